"""KV sessions end to end: SDK, server and kernels against a plain cache in float64."""

import dataclasses
import io
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from attnserve_client import (
    AttentionClient,
    AttnserveError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    Session,
    SessionLayer,
    UnavailableError,
    page_hashes,
)
from attnserve_proto import attention_pb2 as pb
from attnserve_proto import attention_pb2_grpc as pb_grpc
from attnserve_server.app import AttentionServer
from handmade import attention, write_core
from plain_sessions import PlainLayer, PlainSession
from serving import serving

pytestmark = pytest.mark.needs_library

HEADS, KV_HEADS, DIM, VALUE_DIM = 4, 2, 8, 6
PAGE = 16
GENERATOR = np.random.default_rng()

Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    causal = attention(HEADS, DIM, num_kv_heads=KV_HEADS, value_head_dim=VALUE_DIM, mask="causal")
    write_core(folder, "llama", causal)
    write_core(folder, "half", causal, dtype="FP16")
    write_core(folder, "windowed", dataclasses.replace(causal, window=20))
    write_core(folder, "encoder", attention(HEADS, DIM))
    return folder


@pytest.fixture(scope="module")
def server(models: Path) -> Iterator[AttentionServer]:
    with serving(models) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: AttentionServer) -> Iterator[AttentionClient]:
    with AttentionClient(f"127.0.0.1:{server.port}") as client:
        yield client


def random(tokens: int, dtype: Any = np.float32) -> tuple[Array, Array, Array]:
    """Query, key and value of so many tokens."""
    shapes = ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, VALUE_DIM))
    query, key, value = (
        GENERATOR.standard_normal((tokens, *shape)).astype(dtype) for shape in shapes
    )
    return query, key, value


def plain_of(layers: Sequence[SessionLayer], count: int) -> PlainSession:
    each = layers if len(layers) == count else list(layers or [SessionLayer()]) * count
    return PlainSession(
        [PlainLayer(layer.window or 0, layer.kept_first, layer.cross) for layer in each]
    )


def step(
    session: Session,
    plain: PlainSession,
    tokens: int,
    parents: Sequence[int] | None = None,
    tolerance: float = 1e-5,
    dtype: Any = np.float32,
) -> None:
    """A step of random tokens through all layers, compared with the plain one."""
    plain.begin(tokens, parents)
    for layer in range(len(plain.layers)):
        arrays = random(tokens, dtype)
        result = session.attend(
            layer, *arrays, parents=parents, return_log_sum_exp=True, return_entropy=True
        )
        output, log_sum_exp, entropy = plain.attend(layer, *arrays)
        assert result.output is not None
        assert result.output.dtype == dtype
        np.testing.assert_allclose(result.output, output, atol=tolerance, rtol=tolerance)
        np.testing.assert_allclose(result.log_sum_exp, log_sum_exp, atol=tolerance * 4)
        np.testing.assert_allclose(result.entropy, entropy, atol=tolerance * 4)
    plain.end()
    assert session.length == plain.length


def test_steps_of_any_lengths_give_what_one_long_attention_gives(client: AttentionClient) -> None:
    plain = plain_of([], 3)
    with client.session("llama", num_layers=3, max_tokens=400) as session:
        for tokens in (1, 1, PAGE - 2, PAGE, 100, 1, 1, 3 * PAGE + 5, *[1] * 20):
            step(session, plain, tokens)


@pytest.mark.parametrize(
    ("cache_dtype", "tolerance"),
    [("fp32", 1e-5), ("fp16", 2e-3), ("bf16", 2e-2), ("int8", 4e-2), ("fp8", 2e-1)],
)
def test_caches_of_each_dtype(client: AttentionClient, cache_dtype: str, tolerance: float) -> None:
    plain = plain_of([], 2)
    with client.session("llama", num_layers=2, max_tokens=128, cache_dtype=cache_dtype) as session:
        for tokens in (40, 1, 1, 20, 1):
            step(session, plain, tokens, tolerance=tolerance)


def test_a_model_of_half_precision(client: AttentionClient) -> None:
    plain = plain_of([], 2)
    with client.session("half", num_layers=2, max_tokens=128) as session:
        for tokens in (40, 1, 20, 1):
            step(session, plain, tokens, tolerance=4e-3, dtype=np.float16)


def test_windows_and_kept_first_keys(client: AttentionClient) -> None:
    layers = [
        SessionLayer(window=24),
        SessionLayer(window=7, kept_first=5),
        SessionLayer(),
        SessionLayer(window=1),
    ]
    plain = plain_of(layers, 4)
    with client.session("llama", num_layers=4, max_tokens=700, layers=layers) as session:
        for tokens in (5, 60, *[1] * 40, 200, 3, 130, 1, 1):
            step(session, plain, tokens)


