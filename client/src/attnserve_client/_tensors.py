"""NumPy arrays to `Tensor` messages and back."""

from typing import Any

import numpy as np
from attnserve_proto import attention_pb2 as pb

from attnserve_client._results import Array

try:
    import ml_dtypes
except ImportError:  # pip install attnserve-client[bf16]
    ml_dtypes = None  # type: ignore[assignment]

_DTYPES: "dict[np.dtype[Any], pb.DataType.ValueType]" = {
    np.dtype(np.float32): pb.FP32,
    np.dtype(np.float16): pb.FP16,
    np.dtype(np.int64): pb.INT64,
    np.dtype(np.int32): pb.INT32,
    np.dtype(np.bool_): pb.BOOL,
}
if ml_dtypes is not None:
    _DTYPES[np.dtype(ml_dtypes.bfloat16)] = pb.BF16
_NUMPY = {number: dtype for dtype, number in _DTYPES.items()}


def as_array(value: Any, name: str) -> Array:
    """Take anything that NumPy or DLPack can read: arrays, lists, CPU tensors of any library.

    float64 becomes float32: no model computes in float64.

    Raises:
        TypeError: it cannot be read, or its dtype has no place on the wire; says which argument.
    """
    if type(value) is np.ndarray and value.dtype in _DTYPES and value.flags.c_contiguous:
        return value if value.ndim > 0 else value.reshape(1)
    try:
        array = np.asarray(value)
    except Exception as error:  # whatever the foreign library raises
        try:
            array = np.from_dlpack(value)
        except Exception:
            raise TypeError(
                f"{name}: cannot read {type(value).__name__} as an array ({error}); "
                "give a NumPy array or a detached CPU tensor of float32 or float16"
            ) from error
    if array.dtype == np.float64:
        array = array.astype(np.float32)
    if array.dtype.newbyteorder("<") not in _DTYPES:
        allowed = ", ".join(str(dtype) for dtype in _DTYPES)
        raise TypeError(f"{name}: dtype {array.dtype} cannot be sent; allowed: {allowed}")
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))


def can_be_sent(dtype: "np.dtype[Any]") -> bool:
    """Whether there is such a dtype on the wire."""
    return dtype in _DTYPES


def header(dtype: "np.dtype[Any]", shape: tuple[int, ...]) -> pb.Tensor:
    """A tensor without its elements."""
    return pb.Tensor(dtype=_DTYPES[dtype], shape=shape)


def data(array: Array) -> memoryview:
    """The elements of a contiguous array, as bytes, without a copy."""
    return memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]


def kind(tensor: pb.Tensor) -> "tuple[tuple[int, ...], np.dtype[Any]]":
    """Shape and dtype of a tensor."""
    return tuple(tensor.shape), _NUMPY[tensor.dtype]


def lying_in(shape: tuple[int, ...], dtype: "np.dtype[Any]", elements: memoryview) -> Array:
    """An array whose elements these are: not copied where they are aligned."""
    array = np.frombuffer(elements, dtype).reshape(shape)
    return array if array.flags.aligned else array.copy()


def copy_of(tensor: pb.Tensor, elements: bytes | memoryview) -> Array:
    """A writable array of a tensor whose elements lie in `elements`."""
    flat = np.frombuffer(elements, dtype=_NUMPY[tensor.dtype])
    return flat.reshape(tuple(tensor.shape)).copy()


def dtype_name(number: "pb.DataType.ValueType") -> str:
    """`FP32` and so on."""
    return pb.DataType.Name(number)
