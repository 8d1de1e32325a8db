"""The actor that keeps a cluster: as many servers as there should be, and where they are."""

import asyncio
import dataclasses
from collections.abc import Sequence
from typing import Any

from attnserve_cluster import members as servers
from attnserve_cluster.ledger import Ledger
from attnserve_cluster.members import Member
from attnserve_cluster.plan import Plan
from attnserve_cluster.report import State
from attnserve_cluster.scaling import Bounds, Since, decide, together

_LOOK_SECONDS = 1.0
# What a controller that was started again waits for the owners that it finds.
_SETTLE_SECONDS = 10.0
# Between an owner that ended unasked, one that cannot be made here say, and the next one.
_AFTER_TROUBLE_SECONDS = 10.0


class Controller:
    """Keeps a cluster. It is found by the cluster's name, and outlives who made it.

    Args:
        plan: of the cluster.
    """

    async def __init__(self, plan: Plan) -> None:  # type: ignore[misc]  # by Ray
        self._plan = plan
        self._ledger = Ledger(plan.identity)
        self._ending = False
        self._since = Since()
        self._members: list[Member] = []
        self._trouble = ""  # of an owner that ended unasked
        self._not_before = 0.0  # when there may be another in its place
        self._follows: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Condition()
        self._told: tuple[str, ...] | None = None  # None: it is not known yet
        known = self._ledger.read()
        there = servers.found(plan.name)
        if known is None:  # they are of another one, of which nobody took care
            for member in there:
                servers.kill(member)
            known = plan.bounds, plan.bounds.least
            there = []
        self._bounds, self._target = known
        self._ledger.write(self._bounds, self._target)
        self._next_number = 1 + max((each.number for each in there), default=0)
        for member in there:
            self._take(member)
        self._began = asyncio.get_running_loop().time()
        self._task = asyncio.ensure_future(self._keep())

    async def status(self) -> dict[str, Any]:
        """How all is: plain values, for JSON."""
        if self._task.done():
            await self._task  # a defect: its error
        load = together([each.report.measured for each in self._members if each.serves])
        measured = load.measured
        return {
            "name": self._plan.name,
            "servers_wanted": self._target,
            "servers_least": self._bounds.least,
            "servers_most": self._bounds.most,
            "placement": str(self._plan.server.placement),
            "ending": self._ending,
            "trouble": self._trouble,
            "queue_ms": None if measured is None else measured.mean_queue_seconds * 1000,
            "kv_share": None if measured is None else measured.share_of_kv,
            "servers": [_shown(each) for each in sorted(self._members, key=lambda m: m.number)],
        }

    async def scale(self, bounds: Bounds) -> int:
        """Have so many servers from now on; how many that are now."""
        self._bounds = bounds
        self._target = bounds.within(self._target)
        self._since = Since()
        self._ledger.write(self._bounds, self._target)
        self._reconcile()
        return self._target

    async def addresses(self, known: Sequence[str] | None, wait: float) -> tuple[str, ...] | None:
        """Where the servers are that serve, once that differs from what is known.

        Args:
            known: what the caller knows; None: nothing yet.
            wait: seconds after which it is told all the same.

        Returns:
            None if it is not known here yet.
        """
        seen = None if known is None else tuple(known)
        await self._tell()

        def differs() -> bool:
            return self._told is not None and self._told != seen

        try:
            async with asyncio.timeout(wait), self._changed:
                await self._changed.wait_for(differs)
        except TimeoutError:
            pass
        return self._told

    async def end(self) -> None:
        """Drain all servers, and have none any more."""
        self._ending = True
        self._ledger.forget()
        for member in self._members:
            servers.let_go(member, 0.0)

    def _take(self, member: Member) -> None:
        self._members.append(member)
        task = asyncio.ensure_future(servers.follow(self._plan.name, member))
        self._follows.add(task)
        task.add_done_callback(self._follows.discard)

    async def _keep(self) -> None:
        while True:
            self._reconcile()
            await self._tell()
            self._scale()
            await asyncio.sleep(_LOOK_SECONDS)

    def _reconcile(self) -> None:
        """Have as many servers as there should be."""
        now = asyncio.get_running_loop().time()
        for member in [each for each in self._members if each.report.state == State.ENDED]:
            if not member.leaving:
                self._trouble = member.report.trouble
                self._not_before = now + _AFTER_TROUBLE_SECONDS
            self._members.remove(member)
            servers.kill(member)
        staying = [each for each in self._members if each.stays]
        wanted = 0 if self._ending else self._target
        if now >= self._not_before:
            for _ in range(wanted - len(staying)):
                self._take(servers.create(self._plan.name, self._next_number, self._plan.server))
                self._next_number += 1
        for member in servers.first_to_go(staying)[: max(0, len(staying) - wanted)]:
            servers.let_go(member, 0.0 if self._ending else self._plan.retire_seconds)

    async def _tell(self) -> None:
        """Let those know who wait for the addresses, if they have changed."""
        late = asyncio.get_running_loop().time() - self._began > _SETTLE_SECONDS
        if self._told is None and not late and not all(each.asked for each in self._members):
            return
        now = tuple(
            each.report.address
            for each in sorted(self._members, key=lambda member: member.number)
            if each.serves
        )
        if now != self._told:
            self._told = now
            async with self._changed:
                self._changed.notify_all()

    def _scale(self) -> None:
        if self._ending:
            return
        load = together([each.report.measured for each in self._members if each.serves])
        now = asyncio.get_running_loop().time()
        target, self._since = decide(
            self._plan.policy, self._bounds, self._target, load, self._since, now
        )
        if target != self._target:
            self._target = target
            self._ledger.write(self._bounds, target)


def _shown(member: Member) -> dict[str, Any]:
    report = member.report
    shown = dataclasses.asdict(report)
    measured = shown.pop("measured")
    leaving = member.leaving and report.state in (State.SERVING, State.STARTING, State.FAILED)
    return {
        "number": member.number,
        **shown,
        "state": str(State.RETIRING if leaving else report.state),
        "sessions": None if measured is None else measured["sessions"],
        "queue_ms": None if report.measured is None else report.measured.mean_queue_seconds * 1000,
        "kv_share": None if report.measured is None else report.measured.share_of_kv,
    }
