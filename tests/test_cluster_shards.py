"""One KV session over several real servers, by heads and by context, against float64."""

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attnserve_client import (
    AsyncAttentionClient,
    AttentionClient,
    AttnserveError,
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    SessionLayer,
    Shards,
)
from handmade import attention, write_core
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import serving

Array = np.ndarray[Any, Any]
# Of what one server computes; a session by heads over n has n times as many heads.
HEADS, KV_HEADS, DIM, VALUE_DIM = 4, 2, 8, 6
BY = ["heads", "context"]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    grouped = {"num_kv_heads": KV_HEADS, "value_head_dim": VALUE_DIM, "mask": "causal"}
    write_core(folder, "core", attention(HEADS, DIM, **grouped))
    write_core(folder, "alibi", attention(HEADS, DIM, alibi=True, **grouped))
    write_core(folder, "window", attention(HEADS, DIM, window=4, **grouped))
    return folder


@pytest.fixture(scope="module")
def addresses(repository: Path) -> Iterator[list[str]]:
    """Three servers in this process: the ones of their own are in test_cluster.py."""
    with ExitStack() as stack:
        servers = [stack.enter_context(serving(repository)) for _ in range(3)]
        yield [f"127.0.0.1:{server.port}" for server in servers]


@pytest.fixture(scope="module")
def client(addresses: list[str]) -> Iterator[AttentionClient]:
    with AttentionClient(addresses) as client:
        yield client


class Reference:
    """Causal attention over all tokens so far, in float64, of each layer."""

    def __init__(self, num_layers: int, sinks: Array | None = None) -> None:
        self.keys: list[list[Array]] = [[] for _ in range(num_layers)]
        self.values: list[list[Array]] = [[] for _ in range(num_layers)]
        self.sinks = sinks

    def attend(
        self, layer: int, query: Array, key: Array, value: Array, parents: Any = None
    ) -> tuple[Array, Array]:
        """Output [T, H, Dv] and log-sum-exp [T, H]; the tokens are added."""
        before = len(self.keys[layer])
        self.keys[layer] += list(key.astype(float))
        self.values[layer] += list(value.astype(float))
        group = query.shape[1] // key.shape[1]
        keys = np.stack(self.keys[layer]).repeat(group, axis=1)
        values = np.stack(self.values[layer]).repeat(group, axis=1)
        scores = np.einsum("thd,khd->thk", query.astype(float), keys) / DIM**0.5
        for token in range(len(query)):
            seen, at = {token}, token
            while parents is not None and (at := parents[at]) >= 0:
                seen.add(at)
            if parents is None:
                seen = set(range(token + 1))
            hidden = [before + each for each in range(len(query)) if each not in seen]
            scores[token, :, hidden] = -np.inf
        if self.sinks is not None:
            sink = np.broadcast_to(self.sinks[None, :, None], (*scores.shape[:2], 1))
            scores = np.concatenate([scores, sink], axis=2)
        highest = scores.max(axis=2, keepdims=True)
        weights = np.exp(scores - highest)
        total = weights.sum(axis=2, keepdims=True)
        shares = (weights / total)[:, :, : len(keys)]
        return np.einsum("thk,khd->thd", shares, values), (highest + np.log(total))[..., 0]

    def truncate(self, length: int) -> None:
        """Keep the first tokens."""
        for each in (*self.keys, *self.values):
            del each[length:]


def tensors(generator: np.random.Generator, tokens: int, times: int) -> list[Array]:
    """Query, key and value of `times` as many heads as a server has."""
    shapes = ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, VALUE_DIM))
    return [
        generator.standard_normal((tokens, times * heads, dim)).astype(np.float32)
        for heads, dim in shapes
    ]


def times(shards: Shards) -> int:
    return shards.count if shards.by == "heads" else 1


