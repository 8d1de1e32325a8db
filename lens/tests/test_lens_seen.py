"""Pictures and sounds under their attention: what is shown, and in a real Chromium how."""

import dataclasses
import itertools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from attnserve_client import ModelInput, Patches, Timings, TokensResult
from attnserve_lens import write_page
from attnserve_lens.seen import Picture, Sound, seen

if TYPE_CHECKING:
    from chromium import Browser

NORMALIZED = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.5]}
PICTURE = ModelInput(
    "pixel_values", "FP32", (3, 12, 16), 13, Patches(1, 3, 4), preprocessor=NORMALIZED
)
SOUND = ModelInput(
    "input_features", "FP32", (8, 40), 20, frames_per_token=2,
    preprocessor={"hop_length": 160, "sampling_rate": 16000},
)  # fmt: skip


def weights_of(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    raw = np.exp(3 * np.random.default_rng(seed).standard_normal(shape, np.float32))
    return np.asarray(raw / raw.sum(-1, keepdims=True))


def result_of(source: ModelInput, given: np.ndarray[Any, Any], **more: Any) -> TokensResult:
    tokens = ["[CLS]", *(f"{row},{column}" for row in range(3) for column in range(4))]
    return TokensResult(
        "m", "1", "fused", Timings(1, 2, 3, 4, 1), [[]],
        [tokens if source.patches else []], [False], lengths=[source.tokens or 0],
        source=source, given=given, **more,
    )  # fmt: skip


def picture_of(seed: int) -> tuple[TokensResult, np.ndarray[Any, Any]]:
    """What a ViT made of a random picture, and the picture."""
    pixels = np.random.default_rng(seed + 1).integers(0, 256, (12, 16, 3), np.uint8)
    mean, std = (np.asarray(NORMALIZED[name]) for name in ("image_mean", "image_std"))
    given = ((pixels / 255 - mean) / std).transpose(2, 0, 1)[None].astype(np.float32)
    weights = [weights_of(2, 3, 13, 13, seed=seed)]
    result = result_of(PICTURE, given, weights=weights, layers=[0, 1], heads=[0, 1, 2])
    return result, pixels


def sound_of(seed: int, word: str = "cat") -> list[TokensResult]:
    """Whisper's encoder and cross-attention over one random sound in which a word is said."""
    given = np.random.default_rng(seed + 2).standard_normal((1, 8, 40)).astype(np.float32)
    told = {"target_ids": [[3, 4, 5]], "target_tokens": [["<|en|>", "a", word]]}
    named = {"layers": [0, 1], "heads": [0, 1]}
    return [
        result_of(SOUND, given, weights=[weights_of(2, 2, rows, 20, seed=seed)],
                  attention=attention, **told, **named)
        for attention, rows in (("cross", 3), ("encoder", 20))
    ]  # fmt: skip


@pytest.fixture(scope="module")
def picture() -> tuple[TokensResult, np.ndarray[Any, Any]]:
    return picture_of(0)


@pytest.fixture(scope="module")
def sound() -> list[TokensResult]:
    return sound_of(0)


def test_a_picture_is_shown_as_it_was_before_it_was_normalized(
    picture: tuple[TokensResult, np.ndarray[Any, Any]],
) -> None:
    result, pixels = picture
    shown = seen(result, 0)
    assert isinstance(shown, Picture)
    np.testing.assert_array_equal(shown.pixels, pixels)
    bare = dataclasses.replace(result, source=dataclasses.replace(PICTURE, preprocessor=None))
    stretched = seen(bare, 0)
    assert isinstance(stretched, Picture)
    assert (stretched.pixels.min(), stretched.pixels.max()) == (0, 255)
    assert seen(dataclasses.replace(result, source=None), 0) is None


def test_a_sound_is_shown_by_its_frames(sound: list[TokensResult]) -> None:
    shown = seen(sound[0], 0)
    assert isinstance(shown, Sound)
    assert shown.levels.shape == (8, 40)
    assert (shown.frames_per_token, shown.seconds_per_frame) == (2, 0.01)


# What a failure says: the elements that reach beyond the screen, but those in boxes that scroll.
WIDER_THAN_THE_SCREEN = """[...document.querySelectorAll("body *")]
    .map((each) => [each, each.getBoundingClientRect().right])
    .filter(([each, right]) => !each.closest(".scroll, #text") && right > innerWidth)
    .map(([each, right]) => `${each.tagName}#${each.id}: ${right}`).join(", ")"""


def caption(browser: "Browser") -> str:
    browser.drawn()
    return str(browser.run("document.getElementById('seen-caption').textContent"))


def pixel(browser: "Browser", canvas: str, x: float, y: float) -> list[int]:
    """The colour at a place, in CSS pixels."""
    found = browser.run(
        f"(() => {{ const c = document.getElementById('{canvas}'), r = c.width / c.clientWidth;"
        f"return Array.from(c.getContext('2d').getImageData({x} * r, {y} * r, 1, 1).data); }})()"
    )
    return [int(each) for each in found]


def click(browser: "Browser", canvas: str, x: float, y: float) -> None:
    browser.run(
        f"(() => {{ const c = document.getElementById('{canvas}'), b = c.getBoundingClientRect();"
        f"c.dispatchEvent(new MouseEvent('click', {{ clientX: b.left + {x}, clientY: b.top + {y},"
        "bubbles: true })); })()"
    )


def test_attention_lies_over_the_picture_patch_by_patch(
    browser: "Browser", tmp_path: Path, picture: tuple[TokensResult, np.ndarray[Any, Any]]
) -> None:
    result, pixels = picture
    browser.open(write_page(result, tmp_path / "page.html"))
    weights = result.weights[0][0, 0]
    wide = browser.run("Math.min(document.getElementById('seen-query').clientWidth, 460)")
    patch = wide / 4
    # The picture itself, pixel for pixel.
    at = pixel(browser, "seen-query", wide * 9.5 / 16, wide * 1.5 / 16)
    np.testing.assert_allclose(at[:3], pixels[1, 9], atol=2)
    # A click on patch (1, 2) makes it the query: token 1 + 1 * 4 + 2.
    click(browser, "seen-query", 2.5 * patch, 1.5 * patch)
    said = caption(browser)
    assert "query 7 “1,2”" in said
    row = weights[7]
    best = 1 + int(row[1:].argmax())
    assert f"most to patch {result.tokens[0][best]}: " in said
    assert float(re.search(r": ([\d.]+);", said).group(1)) == pytest.approx(row[best], abs=6e-4)
    assert f"{100 * row[0]:.1f} % on [CLS]" in said or f"{100 * row[0]:.0f} % on [CLS]" in said
    # The heavier the patch, the darker it is drawn (on a light page).
    lightest, darkest = (1 + int(each) for each in (row[1:].argmin(), row[1:].argmax()))
    sums = []
    for token in (lightest, darkest):
        middles = [((token - 1) % 4 + 0.5) * patch, ((token - 1) // 4 + 0.5) * patch]
        sums.append(sum(pixel(browser, "seen-keys", *middles)[:3]))
    assert sums[1] < sums[0] - 60
    # The arrow keys move the query by patches.
    browser.run("document.getElementById('seen-query').focus()")
    browser.press("ArrowDown")
    assert "query 11 “2,2”" in caption(browser)
    browser.press("ArrowLeft")
    assert "query 10 “2,1”" in caption(browser)
    assert browser.errors == []
    assert [url for url in browser.requests if not url.startswith("file:")] == []


def test_what_a_token_hears_lies_under_the_spectrogram(
    browser: "Browser", tmp_path: Path, sound: list[TokensResult]
) -> None:
    browser.open(write_page(sound, tmp_path / "page.html"))
    row = sound[0].weights[0][0, 0]
    # Rows of text tokens stand below; the second one is "a".
    click(browser, "seen-time", 200, 120 + 70 + 22 + 18 * 1 + 9)
    best = int(row[1].argmax())
    assert f"query 1 “a” gives most at {best * 2 * 0.01:.2f} s" in caption(browser)
    browser.run("document.getElementById('seen-time').focus()")
    browser.press("ArrowDown")
    assert f"query 2 “cat” gives most at {int(row[2].argmax()) * 0.02:.2f} s" in caption(browser)
    # The bar of the heaviest frame reaches up, that of the lightest does not.
    wide = browser.run("document.getElementById('seen-time').clientWidth") - 92 - 4
    heights = []
    for token in (int(row[2].argmax()), int(row[2].argmin())):
        x = 92 + (token + 0.5) / 20 * wide
        heights.append(pixel(browser, "seen-time", x, 120 + 12))
    assert heights[0] != heights[1]
    # The encoder's queries are frames themselves.
    browser.run(
        "(() => { const s = document.getElementById('map'); s.value = '1';"
        "s.dispatchEvent(new Event('change')); })()"
    )
    browser.wait("!document.getElementById('seen-caption').textContent.includes('cat')")
    browser.drawn()
    click(browser, "seen-time", 92 + 4.5 / 20 * wide, 60)
    encoder = sound[1].weights[0][0, 0]
    expected = f"query at 0.08 s gives most at {int(encoder[4].argmax()) * 0.02:.2f} s"
    assert expected in caption(browser)
    assert browser.errors == []


def test_texts_show_no_picture(browser: "Browser", tmp_path: Path) -> None:
    words = ["a", "b", "c"]
    result = TokensResult(
        "m", "1", "fused", Timings(1, 2, 3, 4, 1), [[1, 2, 3]], [words], [False],
        weights=[weights_of(1, 1, 3, 3)], layers=[0], heads=[0], lengths=[3],
    )  # fmt: skip
    browser.open(write_page(result, tmp_path / "page.html"))
    assert browser.run("document.getElementById('seen-view').hidden") is True
    assert browser.run("document.getElementById('seen-link').hidden") is True
    assert browser.errors == []


@pytest.mark.parametrize("seed", range(3))
def test_it_fits_its_screen(browser: "Browser", tmp_path: Path, seed: int) -> None:
    """Whatever the weights, the values, the words, and how large the reader's type is."""
    word = "Donaudampfschifffahrt" * int(np.random.default_rng(seed).integers(1, 6))
    pages = []
    for index, shown in enumerate((picture_of(seed)[0], sound_of(seed, word))):
        pages.append(write_page(shown, tmp_path / f"{index}.html", title=f"{word} of {seed}"))
    for page, width in itertools.product(pages, (320, 390, 1280)):
        browser.open(page, width=width)
        browser.drawn()
        for size in ("15px", "19px"):
            browser.run(f"document.body.style.fontSize = '{size}'")
            browser.settle()
            wider = browser.run(WIDER_THAN_THE_SCREEN)
            assert browser.run("document.documentElement.scrollWidth") == width, wider
