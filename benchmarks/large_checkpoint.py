"""A large random Llama: written in shards, exported, served, and compared with transformers.

What it takes is measured of the processes that do it: the exporter's peak memory (resident, files
that are mapped into it included) and time, and the server's. The reference is transformers' own
decoder layers in float64, one in memory at a time.

    python benchmarks/large_checkpoint.py --shape 3b --dtype fp16 --json reports/large.json
"""

import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from attnserve_client import AttentionClient
from attnserve_proto.commands import Parser, values
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

Array = NDArray[Any]

# Llama 3.2's 3B, and a tenth of it; tiny to try the script.
SHAPES: Mapping[str, Mapping[str, int]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 1000,
    },
    "0.3b": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 18,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 32_000,
    },
    "3b": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128_256,
    },
}
TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# What an answer is rounded by, relative to its largest number.
ROUNDED = {"fp32": 0.0, "fp16": 2.0**-11, "bf16": 2.0**-8}
SHARD_BYTES = 1 << 30
INDEX = "model.safetensors.index.json"
# Two of the layers, and of each two heads, of a ragged batch.
LENGTHS, LAYERS, HEADS = (37, 64), (0, -1), (1, 3)
TOLERANCE = 1e-4


def config_of(shape: str) -> Any:
    """The configuration of a shape."""
    from transformers import LlamaConfig

    sizes: dict[str, Any] = dict(SHAPES[shape])
    config = LlamaConfig(
        **sizes,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
    )
    config._attn_implementation = "eager"
    return config


