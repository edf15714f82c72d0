"""What a run will hold in memory, said before it starts; and the fastest setting that stays below a limit.

    process      what the process held before: interpreter, torch, transformers, the tokenizer
    base         the packed bytes; mapped from the file, but pages that were touched count as resident
    adapter      its weights and their gradients, and what the optimizer keeps: with AdamW four float32 numbers each
    activations  kept for the backward pass: the layers', or with gradient checkpointing the layers' inputs
    working      the largest of what is needed for a moment: a layer's pass, or a chunk of logits
    graphs       the same two once more, where passes are replayed as CUDA graphs: these keep the memory they were recorded in

All of it is counted on the model itself (measure.py). Two things make a run smaller, each at a price in time:
gradient checkpointing, which computes the layers once more, and smaller passes, each of which unpacks the weights
again. A setting is chosen by these prices, `Setting.cost`: the cheapest whose estimate fits.

What is freed is not always free. glibc before 2.38 leaves a hole behind most large blocks of torch's alignment that no
block of the same size fits into: after a few steps it holds 1.3 to 1.7 times what is alive, not to be foretold. With a
limit, large blocks are therefore mapped each on its own and go back to the system at once (`give_back_freed_memory`).
The price is page faults: a quarter of the time where activations are many and layers small. Trimming the heap between
layers instead cost half as much, but needs hooks in every pass and left more behind.
"""

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import inf
from pathlib import Path

import psutil
import torch
from rich.console import Console
from transformers import PreTrainedModel

from qgraft.adapters.base import find_adapter
from qgraft.data.tokenizing import Sample
from qgraft.errors import OptionError, UnsupportedError
from qgraft.linear import computing
from qgraft.memory.budget import RunOptions, on_gpu, training_tokens
from qgraft.memory.measure import Activations, measure_activations, sample_of
from qgraft.model_parts import is_encoder_decoder, pairs_unsupported
from qgraft.passes.decoder import padding_free
from qgraft.passes.fused import fused_modules
from qgraft.passes.graphed import launch_bound, why_eager
from qgraft.sizes import format_size, memory_now, parse_size

# In units of a forward and backward pass of many tokens that keeps its activations, on two cores with AVX-512
RECOMPUTING = 0.5
UNPACKING = 40  # tokens whose products take the time of unpacking all weights and of a pass's other fixed work
GPU_UNPACKING = 2000  # likewise on an H100, where the fixed work is what the CPU does to start kernels

UNSEEN = 40 << 20  # the Trainer's own, and what ops allocate inside of them: measured by benchmarks/memory.py
UNCOUNTED = 2048  # tokens of a pass on a GPU through a model whose memory cannot be counted
LEAST_TOKENS = 64  # in a pass that an estimate without rows considers
SPARE = 0.1  # of a limit that the estimate leaves free, because it may be so far off
AUTO_SHARE = 0.9  # of the memory there is, for memory_limit: auto

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _LARGE_BLOCK = -1, -3, 128 << 10  # from malloc.h
_STATES = {"sgd": 0, "adafactor": 0, "rmsprop": 1, "adagrad": 1, "lion": 1}  # float32 numbers kept for each weight


@dataclass(frozen=True)
class Setting:
    """How a run is made smaller."""

    tokens_per_pass: int
    checkpointing: bool = False
    unpacking: int = UNPACKING

    @property
    def cost(self) -> float:
        """The time of a token, in units of one in a large pass with none of this."""
        return (1.0 + RECOMPUTING * self.checkpointing) * (1.0 + self.unpacking / self.tokens_per_pass)

    def __str__(self) -> str:
        return f"{self.tokens_per_pass} tokens a pass, gradient checkpointing {'on' if self.checkpointing else 'off'}"


