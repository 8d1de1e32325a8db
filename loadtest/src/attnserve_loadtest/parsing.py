"""Reads the values of command-line options, for argparse and for Locust's own command line."""

from argparse import ArgumentTypeError
from urllib.parse import urlsplit


def positive_int(text: str) -> int:
    """A whole number from 1.

    Raises:
        ArgumentTypeError: it is not one.
    """
    return _int_from(text, 1)


def count(text: str) -> int:
    """A whole number from 0.

    Raises:
        ArgumentTypeError: it is not one.
    """
    return _int_from(text, 0)


def positive_float(text: str) -> float:
    """A finite number above 0.

    Raises:
        ArgumentTypeError: it is not one.
    """
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def seq_lens(text: str) -> tuple[int, ...]:
    """Sequence lengths separated by commas, e.g. `64,128,256`: in order, each once.

    Raises:
        ArgumentTypeError: one is not a whole number from 1, or there is none.
    """
    return tuple(sorted({positive_int(part) for part in names(text)}))


def names(text: str) -> tuple[str, ...]:
    """Names separated by commas, each once, in the order given.

    Raises:
        ArgumentTypeError: there is none.
    """
    found = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not found:
        raise ArgumentTypeError(f"{text!r} holds no value")
    return found


def target(text: str) -> str:
    """`host:port` of a gRPC server; a scheme in front (`grpc://`, `http://`) is dropped.

    Raises:
        ArgumentTypeError: there is no port.
    """
    bare = text.strip().rstrip("/")
    if bare.startswith(("unix:", "dns:", "ipv4:", "ipv6:")):
        return bare
    try:
        parts = urlsplit(bare if "://" in bare else f"//{bare}")
        port = parts.port
    except ValueError:
        port = None
    if port is None or not parts.hostname:
        raise ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return parts.netloc


def _int_from(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise ArgumentTypeError(f"{text!r} is not a whole number from {least}")
    return value
