"""Every bad input gets its own gRPC status, and a message that names the field."""

import time
from collections.abc import Callable

import grpc
import numpy as np
import pytest
from attnserve_client import AttentionClient
from attnserve_proto import attention_pb2 as pb
from attnserve_proto import attention_pb2_grpc as pb_grpc
from attnserve_server.app import AttentionServer
from google.protobuf.message import Message

INVALID, NOT_FOUND = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
EXHAUSTED, PRECONDITION = grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.FAILED_PRECONDITION
DEADLINE = grpc.StatusCode.DEADLINE_EXCEEDED


def tensor(*shape: int, dtype: int = pb.FP32, data: bytes | None = None) -> pb.Tensor:
    size = {pb.FP32: 4, pb.FP16: 2, pb.INT64: 8}.get(dtype, 4)
    content = bytes(size * int(np.prod(shape))) if data is None else data
    return pb.Tensor(dtype=dtype, shape=shape, data=content)


def good() -> pb.AttendRequest:
    q = tensor(1, 4, 3, 8)
    return pb.AttendRequest(model="causal", query=q, key=q, value=q)


def changed(**fields: object) -> pb.AttendRequest:
    request = good()
    for name, value in fields.items():
        request.ClearField(name)
        if isinstance(value, Message):
            getattr(request, name).CopyFrom(value)
        elif value is not None:
            setattr(request, name, value)
    return request


def number(value: float, *shape: int) -> pb.Tensor:
    return tensor(*shape, data=np.full(shape, value, "<f4").tobytes())


def lengths(*values: int) -> pb.Tensor:
    return tensor(len(values), dtype=pb.INT64, data=np.array(values, "<i8").tobytes())


HUGE = 1 << 40
LAYER = pb.AttendRequest(model="self", hidden_states=tensor(1, 3, 32))

