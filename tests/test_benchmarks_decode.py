"""benchmarks/decode.py: a section of it gives figures, and its client in C++ takes real steps."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from attnserve_export.attention.layer import AttentionLayer, LayerConfig
from attnserve_export.attention.positions import Rotary
from attnserve_export.models import seeded
from handmade import attention, write_core, write_layer

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def _missing() -> bool:
    if not shutil.which("pkg-config") or not shutil.which("g++"):
        return True
    return subprocess.run(["pkg-config", "--exists", "libnghttp2"]).returncode != 0


pytestmark = [
    pytest.mark.needs_library,
    pytest.mark.skipif(_missing(), reason="needs g++ and libnghttp2-dev"),
]


@pytest.mark.slow
def test_steps_of_both_kinds_of_models_and_a_shared_prefix(tmp_path: Path) -> None:
    causal = attention(8, 64, mask="causal", alignment="bottom-right")
    write_core(tmp_path, "causal", causal)
    turned = attention(8, 64, mask="causal", rotary=Rotary("half", 64))
    layer = seeded(AttentionLayer, LayerConfig(turned, 512, context_dim=None), 0)
    write_layer(tmp_path, "layer", layer, variants=("paged",))
    report = tmp_path / "figures.json"
    command = [sys.executable, BENCHMARKS / "decode.py", "--quick", "--repository", tmp_path]
    command += ["--sections", "step,layer,prefix", "--json", report]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sections = json.loads(report.read_text())["sections"]
    for row in sections["step"]["rows"]:
        # Query, key and value out, output in: 8 KiB of elements, whatever the context.
        assert 8192 < row["bytes"] < 9000
        assert min(row["native_ms"], row["sdk_ms"], row["in_process_ms"]) > 0
    for row in sections["layer"]["rows"]:
        # Hidden states out, output in.
        assert 4096 < row["bytes"] < 4500
        assert 8192 < row["core_bytes"] < 9000
        assert min(row["layer_ms"], row["core_ms"], row["in_process_ms"]) > 0
    (row,) = sections["prefix"]["rows"]
    assert row["found"] == "[2048]"
    assert row["bytes/least"] == 1
