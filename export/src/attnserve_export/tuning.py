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
from attnserve_export.attention.variants import CPU, CUDA
from attnserve_export.errors import ExportError

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
        (8_192, ("flash", "cudnn", "fused", "blocked", "reference")),
        (16_384, ("cudnn", "flash", "fused", "blocked", "reference")),
        (None, ("cudnn", "flash", "blocked", "fused", "reference")),
    ),
}

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
        own = [Pick(up_to, tuple(n for n in names if n in suited)) for up_to, names in rows]
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
        seconds: to spend on each length.
        progress: told what is going on.

    Raises:
        ExportError: not a core model, or the provider is not there or does not work.
    """
    kind = repository.read_content(folder).get("kind")
    if kind != "core":
        raise ExportError(f"--name: {folder} is of kind {kind!r}; allowed: a core model")
    if provider not in onnxruntime.get_available_providers():
        known = ", ".join(onnxruntime.get_available_providers())
        raise ExportError(f"--provider: given {provider}; available here: {known}")
    manifest = repository.read(folder)
    candidates = {
        entry.name: entry
        for entry in manifest.variants
        if provider in entry.providers
        and "output" in entry.output_names
        # `softcap` is `reference` with one more input, `paged` is for sessions.
        and entry.name not in ("softcap", "paged")
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
    for seq_len in sorted(seq_lens):
        score_bytes = 4 * batch * manifest.attention.num_heads * seq_len**2
        tried = [
            name
            for name, entry in candidates.items()
            if entry.memory == "linear" or score_bytes <= _MOST_SCORE_BYTES
        ]
        try:
            contenders = [(name, opened[name]) for name in tried]
            times = _times(manifest, contenders, batch, seq_len, seconds)
        except MemoryError:
            raise ExportError(
                f"--seq-lens: {seq_len} with --batch {batch} takes more memory than there is"
            ) from None
        found = [Measurement(n, seq_len, statistics.median(t) * 1e3) for n, t in times.items()]
        found.sort(key=lambda measurement: measurement.milliseconds)
        measurements += found
        said = ", ".join(f"{m.variant} {m.milliseconds:.3f} ms" for m in found)
        progress(f"{provider}, {seq_len} positions: {said}")
    picks = {**manifest.picks, provider: picks_from(measurements)}
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
    return measurements


def picks_from(measurements: Sequence[Measurement]) -> tuple[Pick, ...]:
    """The fastest first at each length; lengths with the same order are joined.

    A variant that was too large to try at a length comes after all that were.
    """
    lengths = sorted({m.seq_len for m in measurements})
    everyone = sorted({m.variant for m in measurements})
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
) -> dict[str, list[float]]:
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
        "softcap": np.array([-1], np.float32),
    }
    shape = (batch, attention.num_heads, seq_len, attention.value_head_dim)
    for _, session in contenders:  # the first run allocates
        sessions.run(session, feeds, {"output": shape})
    times: dict[str, list[float]] = {name: [] for name, _ in contenders}
    until = time.monotonic() + seconds
    rounds = 0
    while rounds < 3 or time.monotonic() < until:
        for index in generator.permutation(len(contenders)):
            name, session = contenders[index]
            started = time.perf_counter()
            sessions.run(session, feeds, {"output": shape})
            times[name].append(time.perf_counter() - started)
        rounds += 1
    return times


def _gives_output(variant: VariantEntry) -> bool:
    return any(name in ("output", "last_hidden_state") for name in variant.output_names)
