"""One call of messages both ways, moved on by whoever waits for it.

grpc's own has two threads beneath: one that takes what is to be sent from an iterator, one that
reads. A round trip then changes threads three times, which takes longer than the rest of it. This
one has none, as grpc has it for calls of one request (`SingleThreadedUnaryStream`).

What it stands on is grpc's own and may change with any version: `_decode_call` then does without.
"""

from typing import Any

import grpc
from grpc._cython import cygrpc  # type: ignore[attr-defined]

from attnserve_client import _errors
from attnserve_client._call_events import Event, Metadata
from attnserve_client._errors import AttnserveError

_NO_FLAGS = 0
_RECEIVED = cygrpc.OperationType.receive_message
_SENT = cygrpc.OperationType.send_message
_ENDED = cygrpc.OperationType.receive_status_on_client


class DirectCall:
    """A call that has been opened.

    One thread at a time may be in `next`, and one at a time in the other methods.
    """

    def __init__(self, channel: grpc.Channel, path: str, method: str, metadata: Metadata) -> None:
        self._method = method
        first = (
            (cygrpc.SendInitialMetadataOperation(metadata or None, _NO_FLAGS),),
            (cygrpc.ReceiveStatusOnClientOperation(_NO_FLAGS),),
            (cygrpc.ReceiveInitialMetadataOperation(_NO_FLAGS),),
        )
        self._call: Any = channel._channel.segregated_call(  # type: ignore[attr-defined]
            cygrpc.PropagationConstants.GRPC_PROPAGATE_DEFAULTS,
            path.encode(),
            None,
            None,
            metadata or None,
            None,
            tuple((operations, None) for operations in first),
            cygrpc.build_census_context(),
            None,
        )
        # Operations: each number has one writer at a time.
        self._begun = len(first)
        self._ended = 0
        self._given_up = False

    @property
    def due(self) -> bool:
        """Whether anything is still to happen; then `next` can be called."""
        return self._begun > self._ended and not self._given_up

    def send(self, message: bytes) -> None:
        """Begin to send a message; the one before must have been sent."""
        self._operate(cygrpc.SendMessageOperation(message, _NO_FLAGS))

    def receive(self) -> None:
        """Begin to wait for a message; there must be no such wait."""
        self._operate(cygrpc.ReceiveMessageOperation(_NO_FLAGS))

    def next(self) -> Event:
        """Wait for something to happen. An interrupt of it ends the call."""
        try:
            happened = self._call.next_event()
        except BaseException:
            self._given_up = True  # by grpc
            raise
        event = Event()
        for operation in happened.batch_operations:
            self._ended += 1
            kind = operation.type()
            if kind == _RECEIVED:
                event.received = operation.message()
            elif kind == _SENT:
                event.sent = True
            elif kind == _ENDED:
                event.failure = self._failure(operation)
        return event

    def cancel(self) -> None:
        """End it: what is due happens soon."""
        if self.due:
            self._call.cancel(cygrpc.StatusCode.cancelled, "Locally cancelled by application!")

    def _failure(self, ended: Any) -> AttnserveError:
        code = _errors.code_of(ended.code())
        if code == grpc.StatusCode.OK:
            return _errors.UnavailableError("the stream was ended", method=self._method)
        details = _text(ended.details())
        retry_after = _errors.retry_after_of(ended.trailing_metadata())
        return _errors.from_status(code, details, self._method, retry_after)

    def _operate(self, operation: Any) -> None:
        # None begins on a call that has ended, which `next` tells.
        if self._call.operate((operation,), None):
            self._begun += 1


def _text(details: Any) -> str:
    return details.decode(errors="replace") if isinstance(details, bytes) else str(details or "")
