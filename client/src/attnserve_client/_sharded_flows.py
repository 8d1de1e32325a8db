"""What can be done with one KV session that is laid over several servers."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from attnserve_client import _arguments as arguments
from attnserve_client import _errors
from attnserve_client._errors import AttnserveError
from attnserve_client._flows import Flow
from attnserve_client._merging import merge_attention
from attnserve_client._results import Array, LayerResult
from attnserve_client._session_flows import SessionFlows
from attnserve_client._session_layers import rows
from attnserve_client._session_messages import METHOD
from attnserve_client._session_state import SessionState
from attnserve_client._shards import Shards, heads_of
from attnserve_client._side_by_side import all_or_none

S = TypeVar("S", bound=SessionState)


class ShardedFlows(Generic[S]):
    """The calls of `SessionFlows`, of a session whose parts are at several servers.

    The parts compute a layer at the same time. A layer that some have computed and one has not
    costs the step, at all of them.

    Args:
        parts: the calls of each server's session.
        make: a session of parts, in place of one that is there.
    """

    def __init__(
        self, parts: "Sequence[SessionFlows[Any]]", make: "Callable[[ShardedFlows[S]], S]"
    ) -> None:
        self.parts = list(parts)
        self._make = make

    @property
    @abstractmethod
    def length(self) -> int:
        """Tokens that it holds."""

    @abstractmethod
    def attend(
        self, layer: int, query: Any = None, *args: Any, **options: Any
    ) -> Flow[LayerResult]:
        """As `SessionFlows.attend`."""

    @abstractmethod
    def commit(self, accepted: Sequence[int], *, timeout: float | None = 10.0) -> Flow[None]:
        """As `SessionFlows.commit`."""

    @abstractmethod
    def truncate(self, length: int, *, timeout: float | None = 10.0) -> Flow[None]:
        """As `SessionFlows.truncate`."""

    @abstractmethod
    def fork(self, at: int | None = None, **options: Any) -> Flow[S]:
        """As `SessionFlows.fork`, at the same servers."""

    def send_query(self, layer: int, query: Any, **options: Any) -> Flow[None]:
        """Refused.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "send_query: of a session with shards; allowed: attend, with key and value"
        )
        yield

    def attend_sent(self, layer: int, key: Any, value: Any = None, **options: Any) -> Flow[Any]:
        """Refused, as `send_query`."""
        raise ValueError("attend_sent: of a session with shards; allowed: attend")
        yield

    def abandon(self) -> Flow[None]:
        """As `SessionFlows.abandon`, at all servers, also where the step has ended."""
        in_step = self._in_step()
        for part in self.parts:
            yield from part.abandon()
        if in_step and not self._even:
            yield from self.truncate(self.length)

    def renew(self, *, lease: float | None = None, timeout: float | None = 10.0) -> Flow[None]:
        """As `SessionFlows.renew`, at all servers."""
        for part in self.parts:
            yield from part.renew(lease=lease, timeout=timeout)

    def close(self, *, timeout: float | None = 10.0) -> Flow[None]:
        """As `SessionFlows.close`, at all servers."""
        for part in self.parts:
            yield from part.close(timeout=timeout)

    def _forked(self, at: Sequence[int], **options: Any) -> "Flow[list[SessionFlows[Any]]]":
        """Forks of all parts, or none."""
        forks: list[SessionFlows[Any]] = []
        try:
            for part, length in zip(self.parts, at, strict=True):
                fork = yield from part.fork(length, **options)
                forks.append(fork._flows)
        except AttnserveError:
            for fork in forks:
                yield from fork.close()
            raise
        return forks

    @property
    @abstractmethod
    def _even(self) -> bool:
        """Whether what the parts hold belongs together."""

    def _check_even(self) -> None:
        if not self._in_step() and not self._even:
            raise _errors.FailedPreconditionError(
                f"the session's shards hold {self._lengths()} tokens, as a call ended at some "
                f"only; allowed: truncate to {self.length} or less first",
                method=METHOD,
            )

    def _lengths(self) -> list[int]:
        return [int(part.session.length) for part in self.parts]

    def _in_step(self) -> bool:
        return any(part.alone.in_step for part in self.parts)


