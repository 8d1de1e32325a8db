"""The calls of a client of several servers, whoever waits for them."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Generic, TypeVar, Unpack

import grpc
import numpy as np

from attnserve_client import _arguments as arguments
from attnserve_client import _deadlines, _errors, _retries
from attnserve_client._attend import AttendOptions
from attnserve_client._client_flows import ClientFlows
from attnserve_client._cluster import Cluster, Kind, Member, by_calls, by_held, is_down
from attnserve_client._errors import AttnserveError
from attnserve_client._flows import Flow, Pause
from attnserve_client._messages import Tokens, TokensOptions
from attnserve_client._results import (
    AttendResult,
    Model,
    ServerInfo,
    StoredTensor,
    TokensResult,
)
from attnserve_client._servers import Server
from attnserve_client._session_files import PathOrFile
from attnserve_client._session_messages import METHOD, SessionOptions
from attnserve_client._session_state import SessionState
from attnserve_client._sharded_flows import ShardedFlows, sharded
from attnserve_client._shards import checked, options_of_parts

S = TypeVar("S", bound=SessionState)
T = TypeVar("T")

# Between two looks for a server that serves, seconds.
_LOOK_SECONDS = 0.01


class ClusterFlows(Generic[S]):
    """The calls of `ClientFlows`, each to one of several servers.

    What can be repeated safely is repeated elsewhere at once, until all servers have been asked;
    while none can be reached, until the time is up. What is on one server goes there alone.
    """

    def __init__(
        self, cluster: Cluster[S], make_sharded: Callable[[ShardedFlows[S], str, int], S]
    ) -> None:
        self._cluster = cluster
        self._make_sharded = make_sharded

    def attend(
        self,
        query: Any = None,
        key: Any = None,
        value: Any = None,
        *,
        timeout: float | None = 60.0,
        **options: Unpack[AttendOptions],
    ) -> Flow[AttendResult]:
        """As `ClientFlows.attend`; where its stored tensors are, or its arrays are shared."""
        tensors = [query, key, value, *options.values()]
        keeper = self._keeper("Attend", tensors)
        if keeper is not None:
            return (yield from keeper.flows.attend(query, key, value, timeout=timeout, **options))

        def call(flows: ClientFlows[S], left: float | None) -> Flow[AttendResult]:
            return flows.attend(query, key, value, timeout=left, **options)

        kind = "Attend", str(options.get("model"))
        return (yield from self._anywhere(kind, call, timeout, preferred=self._sharer(tensors)))

    def put_tensor(
        self, array: Any, *, lease: float | None = None, timeout: float | None = 60.0
    ) -> Flow[StoredTensor]:
        """As `ClientFlows.put_tensor`, on one of the servers: `server` says which."""

        def call(flows: ClientFlows[S], left: float | None) -> Flow[StoredTensor]:
            return flows.put_tensor(array, lease=lease, timeout=left)

        kind = "PutTensor", ""
        return (yield from self._anywhere(kind, call, timeout, mark=_kept_at))

    def renew_tensor(
        self, tensor: StoredTensor, *, lease: float | None = None, timeout: float | None = 10.0
    ) -> Flow[StoredTensor]:
        """As `ClientFlows.renew_tensor`."""
        keeper = self._keeper_of("RenewTensor", tensor)
        renewed = yield from keeper.flows.renew_tensor(tensor, lease=lease, timeout=timeout)
        return _kept_at(keeper, renewed)

    def drop_tensor(self, tensor: StoredTensor, *, timeout: float | None = 10.0) -> Flow[None]:
        """As `ClientFlows.drop_tensor`."""
        keeper = self._keeper_of("DropTensor", tensor)
        return (yield from keeper.flows.drop_tensor(tensor, timeout=timeout))

    def session(
        self, model: str = "", *, timeout: float | None = 60.0, **options: Unpack[SessionOptions]
    ) -> Flow[S]:
        """As `ClientFlows.session`, on the server that holds the fewer of two.

        With `shards`, each at another server, computed at the same time.
        """
        shards = options.pop("shards", None)
        if shards is not None:
            return (yield from self._open_shards(shards, model, timeout, options))
        return (yield from self.sessions(1, model, timeout=timeout, **options))[0]

    def sessions(
        self,
        count: int,
        model: str = "",
        *,
        timeout: float | None = 60.0,
        **options: Unpack[SessionOptions],
    ) -> Flow[list[S]]:
        """As `ClientFlows.sessions`: all on one server."""

        def call(flows: ClientFlows[S], left: float | None) -> Flow[list[S]]:
            return flows.sessions(count, model, timeout=left, **options)

        kind = METHOD, model or str(options.get("layer_models"))
        return (yield from self._anywhere(kind, call, timeout, load=by_held))

    def save(self, session: S, to: PathOrFile, *, timeout: float | None = None) -> Flow[None]:
        """As `ClientFlows.save`."""
        arguments.kind("session", session, SessionState, "a session")
        if session._sharded:
            raise ValueError("session: one with shards is not saved; allowed: one at one server")
        moves = session._connection.moves
        member = self._cluster.of(lambda server: server.connection.moves is moves)
        if member is None:
            raise ValueError("session: of another client; allowed: of this client's servers")
        return (yield from member.server.flows.save(session, to, timeout=timeout))

    def load(
        self,
        source: PathOrFile,
        *,
        max_tokens: int = 0,
        reserved_tokens: int = 0,
        lease: float | None = None,
        timeout: float | None = None,
    ) -> Flow[S]:
        """As `ClientFlows.load`; from a path, elsewhere if a server cannot hold it."""

        def call(flows: ClientFlows[S], left: float | None) -> Flow[S]:
            return flows.load(
                source,
                max_tokens=max_tokens,
                reserved_tokens=reserved_tokens,
                lease=lease,
                timeout=left,
            )

        # What was read of an open file is gone.
        repeats = isinstance(source, str | os.PathLike)
        kind = METHOD, "a saved session"
        return (yield from self._anywhere(kind, call, timeout, load=by_held, repeats=repeats))

    def attend_tokens(
        self,
        inputs: Tokens | None = None,
        *,
        timeout: float | None = 60.0,
        **options: Unpack[TokensOptions],
    ) -> Flow[TokensResult]:
        """As `ClientFlows.attend_tokens`."""

        def call(flows: ClientFlows[S], left: float | None) -> Flow[TokensResult]:
            return flows.attend_tokens(inputs, timeout=left, **options)

        return self._anywhere(("AttendTokens", str(options.get("model"))), call, timeout)

    def list_models(self, *, timeout: float | None = 10.0) -> Flow[list[Model]]:
        """All models and versions of all servers that serve, by name and version."""

        def call(flows: ClientFlows[S], left: float | None) -> Flow[list[Model]]:
            return flows.list_models(timeout=left)

        clock = _Clock(timeout)
        models = yield from self._anywhere(("ListModels", ""), call, timeout)
        found = {(model.name, model.version): model for model in models}
        for member in self._cluster.serving():
            try:
                more = yield from member.server.once.list_models(timeout=clock.left())
            except AttnserveError:  # others are there
                continue
            found = {(model.name, model.version): model for model in more} | found
        return sorted(found.values(), key=lambda model: (model.name, model.version))

    def get_model(
        self, name: str, version: str | int = "", *, timeout: float | None = 10.0
    ) -> Flow[Model]:
        """As `ClientFlows.get_model`, of a server that has it."""

        def call(flows: ClientFlows[S], left: float | None) -> Flow[Model]:
            return flows.get_model(name, version, timeout=left)

        return self._anywhere(("GetModel", name), call, timeout)

    def server_info(self, *, timeout: float | None = 10.0) -> Flow[ServerInfo]:
        """As `ClientFlows.server_info`, of one of the servers."""

        def call(flows: ClientFlows[S], left: float | None) -> Flow[ServerInfo]:
            return flows.server_info(timeout=left)

        return self._anywhere(("ServerInfo", ""), call, timeout)

    def _anywhere(
        self,
        kind: Kind,
        call: Callable[[ClientFlows[S], float | None], Flow[T]],
        timeout: float | None,
        *,
        load: Callable[[Member[S]], tuple[int, int]] = by_calls,
        preferred: Member[S] | None = None,
        without: Sequence[Member[S]] = (),
        mark: Callable[[Server[S], T], T] = lambda server, result: result,
        repeats: bool = True,
    ) -> Flow[T]:
        """Call some server, and others if it does not take it.

        Args:
            call: tries it once, in the seconds given.
            load, preferred: as `Cluster.take` has them.
            without: who is not asked.
            mark: the result as of a server.
            repeats: whether it can be tried more than once.

        Raises:
            AttnserveError: what a server said that others cannot mend; else, once all have been
                asked, what the first of them said; UNAVAILABLE if none could be reached in time.
        """
        cluster, clock = self._cluster, _Clock(timeout)
        tried: dict[Member[S], AttnserveError] = {}
        while True:
            member = cluster.take(kind, [*tried, *without], load, preferred)
            if member is not None:
                try:
                    result = yield from call(member.server.once, clock.left())
                    return mark(member.server, result)
                except (grpc.RpcError, AttnserveError) as error:
                    failure = _errors.from_call(error, kind[0])
                    failure.of_server(member.server.address)
                finally:
                    cluster.give_back(member)
                if not cluster.refused(member, kind, failure) or not repeats:
                    raise failure
                tried[member] = failure
                continue
            said = _said(tried)
            begins = cluster.begins
            if said is not None and not begins:
                raise said
            refusal = None if begins else cluster.earliest(kind, [*tried, *without])
            wait = _LOOK_SECONDS
            if refusal is not None:
                wait = max(0.0, refusal.until - time.monotonic())
            if not clock.allows(wait):
                if refusal is not None:
                    raise refusal.error
                raise said or next(iter(tried.values()), None) or cluster.nobody(kind[0])
            if (yield Pause(wait)):
                raise _errors.CancelledError("the client was closed", method=kind[0])
            if not begins:
                tried.clear()

    def _open_shards(
        self, shards: Any, model: str, timeout: float | None, options: SessionOptions
    ) -> Flow[S]:
        clock = _Clock(timeout)
        shards = checked(shards, len(self._cluster.addresses), options)
        described = yield from self.get_model(
            model, options.get("version", ""), timeout=clock.left()
        )
        options["version"] = described.version
        taken: list[Member[S]] = []
        opened: list[Any] = []
        try:
            for each in options_of_parts(shards, described, options):
                session = yield from self._anywhere(
                    (METHOD, model),
                    _opening(model, each),
                    clock.left(),
                    load=by_held,
                    without=taken,
                )
                opened.append(session)
                member = self._cluster.of(_has(session))
                if member is not None:
                    taken.append(member)
            # What servers had of the prefix may differ.
            shortest = min(session.length for session in opened)
            for session in opened:
                if session.length > shortest:
                    yield from session._flows.truncate(shortest, timeout=clock.left())
        except AttnserveError:
            for session in opened:
                yield from session._flows.close()
            raise

        def make(flows: ShardedFlows[S]) -> S:
            return self._make_sharded(flows, described.name, opened[0].num_layers)

        return make(sharded(shards, [session._flows for session in opened], make))

    def _keeper(self, method: str, tensors: list[Any]) -> Server[S] | None:
        """The server that keeps the stored ones among some tensors; None: there are none."""
        stored = [each for each in tensors if isinstance(each, StoredTensor)]
        places = {each.server for each in stored}
        if len(places) > 1:
            raise ValueError(
                f"tensors: stored at {' and '.join(sorted(places))}; allowed: at one server"
            )
        return self._keeper_of(method, stored[0]) if stored else None

    def _keeper_of(self, method: str, tensor: StoredTensor) -> Server[S]:
        """The server that keeps a stored tensor."""
        arguments.kind("tensor", tensor, StoredTensor, "what put_tensor gave")
        if not tensor.server:
            raise ValueError(
                "tensor: put by a client of one server; allowed: what this client's put_tensor gave"
            )
        server = self._cluster.at(tensor.server)
        if server is None:
            raise _errors.NotFoundError(
                f"tensor: kept at {tensor.server}, which is none of this client's servers",
                method=method,
            )
        return server

    def _sharer(self, tensors: list[Any]) -> Member[S] | None:
        """Whose shared memory some arrays lie in; None: nobody's. Elsewhere they are copied."""
        arrays = [each for each in tensors if isinstance(each, np.ndarray)]

        def lie_there(server: Server[S]) -> bool:
            sharing = server.sharing
            return sharing is not None and any(
                sharing.arena.offset_of(array) is not None for array in arrays
            )

        return self._cluster.of(lie_there)


