"""The wheel that `make wheel` builds: what is in it, and that it serves where there is no compiler."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from qgraft.kernels.cpu.library import FOLDER, LEVELS
from qgraft.kernels.cpu.sources import sources_hash

ROOT = Path(__file__).parent.parent
PARTS = ("src", "setup.py", "pyproject.toml", "README.md", "LICENSE")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="setuptools is not installed"),
]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Build a wheel from a copy of the sources, with environment variables."""

    def build(**variables: str) -> Path:
        folder = tmp_path_factory.mktemp("wheel")
        for part in PARTS:
            source, ignore = ROOT / part, shutil.ignore_patterns("_native*", "__pycache__", "*.egg-info")
            (shutil.copytree(source, folder / part, ignore=ignore) if source.is_dir() else shutil.copy(source, folder))
        words = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", "out", "."]
        subprocess.run(
            [sys.executable, "-m", "pip", *words],
            cwd=folder,
            check=True,
            env={**os.environ, "CFLAGS": "-g0", **variables},
        )
        (wheel,) = (folder / "out").iterdir()
        return wheel

    return build


def doctor(wheel: Path, folder: Path) -> dict[str, object]:
    """What it finds where the wheel is installed and no program is on the path."""
    words = ["install", "--quiet", "--no-deps", "--no-compile", "--target", str(folder), str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *words], check=True)
    paths = os.pathsep.join([str(folder), sysconfig.get_path("purelib")])
    done = subprocess.run(
        [sys.executable, "-S", str(folder / "bin" / "qgraft"), "doctor", "--json"],
        capture_output=True, text=True, check=True, cwd=folder, env={"PATH": "", "PYTHONPATH": paths},
    )  # fmt: skip
    return json.loads(done.stdout)


def test_a_wheel_holds_all_that_serves_and_serves_without_a_compiler(
    build: Callable[..., Path], tmp_path: Path
) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("there is no gcc to build with")
    wheel = build()
    assert wheel.name.startswith("qgraft-") and "-py3-none-linux" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        library = archive.read("qgraft/kernels/_native.so")
    package = ROOT / "src" / "qgraft"
    expected = [
        path for pattern in ("*.py", "*.[ch]", "*.jsonl", "*.jinja", "py.typed") for path in package.rglob(pattern)
    ]
    assert len(expected) > 100 and {str(path.relative_to(ROOT / "src")) for path in expected} <= names
    assert sources_hash(FOLDER).encode() in library
    assert all(level.encode() + b"\0" in library for level in LEVELS if level != "amx")  # which torch computes
    found = doctor(wheel, tmp_path)
    assert found["native_kernels"]["available"] and found["native_kernels"]["why"].startswith("built, runs as ")
    assert found["problem"] is None


def test_without_a_compiler_it_is_built_and_installed_all_the_same(build: Callable[..., Path], tmp_path: Path) -> None:
    wheel = build(CC="no-such-compiler", LDSHARED="no-such-compiler")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if "_native" in name]
    found = doctor(wheel, tmp_path)
    assert found["native_kernels"] == {
        "available": False, "why": "not built: no C compiler was found when qgraft was installed",
    }  # fmt: skip
    assert {choice["kernel"] for choice in found["kernels"]} == {"reference"}
