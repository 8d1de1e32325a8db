"""The tokenizer that is stored reads texts as AutoTokenizer does, whatever the files beside say."""

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import transformers
from attnserve_export.checkpoints.sentences import Sentences
from attnserve_export.checkpoints.texts import TextError, text_reader
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

PIECES = [*"abcdefghijklmnopqrstuvwxyzABCDEéàÉß0123456789.,!?'-你好", "the", "The", "cat", "Cat"]
CORPUS = ["the cat sat on the mat", "The Cat isn't there, is it? 12 34", "été É ß 你好 the"] * 3

TEXTS = st.text(
    st.sampled_from("abc theCatÉéàß 你好 1.,!?'-\t\n\u00a0\u0301\u200b"), max_size=40
) | st.sampled_from(["[MASK] the", "<mask>cat </s>", "<s>", "[SEP][CLS]", "the <new> cat"])


def wordpiece(folder: Path) -> None:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, *PIECES, *(f"##{piece}" for piece in PIECES)]
    transformers.BertTokenizer(vocab={w: i for i, w in enumerate(words)}).save_pretrained(folder)


def byte_level(made: type) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<|endoftext|>"]
        trainer = trainers.BpeTrainer(
            vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(CORPUS, trainer)
        model = json.loads(tokenizer.to_str())["model"]
        merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
        made(vocab=model["vocab"], merges=merges).save_pretrained(folder)

    return save


def fast(folder: Path) -> None:
    byte_level(transformers.GPT2Tokenizer)(folder)
    transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def unigram(made: type) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        special = ["<s>", "<pad>", "</s>", "<unk>"]
        vocab = [(s, 0.0) for s in special] + [(p, -2.0) for p in ["▁", "▁the", *PIECES]]
        made(vocab=vocab).save_pretrained(folder)

    return save


OPTIONS: dict[str, tuple[str, Callable[[Path], None], Mapping[str, list[object]]]] = {
    "bert": (
        "bert",
        wordpiece,
        {
            "do_lower_case": [True, False],
            "strip_accents": [None, True, False],
            "tokenize_chinese_chars": [True, False],
            "split_special_tokens": [False, True],
        },
    ),
    "gpt2": (
        "gpt2",
        byte_level(transformers.GPT2Tokenizer),
        {
            "add_prefix_space": [False, True],
            "add_bos_token": [False, True],
            "additional_special_tokens": [[], ["<new>", "cat"]],
        },
    ),
    "roberta": (
        "roberta",
        byte_level(transformers.RobertaTokenizer),
        {"add_prefix_space": [False, True], "trim_offsets": [True, False]},
    ),
    "llama": (
        "llama",
        fast,
        {"add_bos_token": [None, False, True], "add_eos_token": [None, False, True]},
    ),
    "qwen2": ("qwen2", byte_level(transformers.Qwen2Tokenizer), {"add_prefix_space": [None, True]}),
    "t5": (
        "t5",
        unigram(transformers.T5Tokenizer),
        {"extra_ids": [0, 3], "add_eos_token": [None, True]},
    ),
    "xlm-roberta": ("xlm-roberta", unigram(transformers.XLMRobertaTokenizer), {"x": [None]}),
}


def read(folder: Path, sentences: Sentences | None = None) -> tuple[Tokenizer, Any]:
    """What is stored, ready to read texts, and transformers' own."""
    config = transformers.AutoConfig.from_pretrained(folder)
    reader = text_reader(folder, config, sentences)
    assert reader is not None
    content = json.loads(reader.file)
    assert content["truncation"] is None
    assert content["padding"] is None
    served = Tokenizer.from_str(reader.file.decode())
    served.encode_special_tokens = reader.texts.split_special
    return served, transformers.AutoTokenizer.from_pretrained(folder)


def save_config(folder: Path, model_type: str, **options: object) -> None:
    """Files of a model of a kind, and options that tokenizer.json knows nothing of."""
    transformers.AutoConfig.for_model(model_type).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text()) | options
    content = {name: value for name, value in content.items() if value is not None}
    if "strip_accents" in options:
        content["strip_accents"] = options["strip_accents"]
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("name", OPTIONS)
def test_ids_are_those_of_transformers_by_every_combination_of_options(
    name: str, tmp_path: Path
) -> None:
    model_type, save, choices = OPTIONS[name]
    readers = []
    for number, values in enumerate(itertools.product(*choices.values())):
        folder = tmp_path / str(number)
        save(folder)
        save_config(folder, model_type, **dict(zip(choices, values, strict=True)))
        readers.append(read(folder))

    @settings(max_examples=40, suppress_health_check=list(HealthCheck))
    @given(TEXTS, TEXTS)
    def check(first: str, second: str) -> None:
        for served, own in readers:
            single, expected = served.encode(first), own(first)
            assert single.ids == expected["input_ids"]
            if not second:  # which transformers takes for none
                continue
            pair, expected = served.encode(first, second), own(first, second)
            assert pair.ids == expected["input_ids"]
            assert pair.type_ids == expected.get("token_type_ids", pair.type_ids)

    check()


