"""Callers that are killed: their pages come back, and nobody else's sessions notice."""

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import doomed_callers
import numpy as np
import pytest
from attnserve_client import AttentionClient, Session
from attnserve_server.app import AttentionServer
from attnserve_server.settings import Limits
from decode_streams import DIM, HEADS, KV_HEADS, VALUE_DIM
from handmade import attention, write_core
from plain_sessions import PlainLayer, PlainSession
from serving import eventually, serving

pytestmark = pytest.mark.needs_library

KINDS = ("decode", "large", "move", "message")
LEASE = 2.0
LAYERS = 2
generator = np.random.default_rng()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AttentionServer]:
    folder = tmp_path_factory.mktemp("models")
    causal = attention(HEADS, DIM, num_kv_heads=KV_HEADS, value_head_dim=VALUE_DIM, mask="causal")
    write_core(folder, "llama", causal)
    # Refused for a long wait a caller would end before it is killed.
    with serving(folder, limits=Limits(max_queue_seconds=60)) as running:
        yield running


@contextmanager
def callers(server: AttentionServer, kinds: Sequence[str]) -> Iterator[list[subprocess.Popen[str]]]:
    """Callers in the middle of things, each in a process of its own."""
    started = [
        subprocess.Popen(
            [sys.executable, doomed_callers.__file__, str(server.port), kind, str(LEASE)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for kind in kinds
    ]
    try:
        for caller in started:
            assert caller.stdout is not None
            assert caller.stdout.readline() == "at it\n"
        yield started
    finally:
        for caller in started:
            caller.kill()
            caller.wait()


def check_step(session: Session, plain: PlainSession) -> None:
    """A step of random tokens, compared with the plain session's."""
    tokens = int(generator.integers(1, 20))
    plain.begin(tokens)
    for layer in range(LAYERS):
        shapes = ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, VALUE_DIM))
        arrays = [generator.standard_normal((tokens, *shape), np.float32) for shape in shapes]
        expected, _, _ = plain.attend(layer, *arrays)
        given = session.attend(layer, *arrays).output
        np.testing.assert_allclose(given, expected, atol=2e-5, rtol=1e-5)
    plain.end()


def kill(server: AttentionServer, kinds: Sequence[str]) -> None:
    """Kill such callers while another one takes steps."""
    with (
        AttentionClient(f"127.0.0.1:{server.port}") as client,
        ThreadPoolExecutor() as pool,
        client.session("llama", num_layers=LAYERS, max_tokens=1 << 16) as session,
    ):
        plain = PlainSession([PlainLayer(), PlainLayer()])
        expired = server.plane.kv_sessions()["expired"]
        with callers(server, kinds) as doomed:

            def wait_and_kill(caller: subprocess.Popen[str]) -> None:
                time.sleep(generator.random() * 0.2)
                assert caller.poll() is None
                caller.kill()
                caller.wait()

            killed = [pool.submit(wait_and_kill, caller) for caller in doomed]
            while not all(future.done() for future in killed):
                check_step(session, plain)
            for future in killed:
                future.result()
        assert server.plane.kv_sessions()["sessions"] > 1  # of those who are dead
        assert eventually(lambda: server.plane.kv_sessions()["sessions"] == 1, LEASE + 10)
        assert server.plane.kv_sessions()["expired"] >= expired + len(kinds)
        check_step(session, plain)
        pages = -(-plain.length // 16) * LAYERS
        assert server.plane.kv_sessions()["pages_in_use"] == pages
    held = ("kv_sessions", "kv_pages", "kv_bytes", "kv_promised_bytes", "bytes_in_flight")
    read = server.metrics.registry.get_sample_value
    for name in (*held, "connections"):
        assert eventually(lambda name=name: read(f"attnserve_{name}") == 0), name


def test_pages_of_callers_that_are_killed_come_back(server: AttentionServer) -> None:
    kill(server, KINDS)


@pytest.mark.slow
def test_pages_of_many_callers_that_are_killed_come_back(server: AttentionServer) -> None:
    for _ in range(20):
        kill(server, [*KINDS, *generator.choice(KINDS, 2)])
