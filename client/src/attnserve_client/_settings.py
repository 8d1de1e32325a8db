"""What clients are made with."""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import grpc

from attnserve_client import _arguments as arguments
from attnserve_client import _channel
from attnserve_client._call_events import Metadata

PathLike = str | os.PathLike[str]

_COMPRESSIONS = {
    "gzip": grpc.Compression.Gzip,
    "deflate": grpc.Compression.Deflate,
    None: grpc.Compression.NoCompression,
}
# https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md: Header-Name
_HEADER = re.compile(r"[0-9a-z_.-]+")
_MOST_SHARED_BYTES = 1 << 46


class ClientOptions(TypedDict, total=False):
    """What clients take by name, beside their target.

    Attributes:
        credentials: for TLS, as grpc makes them; None is a plaintext channel, unless one of the
            three files is given.
        root_certificates: PEM file of the certificates to trust; None: grpc's own.
        private_key, certificate_chain: PEM files of the client's own, both or none.
        metadata: names and values sent with each call, a mapping or pairs. Values are text; of
            names that end with "-bin", bytes.
        channel_options: grpc's, as pairs of name and value; they go before the client's own.
        compression: of requests: "gzip", "deflate", or None: none. Floats compress badly.
        keepalive_time: seconds without traffic after which a ping is sent; None: never.
        keepalive_timeout: seconds that its answer may take; None: grpc's default, 20.
        keepalive_permit_without_calls: ping while no call is under way, too.
        stream_threshold_bytes: requests whose tensors, both ways, exceed this go over AttendStream
            in chunks.
        shared_memory: put the tensors of `attend`, both ways, into memory shared with the server,
            which must be on this host and run as this user. Arrays that `shared_empty` or `shared`
            made are not copied. A result's arrays take up shared memory as long as they live.
        shared_memory_bytes: how much to share, at most; pages are claimed as arrays need them.
        follow_moved: go after sessions that their server, which drains, hands to another one; else
            they fail with `error.moved`.
    """

    credentials: grpc.ChannelCredentials | None
    root_certificates: PathLike | None
    private_key: PathLike | None
    certificate_chain: PathLike | None
    metadata: Mapping[str, str | bytes] | Iterable[tuple[str, str | bytes]]
    channel_options: Iterable[tuple[str, str | int]]
    compression: str | None
    keepalive_time: float | None
    keepalive_timeout: float | None
    keepalive_permit_without_calls: bool
    stream_threshold_bytes: int
    shared_memory: bool
    shared_memory_bytes: int
    follow_moved: bool


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """What was given, checked.

    Attributes:
        own_channel_options: those that do not depend on the target.
        shared_memory_bytes: None: no memory is shared.
    """

    credentials: grpc.ChannelCredentials | None
    metadata: Metadata
    own_channel_options: list[tuple[str, str | int]]
    compression: grpc.Compression
    stream_threshold_bytes: int
    shared_memory_bytes: int | None
    follow_moved: bool

    def channel_options(
        self, target: str, authority: str | None = None
    ) -> list[tuple[str, str | int]]:
        """Of the channel to a target; `authority`: the name that it goes by, None: the target."""
        named = [] if authority is None else [("grpc.default_authority", authority)]
        return [*self.own_channel_options, *_channel.options(target), *named]


