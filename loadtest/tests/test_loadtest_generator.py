"""Client processes against real servers: due times, pauses, cancellation, several servers."""

import os
import signal
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from attnserve_client import AttentionClient, Model
from attnserve_loadtest.load.arrivals import CONSTANT
from attnserve_loadtest.load.callers import Servers, page_hashes
from attnserve_loadtest.load.generator import Clients, clients
from attnserve_loadtest.load.measured import ANSWERED, CANCELLED, FAILED, Measured
from attnserve_loadtest.load.plan import Arrival, Cancel, Load
from attnserve_loadtest.load.requests import Generation, Mix, Single, Span
from handmade import attention, write_core
from serving import ServerProcess, process

pytestmark = pytest.mark.needs_library

LENGTHS = Mix((8, 16), (1, 1))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("models")
    write_core(folder, "llama", attention(4, 8, num_kv_heads=2, mask="causal"))
    with process(folder) as running:
        yield running


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("models")
    write_core(folder, "llama", attention(4, 8, num_kv_heads=2, mask="causal"))
    with process(folder) as running:
        yield running


@pytest.fixture(scope="module")
def two() -> Iterator[Clients]:
    with clients(2) as ready:
        yield ready


def model(server: ServerProcess) -> Model:
    with AttentionClient(server.address) as client:
        return client.get_model("llama")


def servers(*running: ServerProcess, **options: object) -> Servers:
    found = model(running[0])
    addresses = tuple(each.address for each in running)
    return Servers(addresses, found, found, **options)  # type: ignore[arg-type]


def test_what_is_due_is_sent_and_answered(server: ServerProcess, two: Clients) -> None:
    measured = two.run(Load(servers(server), 1.0, rate=100.0, arrivals=CONSTANT, mix=LENGTHS))
    assert measured.failure == ""
    assert measured.count(ANSWERED) == 100
    assert len(measured.rows) == 150  # with the warm-up's
    assert np.diff(measured.rows["due"]) == pytest.approx(0.01)
    assert (measured.rows["sent"] >= measured.rows["due"]).all()
    assert (measured.rows["done"] > measured.rows["sent"]).all()
    assert (measured.rows["first"] == measured.rows["done"]).all()
    assert set(measured.rows["length"]) == {8, 16}
    assert (measured.rows["compute"] > 0).all()
    assert 0 < measured.client_cpu < 2


def pause(server: ServerProcess, at: float, seconds: float) -> threading.Thread:
    def work() -> None:
        time.sleep(at)
        os.kill(server.popen.pid, signal.SIGSTOP)
        time.sleep(seconds)
        os.kill(server.popen.pid, signal.SIGCONT)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_a_pause_shows_in_all_that_was_due_while_it_lasted(
    server: ServerProcess, two: Clients
) -> None:
    """1 s of 4: a quarter of what is due waits, evenly up to 1 s. So p99 is about 0.96 s."""
    load = Load(servers(server), 4.0, rate=100.0, arrivals=CONSTANT, mix=LENGTHS)
    stopped = pause(server, at=1.5, seconds=1.0)
    measured = two.run(load)
    stopped.join()
    assert measured.count(ANSWERED) == 400
    rows = measured.due_rows
    latency = rows["done"] - rows["due"]
    waited = int(np.sum(latency > 0.1))
    assert 80 <= waited <= 130  # about 90 of the 100 that were due in that second
    assert 900 < measured.latency_ms(0.99) < 1300
    assert measured.latency_ms(0.5) < 100
    # Sent on time all the while: it is the server's time, not the client's.
    assert measured.late_ms(0.9) < 50


def test_a_closed_loop_does_not_see_the_pause(server: ServerProcess, two: Clients) -> None:
    """Why arrivals are open: the two callers wait, and 1 s is two requests of thousands."""
    stopped = pause(server, at=1.0, seconds=1.0)
    measured = two.run(Load(servers(server), 2.5, callers=2, mix=LENGTHS))
    stopped.join()
    rows = measured.due_rows
    assert len(rows) > 300
    assert int(np.sum(rows["done"] - rows["due"] > 0.5)) <= 2
    assert measured.latency_ms(0.99) < 500


