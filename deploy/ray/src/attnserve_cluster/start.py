"""The command `attnserve-cluster`, ready for Ctrl-C before its modules are loaded."""

from attnserve_proto.starting import start


def main() -> int:
    """Run the command as a process of its own; its exit code."""
    start("attnserve-cluster")
    from attnserve_cluster.cli import main

    return main()
