"""A real grpc server that has KV sessions in NumPy, and misbehaves as it is told."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
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
        """Answer requests, one after another."""
        steps: dict[int, pb.BeginStep] = {}
        chunks: list[bytes] = []
        halves: dict[int, pb.AttendLayer] = {}
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
                    if request.request_id in halves:
                        body = pb.AttendLayer()
                        body.MergeFrom(halves.pop(request.request_id))
                        body.MergeFrom(request.attend_layer)
                    elif action == "attend_layer" and self._is_half(body, steps):
                        halves[request.request_id] = body
                        continue
                    getattr(self, f"_{action}")(body, response, steps)
                except (KeyError, ValueError) as error:
                    code = grpc.StatusCode.NOT_FOUND
                    if isinstance(error, ValueError):
                        code = grpc.StatusCode.INVALID_ARGUMENT
                    response.error.code, response.error.message = code.value[0], str(error)
                yield response
        except BreakError as broken:
            context.abort(broken.code, "restarting")

    def _is_half(self, body: pb.AttendLayer, steps: Any) -> bool:
        """Whether keys are still to come."""
        if body.HasField("key") or not body.HasField("query"):
            return False
        step = body.begin if body.HasField("begin") else steps[body.step_id][0]
        return not self.sessions[step.sessions[0].session_id].layers[body.layer].cross

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
            layers = [
                PlainLayer(spec.window, spec.kept_first, spec.cross, VALUE_DIM * spec.latent)
                for spec in specs
            ]
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
            if body.query.shape[1:2] != [HEADS]:  # as below: then the step has not begun
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
        weights: list[Array | None] = []
        first = cross = 0
        for each in step.sessions:
            session = self.sessions[each.session_id]
            held = session.layers[body.layer]
            rows = slice(first, first + each.new_tokens)
            keys = slice(cross, cross + each.cross_tokens) if held.cross else rows
            given = [t[keys] if len(t) and keys.start != keys.stop else None for t in (key, value)]
            outputs.append(session.attend(body.layer, query[rows], *given))
            weights.append(session.weights)
            first, cross = rows.stop, keys.stop
        done.add(body.layer)
        names = ("output", "log_sum_exp", "entropy")
        wanted = (not body.returns.no_output, body.returns.log_sum_exp, body.returns.entropy)
        for name, want, arrays in zip(names, wanted, zip(*outputs, strict=True), strict=True):
            if want:
                getattr(response.attended, name).CopyFrom(tensor_of(np.concatenate(arrays)))
        for index in body.returns.weights_of:
            response.attended.weights.append(tensor_of(weights[index]))
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
    """The elements of a tensor."""
    if not tensor.shape:
        return np.empty(0)
    return np.frombuffer(tensor.data, np.float32).reshape(tuple(tensor.shape))


def tensor_of(array: Array | None) -> pb.Tensor:
    """An array in FP32."""
    assert array is not None
    data = array.astype(np.float32)
    return pb.Tensor(dtype=pb.FP32, shape=data.shape, data=data.tobytes())


@contextmanager
def serving_sessions(look: Look = lambda request: None) -> Iterator[tuple[NumpyServer, str]]:
    """A server and its address; `look` is called with each request before it is answered."""
    service = NumpyServer(look)
    server = grpc.server(ThreadPoolExecutor(8))
    pb_grpc.add_AttentionServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield service, f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait()


def random(generator: np.random.Generator, tokens: int) -> tuple[Array, Array, Array]:
    """Query, key and value of so many tokens."""
    shapes = ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, VALUE_DIM))
    query, key, value = (
        generator.standard_normal((tokens, *shape)).astype(np.float32) for shape in shapes
    )
    return query, key, value


def broken_once(action: str, code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE) -> Look:
    """Breaks the stream of the first such request."""
    left = [True]

    def look(request: pb.DecodeRequest) -> None:
        if request.WhichOneof("action") == action and left:
            left.clear()
            raise BreakError(code)

    return look
