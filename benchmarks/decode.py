"""KV sessions against the kernel in process, against sending everything, and against each other.

Causal attention of 8 heads of 64 in FP32, one layer, on the CPU. Contenders of a section take turns
in rounds of a part of a second; medians of rounds count. The client in C++ is a bare nghttp2
(native/decode.cc). Every step's token is taken away again, outside what is timed.

    step      one session's step: C++, SDK and the graph `paged` in process; bytes on the socket
    sessions  64 sessions in one message, its tensors in it or in shared memory, one by one, and the
              same batch in process
    layer     steps of a layer model, which has the projections inside, beside the core's
    reupload  a step against sending all keys and values again
    memory    bytes of pages at mixed lengths; forks
    prefix    32 sessions over one prefix of 2048 tokens, and with a copy each

    python benchmarks/decode.py --json reports/decode.json
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import common
import decode_calls as calls
import decode_messages as messages
import numpy as np
import serving_sections
import serving_servers
from attnserve_client import AttentionClient, Session, keep_freed_memory, page_hashes
from attnserve_proto import attention_pb2 as pb
from attnserve_proto.commands import Parser
from decode_calls import Metrics, Paged
from decode_messages import Group
from serving_report import Bar, Row, Section
from serving_servers import Server

CONTEXT = 4096
PAUSE_SECONDS = 0.2e-3
NATIVE_BAR_MS, SDK_BAR_MS, BYTES_BAR, LAYER_BYTES_BAR = 0.12, 0.35, 1.01, 0.55
SESSIONS, BATCH_BAR, ONE_BY_ONE_BAR = 64, 1.25, 3.0
REUPLOAD_BAR = 20.0
WASTE_BAR, FORK_BAR_MS = 0.04, 0.1
PREFIX, SHARERS, STORED_BAR, SHARED_BAR = 2048, 32, 1.01, 2.0


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    contexts: tuple[int, ...] = (256, 1024, 4096, 16384)
    batch_contexts: tuple[int, ...] = (64, 1024, 4096)
    layer_contexts: tuple[tuple[int, int], ...] = ((1, 256), (1, 4096), (64, 512))  # of sessions
    fork_layers: tuple[int, ...] = (1, 32)
    rounds: int = 7
    seconds: float = 0.5  # of a contender in a round


QUICK = Sizes(
    contexts=(256, 4096),
    batch_contexts=(64, 512),
    layer_contexts=((1, 256), (1, 4096)),
    rounds=3,
    seconds=0.2,
)


@dataclass(frozen=True)
class Service:
    """A server with the model, and a client of it."""

    repository: Path
    server: Server
    client: AttentionClient
    metrics: Metrics


def step(service: Service, sizes: Sizes) -> Section:
    """What a session's step takes beyond its kernel."""
    rows, bars = [], []
    for context in sizes.contexts:
        (session,) = sessions = calls.copies(service.client, 1, context)
        arrays = messages.random(1)
        groups = [Group(True, messages.step(sessions)), messages.back(sessions)]
        in_process = Paged(service.repository, [context + 1])
        computing: list[float] = []

        def attend(
            session: Session = session,
            arrays: tuple[calls.Array, ...] = arrays,
            computing: list[float] = computing,
        ) -> None:
            computing.append(session.attend(0, *arrays).timings.compute / 1e3)

        def take_back(session: Session = session, context: int = context) -> None:
            session.truncate(context)

        times: dict[str, list[float]] = {"native": [], "sdk": [], "in_process": [], "paused": []}
        sent: list[float] = []
        for _ in range(sizes.rounds):
            got = calls.by_native(service.server, groups, sizes.seconds)
            times["native"].append(got["p50_ms"])
            sent.append(got["bytes"])
            times["sdk"].append(calls.p50_ms(attend, sizes.seconds, take_back))
            times["in_process"].append(calls.p50_ms(in_process, sizes.seconds, _nothing))
            times["paused"].append(calls.p50_ms(in_process, sizes.seconds, _pause))
        row: Row = {"context": context}
        row |= {f"{name}_ms": median(values) for name, values in times.items()}
        for name in ("native", "sdk"):
            row |= {f"{name}_over_ms": _over(times[name], times["in_process"])}
        rows.append(row | {"sdk_server_compute_ms": median(computing), "bytes": median(sent)})
        calls.close(sessions)
        if context == CONTEXT:
            text = f"step, {context} tokens: ms over in process, client in"
            bars.append(Bar(f"{text} C++", row["native_over_ms"], NATIVE_BAR_MS))
            bars.append(Bar(f"{text} Python", row["sdk_over_ms"], SDK_BAR_MS))
    growth = rows[-1]["bytes"] / rows[0]["bytes"]
    text = f"bytes of a step, {rows[-1]['context']} tokens / {rows[0]['context']}"
    notes = [
        "sdk_server_compute_ms: computing in the SDK's steps, by the server's own timings.",
        f"paused_ms: in process, each run {PAUSE_SECONDS * 1e3:g} ms after the one before, as runs "
        "in the server are about: meanwhile other cores fall asleep.",
    ]
    return Section("step", rows, [*bars, Bar(text, growth, BYTES_BAR)], notes)


