"""Copies of packed weights in half precision, in what a run leaves of a GPU's memory (kernels/unpacked.py)."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from qgraft.kernels.reference import HALVES
from qgraft.kernels.unpacked import kept_unpacked
from qgraft.linear import QuantizedLinear
from qgraft.memory.budget import RunOptions, on_gpu
from qgraft.memory.settings import SPARE, limit_bytes
from qgraft.model_parts import computed_dtype
from qgraft.sizes import format_size, memory_now


@contextmanager
def copies_kept(
    model: PreTrainedModel, args: RunOptions, metrics: dict[str, float], notes: list[str]
) -> Iterator[None]:
    """Within the block copies fill what args.memory_limit, or the memory there is, leaves; said in `notes`.

    Only where the run's memory was counted: `metrics` then has its estimate, which the copies are added to.
    """
    estimated, dtype = metrics.get("estimated_memory_bytes"), computed_dtype(model)
    if estimated is None or args.keep_unpacked == "no" or not on_gpu(args) or dtype not in HALVES:
        yield
        return
    before = memory_now()
    room = (1 - SPARE) * limit_bytes(args.memory_limit or "auto", before) - estimated
    weights = [module.packed for module in model.modules() if isinstance(module, QuantizedLinear)]
    with kept_unpacked(weights, dtype, int(room)) as count:
        if count:
            size, name = memory_now() - before, str(dtype).removeprefix("torch.")
            metrics["estimated_memory_bytes"] = estimated + size
            notes.append(f"keep_unpacked: {count} of {len(weights)} weights in {name}, {format_size(size)}")
        yield
