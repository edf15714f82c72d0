"""A decoder as the kernels take it that compute it as a whole: of which ones it can be made, and for how long it is right.

They compute one formula, that of Llama (decode.c). Which models of transformers have it is not found out by looking
or by trial: a scaled position or a window shows only in texts as long as nobody tries. It is a table of exact classes,
`FAMILIES`, and every part of a decoder must be of the class that its family has for it, with nothing put in its place:

    hidden_size, intermediate_size, heads, head_dim, rms_norm_eps     as the modules have them, the same in all layers
    attention_bias, mlp_bias                                          any
    hidden_act                                                        silu
    rope_parameters                                                   any: the model's own module makes cos and sin of the
                                                                      token's position, at which C rotates
    sliding_window, layer_types                                       each layer's window, as the mask of its type is made
    _attn_implementation                                              one that computes softmax(q k s) v (decoding.py)
    attention_dropout                                                 none in evaluation mode

No other field of these configurations enters the decoder's pass over a token. What kernels read are addresses. So a network
lists what the modules held when it was made, and `holds()` compares that before each token: adapters may be attached and
detached, weights replaced, hooks added and layers exchanged at any time. What adapters add is read from structures of their
own (decoding_adapters.py), so that one network serves them all.
"""

import sys
from collections.abc import Callable
from itertools import repeat
from operator import contains
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from qgraft.adapters.lora import LoraLinear
from qgraft.adapters.selection import Selection
from qgraft.errors import UnsupportedError
from qgraft.formats import PackedTensor
from qgraft.kernels import choose
from qgraft.kernels.decoder import LINEARS, Decoder, Layer, Linear, Structures
from qgraft.linear import QuantizedLinear

FAMILIES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
}  # transformers.models -> classes
_LINEARS = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
_HEAD_NORMS = {"qwen3": ("q_norm", "k_norm")}
_LAYER_NORMS = ("input_layernorm", "post_attention_layernorm")
_MASKS = {"full_attention", "sliding_attention"}


def family_of(base: nn.Module) -> str:
    """The family of a decoder, by its class. Raises UnsupportedError for all others."""
    for family, name in FAMILIES.items():
        if type(base) is _class(family, f"{name}Model"):
            return family
    raise UnsupportedError(f"it decodes {', '.join(f'{name}Model' for name in FAMILIES.values())} only")


def _class(family: str, name: str) -> Any:
    """A class of a family, or None where its module was never imported, so that nothing can be of that class."""
    kind = "configuration" if name.endswith("Config") else "modeling"
    return getattr(sys.modules.get(f"transformers.models.{family}.{kind}_{family}"), name, None)


def _windows(family: str, config: Any) -> list[int]:
    """Of each layer, how many tokens it sees at most; 0 for all. A layer sees what the mask that it is given shows."""
    layers, window = config.num_hidden_layers, getattr(config, "sliding_window", None) or 0
    if family == "mistral":
        return [window] * layers
    types = getattr(config, "layer_types", None) or ["full_attention"] * layers
    return [window if name == "sliding_attention" else 0 for name in types]


