"""What a token request may ask for: targets, attentions, layers, heads; and what is refused."""

import asyncio
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import one_graph
import onnx
import pytest
from attnserve_client import (
    AsyncAttentionClient,
    AttentionClient,
    FailedPreconditionError,
    InvalidArgumentError,
    ResourceExhaustedError,
    TokensResult,
)
from attnserve_export.cli import main

SOURCES, TARGETS = [[5, 6, 7, 2], [9, 2]], [[0, 11, 12], [0, 13, 14, 15]]
Families = tuple[Path, str]
Serving = Callable[[Path], AbstractContextManager[str]]


@pytest.fixture(scope="module")
def client(families: Families) -> Iterator[AttentionClient]:
    with AttentionClient(families[1]) as opened:
        yield opened


def test_target_texts_are_shifted_behind_the_start_token(client: AttentionClient) -> None:
    for model, start in (("t5", 0), ("bart", 2)):
        by_text = client.attend_tokens(["w5 w6 w7", "w9"], targets=["w11 w12", "w13"], model=model)
        assert by_text.ids == [[5, 6, 7, 2], [9, 2]]
        assert by_text.target_ids == [[start, 11, 12], [start, 13]]
        assert by_text.target_tokens[0][1:] == ["w11", "w12"]
        by_ids = client.attend_tokens(
            [[5, 6, 7, 2], [9, 2]], targets=[[start, 11, 12], [start, 13]], model=model
        )
        for one, other in zip(by_text.hidden, by_ids.hidden, strict=True):
            np.testing.assert_array_equal(one, other)


def test_without_targets_the_decoder_reads_the_start_token(client: AttentionClient) -> None:
    result = client.attend_tokens(SOURCES, model="t5", attention="cross", layers=[0])
    assert result.target_ids == [[0], [0]]
    assert [weights.shape for weights in result.weights] == [(1, 4, 1, 4), (1, 4, 1, 2)]


def test_each_attention_has_its_own_queries_and_keys(client: AttentionClient) -> None:
    shapes = {"encoder": (1, 4, 2, 2), "decoder": (1, 4, 4, 4), "cross": (1, 4, 4, 2)}
    for attention, shape in shapes.items():
        result = client.attend_tokens(
            SOURCES, targets=TARGETS, model="t5", attention=attention, return_weights=True
        )
        assert result.attention == attention
        assert result.weights[1].shape == shape
        np.testing.assert_allclose(result.weights[1].sum(axis=-1), 1, atol=1e-5)
    assert client.attend_tokens(SOURCES, model="t5", layers=[0]).attention == "encoder"
    assert client.attend_tokens(SOURCES, model="t5").attention == ""


@pytest.mark.parametrize("variant", ["fused", "native"])
def test_some_heads_are_the_same_as_among_all(client: AttentionClient, variant: str) -> None:
    if variant not in {v.name for v in client.get_model("qwen2").variants}:
        pytest.skip("attnserve-kernels has no library here")

    def ask(**chosen: list[int]) -> TokensResult:
        return client.attend_tokens(
            [list(range(3, 40)), [7]],
            model="qwen2",
            variant=variant,
            return_weights=True,
            return_entropy=True,
            mass_by_distance=5,
            mass_on_first=3,
            return_effective_context=True,
            **chosen,
        )

    everything, some = ask(), ask(layers=[1, 0], heads=[3, 0])
    for name in (
        "weights",
        "entropy",
        "effective_context",
        "mass_by_distance",
        "mass_on_first",
    ):
        for whole, part in zip(getattr(everything, name), getattr(some, name), strict=True):
            np.testing.assert_allclose(part, whole[[1, 0]][:, [3, 0]], atol=1e-6)
    # The window of 7 is the second layer's.
    reach = np.nonzero(everything.weights[0][1, 0, -1])[0]
    assert (reach.min(), reach.max()) == (30, 36)


