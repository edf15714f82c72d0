"""Random packed weights of every format, and a switch for QGRAFT_KERNELS."""

from collections.abc import Callable, Iterator

import pytest
import torch

from qgraft.formats import FORMATS, PackedTensor, quantize
from qgraft.kernels import KERNELS_VARIABLE, choose

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
