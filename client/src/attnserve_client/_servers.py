"""One server, as a client reaches it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from attnserve_client._client_flows import ClientFlows
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
