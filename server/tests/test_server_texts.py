"""Texts and pairs of them become what transformers makes of the checkpoint's files."""

import asyncio
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import tritonclient.grpc as triton
from attnserve_client import (
    AsyncAttentionClient,
    AttentionClient,
    FailedPreconditionError,
    InvalidArgumentError,
    TokensResult,
)
from attnserve_client._cli import main
from attnserve_proto.manifest import Texts, Transformer, TransformerAttention, TransformerLayer
from attnserve_server.models.tokenizer import TextTokenizer
from attnserve_server.tokens.run import pool
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import serving
from tokenizers import pre_tokenizers

Array = np.ndarray[Any, Any]

WORDS = ["the", "The", "animal", "was", "tired", "cat", "##s", "e", ".", ",", "query", ":"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
MAX_TEXT, POSITIONS = 16, 40


def bert(folder: Path) -> None:
    """A random BERT of sentence-transformers, in the older form of its files."""
    torch.manual_seed(7)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(
        vocab_size=40, intermediate_size=36, max_position_embeddings=POSITIONS, **sizes
    )
    model = transformers.BertModel(config)
    torch.nn.init.normal_(model.embeddings.token_type_embeddings.weight)
    model.save_pretrained(folder)
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    transformers.BertTokenizer(vocab=vocabulary).save_pretrained(folder)
    modules = ["Transformer", "Pooling", "Normalize"]
    listed = [
        {"type": f"sentence_transformers.models.{kind}", "path": path}
        for kind, path in zip(modules, ["", "1_Pooling", "2_Normalize"], strict=True)
    ]
    (folder / "1_Pooling").mkdir()
    own = json.loads((folder / "tokenizer_config.json").read_text())
    for name, content in {
        "modules.json": listed,
        "1_Pooling/config.json": {"pooling_mode_mean_tokens": True, "include_prompt": False},
        "sentence_bert_config.json": {"max_seq_length": MAX_TEXT, "do_lower_case": False},
        # Beside a tokenizer.json that lowercases.
        "tokenizer_config.json": own | {"do_lower_case": False, "model_max_length": 512},
        "config_sentence_transformers.json": {
            "prompts": {"query": "query: "},
            "default_prompt_name": "query",
        },
    }.items():
        (folder / name).write_text(json.dumps(content))


def roberta(folder: Path) -> None:
    torch.manual_seed(8)
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.RobertaConfig(
        vocab_size=270,
        intermediate_size=36,
        max_position_embeddings=POSITIONS + 2,
        type_vocab_size=1,
        **sizes,
    )
    transformers.RobertaModel(config).save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *letters]
    vocabulary = {word: number for number, word in enumerate(words)}
    transformers.RobertaTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    bert(folder / "bert")
    roberta(folder / "roberta")
    return folder


@pytest.fixture(scope="module")
def models(
    checkpoints: Path,
    tmp_path_factory: pytest.TempPathFactory,
    export_all: Callable[[list[list[str]]], None],
) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    named = [["--name", name, "--checkpoint", str(checkpoints / name)] for name in FAMILIES]
    export_all([["transformer", "--out", str(folder), *words] for words in named])
    return folder


FAMILIES = ("bert", "roberta")


@pytest.fixture(scope="module")
def address(models: Path) -> Iterator[str]:
    with serving(models) as server:
        yield f"127.0.0.1:{server.port}"


@pytest.fixture
def client(address: str) -> Iterator[AttentionClient]:
    with AttentionClient(address) as opened:
        yield opened


@pytest.fixture(scope="module")
def plain(checkpoints: Path) -> Callable[..., Any]:
    """What transformers makes of a text or a pair: ids, kinds, hidden states, maps."""
    tokenizers = {n: transformers.AutoTokenizer.from_pretrained(checkpoints / n) for n in FAMILIES}
    loaded = {
        name: transformers.AutoModel.from_pretrained(
            checkpoints / name, attn_implementation="eager"
        ).eval()
        for name in FAMILIES
    }

    def run(name: str, *texts: str, **options: Any) -> Any:
        encoded = tokenizers[name](*texts, return_tensors="pt", **options)
        with torch.no_grad():
            made = loaded[name](**encoded, output_attentions=True)
        ids = encoded["input_ids"]
        types = encoded.get("token_type_ids", torch.zeros_like(ids))
        return ids[0].tolist(), types[0].tolist(), made.last_hidden_state[0], made.attentions

    return run


