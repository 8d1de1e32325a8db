"""The page in a real Chromium: it draws, answers mouse and keyboard, can be read, loads nothing."""

import dataclasses
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from attnserve_client import AttendResult, Timings, TokensResult
from attnserve_lens import write_page
from attnserve_lens.plot import SCALE

if TYPE_CHECKING:
    from chromium import Browser

HOSTILE = "</script><img src=x onerror=window.hacked=1>\u202e\n"
WORDS = ["[CLS]", "the", HOSTILE, "שלום", "👩‍🚀", "[SEP]", "it", "slept", "[SEP]"]

# Every text node against what is behind it; WCAG 2: 4.5, and 3 for large text.
CONTRAST = """(() => {
  const parse = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) =>
    0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const behind = (element) => {
    for (; element; element = element.parentElement) {
      const colour = parse(getComputedStyle(element).backgroundColor);
      if (colour.length < 4 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const unseen = ["SCRIPT", "STYLE", "OPTION", "NOSCRIPT"], bad = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let count = 0;
  for (let node; (node = walker.nextNode()); ) {
    const element = node.parentElement, style = getComputedStyle(element);
    if (!node.data.trim() || unseen.includes(element.tagName)) continue;
    if (!element.getClientRects().length) continue;
    const [a, b] = [light(parse(style.color)), light(behind(element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    count++;
    if (ratio < (parseFloat(style.fontSize) >= 24 ? 3 : 4.5)) bad.push([ratio, node.data]);
  }
  return JSON.stringify({ count, bad });
})()"""


# What the map frames, as [x, y, width, height], each once.
FRAMES = """(() => {
  const frames = new Set(), drawn = CanvasRenderingContext2D.prototype, original = drawn.strokeRect;
  drawn.strokeRect = function (...box) {
    if (this.canvas.id === "heatmap") frames.add(JSON.stringify(box.map(Math.round)));
    original.apply(this, box);
  };
  document.getElementById("zoom-all").click();
  return new Promise((done) => setTimeout(() => {
    drawn.strokeRect = original;
    done([...frames].map(JSON.parse));
  }, 200));
})()"""


def result_of(words: list[str], layers: int, heads: int, seed: int = 0) -> TokensResult:
    size, generator = len(words), np.random.default_rng(seed)
    weights = np.exp(3 * generator.standard_normal((layers, heads, size, size), np.float32))
    weights /= weights.sum(-1, keepdims=True)
    ids, named = [list(range(size))], {"layers": list(range(layers)), "heads": list(range(heads))}
    timings = Timings(1, 2, 3, 4, 1)
    return TokensResult(
        "m", "1", "fused", timings, ids, [words], [False], weights=[weights], **named
    )


@pytest.fixture(scope="module")
def result() -> TokensResult:
    return result_of(WORDS, 3, 4)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, result: TokensResult) -> Path:
    return write_page(result, tmp_path_factory.mktemp("page") / "page.html")


def text(browser: "Browser", selector: str) -> str:
    return browser.run(f"document.querySelector({json.dumps(selector)}).textContent")


def choose(browser: "Browser", select: str, value: str) -> None:
    browser.run(
        f"(() => {{ const s = document.getElementById('{select}'); s.value = '{value}';"
        "s.dispatchEvent(new Event('change')); })()"
    )


def column(browser: "Browser", table: str, index: int) -> list[float]:
    return browser.run(
        f"[...document.querySelectorAll('#{table} tbody tr')]"
        f".map(row => +row.children[{index}].textContent)"
    )


def test_it_draws_without_errors_and_asks_the_network_for_nothing(
    browser: "Browser", page: Path
) -> None:
    browser.open(page)
    assert browser.run("document.querySelectorAll('#grid [data-item]').length") == 12
    painted = browser.run(
        "[...document.querySelectorAll('.chart, #heatmap, #lines-canvas')].map(c => {"
        "c.scrollIntoView(); return c.id; })"
    )
    assert len(painted) == 4
    browser.drawn()
    browser.drawn()
    for name in painted:
        colours = browser.run(
            f"(() => {{ const c = document.getElementById('{name}');"
            "return new Set(new Uint32Array("
            "c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer)).size; })()"
        )
        assert colours > 10, name
    assert browser.errors == []
    assert [url for url in browser.requests if not url.startswith("file:")] == []


def test_a_hostile_token_is_shown_and_not_run(browser: "Browser", page: Path) -> None:
    browser.open(page)
    assert browser.run("window.hacked ?? null") is None
    shown = text(browser, "#queries li:nth-child(3)")
    assert shown == "</script><img src=x onerror=window.hacked=1><U+202E>␊"
    assert browser.run("document.images.length") == 0


