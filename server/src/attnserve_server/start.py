"""The command `attnserve-server`, ready for Ctrl-C before its modules are loaded."""

from attnserve_proto.starting import start


def main() -> int:
    """Run the command as a process of its own; its exit code."""
    start("attnserve-server")
    from attnserve_server.cli import main

    return main()
