"""Where targets of gRPC are."""

import ipaddress
import re
import socket
from urllib.parse import unquote

# grpc's name syntax: https://github.com/grpc/grpc/blob/master/doc/naming.md
_TARGET = re.compile(
    r"(?:(?P<scheme>dns|ipv4|ipv6|unix|unix-abstract):)?(?://[^/]*/)?(?P<address>.*)", re.DOTALL
)
_LOOPBACK_NAMES = {"localhost", "ip6-localhost", "ip6-loopback"}


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
