"""The weights of a LoRA as a dict of tensors, out of a model and back into it; files are adapter_files/."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from qgraft.adapters.adapter import Adapter, prefix_error
from qgraft.adapters.base import find_adapter
from qgraft.adapters.lora import Lora
from qgraft.errors import AdapterError, UnsupportedError
from qgraft.given import described


def lora_state_dict(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """The weights of one LoRA under PEFT's names, sharing memory with the model (but for the A of an exact LoRA, a copy).

    Args:
        name: the adapter; may be left out when only one is attached.

    Returns `base_model.model.<module path>.lora_A.weight` [r, in] and `...lora_B.weight` [out, r], float32; of an
    embedding `...lora_embedding_A` [r, vocabulary] and `...lora_embedding_B` [width, r]; of an exact LoRA on a K-quant
    `...minimum_A` [r, groups] and `...minimum_B` [out, r].
    Raises AdapterError when there is no adapter, or several and no name, or when it is a prefix.
    """
    adapter = find_adapter(model, name)
    if adapter.is_prefix:
        raise prefix_error("lora_state_dict", [adapter.name])
    return adapter.state_dict()


def load_lora_state_dict(model: nn.Module, state: Mapping[str, Tensor], name: str | None = None) -> None:
    """Put the weights that lora_state_dict gave back into an attached LoRA, all of them or none.

    Args:
        state: tensors by the names of lora_state_dict, of any floating point dtype.
        name: the adapter; may be left out when only one is attached.

    A state dict holds no lora_alpha: the options are those of the attached adapter. Raises AdapterError that lists all
    that is missing, unexpected, of another size or not finite.
    """
    own = lora_state_dict(model, name)
    if not isinstance(state, Mapping):
        raise AdapterError(f"load_lora_state_dict: got {described(state)}, expected tensors by their names",
                           hint="torch.load(file) makes them of a file")  # fmt: skip
    problems = [f"missing tensor {key}" for key in own.keys() - state.keys()]
    problems += [f"unexpected tensor {key}" for key in state.keys() - own.keys()]
    for key in own.keys() & state.keys():
        if not isinstance(state[key], Tensor):
            problems.append(f"{key}: got {described(state[key])}, expected a tensor")
        elif state[key].shape != own[key].shape or not state[key].is_floating_point():
            got = f"{state[key].dtype} {list(state[key].shape)}"
            problems.append(f"{key}: got {got}, expected floats {list(own[key].shape)}")
        elif non_finite({key: state[key]}):
            problems.append(f"{key}: NaN or infinity")
    if problems:
        listed = "\n  ".join(sorted(map(str, problems))[:20] + ["..."] * (len(problems) > 20))
        raise AdapterError(f"these tensors do not fit the adapter {find_adapter(model, name).name!r}:\n  {listed}",
                           hint="attach_lora() with the options that it was trained with comes first")  # fmt: skip
    find_adapter(model, name).take(state)


def loras_of(adapter: Adapter, action: str) -> dict[str, Lora]:
    """The LoRAs that the adapter is, by module path. Raises AdapterError for a prefix, which `action` cannot take."""
    if adapter.is_prefix:
        raise prefix_error(action, [adapter.name])
    if others := [path for path, part in adapter.parts.items() if not isinstance(part, Lora)]:
        raise UnsupportedError(
            f"{action}: {adapter.name!r} has rows of single tokens ({others[0]}), which are no LoRA",
            hint="merge it: the merged file has them",
        )
    return {path: cast(Lora, part) for path, part in adapter.parts.items()}


def non_finite(state: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinity."""
    return [key for key, tensor in state.items() if not bool(torch.isfinite(tensor).all())]
