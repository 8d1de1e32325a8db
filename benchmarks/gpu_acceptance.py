"""What an NVIDIA GPU has to show before the models are said to run well on it.

In one run of a few minutes: core models are exported, every variant that lists the GPU's provider
is compared with attention in float64, and then timed in turn with PyTorch's own fused kernels on
the same tensors. Also recorded: memory, how time grows with length, and which kernels ran.

The figures are written as they come, so that a run cut short still leaves what it had. Without a
GPU, `--dry-run` takes the same path on the CPU at tiny lengths; its figures say nothing of a GPU.

Exit code: 0 all correct, 1 something was not, 2 no GPU.
"""

import contextlib
import dataclasses
import io
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import attnserve_kernels
import common
import gpu_transformers
import numpy as np
import onnx
import onnxruntime
import torch
from attnserve_export import cli
from attnserve_export.models import TORCH
from attnserve_export.runtime import CPU, CUDA
from attnserve_proto.commands import Parser, values
from torch import Tensor
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.nn.attention import SDPBackend, sdpa_kernel

ONNX_TYPES = {
    torch.float32: int(onnx.TensorProto.FLOAT),
    torch.float16: int(onnx.TensorProto.FLOAT16),
    torch.bfloat16: int(onnx.TensorProto.BFLOAT16),
    torch.int64: int(onnx.TensorProto.INT64),
    torch.bool: int(onnx.TensorProto.BOOL),
}
# Which inputs a variant may have to be run here; one with any other is skipped.
KNOWN_INPUTS = {
    "query",
    "key",
    "value",
    "key_lengths",
    "bias",
    "mask",
    "prefix_lengths",
    "softcap",
    "sinks",
}
FLEX = "torch_flex"
KERNEL_LOG = ("ONNX Attention: using", "unified unfused", "SdpaKernel=")
# What the exporter and the probes of kernels and memory may need after the timings.
RESERVE_SHARE = 0.15

Call = Callable[[], object]


@dataclass(frozen=True)
class Contender:
    """What is timed: a call, and which of PyTorch's kernels it may take, if that is to be one."""

    call: Call
    backend: SDPBackend | None = None

    def allowed(self) -> contextlib.AbstractContextManager[object]:
        """A context to call it in; entered once for many calls, since entering takes time."""
        if self.backend is None:
            return contextlib.nullcontext()
        return sdpa_kernel(self.backend)


@dataclass(frozen=True)
class Spec:
    """A model to export: its name, the command line's other options, and whether to time it."""

    name: str
    options: str
    timed: bool = True


_SMALL = "--num-heads 8 --head-dim 64"
_GROUPED = "--num-heads 32 --num-kv-heads 8 --head-dim 128"
# The order is that of importance: what comes last is left out first.
SPECS = (
    Spec("causal_fp16", f"{_SMALL} --mask causal --dtype fp16"),
    Spec("causal_window_fp16", f"{_SMALL} --mask causal --window 256 --dtype fp16"),
    Spec("bidirectional_fp16", f"{_SMALL} --mask bidirectional --dtype fp16"),
    Spec("gqa_causal_fp16", f"{_GROUPED} --mask causal --dtype fp16"),
    Spec("causal_bf16", f"{_SMALL} --mask causal --dtype bf16"),
    Spec("causal_fp32", f"{_SMALL} --mask causal --dtype fp32"),
    Spec("bidirectional_window_fp16", f"{_SMALL} --mask bidirectional --window 256 --dtype fp16"),
    Spec("bidirectional_fp32", f"{_SMALL} --mask bidirectional --dtype fp32", timed=False),
)
_TINY = "--num-heads 2 --head-dim 16"
DRY_SPECS = (
    Spec("causal_fp32", f"{_TINY} --mask causal --dtype fp32"),
    Spec("causal_window_fp32", f"{_TINY} --mask causal --window 32 --dtype fp32"),
    Spec("gqa_bidirectional_fp16", f"{_TINY} --num-kv-heads 1 --mask bidirectional --dtype fp16"),
)


@dataclass(frozen=True)
class Plan:
    """The sizes of a run."""

    specs: tuple[Spec, ...]
    short: int
    odd: int
    medium: int
    large: int
    lengths: tuple[int, ...]
    long_from: int
    memory_lengths: tuple[int, ...]
    kernel_length: int
    rounds: int
    block_ms: float
    max_runs: int


GPU_PLAN = Plan(
    specs=SPECS,
    short=33,
    odd=67,
    medium=1024,
    large=16384,
    lengths=tuple(512 * 2**power for power in range(8)),
    long_from=8192,
    memory_lengths=(4096, 16384, 65536),
    kernel_length=2048,
    rounds=9,
    block_ms=5.0,
    max_runs=50,
)
DRY_PLAN = Plan(
    specs=DRY_SPECS,
    short=9,
    odd=67,
    medium=128,
    large=512,
    lengths=(128, 256, 512),
    long_from=128,
    memory_lengths=(256, 512),
    kernel_length=128,
    rounds=7,
    block_ms=1.0,
    max_runs=3,
)


