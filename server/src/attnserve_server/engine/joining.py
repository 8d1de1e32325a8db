"""Several attentions as one: joined along the batch axis, run once, taken apart again.

Requests of unlike lengths are padded to the longest, within a bucket of lengths that bounds the
waste: at most a quarter of the rows. Padded keys are masked by `key_lengths`; padded queries are
computed and dropped. The operator of attnserve-kernels computes each query by itself, block by
block of keys from the first, so that its results are the same to the bit whatever a request was
joined with; ONNX Runtime's own kernels may choose another order of summation for another size,
and then agree within the tolerances of docs/kernels.md.
"""

from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from attnserve_server.dtypes import Array
from attnserve_server.engine import run
from attnserve_server.engine.models import LoadedModel, Variant
from attnserve_server.engine.work import AttendWork, Dims, Wanted

# The axes of each tensor along which requests may differ: the letters of attention.proto.
_AXES: Mapping[str, tuple[str, ...]] = {
    "query": ("B", "H", "Sq", "D"),
    "key": ("B", "Hkv", "Sk", "D"),
    "value": ("B", "Hkv", "Sk", "Dv"),
    "hidden_states": ("B", "Sq", "E"),
    "context": ("B", "Sk", "E"),
    "key_lengths": ("B",),
    "weights": ("B", "H", "Sq", "Sk"),
    "entropy": ("B", "H", "Sq"),
    "top_k_indices": ("B", "H", "Sq", "k"),
    "top_k_weights": ("B", "H", "Sq", "k"),
    "mass_per_key": ("B", "H", "Sk"),
    "mass_by_distance": ("B", "H", "N"),
}
_CORE_OUTPUT: tuple[str, ...] = ("B", "H", "Sq", "Dv")
_LAYER_OUTPUT: tuple[str, ...] = ("B", "Sq", "E")


def bucket(length: int) -> int:
    """The length that a bucket ends with.

    Up to 8 each length is a bucket of its own: decoding steps run by another path of the kernels.
    From there on there are four steps between powers of two, so that the shortest of a bucket is
    padded by less than a quarter of what it is padded to.
    """
    if length <= 8:
        return length
    step = max(2, 1 << ((length - 1).bit_length() - 3))
    return -(-length // step) * step


def kind(
    model: LoadedModel,
    variant: Variant,
    diagnosis: Variant | None,
    wanted: Wanted,
    dims: Dims,
    softcap: float | None,
    *,
    biased: bool,
) -> Hashable:
    """Equal for works that can be joined, and that take alike long for each sequence.

    Args:
        model, variant, diagnosis, wanted, dims: as in `AttendWork`.
        softcap: a softcap other than the model's own, or None.
        biased: whether the request has a bias of its own: such ones are never joined.
    """
    masked = "key_lengths" in variant.session.inputs
    # What is summed over queries, or counts positions from the last one, bears no padded queries.
    exact_keys = wanted.diagnosed or not masked
    exact_queries = exact_keys or model.manifest.attention.alignment == "bottom-right"
    return (
        id(model),
        variant.name,
        diagnosis.name if diagnosis else "",
        wanted,
        softcap,
        biased,
        dims.query_len if exact_queries else bucket(dims.query_len),
        dims.key_len if exact_keys else bucket(dims.key_len),
    )


def attend_together(works: Sequence[AttendWork]) -> list[dict[str, Array]]:
    """Compute attentions of one kind in one run.

    Returns:
        For each work what `run.attend` would return, in order.
    """
    if len(works) == 1:
        return [run.attend(works[0])]
    results = run.attend(_join(works))
    shares, start = [], 0
    for work in works:
        rows = slice(start, start + work.dims.batch)
        shares.append({name: _share(work, name, array[rows]) for name, array in results.items()})
        start = rows.stop
    return shares


def _join(works: Sequence[AttendWork]) -> AttendWork:
    first = works[0]
    dims = Dims(
        sum(work.dims.batch for work in works),
        first.dims.num_heads,
        max(work.dims.query_len for work in works),
        max(work.dims.key_len for work in works),
    )
    feeds = {}
    for name, array in first.feeds.items():
        # Others (a softcap, a count, the bias that is none) are alike in all works of a kind.
        feeds[name] = _joined(works, name, dims) if name in _AXES else array
    return AttendWork(
        first.model,
        first.variant,
        first.diagnosis,
        feeds,
        first.wanted,
        dims,
    )


def _joined(works: Sequence[AttendWork], name: str, dims: Dims) -> Array:
    arrays = [work.feeds[name] for work in works]
    if all(array.shape[1:] == arrays[0].shape[1:] for array in arrays):
        return np.concatenate(arrays)
    sizes = {"B": dims.batch, "Sq": dims.query_len, "Sk": dims.key_len}
    shape = [sizes.get(axis, size) for axis, size in zip(_AXES[name], arrays[0].shape, strict=True)]
    joint = np.zeros(shape, arrays[0].dtype)
    start = 0
    for array in arrays:
        rows = slice(start, start + array.shape[0])
        joint[(rows, *(slice(size) for size in array.shape[1:]))] = array
        start = rows.stop
    return joint


def _share(work: AttendWork, name: str, rows: Array) -> Array:
    """One work's part of a result, without padding, in memory of its own."""
    if name == "output":
        axes = _LAYER_OUTPUT if "hidden_states" in work.feeds else _CORE_OUTPUT
    else:
        axes = _AXES[name]
    sizes = {"Sq": work.dims.query_len, "Sk": work.dims.key_len}
    part = rows[tuple(slice(sizes.get(axis)) for axis in axes)]
    target = work.into.get(name)
    if target is None:
        return np.ascontiguousarray(part)
    target[...] = part
    return target
