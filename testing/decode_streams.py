"""Decode over its bare messages, and what its layers are to give, for tests."""

import queue
from collections.abc import Sequence
from typing import Any, Self

import grpc
import numpy as np
from attnserve_proto import attention_pb2 as pb
from attnserve_proto import attention_pb2_grpc as pb_grpc
from numpy.typing import NDArray
from plain_sessions import PlainLayer, PlainSession

HEADS, KV_HEADS, DIM, VALUE_DIM, PAGE = 4, 2, 8, 6, 16
Array = NDArray[Any]
generator = np.random.default_rng()


class Refused(Exception):  # noqa: N818 (a test's word for an answer that is an error)
    """A request's answer was an error."""

    def __init__(self, error: pb.Error) -> None:
        super().__init__(f"{grpc.StatusCode(_STATUSES[error.code]).name}: {error.message}")


_STATUSES = {status.value[0]: status.value for status in grpc.StatusCode}


class Stream:
    """A Decode stream: requests go out as they are asked for, answers come back one by one."""

    def __init__(
        self,
        address: str,
        authorities: bytes | None = None,
        token: str = "",
        identity: tuple[bytes, bytes] | tuple[()] = (),
    ) -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]
        if authorities is None:
            self.channel = grpc.insecure_channel(address, options)
        else:
            credentials = grpc.ssl_channel_credentials(authorities, *identity)
            self.channel = grpc.secure_channel(address, credentials, options)
        self._requests: queue.SimpleQueue[pb.DecodeRequest | None] = queue.SimpleQueue()
        self.call = pb_grpc.AttentionServiceStub(self.channel).Decode(
            iter(self._requests.get, None),
            metadata=[("authorization", f"Bearer {token}")] if token else None,
        )
        self._last_id = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._requests.put(None)
        self.call.cancel()
        self.channel.close()

    def send(self, request_id: int | None = None, **action: Any) -> int:
        """Send a request, with the next id unless one is given; answers the id."""
        if request_id is None:
            request_id = self._last_id = self._last_id + 1
        self._requests.put(pb.DecodeRequest(request_id=request_id, **action))
        return request_id

    def end(self) -> None:
        """Send nothing more."""
        self._requests.put(None)

    def receive(self) -> pb.DecodeResponse:
        """Wait for the next answer."""
        answer: pb.DecodeResponse = next(self.call)
        return answer

    def ask(self, **action: Any) -> Any:
        """Send a request and wait for its result; raises Refused."""
        request_id = self.send(**action)
        answer = self.receive()
        assert answer.request_id == request_id
        return result_of(answer)

    def open(self, count: int = 1, **fields: Any) -> list[str]:
        """Open sessions as `opening_of` says; answers their ids."""
        opening = opening_of(count, **fields)
        return [session.session_id for session in self.ask(open=opening).sessions]

    def begin(self, step_id: int, ids: Sequence[str], lengths: Sequence[int]) -> list[int]:
        """Begin a step; answers the lengths before it."""
        return list(self.ask(begin_step=step_of(step_id, ids, lengths)).lengths)

    def step(self, step_id: int, ids: Sequence[str], plains: Sequence[PlainSession]) -> None:
        """A step of random lengths through all layers, compared with the plain ones."""
        lengths = [int(n) for n in generator.integers(1, 20, len(ids))]
        assert self.begin(step_id, ids, lengths) == [plain.length for plain in plains]
        for plain, length in zip(plains, lengths, strict=True):
            plain.begin(length)
        for layer in range(len(plains[0].layers)):
            arrays = rows(sum(lengths))
            attended = self.ask(attend_layer=layer_of(step_id, layer, arrays))
            check(attended, plains, lengths, layer, arrays)
        for plain in plains:
            plain.end()


def result_of(answer: pb.DecodeResponse) -> Any:
    """What an answer holds; raises Refused."""
    name = answer.WhichOneof("result")
    if name == "error":
        raise Refused(answer.error)
    return getattr(answer, name)


def opening_of(count: int = 1, **fields: Any) -> pb.OpenSessions:
    """Sessions of the model "causal" and two layers, unless fields say otherwise."""
    room = {"max_tokens": fields.pop("max_tokens", 256)}
    for name in {"cross_tokens", "reserved_tokens"} & set(fields):
        room[name] = fields.pop(name)
    given: dict[str, Any] = {"model": "causal", "num_layers": 2}
    return pb.OpenSessions(sessions=[pb.NewSession(**room)] * count, **given | fields)


def step_of(step_id: int, ids: Sequence[str], lengths: Sequence[int]) -> pb.BeginStep:
    """A step of so many new tokens of each session."""
    sessions = [
        pb.SessionStep(session_id=name, new_tokens=length)
        for name, length in zip(ids, lengths, strict=True)
    ]
    return pb.BeginStep(step_id=step_id, sessions=sessions)


def rows(tokens: int) -> tuple[Array, Array, Array]:
    """Random query, key and value [tokens, heads, dim] FP32."""
    query, key, value = (
        generator.standard_normal((tokens, heads, dim)).astype(np.float32)
        for heads, dim in ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, VALUE_DIM))
    )
    return query, key, value


def tensor(array: Array) -> pb.Tensor:
    """An FP32 array in a message."""
    return pb.Tensor(dtype=pb.FP32, shape=array.shape, data=array.tobytes())


def layer_of(step_id: int, layer: int, arrays: Sequence[Array], **fields: Any) -> pb.AttendLayer:
    """A layer with query, key and value, as far as they are given."""
    names = ("query", "key", "value")
    tensors = {name: tensor(array) for name, array in zip(names, arrays, strict=False)}
    return pb.AttendLayer(step_id=step_id, layer=layer, **tensors, **fields)


def plain(layers: int = 2) -> PlainSession:
    """A plain session of causal layers."""
    return PlainSession([PlainLayer() for _ in range(layers)])


def check(
    attended: pb.AttendedLayer,
    plains: Sequence[PlainSession],
    lengths: Sequence[int],
    layer: int,
    arrays: Sequence[Array],
    tolerance: float = 1e-5,
) -> None:
    """Compare a layer's answer with what the plain sessions give, which have begun the step."""
    output = np.frombuffer(attended.output.data, np.float32).reshape(attended.output.shape)
    assert output.shape == (sum(lengths), HEADS, VALUE_DIM)
    at = 0
    for one, length in zip(plains, lengths, strict=True):
        part = [array[at : at + length] for array in arrays]
        expected, _, _ = one.attend(layer, *part)
        np.testing.assert_allclose(
            output[at : at + length], expected, atol=tolerance, rtol=tolerance
        )
        at += length
