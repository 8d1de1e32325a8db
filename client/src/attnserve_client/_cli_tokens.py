"""`attnserve tokens`: every option of `AttentionClient.attend_tokens`."""

import argparse
import sys

import numpy as np
from attnserve_proto.commands import values

from attnserve_client import AttentionClient
from attnserve_client._cli_calls import add_model, add_output, save
from attnserve_client._inspect import tokens as texts
from attnserve_client._inspect.attention import AttentionMap, maps_of
from attnserve_client._results import Array, TokensResult

_RESULTS = (
    "hidden",
    "pooled",
    "weights",
    "entropy",
    "effective_context",
    "mass_by_distance",
    "mass_on_first",
    "encoder_hidden",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.description = "Texts through a transformer model, and what each token attends to."
    add = parser.add_argument
    add("texts", nargs="*", type=values.text, metavar="TEXT")
    add("--ids", type=ids, action="append", help="instead of a text, e.g. 101,2009,102; again ...")
    add_model(parser)
    add("--attention", choices=("encoder", "decoder", "cross"), default="", help="of several")
    add_what_is_read(parser)
    add("--query", type=values.text, help="show what this token attends to (default: every token)")
    add("--top", type=values.integer(1), default=5, help="how many tokens to show; default 5")
    flag = argparse.BooleanOptionalAction
    add("--hidden", action=flag, default=True, help="hidden states, for --output")
    add("--pooled", action="store_true", help="also one vector for each text")
    add("--weights", action=flag, default=True, help="attention weights: what is shown")
    add("--entropy", action="store_true", help="also the entropy of each query's weights, nats")
    add("--effective-context", action="store_true", help="also its exponential")
    add("--mass-by-distance", type=values.integer(0), default=0, help="also over so many distances")
    add("--mass-on-first", type=values.integer(0), default=0, help="also on so many first keys")
    add_output(parser, "--output", "FILE.npz", "write all that to")
    parser.set_defaults(run=_run)


def add_what_is_read(parser: argparse.ArgumentParser) -> None:
    """What is read beside the texts, and which layers and heads are asked for."""
    parser.add_argument(
        "--target-text",
        type=values.text,
        action="append",
        metavar="TEXT",
        help="what the decoder of an encoder-decoder reads; again for each text",
    )
    parser.add_argument(
        "--truncate", action="store_true", help="cut texts that are too long for the model"
    )
    indices = values.listed(values.integer(0))
    parser.add_argument("--layers", type=indices, metavar="N,N,...", help="e.g. 0,5; default all")
    parser.add_argument("--heads", type=indices, metavar="N,N,...", help="e.g. 0,5; default all")


def ids(given: str) -> list[int]:
    """Token ids between commas, in their order."""
    read = values.integer(0)
    return [read(part.strip()) for part in given.split(",")]


def _run(client: AttentionClient, options: argparse.Namespace) -> int:
    if bool(options.texts) == bool(options.ids):
        given = "both" if options.texts else "neither"
        raise ValueError(f"TEXT, --ids: given {given}; allowed: one of the two")
    result = client.attend_tokens(
        options.texts or options.ids,
        model=options.model,
        version=options.version or "",
        variant=options.variant or "",
        targets=options.target_text,
        attention=options.attention,
        layers=options.layers,
        heads=options.heads,
        return_hidden=options.hidden,
        return_pooled=options.pooled,
        return_weights=options.weights,
        return_entropy=options.entropy,
        return_effective_context=options.effective_context,
        mass_by_distance=options.mass_by_distance,
        mass_on_first=options.mass_on_first,
        truncate=options.truncate,
        timeout=options.timeout,
    )
    say_what_was_cut(result)
    for index in range(len(result.ids)):
        if result.weights is not None:
            _print_weights(maps_of(result, index)[0], options)
        else:
            _print_shapes(result, index)
    if options.output:
        save(options.output, _arrays(result))
    return 0


def say_what_was_cut(result: TokensResult) -> None:
    """Say on standard error which texts were longer than the model takes."""
    for index, cut in enumerate(result.truncated):
        if cut:
            kept = len(result.ids[index])
            print(f"attnserve: text {index} was cut to {kept} tokens", file=sys.stderr)


def _arrays(result: TokensResult) -> dict[str, Array]:
    arrays: dict[str, Array] = {}
    for index, ids_ in enumerate(result.ids):
        arrays[f"ids_{index}"] = np.asarray(ids_)
        for name in _RESULTS:
            found = getattr(result, name)
            if found is not None:
                arrays[f"{name}_{index}"] = found[index]
    return arrays


def _print_shapes(result: TokensResult, index: int) -> None:
    print(" ".join(result.tokens[index] or map(str, result.ids[index])))
    for name in _RESULTS:
        found = getattr(result, name)
        if found is not None:
            print(f"  {name}: {list(found[index].shape)} {found[index].dtype}")


def _print_weights(attention: AttentionMap, options: argparse.Namespace) -> None:
    queries, keys = texts.shown(attention.queries), texts.shown(attention.keys)
    asked = [
        at
        for at, pair in enumerate(zip(attention.queries, queries, strict=True))
        if options.query is None or options.query in pair
    ]
    if not asked:
        raise ValueError(f"--query: given {options.query!r}; allowed: one of {' '.join(queries)}")
    weights = attention.weights.mean(axis=1)  # (L, Sq, Sk), averaged over heads
    print(" ".join(queries))
    for query in asked:
        for layer, number in enumerate(attention.layers):
            heaviest = np.argsort(-weights[layer, query], kind="stable")[: options.top]
            seen = "  ".join(f"{keys[key]} {weights[layer, query, key]:.2f}" for key in heaviest)
            print(f"  {queries[query]:>12}  layer {number}: {seen}")
