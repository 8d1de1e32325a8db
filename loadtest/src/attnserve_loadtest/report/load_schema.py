"""What `load.json` holds, version 1: these dataclasses as JSON objects, field by field.

Tuples are arrays, None is null. Milliseconds where a name ends in `_ms` and in every
`Distribution`; seconds where it ends in `_seconds`. Latency counts from the time that a request was
due, in an open loop, and from when it was sent in a closed one.
"""

from dataclasses import dataclass

from attnserve_loadtest.report.schema import Client, Distribution, Server

LOAD_SCHEMA = "attnserve-loadtest/load"
LOAD_SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class LoadSettings:
    """What was offered.

    Attributes:
        model, variant: what requests with one answer call; the variant may be empty.
        session_model: what sessions call; None: there were none.
        num_layers: of the sessions.
        arrivals: `poisson`, `constant`, `bursts:N`, `closed` (callers who wait for their answer) or
            `trace`.
        seq_lens, weights: lengths, and how often each comes.
        sessions: share of sessions, 0..1.
        prompt, tokens: the least and the most of a session.
        think_seconds: mean rest of a session's user.
        cancel_share, cancel_seconds: how many callers give up, and after how long.
        slo: bounds that good answers keep to, such as `latency:p99=50ms`.
        step_seconds, warmup_seconds: counted time of each load, and the time before it.
        clients: processes that sent.
        timeout_seconds: that a request may take.
        seed: of arrivals, lengths and inputs.
        trace: the file that was replayed; empty: none.
        speed: how many times faster than it was recorded.
    """

    model: str
    variant: str
    session_model: str | None
    num_layers: int
    arrivals: str
    seq_lens: tuple[int, ...]
    weights: tuple[float, ...]
    sessions: float
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    think_seconds: float
    cancel_share: float
    cancel_seconds: float
    slo: tuple[str, ...]
    step_seconds: float
    warmup_seconds: float
    clients: int
    timeout_seconds: float
    seed: int
    trace: str
    speed: float


@dataclass(frozen=True, slots=True)
class BoundResult:
    """One bound at one load.

    Attributes:
        bound: such as `latency:p99=50ms`.
        observed_ms: the percentile; None: nothing was to be bounded, or what never came is in it.
        met: whether it is within the bound.
    """

    bound: str
    observed_ms: float | None
    met: bool


@dataclass(frozen=True, slots=True)
class LengthAtLoad:
    """Requests with one answer, of one length, at one load.

    Attributes:
        seq_len: the length.
        due: requests, without those given up.
        latency: of the answered.
        met: whether these alone meet the bounds on latency; None: there are no bounds.
    """

    seq_len: int
    due: int
    latency: Distribution | None
    met: bool | None


@dataclass(frozen=True, slots=True)
class TargetAtLoad:
    """One server at one load.

    Attributes:
        target: its address.
        answered, refused, failed: requests.
        first: until the first output.
    """

    target: str
    answered: int
    refused: int
    failed: int
    first: Distribution | None


@dataclass(frozen=True, slots=True)
class Step:
    """One load.

    Attributes:
        offered: requests due a second, as they were drawn; of a closed loop None.
        callers: of a closed loop; None of an open one.
        seconds: counted time.
        due: requests due in it; answered, refused, failed and cancelled ones together.
        answered, refused, failed, cancelled: of them.
        throughput: answers a second.
        goodput: answers a second within all bounds; without bounds the same.
        context_tokens_per_second: tokens of context in the good answers, a second: lengths of
            requests; prompts and generated tokens of sessions.
        latency: of answers to requests that have one, from due to the whole answer.
        first: of all answers, from due to the first output.
        between: between tokens of sessions.
        late: of the client: how long after it was due a request was sent.
        bounds: one result for each bound.
        meets: whether all are met; None: there are none.
        keeps_up: whether 0.95 of what was due was answered, and all bounds were met.
        client_cores: processors that the clients took.
        slices_first_p50_ms, slices_first_p99_ms: of `first` in each fifth of the time: how far this
            figure moves by itself.
        slices_throughput: answers a second in each fifth.
        lengths, targets: by length and by server.
    """

    offered: float | None
    callers: int | None
    seconds: float
    due: int
    answered: int
    refused: int
    failed: int
    cancelled: int
    throughput: float
    goodput: float
    context_tokens_per_second: float
    latency: Distribution | None
    first: Distribution | None
    between: Distribution | None
    late: Distribution | None
    bounds: tuple[BoundResult, ...]
    meets: bool | None
    keeps_up: bool
    client_cores: float
    slices_first_p50_ms: tuple[float | None, ...]
    slices_first_p99_ms: tuple[float | None, ...]
    slices_throughput: tuple[float, ...]
    lengths: tuple[LengthAtLoad, ...]
    targets: tuple[TargetAtLoad, ...]

    @property
    def load(self) -> float:
        """What the steps differ in: requests a second, or callers."""
        return float(self.callers or 0) if self.offered is None else self.offered


