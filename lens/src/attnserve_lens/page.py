"""The page of `attnserve inspect`: one HTML file that loads nothing."""

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from attnserve_client import AttendResult, TokensResult
from attnserve_client import token_texts as texts
from attnserve_proto.commands import replacing

from attnserve_lens import documents, encoding, seen
from attnserve_lens.attention import AttentionMap, Axes, maps_of
from attnserve_lens.measures import Measures, measure, per_head
from attnserve_lens.summary import facts_of, sentences_of

# One script of several files: their order is that of their declarations.
_SCRIPTS = (
    "colour", "data", "dom", "overview", "tokens", "heatmap", "query", "spread", "sinks", "seen",
)  # fmt: skip
_TITLES = {
    "self": "self-attention",
    "encoder": "encoder self-attention",
    "decoder": "decoder self-attention",
    "cross": "cross-attention, decoder to encoder",
}
_NAME_LENGTH = 60


Result = TokensResult | AttendResult


def write_page(
    results: Result | Sequence[Result],
    path: str | Path,
    *,
    title: str = "",
    names: Sequence[str] = (),
    packed: bool = False,
) -> Path:
    """Write the page of results to a file, in one step; `page_of` says what is on it.

    Raises:
        ValueError: a result has no weights.
        OSError: the file cannot be written.
    """
    path, page = Path(path), page_of(results, title=title, names=names, packed=packed)
    with replacing(path) as beside:
        beside.write_text(page, "utf-8")
    return path


def page_of(
    results: Result | Sequence[Result],
    *,
    title: str = "",
    names: Sequence[str] = (),
    packed: bool = False,
) -> str:
    """The page that shows the attention of a result: self-contained, without any network access.

    Args:
        results: with weights; several are the attentions of one model over the same input, like
            an encoder-decoder's.
        title: of the page; empty: the model and the text.
        names: the texts themselves, to call them by; without them, what their tokens spell.
        packed: show all sequences in one map, as documents none of which sees another; not of
            pictures and sounds.

    Raises:
        ValueError: a result has no weights, or what is packed is no text.
    """
    listed = [results] if isinstance(results, TokensResult | AttendResult) else list(results)
    count = len(listed[0].weights) if listed[0].weights is not None else 1
    shown = [[each for result in listed for each in maps_of(result, n)] for n in range(count)]
    if packed:
        if isinstance(listed[0], TokensResult) and listed[0].source is not None:
            raise ValueError(
                f"packed: given of {listed[0].source.name}; allowed: of texts and token ids"
            )
        shown = [[documents.packed(each) for each in zip(*shown, strict=True)]]
        names = [" / ".join(names)] if names else ()
    return "".join(_parts(listed[0], shown, title, names))


def _parts(
    result: Result, shown: Sequence[Sequence[AttentionMap]], title: str, names: Sequence[str]
) -> Iterator[str]:
    sequences: list[dict[str, Any]] = []
    blocks: list[str] = []
    sentences: list[str] = []
    for index, found in enumerate(shown):
        maps: list[dict[str, Any]] = []
        for attention in found:
            name = f"s{index}m{len(maps)}"
            measures = measure(attention)
            bits = encoding.code_bits(attention.weights.size)
            described = describe(attention.axes, name, bits)
            maps.append({**described, "measures": _numbers(measures)})
            blocks += _blocks(attention, measures, name, bits)
            if index == 0:
                sentences += sentences_of(attention, measures)
        source = seen.seen(result, index)
        text = names[index] if index < len(names) else _spoken(source, found, index)
        described_seen = None
        if source is not None:
            described_seen = seen.described(source, f"s{index}seen")
            blocks.append(_block(f"s{index}seen", encoding.pack_bytes(seen.content_of(source))))
        sequences.append({"name": cut(text), "maps": maps, "seen": described_seen})
    meta = json_of({"sequences": sequences})
    yield from assemble(
        _SCRIPTS,
        title=title or f"{result.model}: {sequences[0]['name']}",
        facts=facts_of(result),
        summary=f"<ul>{''.join(f'<li>{html.escape(each)}</li>' for each in sentences)}</ul>",
        precision=_precision(sequences),
        data="\n".join((f'<script type="application/json" id="meta">{meta}</script>', *blocks)),
    )


def assemble(
    scripts: Sequence[str],
    *,
    title: str,
    facts: str,
    summary: str,
    precision: str,
    data: str,
    form: str = "",
    connect: str = "'none'",
) -> Iterator[str]:
    """The parts of a page.

    Args:
        scripts: names of its scripts, in the order of their declarations; `main` follows them.
        title, facts, precision: texts.
        summary, data, form: markup.
        connect: what the page may fetch, as its Content-Security-Policy says it.
    """
    script = "(() => {\n" + "\n".join(_asset(f"{name}.js") for name in (*scripts, "main")) + "})();"
    script, style = f'"use strict";\n{script}\n', _asset("style.css")
    values = {
        "title": html.escape(title),
        "facts": html.escape(facts),
        "summary": summary,
        "precision": html.escape(precision),
        "form": form,
        "connect": connect,
        "style": style,
        "style_hash": _hash(style),
        "script": script,
        "script_hash": _hash(script),
        "data": data,
    }
    # One pass: what is put in is not looked at again.
    for index, part in enumerate(re.split(r"\{\{(\w+)\}\}", _asset("template.html"))):
        yield values[part] if index % 2 else part


