"""Sums up the server's own timings beside Locust's statistics, across worker processes too."""

import logging
from dataclasses import astuple, dataclass, fields
from typing import Any

from attnserve_loadtest.samples import Sample

_KEY = "attnserve_timings"


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over the answered requests of one row of Locust's statistics.

    Attributes:
        answers: how many there were.
        end_to_end_us: microseconds, summed.
        batch_size: sequences that ran together in the server, summed over the requests.
        split: requests in the sums that follow: those whose time can be split.
        deserialize_us, queue_us, compute_us, serialize_us, wire_us: microseconds, summed.
    """

    answers: int = 0
    end_to_end_us: float = 0.0
    batch_size: int = 0
    split: int = 0
    deserialize_us: float = 0.0
    queue_us: float = 0.0
    compute_us: float = 0.0
    serialize_us: float = 0.0
    wire_us: float = 0.0

    def __add__(self, other: "Totals") -> "Totals":
        return Totals(
            *(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True))
        )


@dataclass(frozen=True, slots=True)
class RowMeans:
    """Means over the answered requests of one row, in milliseconds.

    Attributes:
        method: `Attend` or `AttendTokens`.
        name: the row's name.
        answers: how many there were.
        end_to_end_ms: from the call of the SDK to its return.
        deserialize_ms, queue_ms, compute_ms, serialize_ms: the server's own, spans that follow one
            another.
        wire_ms: end to end less those; see `attnserve_loadtest.samples.Parts`.
        batch_size: sequences that ran together in the server.

    The parts are None where the time of no request can be split.
    """

    method: str
    name: str
    answers: int
    end_to_end_ms: float
    deserialize_ms: float | None
    queue_ms: float | None
    compute_ms: float | None
    serialize_ms: float | None
    wire_ms: float | None
    batch_size: float


class TimingsCollector:
    """Listens to a Locust environment: in a worker it hands its sums to the master's."""

    def __init__(self, environment: Any) -> None:
        self._rows: dict[tuple[str, str], Totals] = {}
        self._environment = environment
        events = environment.events
        events.request.add_listener(self._on_request)
        events.report_to_master.add_listener(self._on_report_to_master)
        events.worker_report.add_listener(self._on_worker_report)
        events.test_start.add_listener(self._clear)
        events.reset_stats.add_listener(self._clear)
        events.quitting.add_listener(self._print)

    def rows(self) -> list[RowMeans]:
        """The means so far, by method and name; the lengths of a model in order."""
        return [_means(method, name, totals) for (method, name), totals in self._sorted()]

    def _sorted(self) -> list[tuple[tuple[str, str], Totals]]:
        def by_length(item: tuple[tuple[str, str], Totals]) -> tuple[str, str, int]:
            method, name = item[0]
            front, _, seq_len = name.rpartition("=")
            return method, front, int(seq_len) if seq_len.isdigit() else 0

        return sorted(self._rows.items(), key=by_length)

    def _on_request(
        self, request_type: str, name: str, context: dict[str, Any] | None = None, **_: Any
    ) -> None:
        sample = (context or {}).get("sample")
        if isinstance(sample, Sample) and sample.timings is not None:
            parts = sample.parts()
            split = (0,) if parts is None else (1, *astuple(parts))
            self._add(
                request_type,
                name,
                Totals(1, sample.end_to_end_us, sample.timings.batch_size, *split),
            )

    def _on_report_to_master(self, client_id: str, data: dict[str, Any]) -> None:
        data[_KEY] = [[*key, *astuple(totals)] for key, totals in self._rows.items()]
        self._rows.clear()

    def _on_worker_report(self, client_id: str, data: dict[str, Any]) -> None:
        for method, name, *sums in data.get(_KEY, ()):
            self._add(method, name, Totals(*sums))

    def _add(self, method: str, name: str, totals: Totals) -> None:
        self._rows[method, name] = self._rows.get((method, name), Totals()) + totals

    def _clear(self, **_: Any) -> None:
        self._rows.clear()

    def _print(self, **_: Any) -> None:
        rows = self.rows()
        if not rows:
            return
        log = logging.getLogger("locust.stats_logger")
        width = max(len(row.name) for row in rows)
        names = [field.name for field in fields(RowMeans)][3:]
        log.info(
            "Means of the server's own timings "
            "(milliseconds; wire = end to end - deserialize - queue - compute - serialize)"
        )
        log.info(f"{'Name':<{width}}  " + " ".join(f"{name:>14}" for name in names))
        for row in rows:
            values = " ".join(f"{_text(getattr(row, name)):>14}" for name in names)
            log.info(f"{row.name:<{width}}  {values}")
        log.info("")


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _means(method: str, name: str, totals: Totals) -> RowMeans:
    def part_ms(total_us: float) -> float | None:
        return total_us / totals.split / 1e3 if totals.split else None

    return RowMeans(
        method=method,
        name=name,
        answers=totals.answers,
        end_to_end_ms=totals.end_to_end_us / totals.answers / 1e3,
        deserialize_ms=part_ms(totals.deserialize_us),
        queue_ms=part_ms(totals.queue_us),
        compute_ms=part_ms(totals.compute_us),
        serialize_ms=part_ms(totals.serialize_us),
        wire_ms=part_ms(totals.wire_us),
        batch_size=totals.batch_size / totals.answers,
    )
