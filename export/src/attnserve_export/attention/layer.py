"""Attention layers: projections around the core."""

from dataclasses import dataclass

from torch import Tensor, nn

from attnserve_export.attention.core import AttentionConfig, Core
from attnserve_export.attention.variants import DIAGNOSTICS, VariantSpec
from attnserve_export.errors import ExportError


@dataclass(frozen=True)
class LayerConfig:
    """An attention layer.

    Attributes:
        attention: of its core.
        embed_dim: E, width of the hidden states.
        context_dim: width of the context of a cross-attention layer; None: self-attention.
        bias_terms: whether the projections add a bias.
    """

    attention: AttentionConfig
    embed_dim: int
    context_dim: int | None
    bias_terms: bool = True


class AttentionLayer(nn.Module):
    """Projections to query, key and value, the core, and the projection of its output.

    Parameters: `q_proj`, `k_proj`, `v_proj` and `o_proj`, each a `torch.nn.Linear`.
    """

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        attention = config.attention
        source = config.context_dim or config.embed_dim
        self.config = config
        query_width = attention.num_heads * attention.head_dim
        key_width = attention.num_kv_heads * attention.head_dim
        value_width = attention.num_kv_heads * attention.value_head_dim
        output_width = attention.num_heads * attention.value_head_dim
        self.q_proj = nn.Linear(config.embed_dim, query_width, bias=config.bias_terms)
        self.k_proj = nn.Linear(source, key_width, bias=config.bias_terms)
        self.v_proj = nn.Linear(source, value_width, bias=config.bias_terms)
        self.o_proj = nn.Linear(output_width, config.embed_dim, bias=config.bias_terms)

    @classmethod
    def of_multihead(cls, module: nn.MultiheadAttention, mask: str) -> "AttentionLayer":
        """The same layer as a `torch.nn.MultiheadAttention`, its parameters taken over.

        Raises:
            ExportError: the module adds keys of its own.
        """
        added = {"add_zero_attn": module.add_zero_attn, "add_bias_kv": module.bias_k is not None}
        if any(added.values()):
            given = " and ".join(name for name, is_on in added.items() if is_on)
            raise ExportError(f"module: given with {given}; allowed: without")
        head_dim = module.head_dim
        attention = AttentionConfig(
            num_heads=module.num_heads,
            head_dim=head_dim,
            num_kv_heads=module.num_heads,
            value_head_dim=head_dim,
            mask=mask,
            scale=head_dim**-0.5,
        )
        has_bias = module.in_proj_bias is not None
        context = module.kdim if mask == "cross" else None
        layer = cls(LayerConfig(attention, module.embed_dim, context, has_bias))
        if module.in_proj_weight is not None:
            weights = module.in_proj_weight.chunk(3)
        else:
            weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        state = {f"{n}_proj.weight": w for n, w in zip("qkv", weights, strict=True)}
        state["o_proj.weight"] = module.out_proj.weight
        if has_bias:
            biases = module.in_proj_bias.chunk(3)
            state |= {f"{n}_proj.bias": b for n, b in zip("qkv", biases, strict=True)}
            state["o_proj.bias"] = module.out_proj.bias
        layer.load_state_dict(state)
        return layer

    def heads(self, hidden_states: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Projected query [B, H, Sq, D], key [B, Hkv, Sk, D] and value [B, Hkv, Sk, Dv]."""

        def split(projected: Tensor, num_heads: int) -> Tensor:
            batch, length, _ = projected.shape
            return projected.reshape(batch, length, num_heads, -1).transpose(1, 2)

        attention = self.config.attention
        return (
            split(self.q_proj(hidden_states), attention.num_heads),
            split(self.k_proj(context), attention.num_kv_heads),
            split(self.v_proj(context), attention.num_kv_heads),
        )

    def merge(self, output: Tensor) -> Tensor:
        """[B, H, Sq, Dv] to [B, Sq, E]."""
        merged: Tensor = self.o_proj(output.transpose(1, 2).flatten(2))
        return merged


class SelfLayer(nn.Module):
    """Self-attention over any core that takes key lengths alone."""

    def __init__(self, layer: AttentionLayer, core: Core) -> None:
        super().__init__()
        self.layer = layer
        self.core = core

    def forward(self, hidden_states: Tensor, key_lengths: Tensor) -> Tensor | tuple[Tensor, ...]:
        """[B, S, E] and [B] to [B, S, E], and what else the core gives."""
        heads = self.layer.heads(hidden_states, hidden_states)
        return self._merged(self.core(*heads, key_lengths))

    def _merged(self, result: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        """What a core gives, its output first, with the layer's output in its place."""
        if isinstance(result, Tensor):
            return self.layer.merge(result)
        output, *others = result
        return self.layer.merge(output), *others


class CrossLayer(SelfLayer):
    """Cross-attention over any core that takes key lengths alone."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, context: Tensor, key_lengths: Tensor
    ) -> Tensor | tuple[Tensor, ...]:
        """[B, Sq, E], [B, Sk, Ec] and [B] to [B, Sq, E], and what else the core gives."""
        return self._merged(self.core(*self.layer.heads(hidden_states, context), key_lengths))


class BiasedSelfLayer(SelfLayer):
    """Self-attention over a core that takes a bias, and may give weights and log-sum-exp."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        key_lengths: Tensor,
        bias: Tensor,
        mask: Tensor | None = None,
        prefix_lengths: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """[B, S, E], [B] and a bias to [B, S, E], and what else the core gives."""
        heads = self.layer.heads(hidden_states, hidden_states)
        return self._merged(self.core(*heads, key_lengths, bias, **_given(mask, prefix_lengths)))


class BiasedCrossLayer(BiasedSelfLayer):
    """Cross-attention over a core that takes a bias, and may give weights and log-sum-exp."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        context: Tensor,
        key_lengths: Tensor,
        bias: Tensor,
        mask: Tensor | None = None,
        prefix_lengths: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """[B, Sq, E], [B, Sk, Ec], [B] and a bias to [B, Sq, E], and what else the core gives."""
        heads = self.layer.heads(hidden_states, context)
        return self._merged(self.core(*heads, key_lengths, bias, **_given(mask, prefix_lengths)))


class DiagnosticsSelfLayer(SelfLayer):
    """What the weights of self-attention say."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        key_lengths: Tensor,
        top_k: Tensor,
        distances: Tensor,
        bias: Tensor,
        mask: Tensor,
        prefix_lengths: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """See `DiagnosticsCore.forward`."""
        query, key, _ = self.layer.heads(hidden_states, hidden_states)
        given = _given(mask, prefix_lengths)
        return tuple(self.core(query, key, key_lengths, top_k, distances, bias, **given))


class DiagnosticsCrossLayer(SelfLayer):
    """What the weights of cross-attention say."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        context: Tensor,
        key_lengths: Tensor,
        top_k: Tensor,
        distances: Tensor,
        bias: Tensor,
        mask: Tensor,
        prefix_lengths: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """See `DiagnosticsCore.forward`."""
        query, key, _ = self.layer.heads(hidden_states, context)
        given = _given(mask, prefix_lengths)
        return tuple(self.core(query, key, key_lengths, top_k, distances, bias, **given))


def _given(mask: Tensor | None, prefix_lengths: Tensor | None) -> dict[str, Tensor]:
    """What a core takes by name, where its variant has it."""
    named = {"mask": mask, "prefix_lengths": prefix_lengths}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def layer_module(layer: AttentionLayer, spec: VariantSpec) -> nn.Module:
    """The module of a layer model's variant."""
    cross = layer.config.context_dim is not None
    if spec.outputs == DIAGNOSTICS:
        make: type[SelfLayer] = DiagnosticsCrossLayer if cross else DiagnosticsSelfLayer
    elif "bias" in spec.inputs:
        make = BiasedCrossLayer if cross else BiasedSelfLayer
    else:
        make = CrossLayer if cross else SelfLayer
    return make(layer, spec.core(layer.config.attention))
