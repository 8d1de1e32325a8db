"""What `attnserve-cluster` refuses before it has reached any Ray cluster."""

import socket

import pytest
from attnserve_cluster import cli
from attnserve_cluster.plan import Ports
from attnserve_cluster.process import PortsTakenError, free_ports
from serving import free_port

UP = ["up", "--repository", "models"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([*UP, "--min", "3", "--max", "2"], "--max: given 2; allowed: --min, 3, or more"),
        ([*UP, "--", "--port", "1"], "--port: given behind --; allowed: the options of"),
        ([*UP, "--", "--host=::"], "--host: given behind --; allowed: the options of"),
        ([*UP, "--", "--no-such"], "unrecognized arguments: --no-such"),
        ([*UP, "--", "--concurrency=x"], "argument --concurrency: given 'x'; allowed:"),
        ([*UP, "--cpus", "1.5"], "given '1.5'; allowed: a number of 0..1, or an integer"),
        ([*UP, "--ports", "8001-8001"], "given '8001-8001'; allowed: LOW-HIGH, two ports"),
        (["status", "--", "--port", "1"], "unrecognized arguments: -- --port 1"),
        (["scale", "4-2"], "given '4-2'; allowed: N or N-N of 1..10000"),
        (["scale"], "the following arguments are required: SERVERS"),
        (["status", "--name", "A"], "given 'A'; allowed: 1 to 63 of a-z"),
        (["status", "--address", "unix:/x"], "given 'unix:/x'; allowed: auto, HOST:PORT"),
        (["follow", "/nosuch/file"], "FILE: given /nosuch/file: No such file"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code: object = cli.main(words)
    except SystemExit as ended:
        code = ended.code
    [line] = capsys.readouterr().err.splitlines()
    assert code == 2
    assert said in line


@pytest.mark.parametrize("command", ["status", "down", "scale 2", "follow --once x"])
def test_an_address_where_nobody_is(
    command: str, capsys: pytest.CaptureFixture[str], tmp_path: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(str(tmp_path))
    given = f"127.0.0.2:{free_port()}"
    assert cli.main([*command.split(), "--address", given]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert f"--address: given {given}: Connection refused; allowed: a Ray cluster" in line


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        ("127.0.0.2:{port}", 1, "RAY_ADDRESS: given 127.0.0.2:{port}: Connection refused"),
        ("local", 2, "RAY_ADDRESS: given 'local'; allowed: auto, HOST:PORT or ray://HOST:PORT"),
    ],
)
def test_a_wrong_address_of_the_environment_is_named(
    given: str, code: int, said: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    port = free_port()
    monkeypatch.setenv("RAY_ADDRESS", given.format(port=port))
    assert cli.main(["status"]) == code
    [line] = capsys.readouterr().err.splitlines()
    assert said.format(port=port) in line


def test_ports_of_a_range_are_taken_in_turn() -> None:
    with socket.create_server(("127.0.0.2", 0)) as taken:
        port = int(taken.getsockname()[1])
        with pytest.raises(PortsTakenError, match=f"has no 2 free ports in {port}-{port}"):
            free_ports("127.0.0.2", 2, Ports(port, port), [])
        assert port not in free_ports("127.0.0.2", 2, Ports(port, port + 9), [])
    low = port
    first, second = free_ports("127.0.0.2", 2, Ports(low, low + 9), [])
    assert (first, low < second <= low + 9) == (low, True)
    assert free_ports("127.0.0.2", 2, Ports(low, low + 9), [second, first]) == [second, first]
    assert len(set(free_ports("127.0.0.2", 2, None, []))) == 2