def check(result: TokensResult, row: int, expected: Any) -> None:
    ids, types, hidden, maps = expected
    assert result.ids[row] == ids
    assert result.token_type_ids[row] == types
    assert result.hidden is not None
    np.testing.assert_allclose(result.hidden[row], hidden, atol=1e-4)
    if result.weights is not None:
        np.testing.assert_allclose(result.weights[row], torch.stack(maps)[:, 0], atol=1e-4)


PAIRS = [("The animal was tired", "cats."), ("e", "the The [MASK] , . e"), ("", "was")]


@pytest.mark.parametrize("model", FAMILIES)
def test_pairs_are_put_together_by_the_tokenizers_own_template(
    client: AttentionClient, address: str, plain: Callable[..., Any], model: str
) -> None:
    prompt = "query: " if model == "bert" else ""
    result = client.attend_tokens(PAIRS, model=model, return_weights=True, truncate=False)
    for row, (first, second) in enumerate(PAIRS):
        check(result, row, plain(model, prompt + first, second))
    between = "[SEP]" if model == "bert" else "</s></s>"
    assert between in "".join(result.tokens[0][1:-1])

    async def ask() -> TokensResult:
        async with AsyncAttentionClient(address) as opened:
            return await opened.attend_tokens(PAIRS, model=model, truncate=False)

    other = asyncio.run(ask())
    assert (other.ids, other.token_type_ids) == (result.ids, result.token_type_ids)


def test_kinds_of_given_ids(
    client: AttentionClient, address: str, plain: Callable[..., Any], checkpoints: Path
) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoints / "bert")
    for first, second in PAIRS[:2]:
        ids, types, *rest = plain("bert", first, second)
        assert 1 in types
        result = client.attend_tokens(
            [ids, [2, 3]], token_type_ids=[types, [0, 0]], model="bert", return_weights=True
        )
        check(result, 0, (ids, types, *rest))
        encoding = tokenizer([first, "e"], [second, "e e"], padding=True, return_tensors="np")
        check(client.attend_tokens(encoding, model="bert"), 0, (ids, types, *rest))
        without = client.attend_tokens([ids], model="bert").hidden
        assert np.abs(without[0] - rest[0].numpy()).max() > 1e-2
        inputs = []
        padded = [[*ids, 0], [2, 3] + [0] * (len(ids) - 1)]
        for name, rows in (
            ("input_ids", padded),
            ("attention_mask", [[1] * len(ids) + [0], [1, 1] + [0] * (len(ids) - 1)]),
            ("token_type_ids", [[*types, 9], [0] * (len(ids) + 1)]),
        ):
            inputs.append(triton.InferInput(name, [2, len(ids) + 1], "INT64"))
            inputs[-1].set_data_from_numpy(np.array(rows, np.int64))
        with triton.InferenceServerClient(address) as opened:
            hidden = opened.infer("bert", inputs).as_numpy("last_hidden_state")
        np.testing.assert_allclose(hidden[0, : len(ids)], rest[0], atol=1e-4)