def step(session: Any, reference: Reference, given: list[list[Array]], **options: Any) -> None:
    """A step of all layers, compared."""
    for layer, arrays in enumerate(given):
        result = session.attend(layer, *arrays, return_log_sum_exp=True, **options)
        output, log_sum_exp = reference.attend(layer, *arrays, parents=options.get("parents"))
        np.testing.assert_allclose(result.output, output, rtol=2e-5, atol=2e-6)
        np.testing.assert_allclose(result.log_sum_exp, log_sum_exp, rtol=2e-5, atol=2e-6)
        assert result.step_ended == (layer == len(given) - 1)


@settings(max_examples=12)
@given(
    by=st.sampled_from(BY),
    count=st.integers(2, 3),
    num_layers=st.integers(1, 3),
    steps=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    seed=st.integers(0, 1 << 30),
    sinks=st.booleans(),
)
def test_steps_are_those_of_one_session(
    client: AttentionClient,
    by: str,
    count: int,
    num_layers: int,
    steps: list[int],
    seed: int,
    sinks: bool,
) -> None:
    generator, shards = np.random.default_rng(seed), Shards(count, by)
    logits = generator.standard_normal(HEADS * times(shards)) if sinks else None
    layers = None if logits is None else [SessionLayer(sinks=list(logits))]
    options = {"max_tokens": 512, "layers": layers, "shards": shards}
    with client.session("core", num_layers=num_layers, **options) as session:
        reference = Reference(num_layers, logits)
        for tokens in steps:
            step(
                session,
                reference,
                [tensors(generator, tokens, times(shards)) for _ in range(num_layers)],
            )
            assert session.length == len(reference.keys[0])


@pytest.mark.parametrize("by", BY)
def test_forks_truncation_and_trees(client: AttentionClient, by: str) -> None:
    generator, shards = np.random.default_rng(1), Shards(2, by)

    def new(tokens: int) -> list[list[Array]]:
        return [tensors(generator, tokens, times(shards)) for _ in range(2)]

    with client.session("core", num_layers=2, max_tokens=128, shards=shards) as session:
        reference = Reference(2)
        for tokens in (20, 7, 3, 1):
            step(session, reference, new(tokens))
        with session.fork(at=24) as fork:
            assert fork.length == 24
            other = Reference(2)
            other.keys = [each[:24] for each in reference.keys]
            other.values = [each[:24] for each in reference.values]
            step(fork, other, new(5))
            step(session, reference, new(2))
            assert (fork.length, session.length) == (29, 33)
        session.truncate(25)
        reference.truncate(25)
        step(session, reference, new(4))
        parents = [-1, 0, 0, 2]
        step(session, reference, new(4), parents=parents)
        assert session.length == 29
        session.commit([0, 2, 3])
        for each in (*reference.keys, *reference.values):
            del each[30]
        assert session.length == 32
        step(session, reference, new(3))
        session.truncate(0)
        reference.truncate(0)
        step(session, reference, new(3))
        session.renew(lease=60.0)


def test_context_is_spread(client: AttentionClient) -> None:
    generator = np.random.default_rng(2)
    options = {"num_layers": 1, "max_tokens": 300, "shards": Shards(3, "context")}
    with client.session("core", **options) as session:
        for _ in range(60):
            session.attend(0, *tensors(generator, 5, 1))
        assert [part.length for part in session._parts] == [100, 100, 100]  # type: ignore[attr-defined]
        assert session.reserved_tokens == 100


def test_a_step_that_one_shard_refuses_is_given_up_at_all(client: AttentionClient) -> None:
    generator = np.random.default_rng(3)
    for by in BY:
        shards = Shards(2, by)
        with client.session("core", num_layers=1, max_tokens=64, shards=shards) as session:
            reference = Reference(1)
            step(session, reference, [tensors(generator, 10, times(shards))])
            step(session, reference, [tensors(generator, 10, times(shards))])
            with pytest.raises(AttnserveError, match=r"max_tokens.* \(server 127") as refused:
                session.attend(0, *tensors(generator, 60, times(shards)))
            assert refused.value.server in client.servers
            assert session.length == 20
            step(session, reference, [tensors(generator, 3, times(shards))])


