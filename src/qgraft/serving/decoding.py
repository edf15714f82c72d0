"""fast_decoding(): the tokens of one sequence at the speed of the C kernels, with transformers' generate() around them.

A token of a small model is 200 products of some 20 microseconds each. Called one by one from Python they take three
times as long, so within the block the decoder's forward pass is one call of decode.c, wherever that computes the same:

    one row, one new token       float32, on the CPU, no gradient, no autocast, evaluation mode
    a DynamicCache with tokens   within every sliding window; no attention mask that hides any of them
    a decoder of Llama's kind    llama, mistral, qwen2, qwen3: found out by its parts, and by trial
    all weights packed           in formats that the C kernels read; any number of LoRAs active, no prefix

Everything else, the prompt above all, is transformers' own pass. The cache is transformers' too: its layers' keys and
values are views of buffers with room for more tokens, in which C writes behind the last one. torch.cat, crop and the like
give the layers other tensors; these are copied into new buffers when the next token is decoded, and nothing that
somebody may still look at is written over.

What C reads are addresses. Before each token it is checked that the modules still hold the tensors that the addresses
are of, so adapters may be switched, attached and detached, and weights replaced, at any time.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from qgraft.adapters.lora import Lora, LoraLinear
from qgraft.adapters.selection import Selection
from qgraft.compat import CACHE, given_cache
from qgraft.errors import UnsupportedError
from qgraft.kernels import decode
from qgraft.linear import QuantizedLinear, computing

ROOM = 256  # tokens that a new buffer of keys and values has room for
AGREES = 1e-4  # of the largest number: how far the two ways may be apart in the trial
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_PARTS = {"self_attn": _ATTENTION, "mlp": {"gate_proj", "up_proj", "down_proj"}}
_NORMS = ("input_layernorm", "post_attention_layernorm")


@contextmanager
def fast_decoding(model: PreTrainedModel) -> Iterator[str | None]:
    """Within the block `model` decodes single tokens in C, where that computes what its own forward pass does.

    Found out by looking at its parts, and by decoding two tokens both ways. Yields None where C is in use, else a
    sentence that says why not; the model then is as it was.
    """
    base: Any = model.base_model
    before = vars(base).get("forward")
    decoder = _Decoder(base)
    problem = decoder.problem()
    if problem is None:
        base.forward = wraps(decoder.own)(partial(decoder.forward))  # with the signature of its own
    try:
        yield problem
    finally:
        if problem is None:
            del base.forward
            if before is not None:
                base.forward = before


class _Decoder:
    """The forward pass of one base model: in C or its own."""

    def __init__(self, base: Any) -> None:
        self.base = base
        self.own: Callable[..., Any] = base.forward
        self.lock = threading.Lock()  # two threads may answer with one model
        self.network: _Network | None = None
        self.buffers: _Buffers | None = None

    def problem(self) -> str | None:
        """Why C cannot decode for this model, or None."""
        name = type(self.base).__name__
        try:
            self.network = _Network(self.base)
            with torch.inference_mode(), computing(self.base, "float32"):  # else a rounding may go the other way
                off = self._trial()
        except (UnsupportedError, TypeError, ValueError) as error:
            return f"{name}: {error}"
        finally:
            self.buffers = None
        return None if off <= AGREES else f"{name} computes otherwise than Llama: a state would be off by {off:.2g}"

    def _trial(self) -> float:
        """Two tokens after two others, both ways: how far the states are apart, relative to the largest number."""
        ids = torch.arange(4).remainder(self.base.config.vocab_size)[None]
        caches = [DynamicCache(config=self.base.config) for _ in range(2)]
        off = 0.0
        for cache in caches:
            self.own(input_ids=ids[:, :2], use_cache=True, **{CACHE: cache})
        for token in (ids[:, 2:3], ids[:, 3:]):
            want = self.own(input_ids=token, use_cache=True, **{CACHE: caches[0]}).last_hidden_state
            output = self._step({"input_ids": token, CACHE: caches[1], "use_cache": True})
            if output is None:
                raise UnsupportedError("its state or its cache is not one that C decodes with")
            got = output.last_hidden_state
            off = max(off, float((got - want).abs().max() / want.abs().max()))
        return off

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the base model's own."""
        output = None
        if not args:
            with self.lock:
                output = self._step(kwargs)
        return self.own(*args, **kwargs) if output is None else output

    def _step(self, given: dict[str, Any]) -> BaseModelOutputWithPast | None:
        """The output for one token, or None where that is not for C."""
        ids, positions = given.get("input_ids"), given.get("position_ids")
        cache: Any = given_cache(given)
        if (
            not _is_plain(given, self.base.config)
            or self.base.training
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
        ):
            return None
        past = _length(cache, len(self.base.layers))
        window = getattr(self.base.config, "sliding_window", None)
        if past is None or not _sees_all(given.get("attention_mask"), past + 1) or (window and past >= window):
            return None
        network = self._network()
        if network is None:
            return None
        x = self.base.embed_tokens(ids)
        if positions is None:
            positions = torch.tensor([[past]])
        cos, sin = self.base.rotary_emb(x, position_ids=positions)
        if not x.dtype == cos.dtype == torch.float32 or cos.shape != (1, 1, network.channels):
            return None
        if self.buffers is None or not self.buffers.hold(cache, past):
            self.buffers = _Buffers.copy_of(cache, past, network)
            if self.buffers is None:
                return None
        network.use(self.buffers.memory)
        decode.step(network.model, x.view(-1), cos.view(-1), sin.view(-1), past)
        self.buffers.advance(cache, past + 1)
        return BaseModelOutputWithPast(x, cache)

    def _network(self) -> "_Network | None":
        """The structures of what the model is now; None where C cannot compute that."""
        if self.network is None or self.network.is_stale():
            self.network = None
            try:
                self.network = _Network(self.base)
            except (UnsupportedError, ValueError):  # an adapter was attached, or weights moved, that C does not take
                return None
        return None if self.network.selection and self.network.selection.rows is not None else self.network


