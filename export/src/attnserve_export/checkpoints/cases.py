"""What exported transformers are compared with: Hugging Face's own, eager, in float64."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from attnserve_proto.manifest import Transformer, TransformerAttention
from numpy.typing import NDArray
from torch import nn
from torch.overrides import TorchFunctionMode

from attnserve_export.checkpoints.checkpoint import Checkpoint
from attnserve_export.checkpoints.families import DECODER, ENCODER, ENCODER_DECODER
from attnserve_export.checkpoints.modules import ENCODER_HIDDEN, HIDDEN
from attnserve_export.checkpoints.tracing import CROSS
from attnserve_export.reference import Scheme, attention_reference
from attnserve_export.verification import Case

Array = NDArray[Any]

# Largest absolute error of attention weights and hidden states, FP32. Hidden states of which some
# are larger than 10 may be off by as much more; so may all where scores are larger than 64, since
# exp turns an absolute error of a score into a relative one of a weight.
TOLERANCE = 1e-4
_LARGE, _LARGE_SCORE = 10.0, 64.0

# No case is longer than the model's table of positions; where there is none, nothing changes from
# some length on. Nor has any more weights than this in all layers and heads together.
_LONGEST, _LONGEST_WITHOUT_TABLE = 1024, 320
_MOST_WEIGHTS = 1 << 26

# Scores of this size are masked ones.
_MASKED = 1e30


@dataclass(frozen=True)
class _Lengths:
    """Of the sequences of one case, and of its targets."""

    name: str
    source: tuple[int, ...]
    target: tuple[int, ...]


_CASES = (
    _Lengths("length 1", (1,), (1,)),
    _Lengths("one sequence", (24,), (9,)),
    _Lengths("no multiple of 8", (67,), (71,)),
    _Lengths("ragged", (5, 31, 1, 18), (7, 2, 33, 1)),
    _Lengths("two alike", (13, 13), (6, 6)),
    _Lengths("long", (128, 77), (40, 130)),
    _Lengths("longest", (_LONGEST,), (_LONGEST,)),
)

# What transformers calls the weights of each attention.
_MAPS: Mapping[str, Mapping[str, str]] = {
    ENCODER: {ENCODER: "attentions"},
    DECODER: {DECODER: "attentions"},
    ENCODER_DECODER: {
        ENCODER: "encoder_attentions",
        DECODER: "decoder_attentions",
        CROSS: "cross_attentions",
    },
}


def transformer_cases(
    exact: nn.Module, checkpoint: Checkpoint, info: Transformer, generator: np.random.Generator
) -> Iterator[Case]:
    """Ragged batches of random ids.

    Args:
        exact: the checkpoint with eager attention, in float64.
        checkpoint: what was exported.
        info: for the manifest.
        generator: of the ids.
    """
    most = _longest(checkpoint, info)
    for case in _CASES:
        feeds = _feeds("", case.source, most, info.vocab_size, generator)
        if checkpoint.family.kind == ENCODER_DECODER:
            feeds |= _feeds("decoder_", case.target, most, info.vocab_size, generator)
        yield _case(case.name, exact, checkpoint.family.kind, info, feeds)


def _longest(checkpoint: Checkpoint, info: Transformer) -> int:
    maps = sum(len(attention.layers) * attention.num_heads for attention in info.attentions)
    bound = _LONGEST if checkpoint.family.positions_in_table else _LONGEST_WITHOUT_TABLE
    most = min(bound, math.isqrt(_MOST_WEIGHTS // maps))
    return min(most, checkpoint.max_seq_len or most)


def _feeds(
    prefix: str,
    lengths: Sequence[int],
    most: int,
    vocab_size: int,
    generator: np.random.Generator,
) -> dict[str, Array]:
    sizes = np.minimum(lengths, most)
    longest = int(sizes.max())
    return {
        f"{prefix}input_ids": generator.integers(0, vocab_size, (len(lengths), longest)),
        f"{prefix}attention_mask": (np.arange(longest) < sizes[:, None]).astype(np.int64),
    }


def _case(
    name: str, exact: nn.Module, kind: str, info: Transformer, feeds: Mapping[str, Array]
) -> Case:
    queries = "decoder_attention_mask" if kind == ENCODER_DECODER else "attention_mask"
    masks = {ENCODER: feeds["attention_mask"], DECODER: feeds[queries], CROSS: feeds[queries]}
    with _Scores() as scores:
        expected = _alone(exact, kind, feeds)
    growth = max(1.0, scores.largest / _LARGE_SCORE)
    # What is made of padding means nothing.
    compared = {}
    for output in expected:
        if output in (HIDDEN, ENCODER_HIDDEN):
            mask = feeds[queries] if output == HIDDEN else feeds["attention_mask"]
            compared[output] = mask[:, :, None] > 0
        else:
            compared[output] = masks[output.partition("_")[0]][:, None, :, None] > 0
    dims = {"batch": len(feeds["input_ids"]), "seq_len": feeds["input_ids"].shape[1]}
    if kind == ENCODER_DECODER:
        dims["target_len"] = feeds["decoder_input_ids"].shape[1]
    return Case(
        name,
        dims,
        feeds,
        expected,
        TOLERANCE * growth,
        compared,
        derive=_deriver(info, feeds),
        magnitudes={
            state: max(1.0, float(np.abs(expected[state]).max()) / _LARGE)
            for state in (HIDDEN, ENCODER_HIDDEN)
            if state in expected
        },
    )


class _Scores(TorchFunctionMode):
    """Finds the largest score that reaches a softmax while it is entered.

    Attributes:
        largest: by magnitude, of what is not masked.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0.0

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function is nn.functional.softmax:
            sizes = args[0].abs()
            # Masks are the lowest numbers of some type, to which scores were added.
            self.largest = max(self.largest, float(torch.where(sizes < _MASKED, sizes, 0).max()))
        return function(*args, **(kwargs or {}))


