"""What the peers share: the ONNX file, run by ONNX Runtime as attnserve runs it, and a free port.

Runs in the peers' own environments, which have nothing of attnserve's.
"""

import argparse
import socket
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime


def arguments() -> argparse.Namespace:
    """What every peer's server takes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True, help="the ONNX file")
    parser.add_argument("--threads", type=int, required=True, help="of one computation")
    return parser.parse_args()


class OnnxFile:
    """A core model's graph; threads do not spin while idle, as in attnserve by default."""

    def __init__(self, path: str, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )

    def run(self, query: Any, key: Any, value: Any) -> Any:
        """Attention of [B, H, S, D] arrays; every key is valid."""
        batch, _, key_len, _ = key.shape
        lengths = np.full(batch, key_len, np.int64)
        feeds = {"query": query, "key": key, "value": value, "key_lengths": lengths}
        return self._session.run(["output"], feeds)[0]


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def announce(port: int, *distributions: str) -> None:
    """The line that says where the server listens, and what it runs."""
    versions = [f"{name} {version(name)}" for name in (*distributions, "onnxruntime")]
    print(f"listening on 127.0.0.1:{port} {', '.join(versions)}", flush=True)
