"""Exports against the reference, the reference against PyTorch, and what is left on disk."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from attnserve_export import models
from attnserve_export.attention.core import AttentionConfig, FusedCore
from attnserve_export.attention.layer import AttentionLayer
from attnserve_export.attention.masks import Mask
from attnserve_export.attention.positions import Rotary
from attnserve_export.attention.variants import FUSED, VariantSpec, core_specs, layer_specs
from attnserve_export.cli import main
from attnserve_export.errors import ExportError
from attnserve_export.reference import BIDIRECTIONAL, CAUSAL, attention_reference
from attnserve_export.verification import lowest_bias_tolerance
from handmade import attention, write_core
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

sizes = st.integers(1, 24)
relaxed = settings(deadline=None, max_examples=30)


@relaxed
@given(
    batch=st.integers(1, 3), sq=sizes, sk=sizes, groups=st.integers(1, 4), seed=st.integers(0, 99)
)
def test_the_reference_is_torchs_attention(
    batch: int, sq: int, sk: int, groups: int, seed: int
) -> None:
    torch.manual_seed(seed)
    q = torch.randn(batch, 2 * groups, sq, 5, dtype=torch.float64)
    k, v = (torch.randn(batch, 2, sk, width, dtype=torch.float64) for width in (5, 7))
    for mask in ("bidirectional", "causal"):
        output, _ = attention_reference(
            q, k, v, scheme=CAUSAL if mask == "causal" else BIDIRECTIONAL
        )
        expected = nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=mask == "causal", enable_gqa=True
        )
        np.testing.assert_allclose(output, expected.numpy(), atol=1e-12)


# Options of `attnserve-export core`.
CORES = {
    # As in test_end_to_end.py, so that it is exported once.
    "causal": "--num-heads 8 --head-dim 64 --mask causal",
    "wide": "--num-heads 96 --num-kv-heads 32 --head-dim 4 --value-head-dim 5 --mask causal",
    "half": "--num-heads 6 --num-kv-heads 1 --head-dim 8 --dtype fp16",
    "one": "--num-heads 6 --num-kv-heads 1 --head-dim 8 --value-head-dim 5",
}


@pytest.fixture(scope="module")
def version(
    tmp_path_factory: pytest.TempPathFactory, export_all: Callable[[list[list[str]]], None]
) -> Callable[[str], Path]:
    """Where a model is, which is exported when it is first asked for."""
    out = tmp_path_factory.mktemp("models")

    def folder(name: str) -> Path:
        if not (out / name).exists():
            export_all([["core", "--out", str(out), "--name", name, *CORES[name].split()]])
        return out / name / "1"

    return folder


@relaxed
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
@pytest.mark.parametrize(
    "name",
    [
        "causal",
        "half",
        pytest.param("wide", marks=pytest.mark.slow),
        pytest.param("one", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("variant", ["fused", "reference"])
def test_any_shape_is_within_tolerance(
    version: Callable[[str], Path], name: str, variant: str, data: st.DataObject, seed: int
) -> None:
    manifest = json.loads((version(name) / "model.json").read_text())
    attention = manifest["attention"]
    generator = np.random.default_rng(seed)
    batch, sq, sk = data.draw(st.integers(1, 3)), data.draw(sizes), data.draw(sizes)
    heads, kv_heads = attention["num_heads"], attention["num_kv_heads"]
    dim, value_dim = attention["head_dim"], attention["value_head_dim"]
    dtype = np.float16 if name == "half" else np.float32
    feeds = {
        "query": generator.standard_normal((batch, heads, sq, dim)).astype(dtype),
        "key": generator.standard_normal((batch, kv_heads, sk, dim)).astype(dtype),
        "value": generator.standard_normal((batch, kv_heads, sk, value_dim)).astype(dtype),
        "key_lengths": generator.integers(0, sk + 1, batch),
    }
    for row, length in enumerate(feeds["key_lengths"]):
        feeds["key"][row, :, length:] = data.draw(st.sampled_from((0, np.nan, np.inf)))
        feeds["value"][row, :, length:] = data.draw(st.sampled_from((0, np.nan, -np.inf)))
    lowest = False
    if variant == "reference":
        full = (batch, heads, sq, sk)
        shape = [data.draw(st.sampled_from((1, size))) for size in full]
        feeds["bias"] = generator.standard_normal(shape).astype(dtype)
        feeds["bias"][generator.random(shape) < 0.2] = -np.inf
        if attention["mask"] == "causal":
            feeds["prefix_lengths"] = generator.integers(0, sk + 1, batch)
        lowest = data.draw(st.booleans(), label="lowest")
        if lowest:
            feeds["bias"][:, :, 0] = np.finfo(dtype).min
    output, weights = attention_reference(
        **feeds, scheme=CAUSAL if attention["mask"] == "causal" else BIDIRECTIONAL
    )
    session = _session(version(name) / _file(manifest, variant))
    answers = session.run(None, feeds)
    tolerance = 2e-3 if name == "half" else 2e-6 * np.sqrt(sk)
    tolerance += lowest * lowest_bias_tolerance(manifest["dtype"])
    np.testing.assert_allclose(answers[0], output, atol=tolerance)
    for answer in answers[1:]:
        np.testing.assert_allclose(answer, weights, atol=tolerance)


_sessions: dict[Path, onnxruntime.InferenceSession] = {}


def _session(path: Path) -> onnxruntime.InferenceSession:
    if path not in _sessions:
        _sessions[path] = onnxruntime.InferenceSession(str(path))
    return _sessions[path]


def _file(manifest: dict, variant: str) -> str:
    return next(entry["file"] for entry in manifest["variants"] if entry["name"] == variant)


@pytest.mark.needs_library
def test_the_manifest_says_what_is_there(version: Callable[[str], Path]) -> None:
    folder = version("causal")
    manifest = json.loads((folder / "model.json").read_text())
    assert set(manifest["files"]) == {p.name for p in folder.iterdir()} - {"model.json"}
    for name, entry in manifest["files"].items():
        content = (folder / name).read_bytes()
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
        assert entry["bytes"] == len(content)
        assert str(Path.cwd()).encode() not in content
    names = ["fused", "blocked", "flash", "reference"]
    names += ["blocked_sinks", "reference_sinks", "softcap", "native", "diagnostics"]
    names += ["packed", "packed_diagnostics", "packed_weights", "paged"]
    assert [v["name"] for v in manifest["variants"]] == names
    assert {v["name"] for v in manifest["variants"] if v["memory"] == "linear"} == {
        "blocked", "flash", "blocked_sinks", "native", "diagnostics", "packed",
        "packed_diagnostics", "paged",
    }  # fmt: skip
    for provider, rows in manifest["picks"].items():
        assert rows[-1]["up_to"] is None
        for row in rows:
            assert set(row["variants"]) <= {
                v["name"] for v in manifest["variants"] if provider in v["providers"]
            }
    for variant in manifest["variants"]:
        checked = variant["verification"]
        assert len(checked["cases"]) >= 12
        assert all(0 <= c["max_abs_error"] <= c["tolerance"] for c in checked["cases"])
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")]


def test_fused_is_a_single_attention_node(version: Callable[[str], Path]) -> None:
    graph = onnx.load(version("causal") / "model.onnx").graph
    operators = [node.op_type for node in graph.node]
    assert operators.count("Attention") == 1
    assert "Softmax" not in operators


class _SeesTheFuture(FusedCore):
    """Wrong on purpose: key_lengths are looked at, the causal mask is not."""

    def forward(self, query, key, value, key_lengths):  # type: ignore[no-untyped-def]
        self.mask = Mask(left=None, right=None, bottom_right=False)
        return super().forward(query, key, value, key_lengths)


def test_a_wrong_graph_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def specs(config: AttentionConfig, dtype: str, *, native: bool) -> dict[str, VariantSpec]:
        return {"fused": replace(FUSED, core=_SeesTheFuture)}

    monkeypatch.setattr(models, "core_specs", specs)
    arguments = ["core", "--out", str(tmp_path / "m"), "--name", "x", "--num-heads", "2"]
    assert main([*arguments, "--head-dim", "4", "--mask", "causal"]) == 1
    message = capsys.readouterr().err
    assert "not written: variant fused: case" in message
    assert "allowed:" in message
    assert not list((tmp_path / "m").rglob("*"))


@pytest.fixture
def fused_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports have one variant, where a test is about something else."""
    for specs in (core_specs, layer_specs):

        def fused(*told: Any, specs: Any = specs, **options: Any) -> dict[str, VariantSpec]:
            return {"fused": specs(*told, **options)["fused"]}

        monkeypatch.setattr(models, specs.__name__, fused)


