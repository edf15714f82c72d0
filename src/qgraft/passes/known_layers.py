"""Which layers of transformers compute which formula: known by the code of their forward pass, never by name or trial.

transformers writes each model into a file of its own, with copies of the same few layers in it: of some 200 classes of
norms, 140 have the forward pass of LlamaRMSNorm to the letter. So a layer is what it seems if its class's forward has the
code of one in the tables here: the same instructions, constants and names, and the same functions behind these names.

    norm          y = w · x / rms(x)                        w is the weight, or 1 + the weight
    gated MLP     down(act(gate(x)) · up(x))                act by its exact class
    rotation      q, k by cos, sin: `apply_rotary_pos_emb`  of all channels, or of the first ones

Everything else is unknown, whatever it is called: DeepseekV4MLP has Llama's parts and clamps what goes through them, which
no trial on small numbers shows.
"""

import importlib
import inspect
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from qgraft.kernels.pointwise import ACTIVATIONS, Activation

ROTATION = "apply_rotary_pos_emb"  # what transformers calls it in every modeling_*.py that has one

_NORMS = {  # class -> (where it keeps epsilon, what is added to its weight)
    "transformers.models.llama.modeling_llama.LlamaRMSNorm": ("variance_epsilon", 0),
    "transformers.models.gemma.modeling_gemma.GemmaRMSNorm": ("eps", 1),
    "transformers.models.olmo2.modeling_olmo2.Olmo2RMSNorm": ("variance_epsilon", 0),
    "transformers.models.helium.modeling_helium.HeliumRMSNorm": ("variance_epsilon", 0),
    "transformers.models.llama4.modeling_llama4.Llama4TextRMSNorm": ("eps", 0),
    "transformers.models.moshi.modeling_moshi.MoshiRMSNorm": ("eps", 0),
    "transformers.models.gemma3n.modeling_gemma3n.Gemma3nRMSNorm": ("eps", 0),
    "qgraft.models.chatglm2.ChatGLM2RMSNorm": ("eps", 0),
}
_GATED = (
    "transformers.models.llama.modeling_llama.LlamaMLP",
    "transformers.models.recurrent_gemma.modeling_recurrent_gemma.RecurrentGemmaMlp",
)
_ROTATIONS = {  # function -> whether cos and sin may be narrower than a head
    f"transformers.models.llama.modeling_llama.{ROTATION}": False,
    f"transformers.models.olmo.modeling_olmo.{ROTATION}": False,
    f"transformers.models.gpt_neox.modeling_gpt_neox.{ROTATION}": True,
    f"transformers.models.phi3.modeling_phi3.{ROTATION}": True,
    f"transformers.models.nemotron.modeling_nemotron.{ROTATION}": True,
}
_SILU, _GELU_TANH, _GELU = ACTIVATIONS
_ACTIVATIONS = {  # as configurations call them
    **dict.fromkeys(("silu", "swish"), _SILU),
    **dict.fromkeys(("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_accurate"), _GELU_TANH),
    **dict.fromkeys(("gelu", "gelu_python"), _GELU),
}


@dataclass(frozen=True, eq=False)
class Norm:
    """y = weight · x / sqrt(mean(x²) + eps), of a module whose own weight has this dtype, and is trained or frozen."""

    weight: Tensor
    eps: float
    dtype: torch.dtype
    is_trained: bool


def norm_of(module: nn.Module) -> Norm | None:
    """The formula of an RMSNorm with a weight; None for all other modules."""
    weight, kind = getattr(module, "weight", None), type(module)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or kind.__module__.startswith("torch."):
        return None
    for path, (name, added) in _NORMS.items():
        if _is_like(kind, path, "_norm"):
            counted = weight.float() + added if added else weight
            return Norm(counted.detach(), float(getattr(module, name)), weight.dtype, weight.requires_grad)
    return None


def gate_of(module: nn.Module) -> Activation | None:
    """The activation of a gated MLP of gate_proj, up_proj, down_proj and act_fn; None for all other modules."""
    parts = (getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj"))
    if not all(isinstance(part, nn.Module) for part in parts) or not any(_is_like(type(module), p) for p in _GATED):
        return None
    return _activation_of(getattr(module, "act_fn", None))


def rotates_part(function: Any) -> bool | None:
    """Whether this rotation of queries and keys is one that leaves the last channels be where cos has fewer.

    None where it is no rotation that is known.
    """
    if function is None:
        return None
    return next((part for path, part in _ROTATIONS.items() if _same_code(function, _named(path))), None)


def _activation_of(act: Any) -> Activation | None:
    if act is F.silu:
        return _SILU
    if type(act) is nn.GELU:
        return _GELU if act.approximate == "none" else _GELU_TANH
    if not isinstance(act, nn.Module) or "forward" in vars(act):
        return None
    return next((known for name, known in _ACTIVATIONS.items() if type(act) is type(ACT2FN[name])), None)


def _is_like(kind: type, path: str, *others: str) -> bool:
    """Whether a class computes as the one at `path`, by its forward and by what else forward may call."""
    known = _named(path)
    return all(
        _same_code(getattr(kind, name, None), getattr(known, name, None)) for name in ("forward", *others)
    ) and issubclass(kind, nn.Module)


@cache
def _named(path: str) -> Any:
    """A class or function by its full name."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _same_code(one: Any, other: Any) -> bool:
    """Whether two functions do the same, seen by their code, what they default to and what their globals are."""
    if one is other:
        return True
    one, other = (inspect.unwrap(each) if callable(each) else each for each in (one, other))
    if not isinstance(one, FunctionType) or not isinstance(other, FunctionType):
        return one is other
    a, b = one.__code__, other.__code__
    if (a.co_code, a.co_names, a.co_flags) != (b.co_code, b.co_names, b.co_flags):
        return False
    if a.co_freevars or b.co_freevars or _constants(one) != _constants(other):
        return False
    if (one.__defaults__, one.__kwdefaults__) != (other.__defaults__, other.__kwdefaults__):
        return False
    return all(_same_code(one.__globals__.get(name), other.__globals__.get(name)) for name in a.co_names)


def _constants(function: FunctionType) -> list[tuple[type, Any]]:
    """The constants of the code, with types (1 == 1.0 == True), but for the docstring, which is the first if there is one."""
    first, *others = function.__code__.co_consts or (None,)
    return [(type(each), each) for each in (None if first == function.__doc__ else first, *others)]
