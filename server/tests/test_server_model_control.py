"""Models come and go while the server runs, asked for through tritonclient."""

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from attnserve_dataplane import Model, RequestError
from attnserve_server.app import AttentionServer
from attnserve_server.settings import Settings
from tritonclient.grpc import service_pb2 as oip
from tritonclient.grpc import service_pb2_grpc
from tritonclient.utils import InferenceServerException


@pytest.fixture
def folder(repository: Path, tmp_path: Path) -> Path:
    """A repository of its own with one model."""
    shutil.copytree(repository / "causal", tmp_path / "causal")
    return tmp_path


@pytest.fixture
def running(folder: Path) -> Iterator[AttentionServer]:
    server = AttentionServer(
        Settings(folder, port=0, metrics_port=None, provider="cpu", drain_seconds=5)
    )
    server.start()
    yield server
    server.drain()


@pytest.fixture
def control(running: AttentionServer) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(f"127.0.0.1:{running.port}") as opened:
        yield opened


def infer(client: triton.InferenceServerClient, model: str) -> np.ndarray:
    tensors = []
    for name in ("query", "key", "value"):
        tensors.append(triton.InferInput(name, [1, 4, 3, 8], "FP32"))
        tensors[-1].set_data_from_numpy(np.ones((1, 4, 3, 8), np.float32))
    return client.infer(model, tensors).as_numpy("output")


def states(client: triton.InferenceServerClient) -> dict[str, tuple[str, str]]:
    index = client.get_model_repository_index().models
    return {f"{entry.name}/{entry.version}": (entry.state, entry.reason) for entry in index}


def test_a_model_is_unloaded_and_loaded_again(
    control: triton.InferenceServerClient, running: AttentionServer
) -> None:
    assert states(control) == {"causal/1": ("READY", "")}
    control.unload_model("causal", unload_dependents=True)
    assert running.store.versions("causal") == []
    assert states(control) == {"causal/1": ("UNAVAILABLE", "unloaded")}
    assert not control.is_model_ready("causal")
    with pytest.raises(InferenceServerException, match="causal is unloaded") as raised:
        infer(control, "causal")
    assert raised.value.status() == "StatusCode.UNAVAILABLE"
    control.load_model("causal")
    assert running.store.versions("causal") == [1]
    np.testing.assert_allclose(infer(control, "causal"), 1, atol=1e-6)


def test_a_model_that_is_unloaded_while_it_is_looked_up_is_unloaded(
    running: AttentionServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    plane = running.plane

    class UnloadsMeanwhile:
        """The data plane; a model goes just after it was found."""

        def get_model(self, name: str, version: str) -> Model:
            found = plane.get_model(name, version)
            monkeypatch.undo()
            running.store.put(name, [])
            return found

    monkeypatch.setattr(running.store, "_plane", UnloadsMeanwhile())
    with pytest.raises(RequestError, match="causal is unloaded"):
        running.store.get("causal", "")


def test_models_that_appear_in_the_repository_can_be_loaded(
    control: triton.InferenceServerClient, folder: Path, repository: Path
) -> None:
    shutil.copytree(repository / "half", folder / "half")
    assert states(control)["half/1"] == ("UNAVAILABLE", "not loaded")
    control.load_model("half")
    assert states(control)["half/1"] == ("READY", "")
    assert control.is_model_ready("half")


def test_a_model_that_does_not_load_leaves_the_old_one_serving(
    control: triton.InferenceServerClient, folder: Path
) -> None:
    (folder / "causal" / "1" / "model.json").write_text("{")
    with pytest.raises(InferenceServerException, match=r"causal/1/model.json: not JSON") as raised:
        control.load_model("causal")
    assert raised.value.status() == "StatusCode.FAILED_PRECONDITION"
    assert str(folder) not in raised.value.message()
    np.testing.assert_allclose(infer(control, "causal"), 1, atol=1e-6)
    control.unload_model("causal")
    with pytest.raises(InferenceServerException):
        control.load_model("causal")
    state, reason = states(control)["causal/1"]
    assert state == "UNAVAILABLE"
    assert "not JSON" in reason


def test_what_is_loaded_outlives_its_repository(
    control: triton.InferenceServerClient, folder: Path
) -> None:
    shutil.rmtree(folder)
    assert states(control) == {"causal/1": ("READY", "")}
    np.testing.assert_allclose(infer(control, "causal"), 1, atol=1e-6)
    with pytest.raises(InferenceServerException, match="the repository has none"):
        control.load_model("causal")


def test_what_cannot_be_loaded_or_unloaded(control: triton.InferenceServerClient) -> None:
    for call in (control.load_model, control.unload_model):
        for name in ("nope", "../causal", ""):
            with pytest.raises(InferenceServerException, match="model_name: given") as raised:
                call(name)
            assert raised.value.status() == "StatusCode.NOT_FOUND"
    with pytest.raises(InferenceServerException, match="parameters: given 'config'") as raised:
        control.load_model("causal", config="{}")
    assert raised.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_requests_go_on_while_models_are_changed(control: triton.InferenceServerClient) -> None:
    """A request is answered, or told that the model is not loaded; nothing else."""
    done = threading.Event()
    failures: list[str] = []
    answers: list[np.ndarray] = []

    def call() -> None:
        while not done.is_set():
            try:
                answers.append(infer(control, "causal"))
            except InferenceServerException as error:
                failures.append(error.message())

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(4):
        control.unload_model("causal")
        control.load_model("causal")
    done.set()
    for thread in threads:
        thread.join()
    assert answers
    assert all(np.allclose(answer, 1, atol=1e-6) for answer in answers)
    assert all("causal is unloaded" in failure for failure in failures)


def test_a_server_may_keep_its_models_fixed(folder: Path) -> None:
    server = AttentionServer(
        Settings(
            folder, port=0, metrics_port=None, provider="cpu", drain_seconds=5, model_control=False
        )
    )
    server.start()
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
        for call in (client.load_model, client.unload_model):
            with pytest.raises(InferenceServerException, match="--no-model-control") as raised:
                call("causal")
            assert raised.value.status() == "StatusCode.UNIMPLEMENTED"
        assert states(client) == {"causal/1": ("READY", "")}
    server.drain()


def test_a_drain_answers_what_came_and_ends_the_stream(folder: Path) -> None:
    server = AttentionServer(
        Settings(folder, port=0, metrics_port=None, provider="cpu", drain_seconds=5)
    )
    server.start()
    hold = threading.Event()

    def requests() -> Iterator[oip.ModelInferRequest]:
        yield oip.ModelInferRequest(model_name="causal", id="1")
        hold.wait(20)

    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        call = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(requests())
        assert next(call).infer_response.id == "1"
        draining = threading.Thread(target=server.drain)
        draining.start()
        with pytest.raises(grpc.RpcError, match="shutting down") as raised:
            next(call)
        assert raised.value.code() == grpc.StatusCode.UNAVAILABLE
        hold.set()
        draining.join()
