"""What the flows of a client need of what reaches its server."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from attnserve_proto import attention_pb2 as pb

from attnserve_client._attend import AttendCall


class Transport(Protocol):
    """How a client reaches its server. What is answered is, in asyncio, awaited."""

    @property
    def trace_id(self) -> str | None:
        """The trace that a call belongs to which begins now; None: there is none."""

    def unary(self, method: str, request: Any, left: float | None) -> Any:
        """Call a method of one request and one answer."""

    def health(self, left: float | None) -> Any:
        """Ask whether the server serves; gives a HealthCheckResponse, as bytes."""

    def attend(self, request: bytes, left: float | None) -> Any:
        """Call Attend, with and for bytes."""

    def attend_streamed(self, call: AttendCall, left: float | None) -> Any:
        """A request over an AttendStream of its own; its result."""

    @property
    def attend_stream(self) -> Callable[..., Any]:
        """Opens an AttendStream."""

    def put(self, messages: Iterable[bytes], left: float | None) -> Any:
        """Call PutTensor, with and for bytes."""

    def decode(
        self,
        messages: Iterator[bytes],
        take: Callable[[pb.DecodeResponse], None],
        left: float | None,
    ) -> Any:
        """A Decode call of its own: `take` takes its answers, one after another."""

    def unregister(self, region: str) -> None:
        """Have the server unmap shared memory, without waiting for it."""

    def unregister_now(self, region: str) -> Any:
        """Have the server unmap shared memory, before this client is closed."""
