"""The command `attnserve-server`, ready for Ctrl-C before its modules are loaded."""

from attnserve_proto.starting import start

start("attnserve-server")


def main() -> int:
    """Run the command; its exit code."""
    from attnserve_server.cli import main

    return main()
