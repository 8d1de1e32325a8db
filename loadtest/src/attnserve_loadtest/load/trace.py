"""Recorded traffic: when requests came, how long they were, and which began alike.

Two public formats are read, told apart by their first line:

- Azure's LLM inference traces (https://github.com/Azure/AzurePublicDataset): CSV with the columns
  TIMESTAMP, ContextTokens, GeneratedTokens.
- Mooncake's (https://github.com/kvcache-ai/Mooncake): an object of JSON a line, with `timestamp` in
  milliseconds, `input_length`, `output_length`, and `hash_ids`: what stands for each block of 512
  tokens of the input, so that equal ids mean equal beginnings.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from attnserve_loadtest.errors import LoadTestError
from attnserve_loadtest.load.plan import Arrival
from attnserve_loadtest.load.requests import Generation, Request, Single

AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
MOONCAKE_BLOCK_TOKENS = 512

_MOST_TOKENS = 1 << 24
_MOST_SECONDS = 1e8
_SHOWN = 80


@dataclass(frozen=True, slots=True)
class Recorded:
    """One request of a trace.

    Attributes:
        arrival: seconds from the first one.
        input_length: tokens of its prompt.
        output_length: tokens that were generated.
        blocks: what stands for each block of its prompt, from the first on; none: not recorded.
    """

    arrival: float
    input_length: int
    output_length: int
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Trace:
    """Recorded traffic.

    Attributes:
        name: of the file.
        kind: `azure` or `mooncake`.
        requests: by arrival.
    """

    name: str
    kind: str
    requests: tuple[Recorded, ...]

    @property
    def seconds(self) -> float:
        """From the first arrival to the last."""
        return self.requests[-1].arrival

    def arrivals(
        self, *, speed: float = 1.0, length_scale: float = 1.0, single: bool = False
    ) -> tuple[Arrival, ...]:
        """What is due when.

        Args:
            speed: how many times faster than recorded.
            length_scale: what all lengths are multiplied by; none becomes less than 1.
            single: requests with one answer, of the input's length, instead of sessions.
        """

        def scaled(tokens: int) -> int:
            return max(1, round(tokens * length_scale)) if tokens else 0

        def made(each: Recorded) -> Request:
            prompt = scaled(each.input_length)
            if single:
                return Single(prompt)
            blocks = max(1, round(MOONCAKE_BLOCK_TOKENS * length_scale)) if each.blocks else 0
            return Generation(prompt, scaled(each.output_length), 0.0, each.blocks, blocks)

        return tuple(Arrival(each.arrival / speed, made(each)) for each in self.requests)


def read_trace(path: Path, limit: int | None = None) -> Trace:
    """Read a trace; whatever order its lines have, requests come by arrival.

    Args:
        path: of the file.
        limit: the first so many requests by arrival; None: all.

    Raises:
        LoadTestError: it cannot be read; of a broken line the message has the number, what was
            given and what is allowed.
    """
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except OSError as error:
        raise LoadTestError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise LoadTestError(f"{path} is no text in UTF-8") from None
    first = next((line for line in lines if line.strip()), "")
    kind = "mooncake" if first.lstrip().startswith("{") else "azure"
    read = _mooncake if kind == "mooncake" else _azure
    found = sorted(read(path, lines), key=lambda each: each.arrival)
    if not found:
        raise LoadTestError(f"{path} has no requests")
    start = found[0].arrival
    requests = [
        Recorded(each.arrival - start, each.input_length, each.output_length, each.blocks)
        for each in found[:limit]
    ]
    return Trace(path.name, kind, tuple(requests))


def _azure(path: Path, lines: Sequence[str]) -> Iterator[Recorded]:
    columns: list[int] | None = None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        cells = [cell.strip() for cell in line.split(",")]
        if columns is None:
            if not set(AZURE_COLUMNS) <= set(cells):
                _refuse(
                    path, number, line,
                    f"the columns {','.join(AZURE_COLUMNS)}, or an object of JSON",
                )  # fmt: skip
            columns = [cells.index(name) for name in AZURE_COLUMNS]
            width = len(cells)
            continue
        if len(cells) != width:
            _refuse(path, number, line, f"{width} values between commas")
        when, tokens, generated = (cells[column] for column in columns)
        try:
            moment = datetime.fromisoformat(when)
        except ValueError:
            _refuse(path, number, line, "TIMESTAMP as 2023-11-16 18:15:46.6805900")
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        yield Recorded(
            moment.timestamp(),
            _tokens(path, number, line, "ContextTokens", tokens, 1),
            _tokens(path, number, line, "GeneratedTokens", generated, 0),
        )


def _mooncake(path: Path, lines: Sequence[str]) -> Iterator[Recorded]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found: Any = json.loads(line)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            _refuse(path, number, line, "an object of JSON")
        when = found.get("timestamp")
        if (
            isinstance(when, bool)
            or not isinstance(when, int | float)
            or not 0 <= when <= _MOST_SECONDS * 1e3
        ):
            _refuse(path, number, line, "timestamp, milliseconds of 0 or more")
        length = _tokens(path, number, line, "input_length", found.get("input_length"), 1)
        yield Recorded(
            when / 1e3,
            length,
            _tokens(path, number, line, "output_length", found.get("output_length"), 0),
            _blocks(path, number, line, found.get("hash_ids", []), length),
        )


def _blocks(path: Path, number: int, line: str, given: Any, length: int) -> tuple[int, ...]:
    most = math.ceil(length / MOONCAKE_BLOCK_TOKENS)
    if (
        not isinstance(given, list)
        or any(isinstance(each, bool) or not isinstance(each, int) for each in given)
        or len(given) > most
    ):
        _refuse(
            path, number, line,
            f"hash_ids, integers, one for each {MOONCAKE_BLOCK_TOKENS} tokens of input_length, "
            f"{most} at most",
        )  # fmt: skip
    return tuple(given)


def _tokens(path: Path, number: int, line: str, name: str, given: Any, lowest: int) -> int:
    value = -1
    if isinstance(given, int) and not isinstance(given, bool):
        value = given
    elif isinstance(given, str) and given.isascii() and given.isdigit() and len(given) < 12:
        value = int(given)
    if not lowest <= value <= _MOST_TOKENS:
        _refuse(path, number, line, f"{name}, an integer, {lowest}..{_MOST_TOKENS}")
    return value


def _refuse(path: Path, number: int, line: str, allowed: str) -> NoReturn:
    shown = line if len(line) <= _SHOWN else f"{line[:_SHOWN]}..."
    raise LoadTestError(f"{path}, line {number}: given {shown!r}; allowed: {allowed}")
