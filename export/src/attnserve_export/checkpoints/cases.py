"""What exported transformers are compared with: Hugging Face's own, eager, in float64."""

import contextlib
import inspect
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

from attnserve_export.checkpoints.modules import (
    ENCODER_HIDDEN,
    HIDDEN,
    TYPES,
    last_hidden_state,
)
from attnserve_export.checkpoints.parameters import Eager
from attnserve_export.checkpoints.plans import (
    CROSS,
    DECODER,
    EMBEDS,
    ENCODER,
    ENCODER_DECODER,
    IDS,
    Plan,
)
from attnserve_export.checkpoints.sources import random_source
from attnserve_export.errors import ExportError
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

# Half of a unit in the last place of numbers from 1 to 2: what an output is rounded by.
_ROUNDED = {"FP32": 0.0, "FP16": 2.0**-11, "BF16": 2.0**-8}

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

# What every export is compared on in PyTorch, before any graph is made.
_FIRST = _Lengths("ragged", (5, 23, 1, 12), (7, 2, 19, 1))

# Of sources that are always as long, only their number counts.
_WHOLE_CASES = (
    _Lengths("one", (1,), (1,)),
    _Lengths("two", (1, 1), (71, 33)),
    _Lengths("three", (1, 1, 1), (7, 1, 23)),
    _Lengths("longest target", (1,), (_LONGEST,)),
)
_FIRST_WHOLE = _Lengths("two", (1, 1), (7, 19))


# Of large models, whose parameters are cast anew for each sequence.
_FEW_CASES = (
    _Lengths("one sequence", (24,), (9,)),
    _Lengths("ragged", (5, 67), (33, 7)),
    _Lengths("long", (160,), (130,)),
)
_FEW_FIRST = _Lengths("ragged", (5, 19), (19, 7))


@dataclass(frozen=True)
class Exact:
    """The reference.

    Attributes:
        model: the checkpoint with eager attention, in float64.
        plan: whose each call of its attention is.
        info: for the manifest.
        dtype: of hidden states in the answer.
        few: whether the model is so large that it is compared on fewer tokens.
        embeds_size: of the numbers of its token embeddings: their standard deviation.
    """

    model: nn.Module | Eager
    plan: Plan
    info: Transformer
    dtype: str = "FP32"
    few: bool = False
    embeds_size: float = 1.0


def first_case(exact: Exact, generator: np.random.Generator) -> Case:
    """One ragged batch, to find out what a model must be given."""
    first = _FEW_FIRST if exact.few else _FIRST
    case = first if exact.plan.source.ragged else _FIRST_WHOLE
    return _of(exact, case, _longest(exact), generator)


def transformer_cases(exact: Exact, generator: np.random.Generator) -> Iterator[Case]:
    """Ragged batches of random ids, or of what the model takes in their place.

    Args:
        exact: the reference.
        generator: of the ids.
    """
    most, plan = _longest(exact), exact.plan
    ragged = _FEW_CASES if exact.few else _CASES
    cases: Sequence[_Lengths] = ragged if plan.source.ragged else _WHOLE_CASES
    if not plan.source.ragged and not plan.has_target:
        cases = cases[:-1]
    for case in cases:
        yield _of(exact, case, most, generator)


def _of(exact: Exact, case: _Lengths, most: int, generator: np.random.Generator) -> Case:
    source, vocab_size = exact.plan.source, exact.info.vocab_size
    if source.name == IDS:
        feeds = _feeds("", case.source, most, vocab_size, generator)
        if exact.plan.token_types:
            shape = feeds[IDS].shape
            feeds[TYPES] = generator.integers(0, exact.plan.token_types, shape)
    else:
        sizes = np.minimum(case.source, most)
        rows = random_source(source, len(sizes), int(sizes.max()), generator)
        if source.name == EMBEDS:
            rows *= exact.embeds_size
        feeds = {source.name: rows}
        if source.ragged:
            feeds["attention_mask"] = _mask_of(sizes)
    if exact.plan.has_target:
        feeds |= _feeds("decoder_", case.target, most, vocab_size, generator)
    return _case(case.name, exact, feeds)


