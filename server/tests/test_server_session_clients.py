"""What both clients do with sessions of a real server: layer models, and asyncio's own."""

import asyncio
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attnserve_client import (
    AsyncAttentionClient,
    AttentionClient,
    CancelledError,
    InvalidArgumentError,
    SessionLayer,
)
from attnserve_export.attention.layer import AttentionLayer, LayerConfig
from attnserve_export.attention.positions import Rotary
from attnserve_export.models import seeded
from attnserve_server.app import AttentionServer
from handmade import attention, write_core, write_layer
from plain_sessions import PlainLayer, PlainSession
from serving import serving

pytestmark = pytest.mark.needs_library

HEADS, KV_HEADS, DIM, VALUE_DIM, EMBED = 4, 2, 8, 6, 24
GENERATOR = np.random.default_rng()
Array = np.ndarray[Any, Any]


def layer(seed: int) -> AttentionLayer:
    """A causal layer of random parameters, with rotary embedding inside."""
    heads = attention(HEADS, DIM, num_kv_heads=KV_HEADS, mask="causal", rotary=Rotary("half", DIM))
    return seeded(AttentionLayer, LayerConfig(heads, EMBED, context_dim=None), seed)


LAYERS = {"first": layer(1), "second": layer(2)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    core = attention(HEADS, DIM, num_kv_heads=KV_HEADS, value_head_dim=VALUE_DIM, mask="causal")
    write_core(folder, "core", core)
    write_core(folder, "latent", dataclasses.replace(core, num_kv_heads=1))
    for name, module in LAYERS.items():
        write_layer(folder, name, module)
    return folder


@pytest.fixture(scope="module")
def server(models: Path) -> Iterator[AttentionServer]:
    with serving(models) as running:
        yield running


def hidden_of(tokens: int) -> Array:
    return GENERATOR.standard_normal((tokens, EMBED)).astype(np.float32)


def heads_of(tokens: int) -> list[Array]:
    shapes = ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, VALUE_DIM))
    return [GENERATOR.standard_normal((tokens, *shape)).astype(np.float32) for shape in shapes]


def test_each_layer_of_a_session_has_its_model(server: AttentionServer) -> None:
    names = ["second", "first"]
    with (
        AttentionClient(f"127.0.0.1:{server.port}") as client,
        client.session(layer_models=names, max_tokens=64) as session,
        client.session(layer_models=[(names[0], 1), names[1]], max_tokens=64) as other,
        client.batch([session, other]) as batch,
    ):
        pasts = [[hidden_of(0) for _ in names] for _ in range(2)]
        for counts in ((5, 2), (1, 1), (20, 1)):
            for number, name in enumerate(names):
                new = [hidden_of(count) for count in counts]
                result = batch.attend(number, hidden_states=new, return_entropy=True)
                assert result.entropy is not None
                assert result.entropy.shape == (sum(counts), HEADS)
                for past, rows, output in zip(pasts, new, result.outputs, strict=True):
                    past[number] = np.concatenate([past[number], rows])
                    whole = client.attend(hidden_states=past[number][None], model=name)
                    assert whole.output is not None
                    want = whole.output[0, -len(rows) :]
                    np.testing.assert_allclose(output, want, atol=1e-5)
        assert (session.length, other.length) == (26, 4)
        with pytest.raises(InvalidArgumentError, match="hidden_states"):
            session.attend(0, *heads_of(1))


def test_weights_of_named_sessions_and_latent_layers(server: AttentionServer) -> None:
    layers = [SessionLayer(latent=True)]
    with AttentionClient(f"127.0.0.1:{server.port}") as client:
        cores = client.sessions(3, "core", num_layers=1, max_tokens=64)
        latents = client.sessions(3, "latent", num_layers=1, max_tokens=64, layers=layers)
        for sessions, latent in ((cores, 0), (latents, VALUE_DIM)):
            plains = [PlainSession([PlainLayer(latent=latent)]) for _ in sessions]
            with client.batch(sessions) as batch:
                for counts in ((20, 1, 5), (1, 1, 17)):
                    query, key, value = ([], [], [])
                    for count, plain in zip(counts, plains, strict=True):
                        arrays = heads_of(count)
                        if latent:
                            arrays = [arrays[0], arrays[1][:, :1].copy()]
                        for each, array in zip((query, key, value), arrays, strict=False):
                            each.append(array)
                        plain.begin(count)
                        plain.attend(0, *arrays)
                        plain.end()
                    result = batch.attend(0, query, key, value or None, return_weights_of=[0, 2])
                    assert result.output is not None
                    for given, plain in zip(result.weights, (plains[0], plains[2]), strict=True):
                        np.testing.assert_allclose(given, plain.weights, atol=1e-5)