def _paged_layers_alone(
    config: AttentionConfig, dtype: str, *, native: bool
) -> dict[str, VariantSpec]:
    return {"paged": layer_specs(config, dtype, native=native)["paged"]}


TURNING = ["--num-heads", "4", "--num-kv-heads", "2", "--embed-dim", "24", "--mask", "causal"]
TURNING += ["--rotary", "interleaved", "--rotary-dims", "4"]


@pytest.mark.needs_library
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_layers_and_rotary_cores_keep_sessions_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.setattr(models, "layer_specs", _paged_layers_alone)
    out = ["--out", str(tmp_path), "--name", "x", "--dtype", dtype]
    assert main(["layer", *out, *TURNING]) == 0
    manifest = json.loads((tmp_path / "x/1/model.json").read_text())
    (variant,) = manifest["variants"]
    inputs = {entry["name"]: entry["shape"] for entry in variant["inputs"]}
    assert inputs["hidden_states"] == ["tokens", 24]
    assert inputs["positions"] == ["tokens"]
    assert set(inputs).isdisjoint({"query", "key", "value"})
    assert variant["outputs"][0]["shape"] == ["tokens", 24]
    assert "far on" in {case["case"] for case in variant["verification"]["cases"]}


@pytest.mark.needs_library
def test_a_layer_that_turns_heads_wrongly_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = models.paged_layer

    def wrong(layer: AttentionLayer, dtype: str, opset: int) -> onnx.ModelProto:
        model = right(layer, dtype, opset)
        for node in model.graph.node:
            if node.op_type == "RotaryEmbedding":
                del node.attribute[:]
                heads = 4 if "query" in node.input[0] else 2
                node.attribute.append(onnx.helper.make_attribute("num_heads", heads))
                node.attribute.append(onnx.helper.make_attribute("rotary_embedding_dim", 4))
        return model

    monkeypatch.setattr(models, "layer_specs", _paged_layers_alone)
    monkeypatch.setattr(models, "paged_layer", wrong)
    assert main(["layer", "--out", str(tmp_path), "--name", "x", *TURNING]) == 1
    assert "not written: variant paged: case" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "core", "layer"),
    [
        ({"mask": "causal", "window": 9, "alibi": True}, True, True),
        ({"mask": "causal", "rotary": Rotary("half", 8)}, True, True),
        ({"mask": "bidirectional"}, True, False),
        ({"mask": "cross"}, True, False),
        ({"mask": "cross", "rotary": Rotary("half", 8)}, False, False),
        ({"mask": "bidirectional", "window": 9}, False, False),
    ],
)
def test_which_models_have_pages(config: dict[str, Any], core: bool, layer: bool) -> None:
    attention = AttentionConfig(2, 8, 2, 8, scale=1.0, **config)
    assert ("paged" in core_specs(attention, "FP32", native=True)) == core
    assert ("paged" in layer_specs(attention, "FP32", native=True)) == layer


