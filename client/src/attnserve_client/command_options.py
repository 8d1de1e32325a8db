"""What commands of `attnserve` have alike, those of other distributions too."""

import argparse
import sys

from attnserve_proto.commands import values

from attnserve_client._results import TokensResult


def add_output(
    parser: argparse.ArgumentParser, option: str, kind: str, what: str, *, required: bool = False
) -> None:
    """A file to write, which is looked at before any work."""
    parser.add_argument(
        option, dest="output", type=values.path, required=required, metavar=kind, help=what
    )
    parser.set_defaults(output_option=option)


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
        "--truncate",
        action=argparse.BooleanOptionalAction,
        help="cut texts that are too long, or refuse them; default: as the model's checkpoint does",
    )
    indices = values.listed(values.integer(0))
    parser.add_argument("--layers", type=indices, metavar="N,N,...", help="e.g. 0,5; default all")
    parser.add_argument("--heads", type=indices, metavar="N,N,...", help="e.g. 0,5; default all")


def ids(given: str) -> list[int]:
    """Token ids between commas, in their order."""
    read = values.integer(0)
    return [read(part.strip()) for part in given.split(",")]


def say_what_was_cut(result: TokensResult) -> None:
    """Say on standard error which texts were longer than the model takes."""
    for index, cut in enumerate(result.truncated):
        if cut:
            kept = len(result.ids[index])
            print(f"attnserve: text {index} was cut to {kept} tokens", file=sys.stderr)