@dataclass(frozen=True, slots=True)
class ServicePoint:
    """Requests of about one length at the lowest load.

    Attributes:
        length: median seq_len, tokens of the prompt, or tokens of the session.
        seconds: median of computing in the server.
        count: requests or tokens.
    """

    length: float
    seconds: float
    count: int


@dataclass(frozen=True, slots=True)
class ServiceTime:
    """How long a server computes: constant + linear * n + quadratic * n**2 seconds.

    Attributes:
        constant, linear, quadratic: seconds; none is negative.
        shortest, longest: lengths that it was fitted to.
        off: the largest relative difference from a point.
        points: what it was fitted to.
    """

    constant: float
    linear: float
    quadratic: float
    shortest: float
    longest: float
    off: float
    points: tuple[ServicePoint, ...]

    def at(self, length: float) -> float:
        """Seconds for a length."""
        return self.constant + self.linear * length + self.quadratic * length**2


@dataclass(frozen=True, slots=True)
class Service:
    """Where a server's time goes, of the lowest load: what a simulation is made from.

    Attributes:
        single: computing of a request with one answer, by seq_len; None: too few lengths.
        prompt: computing of all layers of a prompt, by its tokens.
        step: computing of all layers of one more token, by the session's tokens.
        single_wire_seconds, prompt_wire_seconds, step_wire_seconds: median of what is no computing:
            messages, network, client.
    """

    single: ServiceTime | None
    prompt: ServiceTime | None
    step: ServiceTime | None
    single_wire_seconds: float | None
    prompt_wire_seconds: float | None
    step_wire_seconds: float | None


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a reader wants to know first; indices are of `steps`.

    Attributes:
        knee: the load with the most throughput for its latency.
        best: the highest load that was kept up with, bounds included; None: not even the lowest.
        largest_context: the longest seq_len that meets the bounds at any load; None: no bounds, or
            none meets them.
        largest_context_step: the highest load at which it does.
        most_callers: of a closed loop that meets the bounds.
        price_per_hour: of one server; None: not given.
        cost_per_million_tokens: of context, in good answers at the best load; None: no price, or
            no such load.
    """

    knee: int | None
    best: int | None
    largest_context: int | None
    largest_context_step: int | None
    most_callers: int | None
    price_per_hour: float | None
    cost_per_million_tokens: float | None


@dataclass(frozen=True, slots=True)
class LoadReport:
    """All of `load.json`.

    Attributes:
        schema, schema_version: what this is.
        date: when the measuring began, ISO 8601, UTC.
        complete: False if it was interrupted.
        servers: by their own account, in the order of the targets.
        client: what made the load.
        settings: what was offered.
        steps: by load, ascending.
        capacity: in short.
        service: where the time goes at the lowest load.
        failure: what the first failed request said; empty: none failed.
    """

    schema: str
    schema_version: int
    date: str
    complete: bool
    servers: tuple[Server, ...]
    client: Client
    settings: LoadSettings
    steps: tuple[Step, ...]
    capacity: Capacity
    service: Service
    failure: str
