"""What was observed of a model, and how a graph of it is to be made."""

from collections.abc import Mapping
from dataclasses import dataclass

from attnserve_export.checkpoints.masks import Reach

ENCODER, DECODER, CROSS = "encoder", "decoder", "cross"

ENCODER_DECODER = "encoder-decoder"

# A decoder that attends to states that it is given.
STATES_DECODER = "states-decoder"

IDS, EMBEDS, STATES = "input_ids", "inputs_embeds", "encoder_hidden_states"

# What a decoder alone calls what is here named as in an encoder-decoder.
_ALONE = {
    "attention_mask": "encoder_attention_mask",
    "decoder_input_ids": "input_ids",
    "decoder_attention_mask": "attention_mask",
}


@dataclass(frozen=True)
class Source:
    """What a model reads, one sequence a row.

    Attributes:
        name: of the argument.
        shape: of one sequence; a name is a dimension of any size, the length.
        tokens: what one sequence is read as; None: as many as the dimension with the name.
        patches: of a picture: tokens that come first, rows, columns.
        frames_per_token: of a sound.
    """

    name: str = IDS
    shape: tuple[int | str, ...] = ("seq_len",)
    tokens: int | None = None
    patches: tuple[int, int, int] | None = None
    frames_per_token: int | None = None

    @property
    def ragged(self) -> bool:
        """Whether sequences may differ in length, so that there is padding."""
        return self.tokens is None


@dataclass(frozen=True)
class Convention:
    """What a model is given besides ids.

    Attributes:
        mask: which tokens are padding.
        positions: 0, 1, 2, ...
        no_cache: that nobody will read its cache.
    """

    mask: bool
    positions: bool
    no_cache: bool


@dataclass(frozen=True)
class Plan:
    """How a graph of a model is to be made.

    Attributes:
        kind: "encoder", "decoder", "encoder-decoder" or "states-decoder".
        convention: what the model is given.
        calls: of its attention, in order: whose it is, and who sees whom (None: as the model's own
            mask says).
        described: by attention: whether scale, window, sinks and position bias say all that is to
            be said of its weights, given query and key.
        biased: attentions that a position bias is added to.
        max_seq_len: tokens of the longest sequence; 0: no end.
        table: whether positions are in a table, so that there is a longest sequence.
        token_types: how many kinds of token `token_type_ids` tell apart; 0: it takes none.
        source: what the model reads.
    """

    kind: str
    convention: Convention
    calls: tuple[tuple[str, Reach | None], ...]
    described: Mapping[str, bool]
    biased: frozenset[str]
    max_seq_len: int
    table: bool
    token_types: int
    source: Source = Source()

    @property
    def has_target(self) -> bool:
        """Whether there is a decoder that attends to a source."""
        return self.kind in (ENCODER_DECODER, STATES_DECODER)

    def argument(self, name: str) -> str:
        """What the model itself calls an input of its graph."""
        return argument_of(self.kind, name)

    @property
    def attentions(self) -> tuple[str, ...]:
        """Their names, the encoder's first."""
        found = {name for name, _ in self.calls}
        return tuple(name for name in (ENCODER, DECODER, CROSS) if name in found)


def argument_of(kind: str, name: str) -> str:
    """What a model of a kind calls an input of its graph."""
    return _ALONE.get(name, name) if kind == STATES_DECODER else name
