"""Who may come in, who waits outside, and who is refused before being read."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from attnserve_client import AttentionClient, ResourceExhaustedError
from attnserve_server.app import AttentionServer
from attnserve_server.errors import CancelledError, DeadlineError, ExhaustedError
from attnserve_server.scheduler import Ticket
from attnserve_server.scheduler.gate import Gate


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(32) as opened:
        yield opened


def taught(seconds: float, max_seconds: float = 10.0) -> Gate:
    """A gate that has seen one answer come out each `seconds`."""
    gate = Gate(max_seconds, patience=4)
    for _ in range(9):
        gate.enter(Ticket)
        gate.enter(Ticket)
        time.sleep(seconds)
        gate.leave()
        time.sleep(seconds)
        gate.leave()
    return gate


def send(gate: Gate, pool: ThreadPoolExecutor, ticket: Ticket) -> "Future[None]":
    """A request from a thread of its own; returns once it waits or is inside."""
    before = gate.waiting + gate.inside
    future = pool.submit(gate.enter, lambda: ticket)
    until(lambda: gate.waiting + gate.inside > before or future.done())
    return future


def test_quick_requests_come_in_by_the_dozen() -> None:
    gate = Gate(10.0)
    for _ in range(100):
        gate.enter(Ticket)
    assert (gate.inside, gate.waiting) == (100, 0)


def test_slow_requests_come_in_a_few_at_a_time_and_the_others_wait_their_turn(
    pool: ThreadPoolExecutor,
) -> None:
    gate = taught(0.02)
    futures = [send(gate, pool, Ticket(caller="a")) for _ in range(7)]
    futures.append(send(gate, pool, Ticket(caller="b")))
    assert (gate.inside, gate.waiting) == (4, 4)
    assert [future.done() for future in futures[4:]] == [False] * 4
    gate.leave()
    futures[4].result(5)
    # The other caller does not wait for all that the first one sent.
    gate.leave()
    futures[7].result(5)
    assert (gate.inside, gate.waiting) == (4, 2)
    for _ in range(2):
        gate.leave()
    [future.result(5) for future in futures]
    assert (gate.inside, gate.waiting) == (4, 0)


def test_who_would_wait_too_long_is_refused_at_once_and_told_when_to_come_back(
    pool: ThreadPoolExecutor,
) -> None:
    gate = taught(0.02, max_seconds=0.15)
    futures = [send(gate, pool, Ticket()) for _ in range(20)]
    refused = [future for future in futures if future.done() and future.exception()]
    assert 8 <= len(refused) <= 15
    error = refused[0].exception()
    assert isinstance(error, ExhaustedError)
    assert "are before this one" in str(error)
    assert error.retry_after is not None
    for _ in range(len(futures) - len(refused)):
        gate.leave()
    assert (gate.inside, gate.waiting) == (0, 0)


def test_an_empty_server_refuses_nobody_however_slow_it_is(pool: ThreadPoolExecutor) -> None:
    gate = taught(0.02, max_seconds=0.001)
    gate.enter(Ticket)
    assert gate.inside == 1


def test_who_expires_or_is_cancelled_outside_leaves_nothing_behind(
    pool: ThreadPoolExecutor,
) -> None:
    gate = taught(0.02)
    inside = [send(gate, pool, Ticket()) for _ in range(4)]
    cancelled = Ticket()
    gone = send(gate, pool, cancelled)
    late = send(gate, pool, Ticket(time.monotonic() + 0.05))
    cancelled.cancel()
    with pytest.raises(CancelledError):
        gone.result(5)
    with pytest.raises(DeadlineError):
        late.result(5)
    assert gate.waiting == 0
    [future.result(5) for future in inside]


def test_many_threads_leave_the_books_balanced(pool: ThreadPoolExecutor) -> None:
    gate = Gate(10.0)

    def work(number: int) -> None:
        for _ in range(20):
            with gate.inside_of(lambda: Ticket(caller=str(number % 3))):
                time.sleep(0.001)

    [future.result(20) for future in [pool.submit(work, number) for number in range(16)]]
    assert (gate.inside, gate.waiting) == (0, 0)


def test_a_refused_call_and_a_refused_request_of_a_stream_say_when_to_come_back(
    server: AttentionServer, client: AttentionClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = server.gate
    monkeypatch.setattr(gate, "_interval", 1.0)
    monkeypatch.setattr(gate, "_inside", 40)
    small = np.zeros((1, 4, 3, 8), np.float32)
    large = np.zeros((4, 4, 2048, 8), np.float32)
    for query in (small, large):
        with pytest.raises(ResourceExhaustedError, match="40 are before this one") as caught:
            client.attend(query, query, query, model="causal")
        assert caught.value.retry_after == pytest.approx(40 - 0.5, abs=0.1)
    monkeypatch.setattr(gate, "_inside", 0)
    monkeypatch.setattr(gate, "_interval", 0.0)
    assert client.attend(large, large, large, model="causal").output is not None


def test_a_call_without_a_message_is_refused(channel: grpc.Channel) -> None:
    call = channel.stream_unary("/attnserve.v1.AttentionService/Attend", None, None)
    with pytest.raises(grpc.RpcError, match="message: given nothing") as caught:
        call(iter(()))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_cancelled_before_it_is_read_a_call_leaves_the_gate(
    server: AttentionServer, channel: grpc.Channel
) -> None:
    hold = threading.Event()

    def never() -> Iterator[bytes]:
        hold.wait(5)
        yield b""

    call = channel.stream_unary("/attnserve.v1.AttentionService/Attend", None, None)
    future = call.future(never())
    until(lambda: server.gate.inside == 1)
    future.cancel()
    until(lambda: server.gate.inside == 0)
    hold.set()
