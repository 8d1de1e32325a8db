"""What the server counts, for Prometheus: snapshots of the data plane's counts, made when asked."""

import ssl
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

from attnserve_dataplane import BATCH_BUCKETS, SECONDS_BUCKETS, DataPlane
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    UnknownMetricFamily,
)
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar

from attnserve_server.metrics_http import Allowed, MetricsServer
from attnserve_server.moving import Mover
from attnserve_server.tracing.exemplars import Exemplars

if TYPE_CHECKING:
    from attnserve_dataplane import InferCounts

Spans = Callable[[], dict[str, int]]
Models = Callable[[], Iterable[tuple[str, int]]]
_Part = Literal["success", "queue", "input", "infer", "output"]

_GAUGES = {
    "stored_bytes": ("attnserve_stored_tensor_bytes", "Bytes of tensors stored by PutTensor."),
    "waiting": ("attnserve_queue_length", "Requests waiting to run."),
    "inside": (
        "attnserve_requests_inside",
        "Requests that have been received and not been answered yet.",
    ),
    "arriving": (
        "attnserve_requests_arriving",
        "Requests that were admitted and whose bodies have not come yet.",
    ),
    "bytes_in_flight": (
        "attnserve_bytes_in_flight",
        "Bytes of requests and answers, from the first one received to the last one sent.",
    ),
    "shared_bytes": ("attnserve_shared_memory_bytes", "Bytes of callers' shared memory, mapped."),
    "connections": ("attnserve_connections", "Connections that are open."),
    "wedged": ("attnserve_wedged_runs", "Computations that were stopped and do not end."),
}

_KV_GAUGES = {
    "sessions": ("attnserve_kv_sessions", "KV sessions that are open."),
    "pages_in_use": ("attnserve_kv_pages", "Pages that KV sessions hold."),
    "pages_cached": (
        "attnserve_kv_cached_pages",
        "Pages of prefixes that no KV session holds, kept until their room is needed.",
    ),
    "bytes_in_use": ("attnserve_kv_bytes", "Bytes of pages that KV sessions hold."),
    "bytes_cached": ("attnserve_kv_cached_bytes", "Bytes of pages that none holds."),
    "bytes_promised": (
        "attnserve_kv_promised_bytes",
        "Bytes that KV sessions hold or were promised.",
    ),
    "bytes_memory": ("attnserve_kv_memory_bytes", "Bytes of memory taken for pages."),
    "max_bytes": ("attnserve_kv_max_bytes", "Bytes that pages may take."),
}
_KV_COUNTERS = {
    "opened": ("attnserve_kv_sessions_opened", "KV sessions opened, forked or imported."),
    "expired": ("attnserve_kv_sessions_expired", "KV sessions whose lease ran out."),
    "prefix_pages_asked": ("attnserve_kv_prefix_pages_asked", "Pages that prefixes asked for."),
    "prefix_pages_found": ("attnserve_kv_prefix_pages_found", "Those of them that were there."),
    "evicted_pages": ("attnserve_kv_evicted_pages", "Cached pages that made room for others."),
    "tokens": ("attnserve_kv_tokens", "Tokens added to KV sessions."),
}


# What Triton's users look for, of requests of the Open Inference Protocol, as there:
# https://github.com/triton-inference-server/server/blob/main/docs/user_guide/metrics.md
_TRITON_COUNTS: dict[str, tuple[str, Callable[["InferCounts"], int]]] = {
    "nv_inference_request_success": (
        "ModelInfer requests answered.",
        lambda counts: counts["success"][0],
    ),
    "nv_inference_request_failure": (
        "ModelInfer requests refused or failed.",
        lambda counts: counts["fail"][0],
    ),
    "nv_inference_count": ("Sequences computed.", lambda counts: counts["inferences"]),
    "nv_inference_exec_count": (
        "Executions; each may have joined several requests.",
        lambda counts: sum(ran[0] for _, ran, _ in counts["batches"].values()),
    ),
}
_TRITON_DURATIONS: dict[str, tuple[str, _Part]] = {
    "request": ("Microseconds from arrival to answer.", "success"),
    "queue": ("Microseconds in the queue.", "queue"),
    "compute_input": ("Microseconds to read and join tensors.", "input"),
    "compute_infer": ("Microseconds of computation.", "infer"),
    "compute_output": ("Microseconds to divide and write answers.", "output"),
}


