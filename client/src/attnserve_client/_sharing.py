"""Requests whose tensors, and whose answer's, lie in memory shared with the server."""

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from attnserve_proto import attention_pb2 as pb

from attnserve_client import _arguments as arguments
from attnserve_client import _attend, _tensors
from attnserve_client._answers import AnswerReader, Region
from attnserve_client._arena import ALIGNMENT, Arena
from attnserve_client._attend import AttendCall
from attnserve_client._results import Array, AttendResult

# Tensors smaller than this travel within the message: they cost less than a look-up.
_INLINE_BYTES = 4096
_BYTE = np.dtype(np.uint8)


@dataclass(frozen=True, slots=True)
class Placed:
    """Tensors in shared memory, and room for an answer's: they live until it is there.

    Attributes:
        held: the tensors.
        places: field name, dtype, shape and offset of each.
        output: where the answer's tensors go.
        arena: the shared memory.
        region: the server's name for it.
    """

    held: list[Array]
    places: "tuple[tuple[str, np.dtype[Any], tuple[int, ...], int], ...]"
    output: Region
    arena: Arena
    region: str


@dataclass(frozen=True, slots=True)
class SharedCall:
    """A request to send.

    Attributes:
        message: it, serialised.
        placed: its tensors.
        answers: reads what comes back.
    """

    message: bytes
    placed: Placed
    answers: AnswerReader


class Sharing:
    """Shared memory between one client and its server.

    Args:
        byte_size: to share.
    """

    def __init__(self, byte_size: int) -> None:
        self.arena = Arena(byte_size)
        self._name: str | None = None
        self._claimed = False  # somebody registers it
        self._lock = threading.Lock()

    def known(self) -> tuple[Arena, str | None]:
        """The memory, and the server's name for it; None: it is to be registered."""
        with self._lock:
            return self.arena, self._name

    def claim(self) -> Arena | None:
        """What the caller is to register, and then to call `registered`; None: another one is."""
        with self._lock:
            if self._claimed or self._name is not None:
                return None
            self._claimed = True
            return self.arena

    def registered(self, arena: Arena, name: str | None) -> bool:
        """The server maps claimed memory as `name`; None: it does not.

        Returns:
            Whether that is of use: other memory is shared by now if not.
        """
        with self._lock:
            self._claimed = False
            if self.arena is arena:
                self._name = name
            return self.arena is arena

    def empty(self, shape: Sequence[int], dtype: Any) -> Array:
        """An array in the memory, its elements undefined.

        Raises:
            MemoryError: there is no room.
        """
        allowed = "float32, float16, bfloat16 or another dtype that can be sent"
        try:
            kind = np.dtype(dtype)
        except TypeError:
            raise arguments.mistyped("dtype", dtype, allowed) from None
        if not _tensors.can_be_sent(kind):
            raise arguments.refused("dtype", dtype, allowed)
        return self.arena.empty(tuple(arguments.integers("shape", shape, 1, 1 << 48)), kind)

    def copy(self, array: Array) -> Array:
        """A copy of an array in the memory.

        Raises:
            MemoryError: there is no room.
        """
        copy = self.arena.empty(array.shape, array.dtype)
        copy[...] = array
        return copy

    def forget(self, placed: Placed) -> None:
        """The server does not know the memory of a request any more: register it again."""
        with self._lock:
            if placed.region == self._name:
                self._name = None

    def give_up(self, placed: Placed) -> bool:
        """The server may still write an answer that nobody waits for: its memory must not be used
        for anything else. From now on other memory is shared; tensors in the old are copied to it.

        Returns:
            Whether the server's name for the old memory is to be unregistered.
        """
        with self._lock:
            if placed.arena is not self.arena:
                return False  # that has been done
            self.arena.close()
            self.arena, self._name = Arena(self.arena.byte_size), None
            return True

    def close(self) -> str | None:
        """Share no more; the name that is to be unregistered, if there is one."""
        self.arena.close()
        return self._name

    def answer_bytes(self, call: AttendCall) -> int | None:
        """Bytes to set aside for what a request answers; None if that is not known beforehand."""
        return _answer_bytes(call.plan.head, tuple(call.shapes.items()))

    def call(self, call: AttendCall, answer_bytes: int, arena: Arena, name: str) -> SharedCall:
        """Place a request in memory that the server knows by a name.

        Tensors that lie there already are not copied.

        Args:
            call: the request.
            answer_bytes: of it.

        Raises:
            MemoryError: there is no room.
        """
        large = {field: a for field, a in call.tensors.items() if a.nbytes >= _INLINE_BYTES}
        inline = {field: a for field, a in call.tensors.items() if field not in large}
        placed = self.place(large, answer_bytes, arena, name)
        output = placed.output
        head = call.plan.head + _placed(name, placed.places, output.offset, answer_bytes)
        plan = _attend.plan_of(head, inline)
        message = plan.message.fill(list(inline.values()))
        return SharedCall(message, placed, plan.answers)

    def place(
        self, tensors: Mapping[str, Array], answer_bytes: int, arena: Arena, name: str
    ) -> Placed:
        """Place tensors, by field name, where they do not lie there already, and an answer.

        Raises:
            MemoryError: there is no room.
        """
        held, places = [], []
        for field, array in tensors.items():
            shared, offset = _shared(arena, array)
            held.append(shared)
            places.append((field, array.dtype, array.shape, offset))
        output = Region(*arena.place((answer_bytes,), _BYTE))
        return Placed(held, tuple(places), output, arena, name)

    def result(self, call: SharedCall, answer: bytes) -> AttendResult:
        """The result of an answer: its arrays lie in shared memory, and keep it taken."""
        return call.answers.read(answer, region=call.placed.output)[0]


