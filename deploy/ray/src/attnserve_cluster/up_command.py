"""The command `attnserve-cluster up`."""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from attnserve_proto.commands import CommandError, Loading, values

from attnserve_cluster import readers
from attnserve_cluster.connection import answer, connect
from attnserve_cluster.plan import NAMESPACE, Placement, Plan, ServerPlan, has_option
from attnserve_cluster.scaling import Bounds, Policy
from attnserve_cluster.table import table

_LOOK_SECONDS = 0.5
# A port may be taken between two looks; what ends so often does so for good.
_STARTS = 1
# Options of the server that are said by those of `up`.
_OURS = ("--repository", "--host", "--port", "--metrics-port")
_MIB = 1 << 20
# The head's own resource: nodes may go, and without the head there is no Ray cluster.
_ON_HEAD = {"node:__internal_head__": 0.001}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.usage = "%(prog)s --repository DIR [options] [-- options of attnserve-server]"
    add = parser.add_argument
    add("--repository", type=values.path, required=True, metavar="DIR",
        help="folder of models, on each node")  # fmt: skip
    count = values.integer(1, readers.MOST_SERVERS)
    add("--min", type=count, default=1, metavar="N", help="servers, at the least; 1")
    add("--max", type=count, metavar="N", help="at the most; default: as --min")
    add("--cpus", type=readers.share, default=1.0, metavar="N",
        help="processors of a node that a server takes; 1")  # fmt: skip
    add("--gpus", type=readers.share, default=0.0, metavar="N", help="GPUs; 0")
    add("--memory-mib", type=values.integer(0), default=0, metavar="N",
        help="memory; 0: not counted")  # fmt: skip
    add("--ports", type=readers.ports, metavar="LOW-HIGH",
        help="of each node, two for each server; default: any that are free")  # fmt: skip
    add("--queue-ms", type=values.number(0, 1e6, above=True), default=20.0, metavar="MS",
        help="one server more when requests wait longer; 20")  # fmt: skip
    add("--kv-share", type=values.number(0, 1, above=True), default=0.8, metavar="SHARE",
        help="or KV sessions hold more of the memory for pages; 0.8")  # fmt: skip
    add("--busy-seconds", type=values.seconds, default=15.0, metavar="S",
        help="for so long, without a break; 15")  # fmt: skip
    add("--idle-seconds", type=values.seconds, default=300.0, metavar="S",
        help="one less when there was next to nothing of both for so long; 300")  # fmt: skip
    add("--retire-seconds", type=values.seconds, default=600.0, metavar="S",
        help="what a server that goes waits for its KV sessions to end; 600")  # fmt: skip
    add("--metrics-token-file", type=values.path, metavar="FILE",
        help="on each node: an admin's token, where servers identify their callers")  # fmt: skip
    add("--wait", type=values.seconds, default=300.0, metavar="S",
        help="for the first --min servers; 300, 0: not at all")  # fmt: skip
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Run the command.

    Raises:
        CommandError: there is such a cluster already, or its servers do not come.
    """
    plan = plan_of(parsed)
    connect(parsed.address)
    controller = _create(plan)
    if not parsed.wait:
        return 0
    return _wait(plan.name, controller, plan.bounds.least, parsed.wait)


def plan_of(parsed: argparse.Namespace) -> Plan:
    """What the options ask for.

    Raises:
        CommandError: code 2: they do not go together.
        SystemExit: the server's options are none, said on standard error.
    """
    most = parsed.min if parsed.max is None else parsed.max
    if most < parsed.min:
        raise CommandError(f"--max: given {most}; allowed: --min, {parsed.min}, or more", 2)
    for option in _OURS:
        if has_option(parsed.server, option):
            raise CommandError(
                f"{option}: given behind --; allowed: the options of `attnserve-cluster up` for "
                "folder and ports; each server listens on its node's address",
                2,
            )
    token = parsed.metrics_token_file
    server = ServerPlan(
        repository=str(Path(parsed.repository).absolute()),
        options=tuple(parsed.server),
        placement=Placement(parsed.cpus, parsed.gpus, parsed.memory_mib * _MIB),
        ports=parsed.ports,
        metrics_token_file="" if token is None else str(Path(token).absolute()),
    )
    with Loading():
        from attnserve_server import configuration

        configuration.parser().parse_args(server.words("127.0.0.1", 0, 0))
    policy = Policy(
        parsed.queue_ms / 1000, parsed.kv_share, parsed.busy_seconds, parsed.idle_seconds
    )
    return Plan(parsed.name, server, Bounds(parsed.min, most), policy, parsed.retire_seconds)


def _create(plan: Plan) -> Any:
    """A cluster's controller."""
    with Loading():
        import ray

        from attnserve_cluster.controller import Controller

    made = ray.remote(Controller).options(
        name=plan.name,
        namespace=NAMESPACE,
        lifetime="detached",
        max_restarts=-1,
        num_cpus=0,
        resources=_ON_HEAD,
    )
    try:
        return made.remote(plan)
    except ValueError:
        raise CommandError(
            f"--name: given {plan.name}, which is up already; `attnserve-cluster scale` changes "
            "how many servers there are, `attnserve-cluster down` ends them"
        ) from None


def _wait(name: str, controller: Any, wanted: int, seconds: float) -> int:
    """Wait for servers that serve, and say where they are."""
    until = time.monotonic() + seconds
    while True:
        left = until - time.monotonic()
        status = answer(name, controller.status.remote(), max(1.0, left))
        serving = [each for each in status["servers"] if each["state"] == "serving"]
        if len(serving) >= wanted:
            print(table(status))
            return 0
        failed = [
            each
            for each in status["servers"]
            if each["state"] == "failed" and each["restarts"] > _STARTS
        ]
        if failed or status["trouble"]:
            where = f"server {failed[0]['number']} on {failed[0]['node']}: " if failed else ""
            raise CommandError(
                f"{where}{failed[0]['trouble'] if failed else status['trouble']}; it is tried "
                f"again and again: put that right, or run `attnserve-cluster down --name {name}`"
            )
        if left <= 0:
            print(table(status), file=sys.stderr)
            raise CommandError(
                f"{len(serving)} of {wanted} servers serve after {seconds:g} s; the others begin "
                f"as nodes with {status['placement']} free come; see `attnserve-cluster status`"
            )
        time.sleep(_LOOK_SECONDS)
