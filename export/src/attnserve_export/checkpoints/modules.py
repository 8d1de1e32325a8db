"""Modules to export: token ids in, hidden states and what the attentions were given out."""

from typing import Any

import torch
from torch import Tensor, nn

from attnserve_export.checkpoints.plans import CROSS, DECODER, ENCODER, ENCODER_DECODER
from attnserve_export.checkpoints.tracing import Tracer

HIDDEN, ENCODER_HIDDEN = "last_hidden_state", "encoder_last_hidden_state"
SOURCE, TARGET = ("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask")
TYPES = "token_type_ids"

# Before the names of a model's parameters, in the modules that have it inside.
PREFIX = "model."


class OneStack(nn.Module):
    """An encoder or a decoder."""

    hidden: tuple[str, ...] = (HIDDEN,)

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.model = tracer.model
        self.tracer = tracer
        self.inputs = (*SOURCE, TYPES) if tracer.plan.token_types else SOURCE

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Hidden states, then `Tracer.outputs`.

        Args:
            input_ids: [B, S].
            attention_mask: [B, S], 1 valid, 0 padding, which comes last.
            token_type_ids: [B, S], of models that have several kinds of token.
        """
        convention, kind = self.tracer.plan.convention, self.tracer.plan.kind
        more: dict[str, object] = {}
        if token_type_ids is not None:
            more[TYPES] = token_type_ids
        if convention.no_cache:  # of keys and values, which nobody would read
            more["use_cache"] = False
        if convention.mask:
            more["attention_mask"] = attention_mask
        if convention.positions:
            # Positions are written out over the batch since ONNX's RotaryEmbedding does not
            # broadcast it.
            positions = torch.arange(input_ids.shape[1])[None, :].expand(input_ids.shape[0], -1)
            more["position_ids"] = positions
        with self.tracer.tracing({kind: attention_mask.sum(dim=-1)}):
            result = self.model(input_ids=input_ids, **more)
        return last_hidden_state(result), *self.tracer.outputs().values()


class TwoStacks(nn.Module):
    """An encoder and a decoder that attends to it."""

    inputs = (*SOURCE, *TARGET)
    hidden: tuple[str, ...] = (HIDDEN, ENCODER_HIDDEN)

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.model = tracer.model
        self.tracer = tracer

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        decoder_input_ids: Tensor,
        decoder_attention_mask: Tensor,
    ) -> tuple[Tensor, ...]:
        """Hidden states of the decoder and of the encoder, then `Tracer.outputs`.

        Args:
            input_ids: [B, S].
            attention_mask: [B, S], 1 valid, 0 padding, which comes last.
            decoder_input_ids: [B, T].
            decoder_attention_mask: [B, T], likewise.
        """
        convention = self.tracer.plan.convention
        more: dict[str, object] = {"use_cache": False} if convention.no_cache else {}
        if convention.mask:
            more |= {
                "attention_mask": attention_mask,
                "decoder_attention_mask": decoder_attention_mask,
            }
        source = attention_mask.sum(dim=-1)
        lengths = {ENCODER: source, DECODER: decoder_attention_mask.sum(dim=-1), CROSS: source}
        with self.tracer.tracing(lengths):
            result = self.model(input_ids=input_ids, decoder_input_ids=decoder_input_ids, **more)
        states = (last_hidden_state(result), result.encoder_last_hidden_state)
        return (*states, *self.tracer.outputs().values())


def last_hidden_state(result: Any) -> Tensor:
    """Of what a model answers."""
    given = getattr(result, HIDDEN, None)
    state: Tensor = result[0] if given is None else given
    return state


def module_for(tracer: Tracer) -> OneStack | TwoStacks:
    """The module that a tracer's model is exported as."""
    if tracer.plan.kind == ENCODER_DECODER:
        return TwoStacks(tracer)
    return OneStack(tracer)
