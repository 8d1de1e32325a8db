"""ONNX graphs to files, their weights in one file that all variants share."""

import hashlib
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import BinaryIO

import onnx
import torch
from attnserve_proto.manifest import TensorEntry
from onnx import TensorProto, numpy_helper
from onnx.external_data_helper import set_external_data
from torch import Tensor

from attnserve_export.graphs import Graph

DATA_FILE = "model.onnx.data"

# Weights smaller than this stay in the graph: shapes, scalars, biases of small layers.
_INLINE_BYTES = 1024
_ALIGNMENT = 4096

_DTYPES: dict[int, str] = {
    TensorProto.FLOAT: "FP32",
    TensorProto.FLOAT16: "FP16",
    TensorProto.BFLOAT16: "BF16",
    TensorProto.INT64: "INT64",
    TensorProto.INT32: "INT32",
    TensorProto.BOOL: "BOOL",
    TensorProto.UINT8: "UINT8",
}
# What is copied at a time of a tensor that does not lie in memory as it is written.
_ROWS_BYTES = 64 << 20


def file_names(variants: Mapping[str, object]) -> dict[str, str]:
    """The ONNX file of each variant: `model.onnx` for the first."""
    first = next(iter(variants))
    return {n: "model.onnx" if n == first else f"model.{n}.onnx" for n in variants}


def save(folder: Path, variants: Mapping[str, Graph]) -> None:
    """Write all variants; equal weights are stored once, in `model.onnx.data`.

    Parameters that lie outside of their graphs are written one after another: of none that is
    contiguous is there ever a copy.
    """
    path = folder / DATA_FILE
    with path.open("wb") as file:
        data = _Data(file)
        for variant in variants.values():
            for tensor in variant.model.graph.initializer:
                _move(tensor, variant.parameters.get(tensor.name), data)
    if not path.stat().st_size:
        path.unlink()
    for name, file_name in file_names(variants).items():
        (folder / file_name).write_bytes(variants[name].model.SerializeToString())


class _Data:
    """The file of weights, each written once."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._places: dict[Hashable, tuple[int, int]] = {}

    def bytes(self, content: bytes) -> tuple[int, int]:
        """Where some content lies: offset and length."""
        key = hashlib.sha256(content).digest()
        if key not in self._places:
            offset = self._align()
            self._file.write(content)
            self._places[key] = (offset, len(content))
        return self._places[key]

    def tensor(self, tensor: Tensor) -> tuple[int, int]:
        """Where a tensor lies: offset and length."""
        key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if key not in self._places:
            offset = self._align()
            if tensor.is_contiguous():
                self._file.write(_bytes(tensor))
            else:
                rows = max(1, _ROWS_BYTES // max(1, tensor[0].numel() * tensor.element_size()))
                for first in range(0, len(tensor), rows):
                    self._file.write(_bytes(tensor[first : first + rows].contiguous()))
            self._places[key] = (offset, tensor.numel() * tensor.element_size())
        return self._places[key]

    def _align(self) -> int:
        self._file.write(bytes(-self._file.tell() % _ALIGNMENT))
        return self._file.tell()


def _move(entry: TensorProto, apart: Tensor | None, data: _Data) -> None:
    """Move an initializer's content to the file, unless it is small."""
    if apart is not None:
        if apart.numel() * apart.element_size() < _INLINE_BYTES:
            entry.raw_data = bytes(_bytes(apart.contiguous()))
            return
        place = data.tensor(apart)
    else:
        raw = numpy_helper.to_array(entry).tobytes()
        if len(raw) < _INLINE_BYTES:
            return
        place = data.bytes(raw)
        for kind in ("raw_data", "float_data", "int32_data", "int64_data", "double_data"):
            entry.ClearField(kind)
    entry.raw_data = b""  # set_external_data asks for the field
    set_external_data(entry, DATA_FILE, *place)
    entry.ClearField("raw_data")


def _bytes(tensor: Tensor) -> memoryview:
    """Of a contiguous tensor, where it lies."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def tensor_entries(values: "list[onnx.ValueInfoProto]") -> tuple[TensorEntry, ...]:
    """Inputs or outputs of a graph, for the manifest."""
    return tuple(
        TensorEntry(
            value.name,
            _DTYPES[value.type.tensor_type.elem_type],
            tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim),
        )
        for value in values
    )
