"""A decoder as the kernels take it that compute it as a whole: of which ones it can be made, and for how long it is right.

They compute one formula, that of Llama, with experts (decode.c). Which models of transformers have it is not found out by
looking or by trial: a scaled position or a window shows only in texts as long as nobody tries. It is a table of exact classes
(decoding_families.py), and every part of a decoder must be of the class that its family has for it, with nothing put in its
place:

    hidden_size, heads, head_dim, rms_norm_eps                        as the modules have them, the same in all layers
    intermediate_size, and those of experts                           as the modules have them
    attention_bias, mlp_bias                                          any
    hidden_act                                                        silu, or gpt-oss's own
    rope_parameters                                                   any: the model's own module makes cos and sin of the
                                                                      token's position, at which C rotates
    sliding_window, layer_types                                       each layer's window, as the mask of its type is made
    _attn_implementation                                              one that computes softmax(q k s) v (decoding.py)
    attention_dropout, router_jitter_noise                            none in evaluation mode
    residual_multiplier, embedding_multiplier                         as the modules have them

No other field of these configurations enters the decoder's pass over a token. What kernels read are addresses. So a network
lists what the modules held when it was made, and `holds()` compares that before each token: adapters may be attached and
detached, weights replaced, hooks added and layers exchanged at any time. What adapters add is read from structures of their
own (decoding_adapters.py), so that one network serves them all.
"""

from collections.abc import Callable
from itertools import repeat
from operator import contains
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from qgraft.adapters.lora import LoraLayer, LoraLinear
from qgraft.adapters.lora_experts import LoraExperts
from qgraft.adapters.selection import Selection
from qgraft.errors import UnsupportedError
from qgraft.experts import QuantizedExperts
from qgraft.formats import PackedTensor, dequantize
from qgraft.kernels import choose
from qgraft.kernels.decoder import LINEARS, Decoder, Experts, Layer, Linear, Structures
from qgraft.linear import QuantizedLinear
from qgraft.passes.decoding_families import FAMILIES, Mixture, class_of, family_of

_ATTENTION, _DENSE = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
_HEAD_NORMS = ("q_norm", "k_norm")
_LAYER_NORMS = ("input_layernorm", "post_attention_layernorm")
_Shape = tuple[int, ...]
_Named = tuple[str, _Shape]
_MASKS = {"full_attention", "sliding_attention"}


