"""Sessions whose servers end one after another: the SDK goes after them, and nothing is lost.

Values are compared, bit for bit, with those of a twin that stays at one server.
"""

import asyncio
import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attnserve_client import (
    AsyncAttentionClient,
    AttentionClient,
    Batch,
    Session,
    Shards,
    UnavailableError,
)
from attnserve_server import callers
from attnserve_server.app import AttentionServer
from certificates import Authority
from handmade import attention, write_core
from numpy.typing import NDArray
from serving import draining, serving

pytestmark = pytest.mark.needs_library

HEADS, KV_HEADS, DIM, LAYERS = 4, 2, 8, 2
Array = NDArray[Any]
generator = np.random.default_rng()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_core(folder, "causal", attention(HEADS, DIM, num_kv_heads=KV_HEADS, mask="causal"))
    write_core(folder, "half", attention(HEADS // 2, DIM, num_kv_heads=1, mask="causal"))
    return folder


@pytest.fixture(scope="module")
def twins(models: Path) -> Iterator[AttentionClient]:
    """At a server that stays."""
    with serving(models) as server, AttentionClient(server.address) as client:
        yield client


@contextlib.contextmanager
def chain(models: Path, count: int, **options: Any) -> Iterator[list[AttentionServer]]:
    """Servers, each of which hands its sessions to the next."""
    with contextlib.ExitStack() as stack:
        servers: list[AttentionServer] = []
        for _ in range(count):
            if servers:
                options["move_sessions_to"] = servers[0].address
            given = {"drain_seconds": 20} | options
            servers.insert(0, stack.enter_context(serving(models, **given)))
        yield servers


def rows(tokens: int) -> tuple[Array, Array, Array]:
    def some(heads: int) -> Array:
        return generator.standard_normal((tokens, heads, DIM), dtype=np.float32)

    return some(HEADS), some(KV_HEADS), some(KV_HEADS)


def step(pairs: Sequence[tuple[Session | Batch, Session | Batch]], tokens: int = 1) -> None:
    """A step of one session after another, or of a batch with so many tokens in all."""
    for layer in range(LAYERS):
        arrays = rows(tokens)
        for one, twin in pairs:
            output = one.attend(layer, *arrays).output
            np.testing.assert_array_equal(output, twin.attend(layer, *arrays).output)


def opened(
    client: AttentionClient, twins: AttentionClient, count: int
) -> tuple[list[Session], list[Session]]:
    options: dict[str, Any] = {"num_layers": LAYERS, "max_tokens": 600}
    ones = [client.session("causal", **options) for _ in range(count)]
    return ones, twins.sessions(count, "causal", **options)


@pytest.mark.parametrize("count", [1, 3])
def test_sessions_take_steps_while_their_servers_end(
    models: Path, twins: AttentionClient, count: int
) -> None:
    """One by one and in a batch, by a client that knows the first server alone, or all."""
    with chain(models, 3) as servers:
        addresses = [server.address for server in servers]
        with AttentionClient(addresses[0] if count == 1 else addresses) as client:
            ones, others = opened(client, twins, 12)
            pairs: list[Any] = list(zip(ones[:6], others[:6], strict=True))
            batch = [(client.batch(ones[6:]), twins.batch(others[6:]))]
            step(pairs, 40)
            step(batch, 6 * 20)
            for server in servers[:2]:
                with draining(server):
                    while server.plane.session_ids():
                        step(pairs)
                        step(batch, 6)
                step(pairs, 3)
                step(batch, 6)
            assert [one.length for one in ones] == [other.length for other in others]
            fork, twin = ones[0].fork(at=20), others[0].fork(at=20)
            step([(fork, twin), *pairs])
            ones[1].truncate(7)
            others[1].truncate(7)
            step(pairs[:2])
            for one, other in [*zip(ones, others, strict=True), (fork, twin)]:
                one.close()
                other.close()
            assert servers[2].plane.session_ids() == []


def test_asyncio_sessions_go_after_theirs(models: Path, twins: AttentionClient) -> None:
    async def run(servers: list[AttentionServer]) -> None:
        async with AsyncAttentionClient([servers[0].address, servers[1].address]) as client:
            options: dict[str, Any] = {"num_layers": LAYERS, "max_tokens": 600}
            ones = [await client.session("causal", **options) for _ in range(6)]
            others = twins.sessions(6, "causal", **options)
            batch, twin_batch = client.batch(ones[:4]), twins.batch(others[:4])

            async def steps(tokens: int = 1) -> None:
                for layer in range(LAYERS):
                    arrays = rows(4 * tokens)
                    output = (await batch.attend(layer, *arrays)).output
                    expected = twin_batch.attend(layer, *arrays).output
                    np.testing.assert_array_equal(output, expected)
                    arrays = rows(tokens)
                    results = await asyncio.gather(
                        *(one.attend(layer, *arrays) for one in ones[4:])
                    )
                    for result, other in zip(results, others[4:], strict=True):
                        expected = other.attend(layer, *arrays).output
                        np.testing.assert_array_equal(result.output, expected)

            await steps(30)
            for server in servers[:2]:
                drained = asyncio.create_task(asyncio.to_thread(server.drain))
                while server.plane.session_ids():
                    await steps()
                await drained
                await steps()
            for one in ones:
                await one.close()

    with chain(models, 3) as servers:
        asyncio.run(run(servers))


def test_an_idle_client_knows_where_its_sessions_went(
    models: Path, twins: AttentionClient, tmp_path: Path
) -> None:
    with chain(models, 3) as servers, AttentionClient(servers[0].address) as client:
        ones, others = opened(client, twins, 20)
        pairs = list(zip(ones, others, strict=True))
        step(pairs, 17)
        client.save(ones[0], tmp_path / "saved")
        loaded, twin = client.load(tmp_path / "saved"), others[0].fork()
        with draining(servers[0]):
            pass
        deadline = time.monotonic() + 10
        while answers(servers[1]) < len(ones) + 1:  # the client is known at the next one
            assert time.monotonic() < deadline
            time.sleep(0.001)
        with draining(servers[1]):
            pass
        step([*pairs, (loaded, twin)])
        client.save(ones[1], tmp_path / "again")
        with AttentionClient(servers[2].address) as another:
            step([(another.load(tmp_path / "again"), others[1].fork())])


def answers(server: AttentionServer) -> int:
    """To requests of Decode."""
    return sum(count for method, _, count in server.plane.requests() if method == "Decode")


def test_who_does_not_follow_is_told_where_its_session_is(models: Path) -> None:
    with (
        chain(models, 2) as servers,
        AttentionClient(servers[0].address, follow_moved=False) as client,
    ):
        session, held = client.sessions(2, "causal", num_layers=LAYERS, max_tokens=64)
        for layer in range(LAYERS):
            session.attend(layer, *rows(5))
        held.attend(0, *rows(1))  # the server waits for its other layer
        with draining(servers[0]):
            while len(servers[0].plane.session_ids()) > 1:
                time.sleep(0.001)
            with pytest.raises(UnavailableError, match=servers[1].address) as refused:
                session.truncate(1, timeout=0.1)
            held.attend(1, *rows(1))
        moved = refused.value.moved
        assert moved is not None
        assert (moved.session_id, moved.address, moved.length) == (
            session.id,
            servers[1].address,
            5,
        )


def test_a_session_with_shards_goes_after_its_parts(models: Path, twins: AttentionClient) -> None:
    with (
        chain(models, 3) as servers,
        AttentionClient([server.address for server in servers]) as client,
    ):
        sharded = client.session("half", num_layers=LAYERS, max_tokens=600, shards=Shards(2))
        twin = twins.session("causal", num_layers=LAYERS, max_tokens=600)
        step([(sharded, twin)], 30)
        for server in servers[:2]:
            with draining(server):
                while server.plane.session_ids():
                    step([(sharded, twin)])
            step([(sharded, twin)])
        assert sharded.length == twin.length
        sharded.close()


def test_a_query_that_was_sent_ahead_is_sent_again(models: Path, twins: AttentionClient) -> None:
    with chain(models, 2) as servers, AttentionClient(servers[0].address) as client:
        ones, others = opened(client, twins, 2)
        (session, held), (twin, _) = ones, others
        held.attend(0, *rows(1))
        query, key, value = rows(1)
        with draining(servers[0]):
            while len(servers[0].plane.session_ids()) > 1:
                time.sleep(0.001)
            session._connection.moves._moved.clear()  # as if it had not been told yet
            session.send_query(0, query)
            with pytest.raises(UnavailableError) as refused:
                session.attend_sent(0, key, value)
            assert refused.value.moved is not None
            session.send_query(0, query)
            output = session.attend_sent(0, key, value).output
            np.testing.assert_array_equal(output, twin.attend(0, query, key, value).output)
            held.attend(1, *rows(1))


def test_with_identity_and_tls_by_name(
    models: Path, twins: AttentionClient, tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    files = authority.issue("server")
    tokens = {}
    with (tmp_path / "callers").open("w") as book:
        for name, role in (("mover", "move"), ("chat", "sessions")):
            tokens[name], digest = callers.make_token()
            book.write(f"{name} {role} {digest}\n")
    (tmp_path / "token").write_text(tokens["mover"])
    guarded: dict[str, Any] = {
        "tls_certificate": files.certificate,
        "tls_key": files.key,
        "callers": tmp_path / "callers",
        "move_ca": authority.certificate,
        "move_token_file": tmp_path / "token",
        "drain_seconds": 20,
    }
    with (
        serving(models, **guarded) as last,
        serving(models, **guarded, move_sessions_to=f"dns:///localhost:{last.port}") as first,
        AttentionClient(
            f"localhost:{first.port}",
            root_certificates=authority.certificate,
            metadata={"authorization": f"Bearer {tokens['chat']}"},
        ) as client,
    ):
        ones, others = opened(client, twins, 3)
        pairs = list(zip(ones, others, strict=True))
        step(pairs, 20)
        with draining(first):
            while first.plane.session_ids():
                step(pairs)
        step(pairs)
        assert len(last.plane.session_ids()) == 3
