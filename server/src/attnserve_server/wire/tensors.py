"""One `Tensor` message: is it well formed, and where are its elements."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from attnserve_proto import attention_pb2 as pb

from attnserve_server import dtypes
from attnserve_server.dtypes import Array
from attnserve_server.errors import InvalidRequestError

# Tensors in shared memory start at multiples of this: a cache line.
REGION_ALIGNMENT = 64

# Dimensions of a tensor whose rank nothing else says.
_MOST_DIMS = 8


@dataclass(frozen=True, slots=True)
class Region:
    """Part of a shared-memory region: its name, and bytes from its start."""

    name: str
    offset: int
    byte_size: int


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that has been checked but for its elements.

    Attributes:
        name: the field.
        dtype: of the wire.
        shape: every dimension >= 1.
        byte_size: of all elements.
        chunked: whether the elements follow in chunks.
        stored: handle of a kept tensor that holds the elements, or empty.
        region: where they lie in shared memory, or None.
    """

    name: str
    dtype: int
    shape: tuple[int, ...]
    byte_size: int
    chunked: bool = False
    stored: str = ""
    region: Region | None = None

    @property
    def wire_dtype(self) -> "pb.DataType.ValueType":
        """`dtype`, as messages take it."""
        return self.dtype  # type: ignore[return-value]

    @property
    def sent(self) -> bool:
        """Whether the elements come with the request."""
        return not self.stored and self.region is None

    def array(self, elements: memoryview) -> Array:
        """The elements as an array: a view where they lie at a multiple of their size."""
        array = self.view(elements)
        return array if array.flags.aligned else array.copy()

    def view(self, elements: memoryview, shape: tuple[int, ...] | None = None) -> Array:
        """The elements, or a part of another shape, where they are; writable if they are."""
        flat = np.frombuffer(elements, dtypes.to_numpy(self.dtype))
        return flat.reshape(self.shape if shape is None else shape)

    def empty(self) -> Array:
        """An array to receive the elements."""
        return np.empty(self.shape, dtypes.to_numpy(self.dtype))


def check(
    name: str,
    tensor: pb.Tensor,
    data_bytes: int | None,
    *,
    dtype: str,
    dims: Sequence[str],
    chunks_allowed: bool,
    kept: Callable[[str, str], Array] | None = None,
) -> TensorSpec:
    """Check one tensor but for its elements.

    Args:
        name: the field, for messages.
        tensor: the message, its `data` left out.
        data_bytes: how long its `data` was; None if it had none.
        dtype: the dtype it must have.
        dims: names of the dimensions it must have, for messages.
        chunks_allowed: whether its elements may follow in chunks.
        kept: finds a kept tensor by its handle, given the field for messages; None: none are kept.

    Raises:
        InvalidRequestError: it is not well formed.
        NotFoundError: it names a kept tensor that is not there.
    """
    content = "data" if data_bytes is not None else tensor.WhichOneof("content")
    if content == "stored" and kept is not None:
        return _stored(name, tensor, kept, dtype, dims)
    shape, byte_size = shape_of(name, tensor, dtype=dtype, dims=dims)
    if content is None:
        raise InvalidRequestError.of(f"{name}.data", "nothing", f"{byte_size} bytes")
    if content == "stored":
        raise InvalidRequestError.of(f"{name}.stored", tensor.stored[:80], "data")
    if content == "chunked" and not chunks_allowed:
        raise InvalidRequestError.of(f"{name}.chunked", "set", "data; chunks go over AttendStream")
    field, given = {
        "data": ("data", data_bytes),
        "chunked": ("chunked.byte_size", tensor.chunked.byte_size),
        "shared_memory": ("shared_memory.byte_size", tensor.shared_memory.byte_size),
    }[content]
    if given != byte_size:
        raise InvalidRequestError.of(
            f"{name}.{field}",
            f"{given} bytes",
            f"{byte_size} bytes, as shape {list(shape)} of {dtype} takes",
        )
    region = None
    if content == "shared_memory":
        region = region_of(f"{name}.shared_memory", tensor.shared_memory)
    return TensorSpec(name, tensor.dtype, shape, byte_size, content == "chunked", region=region)


