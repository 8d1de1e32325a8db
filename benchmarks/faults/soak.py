"""Mixed load for long: what of memory, descriptors, pages and regions a server keeps.

    python benchmarks/faults/soak.py --json reports/soak.json

After a warm-up of a fifth of the time the resident memory is looked at each second. Its growth is
that of the median of the last fifth over the median of the first fifth after the warm-up. In the
end all callers leave, leases run out, and what is left is counted.
"""

import statistics
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import common
import mixed
from attnserve_proto.commands import Parser, values

MODEL = mixed.Model("causal", {"1": "causal"})
LEFT = {
    "attnserve_kv_sessions": "sessions",
    "attnserve_kv_pages": "pages",
    "attnserve_kv_promised_bytes": "promised_bytes",
    "attnserve_stored_tensor_bytes": "stored_bytes",
    "attnserve_shared_memory_bytes": "shared_bytes",
    "attnserve_bytes_in_flight": "bytes_in_flight",
    "attnserve_requests_inside": "requests_inside",
    "attnserve_connections": "connections",
}
# Until leases have run out and connections are closed.
_SECONDS = 30.0


def resident_bytes(pid: int) -> int:
    """The memory that a process has."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS:")).split()[1]) << 10


def descriptors(pid: int) -> int:
    """The descriptors that it has open."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def gauges(port: int) -> dict[str, float]:
    """What the server says that it holds."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {LEFT[name]: float(value) for name, value in pairs if name in LEFT}


def growth(samples: list[int]) -> float:
    """The last fifth over the first fifth after a warm-up of one, less 1."""
    part = max(1, len(samples) // 5)
    return statistics.median(samples[-part:]) / statistics.median(samples[part : 2 * part]) - 1


def main() -> int:
    """Measure, print, and write the figures; 1 if anything was wrong or left."""
    parsed = _parser().parse_args()
    tally, samples = mixed.Tally(), []
    with tempfile.TemporaryDirectory() as folder:
        mixed.export(Path(folder), "causal")
        port = common.free_port()
        limits = ("--max-queue-ms", "60000", "--max-queue", "4096", "--max-kv-mib", "256")
        with mixed.Server(Path(folder), "--metrics-port", str(port), *limits) as server:
            pid = server.process.pid
            before = descriptors(pid)
            end = time.monotonic() + parsed.minutes * 60
            with mixed.load(server.address, tally, [(MODEL, mixed.STEADY)], callers=parsed.callers):
                while time.monotonic() < end:
                    time.sleep(1)
                    samples.append(resident_bytes(pid))
            deadline = time.monotonic() + _SECONDS
            while any((left := gauges(port)).values()) and time.monotonic() < deadline:
                time.sleep(0.2)
            # The connection that the gauges came by is one of them, until it is closed.
            while (more := descriptors(pid) - before) > 0 and time.monotonic() < deadline:
                time.sleep(0.2)
            left["descriptors"] = more
    figures = mixed.outcome(tally)
    row = {
        "minutes": float(parsed.minutes),
        "answered": figures["answered"],
        "wrong": figures["wrong"],
        "resident_mib": samples[-1] / (1 << 20),
        "growth": growth(samples),
    }
    print(common.table([row]))
    print(common.table([left]))
    print("\n".join(tally.wrong[:20]))
    common.write_json(parsed.json, {**row, "left": left, "samples": samples, "calls": figures})
    return 1 if tally.wrong or any(left.values()) else 0


def _parser() -> Parser:
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=values.number(0, 1e5, above=True), default=60)
    parser.add_argument("--callers", type=values.integer(1, 256), default=9)
    return parser


if __name__ == "__main__":
    sys.exit(main())
