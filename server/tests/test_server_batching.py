"""Requests that run together get what they would get alone."""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attnserve_client import AttendResult, AttentionClient
from attnserve_server.app import AttentionServer
from attnserve_server.settings import Settings
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

HEADS, DIM = 4, 8
KV_HEADS = {"causal": 4, "grouped": 2, "half": 4, "capped": 4}


@pytest.fixture(scope="module")
def waiting(repository: Path) -> Iterator[AttentionClient]:
    """Of a server whose batches wait a moment for others to join."""
    server = AttentionServer(
        Settings(repository, port=0, metrics_port=None, provider="cpu", batch_delay=0.04)
    )
    server.start()
    with AttentionClient(f"127.0.0.1:{server.port}") as client:
        yield client
    server.drain()


@pytest.fixture(scope="module")
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def together(
    client: AttentionClient, threads: ThreadPoolExecutor, requests: list[dict[str, Any]]
) -> list[AttendResult]:
    """All requests at once; their answers."""
    futures: list[Future[AttendResult]] = [
        threads.submit(client.attend, **request) for request in requests
    ]
    return [future.result(30) for future in futures]


def core_arrays(
    model: str, batch: int, query_len: int, key_len: int, seed: int
) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    dtype = np.float16 if model == "half" else np.float32
    value_dim = 6 if model == "grouped" else DIM
    shapes = {
        "query": (batch, HEADS, query_len, DIM),
        "key": (batch, KV_HEADS[model], key_len, DIM),
        "value": (batch, KV_HEADS[model], key_len, value_dim),
    }
    arrays = {n: generator.standard_normal(s).astype(dtype) for n, s in shapes.items()}
    if seed % 2:
        arrays["key_lengths"] = generator.integers(0, key_len + 1, batch)
    return arrays


shapes = st.lists(
    st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 70), st.integers(0, 2**31)),
    min_size=2,
    max_size=6,
)


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    model=st.sampled_from(sorted(KV_HEADS)),
    drawn=shapes,
    variant=st.sampled_from(["", "fused", "reference", "blocked"]),
    weights=st.booleans(),
)
def test_ragged_requests_run_together_as_they_would_alone(
    client: AttentionClient,
    waiting: AttentionClient,
    threads: ThreadPoolExecutor,
    model: str,
    drawn: list[tuple[int, int, int, int]],
    variant: str,
    weights: bool,
) -> None:
    if model == "capped" and variant == "fused":
        variant = "softcap"
    requests = []
    for batch, query_less, key_less, seed in drawn:
        lengths = [
            max(1, length - less % max(1, length // 8))
            for length, less in zip(drawn[0][1:3], (query_less, key_less), strict=True)
        ]
        arrays = core_arrays(model, batch, *lengths, seed)
        options = {"return_weights": weights and variant in ("", "reference")}
        requests.append(arrays | options | {"model": model, "variant": variant})
    for request, result in zip(requests, together(waiting, threads, requests), strict=True):
        alone = client.attend(**request)
        assert result.variant == alone.variant
        for name in ("output", "weights"):
            array, expected = getattr(result, name), getattr(alone, name)
            if expected is None:
                assert array is None
                continue
            assert array.shape == expected.shape
            assert array.dtype == expected.dtype
            if result.variant == "native":
                assert array.tobytes() == expected.tobytes()
            else:
                tolerance = 2e-3 if model == "half" else 2e-5
                np.testing.assert_allclose(array, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize(
    "returns",
    [
        {"return_entropy": True},
        {"top_k": 2, "return_output": False},
        {"return_mass_per_key": True, "mass_by_distance": 3, "return_weights": True},
    ],
)
def test_diagnostics_are_joined_for_equal_lengths_only(
    client: AttentionClient,
    waiting: AttentionClient,
    threads: ThreadPoolExecutor,
    returns: dict[str, Any],
) -> None:
    requests = [
        core_arrays("causal", 1, n, n, seed) | returns | {"model": "causal"}
        for n, seed in ((11, 1), (11, 3), (12, 2))
    ]
    results = together(waiting, threads, requests)
    assert results[2].timings.batch_size == 1
    for request, result in zip(requests, results, strict=True):
        alone = client.attend(**request)
        for name in ("output", "weights", "entropy", "top_k_weights", "mass_per_key"):
            expected = getattr(alone, name)
            if expected is not None:
                np.testing.assert_allclose(getattr(result, name), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("model", ["self", "cross"])
def test_layers_are_joined(
    client: AttentionClient, waiting: AttentionClient, threads: ThreadPoolExecutor, model: str
) -> None:
    requests = []
    for seed, length in enumerate((31, 32, 30)):
        generator = np.random.default_rng(seed)
        hidden = generator.standard_normal((2, length, 32)).astype(np.float32)
        request: dict[str, Any] = {"hidden_states": hidden, "model": model}
        if model == "cross":
            context = generator.standard_normal((2, length - 1 + seed % 2, 24))
            request["context"] = context.astype(np.float32)
        requests.append(request)
    results = together(waiting, threads, requests)
    assert max(result.timings.batch_size for result in results) > 2
    for request, result in zip(requests, results, strict=True):
        alone = client.attend(**request)
        assert result.output is not None
        assert alone.output is not None
        assert result.output.shape == alone.output.shape
        np.testing.assert_allclose(result.output, alone.output, atol=2e-5, rtol=0)


def test_a_request_with_a_bias_of_its_own_runs_alone(
    waiting: AttentionClient, threads: ThreadPoolExecutor
) -> None:
    arrays = core_arrays("causal", 1, 5, 5, 0) | {"model": "causal"}
    biased = arrays | {"bias": np.ones((1, 1, 1, 5), np.float32)}
    results = together(waiting, threads, [biased, arrays, biased, arrays])
    assert [result.timings.batch_size for result in results[0::2]] == [1, 1]


@pytest.mark.usefixtures("occupied")
def test_callers_over_the_wire_are_batched_and_get_their_own(
    server: AttentionServer, client: AttentionClient, threads: ThreadPoolExecutor
) -> None:
    # Long enough to wait for a slot: what takes next to no time does not.
    lengths = (1021, 1024, 1022, 1023)
    requests = [core_arrays("causal", 1, n, n, 2 * n) | {"model": "causal"} for n in lengths]
    futures = [threads.submit(client.attend, **request) for request in requests]
    deadline = time.monotonic() + 10
    while server.plane.gauges()["waiting"] < 4 and time.monotonic() < deadline:
        time.sleep(0.005)
    results = [future.result(30) for future in futures]
    assert [result.timings.batch_size for result in results] == [4, 4, 4, 4]
    for request, result in zip(requests, results, strict=True):
        alone = client.attend(**request)
        assert alone.timings.batch_size == 1
        assert result.output is not None
        assert alone.output is not None
        np.testing.assert_allclose(result.output, alone.output, atol=2e-5, rtol=0)
