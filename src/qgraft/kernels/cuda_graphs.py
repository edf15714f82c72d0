"""CUDA graphs: what is started on a GPU once, as a function that starts it again on the same memory.

A graph knows no number that Python had when it was recorded, but those that lie in the GPU's memory; what goes in and comes
out of it are tensors that stay where they are. passes/static_pass.py has one of forward and backward, gpu_decode.py of a step
of decoding.
"""

import gc
from collections.abc import Callable
from typing import Any

import torch


def recorded(work: Callable[[], None], device: torch.device, pool: Any = None) -> Callable[[], None]:
    """What `work` starts on a GPU, as a function that starts it again. Raises RuntimeError where that cannot be.

    Args:
        device: that GPU, which need not be the current one: of another nothing would be recorded, without an error.
        pool: of torch.cuda.graph_pool_handle, memory that graphs share which do not run at once; None for one of its own.
    """
    gc.collect()  # a gradient function that is left over would go on in the stream that it was made in
    graph = torch.cuda.CUDAGraph()
    with (
        torch.cuda.device(device),
        torch.cuda.stream(torch.cuda.current_stream()),  # which torch.cuda.graph does not restore after an error
        torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"),
    ):
        work()
    return graph.replay


def power_of_two(n: int) -> int:
    """The smallest that is not below n: sizes that graphs and kernels are made for."""
    return 1 << (n - 1).bit_length()
