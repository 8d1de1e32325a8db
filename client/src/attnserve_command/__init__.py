"""The command `attnserve`, ready for Ctrl-C before its modules are loaded.

A package of its own: whatever is in `attnserve_client` loads all of that first.
"""

from attnserve_proto.starting import start

start("attnserve")


def main() -> int:
    """Run the command; its exit code."""
    from attnserve_client._cli import main

    return main()
