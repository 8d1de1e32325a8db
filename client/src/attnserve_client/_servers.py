"""One server, as a client reaches it, and those that it did not name but was sent to."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from attnserve_client._client_flows import ClientFlows
from attnserve_client._flows import Call, Flow
from attnserve_client._session_state import Connection, SessionState
from attnserve_client._sharing import Sharing
from attnserve_client._transports import Transport

S = TypeVar("S", bound=SessionState)


@dataclass(frozen=True, eq=False)
class Server(Generic[S]):
    """What reaches one server.

    Attributes:
        address: as it was given.
        transport: to it.
        connection: what its sessions share.
        sharing: memory shared with it, if any is.
        flows: its calls, each tried until its time is up.
        once: its calls, each tried once.
        close: ends the connection; in asyncio, awaited.
    """

    address: str
    transport: Transport
    connection: Connection
    sharing: Sharing | None
    flows: ClientFlows[S]
    once: ClientFlows[S]
    close: Callable[[], Any]


# A server to which a session was followed is disconnected once so many seconds have passed and none
# is there: it is looked for with the next one that is reached.
_IDLE_SECONDS = 60.0


class FollowedServers(Generic[S]):
    """Servers that have sessions of a client which were somewhere else. Safe to share.

    Args:
        start: runs a flow beside everything else.
    """

    def __init__(self, start: Callable[[Flow[None]], None]) -> None:
        self._start = start
        self._lock = threading.Lock()  # guards what follows
        self._servers: dict[str, tuple[Server[S], float]] = {}

    def of(self, address: str, reach: Callable[[], Server[S]]) -> Server[S]:
        """The server of an address; `reach` makes it, if it is new."""
        now = time.monotonic()
        with self._lock:
            known = self._servers.get(address)
            server = reach() if known is None else known[0]
            self._servers[address] = server, now
            idle = [
                name
                for name, (each, used) in self._servers.items()
                if now - used > _IDLE_SECONDS and not each.connection.held
            ]
            left = [self._servers.pop(name)[0] for name in idle]
        for each in left:
            self._start(_closing(each))
        return server

    def close(self) -> list[Server[S]]:
        """Have none any more; those that are to be closed."""
        with self._lock:
            servers = [server for server, _ in self._servers.values()]
            self._servers.clear()
        return servers


def _closing(server: Server[S]) -> Flow[None]:
    yield Call(lambda left: server.close(), None)
