"""`attnserve inspect --serve`: a real server, a real command, a real browser."""

import http.client
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import numpy as np
import pytest
from attnserve_client import AttentionClient
from attnserve_client._cli import main
from attnserve_server.app import AttentionServer
from attnserve_server.settings import Settings
from chromium import browser

if TYPE_CHECKING:
    from chromium import Browser

__all__ = ["browser"]
HOSTILE = "w1 </script><img src=x onerror=window.hacked=1> w3"


def begin(address: str, *more: str) -> tuple[subprocess.Popen[str], str]:
    """The command in a process of its own, and the address that it prints."""
    process = subprocess.Popen(
        [sys.executable, "-m", "attnserve_client._cli", "inspect", "--serve", "--target", address,
         *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    line = process.stdout.readline()
    assert line.endswith(" shows attention; Ctrl-C ends it\n"), process.stderr.read()
    return process, line.split()[0]


@pytest.fixture(scope="module")
def page(address: str) -> Iterator[str]:
    process, url = begin(address)
    yield url
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert (process.returncode, out) == (130, "")
    assert err == "attnserve: interrupted; nothing was left half written\n"


def ready(browser: "Browser", text: str, pair: str = "") -> None:
    """Type a text, look, and wait until all layers are loaded."""
    browser.run(
        f"document.getElementById('ask-text').value = {json.dumps(text)};"
        f"document.getElementById('ask-pair').value = {json.dumps(pair)};"
        "delete document.documentElement.dataset.ready;"
        "document.getElementById('ask').requestSubmit(); 0"
    )
    browser.wait(
        "document.documentElement.dataset.ready && document.getElementById('ask-progress').hidden"
        " && ![...document.querySelectorAll('#grid .number')].some(e => e.textContent === '…')",
    )


def opened(browser: "Browser", page: str) -> None:
    browser.errors.clear()
    browser.send("Page.navigate", url=page)
    browser.wait("document.documentElement?.dataset?.live === ''")


def test_a_text_is_typed_and_looked_at(
    browser: "Browser", page: str, client: AttentionClient
) -> None:
    opened(browser, page)
    assert browser.run("document.getElementById('main').hidden")
    models = browser.run("[...document.getElementById('ask-model').options].map(o => o.value)")
    assert models == ["bert"]
    ready(browser, HOSTILE)
    assert browser.run("window.hacked ?? null") is None
    assert browser.run("document.images.length") == 0
    found = client.attend_tokens([HOSTILE], model="bert", return_weights=True)
    shown = browser.run("[...document.querySelectorAll('#queries li')].map(e => e.textContent)")
    assert [text.strip() for text in shown] == found.tokens[0]
    assert browser.run("document.querySelector('h1').textContent") == f"bert: {HOSTILE}"
    # Every head's number, of every layer, against the server's own weights.
    weights = np.asarray(found.weights[0], np.float64)
    logs = np.log(weights, out=np.zeros_like(weights), where=weights > 0)
    effective = np.exp(-(weights * logs).sum(-1)).mean(-1).ravel()
    numbers = browser.run(
        "[...document.querySelectorAll('#grid .number')].map(e => +e.textContent)"
    )
    assert numbers == pytest.approx(effective.tolist(), abs=0.06)
    # A weight of the last layer, read off the map.
    browser.run(
        "const s = document.getElementById('layer'); s.value = 2;"
        "s.dispatchEvent(new Event('change')); 0"
    )
    browser.run("document.querySelectorAll('#text [data-item]')[1].click(); 0")
    browser.run("document.getElementById('query-view').scrollIntoView(); 0")
    browser.drawn()
    heaviest = browser.run(
        "parseFloat(document.querySelector('#top-table tbody tr').children[4].textContent)"
    )
    assert heaviest == pytest.approx(weights[2, 0, 1].max(), abs=6e-4)
    assert browser.errors == []


def test_another_text_and_a_pair_follow_on_the_same_page(browser: "Browser", page: str) -> None:
    opened(browser, page)
    ready(browser, "w1 w2")
    ready(browser, "w5 w6", "w7")
    shown = browser.run("[...document.querySelectorAll('#queries li')].map(e => e.textContent)")
    assert [text.strip() for text in shown] == ["[CLS]", "w5", "w6", "[SEP]", "w7", "[SEP]"]
    assert not browser.run("document.getElementById('filter-field').hidden")
    assert browser.errors == []


def test_documents_are_blocks_that_do_not_see_each_other(
    browser: "Browser", page: str, client: AttentionClient
) -> None:
    opened(browser, page)
    ready(browser, "w1 w2 w3\n---\nw5\n--- \n\n---\nw7 w8")
    shown = browser.run("[...document.querySelectorAll('#queries li')].map(e => e.textContent)")
    texts = ["w1 w2 w3", "w5", "w7 w8"]
    found = client.attend_tokens(texts, model="bert", return_weights=True)
    assert [text.strip() for text in shown] == [each for row in found.tokens for each in row]
    options = "[...document.querySelectorAll('#document option')].map(each => each.textContent)"
    sizes = [len(tokens) for tokens in found.tokens]
    assert browser.run(options) == [
        "all",
        *(f"{n}: {size} queries" for n, size in enumerate(sizes)),
    ]
    # Each head's number is the mean over the queries of all documents.
    by_query = []
    for weights in found.weights:
        logs = np.log(weights, out=np.zeros_like(weights), where=weights > 0)
        by_query.append(np.exp(-(weights * logs).sum(-1)))
    effective = np.concatenate(by_query, axis=-1).mean(-1).ravel()
    numbers = browser.run(
        "[...document.querySelectorAll('#grid .number')].map(e => +e.textContent)"
    )
    assert numbers == pytest.approx(effective.tolist(), abs=0.06)
    assert browser.errors == []
    browser.run("document.getElementById('ask-pair').value = 'w9';")
    browser.run("document.getElementById('ask').requestSubmit(); 0")
    browser.wait("document.getElementById('ask-status').classList.contains('warning')")
    said = browser.run("document.getElementById('ask-status').textContent")
    assert said == "text: 3 documents; allowed: one, as one of a pair"


def test_layers_come_when_they_are_looked_at(browser: "Browser", page: str) -> None:
    opened(browser, page)
    ready(browser, "w1 w2 w3")
    name = browser.run(
        "performance.getEntriesByType('resource').map(e => e.name)"
        ".filter(n => n.includes('layer?'))"
    )
    assert [url.rsplit("=", 1)[1] for url in name] == ["0", "1", "2"]


def test_a_refusal_is_said_on_the_page(browser: "Browser", page: str) -> None:
    opened(browser, page)
    browser.run("document.getElementById('ask-text').value = ' ';"
                "document.getElementById('ask').requestSubmit(); 0")  # fmt: skip
    browser.wait("document.getElementById('ask-status').textContent.startsWith('text: empty')")
    assert browser.run("document.getElementById('main').hidden")


def request(page: str, method: str, path: str, body: str = "", **headers: str) -> tuple[int, str]:
    where = urlsplit(page)
    connection = http.client.HTTPConnection(where.hostname, where.port, timeout=10)
    base = where.path if not path.startswith("/") else ""
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, base + path, body or None, fields)
    answer = connection.getresponse()
    content = answer.read().decode()
    connection.close()
    return answer.status, content


ASK = json.dumps({"model": "bert", "text": "w1"})
JSON = {"Content_Type": "application/json"}


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status"),
    [
        ("GET", "", "", {}, 200),
        ("GET", "", "", {"Sec_Fetch_Site": "none"}, 200),
        ("POST", "look", ASK, JSON, 200),
        ("GET", "", "", {"Host": "evil.example"}, 421),
        ("GET", "", "", {"Host": "localhost"}, 421),
        ("GET", "", "", {"Sec_Fetch_Site": "cross-site"}, 403),
        ("POST", "look", ASK, {**JSON, "Origin": "http://evil.example"}, 403),
        ("POST", "look", ASK, {**JSON, "Origin": "null"}, 403),
        ("POST", "look", ASK, {"Content_Type": "text/plain"}, 415),
        ("POST", "look", ASK, {**JSON, "Content_Length": "99999999999"}, 413),
        ("POST", "look", "{", JSON, 400),
        ("POST", "look", "[1]", JSON, 400),
        ("POST", "look", '{"model": "bert", "text": 1}', JSON, 400),
        ("POST", "look", '{"model": "bert", "text": "w1", "x": ""}', JSON, 400),
        ("POST", "look", '{"model": "none", "text": "w1"}', JSON, 502),
        ("GET", "/", "", {}, 404),
        ("GET", "/guessed/", "", {}, 404),
        ("GET", "/../../etc/passwd", "", {}, 404),
        ("GET", "layer?map=m999&layer=0", "", {}, 400),
        ("GET", "layer?map=m0&layer=-1", "", {}, 400),
        ("PUT", "look", ASK, JSON, 501),
    ],
)
def test_only_the_page_itself_is_answered(
    page: str, method: str, path: str, body: str, headers: dict[str, str], status: int
) -> None:
    assert request(page, method, path, body, **headers)[0] == status


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "page.html"], "--out: given with --serve; allowed: without it"),
        (["--layers", "1"], "--layers: given with --serve; allowed: without it"),
        (["w1", "w2"], "TEXT: 2 given with --serve; allowed: 1 or none"),
        (["--model", "none"], "--model: given none; allowed: bert"),
    ],
)
def test_what_does_not_go_with_it_is_said(
    address: str, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["--target", address, "inspect", "--serve", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_text_given_is_looked_at_at_once(browser: "Browser", address: str) -> None:
    process, url = begin(address, "w4 w5", "--model", "bert")
    try:
        browser.errors.clear()
        browser.open(url)
        assert browser.run("document.querySelector('h1').textContent") == "bert: w4 w5"
        assert browser.errors == []
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 130
        process.stdout.close()
        process.stderr.close()


def test_a_port_that_is_taken_is_said_in_one_line(page: str, address: str) -> None:
    taken = str(urlsplit(page).port)
    done = subprocess.run(
        [sys.executable, "-m", "attnserve_client._cli", "inspect", "--serve", "--port", taken,
         "--target", address], capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"attnserve: --port: 127.0.0.1:{taken} is taken; give another, or none for a free one\n"
    )


@pytest.mark.slow
def test_32_layers_of_32_heads_at_2048_tokens_open_from_one_layer(
    browser: "Browser", tmp_path: Path
) -> None:
    import torch
    from attnserve_export.cli import main as export
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=256, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=2048,
    )  # fmt: skip
    model = LlamaModel(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(3)  # uneven weights, as trained models have them
    model.save_pretrained(tmp_path / "checkpoint")
    words = {f"w{number}": number for number in range(511)} | {"[UNK]": 511}
    tokenizer = Tokenizer(models.WordLevel(words, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "checkpoint/tokenizer.json"))
    out = ["--out", str(tmp_path / "models"), "--name", "large"]
    assert export(["transformer", *out, "--checkpoint", str(tmp_path / "checkpoint")]) == 0
    server = AttentionServer(
        Settings(tmp_path / "models", port=0, metrics_port=0, provider="cpu", drain_seconds=5)
    )
    server.start()
    numbers = np.random.default_rng(1).integers(0, 511, 2048)
    text = " ".join(f"w{number}" for number in numbers)
    try:
        started = time.monotonic()
        target = f"127.0.0.1:{server.port}"
        process, url = begin(target, text, "--model", "large", "--timeout", "300")
        print(f"first layer computed and packed in {time.monotonic() - started:.1f} s")
        times = [browser.open(url) for _ in range(7)]
        sent = browser.run(
            "performance.getEntriesByType('resource').reduce((sum, e) => sum + e.transferSize, 0)"
        )
        print(f"{sent / 1e6:.0f} MB; opened in {sorted(times)[3]:.0f} ms, the median of {times}")
        said = browser.run("document.getElementById('ask-status').textContent")
        assert said.startswith("2048 tokens; 1 of 32 layers loaded; the others are loaded when")
        assert sent <= 100e6
        assert browser.errors == []
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=10)
        assert process.returncode == 130
    finally:
        server.drain()
