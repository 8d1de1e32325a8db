"""What the benchmarks share: servers as processes of their own, statistics, tables, JSON."""

import contextlib
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
from attnserve_proto.commands import Parser, values


def arguments(description: str) -> Parser:
    """A parser with what every benchmark takes."""
    parser = Parser(description=description)
    parser.add_argument("--json", type=values.path, help="also write the figures to this file")
    return parser


@contextlib.contextmanager
def process(command: Sequence[str], address_in: Callable[[str], str]) -> Iterator[str]:
    """A server in a process of its own, for the length of a `with` block.

    Args:
        command: to start it; its first line of output says that it is ready.
        address_in: finds the address in that line.
    """
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as p:
        try:
            assert p.stdout is not None
            line = p.stdout.readline()
            if not line:
                raise RuntimeError(f"{' '.join(command)}: ended at once with {p.wait()}")
            yield address_in(line)
        finally:
            p.terminate()


@contextlib.contextmanager
def attnserve(repository: Path, *options: str) -> Iterator[str]:
    """A real attnserve-server on a free port; gives its address."""
    command = [sys.executable, "-m", "attnserve_server.cli", "--repository", str(repository)]
    command += ["--port", "0", "--metrics-port", "-1", "--log-level", "error", *options]
    with process(command, lambda line: line.split("listening on ")[1].split()[0]) as address:
        yield address


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


@contextlib.contextmanager
def causal_core(num_heads: int, head_dim: int) -> Iterator[Path]:
    """A repository with one model, `causal`, exported for the occasion."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "attnserve_export.cli", "core", "--out", folder]
        command += ["--name", "causal", "--mask", "causal"]
        command += ["--num-heads", str(num_heads), "--head-dim", str(head_dim)]
        subprocess.run(command, check=True, capture_output=True)
        yield Path(folder)


def graph_file(folder: Path, variant: str) -> Path:
    """The file of a variant in the folder of a version."""
    manifest = json.loads((folder / "model.json").read_text())
    (file,) = (v["file"] for v in manifest["variants"] if v["name"] == variant)
    return folder / str(file)


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie."""
    if len(values) < 2:
        return values[0]
    return statistics.quantiles(values, n=1000, method="inclusive")[round(share * 1000) - 1]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of equal keys, aligned."""
    cells = [list(rows[0]), *[[text(value) for value in row.values()] for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in cells]
    return "\n".join(lines)


def write_json(path: Path | None, figures: dict[str, Any]) -> None:
    """Write figures with what they were measured on."""
    if path is None:
        return
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine, **figures}, indent=2) + "\n")


def text(value: Any) -> str:
    """A figure as tables show it."""
    return f"{value:.3f}" if isinstance(value, float) else str(value)