ATTEND = {
    "no model": (changed(model=""), INVALID, "model: given nothing"),
    "unknown model": (changed(model="nope"), NOT_FOUND, "model: given 'nope'"),
    "endless name": (changed(model="\U0001f600" * 9999), NOT_FOUND, "model: given '\U0001f600"),
    "unknown version": (changed(version="7"), NOT_FOUND, "version: given '7'"),
    "version no number": (changed(version="-1"), NOT_FOUND, "version: given '-1'"),
    "unknown variant": (changed(variant="x"), NOT_FOUND, "variant: given 'x'"),
    "missing query": (changed(query=None), INVALID, "query: given nothing"),
    "missing value": (changed(value=None), INVALID, "value: given nothing"),
    "wrong rank": (changed(query=tensor(4, 3, 8)), INVALID, "query.shape"),
    "endless shape": (changed(query=tensor(*[1] * 50_000, data=b"")), INVALID, "query.shape"),
    "no shape": (changed(query=pb.Tensor(dtype=pb.FP32, data=b"abcd")), INVALID, "query.shape"),
    "head mismatch": (changed(query=tensor(1, 3, 3, 8)), INVALID, "query.shape.*4 at axis 1"),
    "kv head mismatch": (changed(key=tensor(1, 2, 3, 8)), INVALID, "key.shape"),
    "head_dim mismatch": (changed(query=tensor(1, 4, 3, 9)), INVALID, "query.shape.*axis 3"),
    "key and value lengths": (changed(value=tensor(1, 4, 2, 8)), INVALID, "value.shape.*axis 2"),
    "batch mismatch": (changed(key=tensor(2, 4, 3, 8)), INVALID, "key.shape.*axis 0"),
    "bytes too few": (changed(key=tensor(1, 4, 3, 8, data=bytes(383))), INVALID, "383 bytes"),
    "bytes too many": (changed(key=tensor(1, 4, 3, 8, data=bytes(385))), INVALID, "385 bytes"),
    "no bytes": (changed(key=tensor(1, 4, 3, 8, data=b"")), INVALID, "key.data: given 0 bytes"),
    "no content": (changed(key=pb.Tensor(dtype=1, shape=[1, 4, 3, 8])), INVALID, "key.data: given"),
    "zero dim": (changed(key=tensor(1, 4, 0, 8)), INVALID, "key.shape.*at least 1"),
    "negative dim": (changed(key=tensor(1, 4, -3, 8, data=b"")), INVALID, "key.shape"),
    "overflowing dims": (
        changed(key=tensor(HUGE, HUGE, HUGE, HUGE, data=b"")), INVALID, "less than 2\\^63"
    ),
    "no dtype": (changed(key=tensor(1, 4, 3, 8, dtype=0)), INVALID, "key.dtype"),
    "unknown dtype": (changed(key=tensor(1, 4, 3, 8, dtype=99)), INVALID, "key.dtype: given 99"),
    "wrong dtype": (changed(key=tensor(1, 4, 3, 8, dtype=pb.FP16)), INVALID, "given FP16"),
    "BF16": (changed(key=tensor(1, 4, 3, 8, dtype=pb.BF16)), INVALID, "key.dtype: given BF16"),
    "chunks in a unary call": (
        changed(key=pb.Tensor(dtype=1, shape=[1, 4, 3, 8], chunked={"byte_size": 384})),
        INVALID, "key.chunked",
    ),
    "shared memory": (
        changed(
            key=pb.Tensor(
                dtype=1, shape=[1, 4, 3, 8], shared_memory={"name": "a", "byte_size": 384}
            )
        ),
        NOT_FOUND, "shared_memory region: given 'a'",
    ),
    "no stored tensor": (changed(key=pb.Tensor(stored="x")), NOT_FOUND, "key.stored: given 'x'"),
    "empty handle": (changed(key=pb.Tensor(stored="")), INVALID, "key.stored: given nothing"),
    "priority": (changed(priority=4), INVALID, "priority: given 4; allowed: 1 .high., 2"),
    "NaN bias": (changed(bias=number(np.nan, 1, 1, 3, 3)), INVALID, "bias.*given nan"),
    "infinite bias": (changed(bias=number(np.inf, 1, 1, 3, 3)), INVALID, "bias.*given inf"),
    "bias shape": (changed(bias=number(0, 1, 2, 3, 3)), INVALID, "bias.shape"),
    "key_lengths too long": (changed(key_lengths=lengths(4)), INVALID, "\\[0\\]: given 4"),
    "key_lengths negative": (changed(key_lengths=lengths(-1)), INVALID, "key_lengths\\[0\\]"),
    "key_lengths count": (changed(key_lengths=lengths(1, 1)), INVALID, "key_lengths.shape"),
    "key_lengths dtype": (changed(key_lengths=tensor(1)), INVALID, "key_lengths.dtype"),
    "scale zero": (changed(scale=0.0), INVALID, "scale: given 0"),
    "scale NaN": (changed(scale=float("nan")), INVALID, "scale: given nan"),
    "softcap negative": (changed(softcap=-1.0), INVALID, "softcap: given -1"),
    "softcap off": (changed(model="capped", softcap=0.0), PRECONDITION, "softcap: given 0"),
    "top_k": (changed(returns=pb.ReturnOptions(top_k=4)), INVALID, "returns.top_k: given 4"),
    "mass_by_distance": (
        changed(returns=pb.ReturnOptions(mass_by_distance=4)), INVALID,
        "returns.mass_by_distance: given 4",
    ),
    "nothing wanted": (changed(returns=pb.ReturnOptions(no_output=True)), INVALID, "returns"),
    "variant cannot": (
        changed(variant="fused", returns=pb.ReturnOptions(weights=True)), PRECONDITION, "no weights"
    ),
    "hidden states to a core": (changed(hidden_states=tensor(1, 3, 32)), INVALID, "hidden_states"),
    "query to a layer": (pb.AttendRequest(model="self", query=tensor(1, 4, 3, 8)), INVALID, "que"),
    "scale to a layer": (
        pb.AttendRequest(model="self", hidden_states=tensor(1, 3, 32), scale=1), INVALID, "scale"
    ),
    "layer width": (
        pb.AttendRequest(model="self", hidden_states=tensor(1, 3, 31)), INVALID, "axis 2"
    ),
    "no context": (
        pb.AttendRequest(model="cross", hidden_states=tensor(1, 3, 32)), INVALID, "context: given"
    ),
    "tensors to a transformer": (changed(model="bert"), PRECONDITION, "AttendTokens"),
    "too long": (changed(key=tensor(1, 4, 4097, 8), value=tensor(1, 4, 4097, 8)), INVALID, "Sk"),
    "too many sequences": (
        changed(**dict.fromkeys(("query", "key", "value"), tensor(65, 4, 1, 8))), INVALID, "batch B"
    ),
    "too much memory": (
        changed(
            variant="fused", **dict.fromkeys(("query", "key", "value"), tensor(1, 4, 2100, 8))
        ),
        EXHAUSTED, "working memory",
    ),
    "oversized message": (
        changed(**dict.fromkeys(("query", "key", "value"), tensor(12, 4, 1000, 8))),
        EXHAUSTED, "larger than max",
    ),
}  # fmt: skip


