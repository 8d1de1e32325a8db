"""What was asked for: which servers, where, and how many. Values that actors are made with."""

import math
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

from attnserve_cluster.scaling import Bounds, Policy

NAMESPACE = "attnserve"


@dataclass(frozen=True, slots=True)
class Placement:
    """What one server takes of a node.

    Attributes:
        cpus, gpus: a fraction up to 1, or a whole number.
        memory_bytes: 0: not counted.
    """

    cpus: float = 1.0
    gpus: float = 0.0
    memory_bytes: int = 0

    def __str__(self) -> str:
        parts = [f"{self.cpus:g} CPUs"]
        if self.gpus:
            parts.append(f"{self.gpus:g} GPUs")
        if self.memory_bytes:
            parts.append(f"{self.memory_bytes >> 20} MiB")
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class Ports:
    """The ports of a node that servers may have, both ends included; two for each server."""

    low: int
    high: int


@dataclass(frozen=True, slots=True)
class ServerPlan:
    """One server, as all of them are.

    Attributes:
        repository: folder of models, on each node.
        options: of `attnserve-server`, beside those that its owner gives.
        placement: what it takes.
        ports: None: any that is free.
        metrics_token_file: on each node: an admin's token, for `/metrics` of servers that ask for
            one; empty: none.
    """

    repository: str
    options: tuple[str, ...] = ()
    placement: Placement = Placement()
    ports: Ports | None = None
    metrics_token_file: str = ""

    def words(self, host: str, port: int, metrics_port: int) -> list[str]:
        """The arguments of a server on such a host and such ports.

        It computes with as many threads as it has processors of the node, and where it has no GPU,
        on those, unless its options say otherwise.
        """
        words = [f"--repository={self.repository}", f"--host={host}"]
        words += [f"--port={port}", f"--metrics-port={metrics_port}"]
        if not self.placement.gpus and not self._has("--provider"):
            words.append("--provider=cpu")
        if not self._has("--intra-op-threads"):
            words.append(f"--intra-op-threads={max(1, math.floor(self.placement.cpus))}")
        return [*words, *self.options]

    def _has(self, option: str) -> bool:
        return has_option(self.options, option)


@dataclass(frozen=True, slots=True)
class Plan:
    """A cluster.

    Attributes:
        name: by which it is found.
        server: as each of its servers is.
        bounds: how many there are, to begin with.
        policy: when there are more or fewer.
        retire_seconds: how long a server that is to go waits for its KV sessions to end.
        identity: tells this cluster from others of its name that were before it.
    """

    name: str
    server: ServerPlan
    bounds: Bounds
    policy: Policy = field(default_factory=Policy)
    retire_seconds: float = 600.0
    identity: str = field(default_factory=lambda: uuid.uuid4().hex)


def has_option(words: Sequence[str], option: str) -> bool:
    """Whether an option is among the arguments of a command."""
    return any(word == option or word.startswith(f"{option}=") for word in words)
