"""What the server counts, for Prometheus.

Of several workers, each keeps its values in files of a folder that they share
(https://prometheus.github.io/client_python/multiprocess/), and the supervisor serves their sums.
"""

import threading
import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

# The variable of the environment that makes prometheus_client keep its values in a folder. It is
# to be set before that is imported.
SHARED_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
_SAMPLING_SECONDS = 0.1

_SECONDS = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
)  # fmt: skip


class Metrics:
    """The server's metrics, in a registry of their own.

    Args:
        merged: whether this process is one of several workers, whose metrics are summed elsewhere.
    """

    def __init__(self, merged: bool = False) -> None:
        self._merged = merged
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "attnserve_requests",
            "Requests answered, by gRPC method and status; each request of a stream counts.",
            ["method", "code"],
            registry=self.registry,
        )
        self.seconds = Histogram(
            "attnserve_request_seconds",
            "From a request's arrival to its answer, by part (deserialize, queue, compute).",
            ["model", "variant", "part"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.sequences = Counter(
            "attnserve_sequences",
            "Sequences computed.",
            ["model", "variant"],
            registry=self.registry,
        )
        self.batches = Histogram(
            "attnserve_batch_sequences",
            "Sequences that ran together, one observation for each execution.",
            ["model", "variant"],
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
            registry=self.registry,
        )
        self.kept_bytes = Gauge(
            "attnserve_kept_tensor_bytes",
            "Bytes of tensors kept by PutTensor.",
            registry=self.registry,
            multiprocess_mode="livesum",
        )
        self._of_models: dict[tuple[str, str], ModelMetrics] = {}
        self.waiting = Gauge(
            "attnserve_queue_length",
            "Requests waiting to run.",
            registry=self.registry,
            multiprocess_mode="livesum",
        )
        self.inside = Gauge(
            "attnserve_requests_inside",
            "Requests being received, waiting for a place, running or being answered.",
            registry=self.registry,
            multiprocess_mode="livesum",
        )
        self.outside = Gauge(
            "attnserve_requests_outside",
            "Requests that wait to be read.",
            registry=self.registry,
            multiprocess_mode="livesum",
        )
        self.bytes_in_flight = Gauge(
            "attnserve_bytes_in_flight",
            "Bytes of requests being received, waiting or running.",
            registry=self.registry,
            multiprocess_mode="livesum",
        )

    def of_model(self, model: str, variant: str) -> "ModelMetrics":
        """The metrics of one variant of a model, looked up once."""
        found = self._of_models.get((model, variant))
        if found is None:
            found = ModelMetrics(self, model, variant)
            self._of_models[model, variant] = found
        return found

    def watch(self, gauge: Gauge, read: Callable[[], float]) -> None:
        """Let a gauge show what `read` returns: when asked or, where merged, ten times a second.

        A worker's values are read from its files, so it has to write them there unasked.
        """
        if self._merged:
            threading.Thread(target=_sample, args=(gauge, read), daemon=True).start()
        else:
            gauge.set_function(read)

    def serve(self, host: str, port: int) -> int:
        """Serve /metrics over HTTP from a thread of its own; the port that it got."""
        return _serve(self.registry, host, port)


class MergedMetrics:
    """The sums of the workers' metrics, with the supervisor's own.

    Args:
        folder: where the workers keep their values.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.port: int | None = None
        self.registry = CollectorRegistry()
        MultiProcessCollector(self.registry, folder)  # type: ignore[no-untyped-call]
        self.workers = Gauge("attnserve_workers", "Workers that serve.", registry=self.registry)
        self.restarts = Counter(
            "attnserve_worker_restarts",
            "Workers that died and were replaced.",
            registry=self.registry,
        )

    def forget(self, pid: int) -> None:
        """A worker has died: its gauges go, its counters and histograms stay."""
        mark_process_dead(pid, self.folder)  # type: ignore[no-untyped-call]

    def serve(self, host: str, port: int) -> None:
        """Serve /metrics over HTTP from a thread of its own, on `self.port`."""
        self.port = _serve(self.registry, host, port)


class ModelMetrics:
    """What is counted for each request of one variant of a model."""

    def __init__(self, metrics: Metrics, model: str, variant: str) -> None:
        self._deserialize, self._queue, self._compute = (
            metrics.seconds.labels(model, variant, part)
            for part in ("deserialize", "queue", "compute")
        )
        self._sequences = metrics.sequences.labels(model, variant)
        self._batches = metrics.batches.labels(model, variant)

    def observe(
        self, deserialize: float, queue: float, compute: float, sequences: int, together: int
    ) -> None:
        """Count a request.

        Args:
            deserialize, queue, compute: seconds.
            sequences: of the request.
            together: that ran with it; 0 if another request has counted them.
        """
        self._deserialize.observe(deserialize)
        self._queue.observe(queue)
        self._compute.observe(compute)
        self._sequences.inc(sequences)
        if together:
            self._batches.observe(together)


def _serve(registry: CollectorRegistry, host: str, port: int) -> int:
    try:
        server, _ = start_http_server(port, host, registry)
    except OSError:
        raise OSError(f"cannot serve metrics on {host}:{port}; is it in use?") from None
    return int(server.server_port)


def _sample(gauge: Gauge, read: Callable[[], float]) -> None:
    while True:
        gauge.set(read())
        time.sleep(_SAMPLING_SECONDS)
