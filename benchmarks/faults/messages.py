"""Millions of messages that are nearly right, and what a server makes of them.

    python benchmarks/faults/messages.py --messages 5000000 --json reports/messages.json

Calls of every method of attnserve.v1.AttentionService and inference.GRPCInferenceService, streams
and KV sessions included, over real sockets to a real server. Their messages are valid ones
(messages_seeds), changed (messages_mutations) as values, as fields or as bytes; some come
compressed, or with a wrong length or flag before them. What protobuf's own library cannot read
must be refused as INVALID_ARGUMENT, what it reads must not be refused as unreadable, what is not
changed must be answered. INTERNAL is for wrong lengths and flags alone, as gRPC has it. The
server must neither end nor hang. What goes otherwise is a fault: its bytes are kept in
`--faults`, and `--replay FILE` sends them again. docs/errors.md says all statuses.
"""

import collections
import json
import multiprocessing
import queue
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import common
import messages_calls as calls
import messages_seeds as seeds
import mixed
from attnserve_proto.commands import Parser, values

# Short leases: what earlier messages have left goes, whatever lease they asked for.
_OPTIONS = ("--metrics-port", "-1", "--max-queue-ms", "60000", "--max-queue", "4096",
            "--kv-lease-seconds", "5", "--max-kv-lease-seconds", "20", "--max-kv-mib", "2048",
            "--stored-lease-seconds", "5", "--max-stored-lease-seconds", "20")  # fmt: skip
_SAID_SECONDS = 5.0
_SHOWN = 20


def main() -> int:
    """Send, print, and write the figures; 1 if there was a fault."""
    parsed = _parser().parse_args()
    with tempfile.TemporaryDirectory() as folder:
        repository = parsed.repository or Path(folder)
        if parsed.repository is None:
            _export(repository)
        with mixed.Server(repository, *_OPTIONS) as server:
            port = int(server.address.rpartition(":")[2])
            if parsed.replay is not None:
                print(calls.replayed(port, json.loads(parsed.replay.read_text())))
                return int(server.process.poll() is not None)
            started = time.monotonic()
            outcomes, faults = _send(port, server, parsed)
            seconds = time.monotonic() - started
            faults += _last_look(server)
    parsed.faults.mkdir(parents=True, exist_ok=True) if faults else None
    for number, fault in enumerate(faults):
        (parsed.faults / f"{number:04}.json").write_text(json.dumps(fault, indent=1) + "\n")
    sent = sum(count for (_, _, what), count in outcomes.items() if what == "messages")
    row = {
        "messages": sent,
        "calls": sum(count for (_, _, what), count in outcomes.items() if what.isupper()),
        "seconds": seconds,
        "messages/s": sent / seconds,
        **{kind: sum(fault["kind"] == kind for fault in faults) for kind in calls.KINDS},
    }
    by_method = _by_method(outcomes)
    print(common.table([row]))
    print(common.table(by_method) if by_method else "")
    for fault in faults[:_SHOWN]:
        print(f"{fault['kind']}: {fault['method']}: {fault['said']}")
    common.write_json(parsed.json, {**row, "methods": by_method, "faults": faults[:_SHOWN]})
    return 1 if faults else 0


def _send(
    port: int, server: mixed.Server, parsed: Any
) -> tuple[Counter[tuple[str, str, str]], list[dict[str, Any]]]:
    """Let processes send; what came of their calls, and what must not be."""
    context = multiprocessing.get_context("spawn")
    reports: Any = context.Queue()
    share = -(-parsed.messages // parsed.processes)
    senders = [
        context.Process(
            target=calls.send, args=(port, share, parsed.seed * 1000 + at, reports), daemon=True
        )
        for at in range(parsed.processes)
    ]
    for sender in senders:
        sender.start()
    outcomes: Counter[tuple[str, str, str]] = collections.Counter()
    faults: list[dict[str, Any]] = []
    running, started, said = len(senders), time.monotonic(), time.monotonic()
    while running:
        try:
            report = reports.get(timeout=1)
        except queue.Empty:
            if server.process.poll() is None and any(sender.is_alive() for sender in senders):
                continue
            break
        running -= report is None
        if report is not None:
            outcomes += report[0]
            faults += report[1]
        if time.monotonic() - said > _SAID_SECONDS:
            said = time.monotonic()
            sent = sum(count for (_, _, what), count in outcomes.items() if what == "messages")
            print(
                f"{sent:,} messages, {sent / (said - started):,.0f}/s, {len(faults)} faults",
                file=sys.stderr,
            )
    for sender in senders:
        sender.kill()
        sender.join()
    return outcomes, faults


def _last_look(server: mixed.Server) -> list[dict[str, Any]]:
    """Whether it is still there, and answers as at the start."""
    if (code := server.process.poll()) is not None:
        return [calls.fault("crash", "", f"the server has ended with {code}")]
    try:
        seeds.keep(server.address)
    except Exception as error:
        return [calls.fault("hang", "", f"valid calls fail in the end: {error}")]
    return []


def _by_method(outcomes: Counter[tuple[str, str, str]]) -> list[dict[str, Any]]:
    """A row for each method: messages, those of them unreadable, messages of streams that came back
    and those of them that are refusals, and calls by status.
    """
    names = sorted({(service, method) for service, method, _ in outcomes})
    counts = ("messages", "unreadable", "answers", "refusals within")
    columns = (*counts, *sorted({what for _, _, what in outcomes} - set(counts)))
    return [
        {"method": method, **{what: outcomes[service, method, what] for what in columns}}
        for service, method in names
    ]


def _export(repository: Path) -> None:
    command = [sys.executable, "-m", "attnserve_export.cli", "core", "--out", str(repository)]
    command += ["--name", "causal", "--mask", "causal"]
    command += ["--num-heads", str(seeds.HEADS), "--head-dim", str(seeds.DIM)]
    subprocess.run(command, check=True, capture_output=True)


def _parser() -> Parser:
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--messages", type=values.integer(1, 10**10), default=5_000_000)
    parser.add_argument("--processes", type=values.integer(1, 64), default=2)
    parser.add_argument("--seed", type=values.integer(0, 1 << 32), default=0)
    parser.add_argument("--faults", type=values.path, default=Path("reports/messages-faults"))
    parser.add_argument("--replay", type=values.path, help="send what this file of --faults has")
    parser.add_argument(
        "--repository", type=values.path, help="has a causal core model `causal` of 4 heads of 8"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
