"""Everything about a server that can be set, with its default and its option."""

import argparse
import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from attnserve_server.options import Option, at_least, seconds

KIB, MIB = 1 << 10, 1 << 20


def _page_tokens(text: str) -> int:
    """Reads the size of a page."""
    if text not in ("4", "8", "16", "32", "64"):
        raise argparse.ArgumentTypeError(f"given {text!r}; allowed: 4, 8, 16, 32 or 64")
    return int(text)


@dataclass(frozen=True, slots=True)
class Limits:
    """What the server accepts; sizes in bytes, times in seconds."""

    max_message_bytes: Annotated[
        int,
        Option(
            "one gRPC message; large tensors come in chunks",
            at_least(1),
            "max-message-mib",
            unit=MIB,
        ),
    ] = 128 * MIB
    max_request_bytes: Annotated[
        int, Option("all tensors of a request", at_least(1), "max-request-mib", unit=MIB)
    ] = 1024 * MIB
    max_response_bytes: Annotated[
        int, Option("all tensors of an answer", at_least(1), "max-response-mib", unit=MIB)
    ] = 1024 * MIB
    max_bytes_in_flight: Annotated[
        int,
        Option(
            "tensors of all requests together, that arrive, wait or run",
            at_least(1),
            "max-in-flight-mib",
            unit=MIB,
        ),
    ] = 4096 * MIB
    max_working_bytes: Annotated[
        int,
        Option(
            "estimated memory of what runs, one request or all",
            at_least(1),
            "max-working-mib",
            unit=MIB,
        ),
    ] = 8192 * MIB
    max_seq_len: Annotated[int, Option("longest sequence: Sq and Sk", at_least(1))] = 65_536
    max_batch: Annotated[int, Option("sequences of a request", at_least(1))] = 1024
    max_queue: Annotated[int, Option("requests that may wait to run", at_least(0))] = 256
    max_queue_seconds: Annotated[
        float,
        Option(
            "a request that would wait longer, by estimate, is refused at once",
            at_least(1),
            "max-queue-ms",
            unit=1e-3,
        ),
    ] = 0.5
    max_stream_requests: Annotated[
        int,
        Option("requests in flight on one stream; more are not read until some end", at_least(1)),
    ] = 32
    chunk_bytes: Annotated[
        int, Option("chunks that the server sends", at_least(1), "chunk-kib", unit=KIB)
    ] = MIB
    max_stored_bytes: Annotated[
        int,
        Option(
            "tensors stored by PutTensor, all callers' together",
            at_least(0),
            "max-stored-mib",
            unit=MIB,
        ),
    ] = 1024 * MIB
    stored_lease: Annotated[
        float,
        Option(
            "how long a tensor is stored after its last use, unless its caller says otherwise",
            seconds,
            "stored-lease-seconds",
        ),
    ] = 300.0
    max_stored_lease: Annotated[
        float, Option("the longest that a caller may ask for", seconds, "max-stored-lease-seconds")
    ] = 3600.0
    max_kv_bytes: Annotated[
        int,
        Option(
            "keys and values of KV sessions, all callers' together; 0: there are none",
            at_least(0),
            "max-kv-mib",
            unit=MIB,
        ),
    ] = 1024 * MIB
    kv_page_tokens: Annotated[
        int, Option("tokens of a page of a KV session: 4, 8, 16, 32 or 64", _page_tokens)
    ] = 16
    kv_lease: Annotated[
        float,
        Option(
            "how long a KV session is kept after its last use, unless its caller says otherwise",
            seconds,
            "kv-lease-seconds",
        ),
    ] = 300.0
    max_kv_lease: Annotated[
        float, Option("the longest that a caller may ask for", seconds, "max-kv-lease-seconds")
    ] = 3600.0
    max_shared_regions: Annotated[
        int,
        Option("shared-memory regions registered at once; 0 turns shared memory off", at_least(0)),
    ] = 256
    max_shared_bytes: Annotated[
        int,
        Option("shared memory of callers, mapped at once", at_least(1), "max-shared-mib", unit=MIB),
    ] = 16_384 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaneSettings:
    """What the data plane takes as it is given, by these names; times in seconds."""

    concurrency: Annotated[int, Option("computations that run at once", at_least(1))] = 1
    spinning: Annotated[
        bool,
        Option(
            "let idle computation threads spin: the next computation starts sooner, at the cost of "
            "whatever else needs the cores, the transport first of all"
        ),
    ] = False
    max_batch_size: Annotated[
        int,
        Option("sequences, of all requests, that run together; 1 is no batching", at_least(1)),
    ] = 64
    batch_delay: Annotated[
        float,
        Option(
            "how long a batch waits for others to join; 0: not at all, and requests that come "
            "meanwhile are the next batch",
            at_least(0),
            "batch-delay-us",
            unit=1e-6,
        ),
    ] = 0.0
    max_connections: Annotated[
        int,
        Option(
            "at once; 0: as many as the limit of descriptors allows, but for a reserve", at_least(0)
        ),
    ] = 0
    max_connections_per_address: Annotated[
        int, Option("at once from one address; 0: no bound of its own", at_least(0))
    ] = 0
    idle_timeout: Annotated[
        float, Option("seconds until an unused connection is closed; 0: never", seconds)
    ] = 300.0
    upload_grace: Annotated[
        float,
        Option(
            "seconds that a message under way, or chunks that were announced, may stay behind "
            "16 KiB a second; 0: for ever",
            seconds,
        ),
    ] = 10.0
    keepalive_interval: Annotated[
        float, Option("seconds of silence between pings; 0: none", seconds)
    ] = 7200.0
    keepalive_timeout: Annotated[
        float, Option("seconds that a ping's answer may take", seconds)
    ] = 20.0
    keepalive_min_ping_interval: Annotated[
        float,
        Option(
            "seconds between a caller's own pings; one that sends more is disconnected", seconds
        ),
    ] = 0.5
    max_connection_age: Annotated[
        float, Option("seconds until a connection takes no more calls; 0: never", seconds)
    ] = 0.0
    max_connection_age_grace: Annotated[
        float, Option("seconds that its calls then have to end", seconds)
    ] = 30.0
    limits: Limits = Limits()

    @property
    def plane_keywords(self) -> dict[str, Any]:
        """All that, the limits included, by name."""
        names = {field.name for field in dataclasses.fields(PlaneSettings)} - {"limits"}
        return {name: getattr(self, name) for name in names} | dataclasses.asdict(self.limits)


