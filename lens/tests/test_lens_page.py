"""What the page, notebooks and figures show: numbers against independent ones, hostile tokens."""

import base64
import html.parser
import json
import re
import resource
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attnserve_client import AttendResult, Timings, TokensResult
from attnserve_client import token_texts as texts
from attnserve_lens import encoding, maps_of, page_of, write_page
from attnserve_lens.measures import effective_keys, measure
from scipy import stats

HOSTILE = [
    "[CLS]", "</script><script>window.hacked=1</script>", "<img src=x onerror=window.hacked=1>",
    "\"'`{{data}}", "\u202eRTL", "שלום", "a\nb\x00", "👩‍🚀", "\u2028", "\ud800", "", "  ", "$x_1$",
    "&amp;", "[SEP]",
]  # fmt: skip
TIMINGS = Timings(1, 2, 3, 4, 1)


def random_weights(*shape: int, seed: int = 0, sharpness: float = 2.0) -> np.ndarray:
    scores = np.random.default_rng(seed).standard_normal(shape) * sharpness
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


def causal(weights: np.ndarray) -> np.ndarray:
    kept = np.tril(weights)
    return kept / kept.sum(-1, keepdims=True)


def tokens_result(tokens: list[str], weights: np.ndarray, **more: Any) -> TokensResult:
    layers, heads = weights.shape[:2]
    named: dict[str, Any] = {"layers": list(range(layers)), "heads": list(range(heads)), **more}
    ids = [list(range(len(tokens)))]
    return TokensResult(
        "m", "1", "fused", TIMINGS, ids, [tokens], [False], weights=[weights], **named
    )


