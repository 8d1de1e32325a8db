"""Handing KV sessions to other servers before this one ends."""

import argparse
import contextlib
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import grpc
from attnserve_dataplane import DataPlane, Departure, RequestError
from attnserve_proto import attention_pb2 as pb
from attnserve_proto import attention_pb2_grpc as pb_grpc
from attnserve_proto.commands import Access, CommandError, access_of

from attnserve_server.move_targets import Place, Places
from attnserve_server.settings import Settings, SettingsError

# Sessions on their way at once, and of those whose step has yet to end how many may begin no other,
# not counting those whose step has not ended for so many seconds: it may never end.
_AT_ONCE, _MOST_BUSY, _STUCK_SECONDS = 8, 32, 0.25
# Between two looks whether a step has ended, and between two rounds of asking others; how long
# others are asked again that were full, or away. Seconds.
_STEP_SECONDS, _ROUND_SECONDS, _PATIENCE_SECONDS = 0.002, 0.25, 2.0
# Of the time that is left, what one server may take for a session: others are to have their turn.
_SHARE = 0.5
_SHOWN = 6  # characters of a session's id, which whoever knows it may use

# Why a session was not moved. `late`: its step did not end, or it was not its turn, in time.
REASONS = ("full", "away", "unfit", "refused", "late")
_REASON_OF = {
    grpc.StatusCode.RESOURCE_EXHAUSTED: "full",
    grpc.StatusCode.UNAVAILABLE: "away",
    grpc.StatusCode.CANCELLED: "away",
    grpc.StatusCode.DEADLINE_EXCEEDED: "away",
    # Of another version, or without its model.
    grpc.StatusCode.FAILED_PRECONDITION: "unfit",
    grpc.StatusCode.NOT_FOUND: "unfit",
    grpc.StatusCode.UNIMPLEMENTED: "unfit",
}
_MAY_PASS = {"full", "away"}

_log = logging.getLogger(__name__)


class MovingError(SettingsError):
    """Sessions cannot be moved as the settings ask; the message names the option."""


class Mover:
    """Moves the sessions of a data plane.

    Args:
        plane: whose sessions.
        settings: say where to.

    Raises:
        MovingError: the settings cannot be used.
    """

    def __init__(self, plane: DataPlane, settings: Settings) -> None:
        self._plane, self._settings = plane, settings
        self._targets = (settings.move_sessions_to or "").split(",")
        _access(settings, self._targets)  # read again once it is needed: files are replaced
        self._lock = threading.Lock()  # guards what follows
        self._moved = 0
        self._failed = Counter[str]()
        self._fresh: deque[str] = deque()
        self._busy: deque[_Waiting] = deque()
        self._most_busy = _MOST_BUSY
        self._patient_until: float | None = None

    @property
    def moved(self) -> int:
        """Sessions that are elsewhere."""
        return self._moved

    @property
    def failed(self) -> Mapping[str, int]:
        """Sessions that are not, by reason."""
        return {reason: self._failed[reason] for reason in REASONS}

    def move(self, until: float) -> None:
        """Move all sessions, until then on the monotonic clock; logs what came of it."""
        began = time.monotonic()
        self._plane.begin_moving()
        try:
            places = Places(self._targets, _access(self._settings, self._targets))
        except MovingError as error:
            _log.error("sessions not moved", extra={"error": str(error)})
            return
        seen: set[str] = set()
        with contextlib.closing(places):
            while new := set(self._plane.session_ids()) - seen:
                seen |= new
                self._fresh.extend(new)
                workers = [
                    threading.Thread(target=self._work, args=(places, until), name=f"moving-{n}")
                    for n in range(min(_AT_ONCE, len(new)))
                ]
                for worker in workers:
                    worker.start()
                for worker in workers:
                    worker.join()
        _log.info(
            "sessions moved",
            extra={
                "moved": self._moved,
                "not_moved": {reason: count for reason, count in self.failed.items() if count},
                "seconds": round(time.monotonic() - began, 3),
            },
        )

    def _work(self, places: Places, until: float) -> None:
        while (waiting := self._next()) is not None:
            session_id = waiting.session_id
            try:
                departure = self._plane.depart(session_id)
            except RequestError:
                continue  # closed, or its lease ran out
            if departure is not None:
                self._move_one(session_id, departure, places, until)
                del departure  # a session that stays goes on
            elif time.monotonic() < until:
                self._wait(waiting)
                time.sleep(_STEP_SECONDS)
            else:
                self._plane.stay(session_id)
                self._not_moved(session_id, "late", "its step has not ended")

    def _next(self) -> "_Waiting | None":
        with self._lock:
            if self._busy and (len(self._busy) >= self._most_busy or not self._fresh):
                return self._busy.popleft()
            return _Waiting(self._fresh.popleft()) if self._fresh else None

    def _wait(self, waiting: "_Waiting") -> None:
        """Come back to a session whose step has yet to end."""
        with self._lock:
            if not waiting.stuck and time.monotonic() >= waiting.since + _STUCK_SECONDS:
                waiting.stuck = True
                self._most_busy += 1
            self._busy.append(waiting)

    def _move_one(
        self, session_id: str, departure: Departure, places: Places, until: float
    ) -> None:
        reason, said = "late", "no time was left"
        if not places.in_turn():
            reason, said = "away", "no server is there to be asked"
        while True:
            for place in places.in_turn():
                left = until - time.monotonic()
                if left <= 0:
                    break
                if not place.knows(departure.owner):
                    reason, said = "unfit", f"{place.address}: its callers are not those of here"
                    continue
                try:
                    there = _send(place, departure, left * _SHARE)
                except grpc.RpcError as error:
                    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                        places.leave_out(place)
                    reason = _REASON_OF.get(error.code(), "refused")
                    said = f"{place.address}: {error.code().name}: {error.details()}"
                    departure.again()
                    continue
                departure.moved(place.address, place.authority, there.session_id)
                with self._lock:
                    self._moved += 1
                return
            if reason not in _MAY_PASS or not self._waits(until):
                break
        self._not_moved(session_id, reason, said)

    def _waits(self, until: float) -> bool:
        """Wait before others are asked again; False: they are not."""
        now = time.monotonic()
        with self._lock:
            if self._patient_until is None:
                self._patient_until = min(until, now + _PATIENCE_SECONDS)
        if now >= self._patient_until:
            return False
        time.sleep(_ROUND_SECONDS)
        return True

    def _not_moved(self, session_id: str, reason: str, said: str) -> None:
        with self._lock:
            self._failed[reason] += 1
        _log.warning(
            "session not moved",
            extra={"session": f"{session_id[:_SHOWN]}...", "reason": reason, "said": said},
        )