def test_queries_of_many_sessions_go_ahead(server: AttentionServer) -> None:
    address = f"127.0.0.1:{server.port}"
    plain = PlainSession([PlainLayer(), PlainLayer()])

    async def ahead(arrays: list[list[list[Array]]]) -> list[Array]:
        outputs = []
        async with (
            AsyncAttentionClient(address) as client,
            await client.session("core", num_layers=2, max_tokens=64) as session,
        ):
            for step in arrays:
                for number, (query, key, value) in enumerate(step):
                    await session.send_query(number, query)
                    result = await session.attend_sent(number, key, value)
                    assert result.output is not None
                    outputs.append(result.output)
                assert result.step_ended
            await session.send_query(0, step[0][1][:, :1])
            with pytest.raises(InvalidArgumentError, match="query"):
                await session.attend_sent(0, step[0][1], step[0][2])
            await session.send_query(0, step[0][0])
            await session.abandon()
            assert session.length == sum(len(step[0][0]) for step in arrays)
        return outputs

    given = [[heads_of(tokens) for _ in range(2)] for tokens in (5, 1, 1)]
    outputs = iter(asyncio.run(ahead(given)))
    with (
        AttentionClient(address) as client,
        client.session("core", num_layers=2, max_tokens=64) as session,
    ):
        for step in given:
            plain.begin(len(step[0][0]))
            for number, (query, key, value) in enumerate(step):
                expected, _, _ = plain.attend(number, query, key, value)
                session.send_query(number, query)
                result = session.attend_sent(number, key, value)
                for output in (result.output, next(outputs)):
                    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-5)
            plain.end()
        assert session.length == plain.length


def test_asyncio_has_sessions_streams_and_shared_memory(server: AttentionServer) -> None:
    async def generate(client: AsyncAttentionClient, tokens: int) -> None:
        plain = PlainSession([PlainLayer(), PlainLayer()])
        async with await client.session("core", num_layers=2, max_tokens=64) as session:
            for count in (tokens, 1, 1):
                plain.begin(count)
                for number in range(2):
                    arrays = heads_of(count)
                    result = await session.attend(number, *arrays)
                    output, _, _ = plain.attend(number, *arrays)
                    np.testing.assert_allclose(result.output, output, atol=1e-5)
                plain.end()
            fork = await session.fork(tokens)
            assert fork.length == tokens
            await fork.truncate(1)
            await fork.close()

    async def main() -> None:
        async with AsyncAttentionClient(
            f"127.0.0.1:{server.port}", shared_memory=True, shared_memory_bytes=8 << 20
        ) as client:
            await asyncio.gather(*(generate(client, tokens) for tokens in (3, 17, 40)))
            query, key, value = (
                np.ascontiguousarray(each.swapaxes(0, 1))[None] for each in heads_of(200)
            )
            shared = await client.attend(query, client.shared(key), value, model="core")
            async with client.stream() as stream:
                futures = [stream.submit(query, key, value, model="core") for _ in range(5)]
                with pytest.raises(TypeError, match="models"):
                    stream.submit(query, key, value, models="core")
                results = await asyncio.gather(*futures)
                refused = stream.submit(query, key, value, model="nope")
                with pytest.raises(LookupError):
                    await refused
            assert client._sharing_now() is not None
            assert client._sharing_now().arena.offset_of(shared.output) is not None
            for result in results:
                np.testing.assert_array_equal(result.output, shared.output)
            with pytest.raises((RuntimeError, CancelledError)):
                stream.submit(query, key, value, model="core")

    asyncio.run(main())


def test_long_chunks_of_a_session_lie_in_shared_memory(server: AttentionServer) -> None:
    address = f"127.0.0.1:{server.port}"
    with (
        AttentionClient(address) as plain,
        AttentionClient(address, shared_memory=True, shared_memory_bytes=32 << 20) as sharing,
    ):
        one, other = (
            client.sessions(2, "core", num_layers=1, max_tokens=4096) for client in (plain, sharing)
        )
        assert sharing._sharing_now() is not None
        arena = sharing._sharing_now().arena
        with plain.batch(one) as sent, sharing.batch(other) as shared:
            for counts in ((700, 500), (1, 2), (600, 900)):
                lists = [list(each) for each in zip(*map(heads_of, counts), strict=True)]
                packed = [np.concatenate(each) for each in lists]
                want = sent.attend(0, *lists, return_log_sum_exp=True, return_entropy=True)
                own = [sharing.shared(array) for array in packed]
                got = [
                    shared.attend(0, *given, **count, return_log_sum_exp=True, return_entropy=True)
                    for given, count in ((lists, {}),)
                ]
                for session in other:
                    session.truncate(session.length - counts[other.index(session)])
                got.append(
                    shared.attend(
                        0, *own, new_tokens=counts, return_log_sum_exp=True, return_entropy=True
                    )
                )
                for result in got:
                    for name in ("output", "log_sum_exp", "entropy"):
                        array = getattr(result, name)
                        np.testing.assert_array_equal(array, getattr(want, name))
                        assert array.flags.writeable
                        assert (arena.offset_of(array) is not None) == (sum(counts) > 100)
                # What a server knows no more is registered again.
                _, region = sharing._sharing_now().known()
                if region is not None:
                    sharing._server_to_stay().transport.unregister_now(region)
        assert [session.length for session in other] == [1301, 1402]
