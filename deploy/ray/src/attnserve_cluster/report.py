"""What an owner says of its server."""

from dataclasses import dataclass, replace
from enum import StrEnum

from attnserve_cluster.scaling import Measured


class State(StrEnum):
    """How a server is."""

    PENDING = "pending"  # it waits for a node with room
    STARTING = "starting"
    SERVING = "serving"
    FAILED = "failed"  # it has ended, and will be started again
    RETIRING = "retiring"  # clients are not told of it any more; its sessions may end
    DRAINING = "draining"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Report:
    """How a server is.

    Attributes:
        state: see there.
        node: its address; empty: on none yet.
        address: where it listens; empty: nowhere.
        pid: of its process; 0: there is none.
        restarts: how often it was started again, where it is now.
        trouble: why it ended the last time, or why its load is not known; empty: nothing of that.
        measured: its load; None: not known.
    """

    state: State = State.PENDING
    node: str = ""
    address: str = ""
    pid: int = 0
    restarts: int = 0
    trouble: str = ""
    measured: Measured | None = None

    def but(self, **changed: object) -> "Report":
        """The same, with other values of some attributes."""
        return replace(self, **changed)  # type: ignore[arg-type]
