"""Generates the Python stubs from the .proto files whenever the package is built or installed."""

import re
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
PACKAGE = "attnserve_proto"
OUTPUT = HERE / "src" / PACKAGE
SOURCES = ["attnserve/v1/attention.proto"]


def generate() -> None:
    """Run protoc into the package, then point the generated imports into the package."""
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{HERE}"]
    command += [f"--{kind}_out={OUTPUT}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    subprocess.run([*command, *SOURCES], check=True, cwd=HERE)
    for source in SOURCES:
        folder = OUTPUT / Path(source).parent
        for package in (folder, folder.parent):
            (package / "__init__.py").touch()
        for generated in folder.glob("*_pb2*.py*"):
            text = generated.read_text()
            imports = r"^from attnserve\."
            generated.write_text(re.sub(imports, f"from {PACKAGE}.attnserve.", text, flags=re.M))


class BuildWithStubs(build_py):
    def run(self) -> None:
        generate()
        super().run()


(OUTPUT / "attnserve" / "v1").mkdir(parents=True, exist_ok=True)
setup(cmdclass={"build_py": BuildWithStubs})