def test_the_map_reads_the_exact_weight_under_the_keyboards_cross(
    browser: "Browser", page: Path, result: TokensResult
) -> None:
    browser.open(page)
    # Layer 1, head 2, by keyboard alone: from the overview's one place in the tab order.
    browser.run("document.querySelector('#grid [tabindex=\"0\"]').focus()")
    for key in ("ArrowDown", "ArrowRight", "ArrowRight", "Enter"):
        browser.press(key)
    assert browser.run(
        "[document.getElementById('layer').value, document.getElementById('head').value]"
    ) == ["1", "2"]
    browser.run("document.getElementById('heatmap').focus()")
    for key in ("ArrowUp", "ArrowRight", "ArrowRight", "+"):
        browser.press(key)
    readout = text(browser, "#map-readout")
    query, key, weight = re.search(
        r"query (\d+) .* key (\d+) .*: ([\d.e-]+), rank", readout
    ).groups()
    expected = result.weights[0][1, 2, int(query), int(key)]
    assert float(weight) == pytest.approx(expected, rel=0.06, abs=5e-5)


def test_one_query_is_listed_key_by_key(
    browser: "Browser", page: Path, result: TokensResult
) -> None:
    browser.open(page)
    browser.run("document.querySelectorAll('#text [data-item]')[4].click()")
    browser.run("document.getElementById('query-view').scrollIntoView()")
    browser.drawn()
    weights = result.weights[0][0, 0, 4]
    assert column(browser, "top-table", 2) == np.argsort(-weights).tolist()
    assert column(browser, "top-table", 4)[0] == pytest.approx(weights.max(), abs=6e-4)
    scores = np.sort(np.log(weights / weights.max()))[::-1]
    assert column(browser, "top-table", 7) == pytest.approx(scores.tolist(), abs=0.03)


def test_heads_are_switched_and_a_token_is_looked_at_alone(browser: "Browser", page: Path) -> None:
    browser.open(page)
    browser.run("document.getElementById('tokens').scrollIntoView()")
    browser.run("document.querySelectorAll('#chips button')[2].click()")
    browser.drawn()
    pressed = "[...document.querySelectorAll('#chips [aria-pressed=true]')].map(c => c.textContent)"
    assert browser.run(pressed) == ["head 0", "head 2"]
    assert "Heads 0, 2 of layer 0" in text(browser, "#lines-caption")
    browser.run("document.querySelectorAll('#queries li')[0].focus()")
    browser.press("ArrowDown")
    assert "Query 1 “the” attends to" in text(browser, "#lines-caption")
    browser.press("Enter")
    assert browser.run("document.querySelectorAll('#queries li')[1].ariaSelected") == "true"
    browser.press("ArrowRight")
    assert "Key 1 “the” is attended to by" in text(browser, "#lines-caption")


def test_the_pair_filter_leaves_the_other_side_out(browser: "Browser", page: Path) -> None:
    browser.open(page)
    browser.run("document.querySelectorAll('#text [data-item]')[1].click()")
    choose(browser, "filter", "ab")
    browser.run("document.getElementById('query-view').scrollIntoView()")
    browser.drawn()
    assert sorted(column(browser, "top-table", 2)) == [6, 7, 8]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read(browser: "Browser", page: Path, scheme: str) -> None:
    browser.open(page, scheme=scheme)
    browser.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    for scale in ("root", "weight", "row", "lift"):
        choose(browser, "scale", scale)
        browser.drawn()
        found = json.loads(browser.run(CONTRAST))
        assert found["count"] > 150
        assert found["bad"] == [], scale


def test_the_focus_is_seen_on_every_stop_of_the_tab_key(browser: "Browser", page: Path) -> None:
    browser.open(page, reduced_motion=True)
    seen = []
    for _ in range(60):
        browser.press("Tab")
        stop = browser.run(
            "(() => { const e = document.activeElement, s = getComputedStyle(e);"
            "return [e.id || e.tagName + e.textContent.slice(0, 20),"
            "s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) >= 2,"
            "parseFloat(s.transitionDuration)]; })()"
        )
        if stop[0].startswith("BODY"):
            break
        seen.append(stop)
    names = [name for name, _, _ in seen]
    assert {"layer", "head", "scale", "heatmap", "spread-canvas"} <= set(names)
    assert len(names) < 60
    assert [name for name, outlined, _ in seen if not outlined] == []
    assert max(duration for _, _, duration in seen) == 0