def _alone(exact: nn.Module, kind: str, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """What transformers makes of each sequence, run by itself, in one batch filled up with 0."""
    expected: dict[str, Array] = {}

    def put(name: str, row: int, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
        array = expected.setdefault(name, np.zeros((len(feeds["input_ids"]), *shape)))
        array[row][tuple(slice(size) for size in tensor.shape)] = tensor.numpy()

    longest = _by_stack(kind, {n: array.shape[1] for n, array in feeds.items()})
    for row in range(len(feeds["input_ids"])):
        lengths = {
            n: int(feeds[n.replace("input_ids", "attention_mask")][row].sum()) for n in feeds
        }
        ids = {
            name: torch.from_numpy(array[row : row + 1, : lengths[name]])
            for name, array in feeds.items()
            if name.endswith("input_ids")
        }
        with torch.no_grad():
            result = exact(**ids, output_attentions=True)
        states = {HIDDEN: result.last_hidden_state}
        if kind == ENCODER_DECODER:
            states[ENCODER_HIDDEN] = result.encoder_last_hidden_state
        for name, tensor in states.items():
            stack = ENCODER if name == ENCODER_HIDDEN or kind == ENCODER else DECODER
            put(name, row, tensor[0], (longest[stack], tensor.shape[2]))
        for attention, field in _MAPS[kind].items():
            query_len = longest[ENCODER if attention == ENCODER else DECODER]
            key_len = longest[DECODER if attention == DECODER else ENCODER]
            for layer, weights in enumerate(getattr(result, field)):
                shape = (weights.shape[1], query_len, key_len)
                put(f"{attention}_weights_{layer}", row, weights[0], shape)
    return expected


def _by_stack(kind: str, by_input: Mapping[str, int]) -> dict[str, int]:
    """What is known of inputs, by the stack that reads them."""
    if kind != ENCODER_DECODER:
        return {kind: by_input["input_ids"]}
    return {ENCODER: by_input["input_ids"], DECODER: by_input["decoder_input_ids"]}


def _deriver(
    info: Transformer, feeds: Mapping[str, Array]
) -> Callable[[Mapping[str, Array]], Mapping[str, Array]]:
    def derive(outputs: Mapping[str, Array]) -> Mapping[str, Array]:
        derived = {name: outputs[name] for name in (HIDDEN, ENCODER_HIDDEN) if name in outputs}
        for attention in info.attentions:
            keys = "decoder_attention_mask" if attention.name == DECODER else "attention_mask"
            mask = feeds.get(keys, feeds["attention_mask"])
            for layer in range(len(attention.layers)):
                name = f"{attention.name}_weights_{layer}"
                derived[name] = _weights(attention, layer, outputs, mask.sum(axis=1))
        return derived

    return derive


def _weights(
    attention: TransformerAttention, layer: int, outputs: Mapping[str, Array], lengths: Array
) -> Array:
    """The weights that query and key of a layer stand for, in float64: [B, H, Sq, Sk]."""
    query = outputs[f"{attention.name}_query_{layer}"]
    key = outputs[f"{attention.name}_key_{layer}"]
    query_len, key_len = query.shape[2], key.shape[2]
    bias = None
    if attention.position_bias:
        apart = np.arange(key_len)[None, :] - np.arange(query_len)[:, None] + query_len - 1
        bias = outputs[f"{attention.name}_position_bias"][:, apart]
    entry = attention.layers[layer]
    causal = attention.mask == "causal"
    _, weights = attention_reference(
        query,
        key,
        np.zeros((*key.shape[:3], 1)),
        key_lengths=lengths,
        bias=bias,
        scheme=Scheme(
            left=None if entry.window is None else entry.window - 1, right=0 if causal else None
        ),
        scale=entry.scale,
    )
    return weights
