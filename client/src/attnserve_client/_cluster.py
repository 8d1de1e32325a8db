"""Which of several servers a call goes to.

Of two servers drawn at random, the one with fewer calls of this client under way: "the power of two
choices" (https://www.eecs.harvard.edu/~michaelm/postscripts/mythesis.pdf), as Envoy's least-request
policy and grpc's of that name (gRFC A48) have it. It sees a server that is slow, which taking turns
does not.

There is a channel for each server. grpc's own policies choose among addresses within one channel:
`pick_first`, the default, uses one alone, `round_robin` counts no calls, the others come with xDS.
None can send a session's next call to where the session is, or a repeated one elsewhere.

A server is told apart by what it said last: it serves, or why not; for some kinds of calls, that
it wants to be left alone for a while, or cannot do them. Whoever is left out by what it said of one
kind of calls gets all others.
"""

import random
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import grpc

from attnserve_client import _errors
from attnserve_client._errors import AttnserveError
from attnserve_client._flows import Flow
from attnserve_client._servers import Server
from attnserve_client._session_state import SessionState

S = TypeVar("S", bound=SessionState)

# A kind of calls: the method, and the model that it names.
Kind = tuple[str, str]

# How long a server that cannot do some kind of calls gets them last, seconds: that may change.
_LACKS_SECONDS = 5.0
# Kinds of calls that are remembered of a server, at most.
_MOST_KINDS = 1024
_NOT_ASKED = "not asked yet"

# No answer of a server: another one is asked, and this one gets nothing until it serves again.
_DOWN = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
# What depends on the server: what it holds, which version it is, whom it knows.
_ELSEWHERE = {
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
}


def is_down(failure: AttnserveError) -> bool:
    """Whether a call failed for want of a server, and not for what that server is."""
    return failure.code in _DOWN and not _errors.is_unloaded_model(failure)


@dataclass(slots=True)
class _Refusal:
    """What a server said of a kind of calls.

    Attributes:
        until: when that may be over, on the monotonic clock.
        error: what it said.
    """

    until: float
    error: AttnserveError

    @property
    def asks_to_wait(self) -> bool:
        """Whether it named a time; else it gets such calls once the others cannot do them."""
        return self.error.retry_after is not None


@dataclass(eq=False, slots=True)
class Member(Generic[S]):
    """One of the servers.

    Attributes:
        trouble: why nothing new goes there; empty: it serves.
        calls: of this client that are under way there.
        removed: nothing new goes there, for good.
    """

    server: Server[S]
    trouble: str = _NOT_ASKED
    calls: int = 0
    removed: bool = False
    refusals: dict[Kind, _Refusal] = field(default_factory=dict)

    @property
    def held(self) -> int:
        """Sessions and streams of this client that are there."""
        return len(self.server.connection.held)

    @property
    def busy(self) -> bool:
        """Whether anything of this client is there."""
        return self.calls > 0 or self.held > 0


def by_calls(member: Member[S]) -> tuple[int, int]:
    """Who has least to do: for what is over with its answer."""
    return member.calls, member.held


def by_held(member: Member[S]) -> tuple[int, int]:
    """Who holds least: for what stays, as sessions do."""
    return member.held, member.calls