@dataclass(slots=True)
class _Waiting:
    """A session whose turn it is, or will be again once its step has ended.

    Attributes:
        since: when its turn came first, on the monotonic clock.
        stuck: whether that is too long ago for it to be one of the _MOST_BUSY.
    """

    session_id: str
    since: float = field(default_factory=time.monotonic)
    stuck: bool = False


def _send(place: Place, departure: Departure, seconds: float) -> pb.SessionState:
    """The session's state at another server."""
    chunks = _Chunks(departure)
    stub = pb_grpc.AttentionServiceStub(place.channel)
    try:
        answer: pb.SessionState = stub.MoveSession(
            chunks, timeout=seconds, metadata=place.metadata, wait_for_ready=False
        )
        return answer
    finally:
        chunks.end()


class _Chunks:
    """The messages of one try, which another thread may still ask for when it is over."""

    def __init__(self, departure: Departure) -> None:
        self._lock = threading.Lock()  # guards what follows
        self._departure: Departure | None = departure
        self._index = 0

    def __iter__(self) -> "_Chunks":
        return self

    def __next__(self) -> pb.MoveSessionRequest:
        with self._lock:
            departure = self._departure
            if departure is None or departure.ended:
                raise StopIteration
            data = departure.next()
            chunk = pb.SessionChunk(index=self._index, data=data, last=departure.ended)
            request = pb.MoveSessionRequest(chunk=chunk)
            if self._index == 0:
                request.session.caller = departure.owner
                request.session.lease = departure.lease
                request.session.prefix_hashes = departure.prefix_hashes
            self._index += 1
            return request

    def end(self) -> None:
        """Give no more."""
        with self._lock:
            self._departure = None


def _access(settings: Settings, targets: list[str]) -> Access:
    options = argparse.Namespace(
        ca=settings.move_ca,
        certificate=settings.move_certificate,
        key=settings.move_key,
        token_file=settings.move_token_file,
    )
    try:
        return access_of(options, targets, prefix="move-")
    except CommandError as error:
        raise MovingError(str(error)) from None
