"""The data plane of attnserve: every byte of a request, from the socket to the kernel and back.

C++ in `native/`; this is what the control plane sees of it. See docs/architecture.md.
"""

from attnserve_dataplane._core import (
    BATCH_BUCKETS,
    SECONDS_BUCKETS,
    DataPlane,
    Model,
    ModelFacts,
    Pick,
    Request,
    RequestError,
    VariantFacts,
    collect_logs,
    next_log,
)

__version__ = "0.1.0"

__all__ = [
    "BATCH_BUCKETS",
    "SECONDS_BUCKETS",
    "DataPlane",
    "Model",
    "ModelFacts",
    "Pick",
    "Request",
    "RequestError",
    "VariantFacts",
    "collect_logs",
    "next_log",
]
