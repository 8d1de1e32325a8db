"""The benchmark's own C++ programs: compiled on demand, run, and their JSON read."""

import functools
import json
import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import serving_servers
from attnserve_proto import attention_pb2 as pb
from serving_calls import tensors
from serving_servers import Server

ATTEND = "/attnserve.v1.AttentionService/Attend"
HEALTH = "/grpc.health.v1.Health/Check"
OK, RESOURCE_EXHAUSTED = "0", "8"  # as `load` counts them

_SOURCES = Path(__file__).with_name("native")
_BUILD = Path(__file__).parents[1] / "build/benchmarks"
_LIBRARIES = {
    "echo": "libnghttp2",
    "flood": "libnghttp2",
    "decode": "libnghttp2",
    "load": "grpc++",
}


@functools.cache
def program(name: str) -> Path:
    """The program of native/NAME.cc, compiled unless it is newer than its source.

    Raises:
        SystemExit: it cannot be compiled; the message says what to install.
    """
    source, made = _SOURCES / f"{name}.cc", _BUILD / name
    newest = max(file.stat().st_mtime for file in (source, *_SOURCES.glob("*.h")))
    if made.exists() and made.stat().st_mtime > newest:
        return made
    _BUILD.mkdir(parents=True, exist_ok=True)
    try:
        found = ["pkg-config", "--cflags", "--libs", _LIBRARIES[name]]
        flags = shlex.split(
            subprocess.run(found, check=True, capture_output=True, text=True).stdout
        )
        command = ["g++", "-O2", "-std=c++20", str(source), "-o", str(made), *flags, "-lpthread"]
        subprocess.run(command, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(
            f"{source.name} cannot be compiled ({error}); `scripts/system-packages --tests` "
            "installs what it is built from"
        ) from error
    return made


def echo(threads: int) -> AbstractContextManager[Server]:
    """The bare nghttp2 server, which answers each message by one of a third of its size."""
    return serving_servers.start([str(program("echo")), str(threads)])


@dataclass(frozen=True)
class Loads:
    """Requests in files, for `load` and `flood`; on these cores, if any are named."""

    folder: Path
    cores: tuple[int, ...] = ()

    def closed(
        self, server: Server, seq_len: int, callers: int, seconds: float, deadline: float = 20.0
    ) -> dict[str, Any]:
        """Callers who each send when they have their answer."""
        command = self._command("load", server, ATTEND, self._request(seq_len))
        return _run([*command, str(callers), str(seconds), str(deadline)])

    def open(
        self, server: Server, seq_len: int, rate: float, seconds: float, deadline: float
    ) -> dict[str, Any]:
        """Requests at a rate, Poisson."""
        command = self._command("flood", server, ATTEND, self._request(seq_len))
        return _run([*command, str(rate), str(seconds), str(deadline)])

    def probe(self, server: Server, seconds: float) -> "subprocess.Popen[str]":
        """Health checks meanwhile, ten a second; `probed` waits for what they gave."""
        empty = self.folder / "empty"
        empty.touch()
        command = [*self._command("flood", server, HEALTH, empty), "10", str(seconds), "5"]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def _request(self, seq_len: int) -> Path:
        path = self.folder / str(seq_len)
        if not path.exists():
            parts = (
                pb.Tensor(dtype=pb.FP32, shape=array.shape, data=array.tobytes())
                for array in tensors(seq_len)
            )
            query, key, value = parts
            message = pb.AttendRequest(model="causal", query=query, key=key, value=value)
            path.write_bytes(message.SerializeToString())
        return path

    def _command(self, name: str, server: Server, method: str, request: Path) -> list[str]:
        command = [str(program(name)), server.address, method, str(request)]
        if not self.cores:
            return command
        return ["taskset", "-c", ",".join(str(core) for core in self.cores), *command]


@contextmanager
def loads() -> Iterator[Loads]:
    """Loads, whose files go with the `with` block."""
    with tempfile.TemporaryDirectory() as folder:
        yield Loads(Path(folder))


def probed(prober: "subprocess.Popen[str]") -> dict[str, Any]:
    """What `probe` gave."""
    output, _ = prober.communicate()
    return _figures(output)


def _run(command: list[str]) -> dict[str, Any]:
    return _figures(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _figures(output: str) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads(output)
    for name in ("answers", "refusals"):
        # None of them: -1. It is to meet no bar.
        figures[name] = {k: ms if ms >= 0 else float("nan") for k, ms in figures[name].items()}
    return figures
