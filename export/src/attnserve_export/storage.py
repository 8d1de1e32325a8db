"""ONNX graphs to files, their weights in one file that all variants share."""

from collections.abc import Mapping
from pathlib import Path

import onnx
from attnserve_proto.manifest import TensorEntry
from onnx import TensorProto, numpy_helper
from onnx.external_data_helper import set_external_data

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


def file_names(variants: Mapping[str, onnx.ModelProto]) -> dict[str, str]:
    """The ONNX file of each variant: `model.onnx` for the first."""
    first = next(iter(variants))
    return {n: "model.onnx" if n == first else f"model.{n}.onnx" for n in variants}


def save(folder: Path, variants: Mapping[str, onnx.ModelProto]) -> None:
    """Write all variants; equal weights are stored once, in `model.onnx.data`."""
    offsets: dict[bytes, tuple[int, int]] = {}
    data = bytearray()
    for model in variants.values():
        for tensor in model.graph.initializer:
            raw = numpy_helper.to_array(tensor).tobytes()
            if len(raw) < _INLINE_BYTES:
                continue
            if raw not in offsets:
                data += bytes(-len(data) % _ALIGNMENT)
                offsets[raw] = (len(data), len(raw))
                data += raw
            offset, length = offsets[raw]
            for kind in ("raw_data", "float_data", "int32_data", "int64_data", "double_data"):
                tensor.ClearField(kind)
            tensor.raw_data = b""  # set_external_data asks for the field
            set_external_data(tensor, DATA_FILE, offset, length)
            tensor.ClearField("raw_data")
    if data:
        (folder / DATA_FILE).write_bytes(data)
    for name, file in file_names(variants).items():
        (folder / file).write_bytes(variants[name].SerializeToString())


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
