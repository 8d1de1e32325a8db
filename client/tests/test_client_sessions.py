"""KV sessions of the SDK against a real grpc server that has its cache in NumPy and misbehaves."""

import io
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
from attnserve_proto import attention_pb2_grpc as pb_grpc
from plain_sessions import PlainLayer, PlainSession

HEADS, KV_HEADS, DIM, VALUE_DIM, LAYERS = 4, 2, 8, 6, 2

Array = np.ndarray[Any, Any]
# Called with each request, before it is answered; may raise `BreakError`.
Look = Callable[[pb.DecodeRequest], None]


class BreakError(Exception):
    """The stream ends here."""

    def __init__(self, code: grpc.StatusCode) -> None:
        self.code = code


class NumpyServer(pb_grpc.AttentionServiceServicer):
    """Decode in NumPy: just so much of it as the SDK relies on."""

    def __init__(self, look: Look) -> None:
        self.sessions: dict[str, PlainSession] = {}
        self.requests: list[pb.DecodeRequest] = []
        self._look = look

    def Decode(  # noqa: N802
        self, requests: Iterator[pb.DecodeRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.DecodeResponse]:
        steps: dict[int, pb.BeginStep] = {}
        chunks: list[bytes] = []
        try:
            for request in requests:
                self.requests.append(request)
                self._look(request)
                action = request.WhichOneof("action")
                assert action is not None
                body = getattr(request, action)
                response = pb.DecodeResponse(request_id=request.request_id)
                try:
                    if action == "export_session":
                        yield from self._export(response, body)
                        continue
                    if action == "import_session":
                        chunks.append(body.chunk.data)
                        if not body.chunk.last:
                            continue
                        body = b"".join(chunks)
                    getattr(self, f"_{action}")(body, response, steps)
                except (KeyError, ValueError) as error:
                    code = grpc.StatusCode.NOT_FOUND
                    if isinstance(error, ValueError):
                        code = grpc.StatusCode.INVALID_ARGUMENT
                    response.error.code, response.error.message = code.value[0], str(error)
                yield response
        except BreakError as broken:
            context.abort(broken.code, "restarting")

    def _state(self, name: str, response: pb.SessionState) -> None:
        response.session_id, response.length = name, self.sessions[name].length
        response.max_tokens, response.lease = 4096, 30_000_000

    def _add(self, session: PlainSession, response: pb.SessionState) -> None:
        name = f"session {len(self.sessions)}"
        self.sessions[name] = session
        self._state(name, response)

    def _open(self, body: pb.OpenSessions, response: pb.DecodeResponse, steps: Any) -> None:
        specs = body.layers or [pb.LayerSpec()]
        specs = [specs[0]] * body.num_layers if len(specs) == 1 else specs
        for _ in body.sessions:
            layers = [PlainLayer(spec.window, spec.kept_first, spec.cross) for spec in specs]
            self._add(PlainSession(layers), response.opened.sessions.add())

    def _begin_step(self, body: pb.BeginStep, response: pb.DecodeResponse, steps: Any) -> None:
        for each in body.sessions:
            session = self.sessions[each.session_id]
            response.begun.lengths.append(session.length)
            session.begin(each.new_tokens, each.parents or None)
        response.begun.step_id = body.step_id
        steps[body.step_id] = (body, set())

    def _attend_layer(self, body: pb.AttendLayer, response: pb.DecodeResponse, steps: Any) -> None:
        if body.HasField("begin"):
            if body.query.shape[1] != HEADS:  # as below: then the step has not begun
                raise ValueError(f"query.shape: {list(body.query.shape)}")
            body.begin.step_id = body.step_id
            begun = pb.DecodeResponse()
            self._begin_step(body.begin, begun, steps)
            response.attended.lengths.extend(begun.begun.lengths)
        step, done = steps[body.step_id]
        query, key, value = (array_of(t) for t in (body.query, body.key, body.value))
        if query.shape[1] != HEADS:
            raise ValueError(f"query.shape: {query.shape}")
        outputs: list[tuple[Array, Array, Array]] = []
        first = cross = 0
        for each in step.sessions:
            session = self.sessions[each.session_id]
            held = session.layers[body.layer]
            rows = slice(first, first + each.new_tokens)
            keys = slice(cross, cross + each.cross_tokens) if held.cross else rows
            given = (key[keys], value[keys]) if keys.start != keys.stop else (None, None)
            outputs.append(session.attend(body.layer, query[rows], *given))
            first, cross = rows.stop, keys.stop
        done.add(body.layer)
        names = ("output", "log_sum_exp", "entropy")
        wanted = (not body.returns.no_output, body.returns.log_sum_exp, body.returns.entropy)
        for name, want, arrays in zip(names, wanted, zip(*outputs, strict=True), strict=True):
            if want:
                getattr(response.attended, name).CopyFrom(tensor_of(np.concatenate(arrays)))
        response.attended.timings.batch_size = len(step.sessions)
        if len(done) == len(self.sessions[step.sessions[0].session_id].layers):
            response.attended.step_ended = True
            for each in step.sessions:
                self.sessions[each.session_id].end()

    def _abandon_step(self, body: pb.AbandonStep, response: pb.DecodeResponse, steps: Any) -> None:
        step, _ = steps.pop(body.step_id)
        for each in step.sessions:
            self.sessions[each.session_id].truncate(self.sessions[each.session_id].length)
        response.done.SetInParent()

    def _commit(self, body: pb.CommitTree, response: pb.DecodeResponse, steps: Any) -> None:
        self.sessions[body.session_id].commit(body.accepted)
        self._state(body.session_id, response.session)

    def _truncate(self, body: pb.TruncateSession, response: pb.DecodeResponse, steps: Any) -> None:
        self.sessions[body.session_id].truncate(body.length)
        self._state(body.session_id, response.session)

    def _fork(self, body: pb.ForkSession, response: pb.DecodeResponse, steps: Any) -> None:
        session = self.sessions[body.session_id]
        length = body.length if body.HasField("length") else session.length
        self._add(session.fork(length), response.session)

    def _renew(self, body: pb.RenewSession, response: pb.DecodeResponse, steps: Any) -> None:
        self._state(body.session_id, response.session)

    def _close(self, body: pb.CloseSession, response: pb.DecodeResponse, steps: Any) -> None:
        del self.sessions[body.session_id]
        response.done.SetInParent()

    def _export(
        self, response: pb.DecodeResponse, body: pb.ExportSession
    ) -> Iterator[pb.DecodeResponse]:
        data = body.session_id.encode() + bytes(self.sessions[body.session_id].length)
        for index in range(len(data)):
            response.chunk.index, response.chunk.data = index, data[index : index + 1]
            response.chunk.last = index + 1 == len(data)
            yield response

    def _import_session(self, body: bytes, response: pb.DecodeResponse, steps: Any) -> None:
        name = body.rstrip(b"\0").decode()
        if name not in self.sessions:
            raise ValueError(f"chunk: {name}")
        self._add(self.sessions[name].fork(self.sessions[name].length), response.session)


def array_of(tensor: pb.Tensor) -> Array:
    if not tensor.shape:
        return np.empty(0)
    return np.frombuffer(tensor.data, np.float32).reshape(tuple(tensor.shape))


def tensor_of(array: Array) -> pb.Tensor:
    data = array.astype(np.float32)
    return pb.Tensor(dtype=pb.FP32, shape=data.shape, data=data.tobytes())


@contextmanager
def served(look: Look = lambda request: None) -> Iterator[tuple[NumpyServer, AttentionClient]]:
    service = NumpyServer(look)
    server = grpc.server(ThreadPoolExecutor(8))
    pb_grpc.add_AttentionServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with AttentionClient(f"127.0.0.1:{port}") as client:
        yield service, client
    server.stop(0).wait()


def random(generator: np.random.Generator, tokens: int) -> tuple[Array, Array, Array]:
    """Query, key and value of so many tokens."""
    shapes = ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, VALUE_DIM))
    query, key, value = (
        generator.standard_normal((tokens, *shape)).astype(np.float32) for shape in shapes
    )
    return query, key, value


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
        with pytest.raises(ValueError, match="cache_dtype: 'fp4'; allowed: fp32, "):
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


def broken_once(action: str, code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE) -> Look:
    left = [True]

    def look(request: pb.DecodeRequest) -> None:
        if request.WhichOneof("action") == action and left:
            left.clear()
            raise BreakError(code)

    return look


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