# A menu's longest entry, drawn in its own font, against the room that the menu has for it.
CUT_MENUS = """(() => {
  const context = document.createElement("canvas").getContext("2d");
  const menus = [...document.querySelectorAll("select")].filter((menu) => menu.clientWidth);
  return menus.filter((menu) => {
    const style = getComputedStyle(menu);
    context.font = style.font;
    const texts = [...menu.options].map((option) => context.measureText(option.text).width);
    return Math.max(...texts) > menu.clientWidth - parseFloat(style.paddingLeft) - 16;
  }).map((menu) => menu.id);
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280, 1920])
def test_the_width_is_used_and_nothing_is_cut(
    browser: "Browser", tmp_path: Path, width: int, scheme: str
) -> None:
    page = write_page(result_of(WORDS, 2, 12), tmp_path / "page.html")
    browser.open(page, width=width, scheme=scheme)
    browser.drawn()
    assert browser.run("document.documentElement.scrollWidth") == width
    assert browser.run(CUT_MENUS) == []
    inner = browser.run(
        "(() => { const s = getComputedStyle(document.querySelector('main'));"
        "return innerWidth - parseFloat(s.paddingLeft) - parseFloat(s.paddingRight); })()"
    )
    for view in ("grid", "lines", "spread-canvas", "sinks-canvas", "text"):
        used = browser.run(f"document.getElementById('{view}').getBoundingClientRect().width")
        assert used > 0.95 * inner, view
    browser.run("document.getElementById('tokens').scrollIntoView()")
    browser.drawn()
    assert text(browser, "#lines-caption").startswith("Head 0 of layer 0: ")


def test_pictures_have_a_name_and_the_page_fits_a_narrow_screen(
    browser: "Browser", page: Path
) -> None:
    browser.open(page, width=360, height=740)
    browser.drawn()
    nameless = browser.run(
        "[...document.querySelectorAll('canvas')]"
        ".filter(c => !c.closest('[aria-hidden=true], [aria-label]')).map(c => c.id)"
    )
    assert nameless == []
    assert browser.run("document.documentElement.scrollWidth") <= 360


def test_the_scale_of_colours_is_even_and_the_figures_own(browser: "Browser", page: Path) -> None:
    source = (Path(write_page.__code__.co_filename).parent / "page_assets/colour.js").read_text()
    for dark in (False, True):
        code = f"(() => {{ {source}; return Array.from(makeScale({str(dark).lower()})); }})()"
        scale = np.array(browser.run(code)).reshape(256, 3)
        lab = cielab(scale)
        steps = np.linalg.norm(np.diff(lab[::8], axis=0), axis=1)
        lightness = np.diff(lab[::4, 0])
        assert steps.max() < 2.5 * steps.min()
        assert (lightness > 0).all() if dark else (lightness < 0).all()
        if not dark:
            assert ["#" + bytes(colour.tolist()).hex() for colour in scale[::15]] == list(SCALE)


def test_a_learned_sink_is_a_key_of_its_own(
    browser: "Browser", tmp_path: Path, result: TokensResult
) -> None:
    left = dataclasses.replace(result, weights=[result.weights[0] * np.float32(0.75)])
    browser.open(write_page(left, tmp_path / "page.html"))
    keys = browser.run("[...document.querySelectorAll('#keys li')].map(e => e.textContent)")
    queries = browser.run("document.querySelectorAll('#queries li').length")
    assert (len(keys), keys[-1]) == (queries + 1, "(sink)")
    assert browser.run("document.querySelectorAll('#text [data-item]').length") == queries
    browser.run("document.querySelectorAll('#text [data-item]')[4].click()")
    browser.run("document.getElementById('query-view').scrollIntoView()")
    browser.drawn()
    listed = dict(
        zip(column(browser, "top-table", 2), column(browser, "top-table", 4), strict=True)
    )
    assert listed[queries] == pytest.approx(0.25, abs=6e-4)
    assert browser.errors == []


def test_local_layers_stand_beside_global_ones(browser: "Browser", tmp_path: Path) -> None:
    result = result_of([f"w{n}" for n in range(24)], 4, 2)
    weights = result.weights[0] * np.tri(24, dtype=np.float32)
    weights[::2] *= 1 - np.tri(24, k=-4, dtype=np.float32)  # layers 0 and 2: a window of 4
    weights /= weights.sum(axis=-1, keepdims=True)
    page = write_page(dataclasses.replace(result, weights=[weights]), tmp_path / "page.html")
    browser.open(page)
    browser.run("document.getElementById('spread').scrollIntoView()")
    browser.drawn()
    rows = browser.run(
        "[...document.querySelectorAll('#kinds-table tbody tr')]"
        ".map(row => [...row.children].map(cell => cell.textContent))"
    )
    assert [row[:3] for row in rows] == [["local", "0, 2", "4"], ["global", "1, 3", "24"]]
    logs = np.log(weights, out=np.zeros_like(weights), where=weights > 0)
    effective = np.exp(-(weights * logs).sum(-1)).mean(axis=(1, 2))
    assert float(rows[0][3]) == pytest.approx(effective[::2].mean(), abs=0.06)
    assert float(rows[1][3]) == pytest.approx(effective[1::2].mean(), abs=0.06)
    choose(browser, "spread-lines", "kinds")
    browser.drawn()
    lines = "[...document.querySelectorAll('#spread-table tbody th')].map(e => e.textContent)"
    assert browser.run(lines) == ["local", "global", "uniform"]
    assert browser.errors == []


@pytest.mark.slow
def test_512_tokens_of_12_by_12_heads_open_and_answer_in_time(
    browser: "Browser", tmp_path: Path
) -> None:
    path = write_page(result_of([f"w{i}" for i in range(512)], 12, 12), tmp_path / "big.html")
    opened = browser.open(path)
    browser.run("new Promise(done => setTimeout(done, 3000))")
    browser.run(
        "window.slow = [];"
        "new PerformanceObserver(l => l.getEntries().forEach(e => window.slow.push(e.duration)))"
        ".observe({type: 'event', durationThreshold: 16}); 0"
    )
    for item in (
        "#grid [data-item]:nth-child(5)",
        "#text [data-item]:nth-child(50)",
        "#chips button:nth-child(3)",
    ):
        x, y = browser.run(
            f"(() => {{ const e = document.querySelector('{item}');"
            "e.scrollIntoView({block: 'center'}); const r = e.getBoundingClientRect();"
            "return [r.x + 9, r.y + 9]; })()"
        )
        browser.run("new Promise(done => setTimeout(done, 600))")
        browser.run("window.slow.length = 0; 0")
        for kind in ("mousePressed", "mouseReleased"):
            browser.send(
                "Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1
            )
        browser.run("new Promise(done => setTimeout(done, 600))")
        print(item, "longest input to paint:", max(browser.run("window.slow"), default=0), "ms")
    print(f"{path.stat().st_size / 1e6:.0f} MB opened in {opened:.0f} ms")
    assert browser.errors == []


def cielab(colours: np.ndarray) -> np.ndarray:
    """sRGB bytes to CIE 1976 L*a*b*, D65."""
    share = colours / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    matrix = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = linear @ np.array(matrix).T / [0.9505, 1, 1.089]
    cubic = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    x, y, z = cubic.T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)


def test_packed_documents_are_framed_and_zoomed_to(browser: "Browser", tmp_path: Path) -> None:
    size, starts = 30, np.array([0, 9, 9, 30])
    weights = np.zeros((1, 2, size, size), np.float32)
    for first, after in ((0, 9), (9, 30)):
        weights[:, :, first:after, first:after] = 1 / (after - first)
    packed = AttendResult(
        "m", "1", "packed_weights", Timings(1, 2, 3, 4, 1), weights=weights,
        cu_seqlens_q=starts, cu_seqlens_k=starts,
    )  # fmt: skip
    browser.open(write_page(packed, tmp_path / "page.html"))
    browser.drawn()
    assert "30 keys in 2 documents" in text(browser, ".summary")
    options = "[...document.querySelectorAll('#document option')].map(each => each.textContent)"
    assert browser.run(options) == ["all", "0: 9 queries", "1: 21 queries"]
    browser.run("document.getElementById('heatmap').scrollIntoView()")
    browser.drawn()
    # Beside the frames of the whole and of the cross, one around each document: 9 and 21 of 30.
    frames = browser.run(FRAMES)
    whole = max(frames, key=lambda frame: frame[2])
    first, second = (
        next(frame for frame in frames if abs(frame[2] - share * whole[2]) < 3)
        for share in (9 / 30, 21 / 30)
    )
    assert first[2] == first[3]
    assert second[2] == second[3]
    assert (second[0], second[1]) == pytest.approx(
        (first[0] + first[2], first[1] + first[3]), abs=1
    )
    choose(browser, "document", "1")
    browser.drawn()
    assert "query 9 “1:0” → key 9 “1:0”" in text(browser, "#map-readout")
    browser.run("document.getElementById('zoom-all').click()")
    assert browser.run("document.getElementById('document').value") == "-1"
    assert browser.errors == []


def test_a_view_that_leaves_the_window_before_its_frame_is_drawn_all_the_same(
    browser: "Browser", page: Path
) -> None:
    browser.open(page)
    browser.drawn()
    browser.run("document.getElementById('sinks').scrollIntoView()")
    browser.settle()
    # It is in sight while the others are drawn, and no longer in the frame, which comes late.
    browser.run(
        "(() => { const frame = requestAnimationFrame;"
        "window.requestAnimationFrame = (draw) => setTimeout(() => frame(draw), 400);"
        "setTimeout(() => { window.requestAnimationFrame = frame; scrollTo(0, 0); }, 200); })()"
    )
    choose(browser, "head", "2")
    browser.wait("scrollY === 0")
    browser.drawn()
    assert browser.errors == []
