"""Core attention: query, key and value in, attention out; no weights of its own."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attnserve_export.attention.masks import Mask
from attnserve_export.attention.positions import Rotary, alibi_slopes

# The operators of attnserve-kernels, and the one that graphs bring as a function of their own.
DOMAIN = "attnserve"
BLOCKED = "BlockedAttention"
BLOCKED_SINKS = "BlockedSinksAttention"
FLASH = "FlashAttention"
CUDNN = "CudnnAttention"

# As torch.onnx.ops.symbolic takes them.
Attributes = dict[
    str,
    int | float | str | bool | Sequence[int] | Sequence[float] | Sequence[str] | Sequence[bool],
]


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
        alignment: "top-left" or "bottom-right": where queries are among the keys.
        window: keys up to its own position that a query sees, its own included (Mistral,
            https://arxiv.org/abs/2310.06825); None: all.
        window_right: keys after its own position that it sees, unless causal; None: all.
        alibi: whether scores fall with distance, by a slope per head.
        rotary: how query and key are turned by their positions first; None: not at all.
        chunk: positions of a chunk, of which a query sees its own alone (Llama 4); None: all.
        sinks: of each head, a logit that takes part in the softmax and has no value (gpt-oss,
            https://arxiv.org/abs/2508.10925); None: none.
    """

    num_heads: int
    head_dim: int
    num_kv_heads: int
    value_head_dim: int
    mask: str
    scale: float
    softcap: float = 0.0
    alignment: str = "top-left"
    window: int | None = None
    window_right: int | None = None
    alibi: bool = False
    rotary: Rotary | None = None
    chunk: int | None = None
    sinks: tuple[float, ...] | None = None

    @property
    def visibility(self) -> Mask:
        """The mask as an object."""
        return Mask(
            left=None if self.window is None else self.window - 1,
            right=0 if self.mask == "causal" else self.window_right,
            bottom_right=self.alignment == "bottom-right",
            chunk=self.chunk,
        )

    @property
    def windowed(self) -> bool:
        """Whether a query's reach is bounded on a side, other than by causality."""
        return any(bound is not None for bound in (self.window, self.window_right, self.chunk))

    @property
    def slopes(self) -> list[float] | None:
        """ALiBi's slopes, if it is on."""
        return alibi_slopes(self.num_heads) if self.alibi else None


