"""A simulated cluster: what traffic would find at N servers, by service times that were measured.

A discrete-event simulation, not a measurement. Each server computes one run at a time. What is
there when it becomes free runs next: a chunk of one prompt (512 tokens), or one token of every
session that waits for its next, together, whichever waited longest; so prompts and tokens take
turns as they do in the data plane. A run takes what `Service` says of its lengths: the constant
part once a run, the rest for each session of it. Between two runs of a session lies the wire: what
was measured beside computing. Each request goes to the less busy of two servers drawn at random, as
those of the load generator do.

A server may keep the prefixes of prompts, block by block, as many tokens as it is given room for;
those it was not asked for longest go first. What is kept is not computed again.

What it leaves out: other memory, refusals, and that a server of several cores may compute more than
one run at once, each then slower than it was measured alone.
"""

import heapq
import random
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from attnserve_loadtest.load.measured import ANSWERED, ROW, TOKEN, Measured
from attnserve_loadtest.load.plan import Arrival, Caller, Load
from attnserve_loadtest.load.requests import Generation
from attnserve_loadtest.report.load_schema import Service, ServiceTime

CHUNK = 512
_MOST_TOGETHER = 64

_ENDS, _COMES = range(2)


class Simulated:
    """Stands for the target of a load that was never sent."""

    def connect(self) -> Caller:
        """Nobody is called.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("a simulated cluster cannot be called")


@dataclass(slots=True)
class _Session:
    """One request under way."""

    number: int
    prompt: int
    tokens: int
    due: float
    server: int = 0
    done: int = 0  # tokens of the prompt
    made: int = 0  # tokens generated
    blocks: tuple[int, ...] = ()
    block_tokens: int = 0
    first: float = float("nan")
    last: float = 0.0  # when the last output was there
    since: float = 0.0  # in the server's queue


@dataclass(slots=True)
class _Server:
    """One server: what waits, whether it computes, and what it has kept, oldest first."""

    prompts: deque[_Session] = field(default_factory=deque)
    steps: deque[_Session] = field(default_factory=deque)
    busy: bool = False
    outstanding: int = 0
    worked: float = 0.0
    kept: OrderedDict[int, None] = field(default_factory=OrderedDict)


@dataclass(frozen=True)
class Cluster:
    """What is simulated.

    Attributes:
        service: how long computing takes, and the wire.
        servers: how many.
        together: sessions whose tokens run together, at most.
        prefix_tokens: of prefixes that each server keeps.
        seed: of the choice of servers.
    """

    service: Service
    servers: int
    together: int = _MOST_TOGETHER
    prefix_tokens: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Simulation:
    """What came out.

    Attributes:
        measured: as of a load that was measured: due times and the rest, in simulated seconds.
        busy: share of the time that servers computed, mean.
        found: share of all prompts' tokens that a server had kept.
        seconds: simulated, until the last answer.
    """

    measured: Measured
    busy: float
    found: float
    seconds: float


def simulate(
    arrivals: Sequence[Arrival],
    cluster: Cluster,
    *,
    step: Callable[[int], None] = lambda _: None,
) -> Simulation:
    """Run traffic through a simulated cluster.

    Args:
        arrivals: by due time; requests with one answer are prompts without tokens.
        cluster: the servers.
        step: told now and then how many requests have been answered since it was last told.

    Raises:
        ValueError: the service times lack what the traffic needs.
    """
    return _Run(arrivals, cluster, step).run()


class _Run:
    def __init__(
        self, arrivals: Sequence[Arrival], cluster: Cluster, step: Callable[[int], None]
    ) -> None:
        service = cluster.service
        prompt = service.prompt or service.single
        has_tokens = any(
            isinstance(each.request, Generation) and each.request.tokens for each in arrivals
        )
        if prompt is None or (has_tokens and service.step is None):
            raise ValueError("there are no service times of prompts or of tokens")
        self._prompt: ServiceTime = prompt
        self._step: ServiceTime = service.step or prompt
        self._prompt_wire = service.prompt_wire_seconds or service.single_wire_seconds or 0.0
        self._step_wire = service.step_wire_seconds or 0.0
        self._together, self._prefix_tokens = cluster.together, cluster.prefix_tokens
        self._random = random.Random(cluster.seed)
        self._servers = [_Server() for _ in range(cluster.servers)]
        self._found = 0
        self._arrivals = arrivals
        self._told = step
        self._events: list[tuple[float, int, int, int, list[_Session]]] = []
        self._count = 0
        self._sessions: list[_Session] = []
        self._ended = np.full(len(arrivals), np.nan)
        # Millions: arrays take a fraction of what lists do.
        self._token_rows, self._token_context = array("q"), array("q")
        self._token_took, self._token_at = array("d"), array("d")

    def run(self) -> Simulation:
        """All events, in the order of time."""
        upcoming = iter(enumerate(self._arrivals))
        following = next(upcoming, None)
        events, now, answered = self._events, 0.0, 0
        while events or following is not None:
            # Arrivals are in order already: they need no place in the heap.
            if following is not None and (not events or following[1].due <= events[0][0]):
                number, arrival = following
                now = arrival.due
                self._arrive(number, arrival)
                following = next(upcoming, None)
                continue
            now, _, kind, index, sessions = heapq.heappop(events)
            if kind == _ENDS:
                answered += self._end(now, index, sessions)
                if answered >= 100:
                    self._told(answered)
                    answered = 0
            else:
                self._queue(now, index, sessions)
        self._told(answered)
        return self._result(now)

    def _arrive(self, number: int, arrival: Arrival) -> None:
        request = arrival.request
        if isinstance(request, Generation):
            session = _Session(number, request.prompt, request.tokens, arrival.due)
            session.blocks, session.block_tokens = request.blocks, request.block_tokens
        else:
            session = _Session(number, request.seq_len, 0, arrival.due)
        servers = self._servers
        first = self._random.randrange(len(servers))
        if len(servers) > 1:
            second = (first + self._random.randrange(1, len(servers))) % len(servers)
            if servers[second].outstanding < servers[first].outstanding:
                first = second
        session.server = first
        servers[first].outstanding += 1
        self._sessions.append(session)
        # Some of the wire comes after the server; all of it is added before.
        self._push(arrival.due + self._prompt_wire, _COMES, first, [session])

    def _queue(self, now: float, index: int, sessions: list[_Session]) -> None:
        server = self._servers[index]
        for session in sessions:
            session.since = now
            if session.blocks and not session.done:
                session.done = self._kept(server, session)
                self._found += session.done
            (server.steps if session.done >= session.prompt else server.prompts).append(session)
        if not server.busy:
            self._start(now, index)

    def _start(self, now: float, index: int) -> None:
        server = self._servers[index]
        prompts, steps = server.prompts, server.steps
        if not prompts and not steps:
            server.busy = False
            return
        server.busy = True
        if prompts and (not steps or prompts[0].since <= steps[0].since):
            session = prompts.popleft()
            upto = min(session.prompt, session.done + CHUNK)
            took = self._prompt.at(upto) - (self._prompt.at(session.done) if session.done else 0.0)
            session.done = upto
            batch = [session]
        else:
            count = min(len(steps), self._together)
            batch = [steps.popleft() for _ in range(count)]
            of = self._step
            took = of.constant
            for each in batch:
                context = each.prompt + each.made + 1
                took += of.linear * context + of.quadratic * context * context
        server.worked += took
        self._push(now + took, _ENDS, index, batch)

    def _end(self, now: float, index: int, batch: list[_Session]) -> int:
        """A run is over: outputs go out, the next run starts. How many requests were answered."""
        server, ended = self._servers[index], 0
        returning = []
        session = batch[0]
        if session.done < session.prompt:
            session.since = now
            server.prompts.append(session)
        elif session.first != session.first:
            session.first = session.last = now
            if session.blocks:
                self._keep(server, session)
            if session.tokens:
                returning.append(session)
            else:
                ended += self._answer(now, session)
        else:
            for session in batch:
                session.made += 1
                self._token_rows.append(session.number)
                self._token_took.append(now - session.last)
                self._token_at.append(now)
                self._token_context.append(session.prompt + session.made)
                session.last = now
                if session.made < session.tokens:
                    returning.append(session)
                else:
                    ended += self._answer(now, session)
        if returning:
            self._push(now + self._step_wire, _COMES, index, returning)
        self._start(now, index)
        return ended

    def _answer(self, now: float, session: _Session) -> int:
        self._ended[session.number] = now
        self._servers[session.server].outstanding -= 1
        return 1

    def _kept(self, server: _Server, session: _Session) -> int:
        """Tokens that a prompt begins with and the server has; one token at least is left."""
        blocks = 0
        for block in session.blocks:
            if block not in server.kept:
                break
            server.kept.move_to_end(block)
            blocks += 1
        return min(blocks * session.block_tokens, session.prompt - 1)

    def _keep(self, server: _Server, session: _Session) -> None:
        """Keep a prompt's full blocks, as far as there is room."""
        most = self._prefix_tokens // session.block_tokens
        for block in session.blocks[: min(most, session.prompt // session.block_tokens)]:
            server.kept[block] = None
            server.kept.move_to_end(block)
        while len(server.kept) > most:
            server.kept.popitem(last=False)

    def _push(self, time: float, kind: int, index: int, sessions: list[_Session]) -> None:
        self._count += 1  # so that events of one time keep their order
        heapq.heappush(self._events, (time, self._count, kind, index, sessions))

    def _result(self, now: float) -> Simulation:
        rows = np.zeros(len(self._sessions), ROW)
        for name in ("due", "first"):
            rows[name] = [getattr(session, name) for session in self._sessions]
        rows["sent"] = rows["due"]
        rows["done"] = self._ended
        rows["compute"] = rows["queue"] = np.nan
        rows["outcome"] = ANSWERED
        rows["length"] = [session.prompt for session in self._sessions]
        rows["tokens"] = [session.tokens for session in self._sessions]
        rows["target"] = [session.server for session in self._sessions]
        tokens = np.zeros(len(self._token_rows), TOKEN)
        tokens["row"] = self._token_rows
        tokens["at"] = self._token_at
        tokens["took"] = self._token_took
        tokens["context"] = self._token_context
        tokens["compute"] = np.nan
        seconds = _counted(rows["due"])
        load = Load(Simulated(), seconds, 0.0, schedule=tuple(self._arrivals))
        busy = sum(server.worked for server in self._servers) / (now * len(self._servers) or 1.0)
        found = self._found / max(1, int(np.sum(rows["length"])))
        return Simulation(Measured(load, rows, tokens), busy, found, now)


def _counted(due: NDArray[np.float64]) -> float:
    """Counted time: until just after the last arrival, so that it counts."""
    return float(np.nextafter(due[-1], np.inf)) if len(due) and due[-1] > 0 else 1.0
