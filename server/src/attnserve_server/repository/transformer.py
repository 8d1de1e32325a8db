"""What `model.json` says of a transformer besides its attention as such."""

from dataclasses import dataclass
from typing import Any

from attnserve_server.repository.fields import (
    MASKS,
    integer,
    number,
    one_of,
    optional_integer,
    yes_or_no,
)

POOLINGS = ("mean", "cls", "last")
ATTENTIONS = ("encoder", "decoder", "cross")


@dataclass(frozen=True, slots=True)
class TransformerLayer:
    """What may differ from layer to layer: the scale, and keys that a query sees (None: all)."""

    scale: float
    window: int | None


@dataclass(frozen=True, slots=True)
class TransformerAttention:
    """One attention of a transformer.

    Attributes:
        name: "encoder", "decoder" or, between the two, "cross".
        mask: as the name says: "bidirectional", "causal", "cross".
        position_bias: whether the graph gives a bias by the distance of key and query.
        layers: one entry each.
    """

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mask: str
    position_bias: bool
    layers: tuple[TransformerLayer, ...]


@dataclass(frozen=True, slots=True)
class Transformer:
    """What a transformer model has besides.

    Attributes:
        max_seq_len: 0 where positions have no end.
        decoder_start_token_id: what a target starts with; None: the model has no targets.
        attentions: one or, of an encoder-decoder, three.
    """

    family: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_seq_len: int
    pad_token_id: int
    pooling: str | None
    normalize_pooled: bool
    decoder_start_token_id: int | None
    attentions: tuple[TransformerAttention, ...]

    @property
    def has_target(self) -> bool:
        """Whether it is an encoder-decoder."""
        return self.decoder_start_token_id is not None

    def attention(self, name: str) -> TransformerAttention:
        """An attention by its name, which must be one of the model's."""
        return next(attention for attention in self.attentions if attention.name == name)


def read_transformer(content: Any, attention: Any) -> Transformer | None:
    """A transformer; one without `attentions` has the one that `attention` describes."""
    if content is None:
        return None
    num_layers = integer("transformer.num_layers", content["num_layers"])
    layer = {"scale": attention["scale"], "window": attention.get("window")}
    name = "decoder" if attention["mask"] == "causal" else "encoder"
    alone = attention | {"name": name, "layers": [layer] * num_layers}
    vocab_size = integer("transformer.vocab_size", content["vocab_size"])
    return Transformer(
        family=str(content["family"]),
        num_layers=num_layers,
        hidden_size=integer("transformer.hidden_size", content["hidden_size"]),
        vocab_size=vocab_size,
        max_seq_len=integer("transformer.max_seq_len", content["max_seq_len"], 0),
        pad_token_id=integer(
            "transformer.pad_token_id", content["pad_token_id"] or 0, 0, vocab_size - 1
        ),
        pooling=_pooling(content.get("pooling")),
        normalize_pooled=bool(content.get("normalize_pooled")),
        decoder_start_token_id=optional_integer(
            "transformer.decoder_start_token_id",
            content.get("decoder_start_token_id"),
            0,
            vocab_size - 1,
        ),
        attentions=_attentions(content.get("attentions") or [alone]),
    )


def _pooling(value: Any) -> str | None:
    return None if value is None else one_of("transformer.pooling", value, POOLINGS)


def _attentions(content: Any) -> tuple[TransformerAttention, ...]:
    attentions: list[TransformerAttention] = []
    for entry in content:
        name = one_of("transformer.attentions: name", entry["name"], ATTENTIONS)
        field = f"transformer.attentions: {name}"
        attention = TransformerAttention(
            name=name,
            num_heads=integer(f"{field}.num_heads", entry["num_heads"]),
            num_kv_heads=integer(f"{field}.num_kv_heads", entry["num_kv_heads"]),
            head_dim=integer(f"{field}.head_dim", entry["head_dim"]),
            mask=one_of(f"{field}.mask", entry["mask"], MASKS),
            position_bias=yes_or_no(f"{field}.position_bias", entry.get("position_bias", False)),
            layers=tuple(
                TransformerLayer(
                    number(f"{field}.layers: scale", layer["scale"], above_zero=True),
                    optional_integer(f"{field}.layers: window", layer.get("window")),
                )
                for layer in entry["layers"]
            ),
        )
        if not attention.layers:
            raise ValueError(f"{field}.layers: none")
        if attention.num_heads % attention.num_kv_heads:
            raise ValueError(f"{field}.num_kv_heads: {attention.num_kv_heads}; allowed: a divisor")
        if any(name == other.name for other in attentions):
            raise ValueError(f"{field}: twice")
        attentions.append(attention)
    return tuple(attentions)