def _longest(exact: Exact) -> int:
    maps = sum(len(attention.layers) * attention.num_heads for attention in exact.info.attentions)
    bound = _LONGEST if exact.plan.table else _LONGEST_WITHOUT_TABLE
    most = min(bound, math.isqrt(_MOST_WEIGHTS // maps))
    return min(most, exact.plan.max_seq_len or most)


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
        f"{prefix}attention_mask": _mask_of(sizes),
    }


def _mask_of(sizes: Array) -> Array:
    """[B, S], 1 where there is a token, 0 where there is padding."""
    return (np.arange(int(sizes.max())) < sizes[:, None]).astype(np.int64)


def _case(name: str, exact: Exact, feeds: Mapping[str, Array]) -> Case:
    plan = exact.plan
    source = _source_mask(plan, feeds)
    target = feeds.get("decoder_attention_mask", source)
    masks = {ENCODER: source, DECODER: target, CROSS: target}
    step = _step(exact, len(source), source.shape[1])
    with _Scores() as scores:
        expected = _alone(exact, feeds, step)
    growth = max(1.0, scores.largest / _LARGE_SCORE)
    # What is made of padding means nothing.
    compared = {}
    for output in expected:
        if output in (HIDDEN, ENCODER_HIDDEN):
            mask = target if output == HIDDEN else source
            compared[output] = mask[:, :, None] > 0
        else:
            attention = output.partition("_")[0]
            rows = masks[attention][:, :: step if attention == ENCODER else 1]
            compared[output] = rows[:, None, :, None] > 0
    dims = {"batch": len(source), "seq_len": source.shape[1]}
    if plan.has_target:
        dims["target_len"] = feeds["decoder_input_ids"].shape[1]
    return Case(
        name,
        dims,
        feeds,
        expected,
        TOLERANCE * growth,
        compared,
        derive=_deriver(exact.info, {ENCODER: source, DECODER: target, CROSS: source}, step),
        magnitudes={
            state: _magnitude(float(np.abs(expected[state]).max()), exact.dtype)
            for state in (HIDDEN, ENCODER_HIDDEN)
            if state in expected
        },
    )


def _magnitude(largest: float, dtype: str) -> float:
    """What the error of hidden states is divided by, before it is compared with the tolerance."""
    return max(1.0, largest / _LARGE) + _ROUNDED[dtype] * largest / TOLERANCE


def _source_mask(plan: Plan, feeds: Mapping[str, Array]) -> Array:
    """[B, S] of the source, which may be of tokens that are never padding."""
    if plan.source.ragged:
        return feeds["attention_mask"]
    return np.ones((len(feeds[plan.source.name]), int(plan.source.tokens or 0)), np.int64)


def _step(exact: Exact, rows: int, seq_len: int) -> int:
    """Of an encoder over what is always as long, every so many queries' weights are compared."""
    if exact.plan.source.ragged or exact.plan.biased:
        return 1
    maps = sum(len(a.layers) * a.num_heads for a in exact.info.attentions if a.name == ENCODER)
    return max(1, -(-maps * rows * seq_len * seq_len // _MOST_WEIGHTS))


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


def _alone(exact: Exact, feeds: Mapping[str, Array], step: int) -> dict[str, Array]:
    """What transformers makes of each sequence, run by itself, in one batch filled up with 0."""
    expected: dict[str, Array] = {}
    plan = exact.plan
    source = _source_mask(plan, feeds)

    def put(name: str, row: int, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
        array = expected.setdefault(name, np.zeros((len(source), *shape)))
        array[row][tuple(slice(size) for size in tensor.shape)] = tensor.numpy()

    target = feeds.get("decoder_attention_mask", source)
    # A decoder alone reads the source itself.
    longest = {ENCODER: source.shape[1], DECODER: target.shape[1], CROSS: source.shape[1]}
    taken = inspect.signature(exact.model.forward).parameters
    for row in range(len(source)):
        given = {}
        for name, array in feeds.items():
            argument = plan.argument(name)
            if argument not in taken:
                continue
            whole = name == plan.source.name and not plan.source.ragged
            length = int((target if name.startswith("decoder_") else source)[row].sum())
            tensor = torch.from_numpy(array[row : row + 1, : None if whole else length])
            given[argument] = tensor.double() if tensor.is_floating_point() else tensor
        try:
            with torch.no_grad(), recording() as calls:
                result = exact.model(**given)
        except Exception as error:  # whatever a model may raise
            sizes = ", ".join(f"{n} of {tensor.shape[1]}" for n, tensor in given.items())
            raise ExportError(
                f"--checkpoint: transformers itself cannot run {sizes} tokens: {error}"
            ) from None
        states = {HIDDEN: last_hidden_state(result)}
        if plan.kind == ENCODER_DECODER:
            states[ENCODER_HIDDEN] = result.encoder_last_hidden_state
        if len(calls) != len(plan.calls):
            raise ExportError(
                f"--checkpoint: eager attention is called {len(calls)} times, and "
                f"{len(plan.calls)} times when it is exported"
            )
        layers = dict.fromkeys(plan.attentions, 0)
        for (attention, _), weights in zip(plan.calls, calls, strict=True):
            query_len = longest[ENCODER if attention == ENCODER else DECODER]
            if attention == ENCODER:
                weights, query_len = weights[:, :, ::step], -(-query_len // step)
            shape = (weights.shape[1], query_len, longest[attention])
            put(f"{attention}_weights_{layers[attention]}", row, weights[0], shape)
            layers[attention] += 1
        for name, tensor in states.items():
            stack = ENCODER if name == ENCODER_HIDDEN else DECODER
            put(name, row, tensor[0], (longest[stack], tensor.shape[2]))
    return expected


@contextlib.contextmanager
def recording() -> Iterator[list[torch.Tensor]]:
    """Keeps the weights of every call of eager attention in a `with` block, in order."""
    import transformers

    interface: Any = transformers.AttentionInterface
    original = interface.get_interface
    calls: list[torch.Tensor] = []

    def get(self: Any, implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
        function = original(self, implementation, default)

        def attend(*args: Any, **kwargs: Any) -> Any:
            output, weights = function(*args, **kwargs)
            calls.append(weights)
            return output, weights

        return attend

    interface.get_interface = get
    try:
        yield calls
    finally:
        interface.get_interface = original


def _deriver(
    info: Transformer, masks: Mapping[str, Array], step: int
) -> Callable[[Mapping[str, Array]], Mapping[str, Array]]:
    """Weights of each layer, of which those of an encoder only of every `step`th query.

    Args:
        info: which attentions there are.
        masks: of the keys of each, [B, Sk].
        step: as it says.
    """

    def derive(outputs: Mapping[str, Array]) -> Mapping[str, Array]:
        derived = {}
        for attention in info.attentions:
            lengths = masks[attention.name].sum(axis=1)
            some = slice(None, None, step if attention.name == ENCODER else 1)
            for layer in range(len(attention.layers)):
                name = f"{attention.name}_weights_{layer}"
                if f"weights_{layer}" in outputs:
                    derived[name] = outputs[f"weights_{layer}"][:, :, some]
                elif f"{attention.name}_query_{layer}" in outputs:
                    derived[name] = _weights(attention, layer, outputs, lengths, some)
        states = {name: outputs[name] for name in (ENCODER_HIDDEN, HIDDEN) if name in outputs}
        return derived | states

    return derive


def _weights(
    attention: TransformerAttention,
    layer: int,
    outputs: Mapping[str, Array],
    lengths: Array,
    some: slice,
) -> Array:
    """The weights that query and key of a layer stand for, in float64: [B, H, Sq, Sk].

    Only some queries' of an attention without a position bias, whose queries see all keys.
    """
    query = outputs[f"{attention.name}_query_{layer}"][:, :, some]
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
        sinks=entry.sinks,
        scheme=Scheme(
            left=None if entry.window is None else entry.window - 1, right=0 if causal else None
        ),
        scale=entry.scale,
    )
    return weights