class HeadsFlows(ShardedFlows[S]):
    """By heads: each server has some, of all tokens."""

    @property
    def length(self) -> int:
        """Tokens that it holds."""
        return min(self._lengths())

    def attend(
        self, layer: int, query: Any = None, key: Any = None, value: Any = None, **options: Any
    ) -> Flow[LayerResult]:
        """As `SessionFlows.attend`: outputs of all heads, in their order."""
        if query is None or options.get("hidden_states") is not None:
            raise ValueError("query: not given; allowed: an array, by a session with shards")
        self._check_even()
        given = {"query": query, "key": key, "value": value}
        count = len(self.parts)
        calls = [
            part.attend(
                layer,
                *(
                    None if each is None else heads_of(each, name, count, number)
                    for name, each in given.items()
                ),
                **options,
            )
            for number, part in enumerate(self.parts)
        ]
        results: list[LayerResult] = yield from _all(self.parts, calls)

        def joined(name: str) -> Array | None:
            arrays = [getattr(result, name) for result in results]
            return None if arrays[0] is None else np.concatenate(arrays, axis=1)

        weights = [each.weights for each in results]
        return LayerResult(
            output=joined("output"),
            log_sum_exp=joined("log_sum_exp"),
            entropy=joined("entropy"),
            weights=[np.concatenate(each, axis=1) for each in zip(*weights, strict=True)],
            starts=results[0].starts,
            step_ended=results[0].step_ended,
            timings=max((each.timings for each in results), key=lambda each: each.total),
        )

    def commit(self, accepted: Sequence[int], *, timeout: float | None = 10.0) -> Flow[None]:
        """As `SessionFlows.commit`, at all servers."""
        for part in self.parts:
            yield from part.commit(accepted, timeout=timeout)

    def truncate(self, length: int, *, timeout: float | None = 10.0) -> Flow[None]:
        """As `SessionFlows.truncate`, at all servers; evens parts that are not of one length."""
        for part in self.parts:
            yield from part.truncate(length, timeout=timeout)

    def fork(self, at: int | None = None, **options: Any) -> Flow[S]:
        """As `SessionFlows.fork`, at the same servers."""
        self._check_even()
        length = self.length if at is None else at
        forks = yield from self._forked([length] * len(self.parts), **options)
        return self._make(HeadsFlows(forks, self._make))

    @property
    def _even(self) -> bool:
        return len(set(self._lengths())) == 1


