"""Runs loads one after another against servers, and makes the report of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from attnserve_client import AttentionClient, AttnserveError, Model
from attnserve_proto.commands import PLAIN, Access

from attnserve_loadtest.environment import client_facts, server_facts
from attnserve_loadtest.errors import LoadTestError
from attnserve_loadtest.load.callers import Servers
from attnserve_loadtest.load.generator import Clients, clients
from attnserve_loadtest.load.measured import Measured
from attnserve_loadtest.load.plan import Load
from attnserve_loadtest.load.ramp import ramp
from attnserve_loadtest.load.service import service_of
from attnserve_loadtest.load.slo import Bound
from attnserve_loadtest.load.summary import capacity, summarise_step
from attnserve_loadtest.payloads import check_request
from attnserve_loadtest.report.load_schema import (
    LOAD_SCHEMA,
    LOAD_SCHEMA_VERSION,
    LoadReport,
    LoadSettings,
    Step,
)
from attnserve_loadtest.report.schema import Server

# That a server may take to come up.
_PREPARING_SECONDS = 10.0

Progress = Callable[[Step], None]
Tick = Callable[[float], None]


@dataclass(frozen=True)
class Found:
    """Servers that were asked what they are.

    Attributes:
        servers: how they are called.
        facts: of each, in the order of the addresses.
    """

    servers: Servers
    facts: tuple[Server, ...]


def find_servers(
    addresses: Sequence[str],
    model: str | None,
    session_model: str | None,
    *,
    variant: str = "",
    seq_lens: Sequence[int] = (),
    num_layers: int = 1,
    timeout: float = 30.0,
    seed: int = 0,
    access: Access = PLAIN,
) -> Found:
    """Ask all servers for the models; everything that would be refused is refused here.

    Args:
        addresses: `host:port` of each.
        model: that requests with one answer call; None: there are none.
        session_model: that sessions call; None: there are none.
        variant: of `model`; empty lets the servers pick.
        seq_lens: all lengths that are sent to `model`.
        num_layers: of sessions.
        timeout: seconds that a request may take.
        seed: of the inputs.
        access: how the servers are reached.

    Raises:
        LoadTestError: a server is not there, or does not have such models.
    """
    models: list[tuple[Model | None, Model | None]] = []
    facts, pages = [], 16
    for address in addresses:
        with AttentionClient(address, **access.of_client()) as client:
            try:
                within = min(_PREPARING_SECONDS, timeout)
                info = client.server_info(timeout=within)
                single = None if model is None else client.get_model(model, timeout=within)
                kept = (
                    None
                    if session_model is None
                    else client.get_model(session_model, timeout=within)
                )
            except AttnserveError as error:
                if error.code.name in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
                    raise LoadTestError(
                        f"no server answers at {address}: {error.message}"
                    ) from None
                raise LoadTestError(f"{address}: {error}") from None
        if single is not None and seq_lens:
            check_request(single, info, variant=variant, seq_lens=seq_lens, batch=1)
        _check_sessions(kept)
        pages = info.limits.session_page_tokens or pages
        models.append((single, kept))
        facts.append(server_facts(address, info))
    _check_alike(addresses, models)
    single, kept = models[0]
    servers = Servers(tuple(addresses), single, kept, variant, num_layers, pages, timeout, seed,
                      access)  # fmt: skip
    return Found(servers, tuple(facts))


@dataclass(frozen=True)
class Steps:
    """Which loads are tried.

    Attributes:
        loads: requests a second, or callers: each of them, or of a ramp the lowest and the highest.
        is_ramp: whether to stop at the first that is too much, and look closer below it.
        closed: callers instead of rates.
        refinements: loads tried between the last that was kept up with and the first that was not.
    """

    loads: tuple[float, ...]
    is_ramp: bool
    closed: bool = False
    refinements: int = 3


def run_loads(
    found: Found,
    base: Load,
    steps: Steps,
    settings: LoadSettings,
    bounds: tuple[Bound, ...],
    *,
    price_per_hour: float | None,
    progress: Progress,
    tick: Tick = lambda _: None,
) -> LoadReport:
    """Try loads, and report them.

    An interruption (Ctrl-C) ends the measuring: the report is of the loads that were whole by then.

    Args:
        found: the servers.
        base: what all loads have alike.
        steps: which loads.
        settings: for the report.
        bounds: that good answers keep to.
        price_per_hour: of one server; None: not given.
        progress: told each load when it is over.
        tick: told now and then how many seconds a load has lasted.

    Raises:
        LoadTestError: nothing was answered.
        KeyboardInterrupt: before any load was whole.
    """
    date = datetime.now(UTC).isoformat(timespec="seconds")
    tried: list[tuple[Measured, Step]] = []
    complete = True
    with clients(settings.clients) as ready:

        def try_load(load: float) -> Step:
            measured = _run(ready, _at(base, load, steps), tick)
            step = summarise_step(measured, bounds, found.servers.addresses)
            tried.append((measured, step))
            progress(step)
            return step

        try:
            if steps.is_ramp:
                low, high = steps.loads
                ramp(try_load, low, high, refinements=steps.refinements, whole=steps.closed)
            else:
                for load in steps.loads:
                    try_load(load)
        except KeyboardInterrupt:
            complete = False
            if not tried:
                raise
    return load_report(found, tried, settings, bounds, price_per_hour, date, complete=complete)


def load_report(
    found: Found,
    tried: Sequence[tuple[Measured, Step]],
    settings: LoadSettings,
    bounds: tuple[Bound, ...],
    price_per_hour: float | None,
    date: str,
    *,
    complete: bool,
) -> LoadReport:
    """The report of loads that were tried; arguments as those of `run_loads`.

    Raises:
        LoadTestError: nothing was answered.
    """
    failure = next((measured.failure for measured, _ in tried if measured.failure), "")
    if not any(step.answered for _, step in tried):
        refused = sum(step.refused for _, step in tried)
        said = failure or (f"{refused} were refused" if refused else "nothing was due")
        raise LoadTestError(f"no request was answered: {said}")
    ordered = sorted(tried, key=lambda pair: pair[1].load)
    results = tuple(step for _, step in ordered)
    lowest = next(measured for measured, step in ordered if step.answered)
    return LoadReport(
        schema=LOAD_SCHEMA,
        schema_version=LOAD_SCHEMA_VERSION,
        date=date,
        complete=complete,
        servers=found.facts,
        client=client_facts(),
        settings=settings,
        steps=results,
        capacity=capacity(results, bounds, len(found.facts), price_per_hour),
        service=service_of(lowest),
        failure=failure,
    )


def _at(base: Load, load: float, steps: Steps) -> Load:
    return replace(base, callers=round(load)) if steps.closed else replace(base, rate=load)


def _run(ready: Clients, load: Load, tick: Tick) -> Measured:
    try:
        return ready.run(load, tick=tick)
    except RuntimeError as error:
        raise LoadTestError(f"the clients cannot begin: {error}") from None


def _check_sessions(model: Model | None) -> None:
    if model is None:
        return
    if model.variants and "paged" not in [variant.name for variant in model.variants]:
        raise LoadTestError(f"model {model.name!r} has no variant 'paged', so keeps no sessions")


def _check_alike(
    addresses: Sequence[str], models: Sequence[tuple[Model | None, Model | None]]
) -> None:
    """All servers must take the same tensors."""

    def shape(model: Model | None) -> tuple[object, ...]:
        if model is None:
            return ()
        return (
            model.kind, model.dtype, model.num_heads, model.num_kv_heads, model.head_dim,
            model.value_head_dim, model.embed_dim,
        )  # fmt: skip

    first = [shape(each) for each in models[0]]
    for address, pair in zip(addresses, models, strict=True):
        if [shape(each) for each in pair] != first:
            name = next(each.name for each in pair if each is not None)
            raise LoadTestError(
                f"{address} has another model {name!r} than {addresses[0]}: "
                "of another kind, dtype, or number of heads or dimensions"
            )
