"""Computations and loads that nothing can end: callers are told, and the process is replaced."""

import shutil
import signal
import threading
import urllib.request
from pathlib import Path

import grpc
import numpy as np
import one_graph
import pytest
import serving
import tritonclient.grpc as triton
from grpc_health.v1 import health_pb2, health_pb2_grpc
from handmade import attention, write_core
from tritonclient.utils import InferenceServerException

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

# Adds 1 to the values; computes what never ends if key_lengths is above 3.
WEDGED_RUN = f"""
    bound = Constant <value_int = 3> ()
    lengths_above = Greater (key_lengths, bound)
    scalar = Constant <value_ints = [0]> ()
    above = Gather (lengths_above, scalar)
    output = If (above) <
        then_branch = slow () => (float[b, h, s, d] taken) {{
            largest = ReduceMax <keepdims = 0> (value)
            {one_graph.late_mean("Expand (largest, size)")}
            taken = Add (value, mean) }},
        else_branch = quick () => (float[b, h, s, d] given) {{
            one = Constant <value_float = 1.0> ()
            given = Add (value, one) }}>
"""

# The same of constants, which is computed when the graph is loaded.
WEDGED_LOAD = f"""
    {one_graph.late_mean("ConstantOfShape (size)")}
    output = Add (value, mean)
"""


def code_of(future: grpc.Future) -> grpc.StatusCode:
    error = future.exception(timeout=30)
    return grpc.StatusCode.OK if error is None else error.code()


def test_a_run_that_nothing_ends_is_told_and_the_process_is_replaced(tmp_path: Path) -> None:
    one_graph.write(tmp_path, WEDGED_RUN)
    metrics_port = serving.free_port()
    options = ["--max-run-seconds", "0.5", "--wedged-exit-seconds", "6", "--concurrency", "1"]
    with (
        serving.process(tmp_path, *options, "--metrics-port", str(metrics_port)) as server,
        grpc.insecure_channel(server.address) as channel,
        triton.InferenceServerClient(server.address) as kserve,
    ):
        attend = serving.raw_call(channel, serving.ATTEND)
        health = health_pb2_grpc.HealthStub(channel)
        watched = health.Watch(health_pb2.HealthCheckRequest(), timeout=30)
        assert next(watched).status == SERVING
        assert kserve.is_server_ready()
        assert kserve.is_model_ready("causal")

        quick = serving.attend_request()
        quick.key_lengths.CopyFrom(_lengths(2))
        slow = serving.attend_request()
        slow.key_lengths.CopyFrom(_lengths(5))
        # The first of its kind: what is known to be short runs on the thread of its connection.
        wedged = attend.future(slow.SerializeToString())
        waiting = attend.future(quick.SerializeToString())
        assert code_of(wedged) == grpc.StatusCode.UNAVAILABLE
        assert "does not end" in wedged.exception().details()
        assert code_of(waiting) == grpc.StatusCode.UNAVAILABLE

        assert next(watched).status == NOT_SERVING
        assert health.Check(health_pb2.HealthCheckRequest()).status == NOT_SERVING
        assert not kserve.is_server_ready()
        assert not kserve.is_model_ready("causal")
        assert kserve.is_server_live()
        with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics") as page:
            assert b"\nattnserve_wedged_runs 1.0\n" in page.read()
        refused = attend.future(quick.SerializeToString())
        assert code_of(refused) == grpc.StatusCode.UNAVAILABLE
        assert server.popen.wait(30) == 70


def test_a_server_that_is_told_to_end_does_so_though_a_run_does_not(tmp_path: Path) -> None:
    one_graph.write(tmp_path, WEDGED_RUN)
    options = ["--max-run-seconds", "0.2", "--wedged-exit-seconds", "0", "--drain-seconds", "1"]
    with (
        serving.process(tmp_path, *options) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        slow = serving.attend_request()
        slow.key_lengths.CopyFrom(_lengths(5))
        wedged = serving.raw_call(channel, serving.ATTEND).future(slow.SerializeToString())
        assert code_of(wedged) == grpc.StatusCode.UNAVAILABLE
        server.popen.send_signal(signal.SIGTERM)
        assert server.popen.wait(30) == 70


def test_a_load_that_nothing_ends_delays_nobody_else(tmp_path: Path) -> None:
    repository = tmp_path / "models"
    write_core(repository, "other", attention(serving.HEADS, serving.DIM))
    shutil.copytree(repository / "other", tmp_path / "other")
    options = ["--max-load-seconds", "3"]
    with (
        serving.process(repository, *options) as server,
        triton.InferenceServerClient(server.address) as client,
        triton.InferenceServerClient(server.address) as another,
    ):
        one_graph.write(repository, WEDGED_LOAD)
        told: list[InferenceServerException] = []

        def load() -> None:
            with pytest.raises(InferenceServerException) as raised:
                client.load_model("causal")
            told.append(raised.value)

        loading = threading.Thread(target=load)
        loading.start()
        assert serving.eventually(lambda: _state(another, "causal") == "LOADING")
        another.load_model("other")
        another.unload_model("other")
        another.load_model("other")
        assert another.is_model_ready("other")
        assert loading.is_alive()
        loading.join(30)
        assert told[0].status() == "StatusCode.DEADLINE_EXCEEDED"
        assert "has not loaded within 3 s (--max-load-seconds)" in told[0].message()
        assert str(tmp_path) not in told[0].message()
        load()
        assert told[1].status() == "StatusCode.DEADLINE_EXCEEDED"
        assert "an earlier load of it has not ended" in told[1].message()
        assert _state(another, "causal") == "UNAVAILABLE"
        server.popen.send_signal(signal.SIGTERM)
        assert server.popen.wait(30) == 0


def test_a_server_starts_without_a_model_that_does_not_load_in_time(tmp_path: Path) -> None:
    write_core(tmp_path, "other", attention(serving.HEADS, serving.DIM))
    one_graph.write(tmp_path, WEDGED_LOAD)
    with (
        serving.process(tmp_path, "--max-load-seconds", "2") as server,
        triton.InferenceServerClient(server.address) as client,
    ):
        assert client.is_model_ready("other")
        assert _state(client, "causal") == "UNAVAILABLE"


def _lengths(length: int) -> serving.pb.Tensor:
    numbers = np.array([length], np.int64)
    return serving.pb.Tensor(dtype=serving.pb.INT64, shape=[1], data=numbers.tobytes())


def _state(client: triton.InferenceServerClient, model: str) -> str:
    index = client.get_model_repository_index().models
    return next((entry.state for entry in index if entry.name == model), "")
