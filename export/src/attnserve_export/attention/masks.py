"""Who may see whom. Every scheme is one rule: a query sees a range of keys around its position."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mask:
    """The query at position p sees keys p - left to p + right that are not padding.

    Attributes:
        left: keys before its own position; None: all of them.
        right: keys after its own position; None: all of them.
        bottom_right: query i is at position key_length - Sq + i, so that the last query is at the
            last valid key (a decoder with a cache); otherwise it is at position i. The two differ
            only where Sq and the key length do.
        chunk: a query sees keys of its own chunk alone, positions chunk * n to chunk * (n + 1)
            (Llama 4); None: there are no chunks.
    """

    left: int | None
    right: int | None
    bottom_right: bool
    chunk: int | None = None

    def positions(self, query_len: int, key_lengths: Tensor) -> Tensor:
        """The position of each query among the keys, [B, Sq] INT64; negative ones see nothing."""
        queries = torch.arange(query_len, device=key_lengths.device)[None, :]
        offsets = (
            key_lengths[:, None] - query_len if self.bottom_right else 0 * key_lengths[:, None]
        )
        return queries + offsets

    def ranges(self, query_len: int, key_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """The first key that each query sees and the one after the last, each [B, 1, Sq, 1]."""
        positions = self.positions(query_len, key_lengths)
        lengths = key_lengths[:, None].expand(-1, query_len)
        first = torch.zeros_like(positions)
        if self.left is not None:
            first = torch.clamp(positions - self.left, min=0)
        end = lengths
        if self.right is not None:
            end = torch.minimum(lengths, positions + self.right + 1)
        if self.chunk is not None:
            # Queries before the first key see nothing, as without chunks.
            before = positions < 0
            begin = torch.clamp(positions, min=0) // self.chunk * self.chunk
            first = torch.maximum(first, begin)
            end = torch.where(before, 0, torch.minimum(end, begin + self.chunk))
        return first[:, None, :, None], end[:, None, :, None]

    def visible(
        self, query_len: int, key_len: int, key_lengths: Tensor, prefixes: Tensor | None = None
    ) -> Tensor:
        """Which keys each query sees: [B, 1, Sq, Sk] bool.

        Args:
            query_len, key_len, key_lengths: as everywhere.
            prefixes: [B] INT64; valid keys before that position are seen by all queries.
        """
        first, end = self.ranges(query_len, key_lengths)
        keys = torch.arange(key_len, device=key_lengths.device)
        seen = (keys >= first) & (keys < end)
        if prefixes is None:
            return seen
        return seen | (keys < torch.minimum(prefixes, key_lengths)[:, None, None, None])

    def unpadded(self, heads: Tensor, key_lengths: Tensor) -> Tensor:
        """Keys or values [B, Hkv, Sk, D] with 0 where they are padding.

        A weight of 0 does not hide what is no number: 0 * NaN is NaN.
        """
        keys = torch.arange(heads.shape[2], device=key_lengths.device)[:, None]
        valid = keys < key_lengths[:, None, None, None]  # [B, 1, Sk, 1]
        return torch.where(valid, heads, torch.zeros((), dtype=heads.dtype))
