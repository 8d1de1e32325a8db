"""PutTensor, RenewTensor and DropTensor: tensors that stay in the server."""

from collections.abc import Iterator

import grpc
from attnserve_proto import attention_pb2 as pb
from attnserve_proto import wire

from attnserve_server import dtypes
from attnserve_server.errors import CancelledError, InvalidRequestError
from attnserve_server.kept_tensors import Kept
from attnserve_server.services import inputs
from attnserve_server.services.runtime import Runtime
from attnserve_server.wire import tensors


class TensorService:
    """These methods of `attnserve.v1.AttentionService`."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def put(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> pb.StoredTensor:
        """Keep a tensor."""
        messages = _messages(requests)
        header = _header(next(messages, b""))
        tensor = header.tensor
        data = tensor.data if tensor.WhichOneof("content") == "data" else None
        spec = tensors.check(
            "tensor",
            tensor,
            None if data is None else len(data),
            dtype=dtypes.name_of(tensor.dtype) if dtypes.item_bytes(tensor.dtype) else "a dtype",
            dims=(),
            chunks_allowed=True,
        )
        kept = self._runtime.kept
        kept.reserve(spec.byte_size)
        try:
            array = spec.empty()
            target = tensors.data(array)
            if spec.chunked:
                _receive(messages, target)
            else:
                views = {} if data is None else {"tensor": memoryview(data)}
                array[...] = inputs.array(spec, views, self._runtime, context.peer())
            _end(messages)
            return _stored(kept.put(array, header.lease / 1e6))
        except BaseException:
            kept.release(spec.byte_size)
            raise

    def renew(
        self, message: pb.RenewTensorRequest, context: grpc.ServicerContext
    ) -> pb.StoredTensor:
        """Start a lease anew."""
        return _stored(self._runtime.kept.renew(message.handle, message.lease / 1e6))

    def drop(
        self, message: pb.DropTensorRequest, context: grpc.ServicerContext
    ) -> pb.DropTensorResponse:
        """Give a tensor up."""
        self._runtime.kept.drop(message.handle)
        return pb.DropTensorResponse()


def _messages(requests: Iterator[bytes]) -> Iterator[bytes]:
    try:
        yield from requests
    except grpc.RpcError:
        raise CancelledError("the caller cancelled the call") from None


def _header(message: bytes) -> pb.PutTensorHeader:
    request = pb.PutTensorRequest.FromString(message)
    if request.WhichOneof("body") != "header":
        raise InvalidRequestError.of("body", request.WhichOneof("body") or "nothing", "header")
    return request.header


def _receive(messages: Iterator[bytes], target: memoryview) -> None:
    """Fill `target` with chunks.

    Raises:
        InvalidRequestError: they are out of order, too long, too few, or of another tensor.
    """
    received = 0
    while received < target.nbytes:
        message = next(messages, None)
        if message is None:
            raise InvalidRequestError.of(
                "stream", f"its end after {received} bytes", f"{target.nbytes} bytes"
            )
        chunk = wire.decode_put_chunk(message)
        if chunk is None or chunk.tensor:
            raise InvalidRequestError.of("body", "no chunk of tensor 0", "its chunks")
        if chunk.offset != received:
            raise InvalidRequestError.of("chunk.offset", chunk.offset, received)
        size = chunk.data.nbytes
        if not 1 <= size <= target.nbytes - received:
            raise InvalidRequestError.of(
                "chunk.data", f"{size} bytes", f"1..{target.nbytes - received} bytes"
            )
        target[received : received + size] = chunk.data
        received += size


def _end(messages: Iterator[bytes]) -> None:
    if next(messages, None) is not None:
        raise InvalidRequestError.of("stream", "more messages", "none after the last element")


def _stored(kept: Kept) -> pb.StoredTensor:
    return pb.StoredTensor(
        handle=kept.handle, lease=round(kept.lease * 1e6), byte_size=kept.array.nbytes
    )
