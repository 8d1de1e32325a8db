"""The hand-made encoding is protobuf, byte for byte in meaning."""

import contextlib

import pytest
from attnserve_proto import attention_pb2 as pb
from attnserve_proto import buffers, wire
from attnserve_proto.frames import ALIGNMENT, REQUEST_PADDING, lay_out, lay_out_within
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st

blobs = st.binary(min_size=1, max_size=400)
numbers = st.sampled_from(sorted(wire.REQUEST_TENSORS))


@given(st.text(), st.dictionaries(numbers, st.tuples(st.lists(st.integers(1, 2**40)), blobs)))
def test_a_filled_frame_is_what_protobuf_would_give_but_for_padding(
    model: str, tensors: dict
) -> None:
    message = pb.AttendRequest(model=model)
    parts = [
        (n, pb.Tensor(dtype=pb.FP32, shape=s).SerializeToString(), len(d))
        for n, (s, d) in tensors.items()
    ]
    frame = lay_out(message.SerializeToString(), parts, REQUEST_PADDING)
    joined = frame.fill([data for _, data in tensors.values()])
    assert all(start % ALIGNMENT == 0 for start, _ in frame.rooms)
    for number, (shape, data) in tensors.items():
        field = getattr(message, wire.REQUEST_TENSORS[number])
        field.CopyFrom(pb.Tensor(dtype=pb.FP32, shape=shape, data=data))
    parsed = pb.AttendRequest.FromString(joined)
    parsed.ClearField("padding")
    assert parsed == message


@given(st.integers(0, 2**64 - 1), st.integers(1, 300), st.integers(0, 2**32 - 1))
@example(1, 27, 1)
def test_a_frame_within_a_message_is_what_protobuf_would_give_but_for_padding(
    request_id: int, size: int, layer: int
) -> None:
    for elements in (size, 16384 - size, 16384 + size, (1 << 21) - size):
        message = pb.DecodeRequest(request_id=request_id)
        before = message.SerializeToString()
        attend = message.attend_layer
        attend.layer = layer
        head = attend.SerializeToString()
        header = pb.Tensor(dtype=pb.FP32, shape=[1]).SerializeToString()
        frame, start = lay_out_within(before, 4, head, [(3, header, elements), (5, header, 9)], 15)
        data = bytes(elements), b"123456789"
        for tensor, content in zip((attend.query, attend.value), data, strict=True):
            tensor.CopyFrom(pb.Tensor(dtype=pb.FP32, shape=[1], data=content))
        filled = frame.fill(data)
        assert len(filled) == frame.end
        assert filled[start : start + len(head)] == head
        assert all(start % ALIGNMENT == 0 for start, _ in frame.rooms)
        parsed = pb.DecodeRequest.FromString(filled)
        parsed.attend_layer.ClearField("padding")
        assert parsed == message


@given(st.text(), st.dictionaries(numbers, st.tuples(st.lists(st.integers(1, 2**40)), blobs)))
def test_split_takes_apart_what_protobuf_serialised(model: str, tensors: dict) -> None:
    message = pb.AttendRequest(model=model, scale=0.5)
    for number, (shape, data) in tensors.items():
        field = getattr(message, wire.REQUEST_TENSORS[number])
        field.CopyFrom(pb.Tensor(dtype=pb.FP32, shape=shape, data=data))
    parsed, views = wire.split(message.SerializeToString(), pb.AttendRequest, wire.REQUEST_TENSORS)
    assert {name: bytes(view) for name, view in views.items()} == {
        wire.REQUEST_TENSORS[number]: data for number, (_, data) in tensors.items()
    }
    for name in views:
        assert not getattr(parsed, name).data
        getattr(parsed, name).data = bytes(views[name])
    assert parsed == message


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1), blobs)
def test_a_chunk_travels_both_ways(request_id: int, tensor: int, offset: int, data: bytes) -> None:
    plain = pb.AttendStreamRequest(
        request_id=request_id, chunk=pb.TensorChunk(tensor=tensor, offset=offset, data=data)
    )
    chunk = wire.Chunk(request_id, tensor, offset, memoryview(data))
    encoded = wire.encode_chunk(chunk)
    assert (len(encoded) - len(data)) % ALIGNMENT == 0
    request = pb.AttendStreamRequest.FromString(encoded)
    answer = pb.AttendStreamResponse.FromString(encoded)
    for message in (request, answer):
        message.chunk.ClearField("padding")
    assert request == plain
    assert answer.chunk == plain.chunk
    assert wire.decode_chunk(plain.SerializeToString()) == chunk == wire.decode_chunk(encoded)
    put = pb.PutTensorRequest(chunk=plain.chunk)
    assert wire.decode_put_chunk(put.SerializeToString()) == wire.decode_put_chunk(
        wire.encode_put_chunk(chunk)
    )


def test_a_message_that_is_no_chunk_is_left_to_protobuf() -> None:
    request = pb.AttendStreamRequest(request_id=3, request=pb.AttendRequest(model="m"))
    assert wire.decode_chunk(request.SerializeToString()) is None
    assert wire.decode_chunk(b"") is None


@given(st.binary(max_size=60))
def test_garbage_is_a_decode_error_or_a_message_never_anything_else(garbage: bytes) -> None:
    for read in (
        lambda: wire.split(garbage, pb.AttendRequest, wire.REQUEST_TENSORS),
        lambda: wire.decode_chunk(garbage),
    ):
        with contextlib.suppress(DecodeError):
            read()


def test_cut_covers_the_tensor_once_in_order() -> None:
    data = bytes(range(256)) * 5
    chunks = [wire.decode_chunk(part) for part in wire.cut(7, 4, memoryview(data), 300)]
    assert [chunk.offset for chunk in chunks if chunk] == [0, 300, 600, 900, 1200]
    assert b"".join(bytes(chunk.data) for chunk in chunks if chunk) == data


def test_a_length_beyond_the_message_is_refused() -> None:
    with pytest.raises(DecodeError, match="cut off"):
        wire.split(b"\x22\x7fabc", pb.AttendRequest, wire.REQUEST_TENSORS)


def test_an_adopted_message_outlives_its_name_and_can_be_written() -> None:
    message = bytes(range(250)) * 4
    copy = bytes(bytearray(message))
    view = buffers.adopt(message)
    del message
    assert bytes(view) == copy
    view[3:5] = b"xy"
    assert bytes(view) == copy[:3] + b"xy" + copy[5:]
