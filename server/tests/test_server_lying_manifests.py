"""Manifests that say other things than their graphs are refused at load, and never at a request."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
import serving
import torch
from attnserve_export.attention.layer import AttentionLayer, LayerConfig
from attnserve_export.models import seeded
from attnserve_proto import attention_pb2_grpc as pb_grpc
from attnserve_server.app import AttentionServer
from handmade import attention, write_layer
from tritonclient.grpc import service_pb2 as oip
from tritonclient.grpc import service_pb2_grpc as oip_grpc

Change = Callable[[dict], object]
Code = grpc.StatusCode


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = serving.write_causal(tmp_path_factory.mktemp("lying"))
    config = LayerConfig(attention(4, 8, mask="causal"), embed_dim=32, context_dim=None)
    torch.manual_seed(3)
    write_layer(folder, "self", seeded(AttentionLayer, config, 3))
    return folder


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[AttentionServer]:
    with serving.serving(repository) as running:
        yield running


@pytest.fixture
def channel(server: AttentionServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as opened:
        yield opened


def attention_of(**values: object) -> Change:
    return lambda content: content["attention"].update(values)


def tensor(side: str, name: str, /, **values: object) -> Change:
    def change(content: dict) -> None:
        for each in content["variants"][0][side]:
            if each["name"] == name:
                each.update(values)

    return change


def without(side: str, name: str) -> Change:
    def change(content: dict) -> None:
        tensors = content["variants"][0][side]
        tensors[:] = [each for each in tensors if each["name"] != name]

    return change


@pytest.mark.parametrize(
    ("model", "change", "said"),
    [
        ("causal", attention_of(num_heads=8, num_kv_heads=8), "dimension 1 is 8"),
        ("causal", attention_of(num_kv_heads=2), "key: by the manifest's attention, dimension 1"),
        ("causal", attention_of(head_dim=16), "dimension 3 is 16"),
        ("causal", attention_of(value_head_dim=4), "value: by the manifest's attention"),
        ("causal", lambda content: content.update(dtype="FP16"), "the manifest is of FP16"),
        ("causal", tensor("inputs", "query", dtype="FP16"), "query: the manifest says FP16"),
        ("causal", tensor("inputs", "query", shape=["b", 4, "s", 16]), "query: the manifest says"),
        ("causal", tensor("inputs", "key", shape=["b", "s", 8]), "key: the manifest says"),
        ("causal", tensor("inputs", "value", name="values"), "inputs: the manifest has"),
        ("causal", without("inputs", "key_lengths"), "inputs: the manifest has"),
        ("causal", tensor("outputs", "output", name="context"), "outputs: the manifest has"),
        ("self", lambda content: content["layer"].update(embed_dim=64), "dimension 2 is 64"),
        ("self", lambda content: content.update(dtype="BF16"), "the manifest is of BF16"),
    ],
)
def test_a_lie_is_refused_at_load_and_what_was_served_serves_on(
    channel: grpc.Channel, repository: Path, model: str, change: Change, said: str
) -> None:
    path = repository / model / "1" / "model.json"
    before = path.read_text()
    content = json.loads(before)
    change(content)
    path.write_text(json.dumps(content))
    stub = oip_grpc.GRPCInferenceServiceStub(channel)
    try:
        with pytest.raises(grpc.RpcError) as refused:
            stub.RepositoryModelLoad(oip.RepositoryModelLoadRequest(model_name=model))
    finally:
        path.write_text(before)
    assert refused.value.code() is Code.FAILED_PRECONDITION
    assert said in refused.value.details()
    assert str(repository) not in refused.value.details()
    own = pb_grpc.AttentionServiceStub(channel)
    assert own.Attend(serving.attend_request()).model == "causal"
    stub.RepositoryModelLoad(oip.RepositoryModelLoadRequest(model_name=model))


def test_links_stay_within_the_models_folder(
    channel: grpc.Channel, repository: Path, tmp_path: Path
) -> None:
    stub = oip_grpc.GRPCInferenceServiceStub(channel)
    request = oip.RepositoryModelLoadRequest(model_name="causal")
    folder = repository / "causal" / "1"
    graph = folder / "model.onnx"
    outside = tmp_path / "model.onnx"
    shutil.move(graph, outside)
    try:
        graph.symlink_to(outside)
        with pytest.raises(grpc.RpcError) as refused:
            stub.RepositoryModelLoad(request)
        assert refused.value.code() is Code.FAILED_PRECONDITION
        assert "leads out of its folder" in refused.value.details()
        graph.unlink()
        within = folder / "..data"
        within.mkdir()
        shutil.copy(outside, within / "model.onnx")
        graph.symlink_to("..data/model.onnx")  # as Kubernetes mounts it
        stub.RepositoryModelLoad(request)
        shutil.rmtree(within)
    finally:
        graph.unlink(missing_ok=True)
        shutil.copy(outside, graph)
    stub.RepositoryModelLoad(request)
