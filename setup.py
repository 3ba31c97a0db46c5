"""Builds the C++ extension `mvbert._tokenizer` with CMake; metadata is in pyproject.toml."""

import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Configures and builds the one CMake target straight into the place setuptools names."""

    def build_extension(self, ext: Extension) -> None:
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={module.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--target", "_tokenizer"], check=True)


setup(
    packages=["mvbert", "mvbert.kernels"],
    # The folder's own name belongs to Hugging Face's `kernels`, so it is imported as mvbert.kernels.
    package_dir={"mvbert": "mvbert", "mvbert.kernels": "kernels"},
    package_data={"mvbert": ["py.typed", "*.pyi", "presets/*.toml"], "mvbert.kernels": ["*.cu", "*.md"]},
    ext_modules=[Extension("mvbert._tokenizer", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
