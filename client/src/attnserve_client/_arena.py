"""Arrays in memory shared with a server on the same host.

One POSIX object, of which the server maps the same pages; arrays are pieces of it, and a piece is
free again once its last array is gone. So nothing is copied that was made here.
"""

import bisect
import math
import os
import threading
import weakref
from collections import deque
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np
from attnserve_proto import buffers

from attnserve_client._results import Array

# The server takes tensors at multiples of this.
ALIGNMENT = 64

# Where Linux keeps such objects as files; servers look for them nowhere else.
_FOLDER = Path("/dev/shm")
# Pages are claimed in steps, for small arrays do not need a system call each.
_STEP_BYTES = 4 << 20


class Arena:
    """Shared memory to make arrays in. Safe to share between threads.

    The object has its full size from the start, but no pages. Those of an array are claimed before
    the array is made: whoever writes to a page for which the system has no room, and that would be
    the server with its answer, is ended by SIGBUS.

    Args:
        byte_size: of the whole.
    """

    def __init__(self, byte_size: int) -> None:
        self._memory = SharedMemory(create=True, size=byte_size)
        self._address = np.asarray(self._memory.buf).ctypes.data
        self._size = byte_size
        self._file = _open(self._memory.name)
        if self._file is not None:
            weakref.finalize(self, os.close, self._file).atexit = False
        self._claimed = 0  # bytes from the start that have pages
        # Free pieces as (start, end), in order and apart from each other.
        self._free = [(0, byte_size)]
        # Pieces whose arrays are gone: appended by finalizers, which must not take the lock.
        self._returned: deque[tuple[int, int]] = deque()
        self._lock = threading.Lock()

    @property
    def key(self) -> str:
        """The object's name, as shm_open(3) takes it."""
        return self._memory.name

    @property
    def byte_size(self) -> int:
        """Of the whole."""
        return self._size

    def empty(self, shape: tuple[int, ...], dtype: "np.dtype[Any]") -> Array:
        """An array in shared memory, its elements undefined.

        Raises:
            MemoryError: no piece of that size is free, or the system has no pages for it.
        """
        return self.place(shape, dtype)[0]

    def place(self, shape: tuple[int, ...], dtype: "np.dtype[Any]") -> tuple[Array, int]:
        """As `empty`, and where in the object the array lies."""
        byte_size = math.prod(shape) * dtype.itemsize
        start, end = self._take(byte_size)
        memory = buffers.view_at(self._address + start, byte_size, _Piece(self, start, end))
        return np.ndarray(shape, dtype, memory), start

    def offset_of(self, array: Array) -> int | None:
        """Where in the object a contiguous array lies; None if it is not in it, or not aligned."""
        offset: int = array.__array_interface__["data"][0] - self._address
        inside = offset >= 0 and offset + array.nbytes <= self._size
        return offset if inside and offset % ALIGNMENT == 0 else None

    def give_back(self, start: int, end: int) -> None:
        """A piece is free again; called by finalizers, it takes no lock."""
        self._returned.append((start, end))

    def close(self) -> None:
        """Remove the object's name; its memory lasts as long as arrays in it do."""
        self._memory.unlink()

    def _take(self, byte_size: int) -> tuple[int, int]:
        """Where a free piece lies, which is then no longer free."""
        taken = -(-max(1, byte_size) // ALIGNMENT) * ALIGNMENT
        with self._lock:
            while self._returned:
                self._insert(*self._returned.popleft())
            for index, (start, end) in enumerate(self._free):
                if end - start >= taken:
                    self._claim(start + taken, byte_size)
                    self._free[index : index + 1] = [(start + taken, end)] * (end - start > taken)
                    return start, start + taken
        raise MemoryError(
            f"shared memory: no {byte_size} bytes are free of {self._size}; keep fewer results, or "
            "give AttentionClient more shared_memory_bytes"
        )

    def _claim(self, end: int, byte_size: int) -> None:
        """Have the system set pages aside for all up to `end`."""
        if self._file is None or end <= self._claimed:
            return
        step = min(self._size, -(-end // _STEP_BYTES) * _STEP_BYTES)
        for upto in (step, end):  # where there is no room for a step, there may be for the array
            try:
                os.posix_fallocate(self._file, self._claimed, upto - self._claimed)
            except OSError as error:
                failure = error
            else:
                self._claimed = upto
                return
        room = os.statvfs(_FOLDER)
        raise MemoryError(
            f"shared memory: {byte_size} bytes asked, {end - self._claimed} more to claim, "
            f"{room.f_bavail * room.f_frsize} free of {room.f_blocks * room.f_frsize} in {_FOLDER} "
            f"({failure.strerror}); make {_FOLDER} larger (docker run --shm-size, or an emptyDir "
            "of medium Memory), keep fewer results, or share no memory"
        ) from failure

    def _insert(self, start: int, end: int) -> None:
        at = bisect.bisect(self._free, (start, end))
        if at < len(self._free) and self._free[at][0] == end:
            end = self._free.pop(at)[1]
        if at and self._free[at - 1][1] == start:
            at -= 1
            start = self._free.pop(at)[0]
        self._free.insert(at, (start, end))


def _open(name: str) -> int | None:
    """A file descriptor of an object; None where the system has no such files."""
    try:
        return os.open(_FOLDER / name, os.O_RDWR)
    except FileNotFoundError:
        return None


class _Piece:
    """What an array's memory belongs to; it lives as long as any array or view over it."""

    __slots__ = ("_arena", "_end", "_start")

    def __init__(self, arena: Arena, start: int, end: int) -> None:
        self._arena = arena
        self._start = start
        self._end = end

    def __del__(self) -> None:
        self._arena.give_back(self._start, self._end)
