"""Reports of load tests that were made, not measured."""

from collections.abc import Sequence

from attnserve_client import Model, Timings, Variant
from attnserve_loadtest.environment import client_facts
from attnserve_loadtest.report.schema import (
    SCHEMA,
    SCHEMA_VERSION,
    Report,
    Series,
    Server,
    Settings,
)
from attnserve_loadtest.samples import Sample

MODEL = Model(
    name="causal",
    version="1",
    kind="core",
    dtype="FP32",
    num_heads=4,
    num_kv_heads=4,
    head_dim=8,
    value_head_dim=8,
    mask="causal",
    window=0,
    scale=0.0,
    softcap=0.0,
    embed_dim=0,
    num_layers=1,
    vocab_size=0,
    max_seq_len=0,
    takes_text=False,
    variants=(Variant("fused", (), (), (), 0.0, 0.0),),
    source="",
)


def samples_of(seq_len: int, milliseconds: float, count: int = 3) -> tuple[Sample, ...]:
    """Answered requests that all took as long; nine tenths of it were computing."""
    whole = milliseconds * 1e3
    timings = Timings(0, 0, round(0.9 * whole), 0, 1)
    return tuple(
        Sample("Attend", "causal", "fused", seq_len, whole, 8, timings) for _ in range(count)
    )


def report_of(seq_lens: Sequence[int], series: Sequence[Series]) -> Report:
    """A whole report of these series."""
    return Report(
        schema=SCHEMA,
        schema_version=SCHEMA_VERSION,
        date="2026-01-01T00:00:00+00:00",
        complete=True,
        drift=None,
        server=Server("127.0.0.1:1", "1", "1", ()),
        client=client_facts(),
        settings=Settings(tuple(seq_lens)),
        series=tuple(series),
    )
