"""KV sessions, streams and shared memory of the asyncio client, against real grpc servers."""

import asyncio
import inspect
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc
import numpy as np
import pytest
from attnserve_client import (
    AsyncAttentionClient,
    AsyncBatch,
    AsyncSession,
    AttentionClient,
    Batch,
    CancelledError,
    DeadlineExceededError,
    InvalidArgumentError,
    NotFoundError,
    Session,
    UnavailableError,
)
from attnserve_proto import attention_pb2 as pb
from plain_sessions import PlainLayer, PlainSession
from session_server import (
    LAYERS,
    BreakError,
    Look,
    NumpyServer,
    broken_once,
    random,
    serving_sessions,
)

Test = Callable[[NumpyServer, AsyncAttentionClient], Awaitable[None]]

GENERATOR = np.random.default_rng()


def run(test: Test, look: Look = lambda request: None) -> None:
    """Run a test against a server of its own."""

    async def main(service: NumpyServer, address: str) -> None:
        async with AsyncAttentionClient(address) as client:
            await test(service, client)

    with serving_sessions(look) as (service, address):
        asyncio.run(main(service, address))


def test_both_clients_have_the_same_calls_with_the_same_arguments() -> None:
    for one, other in (
        (AttentionClient, AsyncAttentionClient),
        (Session, AsyncSession),
        (Batch, AsyncBatch),
    ):
        names = {name for name in dir(one) if not name.startswith("_")}
        assert names == {name for name in dir(other) if not name.startswith("_")}
        for name in names - {"batch", "stream"}:
            each, awaited = getattr(one, name), getattr(other, name)
            assert each.__doc__
            if isinstance(each, property):
                continue
            parameters = inspect.signature(each).parameters
            assert list(parameters) == list(inspect.signature(awaited).parameters)
    assert inspect.signature(AttentionClient) == inspect.signature(AsyncAttentionClient)


def test_steps_forks_trees_and_truncation() -> None:
    async def test(service: NumpyServer, client: AsyncAttentionClient) -> None:
        plain = PlainSession([PlainLayer() for _ in range(LAYERS)])
        async with await client.session("m", num_layers=LAYERS, max_tokens=64) as session:
            parents = [-1, 0, 0, 1]
            for given in (None, parents, None):
                plain.begin(4, given)
                for layer in range(LAYERS):
                    arrays = random(GENERATOR, 4)
                    result = await session.attend(
                        layer, *arrays, parents=given, return_log_sum_exp=True
                    )
                    output, log_sum_exp, _ = plain.attend(layer, *arrays)
                    np.testing.assert_allclose(result.output, output, rtol=1e-5, atol=1e-6)
                    np.testing.assert_allclose(result.log_sum_exp, log_sum_exp, rtol=1e-5)
                plain.end()
                if given:
                    await session.commit([0, 2])
                    plain.commit([0, 2])
                assert session.length == plain.length
            async with await session.fork(3) as fork:
                assert isinstance(fork, AsyncSession)
                assert (fork.length, session.length) == (3, 10)
            await session.truncate(2)
            await session.renew()
            assert session.length == 2
            _query, key, value = random(GENERATOR, 1)
            with pytest.raises(InvalidArgumentError, match="query"):
                await session.attend(0, key, key, value)
        assert not service.sessions

    run(test)


def test_batches_of_many_tasks_share_the_stream() -> None:
    async def test(service: NumpyServer, client: AsyncAttentionClient) -> None:
        async def generate(seed: int) -> np.ndarray:
            generator = np.random.default_rng(seed)
            sessions = await client.sessions(2, "m", num_layers=LAYERS, max_tokens=64)
            async with client.batch(sessions) as batch:
                for _ in range(3):
                    for layer in range(LAYERS):
                        result = await batch.attend(layer, *random(generator, 4))
            assert [session.length for session in sessions] == [6, 6]
            assert result.output is not None
            return result.output

        alone = [await generate(seed) for seed in range(3)]
        together = await asyncio.gather(*(generate(seed) for seed in range(3)))
        for one, other in zip(alone, together, strict=True):
            np.testing.assert_array_equal(one, other)

    run(test)


