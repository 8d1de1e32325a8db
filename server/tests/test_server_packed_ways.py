"""Packed sequences in every way of calling: one answer, and it says where they begin."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attend_ways import WAYS
from attnserve_client import AttentionClient, StoredTensor
from attnserve_export.reference import CAUSAL, packed_reference

HEADS, DIM, TOKENS, DISTANCES = 4, 8, 300, 40
ASKED: dict[str, Any] = {
    "model": "causal",
    "return_entropy": True,
    "return_mass_per_key": True,
    "mass_by_distance": DISTANCES,
    "return_log_sum_exp": True,
}
Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def arrays() -> Arrays:
    generator = np.random.default_rng()
    made = {
        name: generator.standard_normal((1, HEADS, TOKENS, DIM), np.float32)
        for name in ("query", "key", "value")
    }
    # Of as many keys as queries in all, but not in each sequence.
    made["cu_seqlens_q"] = np.array([0, 90, 90, 101, 300])
    made["cu_seqlens_k"] = np.array([0, 80, 95, 101, 300])
    return made


@pytest.fixture(scope="module")
def expected(arrays: Arrays) -> Arrays:
    """What the float64 reference says; distances are counted from each sequence's first token."""
    query, key, value, queries, keys = arrays.values()
    output, weights, log_sum_exp = packed_reference(query, key, value, queries, keys, scheme=CAUSAL)
    mass = np.zeros((len(queries) - 1, HEADS, DISTANCES))
    for number in range(len(mass)):
        rows = np.arange(queries[number], queries[number + 1])
        columns = np.arange(keys[number], keys[number + 1])
        for row, column in np.ndindex(len(rows), len(columns)):
            distance = min(abs(row - column), DISTANCES - 1)
            mass[number, :, distance] += weights[0, :, rows[row], columns[column]]
    logs = np.log(weights, out=np.zeros_like(weights), where=weights > 0)
    return {
        "output": output,
        "entropy": -(weights * logs).sum(axis=-1),
        "mass_per_key": weights.sum(axis=2),
        "mass_by_distance": mass,
        "log_sum_exp": log_sum_exp,
        "cu_seqlens_q": queries,
        "cu_seqlens_k": keys,
    }


@pytest.mark.needs_library
@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_reference(
    address: str, arrays: Arrays, expected: Arrays, tmp_path: Path, way: str
) -> None:
    said = WAYS[way](address, arrays, ASKED, tmp_path)
    for name, right in expected.items():
        # The Open Inference Protocol's answers hold no inputs.
        if not (way.startswith("Model") and name.startswith("cu_seqlens")):
            np.testing.assert_allclose(said[name], right, atol=2e-4, rtol=1e-5, err_msg=name)


@pytest.mark.needs_library
def test_what_another_client_stored_is_not_known(client: AttentionClient, arrays: Arrays) -> None:
    kept = client.put_tensor(arrays["cu_seqlens_q"])
    named = StoredTensor(kept.handle, kept.lease, kept.shape, kept.dtype)
    assert named == kept
    given: dict[str, Any] = arrays | {"cu_seqlens_q": named}
    said = client.attend(**given, **ASKED)
    assert said.cu_seqlens_q is None
    assert said.cu_seqlens_k is None
