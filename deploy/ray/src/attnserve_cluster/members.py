"""The servers of a cluster as its controller sees them: their owners, made, found and ended."""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import ray
import ray.util
from ray.exceptions import RayActorError, RayTaskError

from attnserve_cluster.owner import ServerOwner
from attnserve_cluster.plan import NAMESPACE, ServerPlan
from attnserve_cluster.report import Report, State

_LOOK_SECONDS = 1.0


@dataclass(eq=False, slots=True)
class Member:
    """One server.

    Attributes:
        number: within its cluster.
        owner: the actor.
        report: how it was when it was asked last.
        asked: whether it has answered, or failed to, since this controller knows of it.
        leaving: it was told to go.
    """

    number: int
    owner: Any
    report: Report = field(default_factory=Report)
    asked: bool = False
    leaving: bool = False

    @property
    def stays(self) -> bool:
        """Whether it is to be there still in a while."""
        return not self.leaving and self.report.state not in (
            State.RETIRING, State.DRAINING, State.ENDED
        )  # fmt: skip

    @property
    def serves(self) -> bool:
        """Whether clients are told of it."""
        return self.stays and self.report.state == State.SERVING


def owner_name(cluster: str, number: int) -> str:
    """What an owner's actor is called."""
    return f"{cluster}-server-{number}"


def create(cluster: str, number: int, plan: ServerPlan) -> Member:
    """A new server; Ray places it where there is room, on nodes with few first.

    The actor outlives its controller, which finds it again by its name.
    """
    placement = plan.placement
    options: dict[str, Any] = {"num_cpus": placement.cpus, "num_gpus": placement.gpus}
    if placement.memory_bytes:
        options["memory"] = placement.memory_bytes
    made = ray.remote(ServerOwner).options(
        name=owner_name(cluster, number),
        namespace=NAMESPACE,
        lifetime="detached",
        max_restarts=-1,
        scheduling_strategy="SPREAD",
        **options,
    )
    return Member(number, made.remote(plan))


def found(cluster: str) -> list[Member]:
    """The servers of a cluster that are there."""
    prefix = owner_name(cluster, 0).removesuffix("0")
    members = []
    for each in ray.util.list_named_actors(all_namespaces=True):
        number = each["name"].removeprefix(prefix)
        if each["namespace"] == NAMESPACE and each["name"].startswith(prefix) and number.isdigit():
            handle = _handle(each["name"])
            if handle is not None:
                members.append(Member(int(number), handle))
    return members


async def follow(cluster: str, member: Member) -> None:
    """Keep a member's report as its owner says, until the owner is there no more."""
    while True:
        try:
            member.report = await member.owner.report.remote()
        except RayActorError as error:
            if _handle(owner_name(cluster, member.number)) is None:
                member.report = Report(State.ENDED, trouble=str(error).splitlines()[0])
                member.asked = True
                return
            # Ray starts it again; what it was told, it does not know any more.
            member.report, member.leaving = Report(), False
        except RayTaskError as error:
            member.report = Report(State.FAILED, trouble=str(error.cause))
        member.asked = True
        await asyncio.sleep(_LOOK_SECONDS)


def let_go(member: Member, seconds: float) -> None:
    """Have a server end, once its KV sessions have, or after so many seconds."""
    member.leaving = True
    if member.report.state == State.PENDING:
        kill(member)
    else:
        member.owner.retire.remote(seconds)  # should it fail, `follow` finds out


def kill(member: Member) -> None:
    """End a server's owner for good, and with it the server."""
    ray.kill(member.owner, no_restart=True)
    member.report = Report(State.ENDED)


def first_to_go(members: Iterable[Member]) -> list[Member]:
    """Them in the order in which they go: first those that nobody would miss."""

    def missed(member: Member) -> tuple[bool, bool, int, int]:
        measured = member.report.measured
        sessions = 0 if measured is None else measured.sessions
        placed = member.report.state != State.PENDING
        return placed, member.report.state == State.SERVING, sessions, -member.number

    return sorted(members, key=missed)


def _handle(name: str) -> Any | None:
    """An actor by its name; None: there is none, or none any more."""
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return None
