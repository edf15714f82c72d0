"""A LoRA between a model and the two files of its adapter folder: PEFT's options and PEFT's tensors.

    base_model.model.<module path>.lora_A.weight   [r, in]
    base_model.model.<module path>.lora_B.weight   [out, r]

Writing takes both from the model. Reading compares both with the model before anything is attached, and finds all that
differs; adapter_files.py decides what is to be done about it.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from qgraft.adapters.attach import attach_layers, lora_modules, lora_state_dict
from qgraft.adapters.layer_choice import layer_number
from qgraft.adapters.targets import find_targets, is_named
from qgraft.checkpoints.assemble import BaseInfo
from qgraft.checkpoints.peft_config import CONFIG, compiles, layer_config, peft_config, stated_rank

Pairs = dict[str, dict[str, Tensor]]  # module path -> {"A": [r, in], "B": [out, r]}

_KEY = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<part>[AB])(?:\.default)?\.weight")


def lora_content(model: nn.Module, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(PEFT's options, PEFT's tensors) of the LoRA `name`."""
    layers = {path: lora.config for path, lora in lora_modules(model, name)}
    base: BaseInfo | None = getattr(model, "qgraft_base", None)
    targets, numbers = _target_names(model, list(layers))
    options = peft_config(layers, targets, base.source if base else None, numbers)
    return options, lora_state_dict(model, name)


def parse_state(state: Mapping[str, Tensor]) -> tuple[Pairs, list[str]]:
    """({module path: {"A": [r, in], "B": [out, r]}}, what is wrong with the keys)."""
    loras: Pairs = {}
    problems = []
    for key, tensor in state.items():
        match = _KEY.fullmatch(key)
        if match is None:
            problems.append(f"unexpected tensor {key}")
        else:
            loras.setdefault(match["path"], {})[match["part"]] = tensor
    for path, pair in list(loras.items()):
        if len(pair) == 1:
            missing = "B" if "A" in pair else "A"
            problems.append(f"missing tensor base_model.model.{path}.lora_{missing}.weight")
            del loras[path]
    return loras, problems


def fit_layers(model: nn.Module, config: Mapping[str, Any], loras: Pairs) -> tuple[Pairs, list[str]]:
    """(those that fit the model's layers, what differs)."""
    fitting, problems = {}, []
    for path, pair in loras.items():
        if problem := _shape_problem(model, path, pair):
            problems.append(problem)
            continue
        fitting[path] = pair
        if pair["A"].shape[0] != (rank := stated_rank(config, path)):
            problems.append(f"{path}: rank {pair['A'].shape[0]}, but {CONFIG} says r={rank}")
    targets = config.get("target_modules")
    if targets and loras and not config.get("exclude_modules"):
        expected = _targets_of(model, targets)
        if isinstance(targets, list):
            expected = {path for path in expected if path in targets or _in_layers(path, config)}
        problems += [f"missing tensors of {path}" for path in sorted(expected - loras.keys())]
    return fitting, problems


def attach_pairs(model: nn.Module, name: str, config: Mapping[str, Any], loras: Pairs) -> None:
    """Attach each layer with the rank of its tensors and the alpha of its pattern."""
    layers = {path: layer_config(config, path, pair["A"].shape[0]) for path, pair in loras.items()}
    attach_layers(model, name, layers, {path: (pair["A"], pair["B"]) for path, pair in loras.items()})


def _targets_of(model: nn.Module, targets: str | list[str]) -> set[str]:
    """The linear layers that PEFT's target_modules names: last parts or whole paths, or one regular expression."""
    linears = find_targets(model, r"(?s).*")
    if isinstance(targets, str):
        return {path for path in linears if compiles(targets) and re.fullmatch(targets, path)}
    return {path for path in linears for target in targets if is_named(path, target)}


def _in_layers(path: str, config: Mapping[str, Any]) -> bool:
    """Whether PEFT's layers_to_transform, a number or a list, lets the module at `path` have an adapter."""
    numbers = config.get("layers_to_transform")
    if numbers is None or numbers == []:
        return True
    return layer_number(path, config.get("layers_pattern")) in ([numbers] if isinstance(numbers, int) else numbers)


def _shape_problem(model: nn.Module, path: str, pair: dict[str, Tensor]) -> str | None:
    try:
        layer: Any = model.get_submodule(path)
    except AttributeError:
        return f"the model has no layer {path}"
    if not hasattr(layer, "in_features"):
        return f"{path} is a {type(layer).__name__}, not a linear layer"
    A, B = pair["A"], pair["B"]
    if A.dim() != 2 or not A.is_floating_point() or not B.is_floating_point():
        got = f"A {list(A.shape)} {A.dtype}, B {list(B.shape)} {B.dtype}"
        return f"{path}: got {got}, expected two floating point matrices"
    expected = [A.shape[0], layer.in_features], [layer.out_features, A.shape[0]]
    if (list(A.shape), list(B.shape)) != expected:
        return f"{path}: got A {list(A.shape)}, B {list(B.shape)}, expected {expected[0]}, {expected[1]}"
    return None


def _target_names(model: nn.Module, paths: list[str]) -> tuple[list[str] | str, list[int] | None]:
    """The shortest names that select exactly these layers in PEFT, and the numbers that narrow them, if any do.

    The names are the last parts of the paths, or else the whole paths.
    """
    leaves = sorted({path.rsplit(".", 1)[-1] for path in paths})
    selected = {path: layer_number(path) for path in find_targets(model, leaves)}
    if selected.keys() == set(paths):
        return leaves, None
    numbers = {layer_number(path) for path in paths}
    if None not in numbers and {path for path, number in selected.items() if number in numbers} == set(paths):
        return leaves, sorted(number for number in numbers if number is not None)
    if set(find_targets(model, paths)) == set(paths):
        return sorted(paths), None
    return "|".join(re.escape(path) for path in sorted(paths)), None  # one is the end of another layer's path
