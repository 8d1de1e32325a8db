"""Runs validated token requests through a transformer's graph."""

import numpy as np

from attnserve_server.dtypes import Array
from attnserve_server.engine import diagnostics
from attnserve_server.engine.work import SequenceOutput, TokensWork


def attend_tokens(work: TokensWork) -> list[SequenceOutput]:
    """Run ragged sequences through a transformer, padded to the longest.

    Returns:
        One result per sequence, padding removed.
    """
    transformer = work.model.manifest.transformer
    assert transformer is not None  # validation lets only transformers come here
    lengths = [len(sequence) for sequence in work.sequences]
    shape = (len(lengths), max(lengths))
    input_ids = np.full(shape, transformer.pad_token_id, np.int64)
    attention_mask = np.zeros(shape, np.int64)
    for row, sequence in enumerate(work.sequences):
        input_ids[row, : lengths[row]] = sequence
        attention_mask[row, : lengths[row]] = 1
    results = work.variant.session.run(
        {"input_ids": input_ids, "attention_mask": attention_mask}, needed_outputs(work)
    )
    return [_share(work, results, row, length) for row, length in enumerate(lengths)]


def needed_outputs(work: TokensWork) -> list[str]:
    """The graph outputs that the work needs."""
    wanted = work.wanted
    outputs = ["last_hidden_state"] if wanted.hidden or wanted.pooled else []
    if wanted.weights or wanted.entropy:
        outputs += [f"weights_{layer}" for layer in wanted.layers]
    # A graph cannot be run for nothing; this one's cheapest answer says at least that it ran.
    return outputs or ["last_hidden_state"]


def _share(work: TokensWork, results: dict[str, Array], row: int, length: int) -> SequenceOutput:
    wanted = work.wanted
    weights = None
    if wanted.weights or wanted.entropy:
        weights = np.stack(
            [
                results[f"weights_{layer}"][row, list(wanted.heads), :length, :length]
                for layer in wanted.layers
            ]
        )  # (L, H, S, S)
    hidden = results["last_hidden_state"][row, :length] if wanted.hidden or wanted.pooled else None
    return SequenceOutput(
        hidden=hidden if wanted.hidden else None,
        pooled=_pool(work, hidden) if wanted.pooled and hidden is not None else None,
        weights=weights if wanted.weights else None,
        entropy=diagnostics.entropy(weights) if wanted.entropy and weights is not None else None,
    )


def _pool(work: TokensWork, hidden: Array) -> Array:
    """One vector for a sequence, as its checkpoint does it: [S, E] to [E] FP32."""
    transformer = work.model.manifest.transformer
    assert transformer is not None
    exact = hidden.astype(np.float32)
    pooled = exact[0] if transformer.pooling == "cls" else exact.mean(axis=0, dtype=np.float64)
    if transformer.normalize_pooled:
        pooled = pooled / max(float(np.linalg.norm(pooled)), 1e-12)
    return np.asarray(pooled, np.float32)
