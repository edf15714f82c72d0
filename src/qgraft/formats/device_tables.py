"""Tables that a format is read by, on the devices that read: levels of codebooks, points of lattices.

Plain torch reads a format through tensors of one device, so its table has to be there. Uploaded at each call it makes the CPU
wait for the GPU, and no CUDA graph can record it. So a table is put on a device at its first use and kept: 40 KB for all.

    the CPU                   the table as `make` gives it; nothing is kept here
    a CUDA graph is recorded  what is kept; RuntimeError for a table that is not there yet: it would lie in the memory of that
                              graph, empty until it is replayed. Whoever records runs what he records once before
    fake tensors              one of their mode's own each time, which is not kept

Not chosen: functools.cache, which keeps what is made in either.
"""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_kept: dict[tuple[Hashable, torch.device], Tensor] = {}


def on_device(key: Hashable, make: Callable[[], Tensor], device: torch.device) -> Tensor:
    """The table `key`, which `make` gives on the CPU, on `device`; not to be written to."""
    if device.type == "cpu":
        return make()
    known = _kept.get((key, device))
    if known is not None:
        return known
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"the table {key} is not on {device} yet: read a weight of its format before recording a graph"
        )
    with torch.inference_mode(False):
        placed = make().to(device)
    if not isinstance(placed, FakeTensor):
        _kept[key, device] = placed
    return placed


def forget_tables() -> None:
    """Keep none any more: for a device that is about to be another one."""
    _kept.clear()
