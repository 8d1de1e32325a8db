"""PutTensor, RenewTensor, DropTensor, and requests that name stored tensors."""

import time

import grpc
import numpy as np
import pytest
from attnserve_client import (
    AsyncAttentionClient,
    AttentionClient,
    InvalidArgumentError,
    NotFoundError,
)
from attnserve_proto import attention_pb2 as pb
from attnserve_proto import attention_pb2_grpc as pb_grpc

INVALID = grpc.StatusCode.INVALID_ARGUMENT


def tensors(key_len: int = 9) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(key_len)
    query = generator.standard_normal((1, 4, 3, 8)).astype(np.float32)
    key, value = (
        generator.standard_normal((1, 4, key_len, 8)).astype(np.float32) for _ in range(2)
    )
    return query, key, value


def test_stored_keys_and_values_give_what_sending_them_gives(client: AttentionClient) -> None:
    query, key, value = tensors()
    stored_key, stored_value = client.put_tensor(key), client.put_tensor(value)
    assert (stored_key.shape, stored_key.dtype, stored_key.nbytes) == (
        key.shape,
        key.dtype,
        key.nbytes,
    )
    sent = client.attend(query, key, value, model="causal")
    for _ in range(2):
        stored = client.attend(query, stored_key, stored_value, model="causal")
        np.testing.assert_array_equal(stored.output, sent.output)
    with client.stream() as stream:
        streamed = stream.submit(query, stored_key, value, model="causal").result(10)
    np.testing.assert_array_equal(streamed.output, sent.output)


def test_large_tensors_come_in_chunks_and_are_stored_as_one(client: AttentionClient) -> None:
    query, key, value = tensors(4096)
    big = np.repeat(key, 5, axis=0)  # 2.6 MB
    stored = client.put_tensor(big)
    queries = np.repeat(query, 5, axis=0)
    result = client.attend(queries, stored, np.repeat(value, 5, axis=0), model="causal")
    alone = client.attend(query, key, value, model="causal")
    assert result.output is not None
    np.testing.assert_array_equal(result.output[4], alone.output[0])
    client.drop_tensor(stored)


async def calls_of_the_async_client(address: str) -> None:
    query, key, value = tensors()
    async with AsyncAttentionClient(address) as client:
        stored = await client.put_tensor(key, lease=30)
        assert stored.lease == 30
        assert (await client.renew_tensor(stored, lease=20)).lease == 20
        await client.attend(query, stored, value, model="causal")
        await client.drop_tensor(stored)
        with pytest.raises(NotFoundError):
            await client.attend(query, stored, value, model="causal")


def test_the_async_client_has_it_too(address: str) -> None:
    import asyncio

    asyncio.run(calls_of_the_async_client(address))


def test_a_dropped_tensor_is_not_found(client: AttentionClient) -> None:
    query, key, value = tensors()
    stored = client.put_tensor(key)
    client.attend(query, stored, value, model="causal")
    client.drop_tensor(stored)
    for call in (
        lambda: client.attend(query, stored, value, model="causal"),
        lambda: client.drop_tensor(stored),
        lambda: client.renew_tensor(stored),
    ):
        with pytest.raises(NotFoundError, match="no such tensor is kept"):
            call()


def test_a_lease_runs_out_and_starts_anew_with_each_use(client: AttentionClient) -> None:
    query, key, value = tensors()
    stored = client.put_tensor(key, lease=0.6)
    assert stored.lease == pytest.approx(0.6)
    for _ in range(3):
        time.sleep(0.3)
        client.attend(query, stored, value, model="causal")
    time.sleep(0.8)
    with pytest.raises(NotFoundError, match=r"key\.stored.*lease ran out"):
        client.attend(query, stored, value, model="causal")


def test_a_lease_is_bounded_by_the_server(client: AttentionClient) -> None:
    stored = client.put_tensor(np.zeros(3, np.float32), lease=1e6)
    assert stored.lease == 3600
    client.drop_tensor(stored)


def test_a_stored_tensor_that_does_not_fit_is_refused_like_any_other(
    client: AttentionClient,
) -> None:
    query, key, value = tensors()
    for wrong, message in (
        (key[0], r"key\.shape.*rank 3"),
        (key.astype(np.float16), r"key\.dtype: given FP16"),
        (key[:, :2], r"key\.shape"),
    ):
        stored = client.put_tensor(wrong)
        with pytest.raises(InvalidArgumentError, match=message):
            client.attend(query, stored, value, model="causal")
        client.drop_tensor(stored)


def test_a_wrong_shape_beside_a_handle_is_refused(
    client: AttentionClient, channel: grpc.Channel
) -> None:
    query, key, value = tensors()
    stored = client.put_tensor(key)
    request = pb.AttendRequest(
        model="causal",
        query=pb.Tensor(dtype=pb.FP32, shape=query.shape, data=query.tobytes()),
        key=pb.Tensor(dtype=pb.FP32, shape=[1, 4, 8, 8], stored=stored.handle),
        value=pb.Tensor(dtype=pb.FP32, shape=value.shape, data=value.tobytes()),
    )
    with pytest.raises(grpc.RpcError, match="as it was put") as caught:
        pb_grpc.AttentionServiceStub(channel).Attend(request)
    assert caught.value.code() == INVALID


def put(*chunks: pb.TensorChunk, size: int = 12, **header: object) -> list[pb.PutTensorRequest]:
    tensor = pb.Tensor(dtype=pb.FP32, shape=[3], chunked=pb.ChunkedContent(byte_size=size))
    first = pb.PutTensorHeader(**({"tensor": tensor} | header))  # type: ignore[arg-type]
    return [
        pb.PutTensorRequest(header=first),
        *(pb.PutTensorRequest(chunk=chunk) for chunk in chunks),
    ]


def chunk(offset: int, size: int, tensor: int = 0) -> pb.TensorChunk:
    return pb.TensorChunk(tensor=tensor, offset=offset, data=bytes(size))


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([], "body: given nothing"),
        ([pb.PutTensorRequest(chunk=chunk(0, 4))], "body: given chunk"),
        (put(size=16), "tensor.chunked.byte_size: given 16"),
        (put(chunk(0, 4)), "its end after 4 bytes"),
        (put(chunk(4, 4)), "chunk.offset: given 4"),
        (put(chunk(0, 16)), "chunk.data: given 16"),
        (put(chunk(0, 12, tensor=4)), "no chunk of tensor 0"),
        (put(chunk(0, 12), chunk(12, 4)), "more messages"),
        (put(tensor=pb.Tensor()), "tensor.dtype"),
        (put(tensor=pb.Tensor(dtype=pb.FP32)), "tensor.shape"),
        (put(tensor=pb.Tensor(dtype=pb.FP32, shape=[1] * 65, data=bytes(4))), "of rank 65"),
        # Its product alone would take hours.
        (put(tensor=pb.Tensor(dtype=pb.FP32, shape=[1 << 62] * 200_000)), "of rank 200000"),
        (put(tensor=pb.Tensor(dtype=pb.FP32, shape=[3])), "tensor.data: given nothing"),
        (put(tensor=pb.Tensor(dtype=pb.FP32, shape=[3], stored="x")), "tensor.stored"),
    ],
)
def test_wrong_messages_are_refused_and_leave_nothing_behind(
    channel: grpc.Channel, client: AttentionClient, messages: list, match: str
) -> None:
    with pytest.raises(grpc.RpcError, match=match) as caught:
        pb_grpc.AttentionServiceStub(channel).PutTensor(iter(messages), timeout=10)
    assert caught.value.code() == INVALID
