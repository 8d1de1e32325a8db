"""Two texts as one sequence."""

from attnserve_client import AttentionClient


def pair_ids(
    client: AttentionClient,
    first: str,
    second: str,
    *,
    model: str,
    truncate: bool,
    timeout: float,
) -> list[int]:
    """The ids of two texts, each closed by the model's separator.

    Raises:
        AttnserveError: the server refused.
    """
    # Each text comes back between the model's own tokens; the second drops its first one.
    both = client.attend_tokens(
        [first, second],
        model=model,
        return_hidden=False,
        return_weights=False,
        truncate=truncate,
        timeout=timeout,
    )
    ids, others = both.ids
    return ids + (others[1:] if others[0] == ids[0] else others)