def test_who_does_not_wait_is_counted_apart(server: ServerProcess, two: Clients) -> None:
    mix = Mix((2048,), (1.0,))
    load = Load(servers(server), 1.0, rate=40.0, mix=mix, cancel=Cancel(0.5, 0.0005))
    measured = two.run(load)
    assert measured.failure == ""
    cancelled = measured.rows[measured.rows["outcome"] == CANCELLED]
    assert 0.3 < len(cancelled) / len(measured.rows) < 0.7
    assert (cancelled["done"] - cancelled["sent"]).min() >= 0.0005
    assert measured.count(ANSWERED) > 5


def test_sessions_think_and_their_tokens_are_timed(server: ServerProcess, two: Clients) -> None:
    mix = Mix((8,), (1.0,), 0.5, prompt=Span(600, 700), tokens=Span(4, 6), think=0.2)
    measured = two.run(Load(servers(server, num_layers=2), 1.5, rate=10.0, mix=mix))
    assert measured.failure == ""
    rows, tokens = measured.rows, measured.tokens
    assert (rows["outcome"] == ANSWERED).all()
    sessions = np.flatnonzero(rows["tokens"])
    assert 0 < len(sessions) < len(rows)
    for row in sessions:
        own = tokens[tokens["row"] == row]
        assert len(own) == rows["tokens"][row]
        assert list(own["context"]) == [rows["length"][row] + n + 1 for n in range(len(own))]
        assert rows["due"][row] < rows["first"][row] < own["at"][0] <= rows["done"][row]
        # What is left of its time when tokens are taken away is its user's rest.
        rest = own["at"][-1] - rows["first"][row] - own["took"].sum()
        assert rest > -1e-6
    assert set(tokens["row"]) == set(sessions)
    rests = [
        tokens["at"][tokens["row"] == row].max()
        - rows["first"][row]
        - tokens["took"][tokens["row"] == row].sum()
        for row in sessions
    ]
    assert np.mean(rests) == pytest.approx(0.2, abs=0.15)


def test_several_servers_share_the_load(
    server: ServerProcess, other: ServerProcess, two: Clients
) -> None:
    measured = two.run(Load(servers(server, other), 1.0, rate=200.0, mix=LENGTHS))
    assert measured.failure == ""
    shares = np.bincount(measured.rows["target"], minlength=2) / len(measured.rows)
    assert shares.min() > 0.25


def test_a_server_that_is_not_there_is_said(server: ServerProcess, two: Clients) -> None:
    nowhere = Servers(("127.0.0.1:1",), model(server), timeout=0.5)
    with pytest.raises(RuntimeError, match=r"Unavailable|Deadline"):
        two.run(Load(nowhere, 1.0, rate=10.0))
    # And the clients are ready for the next load.
    assert two.run(Load(servers(server), 0.2, rate=50.0)).count(ANSWERED) > 0


def test_failures_are_counted_and_the_first_is_kept(server: ServerProcess, two: Clients) -> None:
    schedule = (Arrival(0.0, Single(8)), Arrival(0.1, Generation(1 << 24, 1)))
    measured = two.run(Load(servers(server), 0.5, schedule=schedule))
    assert measured.count(ANSWERED) == measured.count(FAILED) == 1
    assert "max_tokens" in measured.failure


def sessions_of(measured: Measured) -> list[float]:
    return list(measured.rows["first"] - measured.rows["sent"])


def test_equal_blocks_of_a_trace_are_a_prefix_that_is_found(
    server: ServerProcess, two: Clients
) -> None:
    with AttentionClient(server.address) as client:
        page_tokens = client.server_info().limits.session_page_tokens
    blocks = (3, 4, 5, 6)
    first = Generation(2000, 1, blocks=blocks, block_tokens=512)
    hashes = page_hashes(first, page_tokens)
    assert len(hashes) == 2000 // page_tokens
    shorter = page_hashes(Generation(1024, 1, blocks=(3, 4), block_tokens=512), page_tokens)
    assert shorter == hashes[: len(shorter)]
    changed = page_hashes(Generation(1024, 1, blocks=(3, 9), block_tokens=512), page_tokens)
    assert changed[: 512 // page_tokens] == hashes[: 512 // page_tokens]
    assert not set(changed[512 // page_tokens :]) & set(hashes)
    schedule = tuple(Arrival(n * 0.4, first) for n in range(3))
    target = servers(server, page_tokens=page_tokens, num_layers=4)
    measured = two.run(Load(target, 1.5, schedule=schedule))
    assert measured.failure == ""
    # The connection's own request filled the pages; what is left is one page at most.
    assert measured.rows["compute"].max() < 0.05
    assert len(sessions_of(measured)) == 3