class ContextFlows(ShardedFlows[S]):
    """By context: each server has some tokens, of all heads.

    Args:
        runs: which part took the tokens of each step, and how many, in order.
    """

    def __init__(
        self,
        parts: "Sequence[SessionFlows[Any]]",
        make: "Callable[[ShardedFlows[S]], S]",
        runs: Sequence[tuple[int, int]] = (),
    ) -> None:
        super().__init__(parts, make)
        self._runs = list(runs)
        self._totals = self._of_parts(runs)  # what each part is to hold
        self._taker = 0  # of the step under way, or of the last one

    @property
    def length(self) -> int:
        """Tokens that it holds: the first ones, of which no part lacks any."""
        if self._even:
            return sum(self._totals)
        left, length = self._lengths(), 0
        for number, tokens in self._runs:
            held = min(tokens, left[number])
            left[number] -= held
            length += held
            if held < tokens:
                break
        return length

    def attend(
        self,
        layer: int,
        query: Any = None,
        key: Any = None,
        value: Any = None,
        *,
        return_output: bool = True,
        return_log_sum_exp: bool = False,
        priority: int = 0,
        parents: Sequence[int] | None = None,
        queries_only: bool = False,
        timeout: float | None = 60.0,
        **refused: Any,
    ) -> Flow[LayerResult]:
        """As `SessionFlows.attend`: outputs merged by log-sum-exp."""
        for name, given in refused.items():
            if given:
                raise ValueError(
                    f"{name}: given by a session with shards by context; allowed: nothing, as it "
                    "is not put together from tokens at several servers"
                )
        if query is None:
            raise ValueError("query: not given; allowed: an array, by a session with shards")
        tokens = rows(query, "query").shape[0]
        self._check_even()
        lengths = self._lengths()
        if not self._in_step():
            # The first of those that hold least: the part with the sinks is never empty.
            self._taker = int(np.argmin(lengths))
        asked = [
            number
            for number, length in enumerate(lengths)
            if length > 0 or (number == self._taker and not queries_only)
        ]
        if not asked:
            raise ValueError("queries_only: True of a session without tokens; allowed: False")
        merges = len(asked) > 1
        calls = []
        for number in asked:
            takes = number == self._taker and not queries_only
            calls.append(
                self.parts[number].attend(
                    layer,
                    query,
                    *((key, value) if takes else ()),
                    parents=parents if takes else None,
                    queries_only=not takes,
                    return_output=return_output or merges,
                    return_log_sum_exp=return_log_sum_exp or merges,
                    priority=priority,
                    timeout=timeout,
                )
            )
        results: list[LayerResult] = yield from _all([self.parts[each] for each in asked], calls)
        output, log_sum_exp = results[0].output, results[0].log_sum_exp
        if merges:
            output, log_sum_exp = merge_attention(
                [each.output for each in results], [each.log_sum_exp for each in results]
            )
        grew = self.parts[self._taker].session.length > lengths[self._taker]
        if results[0].step_ended and grew:
            self._took(tokens)
        return LayerResult(
            output=output if return_output else None,
            log_sum_exp=log_sum_exp if return_log_sum_exp else None,
            entropy=None,
            weights=[],
            starts=(0, tokens),
            step_ended=results[0].step_ended,
            timings=max((each.timings for each in results), key=lambda each: each.total),
        )

    def commit(self, accepted: Sequence[int], *, timeout: float | None = 10.0) -> Flow[None]:
        """As `SessionFlows.commit`, at the server that has the tree."""
        taker = self.parts[self._taker]
        yield from taker.commit(accepted, timeout=timeout)
        if accepted:
            self._took(len(accepted))

    def truncate(self, length: int, *, timeout: float | None = 10.0) -> Flow[None]:
        """As `SessionFlows.truncate`: each server keeps what it has of the first `length`.

        So it evens parts that do not belong together.
        """
        runs = self._first(length)
        totals = self._of_parts(runs)
        for part, kept in zip(self.parts, totals, strict=True):
            if part.session.length > kept:
                yield from part.truncate(kept, timeout=timeout)
        self._runs, self._totals = runs, totals

    def fork(self, at: int | None = None, **options: Any) -> Flow[S]:
        """As `SessionFlows.fork`, at the same servers."""
        self._check_even()
        runs = self._first(self.length if at is None else at)
        forks = yield from self._forked(self._of_parts(runs), **options)
        return self._make(ContextFlows(forks, self._make, runs))

    @property
    def _even(self) -> bool:
        return self._lengths() == self._totals

    def _took(self, tokens: int) -> None:
        """The taker of the step has so many tokens more."""
        self._runs.append((self._taker, tokens))
        self._totals[self._taker] += tokens

    def _first(self, length: int) -> list[tuple[int, int]]:
        """The runs of the first tokens."""
        left = arguments.integer("length", length, 0, self.length)
        runs = []
        for number, tokens in self._runs:
            if left > 0:
                runs.append((number, min(tokens, left)))
            left -= min(tokens, left)
        return runs

    def _of_parts(self, runs: Iterable[tuple[int, int]]) -> list[int]:
        """The tokens of each part."""
        lengths = [0] * len(self.parts)
        for number, tokens in runs:
            lengths[number] += tokens
        return lengths


def sharded(
    shards: Shards,
    parts: "Sequence[SessionFlows[Any]]",
    make: "Callable[[ShardedFlows[S]], S]",
) -> ShardedFlows[S]:
    """The calls of a session that was opened so."""
    return HeadsFlows(parts, make) if shards.by == "heads" else ContextFlows(parts, make)


def _all(
    parts: "Sequence[SessionFlows[Any]]", calls: Sequence[Flow[LayerResult]]
) -> Flow[list[LayerResult]]:
    batches = [part.alone for part in parts]
    return all_or_none(calls, batches, [[part.session.length] for part in parts])
