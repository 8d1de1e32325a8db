"""The attnserve SDK: attention on a server, NumPy in and NumPy out.

>>> from attnserve_client import AttentionClient
>>> with AttentionClient("127.0.0.1:8001") as client:
...     result = client.attend(query, key, value, model="causal")
>>> result.output, result.timings
"""

from attnserve_proto.allocator import keep_freed_memory

from attnserve_client._async_client import AsyncAttentionClient
from attnserve_client._async_stream import AsyncAttendStream
from attnserve_client._attend import AttendOptions
from attnserve_client._client import AttentionClient
from attnserve_client._errors import (
    AttnserveError,
    CancelledError,
    DeadlineExceededError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    MovedSession,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
    UnimplementedError,
)
from attnserve_client._merging import merge_attention
from attnserve_client._messages import TokensOptions
from attnserve_client._results import (
    AttendResult,
    LayerResult,
    Limits,
    Model,
    ModelInput,
    Patches,
    ServerInfo,
    SessionLayer,
    StoredTensor,
    Timings,
    TokensResult,
    TransformerAttention,
    UnavailableModel,
    Variant,
)
from attnserve_client._session_flows import page_hashes
from attnserve_client._session_messages import SessionOptions
from attnserve_client._sessions import AsyncBatch, AsyncSession, Batch, Session
from attnserve_client._settings import ClientOptions
from attnserve_client._shards import Shards
from attnserve_client._stream import AttendStream

__version__ = "0.1.0"

__all__ = [
    "AsyncAttendStream",
    "AsyncAttentionClient",
    "AsyncBatch",
    "AsyncSession",
    "AttendOptions",
    "AttendResult",
    "AttendStream",
    "AttentionClient",
    "AttnserveError",
    "Batch",
    "CancelledError",
    "ClientOptions",
    "DeadlineExceededError",
    "FailedPreconditionError",
    "InternalError",
    "InvalidArgumentError",
    "LayerResult",
    "Limits",
    "Model",
    "ModelInput",
    "MovedSession",
    "NotFoundError",
    "Patches",
    "PermissionDeniedError",
    "ResourceExhaustedError",
    "ServerInfo",
    "Session",
    "SessionLayer",
    "SessionOptions",
    "Shards",
    "StoredTensor",
    "Timings",
    "TokensOptions",
    "TokensResult",
    "TransformerAttention",
    "UnauthenticatedError",
    "UnavailableError",
    "UnavailableModel",
    "UnimplementedError",
    "Variant",
    "keep_freed_memory",
    "merge_attention",
    "page_hashes",
]
