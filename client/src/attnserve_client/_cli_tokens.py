"""`attnserve tokens`: every option of `AttentionClient.attend_tokens`."""

import argparse
import dataclasses
from typing import Any

import numpy as np
from attnserve_proto.commands import CommandError, Progress, values

from attnserve_client import AttentionClient
from attnserve_client import token_texts as texts
from attnserve_client._cli_calls import add_model, save
from attnserve_client._errors import InvalidArgumentError
from attnserve_client._results import Array, TokensResult
from attnserve_client.command_options import add_output, add_what_is_read, ids, say_what_was_cut
from attnserve_client.command_tensors import add_tensors, given_tensor

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
_INPUTS = (
    "ids",
    "lengths",
    "tokens",
    "token_type_ids",
    "truncated",
    "target_ids",
    "target_tokens",
    "target_truncated",
)

# Texts of one request. More are several requests, one after the other, so that no answer is large
# and it can be said how far they are.
_AT_ONCE = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.description = (
        "Texts, pictures or sounds through a transformer model, and what each token attends to."
    )
    add = parser.add_argument
    add("texts", nargs="*", type=values.text, metavar="TEXT")
    add("--ids", type=ids, action="append", help="instead of a text, e.g. 101,2009,102; again ...")
    add_tensors(parser)
    add(
        "--pair",
        type=values.text,
        action="append",
        metavar="TEXT",
        help="a second text, which makes one sequence with TEXT; again for each",
    )
    add(
        "--token-type-ids",
        type=ids,
        action="append",
        metavar="N,N,...",
        help="of --ids: what kind of token each is; again for each",
    )
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


def _run(client: AttentionClient, options: argparse.Namespace) -> int:
    tensor = given_tensor(client, options)
    if bool(options.texts) + bool(options.ids) + bool(tensor) != 1:
        several = options.texts or options.ids or tensor
        raise ValueError(
            f"TEXT, --ids, --pixel-values, --input-features, --inputs-embeds: given "
            f"{'more than one' if several else 'none'}; allowed: one of them"
        )
    result = _asked(client, options, tensor)
    say_what_was_cut(result)
    for index in range(len(result.lengths)):
        if result.weights is not None:
            _print_weights(result, index, options)
        else:
            _print_shapes(result, index)
    if options.output:
        save(options.output, _arrays(result))
    return 0


def _asked(client: AttentionClient, options: argparse.Namespace, tensor: Any) -> TokensResult:
    """The answer for all texts or ids, of as many requests as they take, or for a tensor."""
    beside = {"token_type_ids": options.token_type_ids, "targets": options.target_text}
    if tensor:
        return _asked_at_once(client, options, tensor, beside)
    inputs = _inputs(options)
    # Another number of them than of texts is refused as one request is.
    apart = all(len(each) == len(inputs) for each in beside.values() if each is not None)
    at_once = _AT_ONCE if apart else len(inputs)
    parts = []
    with Progress(len(inputs), "texts") as progress:
        for start in range(0, len(inputs), at_once):
            of_part = slice(start, start + at_once)
            try:
                more = {name: each and each[of_part] for name, each in beside.items()}
                parts.append(_asked_at_once(client, options, inputs[of_part], more))
            except InvalidArgumentError as error:
                if not start:
                    raise
                raise CommandError(
                    f"{error}, counted from text {start}; see `attnserve tokens --help`"
                ) from None
            progress.step(count=len(parts[-1].ids))
    return _joined(parts)


def _asked_at_once(
    client: AttentionClient,
    options: argparse.Namespace,
    inputs: Any,
    beside: dict[str, Any],
) -> TokensResult:
    return client.attend_tokens(
        inputs,
        model=options.model,
        version=options.version or "",
        variant=options.variant or "",
        **beside,
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


def _joined(parts: list[TokensResult]) -> TokensResult:
    """One answer of several for the same model, but for its timings."""
    if len(parts) == 1:
        return parts[0]
    lists: dict[str, list[Array]] = {}
    for name in (*_INPUTS, *_RESULTS):
        found = [getattr(part, name) for part in parts]
        if found[0] is not None:
            lists[name] = [each for part in found for each in part]
    return dataclasses.replace(parts[0], **lists)  # type: ignore[arg-type]


def _inputs(options: argparse.Namespace) -> Any:
    if options.pair is None:
        return options.texts or options.ids
    if len(options.pair) != len(options.texts):
        raise ValueError(
            f"--pair: given {len(options.pair)} for {len(options.texts)} texts; allowed: one each"
        )
    return list(zip(options.texts, options.pair, strict=True))


def _arrays(result: TokensResult) -> dict[str, Array]:
    arrays: dict[str, Array] = {}
    for index, ids_ in enumerate(result.ids):
        if result.source is None:
            arrays[f"ids_{index}"] = np.asarray(ids_)
        if result.source is None and any(result.token_type_ids[index]):
            arrays[f"token_type_ids_{index}"] = np.asarray(result.token_type_ids[index])
        for name in _RESULTS:
            found = getattr(result, name)
            if found is not None:
                arrays[f"{name}_{index}"] = found[index]
    return arrays


def _print_shapes(result: TokensResult, index: int) -> None:
    print(" ".join(texts.axes_of(result, index, "encoder")[1]))
    for name in _RESULTS:
        found = getattr(result, name)
        if found is not None:
            print(f"  {name}: {list(found[index].shape)} {found[index].dtype}")


def _print_weights(result: TokensResult, index: int, options: argparse.Namespace) -> None:
    names = texts.axes_of(result, index)
    queries, keys = map(texts.shown, names)
    asked = [
        at
        for at, pair in enumerate(zip(names[0], queries, strict=True))
        if options.query is None or options.query in pair
    ]
    if not asked:
        raise ValueError(f"--query: given {options.query!r}; allowed: one of {' '.join(queries)}")
    assert result.weights is not None
    weights = result.weights[index].mean(axis=1)  # (L, Sq, Sk), averaged over heads
    print(" ".join(queries))
    for query in asked:
        for layer, number in enumerate(result.layers):
            heaviest = np.argsort(-weights[layer, query], kind="stable")[: options.top]
            seen = "  ".join(f"{keys[key]} {weights[layer, query, key]:.2f}" for key in heaviest)
            print(f"  {queries[query]:>12}  layer {number}: {seen}")
