"""The variants for CUDA, as far as a CPU can tell: which there are, and their FP32 form's numbers.

On a GPU, benchmarks/gpu_acceptance.py compares them in their own types.
"""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from attnserve_export import sessions
from attnserve_export.attention.core import AttentionConfig
from attnserve_export.attention.flash import has_cudnn, has_flash
from attnserve_export.attention.positions import Rotary
from attnserve_export.attention.variants import CUDNN, FLASH, VariantSpec
from attnserve_export.cases import scheme_of
from attnserve_export.cli import main
from attnserve_export.models import core_graph
from attnserve_export.reference import attention_reference
from attnserve_export.runtime import CUDA
from attnserve_export.verification import angle_tolerance
from hypothesis import given, settings
from hypothesis import strategies as st

HEADS, KV_HEADS, DIM = 6, 2, 16


def config_of(**changes: object) -> AttentionConfig:
    given: dict = {"mask": "causal", "scale": DIM**-0.5, "value_head_dim": DIM} | changes
    return AttentionConfig(num_heads=HEADS, head_dim=DIM, num_kv_heads=KV_HEADS, **given)


GRAPHS: dict[str, tuple[VariantSpec, AttentionConfig]] = {
    "causal": (FLASH, config_of()),
    "bottom": (FLASH, config_of(alignment="bottom-right")),
    "bidirectional": (FLASH, config_of(mask="bidirectional")),
    "cross": (FLASH, config_of(mask="cross")),
    "window": (FLASH, config_of(window=9)),
    "bottom window": (FLASH, config_of(window=4, alignment="bottom-right")),
    "turned": (FLASH, config_of(rotary=Rotary("half", DIM))),
    "cudnn causal": (CUDNN, config_of()),
    "cudnn bottom": (CUDNN, config_of(alignment="bottom-right", scale=0.4)),
    "cudnn bidirectional": (CUDNN, config_of(mask="bidirectional")),
}


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> dict[str, onnxruntime.InferenceSession]:
    folder = tmp_path_factory.mktemp("flash")
    found = {}
    for name, (spec, config) in GRAPHS.items():
        path = folder / f"{name}.onnx"
        onnx.save(core_graph(config, spec, "FP32", 23), path)
        found[name] = sessions.open_session(path)
    return found


@settings(deadline=None, max_examples=25)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
@pytest.mark.parametrize("name", GRAPHS)
def test_the_same_numbers_at_any_shape(
    opened: dict[str, onnxruntime.InferenceSession], name: str, data: st.DataObject, seed: int
) -> None:
    config = GRAPHS[name][1]
    generator = np.random.default_rng(seed)
    length = st.integers(1, 24) | st.sampled_from([127, 129, 260])
    batch, query_len = data.draw(st.integers(1, 3)), data.draw(length)
    # Equal lengths without padding have a path of their own.
    key_len = data.draw(st.just(query_len) | length)
    whole = np.full(batch, key_len)
    key_lengths = data.draw(
        st.just(whole) | st.just(generator.integers(0, key_len + 1, batch)), label="key_lengths"
    )

    def normal(heads: int, sequence: int) -> np.ndarray:
        return generator.standard_normal((batch, heads, sequence, DIM), np.float32)

    feeds = {
        "query": normal(HEADS, query_len),
        "key": normal(KV_HEADS, key_len),
        "value": normal(KV_HEADS, key_len),
        "key_lengths": key_lengths.astype(np.int64),
    }
    for row, end in enumerate(key_lengths):
        feeds["key"][row, :, end:], feeds["value"][row, :, end:] = np.nan, np.inf
    expected, _ = attention_reference(**feeds, scheme=scheme_of(config), scale=config.scale)
    answer = sessions.run(opened[name], feeds, {"output": expected.shape})["output"]
    tolerance = 2e-6 * np.sqrt(key_len)
    if config.rotary is not None:
        tolerance += angle_tolerance(max(query_len, key_len))
    assert np.abs(answer - expected).max() <= tolerance


def test_which_configs_have_them() -> None:
    assert has_flash(config_of(), "FP32")
    assert not has_cudnn(config_of(), "FP32")
    assert has_flash(config_of(), "BF16")
    assert has_cudnn(config_of(), "BF16")
    assert has_flash(config_of(window=3), "FP16")
    assert not has_cudnn(config_of(window=3), "FP16")
    assert not has_cudnn(config_of(mask="cross"), "FP16")
    without = [
        {"softcap": 5.0}, {"alibi": True}, {"value_head_dim": 8},
        {"mask": "bidirectional", "window": 3, "window_right": 3},
    ]  # fmt: skip
    assert not any(has_flash(config_of(**changes), "FP16") for changes in without)
    assert not has_flash(config_of(window=3), "FP32")


def test_no_mask_reaches_the_operators(tmp_path: Path) -> None:
    arguments = ["core", "--out", str(tmp_path), "--name", "x", "--num-heads", "2"]
    assert main([*arguments, "--head-dim", "8", "--mask", "causal", "--dtype", "bf16"]) == 0
    manifest = json.loads((tmp_path / "x/1/model.json").read_text())
    for name, operator in (("flash", "Attention"), ("cudnn", "GroupQueryAttention")):
        entry = next(v for v in manifest["variants"] if v["name"] == name)
        assert entry["providers"] == [CUDA]
        assert entry["memory"] == "linear"
        assert "the same graph in FP32" in entry["verification"]["reference"]
        model = onnx.load(tmp_path / "x/1" / entry["file"])
        inputs = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
        assert inputs["query"] == onnx.TensorProto.BFLOAT16
        nodes = [node for function in model.functions for node in _all(function.node)]
        found = [node for node in nodes if node.op_type == operator]
        assert found
        if operator == "Attention":
            assert all(len(node.input) < 4 or node.input[3] == "" for node in found)
    picked = manifest["picks"][CUDA]
    assert picked[0]["variants"][0] == "flash"
    assert picked[-1]["variants"][0] == "cudnn"


def _all(nodes: "list[onnx.NodeProto]") -> list[onnx.NodeProto]:
    """Nodes and those of their subgraphs."""
    found = []
    for node in nodes:
        found.append(node)
        for attribute in node.attribute:
            found += _all(list(attribute.g.node))
    return found
