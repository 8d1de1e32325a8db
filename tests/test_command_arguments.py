"""Every option of every command with what it does not take: refused by name, in one line."""

import argparse
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from attnserve_client import _cli as client
from attnserve_cluster import cli as cluster
from attnserve_export import cli as export
from attnserve_loadtest import cli as loadtest
from attnserve_loadtest import options as locust
from attnserve_server import cli as server
from attnserve_server import configuration
from bad_arguments import BAD, actions, words_of, wrongly_answered

OF = {
    "target": "target --trace-endpoint --address --move-sessions-to",
    "host": "host",
    "number": "--timeout --seq-len --batch --seed --scale --softcap --top-k --mass-by-distance "
    "--priority --top --mass-on-first --num-heads --num-kv-heads --head-dim --value-head-dim "
    "--window --window-right --chunk --rotary-dims --rotary-base --embed-dim --context-dim --opset "
    "--seconds --requests --duration --users --rounds --warmup --settle --trials --rate --pause "
    "--bound-ms --request-timeout --version --port --sessions --think --cancel --cancel-after "
    "--price-per-hour --clients --refinements --speed --length-scale --limit --prefix-tokens --min "
    "--max --cpus --gpus --memory-mib --queue-ms --kv-share --busy-seconds --idle-seconds "
    "--retire-seconds --wait --trace-sample --max-traces-per-second",
    "numbers": "--ids --token-type-ids --servers --rates --seq-lens --depths --tokens-seq-lens "
    "--layers --heads",
    "reals": "--sinks",
    "span": "--prompt --tokens --ramp --callers --ports SERVERS",
    "arrivals": "--arrivals",
    "slo": "--slo",
    "choice": "--as --attention --part --mask --alignment --rotary --dtype --module --provider "
    "--log-format --log-level",
    "name": "--model --variant --name --tokens-model --tokens-variant",
    "path": "--input --output --out --file --weights --checkpoint --filler --repository "
    "--tls-certificate --tls-key --tls-client-authorities --config --callers --jwt-keys "
    "--ca --certificate --key --token-file --move-ca --move-certificate --move-key "
    "--move-token-file "
    "report.json TRACE --report A B --pixel-values --input-features --inputs-embeds --processor "
    "--encoder-hidden-states FILE --metrics-token-file",
    "text": "TEXT --query --pair --target-text",
    "title": "--title --jwt-issuer --jwt-audience --jwt-roles-claim",
    "roles": "--certificate-roles",
}
KINDS = {option: kind for kind, listed in OF.items() for option in listed.split()}
KINDS |= {"--target": "target", "--host": "host"}
# Where one name means another thing.
OTHERS = {("attend", "--scale"): "real", ("decode", "--layers"): "number",
          ("load", "--layers"): "number", ("replay", "--layers"): "number",
          ("scaling", "--model"): "names", ("scaling", "--variant"): "names"}  # fmt: skip
# What comes before, so that it is this one that is read.
BEFORE = {("compare", "B"): ["report.json"]}
EMPTY_IS_NONE = {("locust", name) for name in ("--model", "--variant", "--tokens-model",
                                               "--tokens-variant")}  # fmt: skip


def locust_main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("locust")
    locust.add_to_parser(parser)
    parser.parse_args(arguments)
    return 0


def locust_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("locust")
    locust.add_to_parser(parser)
    return parser


COMMANDS: dict[str, tuple[Callable[[list[str]], int], argparse.ArgumentParser]] = {
    "attnserve": (client.main, client._parser()),
    "attnserve-server": (server.main, configuration.parser()),
    "attnserve-export": (export.main, export._parser()),
    "attnserve-cluster": (cluster.main, cluster._parser()),
    "attnserve-loadtest": (loadtest.main, loadtest._parser()),
    "locust": (locust_main, locust_parser()),
}


def cases() -> Iterator[tuple]:
    for program, (_, parser) in COMMANDS.items():
        for path, name, _ in actions(parser):
            last = path[-1] if path else program
            default = "number" if program == "attnserve-server" else ""
            kind = OTHERS.get((last, name)) or KINDS.get(name) or default
            assert kind, f"{program} {path} {name} is in no row of the table"
            for given in BAD[kind]:
                if not (given == "" and (last, name) in EMPTY_IS_NONE):
                    yield program, path, name, given


CASES = list(cases())


def test_every_option_refuses_what_it_does_not_take() -> None:
    """In one process, some hundred cases: each ends before any work begins."""
    wrong = []
    for program, path, name, given in CASES:
        before = BEFORE.get((path[-1] if path else "", name), [])
        words = [*path, *before, *words_of(name, given)]
        wrong += wrongly_answered(COMMANDS[program][0], words, name, helped=program != "locust")
    assert wrong == []
    assert len(CASES) >= 400


