"""How the SDK's channels are set up, and which transport a request takes."""

import ipaddress
import re
from urllib.parse import unquote

# One message cannot hold more than 2 GiB - 1; what it may hold is the server's to limit.
_UNLIMITED = -1

# Above this many bytes of tensors, both ways together, a request goes over AttendStream in chunks.
STREAM_THRESHOLD_BYTES = 4 << 20
CHUNK_BYTES = 1 << 20

# Memory to share with a server on the same host, unless told otherwise.
SHARED_MEMORY_BYTES = 1 << 30

SERVICE = "attnserve.v1.AttentionService"

CHANNEL_OPTIONS: list[tuple[str, str | int]] = [
    ("grpc.max_receive_message_length", _UNLIMITED),
    ("grpc.max_send_message_length", _UNLIMITED),
    # See `_retries`. Without it, sending takes up to a third less time.
    ("grpc.enable_retries", 0),
    # grpc waits from 1 s to 2 min between attempts to connect, during which every call fails at
    # once: a server that was away for a minute would be found again only minutes later.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]

_WITHOUT_PROXY: list[tuple[str, str | int]] = [("grpc.enable_http_proxy", 0)]

# grpc's name syntax: https://github.com/grpc/grpc/blob/master/doc/naming.md
_TARGET = re.compile(
    r"(?:(?P<scheme>dns|ipv4|ipv6|unix|unix-abstract):)?(?://[^/]*/)?(?P<address>.*)", re.DOTALL
)
_LOOPBACK_NAMES = {"localhost", "ip6-localhost", "ip6-loopback"}


def options(target: str) -> list[tuple[str, str | int]]:
    """The options of a channel to a target.

    grpc goes through the proxy that the environment names (`http_proxy` and its kin, less
    `no_proxy`). A proxy elsewhere cannot reach this host's loopback, so such a target goes direct.
    """
    return CHANNEL_OPTIONS + _WITHOUT_PROXY if is_local(target) else CHANNEL_OPTIONS


def is_local(target: str) -> bool:
    """Whether a target, in grpc's syntax, is on this host by its very address.

    Names other than localhost are not resolved for this.
    """
    match = _TARGET.fullmatch(target)
    assert match is not None  # every string matches
    scheme, address = match["scheme"] or "dns", unquote(match["address"])
    if scheme.startswith("unix"):
        return True
    every = [address] if scheme == "dns" else address.split(",")
    return all(_is_loopback(_host(each)) for each in every)


def _host(address: str) -> str:
    """The host of `host`, `host:port`, `[host]:port` or an IPv6 address."""
    if address.startswith("["):
        return address[1:].partition("]")[0]
    return address if address.count(":") > 1 else address.partition(":")[0]


def _is_loopback(host: str) -> bool:
    name = host.removesuffix(".").lower()
    if name in _LOOPBACK_NAMES:
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    within = getattr(address, "ipv4_mapped", None) or address
    # 0.0.0.0 and ::, as addresses to connect to, are this host.
    return bool(within.is_loopback or within.is_unspecified)


def method_path(method: str) -> str:
    """The path of a method on the wire."""
    return f"/{SERVICE}/{method}"
