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
SOURCES = ["attnserve/v1/attention.proto", "inference/open_inference.proto"]


def generate() -> None:
    """Run protoc into the package, then point the generated imports into the package."""
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{HERE}"]
    command += [f"--{kind}_out={OUTPUT}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    subprocess.run([*command, *SOURCES], check=True, cwd=HERE)
    for source in SOURCES:
        folder = OUTPUT / Path(source).parent
        for package in {folder, OUTPUT / Path(source).parts[0]}:
            (package / "__init__.py").touch()
        for generated in folder.glob("*_pb2*.py*"):
            text = generated.read_text()
            imports = r"^from (attnserve\.v1|inference) import"
            text = re.sub(imports, rf"from {PACKAGE}.\1 import", text, flags=re.M)
            if source.startswith("inference/"):
                text = with_pool_of_its_own(text)
            generated.write_text(text)


def with_pool_of_its_own(text: str) -> str:
    """Generated code whose names do not clash with those of other clients of the protocol.

    protobuf's default pool takes each full name once per process, and whoever else speaks the Open
    Inference Protocol (tritonclient, KServe's SDK) registers `inference.ModelInferRequest` too.
    """
    return text.replace("_descriptor_pool.Default()", "_descriptor_pool.DescriptorPool()")


class BuildWithStubs(build_py):
    def run(self) -> None:
        generate()
        super().run()


for made in ("attnserve/v1", "inference"):
    (OUTPUT / made).mkdir(parents=True, exist_ok=True)
setup(cmdclass={"build_py": BuildWithStubs})
