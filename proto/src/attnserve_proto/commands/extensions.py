"""What another distribution adds, if it is installed: found by its entry points."""

import argparse
from importlib.metadata import entry_points
from typing import Any

from attnserve_proto.commands.running import CommandError, Parser

# Options have no letter to begin with: whatever follows the command is taken, and not looked at.
_NO_PREFIX = "\0"


def extension(group: str, name: str) -> Any | None:
    """What an installed distribution gives under a name.

    Args:
        group: of entry points, such as `attnserve.commands`.
        name: of one in it.

    Returns:
        The object, imported now; None where no distribution has one.
    """
    for found in entry_points(group=group, name=name):
        return found.load()
    return None


def add_missing_command(
    parsers: "argparse._SubParsersAction[Parser]", name: str, install: str, **options: Any
) -> None:
    """Add a command that a distribution not installed has: it says what to install.

    Args:
        parsers: of the program's commands.
        name: of the command.
        install: what pip is to install.
        options: of the command's parser.
    """
    parser = parsers.add_parser(name, prefix_chars=_NO_PREFIX, add_help=False, **options)
    parser.add_argument("ignored", nargs="*")

    def refuse(*_: Any) -> int:
        raise CommandError(f"{name} is not installed; `pip install '{install}'`")

    parser.set_defaults(run=refuse)
