"""A server that ends while it is busy, and one that takes its place."""

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import serving
from attnserve_client import AttentionClient


def call_until(
    over: threading.Event, target: str, failures: list[Exception], answered: Callable[[], None]
) -> None:
    arrays = [np.ones((1, serving.HEADS, 32, serving.DIM), np.float32)] * 3
    with AttentionClient(target) as client:
        while not over.is_set():
            try:
                client.attend(*arrays, model="causal", timeout=30)
                answered()
            except Exception as error:
                failures.append(error)
                return


def test_callers_of_the_sdk_notice_no_restart(tmp_path: Path) -> None:
    repository = serving.write_causal(tmp_path)
    over = threading.Event()
    failures: list[Exception] = []
    counts = [0] * 16

    def counter(number: int) -> Callable[[], None]:
        def count() -> None:
            counts[number] += 1

        return count

    with serving.process(repository) as first:
        callers = [
            threading.Thread(
                target=call_until, args=(over, first.address, failures, counter(number))
            )
            for number in range(16)
        ]
        for caller in callers:
            caller.start()
        assert serving.eventually(lambda: min(counts) >= 3 or bool(failures), 20)
        first.popen.terminate()
        assert first.popen.wait(timeout=20) == 0
    before = list(counts)
    with serving.process(repository, port=first.port) as second:
        assert second.address == first.address
        assert serving.eventually(
            lambda: (
                all(now > then + 1 for now, then in zip(counts, before, strict=True))
                or bool(failures)
            ),
            20,
        )
        over.set()
        for caller in callers:
            caller.join(timeout=30)
    assert not failures
