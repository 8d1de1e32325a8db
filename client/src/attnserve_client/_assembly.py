"""Puts the answers of an AttendStream together from their messages."""

import dataclasses
import math
from typing import Any

import numpy as np
from attnserve_proto import attention_pb2 as pb
from attnserve_proto import buffers, wire

from attnserve_client import _errors, _tensors
from attnserve_client._answers import AnswerReader, Kinds, Starts, with_starts
from attnserve_client._attend import AttendCall
from attnserve_client._results import AttendResult


class Assembler:
    """Collects the messages of a stream; says which request each completed answer belongs to."""

    def __init__(self) -> None:
        self._expected: dict[int, tuple[AnswerReader, Starts]] = {}
        self._open: dict[int, _Unfinished] = {}

    def expect(self, request_id: int, call: AttendCall) -> None:
        """A request is about to be sent. Callable by any thread."""
        self._expected[request_id] = call.plan.answers, call.starts

    def add(self, message: bytes) -> tuple[int, AttendResult | _errors.AttnserveError] | None:
        """Take one message that nobody else holds.

        Returns:
            The request id and its result or error, if the message completes one.
        """
        view = buffers.adopt(message)
        request_id, body, start, end = wire.stream_body(view)
        if body == wire.STREAM_CHUNK:
            unfinished = self._open[request_id]
            unfinished.add(*wire.read_chunk(view[start:end]))
            return (request_id, self._open.pop(request_id).result()) if unfinished.done else None
        reader, starts = self._expected.pop(request_id)
        if body == wire.STREAM_ERROR:
            error = pb.Error.FromString(message[start:end])
            return request_id, _errors.from_stream_error(error, "AttendStream")
        result, chunked = reader.read(message, start, end)
        result = with_starts(result, starts)
        if not chunked:
            return request_id, result
        self._open[request_id] = _Unfinished(result, chunked)
        return None


class _Unfinished:
    """An answer whose chunks are coming."""

    def __init__(self, result: AttendResult, chunked: Kinds) -> None:
        self._result = result
        self._chunked = chunked
        self._arrays: dict[str, Any] = {}  # those that have come
        self._missing = sum(_byte_size(*kind) for kind in chunked.values())

    @property
    def done(self) -> bool:
        """Whether all are there."""
        return self._missing == 0

    def add(self, number: int, offset: int, data: memoryview) -> None:
        name = wire.RESPONSE_TENSORS[number]
        shape, dtype = self._chunked[name]
        if data.nbytes == _byte_size(shape, dtype):
            self._arrays[name] = _tensors.lying_in(shape, dtype, data)
        else:
            if name not in self._arrays:
                self._arrays[name] = np.empty(shape, dtype)
            _tensors.data(self._arrays[name])[offset : offset + data.nbytes] = data
        self._missing -= data.nbytes

    def result(self) -> AttendResult:
        """It, once it is done."""
        return dataclasses.replace(self._result, **self._arrays)


def _byte_size(shape: tuple[int, ...], dtype: "np.dtype[Any]") -> int:
    return math.prod(shape) * dtype.itemsize
