"""Serving against its floors, without batching, beside other servers, and overloaded.

Causal attention of 8 heads of 64 in FP32, aligned bottom-right (the same as top-left where there
are as many queries as keys), on the CPU. Figures and what they are held to come from one run:

    floor          end to end / (bare grpcio echo of the same bytes + in process)
    shared-memory  through shared memory / in process
    stored         keys and values stored in the server / sent with each request
    callers        many callers of short requests / the same server without batching
    peers          / KServe, MLServer and PyTriton with the same ONNX file by the same calls
    overload       open loop, up to twice the capacity: goodput, refusals, memory

    python benchmarks/serving_peers.py install --venvs .venvs
    python benchmarks/serving.py --venvs .venvs --json reports/serving.json --plots reports/serving

How load is made, and how coordinated omission is kept out, is said in
attnserve_loadtest.load.generator.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import serving_latency as latency
import serving_sections
import serving_throughput as throughput
from attnserve_client import keep_freed_memory
from attnserve_loadtest.load.generator import Clients, clients
from attnserve_proto.commands import Parser, values
from serving_calls import HEAD_DIM, NUM_HEADS
from serving_plots import latency_against_rate, requests_by_peer
from serving_report import Section

# A model's export: `attnserve-export` with these arguments.
EXPORT = ["core", "--name", "causal", "--mask", "causal", "--alignment", "bottom-right"]
EXPORT += ["--num-heads", str(NUM_HEADS), "--head-dim", str(HEAD_DIM)]


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    floor: latency.Lengths
    shared: latency.Lengths
    stored: tuple[int, int, int]
    callers: int
    callers_effort: throughput.Effort
    peer_lengths: tuple[int, ...]
    peer_callers: tuple[int, ...]
    peer_effort: throughput.Effort
    overload_lengths: tuple[int, ...]
    overload_callers: tuple[int, ...]
    overload_factors: tuple[float, ...]
    overload_effort: throughput.Effort


FULL = Sizes(
    floor=latency.Lengths((64, 256, 1024, 4096), 400),
    shared=latency.Lengths((64, 4096), 400),
    stored=(latency.STORED_QUERIES, latency.STORED_KEYS, 60),
    callers=64,
    callers_effort=throughput.Effort(3.0, 0.5, 7),
    peer_lengths=(32, 64, 256),
    peer_callers=(1, 16),
    peer_effort=throughput.Effort(2.0, 0.5, 3),
    overload_lengths=(256, 1024),
    overload_callers=(4, 16, 64),
    overload_factors=(0.25, 0.5, 0.75, 1.0, 2.0),
    overload_effort=throughput.Effort(5.0, 1.0, 1),
)
# For the test: every section, no figure worth reading.
QUICK = Sizes(
    floor=latency.Lengths((16, 32), 3),
    shared=latency.Lengths((16, 32), 3),
    stored=(4, 64, 3),
    callers=4,
    callers_effort=throughput.Effort(0.3, 0.1, 1),
    peer_lengths=(16,),
    peer_callers=(1, 2),
    peer_effort=throughput.Effort(0.3, 0.1, 1),
    overload_lengths=(32,),
    overload_callers=(2,),
    overload_factors=(0.5, 2.0),
    overload_effort=throughput.Effort(0.5, 0.1, 1),
)


def sections(
    repository: Path, sizes: Sizes, load: Clients, venvs: Path, good_within: float
) -> dict[str, Callable[[], Section]]:
    """Every section by name, as a call that measures it."""
    return {
        "floor": lambda: latency.floor(repository, sizes.floor),
        "shared-memory": lambda: latency.shared_memory(repository, sizes.shared),
        "stored": lambda: latency.stored(repository, *sizes.stored),
        "callers": lambda: throughput.callers(
            repository, load, count=sizes.callers, seq_len=32, effort=sizes.callers_effort
        ),
        "peers": lambda: throughput.peers(
            repository,
            load,
            venvs,
            counts=sizes.peer_callers,
            seq_lens=sizes.peer_lengths,
            effort=sizes.peer_effort,
        ),
        "overload": lambda: throughput.overload(
            repository,
            load,
            seq_lens=sizes.overload_lengths,
            counts=sizes.overload_callers,
            factors=sizes.overload_factors,
            good_within=good_within,
            effort=sizes.overload_effort,
        ),
    }


@contextmanager
def models(exported: Path | None) -> Iterator[Path]:
    """A repository with `causal`, and `same-file`, which has of it the file that the peers run.

    Args:
        exported: a repository to take `causal` from; None exports it.
    """
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder)
        if exported is None:
            command = [sys.executable, "-m", "attnserve_export.cli", *EXPORT, "--out", folder]
            subprocess.run(command, check=True, capture_output=True)
        else:
            shutil.copytree(exported / "causal", repository / "causal")
        shutil.copytree(repository / "causal", repository / "same-file")
        path = repository / "same-file" / "1" / "model.json"
        manifest = json.loads(path.read_text())
        manifest["name"] = "same-file"
        manifest["variants"] = [v for v in manifest["variants"] if v["file"] == "model.onnx"]
        manifest["picks"] = {}
        path.write_text(json.dumps(manifest))
        yield repository


def main() -> int:
    """Run the benchmark; 1 if a section could not be measured."""
    options = _parser().parse_args()
    # As the servers do: neither side is to take memory anew for each request.
    keep_freed_memory()
    with models(options.repository) as repository, clients(options.clients) as load:
        made = sections(
            repository, QUICK if options.quick else FULL, load, options.venvs, options.good_within
        )
        done, failed = serving_sections.measured(options.sections, made)
    status = serving_sections.write("serving", options, done, failed)
    _plot(options.plots, done)
    return status


def _parser() -> Parser:
    names = ["floor", "shared-memory", "stored", "callers", "peers", "overload"]
    parser = serving_sections.arguments(__doc__ or "", names)
    add = parser.add_argument
    add("--quick", action="store_true", help="every section in seconds: figures say nothing")
    add("--clients", type=values.integer(1, 256), default=2, help="client processes (default 2)")
    add("--venvs", type=values.path, default=Path(".venvs"), help="the peers' environments")
    add(
        "--good-within",
        type=values.some_seconds,
        default=1.0,
        help="seconds, for goodput (default 1)",
    )
    add("--plots", type=values.path, help="also draw plots into this folder")
    return parser


def _plot(folder: Path | None, done: Sequence[Section]) -> None:
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for section in done:
        if section.name == "overload":
            latency_against_rate(section.rows, folder)
        if section.name == "peers":
            requests_by_peer(section.rows, folder)


if __name__ == "__main__":
    sys.exit(main())
