"""Simulates one trace at clusters of several sizes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from attnserve_loadtest.errors import LoadTestError
from attnserve_loadtest.load.plan import Arrival
from attnserve_loadtest.load.requests import Generation
from attnserve_loadtest.load.simulation import Cluster, Simulation, simulate
from attnserve_loadtest.load.slo import Bound
from attnserve_loadtest.load.summary import summarise_step
from attnserve_loadtest.load.trace import Trace
from attnserve_loadtest.report.json_file import read_json
from attnserve_loadtest.report.load_schema import LoadReport, Service
from attnserve_loadtest.report.simulation_schema import (
    SIMULATION_SCHEMA,
    SIMULATION_SCHEMA_VERSION,
    SimulationReport,
    Size,
)

# Times the longest length that service times were fitted to, up to which they are used.
_REACH = 2.0


@dataclass(frozen=True)
class Sizing:
    """What is simulated.

    Attributes:
        sizes: numbers of servers, ascending.
        speed: how many times faster than recorded.
        length_scale: what all lengths are multiplied by.
        prefix_tokens: of prefixes that each server keeps.
        price_per_hour: of one server; None: not given.
        seed: of the choice of servers.
    """

    sizes: tuple[int, ...]
    speed: float = 1.0
    length_scale: float = 1.0
    prefix_tokens: int = 0
    price_per_hour: float | None = None
    seed: int = 0


def simulate_sizes(
    trace: Trace,
    source: Path,
    sizing: Sizing,
    bounds: tuple[Bound, ...],
    *,
    step: Callable[[int], None] = lambda _: None,
) -> SimulationReport:
    """Simulate the trace at each size.

    An interruption (Ctrl-C) ends it: the report is of the sizes that were whole by then.

    Args:
        trace: the traffic.
        source: a `load.json` with service times of prompts and tokens.
        sizing: what to simulate.
        bounds: that good answers keep to.
        step: told how many more requests have been answered.

    Raises:
        LoadTestError: the report has no such service times, or the traffic is far longer than what
            they were fitted to.
        KeyboardInterrupt: before any size was whole.
    """
    report = read_json(source)
    if not isinstance(report, LoadReport):
        raise LoadTestError(f"{source} has no service times: use a report of `load` or `replay`")
    for bound in bounds:
        if bound.quantity == "latency":
            raise LoadTestError(f"--slo: given {bound}, but there are only sessions: bound first:")
    arrivals = trace.arrivals(speed=sizing.speed, length_scale=sizing.length_scale)
    longest, beyond = _check_lengths(source, report.service, arrivals)
    sizes: list[Size] = []
    complete = True
    try:
        for servers in sizing.sizes:
            cluster = Cluster(
                report.service, servers, prefix_tokens=sizing.prefix_tokens, seed=sizing.seed
            )
            sizes.append(_size(servers, simulate(arrivals, cluster, step=step), bounds, sizing))
    except KeyboardInterrupt:
        complete = False
        if not sizes:
            raise
    return SimulationReport(
        schema=SIMULATION_SCHEMA,
        schema_version=SIMULATION_SCHEMA_VERSION,
        simulated=True,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        complete=complete,
        trace=f"{trace.name} ({trace.kind})",
        requests=len(arrivals),
        seconds=arrivals[-1].due,
        speed=sizing.speed,
        length_scale=sizing.length_scale,
        longest=longest,
        beyond=beyond,
        prefix_tokens=sizing.prefix_tokens,
        slo=tuple(map(str, bounds)),
        source=str(source),
        model=report.settings.model,
        service=report.service,
        price_per_hour=sizing.price_per_hour,
        seed=sizing.seed,
        sizes=tuple(sizes),
        fewest=next((size.servers for size in sizes if size.meets), None),
    )


def _check_lengths(
    source: Path, service: Service, arrivals: Sequence[Arrival]
) -> tuple[int, float]:
    """The longest session, and the share of those longer than any measured one."""
    sessions = [each.request for each in arrivals if isinstance(each.request, Generation)]
    has_tokens = any(session.tokens for session in sessions)
    if service.prompt is None or (has_tokens and service.step is None):
        raise LoadTestError(
            f"{source} has no service times of sessions of several lengths: measure some with "
            "`attnserve-loadtest load --sessions 1 --prompt LOW-HIGH`"
        )
    prompts = np.array([session.prompt for session in sessions])
    whole = np.array([session.prompt + session.tokens for session in sessions])
    bounds = service.prompt.longest, service.step.longest if service.step is not None else np.inf
    for what, lengths, bound in (("prompt", prompts, bounds[0]), ("session", whole, bounds[1])):
        if lengths.max() > _REACH * bound:
            raise LoadTestError(
                f"the longest {what} has {lengths.max()} tokens; the service times of {source} "
                f"were fitted to {bound:.0f} at most, and bear {_REACH * bound:.0f}: measure "
                "longer ones, or use --length-scale"
            )
    return int(whole.max()), float(np.mean((prompts > bounds[0]) | (whole > bounds[1])))


def _size(servers: int, simulation: Simulation, bounds: tuple[Bound, ...], sizing: Sizing) -> Size:
    step = summarise_step(simulation.measured, bounds, ())
    tokens = step.context_tokens_per_second
    cost = None
    if sizing.price_per_hour is not None and tokens:
        cost = sizing.price_per_hour * servers / 3600 / tokens * 1e6
    return Size(
        servers=servers,
        throughput=step.answered / (simulation.seconds or 1.0),
        goodput=step.goodput,
        good=step.goodput * step.seconds / step.due,
        context_tokens_per_second=tokens,
        first=step.first,
        between=step.between,
        bounds=step.bounds,
        meets=step.meets,
        busy=simulation.busy,
        found=simulation.found,
        seconds=simulation.seconds,
        cost_per_million_tokens=cost,
    )
