"""Builds the native CPU kernels as an optional extension; everything else is in pyproject.toml.

The extension is a shared library of plain C functions, loaded through ctypes (src/qgraft/kernels/native.py): it needs
neither Python's nor torch's headers at run time. Without a compiler the build goes on, the torch reference kernels
serve, and `qgraft doctor` says so.
"""

import sys

from setuptools import Extension, setup

OPENMP = ["-fopenmp"] if sys.platform == "linux" else []

native = Extension(
    "qgraft.kernels._native",
    sources=[
        f"src/qgraft/kernels/{name}.c"
        for name in (
            *("native", "linear", "pointwise", "samples", "decode"),
            *("level_base", "level_v3", "level_v4", "level_bf16"),
        )
    ],
    depends=[
        f"src/qgraft/kernels/{name}.h"
        for name in (
            *("native", "level", "rows", "simd", "small", "panels", "low_rank"),
            *("activations", "int8", "attend", "pointwise", "samples"),
        )
    ],
    # -ffp-contract=off: dequantized values must equal the reference bit for bit, fused multiply-add or not
    # -fno-trapping-math: nobody reads the flags of floating point, and without it loops with a ? b : c stay scalar
    extra_compile_args=["-O3", "-std=gnu11", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", *OPENMP],
    extra_link_args=OPENMP,
    libraries=["m"],
    optional=True,
)

setup(ext_modules=[native])
