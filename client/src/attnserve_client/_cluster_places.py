"""Where the servers of a client are, if not in a list: behind a name, or in a file."""

import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from attnserve_proto.targets import addresses_of

from attnserve_client import _arguments as arguments
from attnserve_client._cluster import Cluster
from attnserve_client._flows import Call, Flow, Pause
from attnserve_client._session_state import SessionState

S = TypeVar("S", bound=SessionState)

_DNS, _FILE = "dns:///", "file://"
# Between two looks at a name, and at a file; while none of the servers there serves.
_NAME_SECONDS, _FILE_SECONDS, _TROUBLED_SECONDS = 5.0, 0.5, 1.0
# Of a file of addresses, bytes.
_MOST_FILE = 1 << 20
# No blanks, and nothing that a terminal would not show.
_ADDRESS = re.compile(r"[\x21-\x7e]{1,4095}")


@dataclass(frozen=True)
class Place:
    """Where servers are.

    Attributes:
        target: as the client was given it.
        look_up: their addresses as they are now. It waits; it raises OSError if they cannot be
            known, ValueError if what is there are none.
        seconds: between two look-ups.
        authority: the name that each server goes by; None: its address.
    """

    target: str
    look_up: Callable[[], list[str]]
    seconds: float
    authority: str | None = None


def place_of(target: str) -> Place | None:
    """Where a target's servers are, if it may have several: `dns:///name:port`, `file:///path`.

    Raises:
        ValueError: a name without a port, or a path that is none.
    """
    if target.startswith(_DNS):
        host, port = _host_and_port(target)
        return Place(target, lambda: addresses_of(host, port), _NAME_SECONDS, f"{host}:{port}")
    if target.startswith(_FILE):
        path = unquote(target.removeprefix(_FILE))
        if not path.startswith("/") or path.endswith("/") or "\0" in path:
            raise arguments.refused("target", target, "file:///path of a file with addresses")
        return Place(target, lambda: addresses_in(path), _FILE_SECONDS)
    return None


def _host_and_port(target: str) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{target.removeprefix(_DNS)}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or port is None:
        raise arguments.refused("target", target, "dns:///name:port")
    return host, port


def addresses_in(path: str) -> list[str]:
    """The targets that a file has, one a line; what follows a `#`, and empty lines, are nothing.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such file; the message names the line.
    """
    # Nobody may ever write into a pipe.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("is no ordinary file")
        data = file.read(_MOST_FILE + 1)
    if len(data) > _MOST_FILE:
        raise ValueError(f"has more than {_MOST_FILE} bytes")
    addresses = []
    for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), 1):
        address = line.partition("#")[0].strip()
        if address and not _ADDRESS.fullmatch(address):
            raise ValueError(f"line {number}: given {address[:60]!r}; allowed: one host:port")
        if address:
            addresses.append(address)
    return list(dict.fromkeys(addresses))


def following(
    place: Place, run: Callable[[Callable[[], list[str]]], Any]
) -> Callable[[Cluster[S]], Flow[None]]:
    """The flow that keeps a cluster's servers to those of a place.

    Args:
        place: where they are.
        run: has a look-up run and gives its addresses; in asyncio, awaited.
    """

    def flow(cluster: Cluster[S]) -> Flow[None]:
        while True:
            try:
                addresses = yield Call(lambda left: run(place.look_up), None)
            except (OSError, ValueError) as error:  # those that were known may be there still
                cluster.name_trouble = f"{place.target}: {error}"
            else:
                cluster.name_trouble = "" if addresses else f"{place.target}: has no addresses"
                cluster.replace(addresses)
            pause = place.seconds if cluster.serving() else min(place.seconds, _TROUBLED_SECONDS)
            if (yield Pause(pause)):
                return

    return flow
