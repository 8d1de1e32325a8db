"""Sessions that servers have handed to others, and how a client goes after them."""

import contextlib
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from attnserve_proto import attention_pb2 as pb

from attnserve_client._errors import AttnserveError, MovedSession
from attnserve_client._flows import Flow

# What telling a new server of this client may take, seconds.
_ARRIVAL_SECONDS = 10.0


@dataclass(slots=True)
class Following:
    """How a client goes after its sessions.

    Attributes:
        reach: the connection to the server that has one now.
        start: runs a flow beside everything else.
    """

    reach: Callable[[MovedSession], Any]
    start: Callable[[Flow[None]], None]


class Moves:
    """Where the sessions of a client are, as far as they have moved. Safe to share.

    Args:
        following: None: they are not gone after.
    """

    def __init__(self, following: Following | None = None) -> None:
        self._following = following
        self._lock = threading.Lock()  # guards what follows
        self._moved: dict[str, MovedSession] = {}
        self._due: deque[MovedSession] = deque()
        self._runs = False
        self.count = 0  # of all that were told of

    def told(self, message: pb.MovedSession) -> None:
        """A server has said on its stream that a session has moved.

        The new server is told of this client at once: it may drain before the session is used, and
        could tell nobody where it went from there.
        """
        if self._following is None:
            return
        moved = MovedSession.of(message)
        self._note(moved)
        with self._lock:
            self._due.append(moved)
            if self._runs:
                return
            self._runs = True
        self._following.start(self._arrivals())

    def follows(self, error: AttnserveError) -> bool:
        """Whether a request failed because its session has moved, and may be repeated there."""
        if error.moved is None or self._following is None:
            return False
        self._note(error.moved)
        return True

    def take(self, session_id: str) -> "tuple[MovedSession, Any] | None":
        """Where a session went, and the connection to there; None: it has not moved. Once."""
        if session_id not in self._moved or self._following is None:
            return None
        with self._lock:
            moved = self._moved.pop(session_id)
        return moved, self._following.reach(moved)

    def _note(self, moved: MovedSession) -> None:
        with self._lock:
            self._moved[moved.session_id] = moved
            self.count += 1

    def _arrivals(self) -> Flow[None]:
        assert self._following is not None
        while True:
            with self._lock:
                if not self._due:
                    self._runs = False
                    return
                moved = self._due.popleft()
                waits = moved.session_id in self._moved
            if waits:  # else it has been used there
                renew = pb.RenewSession(session_id=moved.new_session_id)
                connection = self._following.reach(moved)
                with contextlib.suppress(AttnserveError):
                    yield from connection.ask(pb.DecodeRequest(renew=renew), _ARRIVAL_SECONDS)
