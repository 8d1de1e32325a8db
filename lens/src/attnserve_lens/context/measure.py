"""`attnserve-loadtest context`: what heads give to a fact as the context around it grows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
from attnserve_client import AttentionClient, AttnserveError, Model, TokensResult
from attnserve_loadtest.environment import client_facts, server_facts
from attnserve_loadtest.errors import LoadTestError
from attnserve_loadtest.report.schema import Server
from attnserve_proto.commands import PLAIN, Access
from numpy.typing import NDArray

from attnserve_lens.context.growth import best, by_length, growth, of_heads
from attnserve_lens.context.schema import (
    SCHEMA,
    SCHEMA_VERSION,
    Cell,
    ContextReport,
    ContextSettings,
    Grid,
)
from attnserve_lens.context.text import Context, Pieces, random_pieces, text_pieces

# Weights of one answer: a server sends 128 MiB at most unless told otherwise, and this process
# holds no more than one answer at a time.
_ANSWER_BYTES = 32 << 20

Floats = NDArray[np.float64]
Progress = Callable[[int, float, int], None]


@dataclass(frozen=True, slots=True)
class Rows:
    """What the question of one context attends to, [L, H] each; names as in `Cell`."""

    fact: Floats
    beside: Floats
    sinks: Floats
    effective: Floats
    visible: float


def run_context(
    target: str,
    name: str,
    settings: ContextSettings,
    access: Access = PLAIN,
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    filler: Sequence[str] = (),
    timeout: float = 60.0,
    progress: Progress = lambda seq_len, depth, trial: None,
) -> ContextReport:
    """Measure a model.

    Args:
        target: `host:port` of the server.
        name: a transformer model.
        settings: lengths, depths, trials.
        access: how the server is reached.
        layers, heads: 0-based; None is all.
        filler: sentences to take instead of the grammar's.
        timeout: seconds a request.
        progress: told the length, depth and trial that were measured.

    An interruption (Ctrl-C) ends the measuring: the report is of the lengths that were measured.

    Raises:
        KeyboardInterrupt: before any length was.
        LoadTestError: the model cannot be measured so, or the server failed.
    """
    date = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        with AttentionClient(target, **access.of_client()) as client:
            model = client.get_model(name)
            if model.kind != "transformer":
                raise LoadTestError(f"model {name} is a {model.kind}; allowed: transformer models")
            shown_layers = tuple(range(model.num_layers) if layers is None else layers)
            shown_heads = tuple(range(model.num_heads) if heads is None else heads)
            asker = _Asker(client, model, shown_layers, shown_heads, timeout)
            pieces, source = _pieces(asker, settings, filler)
            _check_lengths(model, settings, pieces)
            cells = _cells(asker, pieces, settings, progress)
            server = server_facts(target, client.server_info())
    except AttnserveError as error:
        raise LoadTestError(str(error)) from None
    lengths = tuple(sorted({cell.seq_len for cell in cells}))
    settings = ContextSettings(lengths, settings.depths, settings.trials, settings.seed, source)
    return _report(date, asker, server, settings, cells, pieces)


class _Asker:
    """Requests of one model."""

    def __init__(
        self,
        client: AttentionClient,
        model: Model,
        layers: tuple[int, ...],
        heads: tuple[int, ...],
        timeout: float,
    ) -> None:
        self.model, self.layers, self.heads = model, layers, heads
        self.variant = ""
        self._client, self._timeout = client, timeout

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids, the model's own included."""
        return self._ask(list(texts), None, None).ids

    def rows(self, context: Context) -> Rows:
        """The rows of the question, fetched a few heads of one layer at a time."""
        seq_len = len(context.ids)
        at_once = max(1, _ANSWER_BYTES // (4 * seq_len * seq_len))
        found: list[list[Floats]] = []
        visible = 0.0
        for layer in self.layers:
            rows = []
            for first in range(0, len(self.heads), at_once):
                heads = self.heads[first : first + at_once]
                answer = self._ask([list(context.ids)], [layer], heads)
                assert answer.weights is not None
                weights = answer.weights[0][0]
                rows.append(weights[:, slice(*context.question)].astype(np.float64))
            joined = np.concatenate(rows)  # (H, question, Sk)
            # A key to which no head of a layer gives any weight is masked: a window may differ
            # from layer to layer.
            visible = max(visible, float((joined > 0).any(axis=0).sum(axis=-1).mean()))
            found.append(list(measure_rows(joined, context)))
        fact, beside, sinks, effective = np.array(found).transpose(1, 0, 2)
        return Rows(fact, beside, sinks, effective, visible)

    def _ask(
        self,
        inputs: list[str] | list[list[int]],
        layers: Sequence[int] | None,
        heads: Sequence[int] | None,
    ) -> TokensResult:
        answer = self._client.attend_tokens(
            inputs,
            model=self.model.name,
            layers=layers,
            heads=heads,
            return_hidden=False,
            return_weights=layers is not None,
            timeout=self._timeout,
        )
        self.variant = answer.variant
        return answer


def measure_rows(weights: Floats, context: Context) -> tuple[Floats, Floats, Floats, Floats]:
    """What the question's rows say.

    Args:
        weights: [H, question, Sk].
        context: whose rows they are.

    Returns:
        fact, beside, sinks, effective of each head, [H]: means over the question's tokens.
    """
    start, end = context.fact
    length = end - start
    near = [at for at in context.filler if start - length <= at < end + length]
    own = set(range(len(context.ids))) - set(context.filler) - set(range(start, end))
    own -= set(range(*context.question))
    received = weights.mean(axis=1)  # (H, Sk)
    logs = np.log(weights, out=np.zeros_like(weights), where=weights > 0)
    effective = np.exp(-(weights * logs).sum(axis=-1)).mean(axis=-1)
    beside = received[:, near].mean(axis=-1) * length
    return (
        received[:, start:end].sum(axis=-1),
        beside,
        received[:, sorted(own | {0})].sum(axis=-1),
        effective,
    )


def _pieces(
    asker: _Asker, settings: ContextSettings, filler: Sequence[str]
) -> tuple[list[Pieces], str]:
    longest = settings.seq_lens[-1]
    found: list[Pieces] = []
    for trial in range(settings.trials):
        text = (
            text_pieces(asker.encode, longest, trial, settings.seed, filler)
            if asker.model.takes_text
            else None
        )
        if text is None:
            drawn = [
                random_pieces(asker.model.vocab_size, longest, each, settings.seed)
                for each in range(settings.trials)
            ]
            return drawn, "random ids"
        found.append(text)
    return found, settings.filler


def _check_lengths(model: Model, settings: ContextSettings, pieces: Sequence[Pieces]) -> None:
    shortest, longest = settings.seq_lens[0], settings.seq_lens[-1]
    least = max(each.shortest for each in pieces)
    if shortest < least:
        raise LoadTestError(
            f"--seq-lens: {shortest}; allowed: {least} or more, for the fact, the question and as "
            "much filler as fact"
        )
    if model.max_seq_len and longest > model.max_seq_len:
        raise LoadTestError(
            f"--seq-lens: {longest}; allowed: up to {model.max_seq_len}, what {model.name} takes"
        )
    available = min(sum(map(len, each.filler)) for each in pieces)
    if available < longest:
        raise LoadTestError(
            f"--filler: {available} tokens; allowed: {longest} or more, the longest of --seq-lens"
        )


def _cells(
    asker: _Asker, pieces: Sequence[Pieces], settings: ContextSettings, progress: Progress
) -> list[Cell]:
    """The cells of each length; interrupted, those of the lengths that are whole."""
    cells: list[Cell] = []
    try:
        for seq_len in settings.seq_lens:
            cells += [_cell(asker, pieces, seq_len, depth, progress) for depth in settings.depths]
    except KeyboardInterrupt:
        if not cells:
            raise
    return cells


def _cell(
    asker: _Asker, pieces: Sequence[Pieces], seq_len: int, depth: float, progress: Progress
) -> Cell:
    rows: list[Rows] = []
    uniform: list[float] = []
    for trial, each in enumerate(pieces):
        rows.append(asker.rows(each.context(seq_len, depth)))
        progress(seq_len, depth, trial)
        uniform.append(len(each.fact) / rows[-1].visible)

    def mean(name: str, chosen: Sequence[Rows]) -> Grid:
        values = np.mean([getattr(row, name) for row in chosen], axis=0)
        return tuple(tuple(map(float, row)) for row in values)

    return Cell(
        seq_len=seq_len,
        depth=depth,
        uniform=float(np.mean(uniform)),
        visible=float(np.mean([row.visible for row in rows])),
        fact=mean("fact", rows),
        fact_odd=mean("fact", rows[1::2] or rows),
        fact_even=mean("fact", rows[0::2]),
        beside=mean("beside", rows),
        sinks=mean("sinks", rows),
        effective=mean("effective", rows),
    )


def _report(
    date: str,
    asker: _Asker,
    server: Server,
    settings: ContextSettings,
    cells: Sequence[Cell],
    pieces: Sequence[Pieces],
) -> ContextReport:
    lengths, axes = settings.seq_lens, (asker.layers, asker.heads)
    fact, effective = by_length(cells, lengths, "fact"), by_length(cells, lengths, "effective")
    odd = of_heads("weight on the fact", lengths, by_length(cells, lengths, "fact_odd"), *axes)
    uniform = by_length(cells, lengths, "uniform")
    mean_fact, mean_effective = fact.mean(axis=(1, 2)), effective.mean(axis=(1, 2))
    return ContextReport(
        schema=SCHEMA,
        schema_version=SCHEMA_VERSION,
        date=date,
        model=asker.model.name,
        version=asker.model.version,
        variant=asker.variant,
        mask=asker.model.mask,
        layers=asker.layers,
        heads=asker.heads,
        question_length=float(np.mean([len(each.question) for each in pieces])),
        fact_length=float(np.mean([len(each.fact) for each in pieces])),
        server=server,
        client=client_facts(),
        settings=settings,
        cells=tuple(cells),
        uniform=growth("uniform attention", lengths, uniform),
        mean_fact=growth("weight on the fact, mean of heads", lengths, mean_fact),
        mean_effective=growth("effective keys, mean of heads", lengths, mean_effective),
        best=best(by_length(cells, lengths, "fact_even"), odd),
        heads_fact=of_heads("weight on the fact", lengths, fact, *axes),
        heads_effective=of_heads("effective keys", lengths, effective, *axes),
    )
