"""Requests of token models once they are checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from attnserve_proto.manifest import ModelInput, TransformerAttention

from attnserve_server.dtypes import Array
from attnserve_server.models.store import LoadedModel, Variant


@dataclass(frozen=True, slots=True)
class HeadsWanted:
    """What to return of a transformer's attention; layers and heads are never empty.

    Attributes:
        attention: which of the model's.
        layers, heads: in the order asked for.
        weights, entropy, effective_context: whether.
        mass_by_distance, mass_on_first: N; 0: not.
    """

    attention: TransformerAttention
    layers: Sequence[int]
    heads: Sequence[int]
    weights: bool
    entropy: bool
    effective_context: bool
    mass_by_distance: int
    mass_on_first: int

    @property
    def names(self) -> list[str]:
        """What is wanted, by the names of fields of `SequenceResult`."""
        asked = {
            "weights": self.weights,
            "entropy": self.entropy,
            "effective_context": self.effective_context,
            "mass_by_distance": self.mass_by_distance,
            "mass_on_first": self.mass_on_first,
        }
        return [name for name, value in asked.items() if value]


@dataclass(frozen=True, slots=True)
class TokensWanted:
    """What to return of a transformer's run; `heads` is None if nothing of its attention is."""

    hidden: bool
    pooled: bool
    heads: HeadsWanted | None


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Sequences of token ids.

    Attributes:
        truncated: of each sequence, whether it was cut.
        types: of each id what kind of token it is; None: 0.
        prompt_len: ids at the beginning of each that do not count for its vector.
    """

    sequences: Sequence[Sequence[int]]
    truncated: Sequence[bool]
    types: Sequence[Sequence[int]] | None = None
    prompt_len: int = 0

    @property
    def lengths(self) -> list[int]:
        """Tokens of each one."""
        return [len(sequence) for sequence in self.sequences]

    @property
    def longest(self) -> int:
        """Tokens of the longest one."""
        return max(self.lengths)


@dataclass(frozen=True, slots=True)
class TensorBatch:
    """What a model reads in the place of token ids, a sequence a row.

    Attributes:
        entry: which of the model's inputs.
        array: [B, ...]; of bfloat16 the bits.
        lengths: tokens of each sequence, padding left out.
    """

    entry: ModelInput
    array: Array
    lengths: Sequence[int]

    @property
    def longest(self) -> int:
        """Tokens of the longest one."""
        return max(self.lengths)

    @property
    def sequences(self) -> Sequence[Sequence[int]]:
        """No ids."""
        return [()] * len(self.lengths)

    @property
    def truncated(self) -> Sequence[bool]:
        """Nothing was cut."""
        return [False] * len(self.lengths)

    @property
    def types(self) -> None:
        """Nothing is said of kinds of token."""

    @property
    def prompt_len(self) -> int:
        """All tokens count for the vector."""
        return 0


@dataclass(frozen=True, slots=True)
class TokensWork:
    """Sequences to run through a transformer: checked, complete, ready to run.

    Attributes:
        source: what it reads.
        target: what the decoder of an encoder-decoder reads; None: it is none.
        priority: as the scheduler has it.
        working_bytes: estimated memory that it takes while it runs.
    """

    model: LoadedModel
    variant: Variant
    source: TokenBatch | TensorBatch
    target: TokenBatch | None
    wanted: TokensWanted
    priority: int
    working_bytes: int = 0

    @property
    def count(self) -> int:
        """How many sequences there are."""
        return len(self.source.lengths)


@dataclass(frozen=True, slots=True)
class SequenceOutput:
    """One sequence's share of a transformer's run, without padding.

    Attributes:
        arrays: by their names in `SequenceResult`.
    """

    arrays: Mapping[str, Array]