class Network:
    """A decoder without its adapters, and the structures that one implementation makes of it.

    Raises UnsupportedError or ValueError, with the reason, for a decoder that none computes.

    Attributes:
        decoder: what the structures are made of.
        structures: to hand tokens to.
        adapted: its linear layers, in the order of `LINEARS`; None for one that has no adapters.
        selection: of the model's adapters; None where no layer has any.
        window: how many tokens the narrowest sliding window of a layer takes.
    """

    def __init__(self, base: Any) -> None:
        self._now: list[dict[str, Any]] = []  # what modules hold, children and tensors that may be missing,
        self._then: list[dict[str, Any]] = []  # and what they held
        self._kept: set[int] = set()  # ids of `_now`
        self._tensors: list[tuple[Callable[[str], Any], str, Tensor, Callable[[], int], int]] = []  # see _place
        self._computes: list[tuple[dict[str, Any], str]] = []  # attributes of packed layers, and how they compute
        self._called: list[dict[str, Any]] = []  # attributes of modules that are called, by their class's forward
        self._hooks: list[Any] = []  # of these modules, none
        self._own_hooks: list[tuple[Any, int]] = []  # of these modules, and how many: transformers' own
        self.adapted: list[LoraLinear | None] = []
        self.selection: Selection | None = None
        self._heads: set[tuple[int, float]] = set()  # head_dim and scaling of all layers, which are the same
        self._epsilons: set[float] = set()
        self._norms: list[tuple[str, tuple[int, ...]]] = []
        self._family, self._config = family_of(base), base.config
        self._name = FAMILIES[self._family]
        self._check_config(base)
        self._windows = _windows(self._family, self._config)
        self.window = min(filter(None, self._windows), default=sys.maxsize)
        self.decoder = self._read(base)
        self.structures = self._made()

    def _read(self, base: Any) -> Decoder:
        layers = self._child(base, "layers")
        made = [self._layer(index, self._child(layers, str(index))) for index in range(len(layers))]
        norm = self._norm(base, "norm")
        if len(self._epsilons) != 1 or len(self._heads) != 1:
            raise UnsupportedError("its norms or heads are not alike")
        channels, scaling = self._heads.pop()
        decoder = Decoder(made, norm, channels, self._epsilons.pop(), scaling)
        if channels % 2 or decoder.heads % max(decoder.groups, 1):
            raise UnsupportedError(
                f"its heads cannot be rotated or shared: {decoder.heads} of {channels}, {decoder.groups} keys"
            )
        self._check_shapes(decoder)
        return decoder

    def _made(self) -> Structures:
        """The structures of the one implementation that serves the formats of all layers."""
        device = self.decoder.norm.device.type
        packed = [linear.packed for layer in self.decoder.layers for linear in layer.linears]
        choices = {choose("decode_step", each.format, device, torch.float32) for each in packed}
        if others := [choice for choice in choices if choice.kernel == "reference"]:
            raise UnsupportedError(f"{others[0].format} weights on {device}: {others[0].why}")
        structures: Structures = choices.pop().module.Structures(self.decoder)
        return structures

    def holds(self) -> bool:
        """Whether the decoder still is what the structures were made of; of 30 layers in a tenth of a millisecond."""
        if self._now != self._then or any(self._hooks) or any(map(contains, self._called, repeat("forward"))):
            return False
        if _windows(self._family, self._config) != self._windows:
            return False
        for held, name, tensor, address, before in self._tensors:
            if held(name) is not tensor or address() != before:
                return False
        for attributes, compute in self._computes:
            if attributes.get("compute", QuantizedLinear.compute) != compute:
                return False
        return all(len(hooks) == count for hooks, count in self._own_hooks)

    def _layer(self, index: int, layer: Any) -> Layer:
        self._check(layer, "DecoderLayer", f"layers.{index}")
        attention, mlp = (self._child(layer, part) for part in _LINEARS)
        self._check(attention, "Attention", f"layers.{index}.self_attn")
        self._check(mlp, "MLP", f"layers.{index}.mlp")
        self._check_activation(mlp)
        if attention.layer_idx != index or attention.config is not self._config:
            raise UnsupportedError(f"layers.{index} was made for another place or another model")
        self._heads.add((int(attention.head_dim), float(attention.scaling)))
        head_norms = _HEAD_NORMS.get(self._family)
        return Layer(
            (
                *(self._linear(attention, name) for name in _LINEARS["self_attn"]),
                *(self._linear(mlp, name) for name in _LINEARS["mlp"]),
            ),
            (
                *(self._norm(layer, name) for name in _LAYER_NORMS),
                *(self._norm(attention, name) for name in head_norms or ()),
            ),
            self._windows[index],
        )

    def _linear(self, parent: nn.Module, name: str) -> Linear:
        layer = self._child(parent, name)
        self.adapted.append(layer if type(layer) is LoraLinear else None)
        if type(layer) is LoraLinear:
            self._check_plain(layer, name)
            if layer.selection is not (self.selection or layer.selection):
                raise UnsupportedError("its layers do not share one selection of adapters")
            self.selection = layer.selection
            layer = self._child(layer, "base")
        if type(layer) is not QuantizedLinear:
            raise UnsupportedError(f"{name} is a {type(layer).__name__}, expected packed weights")
        self._check_plain(layer, name)
        if self._tensor(layer._buffers, "input_order") is not None:
            raise UnsupportedError(f"{name} has its columns in another order than its inputs")
        for name, tensor in self._child(layer, "packed_weight").named_buffers():
            self._place(layer.packed_weight._buffers, name, tensor)
        bias = self._tensor(layer._parameters, "bias")
        self._computes.append((vars(layer), layer.compute))
        return Linear(_detached(layer.packed), None if bias is None else bias.detach(), layer.compute == "int8")

    def _norm(self, parent: nn.Module, name: str) -> Tensor:
        norm = self._child(parent, name)
        self._check(norm, "RMSNorm", name)
        self._epsilons.add(norm.variance_epsilon)
        weight: Tensor = self._tensor(norm._parameters, "weight")
        self._norms.append((name, tuple(weight.shape)))
        return weight.detach()

    def _child(self, module: nn.Module, name: str) -> Any:
        """A child of a module; the network does not hold any more when the module gets another one."""
        self._keep(module._modules)
        return module._modules.get(name)

    def _tensor(self, holder: dict[str, Any], name: str) -> Any:
        """A tensor of a module; the network does not hold any more when another is in its place, or it lies elsewhere."""
        tensor = holder.get(name)
        if tensor is None:
            self._keep(holder)
        else:
            self._place(holder, name, tensor)
        return tensor

    def _place(self, holder: dict[str, Any], name: str, tensor: Tensor) -> None:
        self._tensors.append((holder.get, name, tensor, tensor.data_ptr, tensor.data_ptr()))

    def _keep(self, holder: dict[str, Any]) -> None:
        if id(holder) not in self._kept:
            self._kept.add(id(holder))
            self._now.append(holder)
            self._then.append(dict(holder))

    def _check(self, module: Any, part: str, path: str) -> None:
        """Raise UnsupportedError for a module that is not the family's own, or does more than its class."""
        expected = f"{self._name}{part}"
        if type(module) is not _class(self._family, expected):
            raise UnsupportedError(f"{path} is a {type(module).__name__}, expected {expected}")
        self._check_plain(module, path)

    def _check_plain(self, module: nn.Module, path: str) -> None:
        """Raise UnsupportedError where calling the module runs more than its class's forward."""
        if "forward" in vars(module):
            raise UnsupportedError(f"{path} has a forward pass of its own, which would be passed by")
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            # transformers' own collect states where these are asked for, and such a pass is not for C
            if any(not getattr(hook, "__module__", "").startswith("transformers.") for hook in hooks.values()):
                raise UnsupportedError(f"{path} has a forward hook, which would be passed by")
            if hooks:
                self._own_hooks.append((hooks, len(hooks)))
            else:
                self._hooks.append(hooks)
        self._called.append(vars(module))

    def _check_activation(self, mlp: Any) -> None:
        """Raise UnsupportedError for another activation than silu: the configuration may say it, and the module be it."""
        act = self._child(mlp, "act_fn")
        if self._config.hidden_act != "silu" or type(act) not in (nn.SiLU, type(ACT2FN["silu"])):
            raise UnsupportedError(f"its activation is {self._config.hidden_act} ({type(act).__name__}), expected silu")
        self._check_plain(act, "act_fn")

    def _check_config(self, base: Any) -> None:
        if type(self._config) is not _class(self._family, f"{self._name}Config"):
            raise UnsupportedError(f"its configuration is a {type(self._config).__name__}, expected {self._name}Config")
        if others := set(getattr(self._config, "layer_types", None) or ()) - _MASKS:
            raise UnsupportedError(
                f"it has layers of {', '.join(sorted(others))}, expected {', '.join(sorted(_MASKS))}"
            )
        rotary = self._child(base, "rotary_emb")
        if type(rotary) is not _class(self._family, f"{self._name}RotaryEmbedding"):
            raise UnsupportedError(f"its rotation is a {type(rotary).__name__}, expected {self._name}RotaryEmbedding")

    def _check_shapes(self, m: Decoder) -> None:
        """Raise UnsupportedError where the layers are not all of the first one's shape: kernels would read past an end."""
        wide, narrow = m.heads * m.channels, m.groups * m.channels
        expected: dict[str, tuple[int, ...]] = {
            "q": (wide, m.hidden), "k": (narrow, m.hidden), "v": (narrow, m.hidden), "o": (m.hidden, wide),
            "gate": (m.inner, m.hidden), "up": (m.inner, m.hidden), "down": (m.hidden, m.inner),
        }  # fmt: skip
        named = [pair for layer in m.layers for pair in zip(LINEARS, layer.linears, strict=True)]
        found = [(name, linear.packed.shape) for name, linear in named]
        expected |= dict.fromkeys(("norm", *_LAYER_NORMS), (m.hidden,)) | dict.fromkeys(
            ("q_norm", "k_norm"), (m.channels,)
        )
        for name, shape in [*found, *self._norms]:
            if shape != expected[name]:
                raise UnsupportedError(f"{name} has the shape {shape}, expected {expected[name]}")


def _detached(packed: PackedTensor) -> PackedTensor:
    """With tensors of its own: the memory stays, whatever the layer's are set to."""
    return packed.map(Tensor.detach)
