"""LoRAs on experts in PEFT's files: which parameter a wrapper's tensors are of, and what adapter_config.json says of them.

    target_parameters    ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]: parameters, or the ends of their names

The names of the tensors say the module and how deep its wrapper lies, not the parameter (adapters/lora_experts.py): it
follows from the parameters that target_parameters names in that module.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qgraft.adapter_files.peft_config import CONFIG, stated_rank
from qgraft.adapters.lora_experts import (
    WRAPPED,
    ExpertLora,
    LoraExperts,
    by_experts,
    depth_of,
    expert_layers,
    peft_tensors,
)
from qgraft.adapters.targets import is_named
from qgraft.errors import AdapterError
from qgraft.experts import QuantizedExperts

_Pairs = dict[str, dict[str, Tensor]]  # module path -> "A", "B"


def stored_tensors(experts: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """PEFT's tensors of these LoRAs, A [E, r, in] and B [E, out, r] by the paths of their parameters."""
    made = [peft_tensors(path, depth_of(path, experts), A, B) for path, (A, B) in experts.items()]
    return {name: tensor for tensors in made for name, tensor in tensors.items()}


def stack_tensors(
    lora: ExpertLora, layer: QuantizedExperts, names: Mapping[str, str], scale: float
) -> dict[str, Tensor]:
    """[E, r, in] and [E, out, r] for each tensor of a GGUF file that a projection has, for llama.cpp; one A for all.

    Args:
        names: of the tensors, by what the projection calls their stacks.
        scale: what B is multiplied by.
    """
    A, B = lora.lora_A.detach().cpu(), lora.lora_B.detach().cpu()
    B = B if scale == 1.0 else (B.double() * scale).float()
    tensors: dict[str, Tensor] = {}
    for part, outputs in layer.outputs().items():
        tensors[f"{names[part]}.lora_a"], tensors[f"{names[part]}.lora_b"] = A, B[:, outputs]
    return tensors


def experts_of_stacks(
    model: nn.Module, source: Path, stacks: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, tuple[Tensor, Tensor, int]]:
    """A [E, r, in] and B [E, out, r] of each projection of experts, and the rank that its scaling is of.

    Args:
        source: for messages.
        stacks: "A" and "B" by the paths of stacks.
    """
    layers, problems = {path: _base(layer) for path, layer in expert_layers(model).items()}, []
    grouped: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    for place, pair in stacks.items():
        path, _, part = place.rpartition(".")
        stack: Any = layers[path].get_submodule(part)
        got, rank = {key: list(pair[key].shape) for key in sorted(pair)}, pair["A"].shape[1] if "A" in pair else 0
        expected = {
            "A": [stack.num_experts, rank, stack.in_features],
            "B": [stack.num_experts, stack.out_features, rank],
        }
        if got == expected:
            grouped.setdefault(path, {})[part] = (pair["A"], pair["B"])
        else:
            problems.append(f"{place}: got {got}, expected {expected}")
    ranks = {path: {A.shape[1] for A, _ in parts.values()} for path, parts in grouped.items()}
    problems += [f"{path}: got gate and up of different ranks, expected one" for path in ranks if len(ranks[path]) > 1]
    if problems:
        raise AdapterError(f"{source} does not fit this model:\n  " + "\n  ".join(problems))
    return {path: (*_joined(layers[path], parts), ranks[path].pop()) for path, parts in grouped.items()}


def _joined(layer: QuantizedExperts, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """A and B of a projection, of LoRAs on its stacks by their names.

    Where these have one A it is theirs. Else the ranks add up, and each of them has zeros in the outputs of the others.
    """
    factors = [A for A, _ in pairs.values()]
    shared = all(torch.equal(each, factors[0]) for each in factors)
    A, at = factors[0] if shared else torch.cat(factors, 1), 0
    B = A.new_zeros(layer.num_experts, layer.out_features, A.shape[1])
    outputs = layer.outputs()
    for name, (_, own) in pairs.items():
        B[:, outputs[name], at : at + own.shape[2]] = own
        at += 0 if shared else own.shape[2]
    return A, B


def parameter_names(model: nn.Module, paths: Sequence[str]) -> list[str]:
    """The shortest names that select exactly these projections of experts in PEFT: the ends that all layers share, or all."""
    ends = sorted({".".join(path.split(".")[-3:]) for path in paths})
    named = {path for path in expert_layers(model) for end in ends if is_named(path, end)}
    return ends if named == set(paths) else sorted(paths)


def take_experts(model: nn.Module, config: Mapping[str, Any], pairs: _Pairs) -> tuple[_Pairs, list[str]]:
    """(the LoRAs on experts, by their own paths and with A [E, r, in] and B [E, out, r]; what differs).

    They are taken out of `pairs`.
    """
    layers, names = expert_layers(model), config.get("target_parameters") or []
    modules: dict[str, list[str]] = {}  # the module of the experts -> its parameters that are named, in their order
    for path in layers:
        stem = path.rpartition(".")[0]
        modules.setdefault(stem, [])
        if any(is_named(path, name) for name in names):
            modules[stem].append(path)
    found: _Pairs = {}
    problems: list[str] = []
    for stem, targeted in modules.items():
        for depth, path in enumerate(reversed(targeted)):
            pair = pairs.pop(stem + WRAPPED * depth, None)
            if pair is None:
                problems.append(f"missing tensors of {path}")
            elif isinstance(fitted := _by_experts(layers[path], path, pair), str):
                problems.append(fitted)
            else:
                found[path] = fitted
                if (got := fitted["A"].shape[1]) != (rank := stated_rank(config, path)):
                    problems.append(f"{path}: rank {got}, but {CONFIG} says r={rank}")
    idle = [name for name in names if not any(is_named(path, name) for path in layers)]
    return found, problems + [f"target_parameters: {name} is none of the model's experts" for name in idle]


def _by_experts(layer: QuantizedExperts | LoraExperts, path: str, pair: dict[str, Tensor]) -> dict[str, Tensor] | str:
    """The pair as the layer has it, or what is wrong with it."""
    base = _base(layer)
    A, B = pair["A"], pair["B"]
    rows = A.shape[0] if A.dim() == 2 else 0
    floats = A.is_floating_point() and B.is_floating_point()
    fits = rows > 0 and (A.shape[1], *B.shape) == (base.in_features, base.out_features, rows)
    if floats and fits and rows % base.num_experts == 0:
        return dict(zip("AB", by_experts(A, B, base.num_experts), strict=True))
    expected = f"A [{base.num_experts} x r, {base.in_features}], B [{base.out_features}, r x {base.num_experts}]"
    return f"{path}: got A {list(A.shape)} {A.dtype}, B {list(B.shape)} {B.dtype}, expected {expected}"


def _base(layer: QuantizedExperts | LoraExperts) -> QuantizedExperts:
    return layer.base if isinstance(layer, LoraExperts) else layer
