"""The binding, as type checkers see it; native/services/dataplane.h says what the names mean."""

from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

SECONDS_BUCKETS: list[float]
BATCH_BUCKETS: list[float]

# Roles, as bits.
INFER: int
SESSIONS: int
ADMIN: int
MOVE: int

Histogram = tuple[list[int], float]
Sum = tuple[int, int]

class RequestError(Exception):
    """A request that cannot be answered: args are (code, message, seconds to retry after)."""

class InferCounts(TypedDict):
    """Of one version of a model; sums are (count, nanoseconds)."""

    last_inference: int
    inferences: int
    success: Sum
    fail: Sum
    queue: Sum
    input: Sum
    infer: Sum
    output: Sum
    batches: dict[int, tuple[Sum, Sum, Sum]]

class TokensRun(TypedDict):
    """What came of a token model's run; times in seconds of the monotonic clock."""

    arrays: dict[str, NDArray[Any]]
    arrived: float
    validated: float
    started: float
    ended: float
    sequences: int
    leads: bool

class GivenTensor(TypedDict):
    """A tensor that stands in the place of token ids, or beside them."""

    name: str
    array: NDArray[Any]
    dtype: str
    lengths: Sequence[int]
    mask_name: str
    tokens: int

class ModelFacts:
    """What the control plane has read of a model and checked."""

    name: str
    version: int
    kind: str
    dtype: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_head_dim: int
    window: int | None
    window_right: int | None
    bottom_right: bool
    scale: float
    softcap: float
    sinks: list[float]
    embed_dim: int
    context_dim: int | None
    pad_token_id: int
    hidden_size: int
    def set_mask(self, name: str) -> None: ...

class VariantFacts:
    """One graph of a model, to be loaded."""

    def __init__(self, name: str, path: str, quadratic: bool, native: bool) -> None: ...

class Pick:
    """Variants to prefer up to a length."""

    def __init__(self, up_to: int | None, variants: list[str]) -> None: ...

class Model:
    """One version of a model, ready to run. Immutable."""

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> int: ...
    @property
    def variants(self) -> list[str]: ...
    def inputs(self, variant: str) -> list[str]: ...
    def outputs(self, variant: str) -> list[str]: ...
    def ports(
        self, variant: str
    ) -> tuple[list[tuple[str, str, list[int]]], list[tuple[str, str, list[int]]]]: ...
    def choose(
        self, forced: str, inputs: Sequence[str], outputs: Sequence[str], length: int
    ) -> str: ...
    def working_bytes(
        self,
        variant: str,
        batch: int,
        num_heads: int,
        query_len: int,
        key_len: int,
        tensor_bytes: int,
    ) -> int: ...

class Known:
    """One credential of the file of callers; of bounds, 0 is none."""

    def __init__(
        self,
        name: str,
        roles: int,
        kind: str,
        value: bytes,
        requests_per_second: float,
        bytes_in_flight: int,
        stored_bytes: int,
        sessions: int,
        session_bytes: int,
        calls: int,
    ) -> None: ...
    @property
    def kind(self) -> str: ...
    @property
    def value(self) -> bytes: ...

class Request:
    """One message for the control plane, to be answered exactly once."""

    @property
    def path(self) -> str: ...
    @property
    def peer(self) -> str: ...
    @property
    def message(self) -> bytes: ...
    @property
    def arrived(self) -> float: ...
    @property
    def trace(self) -> tuple[str, str] | None: ...
    def answer(self, message: bytes) -> None: ...
    def fail(self, code: int, message: str, retry_after: float = 0.0) -> None: ...

