"""Runs validated work on its graph."""

from attnserve_server.dtypes import Array
from attnserve_server.engine import diagnostics
from attnserve_server.engine.work import AttendWork, Wanted


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
