"""NumPy arrays to `Tensor` messages and back."""

import sys
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

_WITHOUT_ML_DTYPES = (
    "NumPy has no bfloat16 without ml_dtypes; `pip install 'attnserve-client[bf16]'`"
)


def as_array(value: Any, name: str) -> Array:
    """Take anything that NumPy or DLPack can read: arrays, lists, CPU tensors of any library.

    float64 becomes float32: no model computes in float64. PyTorch's bfloat16 becomes ml_dtypes'.

    Raises:
        TypeError: it cannot be read, or its dtype has no place on the wire; says which argument.
    """
    if type(value) is np.ndarray and value.dtype in _DTYPES and value.flags.c_contiguous:
        return value if value.ndim > 0 else value.reshape(1)
    try:
        array = np.asarray(value)
    except Exception as error:  # whatever the foreign library raises
        try:
            array = _bfloat16(value) if _is_bfloat16(value) else np.from_dlpack(value)
        except Exception as other:
            reason = other if _is_bfloat16(value) else error
            raise TypeError(
                f"{name}: cannot read {type(value).__name__} as an array ({reason}); "
                "give a NumPy array or a detached CPU tensor of float32, float16 or bfloat16"
            ) from error
    if array.dtype == np.float64:
        array = array.astype(np.float32)
    if array.dtype.newbyteorder("<") not in _DTYPES:
        allowed = ", ".join(str(dtype) for dtype in _DTYPES)
        raise TypeError(f"{name}: dtype {array.dtype} cannot be sent; allowed: {allowed}")
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))


def numpy_dtype(name: str) -> "np.dtype[Any]":
    """The dtype that NumPy has for one of the wire's, `FP32` and so on.

    Raises:
        TypeError: it has none for BF16, unless ml_dtypes is installed.
    """
    return _numpy_dtype(pb.DataType.Value(name))


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
    return tuple(tensor.shape), _numpy_dtype(tensor.dtype)


def lying_in(shape: tuple[int, ...], dtype: "np.dtype[Any]", elements: memoryview) -> Array:
    """An array whose elements these are: not copied where they are aligned."""
    array = np.frombuffer(elements, dtype).reshape(shape)
    return array if array.flags.aligned else array.copy()


def copy_of(tensor: pb.Tensor, elements: bytes | memoryview) -> Array:
    """A writable array of a tensor whose elements lie in `elements`."""
    flat = np.frombuffer(elements, dtype=_numpy_dtype(tensor.dtype))
    return flat.reshape(tuple(tensor.shape)).copy()


def dtype_name(number: "pb.DataType.ValueType") -> str:
    """`FP32` and so on."""
    return pb.DataType.Name(number)


def _numpy_dtype(number: "pb.DataType.ValueType") -> "np.dtype[Any]":
    dtype = _NUMPY.get(number)
    if dtype is None:
        raise TypeError(f"{dtype_name(number)}: {_WITHOUT_ML_DTYPES}")
    return dtype


def _is_bfloat16(value: Any) -> bool:
    """Whether it is PyTorch's, which says so to nobody who has not imported it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16


def _bfloat16(tensor: Any) -> Array:
    """The elements of a torch.Tensor of bfloat16, not copied."""
    if ml_dtypes is None:
        raise TypeError(_WITHOUT_ML_DTYPES)
    if tensor.requires_grad:
        raise TypeError("it requires a gradient")
    elements: Array = tensor.view(sys.modules["torch"].int16).numpy()
    return elements.view(ml_dtypes.bfloat16)
