"""Flows side by side: several servers work on their requests at the same time."""

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from attnserve_client._flows import Call, Exchange, Flow, Pause

T = TypeVar("T")


class _Running(Generic[T]):
    """A flow under way.

    Attributes:
        wanted: what it waits for; None: it has ended.
        outcome: its result, or what it raised.
        begun: what its exchange is known by; None: none is begun.
    """

    def __init__(self, flow: Flow[T]) -> None:
        self._flow = flow
        self.wanted: Call | Exchange | Pause | None = None
        self.outcome: T | Exception | None = None
        self.begun: Any = None
        self._go_on(lambda: next(flow))

    def answered(self, answer: Any) -> None:
        """Go on with an answer."""
        self._go_on(lambda: self._flow.send(answer))

    def failed(self, error: BaseException) -> None:
        """Go on with what a call raised; raises it again if it is an interrupt."""
        self._go_on(lambda: self._flow.throw(error))

    def _go_on(self, move: Callable[[], Call | Exchange | Pause]) -> None:
        self.wanted = self.begun = None
        try:
            self.wanted = move()
        except StopIteration as end:
            self.outcome = end.value
        except Exception as error:
            self.outcome = error


def together(flows: Sequence[Flow[T]]) -> Flow[list[T | Exception]]:
    """What each flow gives, or raises.

    Their exchanges are all begun before any answer is waited for; other calls, and pauses, are made
    one after another. An interrupt reaches all of them.
    """
    running = [_Running(flow) for flow in flows]
    try:
        while any(each.wanted is not None for each in running):
            for each in running:
                if isinstance(each.wanted, Exchange):
                    yield from _begin(each, each.wanted)
            for each in running:
                wanted = each.wanted
                if wanted is None or (isinstance(wanted, Exchange) and each.begun is None):
                    continue
                try:
                    answer = yield _answer(wanted, each.begun)
                except Exception as error:
                    each.failed(error)
                else:
                    each.answered(answer)
    except BaseException as interrupt:
        for each in running:
            _interrupt(each, interrupt)
        raise
    outcomes: list[Any] = [each.outcome for each in running]
    return outcomes


def _begin(each: _Running[T], wanted: Exchange) -> Flow[None]:
    try:
        begun = yield Call(lambda left: wanted.stream.begin(wanted.make), wanted.left)
    except Exception as error:
        each.failed(error)
    else:
        each.begun = begun


def _answer(wanted: Call | Exchange | Pause, begun: Any) -> Call | Pause:
    if not isinstance(wanted, Exchange):
        return wanted
    stream, read = wanted.stream, wanted.read
    return Call(lambda left: stream.answer(begun, read, left), wanted.left)


def _interrupt(each: _Running[T], interrupt: BaseException) -> None:
    if isinstance(each.wanted, Exchange) and each.begun is not None:
        each.wanted.stream.drop(each.begun)
    if each.wanted is not None:
        try:
            each.failed(interrupt)
        except BaseException:  # the flow's own end by it
            return
