"""Who may see whom. Each scheme is one object, chosen once."""

from typing import Protocol

import torch
from torch import Tensor


class Mask(Protocol):
    """A rule for which keys a query sees."""

    name: str

    def visible(self, query_len: int, key_len: int, key_lengths: Tensor) -> Tensor:
        """Which keys each query sees.

        Args:
            query_len: Sq.
            key_len: Sk.
            key_lengths: [B] INT64; keys from that position on are padding.

        Returns:
            [B, 1, Sq, Sk] bool.
        """


def _not_padding(query_len: int, key_len: int, key_lengths: Tensor) -> Tensor:
    positions = torch.arange(key_len, device=key_lengths.device)
    valid = positions[None, :] < key_lengths[:, None]  # (B, Sk)
    # Written out over the queries: ONNX Runtime's Attention does not broadcast that dimension.
    return valid[:, None, None, :].expand(-1, 1, query_len, -1)  # (B, 1, Sq, Sk)


class Bidirectional:
    """Every query sees every key that is not padding."""

    name = "bidirectional"

    def visible(self, query_len: int, key_len: int, key_lengths: Tensor) -> Tensor:
        """See `Mask.visible`."""
        return _not_padding(query_len, key_len, key_lengths)


class Cross(Bidirectional):
    """As bidirectional; the keys come from another sequence."""

    name = "cross"


class Causal:
    """Query i sees keys 0..i, as in GPT: aligned top-left where Sq and Sk differ."""

    name = "causal"

    def visible(self, query_len: int, key_len: int, key_lengths: Tensor) -> Tensor:
        """See `Mask.visible`."""
        queries = torch.arange(query_len, device=key_lengths.device)
        keys = torch.arange(key_len, device=key_lengths.device)
        earlier = keys[None, :] <= queries[:, None]  # (Sq, Sk)
        return _not_padding(query_len, key_len, key_lengths) & earlier


MASKS: dict[str, Mask] = {mask.name: mask for mask in (Bidirectional(), Causal(), Cross())}
