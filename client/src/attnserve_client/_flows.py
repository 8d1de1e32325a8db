"""Calls that are written once, for the blocking client and for asyncio's.

A flow is a generator: it yields what is to be sent, and goes on with the answer. All that does not
depend on who waits, and how, is in flows: arguments, messages, results, what follows a failure.

>>> class GreetingFlows:
...     def greet(self, name: str) -> Flow[str]:
...         answer = yield Call(lambda left: self.stub.Greet(name, left), 10.0)
...         return answer.text
>>> class Client:  # with _flows: GreetingFlows and _runner
...     greet = blocking(GreetingFlows.greet)
>>> class AsyncClient:
...     greet = awaited(GreetingFlows.greet)
"""

import asyncio
import functools
import inspect
import threading
from collections.abc import Callable, Coroutine, Generator
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, get_args

from attnserve_client._errors import AttnserveError
from attnserve_client._tracing import Propagation

T = TypeVar("T")
F = TypeVar("F")
M = TypeVar("M", bound=Callable[..., Any])
P = ParamSpec("P")


@dataclass(slots=True)
class Call:
    """One call, whose answer its flow waits for.

    Attributes:
        send: makes it, given the seconds that it may take (None: any). Gives the answer; in
            asyncio, what gives it when it is awaited.
        left: those seconds.
    """

    send: Callable[[float | None], Any]
    left: float | None


class Answering(Protocol):
    """What takes requests, and answers them in any order; in asyncio all of it is awaited."""

    def exchange(self, make: Any, read: Any, timeout: float | None) -> Any:
        """Send a request, and wait for what answers it."""

    def begin(self, make: Any) -> Any:
        """Send a request without waiting; gives what it is known by."""

    def answer(self, begun: Any, read: Any, timeout: float | None) -> Any:
        """Wait for what answers a request that was begun."""

    def drop(self, begun: Any) -> None:
        """Wait for no answer to it."""


@dataclass(slots=True)
class Exchange:
    """A call that can be begun before its answer is waited for, as `together` does.

    Attributes:
        stream: makes it.
        make: the request, given its id.
        read: what is answered.
        left: seconds that it may take; None: any.
    """

    stream: Answering
    make: Callable[[int], bytes]
    read: Callable[[bytes], Any]
    left: float | None

    def send(self, left: float | None) -> Any:
        """As `Call.send`."""
        return self.stream.exchange(self.make, self.read, left)


@dataclass(slots=True)
class Pause:
    """Wait for so many seconds; answered by whether the client was closed meanwhile."""

    seconds: float


Flow = Generator[Call | Exchange | Pause, Any, T]


class Runner:
    """Runs the flows of one client: makes their calls, one after another. Safe to share.

    Args:
        propagation: that tells which trace an error is of.
    """

    def __init__(self, propagation: Propagation | None = None) -> None:
        self._closed = threading.Event()
        self._propagation = propagation or Propagation()

    def close(self) -> None:
        """Whoever pauses stops pausing."""
        self._closed.set()

    def run(self, flow: Flow[T]) -> T:
        """The result of a flow."""
        try:
            wanted = next(flow)
            while True:
                try:
                    answer = (
                        self._closed.wait(wanted.seconds)
                        if isinstance(wanted, Pause)
                        else wanted.send(wanted.left)
                    )
                except BaseException as error:
                    wanted = flow.throw(error)
                else:
                    wanted = flow.send(answer)
        except StopIteration as end:
            result: T = end.value
            return result
        except AttnserveError as error:
            error.of_trace(self._propagation.trace_id)
            raise


class AsyncRunner:
    """`Runner`, awaited."""

    def __init__(self, propagation: Propagation | None = None) -> None:
        self._closed = asyncio.Event()
        self._propagation = propagation or Propagation()

    def close(self) -> None:
        """As `Runner.close`."""
        self._closed.set()

    async def run(self, flow: Flow[T]) -> T:
        """The result of a flow."""
        try:
            wanted = next(flow)
            while True:
                try:
                    answer = await (
                        self._pause(wanted.seconds)
                        if isinstance(wanted, Pause)
                        else wanted.send(wanted.left)
                    )
                except BaseException as error:
                    wanted = flow.throw(error)
                else:
                    wanted = flow.send(answer)
        except StopIteration as end:
            result: T = end.value
            return result
        except AttnserveError as error:
            error.of_trace(self._propagation.trace_id)
            raise

    async def _pause(self, seconds: float) -> bool:
        try:
            return await asyncio.wait_for(self._closed.wait(), seconds)
        except TimeoutError:
            return False


def blocking(flow: Callable[Concatenate[F, P], Flow[T]]) -> Callable[Concatenate[Any, P], T]:
    """The method that waits for a flow, with its arguments and its description.

    Its object has as `_flows` the flow's, or another one that has a flow of that name and those
    arguments; and a `Runner` as `_runner`.
    """
    name = flow.__name__

    @functools.wraps(flow)
    def method(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> T:
        runner: Runner = self._runner
        wanted: Flow[T] = getattr(self._flows, name)(*args, **kwargs)
        return runner.run(wanted)

    return _with_signature_of(flow, method)


def awaited(
    flow: Callable[Concatenate[F, P], Flow[T]],
) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, T]]:
    """The method whose result is awaited; else as `blocking`, with an `AsyncRunner`."""
    name = flow.__name__

    @functools.wraps(flow)
    async def method(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> T:
        runner: AsyncRunner = self._runner
        wanted: Flow[T] = getattr(self._flows, name)(*args, **kwargs)
        return await runner.run(wanted)

    return _with_signature_of(flow, method)


def _with_signature_of(flow: Callable[..., Any], method: M) -> M:
    """A method that `help` shows with the result of its flow."""
    signature = inspect.signature(flow)
    result = get_args(signature.return_annotation)[-1]
    method.__signature__ = signature.replace(return_annotation=result)  # type: ignore[attr-defined]
    return method
