"""Calls that are written once, for the blocking client and for asyncio's.

A flow is a generator: it yields what is to be sent, and goes on with the answer. All that does not
depend on who waits, and how, is in flows: arguments, messages, results, what follows a failure.

>>> class GreetingFlows:
...     def greet(self, name: str) -> Flow[str]:
...         answer = yield Call("Greet", lambda left: self.stub.Greet(name, left), timeout=10.0)
...         return answer.text
>>> class Client:  # with _flows: GreetingFlows and _runner
...     greet = blocking(GreetingFlows.greet)
>>> class AsyncClient:
...     greet = awaited(GreetingFlows.greet)
"""

import functools
from collections.abc import Callable, Coroutine, Generator
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

T = TypeVar("T")
F = TypeVar("F")
P = ParamSpec("P")


@dataclass(slots=True)
class Call:
    """One call, which its flow waits for.

    Attributes:
        method: its name, for messages.
        send: makes it, given the seconds left (None: without end). Gives the answer; in asyncio,
            what gives it when it is awaited.
        timeout: seconds for all tries together; None waits for ever.
        again: whether it can be repeated safely: it is then, while no server is there.
    """

    method: str
    send: Callable[[float | None], Any]
    timeout: float | None
    again: bool = True


Flow = Generator[Call, Any, T]


class Runner(Protocol):
    """Who makes the calls of flows, and waits for them in a thread."""

    def run(self, flow: Flow[T]) -> T:
        """Make the calls of a flow, one after another; its result."""


class AsyncRunner(Protocol):
    """Who makes the calls of flows, and awaits them."""

    async def run(self, flow: Flow[T]) -> T:
        """As `Runner.run`."""


def blocking(flow: Callable[Concatenate[F, P], Flow[T]]) -> Callable[Concatenate[Any, P], T]:
    """The method that waits for a flow, with its arguments and its description.

    Its object has the flow's as `_flows`, and a `Runner` as `_runner`.
    """

    @functools.wraps(flow)
    def method(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> T:
        runner: Runner = self._runner
        return runner.run(flow(self._flows, *args, **kwargs))

    return method


def awaited(
    flow: Callable[Concatenate[F, P], Flow[T]],
) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, T]]:
    """The method whose result is awaited; else as `blocking`, with an `AsyncRunner`."""

    @functools.wraps(flow)
    async def method(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> T:
        runner: AsyncRunner = self._runner
        return await runner.run(flow(self._flows, *args, **kwargs))

    return method