_MAY_BE = {"input_ids", "attention_mask", "position_ids", "cache", "past_key_values", "use_cache", "return_dict"}


def _is_plain(given: dict[str, Any], config: Any) -> bool:
    """Whether these arguments of a forward pass ask for one more token of one row, and for nothing else."""
    ids, positions = given.get("input_ids"), given.get("position_ids")
    asked = {"use_cache": True, "return_dict": True, "output_attentions": False, "output_hidden_states": False}
    for name, value in asked.items():
        got = given.get(name)
        if bool(getattr(config, name, value) if got is None else got) is not value:
            return False
    return (
        isinstance(ids, Tensor)
        and ids.shape == (1, 1)
        and ids.device.type == "cpu"
        and (positions is None or positions.shape == (1, 1))
        and all(name in _MAY_BE or value is None or value is False for name, value in given.items())
    )


def _sees_all(mask: Any, length: int) -> bool:
    """Whether a forward pass with this attention mask lets the token see all `length` tokens."""
    if mask is None:
        return True
    return isinstance(mask, Tensor) and mask.shape == (1, length) and bool(mask.all())


def _length(cache: Any, layers: int) -> int | None:
    """How many tokens are in a cache whose layers C can go on with; None for another cache, and for an empty one."""
    if type(cache) is not DynamicCache or len(cache.layers) != layers or getattr(cache, "offloading", False):
        return None
    length = cache.get_seq_length()
    for layer in cache.layers:
        if type(layer) is DynamicSlidingWindowLayer:
            if layer.record_past or length + 1 >= layer.sliding_window:
                return None
        elif type(layer) is not DynamicLayer:
            return None
    return length or None


