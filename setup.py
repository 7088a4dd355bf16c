"""Metadata is in pyproject.toml; this file only drives CMake for the kernels (csrc/).

HEALTHGPT_CUDA=1 builds the CUDA kernels as well, which takes nvcc and some minutes.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# The modules for Python, and the libraries that ONNX Runtime opens by their path: no modules, so without the tag in the
# name.
MODULES, LIBRARIES = ["_kernels"], ["healthgpt_onnxruntime"]
ROOT = Path(__file__).resolve().parent
CUDA = os.environ.get("HEALTHGPT_CUDA") == "1"
if CUDA:
    MODULES.append("_cuda")
    LIBRARIES.append("healthgpt_onnxruntime_cuda")


class CMakeBuild(build_ext):
    """Builds MODULES and LIBRARIES with CMake and Ninja; setuptools takes them to where the package is."""

    def get_ext_filename(self, name: str) -> str:
        if name.split(".")[-1] in LIBRARIES:
            return str(Path(*name.split("."))) + ".so"
        return super().get_ext_filename(name)

    def build_extension(self, extension: Extension) -> None:
        # What is built again after every change is built where it was before.
        build = ROOT / "build" / "editable" if self.editable_mode else Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCUDA={'ON' if CUDA else 'OFF'}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={Path(self.get_ext_fullpath(extension.name)).resolve().parent}",
        ]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--target", extension.name.split(".")[-1]], check=True)


setup(
    ext_modules=[Extension(f"healthgpt_edge.{name}", sources=[]) for name in MODULES + LIBRARIES],
    cmdclass={"build_ext": CMakeBuild},
)