@pytest.mark.parametrize("by", BY)
def test_what_ends_at_some_shards_only_is_said_and_mended(
    client: AttentionClient, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    generator, shards = np.random.default_rng(5), Shards(2, by)

    def given(tokens: int) -> list[list[Array]]:
        return [tensors(generator, tokens, times(shards))]

    with client.session("core", num_layers=1, max_tokens=64, shards=shards) as session:
        reference = Reference(1)
        for _ in range(4):
            step(session, reference, given(5))
        (_, last) = session._flows.parts

        def fail(*_: Any, **__: Any) -> Any:
            raise DeadlineExceededError("no answer in time", method="Decode")
            yield

        with monkeypatch.context() as patch:
            patch.setattr(last, "truncate", fail)
            with pytest.raises(DeadlineExceededError):
                session.truncate(7)
        for call in (lambda: session.attend(0, *given(1)[0]), session.fork):
            with pytest.raises(FailedPreconditionError, match=r"truncate to (7|10) or less first"):
                call()
        kept = session.length
        session.truncate(kept)
        reference.truncate(kept)
        step(session, reference, given(3))
        assert session.length == kept + 3


@pytest.mark.parametrize("by", BY)
def test_a_cancelled_step_is_given_up_at_all_shards(addresses: list[str], by: str) -> None:
    async def work() -> None:
        generator, shards, reference = np.random.default_rng(6), Shards(2, by), Reference(1)
        async with AsyncAttentionClient(addresses) as client:
            session = await client.session("core", num_layers=1, max_tokens=900, shards=shards)
            for _ in range(100):
                before = session.length
                arrays = tensors(generator, 2, times(shards))
                task = asyncio.create_task(session.attend(0, *arrays))
                await asyncio.sleep(generator.random() * 0.003)
                task.cancel()
                try:
                    output = (await task).output
                except asyncio.CancelledError:
                    await session.abandon()
                    if session.length > before:  # it had ended at all of them
                        await session.truncate(before)
                else:
                    expected, _ = reference.attend(0, *arrays)
                    np.testing.assert_allclose(output, expected, rtol=2e-5, atol=2e-6)
            await session.close()

    asyncio.run(work())


def test_an_asyncio_session_over_several_servers(addresses: list[str]) -> None:
    async def work(by: str) -> None:
        generator, shards, reference = np.random.default_rng(4), Shards(2, by), Reference(1)
        async with (
            AsyncAttentionClient(addresses) as client,
            await client.session("core", num_layers=1, max_tokens=64, shards=shards) as session,
        ):
            for tokens in (9, 1, 4):
                arrays = tensors(generator, tokens, times(shards))
                output, _ = reference.attend(0, *arrays)
                result = await session.attend(0, *arrays)
                np.testing.assert_allclose(result.output, output, rtol=2e-5, atol=2e-6)
            await session.truncate(5)
            assert session.length == 5

    for by in BY:
        asyncio.run(work(by))


@pytest.mark.parametrize(
    ("shards", "options", "said"),
    [
        (Shards(4), {}, r"shards.count: given 4; allowed: 2 to 3, the servers of this client"),
        (Shards(1), {}, r"shards.count"),
        (Shards(2, "rows"), {}, r"shards.by: given 'rows'"),
        (Shards(2), {"model": "alibi"}, r"by heads of model 'alibi', which has ALiBi"),
        (Shards(2, "context"), {"model": "window"}, r"which has a window"),
        (
            Shards(2, "context"),
            {"layers": [SessionLayer(window=4)]},
            r"which has a window, of tokens that may be at other servers",
        ),
        (Shards(2, "context"), {"layers": [SessionLayer(cross=True)]}, r"layers\[0\].cross"),
        (Shards(2, "context"), {"prefix_hashes": [bytes(32)]}, r"prefix_hashes: given with shards"),
        (Shards(2), {"layer_models": ["a"]}, r"layer_models: given with shards"),
    ],
)
def test_what_cannot_be_laid_over_servers_is_refused_with_the_reason(
    client: AttentionClient, shards: Shards, options: dict[str, Any], said: str
) -> None:
    given = {"model": "core", "num_layers": 1, "max_tokens": 64} | options
    with pytest.raises(ValueError, match=said):
        client.session(**given, shards=shards)


def test_what_a_session_over_servers_does_not_do_is_refused_by_name(
    client: AttentionClient, tmp_path: Path, addresses: list[str]
) -> None:
    generator = np.random.default_rng(5)
    with client.session(
        "core", num_layers=1, max_tokens=64, shards=Shards(2, "context")
    ) as session:
        arrays = tensors(generator, 2, 1)
        with pytest.raises(ValueError, match="return_entropy: given by a session with shards"):
            session.attend(0, *arrays, return_entropy=True)
        with pytest.raises(ValueError, match="not saved"):
            client.save(session, tmp_path / "session")
        with pytest.raises(ValueError, match="one with shards; allowed: without"):
            client.batch([session])
        with pytest.raises(ValueError, match="send_query"):
            session.send_query(0, arrays[0])
    with client.session("core", num_layers=1, max_tokens=64, shards=Shards(2)) as session:
        with pytest.raises(ValueError, match=r"query: shape \[2, 3, 8\]; allowed: .* of 2"):
            session.attend(0, np.ones((2, 3, DIM), np.float32))
        with pytest.raises(ValueError, match="query: not given"):
            session.attend(0, hidden_states=np.ones((2, 3), np.float32))
    with (
        AttentionClient(addresses[0]) as single,
        pytest.raises(ValueError, match=r"shards: given .* a client of several servers"),
    ):
        single.session("core", num_layers=1, max_tokens=64, shards=Shards(2))


def test_queries_alone_add_nothing(client: AttentionClient) -> None:
    generator = np.random.default_rng(6)
    with client.session("core", num_layers=2, max_tokens=64) as session:
        query, key, value = tensors(generator, 12, 1)
        with pytest.raises(InvalidArgumentError, match="with queries_only: a session that holds"):
            session.attend(0, query, queries_only=True)
        for layer in range(2):
            session.attend(layer, query, key, value)
        more = tensors(generator, 3, 1)[0]
        wide = np.concatenate([key, np.zeros_like(key)]).astype(float)
        for layer in range(2):
            result = session.attend(
                layer, more, queries_only=True, return_weights=True, return_log_sum_exp=True
            )
            scores = np.einsum("thd,khd->thk", more.astype(float), wide[:12].repeat(2, 1))
            scores /= DIM**0.5
            weights = np.exp(scores - scores.max(2, keepdims=True))
            weights /= weights.sum(2, keepdims=True)
            np.testing.assert_allclose(result.weights[0], weights, rtol=2e-4, atol=2e-6)
            expected = np.einsum("thk,khd->thd", weights, value.astype(float).repeat(2, 1))
            np.testing.assert_allclose(result.output, expected, rtol=2e-5, atol=2e-6)
        assert result.step_ended
        session.renew()
        assert session.length == 12
        with pytest.raises(InvalidArgumentError, match="parents: given 3; allowed: none with quer"):
            session.attend(0, more, queries_only=True, parents=[-1, 0, 1])
        with pytest.raises(InvalidArgumentError, match="key: given a tensor; allowed: nothing"):
            session.attend(0, query, key, value, queries_only=True)
    with client.session("window", num_layers=1, max_tokens=64) as session:
        session.attend(0, query, key, value)
        with pytest.raises(FailedPreconditionError, match="has in layer 0 a window"):
            session.attend(0, query, queries_only=True)
