"""`attnserve-loadtest decode` against a real server."""

import csv
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from threading import Timer

import pytest
from attnserve_loadtest.cli import main
from attnserve_server.app import AttentionServer
from handmade import attention, write_core
from serving import serving

pytestmark = pytest.mark.needs_library

SHORT = ["--rate", "12", "--duration", "1.5", "--prompt", "8-40", "--tokens", "4-9"]
SHORT += ["--pause", "0.05", "--layers", "2"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AttentionServer]:
    folder = tmp_path_factory.mktemp("models")
    write_core(folder, "llama", attention(4, 8, num_kv_heads=2, mask="causal"))
    with serving(folder) as running:
        yield running


def load(server: AttentionServer, out: Path, *options: str) -> int:
    target = f"127.0.0.1:{server.port}"
    return main(["decode", "--target", target, "--out", str(out), *SHORT, *options])


def test_sessions_come_generate_and_end(server: AttentionServer, tmp_path: Path) -> None:
    assert load(server, tmp_path, "--model", "llama", "--bound-ms", "100000") == 0
    report = json.loads((tmp_path / "decode.json").read_text())
    figures, sessions = report["figures"], report["sessions"]
    assert figures["sessions"] == len(sessions) > 0
    assert figures["failed"] == 0
    for one in sessions:
        assert 4 <= len(one["token_ms"]) <= 9
        assert one["first_ms"] > 0
        assert one["token_at"] == sorted(one["token_at"])
    assert figures["goodput_per_second"] == figures["tokens_per_second"] > 0
    assert figures["between_p50_ms"] <= figures["between_p99_ms"]
    with (tmp_path / "decode.csv").open() as file:
        assert len(list(csv.reader(file))) == 1 + sum(len(one["token_ms"]) for one in sessions)
    assert (tmp_path / "decode.png").read_bytes().startswith(b"\x89PNG")


def test_a_bound_that_nothing_meets_leaves_no_goodput(
    server: AttentionServer, tmp_path: Path
) -> None:
    assert load(server, tmp_path, "--model", "llama", "--bound-ms", "0.000001") == 0
    figures = json.loads((tmp_path / "decode.json").read_text())["figures"]
    assert figures["goodput_per_second"] == 0 < figures["tokens_per_second"]


def test_a_model_that_is_not_there(
    server: AttentionServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load(server, tmp_path, "--model", "none") == 1
    assert "given 'none'" in capsys.readouterr().err


def test_an_interruption_keeps_what_was_measured(
    server: AttentionServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Timer(1.5, signal.raise_signal, [signal.SIGINT]).start()
    assert load(server, tmp_path, "--model", "llama", "--duration", "60") == 130
    assert "interrupted: this is what was measured" in capsys.readouterr().err
    report = json.loads((tmp_path / "decode.json").read_text())
    assert not report["complete"]
    tokens = sum(len(one["token_ms"]) for one in report["sessions"])
    assert tokens > 0
    with (tmp_path / "decode.csv").open() as file:
        assert len(list(csv.reader(file))) == 1 + tokens
