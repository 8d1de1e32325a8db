"""`attnserve inspect`: texts in, one page out; or a live page that is served here."""

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from attnserve_client import AttentionClient, TokensResult
from attnserve_client.command_options import add_output, add_what_is_read, ids, say_what_was_cut
from attnserve_client.command_tensors import add_tensors, given_tensor
from attnserve_proto.commands import Progress, values

from attnserve_lens.asking import heads_at_once, layer_of, sequence_of
from attnserve_lens.live import Viewer
from attnserve_lens.page import write_page
from attnserve_lens.serve import serve

# Weights of one page, all texts together: 12 layers of 12 heads at 512 tokens are 38 million and
# make a file of 36 MB, which opens in a second; browsers get slow far above.
_MOST_WEIGHTS = 200_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.description = (
        "Writes one HTML page that shows the attention of texts, pictures or sounds: every layer "
        "and head, token to token, as a map, query by query, how thin it is spread and where it "
        "gathers. The page loads nothing from elsewhere."
    )
    add = parser.add_argument
    add("texts", nargs="*", type=values.text, metavar="TEXT", help="- reads standard input")
    add("--model", type=values.name, help="`attnserve info` lists them")
    add_output(parser, "--out", "PAGE.html", "the page to write")
    add(
        "--serve",
        action="store_true",
        help="instead of writing a page, serve one on this machine where texts are typed and "
        "models picked, until Ctrl-C",
    )
    add("--port", type=values.integer(0, 65535), help="of --serve; default: a free one")
    add(
        "--file",
        type=values.path,
        action="append",
        default=[],
        help="a text from a file, in UTF-8; again for more",
    )
    add("--pair", type=values.text, metavar="TEXT", help="a second text behind the (only) first")
    add(
        "--packed",
        action="store_true",
        help="several texts as one packed sequence: one map with a block for each of them",
    )
    add("--ids", type=ids, help="token ids instead of texts, e.g. 101,2009,102")
    add_tensors(parser)
    add_what_is_read(parser)
    add("--title", type=values.title, default="", help="of the page; default: model and text")
    parser.set_defaults(run=run)


def run(client: AttentionClient, options: argparse.Namespace) -> int:
    """Run the command.

    Raises:
        ValueError: the options do not go together, or there would be too much to show.
        AttnserveError: the server refused.
    """
    if options.serve:
        return _serve(client, options)
    for option, given in (("--model", options.model), ("--out", options.output)):
        if given is None:
            raise ValueError(f"{option}: missing; allowed to be left out with --serve alone")
    if options.port is not None:
        raise ValueError("--port: given without --serve; allowed: with it")
    texts, tensor = _texts(options), given_tensor(client, options)
    if tensor and (texts or options.ids is not None or options.pair is not None):
        raise ValueError("--pixel-values, ...: given with a text; allowed: one of the two")
    if options.packed and (len(texts) < 2 or options.pair is not None):
        given = "--pair" if options.pair is not None else f"{len(texts)} texts"
        raise ValueError(f"--packed: given with {given}; allowed: with 2 texts or more")
    results = collect(
        client,
        tensor or _inputs(options, texts),
        model=options.model,
        targets=options.target_text,
        layers=options.layers,
        heads=options.heads,
        truncate=options.truncate,
        packed=options.packed,
        timeout=options.timeout,
    )
    say_what_was_cut(results[0])
    names = [" ".join([*texts, options.pair])] if options.pair else texts
    path = write_page(
        results, options.output, title=options.title, names=names, packed=options.packed
    )
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    return 0


