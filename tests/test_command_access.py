"""Commands that reach a server by TLS, by mutual TLS and with a token: those that are real."""

import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import certificates
import pytest
import serving
from attnserve_client import _cli as client
from attnserve_loadtest import cli as loadtest
from attnserve_proto.commands.access import TOKEN_VARIABLE
from attnserve_server import callers


@dataclass(frozen=True)
class Guarded:
    """A server and what reaches it."""

    target: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Files:
    """Of one authority and one caller."""

    ca: Path
    certificate: Path
    key: Path
    token: Path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("access")
    authority = certificates.Authority(folder)
    caller = authority.issue("caller")
    token, credential = callers.make_token()
    (folder / "callers").write_text(f"caller infer,sessions {credential}\n")
    (folder / "token").write_text(f"{token}\n")
    authority.issue("server")
    return Files(authority.certificate, caller.certificate, caller.key, folder / "token")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return serving.write_causal(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def by_token(files: Files, repository: Path) -> Iterator[Guarded]:
    folder = files.token.parent
    tls = {"tls_certificate": folder / "server.pem", "tls_key": folder / "server.key"}
    with serving.serving(repository, callers=folder / "callers", **tls) as server:
        words = ("--ca", str(files.ca), "--token-file", str(files.token))
        yield Guarded(f"127.0.0.1:{server.port}", words)


@pytest.fixture(scope="module")
def by_certificate(files: Files, repository: Path) -> Iterator[Guarded]:
    folder = files.token.parent
    tls = {"tls_certificate": folder / "server.pem", "tls_key": folder / "server.key"}
    with serving.serving(repository, tls_client_authorities=files.ca, **tls) as server:
        words = ("--ca", str(files.ca), "--certificate", str(files.certificate))
        yield Guarded(f"127.0.0.1:{server.port}", (*words, "--key", str(files.key)))


@pytest.fixture(params=["by_token", "by_certificate"])
def guarded(request: pytest.FixtureRequest) -> Guarded:
    found: Guarded = request.getfixturevalue(request.param)
    return found


def test_attnserve_reaches_it(guarded: Guarded, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["info"], ["attend", "--model", "causal", "--seq-len", "8"]):
        behind = [*words, "--target", guarded.target, *guarded.words]
        before = ["--target", guarded.target, *guarded.words, *words]
        assert client.main(behind) == client.main(before) == 0
    assert "causal 1" in capsys.readouterr().out


def test_a_token_of_the_environment_does_too(
    by_token: Guarded,
    files: Files,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ["info", "--target", by_token.target, "--ca", str(files.ca)]
    assert client.main(words) == 1
    [said] = capsys.readouterr().err.splitlines()
    assert "UNAUTHENTICATED" in said
    assert "--token-file" in said
    monkeypatch.setenv(TOKEN_VARIABLE, files.token.read_text().strip())
    assert client.main(words) == 0
    # A file goes before it.
    wrong = files.token.with_name("wrong")
    wrong.write_text("attn_unknown")
    assert client.main([*words, "--token-file", str(wrong)]) == 1


def test_a_live_page_asks_by_them(guarded: Guarded) -> None:
    command = [sys.executable, "-m", "attnserve_client._cli", "inspect", "--serve"]
    with subprocess.Popen(
        [*command, "--target", guarded.target, *guarded.words], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        address = process.stdout.readline().split()[0]
        with urllib.request.urlopen(address, timeout=20) as page:
            assert page.status == 200
        process.send_signal(signal.SIGINT)
    assert process.returncode == 130


def test_the_load_test_reaches_it(guarded: Guarded, tmp_path: Path) -> None:
    words = ["--target", guarded.target, *guarded.words, "--model", "causal"]
    load = ["load", *words, "--seq-lens", "8", "--rates", "20", "--duration", "0.2"]
    load += ["--warmup", "0", "--clients", "1", "--out", str(tmp_path / "load")]
    assert loadtest.main(load) == 0
    # In the report stands how it went, not what it was let in by.
    written = (tmp_path / "load/load.json").read_text()
    assert "attn_" not in written
    assert '"failed": 0' in written


def test_other_load_tests_are_let_in(
    guarded: Guarded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--target",
        guarded.target,
        *guarded.words,
        "--model",
        "causal",
        "--out",
        str(tmp_path),
    ]
    assert loadtest.main(["decode", *words, "--duration", "0.1"]) == 0
    # It was told what the model is.
    assert loadtest.main(["context", *words]) == 1
    assert "model causal is a core; allowed: transformer models" in capsys.readouterr().err


@pytest.mark.slow  # processes that load Locust
def test_locusts_users_and_scaling_reach_it(guarded: Guarded, tmp_path: Path) -> None:
    scaling = ["-m", "attnserve_loadtest", "scaling", "--target", guarded.target]
    scaling += ["--model", "causal", "--seq-lens", "8,16", "--requests", "2", "--rounds", "1"]
    subprocess.run(
        [sys.executable, *scaling, *guarded.words, "--out", str(tmp_path)], check=True, timeout=60
    )
    locustfile = Path(__file__).parents[1] / "loadtest/locustfile.py"
    locust = ["-m", "locust", "-f", str(locustfile), "--headless", "-u", "1", "-t", "2s"]
    for open_loop in ([], ["--rate", "20"]):
        ran = subprocess.run(
            [sys.executable, *locust, "--host", guarded.target, "--seq-lens", "8", *open_loop,
             *guarded.words],
            check=True, timeout=60, capture_output=True, text=True,
        )  # fmt: skip
        assert re.search(r"causal/\S+ +[1-9]\d* +0\(0\.00%\)", ran.stderr + ran.stdout)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ca", "FOLDER/absent"], "--ca: given FOLDER/absent: No such file or directory"),
        (["--ca", "FOLDER"], "--ca: given FOLDER: Is a directory"),
        (["--ca", "FOLDER/token"], "--ca: given FOLDER/token, which is none; allowed: a PEM"),
        (["--certificate", "FOLDER/caller.pem"], "--certificate: given without --key"),
        (["--key", "FOLDER/caller.key"], "--key: given without --certificate"),
        (
            ["--certificate", "FOLDER/token", "--key", "FOLDER/caller.key"],
            "--certificate: given FOLDER/token, which is none",
        ),
        (
            ["--certificate", "FOLDER/caller.pem", "--key", "FOLDER/server.key"],
            "--key: given FOLDER/server.key, which is none; allowed: a PEM file with the private "
            "key of FOLDER/caller.pem",
        ),
        (["--token-file", "FOLDER/absent"], "--token-file: given FOLDER/absent: No such file"),
        (["--token-file", "/dev/null"], "--token-file: given /dev/null, which holds none"),
        (["--token-file", "/dev/zero"], "--token-file: given /dev/zero, which holds none"),
        (["--token-file", "FOLDER/server.key"], "--token-file: given FOLDER/server.key, which"),
        (
            ["--token-file", "FOLDER/token", "--target", "example.org:1"],
            "--token-file: given without --ca, for example.org:1: it would cross the network",
        ),
    ],
)
@pytest.mark.parametrize("command", ["attnserve", "attnserve-loadtest"])
def test_what_is_wrong_is_said_in_one_line(
    files: Files,
    capsys: pytest.CaptureFixture[str],
    command: str,
    words: list[str],
    said: str,
) -> None:
    folder = str(files.token.parent)
    given = [word.replace("FOLDER", folder) for word in words]
    main, asked = (
        (client.main, ["info"])
        if command == "attnserve"
        else (loadtest.main, ["load", "--model=m"])
    )
    assert main([*asked, *given]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{command}: {said.replace('FOLDER', folder)}")
    assert "; allowed: " in line
    assert files.token.read_text().strip() not in line


def test_no_command_takes_a_token_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would stand in the list of processes."""
    monkeypatch.setenv(TOKEN_VARIABLE, "two words")
    assert client.main(["info"]) == 2
    parsers = [client._parser(), loadtest._parser()]
    assert not any("--token" in parser.format_help().split() for parser in parsers)
    assert TOKEN_VARIABLE not in os.environ or os.environ[TOKEN_VARIABLE] == "two words"
