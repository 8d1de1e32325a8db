"""What is read of sentence-transformers' files, and what is refused by its name."""

import json
from pathlib import Path
from typing import Any

import pytest
from attnserve_export.checkpoints.checkpoint import read_checkpoint
from attnserve_export.checkpoints.sentences import Sentences, read_sentences
from attnserve_export.cli import main
from attnserve_export.errors import ExportError

MEAN = {"pooling_mode_mean_tokens": True}
MODES = "mean, cls, lasttoken, max, mean_sqrt_len_tokens, weightedmean"


def write(
    folder: Path,
    pooling: object = MEAN,
    modules: tuple[str, ...] = ("Transformer", "Pooling"),
    *,
    inner: str = "",
    **files: object,
) -> Path:
    """A folder with modules of these kinds; `files` are by name, without `.json`."""
    entries = []
    for index, kind in enumerate(modules):
        path = inner if kind == "Transformer" else f"{index}_{kind}"
        entries.append({"type": f"sentence_transformers.models.{kind}", "path": path})
        (folder / path).mkdir(exist_ok=True, parents=True)
        if kind == "Pooling" and pooling is not None:
            (folder / path / "config.json").write_text(json.dumps(pooling))
    (folder / "modules.json").write_text(json.dumps(entries))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def said(folder: Path) -> Sentences:
    found = read_sentences(folder)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("pooling", "modules", "expected"),
    [
        (MEAN, ("Pooling", "Normalize"), ("mean", True)),
        ({"pooling_mode_cls_token": True}, ("Pooling",), ("cls", False)),
        ({"pooling_mode_lasttoken": True}, ("Pooling", "Normalize"), ("last", True)),
        ({"pooling_mode_max_tokens": True}, ("Pooling",), ("max", False)),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, ("Pooling",), ("mean_sqrt_len", False)),
        ({"pooling_mode_weightedmean_tokens": True}, ("Pooling",), ("weightedmean", False)),
        ({"pooling_mode": "cls"}, ("Pooling",), ("cls", False)),
        ({"pooling_mode": ["max"]}, ("Pooling",), ("max", False)),
        ({"pooling_mode_mean_tokens": False}, ("Pooling",), ("mean", False)),  # its default
        (MEAN, ("Dropout", "Pooling", "Dropout"), ("mean", False)),
    ],
)  # fmt: skip
def test_ways_to_pool(
    pooling: object, modules: tuple[str, ...], expected: tuple[str, bool], tmp_path: Path
) -> None:
    found = said(write(tmp_path, pooling, ("Transformer", *modules)))
    assert (found.pooling, found.normalize) == expected
    assert found.refused == ""