class Blocks(html.parser.HTMLParser):
    """The script elements of a page, as a browser would find them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[dict[str, str | None], str]] = []
        self.tags: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "script":
            self.found.append((dict(attrs), ""))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "script" and self.found:
            attributes, text = self.found.pop()
            self.found.append((attributes, text + data))

    def handle_endtag(self, tag: str) -> None:
        self.tags.append("/" + tag)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("sharpness", [0.01, 2.0, 12.0])
def test_packed_weights_are_as_near_as_promised(bits: int, sharpness: float) -> None:
    weights = random_weights(3, 40, 70, sharpness=sharpness)
    weights[0, 0] = 0  # a query that sees no key
    back = encoding.unpack_layer(encoding.pack_layer(weights, bits), weights.shape, bits)
    bound = weights.max(-1, keepdims=True) * 1.001 / encoding.largest_code(bits)
    assert (np.abs(back - weights) <= bound + 1e-7).all()
    assert (back[0, 0] == 0).all()


def test_effective_keys_are_exp_of_scipys_entropy() -> None:
    weights = random_weights(2, 5, 9)
    np.testing.assert_allclose(
        effective_keys(weights), np.exp(stats.entropy(weights, axis=-1)), rtol=1e-5
    )
    uniform = np.full((1, 8), 1 / 8, np.float32)
    np.testing.assert_allclose(effective_keys(uniform), [8], rtol=1e-6)
    assert effective_keys(np.zeros((1, 8), np.float32)) == [0]


def test_measures_of_a_causal_map() -> None:
    weights = causal(random_weights(2, 3, 6, 6))
    names = ["<s>", "a", "b", "c", "d", "</s>"]
    measures = measure(maps_of(tokens_result(names, weights))[0])
    assert measures.visible.tolist() == [[1, 2, 3, 4, 5, 6]] * 2
    np.testing.assert_allclose(measures.first, weights[..., 0].mean(-1), rtol=1e-6)
    np.testing.assert_allclose(measures.special, weights[..., [0, 5]].sum(-1).mean(-1), rtol=1e-5)
    expected = [[np.trace(head, -1) / 5 for head in layer] for layer in weights]
    np.testing.assert_allclose(measures.previous, expected, rtol=1e-6)
    assert not measures.following.any()
    # The last key can only be seen by the last query: its mean is over that one.
    np.testing.assert_allclose(measures.received[..., 5], weights[..., 5, 5], rtol=1e-6)


def test_the_page_holds_the_weights_of_the_layers_and_heads_asked_for() -> None:
    weights = random_weights(2, 3, 7, 7)
    page = page_of(tokens_result(list("abcdefg"), weights, layers=[1, 4], heads=[0, 2, 5]))
    blocks = {a["id"]: text for a, text in Blocks(page).found if "id" in a}
    described = json.loads(blocks["meta"])["sequences"][0]["maps"][0]
    assert (described["layers"], described["heads"]) == ([1, 4], [0, 2, 5])
    for layer in range(2):
        back = encoding.unpack_layer(blocks[f"s0m0-layer-{layer}"], (3, 7, 7), described["bits"])
        np.testing.assert_allclose(back, weights[layer], atol=2e-5)
    packed = zlib.decompress(base64.b64decode(blocks["s0m0-effective"]), -15)
    effective = np.frombuffer(packed, "<f4").reshape(2, 3, 7)
    np.testing.assert_allclose(effective, np.exp(stats.entropy(weights, axis=-1)), rtol=1e-5)


def test_thumbnails_keep_the_heaviest_weight_of_a_cell() -> None:
    weights = np.zeros((1, 1, 100, 50), np.float32)
    weights[0, 0, 99, 7] = 1
    packed = zlib.decompress(base64.b64decode(encoding.pack_thumbnails(weights)), -15)
    picture = np.frombuffer(packed, np.uint8).reshape(32, 32)
    # Cell i of 32 begins at key 50 i / 32, rounded down: the fifth is that of keys 7 and 8.
    assert np.argwhere(picture).tolist() == [[31, 5]]


def test_hostile_tokens_are_text_and_nothing_else() -> None:
    result = tokens_result(HOSTILE, random_weights(1, 2, len(HOSTILE), len(HOSTILE)))
    page = page_of(result, title="<b>&{{script}}</b>")
    page.encode("utf-8")
    blocks = Blocks(page)
    executable = [a for a, _ in blocks.found if "type" not in a]
    assert len(executable) == 1
    assert "img" not in blocks.tags
    assert "b" not in blocks.tags
    assert "<title>&lt;b&gt;&amp;{{script}}&lt;/b&gt;</title>" in page
    meta = json.loads(next(text for a, text in blocks.found if a.get("id") == "meta"))
    assert meta["sequences"][0]["maps"][0]["keys"][1] == HOSTILE[1]
    shown = result._repr_html_()
    assert "<img" not in shown
    assert "<script" not in shown
    assert "\u202e" not in shown


def test_invisible_characters_are_written_out() -> None:
    shown = ["␊", "<U+202E>a", "<U+200B>", "␡", "∅", "␣␣", "👩‍🚀", "שלום", "<U+D800>"]
    given = ["\n", "\u202ea", "\u200b", "\x7f", "", "  ", "👩‍🚀", "שלום", "\ud800"]
    assert list(map(texts.displayable, given)) == shown
    assert texts.label("abcdefgh", 5) == "abcd…"


def test_the_second_text_of_a_pair_is_found() -> None:
    assert texts.second_segment(["[CLS]", "a", "[SEP]", "b", "[SEP]"]) == 3
    assert texts.second_segment(["<s>", "a", "</s>", "</s>", "b", "</s>"]) == 3
    assert texts.second_segment(["[CLS]", "a", "[SEP]"]) is None
    assert texts.second_segment(["a", "b"]) is None


def test_the_page_names_no_outside_address() -> None:
    page = page_of(tokens_result(["a", "b"], random_weights(1, 1, 2, 2)))
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!#)|https?://|@import|url\(""", page)
    assert "default-src 'none'" in page


def test_attend_results_are_shown_too(tmp_path: Path) -> None:
    weights = random_weights(2, 3, 4, 6)
    result = AttendResult("core", "1", "fused", TIMINGS, weights=weights)
    assert maps_of(result, 1)[0].keys == tuple("012345")
    assert write_page(result, tmp_path / "page.html").stat().st_size > 10_000
    assert "[2, 3, 4, 6]" in result._repr_html_()
    assert len(result.plot().axes) == 3
    with pytest.raises(ValueError, match="no weights"):
        AttendResult("core", "1", "fused", TIMINGS).save_html(tmp_path / "page.html")


def test_figures_hold_the_weights() -> None:
    weights = random_weights(2, 3, 5, 5)
    result = tokens_result(["$a$", "\nb", "c", "d", "e"], weights, layers=[3, 7], heads=[1, 4, 6])
    overview = result.plot()
    assert len(overview.axes) == 6
    np.testing.assert_allclose(overview.axes[5].images[0].get_array(), weights[1, 2])
    one = result.plot(layer=7, head=4)
    np.testing.assert_allclose(one.axes[0].images[0].get_array(), weights[1, 1])
    labels = [label.get_text() for label in one.axes[0].get_yticklabels()]
    assert labels == [r"\$a\$", "␊b", "c", "d", "e"]
    spread = result.plot("spread", layer=3)
    curve = spread.axes[0].lines[1].get_ydata()
    np.testing.assert_allclose(curve, np.exp(stats.entropy(weights[0, 1], axis=-1)), rtol=1e-5)
    assert one._repr_png_().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "pie"}, "kind: 'pie'; allowed: overview, head, spread"),
        ({"layer": 2, "kind": "head"}, "layer: 2; allowed: 0, 1, as was asked for"),
        ({"head": 9}, "head: 9; allowed: 0, 1"),
        ({"sequence": 1}, r"sequence: 1; allowed: 0\.\.0"),
        ({"attention": "cross"}, "attention: 'cross'; allowed: self"),
    ],
)
def test_wrong_plot_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokens_result(["a", "b"], random_weights(2, 2, 2, 2)).plot(**options)