class Cluster(Generic[S]):
    """The servers of one client. Safe to share between threads.

    Args:
        connect: reaches a server by its address.
        start: runs a flow beside everything else, until the client is closed.
        watch: the flow that sees to a member: that `told` knows how it is, and that it is closed
            once it is removed and not busy.
        resolve: the flow that calls `replace` with the addresses behind a name; None: they are set.
        addresses: of the servers, to begin with.
    """

    def __init__(
        self,
        connect: Callable[[str], Server[S]],
        start: Callable[[Flow[None]], None],
        watch: "Callable[[Cluster[S], Member[S]], Flow[None]]",
        *,
        resolve: "Callable[[Cluster[S]], Flow[None]] | None" = None,
        addresses: Sequence[str] = (),
    ) -> None:
        self._connect = connect
        self._start = start
        self._watch = watch
        self._resolve = resolve
        self._lock = threading.Lock()
        self._members: dict[str, Member[S]] = {}
        self._leaving: list[Member[S]] = []  # removed, but busy
        self._started = False
        self._closed = False
        self.name_trouble = ""  # why the addresses behind the name are not known
        self.replace(addresses)

    @property
    def addresses(self) -> tuple[str, ...]:
        """Of the servers, in the order given."""
        return tuple(self._members)

    @property
    def states(self) -> Mapping[str, str]:
        """Of each server by its address: "serving", or why nothing new goes there."""
        self.begin()
        with self._lock:
            return {name: each.trouble or "serving" for name, each in self._members.items()}

    @property
    def begins(self) -> bool:
        """Whether some servers have yet to say for the first time how they are."""
        with self._lock:
            return any(each.trouble == _NOT_ASKED for each in self._members.values())

    def begin(self) -> None:
        """Look at the servers from now on. It is called with the first use, not before."""
        if self._started:
            return
        with self._lock:
            if self._started or self._closed:
                return
            self._started = True
            watched = list(self._members.values())
        for member in watched:
            self._start(self._watch(self, member))
        if self._resolve is not None:
            self._start(self._resolve(self))

    def replace(self, addresses: Sequence[str]) -> None:
        """Have these servers from now on. What is on one that is gone ends there."""
        with self._lock:
            if self._closed:
                return
            for address in self._members.keys() - set(addresses):
                member = self._members.pop(address)
                member.removed = True
                self._leaving.append(member)
            new = [
                Member(self._connect(address))
                for address in dict.fromkeys(addresses)
                if address not in self._members
            ]
            known = self._members | {each.server.address: each for each in new}
            self._members = {address: known[address] for address in addresses}
            started = self._started
        if started:
            for member in new:
                self._start(self._watch(self, member))

    def close(self) -> list[Server[S]]:
        """Have no servers any more; those that are to be closed."""
        with self._lock:
            self._closed = True
            return [each.server for each in (*self._members.values(), *self._leaving)]

    def told(self, member: Member[S], trouble: str) -> None:
        """What a server said of itself; empty: it serves."""
        member.trouble = trouble

    def left(self, member: Member[S]) -> None:
        """A server that was removed has been closed."""
        with self._lock:
            if member in self._leaving:
                self._leaving.remove(member)

    def take(
        self,
        kind: Kind,
        without: Collection[Member[S]] = (),
        load: Callable[[Member[S]], tuple[int, int]] = by_calls,
        preferred: Member[S] | None = None,
    ) -> Member[S] | None:
        """Who gets a call of some kind, to be given to `give_back` after it; None: nobody can.

        Args:
            kind: of the call.
            without: who has been asked.
            load: what is to be least.
            preferred: who gets it if it can.

        Raises:
            CancelledError: the client was closed.
        """
        self.begin()
        now = time.monotonic()
        with self._lock:
            if self._closed:
                raise _errors.CancelledError("the client was closed", method=kind[0])
            free, last = [], []
            for member in self._members.values():
                if member.trouble or member in without:
                    continue
                refusal = member.refusals.get(kind)
                if refusal is None or refusal.until <= now:
                    free.append(member)
                elif not refusal.asks_to_wait:
                    last.append(member)
            choices = free or last
            if not choices:
                return None
            if preferred in choices:
                chosen = preferred
            elif len(choices) == 1:
                chosen = choices[0]
            else:
                chosen = min(random.sample(choices, 2), key=load)
            chosen.calls += 1
            return chosen

    def any_member(self, load: Callable[[Member[S]], tuple[int, int]]) -> Member[S] | None:
        """One that serves, if any does, without a call; else one that may."""
        self.begin()
        with self._lock:
            members = list(self._members.values())
        serving = [each for each in members if not each.trouble]
        unknown = [each for each in members if each.trouble == _NOT_ASKED]
        choices = serving or unknown or members
        return min(random.sample(choices, min(2, len(choices))), key=load) if choices else None

    def give_back(self, member: Member[S]) -> None:
        """A call that `take` chose a member for is over."""
        with self._lock:
            member.calls -= 1

    def refused(self, member: Member[S], kind: Kind, failure: AttnserveError) -> bool:
        """Learn from how a call failed; whether another server may take it."""
        if is_down(failure):
            member.trouble = f"{failure.code.name}: {failure.message}"
            return True
        if failure.code == grpc.StatusCode.RESOURCE_EXHAUSTED:
            if failure.retry_after is not None:
                self._remember(member, kind, _Refusal(_in(failure.retry_after), failure))
            return True
        if failure.code in _ELSEWHERE or _errors.is_unloaded_model(failure):
            self._remember(member, kind, _Refusal(_in(_LACKS_SECONDS), failure))
            return True
        return False

    def earliest(self, kind: Kind, without: Collection[Member[S]]) -> _Refusal | None:
        """What the first of those said that serve, but asked to wait; None: there are none."""
        with self._lock:
            refusals = [
                each.refusals[kind]
                for each in self._members.values()
                if not each.trouble and each not in without and kind in each.refusals
            ]
        asked = [each for each in refusals if each.asks_to_wait]
        return min(asked, key=lambda each: each.until, default=None)

    def nobody(self, method: str) -> AttnserveError:
        """Why no server could be asked."""
        with self._lock:
            troubles = [
                f"{name}: {each.trouble or 'serves, and was asked'}"
                for name, each in self._members.items()
            ]
        if self.name_trouble:
            troubles.append(self.name_trouble)
        said = "; ".join(troubles) or "this client has none"
        return _errors.UnavailableError(f"no server could be asked: {said}", method=method)

    def at(self, address: str) -> Server[S] | None:
        """The server of an address, if there is one, or was and something is on it."""
        with self._lock:
            members = [*self._members.values(), *self._leaving]
        found = [each.server for each in members if each.server.address == address]
        return found[0] if found else None

    def present(self, address: str) -> Server[S] | None:
        """The server of an address, if it is one of those that get something new."""
        with self._lock:
            member = self._members.get(address)
        return None if member is None else member.server

    def of(self, matches: Callable[[Server[S]], bool]) -> Member[S] | None:
        """The first member whose server matches."""
        with self._lock:
            members = [*self._members.values(), *self._leaving]
        return next((each for each in members if matches(each.server)), None)

    def serving(self) -> list[Member[S]]:
        """Those that serve."""
        self.begin()
        with self._lock:
            return [each for each in self._members.values() if not each.trouble]

    def _remember(self, member: Member[S], kind: Kind, refusal: _Refusal) -> None:
        with self._lock:
            if len(member.refusals) >= _MOST_KINDS:
                member.refusals.clear()
            member.refusals[kind] = refusal


def _in(seconds: float) -> float:
    return time.monotonic() + seconds