class Metrics(Collector):
    """The server's metrics, in a registry of their own, and those of its process.

    Args:
        plane: that counts.
        models: says the name and version of each model that is loaded.
        exemplars: of its histograms.
        spans: says how many spans became what; nothing where there are no traces.
        mover: that moves sessions, if any does.
    """

    def __init__(
        self,
        plane: DataPlane,
        models: Models,
        exemplars: Exemplars,
        spans: Spans,
        mover: Mover | None,
    ) -> None:
        self._plane, self._models, self._mover = plane, models, mover
        self._exemplars, self._spans = exemplars, spans
        self.registry = CollectorRegistry()
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

    def collect(self) -> Iterator[Metric]:
        """All of them, as they are now."""
        requests = CounterMetricFamily(
            "attnserve_requests",
            "Requests answered, by gRPC method and status; each request of a stream counts.",
            labels=["method", "code"],
        )
        for method, code, count in self._plane.requests():
            requests.add_metric([method, code], count)
        yield requests
        seconds = HistogramMetricFamily(
            "attnserve_request_seconds",
            "From a request's arrival to its answer, by part (deserialize, queue, compute).",
            labels=["model", "variant", "part"],
        )
        sequences = CounterMetricFamily(
            "attnserve_sequences", "Sequences computed.", labels=["model", "variant"]
        )
        batches = HistogramMetricFamily(
            "attnserve_batch_sequences",
            "Sequences that ran together, one observation for each execution.",
            labels=["model", "variant"],
        )
        for model, variant, deserialize, queue, compute, together, count in self._plane.variants():
            parts = (("deserialize", deserialize), ("queue", queue), ("compute", compute))
            for part, (counts, total) in parts:
                buckets = _cumulative(SECONDS_BUCKETS, counts)
                exemplars = self._exemplars.of(model, variant, part)
                seconds.add_metric([model, variant, part], _told(buckets, exemplars), total)
            sequences.add_metric([model, variant], count)
            counts, total = together
            batches.add_metric([model, variant], _cumulative(BATCH_BUCKETS, counts), total)
        yield seconds
        yield sequences
        yield batches
        gauges = self._plane.gauges()
        for key, (name, text) in _GAUGES.items():
            yield GaugeMetricFamily(name, text, value=gauges[key])
        held = self._plane.kv_sessions()
        for key, (name, text) in _KV_GAUGES.items():
            yield GaugeMetricFamily(name, text, value=held[key])
        for key, (name, text) in _KV_COUNTERS.items():
            yield CounterMetricFamily(name, text, value=held[key])
        yield from self._traces()
        if self._mover is not None:
            yield from _moving(self._mover)
        yield from self._triton()

    def _traces(self) -> Iterator[Metric]:
        recorded, refused, dropped = self._plane.records()
        yield CounterMetricFamily(
            "attnserve_traces_recorded", "Calls and requests on streams traced.", value=recorded
        )
        lost = CounterMetricFamily(
            "attnserve_traces_dropped",
            "Those that were not: more than --max-traces-per-second, or taken by nobody in time.",
            labels=["reason"],
        )
        lost.add_metric(["rate"], refused)
        lost.add_metric(["queue"], dropped)
        yield lost
        spans = CounterMetricFamily(
            "attnserve_trace_spans", "Spans, by whether the collector took them.", labels=["result"]
        )
        for result, count in self._spans().items():
            spans.add_metric([result], count)
        yield spans

    def _triton(self) -> Iterator[Metric]:
        counted = [
            ([name, str(version)], self._plane.infer_counts(name, version))
            for name, version in self._models()
        ]
        for name, (text, count) in _TRITON_COUNTS.items():
            yield _untyped(name, text, [(labels, count(each)) for labels, each in counted])
        for part, (text, key) in _TRITON_DURATIONS.items():
            values = [(labels, each[key][1] / 1000) for labels, each in counted]
            yield _untyped(f"nv_inference_{part}_duration_us", text, values)

    def serve(
        self, host: str, port: int, allowed: Allowed, tls: ssl.SSLContext | None
    ) -> MetricsServer:
        """Serve /metrics over HTTP, from threads of its own.

        Raises:
            OSError: the port cannot be had.
        """
        try:
            return MetricsServer(self.registry, host, port, allowed, tls)
        except OSError as error:
            raise OSError(f"/metrics on {host}, port {port}: {error.strerror}") from None


def _moving(mover: Mover) -> Iterator[Metric]:
    yield CounterMetricFamily(
        "attnserve_kv_sessions_moved", "KV sessions handed to other servers.", value=mover.moved
    )
    failed = CounterMetricFamily(
        "attnserve_kv_sessions_not_moved",
        "KV sessions that no other server took, by reason.",
        labels=["reason"],
    )
    for reason, count in mover.failed.items():
        failed.add_metric([reason], count)
    yield failed


def _untyped(name: str, text: str, values: Sequence[tuple[list[str], float]]) -> Metric:
    """Of no declared type: counters would be called _total, which Triton's are not."""
    family = UnknownMetricFamily(name, text, labels=["model", "version"])
    for labels, value in values:
        family.add_metric(labels, value)
    return family


def _told(
    buckets: Sequence[tuple[str, float]], exemplars: Sequence[Exemplar | None]
) -> list[tuple[str, float] | tuple[str, float, Exemplar]]:
    """Buckets with their exemplars, where there is one."""
    return [
        bucket if exemplar is None else (*bucket, exemplar)
        for bucket, exemplar in zip(buckets, exemplars, strict=True)
    ]


def _cumulative(bounds: Sequence[float], counts: Sequence[int]) -> list[tuple[str, float]]:
    """Prometheus's buckets: each holds those below it too."""
    names = [*(str(float(bound)) for bound in bounds), "+Inf"]
    return list(zip(names, map(float, accumulate(counts)), strict=True))
