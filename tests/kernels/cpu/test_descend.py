"""Steps of codes in C: any block and any number of rows, on any number of threads, as plain torch takes them."""

import pytest
import torch

from qgraft.kernels import reference
from qgraft.kernels.cpu import descend as native
from qgraft.kernels.cpu.library import FOLDER

pytestmark = pytest.mark.usefixtures("native_kernels")


def a_block(columns: int, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """R, codes (some below the lowest that is written), steps (some 0) and H, in powers of two: sums have one result."""
    torch.manual_seed(columns * rows)
    steps = 2.0 ** torch.randint(-3, 1, (columns, rows)) * (torch.rand(columns, rows) > 0.1)
    half = torch.randint(-2, 3, (columns, columns)).float()
    H = half + half.T + torch.eye(columns) * 2.0 ** torch.randint(3, 6, (columns,))
    return torch.randint(-64, 65, (columns, rows)).float(), torch.randint(-8, 8, (columns, rows)).float(), steps, H


@pytest.mark.parametrize(("columns", "rows"), [(1, 1), (3, 31), (64, 32), (64, 33), (17, 300), (65, 8)])
@pytest.mark.parametrize("threads", [1, 3])
def test_codes_move_as_in_plain_torch(columns: int, rows: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    results = []
    for module in (reference, native):
        R, codes, steps, H = a_block(columns, rows)
        moved = module.descend(R, codes, steps, H, -7, 7)
        results.append((moved, codes, R))
    for expected, got in zip(*results, strict=True):
        assert torch.equal(expected, got)
    assert results[0][0].any()


def test_it_holds_as_many_columns_as_c_does() -> None:
    assert f"DESCENT_COLUMNS = {native.COLUMNS} " in (FOLDER / "level.h").read_text()
