"""`attnserve-server` where it cannot start: exit code 1 and one line that says why."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import certificates
import pytest
import serving
from attnserve_server import cli, configuration
from attnserve_server.models.store import ModelStore, load_all
from attnserve_server.repository import explain_empty


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return serving.write_causal(tmp_path_factory.mktemp("cli"))


def start(repository: Path, *options: str | Path, before: str = "") -> str:
    """What the command says before it ends with 1."""
    code = f"{before}\nimport sys\nfrom attnserve_server import cli\nsys.exit(cli.main())"
    command = [sys.executable, "-c", code, "--repository", repository, "--port", "0"]
    done = subprocess.run(
        [*command, "--metrics-port", "-1", "--provider", "cpu", "--log-level", "error", *options],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("attnserve-server: ")
    return done.stderr


@pytest.fixture
def refusal(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What stands in that line, without a process of its own."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def refuse(*options: str | Path) -> str:
        words = ["--repository", repository, "--port", "0", "--metrics-port", "-1", *options]
        settings = configuration.read([*map(str, words), "--provider", "cpu"], {})
        with pytest.raises(cli.StartError) as refused:
            cli.serve(settings)
        said = str(refused.value)
        assert len(said.splitlines()) == 1
        return said

    return refuse


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> certificates.Authority:
    return certificates.Authority(tmp_path_factory.mktemp("authority"))


def test_a_certificate_that_is_not_there(
    refusal: Callable[..., str], authority: certificates.Authority, tmp_path: Path
) -> None:
    own = authority.issue("server")
    absent = tmp_path / "absent.pem"
    for option in ("--tls-certificate", "--tls-key", "--tls-client-authorities"):
        given = {"--tls-certificate": own.certificate, "--tls-key": own.key} | {option: absent}
        options = [word for pair in given.items() for word in pair]
        assert str(absent) in refusal(*options)


def test_files_that_are_no_certificates(
    refusal: Callable[..., str], authority: certificates.Authority, tmp_path: Path
) -> None:
    own = authority.issue("server")
    text, binary = tmp_path / "text.pem", tmp_path / "binary.pem"
    text.write_text("no certificate\n")
    binary.write_bytes(bytes(range(256)))
    for wrong in (text, binary):
        for option in ("--tls-certificate", "--tls-key", "--tls-client-authorities"):
            given = {"--tls-certificate": own.certificate, "--tls-key": own.key} | {option: wrong}
            options = [word for pair in given.items() for word in pair]
            said = refusal(*options)
            assert "TLS" in said or f"{option}: {wrong}" in said


def test_a_key_of_another_certificate(repository: Path, authority: certificates.Authority) -> None:
    own, other = authority.issue("server"), authority.issue("other")
    options = ("--tls-certificate", own.certificate, "--tls-key", other.key)
    assert "keys that differ" in start(repository, *options)


def test_half_of_what_tls_needs(
    refusal: Callable[..., str], authority: certificates.Authority
) -> None:
    own = authority.issue("server")
    assert "--tls-key" in refusal("--tls-certificate", own.certificate)
    assert "--tls-certificate" in refusal("--tls-key", own.key)
    assert "--tls-certificate" in refusal("--tls-client-authorities", authority.certificate)


def test_a_port_that_is_taken(repository: Path) -> None:
    with serving.serving(repository) as server:
        assert str(server.port) in start(repository, "--port", str(server.port))
        assert str(server.port) in start(repository, "--metrics-port", str(server.port))


def test_without_the_data_plane_it_says_what_to_install(repository: Path) -> None:
    before = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "attnserve_dataplane":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""
    said = start(repository, before=before)
    assert "attnserve_dataplane" in said
    assert "pip install attnserve-dataplane" in said


def test_an_empty_repository_says_what_was_looked_for_and_what_lies_there(
    repository: Path, tmp_path: Path
) -> None:
    [folder] = repository.iterdir()
    alone = tmp_path / "around" / "models"
    shutil.copytree(folder, alone / folder.name)
    [model] = alone.iterdir()
    said = explain_empty(model)
    assert f"looked for {model}/NAME/VERSION/model.json" in said
    assert said.endswith(f"it is itself a model; give the folder around it, {alone}")
    assert explain_empty(model / "1").endswith(f"it is itself a version of a model; give {alone}")
    assert f"models lie in {alone}; give that" in explain_empty(alone.parent)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "the folder is empty; `attnserve-export` writes models into it" in explain_empty(empty)
    for name in "abcdefg":
        (empty / f"{name}.txt").touch()
    assert "there lies a.txt, b.txt, c.txt, d.txt, e.txt, ..." in explain_empty(empty)


def test_the_warning_is_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_all(tmp_path, ModelStore(None), lambda folder: None)
    [record] = caplog.records
    assert (record.levelname, record.message) == ("WARNING", "no model found")
    assert str(tmp_path) in record.reason


def test_telemetry_of_onnx_runtime_is_off_unless_asked_for() -> None:
    code = (
        "import os, attnserve_server, attnserve_export; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    )
    for asked in ({}, {"ORT_DISABLE_TELEMETRY": "0"}):
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True
        )
        assert done.stdout.strip() == asked.get("ORT_DISABLE_TELEMETRY", "1")
