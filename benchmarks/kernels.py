"""Speed and memory of every variant, side by side with PyTorch's own attention.

Contenders take turns within each round, in changing order, in one process. ONNX Runtime's threads
do not spin while idle (`session.intra_op.allow_spinning=0`), since they would slow whoever runs
next; PyTorch's OpenMP threads sleep between calls by themselves here (GNU OpenMP spins briefly).
Ratios are medians over rounds of time / PyTorch's time in the same round. Memory is the growth of
the peak resident set over one run in a process of its own, inputs and output there already.

    python benchmarks/kernels.py --json reports/kernels.json --plots reports/kernels
"""

import os

# Before PyTorch loads: its threads must not spin while another contender runs.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import contextlib
import io
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import attnserve_kernels
import numpy as np
import onnxruntime
import torch
from attnserve_export import sessions
from attnserve_export.cli import main as export
from attnserve_export.runtime import CPU
from attnserve_loadtest.fitting import fit_power_law
from attnserve_proto.commands import Parser, values
from common import arguments, write_json
from kernels_masks import (
    boolean_masks,
    neutral,
    packed_and_padded,
    prefixes_and_chunks,
    scores_computed,
    sinks_and_rows,
    with_chunks,
)
from kernels_memory import peak_growth
from kernels_plots import draw
from kernels_timing import Timing, in_turns
from numpy.typing import NDArray
from torch.nn import functional

Array = NDArray[Any]

# Quadratic variants are not tried where their scores would take more than this.
MOST_SCORE_BYTES = 0.6e9
# `paged` is for sessions; the others are for what they are named after.
NOT_TIMED = ("softcap", "blocked_sinks", "reference_sinks", "paged", "packed_weights")


@dataclass(frozen=True)
class Shape:
    """Sizes of one attention, batch 1."""

    num_heads: int
    num_kv_heads: int
    query_len: int
    key_len: int
    head_dim: int

    def tensors(self) -> tuple[Array, Array, Array]:
        """Random query, key and value, FP32."""
        generator = np.random.default_rng(0)
        key = (1, self.num_kv_heads, self.key_len, self.head_dim)
        query = (1, self.num_heads, self.query_len, self.head_dim)
        q, k, v = (generator.standard_normal(s, np.float32) for s in (query, key, key))
        return q, k, v


class Models:
    """Core models, exported as they are asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._opened: dict[Path, onnxruntime.InferenceSession] = {}

    def variants(self, options: Sequence[str], shape: Shape) -> dict[str, dict[str, Any]]:
        """Entries of the manifest by variant, with the path of each graph as `path`."""
        sizes = [shape.num_heads, shape.num_kv_heads, shape.head_dim]
        name = "-".join(["m", *options, *map(str, sizes)]).replace("--", "")
        folder = self._folder / name / "1"
        if not folder.exists():
            print(f"exporting {name}", file=sys.stderr)
            command = ["core", "--out", str(self._folder), "--name", name, *options]
            for option, size in zip(("heads", "kv-heads", "dim"), sizes, strict=True):
                command += ["--head-dim" if option == "dim" else f"--num-{option}", str(size)]
            said = io.StringIO()
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                code = export(command)
            if code:
                raise RuntimeError(f"attnserve-export {' '.join(command)}: {said.getvalue()}")
        manifest = json.loads((folder / "model.json").read_text())
        return {
            entry["name"]: entry | {"path": folder / entry["file"]}
            for entry in manifest["variants"]
            if "output" in [o["name"] for o in entry["outputs"]]
            and CPU in entry["providers"]
            and entry["name"] not in NOT_TIMED
        }

    def opened(self, options: Sequence[str], shape: Shape, name: str) -> Any:
        """One variant, ready to run."""
        return self.session(self.variants(options, shape)[name]["path"])

    def session(self, path: Path) -> onnxruntime.InferenceSession:
        """A graph, ready to run on all cores."""
        if path not in self._opened:
            self._opened[path] = sessions.open_session(path, threads=cores())
        return self._opened[path]

    def close(self) -> None:
        """Give back the sessions: each keeps the memory of its largest run."""
        self._opened.clear()

    def contenders(
        self, options: Sequence[str], shape: Shape
    ) -> Iterator[tuple[str, Callable[[], Array]]]:
        """The variants that fit the memory, each as a call that gives the output."""
        q, k, v = shape.tensors()
        feeds = {
            "query": q,
            "key": k,
            "value": v,
            "key_lengths": np.array([shape.key_len]),
            **neutral(1, shape.num_heads),
        }
        scores = 4 * shape.num_heads * shape.query_len * shape.key_len
        for name, entry in self.variants(options, shape).items():
            if name == "packed":  # for packed sequences alone
                continue
            if entry["memory"] == "quadratic" and scores > MOST_SCORE_BYTES:
                continue
            session = self.session(entry["path"])

            def run(session: onnxruntime.InferenceSession = session) -> Array:
                return sessions.run(session, feeds, {"output": q.shape})["output"]

            yield name, run


def torch_attention(shape: Shape, causal: bool, window: int | None = None) -> Callable[[], Array]:
    """PyTorch's scaled_dot_product_attention; a window as a boolean mask."""
    q, k, v = (torch.from_numpy(array) for array in shape.tensors())
    grouped = shape.num_heads != shape.num_kv_heads
    mask = None
    if window is not None:
        rows = torch.arange(shape.query_len)[:, None] - torch.arange(shape.key_len)[None, :]
        mask = (rows >= 0) & (rows < window)

    def run() -> Array:
        with torch.no_grad():
            output: Array = functional.scaled_dot_product_attention(
                q, k, v, is_causal=causal and mask is None, attn_mask=mask, enable_gqa=grouped
            ).numpy()
            return output

    return run


