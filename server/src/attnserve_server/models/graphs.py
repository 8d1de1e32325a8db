"""A manifest beside the graphs that it describes: what it says of their tensors must be so.

A manifest that lies would fail at each request; here it fails once, when the model is loaded.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from attnserve_dataplane import Model
from attnserve_proto.manifest import Manifest, ManifestError, TensorEntry, VariantEntry

_UNKNOWN = "DATA_TYPE_UNSPECIFIED"
_PAGED = "paged"

_Ports = Sequence[tuple[str, str, list[int]]]


def check(folder: Path, manifest: Manifest, entries: Sequence[VariantEntry], model: Model) -> None:
    """Compare names, data types and sizes.

    Args:
        folder: of the version, for messages.
        manifest: of the version.
        entries: the variants that were loaded.
        model: the graphs, loaded.

    Raises:
        ManifestError: something differs.
    """
    sizes = _sizes_of(manifest)
    for entry in entries:
        where = f"{folder / entry.file}: variant {entry.name}"
        inputs, outputs = model.ports(entry.name)
        _compare(f"{where}: input", entry.inputs, inputs)
        _compare(f"{where}: output", entry.outputs, outputs)
        if entry.name == _PAGED:
            continue  # its tensors have a layout of their own
        for name, dtype, shape in (*inputs, *outputs):
            if name in sizes:
                _check_sizes(f"{where}: {name}", manifest.dtype, dtype, shape, sizes[name])


def _compare(where: str, entries: Sequence[TensorEntry], ports: _Ports) -> None:
    graph = {name: (dtype, shape) for name, dtype, shape in ports}
    said = {entry.name for entry in entries}
    if said != graph.keys():
        raise ManifestError(
            f"{where}s: the manifest has {', '.join(sorted(said)) or 'none'}; "
            f"the graph has {', '.join(sorted(graph)) or 'none'}"
        )
    for entry in entries:
        dtype, shape = graph[entry.name]
        if dtype not in (_UNKNOWN, entry.dtype):
            raise ManifestError(
                f"{where} {entry.name}: the manifest says {entry.dtype}; the graph has {dtype}"
            )
        if len(shape) != len(entry.shape) or any(
            own >= 0 and own != told for own, told in zip(shape, entry.shape, strict=True)
        ):
            raise ManifestError(
                f"{where} {entry.name}: the manifest says {list(entry.shape)}; "
                f"the graph has {shape}"
            )


def _sizes_of(manifest: Manifest) -> Mapping[str, Mapping[int, int]]:
    """By tensor, dimensions whose sizes follow from the manifest's own numbers."""
    attention = manifest.attention
    if manifest.transformer is not None:
        return {"last_hidden_state": {2: manifest.transformer.hidden_size}}
    if manifest.layer is not None:
        width = manifest.layer.embed_dim
        sizes = {"hidden_states": {2: width}, "output": {2: width}}
        if manifest.layer.context_dim is not None:
            sizes["context"] = {2: manifest.layer.context_dim}
        return sizes
    return {
        "query": {1: attention.num_heads, 3: attention.head_dim},
        "key": {1: attention.num_kv_heads, 3: attention.head_dim},
        "value": {1: attention.num_kv_heads, 3: attention.value_head_dim},
        "output": {1: attention.num_heads, 3: attention.value_head_dim},
    }


def _check_sizes(
    where: str, wanted: str, dtype: str, shape: Sequence[int], sizes: Mapping[int, int]
) -> None:
    if dtype not in (_UNKNOWN, wanted):
        raise ManifestError(f"{where}: the manifest is of {wanted}; the graph has {dtype}")
    for at, size in sizes.items():
        if at >= len(shape) or (shape[at] >= 0 and shape[at] != size):
            raise ManifestError(
                f"{where}: by the manifest's attention, dimension {at} is {size}; "
                f"the graph has {list(shape)}"
            )