def shape_of(
    name: str, tensor: pb.Tensor, *, dtype: str, dims: Sequence[str]
) -> tuple[tuple[int, ...], int]:
    """The shape of a tensor and the bytes that its elements take, both checked.

    Raises:
        InvalidRequestError: dtype, rank or a dimension is wrong.
    """
    if dtypes.name_of(tensor.dtype) != dtype:
        raise InvalidRequestError.of(f"{name}.dtype", dtypes.name_of(tensor.dtype), dtype)
    return _checked_shape(name, tuple(tensor.shape), tensor.dtype, dims)


def _checked_shape(
    name: str, shape: tuple[int, ...], dtype: int, dims: Sequence[str]
) -> tuple[tuple[int, ...], int]:
    wanted = f"[{', '.join(dims)}]" if dims else f"1..{_MOST_DIMS} dimensions"
    if dims and len(shape) != len(dims):
        raise InvalidRequestError.of(
            f"{name}.shape", f"{list(shape)} of rank {len(shape)}", f"rank {len(dims)}, {wanted}"
        )
    if len(shape) > _MOST_DIMS:
        raise InvalidRequestError.of(f"{name}.shape", f"one of rank {len(shape)}", wanted)
    if min(shape, default=0) < 1:
        raise InvalidRequestError.of(f"{name}.shape", list(shape), f"{wanted}, each at least 1")
    byte_size = math.prod(shape) * (dtypes.item_bytes(dtype) or 0)
    if byte_size >= 1 << 63:
        raise InvalidRequestError.of(
            f"{name}.shape", f"{list(shape)}, {byte_size} bytes", "less than 2^63 bytes"
        )
    return shape, byte_size


def _stored(
    name: str,
    tensor: pb.Tensor,
    kept: Callable[[str, str], Array],
    dtype: str,
    dims: Sequence[str],
) -> TensorSpec:
    """A tensor that is kept: dtype and shape are as put, and may be left out of the message."""
    array = kept(tensor.stored, f"{name}.stored")
    number = dtypes.from_numpy(array.dtype)
    for given in {tensor.dtype, number} - {pb.DATA_TYPE_UNSPECIFIED}:
        if given != dtypes.number_of(dtype):
            raise InvalidRequestError.of(f"{name}.dtype", dtypes.name_of(given), dtype)
    if tensor.shape and tuple(tensor.shape) != array.shape:
        raise InvalidRequestError.of(
            f"{name}.shape", list(tensor.shape), f"{list(array.shape)}, as it was put"
        )
    shape, byte_size = _checked_shape(name, array.shape, number, dims)
    return TensorSpec(name, number, shape, byte_size, stored=tensor.stored)


def region_of(field: str, message: pb.SharedMemoryRegion) -> Region:
    """Part of a shared-memory region, its bounds yet to be compared with the region's.

    Raises:
        InvalidRequestError: its name or offset cannot be right.
    """
    if not message.name:
        raise InvalidRequestError.of(
            f"{field}.name", "nothing", "a name that RegisterSharedMemory answered"
        )
    if message.offset % REGION_ALIGNMENT:
        raise InvalidRequestError.of(
            f"{field}.offset", message.offset, f"a multiple of {REGION_ALIGNMENT}"
        )
    return Region(message.name, message.offset, message.byte_size)


def header(array: Array) -> pb.Tensor:
    """The dtype and shape of an array, without its elements."""
    return pb.Tensor(dtype=dtypes.from_numpy(array.dtype), shape=array.shape)


def data(array: Array) -> memoryview:
    """The elements of an array as bytes, without a copy if it is contiguous."""
    flat = np.ascontiguousarray(array).reshape(-1)
    return memoryview(flat.view(np.uint8))  # type: ignore[arg-type]


def message(array: Array) -> pb.Tensor:
    """A whole tensor, elements included."""
    tensor = header(array)
    tensor.data = data(array).tobytes()
    return tensor
