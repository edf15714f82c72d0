"""Each header stands alone: it has a guard, includes what it uses, and gives the compiler nothing to warn of."""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from qgraft.kernels.cpu.library import FOLDER

HEADERS = sorted(path.name for path in FOLDER.glob("*.h"))
STRICT = ["-std=gnu11", "-fopenmp", "-Wall", "-Wextra", "-Wshadow", "-Werror", "-Wno-unused-function", "-fsyntax-only"]


def test_every_header_has_a_guard_of_its_name() -> None:
    assert len(HEADERS) > 10
    for name in HEADERS:
        guard = "QGRAFT_" + re.sub(r"\W", "_", name).upper()
        text = (FOLDER / name).read_text()
        assert re.search(rf"\A/\*.*?\*/\n\n#ifndef {guard}\n#define {guard}\n", text, flags=re.DOTALL), name
        assert text.endswith("\n#endif\n"), name


@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc to compile with")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="vectors of x86-64")
def test_every_header_compiles_alone_twice(tmp_path: Path) -> None:
    """And twice over, as where two others include it."""
    sources = []
    for name in HEADERS:
        path = tmp_path / f"{name}.c"
        path.write_text(f'#define GEMM_INT8 qgraft_gemm_int8_avx2\n#include "{name}"\n#include "{name}"\n')
        sources.append(str(path))
    command = ["gcc", *STRICT, "-march=x86-64-v3", "-I", str(FOLDER), *sources]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
