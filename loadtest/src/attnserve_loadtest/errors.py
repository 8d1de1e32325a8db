"""What a command cannot go on from."""


class LoadTestError(Exception):
    """A load test cannot start or has nothing to show; the message is one line for the user."""
