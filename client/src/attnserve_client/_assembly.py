"""Puts the answers of an AttendStream together from their messages."""

from attnserve_proto import attention_pb2 as pb
from attnserve_proto import wire

from attnserve_client import _errors, _messages, _tensors
from attnserve_client._results import Array, AttendResult


class Assembler:
    """Collects the messages of a stream; says which request each completed answer belongs to."""

    def __init__(self) -> None:
        self._open: dict[int, _Answer] = {}

    def add(self, message: bytes) -> tuple[int, AttendResult | _errors.AttnserveError] | None:
        """Take one message; the request id and its result or error if it completes one."""
        chunk = wire.decode_chunk(message)
        if chunk is not None:
            answer = self._open[chunk.request_id]
            answer.add(chunk)
            return self._finish(chunk.request_id) if answer.missing == 0 else None
        parsed = pb.AttendStreamResponse.FromString(message)
        if parsed.HasField("error"):
            return parsed.request_id, _errors.from_stream_error(parsed.error, "AttendStream")
        self._open[parsed.request_id] = _Answer(parsed.response)
        return (
            self._finish(parsed.request_id) if self._open[parsed.request_id].missing == 0 else None
        )

    def _finish(self, request_id: int) -> tuple[int, AttendResult]:
        answer = self._open.pop(request_id)
        return request_id, _messages.attend_result(answer.response, answer.arrays)


class _Answer:
    """One answer under way."""

    def __init__(self, response: pb.AttendResponse) -> None:
        self.response = response
        self.arrays: dict[str, Array] = {}
        self.missing = 0
        self._targets: dict[int, memoryview] = {}
        for number, name in wire.RESPONSE_TENSORS.items():
            if not response.HasField(name):  # type: ignore[arg-type]
                continue
            tensor: pb.Tensor = getattr(response, name)
            if tensor.WhichOneof("content") == "chunked":
                array = _tensors.empty(tensor)
                self._targets[number] = _tensors.data(array)
                self.missing += array.nbytes
            else:
                array = _tensors.copy_of(tensor, tensor.data)
            self.arrays[name] = array

    def add(self, chunk: wire.Chunk) -> None:
        end = chunk.offset + chunk.data.nbytes
        self._targets[chunk.tensor][chunk.offset : end] = chunk.data
        self.missing -= chunk.data.nbytes
