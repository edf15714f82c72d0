"""Pages of mapped files that were read and are not needed for now, given back to the system.

Weights are views of mapped files, whose pages come into memory as they are read. They count as memory of the process until
the system takes them back, which it does only where it runs short. Work that passes through a large model layer by layer
gives them back behind itself; the bytes stay in the page cache, as long as there is room, and come from there the next time.

    /proc/self/pagemap, a u64 for each page:    63 in memory    62 swapped    61 a file's

MADV_DONTNEED makes zeros of memory that is no file's, and takes back what was written to a private mapping. So every page
is asked for first, and of a tensor with such pages none is given back.

Sources: Documentation/admin-guide/mm/pagemap.rst of Linux, madvise(2). Not chosen: MADV_PAGEOUT, which needs no care, but
drops the page cache as well, so that every pass would read the disk.
"""

import ctypes
import mmap
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

_PAGEMAP = "/proc/self/pagemap"
_PRESENT, _SWAPPED, _OF_FILE = (np.uint64(1 << bit) for bit in (63, 62, 61))


def release(*tensors: Tensor) -> None:
    """Give back the pages of these tensors that are a file's and hold what it holds; all others stay as they are.

    Nothing happens to tensors in other memory, on a GPU, or where the system does not say whose a page is. No other thread
    may write to them meanwhile: what it writes between the question and the answer would be lost.
    """
    try:
        with open(_PAGEMAP, "rb", buffering=0) as pagemap:
            for tensor in tensors:
                strided = tensor.device.type == "cpu" and tensor.layout == torch.strided
                if strided and tensor.is_contiguous():
                    _release(pagemap, tensor.data_ptr(), tensor.nbytes)
    except OSError:  # no Linux, or /proc is not to be read
        return


def _release(pagemap: Any, start: int, nbytes: int) -> None:
    """The pages that lie in these bytes as a whole."""
    first, end = -(-start // mmap.PAGESIZE), (start + nbytes) // mmap.PAGESIZE
    if first >= end:
        return
    pagemap.seek(8 * first)
    pages = np.frombuffer(pagemap.read(8 * (end - first)), np.uint64)
    present = pages & _PRESENT != 0
    own = (present & (pages & _OF_FILE == 0)) | (pages & _SWAPPED != 0)
    if len(pages) == end - first and present.any() and not own.any():
        _madvise()(first * mmap.PAGESIZE, (end - first) * mmap.PAGESIZE, mmap.MADV_DONTNEED)


@cache
def _madvise() -> Any:
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