@dataclass(frozen=True, slots=True)
class Settings(PlaneSettings):
    """How to run a server."""

    repository: Annotated[Path, Option("folder of models", Path)]
    host: Annotated[
        str,
        Option("address to listen on; unix:PATH or unix-abstract:NAME is a socket of this machine"),
    ] = "127.0.0.1"
    port: Annotated[int, Option("gRPC; 0 takes a free one", at_least(0))] = 8001
    metrics_port: Annotated[
        int | None,
        Option(
            "Prometheus /metrics, on the same host; 0 takes a free one, -1 is off",
            at_least(-1),
            none=-1,
        ),
    ] = 8002
    provider: Annotated[
        str, Option("what computes; auto: CUDA where it works", choices=("auto", "cuda", "cpu"))
    ] = "auto"
    intra_op_threads: Annotated[
        int,
        Option("CPU threads of one computation; 0: as many as there are cores", at_least(0)),
    ] = 0
    io_threads: Annotated[
        int,
        Option("threads that move bytes; 0: one for each core, four at the most", at_least(0)),
    ] = 0
    max_batch_bytes: Annotated[
        int | None,
        Option(
            "tensors of requests that run together, larger ones run alone; 0: 2048 on a CPU, where "
            "joining copies them, 262144 on CUDA",
            at_least(0),
            "max-batch-kib",
            unit=KIB,
            none=0,
        ),
    ] = None
    tls_certificate: Annotated[
        Path | None, Option("PEM file: certificate chain; turns TLS on", Path)
    ] = None
    tls_key: Annotated[Path | None, Option("PEM file: its private key", Path)] = None
    tls_client_authorities: Annotated[
        Path | None,
        Option("PEM file: callers must show a certificate that one of these has signed", Path),
    ] = None
    drain_seconds: Annotated[
        float, Option("how long SIGTERM waits for calls under way", seconds)
    ] = 30.0
    model_control: Annotated[bool, Option("let callers load and unload models")] = True


def usable_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
