"""Every way in which `attend` can be called, as one function: the same request, the same answer."""

import asyncio
import queue
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from attnserve_client import AsyncAttentionClient, AttendResult, AttentionClient
from attnserve_client._cli import main
from tritonclient.utils import np_to_triton_dtype

Arrays = Mapping[str, np.ndarray]
Said = dict[str, np.ndarray]
# Address, tensors, other arguments of `attend`, and a folder for files.
Way = Callable[[str, Arrays, dict[str, Any], Path], Said]

RESULTS = (
    "output", "weights", "entropy", "top_k_indices", "top_k_weights", "mass_per_key",
    "mass_by_distance", "log_sum_exp", "cu_seqlens_q", "cu_seqlens_k",
)  # fmt: skip
# Little is shared: a new region is filled with zeros for every call.
_SHARED: dict[str, Any] = {"shared_memory": True, "shared_memory_bytes": 1 << 20}
# What asks for a result, by its name.
_FLAGS = {
    "return_weights": ("weights",),
    "return_entropy": ("entropy",),
    "return_mass_per_key": ("mass_per_key",),
    "return_log_sum_exp": ("log_sum_exp",),
    "top_k": ("top_k_indices", "top_k_weights"),
    "mass_by_distance": ("mass_by_distance",),
}


def _of_result(result: AttendResult) -> Said:
    found = {name: getattr(result, name) for name in RESULTS}
    return {name: array for name, array in found.items() if array is not None}


def _blocking(call: Callable[..., AttendResult], **options: Any) -> Way:
    def way(address: str, arrays: Arrays, asked: dict[str, Any], _: Path) -> Said:
        with AttentionClient(address, **options) as client:
            return _of_result(call(client, arrays, asked))

    return way


def _awaited(call: Callable[..., Awaitable[AttendResult]], **options: Any) -> Way:
    async def way(address: str, arrays: Arrays, asked: dict[str, Any]) -> Said:
        async with AsyncAttentionClient(address, **options) as client:
            return _of_result(await call(client, arrays, asked))

    return lambda address, arrays, asked, _: asyncio.run(way(address, arrays, asked))


def _attend(client: Any, arrays: Arrays, asked: dict[str, Any]) -> Any:
    return client.attend(**arrays, **asked)


def _on_a_stream(client: AttentionClient, arrays: Arrays, asked: dict[str, Any]) -> AttendResult:
    with client.stream() as stream:
        # Others before and after it: answers are told apart by their ids.
        alone = {name: arrays[name] for name in ("query", "key", "value") if name in arrays}
        others = [stream.submit(**alone, model=asked["model"]) for _ in range(2)]
        future = stream.submit(**arrays, **asked)
        others.append(stream.submit(**alone, model=asked["model"]))
        for other in others:
            assert other.result().cu_seqlens_q is other.result().cu_seqlens_k is None
        return future.result()


async def _on_a_stream_of_asyncio(
    client: AsyncAttentionClient, arrays: Arrays, asked: dict[str, Any]
) -> AttendResult:
    async with client.stream() as stream:
        return await stream.submit(**arrays, **asked)


def _stored(client: AttentionClient, arrays: Arrays, asked: dict[str, Any]) -> AttendResult:
    kept = {name: client.put_tensor(array) for name, array in arrays.items()}
    renewed = {name: client.renew_tensor(tensor, lease=30.0) for name, tensor in kept.items()}
    return client.attend(**renewed, **asked)


def _stored_at_one(address: str, arrays: Arrays, asked: dict[str, Any], _: Path) -> Said:
    with AttentionClient([address]) as client:
        return _of_result(_stored(client, arrays, asked))


def _in_shared_memory(
    client: AttentionClient, arrays: Arrays, asked: dict[str, Any]
) -> AttendResult:
    return client.attend(**{n: client.shared(array) for n, array in arrays.items()}, **asked)


def _by_the_command(address: str, arrays: Arrays, asked: dict[str, Any], folder: Path) -> Said:
    given, made = folder / "in.npz", folder / "out.npz"
    np.savez(given, **arrays)  # type: ignore[arg-type]
    words = ["attend", "--target", address, "--input", str(given), "--output", str(made)]
    for name, value in asked.items():
        option = "--" + name.removeprefix("return_").replace("_", "-")
        words += [option] if value is True else [option, str(value)] if value else []
    assert main(words) == 0
    with np.load(made) as found:
        return dict(found)


def _inferred(address: str, arrays: Arrays, asked: dict[str, Any], *, stream: bool) -> Said:
    """By the Open Inference Protocol, whose answers hold outputs alone."""
    inputs = []
    for name, array in arrays.items():
        inputs.append(triton.InferInput(name, array.shape, np_to_triton_dtype(array.dtype)))
        inputs[-1].set_data_from_numpy(array)
    names = ["output", *(each for flag in _FLAGS if asked.get(flag) for each in _FLAGS[flag])]
    parameters = {name: value for name, value in asked.items() if name not in _FLAGS}
    parameters |= {name: asked[name] for name in ("top_k", "mass_by_distance") if asked.get(name)}
    request: dict[str, Any] = {
        "model_name": parameters.pop("model"),
        "inputs": inputs,
        "outputs": [triton.InferRequestedOutput(name) for name in names],
        "parameters": {name: value for name, value in parameters.items() if value != ""},
    }
    with triton.InferenceServerClient(address) as client:
        if stream:
            answers: queue.Queue[Any] = queue.Queue()
            client.start_stream(lambda result, error: answers.put((result, error)))
            client.async_stream_infer(**request)
            result, error = answers.get(timeout=30)
            assert error is None, error
        else:
            result = client.infer(**request)
        return {name: result.as_numpy(name) for name in names}


WAYS: dict[str, Way] = {
    "Attend": _blocking(_attend),
    "Attend of asyncio": _awaited(_attend),
    "AttendStream of one": _blocking(_attend, stream_threshold_bytes=0),
    "AttendStream of one, asyncio": _awaited(_attend, stream_threshold_bytes=0),
    "AttendStream": _blocking(_on_a_stream),
    "AttendStream of asyncio": _awaited(_on_a_stream_of_asyncio),
    "copied to shared memory": _blocking(_attend, **_SHARED),
    "copied to shared memory, asyncio": _awaited(_attend, **_SHARED),
    "lying in shared memory": _blocking(_in_shared_memory, **_SHARED),
    "stored tensors": _blocking(_stored),
    "stored tensors, shared memory": _blocking(_stored, **_SHARED),
    "stored tensors, several servers": _stored_at_one,
    "attnserve attend": _by_the_command,
    "ModelInfer": lambda *given: _inferred(*given[:3], stream=False),
    "ModelStreamInfer": lambda *given: _inferred(*given[:3], stream=True),
}
