"""`attnserve inspect` against a real server: text, ids, pairs, layers and heads, and refusals."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from attnserve_client import AttentionClient
from attnserve_client._cli import main
from attnserve_lens import command, encoding
from attnserve_proto.commands import progress


def meta_of(page: Path) -> dict:
    found = re.search(r'id="meta">(.*?)</script>', page.read_text("utf-8"), re.DOTALL)
    return json.loads(found[1])["sequences"][0]["maps"][0]


def test_text_becomes_a_page_with_the_servers_weights(
    client: AttentionClient, address: str, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    arguments = ["inspect", "w1 w2 w3", "--model", "bert", "--out", str(page)]
    assert main([*arguments, "--layers", "2,0", "--heads", "1", "--target", address]) == 0
    described = meta_of(page)
    assert described["keys"] == ["[CLS]", "w1", "w2", "w3", "[SEP]"]
    assert (described["layers"], described["heads"]) == ([2, 0], [1])
    expected = client.attend_tokens(
        ["w1 w2 w3"], model="bert", layers=[2, 0], heads=[1], return_weights=True
    )
    for layer in range(2):
        packed = re.search(rf'id="s0m0-layer-{layer}">(.*?)<', page.read_text("utf-8"))[1]
        back = encoding.unpack_layer(packed, (1, 5, 5), described["bits"])
        np.testing.assert_allclose(back, expected.weights[0][layer], atol=3e-5)


def test_layers_fetched_one_by_one_are_those_fetched_together(client: AttentionClient) -> None:
    texts = ["w1 w2 w3", "w4"]
    [one_by_one] = command.collect(client, texts, model="bert")
    together = client.attend_tokens(texts, model="bert", return_weights=True)
    assert one_by_one.layers == together.layers
    for mine, theirs in zip(one_by_one.weights, together.weights, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-6)


def test_a_pair_a_file_and_ids(address: str, tmp_path: Path) -> None:
    page, text = tmp_path / "page.html", tmp_path / "text.txt"
    text.write_text("w5 w6\n")
    common = ["--target", address, "inspect", "--model", "bert", "--out", str(page)]
    assert main([*common, "--file", str(text), "--pair", "w7"]) == 0
    assert meta_of(page)["keys"] == ["[CLS]", "w5", "w6", "[SEP]", "w7", "[SEP]"]
    assert meta_of(page)["split"] == 4
    assert main([*common, "--ids", "2,9,3"]) == 0
    assert meta_of(page)["keys"] == ["[CLS]", "w5", "[SEP]"]


def test_packed_texts_are_blocks_of_one_map(
    client: AttentionClient, address: str, tmp_path: Path
) -> None:
    page, texts = tmp_path / "page.html", ["w1 w2 w3", "w5", "w7 w8"]
    arguments = ["inspect", *texts, "--packed", "--model", "bert", "--out", str(page)]
    assert main([*arguments, "--heads", "1", "--target", address]) == 0
    expected = client.attend_tokens(texts, model="bert", heads=[1], return_weights=True)
    described = meta_of(page)
    assert described["keys"] == [token for tokens in expected.tokens for token in tokens]
    assert (described["documents"], described["split"]) == ([[0, 0], [5, 5], [8, 8]], None)
    content = page.read_text("utf-8")
    assert "12 keys in 3 documents, none of which sees another" in content
    assert "<title>bert: w1 w2 w3 / w5 / w7 w8</title>" in content
    for layer in range(3):
        packed = re.search(rf'id="s0m0-layer-{layer}">(.*?)<', content)[1]
        back = encoding.unpack_layer(packed, (1, 12, 12), described["bits"])
        whole = np.zeros((1, 12, 12))
        for first, own in zip((0, 5, 8), expected.weights, strict=True):
            last = first + own.shape[-1]
            whole[:, first:last, first:last] = own[layer]
        np.testing.assert_allclose(back, whole, atol=3e-5)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "nothing to show; give a text, -, --file or --ids"),
        (["w1", "--ids", "2,3"], 2, "--ids: given with a text"),
        (["w1", "w2", "--pair", "w3"], 2, "--pair: given with 2 texts"),
        (["w1", "--packed"], 2, "--packed: given with 1 texts; allowed: with 2 texts or more"),
        (["--ids", "2,3", "--packed"], 2, "--packed: given with 0 texts"),
        (["w1", "--pair", "w3", "--packed"], 2, "--packed: given with --pair"),
        (["w1", "--layers", "7"], 1, "returns.layers[0]: given 7; allowed: 0..2"),
        (["w " * 30], 1, "allowed: 1..20 tokens"),
    ],
)
def test_what_cannot_be_shown_is_said(
    address: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    message: str,
) -> None:
    out = ["--model", "bert", "--out", str(tmp_path / "page.html")]
    assert main(["--target", address, "inspect", *arguments, *out]) == status
    assert message in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_too_many_weights_are_refused_before_they_are_fetched(
    client: AttentionClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_MOST_WEIGHTS", 100)
    with pytest.raises(ValueError, match=r"are 150 weights; allowed: 100; use --layers, --heads"):
        command.collect(client, ["w1 w2 w3"], model="bert")
    # Packed, the room between texts counts, too.
    with pytest.raises(ValueError, match=r"at \[4, 3\] tokens, are 294 weights; allowed: 100"):
        command.collect(client, ["w1 w2", "w4"], model="bert", packed=True)


def test_tokens_takes_every_option_of_the_call(
    client: AttentionClient, address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "answer.npz"
    texts = ["w1 w2 w3", "w2 " * 30]
    words = ["tokens", *texts, "--model", "bert", "--version", "1", "--truncate"]
    words += ["--layers", "2,0", "--heads", "1", "--entropy", "--effective-context"]
    words += ["--mass-by-distance", "3", "--mass-on-first", "2", "--query", "w2", "--top", "2"]
    assert main([*words, "--output", str(out), "--target", address, "--timeout", "20"]) == 0
    expected = client.attend_tokens(
        texts, model="bert", truncate=True, layers=[2, 0], heads=[1], return_weights=True,
        return_entropy=True, return_effective_context=True, mass_by_distance=3, mass_on_first=2,
    )  # fmt: skip
    said = capsys.readouterr()
    assert said.err == f"attnserve: text 1 was cut to {len(expected.ids[1])} tokens\n"
    assert said.out.startswith("[CLS] w1 w2 w3 [SEP]\n            w2  layer 2: ")
    with np.load(out) as answer:
        for name in ("hidden", "weights", "entropy", "effective_context",
                     "mass_by_distance", "mass_on_first"):  # fmt: skip
            for index in range(2):
                np.testing.assert_allclose(
                    answer[f"{name}_{index}"], getattr(expected, name)[index], atol=1e-6
                )
    short = ["tokens", "--ids", "2,9,3", "--model", "bert", "--no-weights", "--target", address]
    assert main(short) == 0
    assert capsys.readouterr().out.startswith("[CLS] w5 [SEP]\n  hidden: [3, ")
    # A checkpoint without a pooler: the server's own words, and where to look.
    assert main([*short, "--pooled"]) == 1
    assert "says nothing about pooling; see `attnserve tokens --help`" in capsys.readouterr().err


def test_many_texts_are_asked_for_in_parts_and_it_is_said_how_far_they_are(
    client: AttentionClient,
    address: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(progress, "_LOG_SECONDS", 0.0)
    texts = [f"w{index % 7} w{index % 5}" + " w3" * (index % 4) for index in range(40)]
    out = tmp_path / "answer.npz"
    words = ["--model", "bert", "--target", address]
    # The last part alone has a text that is too long.
    assert main(["tokens", *texts[:-1], "w " * 30, *words]) == 1
    said = capsys.readouterr()
    assert (said.out, "text.texts[7]" in said.err) == ("", True)
    assert "counted from text 32; see `attnserve tokens --help`" in said.err

    texts[35] = "w2 " * 30
    options = ["--truncate", "--output", str(out)]
    assert main(["tokens", *texts, *words, *options]) == 0
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert [line.split(",")[0] for line in lines[:3]] == [
        "16/40 texts",
        "32/40 texts",
        "40/40 texts",
    ]
    assert all("left" in line for line in lines[:3])
    assert lines[3].startswith("attnserve: text 35 was cut to ")
    assert said.out.count("[CLS]") >= 40
    with np.load(out) as answer:
        for index in (0, 17, 35, 39):
            [hidden] = client.attend_tokens([texts[index]], model="bert", truncate=True).hidden
            np.testing.assert_allclose(answer[f"hidden_{index}"], hidden, atol=1e-5)
        assert f"hidden_{40}" not in answer


def test_a_token_that_is_not_there(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["tokens", "w1 w2", "--model", "bert", "--query", "w9", "--target", address]
    assert main(words) == 2
    assert "--query: given 'w9'; allowed: one of [CLS] w1 w2 [SEP]" in capsys.readouterr().err
