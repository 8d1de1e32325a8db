"""How the SDK's channels are set up, and which transport a request takes."""

from attnserve_proto.targets import is_local

# One message cannot hold more than 2 GiB - 1; what it may hold is the server's to limit.
_UNLIMITED = -1

# Above this many bytes of tensors, both ways together, a request goes over AttendStream in chunks.
STREAM_THRESHOLD_BYTES = 4 << 20
CHUNK_BYTES = 1 << 20

# Memory to share with a server on the same host, unless told otherwise.
SHARED_MEMORY_BYTES = 1 << 30

# https://github.com/grpc/grpc/blob/master/doc/health-checking.md
HEALTH_CHECK = "/grpc.health.v1.Health/Check"

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


def options(target: str) -> list[tuple[str, str | int]]:
    """The options of a channel to a target.

    grpc goes through the proxy that the environment names (`http_proxy` and its kin, less
    `no_proxy`). A proxy elsewhere cannot reach this host's loopback, so such a target goes direct.
    """
    return CHANNEL_OPTIONS + _WITHOUT_PROXY if is_local(target) else CHANNEL_OPTIONS


def method_path(method: str) -> str:
    """The path of a method on the wire."""
    return f"/{SERVICE}/{method}"
