"""The SDK with the oldest protobuf, grpcio and NumPy that it allows, the newest, and KServe's."""

import subprocess
import sys
from pathlib import Path

import pytest
import sdk_calls
import serving

pytestmark = [pytest.mark.slow, pytest.mark.needs_library]

ROOT = Path(__file__).parents[1]
OLDEST = ["protobuf==6.31.1", "grpcio==1.76.0", "numpy==1.26.0"]
# KServe's SDK: protobuf < 7.
BESIDE_KSERVE = ["kserve"]
NEWEST = ["protobuf>=7", "grpcio", "numpy"]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("wheels")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder)]
    subprocess.run([*pip, "./proto", "./client"], cwd=ROOT, check=True)
    return [str(wheel) for wheel in folder.iterdir()]


def test_what_the_oldest_is_stands_in_the_requirements() -> None:
    needed = (ROOT / "client" / "pyproject.toml").read_text()
    for each in OLDEST[:2]:
        assert each.replace("==", ">=") in needed
    assert "numpy>=1.26" in needed


@pytest.mark.parametrize("beside", [OLDEST, BESIDE_KSERVE, NEWEST], ids=lambda each: each[0])
def test_the_sdk_runs_beside(beside: list[str], wheels: list[str], tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", *beside, *wheels], check=True)
    subprocess.run([python, "-m", "pip", "check"], check=True)
    with serving.serving(serving.write_causal(tmp_path / "models")) as server:
        command = [python, sdk_calls.__file__, f"127.0.0.1:{server.port}"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert said.returncode == 0, said.stderr
    assert said.stdout.endswith("right\n")
    assert ("beside kserve" in said.stdout) == (beside == BESIDE_KSERVE)
