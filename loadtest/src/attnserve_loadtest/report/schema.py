"""What `report.json` holds, version 2: these dataclasses as JSON objects, field by field.

Tuples are arrays, None is null. Durations are milliseconds where a name ends in `_ms` and in
every `Distribution`; seconds where it ends in `_seconds`. Another tool can redraw the plot from
`series[].points[]` (`seq_len` against `end_to_end` and `compute`) and `series[].fits[]`.
Percentiles interpolate linearly between order statistics. In version 1 `wire` held `deserialize`
and `serialize`, and could be negative.
"""

from dataclasses import dataclass

SCHEMA = "attnserve-loadtest/scaling"
SCHEMA_VERSION = 2

# What an end to end is made of, in the order of time but for the wire, which is at both ends.
PARTS = ("deserialize", "queue", "compute", "serialize", "wire")


@dataclass(frozen=True, slots=True)
class Distribution:
    """Durations of the answered requests at one length, milliseconds."""

    mean: float
    minimum: float
    p5: float
    p50: float
    p95: float
    p99: float
    maximum: float


@dataclass(frozen=True, slots=True)
class Point:
    """One series at one length. Distributions are None where no request was answered.

    Attributes:
        seq_len: queries and keys alike, or tokens a sequence.
        count: requests answered.
        failures: requests failed; not in the distributions.
        measured_seconds: wall time in which this length ran alone.
        requests_per_second: answered requests over that time.
        tokens_per_second: the same times batch times seq_len.
        end_to_end: from the call of the SDK to its return.
        deserialize: in the server, from the wire to arrays; of chunks, the wait for them, too.
        queue: waiting in the server for a place to run.
        compute: running the model.
        serialize: in the server, from then until the answer was begun.
        wire: end to end less those four, request by request: packing and unpacking in the client,
            and the network.
        overlapping: requests that are not in these five, for the server's timings together exceed
            their end to end. 0 with a server that keeps to the protocol; then the means of the
            five add up to that of the end to end.
        batch_size: sequences that ran together in the server, mean.
        request_bytes, response_bytes: bytes of the tensors of one request and one answer.
        round_p50_ms: the median end to end of each round; None where it has no answer.
    """

    seq_len: int
    count: int
    failures: int
    measured_seconds: float
    requests_per_second: float
    tokens_per_second: float
    end_to_end: Distribution | None
    deserialize: Distribution | None
    queue: Distribution | None
    compute: Distribution | None
    serialize: Distribution | None
    wire: Distribution | None
    overlapping: int
    batch_size: float | None
    request_bytes: int
    response_bytes: int
    round_p50_ms: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class Residual:
    """How far one length is from the fitted line.

    Attributes:
        seq_len: the length.
        observed_ms: the median that was fitted.
        fitted_ms: the line there.
        log2_ratio: log2(observed / fitted): 1 is twice the line, -1 half of it.
    """

    seq_len: int
    observed_ms: float
    fitted_ms: float
    log2_ratio: float


@dataclass(frozen=True, slots=True)
class LocalExponent:
    """The exponent between two neighbouring lengths: log(t1 / t0) / log(n1 / n0)."""

    from_seq_len: int
    to_seq_len: int
    exponent: float


@dataclass(frozen=True, slots=True)
class Fit:
    """A power law, duration = coefficient * seq_len ** exponent, fitted to the medians.

    See `attnserve_loadtest.fitting` for what the interval means and what it does not.

    Attributes:
        quantity: `end_to_end` or `compute`.
        exponent: the slope on log-log axes.
        low, high: the confidence interval of the exponent; None of fewer than 3 lengths.
        confidence: its level, e.g. 0.95.
        coefficient_ms: the line at seq_len 1.
        r_squared: of the logarithms; None of fewer than 3 lengths.
        points: lengths fitted.
        residuals: one for each.
        local_exponents: between neighbours; if they rise, constants dominate the small lengths
            and the last ones say more about large lengths than the fit does.
    """

    quantity: str
    exponent: float
    low: float | None
    high: float | None
    confidence: float
    coefficient_ms: float
    r_squared: float | None
    points: int
    residuals: tuple[Residual, ...]
    local_exponents: tuple[LocalExponent, ...]


@dataclass(frozen=True, slots=True)
class FailureCount:
    """Failed requests of one gRPC status.

    Attributes:
        code: the status' name.
        count: how many.
        message: what the server said the first time.
    """

    code: str
    count: int
    message: str


@dataclass(frozen=True, slots=True)
class Series:
    """One line of the plot: a model and a variant.

    Attributes:
        label: what the plot calls it.
        model, version, kind: as the server describes the model.
        variant: the variant asked for; empty: the server's choice.
        variants_run: the variants that ran.
        dtype, mask: as the server describes them.
        num_heads, num_kv_heads, head_dim, embed_dim: likewise.
        points: by length.
        fits: of `end_to_end` and `compute`, each if two lengths or more have a median above 0.
        failures: by status.
    """

    label: str
    model: str
    version: str
    kind: str
    variant: str
    variants_run: tuple[str, ...]
    dtype: str
    mask: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    embed_dim: int
    points: tuple[Point, ...]
    fits: tuple[Fit, ...]
    failures: tuple[FailureCount, ...]

    def fit(self, quantity: str) -> Fit | None:
        """The fit of `end_to_end` or `compute`, if there is one."""
        return next((fit for fit in self.fits if fit.quantity == quantity), None)


@dataclass(frozen=True, slots=True)
class Settings:
    """How the load was made.

    Attributes:
        seq_lens: lengths, ascending.
        users: Locust users, each with one request under way at any time.
        batch: sequences of each request.
        rounds: times that all lengths are gone through, each time in another random order.
        requests: measured requests of each length, over all rounds; None: by duration.
        duration_seconds: measured seconds of each length, over all rounds; None: by requests.
        warmup: requests of each length before the first round; not measured.
        settle: requests of each user whenever the length changes; not measured.
        timeout_seconds: that a request may take.
        seed: of the inputs and of the order of lengths.
    """

    seq_lens: tuple[int, ...]
    users: int = 1
    batch: int = 1
    rounds: int = 5
    requests: int | None = 40
    duration_seconds: float | None = None
    warmup: int = 5
    settle: int = 1
    timeout_seconds: float = 30.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Server:
    """The server that was measured, by its own account."""

    target: str
    version: str
    onnxruntime_version: str
    providers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Client:
    """The machine and the software that made the load.

    Attributes:
        attnserve_loadtest, attnserve_client, grpcio, locust, numpy, python: versions.
        system: operating system and processor architecture.
        cpu_count: logical processors that the process may use.
    """

    attnserve_loadtest: str
    attnserve_client: str
    grpcio: str
    locust: str
    numpy: str
    python: str
    system: str
    cpu_count: int


@dataclass(frozen=True, slots=True)
class Report:
    """All of `report.json`.

    Attributes:
        schema, schema_version: what this is.
        date: when the measuring began, ISO 8601, UTC.
        complete: False if it was interrupted.
        drift: median over lengths and series of (median of the last round / of the first):
            how much slower (above 1) or faster the machine became; None of a single round.
        server, client, settings: where and how.
        series: one for each model and variant.
    """

    schema: str
    schema_version: int
    date: str
    complete: bool
    drift: float | None
    server: Server
    client: Client
    settings: Settings
    series: tuple[Series, ...]
