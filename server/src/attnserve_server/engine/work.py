"""Validated work, as it is handed to the engine."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

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
    mass_by_distance: int

    @property
    def diagnosed(self) -> bool:
        """Whether anything is wanted that the weights say."""
        return bool(self.entropy or self.top_k or self.mass_per_key or self.mass_by_distance)


@dataclass(frozen=True, slots=True)
class Dims:
    """The sizes of one attention."""

    batch: int
    num_heads: int
    query_len: int
    key_len: int


@dataclass(frozen=True, slots=True)
class AttendWork:
    """An attention to compute: checked, complete, ready to run.

    Attributes:
        variant: that gives output and weights, or, if neither is wanted, the diagnosis.
        diagnosis: that gives what the weights say; None: nothing, or from the weights themselves.
        feeds: inputs of both.
        kind: equal for works that can run as one, if `joinable`, and take alike long.
        into: arrays to put results into, by their field name in `AttendResponse`; the others are
            made.
        tensor_bytes: of what comes in.
        working_bytes: estimated memory that it takes while it runs.
    """

    model: LoadedModel
    variant: Variant
    diagnosis: Variant | None
    feeds: Mapping[str, Array]
    wanted: Wanted
    dims: Dims
    kind: Hashable = None
    joinable: bool = False
    into: Mapping[str, Array] = field(default_factory=dict)
    tensor_bytes: int = 0
    working_bytes: int = 0


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
    working_bytes: int = 0
    priority: int = 2


@dataclass(frozen=True, slots=True)
class SequenceOutput:
    """One sequence's share of a transformer's run, without padding."""

    hidden: Array | None
    pooled: Array | None
    weights: Array | None
    entropy: Array | None
