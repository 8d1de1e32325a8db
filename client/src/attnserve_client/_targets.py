"""What a client is made for: one server, or several."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

from attnserve_client import _arguments as arguments
from attnserve_client._cluster import Cluster, by_held
from attnserve_client._cluster_flows import ClusterFlows
from attnserve_client._cluster_places import following, place_of
from attnserve_client._cluster_watch import watch
from attnserve_client._errors import MovedSession
from attnserve_client._flows import Flow
from attnserve_client._servers import FollowedServers, Server
from attnserve_client._session_state import Connection, SessionState
from attnserve_client._sharded_flows import ShardedFlows
from attnserve_client._sharing import SharedArrays, Sharing

S = TypeVar("S", bound=SessionState)

# One server, or several.
Target = str | Sequence[str]


class Reach(Protocol[S]):
    """Reaches a server, without waiting for it."""

    def __call__(self, address: str, *, authority: str | None = None) -> Server[S]:
        """By its address; `authority`: the name that it goes by, None: the address."""


class Targeted(SharedArrays, Generic[S]):
    """What both clients have of their servers.

    Args:
        target: as the client has it.
        reach: reaches a server.
        start: runs a flow beside everything else.
        look_up: has what waits for addresses run, and gives them; in asyncio, awaited.
        make_sharded: a session over several servers, of a model and so many layers.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.
    """

    def __init__(
        self,
        target: Target,
        reach: Reach[S],
        start: Callable[[Flow[None]], None],
        look_up: Callable[[Callable[[], list[str]]], Any],
        make_sharded: Callable[[ShardedFlows[S], str, int], S],
    ) -> None:
        super().__init__(self._sharing_now)
        self._reach, self._start = reach, start
        self._followed = FollowedServers[S](start)
        self._server: Server[S] | None = None
        self._cluster: Cluster[S] | None = None
        self._name: str | None = None
        self._flows: Any  # those of the server, or of the cluster
        place = place_of(target) if isinstance(target, str) else None
        if place is not None:
            self._name = place.target
            self._cluster = Cluster(
                lambda address: reach(address, authority=place.authority),
                start,
                watch,
                resolve=following(place, look_up),
            )
        elif isinstance(target, str):
            self._server = reach(arguments.text("target", target, empty=False))
        else:
            self._cluster = Cluster(reach, start, watch, addresses=_addresses("target", target))
        if self._cluster is None:
            assert self._server is not None
            self._flows = self._server.flows
        else:
            self._flows = ClusterFlows(self._cluster, make_sharded)

    @property
    def servers(self) -> tuple[str, ...]:
        """The addresses of the servers; set it to have others from now on.

        What is on a server that is gone from it, sessions, streams and calls, ends there; then its
        connection is closed. It can be set if the client was made with a list.
        """
        if self._cluster is None:
            assert self._server is not None
            return (self._server.address,)
        return self._cluster.addresses

    @servers.setter
    def servers(self, addresses: Sequence[str]) -> None:
        if self._cluster is None or self._name is not None:
            target = self._name or self.servers[0]
            raise ValueError(
                f"servers: set on a client of {target!r}; allowed: on one made with a list"
            )
        self._cluster.replace(_addresses("servers", addresses))

    @property
    def server_states(self) -> Mapping[str, str]:
        """Of each of several servers by its address: "serving", or why nothing new goes there.

        Raises:
            ValueError: the client was made for one server, which it does not watch.
        """
        if self._cluster is None:
            raise ValueError(
                f"server_states: of a client of {self.servers[0]!r}; allowed: of several servers"
            )
        return self._cluster.states

    def _server_to_stay(self) -> Server[S]:
        """One for what stays: the only one, or one that holds little."""
        if self._cluster is None:
            assert self._server is not None
            return self._server
        member = self._cluster.any_member(by_held)
        if member is None:
            raise self._cluster.nobody("AttendStream")
        return member.server

    def _reached(self, moved: MovedSession) -> Connection:
        """The connection to where a session went: to one of the servers, or to another."""
        own = self._server
        if self._cluster is not None:
            own = self._cluster.present(moved.address)
        elif own is not None and own.address != moved.address:
            own = None
        if own is not None:
            return own.connection
        authority = moved.authority or None
        return self._followed.of(
            moved.address, lambda: self._reach(moved.address, authority=authority)
        ).connection

    def _sharing_now(self) -> Sharing | None:
        """Memory to make arrays in."""
        return self._server_to_stay().sharing

    def _to_close(self) -> list[Server[S]]:
        """All servers, for the last time."""
        if self._cluster is None:
            assert self._server is not None
            return [self._server, *self._followed.close()]
        return [*self._cluster.close(), *self._followed.close()]


def _addresses(name: str, given: Any) -> list[str]:
    """The addresses of several servers."""
    allowed = "a target, or a list of targets, one or more and each once"
    each = arguments.items(name, given, allowed)
    addresses = [
        arguments.text(f"{name}[{index}]", address, empty=False)
        for index, address in enumerate(each)
    ]
    if not addresses or len(set(addresses)) < len(addresses):
        raise arguments.refused(name, given, allowed)
    return addresses
