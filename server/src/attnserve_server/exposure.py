"""Whether a server may be reached by others without TLS, or without knowing who they are."""

import ipaddress
import socket

from attnserve_server.settings import Settings, SettingsError


class ExposureError(SettingsError):
    """It would be reached by others, unguarded, and was not told that this is meant."""


def check(settings: Settings) -> None:
    """Refuse to be reached by others without TLS and identity, unless that was asked for.

    Raises:
        ExposureError: the message says what is missing.
    """
    if settings.insecure or is_local(settings.host):
        return
    missing = []
    if settings.tls_certificate is None:
        missing.append("TLS (--tls-certificate)")
    if not settings.identified:
        missing.append("callers' identity (--callers, --jwt-keys or --tls-client-authorities)")
    if missing:
        raise ExposureError(
            f"--host: given {settings.host}, where others can reach it, without "
            f"{' and without '.join(missing)}; allowed: 127.0.0.1, another address of this machine "
            "alone, or --insecure, if that is meant"
        )


def is_local(host: str) -> bool:
    """Whether an address to listen on is reached from this machine alone."""
    if host.startswith("unix"):
        return True
    bare = host.removeprefix("[").removesuffix("]")
    try:
        found = socket.getaddrinfo(bare, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError:
        return False  # it will not be able to listen there either
    return all(is_loopback(str(entry[4][0])) for entry in found)


def is_loopback(address: str) -> bool:
    """Whether an address, in numbers, is this machine's own."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(parsed, "ipv4_mapped", None)
    return (mapped or parsed).is_loopback
