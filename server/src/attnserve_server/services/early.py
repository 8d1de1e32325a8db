"""A streamed request whose first heads are computed while the others are still arriving.

Chunks that hold whole heads, the same ones of query, key and value, are read where grpc put them,
and the output is written where grpc sends it from: such a request is not copied at all here. Other
chunks are copied together as they come.
"""

import threading
from collections.abc import Iterator, Mapping

from attnserve_server import validation
from attnserve_server.dtypes import Array
from attnserve_server.engine import parts
from attnserve_server.engine.work import AttendWork
from attnserve_server.errors import RequestError
from attnserve_server.validation import AttendPlan
from attnserve_server.wire.answers import Clock, OutputChunk
from attnserve_server.wire.tensors import TensorSpec

_CORE = ("query", "key", "value")


class EarlyHeads:
    """Says which heads can be computed, and gathers what comes of them.

    The thread that reads the stream calls `keep` and `take`; those that compute the others.

    Args:
        request_id: of the stream.
        plan: the request.
        work: of all heads.
        output: the one tensor of the answer.
        chunk_bytes: the most that one message of the answer holds of it.
    """

    def __init__(
        self,
        request_id: int,
        plan: AttendPlan,
        work: AttendWork,
        output: TensorSpec,
        chunk_bytes: int,
    ) -> None:
        self.work = work
        self._request_id = request_id
        self._specs = plan.specs
        self._num_kv_heads = plan.model.manifest.attention.num_kv_heads
        self._head_bytes = {name: self._size(plan.specs[name]) for name in _CORE}
        self._output, self._output_head_bytes = output, self._size(output)
        self._most = max(1, chunk_bytes // self._output_head_bytes)
        self._least = min(self._most, -(-self._num_kv_heads // parts.MOST_PARTS))
        # Chunks left where they lie: by tensor and first head, up to which head, and the elements.
        self._pieces: dict[str, dict[int, tuple[int, Array]]] = {name: {} for name in _CORE}
        self._chunks: dict[int, OutputChunk] = {}
        self._taken = 0
        self._unfinished = 0
        self._waited = self._computed = 0.0
        self._failed = False
        self._ended = 0
        self._lock = threading.Lock()

    @classmethod
    def of(
        cls, request_id: int, plan: AttendPlan, arrays: Mapping[str, Array], chunk_bytes: int
    ) -> "EarlyHeads | None":
        """For a request that begins to arrive; None if it is better computed as a whole.

        Args:
            request_id: of the stream.
            plan: the request.
            arrays: all its tensors, those in chunks yet to be filled.
            chunk_bytes: the most that one message of the answer may hold.
        """
        output = plan.results[0]
        if (
            any((name in _CORE) != spec.chunked for name, spec in plan.specs.items())
            or plan.query_factor != 1.0
            or plan.output_region is not None
            or output.name != "output"
        ):
            return None
        try:
            work = validation.complete(plan, arrays)
        except RequestError:
            return None  # it will be said once the request has arrived
        if not parts.divisible(work):
            return None
        early = cls(request_id, plan, work, output, chunk_bytes)
        return early if early._output_head_bytes <= chunk_bytes else None

    @property
    def begun(self) -> bool:
        """Whether any heads were taken."""
        return self._taken > 0

    def keep(self, name: str, offset: int, data: memoryview) -> bool:
        """Keep a chunk where it lies, if it holds whole heads; otherwise it is to be copied.

        Args:
            name: the tensor.
            offset: bytes from its start.
            data: the chunk's elements.
        """
        size, spec = self._head_bytes[name], self._specs[name]
        # A message with more in it than the chunk would be kept as a whole.
        if offset % size or data.nbytes % size or memoryview(data.obj).nbytes > 2 * data.nbytes:
            return False
        first, count = offset // size, data.nbytes // size
        shape = (1, count * spec.shape[1] // self._num_kv_heads, *spec.shape[2:])
        elements = spec.view(data, shape)
        if not elements.flags.aligned:
            return False
        self._pieces[name][first] = (first + count, elements)
        return True

    def take(self, received: Mapping[str, int]) -> AttendWork | None:
        """The next heads to compute, if enough have come.

        Args:
            received: bytes that have come, by tensor.
        """
        there = min(received[name] // size for name, size in self._head_bytes.items())
        count = min(there - self._taken, self._most)
        last = self._taken + count == self._num_kv_heads
        if self._failed or count <= 0 or (count < self._least and not last):
            return None
        first, end = self._taken, self._taken + count
        feeds = {name: self._elements(name, first, end) for name in _CORE}
        size = self._output_head_bytes
        chunk = OutputChunk(self._request_id, self._output, first * size, count * size)
        with self._lock:
            self._taken = end
            self._unfinished += 1
            self._chunks[first] = chunk
        shape = (1, feeds["query"].shape[1], *self._output.shape[2:])
        into = self._output.view(chunk.room, shape)
        return parts.part(self.work, feeds, into, counted=last)

    def _size(self, spec: TensorSpec) -> int:
        """Bytes of a head of key and value, and what belongs to it of query or output."""
        return spec.byte_size // self._num_kv_heads

    def _elements(self, name: str, first: int, last: int) -> Array:
        """Some heads of a tensor."""
        pieces, whole = self._pieces[name], self.work.feeds[name]
        sharing = whole.shape[1] // self._num_kv_heads
        end, elements = pieces.get(first, (0, None))
        if end == last and elements is not None:
            del pieces[first]
            return elements
        # Cut unlike the other tensors, or partly copied: put together what lies apart.
        for start in [start for start in pieces if start < last]:
            end, elements = pieces.pop(start)
            whole[:, start * sharing : end * sharing] = elements
        return whole[:, first * sharing : last * sharing]

    def finished(self, clock: Clock) -> bool:
        """Count a part that has been computed; true for the one that makes the whole."""
        with self._lock:
            self._unfinished -= 1
            self._waited += clock.waited
            self._computed += clock.computed
            whole = self._unfinished == 0 and self._taken == self._num_kv_heads
            return whole and not self._failed

    def messages(self) -> Iterator[bytes]:
        """The chunks of the output, once all parts have been computed."""
        return (self._chunks[first].message for first in sorted(self._chunks))

    def failed(self) -> bool:
        """Count a part that failed, or the arrival itself; true for the first failure."""
        with self._lock:
            first = not self._failed
            self._failed = True
            return first

    def settle(self) -> bool:
        """Say that the request has arrived, or that its computation has ended; true for the second
        of the two, after which nothing uses its memory.
        """
        with self._lock:
            self._ended += 1
            return self._ended == 2

    def forfeit(self) -> None:
        """Its memory has been given back: `settle` shall not say so again."""
        with self._lock:
            self._ended = 2

    def clock(self, last: Clock) -> Clock:
        """When what happened to the whole, of which `last` ended last."""
        return Clock(last.arrived, last.validated, self._waited, self._computed, 1, True)
