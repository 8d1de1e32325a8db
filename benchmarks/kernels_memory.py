"""How far one attention takes the peak of a process's resident memory."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Run = Callable[[Array, Array, Array, Array], None]


def peak_growth(
    path: Path | None, num_heads: int, seq_len: int, head_dim: int, threads: int
) -> int:
    """Bytes above inputs and output, measured in a process of its own.

    Args:
        path: of the graph; None: torch's scaled_dot_product_attention, causal.
        num_heads, seq_len, head_dim: of the attention, batch 1, FP32.
        threads: that it may use.
    """
    asked = json.dumps([str(path) if path else None, num_heads, seq_len, head_dim, threads])
    answer = subprocess.run(
        [sys.executable, __file__, asked], capture_output=True, text=True, check=False
    )
    if answer.returncode:
        raise RuntimeError(f"memory of {path} at {seq_len}: {answer.stderr[-2000:]}")
    return int(answer.stdout)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _torch_run(threads: int) -> Run:
    import torch
    from torch.nn import functional

    torch.set_num_threads(threads)

    def run(query: Array, key: Array, value: Array, output: Array) -> None:
        q, k, v = (torch.from_numpy(array) for array in (query, key, value))
        with torch.no_grad():
            result = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            torch.from_numpy(output).copy_(result)

    return run


def _graph_run(path: Path, threads: int) -> Run:
    from attnserve_export import sessions

    session = sessions.open_session(path, threads=threads)
    taken = [entry.name for entry in session.get_inputs()]

    def run(query: Array, key: Array, value: Array, output: Array) -> None:
        feeds = {
            "query": query,
            "key": key,
            "value": value,
            "key_lengths": np.array([query.shape[2]]),
            "bias": np.zeros((1, 1, 1, 1), np.float32),
            "mask": np.ones((1, 1, 1, 1), bool),
            "prefix_lengths": np.zeros(1, np.int64),
            "softcap": np.array([-1], np.float32),
            "sinks": np.full(query.shape[1], -np.inf, np.float32),
        }
        binding = session.io_binding()
        for name in taken:
            binding.bind_cpu_input(name, feeds[name])
        binding.bind_output("output", "cpu", 0, np.float32, list(output.shape), output.ctypes.data)
        session.run_with_iobinding(binding)

    return run


def _measure(path: str | None, num_heads: int, seq_len: int, head_dim: int, threads: int) -> int:
    generator = np.random.default_rng(0)

    def tensors(length: int) -> list[Array]:
        shape = (1, num_heads, length, head_dim)
        return [generator.standard_normal(shape, np.float32) for _ in range(3)]

    run = _torch_run(threads) if path is None else _graph_run(Path(path), threads)
    q, k, v = tensors(64)
    run(q, k, v, np.zeros_like(q))  # what is set up once does not count
    q, k, v = tensors(seq_len)
    output = np.zeros_like(q)
    output += 1  # so that its pages are there
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    run(q, k, v, output)
    grown = _status("VmHWM") - before
    if path is None:
        grown -= output.nbytes  # torch allocates its result itself
    return max(0, grown)


if __name__ == "__main__":
    print(_measure(*json.loads(sys.argv[1])))
