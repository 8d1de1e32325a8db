"""Models that other tests write by hand say of themselves what exported ones do."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attnserve_export.attention.layer import AttentionLayer, LayerConfig
from attnserve_export.models import seeded
from handmade import attention, write_core, write_layer


@pytest.mark.needs_library
def test_manifests_are_those_of_exports(
    tmp_path: Path, export_all: Callable[[list[list[str]]], None]
) -> None:
    sizes = ["--num-heads", "6", "--num-kv-heads", "1", "--head-dim", "8"]
    exported, written = tmp_path / "exported", tmp_path / "written"
    export_all(
        [
            # As in test_export_core.py, so that it is exported once.
            ["core", "--out", str(exported), "--name", "half", *sizes, "--dtype", "fp16"],
            ["layer", "--out", str(exported), "--name", "layer", *sizes[:2], "--embed-dim", "24"],
        ]
    )
    write_core(written, "half", attention(6, 8, num_kv_heads=1), dtype="FP16")
    config = LayerConfig(attention(6, 4), embed_dim=24, context_dim=None)
    write_layer(written, "layer", seeded(AttentionLayer, config, 0))
    for name in ("half", "layer"):
        assert described(written / name) == described(exported / name)


def described(model: Path) -> dict[str, Any]:
    """A manifest, but for what differs from run to run and where the parameters come from."""
    manifest = json.loads((model / "1/model.json").read_text())
    manifest["files"] = sorted(manifest["files"])
    del manifest["source"]
    for variant in manifest["variants"]:
        verification = variant["verification"]
        variant["verified"] = [(case["case"], case["dims"]) for case in verification["cases"]]
        variant["compared"] = sorted(variant.pop("verification")["max_abs_error"])
    return manifest
