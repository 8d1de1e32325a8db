"""A result in a few sentences and one table: what notebooks show, and the top of the page."""

import html

import numpy as np
from attnserve_client import AttendResult, TokensResult
from attnserve_client import token_texts as texts

from attnserve_lens.attention import Array, AttentionMap, maps_of
from attnserve_lens.measures import Measures, measure

# A notebook keeps what it shows: results with more weights than this are described without them.
_MEASURED_UP_TO = 1 << 24
_TOKENS_SHOWN = 40


def facts_of(result: TokensResult | AttendResult) -> str:
    """What ran, in one line."""
    line = f"model {result.model}, version {result.version}, variant {result.variant}"
    line += f"; computed in {result.timings.compute / 1e3:.1f} ms"
    if isinstance(result, TokensResult) and any(result.truncated):
        line += "; text was cut to what the model takes"
    return line


def sentences_of(attention: AttentionMap, measures: Measures) -> list[str]:
    """What stands out in a map."""
    effective = measures.effective.mean(axis=-1)  # (L, H)
    share = float((measures.effective / np.maximum(measures.visible, 1)[:, None]).mean())
    kind = "" if attention.kind == "self" else f"{attention.kind.capitalize()}: "
    found = [
        f"{kind}{len(attention.layers)} layers, {len(attention.heads)} heads, "
        f"{len(attention.queries)} queries, {_keys(attention)}. A query spreads its weight "
        f"as over {effective.mean():.1f} keys of equal weight, {share:.0%} of uniform, in the mean."
    ]
    if effective.size > 1:
        found.append(
            f"Sharpest: {_head(attention, effective, effective.argmin())}, "
            f"{effective.min():.1f} effective keys. Thinnest: "
            f"{_head(attention, effective, effective.argmax())}, {effective.max():.1f}."
        )
    received = measures.received.mean(axis=(0, 1))
    key = int(received.argmax())
    sink = (
        f"The key that gets most is {key} “{texts.shown(attention.keys)[key]}”: "
        f"{received[key]:.0%} of a query's weight, {received[key] / received.mean():.1f} times the "
        "mean key."
    )
    if any(map(texts.is_special, attention.keys)):
        sink += f" The model's own tokens get {measures.special.mean():.0%} together."
    return [*found, sink]


def summary_html(result: TokensResult | AttendResult) -> str:
    """A light table for notebooks: plain markup, no script, no style sheet."""
    parts = [f"<p><b>{html.escape(type(result).__name__)}</b>: {html.escape(facts_of(result))}</p>"]
    if isinstance(result, TokensResult):
        parts += [_text(result, index) for index in range(len(result.ids))]
    parts.append(_arrays(result))
    if result.weights is not None:
        if sum(np.size(each) for each in result.weights) <= _MEASURED_UP_TO:
            for attention in maps_of(result):
                measures = measure(attention)
                items = "".join(
                    f"<li>{html.escape(each)}</li>" for each in sentences_of(attention, measures)
                )
                parts += [f"<ul>{items}</ul>", _grid(attention, measures)]
        parts.append(
            "<p><code>.plot()</code> draws the weights; <code>.save_html(path)</code> writes a "
            "page to explore them.</p>"
        )
    return "\n".join(parts)


def _text(result: TokensResult, index: int) -> str:
    tokens = result.tokens[index] or [str(each) for each in result.ids[index]]
    shown = " ".join(
        f"<bdi>{html.escape(token)}</bdi>" for token in texts.shown(tokens)[:_TOKENS_SHOWN]
    )
    more = f" … {len(tokens) - _TOKENS_SHOWN} more" if len(tokens) > _TOKENS_SHOWN else ""
    return f"<p>{len(tokens)} tokens: {shown}{more}</p>"


def _arrays(result: TokensResult | AttendResult) -> str:
    rows = []
    for name in type(result).__slots__:
        value = getattr(result, name)
        arrays = value if isinstance(value, list) else [value]
        if arrays and all(isinstance(each, np.ndarray) for each in arrays):
            shapes = ", ".join(str(list(each.shape)) for each in arrays[:3])
            shapes += ", …" if len(arrays) > 3 else ""
            rows.append(f"<tr><td>{name}</td><td>{shapes}</td><td>{arrays[0].dtype}</td></tr>")
    head = "<tr><th>array</th><th>shape</th><th>dtype</th></tr>"
    return f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>" if rows else ""


def _grid(attention: AttentionMap, measures: Measures) -> str:
    """Effective keys of each layer and head."""
    head = "".join(f"<th>head {each}</th>" for each in attention.heads)
    rows = "".join(
        f"<tr><th>layer {layer}</th>" + "".join(f"<td>{value:.1f}</td>" for value in values)
        + "</tr>"
        for layer, values in zip(attention.layers, measures.effective.mean(axis=-1), strict=True)
    )  # fmt: skip
    return (
        "<details><summary>effective keys, exp(entropy), mean over queries</summary>"
        f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table></details>"
    )


def _keys(attention: AttentionMap) -> str:
    if len(attention.documents) > 1:
        count = len(attention.keys) - attention.sink
        return f"{count} keys in {len(attention.documents)} documents, none of which sees another"
    if attention.sink:
        return f"{len(attention.keys) - 1} keys and the model's sink"
    return f"{len(attention.keys)} keys"


def _head(attention: AttentionMap, values: Array, index: np.intp) -> str:
    layer, head = np.unravel_index(int(index), values.shape)
    return f"layer {attention.layers[layer]} head {attention.heads[head]}"
