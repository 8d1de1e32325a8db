"""The attention that Hugging Face's modules call while they are exported.

Transformers lets attention be replaced by a function (`AttentionInterface`). This one computes it
by nodes of our choice and keeps what every call was given, so that one graph gives the hidden
states and, for whoever fetches them, query and key of every layer: weights and what they say are
computed from those, for the asked-for heads alone.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from attnserve_export.attention.core import DOMAIN
from attnserve_export.checkpoints.families import DECODER, ENCODER, ENCODER_DECODER
from attnserve_export.errors import ExportError

# What to give to transformers as `attn_implementation`.
IMPLEMENTATION = "attnserve_export"

CROSS = "cross"

# The attentions of a model, by the kind of its family.
ATTENTIONS: Mapping[str, tuple[str, ...]] = {
    ENCODER: (ENCODER,),
    DECODER: (DECODER,),
    ENCODER_DECODER: (ENCODER, DECODER, CROSS),
}

# Parts of the names of modules that attend to the source.
_CROSS_MODULES = ("EncDecAttention", "encoder_attn")

# Arguments that would change the scores in a way that graphs and server know nothing of.
_UNKNOWN = ("softcap", "s_aux")


@dataclass(frozen=True)
class Call:
    """What one layer's attention was given.

    Attributes:
        query: [B, H, Sq, D], rotary embedding and norms applied.
        key: [B, Hkv, Sk, D], likewise.
        scale: multiplies query x key.
        window: keys up to its own that a query sees; None: all.
        bias: [1, H, Sq, Sk], added to the scores; None: nothing.
    """

    query: Tensor
    key: Tensor
    scale: float
    window: int | None
    bias: Tensor | None


@dataclass
class Tracer:
    """Attention for one export of one model.

    Attributes:
        model: from transformers, loaded with `IMPLEMENTATION`.
        kind: of its family.
        native: whether to use the operator of attnserve-kernels.
        calls: what each attention's layers were given, once the model has been traced.
    """

    model: nn.Module
    kind: str
    native: bool
    calls: dict[str, list[Call]] = field(default_factory=dict)
    _lengths: Mapping[str, Tensor] = field(default_factory=dict)
    _masks: dict[tuple[str, int | None], Tensor] = field(default_factory=dict)

    @contextlib.contextmanager
    def tracing(self, lengths: Mapping[str, Tensor]) -> Iterator[None]:
        """Be the attention of the model for the length of a `with` block.

        Args:
            lengths: of each attention's valid keys, [B].
        """
        global _current
        self.calls = {name: [] for name in ATTENTIONS[self.kind]}
        self._lengths, self._masks = lengths, {}
        self._names = {id(module): name for name, module in self.model.named_modules()}
        _current = self
        try:
            yield
        finally:
            _current = None

    def outputs(self) -> dict[str, Tensor]:
        """What graphs give besides hidden states, by name.

        For each attention and layer, query and key; for each attention with a bias that depends on
        the distance of key and query alone, `position_bias` [H, Sq + Sk - 1]: at index
        key - query + Sq - 1.
        """
        found = {}
        for name, calls in self.calls.items():
            for layer, call in enumerate(calls):
                found[f"{name}_query_{layer}"] = call.query
                found[f"{name}_key_{layer}"] = call.key
            if calls[0].bias is not None:
                last, first = calls[0].bias[0, :, -1, :], calls[0].bias[0, :, 0, 1:]
                found[f"{name}_position_bias"] = torch.cat((last, first), dim=-1)
        return found

    def attend(self, module: nn.Module, call: Call, value: Tensor) -> Tensor:
        """Compute one attention: [B, H, Sq, Dv]."""
        name = self._attention_of(module)
        if name == CROSS:
            call = replace(call, bias=None)  # T5 gives a bias of zeros
        self.calls[name].append(call)
        return self._native(name, call, value) if self.native else self._fused(name, call, value)

    def _attention_of(self, module: nn.Module) -> str:
        if self.kind != ENCODER_DECODER:
            return self.kind
        path = self._names[id(module)]
        if any(part in path for part in _CROSS_MODULES):
            return CROSS
        return ENCODER if path.startswith("encoder") else DECODER

    def _fused(self, name: str, call: Call, value: Tensor) -> Tensor:
        plain = name == DECODER and call.window is None and call.bias is None
        return nn.functional.scaled_dot_product_attention(
            call.query,
            call.key,
            value,
            attn_mask=None if plain else self._mask(name, call),
            is_causal=plain,
            scale=call.scale,
            enable_gqa=call.key.shape[1] != call.query.shape[1],
        )

    def _mask(self, name: str, call: Call) -> Tensor:
        """Who sees whom; one for all layers that are alike, so that the graph has it once.

        Padding comes last, so that under a causal mask no valid query sees any of it. Masks are
        written out over batch and queries, since ONNX Runtime's Attention does not broadcast those.
        """
        key = (name, call.window)
        if key in self._masks:
            return self._masks[key]
        query_len, key_len = call.query.shape[2], call.key.shape[2]
        keys = torch.arange(key_len)
        if name == DECODER:
            queries = torch.arange(query_len)[:, None]
            visible = keys <= queries
            if call.window is not None:
                visible &= keys > queries - call.window
            visible = visible.expand(call.query.shape[0], 1, -1, -1)  # (B, 1, Sq, Sk)
        else:
            visible = (keys < self._lengths[name][:, None])[:, None, None, :]
            visible = visible.expand(-1, 1, query_len, -1)  # (B, 1, Sq, Sk)
        if call.bias is not None:
            lowest = torch.finfo(call.bias.dtype).min
            visible = torch.where(visible, call.bias, lowest)
        self._masks[key] = visible
        return visible

    def _native(self, name: str, call: Call, value: Tensor) -> Tensor:
        query = call.query
        output: Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::Attention",
            (query, call.key, value, self._lengths[name], call.bias, None, None),
            {
                "scale": call.scale,
                "softcap": 0.0,
                "left": -1 if call.window is None else call.window - 1,
                "right": 0 if name == DECODER else -1,
                "bottom_right": 0,
            },
            dtype=query.dtype,
            shape=(*query.shape[:3], value.shape[3]),
            version=1,
        )
        return output


_current: Tracer | None = None


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    position_bias: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls; its own mask, which it does not make for us, is left out.

    Returns:
        [B, Sq, H, Dv], and no weights.
    """
    changing = [name for name in _UNKNOWN if others.get(name) is not None]
    if changing:
        raise ExportError(f"--checkpoint: its attention takes {', '.join(changing)}; allowed: none")
    if _current is None:
        raise AssertionError("attention outside of an export")
    scale = float(query.shape[-1]) ** -0.5 if scaling is None else float(scaling)
    call = Call(query, key, scale, sliding_window, position_bias)
    return _current.attend(module, call, value).transpose(1, 2), None
