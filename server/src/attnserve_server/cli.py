"""The `attnserve-server` command."""

import os
import resource
import signal
import sys
import threading
from collections.abc import Sequence

from attnserve_proto import commands
from attnserve_proto.commands import CommandError, Loading
from attnserve_proto.manifest import ManifestError

from attnserve_server import __version__, configuration, logs
from attnserve_server.settings import Settings, SettingsError

_DESCRIPTORS = 65_536


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; the exit code: 0 after a drain, 1 if it cannot start.

    A computation that does not end lets the process exit with 70, see `watchdog`.
    """
    return commands.run("attnserve-server", lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words[:1] == ["make-token"]:
        from attnserve_server.callers import make_token_command

        return make_token_command(words[1:])
    settings = configuration.read(words, os.environ)
    logs.configure(settings.log_format, settings.log_level)
    serve(settings)
    return 0


class StartError(CommandError):
    """The server cannot start; the message says why, and what to do."""


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then drain.

    Raises:
        StartError: it cannot start.
    """
    _allow_descriptors()
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        with Loading():
            from attnserve_server.app import AttentionServer
    except ImportError as error:
        raise StartError(
            f"{error}; the server needs attnserve-dataplane: `pip install attnserve-dataplane`"
        ) from error
    signal.signal(signal.SIGINT, lambda *_: stop.set())
    try:
        server = AttentionServer(settings)
        server.start()
    except SettingsError as error:
        raise StartError(f"{error}; see `attnserve-server --help`") from error
    except ManifestError as error:
        raise StartError(f"{error}; see `attnserve-export --help`") from error
    except OSError as error:
        raise StartError(
            f"{error}; choose another with --host, --port or --metrics-port, or stop what has it"
        ) from error
    names = ", ".join(sorted({model.manifest.name for model in server.store})) or "none"
    print(
        f"attnserve-server {__version__} listening on {server.address} "
        f"({server.providers.names[0]}; models: {names})",
        flush=True,
    )
    stop.wait()
    server.drain()
    server.exit_if_stuck()


def _allow_descriptors() -> None:
    """As many as the system lets this process have, within reason: each connection takes one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, _DESCRIPTORS) if hard != resource.RLIM_INFINITY else _DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


if __name__ == "__main__":
    sys.exit(main())