def _opening(
    model: str, options: SessionOptions
) -> Callable[[ClientFlows[S], float | None], Flow[S]]:
    return lambda flows, left: flows.session(model, timeout=left, **options)


def _has(session: SessionState) -> Callable[[Server[S]], bool]:
    return lambda server: server.connection is session._connection


class _Clock:
    """The time of one call."""

    def __init__(self, timeout: float | None) -> None:
        timeout = arguments.seconds("timeout", timeout)
        self._deadline = _deadlines.until(timeout)
        self._until = self._deadline

    def left(self) -> float | None:
        """Seconds that the next try may take; None: any."""
        return _deadlines.left(self._deadline, _deadlines.LEAST_SECONDS)

    def allows(self, seconds: float) -> bool:
        """Whether there is time for another try after so many seconds."""
        now = time.monotonic()
        if self._until is None:  # an answer is waited for without end, a server is not
            self._until = now + _retries.UNTIMED_SECONDS
        return now + seconds < self._until


def _said(tried: dict[Member[S], AttnserveError]) -> AttnserveError | None:
    """Of how servers refused a call the one to raise: that which may pass; None: none was there."""
    said: Iterator[AttnserveError] = (each for each in tried.values() if not is_down(each))
    return min(said, key=lambda each: each.retry_after is None, default=None)


def _kept_at(server: Server[S], tensor: StoredTensor) -> StoredTensor:
    return replace(tensor, server=server.address)
