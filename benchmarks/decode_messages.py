"""Messages of the benchmark of KV sessions, as its client in C++ sends them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import grpc
import numpy as np
from attnserve_client import Session
from attnserve_proto import attention_pb2 as pb
from attnserve_proto import attention_pb2_grpc as pb_grpc
from numpy.typing import NDArray
from serving_servers import Server

NUM_HEADS, HEAD_DIM = 8, 64
EMBED_DIM = NUM_HEADS * HEAD_DIM
MODEL = "causal"
LAYER = "layer"  # the same attention with its projections and rotary embedding inside

Array = NDArray[Any]

_ALIGNMENT = 64
# The request_id, which is the client's to fill in: as long as it may become.
_ID = b"\x08\x80\x80\x80\x80\x00"


def random(tokens: int) -> tuple[Array, Array, Array]:
    """Query, key and value [tokens, H, D], fp32."""
    shape = (tokens, NUM_HEADS, HEAD_DIM)
    generator = np.random.default_rng(tokens)
    query, key, value = (generator.standard_normal(shape, np.float32) for _ in range(3))
    return query, key, value


def tensors(model: str, tokens: int) -> dict[str, Any]:
    """What a step takes, by its names: hidden states [tokens, E] fp32, or `random`."""
    query, key, value = random(tokens)
    if model == LAYER:
        return {"hidden_states": query.reshape(tokens, EMBED_DIM)}
    return {"query": query, "key": key, "value": value}


@dataclass(frozen=True)
class Group:
    """Requests that are sent together; the next group waits for their answers."""

    timed: bool
    requests: Sequence[pb.DecodeRequest]


def step(sessions: Sequence[Session]) -> list[pb.DecodeRequest]:
    """A step of one token and one layer of these sessions."""
    begin = pb.BeginStep()
    for session in sessions:
        begin.sessions.add(session_id=session.id, new_tokens=1)
    given: dict[str, Any] = {
        name: pb.Tensor(dtype=pb.FP32, shape=array.shape, data=array.tobytes())
        for name, array in tensors(sessions[0].model, len(sessions)).items()
    }
    layer = pb.AttendLayer(step_id=1, layer=0, begin=begin, **given)
    return [pb.DecodeRequest(attend_layer=layer)]


def back(sessions: Sequence[Session]) -> Group:
    """Takes the new tokens away again, so that every round has the same lengths. Not timed."""
    requests = [
        pb.DecodeRequest(truncate=pb.TruncateSession(session_id=one.id, length=one.length))
        for one in sessions
    ]
    return Group(False, requests)


@contextmanager
def shared_step(server: Server, sessions: Sequence[Session]) -> Iterator[list[pb.DecodeRequest]]:
    """`step`, with all tensors in memory that the server sees too."""
    (request,) = step(sessions)
    layer = request.attend_layer
    given = list(_tensors(layer).values())
    sizes = [len(tensor.data) for tensor in given]
    block = SharedMemory(create=True, size=sum(sizes) + sizes[0])
    try:
        with grpc.insecure_channel(server.address) as channel:
            stub = pb_grpc.AttentionServiceStub(channel)
            asked = pb.RegisterSharedMemoryRequest(key=f"/{block.name}", byte_size=block.size)
            name = stub.RegisterSharedMemory(asked).name
            memory, at = block.buf, 0
            assert memory is not None
            for tensor, size in zip(given, sizes, strict=True):
                memory[at : at + size] = tensor.data
                tensor.shared_memory.CopyFrom(
                    pb.SharedMemoryRegion(name=name, offset=at, byte_size=size)
                )
                at += size
            # The output is as large as the query, or as the hidden states.
            layer.output_region.CopyFrom(
                pb.SharedMemoryRegion(name=name, offset=at, byte_size=sizes[0])
            )
            yield [request]
            stub.UnregisterSharedMemory(pb.UnregisterSharedMemoryRequest(name=name))
    finally:
        block.close()
        block.unlink()


def encoded(request: pb.DecodeRequest) -> bytes:
    """A message whose tensors' elements lie at multiples of 64 in it, as the SDK sends them."""
    given = request.attend_layer
    inside = {name: tensor for name, tensor in _tensors(given).items() if tensor.data}
    if not inside:
        return _ID + request.SerializeToString()
    rest = pb.AttendLayer(step_id=given.step_id, layer=given.layer, begin=given.begin)
    body = bytearray(rest.SerializeToString())
    # What comes before the body has as many bytes whatever the paddings are.
    most = given.ByteSize() + len(inside) * (_ALIGNMENT + 8)
    length_size = len(_varint(most))
    begin = len(_ID) + 1 + length_size
    for name, tensor in inside.items():
        data, shape = tensor.data, pb.Tensor(dtype=tensor.dtype, shape=tensor.shape)
        head = shape.SerializeToString() + _tag(pb.Tensor, "data") + _varint(len(data))
        field = _tag(pb.AttendLayer, name) + _varint(len(head) + len(data))
        padding = -(begin + len(body) + 2 + len(field) + len(head)) % _ALIGNMENT
        body += _tag(pb.AttendLayer, "padding") + bytes([padding]) + bytes(padding)
        body += field + head + data
    size = _varint(len(body), length_size)
    return _ID + _tag(pb.DecodeRequest, "attend_layer") + size + bytes(body)


def _tensors(layer: pb.AttendLayer) -> dict[str, pb.Tensor]:
    """Those that a layer is given, by their names."""
    fields = {field.name: value for field, value in layer.ListFields()}
    return {name: value for name, value in fields.items() if isinstance(value, pb.Tensor)}


def _tag(message: Any, field: str) -> bytes:
    """Of a field that has a length; all of them here have a number of one byte."""
    return bytes([message.DESCRIPTOR.fields_by_name[field].number << 3 | 2])


def _varint(number: int, size: int = 0) -> bytes:
    """In so many bytes, or as few as it takes."""
    digits = bytearray()
    while number or not digits:
        digits.append(number & 0x7F | 0x80)
        number >>= 7
    digits += b"\x80" * (size - len(digits))
    digits[-1] &= 0x7F
    return bytes(digits)