def live_page(title: str, facts: str, live: dict[str, Any]) -> str:
    """The page that asks the server behind it for what it shows.

    Args:
        title, facts: texts.
        live: what the form offers: models, and what it holds at first.
    """
    return "".join(
        assemble(
            (*_SCRIPTS, "live"),
            title=title,
            facts=facts,
            summary="",
            precision="Weights are packed with 16 bits, or with 8 where a layer has many: off by "
            "at most 0.4 % of the heaviest weight of their row. Effective keys and means are "
            "computed from the exact weights.",
            data=f'<script type="application/json" id="meta">{json_of({"live": live})}</script>',
            form=_asset("live.html"),
            connect="'self'",
        )
    )


def describe(axes: Axes, name: str, bits: int) -> dict[str, Any]:
    """What the script must know of a map before it unpacks anything; measures come beside.

    Args:
        axes: of the map.
        name: of its blocks.
        bits: of a code, see `encoding`.
    """
    special = [index for index, key in enumerate(axes.keys) if texts.is_special(key)]
    own = {index for index, query in enumerate(axes.queries) if texts.is_special(query)}
    ordinary = [index for index in range(len(axes.queries)) if index not in own]
    lengths = (len(axes.queries), len(axes.keys))
    return {
        "name": name,
        "title": _TITLES.get(axes.kind, axes.kind),
        "queries": texts.shown(axes.queries),
        "keys": texts.shown(axes.keys),
        "square": axes.square,
        "layers": axes.layers,
        "heads": axes.heads,
        "split": axes.split,
        "documents": axes.documents,
        # Whether queries and keys are what the model saw or heard, where that is shown.
        "over": {
            "queries": axes.kind in ("self", "encoder"),
            "keys": axes.kind in ("self", "encoder", "cross"),
        },
        "sink": len(axes.keys) - 1 if axes.sink else None,
        "special": special,
        "bits": bits,
        "thumbnail": tuple(map(encoding.thumbnail_size, lengths)),
        "first_query": ordinary[len(ordinary) // 2] if ordinary else 0,
    }


def _spoken(
    shown: seen.Picture | seen.Sound | None, maps: Sequence[AttentionMap], index: int
) -> str:
    """What to call a sequence that has no name."""
    if shown is None:
        return texts.text_of(maps[0].keys)
    return f"{'picture' if isinstance(shown, seen.Picture) else 'sound'} {index}"


def _numbers(measures: Measures) -> dict[str, Any]:
    return {
        each: None if values is None else np.round(values.astype(float), 5).tolist()
        for each, values in per_head(measures).items()
    }


def _blocks(attention: AttentionMap, measures: Measures, name: str, bits: int) -> Iterator[str]:
    parts = {
        "effective": encoding.pack_floats(measures.effective),
        "visible": encoding.pack_floats(measures.visible),
        "received": encoding.pack_floats(measures.received),
        "thumbnails": encoding.pack_thumbnails(attention.weights),
    }
    for part, content in parts.items():
        yield _block(f"{name}-{part}", content)
    for layer, weights in enumerate(attention.weights):
        yield _block(f"{name}-layer-{layer}", encoding.pack_layer(weights, bits))


def _block(name: str, content: str) -> str:
    return f'<script type="text/plain" id="{name}">{content}</script>'


def _precision(sequences: list[dict[str, Any]]) -> str:
    bits = max(map(encoding.largest_code, (m["bits"] for s in sequences for m in s["maps"][:1])))
    coarsest = min(m["bits"] for s in sequences for m in s["maps"])
    share = 100 / encoding.largest_code(coarsest) if bits else 0
    return (
        f"Weights are packed with {coarsest} bits: off by at most {share:.2g} % of the heaviest "
        "weight of their row. Effective keys and means are computed from the exact weights. "
        "This file loads nothing and sends nothing."
    )


def cut(text: str) -> str:
    """A text as a name: one line, not long."""
    said = texts.displayable(" ".join(text.split()))
    return said if len(said) <= _NAME_LENGTH else said[: _NAME_LENGTH - 1] + "…"


def json_of(content: Any) -> str:
    """JSON that no HTML parser takes for markup."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    # Surrogates that stand alone cannot be written as UTF-8.
    return re.sub(r"[\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text)


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath("page_assets", name).read_text("utf-8")


def _hash(content: str) -> str:
    """The content's hash as a Content-Security-Policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode("ascii")
