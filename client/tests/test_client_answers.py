"""Answers are read where they lie, and streamed ones put together, in whatever pieces they come."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import grpc
import numpy as np
import pytest
from attnserve_client import AsyncAttentionClient, AttentionClient, AttnserveError
from attnserve_client._answers import AnswerReader
from attnserve_client._results import AttendResult
from attnserve_proto import attention_pb2 as pb
from attnserve_proto import attention_pb2_grpc as pb_grpc
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

ALWAYS = 0
TENSORS = ("output", "weights", "entropy", "top_k_indices", "mass_per_key")
DTYPES = {pb.FP32: np.float32, pb.FP16: np.float16, pb.INT64: np.int64}
MIB = 1 << 20


@st.composite
def tensors(draw: st.DrawFn) -> pb.Tensor:
    number = draw(st.sampled_from(sorted(DTYPES)))
    shape = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    size = int(np.prod(shape)) * np.dtype(DTYPES[number]).itemsize
    return pb.Tensor(dtype=number, shape=shape, data=draw(st.binary(min_size=size, max_size=size)))


@st.composite
def answers(draw: st.DrawFn) -> list[bytes]:
    """Answers to one kind of request, their fields in an order of the server's own."""
    parts = [pb.AttendResponse(model=draw(st.text(max_size=5)), version="1")]
    for name in draw(st.sets(st.sampled_from(TENSORS))):
        parts.append(pb.AttendResponse(**{name: draw(tensors())}))  # noqa: PERF401
    parts = draw(st.permutations(parts))
    counts = st.integers(0, 2**40)
    padded, first = draw(st.integers(0, 150)), draw(st.booleans())
    made = []
    for _ in range(3):
        for part in parts:
            for _, tensor in part.ListFields():
                if isinstance(tensor, pb.Tensor):
                    size = len(tensor.data)
                    tensor.data = draw(st.binary(min_size=size, max_size=size))
        spans = pb.Timings(deserialize=draw(counts), queue=draw(counts), batch_size=1)
        tail = pb.AttendResponse(timings=spans).SerializeToString()
        tail += pb.AttendResponse(padding=bytes(padded)).SerializeToString()
        body = b"".join(part.SerializeToString() for part in parts)
        made.append(tail + body if first else body + tail)
    return made


def check(result: AttendResult, expected: pb.AttendResponse) -> None:
    assert (result.model, result.version, result.variant) == (
        expected.model,
        expected.version,
        expected.variant,
    )
    for field in fields(result.timings):
        assert getattr(result.timings, field.name) == getattr(expected.timings, field.name)
    for name in TENSORS:
        array = getattr(result, name)
        assert (array is not None) == expected.HasField(name)
        if array is not None:
            tensor = getattr(expected, name)
            assert (array.dtype, array.shape) == (DTYPES[tensor.dtype], tuple(tensor.shape))
            assert array.tobytes() == tensor.data
            assert array.flags.writeable
            assert array.flags.aligned


@given(answers(), answers(), st.binary(max_size=9), st.binary(max_size=9))
def test_answers_are_read_as_protobuf_reads_them(
    some: list[bytes], others: list[bytes], before: bytes, after: bytes
) -> None:
    reader = AnswerReader()
    for answer in (*some, *others, some[0], others[0]):
        message = b"".join((before, answer, after, b"."))
        start, stop = len(before), len(before) + len(answer)
        result, lacking = reader.read(message, start, stop)
        assert not lacking
        check(result, pb.AttendResponse.FromString(answer))


def test_an_answer_whose_elements_do_not_fit_is_refused() -> None:
    tensor = pb.Tensor(dtype=pb.FP32, shape=[2, 2], data=bytes(12))
    message = pb.AttendResponse(output=tensor).SerializeToString()
    with pytest.raises(DecodeError, match="output: 12 bytes for float32 of shape"):
        AnswerReader().read(message)


