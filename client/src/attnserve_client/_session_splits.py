"""Steps of sessions that are at several servers: each server takes those of its own."""

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from attnserve_client import _arguments as arguments
from attnserve_client._flows import Flow
from attnserve_client._results import Array, LayerResult
from attnserve_client._session_beginnings import tokens_of_each
from attnserve_client._session_layers import Rows, rows
from attnserve_client._session_state import SessionState
from attnserve_client._session_steps import BatchFlows, given_rows
from attnserve_client._side_by_side import all_or_none


def batch_flows(sessions: Sequence[SessionState]) -> "BatchFlows | SplitBatchFlows":
    """The steps of some sessions.

    Raises:
        TypeError, ValueError: they are none.
    """
    allowed = "a list of sessions, one or more"
    given: list[SessionState] = arguments.items("sessions", sessions, allowed)
    for session in given:
        arguments.kind("sessions", session, SessionState, allowed)
    if not given:
        raise ValueError("sessions: none; allowed: one or more")
    if any(each._sharded for each in given):
        raise ValueError("sessions: one with shards; allowed: without, each at one server")
    if len({id(each._connection) for each in given}) == 1:
        return BatchFlows(given)
    return SplitBatchFlows(given)


class _Part:
    """The sessions of one server.

    Attributes:
        places: of them in the whole batch, ascending.
    """

    def __init__(self, places: list[int], sessions: list[SessionState]) -> None:
        self.places = places
        self.sessions = sessions
        self.flows = BatchFlows(sessions)

    def of(self, each: Sequence[Any] | None) -> list[Any] | None:
        """What is given for its sessions, of what is given for all; None: nothing is."""
        return None if each is None else [each[place] for place in self.places]


