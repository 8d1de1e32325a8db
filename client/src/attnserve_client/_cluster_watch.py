"""What goes on beside a client's calls: how its servers are, and where."""

import socket
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

import grpc
from attnserve_proto import encoding

from attnserve_client import _arguments as arguments
from attnserve_client import _errors
from attnserve_client._cluster import Cluster, Member
from attnserve_client._flows import Call, Flow, Pause
from attnserve_client._session_state import SessionState

S = TypeVar("S", bound=SessionState)

# A server in trouble is asked how it is after so many seconds; one that serves after so many times
# that, or when a call has failed. What its answer may take, seconds.
_LOOK_SECONDS, _SERVING_LOOKS, _ANSWER_SECONDS = 0.25, 4, 2.0
# Between two look-ups of a name; while none of its addresses serves.
_NAME_SECONDS, _TROUBLED_NAME_SECONDS = 5.0, 1.0

# HealthCheckResponse with status 1, SERVING (https://github.com/grpc/grpc-proto, grpc/health/v1).
_SERVING = encoding.tag(1, 0) + encoding.varint(1)
_DNS = "dns:///"


def watch(cluster: Cluster[S], member: Member[S]) -> Flow[None]:
    """See to a member, until the client is closed, or it is removed and nothing is on it."""
    while not member.removed or member.busy:
        if not member.removed:
            cluster.told(member, (yield from _trouble(member)))
        for _ in range(_SERVING_LOOKS):
            if (yield Pause(_LOOK_SECONDS)):
                return
            if member.trouble or member.removed:
                break
    cluster.left(member)
    yield Call(lambda left: member.server.close(), None)


def _trouble(member: Member[S]) -> Flow[str]:
    """Why a server does not serve; empty: it does."""
    try:
        answer: bytes = yield Call(member.server.transport.health, _ANSWER_SECONDS)
    except grpc.RpcError as error:
        failure = _errors.from_rpc_error(error, "Check")
        if failure.code == grpc.StatusCode.UNIMPLEMENTED:
            return ""  # as grpc's own clients have it: a server without health checks serves
        if failure.code == grpc.StatusCode.DEADLINE_EXCEEDED:
            return f"no answer within {_ANSWER_SECONDS:g} s"
        return f"{failure.code.name}: {failure.message}"
    except Exception as error:  # of grpc, to whoever uses what was closed
        return f"cannot be asked: {error}"
    return "" if answer == _SERVING else "not serving: it drains, or has yet to begin"


def host_and_port(target: str) -> tuple[str, int] | None:
    """The name whose addresses are all used, of `dns:///name:port`; None: another target.

    Raises:
        ValueError: it has no port.
    """
    if not target.startswith(_DNS):
        return None
    try:
        parts = urlsplit(f"//{target.removeprefix(_DNS)}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or port is None:
        raise arguments.refused("target", target, "dns:///name:port")
    return host, port


def addresses_of(host: str, port: int) -> list[str]:
    """All addresses behind a name, as targets, ascending.

    Raises:
        OSError: there are none.
    """
    found = {
        (family, address[0])
        for family, _, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    }
    return sorted(
        f"[{address}]:{port}" if family == socket.AF_INET6 else f"{address}:{port}"
        for family, address in found
    )


def resolving(name: str, look_up: Callable[[], Any]) -> Callable[[Cluster[S]], Flow[None]]:
    """The flow that keeps a cluster's servers to the addresses behind a name.

    Args:
        name: for messages.
        look_up: gives the addresses; in asyncio, awaited.
    """

    def flow(cluster: Cluster[S]) -> Flow[None]:
        while True:
            try:
                addresses = yield Call(lambda left: look_up(), None)
            except OSError as error:  # those that were known may be there still
                cluster.name_trouble = f"{name}: {error}"
            else:
                cluster.name_trouble = ""
                cluster.replace(addresses)
            pause = _NAME_SECONDS if cluster.serving() else _TROUBLED_NAME_SECONDS
            if (yield Pause(pause)):
                return

    return flow
