"""Runs validated token requests through a transformer's graph."""

from collections.abc import Collection, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from attnserve_server.dtypes import Array
from attnserve_server.engine import heads
from attnserve_server.engine.joining import bucket
from attnserve_server.engine.work import (
    HeadsWanted,
    SequenceOutput,
    TokenBatch,
    TokensWanted,
    TokensWork,
)
from attnserve_server.repository.transformer import Transformer
from attnserve_server.settings import usable_cores

# Weights of one sequence from which on threads are worth starting.
_WORTH_THREADS = 1 << 20

_HIDDEN, _ENCODER_HIDDEN = "last_hidden_state", "encoder_last_hidden_state"


def attend_tokens_together(works: Sequence[TokensWork]) -> list[list[SequenceOutput]]:
    """Run ragged sequences through a transformer, those of all works at once, padded.

    Sums over more or fewer tokens at a time may come in another order: what a sequence gets agrees
    with what it would get alone within the tolerances of docs/checkpoints.md, not to the bit.

    Args:
        works: of one `kind`.

    Returns:
        For each work one result per sequence, padding removed.
    """
    first = works[0]
    transformer = _transformer(first)
    feeds = _feeds("", [work.source for work in works], transformer.pad_token_id)
    targets = [work.target for work in works if work.target is not None]
    if targets:
        feeds |= _feeds("decoder_", targets, transformer.pad_token_id)
    outputs = needed_outputs(first.wanted, transformer, first.variant.session.outputs)
    results = first.variant.session.run(feeds, outputs)
    shares, start = [], 0
    for work in works:
        rows = range(len(work.sequences))
        shares.append([_share(work, transformer, results, start, row) for row in rows])
        start += len(rows)
    return shares


def kind(work: TokensWork) -> Hashable:
    """Equal for works that can run together, and take alike long for each sequence."""
    outputs = needed_outputs(work.wanted, _transformer(work), work.variant.session.outputs)
    return (
        id(work.model),
        work.variant.name,
        tuple(outputs),
        bucket(work.source.longest),
        None if work.target is None else bucket(work.target.longest),
    )


def hidden_bytes(work: TokensWork) -> int:
    """Of the hidden states of one layer, padded: what running together is measured by."""
    tokens = work.source.longest + (work.target.longest if work.target is not None else 0)
    return 4 * len(work.sequences) * tokens * _transformer(work).hidden_size


def _transformer(work: TokensWork) -> Transformer:
    transformer = work.model.manifest.transformer
    assert transformer is not None  # validation lets only transformers come here
    return transformer


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
    if transformer.has_target and (wanted.hidden or wanted.pooled):
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


def _feeds(prefix: str, batches: Sequence[TokenBatch], pad_token_id: int) -> dict[str, Array]:
    sequences = [sequence for batch in batches for sequence in batch.sequences]
    shape = (len(sequences), max(batch.longest for batch in batches))
    input_ids = np.full(shape, pad_token_id, np.int64)
    attention_mask = np.zeros(shape, np.int64)
    for row, sequence in enumerate(sequences):
        input_ids[row, : len(sequence)] = sequence
        attention_mask[row, : len(sequence)] = 1
    return {f"{prefix}input_ids": input_ids, f"{prefix}attention_mask": attention_mask}


def _share(
    work: TokensWork, transformer: Transformer, results: dict[str, Array], start: int, which: int
) -> SequenceOutput:
    """The part of the results of one sequence, `which` of a work whose rows begin at `start`."""
    wanted, row = work.wanted, start + which
    source_len = len(work.source.sequences[which])
    target_len = source_len if work.target is None else len(work.target.sequences[which])
    arrays = {}
    if wanted.hidden:
        arrays["hidden"] = results[_HIDDEN][row, :target_len]
        if transformer.has_target:
            arrays["encoder_hidden"] = results[_ENCODER_HIDDEN][row, :source_len]
    if wanted.pooled:
        states = results[_ENCODER_HIDDEN if transformer.has_target else _HIDDEN]
        arrays["pooled"] = _pool(transformer, states[row, :source_len])
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
        return [heads.Block(0, 0, weights)]
    sharing = attention.num_heads // attention.num_kv_heads
    bias = None
    if attention.position_bias:
        # Of the padded batch: distance 0 is at the last query.
        longest = results[f"{attention.name}_position_bias"]
        zero = queries.shape[2] - 1
        bias = longest[chosen, zero - query_len + 1 : zero + key_len]
    entry = attention.layers[layer]
    return heads.blocks(
        queries[row, chosen, :query_len],
        results[f"{attention.name}_key_{layer}"][row, chosen // sharing, :key_len],
        entry.scale,
        heads.Reach(attention.mask == "causal", entry.window),
        bias,
        with_entropy=wanted.entropy or wanted.effective_context,
    )


def _pool(transformer: Transformer, hidden: Array) -> Array:
    """One vector for a sequence, as its checkpoint does it: [S, E] to [E] FP32."""
    exact = hidden.astype(np.float32)
    if transformer.pooling == "mean":
        pooled = exact.mean(axis=0, dtype=np.float64)
    else:
        pooled = exact[0 if transformer.pooling == "cls" else -1]
    if transformer.normalize_pooled:
        pooled = pooled / max(float(np.linalg.norm(pooled)), 1e-12)
    return np.asarray(pooled, np.float32)
