"""What the variant `paged` is verified with: ragged batches over pages of every cache type."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from attnserve_export import paged_sources
from attnserve_export.attention.core import AttentionConfig
from attnserve_export.attention.layer import AttentionLayer
from attnserve_export.paged_batches import CACHE_TYPES, PagedBatch, PagedSequence, PageLayout
from attnserve_export.verification import Case, angle_tolerance, core_tolerance

# What a cache adds to the largest absolute error by rounding keys and values of unit size: half a
# unit in the last place of a value of 4, which is 2^-9 of it in FP16's 11 bits, 2^-6 in BF16's 8
# and 2^-2 in FP8's 4; in INT8 a 254th of a row's largest. As much again for the weights, whose
# scores are sums of such errors.
CACHE_TOLERANCES = {"fp32": 0.0, "fp16": 4e-3, "bf16": 3.2e-2, "int8": 6e-2, "fp8": 5e-1}


_TURN = 7  # radians: angles are taken that far and no further, however far on a token is


@dataclass(frozen=True)
class Situation:
    """Sequences of a batch, and what is special about it.

    Attributes:
        sequences: keys before the step and new tokens of each.
        tree: whether new tokens branch.
        appends: whether new keys come with the queries, or are there before.
        first: the position of each sequence's first token, where a graph is told positions.
        latent: whether the keys hold the values.
        sinks: whether heads have sinks of the session's.
    """

    name: str
    sequences: Sequence[tuple[int, int]]
    cache: str = "fp32"
    page_size: int = 16
    window: int = -1
    kept_first: int = 0
    tree: bool = False
    appends: bool = True
    magnitude: float = 1.0
    first: int = 0
    latent: bool = False
    sinks: bool = False


SITUATIONS = (
    Situation("length 1", ((0, 1),)),
    Situation("decoding", ((37, 1), (15, 1), (16, 1), (0, 1))),
    Situation("ragged", ((33, 5), (0, 17), (300, 1), (48, 0), (7, 40))),
    Situation("page boundaries", ((15, 1), (15, 2), (16, 16), (31, 33))),
    Situation("pages of 5", ((13, 9), (4, 1)), page_size=5),
    Situation("keys split", ((2500, 1), (1100, 30))),
    Situation("a chunk of 200", ((90, 200),)),
    Situation("stored before", ((40, 3), (129, 1)), appends=False),
    Situation("a window", ((100, 1), (3, 40)), window=20),
    Situation("a window and kept keys", ((100, 1), (90, 30)), window=9, kept_first=4),
    Situation("trees", ((50, 12), (0, 6)), tree=True),
    Situation("trees in a window", ((50, 12), (7, 30)), window=11, kept_first=2, tree=True),
    Situation("large scores", ((120, 3),), magnitude=6.0),
    Situation("far on", ((70, 2), (0, 33)), first=1_000_000),
    *(
        Situation(f"a cache of {name}", ((70, 1), (0, 33), (1100, 2)), cache=name)
        for name in CACHE_TYPES
        if name != "fp32"
    ),
    *(
        Situation(f"latent rows of {name}", ((70, 1), (3, 17), (1100, 2)), cache=name, latent=True)
        for name in CACHE_TYPES
    ),
    Situation("latent trees", ((50, 12), (7, 30)), window=11, tree=True, latent=True),
    Situation("sinks", ((50, 12), (0, 30), (2500, 1)), sinks=True),
)


def paged_cases(
    config: AttentionConfig,
    dtype: str,
    numpy_type: Any,
    generator: np.random.Generator,
    layer: AttentionLayer | None = None,
) -> Iterator[Case]:
    """The cases of one core or layer model.

    Args:
        config: the attention.
        dtype: of the graph.
        numpy_type: the same, NumPy's.
        generator: of the inputs.
        layer: in float64, with the parameters of the graph; None: a core model.
    """
    causal = config.mask == "causal"
    # What is attended to is made of what is given, by position.
    derived = layer is not None or config.rotary is not None
    for situation in SITUATIONS:
        if not causal and (situation.window >= 0 or situation.tree):
            continue
        if (derived and not situation.appends) or (config.rotary is None and situation.first):
            continue
        if layer is not None and situation.magnitude != 1:
            continue
        if situation.latent and (derived or config.value_head_dim > config.head_dim):
            continue
        batch = PagedBatch(
            PageLayout(
                config.num_kv_heads,
                config.head_dim,
                config.value_head_dim,
                situation.page_size,
                situation.cache,
                situation.latent,
            ),
            config.num_heads,
            numpy_type,
            [
                PagedSequence(before, new, _parents(new, generator) if situation.tree else None)
                for before, new in situation.sequences
            ],
            generator,
            scale=config.scale,
            softcap=config.softcap,
            slopes=None if config.slopes is None else np.array(config.slopes, np.float32),
            sinks=None if config.sinks is None else np.array(config.sinks, np.float32),
            window=situation.window,
            kept_first=situation.kept_first,
            causal=causal,
            appends=situation.appends,
            magnitude=situation.magnitude,
            weights_of=range(0, len(situation.sequences), 2),
        )
        if situation.sinks:
            batch.sinks = (3 * generator.standard_normal(config.num_heads)).astype(np.float32)
            batch.sinks[1::3] = -np.inf
        given = {} if layer is None else paged_sources.project(batch, layer)
        if config.rotary is not None:
            given = paged_sources.turn(batch, config, situation.first) | given
        expected = batch.expected(as_stored=False)
        longest = max(s.length for s in batch.sequences)
        highest = float(np.abs(expected["log_sum_exp"]).max())
        largest = max(_largest_score(batch), highest)
        tolerance = core_tolerance(dtype, longest, largest) + CACHE_TOLERANCES[situation.cache]
        if config.rotary is not None:
            tolerance += angle_tolerance(_TURN)
        if layer is not None:
            expected["output"] = paged_sources.merge(expected["output"], layer)
            # The projections' sums over E round too.
            output = float(np.abs(expected["output"]).max())
            tolerance *= max(1.0, output, layer.config.embed_dim**0.5 / 8)
        yield Case(
            situation.name,
            {"sequences": len(batch.sequences), "tokens": len(batch.query), "longest": longest},
            batch.feeds() | given,
            expected,
            tolerance,
            {},
            # Of the size of the scores, or of its logarithm's.
            magnitudes={"log_sum_exp": max(2.0, highest / 8), "entropy": 4.0},
        )


def _parents(count: int, generator: np.random.Generator) -> list[int]:
    return [int(generator.integers(-1, i)) for i in range(count)]


def _largest_score(batch: PagedBatch) -> float:
    """Of any query with any key of its head, by magnitude."""
    groups = batch.num_heads // batch.layout.num_kv_heads
    largest, at = 0.0, 0
    for s in batch.sequences:
        query = batch.query[at : at + s.count].astype(np.float64)
        keys = np.repeat(s.keys.astype(np.float64), groups, axis=1)
        scores = np.einsum("qhd,khd->hqk", query, keys) * batch.scale
        largest = max(largest, float(np.abs(scores).max(initial=0)))
        at += s.count
    return largest
