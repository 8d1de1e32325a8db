"""What a supervisor and its workers say to each other.

They share one connection, a pair of Unix sockets. The supervisor sends an assignment, the worker
answers with one report, and then it only matters that the connection is open: each side takes its
end as the end of the other.
"""

from dataclasses import dataclass
from typing import Literal

from attnserve_server.settings import Settings


class StartError(Exception):
    """The server cannot start, or not go on; the message is one line for whoever started it."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """All that a worker needs to know."""

    settings: Settings
    log_format: Literal["json", "text"]
    log_level: str


@dataclass(frozen=True, slots=True)
class Report:
    """How a worker's start went.

    Attributes:
        serving: whether it serves now.
        line: what to tell whoever started the server: that it is ready, or why it is not.
    """

    serving: bool
    line: str