def sessions(service: Service, sizes: Sizes) -> Section:
    """Many sessions in one message."""
    rows, bars = [], []
    for context in sizes.batch_contexts:
        many = calls.copies(service.client, SESSIONS, context)
        after = messages.back(many)
        together = [Group(True, messages.step(many)), after]
        one_by_one = [*(Group(True, messages.step([each])) for each in many), after]
        in_process = Paged(service.repository, [context + 1] * SESSIONS)
        times: dict[str, list[float]] = {}
        with messages.shared_step(service.server, many) as request:
            contenders = {"together": together, "one_by_one": one_by_one}
            contenders["shared"] = [Group(True, request), after]
            for _ in range(sizes.rounds):
                for name, groups in contenders.items():
                    got = calls.by_native(service.server, groups, sizes.seconds)
                    times.setdefault(name, []).append(got["p50_ms"])
                took = calls.p50_ms(in_process, sizes.seconds, _nothing)
                times.setdefault("in_process", []).append(took)
        calls.close(many)
        row: Row = {"context": context}
        row |= {f"{name}_ms": median(values) for name, values in times.items()}
        row |= {"ratio": row["together_ms"] / row["in_process_ms"]}
        row |= {"shared_ratio": row["shared_ms"] / row["in_process_ms"]}
        row |= {"gain": row["one_by_one_ms"] / row["together_ms"]}
        rows.append(row)
        text = f"{SESSIONS} sessions of {context} tokens: "
        bars.append(Bar(f"{text}one message / in process", row["ratio"], BATCH_BAR))
        shared = f"{text}one message, tensors in shared memory / in process"
        bars.append(Bar(shared, row["shared_ratio"], BATCH_BAR))
        bars.append(Bar(f"{text}steps/s / one by one", row["gain"], ONE_BY_ONE_BAR, True))
    notes = [
        "From some length on a step is the reading of keys and values, together or not: "
        f"{SESSIONS} sessions of 4096 tokens have 1 GiB of them."
    ]
    return Section("sessions", rows, bars, notes)


def layer(service: Service, sizes: Sizes) -> Section:
    """Steps of a layer model: hidden states in, output after the last projection out."""
    rows, bars = [], []
    for count, context in sizes.layer_contexts:
        contenders = {
            name: calls.copies(service.client, count, context, model)
            for name, model in (("layer", messages.LAYER), ("core", messages.MODEL))
        }
        in_process = Paged(service.repository, [context + 1] * count, messages.LAYER)
        times: dict[str, list[float]] = {"layer": [], "core": [], "in_process": []}
        sent: dict[str, float] = {}
        for _ in range(sizes.rounds):
            for name, many in contenders.items():
                groups = [Group(True, messages.step(many)), messages.back(many)]
                got = calls.by_native(service.server, groups, sizes.seconds)
                times[name].append(got["p50_ms"])
                sent[name] = got["bytes"]
            times["in_process"].append(calls.p50_ms(in_process, sizes.seconds, _nothing))
        for many in contenders.values():
            calls.close(many)
        row: Row = {"sessions": count, "context": context}
        row |= {f"{name}_ms": median(values) for name, values in times.items()}
        row |= {"over_ms": _over(times["layer"], times["in_process"])}
        row |= {"bytes": sent["layer"], "core_bytes": sent["core"]}
        rows.append(row)
        if count == 1 and context == CONTEXT:
            text = f"layer model, {context} tokens: "
            bars.append(
                Bar(f"{text}ms over in process, client in C++", row["over_ms"], NATIVE_BAR_MS)
            )
            share = row["bytes"] / row["core_bytes"]
            bars.append(Bar(f"{text}bytes of a step / core model's", share, LAYER_BYTES_BAR))
    notes = [
        f"Of {messages.EMBED_DIM} numbers a token, which become query, key and value inside; "
        "the client is in C++. core_ms: the core model's step, without projections."
    ]
    return Section("layer", rows, bars, notes)


