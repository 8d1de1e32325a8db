"""Weights from a server, a layer at a time and a few heads an answer, so that none is large."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from attnserve_client import AttentionClient, TokensResult

from attnserve_lens.attention import Array

# Of what a server sends at most: an answer holds more than weights. Each answer runs the model
# again, so few large ones are fast; this process holds one at a time.
_SHARE, _MOST_BYTES = 0.75, 96 << 20


def heads_at_once(client: AttentionClient, seq_len: int, timeout: float) -> int:
    """Heads of one layer that an answer has room for.

    Args:
        client: connected.
        seq_len: of the longer of input and target.
        timeout: seconds that the request may take.

    Raises:
        AttnserveError: the server refused.
    """
    limit = client.server_info(timeout=timeout).limits.max_response_bytes
    return max(1, int(min(_SHARE * limit, _MOST_BYTES)) // (4 * seq_len * seq_len))


def sequence_of(ids: Sequence[int], types: Sequence[int]) -> dict[str, Any]:
    """One sequence, by the arguments of `attend_tokens`.

    Args:
        ids: of its tokens.
        types: of each id what kind of token it is; empty: 0.
    """
    given: dict[str, Any] = {"inputs": [list(ids)]}
    return given | {"token_type_ids": [list(types)]} if any(types) else given


def layer_of(
    client: AttentionClient,
    source: Mapping[str, Any],
    target: Sequence[int],
    *,
    model: str,
    attention: str,
    layer: int,
    heads: Sequence[int],
    at_once: int,
    timeout: float,
    step: Callable[[], None] = lambda: None,
) -> tuple[Array, TokensResult]:
    """The weights of one layer of one sequence.

    Args:
        client: connected.
        source: by the arguments of `attend_tokens`: from `sequence_of`, or a tensor of one row.
        target: ids that a decoder reads; empty where there is none.
        model: its name.
        attention: which of several; empty of one.
        layer: 0-based.
        heads: 0-based, in the order wanted.
        at_once: heads of an answer, see `heads_at_once`.
        timeout: seconds that each request may take.
        step: called after each answer.

    Returns:
        Weights [H, Sq, Sk], and the last answer, which says what ran.

    Raises:
        AttnserveError: the server refused.
    """
    more: dict[str, Any] = {"targets": [list(target)]} if target else {}
    parts = []
    for first in range(0, len(heads), at_once):
        answer = client.attend_tokens(
            model=model,
            layers=[layer],
            heads=list(heads[first : first + at_once]),
            attention=attention,
            return_hidden=False,
            return_weights=True,
            timeout=timeout,
            **source,
            **more,
        )
        assert answer.weights is not None
        parts.append(answer.weights[0][0])
        step()
    return np.concatenate(parts), answer