class Service(pb_grpc.AttentionServiceServicer):
    """Answers with the query, in one message or in chunks; keeps the messages that came."""

    def __init__(self, chunk_bytes: int | None = None) -> None:
        self.chunk_bytes = chunk_bytes
        self.messages: list[pb.AttendStreamRequest] = []

    def AttendStream(  # noqa: N802
        self, requests: Iterator[pb.AttendStreamRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.AttendStreamResponse]:
        self.messages = list(requests)
        first = self.messages[0]
        query = first.request.query
        if query.shape == [1]:
            yield pb.AttendStreamResponse(
                request_id=first.request_id, error=pb.Error(code=3, message="query: rank 1")
            )
            return
        data = elements(self.messages, 4)
        output = pb.Tensor(dtype=query.dtype, shape=query.shape)
        if self.chunk_bytes is None:
            output.data = data
        else:
            output.chunked.byte_size = len(data)
        yield pb.AttendStreamResponse(
            request_id=first.request_id, response=pb.AttendResponse(model="m", output=output)
        )
        for at in range(0, len(data) if self.chunk_bytes else 0, self.chunk_bytes or 1):
            chunk = pb.TensorChunk(tensor=4, offset=at, data=data[at : at + self.chunk_bytes])
            yield pb.AttendStreamResponse(request_id=first.request_id, chunk=chunk)


def elements(messages: list[pb.AttendStreamRequest], number: int) -> bytes:
    """Of a tensor of a request, inline or in chunks."""
    field = pb.AttendRequest.DESCRIPTOR.fields_by_number[number].name
    tensor = getattr(messages[0].request, field)
    chunks = [m.chunk for m in messages[1:] if m.chunk.tensor == number]
    return tensor.data or b"".join(chunk.data for chunk in chunks)


@contextmanager
def served(service: Service) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(4), options=[("grpc.max_receive_message_length", -1)])
    pb_grpc.add_AttentionServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(0).wait()


def arrays(key_len: int, query_len: int = 1) -> tuple[Any, Any, Any]:
    generator = np.random.default_rng()
    lengths = (query_len, key_len, key_len)
    q, k, v = (generator.standard_normal((1, 8, s, 64), np.float32) for s in lengths)
    return q, k, v


# Bytes of key and of value: 2 KiB for each position.
@pytest.mark.parametrize(
    ("key_len", "inline", "chunked"),
    [
        (3, ["query", "key", "value", "key_lengths"], []),
        (400, ["query", "key", "key_lengths"], ["value"]),
        (600, ["query", "key_lengths"], ["key", "value"]),
        (1200, ["key_lengths"], ["query", "key", "value"]),  # some heads at a time
    ],
)
def test_a_streamed_request_has_in_its_first_message_what_fits(
    key_len: int, inline: list[str], chunked: list[str]
) -> None:
    service = Service()
    q, k, v = arrays(key_len)
    with (
        served(service) as address,
        AttentionClient(address, stream_threshold_bytes=ALWAYS) as client,
    ):
        result = client.attend(q, k, v, key_lengths=[key_len], model="m")
    np.testing.assert_array_equal(result.output, q)
    request = service.messages[0].request
    for name, array, number in (("query", q, 4), ("key", k, 5), ("value", v, 6)):
        assert elements(service.messages, number) == array.tobytes()
        assert (getattr(request, name).WhichOneof("content") == "data") == (name in inline)
        assert tuple(getattr(request, name).shape) == array.shape
    assert (len(service.messages) == 1) == (not chunked)
    assert request.key_lengths.data == np.array([key_len]).tobytes()
    assert all(len(message.chunk.data) <= MIB for message in service.messages)


@pytest.mark.parametrize("chunk_bytes", [None, 1000, 1 << 30], ids=["inline", "chunks", "a chunk"])
@pytest.mark.parametrize("query_len", [2, 700])
def test_an_answer_on_a_stream_comes_in_any_pieces(chunk_bytes: int, query_len: int) -> None:
    async def ask(address: str, q: Any, k: Any, v: Any) -> Any:
        async with AsyncAttentionClient(address, stream_threshold_bytes=ALWAYS) as client:
            return (await client.attend(q, k, v, model="m")).output

    with (
        served(Service(chunk_bytes)) as address,
        AttentionClient(address, stream_threshold_bytes=ALWAYS) as client,
    ):
        for _ in range(3):
            q, k, v = arrays(5, query_len)
            output = client.attend(q, k, v, model="m").output
            np.testing.assert_array_equal(output, q)
            assert output.flags.writeable
            np.testing.assert_array_equal(asyncio.run(ask(address, q, k, v)), q)


def test_an_error_on_a_stream_of_one_message_is_the_servers() -> None:
    with (
        served(Service()) as address,
        AttentionClient(address, stream_threshold_bytes=ALWAYS) as client,
        pytest.raises(AttnserveError, match="query: rank 1"),
    ):
        client.attend(np.ones(1, np.float32), *arrays(3)[1:], model="m")
