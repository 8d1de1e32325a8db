"""Learned sinks of a gpt-oss on the inspector's pages: a key of their own, live and written."""

import contextlib
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
import transformers
from attnserve_client import AttentionClient
from attnserve_client._cli import main
from chromium import browser

if TYPE_CHECKING:
    from chromium import Browser

__all__ = ["browser"]
TEXTS = ["w5 w6 w7 w8 w9 w10", "w11 w12"]
SHOWN = "[...document.querySelectorAll('#{}')].map(each => each.textContent)"


def with_sinks(folder: Path, ids: list[int]) -> np.ndarray:
    """[L, H, S, S + 1]: what eager attention of transformers gives each key, then to the sink."""
    model = transformers.AutoModel.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )
    with torch.no_grad():
        found = model(torch.tensor([ids]), output_attentions=True).attentions
    weights = np.stack([each[0].double().numpy() for each in found])
    return np.concatenate([weights, 1 - weights.sum(axis=-1, keepdims=True)], axis=-1)


def packed(parts: list[np.ndarray]) -> np.ndarray:
    """Documents side by side, the sink behind all their keys."""
    size = sum(part.shape[2] for part in parts)
    whole, first = np.zeros((*parts[0].shape[:2], size, size + 1)), 0
    for part in parts:
        rows = slice(first, first + part.shape[2])
        whole[:, :, rows, rows] = part[..., :-1]
        whole[:, :, rows, -1] = part[..., -1]
        first = rows.stop
    return whole


@pytest.fixture(scope="module")
def expected(families: tuple[Path, str]) -> tuple[list[np.ndarray], list[str]]:
    """The weights of each text, and all their tokens."""
    folder, address = families
    with AttentionClient(address) as client:
        found = client.attend_tokens(TEXTS, model="gpt_oss")
    weights = [with_sinks(folder / "gpt_oss", ids) for ids in found.ids]
    assert min(part[..., -1].min() for part in weights) > 0.01
    return weights, [token for tokens in found.tokens for token in tokens]


def rows_of(browser: "Browser", layer: int, query: int) -> dict[int, float]:
    """The weights of a query in the first head, by key, as the page lists them."""
    for menu, value in (("layer", layer), ("top", 100000)):
        browser.run(
            f"{{ const s = document.getElementById('{menu}'); s.value = {value};"
            "s.dispatchEvent(new Event('change')); }"
        )
        browser.drawn()
    browser.run(f"document.querySelectorAll('#text [data-item]')[{query}].click()")
    browser.drawn()
    listed = browser.run(
        "[...document.querySelectorAll('#top-table tbody tr')]"
        ".map(row => [+row.children[2].textContent, parseFloat(row.children[4].textContent)])"
    )
    return {int(key): weight for key, weight in listed}


def check(browser: "Browser", weights: np.ndarray, tokens: list[str]) -> None:
    """The page shows these weights, [L, H, S, S + 1], whose last key is the sink."""
    keys = browser.run(SHOWN.format("keys li"))
    assert [key.strip() for key in keys] == [*tokens, "(sink)"]
    assert len(browser.run(SHOWN.format("queries li"))) == len(tokens)
    # Effective keys count the sink as one.
    effective = np.exp(-np.where(weights > 0, weights * np.log(np.maximum(weights, 1e-300)), 0)
                       .sum(-1)).mean(-1)  # fmt: skip
    numbers = browser.run(SHOWN.format("grid .number"))
    np.testing.assert_allclose([*map(float, numbers)], effective.ravel(), atol=0.06)
    for layer, query in ((0, 1), (1, len(tokens) - 1)):
        shown = rows_of(browser, layer, query)
        for key, weight in enumerate(weights[layer, 0, query]):
            assert shown.get(key, 0) == pytest.approx(weight, abs=6e-4), (layer, query, key)
    received = weights[:, 0, :, -1].mean(axis=1)
    rows = browser.run(
        "[...document.querySelectorAll('#sinks-head tbody tr')]"
        ".map(row => [row.children[0].textContent, parseFloat(row.children[2].textContent)])"
    )
    assert dict(rows)["(sink)"] == pytest.approx(received[1], abs=6e-4)
    assert browser.errors == []


@contextlib.contextmanager
def live(browser: "Browser", address: str, model: str, text: str) -> Iterator[None]:
    """The live page of a text in the browser, all layers loaded."""
    process = subprocess.Popen(
        [sys.executable, "-m", "attnserve_client._cli", "inspect", text, "--serve", "--model",
         model, "--target", address],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        browser.open(process.stdout.readline().split()[0])
        browser.wait("document.getElementById('ask-progress').hidden")
        browser.drawn()  # what has arrived is drawn in the next frame
        yield
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=10)


@pytest.mark.parametrize("count", [1, 2])
def test_the_live_page_has_a_column_of_sinks(
    browser: "Browser",
    families: tuple[Path, str],
    expected: tuple[list[np.ndarray], list[str]],
    count: int,
) -> None:
    parts, tokens = expected
    with live(browser, families[1], "gpt_oss", "\n---\n".join(TEXTS[:count])):
        shown = parts[0] if count == 1 else packed(parts)
        check(browser, shown, tokens[: shown.shape[2]])


def test_a_model_without_sinks_has_no_such_column(
    browser: "Browser", families: tuple[Path, str]
) -> None:
    with live(browser, families[1], "qwen2", TEXTS[0]):
        queries = browser.run(SHOWN.format("queries li"))
        assert browser.run(SHOWN.format("keys li")) == queries


def test_a_page_of_packed_texts_has_the_blocks_and_the_sinks(
    browser: "Browser",
    families: tuple[Path, str],
    expected: tuple[list[np.ndarray], list[str]],
    tmp_path: Path,
) -> None:
    parts, tokens = expected
    page = tmp_path / "page.html"
    words = ["inspect", *TEXTS, "--packed", "--model", "gpt_oss", "--out", str(page)]
    assert main([*words, "--target", families[1]]) == 0
    meta = json.loads(re.search(r'id="meta">(.*?)</script>', page.read_text("utf-8"))[1])
    [[described]] = [sequence["maps"] for sequence in meta["sequences"]]
    assert (described["sink"], len(described["documents"])) == (len(tokens), 2)
    browser.open(page)
    check(browser, packed(parts), tokens)
    choices = browser.run(SHOWN.format("document option"))
    assert choices == ["all", *(f"{n}: {part.shape[2]} queries" for n, part in enumerate(parts))]