def flex_attention(shape: Shape, window: int) -> Callable[[], Array]:
    """PyTorch's FlexAttention, compiled, its block mask made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention as flex

    def seen(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (query >= key) & (query - key < window)

    mask = create_block_mask(seen, None, None, shape.query_len, shape.key_len, device="cpu")
    compiled = torch.compile(flex)
    q, k, v = (torch.from_numpy(array) for array in shape.tensors())

    def run() -> Array:
        with torch.no_grad():
            output: Array = compiled(q, k, v, block_mask=mask).numpy()
            return output

    return run


def measure(
    section: str,
    shape: Shape,
    contenders: dict[str, Callable[[], Array]],
    baseline: str,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Check that all compute the same, then time them in turns."""
    expected = contenders[baseline]()
    for name, run in contenders.items():
        error = float(np.abs(run() - expected).max())
        if not error < 1e-4:
            raise RuntimeError(f"{section} {shape}: {name} is off by {error}")
    timings = in_turns(contenders, baseline, seconds=options.seconds, rounds=options.rounds)
    rows = []
    for name, timing in timings.items():
        row = {"section": section, **asdict(shape), "contender": name, **asdict(timing)}
        rows.append(row)
    print_rows(section, shape, timings)
    return rows


def print_rows(section: str, shape: Shape, timings: dict[str, Timing]) -> None:
    """One line per contender."""
    for name, timing in timings.items():
        print(
            f"{section:<14} Sq {shape.query_len:>6} Sk {shape.key_len:>6} H {shape.num_heads:>2}"
            f"/{shape.num_kv_heads:<2} D {shape.head_dim:>3}  {name:<10} "
            f"{timing.milliseconds:>10.3f} ms  {timing.ratio:>6.2f}x of {timing.baseline}",
            flush=True,
        )


