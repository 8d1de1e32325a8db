"""What the server counts, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

_SECONDS = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
)  # fmt: skip


class Metrics:
    """The server's metrics, in a registry of their own."""

    def __init__(self) -> None:
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
        self.waiting = Gauge(
            "attnserve_queue_length", "Requests waiting to run.", registry=self.registry
        )
        self.bytes_in_flight = Gauge(
            "attnserve_stream_bytes_in_flight",
            "Bytes of streamed requests being received or waiting.",
            registry=self.registry,
        )

    def serve(self, host: str, port: int) -> int:
        """Serve /metrics over HTTP from a thread of its own; the port that it got."""
        server, _ = start_http_server(port, host, self.registry)
        return int(server.server_port)