def reupload(service: Service, sizes: Sizes) -> Section:
    """A step in a session against Attend with all keys and values, both through the SDK."""
    (session,) = calls.copies(service.client, 1, CONTEXT)
    arrays = messages.random(1)
    query, key, value = (x.swapaxes(0, 1)[None].copy() for x in messages.random(CONTEXT))
    times: dict[str, list[float]] = {"session": [], "stateless": []}
    for _ in range(sizes.rounds):
        for name, call in (
            ("session", lambda: session.attend(0, *arrays)),
            (
                "stateless",
                lambda: service.client.attend(query[:, :, -1:], key, value, model=messages.MODEL),
            ),
        ):
            undo = (lambda: session.truncate(CONTEXT)) if name == "session" else _nothing
            times[name].append(calls.p50_ms(call, sizes.seconds, undo))
    session.close()
    row: Row = {"context": CONTEXT, **{f"{n}_ms": median(each) for n, each in times.items()}}
    row |= {"ratio": row["stateless_ms"] / row["session_ms"]}
    text = f"{CONTEXT} tokens: sending all keys and values / a step"
    return Section("reupload", [row], [Bar(text, row["ratio"], REUPLOAD_BAR, at_least=True)])


def memory(service: Service, sizes: Sizes) -> Section:
    """What pages waste, and what forks cost."""
    client = service.client
    lengths = [int(n) for n in np.random.default_rng(3).integers(32, 2048, 64)]
    before = service.metrics.value("attnserve_kv_bytes")
    mixed = [client.session(messages.MODEL, num_layers=1, max_tokens=length) for length in lengths]
    for session, length in zip(mixed, lengths, strict=True):
        calls.fill(session, length)
    held = service.metrics.value("attnserve_kv_bytes") - before
    calls.close(mixed)
    waste = 1 - sum(lengths) * calls.TOKEN_BYTES / held
    rows: list[Row] = [{"what": "64 sessions of 32..2048 tokens: share wasted", "figure": waste}]
    bars = [Bar("bytes of pages without tokens, 64 mixed lengths", waste, WASTE_BAR)]
    for layers in sizes.fork_layers:
        with client.session(messages.MODEL, num_layers=layers, max_tokens=CONTEXT) as parent:
            calls.fill(parent, CONTEXT)
            before = service.metrics.value("attnserve_kv_bytes")
            fork = pb.ForkSession(session_id=parent.id, length=CONTEXT, lease=500_000)
            renew = pb.RenewSession(session_id=parent.id)
            times: dict[str, list[float]] = {"fork": [], "renew": []}
            for _ in range(sizes.rounds):
                for name, request in (
                    ("fork", pb.DecodeRequest(fork=fork)),
                    ("renew", pb.DecodeRequest(renew=renew)),
                ):
                    got = calls.by_native(service.server, [Group(True, [request])], 0.1)
                    times[name].append(got["p50_ms"])
            copied = service.metrics.value("attnserve_kv_bytes") - before
        took = median(times["fork"])
        text = f"fork of {CONTEXT} tokens, {layers} layers"
        rows += [
            {"what": f"{text}: ms", "figure": took},
            {"what": f"{text}: ms without its round trip", "figure": took - median(times["renew"])},
            {"what": f"{text}: bytes of pages copied", "figure": copied},
        ]
        bars.append(Bar(f"{text}: ms, round trip included", took, FORK_BAR_MS))
        bars.append(Bar(f"{text}: bytes of pages copied", copied, 0))
    return Section("memory", rows, bars)