@pytest.mark.parametrize(
    ("pooling", "modules", "message"),
    [
        (MEAN | {"pooling_mode_cls_token": True}, ("Pooling",),
         f"1_Pooling/config.json pools by cls with mean; supported: one of {MODES}"),
        ({"pooling_mode": "median"}, ("Pooling",), "pools by median; supported: one of mean"),
        (MEAN | {"pooling_mode_min_tokens": True}, ("Pooling",),
         "pooling_mode_min_tokens is True; supported: not there"),
        (None, ("Pooling",), "1_Pooling/config.json is not there"),
        (MEAN, ("Pooling", "Dense"), "modules.json has Transformer, Pooling, Dense; supported"),
        (MEAN, ("Pooling", "Pooling"), "modules.json has Transformer, Pooling, Pooling"),
        (MEAN, ("Normalize", "Pooling"), "modules.json has Transformer, Normalize, Pooling"),
        (MEAN, (), "modules.json has Transformer; supported: Transformer, Pooling and"),
    ],
)  # fmt: skip
def test_other_vectors_are_refused_by_name(
    pooling: object, modules: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    found = said(write(tmp_path, pooling, ("Transformer", *modules)))
    assert found.pooling is None
    assert message in found.refused


def test_modules_of_others_are_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "modules.json"
    path.write_text(path.read_text().replace("sentence_transformers.models.Pooling", "own.Pooling"))
    assert "modules.json has Transformer, own.Pooling; supported" in said(tmp_path).refused


def test_a_vector_of_another_width(tmp_path: Path) -> None:
    found = said(write(tmp_path, MEAN | {"word_embedding_dimension": 384}))
    assert found.refused_of(384) == ""
    assert "of 384 numbers, and the hidden states have 768" in found.refused_of(768)


def test_a_norm_of_something_else_is_refused(tmp_path: Path) -> None:
    write(tmp_path, MEAN, ("Transformer", "Pooling", "Normalize"))
    config = {"module_input_name": "token_embeddings"}
    (tmp_path / "2_Normalize/config.json").write_text(json.dumps(config))
    assert "2_Normalize/config.json: module_input_name is 'token_emb" in said(tmp_path).refused


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max_seq_length": 256, "do_lower_case": False}, {"max_len": 256, "lowercase": False}),
        ({"max_seq_length": None, "do_lower_case": True}, {"max_len": None, "lowercase": True}),
        ({"tokenizer_args": {"padding_side": "left", "model_max_length": 7}, "max_seq_length": 9},
         {"max_len": 7, "tokenizer_options": {"padding_side": "left"}}),
        ({"transformer_task": "feature-extraction", "module_output_name": "token_embeddings",
          "model_args": {"torch_dtype": "float16"},
          "modality_config": {"text": {"method": "forward",
                                       "method_output_name": "last_hidden_state"}}},
         {"max_len": None}),
    ],
)  # fmt: skip
def test_settings(settings: object, expected: dict[str, Any], tmp_path: Path) -> None:
    found = said(write(tmp_path, sentence_bert_config=settings))
    for name, value in expected.items():
        assert getattr(found, name) == value


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_seq_length": 0}, "max_seq_length is 0; allowed: an integer above 0, or null"),
        ({"max_seq_length": "256"}, "max_seq_length is '256'"),
        ({"do_lower_case": "no"}, "do_lower_case is 'no'; allowed: true, false"),
        ({"transformer_task": "fill-mask"}, "transformer_task is 'fill-mask'"),
        ({"processing_kwargs": {"text": {"max_length": 5}}}, "processing_kwargs is {'text'"),
        ({"config_args": {"hidden_size": 3}}, "config_kwargs is {'hidden_size'"),
        ({"model_args": {"revision": "x"}}, "model_kwargs is {'revision'"),
        ({"modality_config": {"message": {}}}, "modality_config is {'message'"),
        ({"query_expansion": {"length": 32}}, "query_expansion is {'length'"),
        ({"tokenizer_name_or_path": "other"}, "tokenizer_name_or_path is 'other'; allowed: not"),
        ([], "allowed: a JSON object"),
    ],
)
def test_settings_that_are_not_supported(settings: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"sentence_bert_config\.json") as refused:
        read_sentences(write(tmp_path, sentence_bert_config=settings))
    assert message in str(refused.value)


def test_settings_by_an_older_name(tmp_path: Path) -> None:
    write(tmp_path, sentence_roberta_config={"max_seq_length": 11})
    assert said(tmp_path).max_len == 11


def test_the_default_prompt(tmp_path: Path) -> None:
    config: dict[str, Any] = {"prompts": {"query": "query: ", "text": ""}}
    write(tmp_path, MEAN | {"include_prompt": False}, config_sentence_transformers=config)
    assert (said(tmp_path).prompt, said(tmp_path).prompt_pooled) == ("", False)
    assert said(tmp_path).other_prompts == ("query",)
    path = tmp_path / "config_sentence_transformers.json"
    path.write_text(json.dumps(config | {"default_prompt_name": "query"}))
    assert said(tmp_path).prompt == "query: "
    assert said(tmp_path).other_prompts == ()
    path.write_text(json.dumps(config | {"default_prompt_name": "none"}))
    with pytest.raises(ExportError, match=r"default_prompt_name is 'none'; allowed: one of \['q"):
        read_sentences(tmp_path)
    path.write_text(json.dumps({"model_type": "SparseEncoder"}))
    with pytest.raises(ExportError, match="model_type is 'SparseEncoder'"):
        read_sentences(tmp_path)


def test_the_transformer_may_lie_in_a_folder_of_its_own(tmp_path: Path) -> None:
    write(tmp_path, inner="0_Transformer")
    inner = tmp_path / "0_Transformer"
    (inner / "config.json").write_text('{"model_type": "bert"}')
    (inner / "sentence_bert_config.json").write_text('{"max_seq_length": 33}')
    (inner / "model.safetensors").touch()
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint.folder == inner
    assert checkpoint.sentences is not None
    assert checkpoint.sentences.max_len == 33


def test_a_path_that_leads_elsewhere_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, inner="in")
    path = tmp_path / "modules.json"
    path.write_text(path.read_text().replace('"in"', '"../other"'))
    arguments = ["transformer", "--out", str(tmp_path / "out"), "--name", "x"]
    assert main([*arguments, "--checkpoint", str(tmp_path)]) == 2
    assert "path is '../other'; allowed: one within it" in capsys.readouterr().err