def test_an_options_range_has_two_ends(capsys: pytest.CaptureFixture[str]) -> None:
    for given, allowed in (("0", True), ("65535", True), ("65536", False), ("-1", False)):
        words = ["--repository", "x", f"--port={given}"]
        if allowed:
            assert configuration.parser().parse_args(words).port == int(given)
        else:
            with pytest.raises(SystemExit):
                configuration.parser().parse_args(words)
            assert f"--port: given '{given}'; allowed: an integer, 0..65535" in (
                capsys.readouterr().err
            )


def test_the_server_is_named_before_the_command_or_behind_it() -> None:
    for command in (["info"], ["attend", "--model", "m"], ["tokens", "x", "--model", "m"],
                    ["inspect", "x", "--model", "m", "--out", "x"]):  # fmt: skip
        for words in (["--target", "a:1", *command], [*command, "--target", "a:1"]):
            assert client._parser().parse_args(words).target == "a:1"
        assert client._parser().parse_args(command).target == "127.0.0.1:8001"
        assert client._parser().parse_args([*command, "--timeout", "2"]).timeout == 2


def test_help_fits_a_screen(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        client.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 100


@pytest.fixture
def files(tmp_path: Path) -> Path:
    np.savez(tmp_path / "other.npz", keys=np.zeros(3))
    np.savez(tmp_path / "objects.npz", query=np.array([{}], dtype=object))
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "text.npz").write_text("no arrays")
    (tmp_path / "empty.npz").write_bytes(b"")
    whole = (tmp_path / "other.npz").read_bytes()
    (tmp_path / "half.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    return tmp_path


@pytest.mark.parametrize(
    ("command", "option", "name"),
    [
        ("attend", "--input", "other.npz"),
        ("attend", "--input", "objects.npz"),
        ("attend", "--input", "one.npy"),
        ("attend", "--input", "text.npz"),
        ("attend", "--input", "empty.npz"),
        ("attend", "--input", "half.npz"),
        ("attend", "--input", "absent.npz"),
        ("attend", "--input", ""),
        ("attend", "--output", "absent/out.npz"),
        ("attend", "--output", ""),
        ("tokens x", "--output", "one.npy/out.npz"),
        ("inspect --out /dev/null", "--file", "latin.txt"),
        ("inspect --out /dev/null", "--file", "absent.txt"),
        ("inspect x", "--out", "absent/page.html"),
        ("inspect x", "--out", ""),
    ],
)
def test_a_file_is_named_that_cannot_be_read_or_written(
    files: Path, capsys: pytest.CaptureFixture[str], command: str, option: str, name: str
) -> None:
    path = files / name if name else files
    # No server is asked.
    words = [*command.split(), "--model", "m", option, str(path), "--target", "127.0.0.1:1"]
    assert client.main(words) == 2
    [said] = capsys.readouterr().err.splitlines()
    assert f"{option}: given {path}" in said
    assert "allowed: " in said


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (export.main, ["core", "--name", "m", "--num-heads", "2", "--head-dim", "8"]),
        (export.main, ["transformer", "--name", "m", "--checkpoint", "."]),
        (loadtest.main, ["scaling", "--model", "m", "--target", "127.0.0.1:1"]),
        (loadtest.main, ["context", "--model", "m", "--target", "127.0.0.1:1"]),
        (loadtest.main, ["decode", "--model", "m", "--target", "127.0.0.1:1"]),
        (loadtest.main, ["load", "--model", "m", "--target", "127.0.0.1:1"]),
    ],
)
def test_a_folder_that_cannot_be_written_is_said_before_any_work(
    files: Path, capsys: pytest.CaptureFixture[str], main: Callable, words: list[str]
) -> None:
    out = files / "one.npy"
    assert main([*words, "--out", str(out)]) == 2
    [said] = capsys.readouterr().err.splitlines()
    assert f"--out: given {out}: Not a directory; allowed: " in said


def test_no_server_is_said_with_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert client.main(["info", "--target", "127.0.0.1:1", "--timeout", "0.2"]) == 1
    [said] = capsys.readouterr().err.splitlines()
    assert "start one with `attnserve-server" in said


def interrupted(command: list[str], ready: Callable[[subprocess.Popen[str]], None]) -> list[str]:
    """What a process says on standard error that gets Ctrl-C once it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-m", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    ready(process)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130, said
    return said.splitlines()


def test_ctrl_c_ends_a_call_with_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:

        def connected(_: subprocess.Popen[str]) -> None:
            silent.accept()
            time.sleep(0.2)

        target = f"127.0.0.1:{silent.getsockname()[1]}"
        said = interrupted(["attnserve_client._cli", "info", "--target", target], connected)
    assert said == ["attnserve: interrupted; nothing was left half written"]


def test_ctrl_c_ends_an_export_with_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    def begun(process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        process.stderr.readline()

    command = ["attnserve_export.cli", "core", "--out", str(tmp_path / "models"), "--name", "m"]
    said = interrupted([*command, "--num-heads", "2", "--head-dim", "8"], begun)
    assert [line for line in said if not line.startswith("[")] == [
        "attnserve-export: interrupted; nothing was left half written"
    ]
    assert not list((tmp_path / "models").glob("*/*"))