def test_a_window_is_the_models_unless_said_otherwise(client: AttentionClient) -> None:
    for layers, same in (([], SessionLayer(window=20)), ([SessionLayer(window=0)], SessionLayer())):
        plain = plain_of([same], 2)
        with client.session("windowed", num_layers=2, max_tokens=128, layers=layers) as session:
            for tokens in (50, 1, 30):
                step(session, plain, tokens)


def test_trees_and_what_is_kept_of_them(client: AttentionClient) -> None:
    layers = [SessionLayer(), SessionLayer(window=10)]
    plain = plain_of(layers, 2)
    parents = [-1, 0, 0, 1, 2, -1, 5]
    with client.session("llama", num_layers=2, max_tokens=128, layers=layers) as session:
        for accepted in ([0, 2, 4], [], [5], [0, 1, 3], [5, 6]):
            step(session, plain, 13)
            step(session, plain, len(parents), parents)
            if accepted == [5]:
                with pytest.raises(InvalidArgumentError):
                    session.commit([0, 6])
                with pytest.raises(FailedPreconditionError):
                    session.attend(0, *random(1))
            session.commit(accepted)
            plain.commit(accepted)
            assert session.length == plain.length
        step(session, plain, 1)
        with pytest.raises(FailedPreconditionError):
            session.commit([0])


def test_forks_go_their_own_ways(client: AttentionClient) -> None:
    plain = plain_of([], 2)
    with client.session("llama", num_layers=2, max_tokens=256) as session:
        step(session, plain, 3 * PAGE + 5)
        branches = [(session, plain)]
        for at in (0, PAGE - 1, 2 * PAGE, 3 * PAGE + 2, None):
            fork = session.fork(at)
            branches.append((fork, plain.fork(plain.length if at is None else at)))
        for _ in range(3):
            for one, other in branches:
                step(one, other, 7)
        for fork, _ in branches[1:]:
            fork.close()
        step(session, plain, 1)


def test_truncated_sessions_go_on(client: AttentionClient) -> None:
    layers = [SessionLayer(), SessionLayer(window=9)]
    plain = plain_of(layers, 2)
    with client.session("llama", num_layers=2, max_tokens=256, layers=layers) as session:
        for length in (30, 17, 16, 1):
            step(session, plain, 40)
            session.truncate(max(length, plain.length - 60))
            plain.truncate(max(length, plain.length - 60))
            assert session.length == plain.length
        step(session, plain, 5)
        with pytest.raises(InvalidArgumentError):
            session.truncate(session.length + 1)
        step(session, plain, 1)


@pytest.mark.parametrize("model", ["llama", "encoder"])
def test_cross_layers_are_written_once(client: AttentionClient, model: str) -> None:
    cross, own = SessionLayer(cross=True), SessionLayer()
    layers = [cross, cross] if model == "encoder" else [own, cross]
    kv_heads, value_dim = (HEADS, DIM) if model == "encoder" else (KV_HEADS, VALUE_DIM)
    plain = plain_of(layers, 2)
    with client.session(
        model, num_layers=2, max_tokens=64, layers=layers, cross_tokens=40
    ) as session:
        for number, tokens in enumerate((3, 1, 1)):
            plain.begin(tokens)
            for layer, spec in enumerate(layers):
                query = random(tokens)[0]
                rows = tokens if not spec.cross else 37
                keys: list[Array] = [
                    GENERATOR.standard_normal((rows, kv_heads, dim)).astype(np.float32)
                    for dim in (DIM, value_dim)
                ]
                if spec.cross and number:
                    keys = []
                result = session.attend(layer, query, *keys, cross_tokens=0 if number else 37)
                expected, _, _ = plain.attend(layer, query, *keys)
                np.testing.assert_allclose(result.output, expected, atol=1e-5, rtol=1e-5)
            plain.end()


def test_a_batch_gives_what_its_sessions_give_alone(client: AttentionClient) -> None:
    count, num_layers = 6, 2
    sessions = client.sessions(count, "llama", num_layers=num_layers, max_tokens=300)
    plains = [plain_of([], num_layers) for _ in range(count)]
    with client.batch(sessions) as batch:
        for number in range(5):
            lengths = [1 if (number + each) % 3 else 40 + each for each in range(count)]
            for plain, length in zip(plains, lengths, strict=True):
                plain.begin(length)
            for layer in range(num_layers):
                arrays = random(sum(lengths))
                result = batch.attend(layer, *arrays, new_tokens=lengths)
                ends = np.cumsum([0, *lengths])
                for plain, output, (first, last) in zip(
                    plains, result.outputs, pairwise(ends), strict=True
                ):
                    expected, _, _ = plain.attend(layer, *(a[first:last] for a in arrays))
                    np.testing.assert_allclose(output, expected, atol=1e-5, rtol=1e-5)
            for plain in plains:
                plain.end()
        assert [session.length for session in sessions] == [plain.length for plain in plains]
    for session in sessions:
        session.close()


