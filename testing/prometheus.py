"""A real Prometheus over a real server, and the traffic that all panels of the dashboards show."""

import json
import shutil
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton
import yaml
from attnserve_client import AttentionClient, AttnserveError, page_hashes
from handmade import attention, write_core
from serving import free_port

ROOT = Path(__file__).resolve().parents[1]
DASHBOARDS = sorted((ROOT / "deploy/grafana/dashboards").glob("*.json"))
SCRAPE_SECONDS = 1
HEADS, DIM = 4, 32


@dataclass(frozen=True)
class Prometheus:
    """One that answers queries."""

    url: str

    def series(self, expression: str, seconds: float) -> list[tuple[dict[str, str], Any]]:
        """Of the last seconds: labels, and times and values [n, 2] of each series."""
        now = time.time()
        asked = {"query": expression, "start": now - seconds, "end": now, "step": SCRAPE_SECONDS}
        answer = self._ask("query_range", asked)
        return [
            (each["metric"], np.array(each["values"], dtype=float))
            for each in answer["data"]["result"]
        ]

    def ready(self) -> bool:
        """Whether it has scraped all that it should."""
        with suppress(OSError):
            found = self._ask("query", {"query": "min(up)"})["data"]["result"]
            return bool(found) and found[0]["value"][1] == "1"
        return False

    def _ask(self, what: str, asked: dict[str, Any]) -> Any:
        path = f"{self.url}/api/v1/{what}?{urllib.parse.urlencode(asked)}"
        with urllib.request.urlopen(path, timeout=30) as answer:
            return json.load(answer)


def installed() -> bool:
    """Whether this machine has Prometheus and its tool (`scripts/system-packages --tests`)."""
    return all(shutil.which(name) for name in ("prometheus", "promtool"))


@contextmanager
def prometheus(metrics_port: int, folder: Path) -> Iterator[Prometheus]:
    """One that scrapes a server on this machine, by the committed configuration otherwise."""
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    config["global"]["scrape_interval"] = f"{SCRAPE_SECONDS}s"
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{metrics_port}"]
    config["rule_files"] = [str(ROOT / "deploy/prometheus/alerts.yml")]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    command = [
        "prometheus",
        f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=error",
    ]
    with subprocess.Popen(command) as process:
        try:
            found = Prometheus(f"http://127.0.0.1:{port}")
            until = time.monotonic() + 60
            while not found.ready():
                assert process.poll() is None
                assert time.monotonic() < until
                time.sleep(0.2)
            yield found
        finally:
            process.terminate()


# So little that prefixes make room for others.
SERVER_OPTIONS = ("--max-kv-mib", "24")


def write_models(repository: Path) -> None:
    """What `traffic` asks for."""
    for name in ("causal", "llama-core"):
        write_core(repository, name, attention(HEADS, DIM, mask="causal"))


def traffic(address: str, seconds: float) -> None:
    """Callers of every kind for so long: served, refused, and with sessions that share prefixes."""
    stop = threading.Event()
    callers = [
        threading.Thread(target=caller, args=(address, stop))
        for caller in (_attend, _attend, _infer, _sessions, _mistakes)
    ]
    for each in callers:
        each.start()
    time.sleep(seconds)
    stop.set()
    for each in callers:
        each.join()


def expressions() -> Iterator[tuple[str, str, str, str]]:
    """Of all dashboards: file's name, panel, query as this Prometheus takes it, and legend."""
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                query = target["expr"].replace("$instance", ".*")
                query = query.replace("$__rate_interval", f"{8 * SCRAPE_SECONDS}s")
                yield path.stem, panel["title"], query, target["legendFormat"]


def _random(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng().standard_normal(shape).astype(np.float32)


def _attend(address: str, stop: threading.Event) -> None:
    with AttentionClient(address, shared_memory=True) as client:
        kept = client.put_tensor(_random(1, HEADS, 256, DIM))
        shared = client.shared(_random(1, HEADS, 64, DIM))
        while not stop.is_set():
            client.attend(*(_random(1, HEADS, 256, DIM) for _ in range(3)), model="causal")
            client.attend(shared, kept, kept, model="causal")


def _infer(address: str, stop: threading.Event) -> None:
    inputs = [
        triton.InferInput(name, [1, HEADS, 64, DIM], "FP32") for name in ("query", "key", "value")
    ]
    for each in inputs:
        each.set_data_from_numpy(_random(1, HEADS, 64, DIM))
    with triton.InferenceServerClient(address) as client:
        while not stop.wait(0.01):
            client.infer("causal", inputs)


def _sessions(address: str, stop: threading.Event) -> None:
    with AttentionClient(address) as client:
        page_tokens = client.server_info().limits.session_page_tokens
        generator = np.random.default_rng(0)
        abandoned = []
        while not stop.is_set():
            # A few prefixes that many sessions begin with, and many of one session each.
            first = int(generator.choice([*range(4), generator.integers(1 << 30)]))
            hashes = page_hashes(range(first, first + 32 * page_tokens), page_tokens)
            session = client.session(
                "llama-core", num_layers=2, max_tokens=2048, prefix_hashes=hashes, lease=2
            )
            found = session.length // page_tokens
            for tokens in (32 * page_tokens - session.length, *(1 for _ in range(10))):
                for layer in range(2):
                    if tokens:
                        tensors = (_random(tokens, HEADS, DIM) for _ in range(3))
                        full = hashes[found:] if tokens > 1 and layer == 0 else ()
                        session.attend(layer, *tensors, prefix_hashes=full)
            # One of several is left to its lease.
            if generator.random() < 0.1:
                abandoned.append(session)
            else:
                session.close()
            stop.wait(0.1)


def _mistakes(address: str, stop: threading.Event) -> None:
    query = _random(1, HEADS, 8, DIM)
    with AttentionClient(address) as client:
        while not stop.wait(0.05):
            for asked in (
                {"model": "nosuch"},
                {"model": "causal", "key_lengths": [9]},
                {"model": "causal", "timeout": 1e-4},
            ):
                with suppress(AttnserveError):
                    client.attend(query, query, query, **asked)
