"""Which arithmetic a run computes in, from the options that ask for one and what the device has.

    compute    on a CPU: how the products with packed weights are computed ("float32", "bf16", "int8"); everything else,
               norms, attention, residual stream, loss, stays in float32. `auto` is bf16 where the CPU multiplies
               bfloat16 in hardware (AVX512-BF16, AMX), else float32. int8 rounds the inputs of a layer to 8 bits in
               groups of 32, and where the CPU is faster so, gradients; never chosen by itself.
    bf16       transformers' name: on a CPU the same as compute=bf16; on a GPU the whole model is in bfloat16
    fp16       on a GPU transformers' autocast with loss scaling; no CPU has it

Without such hardware bfloat16 products are 8 to 290 times slower than float32, so asking for them by name is an error
there, and `bf16`, which configurations for GPUs carry along, is answered by a note.
"""

from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from qgraft.errors import OptionError, UnsupportedError, near_match, option
from qgraft.kernels.choice import has_fast_bf16
from qgraft.memory.budget import on_gpu

if TYPE_CHECKING:
    from qgraft.training.arguments import TrainArguments

COMPUTES = ("auto", "float32", "bf16", "int8")


def settle_precision(args: "TrainArguments") -> str:
    """Replace a precision that makes no sense on this device by one that does, and note it in args.notes.

    Sets args.compute to what it will be. Returns the dtype that the model is to be loaded in.

    Raises OptionError for an unknown `compute`, UnsupportedError for one that this CPU does not have.
    """
    if args.compute not in COMPUTES:
        raise OptionError(
            f"compute={args.compute!r}: expected one of {', '.join(COMPUTES)}", hint=near_match(args.compute, COMPUTES)
        )
    for name, dtype in (("fp16_full_eval", "fp16"), ("bf16_full_eval", "bf16")):
        if getattr(args, name):
            setattr(args, name, False)
            if args.do_train:
                args.notes.append(f"{name} has no effect: a run evaluates as it trains")
            else:
                setattr(args, dtype, True)
    dtype = _settle_on_gpu(args) if on_gpu(args) else _settle_on_cpu(args)
    args.bf16 = False  # transformers' autocast stays off for it
    return dtype


def check_device(args: "TrainArguments", model: PreTrainedModel) -> None:
    """Raise OptionError for a model on another device than the options were settled for, or than the current GPU.

    Its passes would be as large as the other device's memory has room for, and `fp16` or `compute` have no effect.
    """
    is_there, wanted = model.device.type == "cuda", on_gpu(args)
    if is_there != wanted:
        cpu, load = option("use_cpu", True), f"load(..., device={'cuda' if wanted else 'cpu'!r})"
        raise OptionError(
            f"the model is on {model.device}, and the run is to be on {'a GPU' if wanted else 'the CPU'}",
            hint=f"{cpu}, or {load}" if wanted else f"{load}, or leave use_cpu out",
        )
    if is_there and model.device.index != (current := torch.cuda.current_device()):
        raise OptionError(
            f"the model is on {model.device}, and the current GPU is cuda:{current}, whose memory would be counted",
            hint=f"torch.cuda.set_device({model.device.index}) before all else",
        )


def _settle_on_gpu(args: "TrainArguments") -> str:
    if args.compute != "auto":
        args.notes.append(f"compute={args.compute} has no effect: it is for CPUs")
    args.compute = "float32"
    if args.bf16:
        return "bfloat16"
    if args.fp16:  # training: float32 tensors, float16 arithmetic by autocast, with loss scaling
        return "float32" if args.do_train else "float16"
    return "auto"


def _settle_on_cpu(args: "TrainArguments") -> str:
    args.dataloader_pin_memory = False
    if args.bf16 and args.compute not in ("auto", "bf16"):
        args.notes.append(f"bf16 has no effect: compute={args.compute} says what a CPU computes in")
    elif args.bf16 and not has_fast_bf16():
        args.notes.append("bf16: this CPU has no bfloat16 arithmetic (many times slower); float32 it is")
    elif args.bf16 and args.compute == "auto":
        args.compute = "bf16"
    if args.compute == "bf16" and not has_fast_bf16():
        raise UnsupportedError(
            "compute=bf16: there is no bfloat16 arithmetic here, expected a CPU with AVX512-BF16 or AMX and the C kernels",
            hint="leave it out: auto takes the fastest that is there; qgraft doctor shows what is",
        )
    if args.compute == "auto":
        args.compute = "bf16" if has_fast_bf16() else "float32"
    if args.fp16:
        args.fp16 = False
        args.notes.append(f"fp16: no CPU computes in it; products are computed in {args.compute} instead")
    return "auto"