def test_a_prefix_is_found_and_shared(client: AttentionClient) -> None:
    page_tokens = client.server_info().limits.session_page_tokens
    ids = GENERATOR.integers(0, 1 << 40, 5 * page_tokens + 3)
    hashes = page_hashes(ids, page_tokens)
    prompt = [random(len(ids)) for _ in range(2)]
    more = random(1)
    with client.session("llama", num_layers=2, max_tokens=256) as first:
        for layer in range(2):
            first.attend(layer, *prompt[layer], prefix_hashes=hashes)
        others = [bytes(32)]
        for asked, pages in ((hashes, 5), (hashes[:2] + others, 2), (others + hashes, 0)):
            with client.session(
                "llama", num_layers=2, max_tokens=256, prefix_hashes=asked
            ) as second:
                assert second.length == pages * page_tokens
                for layer in range(2):
                    second.attend(layer, *(a[second.length :] for a in prompt[layer]))
                results = [second.attend(layer, *more).output for layer in range(2)]
        expected = [first.attend(layer, *more).output for layer in range(2)]
        for one, other in zip(results, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)


def test_a_session_is_saved_and_loaded_elsewhere(client: AttentionClient, models: Path) -> None:
    layers = [SessionLayer(), SessionLayer(window=9, kept_first=3)]
    plain = plain_of(layers, 2)
    file = io.BytesIO()
    with client.session("llama", num_layers=2, max_tokens=256, layers=layers) as session:
        step(session, plain, 75)
        client.save(session, file)
        copy = plain.fork(plain.length)
        step(session, plain, 2)
    with serving(models) as other, AttentionClient(f"127.0.0.1:{other.port}") as elsewhere:
        file.seek(0)
        with elsewhere.load(file) as loaded:
            assert (loaded.length, loaded.max_tokens, loaded.num_layers) == (75, 256, 2)
            step(loaded, copy, 3)
        changed = bytearray(file.getvalue())
        changed[-5] ^= 1
        with pytest.raises(AttnserveError) as caught:
            elsewhere.load(io.BytesIO(bytes(changed)))
        assert caught.value.code == grpc.StatusCode.DATA_LOSS


def test_sessions_that_are_gone_are_not_found(client: AttentionClient) -> None:
    session = client.session("llama", num_layers=1, max_tokens=64)
    session.attend(0, *random(1))
    session.close()
    with pytest.raises(NotFoundError):
        session.attend(0, *random(1))
    with pytest.raises(NotFoundError):
        session.renew()
    short = client.session("llama", num_layers=1, max_tokens=64, lease=0.05)
    assert short.lease == 0.05
    time.sleep(0.2)
    with pytest.raises(NotFoundError):
        short.renew()


def test_what_is_refused_leaves_the_session_unharmed(client: AttentionClient) -> None:
    plain = plain_of([], 2)
    with client.session("llama", num_layers=2, max_tokens=32) as session:
        step(session, plain, 20)
        arrays = random(2)
        query, key, value = arrays
        plain.begin(2)
        with pytest.raises(InvalidArgumentError, match=r"query\.shape"):
            session.attend(0, query[:, :2], key, value)
        expected, _, _ = plain.attend(0, *arrays)
        np.testing.assert_allclose(session.attend(0, *arrays).output, expected, atol=1e-5)
        with pytest.raises(InvalidArgumentError, match="layer"):
            session.attend(0, *arrays)
        with pytest.raises(InvalidArgumentError, match=r"layer: given 2; allowed: 0\.\.1"):
            session.attend(2, *arrays)
        with pytest.raises(FailedPreconditionError):
            session.truncate(3)
        expected, _, _ = plain.attend(1, *arrays)
        np.testing.assert_allclose(session.attend(1, *arrays).output, expected, atol=1e-5)
        plain.end()
        with pytest.raises(ResourceExhaustedError):
            session.attend(0, *random(11))
        step(session, plain, 10)


def test_an_abandoned_step_never_was(client: AttentionClient) -> None:
    layers = [SessionLayer(window=5), SessionLayer()]
    plain = plain_of(layers, 2)
    with client.session("llama", num_layers=2, max_tokens=256, layers=layers) as session:
        step(session, plain, 40)
        session.attend(0, *random(50))
        session.abandon()
        assert session.length == 40
        step(session, plain, 3)


