"""Everything about a server that can be set, with its default and its option."""

import dataclasses
import ipaddress
import os
import re
from argparse import ArgumentTypeError
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from attnserve_proto.commands import values
from attnserve_proto.commands.values import PORT, integer, number, seconds

from attnserve_server.options import Option

KIB, MIB = 1 << 10, 1 << 20
ROLES = ("infer", "sessions", "admin", "move")
# A message's length has 32 bits; of everything else, more than any machine has.
_MOST_MESSAGE, _MOST, _MOST_THREADS = 4095, 1 << 30, 1024
_MOST_TRACES = 100_000  # a second; far more than Python turns into spans

_SOCKETS, _MOST_SOCKET = ("unix:", "unix-abstract:"), 107
_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,252})")
_COLLECTOR = re.compile(
    r"(?P<scheme>https?://)?([A-Za-z0-9_][A-Za-z0-9_.-]{0,252}|\[[0-9A-Fa-f:.]{2,45}\]):(?P<port>[0-9]{1,5})"
)
_SERVERS = f"HOST:PORT, [IPV6]:PORT, unix:PATH or dns:///NAME:PORT between commas, ports 1..{PORT}"
_HOSTS = "a host name, an IPv4 or IPv6 address, unix:PATH or unix-abstract:NAME"


class SettingsError(Exception):
    """What settings ask for cannot be had here; the message says what, and what is missing."""


def _page_tokens(given: str) -> int:
    """Reads the size of a page."""
    if given not in ("4", "8", "16", "32", "64"):
        values.refuse(given, "4, 8, 16, 32 or 64")
    return int(given)


def roles(given: str) -> tuple[str, ...]:
    """Reads roles between commas; `none`: no role."""
    if given == "none":
        return ()
    names = tuple(name for name in ROLES if name in given.split(","))
    if not names or len(names) != len(given.split(",")):
        values.refuse(given, f"{', '.join(ROLES)}, some of them between commas, or none")
    return names


def _roles_text(given: str) -> str:
    """Reads them as a text."""
    return ",".join(roles(given)) or "none"


def _collector(given: str) -> str:
    """Reads where a collector listens; without a scheme it is http."""
    found = _COLLECTOR.fullmatch(given)
    if found is None or not 1 <= int(found["port"]) <= PORT:
        values.refuse(given, "HOST:PORT, http://HOST:PORT or https://HOST:PORT")
    return given if found["scheme"] else f"http://{given}"


def _targets_text(given: str) -> str:
    """Reads targets of servers between commas."""
    try:
        return ",".join(values.listed(_one_or_name)(given))
    except ArgumentTypeError:
        values.refuse(given, _SERVERS)


def _one_or_name(given: str) -> str:
    """Reads where a server is, or the name of several."""
    if given.startswith("dns:///"):
        return f"dns:///{values.target(given.removeprefix('dns:///'))}"
    if given.startswith(("dns:", "ipv4:", "ipv6:")):
        values.refuse(given, _SERVERS)
    return values.target(given)


def _host(given: str) -> str:
    """Reads an address to listen on, without its port."""
    if given.startswith(_SOCKETS):
        path = given.partition(":")[2]
        if not 0 < len(path.encode("utf-8", "surrogateescape")) <= _MOST_SOCKET or "\0" in path:
            values.refuse(given, f"unix:PATH, a path of 1..{_MOST_SOCKET} bytes")
        return given
    bare = given[1:-1] if given[:1] == "[" and given[-1:] == "]" else given
    if ":" in bare:
        try:
            ipaddress.IPv6Address(bare)
        except ValueError:
            values.refuse(given, _HOSTS)
        return bare
    if not _NAME.fullmatch(given):
        values.refuse(given, _HOSTS)
    return given


