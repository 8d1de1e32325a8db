"""What `simulation.json` holds, version 1: these dataclasses as JSON objects, field by field.

Everything here is simulated, none of it measured: seconds are simulated ones, and rates follow.
"""

from dataclasses import dataclass

from attnserve_loadtest.report.load_schema import BoundResult, Service
from attnserve_loadtest.report.schema import Distribution

SIMULATION_SCHEMA = "attnserve-loadtest/simulation"
SIMULATION_SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Size:
    """One size of the cluster.

    Attributes:
        servers: how many.
        throughput: answers a second, until the last one.
        goodput: answers within all bounds, a second of the traffic.
        good: share of the requests that were answered within all bounds.
        context_tokens_per_second: in the good answers: prompts and generated tokens.
        first: until the first output.
        between: between tokens.
        bounds: one result for each bound.
        meets: whether all are met; None: there are none.
        busy: share of the time that servers computed, mean.
        found: share of the prompts' tokens that a server had kept.
        seconds: until the last answer.
        cost_per_million_tokens: of context, in good answers; None: no price, or none is good.
    """

    servers: int
    throughput: float
    goodput: float
    good: float
    context_tokens_per_second: float
    first: Distribution | None
    between: Distribution | None
    bounds: tuple[BoundResult, ...]
    meets: bool | None
    busy: float
    found: float
    seconds: float
    cost_per_million_tokens: float | None


@dataclass(frozen=True, slots=True)
class SimulationReport:
    """All of `simulation.json`.

    Attributes:
        schema, schema_version: what this is.
        simulated: True, always.
        date: when it was made, ISO 8601, UTC.
        complete: False if it was interrupted.
        trace: the file, its format and how many requests.
        requests, seconds: of the traffic, as it was simulated.
        speed, length_scale: what it was changed by.
        longest: tokens of the longest session.
        beyond: share of the requests that are longer than what the service times were fitted to.
        prefix_tokens: of prefixes that each server keeps.
        slo: bounds that good answers keep to.
        source: the report that the service times are of.
        model: that it measured.
        service: the service times.
        price_per_hour: of one server; None: not given.
        seed: of the choice of servers.
        sizes: ascending.
        fewest: the smallest cluster tried that meets all bounds; None: no bounds, or none does.
    """

    schema: str
    schema_version: int
    simulated: bool
    date: str
    complete: bool
    trace: str
    requests: int
    seconds: float
    speed: float
    length_scale: float
    longest: int
    beyond: float
    prefix_tokens: int
    slo: tuple[str, ...]
    source: str
    model: str
    service: Service
    price_per_hour: float | None
    seed: int
    sizes: tuple[Size, ...]
    fewest: int | None
