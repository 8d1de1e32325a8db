"""The command `attnserve-loadtest`, ready for Ctrl-C before its modules are loaded."""

from attnserve_proto.starting import start

start("attnserve-loadtest")


def main() -> int:
    """Run the command; its exit code."""
    from attnserve_loadtest.cli import main

    return main()
