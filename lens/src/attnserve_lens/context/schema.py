"""What `context.json` holds, version 1: these dataclasses as JSON objects, field by field."""

from dataclasses import dataclass

from attnserve_loadtest.report.schema import Client, Server

SCHEMA = "attnserve-loadtest/context"
SCHEMA_VERSION = 1

Grid = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class ContextSettings:
    """What was asked.

    Attributes:
        seq_lens: tokens of the contexts, ascending.
        depths: of the fact, 0 (first) to 1 (right before the question), ascending.
        trials: contexts of each length and depth, with another fact and other filler each.
        seed: of the filler and its order.
        filler: where the filler is from: "grammar", a file's name or "random ids".
    """

    seq_lens: tuple[int, ...]
    depths: tuple[float, ...]
    trials: int
    seed: int
    filler: str


@dataclass(frozen=True, slots=True)
class Cell:
    """One length and depth: means over the question's tokens, then over trials, by layer and head.

    Attributes:
        seq_len, depth: of the cell.
        uniform: the weight that the fact's tokens would have under uniform attention.
        visible: keys that a token of the question may see, mean.
        fact: weight on all tokens of the fact, [L][H].
        fact_odd: the same of the odd trials alone; heads are chosen by the even ones.
        fact_even: the same of the even trials alone.
        beside: weight on as many tokens of filler right beside the fact, [L][H].
        sinks: weight on the first token and on those that the model added, [L][H].
        effective: effective keys, exp(entropy), [L][H].
    """

    seq_len: int
    depth: float
    uniform: float
    visible: float
    fact: Grid
    fact_odd: Grid
    fact_even: Grid
    beside: Grid
    sinks: Grid
    effective: Grid


@dataclass(frozen=True, slots=True)
class Growth:
    """How a quantity grows with the length: quantity = coefficient * seq_len ** exponent.

    Fitted to one value a length, the mean over depths; `attnserve_loadtest.fitting` says what the
    interval means.

    Attributes:
        of: what it is of, in words.
        layer, head: of a single head; None of a mean.
        values: one for each length.
        exponent: the slope on log-log axes: 0 does not change, -1 falls as uniform weight does;
            None of a single length.
        low, high: its confidence interval; None of fewer than 3 lengths.
        confidence: of the interval.
        r_squared: of the logarithms; None of fewer than 3 lengths.
    """

    of: str
    layer: int | None
    head: int | None
    values: tuple[float, ...]
    exponent: float | None
    low: float | None
    high: float | None
    confidence: float
    r_squared: float | None


@dataclass(frozen=True, slots=True)
class ContextReport:
    """All of `context.json`.

    Attributes:
        schema, schema_version: what this is.
        date: when the measuring began, ISO 8601, UTC.
        model, version, variant, mask: what was measured.
        layers, heads: what the [L][H] grids hold, 0-based.
        question_length, fact_length: tokens, mean over trials.
        server, client, settings: where and how.
        cells: by length, then depth.
        uniform: growth of the fact's share under uniform attention.
        mean_fact: growth of the weight on the fact, mean of all heads.
        mean_effective: growth of the effective keys, mean of all heads.
        best: growth of the weight on the fact in the heads that hold it best, chosen by the even
            trials and measured on the odd ones; heaviest first.
        heads_fact: growth of the weight on the fact of every head, by layer and head.
        heads_effective: growth of the effective keys of every head, likewise.
    """

    schema: str
    schema_version: int
    date: str
    model: str
    version: str
    variant: str
    mask: str
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    question_length: float
    fact_length: float
    server: Server
    client: Client
    settings: ContextSettings
    cells: tuple[Cell, ...]
    uniform: Growth
    mean_fact: Growth
    mean_effective: Growth
    best: tuple[Growth, ...]
    heads_fact: tuple[Growth, ...]
    heads_effective: tuple[Growth, ...]
