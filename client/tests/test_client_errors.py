"""The SDK's exceptions are whole wherever they are taken."""

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import attnserve_client
import grpc
import pytest
from attnserve_client import AttnserveError, ResourceExhaustedError, _errors
from attnserve_proto import attention_pb2_grpc as pb_grpc

EVERY = [AttnserveError, *AttnserveError.__subclasses__()]


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize(
    "copied",
    [
        *(lambda error, p=p: pickle.loads(pickle.dumps(error, p)) for p in range(6)),
        copy.copy,
        copy.deepcopy,
    ],
)
def test_copies_and_pickles_are_whole(
    kind: type[AttnserveError], copied: Callable[[Any], AttnserveError]
) -> None:
    error = kind("queue: full", method="Attend", code=grpc.StatusCode.ABORTED, retry_after=0.25)
    error.add_note("at the third try")
    its = copied(error)
    assert type(its) is kind
    assert str(its) == str(error) == "ABORTED from Attend: queue: full"
    assert vars(its) == vars(error)
    assert (its.code, its.message, its.method, its.retry_after) == (
        grpc.StatusCode.ABORTED, "queue: full", "Attend", 0.25,
    )  # fmt: skip
    assert its.args == error.args


def test_every_status_has_its_own_and_all_are_public() -> None:
    for code in grpc.StatusCode:
        kind = type(_errors.from_status(code, "text", "Attend"))
        assert getattr(attnserve_client, kind.__name__) is kind


def test_subclasses_of_users_copy_too() -> None:
    class MyError(ResourceExhaustedError):
        def __init__(self) -> None:
            super().__init__("mine", method="Attend", retry_after=1.0)
            self.extra = [1]

    error = MyError()
    its = copy.deepcopy(error)
    assert (its.message, its.retry_after, its.extra) == ("mine", 1.0, [1])
    assert its.extra is not error.extra


WORKERS = """
import multiprocessing, sys
import numpy as np
from attnserve_client import AttentionClient, ResourceExhaustedError

def attend(address):
    tensor = np.ones((1, 1, 2, 2), np.float32)
    with AttentionClient(address) as client:
        client.attend(tensor, tensor, tensor, model="m")

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        try:
            pool.map(attend, [sys.argv[1]])
        except ResourceExhaustedError as error:
            print(error, error.retry_after, error.method, error.code.name, sep="|")
"""


def test_a_worker_process_raises_it_in_its_parent(tmp_path: Path) -> None:
    class Service(pb_grpc.AttentionServiceServicer):
        def Attend(self, request, context):  # type: ignore[no-untyped-def]  # noqa: N802
            context.set_trailing_metadata([("retry-after", "0.25")])
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue: full")

    server = grpc.server(ThreadPoolExecutor(2))
    pb_grpc.add_AttentionServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    script = tmp_path / "workers.py"
    script.write_text(WORKERS)
    done = subprocess.run(
        [sys.executable, script, f"127.0.0.1:{port}"], capture_output=True, text=True, timeout=60
    )
    server.stop(0).wait()
    expected = "RESOURCE_EXHAUSTED from Attend: queue: full|0.25|Attend|RESOURCE_EXHAUSTED"
    assert done.stdout.strip() == expected, done.stderr
