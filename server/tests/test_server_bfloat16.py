"""BF16 models through the SDK and the command line: torch's tensors, ml_dtypes' arrays, files."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from attnserve_client import AsyncAttentionClient, AttentionClient, SessionLayer
from attnserve_client._cli import main
from handmade import attention, write_core
from serving import serving
from torch.nn.functional import scaled_dot_product_attention

HEADS, DIM, LENGTH = 4, 8, 21
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("models")
    for name, dtype in (("brain", "BF16"), ("half", "FP16"), ("single", "FP32")):
        write_core(folder, name, attention(HEADS, DIM, mask="causal"), dtype=dtype)
    with serving(folder) as server:
        yield f"127.0.0.1:{server.port}"


@pytest.fixture
def client(address: str) -> Iterator[AttentionClient]:
    with AttentionClient(address) as opened:
        yield opened


@pytest.fixture
def tensors() -> list[torch.Tensor]:
    return [torch.randn(1, HEADS, LENGTH, DIM).to(torch.bfloat16) for _ in range(3)]


def expected(tensors: list[torch.Tensor], **options: Any) -> Array:
    exact = [each.double() for each in tensors]
    return scaled_dot_product_attention(*exact, is_causal=True, **options).numpy()


def check(output: Array | None, wanted: Array) -> None:
    assert output is not None
    assert output.dtype == BFLOAT16
    np.testing.assert_allclose(output.astype(np.float64), wanted, atol=3e-2)


def test_tensors_of_torch_are_taken_wherever_arrays_are(
    client: AttentionClient, address: str, tensors: list[torch.Tensor]
) -> None:
    wanted = expected(tensors)
    bias = torch.zeros(1, 1, LENGTH, LENGTH, dtype=torch.bfloat16)
    check(client.attend(*tensors, model="brain").output, wanted)
    check(client.attend(*tensors, model="brain", bias=bias).output, wanted)
    turned = [each.transpose(1, 2).contiguous().transpose(1, 2) for each in tensors]
    check(client.attend(*turned, model="brain").output, wanted)
    stored = [client.put_tensor(each) for each in tensors]
    assert stored[0].dtype == BFLOAT16
    check(client.attend(*stored, model="brain").output, wanted)
    with client.stream() as stream:
        check(stream.submit(*tensors, model="brain").result().output, wanted)
    with AttentionClient(address, shared_memory=True) as beside:
        shared = [beside.shared(each) for each in tensors]
        check(beside.attend(*shared, model="brain").output, wanted)

    async def ask() -> Array | None:
        async with AsyncAttentionClient(address) as opened:
            return (await opened.attend(*tensors, model="brain")).output

    check(asyncio.run(ask()), wanted)


@pytest.mark.needs_library
def test_tensors_of_torch_in_sessions(
    client: AttentionClient, address: str, tensors: list[torch.Tensor]
) -> None:
    wanted = expected(tensors)[0].swapaxes(0, 1)
    rows = [each[0].transpose(0, 1) for each in tensors]  # [S, H, D]
    parts = [(0, 9), (9, LENGTH)]
    with client.session("brain", num_layers=1, max_tokens=64) as session:
        for first, last in parts:
            given = [each[first:last] for each in rows]
            check(session.attend(0, *given).output, wanted[first:last])

    async def ask() -> list[Array | None]:
        async with AsyncAttentionClient(address) as opened:
            layers = [SessionLayer()]
            async with await opened.session(
                "brain", num_layers=1, layers=layers, max_tokens=64
            ) as session:
                return [
                    (await session.attend(0, *(each[first:last] for each in rows))).output
                    for first, last in parts
                ]

    for (first, last), output in zip(parts, asyncio.run(ask()), strict=True):
        check(output, wanted[first:last])


def test_what_cannot_be_read_is_told_what_can(
    client: AttentionClient, tensors: list[torch.Tensor]
) -> None:
    query = tensors[0].clone().requires_grad_()
    with pytest.raises(TypeError, match=r"query: .*requires a gradient.*bfloat16"):
        client.attend(query, *tensors[1:], model="brain")


def attend(address: str, *words: object) -> int:
    return main(["attend", "--target", address, *map(str, words)])


@pytest.mark.parametrize("model", ["brain", "half", "single"])
def test_the_command_with_random_tensors(
    address: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.npz"
    words = ["--seq-len", 9, "--batch", 2, "--weights", "--entropy", "--output", out]
    assert attend(address, "--model", model, *words) == 0
    dtype = {"brain": "bfloat16", "half": "float16", "single": "float32"}[model]
    assert f"output: [2, {HEADS}, 9, {DIM}] {dtype}" in capsys.readouterr().out
    with np.load(out) as found:
        assert found["weights"].dtype == (np.float16 if model == "half" else np.float32)
        np.testing.assert_allclose(found["weights"].astype(np.float32).sum(-1), 1, atol=3e-2)


@pytest.mark.parametrize("model", ["brain", "half", "single"])
@pytest.mark.parametrize("kind", [BFLOAT16, np.float16, np.float32, np.float64])
def test_the_command_with_a_file_of_any_floating_point_dtype(
    address: str, model: str, kind: Any, tmp_path: Path
) -> None:
    generator = np.random.default_rng()
    arrays = [generator.standard_normal((1, HEADS, 7, DIM)).astype(kind) for _ in range(3)]
    np.savez(tmp_path / "in.npz", **dict(zip("qkv", arrays, strict=True)), scale=np.float32(0.5))
    assert attend(
        address, "--model", model, "--input", tmp_path / "in.npz", "--output", tmp_path / "out.npz"
    ) == 0  # fmt: skip
    wanted = expected([torch.from_numpy(each.astype(np.float64)) for each in arrays], scale=0.5)
    with np.load(tmp_path / "out.npz") as found:
        np.testing.assert_allclose(found["output"].astype(np.float64), wanted, atol=3e-2)


def test_names_of_the_arrays_of_a_file(
    address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = np.zeros((1, HEADS, 2, DIM), np.float32)
    for arrays, message in (
        ({"q": rows, "query": rows}, "with query and query; allowed: one of them"),
        ({"query": rows, "scale": np.zeros(2)}, "scale of float64, shape [2]; allowed: one number"),
        ({"query": rows, "softcap": np.array("x")}, "allowed: one number"),
        ({"queries": rows}, "arrays called queries; allowed: an .npz file of arrays called query,"),
    ):
        np.savez(tmp_path / "in.npz", **arrays)
        assert attend(address, "--model", "single", "--input", tmp_path / "in.npz") == 2
        assert message in capsys.readouterr().err
    np.savez(tmp_path / "in.npz", q=rows, k=rows, v=rows, scale=2)
    words = ["--model", "single", "--input", tmp_path / "in.npz", "--scale", 1]
    assert attend(address, *words) == 2
    assert "--scale: given 1, and in --input" in capsys.readouterr().err
