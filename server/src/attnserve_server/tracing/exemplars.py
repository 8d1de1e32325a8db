"""Exemplars: for each bucket of a histogram, the trace of a request that fell into it."""

import threading
from collections.abc import Iterator, Sequence

from attnserve_dataplane import SECONDS_BUCKETS, CallRecord
from prometheus_client.samples import Exemplar

from attnserve_server.tracing.phases import Mark

_Key = tuple[str, str, str]


class Exemplars:
    """The last one of each bucket of `attnserve_request_seconds`. Any thread.

    Bounded: models that are loaded, or were, times their variants, three parts and the buckets.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: dict[_Key, dict[int, Exemplar]] = {}

    def add(self, record: CallRecord, epoch: int) -> None:
        """Keep those of a record.

        Args:
            record: of a call or request; one that ran nothing has none.
            epoch: nanoseconds since 1970 at which the data plane's clock was 0.
        """
        marks = record.marks
        if not record.model or not marks[Mark.ENDED]:
            return
        labels = {"trace_id": record.trace_id.hex(), "span_id": record.span_id.hex()}
        at = (epoch + marks[Mark.ENDED]) / 1e9
        for part, nanoseconds in _parts(marks, record.of_stream):
            value = max(0, nanoseconds) / 1e9
            bucket = next(
                (index for index, bound in enumerate(SECONDS_BUCKETS) if value <= bound),
                len(SECONDS_BUCKETS),
            )
            with self._lock:
                kept = self._kept.setdefault((record.model, record.variant, part), {})
                kept[bucket] = Exemplar(labels, value, at)

    def of(self, model: str, variant: str, part: str) -> list[Exemplar | None]:
        """Of each bucket of a histogram, the last one included, in their order."""
        with self._lock:
            kept = dict(self._kept.get((model, variant, part), {}))
        return [kept.get(bucket) for bucket in range(len(SECONDS_BUCKETS) + 1)]


def _parts(marks: Sequence[int], of_stream: bool) -> Iterator[tuple[str, int]]:
    """The parts of a request as the data plane's histograms have them."""
    begun = marks[Mark.ARRIVED if of_stream else Mark.RECEIVED]
    yield "deserialize", marks[Mark.CHECKED] - begun
    yield "queue", marks[Mark.STARTED] - marks[Mark.CHECKED]
    yield "compute", marks[Mark.ENDED] - marks[Mark.STARTED]
