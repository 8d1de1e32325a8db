"""Whole transformers on a GPU: what their variants give and how long they take, beside PyTorch.

A section of `gpu_acceptance.py`. Random checkpoints are exported, and every variant that lists the
GPU's provider is compared with transformers' eager attention in float64, given the same rounded
parameters. PyTorch runs the same module in the same type, by SDPA: an answer may be twice as far
from float64 as that one is, and by the rounding of the answer more.
"""

import functools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from attnserve_export import sessions
from attnserve_export.models import TORCH
from attnserve_export.runtime import CPU
from numpy.typing import NDArray
from torch import Tensor, nn

HIDDEN = "last_hidden_state"

# What an answer of a type is rounded by, relative to its largest number.
ROUNDED = {torch.float32: 1e-5, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@dataclass(frozen=True)
class Checkpoint:
    """A random checkpoint: its name, `model_type`, sizes, and the type to export it in."""

    name: str
    family: str
    sizes: dict[str, Any]
    dtype: str


@dataclass(frozen=True)
class Sizes:
    """Which checkpoints, and at which lengths they are compared and timed."""

    checkpoints: tuple[Checkpoint, ...]
    ragged: tuple[int, ...]
    lengths: tuple[int, ...]
    batch: int


def _llama(width: int, layers: int, heads: int, vocabulary: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 4,
        "max_position_embeddings": 8192,
    }


_BERT = {
    "vocab_size": 30_522,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "max_position_embeddings": 2048,
}
_LLAMA = _llama(2048, 6, 16, 8192)
GPU = Sizes(
    (
        Checkpoint("llama_fp16", "llama", _LLAMA, "fp16"),
        Checkpoint("bert_fp16", "bert", _BERT, "fp16"),
        Checkpoint("mistral_window_fp16", "mistral", _LLAMA | {"sliding_window": 256}, "fp16"),
        Checkpoint("llama_bf16", "llama", _LLAMA, "bf16"),
    ),
    ragged=(301, 1, 512, 77),
    lengths=(128, 512, 2048),
    batch=4,
)
DRY = Sizes(
    (Checkpoint("llama_fp16", "llama", _llama(64, 2, 4, 100), "fp16"),),
    ragged=(30, 1, 17),
    lengths=(32, 64),
    batch=2,
)

Arrays = dict[str, NDArray[Any]]
Export = Callable[[list[str]], str | None]


def write(checkpoint: Checkpoint, folder: Path) -> None:
    """Random parameters at which attention is neither flat nor all on one key."""
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(checkpoint.family, **checkpoint.sizes)
    auto: Any = transformers.AutoModel
    model = auto.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    model.save_pretrained(folder)


def inputs(sizes: Sequence[int], vocabulary: int) -> Arrays:
    """A ragged batch, padded at the end."""
    longest = max(sizes)
    ids = np.random.default_rng(0).integers(0, vocabulary, (len(sizes), longest))
    mask = np.arange(longest) < np.asarray(sizes)[:, None]
    return {"input_ids": ids, "attention_mask": mask.astype(np.int64)}


def hidden_states(module: Any, feeds: Arrays, device: str) -> NDArray[np.float64]:
    """Of PyTorch, each sequence by itself, 0 where there is padding."""
    rows = []
    for ids, mask in zip(feeds["input_ids"], feeds["attention_mask"], strict=True):
        own = torch.from_numpy(ids[None, : mask.sum()]).to(device)
        state = module(own).last_hidden_state[0].double().cpu().numpy()
        rows.append(np.pad(state, ((0, len(ids) - len(state)), (0, 0))))
    return np.stack(rows)


@dataclass(frozen=True)
class Models:
    """A checkpoint in PyTorch: exactly, and as one would run it."""

    exact: nn.Module
    own: nn.Module


def load(folder: Path, dtype: torch.dtype, device: str) -> Models:
    """Parameters rounded to a type; in float64 with eager attention, and in the type with SDPA."""
    import transformers

    def read(implementation: str) -> Any:
        made = transformers.AutoModel.from_pretrained(
            folder, attn_implementation=implementation, dtype=dtype
        )
        return made.eval().to(device)

    return Models(read("eager").double(), read("sdpa"))


def allowed(exact: NDArray[np.float64], own: NDArray[np.float64], dtype: torch.dtype) -> float:
    """How far an answer may be from float64."""
    rounding = ROUNDED[dtype] * float(np.abs(exact).max())
    return 2 * float(np.abs(own - exact).max()) + 2 * rounding


def examine(
    checkpoint: Checkpoint,
    sizes: Sizes,
    target: Any,
    folder: Path,
    export: Export,
    add: Callable[..., None],
    pair: Callable[[dict[str, Callable[[], object]]], dict[str, float]],
) -> bool:
    """Export, compare and time one checkpoint.

    Args:
        checkpoint: to examine.
        sizes: of the inputs.
        target: where everything runs (`gpu_acceptance.Target`).
        folder: for files.
        export: runs the exporter with arguments; why it wrote nothing, None where it did.
        add: records a row.
        pair: times calls in turn: milliseconds of each.

    Returns:
        Whether all that ran is right.
    """
    started = time.monotonic()
    source = folder / f"{checkpoint.name}.checkpoint"
    write(checkpoint, source)
    place = ["transformer", "--out", str(folder), "--name", checkpoint.name]
    reason = export([*place, "--dtype", checkpoint.dtype, "--checkpoint", str(source)])
    if reason is not None:
        add(model=checkpoint.name, what="export", reason=reason, ok=False)
        return False
    add(model=checkpoint.name, what="export", seconds=time.monotonic() - started, ok=True)
    version = folder / checkpoint.name / "1"
    manifest = json.loads((version / "model.json").read_text())
    dtype = TORCH[manifest["dtype"]]
    models = load(source, dtype, target.kind)
    feeds = inputs(sizes.ragged, checkpoint.sizes["vocab_size"])
    exact = hidden_states(models.exact, feeds, target.kind)
    own = hidden_states(models.own, feeds, target.kind)
    bound = allowed(exact, own, dtype)
    valid = feeds["attention_mask"] > 0
    good, running = True, {}
    for entry in manifest["variants"]:
        # ONNX Runtime's CPU provider runs FP16 too, so that a dry run tries that graph itself.
        tried = target.dry_run and dtype == torch.float16
        if target.provider not in entry["providers"] and not tried:
            continue
        row = {"model": checkpoint.name, "variant": entry["name"], "what": "hidden states"}
        try:
            session = open_session(version / entry["file"], target)
            made = sessions.run(session, feeds, [HIDDEN])[HIDDEN].astype(np.float64)
        except Exception as error:  # whatever ONNX Runtime may raise
            add(**row, reason=" ".join(str(error).split())[:300], ok=False)
            good = False
            continue
        error_ = float(np.abs(made - exact)[valid].max())
        ok = bool(error_ <= bound)
        good &= ok
        own_error = float(np.abs(own - exact)[valid].max())
        add(**row, max_abs_error=error_, pytorch_error=own_error, tolerance=bound, ok=ok)
        running[entry["name"]] = session
    for length in sizes.lengths:
        if length > int(manifest["transformer"]["max_seq_len"] or length):
            break
        batch = inputs([length] * sizes.batch, checkpoint.sizes["vocab_size"])
        calls = {name: bound_call(session, batch, target) for name, session in running.items()}
        ids = torch.from_numpy(batch["input_ids"]).to(target.kind)
        calls["torch_sdpa"] = functools.partial(models.own, ids)
        times = pair(calls)
        for name, milliseconds in times.items():
            add(
                model=checkpoint.name,
                variant=name,
                what=f"{sizes.batch} x {length}",
                median_ms=milliseconds,
                over_torch_sdpa=milliseconds / times["torch_sdpa"],
                ok=True,
            )
    return good


def open_session(path: Path, target: Any) -> onnxruntime.InferenceSession:
    """A graph on the target, on PyTorch's stream."""
    providers: list[Any] = [target.provider]
    if target.stream is not None:
        options = {"use_tf32": "0", "user_compute_stream": str(target.stream.cuda_stream)}
        providers = [(target.provider, options), CPU]
    return sessions.open_session(path, providers)


def bound_call(
    session: onnxruntime.InferenceSession, feeds: Arrays, target: Any
) -> Callable[[], object]:
    """A call whose inputs lie on the device, where its hidden states stay."""
    binding = session.io_binding()
    kept: list[Tensor] = []
    for entry in session.get_inputs():
        tensor = torch.from_numpy(feeds[entry.name]).to(target.kind)
        kept.append(tensor)
        binding.bind_input(
            entry.name, target.kind, 0, np.int64, list(tensor.shape), tensor.data_ptr()
        )
    binding.bind_output(HIDDEN, target.kind)

    def call() -> object:
        session.run_with_iobinding(binding)
        return kept

    return call