@dataclass(frozen=True)
class Estimate:
    """Bytes that a run with this setting will hold at most; `layers` are the bytes kept in each decoder layer."""

    setting: Setting
    process: int
    base: int
    adapter: int
    layers: tuple[int, ...]
    outside: int
    working: int
    graphs: int = 0

    @property
    def activations(self) -> int:
        """Everything that a pass keeps for its backward pass."""
        return sum(self.layers) + self.outside

    @property
    def total(self) -> int:
        """The peak."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """What the total consists of, by name."""
        names = ("process", "base", "adapter", "activations", "working", *(("graphs",) if self.graphs else ()))
        return {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {format_size(size)}" for name, size in self.parts().items())
        return f"{format_size(self.total)} with {self.setting} ({parts})"


@dataclass(frozen=True)
class Counted:
    """A model's memory as measured, from which the estimate of any setting follows.

    Attributes:
        graphed: the most tokens of a pass that is replayed as a CUDA graph.
    """

    activations: Activations
    process: int
    base: int
    adapter: int
    graphed: float = 0.0

    def estimate(self, setting: Setting) -> Estimate:
        """What a run with this setting holds at most."""
        measured, tokens = self.activations, setting.tokens_per_pass
        layers = tuple(layer.at(tokens) for layer in measured.layers)
        if setting.checkpointing:
            layers = (measured.inputs.at(tokens) // len(layers),) * len(layers)
        outside, working = measured.outside.at(tokens), measured.working(tokens, setting.checkpointing)
        replayed = tokens <= self.graphed and not setting.checkpointing
        graphs = sum(layers) + outside + working if replayed else 0
        return Estimate(setting, self.process, self.base, self.adapter, layers, outside, working, graphs)


def estimate(model: PreTrainedModel, args: RunOptions) -> list[Estimate]:
    """What training will hold at most with passes of training_tokens(args), for each kind of setting, fastest first.

    With args.memory_limit the setting that it leads to comes last. Nothing is trained; args.adapter_name is on the
    model. Raises OptionError where nothing fits.
    """
    if is_encoder_decoder(model.config):
        raise pairs_unsupported("estimate")
    samples = [sample_of(model, 16), sample_of(model, 17)]
    with computing(model, args.compute), padding_free(model, samples), fused_modules(model):
        counted = count(model, args)
    tokens = training_tokens(args)
    found = [counted.estimate(kind) for kind in sorted(_kinds(args, tokens), key=lambda kind: kind.cost)]
    if args.memory_limit:
        found.append(fastest(counted, args, min(LEAST_TOKENS, tokens), tokens))
    return found


def settle(model: PreTrainedModel, args: RunOptions, samples: Sequence[Sample], budget: int) -> Estimate:
    """Choose the fastest setting below args.memory_limit for a run on these samples, and write it into `args`.

    Args:
        budget: most tokens in a pass; 0 for one sample in each.

    Raises OptionError where nothing fits.
    """
    lengths = sorted(len(sample.input_ids) for sample in samples)
    step, longest = sum(lengths[-args.per_device_train_batch_size * args.gradient_accumulation_steps :]), lengths[-1]
    found = fastest(count(model, args), args, longest, max(longest, min(budget, step)))
    apply_setting(args, found.setting)
    return found


def settle_noted(
    model: PreTrainedModel, args: RunOptions, samples: Sequence[Sample], alone: bool, notes: list[str],
    console: Console | None,
) -> tuple[int, dict[str, float]]:  # fmt: skip
    """settle() where there is a limit, said in `notes` and on the terminal; returns the budget, and metrics to report.

    The memory of a GPU is one where nobody says how large a pass is: too small a pass leaves it idle, too large a one ends
    the run. A model whose memory cannot be counted gets passes of UNCOUNTED tokens there.

    Args:
        alone: whether each sample passes through the model by itself.
    """
    budget = 0 if alone else training_tokens(args)
    by_itself = on_gpu(args) and not args.max_tokens_per_pass and not args.memory_limit
    if not args.memory_limit and not by_itself:
        map_large_blocks()
        return budget, {}
    try:
        chosen = settle(model, args, samples, budget)
    except UnsupportedError as error:
        if not by_itself:
            raise
        notes.append(f"{error.message}; passes of {UNCOUNTED} tokens")
        return min(budget, UNCOUNTED), {}
    notes.append(f"memory_limit {args.memory_limit or 'auto'}: {chosen}")
    if console is not None:
        console.print(notes[-1], markup=False, highlight=False)
    return training_tokens(args) if budget else 0, {"estimated_memory_bytes": chosen.total}


def apply_setting(args: RunOptions, setting: Setting) -> None:
    """Write a setting into the options of a run."""
    args.max_tokens_per_pass = setting.tokens_per_pass
    renamed = hasattr(args, "activation_checkpointing")  # in newer releases of transformers
    setattr(args, "activation_checkpointing" if renamed else "gradient_checkpointing", setting.checkpointing)


def map_large_blocks() -> None:
    """Let each block of more than 3 MB have memory of its own; only where glibc serves it.

    In a model of 6 billion weights most tensors of a pass are larger. From the heap they leave holes behind that the next one
    does not fit into: a run of 512 tokens held 6.7 GB instead of 4.7. Pages asked for anew cost it some 15 % of its time; a
    small model has no such tensors.
    """
    if libc := _glibc():
        libc.mallopt(_M_MMAP_THRESHOLD, 3 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 128 << 20)


def give_back_freed_memory() -> None:
    """Let this process return large blocks to the system as soon as they are freed, where glibc serves it; a GPU's, now."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if libc := _glibc():
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK)
        libc.mallopt(_M_TRIM_THRESHOLD, _LARGE_BLOCK)
        libc.malloc_trim(0)