class _Buffers:
    """Keys and values of all layers with room for more tokens, [2 layers, 1, groups, capacity, channels]."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.views: tuple[Tensor, ...] = ()  # what the cache's layers hold: keys and values of the first layer, ...

    @classmethod
    def copy_of(cls, cache: Any, length: int, network: "_Network") -> "_Buffers | None":
        """New buffers with what the cache holds; None where that is not of the decoder's shape."""
        shape = (1, network.groups, length, network.channels)
        held = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        if any(tensor.shape != shape or tensor.dtype != torch.float32 for tensor in held):
            return None
        memory = torch.empty(len(held), 1, network.groups, length + ROOM, network.channels)
        for part, tensor in zip(memory, held, strict=True):
            part[:, :, :length] = tensor
        buffers = cls(memory)
        buffers._set(cache, length)
        return buffers

    def hold(self, cache: Any, length: int) -> bool:
        """Whether these buffers are what the cache looks at, with room for one more token behind its `length`."""
        views = iter(self.views)
        return length < self.memory.shape[3] and all(
            layer.keys is next(views) and layer.values is next(views) for layer in cache.layers
        )

    def advance(self, cache: Any, length: int) -> None:
        """Let the cache see the first `length` tokens."""
        self._set(cache, length)
        for layer in cache.layers:
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length = length

    def _set(self, cache: Any, length: int) -> None:
        self.views = self.memory.narrow(3, 0, length).unbind(0)
        for index, layer in enumerate(cache.layers):
            layer.keys, layer.values = self.views[2 * index], self.views[2 * index + 1]


