"""A client of several servers: who is asked, who is asked next, and who is left alone."""

import asyncio
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import grpc
import numpy as np
import pytest
from attnserve_client import (
    AsyncAttentionClient,
    AttentionClient,
    CancelledError,
    DeadlineExceededError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    Session,
    StoredTensor,
    UnavailableError,
)
from attnserve_client._cluster import Cluster
from plain_server import served
from serving import eventually

Q = np.ones((1, 2, 3, 4), np.float32)
Before = Callable[[str, grpc.ServicerContext], None]


class Calls:
    """Counts calls by server and method, and has some servers refuse them."""

    def __init__(self, refuse: dict[int, Before] | None = None) -> None:
        self.counts: Counter[tuple[int, str]] = Counter()
        self.times: list[tuple[int, float]] = []
        self._refuse = refuse or {}

    def of(self, server: int) -> Before:
        """What a server's calls begin with."""

        def before(method: str, context: grpc.ServicerContext) -> None:
            self.counts[server, method] += 1
            self.times.append((server, time.monotonic()))
            if server in self._refuse:
                self._refuse[server](method, context)

        return before

    def attended(self) -> list[int]:
        """Calls of Attend at each server."""
        return [self.counts[server, "Attend"] for server in range(3)]


@contextmanager
def three(calls: Calls) -> Iterator[list[str]]:
    with ExitStack() as stack:
        yield [stack.enter_context(served(calls.of(number))) for number in range(3)]


def refusing(code: grpc.StatusCode, details: str = "no", retry_after: str = "") -> Before:
    def refuse(method: str, context: grpc.ServicerContext) -> None:
        if retry_after:
            context.set_trailing_metadata([("retry-after", retry_after)])
        context.abort(code, details)

    return refuse


def all_serve(client: Any) -> bool:
    return eventually(lambda: set(client.server_states.values()) == {"serving"})


def cluster_of(client: AttentionClient) -> Cluster[Session]:
    assert client._cluster is not None
    return client._cluster


def test_calls_go_to_all_servers() -> None:
    calls = Calls()
    with three(calls) as addresses, AttentionClient(addresses) as client:
        assert client.servers == tuple(addresses)
        assert all_serve(client)
        for _ in range(60):
            client.attend(Q, Q, Q, model="m")
    assert min(calls.attended()) > 5


def test_a_slow_server_gets_fewer_calls() -> None:
    calls = Calls({0: lambda *_: time.sleep(0.2)})
    with three(calls) as addresses, AttentionClient(addresses) as client:
        assert all_serve(client)
        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(client.attend, Q, Q, Q, model="m") for _ in range(200)]:
                done.result(20)
    assert calls.attended()[0] < 40


@pytest.mark.parametrize(
    "code",
    [
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.UNAUTHENTICATED,
    ],
)
def test_what_one_server_refuses_another_takes_at_once(code: grpc.StatusCode) -> None:
    calls = Calls({0: refusing(code), 2: refusing(code)})
    with three(calls) as addresses, AttentionClient(addresses) as client:
        assert all_serve(client)
        started = time.monotonic()
        for _ in range(30):
            assert client.attend(Q, Q, Q, model="m").model == "m"
        assert time.monotonic() - started < 2
    assert calls.attended()[1] == 30
    assert calls.attended()[0] + calls.attended()[2] > 0

    async def call_all() -> None:
        async with AsyncAttentionClient(addresses) as client:
            assert client.server_states
            await asyncio.gather(*(client.attend(Q, Q, Q, model="m") for _ in range(30)))

    calls = Calls({0: refusing(code), 2: refusing(code)})
    with three(calls) as addresses:
        asyncio.run(asyncio.wait_for(call_all(), 20))
    assert calls.attended()[1] == 30


def test_what_is_wrong_in_itself_is_asked_once() -> None:
    wrong = refusing(grpc.StatusCode.INVALID_ARGUMENT, "query: no")
    calls = Calls(dict.fromkeys(range(3), wrong))
    with (
        three(calls) as addresses,
        AttentionClient(addresses) as client,
        pytest.raises(InvalidArgumentError, match=r"query: no \(server 127"),
    ):
        client.attend(Q, Q, Q, model="m")
    assert sum(calls.attended()) == 1


def test_what_all_servers_refuse_is_said_at_once_and_asked_of_each_once() -> None:
    absent = refusing(grpc.StatusCode.NOT_FOUND, "model: m")
    calls = Calls(dict.fromkeys(range(3), absent))
    with three(calls) as addresses, AttentionClient(addresses) as client:
        assert all_serve(client)
        with pytest.raises(NotFoundError, match="model: m"):
            client.attend(Q, Q, Q, model="m")
        assert calls.attended() == [1, 1, 1]


