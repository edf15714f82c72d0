"""How many tokens go through a model at a time where nobody says it, and on which device.

On two cores more than a few hundred are hardly faster. A GPU is idle in a small pass, for what the CPU does to start its
kernels takes as long as for a large one: there a run takes as many as the memory holds (memory.settle_noted).
"""

from typing import Any, Protocol

import torch

CPU_TOKENS, GPU_TOKENS = 384, 16384  # of training; on a GPU the most that is tried
CPU_EVAL_TOKENS, GPU_EVAL_TOKENS = 1024, 8192  # without gradients activations are small


class RunOptions(Protocol):
    """What this room asks of a run's options; training's TrainArguments have them."""

    adapter_name: str
    compute: str
    cuda_graphs: str
    gradient_accumulation_steps: int
    gradient_checkpointing: Any
    keep_unpacked: str
    max_tokens_per_pass: int
    memory_limit: str | None
    optim: Any
    per_device_train_batch_size: int
    use_cpu: bool


def on_gpu(args: RunOptions) -> bool:
    """Whether the run is on a GPU."""
    return torch.cuda.is_available() and not args.use_cpu


def training_tokens(args: RunOptions) -> int:
    """The most tokens in a pass of training: max_tokens_per_pass, or the usual."""
    return args.max_tokens_per_pass or (GPU_TOKENS if on_gpu(args) else CPU_TOKENS)


def evaluation_tokens(args: RunOptions) -> int:
    """The same of an evaluation in a run: with a limit, as a GPU always has one, no more than training takes."""
    if on_gpu(args):
        return min(GPU_EVAL_TOKENS, training_tokens(args))
    return min(CPU_EVAL_TOKENS, training_tokens(args)) if args.memory_limit else CPU_EVAL_TOKENS
