"""Bounds of token ids and of sequences of them."""

from collections.abc import Sequence

from attnserve_proto.manifest import Transformer

from attnserve_server.errors import InvalidRequestError
from attnserve_server.settings import Limits


def max_len(transformer: Transformer, limits: Limits) -> int:
    """Tokens of the longest sequence that is taken."""
    return min(transformer.max_seq_len or limits.max_seq_len, limits.max_seq_len)


def check_batch(field: str, count: int, limits: Limits) -> None:
    """Refuse a request without sequences, or with more than the server takes."""
    if not 1 <= count <= limits.max_batch:
        raise InvalidRequestError.of(field, f"{count} sequences", f"1..{limits.max_batch}")


def check_lengths(field: str, sequences: Sequence[Sequence[int]], most: int) -> None:
    """See that each sequence has 1 to `most` tokens.

    Raises:
        InvalidRequestError: one has not.
    """
    for row, sequence in enumerate(sequences):
        if not 1 <= len(sequence) <= most:
            raise InvalidRequestError.of(
                f"{field}[{row}]", f"{len(sequence)} tokens", f"1..{most} tokens"
            )


def check_ids(
    field: str, part: str, sequences: Sequence[Sequence[int]], count: int, what: str
) -> None:
    """See that each number is from 0 to `count` - 1.

    Args:
        field, part: of the sequences, and of the numbers in them.
        sequences: of numbers.
        count: how many there are to choose from.
        what: they are, in words.

    Raises:
        InvalidRequestError: one is not.
    """
    for row, sequence in enumerate(sequences):
        for position, number in enumerate(sequence):
            if not 0 <= number < count:
                raise InvalidRequestError.of(
                    f"{field}[{row}].{part}[{position}]", number, f"0..{count - 1}, {what}"
                )
