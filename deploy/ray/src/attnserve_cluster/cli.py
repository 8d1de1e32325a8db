"""The command `attnserve-cluster`."""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from attnserve_proto import commands
from attnserve_proto.commands import CommandError, Parser, values

from attnserve_cluster import __version__, follow_command, readers, up_command
from attnserve_cluster.connection import NoClusterError, answer, connect, find
from attnserve_cluster.table import table

_LOOK_SECONDS = 0.2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: of the command line; None: those of this process.

    Returns:
        The exit status: 0, 1 for what cannot be done, 2 for wrong arguments, 130 after an
        interruption.
    """
    return commands.run("attnserve-cluster", lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    words = sys.argv[1:] if arguments is None else list(arguments)
    # What is behind `--` is for the servers; argparse would mix it with what is its own.
    ours, dashes, server = words, False, list[str]()
    if "up" in words and "--" in words:
        at = words.index("--")
        ours, dashes, server = words[:at], True, words[at + 1 :]
    parsed = _parser().parse_args(ours)
    if dashes and parsed.command != "up":
        raise CommandError("--: given; allowed: behind `attnserve-cluster up`", 2)
    parsed.server = server
    status: int = parsed.run(parsed)
    return status


def _parser() -> Parser:
    parser = Parser(
        prog="attnserve-cluster",
        description="Servers of attnserve on a Ray cluster: placed by what they take of a node, "
        "started again, scaled by how long requests wait and KV sessions' pages, and found by "
        "clients.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    chosen = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, told, add in (
        ("up", "have servers, from now on", up_command.add_arguments),
        ("status", "how they are", _add_status),
        ("scale", "have more or fewer", _add_scale),
        ("follow", "keep a file of their addresses", follow_command.add_arguments),
        ("down", "drain them, and have none", _add_down),
    ):
        each = chosen.add_parser(name, help=told, allow_abbrev=False)
        each.add_argument(
            "--address",
            type=readers.address,
            default="auto",
            metavar="HOST:PORT",
            help="of the Ray cluster; auto: the one of this machine, or RAY_ADDRESS's",
        )
        each.add_argument(
            "--name", type=readers.name, default="attnserve", help="of the cluster; attnserve"
        )
        add(each)
    return parser


def _add_status(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.set_defaults(run=_status)


def _status(parsed: argparse.Namespace) -> int:
    connect(parsed.address)
    status = answer(parsed.name, find(parsed.name).status.remote())
    print(json.dumps(status, indent=2) if parsed.json else table(status))
    return 0


def _add_scale(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "servers",
        type=readers.bounds,
        metavar="SERVERS",
        help="N: so many whatever the load is; LEAST-MOST: by load",
    )
    parser.set_defaults(run=_scale)


def _scale(parsed: argparse.Namespace) -> int:
    connect(parsed.address)
    wanted = answer(parsed.name, find(parsed.name).scale.remote(parsed.servers))
    print(f"{parsed.name}: {wanted} wanted, of {parsed.servers}")
    return 0


def _add_down(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--wait",
        type=values.seconds,
        default=300.0,
        metavar="S",
        help="for the servers to drain; 300. Those that have not by then are killed",
    )
    parser.set_defaults(run=_down)


def _down(parsed: argparse.Namespace) -> int:
    connect(parsed.address)
    import ray

    controller = find(parsed.name)
    answer(parsed.name, controller.end.remote())
    until = time.monotonic() + parsed.wait
    while (left := _left(parsed.name, controller)) and time.monotonic() < until:
        time.sleep(_LOOK_SECONDS)
    for number in left:
        _kill(parsed.name, number)
    ray.kill(controller, no_restart=True)
    if left:
        killed = ", ".join(map(str, left))
        raise CommandError(f"servers {killed} had not drained after {parsed.wait:g} s: killed")
    return 0


def _left(name: str, controller: Any) -> list[int]:
    """Numbers of the servers that have not ended."""
    return [each["number"] for each in answer(name, controller.status.remote())["servers"]]


def _kill(name: str, number: int) -> None:
    import ray

    from attnserve_cluster.members import owner_name

    with contextlib.suppress(NoClusterError):  # it may have ended meanwhile
        ray.kill(find(owner_name(name, number)), no_restart=True)


if __name__ == "__main__":
    sys.exit(main())
