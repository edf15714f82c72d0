"""Pages are counted by the system itself, in /proc/self/smaps."""

import mmap
import os
import random
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qgraft import mapped
from qgraft.mapped import release

PAGES = 64
SIZE = PAGES * mmap.PAGESIZE
pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/pagemap"), reason="asks Linux whose a page is")


def resident(tensor: Tensor) -> int:
    """Bytes in memory of the mapping in which the tensor begins."""
    for mapping in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        start, end = (int(each, 16) for each in mapping.split(" ", 1)[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return 1024 * int(re.search(r"^Rss: +(\d+) kB", mapping, re.MULTILINE)[1])  # type: ignore[index]
    raise AssertionError("the tensor is nowhere")


@pytest.fixture
def of_file(tmp_path: Path) -> Tensor:
    """[SIZE] uint8, a private mapping of a file, none of it read."""
    path = tmp_path / "bytes"
    path.write_bytes(random.Random(0).randbytes(SIZE))
    return torch.from_file(str(path), shared=False, size=SIZE, dtype=torch.uint8)


def test_pages_of_a_file_are_given_back_and_read_again(of_file):
    before = of_file.clone()
    assert resident(of_file) == SIZE
    release(of_file)
    assert resident(of_file) == 0
    assert torch.equal(of_file, before) and resident(of_file) == SIZE


def test_of_a_part_only_the_pages_that_lie_in_it(of_file):
    of_file.sum()
    release(of_file[10 : 10 + 3 * mmap.PAGESIZE])
    assert resident(of_file) == SIZE - 2 * mmap.PAGESIZE
    release(of_file[20:30], of_file[:0])
    assert resident(of_file) == SIZE - 2 * mmap.PAGESIZE


@pytest.mark.parametrize("at", [0, SIZE // 2, SIZE - 1])
def test_what_was_written_to_a_private_mapping_stays(of_file, at):
    of_file[at] ^= 1
    before = of_file.clone()
    release(of_file)
    assert torch.equal(of_file, before) and resident(of_file) == SIZE
    half = of_file[: SIZE // 2] if at >= SIZE // 2 else of_file[SIZE // 2 :]
    release(half)  # in which nothing was written
    assert resident(of_file) == SIZE // 2 and torch.equal(of_file, before)


def test_memory_that_is_no_files_stays():
    own = torch.arange(1 << 20)
    release(own, own[::2], own.to("meta"), torch.eye(9).to_sparse(), torch.eye(9).to_sparse_csr())
    assert torch.equal(own, torch.arange(1 << 20))


@pytest.mark.parametrize("kind", ["fork", "a file", "shared by torch"])
def test_memory_that_processes_share_stays(kind, tmp_path):
    """Its pages count as a file's, and are still there after they have been given back."""
    if kind == "fork":
        shared = torch.frombuffer(mmap.mmap(-1, SIZE), dtype=torch.uint8)
    elif kind == "a file":
        (tmp_path / "bytes").write_bytes(bytes(SIZE))
        shared = torch.from_file(str(tmp_path / "bytes"), shared=True, size=SIZE, dtype=torch.uint8)
    else:
        shared = torch.zeros(SIZE, dtype=torch.uint8).share_memory_()
    written = torch.frombuffer(bytearray(random.Random(1).randbytes(SIZE)), dtype=torch.uint8)
    shared.copy_(written)
    release(shared, shared[mmap.PAGESIZE : 9 * mmap.PAGESIZE])
    assert torch.equal(shared, written)


def test_views_of_one_storage_keep_what_was_written_beside_them(of_file):
    of_file[40 * mmap.PAGESIZE + 9] ^= 1
    before = of_file.clone()
    table = of_file[mmap.PAGESIZE :].view(-1, mmap.PAGESIZE)
    release(table, table[:20], table[:, :100], table.T, table[:1].expand(5, -1), table[41:])
    assert torch.equal(of_file, before) and resident(of_file) == SIZE
    release(table[:39], table[40:])
    assert resident(of_file) == 2 * mmap.PAGESIZE
    assert torch.equal(of_file, before)


def test_where_the_system_does_not_say_nothing_happens(of_file, monkeypatch, tmp_path):
    monkeypatch.setattr(mapped, "_PAGEMAP", str(tmp_path / "missing"))
    of_file.sum()
    release(of_file)
    assert resident(of_file) == SIZE
