"""Experts that a folder holds as floats, packed: a parameter of all experts as stacks of matrices, as a GGUF file has them.

    gate_up_proj [E, 2I, H]   ->  gate [E, I, H], up [E, I, H]      blocks of whole rows, each expert quantized by itself
    down_proj    [E, H, I]    ->  down [E, H, I]

transformers keeps all experts of a layer in two parameters, whatever a folder has: one tensor as these (GraniteMoE), or
[E, in, out] (gpt-oss), or two or three matrices for each expert (Qwen-MoE, Mixtral, OLMoE), of which it makes them.

Packed are the formats of GGUF files, which is where such a model can be saved. The formats of folders (chatglm-int4) have
layouts for single matrices, and leave experts as the floats that they are.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from qgraft.errors import UnsupportedError
from qgraft.experts import PARTS, Stack, holds_experts, parts_of
from qgraft.formats import GGML_TYPES, PackedTensor, fitting_format, hold_floats, join_rows
from qgraft.formats import quantize as quantize_weight

_PACKED = frozenset(GGML_TYPES.values())


def packs_experts(format: str | None) -> bool:
    """Whether experts of a folder are packed where this format is asked for."""
    return format in _PACKED


def experts_module(model: nn.Module, parameter: str) -> nn.Module | None:
    """The module whose parameter of all experts is called so; None where it is another one."""
    owner, _, leaf = parameter.rpartition(".")
    module = model.get_submodule(owner) if leaf in PARTS else None
    return module if module is not None and holds_experts(module) else None


def pack_experts(name: str, module: Any, value: Tensor, format: str) -> tuple[dict[str, Stack], str | None]:
    """(the stacks of a parameter, the format that they got); None for a width that `format` has no blocks for: floats.

    Args:
        name: the parameter's.
        module: the experts that it is of.

    Raises UnsupportedError for weights that cannot be quantized.
    """
    parts = parts_of(module, name.rpartition(".")[2], value)
    fitting = fitting_format(format, next(iter(parts.values())).shape[2])
    pack: Callable[[Tensor], PackedTensor] = (
        hold_floats if fitting is None else lambda w_OI: quantize_weight(w_OI, fitting)
    )
    try:
        stacks = {
            part: Stack(len(w_EOI), join_rows([pack(w_OI.contiguous()) for w_OI in w_EOI]))
            for part, w_EOI in parts.items()
        }
    except UnsupportedError as error:
        raise UnsupportedError(f"{name}: {error.message}", hint=error.hint) from error
    return stacks, fitting


def float_experts(model: nn.Module) -> dict[str, tuple[Any, str]]:
    """{name: (module, leaf)} of the parameters of all experts that are floats."""
    return {
        f"{path}.{leaf}": (module, leaf)
        for path, module in model.named_modules()
        if holds_experts(module)
        for leaf in PARTS
        if isinstance(getattr(module, leaf), nn.Parameter)
    }


def float_experts_note(model: nn.Module, format: str) -> list[str]:
    """One sentence where quantizing leaves the experts as they are."""
    if not float_experts(model):
        return []
    return [f"the experts are held as floats and are not in {format}: formats of GGUF files (q4_0, q8_0) pack them"]
