"""Validated work, as it is handed to the engine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from attnserve_server.dtypes import Array
from attnserve_server.engine.models import LoadedModel, Variant


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to return of an attention."""

    output: bool
    weights: bool
    entropy: bool
    top_k: int
    mass_per_key: bool


@dataclass(frozen=True, slots=True)
class AttendWork:
    """An attention to compute: checked, complete, ready to run."""

    model: LoadedModel
    variant: Variant
    feeds: Mapping[str, Array]
    wanted: Wanted
    batch: int


@dataclass(frozen=True, slots=True)
class TokensWanted:
    """What to return of a transformer's run; layers and heads are sorted out and never empty."""

    hidden: bool
    pooled: bool
    weights: bool
    entropy: bool
    layers: Sequence[int]
    heads: Sequence[int]


@dataclass(frozen=True, slots=True)
class TokensWork:
    """Sequences to run through a transformer: checked, complete, ready to run."""

    model: LoadedModel
    variant: Variant
    sequences: Sequence[Sequence[int]]
    truncated: Sequence[bool]
    wanted: TokensWanted


@dataclass(frozen=True, slots=True)
class SequenceOutput:
    """One sequence's share of a transformer's run, without padding."""

    hidden: Array | None
    pooled: Array | None
    weights: Array | None
    entropy: Array | None
