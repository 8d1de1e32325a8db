"""`attnserve inspect` against a real server: text, ids, pairs, layers and heads, and refusals."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from attnserve_client import AttentionClient
from attnserve_client._cli import main
from attnserve_client._inspect import command, encoding


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


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "nothing to show; give a text, -, --file or --ids"),
        (["w1", "--ids", "2,3"], 2, "--ids: given with a text"),
        (["w1", "w2", "--pair", "w3"], 2, "--pair: given with 2 texts"),
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
