"""The `attnserve` command: its arguments, and how it ends."""

import argparse
import sys
from collections.abc import Sequence

import grpc
from attnserve_proto import commands
from attnserve_proto.commands import (
    CommandError,
    Parser,
    access_of,
    add_access,
    add_missing_command,
    extension,
    values,
)

from attnserve_client import AttentionClient, AttnserveError, __version__, _cli_calls, _cli_tokens

_HELP = """\
Look at an attention server, and call it.

what a server has:
  info       the server and its models

attention:
  attend     of query, key and value: from a file, or random
  tokens     of texts, by a transformer model: what each token attends to
  inspect    of texts, as one HTML page to look at, or live with --serve

`attnserve COMMAND --help` explains each. Beside it there are attnserve-export (make models),
attnserve-server (serve them) and attnserve-loadtest (measure them).
"""

_WHAT_TO_DO = {
    grpc.StatusCode.UNAVAILABLE: "start one with `attnserve-server --repository DIR`, or say where "
    "one is with --target, and with --ca if it wants TLS",
    grpc.StatusCode.DEADLINE_EXCEEDED: "give it more time with --timeout, or less to do",
    grpc.StatusCode.NOT_FOUND: "`attnserve info` lists what there is",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "ask for less at once, or try again later",
    grpc.StatusCode.UNIMPLEMENTED: "--target must name an attnserve server of this version",
    grpc.StatusCode.UNAUTHENTICATED: "say who calls with --token-file, or --certificate and --key",
    grpc.StatusCode.PERMISSION_DENIED: "ask whoever runs the server for the role",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code: 0 fine, 1 the call failed, 2 wrong arguments, 130 Ctrl-C."""
    return commands.run("attnserve", lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    options = _parser().parse_args(arguments)
    where = f"see `attnserve {options.command} --help`"
    try:
        if getattr(options, "output", None) is not None:
            commands.check_file(options.output_option, options.output)
        access = access_of(options, [options.target])
        with AttentionClient(options.target, **access.of_client()) as client:
            code: int = options.run(client, options)
            return code
    except AttnserveError as error:
        raise CommandError(f"{error}; {_WHAT_TO_DO.get(error.code, where)}") from None
    except (TypeError, ValueError, KeyError) as error:
        raise CommandError(f"{error}; {where}", 2) from None


def _parser() -> Parser:
    parser = Parser(
        prog="attnserve",
        usage="attnserve [--target HOST:PORT] [--timeout SECONDS] [--ca FILE] COMMAND ...",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"attnserve {__version__}")
    _add_common(parser, "127.0.0.1:8001", 60.0)
    add_access(parser, shown=False)
    found = parser.add_subparsers(
        required=True, dest="command", metavar="COMMAND", help=argparse.SUPPRESS
    )
    for name, add in (
        ("info", _cli_calls.add_info),
        ("attend", _cli_calls.add_attend),
        ("tokens", _cli_tokens.add_arguments),
        ("inspect", extension("attnserve.commands", "inspect")),
    ):
        if add is None:
            add_missing_command(found, name, "attnserve-client[lens]")
            continue
        one = found.add_parser(name, prog=f"attnserve {name}")
        add(one)
        # In both places: the one after the command, if it is given, wins.
        _add_common(one, argparse.SUPPRESS, argparse.SUPPRESS)
        add_access(one, default=argparse.SUPPRESS)
    return parser


def _add_common(parser: argparse.ArgumentParser, target: str, timeout: float | str) -> None:
    parser.add_argument(
        "--target",
        type=values.target,
        default=target,
        metavar="HOST:PORT",
        help="of the server; default 127.0.0.1:8001",
    )
    parser.add_argument(
        "--timeout",
        type=values.some_seconds,
        default=timeout,
        metavar="SECONDS",
        help="of each call; default 60",
    )


if __name__ == "__main__":
    sys.exit(main())
