"""FP16 and BF16 transformers, served, against transformers with the parameters that they have."""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from attnserve_client import AttentionClient
from attnserve_export.cli import main

SEQUENCES = [[5, 9, 21, 33, 2], [7, 2], [int(n) for n in np.arange(3, 34)]]
TYPES: dict[str, tuple[torch.dtype, Any]] = {
    "FP16": (torch.float16, np.float16),
    "BF16": (torch.bfloat16, ml_dtypes.bfloat16),
}
FAMILIES = {"FP16": "gpt2", "BF16": "bert"}


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory,
    export_all: Callable[[list[list[str]]], None],
    make_checkpoint: Callable[..., None],
    serving: Callable[[Path], AbstractContextManager[str]],
) -> Iterator[tuple[Path, AttentionClient]]:
    """A checkpoint of each type by its name, and a client of a server that has them."""
    folder = tmp_path_factory.mktemp("halves")
    commands = []
    for dtype, family in FAMILIES.items():
        make_checkpoint(family, folder / dtype, layers=(1, 1))
        command = ["transformer", "--out", str(folder / "models"), "--name", dtype]
        commands.append([*command, "--dtype", dtype.lower(), "--checkpoint", str(folder / dtype)])
    export_all(commands)
    with serving(folder / "models") as address, AttentionClient(address) as client:
        yield folder, client


def rounded(checkpoint: Path, dtype: torch.dtype) -> Any:
    """In FP32, with parameters as that type has them."""
    model = transformers.AutoModel.from_pretrained(checkpoint, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    return model


@pytest.mark.parametrize("dtype", FAMILIES)
def test_hidden_states_come_in_the_models_type_and_weights_in_fp32(
    dtype: str, served: tuple[Path, AttentionClient]
) -> None:
    folder, client = served
    stored, numbers = TYPES[dtype]
    model = rounded(folder / dtype, stored)
    assert client.get_model(dtype).dtype == dtype
    for variant in client.get_model(dtype).variants:
        result = client.attend_tokens(
            SEQUENCES, model=dtype, variant=variant.name, return_weights=True, return_entropy=True
        )
        for row, ids in enumerate(SEQUENCES):
            with torch.no_grad():
                expected = model(torch.tensor([ids]), output_attentions=True)
            assert result.hidden[row].dtype == numbers
            hidden = result.hidden[row].astype(np.float32)
            # As exact as the type is: the sums are of FP32.
            unit = float(ml_dtypes.finfo(numbers).eps) / 2
            states = expected.last_hidden_state[0].numpy()
            np.testing.assert_allclose(hidden, states, rtol=unit, atol=1e-4)
            assert result.weights[row].dtype == np.float32
            maps = torch.stack(expected.attentions)[:, 0].numpy()
            np.testing.assert_allclose(result.weights[row], maps, atol=1e-4)
            assert result.entropy is not None
            logs = np.log(maps, out=np.zeros_like(maps), where=maps > 0)
            np.testing.assert_allclose(result.entropy[row], -(maps * logs).sum(axis=-1), atol=1e-4)


def test_what_is_stored_is_half_as_large(served: tuple[Path, AttentionClient]) -> None:
    folder, _ = served
    for dtype, (stored, _) in TYPES.items():
        model = transformers.AutoModel.from_pretrained(folder / dtype)
        unused = {"pooler"}
        numbers = sum(
            parameter.numel()
            for name, parameter in model.named_parameters()
            if name.split(".")[0] not in unused
        )
        data = folder / "models" / dtype / "1/model.onnx.data"
        # Each tensor begins a page.
        assert data.stat().st_size <= numbers * stored.itemsize + 4096 * len(
            list(model.parameters())
        )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_oss", "t5", "bart", "distilbert"])
def test_families_are_exported(
    family: str, dtype: str, make_checkpoint: Callable[..., None], tmp_path: Path
) -> None:
    make_checkpoint(family, tmp_path / "checkpoint")
    arguments = ["transformer", "--out", str(tmp_path), "--name", "x", "--dtype", dtype.lower()]
    assert main([*arguments, "--checkpoint", str(tmp_path / "checkpoint")]) == 0
    manifest = json.loads((tmp_path / "x/1/model.json").read_text())
    assert manifest["dtype"] == dtype
    for variant in manifest["variants"]:
        errors = variant["verification"]["max_abs_error"]
        assert all(error < 1e-4 for name, error in errors.items() if "weights" in name)