def test_more_than_the_store_holds_is_refused_at_once(client: AttentionClient) -> None:
    with pytest.raises(ResourceExhaustedError):
        client.session("llama", num_layers=1024, max_tokens=1 << 24)
    plain = plain_of([], 1)
    with client.session("llama", num_layers=1, max_tokens=1 << 24, reserved_tokens=64) as session:
        step(session, plain, 100)


def test_models_that_keep_no_sessions_say_so(client: AttentionClient) -> None:
    with pytest.raises(FailedPreconditionError, match="encoder is not causal"):
        client.session("encoder", num_layers=1, max_tokens=64)
    with pytest.raises(NotFoundError):
        client.session("nope", num_layers=1, max_tokens=64)


def test_a_lost_connection_costs_the_step_and_not_the_session(client: AttentionClient) -> None:
    plain = plain_of([], 2)
    with client.session("llama", num_layers=2, max_tokens=64) as session:
        step(session, plain, 5)
        session.attend(0, *random(3))
        session._connection.streams.get()._call.cancel()
        with pytest.raises(AttnserveError, match=r"its sessions are there, of lengths \[5\]"):
            session.attend(1, *random(3))
        step(session, plain, 2)


def test_a_server_that_was_started_anew_has_no_sessions(models: Path) -> None:
    with serving(models) as first:
        port = first.port
        client = AttentionClient(f"127.0.0.1:{port}")
        session = client.session("llama", num_layers=1, max_tokens=64)
        session.attend(0, *random(1))
    with serving(models, port=port), client:
        with pytest.raises((NotFoundError, UnavailableError)):
            session.attend(0, *random(1))
        with pytest.raises(NotFoundError):
            session.renew()


def tensor(array: Array) -> pb.Tensor:
    return pb.Tensor(dtype=pb.FP32, shape=array.shape, data=array.tobytes())


def test_query_may_come_before_key_and_value_and_steps_overlap(server: AttentionServer) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = pb_grpc.AttentionServiceStub(channel)
        opening = pb.OpenSessions(
            model="llama", num_layers=1, sessions=[pb.NewSession(max_tokens=64)] * 2
        )
        (answer,) = stub.Decode(iter([pb.DecodeRequest(request_id=1, open=opening)]))
        ids = [session.session_id for session in answer.opened.sessions]
        arrays = [random(4), random(2)]
        requests = [
            pb.DecodeRequest(
                request_id=1 + number,
                begin_step=pb.BeginStep(
                    step_id=7 + number,
                    sessions=[pb.SessionStep(session_id=name, new_tokens=len(each[0]))],
                ),
            )
            for number, (name, each) in enumerate(zip(ids, arrays, strict=True))
        ]
        parts: list[list[pb.AttendLayer]] = []
        for number, (query, key, value) in enumerate(arrays):
            parts.append(
                [
                    pb.AttendLayer(step_id=7 + number, query=tensor(query)),
                    pb.AttendLayer(step_id=7 + number, key=tensor(key), value=tensor(value)),
                ]
            )
        for request_id, part in (
            (3, parts[0][0]),
            (4, parts[1][1]),
            (4, parts[1][0]),
            (3, parts[0][1]),
        ):
            requests.append(pb.DecodeRequest(request_id=request_id, attend_layer=part))
        answers = {answer.request_id: answer for answer in stub.Decode(iter(requests))}
        assert sorted(answers) == [1, 2, 3, 4]
        for request_id, each in zip((3, 4), arrays, strict=True):
            attended = answers[request_id].attended
            plain = plain_of([], 1)
            plain.begin(len(each[0]))
            expected, _, _ = plain.attend(0, *each)
            output = np.frombuffer(attended.output.data, np.float32).reshape(expected.shape)
            np.testing.assert_allclose(output, expected, atol=1e-5)
            assert attended.step_ended
        closing = [
            pb.DecodeRequest(request_id=1 + at, close=pb.CloseSession(session_id=name))
            for at, name in enumerate(ids)
        ]
        assert all(a.WhichOneof("result") == "done" for a in stub.Decode(iter(closing)))


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([pb.DecodeRequest(request_id=0, close=pb.CloseSession(session_id="a"))], "request_id"),
        (
            [pb.DecodeRequest(request_id=n, close=pb.CloseSession(session_id="a")) for n in (2, 1)],
            "request_id",
        ),
        ([pb.DecodeRequest(request_id=1)], "action"),
    ],
)
def test_what_breaks_the_protocol_ends_the_stream(
    server: AttentionServer, requests: list[pb.DecodeRequest], message: str
) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = pb_grpc.AttentionServiceStub(channel)
        with pytest.raises(grpc.RpcError, match=message) as caught:
            list(stub.Decode(iter(requests)))
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]
