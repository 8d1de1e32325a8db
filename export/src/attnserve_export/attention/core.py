"""Core attention: query, key and value in, attention out; no weights of its own."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attnserve_export.attention.masks import MASKS, Mask


@dataclass(frozen=True)
class AttentionConfig:
    """What attention to compute.

    Attributes:
        num_heads: H, query heads.
        head_dim: D, width of query and key per head.
        num_kv_heads: Hkv, heads of key and value; H is a multiple of it (GQA,
            https://arxiv.org/abs/2305.13245; 1 is MQA, https://arxiv.org/abs/1911.02150).
        value_head_dim: Dv, width of value per head.
        mask: "bidirectional", "causal" or "cross".
        scale: multiplies query x key.
        softcap: scores become softcap * tanh(scores / softcap); 0 is off (Gemma 2,
            https://arxiv.org/abs/2408.00118).
    """

    num_heads: int
    head_dim: int
    num_kv_heads: int
    value_head_dim: int
    mask: str
    scale: float
    softcap: float = 0.0

    @property
    def visibility(self) -> Mask:
        """The mask as an object."""
        return MASKS[self.mask]


class FusedCore(nn.Module):
    """Attention that exports to one ONNX Attention node (ai.onnx, opset 23).

    A softcap is not among what PyTorch's operator can express: such a config has no fused form.
    """

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__()
        self._mask = config.visibility
        self._scale = config.scale
        self._grouped = config.num_kv_heads != config.num_heads

    def forward(self, query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor) -> Tensor:
        """Attention output.

        Args:
            query: [B, H, Sq, D].
            key: [B, Hkv, Sk, D].
            value: [B, Hkv, Sk, Dv].
            key_lengths: [B] INT64.

        Returns:
            [B, H, Sq, Dv]; 0 for queries that see no key.
        """
        visible = self._mask.visible(query.shape[2], key.shape[2], key_lengths)
        # In FP32 also for FP16 tensors: ONNX Runtime's CPU kernel rounds FP16 scores to FP16, which
        # was measured to put the output off by up to 2e-3, and by 1.5e-2 for scores of 30.
        output = nn.functional.scaled_dot_product_attention(
            query.float(),
            key.float(),
            value.float(),
            attn_mask=visible,
            scale=self._scale,
            enable_gqa=self._grouped,
        ).to(query.dtype)
        # Every mask lets a query see key 0, unless all keys are padding.
        some = (key_lengths > 0)[:, None, None, None]
        return torch.where(some, output, torch.zeros_like(output))


class ReferenceCore(nn.Module):
    """Attention by plain operators, with a bias, giving the weights too; computed in FP32."""

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__()
        self._config = config
        self._mask = config.visibility

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Attention output and weights.

        Args:
            query: [B, H, Sq, D].
            key: [B, Hkv, Sk, D].
            value: [B, Hkv, Sk, Dv].
            key_lengths: [B] INT64.
            bias: broadcast to [B, H, Sq, Sk] and added to the scores; -inf masks.

        Returns:
            [B, H, Sq, Dv] and [B, H, Sq, Sk]; rows without any visible key are 0.
        """
        return self._attend(query, key, value, key_lengths, bias, self._cap)

    def _cap(self, scores: Tensor) -> Tensor:
        return scores

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_lengths: Tensor,
        bias: Tensor,
        cap: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Tensor]:
        batch, num_heads, query_len, head_dim = query.shape
        num_kv_heads, key_len = key.shape[1], key.shape[2]
        # Heads that share keys become rows of one product: (B, Hkv, G * Sq, D).
        q = query.float().reshape(batch, num_kv_heads, -1, head_dim) * self._config.scale
        scores = q @ key.float().transpose(2, 3)  # (B, Hkv, G * Sq, Sk)
        scores = cap(scores.reshape(batch, num_heads, -1, key_len)) + bias.float()
        lowest = torch.finfo(torch.float32).min
        visible = self._mask.visible(query_len, key_len, key_lengths)
        # A finite stand-in for -inf: softmax over a row of -inf would give NaN.
        scores = torch.where(visible, scores.clamp(min=lowest), lowest)
        seen = scores.amax(dim=-1, keepdim=True) > lowest
        weights = torch.softmax(scores, dim=-1) * seen.float()  # (B, H, Sq, Sk)
        output = weights.reshape(batch, num_kv_heads, -1, key_len) @ value.float()
        output = output.reshape(batch, num_heads, -1, value.shape[3])
        return output.to(query.dtype), weights.to(query.dtype)


class CappedCore(ReferenceCore):
    """As the reference, for a config that has a softcap."""

    def _cap(self, scores: Tensor) -> Tensor:
        return self._config.softcap * torch.tanh(scores / self._config.softcap)


class SoftcapCore(ReferenceCore):
    """As the reference, with the softcap as an input, [1] FP32 > 0."""

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_lengths: Tensor,
        bias: Tensor,
        softcap: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """See `ReferenceCore.forward`."""

        def cap(scores: Tensor) -> Tensor:
            return softcap * torch.tanh(scores / softcap)

        return self._attend(query, key, value, key_lengths, bias, cap)


def core_variants(config: AttentionConfig) -> dict[str, nn.Module]:
    """The modules of a core model, preferred first."""
    if config.softcap:
        return {"reference": CappedCore(config), "softcap": SoftcapCore(config)}
    return {
        "fused": FusedCore(config),
        "reference": ReferenceCore(config),
        "softcap": SoftcapCore(config),
    }


def default_scale(head_dim: int) -> float:
    """1/sqrt(D)."""
    return 1 / math.sqrt(head_dim)