# "The café is 👍 déjà vu." as GPT-2's tokens, "é" and "👍" in two parts each.
BYTES = [
    "<|endoftext|>",
    "The",
    "Ġcaf",
    "Ã",
    "©",
    "Ġis",
    "ĠðŁ",
    "ĳį",
    "Ġd",
    "Ã©j",
    "Ãł",
    "Ġvu",
    ".",
]


def test_tokens_of_bytes_are_shown_as_text() -> None:
    assert texts.shown(BYTES) == [
        "<|endoftext|>", "The", "␣caf", "<0xC3>", "<0xA9>", "␣is", "␣<0xF0><0x9F>", "<0x91><0x8D>",
        "␣d", "éj", "à", "␣vu", ".",
    ]  # fmt: skip
    assert texts.text_of(BYTES) == "The café is 👍 déjà vu."
    assert texts.shown(BYTES[:4])[-1] == "<0xC3>"  # cut within a character


@pytest.mark.parametrize("words", [["naïve", "Łódka"], ["č"], ["Ġ"], ["Ã", "##©"], ["Ģ"], ["it"]])
def test_other_tokens_are_left_as_they_are(words: list[str]) -> None:
    assert texts.shown(words) in (words, ["␣"])  # Ġ alone is a space of byte-level BPE


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        ("[CLS] the animal didn ' t cross ( yet ) . [SEP]", "the animal didn't cross (yet)."),
        ("[CLS] un ##afford ##able , well - known [SEP]", "unaffordable, well-known"),
        ("<s> ▁The ▁cat <0xC3> <0xA9> s </s>", "The catés"),
        ("[CLS] [SEP]", "[CLS] [SEP]"),
    ],
)
def test_a_page_is_called_by_the_text_that_its_tokens_spell(tokens: str, text: str) -> None:
    assert texts.text_of(tokens.split()) == text


def test_a_page_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    result = tokens_result(["a", "b"], random_weights(1, 1, 2, 2))
    path = tmp_path / "page.html"
    path.write_text("before")
    path.chmod(0o640)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # as on a full disk
    try:
        with pytest.raises(OSError, match="too large"):
            write_page(result, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "before"
    assert [each.name for each in tmp_path.iterdir()] == ["page.html"]
    write_page(result, path)
    assert path.read_text("utf-8").startswith("<!DOCTYPE html>")
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_what_rows_leave_to_a_learned_sink_is_a_column(dtype: type) -> None:
    """Against a softmax with one logit more, in float64."""
    scores = np.random.default_rng(3).normal(0, 2, (2, 3, 5, 5))
    scores[..., ~np.tri(5, dtype=bool)] = -np.inf
    sink = np.broadcast_to(np.array([0.5, -1.0, 2.0])[None, :, None, None], (2, 3, 5, 1))
    whole = np.exp(np.concatenate([scores, sink], axis=-1))
    whole /= whole.sum(axis=-1, keepdims=True)
    words = ["a", "b", "c", "d", "e"]
    result = tokens_result(words, whole[..., :-1].astype(dtype))
    [found] = maps_of(result)
    assert (found.sink, found.square, found.keys) == (True, True, (*words, "(sink)"))
    np.testing.assert_allclose(found.weights, whole, atol=5e-3 if dtype is np.float16 else 1e-6)
    measures = measure(found)
    following = np.diagonal(whole[..., :5], 1, axis1=-2, axis2=-1).mean(-1)
    np.testing.assert_allclose(measures.following, following, atol=5e-3)
    assert "5 keys and the model" in str(result._repr_html_())
    assert result.plot("head", layer=0, head=0).axes
    assert '"sink":5' in page_of(result)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_without_a_sink_there_is_no_column(dtype: type) -> None:
    weights = causal(random_weights(2, 2, 300, 300)).astype(dtype)
    weights[0, 0, 7] = 0  # sees no key
    [found] = maps_of(tokens_result([f"w{n}" for n in range(300)], weights))
    assert not found.sink
    assert found.weights.shape == weights.shape
