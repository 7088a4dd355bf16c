"""Metadata is in pyproject.toml; this file only drives CMake for the kernels (csrc/).

HEALTHGPT_CUDA=1 builds the CUDA kernels as well, which takes nvcc and some minutes.
"""

import os
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# The module for Python, and the library that ONNX Runtime opens by its path: no module, so without the tag in its name.
MODULE, LIBRARY = "_kernels", "healthgpt_onnxruntime"
CUDA = os.environ.get("HEALTHGPT_CUDA") == "1"


class CMakeBuild(build_ext):
    """Builds MODULE and LIBRARY with CMake and Ninja; setuptools takes them to where the package is."""

    def get_ext_filename(self, name: str) -> str:
        if name.split(".")[-1] == LIBRARY:
            return str(Path(*name.split("."))) + ".so"
        return super().get_ext_filename(name)

    def build_extension(self, extension: Extension) -> None:
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            "-S",
            str(Path(__file__).resolve().parent),
            "-B",
            str(build),
            "-G",
            "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCUDA={'ON' if CUDA else 'OFF'}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={Path(self.get_ext_fullpath(extension.name)).resolve().parent}",
        ]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--target", extension.name.split(".")[-1]], check=True)


setup(
    ext_modules=[Extension(f"healthgpt_edge.{name}", sources=[]) for name in (MODULE, LIBRARY, *["_cuda"] * CUDA)],
    cmdclass={"build_ext": CMakeBuild},
)