def refused(call: Callable[[], object], code: grpc.StatusCode, message: str) -> None:
    with pytest.raises(grpc.RpcError, match=message) as caught:
        call()
    assert caught.value.code() == code
    assert "Traceback" not in caught.value.details()


@pytest.mark.parametrize("case", ATTEND)
def test_attend_refuses(channel: grpc.Channel, case: str) -> None:
    request, code, message = ATTEND[case]
    refused(lambda: pb_grpc.AttentionServiceStub(channel).Attend(request), code, message)


def tokens(*sequences: list[int], **fields: object) -> pb.AttendTokensRequest:
    batch = pb.TokenBatch(sequences=[pb.TokenSequence(ids=ids) for ids in sequences])
    return pb.AttendTokensRequest(**{"model": "bert", "tokens": batch, **fields})


def typed(ids: list[int], types: list[int]) -> pb.AttendTokensRequest:
    sequence = pb.TokenSequence(ids=ids, token_type_ids=types)
    return pb.AttendTokensRequest(model="bert", tokens=pb.TokenBatch(sequences=[sequence]))


def wanting(**options: object) -> pb.AttendTokensRequest:
    return tokens([2, 3], returns=pb.TokenReturnOptions(**options))


TOKENS = {
    "id out of vocabulary": (tokens([2, 40]), INVALID, "ids\\[1\\]: given 40; allowed: 0..39"),
    "negative id": (tokens([-1]), INVALID, "ids\\[0\\]: given -1"),
    "empty sequence": (tokens([2], []), INVALID, "sequences\\[1\\]: given 0 tokens"),
    "no sequences": (tokens(), INVALID, "given 0 sequences"),
    "sequence too long": (tokens([2] * 21), INVALID, "given 21 tokens; allowed: 1..20"),
    "no input": (pb.AttendTokensRequest(model="bert"), INVALID, "input: given nothing"),
    "pairs": (
        pb.AttendTokensRequest(model="bert", text=pb.TextBatch(texts=["w1"], pairs=["w2", "w3"])),
        INVALID,
        "text.pairs: given 2 texts; allowed: 1, one for each",
    ),
    "fewer token types": (
        typed([2, 3], [0]),
        INVALID,
        "token_type_ids: given 1 numbers; allowed: 2",
    ),
    "unknown token type": (typed([2, 3], [0, 2]), INVALID, "token_type_ids\\[1\\]: given 2"),
    "unknown layer": (wanting(weights=True, layers=[3]), INVALID, "returns.layers\\[0\\]: given 3"),
    "unknown head": (wanting(weights=True, heads=[2]), INVALID, "returns.heads\\[0\\]: given 2"),
    "a layer twice": (wanting(weights=True, layers=[1, 1]), INVALID, "each number once"),
    "unknown attention": (wanting(attention="cross"), INVALID, "given cross; allowed: encoder"),
    "mass_on_first": (wanting(mass_on_first=4097), INVALID, "mass_on_first: given 4097"),
    "distances": (wanting(mass_by_distance=4097), INVALID, "mass_by_distance: given 4097"),
    "targets to an encoder": (
        tokens([2], target_text=pb.TextBatch(texts=["w1"])),
        PRECONDITION,
        "no encoder-decoder",
    ),
    "no pooling": (wanting(pooled=True), PRECONDITION, "pooling"),
    "tokens to a core": (tokens([2], model="causal"), PRECONDITION, "use Attend"),
    "unknown tokens model": (tokens([2], model="gpt"), NOT_FOUND, "model: given 'gpt'"),
}


@pytest.mark.parametrize("case", TOKENS)
def test_attend_tokens_refuses(channel: grpc.Channel, case: str) -> None:
    request, code, message = TOKENS[case]
    refused(lambda: pb_grpc.AttentionServiceStub(channel).AttendTokens(request), code, message)


def announced(request_id: int = 1, **chunked: int) -> pb.AttendStreamRequest:
    request = good()
    for name, size in (chunked or {"query": 384}).items():
        field = getattr(request, name)
        field.chunked.byte_size = size
    return pb.AttendStreamRequest(request_id=request_id, request=request)


def chunk(offset: int, size: int, request_id: int = 1, field: int = 4) -> pb.AttendStreamRequest:
    data = pb.TensorChunk(tensor=field, offset=offset, data=bytes(size))
    return pb.AttendStreamRequest(request_id=request_id, chunk=data)


