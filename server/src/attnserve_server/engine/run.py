"""Runs validated work on its graph."""

import numpy as np

from attnserve_server.dtypes import Array
from attnserve_server.engine import diagnostics
from attnserve_server.engine.work import AttendWork, SequenceOutput, TokensWork, Wanted


def attend(work: AttendWork) -> dict[str, Array]:
    """Compute one attention.

    Returns:
        The arrays asked for, by their field name in `AttendResponse`.
    """
    wanted = work.wanted
    from_weights = wanted.diagnosed and work.diagnosis is None
    outputs = ["output"] if wanted.output else []
    if wanted.weights or from_weights:
        outputs.append("weights")
    results = work.variant.session.run(work.feeds, outputs, work.into) if outputs else {}
    if work.diagnosis is not None:
        results |= work.diagnosis.session.run(work.feeds, _said(wanted))
    elif from_weights:
        results |= _from_weights(work, results["weights"])
        if not wanted.weights:
            del results["weights"]
    for name, array in work.into.items():
        if results[name] is not array:
            array[...] = results[name]
            results[name] = array
    return results


def _said(wanted: Wanted) -> list[str]:
    """The outputs of a diagnosis that are wanted."""
    names = {
        "entropy": wanted.entropy,
        "mass_per_key": wanted.mass_per_key,
        "mass_by_distance": wanted.mass_by_distance,
        "top_k_indices": wanted.top_k,
        "top_k_weights": wanted.top_k,
    }
    return [name for name, asked in names.items() if asked]


def _from_weights(work: AttendWork, weights: Array) -> dict[str, Array]:
    wanted = work.wanted
    results = {}
    if wanted.entropy:
        results["entropy"] = diagnostics.entropy(weights)
    if wanted.top_k:
        indices, heaviest = diagnostics.top_k(weights, wanted.top_k)
        results |= {"top_k_indices": indices, "top_k_weights": heaviest}
    if wanted.mass_per_key:
        results["mass_per_key"] = diagnostics.mass_per_key(weights)
    if wanted.mass_by_distance:
        results["mass_by_distance"] = diagnostics.mass_by_distance(
            weights,
            work.feeds["key_lengths"],
            bottom_right=work.model.manifest.attention.alignment == "bottom-right",
            count=wanted.mass_by_distance,
        )
    return results


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
