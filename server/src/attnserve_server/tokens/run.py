"""Runs validated token requests through a transformer's graph."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from attnserve_dataplane import DataPlane, Request
from attnserve_proto.manifest import Transformer

from attnserve_server import dtypes
from attnserve_server.dtypes import Array
from attnserve_server.settings import usable_cores
from attnserve_server.tokens import heads
from attnserve_server.tokens.work import (
    HeadsWanted,
    SequenceOutput,
    TensorBatch,
    TokensWanted,
    TokensWork,
)

if TYPE_CHECKING:
    from attnserve_dataplane import GivenTensor

# Weights of one sequence from which on threads are worth starting.
_WORTH_THREADS = 1 << 20

_HIDDEN, _ENCODER_HIDDEN = "last_hidden_state", "encoder_last_hidden_state"


@dataclass(frozen=True, slots=True)
class Run:
    """What came of a request; times in seconds of the data plane's clock.

    Attributes:
        outputs: one for each sequence, padding removed.
        arrived, validated, started, ended: when it came, was checked, began to run, had run.
        together: sequences that ran with it, its own included.
        leads: whether it counts for the execution.
    """

    outputs: list[SequenceOutput]
    arrived: float
    validated: float
    started: float
    ended: float
    together: int
    leads: bool


def attend(plane: DataPlane, request: Request, work: TokensWork, timeout: int = 0) -> Run:
    """Run ragged sequences through a transformer, batched with those of other requests.

    Sums over more or fewer tokens at a time may come in another order: what a sequence gets agrees
    with what it would get alone within the tolerances of docs/checkpoints.md, not to the bit.

    Args:
        plane: that runs it.
        request: that asks for it.
        work: checked.
        timeout: microseconds that the request may wait and run; 0: as long as its call.

    Raises:
        attnserve_dataplane.RequestError: it was refused, came too late, or failed.
    """
    transformer = _transformer(work)
    outputs = needed_outputs(work.wanted, transformer, work.variant.outputs)
    source = work.source
    given: GivenTensor | dict[str, Any] = {}
    if isinstance(source, TensorBatch):
        given = given_tensor(source)
    ran = plane.attend_tokens(
        request=request,
        model=work.model.core,
        variant=work.variant.name,
        source=[] if given else source.sequences,
        source_types=source.types or (),
        given=given,
        target=[] if work.target is None else work.target.sequences,
        outputs=outputs,
        priority=work.priority,
        timeout=timeout,
        working_bytes=work.working_bytes,
    )
    arrays = {name: dtypes.of_data_plane(array) for name, array in ran["arrays"].items()}
    return Run(
        [_share(work, transformer, arrays, row) for row in range(work.count)],
        ran["arrived"],
        ran["validated"],
        ran["started"],
        ran["ended"],
        ran["sequences"],
        ran["leads"],
    )


def _transformer(work: TokensWork) -> Transformer:
    transformer = work.model.manifest.transformer
    assert transformer is not None  # validation lets only transformers come here
    return transformer


def given_tensor(batch: TensorBatch) -> "GivenTensor":
    """A batch as the data plane takes it."""
    entry = batch.entry
    return {
        "name": entry.name,
        "array": batch.array,
        "dtype": entry.dtype,
        "lengths": batch.lengths if entry.tokens is None else [],
        "mask_name": "attention_mask",
        "tokens": batch.longest,
    }


def needed_outputs(
    wanted: TokensWanted, transformer: Transformer, given: Collection[str]
) -> list[str]:
    """The graph outputs that a request needs.

    Args:
        wanted: by it.
        transformer: to run.
        given: all outputs of the graph, or graphs: weights come from query and key where these
            are among them, and otherwise, from graphs that give them, as they are.
    """
    outputs = []
    if wanted.hidden:
        outputs.append(_HIDDEN)
    if transformer.has_two_stacks and (wanted.hidden or wanted.pooled):
        outputs.append(_ENCODER_HIDDEN)
    if wanted.pooled and not outputs:
        outputs.append(_HIDDEN)
    if wanted.heads is not None:
        name = wanted.heads.attention.name
        for layer in wanted.heads.layers:
            if f"{name}_query_{layer}" in given:
                outputs += [f"{name}_query_{layer}", f"{name}_key_{layer}"]
            else:
                outputs.append(f"weights_{layer}")
        if wanted.heads.attention.position_bias:
            outputs.append(f"{name}_position_bias")
    # A graph cannot be run for nothing; this one's cheapest answer says at least that it ran.
    return outputs or [_HIDDEN]


def _share(
    work: TokensWork, transformer: Transformer, results: dict[str, Array], row: int
) -> SequenceOutput:
    """The part of the results of one sequence, without padding."""
    wanted = work.wanted
    source_len = work.source.lengths[row]
    target_len = source_len if work.target is None else work.target.lengths[row]
    arrays = {}
    if wanted.hidden:
        arrays["hidden"] = results[_HIDDEN][row, :target_len]
        if transformer.has_two_stacks:
            arrays["encoder_hidden"] = results[_ENCODER_HIDDEN][row, :source_len]
    if wanted.pooled:
        states = results[_ENCODER_HIDDEN if transformer.has_two_stacks else _HIDDEN]
        first = min(work.source.prompt_len, source_len)
        arrays["pooled"] = pool(transformer, states[row, :source_len], first)
    if wanted.heads is not None:
        name = wanted.heads.attention.name
        query_len = source_len if name == "encoder" else target_len
        key_len = target_len if name == "decoder" else source_len
        arrays |= _observe(wanted.heads, results, row, query_len, key_len)
    return SequenceOutput(arrays)


def _observe(
    wanted: HeadsWanted, results: dict[str, Array], row: int, query_len: int, key_len: int
) -> dict[str, Array]:
    """What is wanted of the attention of one sequence, with an axis for the layers first."""

    def observe(layer: int) -> dict[str, Array]:
        found = _blocks(wanted, layer, results, row, query_len, key_len)
        return heads.say(found, len(wanted.heads), query_len, key_len, wanted)

    if len(wanted.layers) * len(wanted.heads) * query_len * key_len < _WORTH_THREADS:
        by_layer = [observe(layer) for layer in wanted.layers]
    else:
        # NumPy lets other threads run while it computes.
        with ThreadPoolExecutor(min(len(wanted.layers), usable_cores())) as pool:
            by_layer = list(pool.map(observe, wanted.layers))
    return {name: np.stack([said[name] for said in by_layer]) for name in wanted.names}


def _blocks(
    wanted: HeadsWanted,
    layer: int,
    results: dict[str, Array],
    row: int,
    query_len: int,
    key_len: int,
) -> Iterable[heads.Block]:
    attention, chosen = wanted.attention, np.asarray(wanted.heads)
    queries = results.get(f"{attention.name}_query_{layer}")
    if queries is None:
        weights = results[f"weights_{layer}"][row, chosen, :query_len, :key_len]
        return [heads.Block(0, 0, weights.astype(np.float32, copy=False))]
    sharing = attention.num_heads // attention.num_kv_heads
    bias = None
    if attention.position_bias:
        # Of the padded batch: distance 0 is at the last query.
        longest = results[f"{attention.name}_position_bias"]
        zero = queries.shape[2] - 1
        bias = longest[chosen, zero - query_len + 1 : zero + key_len].astype(np.float32)
    entry = attention.layers[layer]
    return heads.blocks(
        queries[row, chosen, :query_len].astype(np.float32, copy=False),
        results[f"{attention.name}_key_{layer}"][row, chosen // sharing, :key_len].astype(
            np.float32, copy=False
        ),
        entry.scale,
        heads.Reach(attention.mask == "causal", entry.window),
        bias,
        None if entry.sinks is None else np.asarray(entry.sinks, np.float32)[chosen],
        with_entropy=wanted.entropy or wanted.effective_context,
    )


def pool(transformer: Transformer, hidden: Array, first: int = 0) -> Array:
    """One vector for a sequence, as its checkpoint does it.

    Args:
        transformer: that it went through.
        hidden: [S, E].
        first: tokens at its beginning that do not count.

    Returns:
        [E] FP32. As in sentence-transformers' `Pooling`, and 0 where no token counts.
    """
    rows = hidden[first:].astype(np.float64)
    if not len(rows):
        return np.zeros(hidden.shape[1], np.float32)
    pooled = _POOLINGS[transformer.pooling or "mean"](rows, np.arange(first, len(hidden)) + 1.0)
    if transformer.normalize_pooled:
        pooled = pooled / max(float(np.linalg.norm(pooled)), 1e-12)
    return np.asarray(pooled, np.float32)


# Of rows [S, E] and their positions from 1 on, [S].
_POOLINGS: Mapping[str, Callable[[Array, Array], Array]] = {
    "mean": lambda rows, _: rows.mean(axis=0),
    "cls": lambda rows, _: rows[0],
    "last": lambda rows, _: rows[-1],
    "max": lambda rows, _: rows.max(axis=0),
    "mean_sqrt_len": lambda rows, _: rows.sum(axis=0) / math.sqrt(len(rows)),
    "weightedmean": lambda rows, positions: positions @ rows / positions.sum(),
}
