"""Messages that have been seen before, but for the elements of their tensors."""

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


class Layouts(Generic[T]):
    """Remembers messages by everything but the elements of their tensors.

    Services see the same few messages again and again, with other elements in them. One that
    equals a known one in every byte outside the elements, length fields included, has its elements
    at the same places and means the same: nothing of it needs to be parsed again.

    Args:
        most: messages to remember; the longest unused is forgotten first.
    """

    # Beyond this, comparing costs as much as parsing.
    _MOST_OUTSIDE_BYTES = 2048

    def __init__(self, most: int = 512) -> None:
        self._most = most
        self._known: OrderedDict[int, _Layout[T]] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, buffer: bytes) -> tuple[T, dict[str, memoryview]] | None:
        """What was remembered of such a message, and its elements by name."""
        layout = self._known.get(len(buffer))
        if layout is None:
            return None
        for start, end, outside in layout.outside:
            if buffer[start:end] != outside:
                return None
        view = memoryview(buffer)
        return layout.value, {name: view[a:b] for name, (a, b) in layout.rooms.items()}

    def forget(self) -> None:
        """Forget all: what they meant has changed."""
        with self._lock:
            self._known.clear()

    def remember(self, buffer: bytes, rooms: Mapping[str, tuple[int, int]], value: T) -> None:
        """Remember `value` of a message whose elements lie at `rooms`.

        Of messages of equal length the newest is remembered.
        """
        outside = []
        at = 0
        for start, end in [*sorted(rooms.values()), (len(buffer), len(buffer))]:
            if start > at:
                outside.append((at, start, buffer[at:start]))
            at = end
        if sum(end - start for start, end, _ in outside) > self._MOST_OUTSIDE_BYTES:
            return
        with self._lock:
            self._known.pop(len(buffer), None)
            self._known[len(buffer)] = _Layout(tuple(outside), dict(rooms), value)
            if len(self._known) > self._most:
                self._known.popitem(last=False)


@dataclass(frozen=True, slots=True)
class _Layout(Generic[T]):
    outside: tuple[tuple[int, int, bytes], ...]
    rooms: Mapping[str, tuple[int, int]]
    value: T
