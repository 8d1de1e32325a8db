"""Element types: parsed once, here, and NumPy dtypes from then on."""

from typing import Any

import ml_dtypes
import numpy as np
from attnserve_proto import attention_pb2 as pb
from numpy.typing import NDArray

Array = NDArray[Any]

_NUMPY_BY_NUMBER: dict[int, np.dtype[Any]] = {
    pb.FP32: np.dtype("<f4"),
    pb.FP16: np.dtype("<f2"),
    pb.BF16: np.dtype(ml_dtypes.bfloat16),
    pb.INT64: np.dtype("<i8"),
    pb.INT32: np.dtype("<i4"),
    pb.BOOL: np.dtype("?"),
}
_NUMBER_BY_NUMPY = {dtype: number for number, dtype in _NUMPY_BY_NUMBER.items()}
_ITEM_BYTES = {number: dtype.itemsize for number, dtype in _NUMPY_BY_NUMBER.items()}


def number_of(name: str) -> "pb.DataType.ValueType":
    """The wire's number of a manifest's dtype.

    Raises:
        ValueError: there is no such dtype.
    """
    return pb.DataType.Value(name)


def name_of(number: int) -> str:
    """The name of a dtype, or its number if it has none."""
    known: dict[int, str] = {value: key for key, value in pb.DataType.items()}
    return known.get(number, str(number))


def item_bytes(number: int) -> int | None:
    """Bytes of one element; None if the dtype is unknown."""
    return _ITEM_BYTES.get(number)


def to_numpy(number: int) -> np.dtype[Any]:
    """The NumPy dtype of a wire dtype that NumPy has."""
    return _NUMPY_BY_NUMBER[number]


def of_data_plane(array: Array) -> Array:
    """An array that the data plane gave: of BF16 it gives the bits, and of no other type such."""
    return array.view(ml_dtypes.bfloat16) if array.dtype == np.uint16 else array


def from_numpy(dtype: np.dtype[Any]) -> "pb.DataType.ValueType":
    """The wire dtype of a NumPy dtype."""
    return _NUMBER_BY_NUMPY[dtype.newbyteorder("<")]  # type: ignore[return-value]
