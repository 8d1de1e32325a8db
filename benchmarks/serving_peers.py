"""Other servers of the Open Inference Protocol, each in an environment of its own.

    python benchmarks/serving_peers.py install --venvs .venvs

They pin versions of protobuf and grpcio that exclude one another, hence the environments. Each runs
the ONNX Runtime version that attnserve runs, where pip finds it for the peer's Python.
"""

import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from attnserve_proto.commands import Parser, values
from serving_calls import tensors, triton_request
from serving_servers import Server, start

SCRIPTS = Path(__file__).with_name("peers")


@dataclass(frozen=True)
class Peer:
    """A server to compare with.

    Attributes:
        name: of the environment, and of the script in peers/.
        distribution: what pip installs.
        pythons: versions to try, in this order; empty is this one.
        about: how it runs here.
    """

    name: str
    distribution: str
    pythons: Sequence[str]
    about: str


PEERS = (
    Peer("kserve", "kserve", ("",), "requests one by one on its event loop"),
    Peer("mlserver", "mlserver", ("",), "in one process (parallel_workers=0)"),
    # Its backend embeds an interpreter of its own and takes the standard library of the
    # environment's: the patch releases must fit, which is likeliest for the newest.
    Peer("pytriton", "nvidia-pytriton", ("3.13", "3.11", "3.10", ""), "dynamic batching up to 64"),
)


def install(peer: Peer, venvs: Path) -> str:
    """Make a peer's environment.

    Returns:
        Why there is none, or nothing.
    """
    folder = venvs / peer.name
    reason = "no Python of a version that it takes"
    for version in peer.pythons:
        python = _python(version)
        if python is None:
            continue
        subprocess.run([python, "-m", "venv", "--clear", folder], check=True)
        for runtime in (f"onnxruntime=={onnxruntime.__version__}", "onnxruntime"):
            command = [str(folder / "bin/python"), "-m", "pip", "install", "--quiet"]
            command += ["--disable-pip-version-check", peer.distribution, runtime]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                return ""
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            reason = lines[-1] if lines else f"pip ended with {done.returncode}"
    shutil.rmtree(folder, ignore_errors=True)
    (venvs / f"{peer.name}.why").write_text(reason + "\n")
    return reason


def missing(peer: Peer, venvs: Path) -> str:
    """Why a peer is not installed, or nothing if it is."""
    if (venvs / peer.name / "bin/python").exists():
        return ""
    why = venvs / f"{peer.name}.why"
    return why.read_text().strip() if why.exists() else f"not installed in {venvs}"


@contextlib.contextmanager
def serve(peer: Peer, venvs: Path, model: Path, threads: int) -> Iterator[Server]:
    """Start a peer over an ONNX file.

    Raises:
        RuntimeError: it does not start.
    """
    python = venvs / peer.name / "bin/python"
    script = SCRIPTS / f"{peer.name}_server.py"
    command = [python, script, "--model", model, "--threads", threads]
    with start([str(word) for word in command]) as server:
        _wait_for_answer(server, model)
        yield server


def _wait_for_answer(server: Server, model: Path) -> None:
    """Call it until it answers, and compare with the file run here."""
    # Here, since installing peers does not need it.
    from tritonclient.grpc import InferenceServerClient
    from tritonclient.utils import InferenceServerException

    feeds = dict(zip(("query", "key", "value"), tensors(16), strict=True))
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    expected = session.run(["output"], feeds | {"key_lengths": np.array([16])})[0]
    inputs, outputs = triton_request(feeds)
    deadline = time.monotonic() + 60
    with InferenceServerClient(server.address) as client:
        while True:
            try:
                answer = client.infer("causal", inputs, outputs=outputs).as_numpy("output")
                break
            except InferenceServerException as error:
                if time.monotonic() > deadline or not server.process.is_running():
                    raise RuntimeError(f"it does not answer: {error}") from None
            time.sleep(0.1)
    if not np.allclose(answer, expected, atol=1e-5):
        raise RuntimeError("its answer is not that of the file")


def _python(version: str) -> str | None:
    if not version or version == f"{sys.version_info.major}.{sys.version_info.minor}":
        return sys.executable
    pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    return str(pyenv[-1]) if pyenv else shutil.which(f"python{version}")


def main() -> int:
    """Install peers."""
    options = _parser().parse_args()
    known = {peer.name: peer for peer in PEERS}
    options.venvs.mkdir(parents=True, exist_ok=True)
    for name in options.names or known:
        reason = install(known[name], options.venvs)
        print(f"{name}: {reason or 'installed'}", flush=True)
    return 0


def _parser() -> Parser:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    name = values.one_of([peer.name for peer in PEERS])
    add("action", choices=["install"])
    add("names", nargs="*", type=name, metavar="NAME", help="default: all")
    add("--venvs", type=values.path, required=True, help="folder of environments")
    return parser


if __name__ == "__main__":
    sys.exit(main())
