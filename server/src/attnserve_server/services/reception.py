"""Receiving the requests of one AttendStream: announcements, then chunks into arrays."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from attnserve_proto import attention_pb2 as pb
from attnserve_proto import wire

from attnserve_server.dtypes import Array
from attnserve_server.errors import ExhaustedError, InvalidRequestError
from attnserve_server.scheduler.memory import ByteBudget
from attnserve_server.services.early import EarlyHeads
from attnserve_server.validation import AttendPlan
from attnserve_server.wire import tensors

_NUMBER = {name: number for number, name in wire.REQUEST_TENSORS.items()}


@dataclass(slots=True)
class Reception:
    """One request whose tensors are arriving.

    Attributes:
        plan: the request, checked but for its elements.
        arrays: its tensors, filled so far.
        missing: bytes that have not come yet.
        received: bytes that have come, by tensor in chunks.
        early: computes heads while others are arriving; None: the whole, once it has arrived.
    """

    plan: AttendPlan
    arrays: dict[str, Array]
    missing: int
    received: dict[str, int] = field(default_factory=dict)
    early: EarlyHeads | None = None
    _targets: dict[int, memoryview] = field(default_factory=dict)

    @classmethod
    def begin(
        cls, request_id: int, plan: AttendPlan, arrays: Mapping[str, Array], chunk_bytes: int
    ) -> "Reception":
        """Make room for the tensors that follow; the others are there."""
        reception = cls(plan, dict(arrays), 0)
        for name, spec in plan.specs.items():
            if not spec.chunked:
                continue
            array = spec.empty()
            number = _NUMBER[name]
            reception.arrays[name] = array
            reception._targets[number] = tensors.data(array)
            reception.received[name] = 0
            reception.missing += spec.byte_size
        if reception.missing:
            reception.early = EarlyHeads.of(request_id, plan, reception.arrays, chunk_bytes)
        return reception

    def add(self, chunk: wire.Chunk) -> None:
        """Take one chunk.

        Raises:
            InvalidRequestError: it is empty, out of order, too long, or of no chunked tensor.
        """
        target = self._targets.get(chunk.tensor)
        if target is None:
            allowed = ", ".join(f"{n} ({wire.REQUEST_TENSORS[n]})" for n in self._targets)
            raise InvalidRequestError.of("chunk.tensor", chunk.tensor, allowed)
        name = wire.REQUEST_TENSORS[chunk.tensor]
        received = self.received[name]
        if chunk.offset != received:
            raise InvalidRequestError.of(
                f"chunk.offset of {name}", chunk.offset, f"{received}, the bytes already sent"
            )
        size, left = chunk.data.nbytes, target.nbytes - received
        if not 1 <= size <= left:
            raise InvalidRequestError.of(
                f"chunk.data of {name}", f"{size} bytes", f"1..{left} bytes" if left else "no more"
            )
        if self.early is None or not self.early.keep(name, received, chunk.data):
            target[received : received + size] = chunk.data
        self.received[name] += size
        self.missing -= size


class Receiver:
    """Turns the messages of a stream into complete requests.

    Args:
        max_open: requests that may be arriving at once.
        budget: where the memory for their tensors is taken from.
        chunk_bytes: the most that one message of an answer holds of a tensor.
    """

    def __init__(self, max_open: int, budget: ByteBudget, chunk_bytes: int) -> None:
        self._chunk_bytes = chunk_bytes
        self._max_open = max_open
        self._budget = budget
        self._open: dict[int, Reception] = {}
        # Requests that failed while chunks of theirs are still to come: bytes to throw away.
        self._discarded: dict[int, int] = {}
        self._last_id = 0

    def announce(self, message: pb.AttendStreamRequest) -> None:
        """Check that a request id may be used.

        Raises:
            InvalidRequestError: the protocol is broken; the stream must end.
        """
        if message.WhichOneof("body") != "request":
            raise InvalidRequestError.of("body", "nothing", "request or chunk")
        if message.request_id <= self._last_id:
            raise InvalidRequestError.of(
                "request_id", message.request_id, f"more than {self._last_id}, the last one"
            )
        self._last_id = message.request_id

    def begin(self, request_id: int, plan: AttendPlan, arrays: Mapping[str, Array]) -> Reception:
        """Start to receive a request, which may be complete already.

        Args:
            request_id: it is.
            plan: the request, checked but for its elements.
            arrays: its tensors that are not chunked.

        Raises:
            ExhaustedError: too many are open, or too little memory is left.
        """
        if len(self._open) >= self._max_open:
            raise ExhaustedError(
                f"requests open on this stream: {len(self._open)} wait for chunks; "
                f"allowed: {self._max_open}"
            )
        self._budget.take(plan.sent_bytes)
        try:
            reception = Reception.begin(request_id, plan, arrays, self._chunk_bytes)
        except MemoryError:
            self._budget.give_back(plan.sent_bytes)
            raise ExhaustedError(f"memory: no room for {plan.sent_bytes} bytes") from None
        if reception.missing:
            self._open[request_id] = reception
        return reception

    def discard(self, request_id: int, message: pb.AttendRequest) -> None:
        """A request was refused: throw its chunks away."""
        size = 0
        for name in wire.REQUEST_TENSORS.values():
            tensor: pb.Tensor = getattr(message, name)
            if tensor.WhichOneof("content") == "chunked":
                size += tensor.chunked.byte_size
        if size:
            self._discarded[request_id] = size

    def add(self, chunk: wire.Chunk) -> Reception | None:
        """Take a chunk; returns its request, unless that was refused.

        Raises:
            RefusedChunkError: the chunk's request fails; the stream goes on.
            InvalidRequestError: the protocol is broken; the stream must end.
        """
        reception = self._open.get(chunk.request_id)
        if reception is None:
            self._throw_away(chunk)
            return None
        try:
            reception.add(chunk)
        except InvalidRequestError as error:
            del self._open[chunk.request_id]
            self._give_back(reception)
            left = reception.missing - chunk.data.nbytes
            if left > 0:
                self._discarded[chunk.request_id] = left
            raise RefusedChunkError(str(error)) from None
        if not reception.missing:
            del self._open[chunk.request_id]
        return reception

    def close(self) -> list[int]:
        """Give up what is still arriving; the ids of those requests."""
        for reception in self._open.values():
            self._give_back(reception)
        unfinished = list(self._open)
        self._open.clear()
        return unfinished

    def _give_back(self, reception: Reception) -> None:
        self._budget.give_back(reception.plan.sent_bytes)
        if reception.early is not None:
            reception.early.forfeit()

    def _throw_away(self, chunk: wire.Chunk) -> None:
        left = self._discarded.get(chunk.request_id)
        if left is None:
            raise InvalidRequestError.of(
                "chunk",
                f"for request_id {chunk.request_id}, which waits for none",
                "chunks of a request that announced them",
            )
        if left <= chunk.data.nbytes:
            del self._discarded[chunk.request_id]
        else:
            self._discarded[chunk.request_id] = left - max(1, chunk.data.nbytes)


class RefusedChunkError(InvalidRequestError):
    """A chunk whose request fails, while its stream goes on."""
