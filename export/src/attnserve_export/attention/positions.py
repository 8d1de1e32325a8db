"""What positions do to attention besides masks: rotary embedding and ALiBi."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding (Su et al., https://arxiv.org/abs/2104.09864).

    Attributes:
        style: "half" turns elements i and i + dims/2 together (GPT-NeoX, Llama in Hugging Face),
            "interleaved" elements 2i and 2i + 1 (the paper, GPT-J).
        dims: how many of head_dim are turned, the first ones; even.
        base: of the wavelengths.
    """

    style: str
    dims: int
    base: float = 10_000.0

    def rotate(self, heads: Tensor, positions: Tensor) -> Tensor:
        """Turn the heads.

        Args:
            heads: [B, H, S, D].
            positions: [B, S] or [1, S].

        Returns:
            [B, H, S, D] FP32: rounding to less here would cost more than all that follows.
        """
        exponents = torch.arange(0, self.dims, 2, dtype=torch.float32) / self.dims
        angles = positions[:, None, :, None].float() * self.base**-exponents  # (B, 1, S, dims/2)
        cosine, sine = angles.cos(), angles.sin()
        turned, rest = heads[..., : self.dims].float(), heads[..., self.dims :].float()
        if self.style == "half":
            first, second = turned.chunk(2, dim=-1)
        else:
            first, second = turned[..., 0::2], turned[..., 1::2]
        pair = (first * cosine - second * sine, second * cosine + first * sine)
        joined = torch.cat(pair, dim=-1) if self.style == "half" else _interleave(*pair)
        return torch.cat((joined, rest), dim=-1)


def _interleave(first: Tensor, second: Tensor) -> Tensor:
    return torch.stack((first, second), dim=-1).flatten(-2)


def alibi_slopes(num_heads: int) -> list[float]:
    """The slope of each head (Press et al., https://arxiv.org/abs/2108.12409).

    Scores get -slope * |position - key|. For a number of heads that is no power of two, the slopes
    of the next lower power, and every other one of the next higher, as the authors' code does it.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    between = [2 ** (-4 * (2 * i + 1) / power) for i in range(num_heads - power)]
    return slopes + between
