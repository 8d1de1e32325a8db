"""The command `attnserve-export`, ready for Ctrl-C before its modules are loaded."""

from attnserve_proto.starting import start

start("attnserve-export")


def main() -> int:
    """Run the command; its exit code."""
    from attnserve_export.cli import main

    return main()
