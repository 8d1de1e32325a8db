"""The wheels serve where there is neither a compiler nor what the data plane is built from."""

import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from attnserve_client import AttentionClient
from elftools.elf.elffile import ELFFile
from handmade import attention, write_core

ROOT = Path(__file__).parents[2]
# What manylinux counts on: glibc, the C++ runtime, zlib.
EVERYWHERE = re.compile(
    r"(libc|libm|libz|libdl|librt|libpthread|libstdc\+\+|libgcc_s|ld-linux[\w-]*)\.so"
)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheels() -> dict[str, Path]:
    """By distribution."""
    subprocess.run([ROOT / "scripts" / "wheels"], check=True)
    return {path.name.split("-")[0]: path for path in (ROOT / "dist").glob("*.whl")}


def needed(library: Path) -> list[str]:
    """The shared libraries that one is linked with."""
    with library.open("rb") as file:
        dynamic = ELFFile(file).get_section_by_name(".dynamic")
        return [tag.needed for tag in dynamic.iter_tags() if tag.entry.d_tag == "DT_NEEDED"]


def test_there_is_a_wheel_of_each_distribution(wheels: dict[str, Path]) -> None:
    names = "client cluster dataplane export kernels lens loadtest proto server"
    assert sorted(wheels) == [f"attnserve_{name}" for name in names.split()]
    for path in wheels.values():
        packed = zipfile.ZipFile(path).namelist()
        assert not [name for name in packed if "/tests/" in name or "__pycache__" in name]
    assert "manylinux" in wheels["attnserve_dataplane"].name


def test_a_server_from_wheels_needs_nothing_of_the_system(
    wheels: dict[str, Path], tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", bare], check=True)
    path = str(bare / "bin")
    assert shutil.which("c++", path=path) is None
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PATH"] = path
    install = [bare / "bin" / "python", "-m", "pip", "install", "--quiet", "--only-binary", ":all:"]
    chosen = [wheels[f"attnserve_{name}"] for name in ("proto", "kernels", "dataplane", "server")]
    subprocess.run([*install, "-c", ROOT / "constraints.txt", *chosen], check=True, env=environment)

    (site,) = bare.glob("lib/python*/site-packages")
    (core,) = (site / "attnserve_dataplane").glob("_core*.so")
    libraries = list((site / "attnserve_dataplane.libs").iterdir())
    bundled = {library.name for library in libraries}
    for library in [core, *libraries]:
        strangers = [name for name in needed(library) if not EVERYWHERE.match(name)]
        assert set(strangers) <= bundled, library.name
    assert any(name.startswith("libnghttp2") for name in bundled)

    repository = tmp_path / "models"
    write_core(repository, "causal", attention(2, 8, mask="causal"))
    command = [bare / "bin" / "attnserve-server", "--repository", repository, "--port", "0"]
    server = subprocess.Popen(
        [*command, "--metrics-port", "-1", "--provider", "cpu"],
        env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert server.stderr is not None
        log = ""
        for line in server.stderr:
            log += line
            if found := re.search(r'"message": "serving", "address": "([^"]+)"', line):
                break
        else:
            pytest.fail(log)
        query = np.ones((1, 2, 5, 8), np.float32)
        with AttentionClient(found[1]) as client:
            result = client.attend(query, query, query, model="causal")
        np.testing.assert_allclose(result.output, query, rtol=1e-5)
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=30)
    assert server.returncode == 0
