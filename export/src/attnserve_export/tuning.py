"""Which variant to run at which length: a default, and what was measured on this machine."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime
from attnserve_proto.manifest import Manifest, Pick, VariantEntry
from numpy.typing import NDArray

from attnserve_export import repository, sessions
from attnserve_export.errors import ExportError
from attnserve_export.runtime import CPU, CUDA

Array = NDArray[Any]

# Measured (docs/kernels.md): `native` is the fastest on CPUs at every length. Of the two that plain
# ONNX Runtime runs, `fused` has less to set up, and `blocked` passes it where the scores no longer
# fit the caches. CUDA: one node beats a loop as long as its scores fit the memory.
_DEFAULTS: Mapping[str, Sequence[tuple[int | None, Sequence[str]]]] = {
    CPU: (
        (1024, ("native", "fused", "blocked", "reference")),
        (None, ("native", "blocked", "fused", "reference")),
    ),
    CUDA: (
        (8_192, ("half", "flash", "cudnn", "fused", "blocked", "reference")),
        (16_384, ("half", "cudnn", "flash", "fused", "blocked", "reference")),
        (None, ("half", "cudnn", "flash", "blocked", "fused", "reference")),
    ),
}

# Graphs over token ids, and those over embeddings in their place.
_KINDS = ("", "_embeds")

# Quadratic variants are not tried where their scores would take more than this.
_MOST_SCORE_BYTES = 1 << 30


@dataclass(frozen=True)
class Measurement:
    """The median time of a variant at a length, in milliseconds."""

    variant: str
    seq_len: int
    milliseconds: float


def default_picks(variants: Sequence[VariantEntry]) -> dict[str, tuple[Pick, ...]]:
    """The default table, by provider, of the variants that there are."""
    picks = {}
    for provider, rows in _DEFAULTS.items():
        suited = {v.name for v in variants if provider in v.providers and _gives_output(v)}
        own = [
            Pick(up_to, tuple(n + kind for n in names for kind in _KINDS if n + kind in suited))
            for up_to, names in rows
        ]
        picks[provider] = _joined(own)
    return picks


def tune(
    folder: Path,
    *,
    seq_lens: Sequence[int],
    provider: str,
    batch: int,
    seconds: float,
    progress: Callable[[str], None],
) -> list[Measurement]:
    """Measure the variants of a core model here, and let its manifest say which are fastest.

    Contenders take turns within a round, in changing order, with idle threads not spinning, so
    that what else runs on the machine meets all of them.

    Args:
        folder: of the version.
        seq_lens: lengths to measure at; a pick holds up to the geometric mean with the next one.
        provider: ONNX Runtime's name of it.
        batch: sequences per run.
        seconds: to spend on each length: variants that would take more, by the length before, are
            left out there. At the shortest length each runs at least once, at others the fastest.
        progress: told what is going on.

    Raises:
        ExportError: not a core model, or the provider is not there or does not work.
        KeyboardInterrupt: interrupted; the lengths that were measured are in the manifest.
    """
    kind = repository.read_content(folder).get("kind")
    if kind != "core":
        raise ExportError(f"--name: {folder} is of kind {kind!r}; allowed: a core model")
    if provider not in onnxruntime.get_available_providers():
        available = ", ".join(onnxruntime.get_available_providers())
        raise ExportError(f"--provider: given {provider}; available here: {available}")
    manifest = repository.read(folder)
    candidates = {
        entry.name: entry
        for entry in manifest.variants
        if provider in entry.providers
        and "output" in entry.output_names
        # `paged` is for sessions, and those for packed sequences for these alone; the others are
        # slower than variants that they are like.
        and entry.name not in ("softcap", "blocked_sinks", "reference_sinks", "paged")
        and not entry.name.startswith("packed")
    }
    opened = {
        name: sessions.open_session(folder / entry.file, tuple(dict.fromkeys((provider, CPU))))
        for name, entry in candidates.items()
    }
    for session in opened.values():
        if session.get_providers()[0] != provider:
            raise ExportError(
                f"--provider: given {provider}, which does not work here; "
                f"ONNX Runtime fell back to {session.get_providers()[0]}"
            )
    measurements: list[Measurement] = []
    # Of each variant, the longest length measured so far, and its seconds there.
    furthest: dict[str, tuple[int, float]] = {}
    lengths = sorted(set(seq_lens))
    try:
        for index, seq_len in enumerate(lengths):
            tried = [
                (name, opened[name])
                for name, entry in candidates.items()
                if entry.memory == "linear"
                or 4 * batch * manifest.attention.num_heads * seq_len**2 <= _MOST_SCORE_BYTES
            ]
            expected = {name: _expected(furthest.get(name), seq_len) for name, _ in tried}
            try:
                times = _times(manifest, tried, batch, seq_len, seconds, expected)
            except MemoryError:
                raise ExportError(
                    f"--seq-lens: {seq_len} with --batch {batch} takes more memory than there is"
                ) from None
            furthest |= {name: (seq_len, each) for name, each in times.items()}
            found = [Measurement(name, seq_len, each * 1e3) for name, each in times.items()]
            found.sort(key=lambda measurement: measurement.milliseconds)
            measurements += found
            said = ", ".join(f"{m.variant} {m.milliseconds:.3f} ms" for m in found)
            left = len(lengths) - index - 1
            more = f"; {left} to go, about {left * seconds:.3g} s" if left else ""
            progress(f"{provider}, {seq_len} positions: {said}{more}")
    finally:
        # What was measured is kept, whatever happens after it.
        if measurements:
            complete = measurements[-1].seq_len == lengths[-1]
            _keep(folder, manifest, provider, batch, measurements, complete=complete)
    return measurements


def _expected(known: tuple[int, float] | None, seq_len: int) -> float:
    """The seconds of a run, growing with the square of the length; 0 of what is not known."""
    if known is None:
        return 0.0
    length, seconds = known
    return seconds * (seq_len / length) ** 2


def _keep(
    folder: Path,
    manifest: Manifest,
    provider: str,
    batch: int,
    measurements: Sequence[Measurement],
    *,
    complete: bool,
) -> None:
    """Let the manifest say what was measured."""
    found = picks_from(measurements)
    if not complete:
        longest = measurements[-1].seq_len
        before = manifest.picks.get(provider, ())
        beyond = [pick for pick in before if pick.up_to is None or pick.up_to > longest]
        found = _joined([*found[:-1], Pick(longest, found[-1].variants), *beyond])
    picks = {**manifest.picks, provider: found}
    tuned = dict(manifest.tuned or {})
    tuned[provider] = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "onnxruntime": onnxruntime.__version__,
        "batch": batch,
        "measurements": [asdict(m) for m in measurements],
    }
    rows = {name: [asdict(pick) for pick in given] for name, given in picks.items()}
    repository.rewrite(folder, {"picks": rows, "tuned": tuned})


def picks_from(measurements: Sequence[Measurement]) -> tuple[Pick, ...]:
    """The fastest first at each length; lengths with the same order are joined.

    A variant that was too large or slow to try at a length comes after all that were.
    """
    lengths = sorted({m.seq_len for m in measurements})
    longest: dict[str, Measurement] = {}
    for measured in sorted(measurements, key=lambda m: m.seq_len):
        longest[measured.variant] = measured
    # Whoever got further is the faster.
    everyone = sorted(
        longest, key=lambda name: (-longest[name].seq_len, longest[name].milliseconds)
    )
    rows: list[Pick] = []
    for index, length in enumerate(lengths):
        fastest = sorted(
            (m for m in measurements if m.seq_len == length), key=lambda m: m.milliseconds
        )
        order = tuple(m.variant for m in fastest)
        order += tuple(name for name in everyone if name not in order)
        last = index + 1 == len(lengths)
        up_to = None if last else int((length * lengths[index + 1]) ** 0.5)
        rows.append(Pick(up_to, order))
    return _joined(rows)


def _joined(rows: Sequence[Pick]) -> tuple[Pick, ...]:
    """Neighbouring rows of the same variants made one."""
    joined: list[Pick] = []
    for row in rows:
        if joined and joined[-1].variants == row.variants:
            joined.pop()
        joined.append(row)
    return tuple(joined)


def _times(
    manifest: Manifest,
    contenders: Sequence[tuple[str, onnxruntime.InferenceSession]],
    batch: int,
    seq_len: int,
    seconds: float,
    expected: Mapping[str, float],
) -> dict[str, float]:
    """The median seconds of each contender that fits the time."""
    attention = manifest.attention
    generator = np.random.default_rng(0)
    dtypes: dict[str, Any] = {"FP32": np.float32, "FP16": np.float16, "BF16": ml_dtypes.bfloat16}
    dtype = dtypes[manifest.dtype]

    def normal(num_heads: int, width: int) -> Array:
        shape = (batch, num_heads, seq_len, width)
        return generator.standard_normal(shape, np.float32).astype(dtype)

    feeds = {
        "query": normal(attention.num_heads, attention.head_dim),
        "key": normal(attention.num_kv_heads, attention.head_dim),
        "value": normal(attention.num_kv_heads, attention.value_head_dim),
        "key_lengths": np.full(batch, seq_len, np.int64),
        "bias": np.zeros((1, 1, 1, 1), dtype),
        "mask": np.ones((1, 1, 1, 1), bool),
        "prefix_lengths": np.zeros(batch, np.int64),
        "softcap": np.array([-1], np.float32),
        "sinks": np.array(attention.sinks or [-np.inf] * attention.num_heads, np.float32),
    }
    shape = (batch, attention.num_heads, seq_len, attention.value_head_dim)
    until = time.monotonic() + seconds
    first: dict[str, float] = {}
    times: dict[str, list[float]] = {}

    def timed(session: onnxruntime.InferenceSession) -> float:
        started = time.perf_counter()
        sessions.run(session, feeds, {"output": shape})
        return time.perf_counter() - started

    fastest_first = sorted(contenders, key=lambda each: expected[each[0]])
    for name, session in fastest_first:  # the first run allocates
        known = expected[name] > 0
        if not first or not known or time.monotonic() + expected[name] <= until:
            first[name], times[name] = timed(session), []
    running = [each for each in contenders if each[0] in first]
    while running:
        for index in generator.permutation(len(running)):
            name, session = running[index]
            if _fits(name, first, times, until):
                times[name].append(timed(session))
        running = [each for each in running if _fits(each[0], first, times, until)]
    return {name: statistics.median(found or [first[name]]) for name, found in times.items()}


def _fits(
    name: str, first: Mapping[str, float], times: Mapping[str, Sequence[float]], until: float
) -> bool:
    """Whether a contender's next run ends in time."""
    return time.monotonic() + (times[name] or [first[name]])[-1] <= until


def _gives_output(variant: VariantEntry) -> bool:
    return any(name in ("output", "last_hidden_state") for name in variant.output_names)
