"""Requests whose tensors, and whose answer's, lie in memory shared with the server."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from attnserve_proto import attention_pb2 as pb
from attnserve_proto import wire

from attnserve_client import _messages, _tensors
from attnserve_client._arena import ALIGNMENT, Arena
from attnserve_client._messages import AttendCall
from attnserve_client._results import Array, AttendResult

# Tensors smaller than this travel within the message: they cost less than a look-up.
_INLINE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class SharedCall:
    """A request to send, and what must live until it is answered.

    Attributes:
        message: it, serialised.
        held: its tensors in shared memory.
        output: where the answer's tensors go.
        offset: of that in the shared memory.
    """

    message: bytes
    held: list[Array]
    output: Array
    offset: int


class Sharing:
    """Shared memory between one client and its server.

    Args:
        byte_size: to share.
        register: maps an object into the server, given its key and size; answers its name there.
    """

    def __init__(self, byte_size: int, register: Callable[[str, int], str]) -> None:
        self.arena = Arena(byte_size)
        self._register = register
        self._name: str | None = None

    def name(self) -> str:
        """The server's name for the memory; registers it when first asked."""
        if self._name is None:
            self._name = self._register(self.arena.key, self.arena.byte_size)
        return self._name

    def forget(self) -> None:
        """The server does not know the memory any more: register it again."""
        self._name = None

    def close(self, unregister: Callable[[str], None]) -> None:
        """Share no more; `unregister` has the server unmap the memory."""
        if self._name is not None:
            unregister(self._name)
        self.arena.close()

    def call(self, call: AttendCall) -> SharedCall | None:
        """Place a request; None if what it answers is not known beforehand.

        Tensors that lie in shared memory already are not copied.
        """
        needed = _answer_bytes(call.head, tuple(call.shapes.items()))
        if needed is None:
            return None
        name = self.name()
        held, inline, places = [], {}, []
        for field, array in call.tensors.items():
            if array.nbytes < _INLINE_BYTES:
                inline[field] = array
            else:
                shared, offset = self._shared(array)
                held.append(shared)
                places.append((field, array.dtype, array.shape, offset))
        output = self.arena.empty((needed,), np.dtype(np.uint8))
        at = self._offset(output)
        head = call.head + _placed(name, tuple(places), at, needed)
        placed = AttendCall(head, inline, call.no_output, call.return_weights)
        return SharedCall(placed.to_bytes(), held, output, at)

    def result(self, call: SharedCall, answer: bytes) -> AttendResult:
        """The result of an answer: its arrays lie in shared memory, and keep it taken."""
        response = pb.AttendResponse.FromString(answer)
        arrays = {}
        for field in wire.RESPONSE_TENSORS.values():
            if not response.HasField(field):  # type: ignore[arg-type]
                continue
            tensor: pb.Tensor = getattr(response, field)
            at = tensor.shared_memory.offset - call.offset
            part = call.output[at : at + tensor.shared_memory.byte_size]
            arrays[field] = _tensors.placed(tensor, part)
        return _messages.attend_result(response, arrays)

    def _shared(self, array: Array) -> tuple[Array, int]:
        offset = self.arena.offset_of(array)
        if offset is not None:
            return array, offset
        copy = self.arena.empty(array.shape, array.dtype)
        copy[...] = array
        return copy, self._offset(copy)

    def _offset(self, array: Array) -> int:
        offset = self.arena.offset_of(array)
        assert offset is not None  # the arena made it
        return offset


@lru_cache(maxsize=256)
def _placed(
    name: str,
    places: "tuple[tuple[str, np.dtype[Any], tuple[int, ...], int], ...]",
    output: int,
    output_bytes: int,
) -> bytes:
    """Where tensors lie, and where the answer's go, as fields of an `AttendRequest`."""
    message = pb.AttendRequest(output_region=_region(name, output, output_bytes))
    for field, dtype, shape, offset in places:
        tensor = _tensors.header(dtype, shape)
        byte_size = math.prod(shape) * dtype.itemsize
        tensor.shared_memory.CopyFrom(_region(name, offset, byte_size))
        getattr(message, field).CopyFrom(tensor)
    return message.SerializeToString()


def _region(name: str, offset: int, byte_size: int) -> pb.SharedMemoryRegion:
    return pb.SharedMemoryRegion(name=name, offset=offset, byte_size=byte_size)


@lru_cache(maxsize=256)
def _answer_bytes(
    head: bytes, named_shapes: tuple[tuple[str, tuple[tuple[int, ...], int]], ...]
) -> int | None:
    """Bytes for the tensors of the answer, one after another, each aligned.

    None for layer models with more than an output: their heads are not known here. None also for
    shapes that the server will refuse: it says best what is wrong with them.
    """
    returns = pb.AttendRequest.FromString(head).returns
    more = (
        returns.weights
        or returns.entropy
        or returns.top_k
        or returns.mass_per_key
        or returns.mass_by_distance
    )
    shapes = dict(named_shapes)
    if "hidden_states" in shapes:
        shape, item = shapes["hidden_states"]
        return None if more or returns.no_output else math.prod(shape) * item
    if not {"query", "key", "value"} <= shapes.keys():
        return None
    (query, item), (key, _), (value, _) = (shapes[name] for name in ("query", "key", "value"))
    if not len(query) == len(key) == len(value) == 4:
        return None
    rows, per_head = math.prod(query[:3]), math.prod(query[:2])
    sizes: dict[str, int] = {
        "output": rows * value[3] * item * (not returns.no_output),
        "weights": rows * key[2] * item * returns.weights,
        "entropy": rows * 4 * returns.entropy,
        "top_k_indices": rows * 8 * returns.top_k,
        "top_k_weights": rows * 4 * returns.top_k,
        "mass_per_key": per_head * key[2] * 4 * returns.mass_per_key,
        "mass_by_distance": per_head * 4 * returns.mass_by_distance,
    }
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes.values())
