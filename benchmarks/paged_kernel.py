"""PagedAttention by itself: decoding, batches of sessions and prefill chunks, beside PyTorch.

    python benchmarks/paged_kernel.py --json reports/paged-kernel.json

Contenders take turns within each round. A model's layers have a cache each, so that a step finds
none of it in the processor's caches: here too, steps go round over as many copies as make up 256
MiB. A cache's bytes per second are those of its keys and values (and scales), which each step reads
once. The machine's own are what the quickest of several plain reductions reads: as many bytes, in a
row, which nobody has read for 256 MiB either, in the same kind of memory pages, with as many
threads. Times and ratios are medians over rounds, ratios of two runs of the same round.
"""

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import attnserve_kernels
import numpy as np
import onnx.helper
import onnxruntime
import torch
from attnserve_proto.commands import Parser, values
from common import arguments, table, write_json
from kernels_timing import Timing, in_turns
from numpy.typing import NDArray

Array = NDArray[Any]
Call = Callable[[], Any]

PAGE_SIZE = 16
CACHE_TYPES = {"fp32": (0, 4), "fp16": (1, 2), "bf16": (2, 2), "int8": (3, 1), "fp8": (4, 1)}
CONTEXTS = (1024, 4096, 16384, 65536)
COPIES_BYTES = 256 << 20


@dataclass(frozen=True)
class Shape:
    """Heads of an attention."""

    num_heads: int = 8
    num_kv_heads: int = 8
    head_dim: int = 64

    def row_bytes(self, dtype: str) -> int:
        """Bytes of a token's keys and values, with their scales."""
        _, element = CACHE_TYPES[dtype]
        scales = 8 if element == 1 else 0
        return self.num_kv_heads * (2 * self.head_dim * element + scales)

    def page_bytes(self, dtype: str) -> int:
        """Bytes of a page."""
        return -(-PAGE_SIZE * self.row_bytes(dtype) // 64) * 64


def options(threads: int) -> onnxruntime.SessionOptions:
    """Of sessions whose idle threads do not spin, which would slow the next contender."""
    made = onnxruntime.SessionOptions()
    made.intra_op_num_threads = threads
    made.add_session_config_entry("session.intra_op.allow_spinning", "0")
    made.register_custom_ops_library(str(attnserve_kernels.library_path()))
    return made


def node_session(
    operator: str,
    inputs: dict[str, tuple[int, int]],
    outputs: dict[str, int],
    attributes: dict[str, Any],
    threads: int,
) -> onnxruntime.InferenceSession:
    """A graph of one node; inputs by name, with element type and rank, outputs with rank."""
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node(
                operator, list(inputs), list(outputs), domain="attnserve", **attributes
            )
        ],
        "one",
        [value(name, kind, [None] * rank) for name, (kind, rank) in inputs.items()],
        [value(name, 1, [None] * rank) for name, rank in outputs.items()],
    )
    opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid("attnserve", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options(threads), providers=["CPUExecutionProvider"]
    )


def bound(
    session: onnxruntime.InferenceSession, feeds: dict[str, Array], outputs: dict[str, Array]
) -> Call:
    """A run over memory that is bound once."""
    binding = session.io_binding()
    for name, array in feeds.items():
        binding.bind_input(name, "cpu", 0, array.dtype, list(array.shape), array.ctypes.data)
    for name, array in outputs.items():
        binding.bind_output(name, "cpu", 0, array.dtype, list(array.shape), array.ctypes.data)

    def call() -> object:
        session.run_with_iobinding(binding)
        return feeds, outputs  # which must live as long as the call

    return call