def fastest(counted: Counted, args: RunOptions, least: int, most: int) -> Estimate:
    """The cheapest setting with `least` to `most` tokens in a pass that fits into args.memory_limit.

    CUDA graphs that nobody asked for by name take what it leaves, or are not there. Raises OptionError where nothing fits.
    """
    if args.cuda_graphs != "yes" and counted.graphed:
        found = fastest(replace(counted, graphed=0.0), args, least, most)
        replayed = counted.estimate(found.setting)
        return (
            replayed
            if replayed.total <= limit_bytes(args.memory_limit or "auto", counted.process + counted.base)
            else found
        )
    limit = (1 - SPARE) * limit_bytes(args.memory_limit or "auto", counted.process + counted.base)
    fitting = []
    for kind in _kinds(args, least):
        low, high = least, most
        while low < high:  # the largest pass that fits
            middle = (low + high + 1) // 2
            fits = counted.estimate(replace(kind, tokens_per_pass=middle)).total <= limit
            low, high = (middle, high) if fits else (low, middle - 1)
        found = counted.estimate(replace(kind, tokens_per_pass=low))
        if found.total <= limit:
            fitting.append(found)
    if fitting:
        return min(fitting, key=lambda found: found.setting.cost)
    smallest = min((counted.estimate(kind) for kind in _kinds(args, least)), key=lambda found: found.total)
    raise OptionError(
        f"memory_limit {args.memory_limit or 'auto'}: the smallest setting needs {smallest}",
        hint=f"the longest sample has {least} tokens; a smaller max_length or r needs less, or a model in fewer bits",
    )


def count(model: PreTrainedModel, args: RunOptions) -> Counted:
    """Measure a model with its adapter on, in a run inside of padding_free. From then on freed memory goes back."""
    give_back_freed_memory()
    measured = measure_activations(model, training_tokens(args))
    give_back_freed_memory()  # what counting took is not the run's
    weights = sum(t.numel() * t.element_size() for t in find_adapter(model, args.adapter_name).state_dict().values())
    base = base_bytes(model)
    process = memory_now() - base - weights + UNSEEN  # by now every page of the base was touched
    return Counted(measured, process, base, int(weights * (2 + _optimizer_states(args))), _graphed(model, args))


def _graphed(model: PreTrainedModel, args: RunOptions) -> float:
    """The most tokens of a pass that a run replays as a CUDA graph; 0 for none."""
    limited = args.memory_limit not in (None, "auto")
    if not on_gpu(args) or args.cuda_graphs == "no" or (limited and args.cuda_graphs == "auto"):
        return 0.0
    if why_eager(model) is not None:
        return 0.0
    return inf if args.cuda_graphs == "yes" else launch_bound(model)


def base_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights that a pass reads, each once: not an embedding of its own, of which few rows are touched."""
    table, output = model.get_input_embeddings(), model.get_output_embeddings()
    skipped = _addresses(table) - _addresses(output)
    tensors = [*model.buffers(), *(p for p in model.parameters() if not p.requires_grad)]
    sizes = {t.data_ptr(): t.numel() * t.element_size() for t in tensors}
    return sum(size for address, size in sizes.items() if address not in skipped)


def limit_bytes(limit: str, held: int) -> int:
    """The limit in bytes; "auto" is most of what this machine has left beside others. Raises OptionError."""
    if limit != "auto":
        return parse_size(limit)
    if torch.cuda.is_available() and torch.cuda.memory_allocated():
        return int(AUTO_SHARE * (torch.cuda.mem_get_info()[0] + held))
    free = psutil.virtual_memory().available + held
    group = Path("/sys/fs/cgroup/memory.max")  # of a container
    if group.is_file() and (text := group.read_text().strip()).isdigit():
        free = min(free, int(text))
    return int(AUTO_SHARE * free)


def _kinds(args: RunOptions, tokens: int) -> Iterator[Setting]:
    """All combinations; checkpointing is not turned off where it is asked for."""
    asked = bool(getattr(args, "activation_checkpointing", None) or args.gradient_checkpointing)
    unpacking = GPU_UNPACKING if on_gpu(args) else UNPACKING
    yield from (Setting(tokens, checkpointing, unpacking) for checkpointing in ((True,) if asked else (False, True)))


def _optimizer_states(args: RunOptions) -> float:
    """float32 numbers that the optimizer keeps for each weight; two for the family of Adam and for whatever is new."""
    name = str(getattr(args.optim, "value", args.optim))
    states = next((count for family, count in _STATES.items() if family in name), 2)
    return states / 4 if "8bit" in name else states


def _addresses(module: torch.nn.Module) -> set[int]:
    return {t.data_ptr() for t in [*module.buffers(), *module.parameters()]}


@cache
def _glibc() -> ctypes.CDLL | None:
    """The C library where it is glibc and the model lies in its memory."""
    known = "CS_GNU_LIBC_VERSION" in getattr(os, "confstr_names", {}) and sys.platform == "linux"
    return ctypes.CDLL(None) if known and (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc") else None
