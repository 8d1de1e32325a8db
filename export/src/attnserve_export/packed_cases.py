"""What the variants for packed sequences are verified with: ragged ones, empty ones among them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from attnserve_export.attention.core import AttentionConfig
from attnserve_export.attention.layer import AttentionLayer
from attnserve_export.attention.variants import VariantSpec
from attnserve_export.reference import Scheme, diagnostics_reference, packed_reference
from attnserve_export.verification import (
    Case,
    angle_tolerance,
    core_tolerance,
    log_sum_exp_magnitudes,
)

Array = NDArray[Any]

_TOP_K, _DISTANCES = 3, 9


@dataclass(frozen=True)
class Situation:
    """Lengths of packed sequences, and what is special about them.

    Attributes:
        queries, keys: tokens of each sequence; no keys: as many as queries.
        bias, mask: whether there is one, over all queries and keys.
        prefix_lengths: keys of each sequence that all its queries see; None: none.
        sinks: whether heads have sinks of the request's.
    """

    name: str
    queries: Sequence[int]
    keys: Sequence[int] | None = None
    bias: bool = False
    mask: bool = False
    prefix_lengths: Sequence[int] | None = None
    softcap: float | None = None
    sinks: bool = False


SITUATIONS = (
    Situation("one token", (1,)),
    Situation("one sequence", (37,)),
    Situation("ragged", (33, 1, 130, 8, 57)),
    Situation("empty ones", (0, 5, 0, 0, 21, 0)),
    Situation("tokens by themselves", (1,) * 50),
    Situation("powers of two", (64, 128)),
    Situation("long", (301, 40)),
    Situation("cross", (3, 0, 17, 9, 4), (19, 6, 0, 9, 2)),
    Situation("cross, few queries", (1, 2), (140, 7)),
    Situation("a bias", (9, 14), bias=True),
    Situation("a boolean mask", (40, 0, 150), mask=True),
    Situation("prefixes", (12, 30, 7), prefix_lengths=(4, 30, 0)),
    Situation("a softcap", (11, 6), softcap=20.0),
    Situation("sinks", (33, 0, 12), (140, 3, 0), sinks=True),
)


def packed_cases(
    config: AttentionConfig,
    dtype: str,
    numpy_type: Any,
    spec: VariantSpec,
    generator: np.random.Generator,
    layer: AttentionLayer | None = None,
) -> Iterator[Case]:
    """The cases of a core model, or of a layer.

    Args:
        config: the attention.
        dtype: of the graph.
        numpy_type: the same, NumPy's.
        spec: of the variant.
        generator: of the inputs.
        layer: in float64; None: a core model.
    """
    mask, rotary = config.visibility, config.rotary
    scheme = Scheme(
        mask.left,
        mask.right,
        mask.bottom_right,
        config.slopes,
        rotary_style=None if rotary is None else rotary.style,
        rotary_dims=0 if rotary is None else rotary.dims,
        rotary_base=10_000.0 if rotary is None else rotary.base,
        chunk=mask.chunk,
    )
    for situation in SITUATIONS:
        if not _suits(situation, config, spec, layer):
            continue
        keys = situation.keys or situation.queries
        feeds = _feeds(config, numpy_type, situation, keys, generator)
        if layer is not None:
            feeds |= _projected(layer, numpy_type, feeds, generator)
        softcap = config.softcap if situation.softcap is None else situation.softcap
        output, weights, log_sum_exp = packed_reference(
            feeds["query"],
            feeds["key"],
            feeds["value"],
            feeds["cu_seqlens_q"],
            feeds["cu_seqlens_k"],
            bias=feeds["bias"],
            mask=feeds["mask"],
            prefix_lengths=feeds["prefix_lengths"],
            sinks=feeds["sinks"],
            scheme=scheme,
            scale=config.scale,
            softcap=softcap,
        )
        longest = max(*situation.queries, *keys)
        tolerance = core_tolerance(dtype, longest, _largest_score(feeds, config))
        if rotary is not None:
            tolerance += angle_tolerance(longest)
        if layer is not None:
            output = _merged(layer, output)
            # The projections' sums over E round too.
            tolerance *= max(1.0, float(np.abs(output).max()), layer.config.embed_dim**0.5 / 8)
        dims = {"sequences": len(keys), "query_len": weights.shape[2], "key_len": weights.shape[3]}
        if "output" in spec.outputs:
            made = {"output": output, "weights": weights, "log_sum_exp": log_sum_exp}
            yield Case(
                situation.name,
                dims,
                feeds,
                {name: made[name] for name in spec.outputs},
                tolerance,
                {},
                magnitudes={"log_sum_exp": log_sum_exp_magnitudes(log_sum_exp)},
            )
            continue
        expected = _diagnosed(weights, feeds, mask.bottom_right)
        growth = max(8.0, float(expected["mass_per_key"].max()))
        yield Case(
            situation.name,
            dims,
            feeds,
            expected,
            tolerance * growth,
            {},
            looked_up={"top_k_indices": weights},
        )


def _suits(
    situation: Situation,
    config: AttentionConfig,
    spec: VariantSpec,
    layer: AttentionLayer | None,
) -> bool:
    """Whether a variant can be given what is special about a situation."""
    self_attention = layer is not None and layer.config.context_dim is None
    return not (
        (situation.prefix_lengths is not None and config.mask != "causal")
        or (situation.softcap is not None and "softcap" not in spec.inputs)
        or (situation.sinks and "sinks" not in spec.inputs)
        or (situation.keys is not None and self_attention)
    )


def _projected(
    layer: AttentionLayer,
    numpy_type: Any,
    feeds: dict[str, Array],
    generator: np.random.Generator,
) -> dict[str, Array]:
    """Hidden states in the place of random heads, and the heads that are made of them."""
    lengths = {"hidden_states": int(feeds["cu_seqlens_q"][-1])}
    widths = {"hidden_states": layer.config.embed_dim}
    if layer.config.context_dim is not None:
        lengths["context"] = int(feeds["cu_seqlens_k"][-1])
        widths["context"] = layer.config.context_dim
    given: dict[str, Array] = {
        name: generator.standard_normal((1, length, widths[name])).astype(numpy_type)
        for name, length in lengths.items()
    }
    exact = [torch.from_numpy(array.astype(np.float64)) for array in given.values()]
    with torch.no_grad():
        heads = layer.heads(exact[0], exact[-1])
    names = ("query", "key", "value")
    return given | {name: each.numpy() for name, each in zip(names, heads, strict=True)}


def _merged(layer: AttentionLayer, output: Array) -> Array:
    with torch.no_grad():
        merged: Array = layer.merge(torch.from_numpy(output)).numpy()
    return merged


def _feeds(
    config: AttentionConfig,
    numpy_type: Any,
    situation: Situation,
    keys: Sequence[int],
    generator: np.random.Generator,
) -> dict[str, Array]:
    query_len, key_len = sum(situation.queries), sum(keys)

    def normal(*shape: int) -> Array:
        return generator.standard_normal(shape).astype(numpy_type)

    def starts(lengths: Sequence[int]) -> Array:
        return np.cumsum([0, *lengths], dtype=np.int64)

    bias, mask = np.zeros((1, 1, 1, 1), numpy_type), np.ones((1, 1, 1, 1), bool)
    if situation.bias:
        bias = normal(1, config.num_heads, query_len, key_len)
        bias[generator.random(bias.shape) < 0.2] = -np.inf
    if situation.mask:
        mask = generator.random((1, 1, query_len, key_len)) < 0.6
    prefixes = situation.prefix_lengths or (0,) * len(keys)
    softcap = -1 if situation.softcap is None else situation.softcap
    sinks = np.array(config.sinks or [-np.inf] * config.num_heads, np.float32)
    if situation.sinks:
        sinks = (3 * generator.standard_normal(config.num_heads)).astype(np.float32)
    return {
        "query": normal(1, config.num_heads, query_len, config.head_dim),
        "key": normal(1, config.num_kv_heads, key_len, config.head_dim),
        "value": normal(1, config.num_kv_heads, key_len, config.value_head_dim),
        "cu_seqlens_q": starts(situation.queries),
        "cu_seqlens_k": starts(keys),
        "bias": bias,
        "mask": mask,
        "prefix_lengths": np.array(prefixes, np.int64),
        "softcap": np.array([softcap], np.float32),
        "sinks": sinks,
        "top_k": np.array([min(_TOP_K, key_len)], np.int64),
        "distances": np.array([_DISTANCES], np.int64),
    }


def _diagnosed(weights: Array, feeds: dict[str, Array], bottom_right: bool) -> dict[str, Array]:
    """What the weights say as a whole, but by distance, which is of each sequence."""
    key_len = weights.shape[3]
    expected = diagnostics_reference(
        weights,
        [key_len],
        bottom_right=False,
        top_k=int(feeds["top_k"][0]),
        distances=_DISTANCES,
    )
    queries, keys = feeds["cu_seqlens_q"], feeds["cu_seqlens_k"]
    by_distance = []
    for n in range(len(queries) - 1):
        own = weights[:, :, slice(*queries[n : n + 2]), slice(*keys[n : n + 2])]
        said = diagnostics_reference(
            own, [own.shape[3]], bottom_right=bottom_right, top_k=0, distances=_DISTANCES
        )
        by_distance.append(said["mass_by_distance"][0])
    return {**expected, "mass_by_distance": np.stack(by_distance)}


def _largest_score(feeds: dict[str, Array], config: AttentionConfig) -> float:
    q, k = (feeds[name].astype(np.float64) for name in ("query", "key"))
    groups = config.num_heads // config.num_kv_heads
    scores = q @ np.repeat(k, groups, axis=1).swapaxes(2, 3) * config.scale
    return float(np.abs(scores).max())
