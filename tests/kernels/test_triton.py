"""Triton without a GPU: its interpreter on every kernel, and its compiler for three generations of GPUs.

Both need triton installed (`pip install triton`, which on Linux comes with torch for CUDA), neither needs a driver.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
]
HERE = Path(__file__).parent
INTERPRETED = ("interpreted_triton.py", "interpreted_experts.py")


def run(*words: str, **variables: str) -> None:
    """A process of its own: triton reads its variables when it is imported."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]


def test_every_kernel_under_the_interpreter() -> None:
    """Those that have tests of their own, and as rows of the table beside the reference."""
    files = [str(HERE / name) for name in (*INTERPRETED, "test_table.py")]
    run("-m", "pytest", *files, "-q", "-n", "0", "-p", "no:cacheprovider", "-m", "triton and not slow",
        "--import-mode=importlib", TRITON_INTERPRET="1", QGRAFT_KERNELS="triton")  # fmt: skip


@pytest.mark.slow
def test_whole_models_under_the_interpreter() -> None:
    files = [str(HERE / name) for name in INTERPRETED]
    run("-m", "pytest", *files, "-q", "-n", "0", "-p", "no:cacheprovider", "-m", "triton and slow",
        "--import-mode=importlib", TRITON_INTERPRET="1", QGRAFT_KERNELS="triton")  # fmt: skip


def test_kernels_compile_without_spills(tmp_path: Path) -> None:
    """One format of each kind, and the kernels of rows; all with `compile_triton.py 80 90 120`."""
    run(str(HERE / "compile_triton.py"), "80:q4_k", "90:q4_1:experts", "120:q6_k", TRITON_CACHE_DIR=str(tmp_path))


@pytest.mark.slow
def test_kernels_of_experts_compile_for_every_generation(tmp_path: Path) -> None:
    words = ("80:q4_k:experts", "90:q4_k:experts", "120:q4_k:experts")
    run(str(HERE / "compile_triton.py"), *words, TRITON_CACHE_DIR=str(tmp_path))
