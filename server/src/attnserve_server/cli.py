"""The `attnserve-server` command."""

import argparse
import resource
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from attnserve_server import __version__, logs
from attnserve_server.settings import MIB, Limits, Settings

_DESCRIPTORS = 65_536


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; the exit code: 0 after a drain, 1 if it cannot start."""
    options = _parser().parse_args(arguments)
    logs.configure(options.log_format, options.log_level)
    try:
        serve(_settings(options))
    except StartError as error:
        print(f"attnserve-server: {error}", file=sys.stderr)
        return 1
    return 0


class StartError(Exception):
    """The server cannot start; the message says why."""


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then drain.

    Raises:
        StartError: it cannot start.
    """
    _allow_descriptors()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        from attnserve_server.app import AttentionServer
        from attnserve_server.certificates import CertificateError
        from attnserve_server.models.providers import ProviderError
        from attnserve_server.onnxruntime_library import LibraryError
        from attnserve_server.repository import ManifestError
    except ImportError as error:
        raise StartError(
            f"{error}; the server needs attnserve-dataplane: `pip install attnserve-dataplane`"
        ) from error
    try:
        server = AttentionServer(settings)
        server.start()
    except (LibraryError, ProviderError, CertificateError, ManifestError, OSError) as error:
        raise StartError(str(error)) from error
    names = ", ".join(sorted({model.manifest.name for model in server.store})) or "none"
    print(
        f"attnserve-server {__version__} listening on {server.address} "
        f"({server.providers.names[0]}; models: {names})",
        flush=True,
    )
    stop.wait()
    server.drain()