@dataclass(frozen=True, slots=True)
class Limits:
    """What the server accepts; sizes in bytes, times in seconds."""

    max_message_bytes: Annotated[
        int,
        Option(
            "one gRPC message; large tensors come in chunks",
            integer(1, _MOST_MESSAGE),
            "max-message-mib",
            unit=MIB,
        ),
    ] = 128 * MIB
    max_request_bytes: Annotated[
        int, Option("all tensors of a request", integer(1, _MOST), "max-request-mib", unit=MIB)
    ] = 1024 * MIB
    max_response_bytes: Annotated[
        int, Option("all tensors of an answer", integer(1, _MOST), "max-response-mib", unit=MIB)
    ] = 1024 * MIB
    max_bytes_in_flight: Annotated[
        int,
        Option(
            "tensors of all requests together, that arrive, wait or run",
            integer(1, _MOST),
            "max-in-flight-mib",
            unit=MIB,
        ),
    ] = 4096 * MIB
    max_working_bytes: Annotated[
        int,
        Option(
            "estimated memory of what runs, one request or all",
            integer(1, _MOST),
            "max-working-mib",
            unit=MIB,
        ),
    ] = 8192 * MIB
    max_seq_len: Annotated[int, Option("longest sequence: Sq and Sk", integer(1))] = 65_536
    max_batch: Annotated[int, Option("sequences of a request", integer(1))] = 1024
    max_queue: Annotated[int, Option("requests that may wait to run", integer(0))] = 256
    max_queue_seconds: Annotated[
        float,
        Option(
            "a request that would wait longer, by estimate, is refused at once",
            integer(1),
            "max-queue-ms",
            unit=1e-3,
        ),
    ] = 0.5
    max_stream_requests: Annotated[
        int,
        Option("requests in flight on one stream; more are not read until some end", integer(1)),
    ] = 32
    chunk_bytes: Annotated[
        int,
        Option(
            "chunks that the server sends", integer(1, _MOST_MESSAGE << 10), "chunk-kib", unit=KIB
        ),
    ] = MIB
    max_stored_bytes: Annotated[
        int,
        Option(
            "tensors stored by PutTensor, all callers' together",
            integer(0, _MOST),
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
            integer(0, _MOST),
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
        Option("shared-memory regions registered at once; 0 turns shared memory off", integer(0)),
    ] = 256
    max_shared_bytes: Annotated[
        int,
        Option(
            "shared memory of callers, mapped at once",
            integer(1, _MOST),
            "max-shared-mib",
            unit=MIB,
        ),
    ] = 16_384 * MIB
    caller_requests_per_second: Annotated[
        float,
        Option(
            "calls and requests on streams of one caller, a second; 0: no bound of its own",
            number(0, 1e9),
        ),
    ] = 0.0
    caller_bytes_in_flight: Annotated[
        int,
        Option(
            "of --max-in-flight-mib, for one caller; 0: half of it where callers are identified, "
            "else all",
            integer(0, _MOST),
            "caller-in-flight-mib",
            unit=MIB,
        ),
    ] = 0
    caller_stored_bytes: Annotated[
        int,
        Option(
            "of --max-stored-mib, for one caller; 0: half of it where callers are identified, "
            "else all",
            integer(0, _MOST),
            "caller-stored-mib",
            unit=MIB,
        ),
    ] = 0
    caller_sessions: Annotated[
        int,
        Option(
            "KV sessions of one caller, open at once; 0: 16384 where callers are identified, else "
            "no bound of its own",
            integer(0),
        ),
    ] = 0
    caller_session_bytes: Annotated[
        int,
        Option(
            "of --max-kv-mib, for the KV sessions of one caller; 0: half of it where callers are "
            "identified, else all",
            integer(0, _MOST),
            "caller-kv-mib",
            unit=MIB,
        ),
    ] = 0
    caller_calls: Annotated[
        int,
        Option(
            "calls of one caller, open at once, streams among them; 0: 1024 where callers are "
            "identified, else no bound of its own",
            integer(0),
        ),
    ] = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaneSettings:
    """What the data plane takes as it is given, by these names; times in seconds."""

    concurrency: Annotated[
        int, Option("computations that run at once", integer(1, _MOST_THREADS))
    ] = 1
    spinning: Annotated[
        bool,
        Option(
            "let idle computation threads spin: the next computation starts sooner, at the cost of "
            "whatever else needs the cores, the transport first of all"
        ),
    ] = False
    max_batch_size: Annotated[
        int,
        Option("sequences, of all requests, that run together; 1 is no batching", integer(1)),
    ] = 64
    batch_delay: Annotated[
        float,
        Option(
            "how long a batch waits for others to join; 0: not at all, and requests that come "
            "meanwhile are the next batch",
            integer(0),
            "batch-delay-us",
            unit=1e-6,
        ),
    ] = 0.0
    max_run_seconds: Annotated[
        float,
        Option(
            "how long a computation may run before it is stopped; 0: for ever, and none is found "
            "that does not end",
            seconds,
        ),
    ] = 300.0
    max_connections: Annotated[
        int,
        Option(
            "at once; 0: as many as the limit of descriptors allows, but for a reserve", integer(0)
        ),
    ] = 0
    max_connections_per_address: Annotated[
        int, Option("at once from one address; 0: no bound of its own", integer(0))
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
    trace_sample: Annotated[
        float,
        Option(
            "of the calls that belong to no trace, the part that is traced, 0..1; with "
            "--trace-endpoint",
            number(0, 1),
        ),
    ] = 0.01
    max_traces_per_second: Annotated[
        int,
        Option(
            "calls and requests on streams that are traced, whatever their callers ask for",
            integer(1, _MOST_TRACES),
        ),
    ] = 100
    limits: Limits = Limits()

    @property
    def plane_keywords(self) -> dict[str, Any]:
        """All that, the limits included, by name."""
        names = {field.name for field in dataclasses.fields(PlaneSettings)} - {"limits"}
        return {name: getattr(self, name) for name in names} | dataclasses.asdict(self.limits)


@dataclass(frozen=True, slots=True)
class Settings(PlaneSettings):
    """How to run a server."""

    repository: Annotated[Path, Option("folder of models", values.path)]
    host: Annotated[
        str,
        Option(
            "address to listen on; unix:PATH or unix-abstract:NAME is a socket of this machine",
            _host,
        ),
    ] = "127.0.0.1"
    port: Annotated[int, Option("gRPC; 0 takes a free one", integer(0, PORT))] = 8001
    metrics_port: Annotated[
        int | None,
        Option(
            "Prometheus /metrics, on the same host; 0 takes a free one, -1 is off",
            integer(-1, PORT),
            none=-1,
        ),
    ] = 8002
    provider: Annotated[
        str, Option("what computes; auto: CUDA where it works", choices=("auto", "cuda", "cpu"))
    ] = "auto"
    intra_op_threads: Annotated[
        int,
        Option(
            "CPU threads of one computation; 0: as many as there are cores",
            integer(0, _MOST_THREADS),
        ),
    ] = 0
    io_threads: Annotated[
        int,
        Option(
            "threads that move bytes; 0: one for each core, four at the most",
            integer(0, _MOST_THREADS),
        ),
    ] = 0
    max_batch_bytes: Annotated[
        int | None,
        Option(
            "tensors of requests that run together, larger ones run alone; 0: 2048 on a CPU, where "
            "joining copies them, 262144 on CUDA",
            integer(0, _MOST),
            "max-batch-kib",
            unit=KIB,
            none=0,
        ),
    ] = None
    tls_certificate: Annotated[
        Path | None, Option("PEM file: certificate chain; turns TLS on", values.path)
    ] = None
    tls_key: Annotated[Path | None, Option("PEM file: its private key", values.path)] = None
    tls_client_authorities: Annotated[
        Path | None,
        Option(
            "PEM file: callers must show a certificate that one of these has signed", values.path
        ),
    ] = None
    callers: Annotated[
        Path | None,
        Option(
            "file of callers, their roles and credentials, one a line; read again when it changes",
            values.path,
        ),
    ] = None
    certificate_roles: Annotated[
        str,
        Option(
            "what callers may do whose certificate is signed by --tls-client-authorities and in no "
            "line of --callers",
            _roles_text,
        ),
    ] = "infer,sessions"
    jwt_keys: Annotated[
        Path | None,
        Option(
            "file of public keys, PEM or a JSON Web Key Set: callers may show JSON Web Tokens "
            "that one of them verifies; read again when it changes",
            values.path,
        ),
    ] = None
    jwt_issuer: Annotated[
        str | None, Option("iss of every such token; needed with --jwt-keys", values.title)
    ] = None
    jwt_audience: Annotated[
        str | None, Option("aud of every such token; needed with --jwt-keys", values.title)
    ] = None
    jwt_roles_claim: Annotated[
        str, Option("claim with the roles: a list, or a text with blanks between", values.title)
    ] = "roles"
    insecure: Annotated[
        bool,
        Option(
            "listen where others can reach it without TLS, or without asking callers who they are"
        ),
    ] = False
    trace_endpoint: Annotated[
        str | None,
        Option(
            "OpenTelemetry collector that traces are sent to, by OTLP over gRPC: HOST:PORT, or "
            "https://HOST:PORT; without it there are none",
            _collector,
        ),
    ] = None
    drain_seconds: Annotated[
        float, Option("how long SIGTERM waits for calls under way", seconds)
    ] = 30.0
    wedged_exit_seconds: Annotated[
        float,
        Option(
            "how long a computation may go on that was stopped and does not end, before the "
            "process exits with code 70; 0: it never does",
            seconds,
        ),
    ] = 30.0
    max_load_seconds: Annotated[
        float,
        Option("how long one version of a model may take to load; 0: as long as it takes", seconds),
    ] = 900.0
    move_sessions_to: Annotated[
        str | None,
        Option(
            "other servers, between commas, as callers reach them: SIGTERM hands them the KV "
            "sessions; of dns:///NAME:PORT all addresses behind the name",
            _targets_text,
        ),
    ] = None
    move_ca: Annotated[
        Path | None,
        Option(
            "PEM file: the authorities that signed those servers' certificates; turns TLS on",
            values.path,
        ),
    ] = None
    move_certificate: Annotated[
        Path | None, Option("PEM file: what this server shows them, for mutual TLS", values.path)
    ] = None
    move_key: Annotated[Path | None, Option("PEM file: its private key", values.path)] = None
    move_token_file: Annotated[
        Path | None,
        Option(
            "file with the token that this server shows them, of a caller with the role move",
            values.path,
        ),
    ] = None
    model_control: Annotated[bool, Option("let callers load and unload models")] = True
    log_format: Annotated[
        str, Option("lines on standard error: for programs or for people", choices=("json", "text"))
    ] = "json"
    log_level: Annotated[
        str,
        Option(
            "of the least important lines written", choices=("debug", "info", "warning", "error")
        ),
    ] = "info"

    @property
    def identified(self) -> bool:
        """Whether callers must say who they are."""
        shown = (self.callers, self.tls_client_authorities, self.jwt_keys)
        return any(each is not None for each in shown)


def usable_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