def write_checkpoint(folder: Path, shape: str, dtype: torch.dtype) -> None:
    """Random parameters in shards of a GiB, of which one is in memory at a time."""
    from transformers import LlamaModel

    config = config_of(shape)
    config.dtype = dtype
    config.architectures = ["LlamaModel"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: each.shape for name, each in LlamaModel(config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    places: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    held, number = 0, 0
    for index, (name, size) in enumerate(shapes.items()):
        if len(size) == 1:  # of a norm
            tensor = 1 + 0.1 * torch.randn(size, generator=generator)
        else:
            tensor = torch.empty(size, dtype=torch.float32).normal_(generator=generator)
            tensor *= 1.0 if "embed" in name else size[1] ** -0.5
        shard[name] = tensor.to(dtype)
        held += shard[name].numel() * dtype.itemsize
        if held >= SHARD_BYTES or index == len(shapes) - 1:
            number += 1
            file = f"model-{number:05d}.safetensors"
            save_file(shard, folder / file, {"format": "pt"})
            places |= dict.fromkeys(shard, file)
            shard, held = {}, 0
    count = sum(int(math.prod(size)) for size in shapes.values())
    index_file = {"metadata": {"total_size": count * dtype.itemsize}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index_file))


def export(checkpoint: Path, repository: Path, dtype: str) -> dict[str, Any]:
    """Export in a process of its own: seconds and peak bytes of it, and what it said."""
    command = [sys.executable, "-m", "attnserve_export.cli", "transformer", "--name", "large"]
    command += ["--out", str(repository), "--checkpoint", str(checkpoint), "--dtype", dtype]
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        lines = said.read().splitlines()
    if process.returncode:
        raise RuntimeError("\n".join(lines))
    files = sum(file.stat().st_size for file in (repository / "large/1").iterdir())
    return {
        "seconds": time.monotonic() - started,
        "processor_seconds": used.ru_utime + used.ru_stime,
        "peak_bytes": used.ru_maxrss * 1024,
        "file_bytes": files,
        "said": lines,
    }


def sequences(shape: str) -> list[list[int]]:
    """A ragged batch of random ids."""
    generator = np.random.default_rng(1)
    return [generator.integers(0, SHAPES[shape]["vocab_size"], n).tolist() for n in LENGTHS]


def expected(checkpoint: Path, shape: str, dtype: torch.dtype) -> list[tuple[Array, Array]]:
    """Hidden states [S, E] and weights [L, H, S, S] of each sequence, layer by layer.

    Args:
        checkpoint: as it was written.
        shape: of it.
        dtype: that parameters are rounded to before they are computed with.
    """
    from transformers.models.llama import modeling_llama as llama

    config = config_of(shape)
    index = json.loads((checkpoint / INDEX).read_text())["weight_map"]

    def read(name: str) -> Tensor:
        with safe_open(checkpoint / index[name], framework="pt", backend="pread") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor.to(dtype)

    table = read("embed_tokens.weight")
    ids = [torch.tensor([each]) for each in sequences(shape)]
    states = [table[each].double() for each in ids]
    del table
    rotary = llama.LlamaRotaryEmbedding(config)
    kept: list[list[Array]] = [[] for _ in ids]
    wanted = {layer % config.num_hidden_layers for layer in LAYERS}
    for number in range(config.num_hidden_layers):
        layer = llama.LlamaDecoderLayer(config, number).to(torch.float64)
        prefix = f"layers.{number}."
        names = [name for name in index if name.startswith(prefix)]
        layer.load_state_dict({name.removeprefix(prefix): read(name) for name in names})
        found: list[Tensor] = []
        hook = layer.self_attn.register_forward_hook(
            lambda _module, _given, made, found=found: found.append(made[1])
        )
        for row, state in enumerate(states):
            length = state.shape[1]
            mask = torch.full((length, length), -torch.inf, dtype=torch.float64).triu(1)
            positions = torch.arange(length)[None]
            with torch.no_grad():
                made = layer(
                    state,
                    attention_mask=mask[None, None],
                    position_ids=positions,
                    position_embeddings=rotary(state, positions),
                )
            states[row] = made[0] if isinstance(made, tuple) else made
            if number in wanted:
                kept[row].append(found[-1][0, list(HEADS)].numpy())
        hook.remove()
    norm = llama.LlamaRMSNorm(config.hidden_size, config.rms_norm_eps).double()
    norm.load_state_dict({"weight": read("norm.weight")})
    with torch.no_grad():
        hidden = [norm(state)[0].numpy() for state in states]
    return [(state, np.stack(maps)) for state, maps in zip(hidden, kept, strict=True)]


@contextlib.contextmanager
def serving(repository: Path) -> Iterator[tuple[str, int]]:
    """A server: its address, and its process."""
    command = [sys.executable, "-m", "attnserve_server.cli", "--repository", str(repository)]
    command += ["--port", "0", "--metrics-port", "-1", "--log-level", "error"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"the server ended at once with {process.wait()}")
            yield line.split("listening on ")[1].split()[0], process.pid
        finally:
            process.terminate()


def memory(pid: int) -> dict[str, int]:
    """Of a process, in bytes: at most, its own now, and what it has mapped of files."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    found = dict(line.split(":", 1) for line in lines)
    names = {"peak_bytes": "VmHWM", "own_bytes": "RssAnon", "mapped_bytes": "RssFile"}
    return {name: int(found[key].split()[0]) * 1024 for name, key in names.items()}


def ask(
    address: str, shape: str, dtype: str, exact: list[tuple[Array, Array]]
) -> list[dict[str, Any]]:
    """Every variant, and how far it is from the reference."""
    layers = [layer % SHAPES[shape]["num_hidden_layers"] for layer in LAYERS]
    rows = []
    with AttentionClient(address) as client:
        for variant in client.get_model("large").variants:
            if "CPUExecutionProvider" not in variant.providers:
                continue
            started = time.monotonic()
            result = client.attend_tokens(
                sequences(shape),
                model="large",
                variant=variant.name,
                layers=layers,
                heads=list(HEADS),
                return_weights=True,
                timeout=None,
            )
            seconds = time.monotonic() - started
            assert result.hidden is not None
            assert result.weights is not None
            largest = max(float(np.abs(state).max()) for state, _ in exact)
            hidden = max(
                float(np.abs(result.hidden[row].astype(np.float64) - state).max())
                for row, (state, _) in enumerate(exact)
            )
            weights = max(
                float(np.abs(result.weights[row] - maps).max())
                for row, (_, maps) in enumerate(exact)
            )
            allowed = TOLERANCE * max(1.0, largest / 10) + ROUNDED[dtype] * largest
            rows.append(
                {
                    "variant": variant.name,
                    "seconds": seconds,
                    "hidden_error": hidden,
                    "hidden_allowed": allowed,
                    "hidden_largest": largest,
                    "weights_error": weights,
                    "agrees": hidden <= allowed and weights <= TOLERANCE,
                }
            )
    return rows


def main() -> int:
    """Run it; 1 if an answer differs or a bar is missed."""
    options = _parser().parse_args()
    stored = options.stored or options.dtype
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        checkpoint = options.checkpoint or folder / "checkpoint"
        checkpoint.mkdir(parents=True, exist_ok=True)
        if not (checkpoint / INDEX).is_file():
            write_checkpoint(checkpoint, options.shape, TYPES[stored])
        total = json.loads((checkpoint / INDEX).read_text())["metadata"]["total_size"]
        count = total // TYPES[stored].itemsize
        size = count * TYPES[options.dtype].itemsize
        print(f"{count:,} parameters, {size / 2**30:.2f} GiB in {options.dtype}", flush=True)
        exported = export(checkpoint, folder / "models", options.dtype)
        bound = 1.2 * size + (2 << 30)
        print(
            f"exported in {exported['seconds']:.0f} s ({exported['processor_seconds']:.0f} s of "
            f"processors) with {exported['peak_bytes'] / 2**30:.2f} GiB at most (bar: "
            f"{bound / 2**30:.2f}); {exported['file_bytes']:,} bytes of files",
            flush=True,
        )
        exact = expected(checkpoint, options.shape, TYPES[options.dtype])
        started = time.monotonic()
        with serving(folder / "models") as (address, pid):
            ready = time.monotonic() - started
            idle = memory(pid)
            answers = ask(address, options.shape, options.dtype, exact)
            loaded = memory(pid)
    print(common.table(answers))
    print(f"server: ready in {ready:.0f} s; {idle} at first, {loaded} after the answers")
    common.write_json(
        options.json,
        {
            "shape": options.shape,
            "parameters": count,
            "dtype": options.dtype,
            "stored": stored,
            "parameter_bytes": size,
            "bound_bytes": bound,
            "export": exported,
            "server": {"ready_seconds": ready, "idle": idle, "after_answers": loaded},
            "answers": answers,
        },
    )
    good = all(answer["agrees"] for answer in answers) and exported["peak_bytes"] <= bound
    print("agrees, within the bars" if good else "NOT within the bars")
    return 0 if good else 1


def _parser() -> Parser:
    parser = common.arguments(__doc__ or "")
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="0.3b")
    add("--dtype", choices=TYPES, default="fp16", help="of the export")
    add("--stored", choices=TYPES, help="of the checkpoint; default: --dtype")
    add("--folder", type=values.path, help="for the files, which are deleted at the end")
    add(
        "--checkpoint",
        type=values.path,
        help="write it here and keep it, or take the one that is here",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