def test_what_cannot_be_paired_is_said(
    client: AttentionClient, address: str, models: Path, tmp_path: Path
) -> None:
    for arguments, error, message in (
        ({"token_type_ids": [[0, 2]]}, InvalidArgumentError, r"token_type_ids\[1\]: given 2; allo"),
        ({"token_type_ids": [[0, 1]], "model": "roberta"}, FailedPreconditionError,
         "model roberta takes no token_type_ids"),
        ({"token_type_ids": [[0]]}, ValueError, r"token_type_ids\[0\]: 1 numbers for 2 ids"),
        ({"token_type_ids": [[0], [0]]}, ValueError, "for each of the 1 sequences"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            client.attend_tokens([[2, 3]], **({"model": "bert"} | arguments))
    for inputs, message in (
        ([("a", "b"), "c"], "pairs, texts cannot be mixed"),
        ([("a", "b"), [1]], "id sequences, pairs cannot be mixed"),
    ):
        with pytest.raises(TypeError, match=message):
            client.attend_tokens(inputs, model="bert")
    with pytest.raises(ValueError, match="token_type_ids: given with pairs; allowed: with id"):
        client.attend_tokens([("a", "b")], token_type_ids=[[0]], model="bert")
    # As models were exported before they took kinds of tokens.
    shutil.copytree(models / "bert", tmp_path / "bert")
    path = tmp_path / "bert/1/model.json"
    content = json.loads(path.read_text())
    del content["transformer"]["token_types"]
    refused = "1_Pooling/config.json pools by cls with mean; supported: one of mean"
    content["transformer"] |= {"pooling": None, "pooling_refused": refused}
    path.write_text(json.dumps(content))
    with serving(tmp_path) as server, AttentionClient(f"127.0.0.1:{server.port}") as old:
        with pytest.raises(FailedPreconditionError, match="tells the texts of a pair apart"):
            old.attend_tokens([("a", "b")], model="bert")
        with pytest.raises(FailedPreconditionError, match=r"checkpoint bert: 1_Pooling.*cls with"):
            old.attend_tokens(["a"], model="bert", return_pooled=True)
        assert old.attend_tokens(["a"], model="bert").tokens == [
            ["[CLS]", "query", ":", "[UNK]", "[SEP]"]
        ]


def test_texts_are_cut_where_the_checkpoint_says(
    client: AttentionClient,
    address: str,
    plain: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    long = " ".join(["The animal was tired ."] * 5)
    prompted = f"query: {long}"
    described = client.get_model("bert")
    assert (described.max_text_len, described.max_seq_len) == (MAX_TEXT, POSITIONS)
    assert described.token_types == 2
    result = client.attend_tokens([long, "e"], model="bert", return_pooled=True)
    assert result.truncated == [True, False]
    expected = plain("bert", prompted, truncation=True, max_length=MAX_TEXT)
    check(result, 0, expected)
    # The prompt's tokens, and the one before them, do not count.
    mean = expected[2][3:].mean(dim=0)
    np.testing.assert_allclose(result.pooled[0], mean / mean.norm(), atol=1e-5)
    with pytest.raises(InvalidArgumentError, match=r"texts\[0\]: given 29 tokens; allowed: 1..16"):
        client.attend_tokens([long], model="bert", truncate=False)
    # Ids are the caller's, and the model has positions for more.
    ids = plain("bert", prompted)[0]
    assert client.attend_tokens([ids], model="bert").ids == [ids]
    assert main(["--target", address, "tokens", long, "--model", "bert"]) == 0
    assert f"text 0 was cut to {MAX_TEXT} tokens" in capsys.readouterr().err


def test_other_checkpoints_texts_are_refused_unless_they_may_be_cut(
    client: AttentionClient, plain: Callable[..., Any]
) -> None:
    with pytest.raises(InvalidArgumentError, match=r"texts\[0\]: given 52 tokens; allowed: 1..40"):
        client.attend_tokens(["e" * 50], model="roberta")
    result = client.attend_tokens([("e" * 50, "xyz")], model="roberta", truncate=True)
    check(result, 0, plain("roberta", "e" * 50, "xyz", truncation=True, max_length=POSITIONS))


def test_white_space_without_end_is_read_through(
    client: AttentionClient, plain: Callable[..., Any]
) -> None:
    text = "The" + " " * 9000 + "animal " + "x" * 5000
    result = client.attend_tokens([text], model="bert", truncate=True)
    check(result, 0, plain("bert", f"query: {text}"))


def test_the_commands(
    address: str, plain: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "answer.npz"
    words = ["tokens", "The cat", "--pair", "was tired", "--model", "bert", "--target", address]
    assert main([*words, "--output", str(out)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("[CLS] query : The cat [SEP] was tired [SEP]\n")
    ids, types, hidden, _ = plain("bert", "query: The cat", "was tired")
    with np.load(out) as answer:
        assert answer["token_type_ids_0"].tolist() == types
        np.testing.assert_allclose(answer["hidden_0"], hidden, atol=1e-4)
    given = ["tokens", "--ids", ",".join(map(str, ids)), "--model", "bert", "--target", address]
    given += ["--token-type-ids", ",".join(map(str, types)), "--output", str(out)]
    assert main(given) == 0
    with np.load(out) as answer:
        np.testing.assert_allclose(answer["hidden_0"], hidden, atol=1e-4)
    assert main(["tokens", "a", "--pair", "b", "--pair", "c", *words[4:]]) == 2
    assert "--pair: given 2 for 1 texts; allowed: one each" in capsys.readouterr().err
    page = tmp_path / "page.html"
    inspect = ["inspect", "cat", "--pair", "e", "--model", "roberta", "--target", address]
    assert main([*inspect, "--out", str(page)]) == 0
    found = re.search(r'id="meta">(.*?)</script>', page.read_text("utf-8"), re.DOTALL)
    assert found is not None
    shown = json.loads(found[1])["sequences"][0]["maps"][0]
    assert shown["keys"] == ["<s>", "c", "a", "t", "</s>", "</s>", "e", "</s>"]


@settings(max_examples=60)
@given(
    st.lists(st.sampled_from(WORDS), max_size=30).map(" ".join),
    st.none() | st.lists(st.sampled_from(WORDS), min_size=1, max_size=30).map(" ".join),
    st.integers(4, 40),
    st.sampled_from(["right", "left"]),
    st.sampled_from(FAMILIES),
)
def test_texts_are_cut_as_transformers_cuts_them(
    checkpoints: Path, first: str, second: str | None, most: int, side: str, family: str
) -> None:
    own = transformers.AutoTokenizer.from_pretrained(checkpoints / family, truncation_side=side)
    file = checkpoints / family / "as_it_is.json"
    if not file.exists():
        own.backend_tokenizer.save(str(file))
    served = TextTokenizer(file, Texts(side=side))
    found = served.encode(first, second, most, prompted=False)
    expected = own(first, second, truncation=True, max_length=most)
    whole = own(first, second, verbose=False)["input_ids"]
    assert found.ids == expected["input_ids"]
    assert found.types == expected.get("token_type_ids", found.types)
    assert (found.length, found.cut) == (len(whole), len(whole) > most)


def transformer(pooling: str, *, normalize: bool) -> Transformer:
    layers = (TransformerLayer(1.0),)
    attention = TransformerAttention(
        name="encoder", num_heads=1, num_kv_heads=1, head_dim=1, mask="bidirectional", layers=layers
    )
    return Transformer(
        family="x", num_layers=1, hidden_size=5, vocab_size=9, max_seq_len=0, pad_token_id=0,
        pooling=pooling, normalize_pooled=normalize, attentions=(attention,),
    )  # fmt: skip


@pytest.mark.parametrize("normalize", [False, True])
@given(seed=st.integers(0, 99), length=st.integers(1, 9), first=st.integers(0, 4))
def test_ways_to_pool(normalize: bool, seed: int, length: int, first: int) -> None:
    torch.manual_seed(seed)
    hidden = torch.randn(length, 5, dtype=torch.float64)
    rows, weights = hidden[first:], torch.arange(1, length + 1)[first:, None]
    wanted = {
        "mean": lambda: rows.sum(0) / len(rows),
        "cls": lambda: rows[0],
        "last": lambda: rows[-1],
        "max": lambda: rows.amax(0),
        "mean_sqrt_len": lambda: rows.sum(0) / torch.tensor(len(rows)).sqrt(),
        "weightedmean": lambda: (rows * weights).sum(0) / weights.sum(),
    }
    for pooling, formula in wanted.items():
        made = pool(transformer(pooling, normalize=normalize), hidden.float().numpy(), first)
        expected = formula() if len(rows) else torch.zeros(5, dtype=torch.float64)
        if normalize:
            expected = torch.nn.functional.normalize(expected, dim=0)
        np.testing.assert_allclose(made, expected, atol=1e-5)
