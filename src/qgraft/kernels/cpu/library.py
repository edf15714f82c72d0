"""The C library: where it is, whether it was made from the sources beside it, and which level of CPU it runs as.

    QGRAFT_NATIVE_LIBRARY   another library than kernels/_native.so: one with sanitizers (`make sanitize`)
    QGRAFT_CPU_LEVEL        a lower level than this CPU's, to test and to compare:

        plain           any CPU: plain C for few rows, torch's sgemm for many
        avx2            x86-64-v3
        avx512          x86-64-v4;  avx512-vnni: with 8-bit products of its own
        avx512-bf16     with products of bfloat16 numbers
        amx             with those of torch (oneDNN), which has tiles for them

A level decides what qgraft computes and how it chooses, `--compute auto` among it. It does not reach into torch, whose own
products are as the CPU is: ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA are for that, see `make test-levels`.
"""

import ctypes
import os
import sys
from functools import cache
from pathlib import Path

import torch

from qgraft.errors import InstallationError, OptionError, near_match
from qgraft.kernels.cpu import abi
from qgraft.kernels.cpu.sources import sources_hash

LIBRARY_VARIABLE = "QGRAFT_NATIVE_LIBRARY"
LEVEL_VARIABLE = "QGRAFT_CPU_LEVEL"
LEVELS = ("plain", "avx2", "avx512", "avx512-vnni", "avx512-bf16", "amx")

FOLDER = Path(__file__).parent  # of the sources
_NOT_BUILT = "not built: no C compiler was found when qgraft was installed"


def native_status() -> tuple[bool, str]:
    """(available, one line that says why) for `qgraft doctor` and the choice of kernels.

    Raises InstallationError for a library that does not fit its sources, OptionError for a level that is not there.
    """
    library = load()
    if library is None:
        return False, _NOT_BUILT
    why = f"built, runs as {level()}"
    if forced := forced_level():
        return True, f"{why}: {LEVEL_VARIABLE}={forced}, of {', '.join(levels(library))}"
    if not library.qgraft_has_vectors():
        why += ": the compiler made no faster level, gcc 11 or later on x86-64 does"
    return True, why


@cache
def load() -> ctypes.CDLL | None:
    """The library, checked and at its level; None where it is not built. Raises as native_status does."""
    forced = forced_level()
    path = _path()
    if path is None:
        return None
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        hint = "install libgomp (libgomp1 on Debian and Ubuntu)" if "libgomp" in str(error) else _hint()
        raise InstallationError(f"{path}: cannot be loaded: {error}", hint=hint) from None
    _check_sources(library, path)
    abi.declare(library)
    names = levels(library)
    if forced not in (None, *names):
        raise OptionError(
            f"{LEVEL_VARIABLE}={forced}: not here, expected one of {', '.join(names)}",
            hint="leave it out: the highest that is there runs",
        )
    use_level(library, forced or names[-1])
    return library


def loaded() -> ctypes.CDLL:
    """The library, where choose() said that it serves."""
    library = load()
    assert library is not None, "native kernels were chosen but are not built"
    return library


@cache
def forced_level() -> str | None:
    """What QGRAFT_CPU_LEVEL asks for. Raises OptionError for an unknown name."""
    wanted = os.environ.get(LEVEL_VARIABLE)
    if wanted not in (None, *LEVELS):
        raise OptionError(
            f"{LEVEL_VARIABLE}={wanted!r}: expected one of {', '.join(LEVELS)}", hint=near_match(wanted, LEVELS)
        )
    return wanted


@cache
def level() -> str:
    """The level that runs."""
    return forced_level() or levels(loaded())[-1]


def levels(library: ctypes.CDLL) -> list[str]:
    """The levels of this CPU, plainest first."""
    names: list[str] = []
    while (name := library.qgraft_level_name(len(names))) is not None:
        names.append(name.decode())
    if names[-1] == "avx512-bf16" and torch.cpu._is_amx_tile_supported() and torch.backends.mkldnn.is_available():
        names.append("amx")
    return names


def has_panels() -> bool:
    """Whether this CPU's C loops multiply many rows and take gradients, in float32: all but the plain level."""
    return level() != "plain"


def has_bf16() -> bool:
    """Whether bfloat16 products are computed in C here."""
    return level() == "avx512-bf16"


def has_amx() -> bool:
    """Whether torch's bfloat16 products (oneDNN) are the fastest here: they have tiles for them."""
    return level() == "amx"


def has_int8_panels() -> bool:
    """Whether many rows are multiplied in 8 bits panel by panel here, and input gradients are: with AVX2 and no more.

    VNNI has instructions of its own for the forward pass; with AVX-512 float32 gradients are as fast.
    """
    return level() == "avx2"


def use_level(library: ctypes.CDLL, name: str) -> None:
    """Run as `name` from now on, one of `levels`; C knows no `amx`, for which torch multiplies."""
    code = library.qgraft_use_level(LEVELS.index("avx512-bf16" if name == "amx" else name))
    assert code == 0, f"no level {name}"


def _path() -> Path | None:
    if given := os.environ.get(LIBRARY_VARIABLE):
        if not Path(given).is_file():
            raise OptionError(f"{LIBRARY_VARIABLE}={given}: no such file")
        return Path(given)
    # Above its sources, where it has always been built: after a `git pull` an older one is found, and said to be one.
    path = FOLDER.parent / ("_native.dll" if sys.platform == "win32" else "_native.so")
    return path if path.exists() else None


def _check_sources(library: ctypes.CDLL, path: Path) -> None:
    """Raise InstallationError unless the library was made from the sources that lie here."""
    expected = sources_hash(FOLDER)
    if not hasattr(library, "qgraft_sources"):
        got = "none"
    else:
        library.qgraft_sources.restype = ctypes.c_char_p
        got = library.qgraft_sources().decode()
    if got != expected:
        raise InstallationError(
            f"{path}: made from other C sources than those in {FOLDER}: got hash {got}, expected {expected}",
            hint=_hint(),
        )


def _hint() -> str:
    """How to build again, in a checkout or an installed package."""
    root = FOLDER.parents[3]
    again = f"build again: pip install -e {root}" if (root / "setup.py").exists() else "install qgraft again"
    if LIBRARY_VARIABLE in os.environ:
        again = f"unset {LIBRARY_VARIABLE}"
    return f"{again}; or do without it: QGRAFT_KERNELS=reference"