class SplitBatchFlows:
    """As `BatchFlows`: the servers compute their parts of each layer at the same time.

    A layer that some servers have computed and one has not would leave a step half done: then the
    whole step is given up everywhere, and begins anew with layer 0.
    """

    def __init__(self, sessions: Sequence[SessionState]) -> None:
        self._sessions = list(sessions)
        places: dict[int, list[int]] = {}
        for place, session in enumerate(self._sessions):
            places.setdefault(id(session._connection), []).append(place)
        self._parts = [_Part(at, [self._sessions[each] for each in at]) for at in places.values()]
        # Of the step under way: each session's tokens, cross keys, and length before it.
        self._counts: tuple[int, ...] = ()
        self._cross: tuple[int, ...] = ()
        self._before: list[int] = []
        self._named: list[int] = []  # whose weights are asked for, of queries sent ahead

    @property
    def in_step(self) -> bool:
        """Whether a step is under way."""
        return any(part.flows.in_step for part in self._parts)

    def attend(
        self,
        layer: int,
        query: Any = None,
        key: Any = None,
        value: Any = None,
        *,
        hidden_states: Any = None,
        new_tokens: Sequence[int] | None = None,
        parents: Sequence[Sequence[int] | None] | None = None,
        cross_tokens: Sequence[int] | int = 0,
        prefix_hashes: Sequence[Iterable[bytes]] | None = None,
        return_weights_of: Sequence[int] = (),
        **options: Any,
    ) -> Flow[LayerResult]:
        """As `BatchFlows.attend`."""
        tensors = given_rows(query, key, value, hidden_states)
        self._begin(next(iter(tensors.values())), new_tokens, cross_tokens)
        named = self._each("return_weights_of", return_weights_of)

        def given(part: _Part) -> dict[str, Any]:
            return {name: part.of(self._rows(name, each)) for name, each in tensors.items()}

        def attend(part: _Part) -> Flow[LayerResult]:
            return part.flows.attend(
                layer,
                **given(part),
                **self._beginning(part, parents, prefix_hashes),
                return_weights_of=[
                    index for index, place in enumerate(part.places) if place in named
                ],
                **options,
            )

        return (yield from self._computed(attend, named))

    def send_query(
        self,
        layer: int,
        query: Any,
        *,
        new_tokens: Sequence[int] | None = None,
        parents: Sequence[Sequence[int] | None] | None = None,
        cross_tokens: Sequence[int] | int = 0,
        prefix_hashes: Sequence[Iterable[bytes]] | None = None,
        return_weights_of: Sequence[int] = (),
        **options: Any,
    ) -> Flow[None]:
        """As `BatchFlows.send_query`."""
        if query is None:
            raise ValueError("query: not given; allowed: an array")
        queries = rows(query, "query")
        self._begin(queries, new_tokens, cross_tokens)
        named = self._each("return_weights_of", return_weights_of)
        self._named = named

        def send(part: _Part) -> Flow[None]:
            return part.flows.send_query(
                layer,
                part.of(self._rows("query", queries)),
                **self._beginning(part, parents, prefix_hashes),
                return_weights_of=[
                    index for index, place in enumerate(part.places) if place in named
                ],
                **options,
            )

        yield from self._all(send)

    def attend_sent(
        self, layer: int, key: Any, value: Any = None, *, timeout: float | None = 60.0
    ) -> Flow[LayerResult]:
        """As `BatchFlows.attend_sent`; one server after another."""
        if key is None:
            raise ValueError("key: not given; allowed: an array")
        keys = self._rows("key", rows(key, "key"))
        values = None if value is None else self._rows("value", rows(value, "value"))

        def attend(part: _Part) -> Flow[LayerResult]:
            return part.flows.attend_sent(layer, part.of(keys), part.of(values), timeout=timeout)

        return (yield from self._computed(attend, self._named))

    def abandon(self) -> Flow[None]:
        """As `BatchFlows.abandon`, at all servers."""
        for part in self._parts:
            yield from part.flows.abandon()

    def _begin(
        self, first: Rows, new_tokens: Sequence[int] | None, cross_tokens: Sequence[int] | int
    ) -> None:
        """Know what a step is of, if this begins one."""
        if self.in_step:
            return
        count = len(self._sessions)
        self._counts = tokens_of_each(count, first, new_tokens)
        if not isinstance(cross_tokens, list | tuple):
            cross_tokens = [arguments.integer("cross_tokens", cross_tokens)] * count
        self._cross = tuple(arguments.integers("cross_tokens", cross_tokens))
        if len(self._cross) != count:
            raise arguments.refused("cross_tokens", cross_tokens, f"a list of {count}, or a number")
        self._before = [session.length for session in self._sessions]

    def _beginning(
        self,
        part: _Part,
        parents: Sequence[Sequence[int] | None] | None,
        prefix_hashes: Sequence[Iterable[bytes]] | None,
    ) -> dict[str, Any]:
        """What begins a part's step."""
        if part.flows.in_step:
            return {}
        for name, given in (("parents", parents), ("prefix_hashes", prefix_hashes)):
            if given is not None and len(given) != len(self._sessions):
                allowed = f"a list of {len(self._sessions)}, one for each session"
                raise arguments.refused(name, given, allowed)
        return {
            "new_tokens": part.of(self._counts),
            "cross_tokens": part.of(self._cross),
            "parents": part.of(parents),
            "prefix_hashes": part.of(prefix_hashes),
        }

    def _each(self, name: str, given: Sequence[int]) -> list[int]:
        """Places of sessions, ascending."""
        return arguments.integers(name, given, 0, len(self._sessions) - 1)

    def _rows(self, name: str, given: Rows) -> list[Array]:
        """The rows of each session."""
        if len(given.parts) == len(self._sessions):
            return list(given.parts)
        packed = given.parts[0]
        for counts in (self._counts, self._cross):
            if len(given.parts) == 1 and len(packed) == sum(counts):
                return [packed[a:b] for a, b in pairwise(accumulate(counts, initial=0))]
        raise ValueError(
            f"{name}: {given.shape[0]} rows in {len(given.parts)} arrays for "
            f"{len(self._sessions)} sessions of {list(self._counts)} new tokens; allowed: an array "
            "for each session, or one with the rows of all"
        )

    def _computed(
        self, attend: "Callable[[_Part], Flow[LayerResult]]", named: Sequence[int]
    ) -> Flow[LayerResult]:
        """A layer of all parts, joined in the order of the sessions."""
        results: list[LayerResult] = yield from self._all(attend)
        starts = tuple(accumulate(self._counts, initial=0))
        parts = list(zip(self._parts, results, strict=True))

        def joined(name: str) -> Array | None:
            pieces: list[Array] = [np.empty(0)] * len(self._sessions)
            for part, result in parts:
                array: Array | None = getattr(result, name)
                if array is None:
                    return None
                for place, (first, last) in zip(part.places, pairwise(result.starts), strict=True):
                    pieces[place] = array[first:last]
            return np.concatenate(pieces)

        weights: dict[int, Array] = {}
        for part, result in parts:
            asked = [place for place in part.places if place in named]
            weights.update(zip(asked, result.weights, strict=True))
        return LayerResult(
            output=joined("output"),
            log_sum_exp=joined("log_sum_exp"),
            entropy=joined("entropy"),
            weights=[weights[place] for place in named],
            starts=starts,
            step_ended=all(result.step_ended for result in results),
            # Of the server that took longest: the others' passed meanwhile.
            timings=max((result.timings for result in results), key=lambda each: each.total),
        )

    def _all(self, call: "Callable[[_Part], Flow[Any]]") -> Flow[list[Any]]:
        """Do a thing in all parts, or in none."""
        batches = [part.flows for part in self._parts]
        before = [part.of(self._before) or [] for part in self._parts]
        return all_or_none([call(part) for part in self._parts], batches, before)