class CallRecord:
    """A call, or one request of a stream, that is recorded for traces.

    Marks are in nanoseconds of the monotonic clock, 0 where it did not come so far: headers,
    admitted, message whole, taken by a thread of the control plane, waiting to run, out of the
    queue, started, ended, answer written.
    """

    @property
    def trace_id(self) -> bytes: ...
    @property
    def span_id(self) -> bytes: ...
    @property
    def parent_id(self) -> bytes: ...
    @property
    def of_stream(self) -> bool: ...
    @property
    def trace_state(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def peer(self) -> str: ...
    @property
    def caller(self) -> str: ...
    @property
    def request_id(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def version(self) -> int: ...
    @property
    def variant(self) -> str: ...
    @property
    def sequences(self) -> int: ...
    @property
    def together(self) -> int: ...
    @property
    def query_len(self) -> int: ...
    @property
    def key_len(self) -> int: ...
    @property
    def code(self) -> int: ...
    @property
    def marks(self) -> list[int]: ...

class Departure:
    """A session while it is copied to another server. Let go before `moved`: it stays."""

    @property
    def owner(self) -> str: ...
    @property
    def length(self) -> int: ...
    @property
    def lease(self) -> int: ...
    @property
    def prefix_hashes(self) -> bytes: ...
    @property
    def ended(self) -> bool: ...
    def again(self) -> None: ...
    def next(self) -> bytes: ...
    def moved(self, address: str, authority: str, new_session_id: str) -> None: ...

class DataPlane:
    """A whole data plane."""

    def __init__(self, **options: Any) -> None: ...
    def start(self) -> None: ...
    @property
    def addresses(self) -> list[str]: ...
    def begin_moving(self) -> None: ...
    def session_ids(self) -> list[str]: ...
    def depart(self, session_id: str) -> Departure | None: ...
    def stay(self, session_id: str) -> None: ...
    def drain(self, timeout: float) -> bool: ...
    def replace_tls(
        self, certificate_chain: str, private_key: str, client_authorities: str
    ) -> None: ...
    def set_callers(self, known: list[Known], web_keys: list[str] = ...) -> None: ...
    def admit_web_token(
        self, token: bytes, name: str, roles: int, until: float, key: str
    ) -> None: ...
    def look_up(self, authorization: str) -> tuple[str, int] | None: ...
    @property
    def draining(self) -> bool: ...
    @property
    def wedged_runs(self) -> int: ...
    def stop_running(self, timeout: float) -> bool: ...
    def load(self, facts: ModelFacts, variants: list[VariantFacts], picks: list[Pick]) -> Model: ...
    def put_models(self, name: str, models: list[Model], reason: str) -> None: ...
    def get_model(self, name: str, version: str) -> Model: ...
    def next_request(self, queue: str, timeout: float) -> Request | None: ...
    def attend_tokens(
        self,
        request: Request,
        model: Model,
        variant: str,
        source: Sequence[Sequence[int]],
        source_types: Sequence[Sequence[int]],
        given: GivenTensor | dict[str, Any],
        target: Sequence[Sequence[int]],
        outputs: list[str],
        priority: int,
        timeout: int,
        working_bytes: int,
    ) -> TokensRun: ...
    def requests(self) -> list[tuple[str, str, int]]: ...
    def variants(
        self,
    ) -> list[tuple[str, str, Histogram, Histogram, Histogram, Histogram, int]]: ...
    def take_records(self, most: int, timeout: float) -> list[CallRecord]: ...
    def records(self) -> tuple[int, int, int]: ...
    def infer_counts(self, model: str, version: int) -> InferCounts: ...
    def count_inference(
        self,
        model: str,
        version: int,
        sequences: int,
        arrived: float,
        validated: float,
        started: float,
        ended: float,
        together: int,
        leads: bool,
    ) -> None: ...
    def count_failed_inference(self, model: str, version: int, arrived: float) -> None: ...
    def kv_sessions(self) -> dict[str, float]: ...
    def gauges(self) -> dict[str, float]: ...
    def add_region(self, name: str, key: str, offset: int, byte_size: int, peer: str) -> None: ...
    def region_view(
        self, name: str, offset: int, byte_size: int, peer: str
    ) -> NDArray[np.uint8]: ...
    def remove_region(self, name: str, peer: str) -> None: ...
    def remove_regions(self, peer: str) -> None: ...
    def regions(self, name: str, peer: str) -> list[tuple[str, str, int, int]]: ...

def collect_logs() -> None: ...
def next_log(timeout: float) -> tuple[str, str, list[tuple[str, str]]] | None: ...