@dataclass(frozen=True)
class Target:
    """Where everything runs: the GPU, or the CPU of a dry run."""

    dry_run: bool
    provider: str
    kind: str
    libraries: tuple[Path, ...] = ()
    stream: "torch.cuda.Stream | None" = None

    def synchronize(self) -> None:
        """Wait for all work given to the device."""
        if not self.dry_run:
            torch.cuda.synchronize()

    def free_bytes(self) -> int:
        """Memory that is left."""
        if self.dry_run:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return int(torch.cuda.mem_get_info()[0])

    def used_bytes(self) -> int:
        """Memory taken on the device; in a dry run the most this process ever took."""
        if self.dry_run:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        return int(total - free)

    def milliseconds(self, contender: Contender, runs: int) -> float:
        """Per run, of `runs` runs in a row."""
        call = contender.call
        with contender.allowed():
            if self.dry_run:
                started = time.perf_counter()
                for _ in range(runs):
                    call()
                return (time.perf_counter() - started) * 1e3 / runs
            before, after = (
                torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                for _ in range(2)
            )
            before.record()
            for _ in range(runs):
                call()
            after.record()
        after.synchronize()
        return float(before.elapsed_time(after)) / runs


@dataclass(frozen=True)
class Variant:
    """One ONNX file of an exported model."""

    model: str
    name: str
    path: Path
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    providers: tuple[str, ...]
    dtype: torch.dtype
    attention: dict[str, Any]
    timed: bool

    def unusable(self) -> str | None:
        """Why it can't be run here; None: it can."""
        if "output" not in self.outputs:
            return "gives no attention output"
        if self.name == "softcap":
            return "is `reference` with one more input"
        unknown = sorted(set(self.inputs) - KNOWN_INPUTS)
        return f"needs {', '.join(unknown)}" if unknown else None


@dataclass
class Report:
    """The figures, written anew after each.

    Attributes:
        path: of the JSON file.
        deadline: when to stop adding measurements, by the monotonic clock.
        figures: what is written.
    """

    path: Path | None
    deadline: float
    figures: dict[str, Any] = field(default_factory=dict)

    def add(self, section: str, **row: Any) -> None:
        """One more row of a section."""
        self.figures[section].append(row)
        self.write()

    def note(self, text: str) -> None:
        """One more remark, also shown at once."""
        if text not in self.figures["notes"]:
            self.figures["notes"].append(text)
            print(text, file=sys.stderr, flush=True)
            self.write()

    def write(self) -> None:
        """Write what there is so far."""
        common.write_json(self.path, self.figures)

    def left(self) -> float:
        """Seconds of the budget that remain."""
        return self.deadline - time.monotonic()

    def spent(self, what: str, reserve: float = 0.0) -> bool:
        """Whether the budget, less a reserve, is spent; says so, and what is left out."""
        if self.left() > reserve:
            return False
        self.note(f"budget spent: left out from {what} on")
        return True


@dataclass(frozen=True)
class Comparison:
    """How far an output is from the reference; no error is given where it isn't finite."""

    max_abs_error: float | None
    tolerance: float
    ok: bool


def compare(output: Tensor, expected: Tensor, tolerance: float) -> Comparison:
    """Compare an output with the reference, in float64."""
    error = float((output.double() - expected.double()).abs().max())
    finite = error < float("inf")
    return Comparison(error if finite else None, tolerance, finite and error <= tolerance)


def tolerance_for(dtype: torch.dtype, key_len: int, largest_score: float, on_gpu: bool) -> float:
    """The largest error allowed: what the arithmetic of the type leads to."""
    if dtype == torch.float16:
        return 2e-3
    if dtype == torch.bfloat16:
        return 1.6e-2
    if on_gpu:
        return 1e-5 * math.sqrt(key_len)
    return 2e-6 * math.sqrt(key_len) * max(1.0, largest_score / 8)


