"""The command `attnserve-loadtest`, ready for Ctrl-C before its modules are loaded."""

from attnserve_proto.starting import start


def main() -> int:
    """Run the command as a process of its own; its exit code."""
    start("attnserve-loadtest")
    from attnserve_loadtest.cli import main

    return main()