class Core(nn.Module):
    """What all variants share."""

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__()
        self.config = config
        self.mask = config.visibility
        self.slopes: Tensor | None = None
        if config.slopes is not None:
            self.slopes = torch.tensor(config.slopes)
        self.own_sinks: Tensor | None = None
        if config.sinks is not None:
            self.own_sinks = torch.tensor(config.sinks)

    def sinks(self, given: Tensor | None) -> Tensor | None:
        """Those of a request, otherwise the config's, [H] FP32; None: there are none."""
        return self.own_sinks if given is None else given

    def turned(self, query: Tensor, key: Tensor, key_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Query and key, turned by their positions if the config asks for it."""
        rotary = self.config.rotary
        if rotary is None:
            return query, key
        queries = self.mask.positions(query.shape[2], key_lengths)
        keys = torch.arange(key.shape[2], device=key.device)[None, :]
        return rotary.rotate(query, queries), rotary.rotate(key, keys)

    def attributes(self) -> Attributes:
        """Of the operators in attnserve-kernels."""
        mask = self.mask
        return {
            "scale": float(self.config.scale),
            "softcap": float(self.config.softcap),
            "left": -1 if mask.left is None else mask.left,
            "right": -1 if mask.right is None else mask.right,
            "bottom_right": int(mask.bottom_right),
            "chunk": mask.chunk or 0,
        }


class FusedCore(Core):
    """Attention that exports to one ONNX Attention node (ai.onnx, opset 23).

    Softcap and ALiBi are not among what PyTorch's operator can express without a matrix of biases:
    such a config has no fused form.
    """

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
        config = self.config
        dtype = query.dtype
        query, key = self.turned(query, key, key_lengths)
        # In FP32 also for FP16 tensors: ONNX Runtime's CPU kernel rounds FP16 scores to FP16, which
        # was measured to put the output off by up to 2e-3, and by 1.5e-2 for scores of 30.
        output = nn.functional.scaled_dot_product_attention(
            query.float(),
            self.mask.unpadded(key.float(), key_lengths),
            self.mask.unpadded(value.float(), key_lengths),
            attn_mask=self.mask.visible(query.shape[2], key.shape[2], key_lengths),
            scale=config.scale,
            enable_gqa=config.num_kv_heads != config.num_heads,
        )
        first, end = self.mask.ranges(query.shape[2], key_lengths)
        return torch.where(first < end, output, torch.zeros_like(output)).to(dtype)


class NativeCore(Core):
    """The operator of attnserve-kernels: tiled, linear in memory, on the CPU."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_lengths: Tensor,
        bias: Tensor,
        mask: Tensor,
        prefix_lengths: Tensor | None = None,
        softcap: Tensor | None = None,
        sinks: Tensor | None = None,
    ) -> Sequence[Tensor]:
        """As `FusedCore.forward`, with a bias, masks, a softcap and sinks.

        Args:
            query, key, value, key_lengths: as there.
            bias: broadcast to [B, H, Sq, Sk] and added to the scores; -inf masks.
            mask: BOOL, broadcast likewise; true where a key may be seen.
            prefix_lengths: [B] INT64; valid keys before that position are seen by all queries.
            softcap: [1] FP32; replaces the config's unless it is negative.
            sinks: [H] FP32, logits that take part in the softmax and have no value; -inf: none.

        Returns:
            The output, and the log-sum-exp of the scores, [B, H, Sq] FP32, sinks among them; -inf
            for queries that see nothing.
        """
        dtype = query.dtype
        query, key = self.turned(query, key, key_lengths)
        batch, num_heads, query_len, _ = query.shape
        # The operator takes one type; turned heads are FP32.
        output, log_sum_exp = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::Attention",
            (
                query,
                key,
                value.to(query.dtype),
                key_lengths,
                bias.to(query.dtype),
                self.slopes,
                softcap,
                mask,
                prefix_lengths,
                None,  # packed sequences
                None,
                self.sinks(sinks),
            ),
            self.attributes(),
            dtypes=(query.dtype, torch.float32),
            shapes=(
                (batch, num_heads, query_len, value.shape[3]),
                (batch, num_heads, query_len),
            ),
            version=1,
        )
        return output.to(dtype), log_sum_exp


class BlockedCore(Core):
    """Blocks of queries in an ONNX Loop, each against only the keys that it may see.

    The operator is a function that the graph brings along: `attnserve_export.attention.blocked`.
    """

    def forward(self, query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor) -> Tensor:
        """See `FusedCore.forward`."""
        dtype = query.dtype
        query, key = self.turned(query, key, key_lengths)
        batch, num_heads, query_len, _ = query.shape
        shape = (batch, num_heads, query_len, value.shape[3])
        inputs = (query, key, value.to(query.dtype), key_lengths)
        return _operator(BLOCKED, inputs, {}, query.dtype, shape).to(dtype)


class BlockedSinksCore(Core):
    """As `BlockedCore`, with sinks, giving the log-sum-exp too."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_lengths: Tensor,
        sinks: Tensor | None = None,
    ) -> Sequence[Tensor]:
        """See `FusedCore.forward`.

        Args:
            query, key, value, key_lengths: as there.
            sinks: as in `NativeCore.forward`; None: the config's.

        Returns:
            Output and log-sum-exp, as in `NativeCore.forward`.
        """
        dtype = query.dtype
        query, key = self.turned(query, key, key_lengths)
        batch, num_heads, query_len, _ = query.shape
        output, log_sum_exp = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::{BLOCKED_SINKS}",
            (query, key, value.to(query.dtype), key_lengths, self.sinks(sinks)),
            {},
            dtypes=(query.dtype, torch.float32),
            shapes=(
                (batch, num_heads, query_len, value.shape[3]),
                (batch, num_heads, query_len),
            ),
            version=1,
        )
        return output.to(dtype), log_sum_exp


class FlashCore(Core):
    """Nodes that ONNX Runtime runs by FlashAttention on CUDA, in the dtype of the tensors.

    The operator is a function that the graph brings along: `attnserve_export.attention.flash`.
    """

    operator = FLASH

    def forward(self, query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor) -> Tensor:
        """See `FusedCore.forward`."""
        dtype = value.dtype
        query, key = self.turned(query, key, key_lengths)
        inputs = (query.to(dtype), key.to(dtype), value, key_lengths)
        return _operator(self.operator, inputs, {}, dtype, query.shape)


class CudnnCore(FlashCore):
    """As `FlashCore`, by a node that ONNX Runtime runs by cuDNN's kernel where that is faster."""

    operator = CUDNN