def test_options_change_what_is_read(tmp_path: Path) -> None:
    """The comparison above would hold of options that nobody read."""
    found = {}
    for lower, accents in ((True, None), (False, None), (True, False)):
        folder = tmp_path / f"{lower}{accents}"
        wordpiece(folder)
        save_config(folder, "bert", do_lower_case=lower, strip_accents=accents)
        served, _ = read(folder)
        found[lower, accents] = served.encode("The é").tokens[1:-1]
    assert found == {
        (True, None): ["the", "e"],
        (False, None): ["The", "é"],
        (True, False): ["the", "é"],
    }


def test_files_without_tokenizer_json_are_converted(tmp_path: Path) -> None:
    wordpiece(tmp_path / "whole")
    vocabulary = json.loads((tmp_path / "whole/tokenizer.json").read_text())["model"]["vocab"]
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.get)))
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    transformers.AutoConfig.for_model("bert").save_pretrained(folder)
    served, own = read(folder)
    assert served.encode("The cat").tokens == ["[CLS]", "The", "cat", "[SEP]"]
    assert served.encode("The cat").ids == own("The cat")["input_ids"]


def test_tokenizer_json_alone_is_read_as_it_is(tmp_path: Path) -> None:
    """Transformers takes it for WordPiece, as models of this kind usually have."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "Cat": 1, "[SEP]": 2}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("$A [SEP]", None, [("[SEP]", 2)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = transformers.AutoConfig.for_model("bert")
    reader = text_reader(tmp_path, config, None)
    assert reader is not None
    assert reader.types_unknown
    assert Tokenizer.from_str(reader.file.decode()).encode("Cat cat").ids == [1, 0, 2]


def test_what_is_no_tokenizer_or_none_that_can_be_stored(tmp_path: Path) -> None:
    config = transformers.AutoConfig.for_model("bert")
    config.save_pretrained(tmp_path)
    assert text_reader(tmp_path, config, None) is None
    wordpiece(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TextError, match="transformers cannot read its tokenizer"):
        text_reader(tmp_path, config, None)
    own = tmp_path / "own"
    wordpiece(own)
    config.save_pretrained(own)
    path = own / "tokenizer_config.json"
    path.write_text(json.dumps({"tokenizer_class": "LayoutLMv2Tokenizer"}))
    with pytest.raises(TextError, match="does not take texts"):
        text_reader(own, config, None)
    python = tmp_path / "python"
    python.mkdir()
    (python / "vocab.txt").write_text("<cls>\n<pad>\n<eos>\n<unk>\nL\nA\n<mask>\n")
    (python / "tokenizer_config.json").write_text('{"tokenizer_class": "EsmTokenizer"}')
    config.save_pretrained(python)
    with pytest.raises(TextError, match="is a EsmTokenizer, which runs in Python alone"):
        text_reader(python, config, None)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (None, "right", True)),
        ({"model_max_length": 99, "truncation_side": "left"}, (99, "left", True)),
        ({"model_input_names": ["input_ids", "attention_mask"]}, (None, "right", False)),
    ],
)
def test_how_texts_are_cut_and_told_apart(
    options: dict[str, object], expected: tuple[object, ...], tmp_path: Path
) -> None:
    wordpiece(tmp_path)
    save_config(tmp_path, "bert", **options)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    reader = text_reader(tmp_path, config, None)
    assert reader is not None
    texts = reader.texts
    assert (texts.max_len, texts.side, texts.types) == expected
    assert not texts.cut


def test_settings_of_sentence_transformers(tmp_path: Path) -> None:
    wordpiece(tmp_path)
    save_config(tmp_path, "bert", do_lower_case=False, model_max_length=1000)
    config = transformers.AutoConfig.from_pretrained(tmp_path)

    def texts(**said: Any) -> Any:
        reader = text_reader(tmp_path, config, Sentences(tmp_path, **said))
        assert reader is not None
        return reader

    assert texts(max_len=256).texts.max_len == 256
    assert texts().texts.max_len == config.max_position_embeddings == 512
    assert texts().texts.cut
    prompted = texts(prompt="query: ", prompt_pooled=False).texts
    assert (prompted.prompt, prompted.prompt_pooled) == ("query: ", False)
    for lowercase, expected in ((False, "The"), (True, "the")):
        file = texts(lowercase=lowercase).file.decode()
        assert Tokenizer.from_str(file).encode("The").tokens[1] == expected
    options = texts(tokenizer_options={"do_lower_case": True}).file.decode()
    assert Tokenizer.from_str(options).encode("The").tokens[1] == "the"