@pytest.mark.usefixtures("fused_alone")
def test_a_version_is_replaced_only_when_told_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for version in (1, 2):
        write_core(tmp_path, "one", attention(2, 4), version=version)
    first = (tmp_path / "one/1/model.json").read_bytes()
    arguments = ["core", "--out", str(tmp_path), "--name", "one", "--num-heads", "2"]
    arguments += ["--head-dim", "4"]
    assert main(arguments) == 2
    assert "is there already" in capsys.readouterr().err
    assert main([*arguments, "--version", "2", "--overwrite", "--scale", "3"]) == 0
    manifest = json.loads((tmp_path / "one/2/model.json").read_text())
    assert manifest["attention"]["scale"] == 3
    assert (tmp_path / "one/1/model.json").read_bytes() == first
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["1", "2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name", "../x", "--num-heads", "2", "--head-dim", "4"], "--name: given '../x'"),
        (["--name", "x", "--num-heads", "6", "--num-kv-heads", "4", "--head-dim", "4"], "divisor"),
        (["--name", "x", "--num-heads", "2", "--head-dim", "4", "--version", "0"], "--version"),
        (["--name", "x", "--num-heads", "2", "--head-dim", "4", "--opset", "20"], "--opset"),
    ],
)
def test_wrong_arguments_are_named(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["core", "--out", str(tmp_path), *arguments])
    except SystemExit as ended:  # by argparse, for what is wrong by itself
        code = ended.code
    assert code == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("fused_alone")
def test_a_layers_parameters_come_from_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = nn.MultiheadAttention(16, 2)
    state = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
    save_file(state, tmp_path / "good.safetensors")
    del state["in_proj_bias"]
    state["out_proj.weight"] = torch.zeros(3, 3)
    save_file(state, tmp_path / "bad.safetensors")
    layer = ["layer", "--out", str(tmp_path / "m"), "--name", "x", "--num-heads", "2"]
    layer += ["--embed-dim", "16", "--module", "multihead", "--weights"]
    assert main([*layer, str(tmp_path / "bad.safetensors")]) == 2
    message = capsys.readouterr().err
    assert "in_proj_bias is missing" in message
    assert "out_proj.weight has shape [3, 3], allowed: [16, 16]" in message
    keyed = nn.MultiheadAttention(16, 2, add_bias_kv=True).state_dict()
    save_file(keyed, tmp_path / "keyed.safetensors")
    assert main([*layer, str(tmp_path / "keyed.safetensors")]) == 2
    assert "bias_k is not a parameter of the layer" in capsys.readouterr().err
    assert main([*layer, str(tmp_path / "good.safetensors")]) == 0
    # Nothing in the file would say otherwise: a module that has it leaves the same parameters.
    zero = nn.MultiheadAttention(16, 2, add_zero_attn=True)
    assert zero.state_dict().keys() == module.state_dict().keys()
    said = capsys.readouterr().err
    assert "add_zero_attn, which leaves no parameters behind, is taken to be off" in said


@pytest.mark.parametrize("option", ["add_zero_attn", "add_bias_kv"])
def test_what_a_layer_does_not_compute_is_refused(option: str, tmp_path: Path) -> None:
    module = nn.MultiheadAttention(16, 2, **{option: True})
    with pytest.raises(ExportError, match=f"module: given with {option}; allowed: without"):
        models.export_layer(
            module, "bidirectional", tmp_path / "x" / "1", name="x", version=1, dtype="FP32",
            opset=23, source={}, progress=lambda _: None,
        )  # fmt: skip
    assert not (tmp_path / "x").exists()