def _allow_descriptors() -> None:
    """As many as the system lets this process have, within reason: each connection takes one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, _DESCRIPTORS) if hard != resource.RLIM_INFINITY else _DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _settings(options: argparse.Namespace) -> Settings:
    return Settings(
        repository=options.repository,
        host=options.host,
        port=options.port,
        metrics_port=None if options.metrics_port < 0 else options.metrics_port,
        provider=options.provider,
        intra_op_threads=options.intra_op_threads,
        spinning=options.spinning,
        concurrency=options.concurrency,
        max_batch_size=options.max_batch_size,
        max_batch_bytes=options.max_batch_kib << 10 if options.max_batch_kib else None,
        batch_delay=options.batch_delay_us / 1e6,
        io_threads=options.io_threads,
        max_connections=options.max_connections,
        max_connections_per_address=options.max_connections_per_address,
        idle_timeout=options.idle_timeout,
        keepalive_interval=options.keepalive_interval,
        keepalive_timeout=options.keepalive_timeout,
        keepalive_min_ping_interval=options.keepalive_min_ping_interval,
        max_connection_age=options.max_connection_age,
        max_connection_age_grace=options.max_connection_age_grace,
        tls_certificate=options.tls_certificate,
        tls_key=options.tls_key,
        tls_client_authorities=options.tls_client_authorities,
        drain_seconds=options.drain_seconds,
        model_control=options.model_control,
        limits=Limits(
            max_message_bytes=options.max_message_mib * MIB,
            max_request_bytes=options.max_request_mib * MIB,
            max_response_bytes=options.max_response_mib * MIB,
            max_bytes_in_flight=options.max_in_flight_mib * MIB,
            max_working_bytes=options.max_working_mib * MIB,
            max_seq_len=options.max_seq_len,
            max_batch=options.max_batch,
            max_queue=options.max_queue,
            max_stream_requests=options.max_stream_requests,
            chunk_bytes=options.chunk_kib << 10,
            max_queue_seconds=options.max_queue_ms / 1e3,
            max_stored_bytes=options.max_kept_mib * MIB,
            stored_lease=options.kept_lease_seconds,
            max_stored_lease=options.max_kept_lease_seconds,
            max_kv_bytes=options.max_kv_mib * MIB,
            kv_page_tokens=options.kv_page_tokens,
            kv_lease=options.kv_lease_seconds,
            max_kv_lease=options.max_kv_lease_seconds,
            max_shared_regions=options.max_shared_regions,
            max_shared_bytes=options.max_shared_mib * MIB,
        ),
    )


def _parser() -> argparse.ArgumentParser:
    defaults, limits = Settings(Path()), Limits()
    parser = argparse.ArgumentParser(
        prog="attnserve-server",
        description="Serves the models of a repository over gRPC.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"attnserve-server {__version__}")
    add = parser.add_argument
    add("--repository", type=Path, required=True, help="folder of models")
    add("--host", default=defaults.host, help="address to listen on, or unix:PATH")
    add("--port", type=_at_least(0), default=defaults.port, help="gRPC; 0 takes a free one")
    add(
        "--metrics-port",
        type=_at_least(-1),
        default=defaults.metrics_port,
        help="Prometheus /metrics; 0 takes a free one, -1 is off",
    )
    add("--provider", choices=("auto", "cuda", "cpu"), default=defaults.provider)
    add(
        "--intra-op-threads",
        type=_at_least(0),
        default=defaults.intra_op_threads,
        help="CPU threads of one computation; 0: as many as there are cores",
    )
    add(
        "--spinning",
        action=argparse.BooleanOptionalAction,
        default=defaults.spinning,
        help="let idle computation threads spin",
    )
    add(
        "--concurrency",
        type=_at_least(1),
        default=defaults.concurrency,
        help="computations at once",
    )
    add(
        "--max-batch-size",
        type=_at_least(1),
        default=defaults.max_batch_size,
        help="sequences, of all requests, that run together; 1 is no batching",
    )
    add(
        "--max-batch-kib",
        type=_at_least(0),
        default=0,
        help="tensors of requests that run together; 0: 2048 on a CPU, 262144 on CUDA",
    )
    add(
        "--batch-delay-us",
        type=_at_least(0),
        default=round(defaults.batch_delay * 1e6),
        help="how long a batch waits for others to join; 0: not at all",
    )
    add(
        "--io-threads",
        type=_at_least(0),
        default=defaults.io_threads,
        help="threads that move bytes; 0: one for each core, four at the most",
    )
    add(
        "--max-connections",
        type=_at_least(0),
        default=defaults.max_connections,
        help="at once; 0: as many as the limit of descriptors allows, but for a reserve",
    )
    add(
        "--max-connections-per-address",
        type=_at_least(0),
        default=defaults.max_connections_per_address,
        help="at once from one address; 0: no bound of its own",
    )
    for name, default, text in (
        (
            "idle-timeout",
            defaults.idle_timeout,
            "until an unused connection is closed; 0: never",
        ),
        (
            "keepalive-interval",
            defaults.keepalive_interval,
            "between pings of silence; 0: none",
        ),
        ("keepalive-timeout", defaults.keepalive_timeout, "that a ping's answer may take"),
        (
            "keepalive-min-ping-interval",
            defaults.keepalive_min_ping_interval,
            "between a caller's own pings; one that sends more is disconnected",
        ),
        (
            "max-connection-age",
            defaults.max_connection_age,
            "until a connection takes no more calls; 0: never",
        ),
        (
            "max-connection-age-grace",
            defaults.max_connection_age_grace,
            "that its calls then have to end",
        ),
    ):
        add(f"--{name}", type=_seconds, default=default, help=f"seconds {text}")
    add("--tls-certificate", type=Path, help="PEM file: certificate chain; turns TLS on")
    add("--tls-key", type=Path, help="PEM file: its private key")
    add(
        "--tls-client-authorities",
        type=Path,
        help="PEM file: callers must show a certificate that one of these has signed",
    )
    add(
        "--drain-seconds",
        type=float,
        default=defaults.drain_seconds,
        help="how long SIGTERM waits for calls under way",
    )
    add(
        "--model-control",
        action=argparse.BooleanOptionalAction,
        default=defaults.model_control,
        help="let callers load and unload models",
    )
    add(
        "--max-shared-regions",
        type=_at_least(0),
        default=limits.max_shared_regions,
        help="shared-memory regions registered at once; 0 turns shared memory off",
    )
    for name, default, text in (
        ("message", limits.max_message_bytes, "one gRPC message"),
        ("request", limits.max_request_bytes, "all tensors of a request"),
        ("response", limits.max_response_bytes, "all tensors of an answer"),
        ("working", limits.max_working_bytes, "estimated memory of what runs, one or all"),
        ("shared", limits.max_shared_bytes, "shared memory of callers, mapped at once"),
    ):
        add(f"--max-{name}-mib", type=_at_least(1), default=default // MIB, help=text)
    add(
        "--max-in-flight-mib",
        type=_at_least(1),
        default=limits.max_bytes_in_flight // MIB,
        help="tensors of all requests together",
    )
    add("--max-seq-len", type=_at_least(1), default=limits.max_seq_len, help="longest sequence")
    add("--max-batch", type=_at_least(1), default=limits.max_batch, help="sequences of a request")
    add("--max-queue", type=_at_least(0), default=limits.max_queue, help="requests that may wait")
    add(
        "--max-queue-ms",
        type=_at_least(1),
        default=round(limits.max_queue_seconds * 1e3),
        help="a request that would wait longer, by estimate, is refused at once",
    )
    add(
        "--max-kept-mib",
        type=_at_least(0),
        default=limits.max_stored_bytes // MIB,
        help="tensors stored by PutTensor",
    )
    add(
        "--kept-lease-seconds",
        type=float,
        default=limits.stored_lease,
        help="how long a tensor is stored after its last use, unless its caller says otherwise",
    )
    add(
        "--max-kept-lease-seconds",
        type=float,
        default=limits.max_stored_lease,
        help="the longest that a caller may ask for",
    )
    add(
        "--max-kv-mib",
        type=_at_least(0),
        default=limits.max_kv_bytes // MIB,
        help="keys and values of KV sessions; 0: there are none",
    )
    add(
        "--kv-page-tokens",
        type=int,
        choices=(4, 8, 16, 32, 64),
        default=limits.kv_page_tokens,
        help="tokens of a page of a KV session",
    )
    add(
        "--kv-lease-seconds",
        type=_seconds,
        default=limits.kv_lease,
        help="how long a KV session is kept after its last use, unless its caller says otherwise",
    )
    add(
        "--max-kv-lease-seconds",
        type=_seconds,
        default=limits.max_kv_lease,
        help="the longest that a caller may ask for",
    )
    add(
        "--max-stream-requests",
        type=_at_least(1),
        default=limits.max_stream_requests,
        help="requests in flight on one stream",
    )
    add(
        "--chunk-kib",
        type=_at_least(1),
        default=limits.chunk_bytes >> 10,
        help="chunks that the server sends",
    )
    add("--log-format", choices=("json", "text"), default="json")
    add("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    return parser


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e9:
        raise argparse.ArgumentTypeError(f"given {text!r}; allowed: 0 or more, in seconds")
    return seconds


class _at_least:  # noqa: N801 (used as an argparse type, whose name shows in messages)
    """An integer with a lower bound."""

    def __init__(self, lowest: int) -> None:
        self._lowest = lowest

    def __call__(self, text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = self._lowest - 1
        if number < self._lowest:
            raise argparse.ArgumentTypeError(f"given {text!r}; allowed: {self._lowest} or more")
        return number


if __name__ == "__main__":
    sys.exit(main())
