"""How the SDK's channels are set up, and which transport a request takes."""

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
]


def method_path(method: str) -> str:
    """The path of a method on the wire."""
    return f"/{SERVICE}/{method}"
