"""The attention that Hugging Face's modules call while they are exported.

Transformers lets attention be replaced by a function (`AttentionInterface`). This one computes it
by nodes of our choice and keeps what every call was given, so that one graph gives the hidden
states and, for whoever fetches them, what weights are made of: query and key of every layer, where
scale, window and position bias say the rest, and otherwise the weights themselves.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from attnserve_export.attention.core import DOMAIN, Attributes
from attnserve_export.attention.flash import WIDEST
from attnserve_export.checkpoints.masks import EVERYTHING, Reach
from attnserve_export.checkpoints.plans import Plan
from attnserve_export.errors import ExportError

# What to give to transformers as `attn_implementation`.
IMPLEMENTATION = "attnserve_export"

# Arguments that change nothing here: for training, for the answer, or for attention by kernels
# that are not ours. Whatever else is given is refused, as it may change the scores.
_HARMLESS = frozenset(
    (
        "dropout", "is_causal", "sliding_window", "output_attentions", "output_hidden_states",
        "use_cache", "return_dict", "position_ids", "cache_position", "deterministic", "training",
        "head_mask", "layer_head_mask", "num_items_in_batch", "logits_to_keep", "target_dtype",
    )
)  # fmt: skip


@dataclass(frozen=True)
class Call:
    """What one layer's attention was given.

    Attributes:
        query: [B, H, Sq, D], rotary embedding and norms applied.
        key: [B, Hkv, Sk, D], likewise.
        scale: multiplies query x key.
        reach: who sees whom; None: as `mask` says.
        mask: the model's own, added to the scores or, if it is boolean, true where a key is seen.
        bias: [1, H, Sq, Sk], added to the scores; None: nothing.
        softcap: scores become softcap * tanh(scores / softcap); 0: they stay.
        sinks: [H], the logit of each head that stands for no key; None: there is none.
    """

    query: Tensor
    key: Tensor
    scale: float
    reach: Reach | None
    mask: Tensor | None
    bias: Tensor | None
    softcap: float
    sinks: Tensor | None


@dataclass
class Tracer:
    """Attention for one export of one model.

    Attributes:
        model: from transformers, loaded with `IMPLEMENTATION`.
        plan: what was observed of it.
        native: whether to use the operator of attnserve-kernels.
        by_lengths: whether to use nodes that ONNX Runtime runs by FlashAttention on CUDA, which
            take lengths and no masks; opset 24.
        calls: what each attention's layers were given, once the model has been traced.
        weights: of the layers whose weights the graph gives itself.
        matrices: whether any attention holds a matrix over all queries and keys.
        named: the outputs besides hidden states, by name, once the model has been traced.
    """

    model: nn.Module
    plan: Plan
    native: bool = False
    by_lengths: bool = False
    calls: dict[str, list[Call]] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    matrices: bool = False
    named: tuple[str, ...] = ()
    _lengths: Mapping[str, Tensor | None] = field(default_factory=dict)
    _masks: dict[tuple[str, Reach], Tensor] = field(default_factory=dict)
    _called: int = 0

    @contextlib.contextmanager
    def tracing(self, lengths: Mapping[str, Tensor | None]) -> Iterator[None]:
        """Be the attention of the model for the length of a `with` block.

        Args:
            lengths: of each attention's valid keys, [B]; None: there is no padding.
        """
        self.calls = {name: [] for name in self.plan.attentions}
        self._lengths, self._masks, self.weights, self._called = lengths, {}, {}, 0
        with being(self):
            yield

    def outputs(self) -> dict[str, Tensor]:
        """What graphs give besides hidden states, by name.

        For each attention and layer, query and key; for each attention with a bias that depends on
        the distance of key and query alone, `position_bias` [H, Sq + Sk - 1]: at index
        key - query + Sq - 1. Where these do not say it all, the weights of each layer.
        """
        found: dict[str, Tensor] = {}
        for name, calls in self.calls.items():
            if not self.plan.described[name]:
                found |= self.weights
                continue
            for layer, call in enumerate(calls):
                found[f"{name}_query_{layer}"] = call.query
                found[f"{name}_key_{layer}"] = call.key
            bias = calls[0].bias
            if bias is not None:
                last, first = bias[0, :, -1, :], bias[0, :, 0, 1:]
                found[f"{name}_position_bias"] = torch.cat((last, first), dim=-1)
        self.named = tuple(found)
        return found

    def attend(self, call: Call, value: Tensor) -> Tensor:
        """Compute one attention: [B, H, Sq, Dv]."""
        if self._called >= len(self.plan.calls):
            raise ExportError("--checkpoint: its attention is called once more than was observed")
        name, reach = self.plan.calls[self._called]
        self._called += 1
        bias = call.bias if name in self.plan.biased else None  # T5 gives a bias of zeros
        call = Call(
            call.query,
            call.key,
            call.scale,
            reach,
            call.mask if reach is None else None,
            bias,
            call.softcap,
            call.sinks,
        )
        layer = len(self.calls[name])
        self.calls[name].append(call)
        if self.native:
            return self._native(name, call, value)
        if self.by_lengths and _has_kernel(call, value):
            if call.reach == EVERYTHING:
                return self._padded(name, call, value)
            return self._grouped(call, value)
        self.matrices = True
        if self.plan.described[name] and not call.softcap and call.sinks is None:
            return self._fused(name, call, value)
        output, weights = self._plain(name, call, value)
        if not self.plan.described[name]:
            self.weights[f"weights_{layer}"] = weights
        return output

    def _fused(self, name: str, call: Call, value: Tensor) -> Tensor:
        causal = call.reach == Reach(None, 0) and call.bias is None
        everything = call.reach == EVERYTHING and call.bias is None and self._lengths[name] is None
        return nn.functional.scaled_dot_product_attention(
            call.query,
            call.key,
            value,
            attn_mask=None if causal or everything else self._mask(name, call),
            is_causal=causal,
            scale=call.scale,
            enable_gqa=call.key.shape[1] != call.query.shape[1],
        )

    def _plain(self, name: str, call: Call, value: Tensor) -> tuple[Tensor, Tensor]:
        """Output and weights, node by node."""
        sharing = call.query.shape[1] // call.key.shape[1]
        key, value = (each.repeat_interleave(sharing, dim=1) for each in (call.key, value))
        # In FP32 from here to the weights, as transformers has it.
        scores = (call.query @ key.transpose(2, 3) * call.scale).float()
        if call.softcap:
            scores = torch.tanh(scores / call.softcap) * call.softcap
        mask = self._mask(name, call)
        lowest = torch.finfo(scores.dtype).min
        scores = torch.where(mask, scores, lowest) if mask.dtype == torch.bool else scores + mask
        if call.sinks is None:
            weights = scores.softmax(dim=-1)
        else:
            sinks = call.sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
            weights = torch.cat((scores, sinks.float()), dim=-1).softmax(dim=-1)[..., :-1]
        return weights.to(value.dtype) @ value, weights

    def _mask(self, name: str, call: Call) -> Tensor:
        """Who sees whom; one for all layers that are alike, so that the graph has it once.

        Padding comes last, so that under a causal mask no valid query sees any of it. Masks are
        written out over batch and queries, since ONNX Runtime's Attention does not broadcast those.
        """
        if call.reach is None:
            return self._own_mask(name, call)
        cached = (name, call.reach)
        if cached in self._masks:
            return self._masks[cached]
        batch, _, query_len, _ = call.query.shape
        visible = self._visible(name, call.reach, query_len, call.key.shape[2])
        visible = visible.expand(batch, 1, query_len, -1)  # (B, 1, Sq, Sk)
        lowest = torch.finfo(call.query.dtype).min
        if call.bias is not None:
            visible = torch.where(visible, call.bias, lowest)
        elif not call.reach.causal and call.reach.left is not None:
            # A query of the padding may see no key at all: what it gets must still be a number.
            visible = torch.where(visible, 0.0, lowest).to(call.query.dtype)
        self._masks[cached] = visible
        return visible

    def _visible(self, name: str, reach: Reach, query_len: int, key_len: int) -> Tensor:
        """[B or 1, 1, Sq or 1, Sk]."""
        keys, queries = torch.arange(key_len), torch.arange(query_len)[:, None]
        if reach.causal:
            visible = keys <= queries
            if reach.left is not None:
                visible &= keys > queries - (reach.left + 1)
            return visible[None, None]
        lengths = self._lengths[name]
        valid = (keys >= 0)[None] if lengths is None else keys < lengths[:, None]
        visible = valid[:, None, None, :]
        if reach.left is not None:
            visible = visible & (keys >= queries - reach.left)
        if reach.right is not None:
            visible = visible & (keys <= queries + reach.right)
        return visible

    def _own_mask(self, name: str, call: Call) -> Tensor:
        """What the model itself gave, and no padding: [B, 1 or H, Sq, Sk], to be added."""
        mask, lowest = call.mask, torch.finfo(call.query.dtype).min
        assert mask is not None
        if mask.dtype == torch.bool:
            mask = torch.where(mask, 0.0, lowest)
        key_len, lengths = call.key.shape[2], self._lengths[name]
        mask = mask[..., :key_len]
        if lengths is not None:
            valid = torch.arange(key_len) < lengths[:, None]
            mask = torch.where(valid[:, None, None, :], mask, lowest)
        mask = mask.clamp(min=lowest).to(call.query.dtype)
        if call.bias is not None:
            mask = (mask + call.bias).clamp(min=lowest)
        return mask.expand(call.query.shape[0], -1, call.query.shape[2], -1)

    def _padded(self, name: str, call: Call, value: Tensor) -> Tensor:
        """All keys but padding, whose number is given for each sequence."""
        output: Tensor = torch.onnx.ops.symbolic(
            "Attention",
            (call.query, call.key, value, None, None, None, self._valid(name, call)),
            {"scale": call.scale},
            dtype=call.query.dtype,
            shape=(*call.query.shape[:3], value.shape[3]),
        )
        return output

    def _valid(self, name: str, call: Call) -> Tensor:
        """Of each sequence the number of keys, [B]."""
        lengths = self._lengths[name]
        if lengths is None:
            lengths = torch.full((call.query.shape[0],), call.key.shape[2], dtype=torch.int64)
        return lengths

    def _grouped(self, call: Call, value: Tensor) -> Tensor:
        """Causal attention, of which padding that comes last needs no mask."""
        assert call.reach is not None
        batch, num_heads, length, head_dim = call.query.shape
        num_kv_heads = call.key.shape[1]
        rows = [
            each.transpose(1, 2).reshape(batch, length, each.shape[1] * head_dim)
            for each in (call.query, call.key, value)
        ]
        last = torch.zeros(batch, dtype=torch.int32) + (length - 1)
        total = torch.scalar_tensor(length, dtype=torch.int32)
        none = [None] * 4
        attributes: Attributes = {
            "num_heads": num_heads,
            "kv_num_heads": num_kv_heads,
            "scale": call.scale,
            "softcap": call.softcap,
            "local_window_size": -1 if call.reach.left is None else call.reach.left + 1,
        }
        kept = (batch, num_kv_heads, length, head_dim)
        output, _, _ = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            (*rows, None, None, last, total, *none, call.sinks),
            attributes,
            dtypes=(value.dtype,) * 3,
            shapes=((batch, length, num_heads * head_dim), kept, kept),
            version=1,
        )
        return output.reshape(batch, length, num_heads, head_dim).transpose(1, 2)

    def _native(self, name: str, call: Call, value: Tensor) -> Tensor:
        query, reach, bias = call.query, call.reach, call.bias
        if reach is None:
            reach, bias = Reach(None, None), self._own_mask(name, call)
        lengths = self._valid(name, call)
        inputs = [query, call.key, value, lengths, bias, None, None]
        if call.sinks is not None:
            # Between them a mask, prefixes and packed sequences.
            inputs += [None, None, None, None, call.sinks.float()]
        output: Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::Attention",
            inputs,
            {
                "scale": call.scale,
                "softcap": call.softcap,
                "left": -1 if reach.left is None else reach.left,
                "right": -1 if reach.right is None else reach.right,
                "bottom_right": 0,
            },
            dtype=query.dtype,
            shape=(*query.shape[:3], value.shape[3]),
            version=1,
        )
        return output


def _has_kernel(call: Call, value: Tensor) -> bool:
    """Whether a node on CUDA computes an attention without any matrix of masks."""
    head_dim = call.query.shape[3]
    plain = call.reach == EVERYTHING and not call.softcap and call.sinks is None
    causal = call.reach is not None and call.reach.causal
    same = head_dim == value.shape[3] and head_dim % 8 == 0 and head_dim <= WIDEST
    return call.bias is None and same and (plain or causal)


_current: Any = None


@contextlib.contextmanager
def being(attending: Any) -> Iterator[None]:
    """Let `attending.attend` be the attention of all models for the length of a `with` block."""
    global _current
    _current = attending
    try:
        yield
    finally:
        _current = None


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls.

    Returns:
        [B, Sq, H, Dv], and no weights.
    """
    changing = sorted(n for n, given in others.items() if n not in _HARMLESS and given is not None)
    if changing:
        raise ExportError(
            f"--checkpoint: its attention is given {', '.join(changing)}, which nothing is known of"
        )
    if _current is None:
        raise AssertionError("attention outside of an export")
    scale = float(query.shape[-1]) ** -0.5 if scaling is None else float(scaling)
    call = Call(
        query,
        key,
        scale,
        None,
        attention_mask,
        position_bias,
        float(softcap or 0.0),
        s_aux if s_aux is not None else sinks,
    )
    output: Tensor = _current.attend(call, value)
    return output.transpose(1, 2).contiguous(), None
