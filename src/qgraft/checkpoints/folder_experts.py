"""The experts of a layer in a folder, read from packed tensors and written back into what the folder keeps them in.

    Qwen-MoE, OLMoE    experts.0.gate_proj.weight [I, H], experts.0.up_proj.weight, experts.0.down_proj.weight [H, I], ...
    Mixtral            experts.0.w1.weight, experts.0.w3.weight, experts.0.w2.weight, ...
    GraniteMoE         input_linear.weight [E, 2I, H], output_linear.weight [E, H, I]
    gpt-oss            experts.gate_up_proj [E, H, 2I], experts.down_proj [E, I, H]; as released in MXFP4 (layouts/mxfp4.py)

The model has stacks of matrices (experts.py) whatever a folder has. Which tensors make up a stack is what transformers' rules
say of the folder (names.py); a rule is turned round where it does nothing but stack matrices and put stacks side by side.

Written are floats, and MXFP4 where transformers reads it: in gpt-oss, all experts or none.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qgraft.checkpoints.assemble import empty_model
from qgraft.checkpoints.layouts import LAYOUTS, Layout, StoredMatrix, layout_for
from qgraft.checkpoints.layouts.layout import WEIGHT
from qgraft.checkpoints.layouts.mxfp4 import FORMAT as MXFP4
from qgraft.checkpoints.names import transformers_names
from qgraft.checkpoints.origin import Matrix, Stored
from qgraft.errors import CheckpointError, UnsupportedError, worded
from qgraft.experts import PARTS, Stack, cut_outputs, join_outputs
from qgraft.formats import PackedTensor, slice_rows

_FLOATS = frozenset(format for layout in LAYOUTS if layout.packed_as is None for format in layout.formats)
FORMATS = _FLOATS | {MXFP4}  # that a folder has a place for


def stored_stacks(name: str, module: Any, layout: Layout, matrix: StoredMatrix) -> dict[str, Stack]:
    """The stacks of the parameter `name` of a layer's experts, which a folder has packed. Raises CheckpointError."""
    leaf = name.rpartition(".")[2]
    experts, *sizes = getattr(module, leaf).shape
    out, width = reversed(sizes) if module.is_transposed else sizes
    first = matrix.tensor(layout.suffixes[0])
    if first is not None and list(first.shape[:2]) != [experts, out]:
        got = f"{matrix.name}{layout.suffixes[0]}: got {list(first.shape)}"
        raise CheckpointError(f"{got}, expected {experts} experts of {out} rows")
    packed = layout.read(matrix, (experts * out, width), False)
    assert isinstance(packed, PackedTensor)
    cuts = cut_outputs(module, leaf, packed.parts[0].view(experts, out, -1))
    return {part: _stack(packed.format, width, cut) for part, cut in cuts.items()}


def _stack(format: str, width: int, data_EO: Tensor) -> Stack:
    experts, rows, size = data_EO.shape
    data = data_EO.contiguous().view(experts * rows, size)
    return Stack(experts, PackedTensor(format, (experts * rows, width), (data,)))


@dataclass(frozen=True, eq=False)
class Together:
    """The experts of one parameter that are one matrix of a folder, and what goes in its place.

    Attributes:
        stored: where it lies.
        module: transformers' module of these experts.
        stacks: the matrices of each of its stacks.
    """

    stored: Stored
    module: Any
    stacks: Sequence[Matrix]

    @property
    def format(self) -> str:
        """The one that all stacks have."""
        return self.stacks[0].format

    @property
    def nbytes(self) -> int:
        """See Matrix."""
        return sum(each.nbytes for each in self.stacks)

    def written(self) -> dict[str, Tensor]:
        """{suffix: tensor} of its layout."""
        layout, parts = layout_for(self.format), list[dict[str, Tensor]]()
        for each in self.stacks:
            written = layout.write(each.whole(), False)
            parts.append(
                {suffix: value.unflatten(0, (self.module.num_experts, -1)) for suffix, value in written.items()}
            )
        joined = {suffix: join_outputs(self.module, [part[suffix] for part in parts]) for suffix in layout.suffixes}
        if WEIGHT in joined and self.module.is_transposed:
            joined[WEIGHT] = joined[WEIGHT].transpose(1, 2).contiguous()
        return joined


def place_experts(model: Any, stacks: Sequence[Matrix], weights: Iterable[str]) -> dict[str, Matrix | Together]:
    """What goes in the place of matrices of a folder, by their names there.

    Args:
        stacks: all those of the model.
        weights: the names of all matrices and other tensors of the folder.

    Raises UnsupportedError where the folder has experts in a way, or they are in formats, that are not written.
    """
    if not stacks:
        return {}
    names = transformers_names(empty_model(model.config, torch.float32), weights)
    _check_formats(model, stacks)
    found: dict[str, Matrix | Together] = {}
    by_parameter: dict[str, list[Matrix]] = {}
    for each in stacks:
        by_parameter.setdefault(each.path.rpartition(".")[0], []).append(each)
    for parameter, parts in by_parameter.items():
        owner, _, leaf = parameter.rpartition(".")
        module: Any = model.get_submodule(owner)
        parts.sort(key=lambda each: PARTS[leaf].index(each.path.rpartition(".")[2]))
        if (stored := names.stored.get(parameter)) is not None:
            found[stored] = Together(Stored(stored), module, parts)
            continue
        made = names.made.get(parameter)
        lists = made.stacked() if made else []
        one_behind_the_other = module.is_concatenated and not module.is_transposed
        if not one_behind_the_other or [len(each) for each in lists] != [module.num_experts] * len(parts):
            raise UnsupportedError(
                f"{parameter}: what the folder has of these experts is not known to be written back",
                hint=worded(flags="give --output NAME.gguf", python="save as NAME.gguf"),
            )
        for stack, tensors in zip(parts, lists, strict=True):
            rows = stack.packed.shape[0] // len(tensors)
            for number, name in enumerate(tensors):
                packed = slice_rows(stack.packed, number * rows, (number + 1) * rows)
                found[name] = Matrix(f"{stack.path}.{number}", Stored(name), packed, stack.format)
    return found


def _check_formats(model: Any, stacks: Sequence[Matrix]) -> None:
    formats = {each.format for each in stacks}
    held = formats <= _FLOATS or (formats == {MXFP4} and model.config.model_type == "gpt_oss")
    if held and all(len({each.format for each in stacks if each.path.startswith(f"{path}.")}) == 1
                    for path in {each.path.rpartition(".")[0] for each in stacks}):  # fmt: skip
        return
    floats = ", ".join(sorted(_FLOATS))
    raise UnsupportedError(
        f"{len(stacks)} stacks of experts ({stacks[0].path}, ...) are in {', '.join(sorted(formats))}: a folder can have the "
        f"experts of a parameter in one of {floats}; those of gpt-oss, all of them, in {MXFP4}",
        hint=worded(flags="give --to f16, or --output NAME.gguf", python='save with to="f16", or as NAME.gguf'),
    )
