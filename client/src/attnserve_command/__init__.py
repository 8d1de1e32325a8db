"""The command `attnserve`, ready for Ctrl-C before its modules are loaded.

A package of its own: whatever is in `attnserve_client` loads all of that first.
"""

from attnserve_proto.starting import start


def main() -> int:
    """Run the command as a process of its own; its exit code."""
    start("attnserve")
    from attnserve_client._cli import main

    return main()
