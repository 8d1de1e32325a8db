"""Packed sequences in every way of calling: one answer, and it says where they begin."""

import asyncio
import queue
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from attnserve_client import AsyncAttentionClient, AttendResult, AttentionClient, StoredTensor
from attnserve_client._cli import main
from attnserve_export.reference import CAUSAL, packed_reference
from tritonclient.utils import np_to_triton_dtype

HEADS, DIM, TOKENS, DISTANCES = 4, 8, 300, 40
STARTS = np.array([0, 90, 90, 101, 300])
RESULTS = ("output", "entropy", "mass_per_key", "mass_by_distance", "log_sum_exp")
ASKED: dict[str, Any] = {
    "model": "causal",
    "return_entropy": True,
    "return_mass_per_key": True,
    "mass_by_distance": DISTANCES,
    "return_log_sum_exp": True,
}
Arrays = dict[str, np.ndarray]
Said = dict[str, np.ndarray | None]


@pytest.fixture(scope="module")
def arrays() -> Arrays:
    generator = np.random.default_rng()
    shape = (1, HEADS, TOKENS, DIM)
    made = {
        name: generator.standard_normal(shape, np.float32) for name in ("query", "key", "value")
    }
    # Of as many keys as queries in all, but not in each sequence.
    return made | {"cu_seqlens_q": STARTS, "cu_seqlens_k": np.array([0, 80, 95, 101, 300])}


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


def of_result(result: AttendResult) -> Said:
    return {name: getattr(result, name) for name in (*RESULTS, "cu_seqlens_q", "cu_seqlens_k")}


def blocking(
    call: Callable[[AttentionClient, Arrays], AttendResult], **options: Any
) -> Callable[[str, Arrays, Path], Said]:
    def way(address: str, arrays: Arrays, folder: Path) -> Said:
        with AttentionClient(address, **options) as client:
            return of_result(call(client, arrays))

    return way


def awaited(
    call: Callable[[AsyncAttentionClient, Arrays], Awaitable[AttendResult]], **options: Any
) -> Callable[[str, Arrays, Path], Said]:
    async def way(address: str, arrays: Arrays) -> Said:
        async with AsyncAttentionClient(address, **options) as client:
            return of_result(await call(client, arrays))

    return lambda address, arrays, folder: asyncio.run(way(address, arrays))


def attend(client: Any, arrays: Arrays) -> Any:
    return client.attend(**arrays, **ASKED)


def on_a_stream(client: AttentionClient, arrays: Arrays) -> AttendResult:
    with client.stream() as stream:
        first, unpacked = stream.submit(**arrays, **ASKED), {**arrays, **ASKED}
        del unpacked["cu_seqlens_q"], unpacked["cu_seqlens_k"]
        second = stream.submit(**unpacked)
        assert second.result().cu_seqlens_q is second.result().cu_seqlens_k is None
        return first.result()


async def on_a_stream_of_asyncio(client: AsyncAttentionClient, arrays: Arrays) -> AttendResult:
    async with client.stream() as stream:
        return await stream.submit(**arrays, **ASKED)


def stored(client: AttentionClient, arrays: Arrays) -> AttendResult:
    kept = {name: client.put_tensor(array) for name, array in arrays.items()}
    kept["cu_seqlens_q"] = client.renew_tensor(kept["cu_seqlens_q"], lease=30.0)
    return client.attend(**kept, **ASKED)


def in_shared_memory(client: AttentionClient, arrays: Arrays) -> AttendResult:
    return client.attend(**{name: client.shared(array) for name, array in arrays.items()}, **ASKED)


def by_the_command(address: str, arrays: Arrays, folder: Path) -> Said:
    np.savez(folder / "in.npz", **arrays)
    words = ["--model", "causal", "--entropy", "--mass-per-key", "--log-sum-exp"]
    words += ["--mass-by-distance", str(DISTANCES)]
    files = ["--input", str(folder / "in.npz"), "--output", str(folder / "out.npz")]
    assert main(["attend", "--target", address, *words, *files]) == 0
    with np.load(folder / "out.npz") as found:
        return dict(found)


def infer(address: str, arrays: Arrays, *, stream: bool) -> Said:
    """By the Open Inference Protocol, whose answers name outputs alone."""
    inputs = []
    for name, array in arrays.items():
        inputs.append(triton.InferInput(name, array.shape, np_to_triton_dtype(array.dtype)))
        inputs[-1].set_data_from_numpy(array)
    asked: dict[str, Any] = {
        "outputs": [triton.InferRequestedOutput(name) for name in RESULTS],
        "parameters": {"mass_by_distance": DISTANCES},
    }
    with triton.InferenceServerClient(address) as client:
        if not stream:
            result = client.infer("causal", inputs, **asked)
        else:
            answers: queue.Queue[Any] = queue.Queue()
            client.start_stream(lambda result, error: answers.put((result, error)))
            client.async_stream_infer("causal", inputs, **asked)
            result, error = answers.get(timeout=30)
            assert error is None
        return {name: result.as_numpy(name) for name in RESULTS}


WAYS: dict[str, Callable[[str, Arrays, Path], Said]] = {
    "Attend": blocking(attend),
    "Attend of asyncio": awaited(attend),
    "AttendStream of one": blocking(attend, stream_threshold_bytes=0),
    "AttendStream of one, asyncio": awaited(attend, stream_threshold_bytes=0),
    "AttendStream": blocking(on_a_stream),
    "AttendStream of asyncio": awaited(on_a_stream_of_asyncio),
    "copied to shared memory": blocking(attend, shared_memory=True),
    "copied to shared memory, asyncio": awaited(attend, shared_memory=True),
    "lying in shared memory": blocking(in_shared_memory, shared_memory=True),
    "stored tensors": blocking(stored),
    "stored tensors, shared memory": blocking(stored, shared_memory=True),
    "several servers": lambda address, arrays, folder: blocking(stored)(
        [address],
        arrays,
        folder,  # type: ignore[arg-type]
    ),
    "attnserve attend": by_the_command,
    "ModelInfer": lambda address, arrays, folder: infer(address, arrays, stream=False),
    "ModelStreamInfer": lambda address, arrays, folder: infer(address, arrays, stream=True),
}


@pytest.mark.needs_library
@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_reference(
    address: str, arrays: Arrays, expected: Arrays, tmp_path: Path, way: str
) -> None:
    said = WAYS[way](address, arrays, tmp_path)
    for name, right in expected.items():
        if way.startswith("Model") and name.startswith("cu_seqlens"):
            continue
        found = said[name]
        assert found is not None, name
        np.testing.assert_allclose(found, right, atol=2e-4, rtol=1e-5, err_msg=name)


@pytest.mark.needs_library
def test_what_another_client_stored_is_not_known(client: AttentionClient, arrays: Arrays) -> None:
    kept = client.put_tensor(arrays["cu_seqlens_q"])
    named = StoredTensor(kept.handle, kept.lease, kept.shape, kept.dtype)
    assert named == kept
    said = client.attend(**{**arrays, "cu_seqlens_q": named}, **ASKED)
    assert said.cu_seqlens_q is None
    assert said.cu_seqlens_k is None
