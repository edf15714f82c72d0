"""Random packed weights of every format, and switches for what is chosen once a process: kernels, the CPU level."""

import os
from collections.abc import Callable, Iterator

import pytest
import torch

from qgraft.formats import FORMATS, PackedTensor, quantize
from qgraft.kernels import KERNELS_VARIABLE, choose, native_status
from qgraft.kernels.cpu import library

_HALVES = {  # byte offsets of the float16 numbers in a block; all other bytes of a block may be anything
    "q4_0": (0,), "q4_1": (0, 2), "q5_0": (0,), "q5_1": (0, 2), "q8_0": (0,),
    "q2_k": (80, 82), "q3_k": (108,), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,),
    "iq4_nl": (0,), "iq4_xs": (0,), "tq1_0": (52,), "tq2_0": (64,), "mxfp4": (), "nvfp4": (), "iq1_m": (),
    "iq1_s": (0,), "iq2_xxs": (0,), "iq2_xs": (0,), "iq2_s": (0,), "iq3_xxs": (0,), "iq3_s": (0,),
}  # fmt: skip
_BYTES = {"mxfp4": (0, 1, 116, 124), "nvfp4": (0, 4, 0, 40)}  # scales: from byte to byte, from number to number


@pytest.fixture
def random_packed() -> Callable[..., PackedTensor]:
    """(format, out, in) -> every code the format has, with small finite scales of both signs."""

    def make(format: str, rows: int, columns: int) -> PackedTensor:
        generator = torch.Generator().manual_seed(rows * 1000 + columns)
        layout = FORMATS[format]
        if layout.block_size == 1 and len(layout.parts) == 1:
            return quantize(torch.randn(rows, columns, generator=generator) * 0.1, format)
        shape = layout.parts[0].shape(rows, columns)
        data = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        if len(layout.parts) > 1:
            scale = torch.randn(rows, generator=generator).mul_(0.01).half()
            return PackedTensor(format, (rows, columns), (data.view(torch.int8), scale))
        blocks = data.view(-1, layout.nbytes(1, layout.block_size))
        for offset in _HALVES[format]:
            halves = torch.randn(len(blocks), 1, generator=generator).mul_(0.01).half()
            blocks[:, offset : offset + 2] = halves.view(torch.uint8)
        if format in _BYTES:
            start, stop, low, high = _BYTES[format]
            scales = torch.randint(low, high, (len(blocks), stop - start), dtype=torch.uint8, generator=generator)
            blocks[:, start:stop] = scales
        if (
            format == "iq1_m"
        ):  # the upper bits of 0.01, and random ones of its fraction, in the upper halves of four numbers
            blocks[:, 49::2] &= torch.tensor([0xFF, 0xFF, 0x1F, 0x2F], dtype=torch.uint8)
            blocks[:, 55] |= 0x20
        return PackedTensor(format, (rows, columns), (data,))

    return make


@pytest.fixture
def use_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str | None], None]]:
    """Set QGRAFT_KERNELS (None: unset) for the test, as if the process had started with it."""

    def use(value: str | None) -> None:
        if value is None:
            monkeypatch.delenv(KERNELS_VARIABLE, raising=False)
        else:
            monkeypatch.setenv(KERNELS_VARIABLE, value)
        choose.cache_clear()

    yield use
    choose.cache_clear()


def skip_without_native() -> None:
    available, why = native_status()
    if not available:
        pytest.skip(f"native kernels are {why}")
    if os.environ.get(KERNELS_VARIABLE) == "reference":
        pytest.skip(f"{KERNELS_VARIABLE}=reference")


@pytest.fixture
def native_kernels(use_kernels: Callable[[str | None], None]) -> None:
    """The C library serves; or the test is skipped where it is not built, or not wanted."""
    skip_without_native()
    use_kernels("native")


@pytest.fixture
def reload(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Set environment variables (None: unset) and let the library be loaded anew, as a process that starts with them."""

    def reload(**variables: str | None) -> None:
        for name, value in variables.items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)
        forget()

    yield reload
    monkeypatch.undo()
    forget()


def forget() -> None:
    """Of the library and its level all that is remembered; the next call sets the level again."""
    for known in (library.load, library.level, library.forced_level, choose):
        known.cache_clear()


@pytest.fixture(params=library.LEVELS)
def cpu_level(request: pytest.FixtureRequest, native_kernels: None, reload: Callable[..., None]) -> str:
    """Every level of the C library in turn that this CPU has, or the one that QGRAFT_CPU_LEVEL asks for."""
    take_level(request.param, reload)
    return request.param


@pytest.fixture(params=["reference", *library.LEVELS])
def cpu_level_or_reference(request: pytest.FixtureRequest, reload: Callable[..., None]) -> str:
    """The same, and plain torch."""
    if request.param == "reference":
        reload(QGRAFT_KERNELS="reference")
    else:
        take_level(request.param, reload)
    return request.param


def take_level(level: str, reload: Callable[..., None]) -> None:
    skip_without_native()
    if level not in library.levels(library.loaded()):
        pytest.skip(f"this CPU has no {level}")
    if (forced := library.forced_level()) not in (None, level):
        pytest.skip(f"{library.LEVEL_VARIABLE}={forced}")
    reload(QGRAFT_CPU_LEVEL=level, QGRAFT_KERNELS="native")


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
