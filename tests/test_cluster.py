"""The SDK over three real servers: killed, drained, added and removed while they are called."""

import asyncio
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attnserve_client import (
    AsyncAttentionClient,
    AttentionClient,
    AttnserveError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    Session,
)
from plain_sessions import PlainLayer, PlainSession
from serving import DIM, HEADS, ServerProcess, eventually, process, serving, write_causal

Array = np.ndarray[Any, Any]
OPTIONS = ("--max-kv-mib", "8")


class Servers:
    """Three servers of their own, that can be ended and replaced."""

    def __init__(self, stack: ExitStack, repository: Path) -> None:
        self._stack = stack
        self._repository = repository
        with ThreadPoolExecutor(3) as pool:
            self._running = list(pool.map(lambda _: self._start(0), range(3)))

    def _start(self, port: int) -> ServerProcess:
        return self._stack.enter_context(process(self._repository, *OPTIONS, port=port))

    @property
    def addresses(self) -> list[str]:
        """Of the three."""
        return [each.address for each in self._running]

    def end(self, index: int, how: signal.Signals) -> None:
        """End one by a signal."""
        self._running[index].popen.send_signal(how)
        self._running[index].popen.wait(20)

    def replace(self, index: int) -> None:
        """Start one anew where it was."""
        self._running[index] = self._start(self._running[index].port)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_causal(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def servers(repository: Path) -> Iterator[Servers]:
    with ExitStack() as stack:
        yield Servers(stack, repository)


def all_serve(client: AttentionClient) -> bool:
    return eventually(lambda: set(client.server_states.values()) == {"serving"})


def tensors(generator: np.random.Generator) -> tuple[Array, Array, Array]:
    query, key, value = generator.standard_normal((3, 1, HEADS, 8, DIM)).astype(np.float32)
    return query, key, value


def expected(query: Array, key: Array, value: Array) -> Array:
    """Causal attention in float64."""
    scores = query.astype(float) @ key.astype(float).swapaxes(-1, -2) / DIM**0.5
    scores[..., np.triu(np.ones(scores.shape[-2:], bool), 1)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    result: Array = weights / weights.sum(-1, keepdims=True) @ value
    return result


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_no_call_is_lost_with_a_server_and_its_replacement_is_found(
    servers: Servers, how: signal.Signals
) -> None:
    stop = threading.Event()

    def call(client: AttentionClient, seed: int) -> int:
        generator, calls = np.random.default_rng(seed), 0
        while not stop.is_set():
            given = tensors(generator)
            result = client.attend(*given, model="causal", timeout=10.0)
            np.testing.assert_allclose(result.output, expected(*given), rtol=2e-4, atol=2e-5)
            calls += 1
        return calls

    with AttentionClient(servers.addresses) as client, ThreadPoolExecutor(4) as pool:
        assert all_serve(client)
        callers = [pool.submit(call, client, seed) for seed in range(4)]
        time.sleep(0.2)
        servers.end(1, how)
        gone = servers.addresses[1]
        assert eventually(lambda: client.server_states[gone] != "serving")
        servers.replace(1)
        assert eventually(lambda: client.server_states[gone] == "serving", 3)
        stop.set()
        assert all(caller.result(20) > 10 for caller in callers)


def test_no_asyncio_call_is_lost_with_a_server(servers: Servers) -> None:
    async def call(client: AsyncAttentionClient, seed: int, until: float) -> int:
        generator, calls = np.random.default_rng(seed), 0
        while time.monotonic() < until:
            given = tensors(generator)
            result = await client.attend(*given, model="causal", timeout=10.0)
            np.testing.assert_allclose(result.output, expected(*given), rtol=2e-4, atol=2e-5)
            calls += 1
        return calls

    async def work() -> None:
        async with AsyncAttentionClient(servers.addresses) as client:
            until = time.monotonic() + 0.8
            callers = [asyncio.create_task(call(client, seed, until)) for seed in range(4)]
            await asyncio.sleep(0.3)
            servers.end(2, signal.SIGKILL)
            assert min(await asyncio.gather(*callers)) > 10

    asyncio.run(work())
    servers.replace(2)


def step(session: Session, generator: np.random.Generator) -> Array | None:
    query, key, value = generator.standard_normal((3, 1, HEADS, DIM)).astype(np.float32)
    return session.attend(0, query, key, value).output


def test_sessions_stay_where_they_are_and_one_that_is_lost_says_so(servers: Servers) -> None:
    generator = np.random.default_rng(1)
    with AttentionClient(servers.addresses) as client:
        assert all_serve(client)
        sessions = [client.session("causal", num_layers=1, max_tokens=64) for _ in range(12)]
        places: dict[Any, list[Session]] = {}
        for session in sessions:
            step(session, generator)
            places.setdefault(session._connection, []).append(session)
        assert sorted(len(each) for each in places.values())[0] >= 2
        lost_at = next(iter(places))
        server = cluster_server(client, lost_at)
        index = servers.addresses.index(server)
        servers.end(index, signal.SIGKILL)
        servers.replace(index)
        for connection, there in places.items():
            for session in there:
                if connection is lost_at:
                    with pytest.raises(NotFoundError, match="session"):
                        step(session, generator)
                else:
                    step(session, generator)
                    assert session.length == 2
        for session in sessions:
            session.close()


def cluster_server(client: AttentionClient, connection: Any) -> str:
    assert client._cluster is not None
    member = client._cluster.of(lambda server: server.connection is connection)
    assert member is not None
    return member.server.address


def spread(client: AttentionClient, count: int, num_layers: int) -> list[Session]:
    """Sessions of several servers, not in the order of these."""
    assert all_serve(client)
    sessions = [
        client.session("causal", num_layers=num_layers, max_tokens=64) for _ in range(count)
    ]
    assert len({each._connection for each in sessions}) > 1
    return sessions


def ragged(generator: np.random.Generator, counts: list[int]) -> list[list[Array]]:
    """Query, key and value of each session."""
    return [
        [generator.standard_normal((count, HEADS, DIM)).astype(np.float32) for count in counts]
        for _ in range(3)
    ]


@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_of_several_servers_is_split_and_joined_in_order(
    servers: Servers, packed: bool
) -> None:
    generator = np.random.default_rng(7)
    with AttentionClient(servers.addresses) as client:
        sessions = spread(client, 7, 2)
        plains = [PlainSession([PlainLayer(), PlainLayer()]) for _ in sessions]
        with client.batch(sessions) as batch:
            for counts in ([1, 4, 2, 3, 1, 5, 2], [1] * 7, [2, 1, 1, 1, 2, 1, 1]):
                for plain, count in zip(plains, counts, strict=True):
                    plain.begin(count)
                for layer in range(2):
                    lists = ragged(generator, counts)
                    given = [np.concatenate(each) for each in lists] if packed else lists
                    result = batch.attend(
                        layer,
                        *given,
                        new_tokens=counts if packed and layer == 0 else None,
                        return_log_sum_exp=True,
                        return_weights_of=[1, 4, 6],
                    )
                    assert result.starts == (0, *np.cumsum(counts))
                    assert result.step_ended == (layer == 1)
                    wanted = [
                        plain.attend(layer, *each)
                        for plain, *each in zip(plains, *lists, strict=True)
                    ]
                    for index, (output, (expected_output, log, _)) in enumerate(
                        zip(result.outputs, wanted, strict=True)
                    ):
                        np.testing.assert_allclose(output, expected_output, rtol=2e-4, atol=2e-5)
                        assert result.log_sum_exp is not None
                        rows = slice(result.starts[index], result.starts[index + 1])
                        np.testing.assert_allclose(result.log_sum_exp[rows], log, rtol=1e-4)
                    for index, weights in zip([1, 4, 6], result.weights, strict=True):
                        np.testing.assert_allclose(weights, plains[index].weights, atol=2e-5)
                for plain in plains:
                    plain.end()
        assert [each.length for each in sessions] == [each.length for each in plains]
        for session in sessions:
            session.close()


def test_a_step_that_one_server_fails_is_given_up_at_all(servers: Servers) -> None:
    generator = np.random.default_rng(8)
    with AttentionClient(servers.addresses) as client:
        sessions = spread(client, 5, 1)
        with client.batch(sessions) as batch:
            batch.attend(0, *ragged(generator, [2] * 5))
            sessions[2].truncate(0)
            sessions[2].attend(0, *(each[0] for each in ragged(generator, [60])))
            with pytest.raises(ResourceExhaustedError, match="max_tokens"):
                batch.attend(0, *ragged(generator, [5] * 5))
            for session in sessions:
                session.renew()
            assert [each.length for each in sessions] == [2, 2, 60, 2, 2]
            with pytest.raises(InvalidArgumentError):  # of all of them
                batch.attend(0, *(np.ones((5, HEADS + 1, DIM), np.float32) for _ in range(3)))
            batch.attend(0, *ragged(generator, [1] * 5))
            with pytest.raises(ValueError, match="rows in"):
                batch.attend(0, np.ones((5, HEADS, DIM)), np.ones((4, HEADS, DIM)))
        for session in sessions:
            session.close()


def test_queries_sent_ahead_of_several_servers(servers: Servers) -> None:
    generator = np.random.default_rng(9)
    with AttentionClient(servers.addresses) as client:
        sessions = spread(client, 4, 1)
        plains = [PlainSession([PlainLayer()]) for _ in sessions]
        with client.batch(sessions) as batch:
            for counts in ([3, 1, 2, 2], [1, 1, 1, 1]):
                queries, keys, values = ragged(generator, counts)
                batch.send_query(0, queries)
                outputs = batch.attend_sent(0, keys, values).outputs
                for plain, count, output, *each in zip(
                    plains, counts, outputs, queries, keys, values, strict=True
                ):
                    plain.begin(count)
                    np.testing.assert_allclose(
                        output, plain.attend(0, *each)[0], rtol=2e-4, atol=2e-5
                    )
                    plain.end()
        for session in sessions:
            session.close()


def test_an_asyncio_batch_of_several_servers(servers: Servers) -> None:
    async def work() -> None:
        generator = np.random.default_rng(10)
        async with AsyncAttentionClient(servers.addresses) as client:
            sessions = [
                await client.session("causal", num_layers=1, max_tokens=64) for _ in range(6)
            ]
            async with client.batch(sessions) as batch:
                lists = ragged(generator, [2] * 6)
                result = await batch.attend(0, *lists)
            for output, *each in zip(result.outputs, *lists, strict=True):
                plain = PlainSession([PlainLayer()])
                plain.begin(2)
                np.testing.assert_allclose(output, plain.attend(0, *each)[0], rtol=2e-4, atol=2e-5)
            for session in sessions:
                await session.close()

    asyncio.run(work())


def test_a_saved_session_moves_to_another_server(servers: Servers, tmp_path: Path) -> None:
    generator = np.random.default_rng(2)
    with AttentionClient(servers.addresses) as client:
        session = client.session("causal", num_layers=1, max_tokens=64)
        step(session, generator)
        client.save(session, tmp_path / "session")
        copies = [client.load(tmp_path / "session") for _ in range(6)]
        assert {each.length for each in copies} == {1}
        assert len({each._connection for each in (session, *copies)}) > 1
        outputs = []
        for each in (session, *copies):
            outputs.append(step(each, np.random.default_rng(3)))
            each.close()
        for output in outputs:
            np.testing.assert_allclose(output, outputs[0], rtol=1e-5)


def test_what_one_server_lacks_others_do(
    servers: Servers, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A server without the model, and one without sessions, beside one that has both."""
    generator = np.random.default_rng(4)
    empty = tmp_path_factory.mktemp("empty")
    with (
        serving(empty) as without,
        AttentionClient([f"127.0.0.1:{without.port}", servers.addresses[0]]) as client,
    ):
        for _ in range(20):
            client.attend(*tensors(generator), model="causal")
            client.get_model("causal")
            client.session("causal", num_layers=1, max_tokens=8).close()
        assert [model.name for model in client.list_models()] == ["causal"]
        with pytest.raises(NotFoundError, match="nope"):
            client.attend(*tensors(generator), model="nope")


def test_memory_is_shared_with_each_server(servers: Servers) -> None:
    generator = np.random.default_rng(5)
    with AttentionClient(servers.addresses, shared_memory=True) as client:
        assert all_serve(client)
        for _ in range(12):
            given = tensors(generator)
            query, key, value = (client.shared(each) for each in given)
            result = client.attend(query, key, value, model="causal")
            np.testing.assert_allclose(result.output, expected(*given), rtol=2e-4, atol=2e-5)


def test_an_asyncio_stream_is_on_one_server(servers: Servers) -> None:
    async def work() -> None:
        generator = np.random.default_rng(6)
        async with AsyncAttentionClient(servers.addresses) as client:
            await client.server_info()
            async with client.stream() as stream:
                given = [tensors(generator) for _ in range(10)]
                futures = [stream.submit(*each, model="causal") for each in given]
                for each, result in zip(given, await asyncio.gather(*futures), strict=True):
                    np.testing.assert_allclose(result.output, expected(*each), rtol=2e-4, atol=2e-5)

    asyncio.run(work())


def test_a_client_without_servers_left_says_how_each_is(servers: Servers) -> None:
    with AttentionClient([servers.addresses[0], "127.0.0.1:1"]) as client:
        assert client.server_info().state == "serving"
        client.servers = ["127.0.0.1:1"]
        with pytest.raises(AttnserveError, match=r"127\.0\.0\.1:1: UNAVAILABLE"):
            client.server_info(timeout=0.5)
