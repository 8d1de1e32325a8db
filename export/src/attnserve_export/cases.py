"""Inputs to verify attention graphs with: fresh each time, from a seed that is recorded."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from attnserve_export.attention.core import PACKED_CORES, AttentionConfig, PagedCore
from attnserve_export.attention.layer import AttentionLayer
from attnserve_export.attention.variants import DIAGNOSTICS, VariantSpec
from attnserve_export.packed_cases import packed_cases
from attnserve_export.paged_cases import paged_cases
from attnserve_export.reference import (
    Scheme,
    attention_with_log_sum_exp,
    diagnostics_reference,
)
from attnserve_export.verification import (
    Case,
    angle_tolerance,
    core_tolerance,
    log_sum_exp_magnitudes,
    lowest_bias_tolerance,
)

Array = NDArray[Any]

NUMPY: dict[str, Any] = {"FP32": np.float32, "FP16": np.float16, "BF16": ml_dtypes.bfloat16}
_TORCH = {"FP32": torch.float32, "FP16": torch.float16, "BF16": torch.bfloat16}

# Of the cases of diagnostics.
_TOP_K, _DISTANCES = 5, 9


@dataclass(frozen=True)
class Situation:
    """The sizes of one case, and what is special about it.

    Attributes:
        bias: the full dimensions that a bias has, of b, h, q and k; None: no bias.
        mask: likewise of a boolean mask.
        prefix_lengths: keys of each sequence that all queries see; None: none.
        lowest: whether the bias of the first query is the lowest finite number for all keys.
        sinks: whether heads have sinks of the request's, some heads none.
    """

    name: str
    batch: int
    query_len: int
    key_len: int
    key_lengths: tuple[int, ...] | None = None
    bias: str | None = None
    lowest: bool = False
    magnitude: float = 1.0
    softcap: float = 20.0
    mask: str | None = None
    prefix_lengths: tuple[int, ...] | None = None
    sinks: bool | None = None

    def suits(self, spec: VariantSpec) -> bool:
        """Whether a variant takes what is special about it."""
        special = {
            "bias": self.bias,
            "mask": self.mask,
            "prefix_lengths": self.prefix_lengths,
            "sinks": self.sinks,
        }
        return all(name in spec.inputs for name, given in special.items() if given is not None)


SITUATIONS = (
    Situation("length 1", 1, 1, 1),
    Situation("one query", 2, 1, 37),
    Situation("one key", 1, 13, 1),
    Situation("odd lengths", 1, 7, 7),
    Situation("no multiple of 8", 2, 67, 67),
    Situation("power of two", 1, 128, 128),
    Situation("more queries than keys", 1, 45, 19),
    Situation("more keys than queries", 1, 19, 45),
    Situation("ragged", 4, 33, 33, (33, 1, 17, 8)),
    Situation("a row fully masked", 3, 21, 21, (21, 0, 5)),
    Situation("large scores", 1, 50, 50, magnitude=6.0),
    Situation("full bias", 2, 23, 29, (29, 11), bias="bhqk"),
    Situation("bias over keys", 2, 23, 29, bias="k"),
    Situation("bias per head", 1, 9, 14, bias="hqk"),
    Situation("bias per sequence", 3, 6, 6, (6, 2, 0), bias="bk"),
    Situation("boolean mask", 2, 140, 140, (140, 90), mask="bqk"),
    Situation("boolean mask over keys", 3, 6, 6, (6, 2, 0), mask="bk"),
    Situation("prefix", 4, 53, 53, (53, 20, 0, 5), prefix_lengths=(7, 30, 0, 5)),
    Situation("lowest bias", 2, 11, 11, (11, 4), bias="bqk", lowest=True),
    Situation("sinks", 3, 37, 37, (37, 0, 5), sinks=True),
    Situation("sinks and a bias", 2, 5, 140, (140, 3), bias="hk", sinks=True),
    Situation("long", 1, 301, 301),
)


def scheme_of(config: AttentionConfig) -> Scheme:
    """A config as the reference has it."""
    mask, rotary = config.visibility, config.rotary
    scheme = Scheme(mask.left, mask.right, mask.bottom_right, config.slopes, chunk=mask.chunk)
    if rotary is None:
        return scheme
    return replace(
        scheme, rotary_style=rotary.style, rotary_dims=rotary.dims, rotary_base=rotary.base
    )


def core_cases(
    config: AttentionConfig, dtype: str, spec: VariantSpec, generator: np.random.Generator
) -> Iterator[Case]:
    """The cases of one variant of a core model."""
    if spec.core is PagedCore:
        yield from paged_cases(config, dtype, NUMPY[dtype], generator)
        return
    if spec.core in PACKED_CORES:
        yield from packed_cases(config, dtype, NUMPY[dtype], spec, generator)
        return
    for situation in SITUATIONS:
        if not situation.suits(spec):
            continue
        feeds = core_feeds(config, dtype, situation, generator)
        softcap = config.softcap
        if "softcap" in spec.inputs:
            # `native` has the config's own where the input is negative.
            own = spec.native and not situation.bias
            softcap = config.softcap if own else situation.softcap
            feeds["softcap"] = np.array([-1 if own else softcap], np.float32)
        output, weights, log_sum_exp = attention_with_log_sum_exp(
            feeds["query"],
            feeds["key"],
            feeds["value"],
            key_lengths=feeds["key_lengths"],
            bias=feeds["bias"],
            mask=feeds["mask"],
            prefix_lengths=feeds["prefix_lengths"],
            sinks=feeds["sinks"],
            scheme=scheme_of(config),
            scale=config.scale,
            softcap=softcap,
        )
        tolerance = _tolerance(
            config, dtype, situation, _largest_score(feeds["query"], feeds["key"], config)
        )
        if spec.outputs == DIAGNOSTICS:
            yield _diagnosed(situation, feeds, weights, config, tolerance)
        else:
            expected = {"output": output, "weights": weights, "log_sum_exp": log_sum_exp}
            yield _attended(situation, feeds, expected, tolerance)


def _attended(
    situation: Situation,
    feeds: Mapping[str, Array],
    expected: Mapping[str, Array],
    tolerance: float,
) -> Case:
    """A case of what attention gives."""
    magnitudes = {"log_sum_exp": log_sum_exp_magnitudes(expected["log_sum_exp"])}
    return Case(
        situation.name,
        _dims(situation),
        feeds,
        expected,
        tolerance,
        {},
        magnitudes=magnitudes,
    )


def _tolerance(
    config: AttentionConfig, dtype: str, situation: Situation, largest_score: float
) -> float:
    tolerance = core_tolerance(dtype, situation.key_len, largest_score)
    if situation.lowest:
        tolerance += lowest_bias_tolerance(dtype)
    if config.rotary is not None:
        tolerance += angle_tolerance(max(situation.query_len, situation.key_len))
    return tolerance


def _diagnosed(
    situation: Situation,
    feeds: dict[str, Array],
    weights: Array,
    config: AttentionConfig,
    tolerance: float,
) -> Case:
    """A case of what weights say."""
    top_k = min(_TOP_K, situation.key_len)
    expected = diagnostics_reference(
        weights,
        feeds["key_lengths"],
        bottom_right=config.visibility.bottom_right,
        top_k=top_k,
        distances=_DISTANCES,
    )
    more = {"top_k": np.array([top_k]), "distances": np.array([_DISTANCES])}
    # Masses are sums over the queries, entropies over the keys.
    growth = max(8.0, float(expected["mass_per_key"].max()))
    return Case(
        situation.name,
        _dims(situation),
        feeds | more,
        expected,
        tolerance * growth,
        {},
        looked_up={"top_k_indices": weights},
    )


def core_feeds(
    config: AttentionConfig, dtype: str, situation: Situation, generator: np.random.Generator
) -> dict[str, Array]:
    """Random inputs of a core model; bias zero where the situation has none."""
    batch, key_len = situation.batch, situation.key_len

    def normal(*shape: int) -> Array:
        return generator.standard_normal(shape).astype(NUMPY[dtype])

    query = normal(batch, config.num_heads, situation.query_len, config.head_dim)
    key = normal(batch, config.num_kv_heads, key_len, config.head_dim)
    value = normal(batch, config.num_kv_heads, key_len, config.value_head_dim)
    lengths = np.array(situation.key_lengths or (key_len,) * batch, np.int64)
    # Nothing that is padding may reach a result, no number least of all.
    for row, length in enumerate(lengths):
        key[row, :, length:], value[row, :, length:] = np.nan, np.inf
    return {
        "query": query * NUMPY[dtype](situation.magnitude),
        "key": key,
        "value": value,
        "key_lengths": lengths,
        **mask_feeds(situation, config, dtype, generator),
    }


def mask_feeds(
    situation: Situation,
    config: AttentionConfig,
    dtype: str,
    generator: np.random.Generator,
) -> dict[str, Array]:
    """A random bias, a fifth of it -inf, and a mask of the situation's dimensions; prefixes; sinks.

    What the situation has not is zero, true and zero, and the config's own sinks. The lowest finite
    number is a bias like any other: a row of it weighs all keys alike.
    """
    full = {
        "b": situation.batch,
        "h": config.num_heads,
        "q": situation.query_len,
        "k": situation.key_len,
    }

    def shape(axes: str | None) -> tuple[int, ...]:
        return tuple(size if axis in (axes or "") else 1 for axis, size in full.items())

    bias: Array = np.zeros(shape(situation.bias), NUMPY[dtype])
    if situation.bias is not None:
        bias = generator.standard_normal(bias.shape).astype(NUMPY[dtype])
        bias[generator.random(bias.shape) < 0.2] = -np.inf
        if situation.lowest:
            bias[:, :, 0] = torch.finfo(_TORCH[dtype]).min
    mask = np.ones(shape(situation.mask), bool)
    if situation.mask is not None:
        mask = generator.random(mask.shape) < 0.6
        # A block of keys that some queries do not see at all, and queries that see nothing.
        mask[..., : mask.shape[2] // 2, :128] = False
    prefixes = situation.prefix_lengths or (0,) * situation.batch
    sinks = sinks_of(config)
    if situation.sinks:
        sinks = (3 * generator.standard_normal(config.num_heads)).astype(np.float32)
        sinks[1::3] = -np.inf
    return {
        "bias": bias,
        "mask": mask,
        "prefix_lengths": np.array(prefixes, np.int64),
        "sinks": sinks,
    }


def sinks_of(config: AttentionConfig) -> Array:
    """What a graph with an input for sinks is fed if a request brings none, [H] FP32."""
    return np.array(config.sinks or [-np.inf] * config.num_heads, np.float32)


def layer_cases(
    layer: AttentionLayer,
    original: nn.Module,
    dtype: str,
    spec: VariantSpec,
    generator: np.random.Generator,
) -> Iterator[Case]:
    """The cases of one variant of a layer model.

    Args:
        layer: what was exported, in the dtype of the export.
        original: the module that it stands for, with the same parameters in float64; where it
            is a `torch.nn.MultiheadAttention`, the reference is checked against it.
        dtype: of the export.
        spec: of the variant.
        generator: of the inputs.
    """
    config = layer.config
    attention = config.attention
    if spec.core is PagedCore:
        yield from paged_cases(attention, dtype, NUMPY[dtype], generator, _exact(layer))
        return
    if spec.core in PACKED_CORES:
        yield from packed_cases(attention, dtype, NUMPY[dtype], spec, generator, _exact(layer))
        return
    for situation in SITUATIONS:
        if not situation.suits(spec):
            continue
        if config.context_dim is None and situation.query_len != situation.key_len:
            continue
        shape = (situation.batch, situation.query_len, config.embed_dim)
        hidden = generator.standard_normal(shape).astype(NUMPY[dtype])
        feeds = {
            "hidden_states": hidden,
            "key_lengths": np.array(
                situation.key_lengths or (situation.key_len,) * situation.batch, np.int64
            ),
            **mask_feeds(situation, attention, dtype, generator),
        }
        if config.context_dim is not None:
            context = (situation.batch, situation.key_len, config.context_dim)
            feeds["context"] = generator.standard_normal(context).astype(NUMPY[dtype])
        output, weights, log_sum_exp, largest = _layer_reference(original, layer, feeds)
        # The projections' sums over E round too.
        growth = max(1.0, float(np.abs(output).max()), config.embed_dim**0.5 / 8)
        tolerance = _tolerance(attention, dtype, situation, largest) * growth
        if spec.outputs == DIAGNOSTICS:
            yield _diagnosed(situation, feeds, weights, attention, tolerance)
        else:
            expected = {"output": output, "weights": weights, "log_sum_exp": log_sum_exp}
            yield _attended(situation, feeds, expected, tolerance)


def _layer_reference(
    original: nn.Module, layer: AttentionLayer, feeds: Mapping[str, Array]
) -> tuple[Array, Array, Array, float]:
    """Output, weights, log-sum-exp and the largest score of a layer, in float64."""
    attention = layer.config.attention
    given = feeds["hidden_states"]
    hidden = torch.from_numpy(given.astype(np.float64))
    context = torch.from_numpy(feeds.get("context", given).astype(np.float64))
    exact = _exact(layer)
    with torch.no_grad():
        query, key, value = (heads.numpy() for heads in exact.heads(hidden, context))
        output, weights, log_sum_exp = attention_with_log_sum_exp(
            query,
            key,
            value,
            key_lengths=feeds["key_lengths"],
            bias=feeds["bias"],
            mask=feeds["mask"],
            prefix_lengths=feeds["prefix_lengths"],
            sinks=feeds["sinks"],
            scheme=scheme_of(attention),
            scale=attention.scale,
            softcap=attention.softcap,
        )
        merged = exact.merge(torch.from_numpy(output)).numpy()
        if isinstance(original, nn.MultiheadAttention):
            _check_multihead(original, hidden, context, feeds, attention, merged, weights)
    return merged, weights, log_sum_exp, _largest_score(query, key, attention)


def _exact(layer: AttentionLayer) -> AttentionLayer:
    """A copy in float64 of the very parameters that were exported."""
    exact = AttentionLayer(layer.config).double()
    exact.load_state_dict(layer.state_dict())
    return exact


def _check_multihead(
    original: nn.MultiheadAttention,
    hidden: torch.Tensor,
    context: torch.Tensor,
    feeds: Mapping[str, Array],
    attention: AttentionConfig,
    output: Array,
    weights: Array,
) -> None:
    """The reference must be what PyTorch's own module gives, where that gives numbers."""
    query_len, key_len = hidden.shape[1], context.shape[1]
    additive = torch.zeros(weights.shape, dtype=torch.float64)
    additive += torch.from_numpy(feeds["bias"].astype(np.float64))
    padding = torch.arange(key_len)[None] >= torch.from_numpy(feeds["key_lengths"])[:, None]
    additive.masked_fill_(padding[:, None, None, :], -torch.inf)
    if attention.mask == "causal":
        later = torch.ones(query_len, key_len, dtype=torch.bool).triu(1)
        prefixes = torch.from_numpy(feeds["prefix_lengths"])
        prefix = torch.arange(key_len) < prefixes[:, None, None, None]
        additive.masked_fill_(later & ~prefix, -torch.inf)
    additive.masked_fill_(torch.from_numpy(~feeds["mask"]), -torch.inf)
    expected, expected_weights = original(
        hidden,
        context,
        context,
        attn_mask=additive.flatten(0, 1),
        need_weights=True,
        average_attn_weights=False,
    )
    seen = ~torch.isinf(additive).all(dim=-1)  # (B, H, Sq)
    whole = seen.all(dim=1).numpy()[..., None]
    scale = max(1.0, float(np.abs(output).max()))
    exported = max(
        float(np.abs(np.where(whole, output - expected.numpy(), 0)).max()) / scale,
        float(
            np.abs(np.where(seen.numpy()[..., None], weights - expected_weights.numpy(), 0)).max()
        ),
    )
    if not exported <= 1e-9:
        raise AssertionError(f"the reference differs from torch.nn.MultiheadAttention: {exported}")


def _largest_score(query: Array, key: Array, config: AttentionConfig) -> float:
    q, k = np.asarray(query, np.float64), np.asarray(key, np.float64)
    groups = config.num_heads // config.num_kv_heads
    scores = q @ np.repeat(k, groups, axis=1).swapaxes(2, 3) * config.scale
    return float(np.nanmax(np.abs(scores)))  # padding is no number


def _dims(situation: Situation) -> dict[str, int]:
    return {
        "batch": situation.batch,
        "query_len": situation.query_len,
        "key_len": situation.key_len,
    }
