"""The servers that sessions may be moved to."""

import logging
import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
from attnserve_proto.commands import Access
from attnserve_proto.targets import addresses_of, is_local

_DNS = "dns:///"
_OPTIONS: list[tuple[str, str | int]] = [
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """One of them.

    Attributes:
        address: as its callers take it.
        authority: the name that it goes by; empty: the address.
        metadata: of each call.
    """

    address: str
    authority: str
    channel: grpc.Channel
    metadata: tuple[tuple[str, str], ...]

    def knows(self, owner: str) -> bool:
        """Whether an owner of sessions, as MovingSession.caller has it, is the same caller there.

        By name it is; by address, callers of a Unix socket are none over TCP.
        """
        return owner.startswith("@") or (owner == "unix") == self.address.startswith("unix")


class Places:
    """All of them, until `close`.

    Args:
        targets: addresses, or names of several, `dns:///NAME:PORT`; what cannot be looked up is
            said in the log, and left out.
        access: how they are reached.
    """

    def __init__(self, targets: Sequence[str], access: Access) -> None:
        self._lock = threading.Lock()  # guards what follows
        self._next = 0
        self._left_out: set[Place] = set()
        found = dict.fromkeys(place for target in targets for place in _behind(target))
        self._places = [_place(address, authority, access) for address, authority in found]
        random.shuffle(self._places)  # servers that end together do not all begin with one

    def close(self) -> None:
        """Close the connections to them."""
        for place in self._places:
            place.channel.close()

    def in_turn(self) -> list[Place]:
        """All of them, each time beginning with the next one."""
        with self._lock:
            places = [place for place in self._places if place not in self._left_out]
            first = self._next % max(1, len(places))
            self._next += 1
        return places[first:] + places[:first]

    def leave_out(self, place: Place) -> None:
        """Give none again that did not answer."""
        with self._lock:
            self._left_out.add(place)


def _behind(target: str) -> list[tuple[str, str]]:
    """The addresses that a target stands for, each with the name that it goes by."""
    if not target.startswith(_DNS):
        return [(target, "")]
    name = target.removeprefix(_DNS)
    host, _, port = name.rpartition(":")
    try:
        addresses = addresses_of(host.strip("[]"), int(port))
    except OSError as error:
        _log.warning("servers not found", extra={"target": target, "error": str(error)})
        return []
    return [(address, name) for address in addresses]


def _place(address: str, authority: str, access: Access) -> Place:
    options = list(_OPTIONS)
    if authority:
        options.append(("grpc.default_authority", authority))
    if is_local(address):
        options.append(("grpc.enable_http_proxy", 0))
    if access.authorities or access.certificate:
        credentials = grpc.ssl_channel_credentials(
            Path(access.authorities).read_bytes() if access.authorities else None,
            Path(access.key).read_bytes() if access.key else None,
            Path(access.certificate).read_bytes() if access.certificate else None,
        )
        channel = grpc.secure_channel(address, credentials, options)
    else:
        channel = grpc.insecure_channel(address, options)
    metadata = (("authorization", f"Bearer {access.token}"),) if access.token else ()
    return Place(address, authority, channel, metadata)