class _Network:
    """The C structures of a base model with its active LoRAs, and what has to be so for them to stay right.

    Raises UnsupportedError or ValueError for a model that is not of Llama's kind, or not all packed.
    """

    def __init__(self, base: Any) -> None:
        self.held: decode.Held = []
        self.watched: list[tuple[dict[str, Any], str, Any, int | None]] = []
        self.selection: Selection | None = None
        self.weights: dict[str, float] = {}
        self.rank = 0
        self.epsilons: set[float] = set()
        _check_parts(base)
        attention, mlp = base.layers[0].self_attn, base.layers[0].mlp
        self.channels, self.hidden = int(attention.head_dim), int(attention.q_proj.in_features)
        heads = attention.q_proj.out_features // self.channels
        self.groups = attention.k_proj.out_features // self.channels
        layers = [self._layer(layer) for layer in base.layers]
        self.array = (decode.Layer * len(layers))(*layers)
        norm = self._norm(base, "norm", self.hidden)
        if len(self.epsilons) != 1 or heads % max(self.groups, 1) or self.channels % 2:
            raise UnsupportedError("its norms or heads are not alike")
        self.model = decode.Model(
            len(layers), self.hidden, mlp.gate_proj.out_features, heads, self.groups, self.channels,
            self.rank, 0, self.epsilons.pop(), attention.scaling, norm, self.array,
        )  # fmt: skip
        self._check_shapes()
        self.memory: Tensor | None = None

    def is_stale(self) -> bool:
        """Whether the model holds other modules or tensors than the structures were made of."""
        if self.selection is not None and self.selection.weights != self.weights:
            return True
        for holder, name, value, place in self.watched:  # of 210 layers: a twentieth of a millisecond
            found: Any = holder.get(name)
            if found is not value or (place is not None and found.data_ptr() != place):
                return True
        return False

    def use(self, memory: Tensor) -> None:
        """Write keys and values here: [2 layers, 1, groups, capacity, channels]."""
        if memory is not self.memory:
            self.memory, self.model.capacity = memory, memory.shape[3]
            for index, layer in enumerate(self.array):
                layer.keys, layer.values = memory[2 * index].data_ptr(), memory[2 * index + 1].data_ptr()

    def _layer(self, layer: Any) -> decode.Layer:
        attention, mlp = layer.self_attn, layer.mlp
        return decode.Layer(
            *(self._linear(attention, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
            *(self._linear(mlp, name) for name in ("gate_proj", "up_proj", "down_proj")),
            *(self._norm(layer, name, self.hidden) for name in _NORMS),
            *(
                self._norm(attention, name, self.channels) if hasattr(attention, name) else None
                for name in ("q_norm", "k_norm")
            ),
        )

    def _linear(self, parent: nn.Module, name: str) -> decode.Linear:
        layer, loras = self._watch(parent._modules, name), []
        if isinstance(layer, LoraLinear):
            loras = self._loras(layer)
            layer = layer.base
        if not isinstance(layer, QuantizedLinear):
            raise UnsupportedError(f"{name} is a {type(layer).__name__}, expected packed weights")
        for tensor in ("data", "scale"):
            self._watch(layer.packed_weight._buffers, tensor)
        bias = self._watch(layer._parameters, "bias")
        int8 = (self._watch(vars(layer), "compute") or layer.compute) == "int8"
        return decode.linear(layer.packed, bias, loras, self.held, int8)

    def _loras(self, layer: LoraLinear) -> list[decode.Lora]:
        if self.selection is None:
            self.selection, self.weights = layer.selection, dict(layer.selection.weights)
        if layer.selection is not self.selection:
            raise UnsupportedError("its layers do not share one selection of adapters")
        loras = []
        for name, weight in self.weights.items():
            lora = self._watch(layer.loras._modules, name)
            if lora is not None:
                A, B = (self._watch(lora._parameters, part) for part in ("lora_A", "lora_B"))
                scaling = cast(Lora, lora).config.scaling * weight
                self.rank = max(self.rank, len(A))
                loras.append(decode.lora(A, B, scaling, self.held))
        return loras

    def _norm(self, parent: nn.Module, name: str, size: int) -> int | None:
        norm: Any = self._watch(parent._modules, name)
        if {key: tuple(value.shape) for key, value in norm.named_parameters()} != {"weight": (size,)} or not hasattr(
            norm, "variance_epsilon"
        ):
            raise UnsupportedError(f"{name} is a {type(norm).__name__}, expected one of Llama's with {size} weights")
        self.epsilons.add(norm.variance_epsilon)
        return decode.address(self._watch(norm._parameters, "weight"), self.held)

    def _watch(self, holder: Any, name: str) -> Any:
        """What a module holds under this name; the structures are stale when it is something else."""
        value = holder.get(name)
        self.watched.append((holder, name, value, value.data_ptr() if isinstance(value, Tensor) else None))
        return value

    def _check_shapes(self) -> None:
        """Raise UnsupportedError where the layers are not all of the first one's shape: C would read past an end."""
        m = self.model
        wide, narrow = m.heads * m.channels, m.groups * m.channels
        expected = {
            "q": (wide, m.hidden), "k": (narrow, m.hidden), "v": (narrow, m.hidden), "o": (m.hidden, wide),
            "gate": (m.inner, m.hidden), "up": (m.inner, m.hidden), "down": (m.hidden, m.inner),
        }  # fmt: skip
        for layer in self.array:
            for name, shape in expected.items():
                linear = getattr(layer, name)
                if (linear.rows, linear.columns) != shape:
                    raise UnsupportedError(f"{name} has the shape {(linear.rows, linear.columns)}, expected {shape}")


def _check_parts(base: Any) -> None:
    """Raise UnsupportedError for a base model that is not made of the parts of Llama's, or does more than it shows."""
    children = {name for name, _ in base.named_children()}
    if not children >= {"embed_tokens", "layers", "norm", "rotary_emb"}:
        raise UnsupportedError(f"it is made of {', '.join(sorted(children))}, expected Llama's parts")
    for layer in base.layers:
        kinds = {name for name, _ in layer.named_children()}
        if kinds != {*_PARTS, *_NORMS}:
            raise UnsupportedError(f"a layer is made of {', '.join(sorted(kinds))}, expected Llama's parts")
        for name, parts in _PARTS.items():
            inner = {child for child, _ in getattr(layer, name).named_children()} - {"act_fn", "q_norm", "k_norm"}
            if inner != parts:
                raise UnsupportedError(f"{name} is made of {', '.join(sorted(inner))}, expected Llama's parts")
    for path, module in (*base.layers.named_modules(prefix="layers"), ("norm", base.norm)):
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        # transformers' own collect states where these are asked for, and such a pass is not for C
        if any(not getattr(hook, "__module__", "").startswith("transformers.") for hook in hooks):
            raise UnsupportedError(f"{path} has a forward hook, which C would pass by")
