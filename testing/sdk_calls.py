"""Calls of the SDK in an environment that has nothing else of attnserve: run with an address."""

import asyncio
import importlib.util
import math
import sys
from typing import Any

import numpy as np
from attnserve_client import AsyncAttentionClient, AttentionClient

Array = np.ndarray[Any, Any]
SHAPE = (1, 4, 5, 8)  # B, H, S, D of the model `causal`
GENERATOR = np.random.default_rng()


def random() -> list[Array]:
    """Query, key and value."""
    return [GENERATOR.standard_normal(SHAPE).astype(np.float32) for _ in range(3)]


def expected(query: Array, key: Array, value: Array) -> Array:
    """Causal attention."""
    scores = query @ key.swapaxes(-1, -2) / math.sqrt(SHAPE[-1])
    scores = np.where(np.tri(SHAPE[-2], dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    result: Array = weights / weights.sum(-1, keepdims=True) @ value
    return result


def check(given: Any, arrays: list[Array]) -> None:
    """Compare with NumPy."""
    np.testing.assert_allclose(given, expected(*arrays), rtol=1e-4, atol=1e-5)


def tokens_of(array: Array) -> list[Array]:
    """[H, S, D] as rows of single tokens, [1, H, D] each."""
    return list(array[0].transpose(1, 0, 2)[:, None])


def blocking(address: str) -> None:
    """What `AttentionClient` does, in messages and in shared memory."""
    for shared_memory in (False, True):
        with AttentionClient(address, shared_memory=shared_memory) as client:
            arrays = random()
            check(client.attend(*arrays, model="causal").output, arrays)
            with client.stream() as stream:
                check(stream.submit(*arrays, model="causal").result().output, arrays)
            with client.session("causal", num_layers=1, max_tokens=64) as session:
                rows = zip(*map(tokens_of, arrays), strict=True)
                outputs = [session.attend(0, *row).output for row in rows]
                check(np.concatenate(outputs).transpose(1, 0, 2)[None], arrays)


async def awaited(address: str) -> None:
    """What `AsyncAttentionClient` does."""
    async with AsyncAttentionClient(address) as client:
        arrays = random()
        check((await client.attend(*arrays, model="causal")).output, arrays)
        async with await client.session("causal", num_layers=1, max_tokens=64) as session:
            rows = zip(*map(tokens_of, arrays), strict=True)
            outputs = [(await session.attend(0, *row)).output for row in rows]
            check(np.concatenate(outputs).transpose(1, 0, 2)[None], arrays)


async def kserve(address: str) -> None:
    """The same model by KServe's client, in this process."""
    from kserve import InferenceGRPCClient, InferInput, InferRequest

    arrays = random()
    inputs = []
    for name, array in zip(("query", "key", "value"), arrays, strict=True):
        inputs.append(InferInput(name, list(array.shape), "FP32"))
        inputs[-1].set_data_from_numpy(array)
    client = InferenceGRPCClient(address)
    response = await client.infer(InferRequest(model_name="causal", infer_inputs=inputs))
    [output] = [each for each in response.outputs if each.name == "output"]
    check(output.as_numpy(), arrays)
    await client.close()


if __name__ == "__main__":
    blocking(sys.argv[1])
    asyncio.run(awaited(sys.argv[1]))
    if importlib.util.find_spec("kserve") is not None:
        asyncio.run(kserve(sys.argv[1]))
        print("beside kserve: ", end="")
    print("right")