class Pages:
    """A cache of random numbers for sequences of given lengths, with the operator over it."""

    def __init__(self, shape: Shape, dtype: str, lengths: list[int], threads: int) -> None:
        self.shape, self.dtype, self.lengths = shape, dtype, lengths
        self.counts = [-(-length // PAGE_SIZE) for length in lengths]
        generator = np.random.default_rng(0)
        page = shape.page_bytes(dtype)
        pages = sum(self.counts)
        memory = np.empty(pages * page + 64, np.uint8)
        start = -memory.ctypes.data % 64
        self.cache = memory[start : start + pages * page]
        self.cache.reshape(pages, page)[:] = self.content(generator)
        self.table = generator.permutation(pages).astype(np.int64) * page
        self.session = node_session(
            "PagedAttention",
            {
                "query": (1, 3),
                "key": (1, 3),
                "value": (1, 3),
                "cache": (2, 1),
                "starts": (7, 1),
                "lengths": (7, 1),
                "table_starts": (7, 1),
                "table": (7, 1),
                "spec": (7, 1),
            },
            {"output": 3, "log_sum_exp": 2, "entropy": 2},
            {
                "scale": shape.head_dim**-0.5,
                "softcap": 0.0,
                "num_kv_heads": shape.num_kv_heads,
                "head_dim": shape.head_dim,
                "value_head_dim": shape.head_dim,
            },
            threads,
        )

    def content(self, generator: np.random.Generator) -> Array:
        """Bytes of a page of numbers of about unit size."""
        page = self.shape.page_bytes(self.dtype)
        if CACHE_TYPES[self.dtype][1] == 1:
            content = generator.integers(0, 96, page, np.uint8)
            scales = PAGE_SIZE * self.shape.num_kv_heads * 2
            content[-4 * scales :] = np.full(scales, 0.01, np.float32).view(np.uint8)
            return content
        numbers: Array = generator.standard_normal(page // 4, np.float32)
        if self.dtype == "fp16":
            numbers = numbers.astype(np.float16)
        elif self.dtype == "bf16":
            numbers = (numbers.view(np.uint32) >> 16).astype(np.uint16)
        return np.resize(numbers.view(np.uint8), page)

    @property
    def bytes(self) -> int:
        """What a step reads."""
        return sum(self.lengths) * self.shape.row_bytes(self.dtype)

    def step(self, new_tokens: int = 1, only: int | None = None) -> Call:
        """A step of all sequences, or of one of them."""
        shape = self.shape
        chosen = range(len(self.lengths)) if only is None else range(only, only + 1)
        starts = np.concatenate([[0], np.cumsum(self.counts)])
        count = len(chosen)
        tokens = count * new_tokens
        generator = np.random.default_rng(1)

        def normal(heads: int) -> Array:
            return generator.standard_normal((tokens, heads, shape.head_dim), np.float32)

        tables = [self.table[starts[i] : starts[i + 1]] for i in chosen]
        feeds = {
            "query": normal(shape.num_heads),
            "key": normal(shape.num_kv_heads),
            "value": normal(shape.num_kv_heads),
            "cache": self.cache,
            "starts": np.arange(count + 1) * new_tokens,
            "lengths": np.array([self.lengths[i] for i in chosen]),
            "table_starts": np.cumsum([0, *(len(t) for t in tables)]),
            "table": np.concatenate(tables),
            "spec": np.array([PAGE_SIZE, CACHE_TYPES[self.dtype][0], -1, 0, 1, 0]),
        }
        rows = (tokens, shape.num_heads)
        outputs = {
            "output": np.empty((*rows, shape.head_dim), np.float32),
            "log_sum_exp": np.empty(rows, np.float32),
            "entropy": np.empty(rows, np.float32),
        }
        return bound(self.session, feeds, outputs)


def in_rotation(calls: Sequence[Call]) -> Call:
    """One of the calls after the other."""
    turns = itertools.cycle(calls)
    return lambda: next(turns)()


def torch_decode(shape: Shape, length: int, copies: int) -> Call:
    """PyTorch's scaled_dot_product_attention of one query over contiguous caches."""
    query = torch.randn(1, shape.num_heads, 1, shape.head_dim)

    def copy(numbers: torch.Tensor) -> torch.Tensor:
        return numbers_in_memory(numbers.numel()).reshape(numbers.shape).copy_(numbers)

    grouped = shape.num_heads != shape.num_kv_heads
    rows = (1, shape.num_kv_heads, length, shape.head_dim)
    one = torch.randn(rows)

    def over(key: torch.Tensor, value: torch.Tensor) -> Call:
        return lambda: torch.nn.functional.scaled_dot_product_attention(
            query, key, value, enable_gqa=grouped
        )

    return in_rotation([over(copy(one), copy(one)) for _ in range(copies)])


def numbers_in_memory(count: int) -> torch.Tensor:
    """So many FP32 numbers, not set, in memory pages as the caches of `Pages` have them: NumPy asks
    for large ones, PyTorch does not."""
    return torch.from_numpy(np.empty(count, np.float32))


def readers(size: int, copies: int) -> dict[str, Call]:
    """Plain reductions over buffers of so many bytes."""
    buffers = [numbers_in_memory(size // 4).fill_(1) for _ in range(copies)]
    reductions: dict[str, list[Call]] = {
        "sum": [buffer.sum for buffer in buffers],
        "max": [buffer.max for buffer in buffers],
        "integers": [buffer.view(torch.int32).max for buffer in buffers],
    }
    # Each begins elsewhere: none may find what another has just read in the processor's cache.
    return {
        name: in_rotation(calls[at * copies // 3 :] + calls[: at * copies // 3])
        for at, (name, calls) in enumerate(reductions.items())
    }


def gigabytes_per_second(size: int, timing: Timing) -> float:
    """Of a run that reads so many bytes."""
    return size / timing.milliseconds / 1e6


def decode(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One session: share of the machine's bandwidth, ratios to PyTorch and among cache types."""
    rows = []
    for shape in (Shape(), Shape(32, 8, 128)):
        for length in CONTEXTS:
            contenders = {}
            for dtype in CACHE_TYPES:
                copies = -(-COPIES_BYTES // (length * shape.row_bytes(dtype)))
                pages = Pages(shape, dtype, [length] * copies, options.threads)
                contenders[f"paged {dtype}"] = in_rotation(
                    [pages.step(only=copy) for copy in range(copies)]
                )
            size = length * shape.row_bytes("fp32")
            copies = -(-COPIES_BYTES // size)
            contenders["torch"] = torch_decode(shape, length, copies)
            reading = readers(size, copies)
            contenders |= {f"read {name}": call for name, call in reading.items()}
            timings = in_turns(contenders, "torch", seconds=options.seconds)
            read = min((timings[f"read {name}"] for name in reading), key=lambda t: t.milliseconds)
            for dtype in CACHE_TYPES:
                timing = timings[f"paged {dtype}"]
                bytes_read = length * shape.row_bytes(dtype)
                rows.append(
                    {
                        "heads": f"{shape.num_heads}/{shape.num_kv_heads}x{shape.head_dim}",
                        "context": length,
                        "cache": dtype,
                        "ms": timing.milliseconds,
                        "quick ms": timing.quick,
                        "GB/s": gigabytes_per_second(bytes_read, timing),
                        "machine GB/s": gigabytes_per_second(size, read),
                        "share": bytes_read / size * read.to(timing),
                        "ratio to torch": timing.ratio,
                        "tokens/s to fp32's": timings["paged fp32"].to(timing),
                    }
                )
    return rows


def sessions(options: argparse.Namespace) -> list[dict[str, Any]]:
    """64 sessions of mixed lengths in one run and one by one; a shared prefix and none."""
    lengths = [int(n) for n in np.random.default_rng(2).integers(64, 4096, 64)]
    shape = Shape()
    rows = []
    for dtype in ("fp32", "int8"):
        pages = Pages(shape, dtype, lengths, options.threads)
        single = [pages.step(only=i) for i in range(len(lengths))]

        def one_by_one(calls: list[Call] = single) -> None:
            for call in calls:
                call()

        timings = in_turns(
            {"together": pages.step(), "one by one": one_by_one},
            "one by one",
            seconds=options.seconds,
        )
        rows += [
            {
                "sessions": f"64 of 64..4096, {dtype}",
                "run": name,
                "ms": timing.milliseconds,
                "GB/s": gigabytes_per_second(pages.bytes, timing),
                "ratio": timing.ratio,
            }
            for name, timing in timings.items()
        ]
    apart = Pages(shape, "fp32", [2048 + 32] * 32, options.threads)
    shared = Pages(shape, "fp32", [2048 + 32] * 32, options.threads)
    prefix = 2048 // PAGE_SIZE
    tables = shared.table.reshape(32, -1)
    tables[:, :prefix] = tables[0, :prefix]
    timings = in_turns(
        {"a shared prefix of 2048": shared.step(), "unshared": apart.step()},
        "unshared",
        seconds=options.seconds,
    )
    return rows + [
        {
            "sessions": "32 of 2080, fp32",
            "run": name,
            "ms": timing.milliseconds,
            "GB/s": gigabytes_per_second(apart.bytes, timing),
            "ratio": timing.ratio,
        }
        for name, timing in timings.items()
    ]


def prefill(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Chunks of 512 against the operator Attention over contiguous keys of the same length."""
    shape, chunk = Shape(), 512
    rows = []
    for length in (512, 2048, 8192):
        generator = np.random.default_rng(3)

        def normal(heads: int, count: int, generator: Any = generator) -> Array:
            made: Array = generator.standard_normal((1, heads, count, shape.head_dim), np.float32)
            return made

        session = node_session(
            "Attention",
            {"query": (1, 4), "key": (1, 4), "value": (1, 4), "key_lengths": (7, 1)},
            {"output": 4},
            {
                "scale": shape.head_dim**-0.5,
                "softcap": 0.0,
                "left": -1,
                "right": 0,
                "bottom_right": 1,
            },
            options.threads,
        )
        feeds = {
            "query": normal(shape.num_heads, chunk),
            "key": normal(shape.num_kv_heads, length),
            "value": normal(shape.num_kv_heads, length),
            "key_lengths": np.array([length]),
        }
        outputs = {"output": np.empty_like(feeds["query"])}
        contenders = {"Attention": bound(session, feeds, outputs)} | {
            f"paged {dtype}": Pages(shape, dtype, [length], options.threads).step(chunk)
            for dtype in CACHE_TYPES
        }
        timings = in_turns(contenders, "Attention", seconds=options.seconds)
        rows += [
            {
                "keys": length,
                "by": name,
                "ms": timing.milliseconds,
                "ratio to Attention": timing.ratio,
            }
            for name, timing in timings.items()
        ]
    return rows


SECTIONS = {"decode": decode, "sessions": sessions, "prefill": prefill}


def main() -> int:
    """Measure, print, write."""
    parsed = _parser().parse_args()
    torch.set_num_threads(parsed.threads)
    figures: dict[str, Any] = {"shape": asdict(Shape()), "threads": parsed.threads}
    with torch.inference_mode():
        for name in parsed.sections:
            figures[name] = SECTIONS[name](parsed)
            print(f"\n{name}\n{table(figures[name])}", flush=True)
    write_json(parsed.json, figures)
    return 0


def _parser() -> Parser:
    parser = arguments("PagedAttention beside PyTorch and the machine's bandwidth.")
    add = parser.add_argument
    add("--seconds", type=values.some_seconds, default=3.0, help="for each set of contenders")
    add("--threads", type=values.integer(1, 1024), default=os.cpu_count() or 1)
    add("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    return parser


if __name__ == "__main__":
    sys.exit(main())
