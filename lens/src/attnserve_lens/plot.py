"""Results as matplotlib figures: `result.plot()`."""

import io
from typing import Any

import numpy as np
from attnserve_client import AttendResult, TokensResult
from attnserve_client import token_texts as texts
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from attnserve_lens.attention import Array, AttentionMap, maps_of
from attnserve_lens.measures import effective_keys

KINDS = ("overview", "head", "spread")

# Every 15th of the 256 colours of the page (page_assets/colour.js), light: from paper to ink,
# uniform to the eye, and readable in grey.
SCALE = (
    "#ffffff",
    "#f4f3d5",
    "#dde8b2",
    "#bcde98",
    "#93d48a",
    "#60ca87",
    "#12be8b",
    "#0eb191",
    "#15a292",
    "#119290",
    "#107f8a",
    "#066e83",
    "#085f7c",
    "#005277",
    "#054571",
    "#1c365b",
    "#22293e",
    "#1f1f1f",
)
_LABELLED_UP_TO = 64


def plot(
    result: TokensResult | AttendResult,
    kind: str = "",
    *,
    sequence: int = 0,
    attention: str = "",
    layer: int | None = None,
    head: int | None = None,
    axes: Axes | None = None,
) -> Figure:
    """Draw the weights of one sequence.

    Args:
        result: with weights.
        kind: "overview" (every layer and head in small), "head" (one head, with the tokens) or
            "spread" (effective keys, exp(entropy), by position). Empty: "overview", or "head"
            where `head` is given or there is one head only.
        sequence: which one of the batch.
        attention: which kind, of an encoder-decoder: "encoder", "decoder" or "cross"; empty: the
            first.
        layer: for "head" and "spread"; None: the first of the result.
        head: for "head": None is the mean of the heads.
        axes: where to draw "head" or "spread"; None makes a figure.

    Returns:
        The figure; a notebook shows it, `figure.savefig(path)` writes it.

    Raises:
        ValueError: an argument is not among what the result holds.
    """
    shown = _pick(maps_of(result, sequence), attention)
    single = shown.weights.shape[:2] == (1, 1)
    kind = kind or ("head" if head is not None or single else "overview")
    if kind not in KINDS:
        raise ValueError(f"kind: {kind!r}; allowed: {', '.join(KINDS)}")
    if kind == "overview":
        if axes is not None:
            raise ValueError("axes: given with kind 'overview'; allowed: with 'head' and 'spread'")
        return _overview(shown)
    if axes is None:
        size = (6.4, 5.8) if kind == "head" else (7.6, 4.4)
        axes = NotebookFigure(figsize=size, layout="constrained").subplots()
    if kind == "head":
        _draw_head(axes, shown, layer, head)
    else:
        _draw_spread(axes, shown, layer)
    figure = axes.get_figure(root=True)
    assert figure is not None
    return figure


class NotebookFigure(Figure):
    """Shown by notebooks whatever backend they use, and only once."""

    def _repr_png_(self) -> bytes:
        content = io.BytesIO()
        FigureCanvasAgg(self).print_png(content)  # type: ignore[no-untyped-call]
        return content.getvalue()


def _pick(maps: tuple[AttentionMap, ...], kind: str) -> AttentionMap:
    for each in maps:
        if kind in ("", each.kind):
            return each
    allowed = ", ".join(each.kind for each in maps)
    raise ValueError(f"attention: {kind!r}; allowed: {allowed}, as the result has")


def _overview(shown: AttentionMap) -> Figure:
    layers, heads = len(shown.layers), len(shown.heads)
    side = max(0.62, min(1.6, 9 / heads))
    layout = ConstrainedLayoutEngine(w_pad=0.01, h_pad=0.01, wspace=0.02, hspace=0.02)
    figure = NotebookFigure(figsize=(side * heads + 0.7, side * layers + 0.8), layout=layout)
    grid = figure.subplots(layers, heads, squeeze=False)
    for row, layer in enumerate(shown.layers):
        for column, head in enumerate(shown.heads):
            axes, weights = grid[row, column], shown.weights[row, column]
            # Each head on its own scale, as its pattern matters here.
            _image(axes, weights, max(float(weights.max()), 1e-9))
            axes.set_xticks([])
            axes.set_yticks([])
            if row == 0:
                axes.set_title(str(head), fontsize=8)
            if column == 0:
                axes.set_ylabel(str(layer), fontsize=8, rotation=0, ha="right", va="center")
    figure.suptitle("weights by layer (down) and head (right)", fontsize=9)
    return figure


def _draw_head(axes: Axes, shown: AttentionMap, layer: int | None, head: int | None) -> None:
    row = shown.layer_index(layer)
    weights = shown.weights[row]
    name = f"layer {shown.layers[row]}"
    if head is None and len(shown.heads) > 1:
        picture, name = weights.mean(axis=0), f"{name}, mean of {len(shown.heads)} heads"
    else:
        column = shown.head_index(head)
        picture, name = weights[column], f"{name}, head {shown.heads[column]}"
    image = _image(axes, picture, max(float(picture.max()), 1e-9))
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.8)
    bar.set_label("weight")
    axes.set_title(name)
    axes.set_xlabel("key")
    axes.set_ylabel("query")
    _name(axes.xaxis, shown.keys, rotation=90)
    _name(axes.yaxis, shown.queries)


def _draw_spread(axes: Axes, shown: AttentionMap, layer: int | None) -> None:
    row = shown.layer_index(layer)
    weights = shown.weights[row].astype(np.float32, copy=False)
    effective, positions = effective_keys(weights), np.arange(len(shown.queries))
    for column, curve in enumerate(effective):
        label = "each head" if column == 0 else None
        axes.plot(positions, curve, color="0.55", lw=0.8, label=label)
    axes.plot(positions, effective.mean(axis=0), color="#0b57b0", lw=2.2, label="mean of heads")
    visible = (weights > 0).any(axis=0).sum(axis=-1)
    axes.plot(positions, visible, color="black", lw=1.5, ls=":", label="uniform")
    axes.set_yscale("log", base=2)
    axes.set_ylim(bottom=0.9)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("position of the query")
    axes.set_ylabel("effective keys, exp(entropy)")
    axes.set_title(f"How thin attention is spread: layer {shown.layers[row]}")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(frameon=False)


def _image(axes: Axes, weights: Array, most: float) -> Any:
    # The root of the weight, as on the page: light weights are many, and matter together.
    norm = PowerNorm(0.5, 0, most)
    picture = weights.astype(np.float32, copy=False)
    colours = LinearSegmentedColormap.from_list("attnserve", SCALE)
    return axes.imshow(picture, cmap=colours, norm=norm, interpolation="nearest", aspect="auto")


def _name(axis: Any, tokens: tuple[str, ...], rotation: int = 0) -> None:
    if len(tokens) > _LABELLED_UP_TO:
        return
    # A dollar would begin a formula.
    labels = [texts.label(token).replace("$", r"\$") for token in texts.shown(tokens)]
    size = 9 if len(tokens) <= 32 else 6
    axis.set_ticks(range(len(tokens)), labels, rotation=rotation, fontsize=size)