REFUSED_IN_A_STREAM = {
    "chunk out of order": ([announced(), chunk(100, 100)], INVALID, "chunk.offset of query"),
    "chunk too long": ([announced(), chunk(0, 385)], INVALID, "chunk.data of query"),
    "empty chunk": ([announced(), chunk(0, 0)], INVALID, "chunk.data of query: given 0 bytes"),
    "chunk of another tensor": ([announced(), chunk(0, 9, field=5)], INVALID, "chunk.tensor"),
    "chunked size and shape": ([announced(query=380)], INVALID, "chunked.byte_size: given 380"),
}


@pytest.mark.parametrize("case", REFUSED_IN_A_STREAM)
def test_a_request_of_a_stream_fails_and_the_stream_lives(channel: grpc.Channel, case: str) -> None:
    messages, code, message = REFUSED_IN_A_STREAM[case]
    then = pb.AttendStreamRequest(request_id=2, request=good())
    answers = list(pb_grpc.AttentionServiceStub(channel).AttendStream(iter([*messages, then])))
    errors = {answer.request_id: answer.error for answer in answers if answer.HasField("error")}
    assert errors[1].code == code.value[0]
    assert message in errors[1].message
    assert any(answer.request_id == 2 and answer.HasField("response") for answer in answers)


ENDS_A_STREAM = {
    "truncated stream": ([announced(), chunk(0, 100)], "chunks of request 1 missing"),
    "chunk never announced": ([chunk(0, 10, request_id=9)], "request_id 9"),
    "id zero": ([announced(0)], "request_id"),
    "id not increasing": ([announced(2), chunk(0, 384, 2), announced(2)], "request_id"),
    "no body": ([pb.AttendStreamRequest(request_id=1)], "body: given nothing"),
}


@pytest.mark.parametrize("case", ENDS_A_STREAM)
def test_a_broken_protocol_ends_the_stream(channel: grpc.Channel, case: str) -> None:
    messages, message = ENDS_A_STREAM[case]
    stub = pb_grpc.AttentionServiceStub(channel)
    refused(lambda: list(stub.AttendStream(iter(messages), timeout=10)), INVALID, message)


def test_too_many_open_requests_on_a_stream(channel: grpc.Channel) -> None:
    stub = pb_grpc.AttentionServiceStub(channel)
    first = next(iter(stub.AttendStream(announced(number) for number in range(1, 6))))
    assert (first.request_id, first.error.code) == (5, EXHAUSTED.value[0])


def test_garbage_is_an_invalid_argument(channel: grpc.Channel) -> None:
    for method in ("Attend", "AttendTokens", "GetModel"):
        call = channel.unary_unary(f"/attnserve.v1.AttentionService/{method}")
        refused(lambda call=call: call(b"\xff\xff\xff"), INVALID, "message: given bytes")


def test_a_request_of_decode_needs_an_id_and_an_action(channel: grpc.Channel) -> None:
    stub = pb_grpc.AttentionServiceStub(channel)
    for request, message in (
        (pb.DecodeRequest(), "request_id: given 0"),
        (pb.DecodeRequest(request_id=1), "action: given nothing"),
    ):
        refused(lambda request=request: list(stub.Decode(iter([request]))), INVALID, message)


def longer() -> pb.AttendRequest:
    """One that waits for its turn: what takes next to no time does not."""
    q = tensor(1, 4, 1000, 8)
    return pb.AttendRequest(model="causal", query=q, key=q, value=q)


@pytest.mark.usefixtures("occupied")
def test_an_expired_request_is_given_up_and_never_runs(
    channel: grpc.Channel, server: AttentionServer
) -> None:
    stub = pb_grpc.AttentionServiceStub(channel)
    refused(lambda: stub.Attend(longer(), timeout=0.2), DEADLINE, "[Dd]eadline")
    deadline = time.monotonic() + 5
    while server.plane.gauges()["waiting"] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.plane.gauges()["waiting"] == 0


@pytest.mark.usefixtures("occupied")
def test_a_full_queue_refuses_at_once(channel: grpc.Channel, server: AttentionServer) -> None:
    stub = pb_grpc.AttentionServiceStub(channel)
    calls = [stub.Attend.future(longer()) for _ in range(4)]
    deadline = time.monotonic() + 5
    while server.plane.gauges()["waiting"] < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    refused(lambda: stub.Attend(longer(), timeout=5), EXHAUSTED, "queue: 4 requests are waiting")
    for call in calls:
        call.cancel()
    deadline = time.monotonic() + 5
    while server.plane.gauges()["waiting"] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.plane.gauges()["waiting"] == 0


def test_the_server_is_well_after_all_that(client: AttentionClient) -> None:
    q = np.zeros((1, 4, 3, 8), np.float32)
    assert not client.attend(q, q, q, model="causal").output.any()
