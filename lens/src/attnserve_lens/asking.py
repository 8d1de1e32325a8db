"""Weights from a server, a layer at a time and a few heads an answer, so that none is large."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from attnserve_client import AttentionClient, TokensResult

from attnserve_lens.attention import Array

# A server sends 128 MiB at most unless told otherwise.
_ANSWER_BYTES = 32 << 20


def layer_of(
    client: AttentionClient,
    ids: Sequence[int],
    target: Sequence[int],
    *,
    model: str,
    attention: str,
    layer: int,
    heads: Sequence[int],
    timeout: float,
) -> tuple[Array, TokensResult]:
    """The weights of one layer of one sequence.

    Args:
        client: connected.
        ids: of the sequence.
        target: ids that a decoder reads; empty where there is none.
        model: its name.
        attention: which of several; empty of one.
        layer: 0-based.
        heads: 0-based, in the order wanted.
        timeout: seconds that each request may take.

    Returns:
        Weights [H, Sq, Sk], and the last answer, which says what ran.

    Raises:
        AttnserveError: the server refused.
    """
    more: dict[str, Any] = {"targets": [list(target)]} if target else {}
    longest = max(len(ids), len(target))
    at_once = max(1, _ANSWER_BYTES // (4 * longest * longest))
    parts = []
    for first in range(0, len(heads), at_once):
        answer = client.attend_tokens(
            [list(ids)],
            model=model,
            layers=[layer],
            heads=list(heads[first : first + at_once]),
            attention=attention,
            return_hidden=False,
            return_weights=True,
            timeout=timeout,
            **more,
        )
        assert answer.weights is not None
        parts.append(answer.weights[0][0])
    return np.concatenate(parts), answer
