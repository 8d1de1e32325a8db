"""A client whose servers a file says: read again whenever it changes."""

import asyncio
import os
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from attnserve_client import AsyncAttentionClient, AttentionClient, UnavailableError
from attnserve_client import _cli as command
from attnserve_client._cluster_places import addresses_in
from plain_server import served
from serving import eventually

Q = np.ones((1, 2, 3, 4), np.float32)


def replace(path: Path, text: str) -> None:
    beside = path.with_name("new")
    beside.write_text(text)
    beside.replace(path)


def test_servers_are_those_that_the_file_has_now(tmp_path: Path) -> None:
    path = tmp_path / "the servers"
    target = f"file://{tmp_path}/the%20servers"
    with ExitStack() as stack:
        first, second = (stack.enter_context(served()) for _ in range(2))
        client = stack.enter_context(AttentionClient(target))
        with pytest.raises(UnavailableError, match=r"the%20servers: .*No such file"):
            client.attend(Q, Q, Q, model="m", timeout=0.3)
        replace(path, f"# one\n{first}\n\n")
        assert client.attend(Q, Q, Q, model="m").model == "m"
        assert client.servers == (first,)
        replace(path, f"{first}  # the old one\n{second}\n{first}\n")
        assert eventually(lambda: client.servers == (first, second))
        replace(path, second)
        assert eventually(lambda: client.servers == (second,))
        client.attend(Q, Q, Q, model="m")
        # What was known is kept.
        path.unlink()
        cluster = client._cluster
        assert cluster is not None
        assert eventually(lambda: "No such file" in cluster.name_trouble)
        client.attend(Q, Q, Q, model="m")
        replace(path, f"{first}\ntwo words\n")
        assert eventually(lambda: "line 2: given 'two words'" in cluster.name_trouble)
        assert client.servers == (second,)
        with pytest.raises(ValueError, match="servers: set on a client of 'file:///"):
            client.servers = [first]
        # A file that names nobody says just that.
        replace(path, "# none now\n")
        assert eventually(lambda: client.servers == ())
        with pytest.raises(UnavailableError, match="has no addresses"):
            client.attend(Q, Q, Q, model="m", timeout=0.3)


def test_asyncio_reads_it_too(tmp_path: Path) -> None:
    path = tmp_path / "servers"

    async def call(first: str, second: str) -> None:
        async with AsyncAttentionClient(f"file://{path}") as client:
            await client.attend(Q, Q, Q, model="m")
            assert client.servers == (first,)
            replace(path, second)
            while client.servers != (second,):
                await asyncio.sleep(0.01)
            await client.attend(Q, Q, Q, model="m")

    with served() as first, served() as second:
        path.write_text(first)
        asyncio.run(asyncio.wait_for(call(first, second), 20))


def test_the_command_takes_it_for_a_target(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "servers"
    with served() as address:
        path.write_text(address)
        assert command.main(["info", "--target", f"file://{path}"]) == 0
    with pytest.raises(SystemExit) as ended:
        command.main(["info", "--target", "file://servers"])
    assert ended.value.code == 2
    assert "--target: given 'file://servers'" in capsys.readouterr().err


def test_files_that_have_no_addresses(tmp_path: Path) -> None:
    """Each says what is wrong, and none waits or fills the memory."""
    pipe, long = tmp_path / "pipe", tmp_path / "long"
    os.mkfifo(pipe)
    long.write_bytes(b"a:1\n" * (1 << 19))
    for path, said in ((pipe, "no ordinary file"), (long, "more than"), (tmp_path, "ordinary|dire"),
                       (Path("/dev/zero"), "no ordinary file")):  # fmt: skip
        with pytest.raises((ValueError, OSError), match=said):
            addresses_in(str(path))
    (tmp_path / "latin").write_bytes(b"\xe4:1")
    with pytest.raises(ValueError, match="line 1: given"):
        addresses_in(str(tmp_path / "latin"))