def test_sessions_are_saved_and_loaded(tmp_path: Path) -> None:
    async def test(service: NumpyServer, client: AsyncAttentionClient) -> None:
        session = await client.session("m", num_layers=1, max_tokens=64)
        await session.attend(0, *random(GENERATOR, 3))
        await client.save(session, tmp_path / "session")
        loaded = await client.load(tmp_path / "session")
        assert (loaded.length, loaded.model, loaded.num_layers) == (3, "m", 1)
        arrays = random(GENERATOR, 1)
        one, other = [await each.attend(0, *arrays) for each in (session, loaded)]
        np.testing.assert_array_equal(one.output, other.output)
        (tmp_path / "other").write_bytes((tmp_path / "session").read_bytes()[:-1])
        with pytest.raises(ValueError, match="in the middle of a chunk"):
            await client.load(tmp_path / "other")
        await loaded.close()
        with pytest.raises(NotFoundError):
            await client.save(loaded, tmp_path / "none")
        assert not list(tmp_path.glob("none*"))

    run(test)


def test_a_step_that_had_not_begun_is_repeated_after_a_lost_connection() -> None:
    async def test(service: NumpyServer, client: AsyncAttentionClient) -> None:
        session = await client.session("m", num_layers=LAYERS, max_tokens=64)
        for layer in range(LAYERS):
            await session.attend(layer, *random(GENERATOR, 2))
        assert session.length == 2

    run(test, broken_once("attend_layer"))


def test_a_step_that_is_lost_says_that_its_sessions_are_not() -> None:
    async def test(service: NumpyServer, client: AsyncAttentionClient) -> None:
        session = await client.session("m", num_layers=LAYERS, max_tokens=64)
        arrays = random(GENERATOR, 2)
        await session.attend(0, *arrays)

        def look(request: pb.DecodeRequest) -> None:
            if request.HasField("attend_layer"):
                service._look = lambda _: None
                raise BreakError(grpc.StatusCode.UNAVAILABLE)

        service._look = look
        with pytest.raises(UnavailableError, match=r"its sessions are there, of lengths \[0\]"):
            await session.attend(1, *arrays)
        service.sessions[session.id].truncate(0)  # as a server does when a stream ends
        for layer in (0, 1):
            await session.attend(layer, *arrays)
        assert session.length == 2

    run(test)


def test_no_answer_in_time_loses_the_step() -> None:
    released = threading.Event()

    def look(request: pb.DecodeRequest) -> None:
        if request.attend_layer.layer == 1:
            released.wait(20)

    async def test(service: NumpyServer, client: AsyncAttentionClient) -> None:
        session = await client.session("m", num_layers=LAYERS, max_tokens=64)
        await session.attend(0, *random(GENERATOR, 1))
        try:
            with pytest.raises(DeadlineExceededError, match="its sessions are there"):
                await session.attend(1, *random(GENERATOR, 1), timeout=0.2)
        finally:
            released.set()

    run(test, look)


def test_a_cancelled_task_leaves_a_step_that_can_be_abandoned() -> None:
    released, seen = threading.Event(), threading.Event()

    def look(request: pb.DecodeRequest) -> None:
        if request.HasField("attend_layer") and not released.is_set():
            seen.set()
            released.wait(20)

    async def test(service: NumpyServer, client: AsyncAttentionClient) -> None:
        session = await client.session("m", num_layers=LAYERS, max_tokens=64)
        task = asyncio.ensure_future(session.attend(0, *random(GENERATOR, 2)))
        await asyncio.to_thread(seen.wait, 20)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        released.set()
        await session.abandon()
        assert session.length == 0
        for layer in range(LAYERS):
            await session.attend(layer, *random(GENERATOR, 3))
        assert session.length == 3

    run(test, look)


def test_a_client_that_was_closed_opens_no_session() -> None:
    async def test(service: NumpyServer, client: AsyncAttentionClient) -> None:
        await client.session("m", num_layers=1, max_tokens=64)
        await client.close()
        with pytest.raises(CancelledError, match="closed"):
            await client.session("m", num_layers=1, max_tokens=64)

    run(test)
