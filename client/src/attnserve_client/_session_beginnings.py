"""What begins a step of KV sessions."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from attnserve_proto import attention_pb2 as pb

from attnserve_client import _arguments as arguments
from attnserve_client import _session_layers as layers
from attnserve_client import _session_messages as messages
from attnserve_client._session_layers import Rows
from attnserve_client._session_state import SessionState

_INT32 = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class Beginning:
    """What begins a step.

    Attributes:
        field: of the first layer's message.
        kept: of each session, the new tokens that it holds when the step has ended; a tree's are
            kept by `commit`.
        starts: where each session's tokens begin, and where the last one's end.
    """

    field: bytes
    kept: list[int]
    starts: tuple[int, ...]


class Beginnings:
    """The beginnings of steps of some sessions."""

    def __init__(self, sessions: tuple[SessionState, ...]) -> None:
        self._sessions = sessions
        self._plain: dict[tuple[int, ...], Beginning] = {}  # of steps without anything special

    def forget(self) -> None:
        """The sessions have other ids."""
        self._plain = {}

    def make(
        self,
        first: Rows,
        new_tokens: Sequence[int] | None,
        parents: Sequence[Sequence[int] | None] | None,
        cross_tokens: Sequence[int] | int,
        prefix_hashes: Sequence[Iterable[bytes]] | None,
        priority: int,
        queries_only: bool,
    ) -> Beginning:
        """Begin a step with these arguments of `attend`; `first`: a tensor of the new tokens.

        Raises:
            TypeError, ValueError: as `attend`.
        """
        counts = tokens_of_each(len(self._sessions), first, new_tokens)
        queries_only = arguments.flag("queries_only", queries_only)
        special = queries_only or (cross_tokens, priority) != (0, 0)
        plain = parents is None and prefix_hashes is None and not special
        if plain and counts in self._plain:
            return self._plain[counts]
        begin = pb.BeginStep(
            priority=arguments.integer("priority", priority, 0, 3),
            queries_only=queries_only,
        )
        if not isinstance(cross_tokens, list | tuple):
            cross_tokens = [arguments.integer("cross_tokens", cross_tokens)] * len(counts)
        crossing = self._each("cross_tokens", arguments.integers("cross_tokens", cross_tokens), 0)
        trees = self._each("parents", parents, None)
        hashes = self._each("prefix_hashes", prefix_hashes, ())
        for session, new, tree, pages, cross in zip(
            self._sessions, counts, trees, hashes, crossing, strict=True
        ):
            begin.sessions.add(
                session_id=session.id,
                new_tokens=new,
                parents=() if tree is None else arguments.integers("parents", tree, -1, _INT32),
                cross_tokens=cross,
                prefix_hashes=messages.joined_hashes("prefix_hashes", pages),
            )
        kept = [0 if each.parents or queries_only else each.new_tokens for each in begin.sessions]
        starts = tuple(accumulate(counts, initial=0))
        beginning = Beginning(layers.begin_of(begin), kept, starts)
        if plain:
            self._plain = {counts: beginning}  # the next step is most often like this one
        return beginning

    def _each(self, name: str, given: Any, nothing: Any) -> list[Any]:
        """What is given for each session; None: nothing for any."""
        count = len(self._sessions)
        if given is None:
            return [nothing] * count
        each = arguments.items(name, given, f"a list of {count}, one for each session")
        if len(each) != count:
            raise arguments.refused(name, given, f"a list of {count}, one for each session")
        return each


def tokens_of_each(count: int, first: Rows, new_tokens: Sequence[int] | None) -> tuple[int, ...]:
    """The new tokens of each of `count` sessions, in a step with this tensor.

    Raises:
        TypeError, ValueError: they do not go together.
    """
    if new_tokens is None and len(first.parts) == count:
        return tuple(first.lengths)
    total = first.shape[0]
    lengths = (
        (total // count,) * count
        if new_tokens is None
        else tuple(arguments.integers("new_tokens", new_tokens))
    )
    if len(lengths) != count or sum(lengths) != total:
        raise ValueError(
            f"new_tokens: {list(lengths)} for {count} sessions and a query of {total} tokens; "
            "allowed: one number for each session, which add up to the query's tokens"
        )
    return lengths
