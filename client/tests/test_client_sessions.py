"""KV sessions of the blocking SDK against a server that has its cache in NumPy and misbehaves."""

import io
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
from attnserve_client import (
    AttentionClient,
    CancelledError,
    DeadlineExceededError,
    InvalidArgumentError,
    NotFoundError,
    SessionLayer,
    UnavailableError,
    page_hashes,
)
from attnserve_proto import attention_pb2 as pb
from plain_sessions import PlainLayer, PlainSession
from session_server import (
    HEADS,
    LAYERS,
    VALUE_DIM,
    Array,
    BreakError,
    Look,
    NumpyServer,
    array_of,
    broken_once,
    random,
    serving_sessions,
)


@pytest.fixture(autouse=True, params=["direct", "public"], scope="module")
def call(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each kind of call; the public one as if grpc had not what the other stands on."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "public":
            patch.setitem(sys.modules, "attnserve_client._direct_call", None)
        yield


@contextmanager
def served(look: Look = lambda request: None) -> Iterator[tuple[NumpyServer, AttentionClient]]:
    with serving_sessions(look) as (service, address), AttentionClient(address) as client:
        yield service, client


GENERATOR = np.random.default_rng()


def test_a_session_takes_steps_of_all_layers() -> None:
    plain = PlainSession([PlainLayer() for _ in range(LAYERS)])
    with (
        served() as (service, client),
        client.session("m", num_layers=LAYERS, max_tokens=64) as session,
    ):
        for tokens in (5, 1, 3):
            plain.begin(tokens)
            for layer in range(LAYERS):
                arrays = random(GENERATOR, tokens)
                result = session.attend(
                    layer, *arrays, return_log_sum_exp=True, return_entropy=True
                )
                output, log_sum_exp, entropy = plain.attend(layer, *arrays)
                assert result.output is not None
                assert result.output.flags.writeable
                np.testing.assert_allclose(result.output, output, rtol=1e-5, atol=1e-6)
                np.testing.assert_allclose(result.log_sum_exp, log_sum_exp, rtol=1e-5)
                np.testing.assert_allclose(result.entropy, entropy, rtol=1e-4, atol=1e-5)
                assert result.step_ended == (layer == LAYERS - 1)
            plain.end()
            assert session.length == plain.length
        assert list(service.sessions) == [session.id]
    assert not service.sessions


def test_elements_travel_aligned_and_are_asked_for_alone() -> None:
    with (
        served() as (service, client),
        client.session("m", num_layers=1, max_tokens=64) as session,
    ):
        for tokens in range(1, 40):
            arrays = random(GENERATOR, tokens)
            result = session.attend(0, *arrays, return_output=False, return_entropy=True)
            assert result.output is None
            assert result.log_sum_exp is None
            assert result.outputs == []
            assert result.entropy is not None
            sent = service.requests[-1].attend_layer
            for tensor, array in zip((sent.query, sent.key, sent.value), arrays, strict=True):
                np.testing.assert_array_equal(array_of(tensor), array)


def test_weights_of_named_sessions_come_beside_the_output() -> None:
    plains = [PlainSession([PlainLayer()]) for _ in range(3)]
    with served() as (_, client):
        sessions = client.sessions(3, "m", num_layers=1, max_tokens=64)
        with client.batch(sessions) as batch:
            for counts in ([3, 1, 4], [1, 2, 1]):
                parts = [random(GENERATOR, count) for count in counts]
                lists = [list(each) for each in zip(*parts, strict=True)]
                result = batch.attend(0, *lists, return_weights_of=[0, 2])
                for plain, count, part in zip(plains, counts, parts, strict=True):
                    plain.begin(count)
                    plain.attend(0, *part)
                    plain.end()
                for given, plain in zip(result.weights, (plains[0], plains[2]), strict=True):
                    np.testing.assert_allclose(given, plain.weights, rtol=1e-4, atol=1e-6)
                    assert given.flags.writeable
        alone = sessions[0].attend(0, *random(GENERATOR, 2), return_weights=True)
        assert [each.shape for each in alone.weights] == [(2, HEADS, 6)]
        assert sessions[0].attend(0, *random(GENERATOR, 2)).weights == []


def test_a_latent_layer_takes_no_value() -> None:
    plain = PlainSession([PlainLayer(latent=VALUE_DIM)])
    layers = [SessionLayer(latent=True)]
    with (
        served() as (service, client),
        client.session("m", num_layers=1, max_tokens=64, layers=layers) as session,
    ):
        assert service.requests[0].open.layers[0].latent
        for tokens in (4, 1, 2):
            query, key, _ = random(GENERATOR, tokens)
            plain.begin(tokens)
            expected, _, _ = plain.attend(0, query, key)
            plain.end()
            result = session.attend(0, query, key)
            np.testing.assert_allclose(result.output, expected, rtol=1e-5, atol=1e-6)


def test_layer_models_and_their_hidden_states_are_told_to_the_server() -> None:
    with served() as (service, client):
        session = client.session(layer_models=["a", ("b", 2)], max_tokens=8)
        assert session.num_layers == 2
        assert service.requests[0].open == pb.OpenSessions(
            num_layers=2,
            layer_models=[pb.ModelOfLayer(model="a"), pb.ModelOfLayer(model="b", version="2")],
            sessions=[pb.NewSession(max_tokens=8)],
        )
        hidden = GENERATOR.standard_normal((3, 5)).astype(np.float32)
        with pytest.raises(InvalidArgumentError):  # this server has none
            session.attend(0, hidden_states=hidden)
        sent = service.requests[-1].attend_layer.hidden_states
        np.testing.assert_array_equal(array_of(sent), hidden)
        with pytest.raises(ValueError, match=r"hidden_states: shape \[3, 5, 1\]; allowed: \[T"):
            session.attend(0, hidden_states=hidden[..., None])
        with pytest.raises(ValueError, match="query: not given"):
            session.attend(0)
        with pytest.raises(ValueError, match="num_layers 3; allowed"):
            client.session(layer_models=["a", "b"], num_layers=3, max_tokens=8)


def test_a_batch_steps_sessions_of_different_lengths() -> None:
    with served() as (service, client):
        first, second = client.sessions(2, "m", num_layers=LAYERS, max_tokens=64)
        alone = client.session("m", num_layers=LAYERS, max_tokens=64)
        with client.batch([first, second]) as batch:
            for counts in ([4, 2], [1, 3]):
                for layer in range(LAYERS):
                    parts = [random(GENERATOR, count) for count in counts]
                    lists = [list(each) for each in zip(*parts, strict=True)]
                    packed = [np.concatenate(each) for each in lists]
                    if counts[0] == 4:
                        result = batch.attend(layer, *lists)
                    else:
                        result = batch.attend(layer, *packed, new_tokens=counts)
                    expected = alone.attend(layer, *parts[1])
                    assert result.starts == (0, counts[0], sum(counts))
                    assert [len(each) for each in result.outputs] == counts
                    np.testing.assert_array_equal(result.outputs[1], expected.output)
            assert (first.length, second.length) == (5, 5)
            with pytest.raises(ValueError, match="new_tokens: \\[1, 1\\] for 2 sessions"):
                batch.attend(0, *random(GENERATOR, 3))
            batch.attend(0, *random(GENERATOR, 2))  # one each
        assert service.requests[-1].WhichOneof("action") == "abandon_step"
        assert (first.length, second.length) == (5, 5)


def test_queries_go_ahead_of_their_keys_and_values() -> None:
    with served() as (service, client):
        sessions = client.sessions(2, "m", num_layers=LAYERS, max_tokens=64)
        alone = client.session("m", num_layers=LAYERS, max_tokens=64)
        with client.batch(sessions) as batch:
            for count in (3, 1):
                for layer in range(LAYERS):
                    query, key, value = random(GENERATOR, count)
                    halves = [np.concatenate([each, each]) for each in (query, key, value)]
                    batch.send_query(layer, halves[0], return_entropy=True)
                    with pytest.raises(ValueError, match="was sent ahead; allowed: attend_sent"):
                        batch.attend(layer, *halves)
                    with pytest.raises(ValueError, match="was sent; allowed: attend_sent"):
                        batch.send_query(layer, halves[0])
                    expected = alone.attend(layer, query, key, value)  # other requests in between
                    result = batch.attend_sent(layer, halves[1], halves[2])
                    for output in result.outputs:
                        np.testing.assert_array_equal(output, expected.output)
                    assert result.entropy is not None
                    parts = [
                        r.attend_layer for r in service.requests if r.HasField("attend_layer")
                    ][-3::2]
                    assert [part.HasField("key") for part in parts] == [False, True]
                    assert [part.HasField("query") for part in parts] == [True, False]
            assert [session.length for session in sessions] == [4, 4]
            with pytest.raises(ValueError, match="layer: 0, whose query was not sent"):
                batch.attend_sent(0, *random(GENERATOR, 2)[1:])
            with pytest.raises(ValueError, match="layer: 1 without a step"):
                batch.send_query(1, random(GENERATOR, 2)[0])
            with pytest.raises(ValueError, match="query: not given"):
                batch.send_query(0, None)
            batch.send_query(0, random(GENERATOR, 2)[0])
        assert service.requests[-1].WhichOneof("action") == "abandon_step"


def test_what_is_wrong_with_queries_is_said_when_the_rest_was_sent() -> None:
    with (
        served() as (_, client),
        client.session("m", num_layers=LAYERS, max_tokens=64) as session,
    ):
        query, key, value = random(GENERATOR, 2)
        for layer in range(LAYERS):
            session.send_query(layer, key)
            with pytest.raises(InvalidArgumentError, match=r"query\.shape"):
                session.attend_sent(layer, key, value)
            session.send_query(layer, query)
            session.attend_sent(layer, key, value)
        assert session.length == 2


def test_a_step_whose_query_was_sent_is_lost_with_its_stream() -> None:
    breaking: list[int] = []

    def look(request: pb.DecodeRequest) -> None:
        if breaking and request.HasField("attend_layer") and request.attend_layer.HasField("key"):
            breaking.clear()
            raise BreakError(grpc.StatusCode.UNAVAILABLE)

    with (
        served(look) as (service, client),
        client.session("m", num_layers=LAYERS, max_tokens=64) as session,
    ):
        query, key, value = random(GENERATOR, 2)
        for layers in range(LAYERS):
            for layer in range(layers):
                session.attend(layer, query, key, value)
            session.send_query(layers, query)
            breaking.append(1)
            with pytest.raises(UnavailableError, match="its sessions are there, of lengths"):
                session.attend_sent(layers, key, value)
            service.sessions[session.id].truncate(0)  # as a server does when a stream ends
        for layer in range(LAYERS):
            session.send_query(layer, query)
            assert session.attend_sent(layer, key, value).output is not None
        assert session.length == 2


def test_a_tree_is_committed() -> None:
    parents = [-1, 0, 0, 1]
    plain = PlainSession([PlainLayer() for _ in range(LAYERS)])
    with (
        served() as (_, client),
        client.session("m", num_layers=LAYERS, max_tokens=64) as session,
    ):
        for given in (None, parents, None):
            plain.begin(4, given)
            for layer in range(LAYERS):
                arrays = random(GENERATOR, 4)
                result = session.attend(layer, *arrays, parents=given)
                expected, _, _ = plain.attend(layer, *arrays)
                np.testing.assert_allclose(result.output, expected, rtol=1e-5, atol=1e-6)
            plain.end()
            if given:
                assert session.length == 4
                session.commit([0, 2])
                plain.commit([0, 2])
            assert session.length == plain.length
        assert session.length == 10


def test_forks_and_truncated_sessions_go_on_from_where_they_are() -> None:
    with served() as (_, client), client.session("m", num_layers=1, max_tokens=64) as session:
        arrays = [random(GENERATOR, 1) for _ in range(8)]
        for each in arrays[:6]:
            session.attend(0, *each)
        with session.fork(4) as fork, session.fork() as whole:
            assert (fork.length, whole.length, fork.max_tokens) == (4, 6, 4096)
            session.truncate(4)
            assert session.length == 4
            one, other = (s.attend(0, *arrays[6]).output for s in (fork, session))
            np.testing.assert_array_equal(one, other)
        session.renew(lease=5.0)
        assert session.lease == 30.0


def test_layers_are_told_to_the_server() -> None:
    layers = [SessionLayer(window=8, kept_first=2), SessionLayer(cross=True), SessionLayer()]
    with served() as (service, client):
        session = client.session(
            "m",
            num_layers=3,
            max_tokens=64,
            version=2,
            layers=layers,
            cache_dtype="int8",
            reserved_tokens=32,
            cross_tokens=9,
            lease=1.5,
        )
        assert service.requests[0].open == pb.OpenSessions(
            model="m",
            version="2",
            num_layers=3,
            layers=[pb.LayerSpec(window=8, kept_first=2), pb.LayerSpec(cross=True), pb.LayerSpec()],
            cache_type=pb.CACHE_INT8,
            lease=1_500_000,
            sessions=[pb.NewSession(max_tokens=64, reserved_tokens=32, cross_tokens=9)],
        )
        query, key, value = random(GENERATOR, 3)
        _, far_key, far_value = random(GENERATOR, 9)
        session.attend(0, query, key, value, cross_tokens=9)
        assert service.requests[-1].attend_layer.begin.sessions[0].cross_tokens == 9
        assert session.attend(1, query, far_key, far_value).output is not None
        assert session.attend(2, query, key, value).step_ended
        session.attend(0, query, key, value)
        assert session.attend(1, query).output is not None
        with pytest.raises(ValueError, match="cache_dtype: given 'fp4'; allowed: 'fp32', "):
            client.session("m", num_layers=1, max_tokens=64, cache_dtype="fp4")


def test_pages_have_hashes() -> None:
    hashes = page_hashes(range(40), 16)
    assert [len(each) for each in hashes] == [32, 32]
    assert hashes == page_hashes(range(32), 16)
    assert hashes[1] == page_hashes(range(16, 32), 16)[0] != hashes[0]
    with served() as (service, client):
        session = client.session("m", num_layers=1, max_tokens=64, prefix_hashes=hashes)
        session.attend(0, *random(GENERATOR, 16), prefix_hashes=hashes[:1])
        assert service.requests[0].open.sessions[0].prefix_hashes == b"".join(hashes)
        assert service.requests[1].attend_layer.begin.sessions[0].prefix_hashes == hashes[0]
        with pytest.raises(ValueError, match="prefix_hashes: one of 3 bytes"):
            client.session("m", num_layers=1, max_tokens=64, prefix_hashes=[b"abc"])


def test_a_refused_layer_can_be_sent_again() -> None:
    with (
        served() as (_, client),
        client.session("m", num_layers=LAYERS, max_tokens=64) as session,
    ):
        query, key, value = random(GENERATOR, 2)
        with pytest.raises(ValueError, match="layer: 1 without a step"):
            session.attend(1, query, key, value)
        with pytest.raises(ValueError, match=r"query: shape \[2, 32\]; allowed: \[T, heads, dim\]"):
            session.attend(0, query.reshape(2, -1), key, value)
        with pytest.raises(InvalidArgumentError, match=r"query\.shape"):
            session.attend(0, key, key, value)
        session.attend(0, query, key, value)
        session.attend(1, query, key, value)
        assert session.length == 2


def test_a_refused_step_has_not_begun() -> None:
    with served() as (service, client), client.session("m", num_layers=1, max_tokens=64) as session:
        kept = service.sessions.pop(session.id)
        with pytest.raises(NotFoundError, match=session.id):
            session.attend(0, *random(GENERATOR, 1))
        service.sessions[session.id] = kept
        assert session.attend(0, *random(GENERATOR, 1)).step_ended


def test_a_step_that_had_not_begun_is_repeated_after_a_lost_connection() -> None:
    with (
        served(broken_once("attend_layer")) as (_, client),
        client.session("m", num_layers=LAYERS, max_tokens=64) as session,
    ):
        for layer in range(LAYERS):
            session.attend(layer, *random(GENERATOR, 2))
        assert session.length == 2


def test_a_step_that_is_lost_says_that_its_sessions_are_not() -> None:
    layers = []

    def look(request: pb.DecodeRequest) -> None:
        layers.extend([request.attend_layer.layer] if request.HasField("attend_layer") else [])
        if layers == [0, 1, 0, 1]:
            layers.append(-1)
            raise BreakError(grpc.StatusCode.UNAVAILABLE)

    with (
        served(look) as (service, client),
        client.session("m", num_layers=LAYERS, max_tokens=64) as session,
    ):
        arrays = random(GENERATOR, 2)
        for layer in (0, 1, 0):
            session.attend(layer, *arrays)
        with pytest.raises(UnavailableError, match=r"its sessions are there, of lengths \[2\]"):
            session.attend(1, *arrays)
        service.sessions[session.id].truncate(2)  # as a server does when a stream ends
        for layer in (0, 1):
            session.attend(layer, *arrays)
        assert session.length == 4


def test_a_step_that_may_have_ended_is_not_repeated() -> None:
    with served() as (service, client), client.session("m", num_layers=1, max_tokens=64) as session:

        def end_and_break(request: pb.DecodeRequest) -> None:
            if request.HasField("attend_layer"):
                service._look = lambda _: None
                service.sessions[session.id].begin(2)
                service.sessions[session.id].end()
                raise BreakError(grpc.StatusCode.UNAVAILABLE)

        service._look = end_and_break
        with pytest.raises(UnavailableError, match=r"of lengths \[2\]"):
            session.attend(0, *random(GENERATOR, 2))
        assert session.length == 2


def test_a_session_lost_with_its_server_is_not_found() -> None:
    with served() as (service, client), client.session("m", num_layers=1, max_tokens=64) as session:

        def forget(request: pb.DecodeRequest) -> None:
            if request.attend_layer.HasField("begin"):
                service.sessions.clear()
                raise BreakError(grpc.StatusCode.UNAVAILABLE)

        service._look = forget
        with pytest.raises(NotFoundError, match=f"sessions lost: {session.id}"):
            session.attend(0, *random(GENERATOR, 2))


def test_a_step_without_a_server_ends_with_its_timeout_and_is_not_repeated_unasked() -> None:
    def away(request: pb.DecodeRequest) -> None:
        raise BreakError(grpc.StatusCode.UNAVAILABLE)

    with served() as (service, client):
        session, other = client.sessions(2, "m", num_layers=LAYERS, max_tokens=64)
        other.attend(0, *random(GENERATOR, 2))
        service._look = away
        for each, layer in ((session, 0), (other, 1)):
            asked, began = len(service.requests), time.monotonic()
            with pytest.raises(UnavailableError):
                each.attend(layer, *random(GENERATOR, 2), timeout=0.2)
            assert time.monotonic() - began < 10
            actions = [request.WhichOneof("action") for request in service.requests[asked:]]
            assert actions.count("attend_layer") == (each is session)
            assert "renew" in actions


def test_no_answer_in_time_loses_the_step() -> None:
    released = threading.Event()

    def look(request: pb.DecodeRequest) -> None:
        if request.attend_layer.layer == 1:
            released.wait(20)

    with (
        served(look) as (_, client),
        client.session("m", num_layers=LAYERS, max_tokens=64) as session,
    ):
        session.attend(0, *random(GENERATOR, 1))
        try:
            with pytest.raises(DeadlineExceededError, match="its sessions are there"):
                session.attend(1, *random(GENERATOR, 1), timeout=0.2)
        finally:
            released.set()


def test_threads_share_the_stream() -> None:
    with served() as (_, client):

        def generate(seed: int) -> Array:
            generator = np.random.default_rng(seed)
            with client.session("m", num_layers=LAYERS, max_tokens=64) as session:
                for step in range(10):
                    for layer in range(LAYERS):
                        result = session.attend(layer, *random(generator, 1 + step % 2))
            assert result.output is not None
            return result.output

        alone = [generate(seed) for seed in range(4)]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(generate, range(4)))
        for one, other in zip(alone, together, strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_session_is_saved_and_loaded(tmp_path: Path) -> None:
    with served() as (_, client), client.session("m", num_layers=1, max_tokens=64) as session:
        session.attend(0, *random(GENERATOR, 3))
        path = tmp_path / "session"
        file = io.BytesIO()
        client.save(session, path)
        client.save(session, file)
        assert path.read_bytes() == file.getvalue()
        assert list(tmp_path.iterdir()) == [path]
        file.seek(0)
        with client.load(path) as one, client.load(file, max_tokens=9) as other:
            assert (one.length, one.model, one.num_layers) == (3, "m", 1)
            arrays = random(GENERATOR, 1)
            np.testing.assert_array_equal(
                one.attend(0, *arrays).output, other.attend(0, *arrays).output
            )
        with pytest.raises(ValueError, match="no saved session: its first line"):
            client.load(io.BytesIO(b"something else\n"))
        with pytest.raises(ValueError, match="in the middle of a chunk"):
            client.load(io.BytesIO(file.getvalue()[:-1]))
        lacking = io.BytesIO(file.getvalue()[: -4 * 9])  # four chunks of a byte
        with pytest.raises(InvalidArgumentError):
            client.load(lacking)


def test_a_client_that_was_closed_opens_no_session() -> None:
    with served() as (_, client):
        client.session("m", num_layers=1, max_tokens=64)
        client.close()
        with pytest.raises(CancelledError, match="closed"):
            client.session("m", num_layers=1, max_tokens=64)
