"""The command `attnserve-cluster follow`."""

import argparse
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from attnserve_proto.commands import CommandError, check_file, replacing, values

from attnserve_cluster.connection import NoAnswerError, NoClusterError, answer, connect, find

_WAIT_SECONDS, _ANSWER_SECONDS, _PAUSE_SECONDS = 20.0, 40.0, 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.description = (
        "Writes the addresses of the servers that serve into a file, one a line, as often as they "
        "change, until SIGTERM or Ctrl-C: for clients of file:///FILE."
    )
    parser.add_argument("file", type=values.path, metavar="FILE", help="is replaced, as a whole")
    parser.add_argument("--once", action="store_true", help="write it once, and end")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Run the command.

    Raises:
        CommandError: there is no such cluster; without --once, at the beginning.
    """
    check_file("FILE", parsed.file)
    connect(parsed.address)
    find(parsed.name)
    terminated = threading.Event()

    def terminate(*_: object) -> None:
        terminated.set()
        raise KeyboardInterrupt  # which is what Ray lets through

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        return _follow(parsed.name, parsed.file, once=parsed.once)
    except KeyboardInterrupt:
        if terminated.is_set():
            return 0  # as a service is ended
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _follow(name: str, path: Path, *, once: bool) -> int:
    known: tuple[str, ...] | None = None
    troubled = False
    while True:
        try:
            asked = find(name).addresses.remote(known, _WAIT_SECONDS)
            now = answer(name, asked, _ANSWER_SECONDS)
        except (NoClusterError, NoAnswerError) as error:
            if once:
                raise
            if not troubled:
                print(f"attnserve-cluster: {error}; trying again", file=sys.stderr)
            troubled = True
            time.sleep(_PAUSE_SECONDS)
            continue
        troubled = False
        if now is None and once:
            raise CommandError(f"{name}: it is not known yet where its servers are")
        if now is not None and now != known:
            _write(path, name, now)
            known = now
        if once:
            return 0


def _write(path: Path, name: str, addresses: Sequence[str]) -> None:
    with replacing(path) as beside:
        lines = [f"# servers of {name}, by attnserve-cluster follow", *addresses]
        beside.write_text("\n".join(lines) + "\n")
