"""A server that is ended and started again under load: what of it callers of the SDK notice.

    python benchmarks/faults/restarts.py --json reports/restarts.json

It is told to end (SIGTERM), then killed (SIGKILL), many times each, while callers send requests in
messages, in chunks and in shared memory, which the SDK repeats: each must be answered, and rightly.
Streams are theirs who hold them: what was not answered on one fails as UNAVAILABLE or CANCELLED,
and what was is right.
"""

import random
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import common
import mixed
from attnserve_proto.commands import Parser, values

CALLED = mixed.Model("causal", {"1": "causal"})
HELD = mixed.Model("causal", {"1": "causal"}, ("UNAVAILABLE", "CANCELLED"))
# That callers may take to be answered again.
_SECONDS = 60.0


def restart(
    server: mixed.Server, number: int, tally: mixed.Tally, callers: int, chosen: random.Random
) -> float:
    """End a server by a signal and start it again; the seconds until calls are answered again."""
    time.sleep(chosen.random() * 0.3)
    before = time.monotonic()
    code = server.end(number)
    expected = 0 if number == signal.SIGTERM else -number
    if code != expected:
        tally.fault(f"exit code {code} after {signal.Signals(number).name}; allowed: {expected}")
    server.start()
    answered = tally.total()
    while tally.total() < answered + 3 * callers:
        if time.monotonic() - before > _SECONDS:
            tally.fault("calls are not answered any more")
            break
        time.sleep(0.005)
    return time.monotonic() - before


def main() -> int:
    """Measure, print, and write the figures; 1 if anything was lost or wrong."""
    parsed = _parser().parse_args()
    chosen = random.Random(0)
    plan = [(CALLED, (mixed.Caller.attend,)), (HELD, (mixed.Caller.stream,))]
    rows, figures = [], {}
    with tempfile.TemporaryDirectory() as folder:
        mixed.export(Path(folder), "causal")
        limits = ("--metrics-port", "-1", "--max-queue-ms", "60000", "--max-queue", "4096")
        with mixed.Server(Path(folder), *limits) as server:
            for number, times in ((signal.SIGTERM, parsed.terminated),
                                  (signal.SIGKILL, parsed.killed)):  # fmt: skip
                tally = mixed.Tally()
                with mixed.load(server.address, tally, plan, callers=parsed.callers):
                    seconds = [
                        restart(server, number, tally, parsed.callers, chosen) for _ in range(times)
                    ]
                name = signal.Signals(number).name
                figures[name] = mixed.outcome(tally)
                rows.append(
                    {
                        "signal": name,
                        "restarts": times,
                        "answered": sum(tally.answered.values()),
                        "lost_or_wrong": len(tally.wrong),
                        "median_seconds": statistics.median(seconds) if seconds else 0.0,
                    }
                )
                print("\n".join(tally.wrong[:20]), end="\n" if tally.wrong else "")
    print(common.table(rows))
    common.write_json(parsed.json, {"restarts": rows, "calls": figures})
    return 1 if any(row["lost_or_wrong"] for row in rows) else 0


def _parser() -> Parser:
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--terminated", type=values.integer(0, 100_000), default=100)
    parser.add_argument("--killed", type=values.integer(0, 100_000), default=20)
    parser.add_argument("--callers", type=values.integer(1, 256), default=9)
    return parser


if __name__ == "__main__":
    sys.exit(main())
