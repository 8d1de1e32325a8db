"""Builds the operators; without a C++ compiler the package installs without them."""

import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FLAGS = ["-O3", "-std=c++17", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-Wextra"]
# GCC notes that passing vectors between functions differs by instruction set: these are inlined.
FLAGS += ["-Wno-psabi", "-Wno-ignored-attributes", "-Wno-unknown-pragmas"]


class BuildOperators(build_ext):
    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:
            # The models' graphs that need no operators of ours stay in use.
            print(f"attnserve-kernels: installed without operators: {error}", file=sys.stderr)


setup(
    cmdclass={"build_ext": BuildOperators},
    ext_modules=[
        Extension(
            "attnserve_kernels.operators",
            sources=[
                "native/attention.cpp",
                "native/attention_avx512.cpp",
                "native/attention_avx2.cpp",
                "native/attention_generic.cpp",
                "native/operators.cpp",
                "native/paged.cpp",
                "native/paged_operator.cpp",
            ],
            depends=[
                "native/attention.h",
                "native/attention_mask.inc",
                "native/attention_tiles.inc",
                "native/onnxruntime_abi.h",
                "native/operator_context.h",
                "native/paged.h",
                "native/paged_operator.h",
                "native/paged_tiles.inc",
                "native/paged_weights.inc",
            ],
            include_dirs=["native"],
            extra_compile_args=FLAGS,
            language="c++",
            optional=True,
        )
    ],
)
