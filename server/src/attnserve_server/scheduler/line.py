"""Those that wait, in the order in which they will be served.

By priority first. Within a priority, callers share alike: start-time fair queueing (Goyal, Vin,
Cheng: "Start-time Fair Queueing", SIGCOMM 1996), where a caller's next request starts, in virtual
time, when its previous one would have ended. Who sends many waits behind its own requests, not
others behind it.
"""

import bisect
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, auto

from attnserve_server.scheduler.job import AnyJob, Outcome, Ticket

# Virtual seconds of a request whose kind has never run.
_UNKNOWN_SECONDS = 1e-3


class State(Enum):
    """Where an entry is."""

    WAITING = auto()  # in the line
    LEADING = auto()  # has a place; its own thread runs it
    FOLLOWING = auto()  # runs with a leader, on that one's thread
    DONE = auto()


@dataclass(eq=False, slots=True)
class Entry:
    """A request between its arrival and its end."""

    ticket: Ticket
    job: AnyJob
    arrived: float
    seconds: float = 0.0
    state: State = State.WAITING
    outcome: Outcome[object] | Exception | None = None
    order: tuple[int, float, int] = (0, 0.0, 0)
    called: threading.Event = field(default_factory=threading.Event)


class Line:
    """The entries that wait. Not safe to share between threads without a lock."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self._keys: list[tuple[int, float, int]] = []
        self._number = 0
        self._virtual = 0.0
        self._ends: dict[tuple[str, int], float] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries)

    def add(self, entry: Entry) -> None:
        """Put an entry where it belongs."""
        self._number += 1
        ticket = entry.ticket
        who = (ticket.caller, ticket.priority)
        start = max(self._virtual, self._ends.get(who, 0.0))
        self._ends[who] = start + (entry.seconds or _UNKNOWN_SECONDS)
        entry.order = (ticket.priority, start, self._number)
        at = bisect.bisect(self._keys, entry.order)
        self._entries.insert(at, entry)
        self._keys.insert(at, entry.order)

    def first(self) -> Entry | None:
        """The entry to serve next, left where it is."""
        return self._entries[0] if self._entries else None

    def serve(self, entry: Entry) -> None:
        """Take out the first entry, whose turn it is: virtual time goes on to it."""
        self._virtual = max(self._virtual, entry.order[1])
        self.remove(entry)

    def remove(self, entry: Entry) -> None:
        """Take out an entry out of turn: who comes later is not set back behind it."""
        at = bisect.bisect_left(self._keys, entry.order)
        del self._entries[at], self._keys[at]
        if not self._entries:
            self._virtual, self._ends = 0.0, {}

    def seconds_ahead(self, priority: int) -> float:
        """What those take together that a newcomer of this priority would wait for."""
        return sum(e.seconds for e in self._entries if e.ticket.priority <= priority)