class Network:
    """A decoder without its adapters, and the structures that one implementation makes of it.

    Raises UnsupportedError or ValueError, with the reason, for a decoder that none computes.

    Attributes:
        decoder: what the structures are made of.
        structures: to hand tokens to.
        adapted: its linear layers, in the order of `PLACES`; None for one that has no adapters. Of experts (the projection
            that carries them, which of its stacks).
        selection: of the model's adapters; None where no layer has any.
        family: the decoder's.
        windows: how many tokens each layer sees at most, 0 for all.
        multiplier: what embeddings are multiplied by.
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
        self.adapted: list[LoraLinear | tuple[LoraExperts, str] | None] = []
        self.selection: Selection | None = None
        self._heads: set[tuple[int, float]] = set()  # head_dim and scaling of all layers, which are the same
        self._epsilons: set[float] = set()
        self._residuals: set[float] = set()
        self._norms: list[_Named] = []
        self._of, self._config = family_of(base), base.config
        self.family = FAMILIES[self._of]
        self._check_config(base)
        self.windows = self.family.windows(self._config)
        self.multiplier = float(getattr(base, "embedding_multiplier", 1.0))
        self._rotary = base.rotary_emb
        self.decoder = self._read(base)
        self.structures = self._made()

    def _read(self, base: Any) -> Decoder:
        layers = self._child(base, "layers")
        made = [self._layer(index, self._child(layers, str(index))) for index in range(len(layers))]
        norm = self._norm(base, "norm")
        if len(self._epsilons) != 1 or len(self._heads) != 1 or len(self._residuals) != 1:
            raise UnsupportedError("its norms or heads are not alike")
        channels, scaling = self._heads.pop()
        rotated = 2 * len(self._rotary.inv_freq)
        decoder = Decoder(
            made, norm, channels, self._epsilons.pop(), scaling, rotated, self.family.pairs,
            self.family.head_norms == "wide", self._residuals.pop(),
        )  # fmt: skip
        if rotated > channels or (rotated < channels and not self.family.partial):
            raise UnsupportedError(f"{rotated} channels are rotated, its heads have {channels}")
        if channels % 2 or decoder.heads % max(decoder.groups, 1):
            raise UnsupportedError(
                f"its heads cannot be rotated or shared: {decoder.heads} of {channels}, {decoder.groups} keys"
            )
        self._check_shapes(decoder)
        return decoder

    def _made(self) -> Structures:
        """The structures of the one implementation that serves the formats of all layers."""
        device = self.decoder.norm.device.type
        packed = [packed for layer in self.decoder.layers for packed in layer.packed]
        choices = {choose("decode_step", each.format, device, torch.float32) for each in packed}
        if others := [choice for choice in choices if choice.kernel == "reference"]:
            raise UnsupportedError(f"{others[0].format} weights on {device}: {others[0].why}")
        structures: Structures = choices.pop().module.Structures(self.decoder)
        return structures

    def holds(self) -> bool:
        """Whether the decoder still is what the structures were made of; of 30 layers in a tenth of a millisecond."""
        if self._now != self._then or any(self._hooks) or any(map(contains, self._called, repeat("forward"))):
            return False
        if self.family.windows(self._config) != self.windows:
            return False
        for held, name, tensor, address, before in self._tensors:
            if held(name) is not tensor or address() != before:
                return False
        for attributes, compute in self._computes:
            if attributes.get("compute", QuantizedLinear.compute) != compute:
                return False
        return all(len(hooks) == count for hooks, count in self._own_hooks)

    def begin(self, embedded: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """What the structures take for tokens whose embeddings [1, T, hidden] are of positions [1, T].

        Returns x [1, T, hidden], which may be written over, cos and sin [1, T, angles]; None for other angles than the
        structures take.
        """
        x = embedded.to(torch.float32, copy=True)
        if self.multiplier != 1:
            x *= self.multiplier
        cos, sin = self._rotary(x, position_ids=positions)
        if 2 * cos.shape[-1] == self.decoder.angles:  # gpt-oss has each angle once
            cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
        expected = (1, x.shape[1], self.decoder.angles)
        return (x, cos, sin) if cos.dtype == torch.float32 and cos.shape == expected else None

    def _layer(self, index: int, layer: Any) -> Layer:
        self._check(layer, "DecoderLayer", f"layers.{index}")
        attention = self._child(layer, "self_attn")
        self._check(attention, "Attention", f"layers.{index}.self_attn")
        if attention.layer_idx != index or attention.config is not self._config:
            raise UnsupportedError(f"layers.{index} was made for another place or another model")
        self._heads.add((int(attention.head_dim), float(attention.scaling)))
        self._residuals.add(float(getattr(layer, "residual_multiplier", 1.0)))
        norms = [self._norm(layer, name) for name in _LAYER_NORMS]
        if self.family.head_norms and getattr(attention, "use_qk_norm", True):
            norms += [self._norm(attention, name) for name in _HEAD_NORMS]
        sinks = self._tensor(attention._parameters, "sinks") if self.family.sinks else None
        linears = [self._linear(attention, name) for name in _ATTENTION]
        dense, experts = self._feed_forward(index, layer)
        return Layer((*linears, *dense), tuple(norms), self.windows[index], experts, _detached(sinks))

    def _feed_forward(self, index: int, layer: Any) -> tuple[list[Linear | None], Experts | None]:
        """Gate, up, shared gate and down of a layer; its experts."""
        mixture = self.family.mixture
        at = mixture.at if mixture else "mlp"
        block, path = self._child(layer, at), f"layers.{index}.{at}"
        if mixture is None or type(block) is not class_of(self._of, f"{self.family.name}{mixture.block}"):
            linears = self._dense(block, path)
            self.adapted += [None] * 3
            return linears, None
        self._check_plain(block, path)
        shared = self._child(block, mixture.shared) if mixture.shared else None
        if shared is None:
            self.adapted += [None] * 4
            return [None] * 4, self._experts(block, mixture, path)
        linears = self._dense(shared, f"{path}.{mixture.shared}", block if mixture.shared_gate else None)
        return linears, self._experts(block, mixture, path)

    def _dense(self, mlp: Any, path: str, gated_by: nn.Module | None = None) -> list[Linear | None]:
        self._check(mlp, "MLP", path)
        self._check_activation(mlp)
        gate, up = (self._linear(mlp, name) for name in _DENSE[:2])
        shared_gate = None
        if gated_by is not None:
            assert self.family.mixture is not None and self.family.mixture.shared_gate is not None
            shared_gate = self._linear(gated_by, self.family.mixture.shared_gate)
            weight, shape = dequantize(shared_gate.packed, torch.float32), shared_gate.packed.shape
            shared_gate = Linear(PackedTensor("f32", shape, (weight,)), shared_gate.bias)
        else:
            self.adapted.append(None)
        return [gate, up, shared_gate, self._linear(mlp, _DENSE[2])]

    def _experts(self, block: Any, mixture: Mixture, path: str) -> Experts:
        experts, router = self._child(block, "experts"), self._child(block, mixture.chooses)
        self._check(experts, "Experts", f"{path}.experts")
        self._check(router, mixture.router, f"{path}.{mixture.chooses}")
        clamp = (float(experts.limit), float(experts.alpha)) if hasattr(experts, "limit") else None
        if clamp is None:
            self._check_activation(experts)
        gate_up, down = (self._stacks(experts, name) for name in ("gate_up_proj", "down_proj"))
        if gate_up.keys() != {"gate", "up"} or down.keys() != {"down"}:
            raise UnsupportedError(f"{path}.experts has the weights {', '.join((*gate_up, *down))}")
        bias, down_bias = (
            self._tensor(experts._parameters, f"{name}_bias") if experts.has_bias else None
            for name in ("gate_up_proj", "down_proj")
        )
        correction = self._correction(router, mixture) if mixture.correction else None
        return Experts(
            gate_up["gate"], gate_up["up"], down["down"]._replace(bias=_detached(down_bias)),
            self._tensor(router._parameters, "weight").detach(), mixture.routing(router),
            _detached(self._tensor(router._parameters, "bias")), correction, _detached(bias), not experts.is_concatenated,
            clamp,
        )  # fmt: skip

    def _correction(self, router: Any, mixture: Mixture) -> Tensor:
        """[experts], what is added to the scores that experts are chosen by."""
        if mixture.keeper is not None:
            name, kind = mixture.keeper
            router = self._child(router, name)
            self._check(router, kind, name)
        holder = router._parameters if mixture.correction in router._parameters else router._buffers
        correction: Tensor = self._tensor(holder, mixture.correction or "")
        return correction.detach().flatten()

    def _stacks(self, experts: Any, name: str) -> dict[str, Linear]:
        """The packed weights of all experts in one of their projections."""
        layer = wrapper = self._child(experts, name)
        if type(layer) is LoraExperts:
            self._take_selection(layer, name)
            layer = self._child(layer, "base")
        if type(layer) is not QuantizedExperts:
            raise UnsupportedError(f"{name} is a {type(layer).__name__}, expected packed weights")
        self._check_plain(layer, name)
        found = {}
        for part in layer.stacks():
            self.adapted.append((wrapper, part) if type(wrapper) is LoraExperts else None)
            stack = self._child(layer, part)
            self._place_packed(stack)
            self._computes.append((vars(layer), layer.compute))
            found[part] = Linear(_packed(stack), None, layer.compute == "int8")
        return found

    def _linear(self, parent: nn.Module, name: str) -> Linear:
        layer = self._child(parent, name)
        self.adapted.append(layer if type(layer) is LoraLinear else None)
        if type(layer) is LoraLinear:
            self._take_selection(layer, name)
            layer = self._child(layer, "base")
        if type(layer) is not QuantizedLinear:
            raise UnsupportedError(f"{name} is a {type(layer).__name__}, expected packed weights")
        self._check_plain(layer, name)
        if self._tensor(layer._buffers, "input_order") is not None:
            raise UnsupportedError(f"{name} has its columns in another order than its inputs")
        self._place_packed(layer)
        bias = self._tensor(layer._parameters, "bias")
        self._computes.append((vars(layer), layer.compute))
        return Linear(_packed(layer), _detached(bias), layer.compute == "int8")

    def _take_selection(self, layer: LoraLayer, name: str) -> None:
        self._check_plain(layer, name)
        if layer.selection is not (self.selection or layer.selection):
            raise UnsupportedError("its layers do not share one selection of adapters")
        self.selection = layer.selection

    def _place_packed(self, layer: Any) -> None:
        for name, tensor in self._child(layer, "packed_weight").named_buffers():
            self._place(layer.packed_weight._buffers, name, tensor)

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
        expected = f"{self.family.name}{part}"
        if type(module) is not class_of(self._of, expected):
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
        name, option = self.family.name, self.family.unserved
        if type(self._config) is not class_of(self._of, f"{name}Config"):
            raise UnsupportedError(f"its configuration is a {type(self._config).__name__}, expected {name}Config")
        if option is not None and getattr(self._config, option) is not None:
            raise UnsupportedError(f"it has {option}={getattr(self._config, option)}, expected None")
        if others := set(getattr(self._config, "layer_types", None) or ()) - _MASKS:
            raise UnsupportedError(
                f"it has layers of {', '.join(sorted(others))}, expected {', '.join(sorted(_MASKS))}"
            )
        rotary = self._child(base, "rotary_emb")
        if type(rotary) is not class_of(self._of, f"{name}RotaryEmbedding"):
            raise UnsupportedError(f"its rotation is a {type(rotary).__name__}, expected {name}RotaryEmbedding")

    def _check_shapes(self, m: Decoder) -> None:
        """Raise UnsupportedError where layers are not of the first one's shape: kernels would read past an end."""
        wide, narrow = m.heads * m.channels, m.groups * m.channels
        norms = (wide, narrow) if m.wide_norms else (m.channels, m.channels)
        expected: dict[str, _Shape] = {
            "q": (wide, m.hidden), "k": (narrow, m.hidden), "v": (narrow, m.hidden), "o": (m.hidden, wide),
            "shared_gate": (1, m.hidden), "sinks": (m.heads,), **dict.fromkeys(("norm", *_LAYER_NORMS), (m.hidden,)),
            **{name: (width,) for name, width in zip(_HEAD_NORMS, norms, strict=True)},
        }  # fmt: skip
        self._compare(self._norms, expected)
        for layer in m.layers:
            linears = zip(LINEARS, layer.linears, strict=True)
            found: list[_Named] = [(name, linear.packed.shape) for name, linear in linears if linear is not None]
            if layer.sinks is not None:
                found.append(("sinks", tuple(layer.sinks.shape)))
            inner = layer.rows("gate")
            own: dict[str, _Shape] = {"gate": (inner, m.hidden), "up": (inner, m.hidden), "down": (m.hidden, inner)}
            self._compare(found, expected | own)
            if layer.experts is not None:
                count, inner = len(layer.experts.router), layer.experts.inner
                own = {"gate": (count * inner, m.hidden), "up": (count * inner, m.hidden)}
                own |= {"down": (count * m.hidden, inner), "router": (count, m.hidden)}
                found = [(name, each.packed.shape) for name, each in zip(own, layer.experts.linears, strict=False)]
                self._compare([*found, ("router", tuple(layer.experts.router.shape))], own)

    @staticmethod
    def _compare(found: list[_Named], expected: dict[str, _Shape]) -> None:
        for name, shape in found:
            if shape != expected[name]:
                raise UnsupportedError(f"{name} has the shape {shape}, expected {expected[name]}")


def _packed(layer: Any) -> PackedTensor:
    """The layer's weight with tensors of its own: the memory stays, whatever the layer's are set to."""
    packed: PackedTensor = layer.packed
    return packed.map(Tensor.detach)


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