class PagedCore(Core):
    """New tokens over pages, for sessions. Its graph is not traced: see `attention.paged`."""


class PackedCore(Core):
    """Packed sequences. Its graph is not traced: see `attention.packed`."""


class PackedDiagnosticsCore(Core):
    """What the weights of packed sequences say: see there."""


class PackedWeightsCore(Core):
    """Packed sequences, with their weights: see there."""


PACKED_CORES = (PackedCore, PackedDiagnosticsCore, PackedWeightsCore)


class DiagnosticsCore(Core):
    """What the weights say, without ever holding them all; by attnserve-kernels."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        key_lengths: Tensor,
        top_k: Tensor,
        distances: Tensor,
        bias: Tensor,
        mask: Tensor,
        prefix_lengths: Tensor | None = None,
        softcap: Tensor | None = None,
        sinks: Tensor | None = None,
    ) -> Sequence[Tensor]:
        """Entropy and masses of the weights.

        Args:
            query, key, key_lengths, bias, mask, prefix_lengths, softcap, sinks: as in
                `NativeCore.forward`.
            top_k: [1] INT64, keys to name per query; 0: none.
            distances: [1] INT64, N: distances to tell apart, the last one gathers all beyond.

        Returns:
            entropy [B, H, Sq] in nats, mass per key [B, H, Sk], mass by distance [B, H, N], indices
            [B, H, Sq, top_k] INT64 and weights of the heaviest keys; FP32 where nothing is said.
        """
        query, key = self.turned(query, key, key_lengths)
        batch, num_heads, query_len, _ = query.shape
        rows = (batch, num_heads, query_len)
        # The sizes of the last three depend on values: symbols of their own would be needed.
        floats = torch.float32
        return torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::AttentionDiagnostics",
            (
                query,
                key,
                key_lengths,
                top_k,
                distances,
                bias.to(query.dtype),
                self.slopes,
                softcap,
                mask,
                prefix_lengths,
                None,  # packed sequences
                None,
                self.sinks(sinks),
            ),
            self.attributes(),
            dtypes=(floats, floats, floats, torch.int64, floats),
            shapes=(
                rows,
                (batch, num_heads, key.shape[2]),
                (batch, num_heads, 1),
                (*rows, 1),
                (*rows, 1),
            ),
            version=1,
        )


class ReferenceCore(Core):
    """Attention by plain operators, with a bias, giving the weights too; computed in FP32."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_lengths: Tensor,
        bias: Tensor,
        prefix_lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention output and weights.

        Args:
            query: [B, H, Sq, D].
            key: [B, Hkv, Sk, D].
            value: [B, Hkv, Sk, Dv].
            key_lengths: [B] INT64.
            bias: broadcast to [B, H, Sq, Sk] and added to the scores; -inf masks.
            prefix_lengths: [B] INT64; valid keys before that position are seen by all queries.

        Returns:
            [B, H, Sq, Dv] and [B, H, Sq, Sk]; rows without any visible key are 0.
        """
        scores = self._scores(query, key, key_lengths, bias, prefix_lengths, None)
        # The softmax of a row of -inf is no number. Any finite bias is a number, the lowest too.
        unseeing = scores.amax(dim=-1, keepdim=True) == -torch.inf
        weights = torch.where(unseeing, torch.zeros(()), torch.softmax(scores, dim=-1))
        output = self._mixed(weights, value, key_lengths)
        return output.to(value.dtype), weights.to(value.dtype)

    def _cap(self, scores: Tensor, softcap: Tensor | None) -> Tensor:
        return scores

    def _scores(
        self,
        query: Tensor,
        key: Tensor,
        key_lengths: Tensor,
        bias: Tensor,
        prefix_lengths: Tensor | None,
        softcap: Tensor | None,
    ) -> Tensor:
        """[B, H, Sq, Sk] FP32, -inf where a key is not seen."""
        query, key = self.turned(query, key, key_lengths)
        batch, num_heads, query_len, head_dim = query.shape
        num_kv_heads, key_len = key.shape[1], key.shape[2]
        # Heads that share keys become rows of one product: (B, Hkv, G * Sq, D).
        q = query.float().reshape(batch, num_kv_heads, -1, head_dim) * self.config.scale
        scores = q @ key.float().transpose(2, 3)  # (B, Hkv, G * Sq, Sk)
        scores = scores.reshape(batch, num_heads, -1, key_len)
        scores = self._cap(scores, softcap) + bias.float()
        if self.slopes is not None:
            positions = self.mask.positions(query_len, key_lengths)[:, None, :, None]
            apart = (positions - torch.arange(key_len)).abs().float()  # (B, 1, Sq, Sk)
            scores = scores - self.slopes[:, None, None] * apart
        visible = self.mask.visible(query_len, key_len, key_lengths, prefix_lengths)
        return torch.where(visible, scores, torch.full((), -torch.inf))

    def _mixed(self, weights: Tensor, value: Tensor, key_lengths: Tensor) -> Tensor:
        """[B, H, Sq, Dv] FP32: the values by their weights."""
        batch, num_heads, _, key_len = weights.shape
        values = self.mask.unpadded(value.float(), key_lengths)
        output = weights.reshape(batch, value.shape[1], -1, key_len) @ values
        return output.reshape(batch, num_heads, -1, value.shape[3])


class CappedCore(ReferenceCore):
    """As the reference, for a config that has a softcap."""

    def _cap(self, scores: Tensor, softcap: Tensor | None) -> Tensor:
        return self.config.softcap * torch.tanh(scores / self.config.softcap)


class SinksCore(ReferenceCore):
    """As the reference, with sinks, giving the log-sum-exp too."""

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_lengths: Tensor,
        bias: Tensor,
        prefix_lengths: Tensor | None = None,
        sinks: Tensor | None = None,
        softcap: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `ReferenceCore.forward`.

        Args:
            query, key, value, key_lengths, bias, prefix_lengths: as there.
            sinks: as in `NativeCore.forward`; None: the config's.
            softcap: [1] FP32 > 0, where the class takes one.

        Returns:
            Output, weights, whose rows sum to 1 less what the sink takes, and log-sum-exp as in
            `NativeCore.forward`.
        """
        scores = self._scores(query, key, key_lengths, bias, prefix_lengths, softcap)
        highest = scores.amax(dim=-1, keepdim=True)  # (B, H, Sq, 1)
        used = self.sinks(sinks)
        if used is not None:
            used = used[:, None, None]
            highest = torch.maximum(highest, used)
        # Any number serves a row that sees nothing.
        finite = torch.where(highest == -torch.inf, torch.zeros(()), highest)
        weights = torch.exp(scores - finite)
        total = weights.sum(dim=-1, keepdim=True)
        if used is not None:
            total = total + torch.exp(used - finite)
        weights = weights / torch.where(total == 0, torch.ones(()), total)
        output = self._mixed(weights, value, key_lengths)
        log_sum_exp = (finite + torch.log(total)).squeeze(-1)
        return output.to(value.dtype), weights.to(value.dtype), log_sum_exp


class CappedSinksCore(SinksCore):
    """As that, for a config that has a softcap."""

    def _cap(self, scores: Tensor, softcap: Tensor | None) -> Tensor:
        return self.config.softcap * torch.tanh(scores / self.config.softcap)


class SoftcapCore(SinksCore):
    """As that, with the softcap as an input."""

    def _cap(self, scores: Tensor, softcap: Tensor | None) -> Tensor:
        assert softcap is not None
        return softcap * torch.tanh(scores / softcap)


def default_scale(head_dim: int) -> float:
    """1/sqrt(D)."""
    return 1 / math.sqrt(head_dim)


def _operator(
    name: str,
    inputs: Sequence[Tensor | None],
    attributes: Attributes,
    dtype: torch.dtype,
    shape: Sequence[int | torch.SymInt],
) -> Tensor:
    """A node of our own domain in the exported graph; PyTorch itself cannot compute it."""
    output: Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{name}", inputs, attributes, dtype=dtype, shape=shape, version=1
    )
    return output
