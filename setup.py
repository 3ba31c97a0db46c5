"""Builds the C++ extension `mvbert._core` with CMake; metadata is in pyproject.toml."""

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).parent.resolve()

if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(f"mvbert needs setuptools>=77 to build, this is {setuptools.__version__}")


def build_tool(name: str, directory: str) -> str:
    """The tool from its pip package in this environment, or else from PATH."""
    try:
        path = shutil.which(name, path=getattr(importlib.import_module(name), directory))
    except (ImportError, AttributeError):
        path = None
    path = path or shutil.which(name)
    if path is None:
        sys.exit(f"mvbert needs {name} to build its C++ part; run: pip install {name}")
    return path


class CMakeBuild(build_ext):
    """Configures and builds the one CMake target straight into the place setuptools names."""

    def build_extension(self, ext: Extension) -> None:
        cmake = build_tool("cmake", "CMAKE_BIN_DIR")
        try:
            import pybind11
        except ImportError:
            sys.exit("mvbert needs pybind11 to build its C++ part; run: pip install pybind11")
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        # Objects stay, whatever temporary folder pip names: a rebuild compiles what has changed.
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        configure = [
            cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={build_tool('ninja', 'BIN_DIR')}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={module.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build), "--target", "_core"], check=True)


class EditableWheel(editable_wheel):
    """`pip install -e`: a folder goes on sys.path that holds nothing but a link to the package.

    setuptools' import hook, its way for a package_dir like ours, is asked after sys.path. In the
    folder above a clone named mvbert, Python would take the clone for a namespace package and never
    ask. The root of the clone must not be on sys.path: CONTRIBUTING.md, "The name `kernels`".
    """

    def finalize_options(self) -> None:
        link = ROOT / ".editable" / "mvbert"
        link.parent.mkdir(exist_ok=True)
        if not link.is_symlink():
            link.symlink_to("../mvbert")
        self.distribution.package_dir = {"": link.parent.name}
        super().finalize_options()


setup(
    packages=[
        "mvbert",
        "mvbert.kernels",
        "mvbert.presets",
        "mvbert.text",
        "mvbert.model",
        "mvbert.training",
        "mvbert.study",
        "mvbert.tasks",
        "mvbert.publish",
        "mvbert.publish.page",
    ],
    # The folder's own name is Hugging Face's: it is imported as mvbert.kernels (CONTRIBUTING.md).
    package_dir={"mvbert": "mvbert", "mvbert.kernels": "kernels"},
    package_data={
        "mvbert": ["py.typed", "*.pyi"],
        "mvbert.kernels": ["*.json", "*.md"],
        "mvbert.presets": ["*.toml"],
        "mvbert.publish": ["sample.txt"],
        "mvbert.publish.page": ["*"],
    },
    ext_modules=[Extension("mvbert._core", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "editable_wheel": EditableWheel},
)
