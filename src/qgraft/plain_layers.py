"""Which float layers of a model may be replaced by packed ones, or get a LoRA: by what the code around them does.

Two questions: does the layer compute x W^T + b and nothing else, and does nobody read its weight past it?
"""

import inspect
import re
import sys
from functools import cache

from torch import nn

# Layers that compute x W^T + b and nothing else, by exact type: a subclass may do what its name does not say.
_LINEARS = {"torch.nn.modules.linear.Linear", "transformers.models.falcon.modeling_falcon.FalconLinear"}
# Models of transformers whose code reads the weights of layers only where this option of their configuration is set.
_READS_IF = {"bloom": "slow_but_exact"}
# Models whose embeddings are compared with given ones only, to find the ids that these are of: NaN are none, an error there
_COMPARES = {"transformers.models.gemma4.modeling_gemma4.Gemma4ForCausalLM"}

# Routers of experts that keep their weight in a linear layer: they stay floats and take no LoRA, as all routers
_ROUTERS = {"transformers.models.hunyuan_v1_moe.modeling_hunyuan_v1_moe.HunYuanMoEV1Gate"}


def qualified_name(module: nn.Module) -> str:
    """Where the class of a module is, and what it is called."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def is_plain_linear(module: nn.Module) -> bool:
    """Whether this is a float layer that computes x W^T + b and nothing else."""
    return qualified_name(module) in _LINEARS


def weight_is_read(model: nn.Module, path: str) -> bool:
    """Whether the code of the model reads the weight of the layer at `path`, instead of calling the layer.

    Such a layer cannot be replaced by one that holds its weight in another way, and a LoRA on it would be passed by.
    (Mamba hands `self.out_proj.weight` to its kernels.) What the code says is taken for what it does. So is that of a router,
    in whatever class it is.
    """
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent)
    if qualified_name(owner) in _ROUTERS:
        return True
    option = _READS_IF.get(getattr(getattr(owner, "config", None), "model_type", ""))
    if not type(owner).__module__.startswith("transformers.models.") or (option and not getattr(owner.config, option)):
        return False
    if isinstance(owner.get_submodule(name), nn.Embedding) and qualified_name(model) in _COMPARES:
        return False
    return name in _read_weights(type(owner).__module__)


@cache
def _read_weights(module: str) -> frozenset[str]:
    """The names of layers whose weights are read in a Python module, for more than their type, dtype or device, or clamped.

    What begins with `module.` is not: so the functions call what they initialize.
    """
    # names in strings are no code
    source = re.sub(r"\"[^\"\n]*\"|'[^'\n]*'", "", inspect.getsource(sys.modules[module]))
    source = re.sub(r"isinstance\(\s*[\w.]+,", "", source)
    chain = r"(?<![\w.])(?!module\.)(?:\w+\.)+(\w+)\.weight\b(?!\.(?:dtype|device)\b|\.data\b(?!\.clamp_))"
    return frozenset(re.findall(chain, source))