def settings(
    *,
    credentials: grpc.ChannelCredentials | None = None,
    root_certificates: PathLike | None = None,
    private_key: PathLike | None = None,
    certificate_chain: PathLike | None = None,
    metadata: Mapping[str, str | bytes] | Iterable[tuple[str, str | bytes]] = (),
    channel_options: Iterable[tuple[str, str | int]] = (),
    compression: str | None = None,
    keepalive_time: float | None = None,
    keepalive_timeout: float | None = None,
    keepalive_permit_without_calls: bool = False,
    stream_threshold_bytes: int = _channel.STREAM_THRESHOLD_BYTES,
    shared_memory: bool = False,
    shared_memory_bytes: int = _channel.SHARED_MEMORY_BYTES,
    follow_moved: bool = True,
) -> ClientSettings:
    """Check the arguments of a client; those by name as `ClientOptions` has them.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.
        OSError: a file cannot be read.
    """
    files = {
        "root_certificates": root_certificates,
        "private_key": private_key,
        "certificate_chain": certificate_chain,
    }
    if credentials is not None:
        kind = "grpc.ChannelCredentials, or None: plaintext"
        arguments.kind("credentials", credentials, grpc.ChannelCredentials, kind)
        given = [name for name, file in files.items() if file is not None]
        if given:
            raise ValueError(f"{given[0]}: given beside credentials; allowed: one of them")
    arguments.one_of("compression", compression, _COMPRESSIONS, ", or None: none")
    shared = arguments.integer("shared_memory_bytes", shared_memory_bytes, 1, _MOST_SHARED_BYTES)
    return ClientSettings(
        credentials=credentials or _from_files(files),
        metadata=_metadata(metadata),
        own_channel_options=[
            *_options(channel_options),
            *_keepalive(keepalive_time, keepalive_timeout, keepalive_permit_without_calls),
        ],
        compression=_COMPRESSIONS[compression],
        stream_threshold_bytes=arguments.integer(
            "stream_threshold_bytes", stream_threshold_bytes, 0, arguments.INT64
        ),
        shared_memory_bytes=shared if arguments.flag("shared_memory", shared_memory) else None,
        follow_moved=arguments.flag("follow_moved", follow_moved),
    )


def _from_files(files: Mapping[str, PathLike | None]) -> grpc.ChannelCredentials | None:
    """Credentials of PEM files; None if none is given."""
    contents = {}
    for name, file in files.items():
        if file is not None:
            arguments.kind(name, file, (str, os.PathLike), "the path of a PEM file, or None")
            try:
                contents[name] = Path(file).read_bytes()
            except ValueError as error:  # a path that no file can have
                raise ValueError(f"{name}: given {file!r} ({error}); allowed: a path") from None
            except OSError as error:
                raise type(error)(
                    error.errno, f"{name}: given a file that cannot be read: {error.strerror}", file
                ) from None
            if b"-----BEGIN" not in contents[name]:
                raise arguments.refused(name, file, "the path of a PEM file")
    for name, other in (
        ("private_key", "certificate_chain"),
        ("certificate_chain", "private_key"),
    ):
        if name in contents and other not in contents:
            raise ValueError(f"{name}: given without {other}; allowed: both, or none")
    return grpc.ssl_channel_credentials(**contents) if contents else None


def _metadata(given: Any) -> Metadata:
    allowed = "a mapping, or pairs of name and value"
    pairs = (
        list(given.items())
        if isinstance(given, Mapping)
        else arguments.items("metadata", given, allowed)
    )
    for pair in pairs:
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise arguments.mistyped("metadata", pair, allowed)
        name, value = pair
        if not isinstance(name, str) or not _HEADER.fullmatch(name) or name.startswith("grpc-"):
            raise arguments.refused(
                "metadata", name, "names of 0-9, a-z, _, . and -, that do not begin with grpc-"
            )
        if not isinstance(value, bytes if name.endswith("-bin") else str):
            raise arguments.mistyped(f"metadata[{name!r}]", value, "text; of names in -bin, bytes")
        if isinstance(value, str) and not (value.isascii() and value.isprintable()):
            raise arguments.refused(f"metadata[{name!r}]", value, "printable ASCII")
    return tuple(pairs)


def _options(given: Any) -> list[tuple[str, str | int]]:
    allowed = "pairs of a name and an integer or a text"
    options = arguments.items("channel_options", given, allowed)
    for pair in options:
        if (
            not isinstance(pair, tuple)
            or len(pair) != 2
            or not isinstance(pair[0], str)
            or not isinstance(pair[1], int | str)
        ):
            raise arguments.mistyped("channel_options", pair, allowed)
        if isinstance(pair[1], int) and not -(1 << 31) <= pair[1] < 1 << 31:
            raise arguments.refused("channel_options", pair, "integers of 32 bits")
    return options


def _keepalive(
    time: float | None, timeout: float | None, without_calls: bool
) -> list[tuple[str, str | int]]:
    options: list[tuple[str, str | int]] = []
    for name, given in (("keepalive_time", time), ("keepalive_timeout", timeout)):
        wait = arguments.seconds(name, given)
        if wait is not None:
            most = (1 << 31) - 1
            options.append((f"grpc.{name}_ms", min(most, max(1, round(wait * 1000)))))
    if arguments.flag("keepalive_permit_without_calls", without_calls):
        options.append(("grpc.keepalive_permit_without_calls", 1))
    return options
