"""The `attnserve-server` command."""

import argparse
import resource
import signal
import sys
import threading
from collections.abc import Sequence

from attnserve_proto import commands
from attnserve_proto.commands import CommandError, Loading, Parser
from attnserve_proto.manifest import ManifestError

from attnserve_server import __version__, logs, options
from attnserve_server.settings import Limits, PlaneSettings, Settings

_DESCRIPTORS = 65_536


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; the exit code: 0 after a drain, 1 if it cannot start."""
    return commands.run("attnserve-server", lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    parsed = _parser().parse_args(arguments)
    logs.configure(parsed.log_format, parsed.log_level)
    serve(_settings(parsed))
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
            from attnserve_server.certificates import CertificateError
            from attnserve_server.models.providers import ProviderError
            from attnserve_server.onnxruntime_library import LibraryError
    except ImportError as error:
        raise StartError(
            f"{error}; the server needs attnserve-dataplane: `pip install attnserve-dataplane`"
        ) from error
    signal.signal(signal.SIGINT, lambda *_: stop.set())
    try:
        server = AttentionServer(settings)
        server.start()
    except (LibraryError, ProviderError, CertificateError) as error:
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


def _allow_descriptors() -> None:
    """As many as the system lets this process have, within reason: each connection takes one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, _DESCRIPTORS) if hard != resource.RLIM_INFINITY else _DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _settings(parsed: argparse.Namespace) -> Settings:
    return Settings(
        **options.values(parsed, Settings),
        **options.values(parsed, PlaneSettings),
        limits=Limits(**options.values(parsed, Limits)),
    )


def _parser() -> Parser:
    parser = Parser(
        prog="attnserve-server",
        description="Serves the models of a repository over gRPC.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"attnserve-server {__version__}")
    parser.add_argument("--log-format", choices=("json", "text"), default="json")
    parser.add_argument(
        "--log-level", choices=("debug", "info", "warning", "error"), default="info"
    )
    options.add(parser, "server", Settings)
    options.add(parser, "computing and connections", PlaneSettings)
    options.add(parser, "what is accepted", Limits)
    return parser


if __name__ == "__main__":
    sys.exit(main())
