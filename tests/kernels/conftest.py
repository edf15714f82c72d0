"""Random packed weights of every format, and a switch for QGRAFT_KERNELS."""

import ctypes
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from qgraft.formats import FORMATS, PackedTensor, quantize
from qgraft.kernels import KERNELS_VARIABLE, choose, native

_HALVES = {  # byte offsets of the float16 numbers in a block; all other bytes of a block may be anything
    "q4_0": (0,), "q4_1": (0, 2), "q5_0": (0,), "q5_1": (0, 2), "q8_0": (0,),
    "q2_k": (80, 82), "q3_k": (108,), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,),
}  # fmt: skip


@pytest.fixture
def random_packed() -> Callable[..., PackedTensor]:
    """(format, out, in) -> every code the format has, with small finite scales of both signs."""

    def make(format: str, rows: int, columns: int) -> PackedTensor:
        generator = torch.Generator().manual_seed(rows * 1000 + columns)
        layout = FORMATS[format]
        if layout.block_size == 1 and layout.family == "ggml":
            return quantize(torch.randn(rows, columns, generator=generator) * 0.1, format)
        shape = (rows, layout.row_bytes(columns))
        data = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        if layout.family == "rowwise":
            scale = torch.randn(rows, generator=generator).mul_(0.01).half()
            return PackedTensor(format, (rows, columns), data.view(torch.int8), scale)
        blocks = data.view(-1, layout.block_bytes)
        for offset in _HALVES[format]:
            halves = torch.randn(len(blocks), 1, generator=generator).mul_(0.01).half()
            blocks[:, offset : offset + 2] = halves.view(torch.uint8)
        return PackedTensor(format, (rows, columns), data)

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


LEVELS = {  # QGRAFT_CPU -> what qgraft_cpu_level then says
    "base": "plain C", "v3": "x86-64-v3 (AVX2)", "v4": "x86-64-v4 (AVX-512)", "v4-vnni": "x86-64-v4 (AVX-512, VNNI)",
    "v4-bf16": "x86-64-v4 (AVX-512, VNNI, BF16)",
}  # fmt: skip


@pytest.fixture(params=LEVELS)
def cpu_level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Every level of the C library in turn, where this CPU has it: a copy of the library is loaded anew for each."""
    own = native._library()
    if own is None:
        pytest.skip(f"native kernels are {native.native_status()[1]}")
    monkeypatch.setenv("QGRAFT_CPU", request.param)
    copy = shutil.copy(own._name, tmp_path / f"{request.param}.so")
    library = native._declare(ctypes.CDLL(str(copy)))
    if library.qgraft_cpu_level().decode() != LEVELS[request.param]:
        pytest.skip(f"this CPU has no {LEVELS[request.param]}")
    monkeypatch.setattr(native, "_library", lambda: library)
    for known in (native.has_panels, native.has_bf16):  # what is remembered of the other level
        monkeypatch.setattr(native, known.__name__, known.__wrapped__)
    return request.param


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
