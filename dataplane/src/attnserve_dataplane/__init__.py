"""The data plane of attnserve: every byte of a request, from the socket to the kernel and back.

C++ in `native/`; this is what the control plane sees of it. See docs/architecture.md.
"""

from typing import TYPE_CHECKING

from attnserve_dataplane._core import (
    ADMIN,
    BATCH_BUCKETS,
    INFER,
    MOVE,
    SECONDS_BUCKETS,
    SESSIONS,
    CallRecord,
    DataPlane,
    Departure,
    Known,
    Model,
    ModelFacts,
    Pick,
    Request,
    RequestError,
    VariantFacts,
    collect_logs,
    next_log,
)

if TYPE_CHECKING:  # shapes of dictionaries, for type checkers alone
    from attnserve_dataplane._core import GivenTensor, InferCounts, TokensRun

__version__ = "0.1.0"

__all__ = [
    "ADMIN",
    "BATCH_BUCKETS",
    "INFER",
    "MOVE",
    "SECONDS_BUCKETS",
    "SESSIONS",
    "CallRecord",
    "DataPlane",
    "Departure",
    "GivenTensor",
    "InferCounts",
    "Known",
    "Model",
    "ModelFacts",
    "Pick",
    "Request",
    "RequestError",
    "TokensRun",
    "VariantFacts",
    "collect_logs",
    "next_log",
]