class SharedArrays:
    """Arrays in the memory that a client shares with its server; neither call waits for anything.

    A client of several servers shares other memory with each: an array lies in that of one of them,
    and is copied for the others.

    Args:
        sharing: gives the memory; None: the client shares none.
    """

    def __init__(self, sharing: Callable[[], Sharing | None]) -> None:
        self._sharing_of = sharing

    def shared_empty(self, shape: Sequence[int], dtype: Any = np.float32) -> Array:
        """An array in the memory shared with the server, its elements undefined.

        Args:
            shape: of it.
            dtype: float32, float16 or bfloat16, as the model has it.

        Raises:
            RuntimeError: this client shares no memory.
            MemoryError: not so much of it is free.
        """
        return self._shared_memory().empty(shape, dtype)

    def shared(self, array: Any) -> Array:
        """A copy of an array in the memory shared with the server; errors as `shared_empty`."""
        return self._shared_memory().copy(_tensors.as_array(array, "array"))

    def _shared_memory(self) -> Sharing:
        sharing = self._sharing_of()
        if sharing is None:
            raise RuntimeError("this client shares no memory; give it shared_memory=True")
        return sharing


def _shared(arena: Arena, array: Array) -> tuple[Array, int]:
    """An array as it lies in an arena, or a copy there, and where."""
    offset = arena.offset_of(array)
    if offset is not None:
        return array, offset
    copy, offset = arena.place(array.shape, array.dtype)
    copy[...] = array
    return copy, offset


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


def region_of(name: str, output: Region) -> pb.SharedMemoryRegion:
    """Where an answer's tensors go, as a message."""
    return _region(name, output.offset, output.memory.nbytes)


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
        or returns.log_sum_exp
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
    # Of packed sequences each has distances of its own.
    starts = shapes.get("cu_seqlens_q", ((), 0))[0]
    diagnosed = query[1] * max(0, starts[0] - 1) if len(starts) == 1 else per_head
    sizes: dict[str, int] = {
        "output": rows * value[3] * item * (not returns.no_output),
        "weights": rows * key[2] * item * returns.weights,
        "entropy": rows * 4 * returns.entropy,
        "top_k_indices": rows * 8 * returns.top_k,
        "top_k_weights": rows * 4 * returns.top_k,
        "mass_per_key": per_head * key[2] * 4 * returns.mass_per_key,
        "mass_by_distance": diagnosed * 4 * returns.mass_by_distance,
        "log_sum_exp": rows * 4 * returns.log_sum_exp,
    }
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes.values())
