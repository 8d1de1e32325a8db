"""How the SDK's channels are set up, and which transport a request takes."""

import json

# One message cannot hold more than 2 GiB - 1; what it may hold is the server's to limit.
_UNLIMITED = -1

# Above this many bytes of tensors, both ways together, a request goes over AttendStream in chunks.
STREAM_THRESHOLD_BYTES = 1 << 20
CHUNK_BYTES = 1 << 20

# Memory to share with a server on the same host, unless told otherwise.
SHARED_MEMORY_BYTES = 1 << 30

SERVICE = "attnserve.v1.AttentionService"

# UNAVAILABLE is retried by grpc itself (https://grpc.io/docs/guides/retry/). Every method but
# Decode can be repeated safely. grpc gives up retrying a call once it has buffered more than
# grpc.per_rpc_retry_buffer_size of it, so large requests are tried again only while connecting.
_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [
                {"service": SERVICE, "method": method}
                for method in (
                    "Attend",
                    "AttendStream",
                    "AttendTokens",
                    "ListModels",
                    "GetModel",
                    "ServerInfo",
                )
            ],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "2s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}

CHANNEL_OPTIONS: list[tuple[str, str | int]] = [
    ("grpc.max_receive_message_length", _UNLIMITED),
    ("grpc.max_send_message_length", _UNLIMITED),
    ("grpc.enable_retries", 1),
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
]


def method_path(method: str) -> str:
    """The path of a method on the wire."""
    return f"/{SERVICE}/{method}"