def full(models: Models, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Causal and bidirectional, every variant against scaled_dot_product_attention."""
    rows = []
    for mask in ("causal", "bidirectional"):
        for seq_len in options.seq_lens:
            shape = Shape(options.num_heads, options.num_heads, seq_len, seq_len, options.head_dim)
            contenders = {"torch": torch_attention(shape, mask == "causal")}
            contenders |= dict(models.contenders(["--mask", mask], shape))
            rows += measure(mask, shape, contenders, "torch", options)
        models.close()
    return rows


def windowed(models: Models, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A sliding window against FlexAttention, a masked scaled_dot_product_attention, and full."""
    rows = []
    window = options.window
    chosen = ["--mask", "causal", "--window", str(window)]
    for seq_len in options.window_seq_lens:
        shape = Shape(options.num_heads, options.num_heads, seq_len, seq_len, options.head_dim)
        contenders = dict(models.contenders(chosen, shape))
        # Beyond, making its block mask takes more memory than there is.
        if options.flex and seq_len <= 16_384:
            try:
                flex = flex_attention(shape, window)
                flex()
                contenders["flex"] = flex
            except Exception as error:  # its compiler is not everywhere
                print(f"FlexAttention: not available: {error}", file=sys.stderr)
        if seq_len <= 8192:
            contenders["torch mask"] = torch_attention(shape, causal=True, window=window)
        rows += measure(f"window {window}", shape, contenders, "native", options)
    models.close()
    # Windowed against full, of the same variant.
    seq_len = options.compare_seq_len
    shape = Shape(options.num_heads, options.num_heads, seq_len, seq_len, options.head_dim)
    for name in ("native", "blocked"):
        ours = dict(models.contenders(chosen, shape))[name]
        whole = dict(models.contenders(["--mask", "causal"], shape))[name]
        timings = in_turns({"full": whole, "window": ours}, "window", seconds=options.seconds)
        print_rows(f"{name} full/win", shape, timings)
        rows += [
            {
                "section": f"full against window, {name}",
                **asdict(shape),
                "contender": n,
                **asdict(t),
            }
            for n, t in timings.items()
        ]
    return rows


def other_shapes(models: Models, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Grouped heads, cross-attention and single queries."""
    square, keys = options.grouped_seq_len, options.cross_key_len
    shapes = {
        "grouped": (["--mask", "causal"], Shape(32, 8, square, square, 128)),
        "cross": (["--mask", "cross"], Shape(8, 8, 128, keys, 64)),
        "one query": (["--mask", "cross"], Shape(8, 8, 1, keys, 64)),
        "one grouped": (["--mask", "cross"], Shape(32, 8, 1, keys, 128)),
    }
    rows = []
    for section, (chosen, shape) in shapes.items():
        contenders = {"torch": torch_attention(shape, "causal" in chosen)}
        contenders |= dict(models.contenders(chosen, shape))
        rows += measure(section, shape, contenders, "torch", options)
    return rows


def masked(models: Models, options: argparse.Namespace) -> list[dict[str, Any]]:
    """What boolean masks, prefixes and chunks cost `native`."""
    rows = []
    for seq_len in options.mask_seq_lens:
        shape = Shape(options.num_heads, options.num_heads, seq_len, seq_len, options.head_dim)
        tensors = dict(zip(("query", "key", "value"), shape.tensors(), strict=True))
        plain = models.opened(["--mask", "bidirectional"], shape, "native")
        rows += compare("masks", shape, boolean_masks(plain, tensors), "no mask", options)
        causal = models.variants(["--mask", "causal"], shape)["native"]["path"]
        # The largest sees all: what chunks cost where they spare nothing.
        chunked = {
            chunk: models.session(with_chunks(causal, chunk))
            for chunk in (256, options.mask_seq_lens[-1])
        }
        ways = prefixes_and_chunks(models.session(causal), chunked, tensors)
        rows += compare("prefix, chunks", shape, ways, "causal", options)
    return rows


def sunk(models: Models, options: argparse.Namespace) -> list[dict[str, Any]]:
    """What sinks and log-sum-exp cost `native`; single queries among them."""
    rows = []
    keys = options.mask_seq_lens
    for mask, query_len, key_len in [
        *(("causal", n, n) for n in keys),
        *(("bidirectional", n, n) for n in keys),
        ("bidirectional", 1, keys[-1]),
    ]:
        shape = Shape(options.num_heads, options.num_heads, query_len, key_len, options.head_dim)
        tensors = dict(zip(("query", "key", "value"), shape.tensors(), strict=True))
        session = models.opened(["--mask", mask], shape, "native")
        ways = sinks_and_rows(session, tensors)
        rows += compare(f"sinks {mask}", shape, ways, "plain", options)
    return rows


def packed(models: Models, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Documents of unlike lengths, packed into one row or padded to the longest."""
    rows = []
    shortest, longest = options.documents
    lengths = np.random.default_rng(0).integers(shortest, longest + 1, 64)
    lengths[:2] = shortest, longest
    tokens = int(lengths.sum())
    shape = Shape(options.num_heads, options.num_heads, tokens, tokens, options.head_dim)
    for mask in ("causal", "bidirectional"):
        chosen = ["--mask", mask]
        ways = packed_and_padded(
            models.opened(chosen, shape, "packed"),
            models.opened(chosen, shape, "native"),
            lengths,
            options.num_heads,
            options.head_dim,
            causal=mask == "causal",
        )
        scores = scores_computed(lengths, causal=mask == "causal")
        for row in measure(f"packed {mask}", shape, ways, "packed", options):
            # What the time would be if it were that of the scores alone.
            in_theory = scores[row["contender"]] / scores["packed"]
            rows.append({**row, "scores": scores[row["contender"]], "scores_ratio": in_theory})
            print(
                f"{row['section']:<20} {row['contender']:<14} {row['ratio']:>6.2f}x measured, "
                f"{in_theory:>6.2f}x by the scores that it computes",
                flush=True,
            )
    return rows


def compare(
    section: str,
    shape: Shape,
    contenders: dict[str, Callable[[], Array]],
    baseline: str,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Time, in turns, what does not compute the same."""
    timings = in_turns(contenders, baseline, seconds=options.seconds, rounds=options.rounds)
    print_rows(section, shape, timings)
    return [
        {"section": section, **asdict(shape), "contender": name, **asdict(timing)}
        for name, timing in timings.items()
    ]


def memory(models: Models, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Peak memory above inputs and output, each in a process of its own."""
    rows = []
    for seq_len in options.memory_seq_lens:
        shape = Shape(options.num_heads, options.num_heads, seq_len, seq_len, options.head_dim)
        scores = 4 * shape.num_heads * seq_len**2
        for mask in (["--mask", "causal"], ["--mask", "causal", "--window", str(options.window)]):
            kind = "window" if "--window" in mask else "causal"
            contenders: dict[str, Path | None] = {
                name: entry["path"]
                for name, entry in models.variants(mask, shape).items()
                if name != "packed" and (entry["memory"] == "linear" or scores <= MOST_SCORE_BYTES)
            }
            if kind == "causal":
                contenders["torch"] = None
            for name, path in contenders.items():
                grown = peak_growth(path, shape.num_heads, seq_len, shape.head_dim, cores())
                print(
                    f"memory {kind:<8} {seq_len:>6}  {name:<10} {grown / 2**20:>9.1f} MiB",
                    flush=True,
                )
                rows.append(
                    {
                        "section": f"memory {kind}",
                        **asdict(shape),
                        "contender": name,
                        "bytes": grown,
                    }
                )
    return rows


def exponents(rows: list[dict[str, Any]], shortest: int) -> dict[str, Any]:
    """How time grows with length, per section and contender: time = a * length^exponent."""
    found = {}
    series: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in rows:
        timed = "milliseconds" in row and row["query_len"] >= shortest
        if timed and row["section"].split()[0] in ("causal", "bidirectional", "window"):
            at = series.setdefault((row["section"], row["contender"]), [])
            at.append((row["query_len"], row["milliseconds"]))
    for (section, contender), points in series.items():
        if len(points) < 3:
            continue
        fit = fit_power_law("compute", [n for n, _ in points], [ms for _, ms in points])
        if fit is None:
            continue
        found[f"{section}, {contender}"] = fit.exponent
        print(f"exponent {section}, {contender}: {fit.exponent:.3f} over {[n for n, _ in points]}")
    return found


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0))


SECTIONS = {
    "full": full,
    "window": windowed,
    "masks": masked,
    "sinks": sunk,
    "packed": packed,
    "shapes": other_shapes,
    "memory": memory,
}


def main() -> int:
    """Measure, print, write."""
    options = _parser().parse_args()
    options.seq_lens = [512, 2048, 4096, 8192]
    options.window_seq_lens = [2048, 4096, 8192, 16_384, 32_768]
    options.memory_seq_lens = [4096, 16_384, 65_536]
    options.compare_seq_len, options.flex, shortest = 16_384, True, 2048
    options.grouped_seq_len, options.cross_key_len = 1024, 8192
    options.mask_seq_lens, options.documents = [512, 2048, 4096], (32, 512)
    if options.quick:
        options.seq_lens, options.window_seq_lens = [128, 256], [128, 256, 512]
        options.memory_seq_lens, options.compare_seq_len = [1024], 1024
        options.grouped_seq_len, options.cross_key_len = 128, 1024
        options.mask_seq_lens, options.documents = [128, 512], (4, 64)
        options.flex, options.seconds, options.rounds, shortest = False, 0.05, 3, 128
    torch.set_num_threads(cores())
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        models = Models(options.models or Path(folder))
        for section in options.sections:
            rows += SECTIONS[section](models, options)
    found = exponents(rows, shortest)
    if options.plots:
        options.plots.mkdir(parents=True, exist_ok=True)
        draw(rows, options.plots)
    write_json(
        options.json,
        {
            "instruction_set": attnserve_kernels.instruction_set(),
            "torch": torch.__version__,
            "cores": cores(),
            "idle_threads_spin": False,
            "rows": rows,
            "exponents": found,
        },
    )
    return 0


def _parser() -> Parser:
    parser = arguments(__doc__.splitlines()[0] if __doc__ else "")
    add = parser.add_argument
    sections = values.listed(values.one_of(SECTIONS))
    add("--plots", type=values.path, help="folder for plots")
    add("--sections", type=sections, default=tuple(SECTIONS), help="default all of them")
    add("--num-heads", type=values.integer(1, 1024), default=8)
    add("--head-dim", type=values.integer(1, 1024), default=64)
    add("--window", type=values.integer(1, 1 << 20), default=256)
    add("--seconds", type=values.some_seconds, default=4.0, help="per set of contenders")
    add("--rounds", type=values.integer(2), default=5, help="at least")
    add("--quick", action="store_true", help="small lengths, to try it out")
    add("--models", type=values.path, help="take exported models from here, and leave them here")
    return parser


if __name__ == "__main__":
    sys.exit(main())