def collect(
    client: AttentionClient,
    inputs: Sequence[str] | Sequence[tuple[str, str]] | Sequence[Sequence[int]] | Mapping[str, Any],
    *,
    model: str,
    targets: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    truncate: bool | None = None,
    packed: bool = False,
    timeout: float = 60.0,
) -> list[TokensResult]:
    """Weights of texts or ids, one layer of one sequence a request, so that no answer is large.

    Args:
        client: connected.
        inputs: as `attend_tokens` takes them; of pictures and sounds, a mapping with the tensor.
        model: its name.
        targets: for an encoder-decoder, what its decoder reads.
        layers, heads: 0-based; None is all.
        truncate: cut texts that are too long, or refuse them; None is as the checkpoint does.
        packed: whether all will be shown in one map, which has room for weights between them.
        timeout: seconds that each request may take.

    Returns:
        A result for each of the model's attentions: one, an encoder-decoder's three, or the two of
        a decoder that is given what an encoder has made.

    Raises:
        ValueError: more weights than a page can show.
        AttnserveError: the server refused.
    """
    asked = client.get_model(model, timeout=timeout)
    more: dict[str, Any] = {} if targets is None else {"targets": targets}
    # Ids first: the lengths are known before any weight is asked for.
    found = client.attend_tokens(
        inputs,
        model=model,
        return_hidden=False,
        return_weights=False,
        truncate=truncate,
        timeout=timeout,
        **more,
    )
    target_ids, lengths = found.target_ids, found.lengths
    listed: tuple[Any, ...] = asked.attentions or (asked,)
    _check_size(lengths, target_ids, listed, layers, heads, packed=packed)
    wanted_layers = [
        list(range(each.num_layers)) if layers is None else list(layers) for each in listed
    ]
    results = []
    with Progress(len(lengths) * sum(map(len, wanted_layers)), "layers of texts") as progress:
        for attention, shown in zip(listed, wanted_layers, strict=True):
            shown_heads = list(range(attention.num_heads)) if heads is None else list(heads)
            # A model with one attention is not asked which.
            name = attention.name if len(listed) > 1 else ""
            weights = []
            for index, length in enumerate(lengths):
                target = target_ids[index] if index < len(target_ids) else []
                at_once = heads_at_once(client, max(length, len(target)), timeout)
                rows, source = [], _sequence(found, index)
                for layer in shown:
                    row, last = layer_of(
                        client,
                        source,
                        target,
                        model=model,
                        attention=name,
                        layer=layer,
                        heads=shown_heads,
                        at_once=at_once,
                        timeout=timeout,
                    )
                    rows.append(row)
                    progress.step()
                weights.append(np.stack(rows))
            results.append(
                dataclasses.replace(
                    found,
                    variant=last.variant,
                    timings=last.timings,
                    attention=name,
                    weights=weights,
                    layers=shown,
                    heads=shown_heads,
                )
            )
    return results


def _sequence(found: TokensResult, index: int) -> dict[str, Any]:
    """One sequence of a result, as `attend_tokens` takes it."""
    if found.source is None or found.given is None:
        return sequence_of(found.ids[index], found.token_type_ids[index])
    given = found.given[index : index + 1]
    if found.source.tokens is None:  # padded to the longest
        given = given[:, : found.lengths[index]]
    return {found.source.name: given}


def _check_size(
    source_lengths: Sequence[int],
    target_ids: Sequence[Sequence[int]],
    attentions: Sequence[Any],
    layers: Sequence[int] | None,
    heads: Sequence[int] | None,
    *,
    packed: bool,
) -> None:
    lengths = [
        max([length, *map(len, target_ids[index : index + 1])])
        for index, length in enumerate(source_lengths)
    ]
    maps = sum(
        len(layers or range(each.num_layers)) * len(heads or range(each.num_heads))
        for each in attentions
    )
    squares = [sum(lengths)] if packed else lengths
    total = sum(length * length for length in squares) * maps
    if total > _MOST_WEIGHTS:
        raise ValueError(
            f"{maps} heads in all layers together, at {lengths} tokens, are {total:,} weights; "
            f"allowed: {_MOST_WEIGHTS:,}; use --layers, --heads or shorter texts"
        )


def _texts(options: argparse.Namespace) -> list[str]:
    texts = [_standard_input() if text == "-" else text for text in options.texts]
    return texts + [_read(path) for path in options.file]


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise ValueError(f"--file: given {path}: {error.strerror}; allowed: a text file") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--file: given {path}: byte {error.start} is not UTF-8; allowed: text in UTF-8"
        ) from None


def _standard_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"-: byte {error.start} of standard input is not UTF-8; allowed: text in UTF-8"
        ) from None


def _inputs(
    options: argparse.Namespace, texts: list[str]
) -> list[str] | list[tuple[str, str]] | list[list[int]]:
    if options.ids is not None:
        if texts or options.pair is not None:
            raise ValueError("--ids: given with a text; allowed: one of the two")
        return [options.ids]
    if not texts:
        raise ValueError("nothing to show; give a text, -, --file or --ids")
    if options.pair is None:
        return texts
    if len(texts) != 1:
        raise ValueError(f"--pair: given with {len(texts)} texts; allowed: 1")
    return [(texts[0], options.pair)]


def _serve(client: AttentionClient, options: argparse.Namespace) -> int:
    """Serve the live page until it is interrupted."""
    for option, given in (
        ("--out", options.output),
        ("--file", options.file),
        ("--packed", options.packed),
        ("--ids", options.ids),
        ("--layers", options.layers),
        ("--heads", options.heads),
        ("--target-text", options.target_text),
        ("--truncate", options.truncate),
        ("--title", options.title),
        ("--pixel-values", options.pixel_values),
        ("--input-features", options.input_features),
        ("--inputs-embeds", options.inputs_embeds),
        ("--encoder-hidden-states", options.encoder_hidden_states),
        ("--processor", options.processor),
    ):
        if given:
            raise ValueError(f"{option}: given with --serve; allowed: without it")
    if len(options.texts) > 1:
        raise ValueError(f"TEXT: {len(options.texts)} given with --serve; allowed: 1 or none")
    first = {
        "text": options.texts[0] if options.texts else "",
        "pair": options.pair or "",
        "model": options.model or "",
    }
    serve(Viewer(client, options.timeout), first, options.port or 0)
    return 0