def key_range(
    attention: dict[str, Any], queries: Tensor, query_len: int, key_lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """The first key that each query sees and the one after the last, each [B, R]."""
    positions = queries[None, :].expand(key_lengths.shape[0], -1)
    if attention.get("alignment") == "bottom-right":
        positions = positions + key_lengths[:, None] - query_len
    window = attention.get("window")
    first = torch.zeros_like(positions)
    if window is not None:
        first = (positions - (window - 1)).clamp(min=0)
    right = 0 if attention["mask"] == "causal" else attention.get("window_right")
    end = key_lengths[:, None].expand_as(positions)
    if right is not None:
        end = torch.minimum(end, positions + right + 1)
    return first, end


def reference(
    attention: dict[str, Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor,
    queries: Tensor,
) -> tuple[Tensor, float]:
    """Attention in float64, written plainly.

    Args:
        attention: the manifest's description.
        query: [B, H, Sq, D].
        key: [B, Hkv, Sk, D].
        value: [B, Hkv, Sk, Dv].
        key_lengths: [B] INT64.
        queries: [R] INT64, the rows to compute.

    Returns:
        [B, H, R, Dv], and the largest score by magnitude.
    """
    group = query.shape[1] // key.shape[1]
    first, end = key_range(attention, queries, query.shape[2], key_lengths)
    keys = torch.arange(key.shape[2], device=query.device)
    visible = (keys >= first[:, None, :, None]) & (keys < end[:, None, :, None])
    outputs, largest = [], 0.0
    # A head at a time: all at once would not fit at the longest lengths.
    for head in range(query.shape[1]):
        q = query[:, head : head + 1, queries].double()  # (B, 1, R, D)
        k = key[:, head // group][:, None].double()
        v = value[:, head // group][:, None].double()
        scores = attention["scale"] * (q @ k.transpose(2, 3))  # (B, 1, R, Sk)
        scores = scores.masked_fill(~visible, -torch.inf)
        highest = scores.amax(dim=-1, keepdim=True)
        # A row without any visible key has weights of 0, by the rule of the project.
        weights = torch.exp(scores - torch.where(highest.isfinite(), highest, 0.0))
        total = weights.sum(dim=-1, keepdim=True)
        outputs.append((weights @ v) / torch.where(total > 0, total, 1.0))
        seen = scores[scores.isfinite()]
        largest = max(largest, float(seen.abs().max()) if seen.numel() else 0.0)
    return torch.cat(outputs, dim=1), largest


def tensors_for(
    variant: Variant,
    target: Target,
    query_len: int,
    key_len: int,
    key_lengths: Sequence[int],
    seed: int,
) -> dict[str, Tensor]:
    """Fresh random inputs for a variant, on the device."""
    generator = torch.Generator(device=target.kind).manual_seed(seed)
    batch, a = len(key_lengths), variant.attention
    shapes = {
        "query": (batch, a["num_heads"], query_len, a["head_dim"]),
        "key": (batch, a["num_kv_heads"], key_len, a["head_dim"]),
        "value": (batch, a["num_kv_heads"], key_len, a["value_head_dim"]),
    }
    # Clamped, since the absolute tolerance of a 16-bit output is for values below 4.
    tensors = {
        name: torch.randn(shape, generator=generator, device=target.kind)
        .clamp(-3, 3)
        .to(variant.dtype)
        for name, shape in shapes.items()
    }
    tensors["key_lengths"] = torch.tensor(key_lengths, device=target.kind, dtype=torch.int64)
    tensors["bias"] = torch.zeros((1, 1, 1, 1), device=target.kind, dtype=variant.dtype)
    tensors["mask"] = torch.ones((1, 1, 1, 1), device=target.kind, dtype=torch.bool)
    tensors["prefix_lengths"] = torch.zeros_like(tensors["key_lengths"])
    tensors["softcap"] = torch.tensor([-1.0], device=target.kind)  # the model's own
    tensors["sinks"] = torch.full((a["num_heads"],), -torch.inf, device=target.kind)
    return {name: tensors[name] for name in variant.inputs}


class Runner:
    """A variant's session, fed from tensors that lie on the device.

    Raises RuntimeError where ONNX Runtime falls back from the provider as a whole.
    """

    def __init__(
        self, variant: Variant, target: Target, *, profile: Path | None = None, tight: bool = False
    ) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = len(os.sched_getaffinity(0))
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        for library in target.libraries:
            options.register_custom_ops_library(str(library))
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        providers: list[Any] = [CPU]
        if target.stream is not None:
            cuda = {
                "use_tf32": "0",
                # One stream for both contenders: the events of PyTorch then time ONNX Runtime too.
                "user_compute_stream": str(target.stream.cuda_stream),
            }
            if tight:
                cuda["arena_extend_strategy"] = "kSameAsRequested"
            providers = [(CUDA, cuda), CPU]
        self.session = onnxruntime.InferenceSession(str(variant.path), options, providers=providers)
        if self.session.get_providers()[0] != target.provider:
            raise RuntimeError(f"ONNX Runtime could not use {target.provider}")
        self._variant = variant
        self._kind = target.kind
        self._options = onnxruntime.RunOptions()
        # Waiting for the device after every run is the caller's business.
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def bind(self, tensors: dict[str, Tensor]) -> tuple[Call, Tensor]:
        """A call that runs the graph on these tensors, and the output that it fills."""
        binding = self.session.io_binding()
        for name, tensor in tensors.items():
            binding.bind_input(name, *self._place(tensor))
        a = self._variant.attention
        query = tensors["query"]
        output = torch.full(
            (*query.shape[:3], a["value_head_dim"]),
            torch.nan,
            dtype=self._variant.dtype,
            device=query.device,
        )
        binding.bind_output("output", *self._place(output))
        # The binding holds addresses only: the call keeps the tensors alive.
        kept = (binding, tensors, output)

        def call() -> None:
            self.session.run_with_iobinding(kept[0], self._options)

        return call, output

    def _place(self, tensor: Tensor) -> tuple[str, int, int, list[int], int]:
        dtype = ONNX_TYPES[tensor.dtype]
        return self._kind, 0, dtype, list(tensor.shape), tensor.data_ptr()


def unusable_gpu() -> str | None:
    """Why the GPU can't be used; None: it can."""
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    if CUDA not in onnxruntime.get_available_providers():
        return f"ONNX Runtime {onnxruntime.__version__} has no {CUDA}"
    return None


def custom_libraries() -> tuple[Path, ...]:
    """The project's own operators, where they are built."""
    path = attnserve_kernels.library_path()
    return () if path is None else (path,)


def environment(target: Target) -> dict[str, Any]:
    """What it ran on."""
    versions: dict[str, Any] = {
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "onnxruntime": onnxruntime.__version__,
        "custom_operators": [path.name for path in target.libraries],
    }
    if target.dry_run:
        return {"device": "CPU (dry run: not a GPU figure)", "driver": None, **versions}
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "driver": _driver(),
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        **versions,
    }


def export_models(plan: Plan, target: Target, folder: Path, report: Report) -> list[Variant]:
    """Export every model of the plan that isn't there yet; what can't be is recorded."""
    variants = []
    for spec in plan.specs:
        if report.spent(f"export of {spec.name}", 0.6 * report.figures["budget_seconds"]):
            break
        print(f"export {spec.name}", file=sys.stderr, flush=True)
        started = time.monotonic()
        version = folder / spec.name / "1"
        reason = None
        if not version.exists():
            place = ["--out", str(folder), "--name", spec.name]
            reason = _export(["core", *place, *spec.options.split()])
        seconds = time.monotonic() - started
        report.add(
            "models", model=spec.name, options=spec.options, reason=reason, export_seconds=seconds
        )
        if reason is not None:
            report.note(f"{spec.name}: not available: {reason}")
            continue
        manifest = json.loads((version / "model.json").read_text())
        for entry in manifest["variants"]:
            variant = Variant(
                model=spec.name,
                name=entry["name"],
                path=version / entry["file"],
                inputs=tuple(value["name"] for value in entry["inputs"]),
                outputs=tuple(value["name"] for value in entry["outputs"]),
                providers=tuple(entry["providers"]),
                dtype=TORCH[manifest["dtype"]],
                attention=manifest["attention"],
                timed=spec.timed,
            )
            if _usable(variant, target, report):
                variants.append(variant)
    return variants


def check_all(plan: Plan, target: Target, variants: Sequence[Variant], report: Report) -> None:
    """Compare every variant with the reference at every shape."""
    odd, short, medium, large = plan.odd, plan.short, plan.medium, plan.large
    # Name, Sq, Sk, key lengths, whether to check every row.
    cases: list[tuple[str, int, int, list[int], bool]] = [
        ("one", 1, 1, [1], True),
        ("odd", odd, odd, [odd, odd], True),
        ("ragged", odd, odd, [odd, odd // 2, 5], True),
        ("no key", 2 * odd, 2 * odd, [2 * odd, 0], True),
        ("fewer queries", short, 3 * short, [3 * short, 2 * short], True),
        ("more queries", 3 * short, short, [short, short - 2], True),
        ("medium", medium, medium, [medium], True),
        ("medium ragged", medium, medium, [medium, medium - 37], True),
    ]
    for number, variant in enumerate(variants):
        if report.spent(f"correctness of {variant.model}/{variant.name}"):
            return
        runner = Runner(variant, target)
        print(f"check {variant.model}/{variant.name}", file=sys.stderr, flush=True)
        # The largest only where the weights, quadratic in length, aren't among the outputs.
        longest = [] if "weights" in variant.outputs else [("large", large, large, [large], False)]
        for seed, (case, query_len, key_len, lengths, every) in enumerate([*cases, *longest]):
            try:
                result = check(
                    runner, variant, target, query_len, key_len, lengths, every, 100 * number + seed
                )
            except Exception as error:
                if not _out_of_memory(error):
                    report.add("correctness", **_names(variant), case=case, error=_line(error))
                    report.figures["passed"] = False
                    report.note(f"{variant.model}/{variant.name}: {case}: {_line(error)}")
                else:
                    report.note(f"{variant.model}/{variant.name}: {case}: too little memory")
                continue
            report.figures["passed"] &= result.ok
            report.add(
                "correctness",
                **_names(variant),
                case=case,
                query_len=query_len,
                key_len=key_len,
                key_lengths=lengths,
                rows="all" if every else "sampled",
                max_abs_error=result.max_abs_error,
                tolerance=result.tolerance,
                ok=result.ok,
            )


def check(
    runner: Runner,
    variant: Variant,
    target: Target,
    query_len: int,
    key_len: int,
    key_lengths: Sequence[int],
    every_row: bool,
    seed: int,
) -> Comparison:
    """Run a variant on fresh inputs and compare."""
    tensors = tensors_for(variant, target, query_len, key_len, key_lengths, seed)
    target.synchronize()
    call, output = runner.bind(tensors)
    call()
    target.synchronize()
    rows = torch.arange(query_len, device=target.kind)
    if not every_row:
        generator = torch.Generator().manual_seed(seed)
        sample = torch.randint(query_len, (48,), generator=generator)
        ends = torch.tensor([0, 1, query_len // 2, query_len - 2, query_len - 1])
        rows = torch.tensor(sorted({*sample.tolist(), *ends.tolist()}), device=target.kind)
    lengths = torch.tensor(key_lengths, device=target.kind)
    q, k, v = tensors["query"], tensors["key"], tensors["value"]
    expected, largest = reference(variant.attention, q, k, v, lengths, rows)
    tolerance = tolerance_for(variant.dtype, key_len, largest, not target.dry_run)
    return compare(output[:, :, rows], expected, tolerance)


def visible_pairs(attention: dict[str, Any], seq_len: int) -> int:
    """Pairs of a query and a key that it sees, of one head at full length."""
    queries = torch.arange(seq_len)
    first, end = key_range(attention, queries, seq_len, torch.tensor([seq_len]))
    return int((end - first).clamp(min=0).sum())


def operations(attention: dict[str, Any], seq_len: int, batch: int) -> float:
    """Floating-point operations of the two products; S^2 / 2 pairs count for a full causal mask."""
    pairs: float = visible_pairs(attention, seq_len)
    if attention["mask"] == "causal" and attention.get("window") is None:
        pairs = seq_len**2 / 2
    width = attention["head_dim"] + attention["value_head_dim"]
    return float(2.0 * batch * attention["num_heads"] * pairs * width)


def torch_contenders(
    attention: dict[str, Any], tensors: dict[str, Tensor], target: Target
) -> dict[str, Contender]:
    """PyTorch's own attention on the same tensors.

    Its fused kernels know no window, and see every key; FlexAttention does, if it can be compiled.
    """
    q, k, v = tensors["query"], tensors["key"], tensors["value"]
    grouped = attention["num_heads"] != attention["num_kv_heads"]
    causal, scale = attention["mask"] == "causal", attention["scale"]

    def attend() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped
        )

    if target.dry_run:
        return {"torch_default": Contender(attend)}
    contenders = {
        "torch_flash": Contender(attend, SDPBackend.FLASH_ATTENTION),
        "torch_cudnn": Contender(attend, SDPBackend.CUDNN_ATTENTION),
        "torch_efficient": Contender(attend, SDPBackend.EFFICIENT_ATTENTION),
    }
    if causal and attention.get("window") is not None:
        contenders[FLEX] = Contender(_flex(attention, q, k, v))
    return contenders


def time_all(plan: Plan, target: Target, variants: Sequence[Variant], report: Report) -> None:
    """Time the variants without a weights output, each in turn with PyTorch, by length."""
    reserve = RESERVE_SHARE * report.figures["budget_seconds"]
    models = {v.model: [w for w in variants if w.model == v.model] for v in variants}
    for model, own in models.items():
        timed = [v for v in own if v.timed and "weights" not in v.outputs]
        runners = {v.name: Runner(v, target) for v in timed}
        out: dict[str, str] = {}
        last: dict[str, tuple[int, float]] = {}
        for seq_len in plan.lengths if timed else ():
            if report.spent(f"timing of {model} at {seq_len}", reserve):
                return
            print(f"time {model} at {seq_len}", file=sys.stderr, flush=True)
            anyones = dataclasses.replace(timed[0], inputs=tuple(sorted(KNOWN_INPUTS)))
            tensors = tensors_for(anyones, target, seq_len, seq_len, [seq_len], seq_len)
            target.synchronize()
            contenders = torch_contenders(timed[0].attention, tensors, target)
            for variant in timed:
                own_tensors = {name: tensors[name] for name in variant.inputs}
                contenders[variant.name] = Contender(runners[variant.name].bind(own_tensors)[0])
            for name in [name for name in contenders if name in out]:
                del contenders[name]
            for name in list(contenders):
                reason = _does_not_fit(name, seq_len, last, report.left() - reserve, plan)
                try:
                    if reason is None:
                        _warm_up(contenders[name], target)
                except Exception as error:
                    reason = _line(error)
                if reason is not None:
                    out[name] = reason
                    del contenders[name]
                    report.note(f"{model}: {name} from {seq_len} on: {reason}")
            rows = _paired(contenders, plan, target)
            work = operations(timed[0].attention, seq_len, 1)
            # A window counts only what it sees; PyTorch computes the whole causal triangle.
            full = {**timed[0].attention, "window": None, "window_right": None}
            for name, milliseconds in rows.items():
                sees_all = name.startswith("torch_") and name != FLEX
                own_work = operations(full, seq_len, 1) if sees_all else work
                last[name] = (seq_len, statistics.median(milliseconds))
                ratios = {
                    f"over_{other}": statistics.median(
                        a / b for a, b in zip(milliseconds, rows[other], strict=True)
                    )
                    for other in rows
                    if other.startswith("torch_") and not name.startswith("torch_")
                }
                report.add(
                    "speed",
                    model=model,
                    contender=name,
                    dtype=str(timed[0].dtype).removeprefix("torch."),
                    seq_len=seq_len,
                    # Of the model. PyTorch's fused kernels take no window.
                    window=timed[0].attention.get("window"),
                    median_ms=last[name][1],
                    lowest_ms=min(milliseconds),
                    tflops=own_work / last[name][1] / 1e9,
                    **ratios,
                )


def fit_exponents(plan: Plan, report: Report) -> None:
    """How time grows with length: the slope of log time over log length."""
    series: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in report.figures["speed"]:
        if row["seq_len"] >= plan.long_from:
            points = series.setdefault((row["model"], row["contender"]), [])
            points.append((row["seq_len"], row["median_ms"]))
    for (model, contender), points in series.items():
        if len(points) < 2:
            report.note(f"{model}/{contender}: too few long lengths for an exponent")
            continue
        lengths, times = np.log2(np.array(points)).T
        slope = float(np.polyfit(lengths, times, 1)[0])
        report.add(
            "exponents",
            model=model,
            contender=contender,
            lengths=[length for length, _ in points],
            exponent=slope,
        )


def measure_memory(plan: Plan, target: Target, variants: Sequence[Variant], report: Report) -> None:
    """What a fresh session's first run takes of the device: its arena keeps what it ever needed."""
    ran = {(row["model"], row["contender"]): row["seq_len"] for row in report.figures["speed"]}
    for variant in variants:
        for seq_len in plan.memory_lengths:
            if seq_len > ran.get((variant.model, variant.name), 0):
                break
            if report.spent(
                f"memory of {variant.model}/{variant.name}", 0.05 * report.figures["budget_seconds"]
            ):
                return
            tensors = tensors_for(variant, target, seq_len, seq_len, [seq_len], 0)
            runner = Runner(variant, target, tight=True)
            call, output = runner.bind(tensors)
            before = target.used_bytes()
            try:
                call()
                target.synchronize()
            except Exception as error:
                report.note(f"{variant.model}/{variant.name}: memory at {seq_len}: {_line(error)}")
                break
            heads = variant.attention["num_heads"]
            report.add(
                "memory",
                **_names(variant),
                seq_len=seq_len,
                run_bytes=target.used_bytes() - before,
                tensor_bytes=sum(t.nbytes for t in (*tensors.values(), output)),
                score_matrix_bytes=heads * seq_len**2 * output.element_size(),
                source="growth of the process's peak" if target.dry_run else "mem_get_info",
            )


def find_kernels(
    plan: Plan, target: Target, variants: Sequence[Variant], folder: Path, report: Report
) -> None:
    """Which nodes, device kernels and code paths ran, by ONNX Runtime's and PyTorch's profilers."""
    for variant in variants:
        # Quick, and worth a little more than the budget.
        if report.spent(f"kernels of {variant.model}/{variant.name}", -30):
            return
        seq_len = plan.kernel_length
        tensors = tensors_for(variant, target, seq_len, seq_len, [seq_len], 0)
        prefix = folder / f"profile_{variant.model}_{variant.name}"
        # Read when the session is made; printing at each run would spoil timings, so only here.
        os.environ["ORT_ENABLE_ATTENTION_KERNEL_DEBUG_INFO"] = "1"
        try:
            with _native_output(folder) as text:
                onnxruntime.set_default_logger_severity(0)
                runner = Runner(variant, target, profile=prefix)
                call, _ = runner.bind(tensors)
                call()
                target.synchronize()
                names = [] if target.dry_run else _device_kernels(call, target)
            nodes = _nodes(Path(runner.session.end_profiling()))
        except Exception as error:
            report.note(f"{variant.model}/{variant.name}: kernels: {_line(error)}")
            continue
        finally:
            onnxruntime.set_default_logger_severity(2)
            del os.environ["ORT_ENABLE_ATTENTION_KERNEL_DEBUG_INFO"]
        said = {line.strip()[-200:] for line in text if any(key in line for key in KERNEL_LOG)}
        report.add(
            "kernels",
            **_names(variant),
            seq_len=seq_len,
            nodes=nodes,
            device_kernels=names,
            log=sorted(said),
        )


def examine_transformers(plan: Plan, target: Target, folder: Path, report: Report) -> None:
    """Whole transformers in FP16 and BF16: right, and how fast beside PyTorch."""
    sizes = gpu_transformers.DRY if target.dry_run else gpu_transformers.GPU

    def pair(calls: dict[str, Call]) -> dict[str, float]:
        contenders = {name: Contender(call) for name, call in calls.items()}
        for contender in contenders.values():
            _warm_up(contender, target)
        rows = _paired(contenders, plan, target)
        return {name: statistics.median(times) for name, times in rows.items()}

    for checkpoint in sizes.checkpoints:
        if report.spent(f"transformer {checkpoint.name}"):
            return
        print(f"transformer {checkpoint.name}", file=sys.stderr, flush=True)

        def add(**row: Any) -> None:
            report.add("transformers", **row)

        try:
            good = gpu_transformers.examine(checkpoint, sizes, target, folder, _export, add, pair)
        except Exception as error:
            report.note(f"transformer {checkpoint.name}: {_line(error)}")
            good = False
        report.figures["passed"] &= good


def main() -> int:
    """Run the acceptance."""
    options = _parser().parse_args()
    reason = None if options.dry_run else unusable_gpu()
    if reason is not None:
        print(f"gpu_acceptance: no usable GPU: {reason} (see --dry-run)", file=sys.stderr)
        return 2
    target = _target(options.dry_run)
    plan = DRY_PLAN if options.dry_run else GPU_PLAN
    report = Report(options.json, time.monotonic() + options.budget_seconds)
    report.figures = {
        "benchmark": "gpu_acceptance",
        "dry_run": options.dry_run,
        **environment(target),
        "budget_seconds": options.budget_seconds,
        "finished": False,
        "passed": True,
        **{name: [] for name in ("notes", "models", "availability", "correctness")},
        **{name: [] for name in ("speed", "exponents", "memory", "kernels", "transformers")},
    }
    report.write()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name, torch.inference_mode(), warnings.catch_warnings():
        # PyTorch explains at length why a backend was not taken; that it was not is recorded.
        warnings.simplefilter("ignore")
        folder = Path(name)
        variants = export_models(plan, target, options.models or folder, report)
        check_all(plan, target, variants, report)
        time_all(plan, target, variants, report)
        fit_exponents(plan, report)
        measure_memory(plan, target, variants, report)
        find_kernels(plan, target, variants, folder, report)
        # A budget of its own: each is exported first.
        report.deadline = time.monotonic() + options.transformer_seconds
        examine_transformers(plan, target, folder, report)
    if not report.figures["correctness"]:
        report.note("nothing was checked")
        report.figures["passed"] = False
    report.figures["seconds"] = time.monotonic() - started
    report.figures["finished"] = True
    report.write()
    _show(report.figures)
    return 0 if report.figures["passed"] else 1


def _target(dry_run: bool) -> Target:
    if dry_run:
        return Target(True, CPU, "cpu", custom_libraries())
    # ONNX Runtime finds the CUDA and cuDNN libraries that came with PyTorch.
    if hasattr(onnxruntime, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):
            onnxruntime.preload_dlls()
    # A stream of its own: the default stream's handle is 0, which ONNX Runtime takes for none.
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    torch.cuda.set_stream(stream)
    torch.backends.cuda.matmul.allow_tf32 = False
    return Target(False, CUDA, "cuda", custom_libraries(), stream)


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _export(arguments: list[str]) -> str | None:
    """Run the exporter; why it did not write the model, None where it did."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            code = cli.main(arguments)
    except SystemExit as stop:  # options that it does not know
        code = int(stop.code) if isinstance(stop.code, int) else 1
    except Exception as error:
        return _line(error)
    lines = said.getvalue().strip().splitlines()
    return None if code == 0 else (lines[-1] if lines else f"exit code {code}")


def _usable(variant: Variant, target: Target, report: Report) -> bool:
    """Whether to run a variant; records it either way."""
    required = target.provider in variant.providers
    reason = variant.unusable() if required else f"does not list {target.provider}"
    failed = False
    if reason is None:
        try:
            Runner(variant, target)
        except Exception as error:
            reason, failed = _line(error), True
    report.add(
        "availability", **_names(variant), required=required, usable=reason is None, reason=reason
    )
    if failed:
        report.figures["passed"] = False
        report.note(f"{variant.model}/{variant.name}: no session: {reason}")
    return reason is None


def _names(variant: Variant) -> dict[str, str]:
    return {"model": variant.model, "variant": variant.name}


def _flex(attention: dict[str, Any], q: Tensor, k: Tensor, v: Tensor) -> Call:
    """PyTorch's FlexAttention with a causal window, compiled when it is first called."""
    # Only here: it needs a compiler, which not every machine has.
    from torch.nn.attention import flex_attention as flex

    window, seq_len = attention["window"], q.shape[2]

    def visible(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen: Tensor = (key <= query) & (query - key < window)
        return seen

    options = {"scale": attention["scale"], "enable_gqa": q.shape[1] != k.shape[1]}
    made: list[Call] = []

    def attend() -> object:
        if not made:
            blocks = flex.create_block_mask(
                visible, None, None, seq_len, seq_len, device=str(q.device), _compile=True
            )
            compiled = torch.compile(flex.flex_attention, dynamic=False)
            made.append(lambda: compiled(q, k, v, block_mask=blocks, **options))
        return made[0]()

    return attend


def _warm_up(contender: Contender, target: Target) -> None:
    with contender.allowed():
        for _ in range(2):
            contender.call()
    target.synchronize()


def _does_not_fit(
    name: str, seq_len: int, last: dict[str, tuple[int, float]], seconds: float, plan: Plan
) -> str | None:
    """Whether a contender would take too long, by its last length and quadratic growth."""
    if name not in last:
        return None
    length, milliseconds = last[name]
    expected = milliseconds * (seq_len / length) ** 2 * (plan.rounds + 3) / 1e3
    if expected > min(12.0, max(1.0, seconds) / 4):
        return f"left out: would take about {expected:.0f} s"
    return None


def _paired(contenders: dict[str, Contender], plan: Plan, target: Target) -> dict[str, list[float]]:
    """Milliseconds per run, all contenders once a round, each round beginning with another."""
    runs = {}
    for name, contender in contenders.items():
        once = target.milliseconds(contender, 1)
        runs[name] = max(1, min(plan.max_runs, int(plan.block_ms / max(once, 1e-3))))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    for _ in range(plan.rounds):
        for name in order:
            times[name].append(target.milliseconds(contenders[name], runs[name]))
        order = [*order[1:], *order[:1]]
    return times


@contextlib.contextmanager
def _native_output(folder: Path) -> Iterator[list[str]]:
    """What native code prints meanwhile, as lines once the block has ended."""
    lines: list[str] = []
    path = folder / "native_output.txt"
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    with path.open("wb") as file:
        try:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            yield lines
        finally:
            for number, copy in enumerate(saved, start=1):
                os.dup2(copy, number)
                os.close(copy)
    lines.extend(path.read_text(errors="replace").splitlines())


def _nodes(profile: Path) -> list[str]:
    """The operators that ran and where, in order, each once."""
    found: dict[str, None] = {}
    for event in json.loads(profile.read_text()):
        described = event.get("args", {})
        if "op_name" in described and "provider" in described:
            where = described["provider"].removesuffix("ExecutionProvider")
            found[f"{described['op_name']} ({where})"] = None
    return list(found)


def _device_kernels(call: Call, target: Target) -> list[str]:
    """The longest-running kernels of a run, by PyTorch's profiler, which sees the whole device."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        call()
        target.synchronize()
    spent: dict[str, float] = {}
    for event in profiler.events() or ():
        if event.device_type == DeviceType.CUDA:
            spent[event.name] = spent.get(event.name, 0.0) + event.time_range.elapsed_us()
    longest = sorted(spent.items(), key=lambda entry: -entry[1])[:6]
    return [f"{name[:160]} ({microseconds:.0f} us)" for name, microseconds in longest]


def _out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, torch.cuda.OutOfMemoryError) or any(
        sign in text for sign in ("out of memory", "failed to allocate", "available memory")
    )


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    # ONNX Runtime tells where first and what at the end.
    short = text if len(text) <= 400 else f"{text[:150]} ... {text[-250:]}"
    return f"{type(error).__name__}: {short}"


def _show(figures: dict[str, Any]) -> None:
    """The tables."""
    hidden = {"key_lengths", "options", "nodes", "device_kernels", "log", "lengths"}
    shown = ("models", "availability", "correctness", "speed", "exponents", "memory")
    for section in (*shown, "transformers"):
        print(f"\n{section}")
        rows = figures[section]
        keys = list(dict.fromkeys(key for row in rows for key in row if key not in hidden))
        if rows:
            print(common.table([{key: _cell(row.get(key)) for key in keys} for row in rows]))
    print("\nkernels")
    for row in figures["kernels"]:
        print(f"{row['model']}/{row['variant']} at {row['seq_len']}: {', '.join(row['nodes'])}")
        for line in (*row["device_kernels"], *row["log"]):
            print(f"    {line}")
    print("\nnotes")
    for note in figures["notes"]:
        print(f"- {note}")
    verdict = "passed" if figures["passed"] else "FAILED"
    print(f"\n{figures['device']}: {verdict} in {figures['seconds']:.0f} s")


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.3g}"
    return "" if value is None else value


def _parser() -> Parser:
    parser = common.arguments(__doc__ or "")
    add = parser.add_argument
    seconds = values.seconds
    add(
        "--budget-seconds", type=seconds, default=420.0, help="stop adding measurements after these"
    )
    add("--models", type=values.path, help="take exported models from here, and leave them here")
    add(
        "--transformer-seconds",
        type=seconds,
        default=420.0,
        help="for whole transformers after that, of which none begins later",
    )
    add("--dry-run", action="store_true", help="on the CPU, at tiny lengths")
    return parser


if __name__ == "__main__":
    sys.exit(main())
