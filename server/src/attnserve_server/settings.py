"""Everything about a server that can be set, with its default."""

import os
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Limits:
    """What the server accepts; sizes in bytes.

    Attributes:
        max_message_bytes: one gRPC message. Tensors above about 4 MB are better sent in chunks.
        max_request_bytes: all tensors of one request.
        max_response_bytes: all tensors of one answer.
        max_bytes_in_flight: tensors of all requests that are received, wait or run.
        max_working_bytes: estimated memory of one request's computation; also of all that run at
            once.
        max_seq_len: Sq and Sk.
        max_batch: sequences of one request.
        max_queue: requests waiting to run.
        max_stream_requests: requests in flight on one stream; more are not read until some end.
        chunk_bytes: size of the chunks that the server sends.
        max_queue_seconds: a request that would wait longer, by estimate, is refused.
        max_stored_bytes: tensors stored by PutTensor, all callers' together.
        stored_lease, max_stored_lease: seconds that a tensor is stored after its last use: unless
            its caller says otherwise, and at most.
        max_kv_bytes: keys and values of KV sessions, all callers' together; 0: there are none.
        kv_page_tokens: tokens of a page of a session; a multiple of 4.
        kv_lease, max_kv_lease: seconds that a session is kept after its last use: unless its caller
            says otherwise, and at most.
        max_shared_regions: shared-memory regions registered at once; 0 turns shared memory off.
        max_shared_bytes: of shared memory mapped at once.
    """

    max_message_bytes: int = 128 * MIB
    max_request_bytes: int = 1024 * MIB
    max_response_bytes: int = 1024 * MIB
    max_bytes_in_flight: int = 4096 * MIB
    max_working_bytes: int = 8192 * MIB
    max_seq_len: int = 65_536
    max_batch: int = 1024
    max_queue: int = 256
    max_stream_requests: int = 32
    chunk_bytes: int = MIB
    max_queue_seconds: float = 0.5
    max_stored_bytes: int = 1024 * MIB
    stored_lease: float = 300.0
    max_stored_lease: float = 3600.0
    max_kv_bytes: int = 1024 * MIB
    kv_page_tokens: int = 16
    kv_lease: float = 300.0
    max_kv_lease: float = 3600.0
    max_shared_regions: int = 256
    max_shared_bytes: int = 16_384 * MIB


@dataclass(frozen=True, slots=True)
class Settings:
    """How to run a server.

    Attributes:
        repository: the folder of models.
        host, port: where gRPC listens; port 0 takes a free one. A host "unix:PATH" or
            "unix-abstract:NAME" is a socket of this machine and has no port.
        metrics_port: Prometheus over HTTP on the same host, on 127.0.0.1 where that is such a
            socket; 0 takes a free one, None is off.
        provider: "auto", "cuda" or "cpu".
        intra_op_threads: threads that one computation may use; 0: as many as there are cores.
        spinning: whether idle computation threads spin. Lower latency for the next computation,
            at the cost of whatever else needs the cores, the transport first of all.
        concurrency: computations that run at once.
        max_batch_size: sequences, of however many requests, that run together; 1 is no batching.
        max_batch_bytes: tensors of requests that run together; larger requests run alone. None: 2
            MiB on a CPU, where joining saves a small request's fixed cost but copies its tensors,
            256 MiB on CUDA.
        batch_delay: seconds that a batch waits for others to join; 0: it runs at once, and requests
            that come meanwhile are the next one.
        io_threads: threads that move bytes, each with connections of its own; 0: one for each core,
            four at the most.
        max_connections: at once; 0: as many as the limit of descriptors allows, but for a reserve.
        max_connections_per_address: of one caller's address; 0: no bound of its own.
        idle_timeout: seconds after which a connection without calls is closed; 0: never.
        keepalive_interval, keepalive_timeout: seconds between pings of ours on a silent connection
            (0: none), and for their answer.
        keepalive_min_ping_interval: seconds; callers that ping more often are told to calm down.
        max_connection_age, max_connection_age_grace: seconds after which a connection takes no more
            calls (0: never), and that its calls then have to end.
        tls_certificate, tls_key: PEM files; with them all connections are TLS.
        tls_client_authorities: PEM file; callers must show a certificate that these have signed.
        drain_seconds: how long SIGTERM waits for calls under way.
        model_control: whether callers may load and unload models.
        limits: what is accepted.
    """

    repository: Path
    host: str = "127.0.0.1"
    port: int = 8001
    metrics_port: int | None = 8002
    provider: str = "auto"
    intra_op_threads: int = 0
    spinning: bool = False
    concurrency: int = 1
    max_batch_size: int = 64
    max_batch_bytes: int | None = None
    batch_delay: float = 0.0
    io_threads: int = 0
    max_connections: int = 0
    max_connections_per_address: int = 0
    idle_timeout: float = 300.0
    keepalive_interval: float = 7200.0
    keepalive_timeout: float = 20.0
    keepalive_min_ping_interval: float = 0.5
    max_connection_age: float = 0.0
    max_connection_age_grace: float = 30.0
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_client_authorities: Path | None = None
    drain_seconds: float = 30.0
    model_control: bool = True
    limits: Limits = Limits()


def usable_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
