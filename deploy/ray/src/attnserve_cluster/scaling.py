"""How many servers there should be: a decision of what was measured, and nothing else.

One more when requests have waited too long, or KV sessions have taken too much of the memory for
pages, without a break for `busy_seconds`; one less when there has been next to nothing of both for
`idle_seconds`. Between the two lies room, so that the one does not call for the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

# Idle is what is below so much of what is busy.
_IDLE_QUEUE, _IDLE_KV = 0.25, 0.75


@dataclass(frozen=True, slots=True)
class Bounds:
    """How many servers there may be, both ends included."""

    least: int
    most: int

    def within(self, count: int) -> int:
        """The nearest count that may be."""
        return max(self.least, min(self.most, count))

    def __str__(self) -> str:
        return f"{self.least}" if self.least == self.most else f"{self.least}-{self.most}"


@dataclass(frozen=True, slots=True)
class Policy:
    """When there are more or fewer servers.

    Attributes:
        queue_seconds: requests that wait longer, on average, make servers busy.
        kv_share: of the memory for pages, 0..1: if KV sessions were promised more, that does, too.
        busy_seconds: how long they are, until there is one more.
        idle_seconds: how long they are idle, until there is one less.
    """

    queue_seconds: float = 0.02
    kv_share: float = 0.8
    busy_seconds: float = 15.0
    idle_seconds: float = 300.0


@dataclass(frozen=True, slots=True)
class Measured:
    """What one server says of the last seconds.

    Attributes:
        requests: that were computed.
        queue_seconds: that they waited, all together.
        sessions: KV sessions that are open.
        kv_bytes: of pages, promised to KV sessions.
        kv_most: bytes that there may be.
    """

    requests: float = 0.0
    queue_seconds: float = 0.0
    sessions: int = 0
    kv_bytes: float = 0.0
    kv_most: float = 0.0

    @property
    def mean_queue_seconds(self) -> float:
        """How long a request waited; 0 if there was none."""
        return self.queue_seconds / self.requests if self.requests else 0.0

    @property
    def share_of_kv(self) -> float:
        """Of the memory for pages, what was promised."""
        return self.kv_bytes / self.kv_most if self.kv_most else 0.0


@dataclass(frozen=True, slots=True)
class Load:
    """Of all servers that serve.

    Attributes:
        servers: how many they are.
        measured: together; None: not one of them says.
    """

    servers: int
    measured: Measured | None


@dataclass(frozen=True, slots=True)
class Since:
    """Since when servers are busy, or idle; None: they are not."""

    busy: float | None = None
    idle: float | None = None


def together(each: Sequence[Measured | None]) -> Load:
    """The load of servers, of what each of them says; None: it says nothing."""
    known = [measured for measured in each if measured is not None]
    if not known:
        return Load(len(each), None)
    total = Measured(
        sum(one.requests for one in known),
        sum(one.queue_seconds for one in known),
        sum(one.sessions for one in known),
        sum(one.kv_bytes for one in known),
        sum(one.kv_most for one in known),
    )
    return Load(len(each), total)


def decide(
    policy: Policy, bounds: Bounds, target: int, load: Load, since: Since, now: float
) -> tuple[int, Since]:
    """How many servers there should be, and what to decide by the next time.

    Args:
        policy: when there are more or fewer.
        bounds: how many there may be.
        target: how many there should have been until now.
        load: of those that serve.
        since: as it was given the last time.
        now: seconds.
    """
    target = bounds.within(target)
    if load.measured is None:
        return target, Since()
    if _is_busy(policy, load.measured):
        began = now if since.busy is None else since.busy
        # Who was asked for last has yet to come, and may be enough.
        if load.servers < target:
            return target, Since(busy=now)
        if now - began >= policy.busy_seconds and target < bounds.most:
            return target + 1, Since()
        return target, Since(busy=began)
    if _would_be_idle(policy, load.measured, load.servers):
        began = now if since.idle is None else since.idle
        if now - began >= policy.idle_seconds and target > bounds.least:
            return target - 1, Since()
        return target, Since(idle=began)
    return target, Since()


def _is_busy(policy: Policy, measured: Measured) -> bool:
    return (
        measured.mean_queue_seconds > policy.queue_seconds or measured.share_of_kv > policy.kv_share
    )


def _would_be_idle(policy: Policy, measured: Measured, servers: int) -> bool:
    """Whether one server less would have nearly nothing to do more."""
    after = measured.share_of_kv * servers / max(1, servers - 1)
    return (
        measured.mean_queue_seconds <= policy.queue_seconds * _IDLE_QUEUE
        and after <= policy.kv_share * _IDLE_KV
    )
