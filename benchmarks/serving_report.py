"""What a section of the serving benchmark gives, and how it is printed."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import common

Row = dict[str, Any]


@dataclass(frozen=True)
class Bar:
    """One figure and the bound that it is held to.

    Attributes:
        text: what it is.
        value: as measured.
        bound: the most, or the least if `at_least`, that meets it.
    """

    text: str
    value: float
    bound: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether the figure is within the bound; NaN is not."""
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def row(self) -> Row:
        """For tables and JSON."""
        return {
            "bar": self.text,
            "measured": self.value,
            "bound": f"{'>=' if self.at_least else '<='} {self.bound:g}",
            "verdict": "met" if self.met else "missed",
        }


@dataclass(frozen=True)
class Section:
    """The figures of one section.

    Attributes:
        name: of the section.
        rows: one kind of row throughout.
        bars: computed from the rows.
        notes: what a reader must know besides.
    """

    name: str
    rows: Sequence[Row]
    bars: Sequence[Bar] = ()
    notes: Sequence[str] = ()

    def text(self) -> str:
        """For a terminal."""
        parts = [f"== {self.name}", *self.notes]
        parts += [common.table(self.rows)] if self.rows else []
        parts += [common.table([bar.row() for bar in self.bars])] if self.bars else []
        return "\n".join(parts) + "\n"

    def markdown(self) -> str:
        """For a document."""
        parts = [f"## {self.name}\n", *(f"{note}\n" for note in self.notes)]
        parts += [_markdown_table(self.rows)] if self.rows else []
        parts += [_markdown_table([bar.row() for bar in self.bars])] if self.bars else []
        return "\n".join(parts)

    def figures(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"bars": [asdict(bar) | {"met": bar.met} for bar in self.bars]}


def _markdown_table(rows: Sequence[Row]) -> str:
    names = list(rows[0])
    lines = [
        _line(names),
        _line("---" if name in ("bar", "contender") else "---:" for name in names),
    ]
    lines += [_line(common.text(value) for value in row.values()) for row in rows]
    return "\n".join(lines) + "\n"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
