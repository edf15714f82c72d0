"""Builds the native CPU kernels as an optional extension; everything else is in pyproject.toml.

The extension is a shared library of plain C functions, loaded through ctypes (src/qgraft/kernels/cpu/library.py): it needs
neither Python's nor torch's headers at run time, and one file serves every version of Python. Without a compiler the
build goes on, the torch reference kernels serve, and `qgraft doctor` says so.
"""

import os
import runpy
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = Path("src/qgraft/kernels/cpu")
HASH = runpy.run_path(str(SOURCES / "sources.py"))["sources_hash"](SOURCES)
# -g0: where Python was compiled with -g its flags would make the library eight times as large. With sanitizers -O1 compiles
# ten times as fast.
OPTIMIZE = os.environ.get("QGRAFT_OPTIMIZE", "-O3 -g0").split()
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []

native = Extension(
    "qgraft.kernels._native",
    sources=sorted(map(str, SOURCES.glob("*.c"))),
    depends=sorted(map(str, SOURCES.glob("*.h"))),
    define_macros=[("QGRAFT_SOURCES", f'"{HASH}"')],
    # -ffp-contract=off: dequantized values must equal the reference bit for bit, fused multiply-add or not
    # -fno-trapping-math: nobody reads the flags of floating point, and without it loops with a ? b : c stay scalar
    extra_compile_args=[*OPTIMIZE, "-std=gnu11", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", *OPENMP],
    extra_link_args=OPENMP,
    libraries=["m"],
    optional=True,
)


class BuildLibrary(build_ext):
    """Builds a file that is named for no version of Python, and anew whenever it was made from other sources."""

    def get_ext_filename(self, fullname: str) -> str:
        """Without the tag of an extension module of this Python."""
        return str(Path(*fullname.split(".")).with_suffix(".dll" if sys.platform == "win32" else ".so"))

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """No PyInit function, which Windows would look for."""
        return ext.export_symbols

    def build_extension(self, ext: Extension) -> None:
        """A library of other sources goes first: their dates may be older, and without a compiler it would stay."""
        library = Path(self.get_ext_fullpath(ext.name))
        if library.exists() and HASH.encode() not in library.read_bytes():
            library.unlink()
        one_by_one = self.compiler.compile

        def at_once(sources: list[str], *args: Any, **options: Any) -> list[str]:
            """The objects of the sources, each compiled on a core of its own."""
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return [
                    path for paths in pool.map(lambda s: one_by_one([s], *args, **options), sources) for path in paths
                ]

        self.compiler.compile = at_once
        super().build_extension(ext)


class LibraryWheel(bdist_wheel):
    """A wheel for every Python 3 on this kind of machine."""

    def get_tag(self) -> tuple[str, str, str]:
        """(python, abi, platform)."""
        return "py3", "none", super().get_tag()[2]


setup(ext_modules=[native], cmdclass={"build_ext": BuildLibrary, "bdist_wheel": LibraryWheel})
