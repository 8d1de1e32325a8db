"""Modules to export: token ids, or what is in their place, in; hidden states and what attentions
were given out.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attnserve_export.checkpoints.overflow import BothBranches
from attnserve_export.checkpoints.plans import (
    CROSS,
    DECODER,
    ENCODER,
    STATES_DECODER,
)
from attnserve_export.checkpoints.tracing import Tracer

HIDDEN, ENCODER_HIDDEN = "last_hidden_state", "encoder_last_hidden_state"
MASK, TARGET = "attention_mask", ("decoder_input_ids", "decoder_attention_mask")
TYPES = "token_type_ids"

# Before the names of a model's parameters, in the modules that have it inside.
PREFIX = "model."


class _Traced(nn.Module):
    """A model whose attention is a tracer's.

    Attributes:
        inputs: what `forward` takes, in order.
        hidden: the first of what it gives.
    """

    hidden: tuple[str, ...] = (HIDDEN,)

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.model = tracer.model
        self.tracer = tracer
        self.source = tracer.plan.source.name
        self.inputs: tuple[str, ...] = (self.source, MASK)

    def _read(self, given: Mapping[str, Tensor], lengths: Mapping[str, Tensor | None]) -> Any:
        more = {"use_cache": False} if self.tracer.plan.convention.no_cache else {}
        source = given[self.source]
        if self.tracer.by_lengths and source.is_floating_point():
            computed: Any = self.model.dtype
            given = {**given, self.source: source.to(computed)}
        with self.tracer.tracing(lengths), BothBranches():
            # Of keys and values that are cached nobody would read any.
            return self.model(**given, **more)


class OneStack(_Traced):
    """An encoder or a decoder over sequences that may be padded."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__(tracer)
        if tracer.plan.token_types:
            self.inputs = (*self.inputs, TYPES)

    def forward(
        self, source: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Hidden states, then `Tracer.outputs`.

        Args:
            source: [B, S] ids, or [B, S, E].
            attention_mask: [B, S], 1 valid, 0 padding, which comes last.
            token_type_ids: [B, S], of models that have several kinds of token.
        """
        convention, kind = self.tracer.plan.convention, self.tracer.plan.kind
        given = {self.source: source}
        if token_type_ids is not None:
            given[TYPES] = token_type_ids
        if convention.mask:
            given[MASK] = attention_mask
        if convention.positions:
            given["position_ids"] = _positions(source)
        result = self._read(given, {kind: attention_mask.sum(dim=-1)})
        return last_hidden_state(result), *self.tracer.outputs().values()


class WholeStack(_Traced):
    """An encoder over what is always as long: pictures, sounds."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__(tracer)
        self.inputs = (self.source,)

    def forward(self, source: Tensor) -> tuple[Tensor, ...]:
        """Hidden states, then `Tracer.outputs`.

        Args:
            source: [B, ...], as the model takes it.
        """
        result = self._read({self.source: source}, {self.tracer.plan.kind: None})
        return last_hidden_state(result), *self.tracer.outputs().values()


class TwoStacks(_Traced):
    """An encoder and a decoder that attends to it."""

    hidden: tuple[str, ...] = (HIDDEN, ENCODER_HIDDEN)

    def __init__(self, tracer: Tracer) -> None:
        super().__init__(tracer)
        self.inputs = (self.source, MASK, *TARGET)

    def forward(
        self,
        source: Tensor,
        attention_mask: Tensor,
        decoder_input_ids: Tensor,
        decoder_attention_mask: Tensor,
    ) -> tuple[Tensor, ...]:
        """Hidden states of the decoder and of the encoder, then `Tracer.outputs`.

        Args:
            source: [B, S] ids, or [B, S, E].
            attention_mask: [B, S], 1 valid, 0 padding, which comes last.
            decoder_input_ids: [B, T].
            decoder_attention_mask: [B, T], likewise.
        """
        given = {self.source: source}
        if self.tracer.plan.convention.mask:
            given[MASK] = attention_mask
        lengths = attention_mask.sum(dim=-1)
        return self._decoded(given, lengths, decoder_input_ids, decoder_attention_mask)

    def _decoded(
        self, given: dict[str, Tensor], lengths: Tensor | None, ids: Tensor, mask: Tensor
    ) -> tuple[Tensor, ...]:
        given["decoder_input_ids"] = ids
        if self.tracer.plan.convention.mask:
            given["decoder_attention_mask"] = mask
        result = self._read(given, {ENCODER: lengths, DECODER: mask.sum(dim=-1), CROSS: lengths})
        states = (last_hidden_state(result), result.encoder_last_hidden_state)
        return (*states, *self.tracer.outputs().values())


class OverStates(_Traced):
    """A decoder that attends to states that it is given."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__(tracer)
        self.inputs = (self.source, MASK, *TARGET)

    def forward(
        self,
        source: Tensor,
        attention_mask: Tensor,
        decoder_input_ids: Tensor,
        decoder_attention_mask: Tensor,
    ) -> tuple[Tensor, ...]:
        """Hidden states, then `Tracer.outputs`.

        Args:
            source: [B, S, E].
            attention_mask: [B, S], 1 valid, 0 padding, which comes last.
            decoder_input_ids: [B, T].
            decoder_attention_mask: [B, T], likewise.
        """
        plan, (ids, mask) = self.tracer.plan, TARGET
        given = {self.source: source, plan.argument(ids): decoder_input_ids}
        if plan.convention.mask:
            given |= {
                plan.argument(MASK): attention_mask,
                plan.argument(mask): decoder_attention_mask,
            }
        if plan.convention.positions:
            given["position_ids"] = _positions(decoder_input_ids)
        lengths = {DECODER: decoder_attention_mask.sum(dim=-1), CROSS: attention_mask.sum(dim=-1)}
        result = self._read(given, lengths)
        return last_hidden_state(result), *self.tracer.outputs().values()


class WholeAndTarget(TwoStacks):
    """The same over sources that are always as long."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__(tracer)
        self.inputs = (self.source, *TARGET)

    def forward(  # type: ignore[override]
        self, source: Tensor, decoder_input_ids: Tensor, decoder_attention_mask: Tensor
    ) -> tuple[Tensor, ...]:
        """As `TwoStacks`, without a mask of the source: [B, ...], as the model takes it."""
        given = {self.source: source}
        return self._decoded(given, None, decoder_input_ids, decoder_attention_mask)


def _positions(rows: Tensor) -> Tensor:
    """0, 1, ... [B, S], written out, since ONNX's RotaryEmbedding does not broadcast the batch."""
    return torch.arange(rows.shape[1])[None, :].expand(rows.shape[0], -1)


def last_hidden_state(result: Any) -> Tensor:
    """Of what a model answers."""
    given = getattr(result, HIDDEN, None)
    state: Tensor = result[0] if given is None else given
    return state


def module_for(tracer: Tracer) -> OneStack | WholeStack | TwoStacks | OverStates:
    """The module that a tracer's model is exported as."""
    ragged = tracer.plan.source.ragged
    if tracer.plan.kind == STATES_DECODER:
        return OverStates(tracer)
    if tracer.plan.has_target:
        return TwoStacks(tracer) if ragged else WholeAndTarget(tracer)
    return OneStack(tracer) if ragged else WholeStack(tracer)