def test_a_server_without_the_model_is_not_asked_for_it_again_soon() -> None:
    calls = Calls({0: refusing(grpc.StatusCode.NOT_FOUND)})
    with three(calls) as addresses, AttentionClient(addresses) as client:
        assert all_serve(client)
        for _ in range(40):
            client.attend(Q, Q, Q, model="m")
    assert calls.attended()[0] == 1


def test_a_server_that_names_a_time_is_left_alone_for_it() -> None:
    busy = refusing(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue", "0.5")
    calls = Calls({0: busy})
    with three(calls) as addresses, AttentionClient(addresses) as client:
        assert all_serve(client)
        until = time.monotonic() + 1.2
        while time.monotonic() < until:
            client.attend(Q, Q, Q, model="m")
        # Another kind of calls is none of it.
        client.servers = [addresses[0]]
        with pytest.raises(ResourceExhaustedError):
            client.get_model("m")
    asked = [at for server, at in calls.times if server == 0][:-1]
    assert 2 <= len(asked) <= 3
    assert all(later - earlier >= 0.5 for earlier, later in pairwise(asked))


def test_who_all_asked_to_wait_waits_if_there_is_time() -> None:
    busy = refusing(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue", "0.3")
    calls = Calls(dict.fromkeys(range(3), busy))
    with three(calls) as addresses, AttentionClient(addresses) as client:
        assert all_serve(client)
        with pytest.raises(ResourceExhaustedError, match="queue") as refused:
            client.attend(Q, Q, Q, model="m")
        assert refused.value.retry_after == 0.3
        assert calls.attended() == [1, 1, 1]
        started = time.monotonic()
        with pytest.raises(ResourceExhaustedError):  # there is no time: nobody is asked
            client.attend(Q, Q, Q, model="m", timeout=0.1)
        assert time.monotonic() - started < 0.1
        assert calls.attended() == [1, 1, 1]
        with pytest.raises(ResourceExhaustedError):
            client.attend(Q, Q, Q, model="m")
        assert time.monotonic() - started >= 0.15
        assert sum(calls.attended()) > 3


@contextmanager
def silent() -> Iterator[str]:
    """An address where connections are taken and nothing is said."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def test_addresses_that_never_answer_cost_nothing() -> None:
    with served() as address, silent() as mute:
        addresses = [mute, "127.0.0.1:1", address, "192.0.2.1:8001", "no-such-host.invalid:1"]
        with AttentionClient(addresses) as client:
            started = time.monotonic()
            for _ in range(50):
                client.attend(Q, Q, Q, model="m", timeout=5.0)
            assert time.monotonic() - started < 2
            assert eventually(lambda: client.server_states[mute] == "no answer within 2 s")
            states = client.server_states
            assert states[address] == "serving"
            assert "UNAVAILABLE" in states["127.0.0.1:1"]


def test_without_any_server_the_error_says_what_is_wrong_with_each() -> None:
    with silent() as mute, AttentionClient([mute, "127.0.0.1:1"]) as client:
        started = time.monotonic()
        with pytest.raises(UnavailableError) as error:
            client.attend(Q, Q, Q, model="m", timeout=2.5)
        assert 2.3 < time.monotonic() - started < 3.5
    assert f"{mute}: no answer within 2 s" in error.value.message
    assert "127.0.0.1:1: UNAVAILABLE" in error.value.message


def test_a_deadline_is_one_for_all_tries() -> None:
    calls = Calls(dict.fromkeys(range(3), lambda *_: time.sleep(1.0)))
    with three(calls) as addresses, AttentionClient(addresses) as client:
        started = time.monotonic()
        with pytest.raises(DeadlineExceededError):
            client.attend(Q, Q, Q, model="m", timeout=0.3)
        assert time.monotonic() - started < 0.9


def test_servers_are_added_and_removed_while_calls_go_on() -> None:
    calls = Calls({0: lambda *_: time.sleep(0.002)})
    with three(calls) as addresses, AttentionClient(addresses[:1]) as client:
        with ThreadPoolExecutor(4) as pool:
            work = [pool.submit(client.attend, Q, Q, Q, model="m") for _ in range(100)]
            client.servers = addresses[1:]
            work += [pool.submit(client.attend, Q, Q, Q, model="m") for _ in range(200)]
            for done in work:
                done.result(20)
        assert client.servers == tuple(addresses[1:])
        before = calls.attended()
        for _ in range(20):
            client.attend(Q, Q, Q, model="m")
        assert calls.attended()[0] == before[0]
        client.servers = [*addresses]
        assert all_serve(client)
    assert min(calls.attended()[1:]) > 0


def test_a_removed_server_is_left_once_nothing_is_on_it() -> None:
    calls = Calls()
    with three(calls) as addresses, AttentionClient(addresses) as client:
        assert all_serve(client)
        cluster = cluster_of(client)
        with client.stream() as stream:
            held = cluster.of(lambda server: len(server.connection.held) > 0)
            assert held is not None
            gone = held.server.address
            client.servers = [each for each in addresses if each != gone]
            answer = stream.submit(Q, Q, Q, model="m")
            time.sleep(0.6)
            assert cluster.at(gone) is not None
        assert answer.result(5) is not None
        del stream
        assert eventually(lambda: cluster.at(gone) is None)


def test_stored_tensors_are_where_they_were_put() -> None:
    calls = Calls()
    with three(calls) as addresses, AttentionClient(addresses) as client:
        assert all_serve(client)
        stored = [client.put_tensor(Q) for _ in range(30)]
        assert {each.server for each in stored} == set(addresses)
        for each in stored:
            client.attend(Q, each, each, model="m")
        kept = Counter(addresses.index(each.server) for each in stored)
        assert calls.attended() == [kept[number] for number in range(3)]
        renewed = client.renew_tensor(stored[0])
        assert renewed.server == stored[0].server
        client.drop_tensor(renewed)
        other = next(each for each in stored if each.server != stored[0].server)
        with pytest.raises(ValueError, match=r"stored at .* and .*; allowed: at one server"):
            client.attend(Q, stored[0], other, model="m")
        client.servers = [other.server]
        assert eventually(
            lambda: client._cluster is not None and len(client._cluster._leaving) == 0
        )
        with pytest.raises(NotFoundError, match="none of this client's servers"):
            client.attend(Q, stored[0], Q, model="m")
        with pytest.raises(ValueError, match="put by a client of one server"):
            client.drop_tensor(StoredTensor("handle", 60.0, Q.shape, Q.dtype))


def test_a_name_stands_for_all_its_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    behind = ["127.0.0.1"]

    def look_up(host: str, port: int, **_: Any) -> list[Any]:
        assert host == "attnserve.test"
        if not behind:
            raise socket.gaierror("Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port)) for each in behind]

    monkeypatch.setattr("attnserve_proto.targets.socket.getaddrinfo", look_up)
    monkeypatch.setattr("attnserve_client._cluster_places._NAME_SECONDS", 0.05)
    calls = Calls()
    with served(calls.of(0)) as first:
        port = int(first.rpartition(":")[2])
        with (
            served(calls.of(1), port, "127.0.0.2") as second,
            AttentionClient(f"dns:///attnserve.test:{port}") as client,
        ):
            client.attend(Q, Q, Q, model="m")
            assert client.servers == (first,)
            behind.append("127.0.0.2")
            assert eventually(lambda: client.servers == (first, second))
            behind.remove("127.0.0.1")
            assert eventually(lambda: client.servers == (second,))
            client.attend(Q, Q, Q, model="m")
            behind.clear()  # what was known is kept
            time.sleep(0.2)
            client.attend(Q, Q, Q, model="m")
            with pytest.raises(ValueError, match="servers: set on a client of 'dns:///"):
                client.servers = [first]
    assert calls.attended() == [1, 2, 0]


def test_closing_the_client_ends_its_tries() -> None:
    client = AttentionClient(["127.0.0.1:1"])
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.attend, Q, Q, Q, model="m", timeout=None)
        time.sleep(0.2)
        client.close()
        with pytest.raises(CancelledError, match="closed"):
            call.result(2)
    with pytest.raises(CancelledError, match="closed"):
        client.server_info()


@pytest.mark.parametrize(
    ("target", "error"),
    [
        ([], ValueError),
        (["a:1", "a:1"], ValueError),
        (["a:1", ""], ValueError),
        (["a:1", 2], TypeError),
        (3, TypeError),
        ("", ValueError),
        ("dns:///name", ValueError),
        ("dns:///name:port", ValueError),
        ("file://name", ValueError),
        ("file:///folder/", ValueError),
    ],
)
def test_targets_that_are_none(target: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="target"):
        AttentionClient(target)


def test_a_client_of_one_server_watches_nothing() -> None:
    with served() as address, AttentionClient(address) as client:
        assert client.servers == (address,)
        with pytest.raises(ValueError, match="allowed: on one made with a list"):
            client.servers = [address]
        with pytest.raises(ValueError, match="of several servers"):
            client.server_states  # noqa: B018