def test_diagnostics_come_without_weights(client: AttentionClient) -> None:
    result = client.attend_tokens(
        SOURCES, model="gpt2", return_hidden=False, mass_by_distance=100, mass_on_first=100
    )
    assert (result.weights, result.hidden, result.entropy) == (None, None, None)
    assert result.mass_by_distance[0].shape == (1, 4, 100)
    np.testing.assert_allclose(result.mass_by_distance[0].sum(axis=-1), 4, rtol=1e-5)
    np.testing.assert_allclose(result.mass_on_first[0], 1, rtol=1e-5)


def test_what_a_model_lists(client: AttentionClient) -> None:
    t5, qwen2 = client.get_model("t5"), client.get_model("qwen2")
    assert [(a.name, a.mask) for a in t5.attentions] == [
        ("encoder", "bidirectional"),
        ("decoder", "causal"),
        ("cross", "cross"),
    ]
    assert t5.max_seq_len == 0
    (attention,) = qwen2.attentions
    assert (attention.num_heads, attention.num_kv_heads, attention.windows) == (4, 2, (0, 7))


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (FailedPreconditionError, "target_tokens: model gpt2 is no encoder-decoder",
         {"model": "gpt2", "targets": [[1], [1]]}),
        (InvalidArgumentError, r"target_tokens.sequences: given 1 sequences; allowed: 2, one",
         {"targets": [[1]]}),
        (InvalidArgumentError, r"target_tokens.sequences\[1\].ids\[0\]: given 60; allowed: 0..59",
         {"targets": [[1], [60]]}),
        (InvalidArgumentError, r"target_tokens.sequences\[0\]: given 0 tokens",
         {"targets": [[], [1]]}),
        (InvalidArgumentError, r"target_text.texts\[0\]: given 61 tokens; allowed: 1..48",
         {"model": "bart", "targets": ["w3 " * 60, ""]}),
        (InvalidArgumentError, "returns.attention: given middle; allowed: encoder, decoder, cross",
         {"attention": "middle"}),
        (InvalidArgumentError, "returns.attention: given encoder; allowed: decoder",
         {"model": "gpt2", "attention": "encoder"}),
        (InvalidArgumentError, r"returns.heads\[0\]: given 4; allowed: 0..3", {"heads": [4]}),
        (InvalidArgumentError, r"returns.layers\[0\]: given 1; allowed: 0..0", {"layers": [1]}),
        (InvalidArgumentError, "returns.mass_on_first: given 70000", {"mass_on_first": 70_000}),
    ],
)  # fmt: skip
def test_bad_requests_are_refused_by_field(
    client: AttentionClient, error: type[Exception], message: str, arguments: dict[str, object]
) -> None:
    with pytest.raises(error, match=message):
        client.attend_tokens(SOURCES, **{"model": "t5", **arguments})


def test_bad_arguments_never_leave_the_client(client: AttentionClient) -> None:
    with pytest.raises(TypeError, match="targets: given 'a text', of type str"):
        client.attend_tokens(SOURCES, model="t5", targets="a text")
    with pytest.raises(ValueError, match="mass_on_first: given -1"):
        client.attend_tokens(SOURCES, model="t5", mass_on_first=-1)


def test_the_asyncio_client_has_the_same_arguments(
    client: AttentionClient, families: Families
) -> None:
    arguments = {"model": "bart", "targets": TARGETS, "attention": "cross", "mass_on_first": 1}
    arguments |= {"return_effective_context": True, "mass_by_distance": 3, "return_entropy": True}

    async def ask() -> TokensResult:
        async with AsyncAttentionClient(families[1]) as opened:
            return await opened.attend_tokens(SOURCES, **arguments)

    one, other = asyncio.run(ask()), client.attend_tokens(SOURCES, **arguments)
    for name in ("hidden", "mass_on_first", "effective_context", "mass_by_distance", "entropy"):
        for left, right in zip(getattr(one, name), getattr(other, name), strict=True):
            np.testing.assert_array_equal(left, right)


