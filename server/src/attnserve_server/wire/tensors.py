"""One `Tensor` message: is it well formed, and where are its elements."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from attnserve_proto import attention_pb2 as pb

from attnserve_server import dtypes
from attnserve_server.dtypes import Array
from attnserve_server.errors import InvalidRequestError, UnimplementedError


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that has been checked but for its elements.

    Attributes:
        name: the field.
        dtype: of the wire.
        shape: every dimension >= 1.
        byte_size: of all elements.
        chunked: whether the elements follow in chunks.
    """

    name: str
    dtype: int
    shape: tuple[int, ...]
    byte_size: int
    chunked: bool

    def array(self, elements: memoryview) -> Array:
        """The elements as an array: a view where they lie at a multiple of their size."""
        array = np.frombuffer(elements, dtypes.to_numpy(self.dtype)).reshape(self.shape)
        return array if array.flags.aligned else array.copy()

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
) -> TensorSpec:
    """Check one tensor but for its elements.

    Args:
        name: the field, for messages.
        tensor: the message, its `data` left out.
        data_bytes: how long its `data` was; None if it had none.
        dtype: the dtype it must have.
        dims: names of the dimensions it must have, for messages.
        chunks_allowed: whether its elements may follow in chunks.

    Raises:
        InvalidRequestError: it is not well formed.
        UnimplementedError: its elements are in shared memory.
    """
    if tensor.dtype != dtypes.number_of(dtype):
        raise InvalidRequestError.of(f"{name}.dtype", dtypes.name_of(tensor.dtype), dtype)
    shape = tuple(tensor.shape)
    wanted = f"[{', '.join(dims)}]"
    if len(shape) != len(dims):
        raise InvalidRequestError.of(
            f"{name}.shape", f"{list(shape)} of rank {len(shape)}", f"rank {len(dims)}, {wanted}"
        )
    if min(shape) < 1:
        raise InvalidRequestError.of(f"{name}.shape", list(shape), f"{wanted}, each at least 1")
    byte_size = math.prod(shape) * (dtypes.item_bytes(tensor.dtype) or 0)
    if byte_size >= 1 << 63:
        raise InvalidRequestError.of(
            f"{name}.shape", f"{list(shape)}, {byte_size} bytes", "less than 2^63 bytes"
        )
    content = "data" if data_bytes is not None else tensor.WhichOneof("content")
    if content == "shared_memory":
        raise UnimplementedError(
            f"{name}.shared_memory: this server version takes no shared memory; send data"
        )
    if content is None:
        raise InvalidRequestError.of(f"{name}.data", "nothing", f"{byte_size} bytes")
    given = tensor.chunked.byte_size if content == "chunked" else data_bytes
    if content == "chunked" and not chunks_allowed:
        raise InvalidRequestError.of(f"{name}.chunked", "set", "data; chunks go over AttendStream")
    if given != byte_size:
        field = f"{name}.{'chunked.byte_size' if content == 'chunked' else 'data'}"
        raise InvalidRequestError.of(
            field, f"{given} bytes", f"{byte_size} bytes, as shape {list(shape)} of {dtype} takes"
        )
    return TensorSpec(name, tensor.dtype, shape, byte_size, content == "chunked")


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