def prefix(service: Service, sizes: Sizes) -> Section:
    """Sessions that begin with the same tokens."""
    client, tail = service.client, calls.PAGE_TOKENS
    most = PREFIX + 4 * calls.PAGE_TOKENS
    hashes = page_hashes(np.random.default_rng().integers(0, 1 << 40, PREFIX).tolist(), tail)
    before = service.metrics.value("attnserve_kv_bytes")
    with client.session(messages.MODEL, num_layers=1, max_tokens=PREFIX) as first:
        first.attend(0, *messages.random(PREFIX), prefix_hashes=hashes)
        shared = [
            client.session(messages.MODEL, num_layers=1, max_tokens=most, prefix_hashes=hashes)
            for _ in range(SHARERS)
        ]
    found = {session.length for session in shared}
    for session in shared:
        calls.fill(session, PREFIX + tail)
    held = service.metrics.value("attnserve_kv_bytes") - before
    least = (PREFIX + SHARERS * tail) * calls.TOKEN_BYTES
    apart = calls.copies(client, SHARERS, PREFIX + tail)
    times: dict[str, list[float]] = {"shared": [], "unshared": []}
    for _ in range(sizes.rounds):
        for name, each in (("shared", shared), ("unshared", apart)):
            groups = [Group(True, messages.step(each)), messages.back(each)]
            got = calls.by_native(service.server, groups, sizes.seconds)
            times[name].append(got["p50_ms"])
    calls.close([*shared, *apart])
    row: Row = {"sessions": SHARERS, "prefix": PREFIX, "found": str(sorted(found))}
    row |= {f"{name}_ms": median(values) for name, values in times.items()}
    row |= {"speed": row["unshared_ms"] / row["shared_ms"], "bytes/least": held / least}
    text = f"a prefix of {PREFIX} under {SHARERS} sessions: "
    bars = [
        Bar(f"{text}bytes / one prefix and all tails", row["bytes/least"], STORED_BAR),
        Bar(f"{text}steps/s / unshared", row["speed"], SHARED_BAR, at_least=True),
    ]
    return Section("prefix", [row], bars)


def _nothing() -> None:
    pass


def _pause() -> None:
    time.sleep(PAUSE_SECONDS)


def _over(times: list[float], floor: list[float]) -> float:
    """Median of the differences within rounds."""
    return median(one - other for one, other in zip(times, floor, strict=True))


@contextlib.contextmanager
def _service(repository: Path) -> Iterator[Service]:
    port = common.free_port()
    options = ("--metrics-port", str(port), "--max-kv-mib", "4096")
    with (
        serving_servers.attnserve(repository, *options) as server,
        AttentionClient(server.address) as client,
    ):
        yield Service(repository, server, client, Metrics(port))


SECTIONS = {
    "step": step,
    "sessions": sessions,
    "layer": layer,
    "reupload": reupload,
    "memory": memory,
    "prefix": prefix,
}


def main() -> int:
    """Run the benchmark; 1 if a section could not be measured."""
    options = _parser().parse_args()
    keep_freed_memory()
    sizes = QUICK if options.quick else Sizes()
    with calls.models(options.repository, layer="layer" in options.sections) as repository:
        made = {name: partial(_measured, name, repository, sizes) for name in options.sections}
        done, failed = serving_sections.measured(options.sections, made)
    return serving_sections.write("decode", options, done, failed, load_average=os.getloadavg())


def _measured(name: str, repository: Path, sizes: Sizes) -> Section:
    measure: Callable[[Service, Sizes], Section] = SECTIONS[name]
    with _service(repository) as service:
        return measure(service, sizes)


def _parser() -> Parser:
    names = list(SECTIONS)
    parser = serving_sections.arguments(__doc__ or "", names)
    help_of_quick = "shorter and fewer rounds, fewer contexts"
    parser.add_argument("--quick", action="store_true", help=help_of_quick)
    return parser


if __name__ == "__main__":
    sys.exit(main())