def test_models_that_give_weights_themselves_are_served_as_before(
    client: AttentionClient, families: Families, tmp_path: Path, serving: Serving
) -> None:
    folder = families[0]
    version = tmp_path / "roberta/1"
    shutil.copytree(folder / "models/roberta/1", version)
    give_weights(version)
    with serving(tmp_path) as address, AttentionClient(address) as old:
        arguments = {"model": "roberta", "heads": [2, 1], "return_entropy": True}
        for ids in (list(range(3, 30)), [7]):
            one = old.attend_tokens([ids], return_weights=True, **arguments)
            other = client.attend_tokens([ids], return_weights=True, **arguments)
            np.testing.assert_allclose(one.weights[0], other.weights[0], atol=1e-5)
            np.testing.assert_allclose(one.entropy[0], other.entropy[0], atol=1e-4)


def give_weights(version: Path) -> None:
    """Make of an encoder's version, of one layer, one as they were before they gave query and key:
    its graph gives weights (without regard to padding), its manifest lists no attentions."""
    model = onnx.load(version / "model.onnx", load_external_data=False)
    make = onnx.helper.make_node
    model.graph.node.extend(
        [
            make("Transpose", ["encoder_key_0"], ["turned"], perm=[0, 1, 3, 2]),
            make("MatMul", ["encoder_query_0", "turned"], ["products"]),
            make("Mul", ["products", "scale"], ["scores"]),
            make("Softmax", ["scores"], ["weights_0"], axis=-1),
        ]
    )
    manifest = json.loads((version / "model.json").read_text())
    scale = np.float32(manifest["attention"]["scale"])
    model.graph.initializer.append(onnx.numpy_helper.from_array(scale, "scale"))
    shape = ["batch", 4, "seq_len", "seq_len"]
    weights = onnx.helper.make_tensor_value_info("weights_0", onnx.TensorProto.FLOAT, shape)
    del model.graph.output[1:]
    model.graph.output.append(weights)
    (version / "model.onnx").write_bytes(model.SerializeToString())
    del manifest["transformer"]["attentions"], manifest["transformer"]["decoder_start_token_id"]
    manifest["variants"] = [v for v in manifest["variants"] if v["name"] == "fused"]
    manifest["variants"][0]["outputs"][1:] = [
        {"name": "weights_0", "dtype": "FP32", "shape": shape}
    ]
    manifest["files"]["model.onnx"] = one_graph.entry_of(version / "model.onnx")
    (version / "model.json").write_text(json.dumps(manifest))


@pytest.mark.slow
@pytest.mark.needs_library
def test_long_inputs_take_no_matrix_unless_weights_are_asked_for(
    families: Families, tmp_path: Path
) -> None:
    length = 12_288  # the weights of one head would take 576 MiB
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(families[0] / "qwen2", checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(
        json.dumps(config | {"max_position_embeddings": length})
    )
    arguments = ["transformer", "--out", str(tmp_path / "models"), "--name", "long"]
    assert main([*arguments, "--checkpoint", str(checkpoint)]) == 0
    command = [sys.executable, "-m", "attnserve_server.cli", "--port", "0", "--metrics-port", "-1"]
    command += ["--repository", str(tmp_path / "models"), "--provider", "cpu"]
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True) as server:
        try:
            address = server.stdout.readline().split("listening on ")[1].split()[0]
            with AttentionClient(address) as client:
                ids = np.random.default_rng(0).integers(3, 60, length).tolist()
                client.attend_tokens([ids[:64]], model="long", return_entropy=True)
                before = peak_mib(server.pid)
                result = client.attend_tokens(
                    [ids], model="long", return_entropy=True, mass_by_distance=64, mass_on_first=4
                )
                assert peak_mib(server.pid) - before < 250
                assert result.entropy[0].shape == (2, 4, length)
                np.testing.assert_allclose(result.mass_by_distance[0].sum(-1), length, rtol=1e-4)
                with pytest.raises(ResourceExhaustedError, match="ask for fewer layers, heads"):
                    client.attend_tokens([ids], model="long", heads=[0])
        finally:
            server.terminate()


def peak_mib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) >> 10
