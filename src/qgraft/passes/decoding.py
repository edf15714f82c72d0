"""fast_decoding(): the tokens of one sequence at the speed of the kernels, with transformers' generate() around them.

A token of a small model is 200 products of some 20 microseconds each. Called one by one from Python they take three
times as long, on a GPU ten times, so within the block the decoder's forward pass is one call of decode.c, or one CUDA graph
(gpu_decode.py), wherever that computes the same:

    one row, one new token       in float32, on a GPU in half precision too; no gradient, no autocast, evaluation mode
    a DynamicCache with tokens   its layers' windows those of the masks; no attention mask that hides any of them
    a decoder of some families   by their exact classes (decoding_families.py)
    all weights packed           in formats that the kernels read; any number of LoRAs active, no prefix

Everything else, the prompt above all, is transformers' own pass. The cache is transformers' too: its layers' keys and
values are views of buffers with room for more tokens, in which the kernels write behind the last one. torch.cat, crop and
the like give the layers other tensors; these are copied into new buffers when the next token is decoded, and nothing that
somebody may still look at is written over.

Several threads may answer at once. Each conversation has its own cache and so its own buffers; each choice of adapters
its own structures; and a token is one call that uses all cores, so one thread at a time decodes one.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import update_wrapper
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, MoeModelOutputWithPast

from qgraft.attention import PREFIX, attention_of
from qgraft.compat import given_cache
from qgraft.errors import UnsupportedError
from qgraft.kernels.decoder import Part, Row
from qgraft.kernels.reference import HALVES
from qgraft.model_parts import decoder_of
from qgraft.passes.decoding_adapters import DecoderLoras, Decoding
from qgraft.passes.decoding_network import Network

ROOM = 256  # tokens that a new buffer of keys and values has room for
CHOICES = 8  # choices of adapters whose structures are kept
_ATTENTIONS = ("eager", "sdpa", PREFIX)
_INSTALLING = threading.Lock()


@contextmanager
def fast_decoding(model: PreTrainedModel) -> Iterator[str | None]:
    """Within the block `model` decodes single tokens in one call of kernels, where that computes what its own pass does.

    Several threads may be in such a block. Yields None where they are in use, else a sentence that says why not; the model
    then is as it was.
    """
    base = decoder_of(model)
    problem = why_not(base)
    if problem is not None:
        yield problem
        return
    with _INSTALLING:
        decoder = vars(base).get("forward") or _Decoder(base)
        decoder.users += 1
    try:
        yield None
    finally:
        with _INSTALLING:
            decoder.leave()


def why_not(base: nn.Module) -> str | None:
    """Why no kernel can decode for this decoder as it is now, or None."""
    name, forward = type(base).__name__, vars(base).get("forward")
    if forward is not None and not isinstance(forward, _Decoder):
        return f"{name}: its forward pass was replaced, which would be passed by"
    try:
        network = Network(base)
        weights = network.selection.now().uniform if network.selection else {}
        DecoderLoras(network, weights or {})
    except (UnsupportedError, ValueError) as error:
        return f"{name}: {error}"
    return None


class _Decoder:
    """The forward pass of a base model, by kernels or its own, in the place of it while there are users."""

    def __init__(self, base: Any) -> None:
        self.base = base
        self.own: Callable[..., Any] = base.forward
        self.users = 0
        self.lock = threading.RLock()
        self.structures = Decoding(base, CHOICES)
        self.buffers: WeakKeyDictionary[DynamicCache, _Buffers] = WeakKeyDictionary()
        update_wrapper(self, self.own)  # with the signature of its own
        base.forward = self

    def leave(self) -> None:
        """One user less; without any the model's forward pass is its own again."""
        self.users -= 1
        if not self.users and vars(self.base).get("forward") is self:
            del self.base.forward

    def __reduce__(self) -> Any:
        return _itself, (self.own,)  # a copy of the model has its own forward pass

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the base model's own."""
        output = None if args or not self.users else self._step(kwargs)
        return self.own(*args, **kwargs) if output is None else output

    def _step(self, given: dict[str, Any]) -> BaseModelOutputWithPast | MoeModelOutputWithPast | None:
        """The output for one token, or None where that is not for the kernels."""
        base, cache, positions = self.base, given_cache(given), given.get("position_ids")
        if not _is_plain(given, base.config) or not _computes_plainly(base):
            return None
        past = _length(cache, len(base.layers))
        if past is None or not _sees_all(given.get("attention_mask"), past + 1):
            return None
        embedded = base.embed_tokens(given["input_ids"])
        if not computes(embedded):
            return None
        positions = torch.tensor([[past]], device=embedded.device) if positions is None else positions
        with self.lock:
            self.structures.check()
            self.structures.check_loras()
            network = self.structures.network
            begun = None if network is None else network.begin(embedded, positions)
            if network is None or begun is None or not _has_windows(cache, network):
                return None
            weights = network.selection.now().uniform if network.selection else {}
            loras = None if weights is None else self.structures.loras(weights)  # None: an adapter for each row
            buffers = None if loras is None else self._buffers_for(cache, past, network, embedded)
            if loras is None or buffers is None:
                return None
            network.structures.use(buffers.pairs)
            parts, rows = [Part(loras.loras, 1)], [Row(torch.arange(past + 1, device=embedded.device), past + 1)]
            states = network.structures.step(parts, rows, *(part[0] for part in begun))
            buffers.advance(cache, past + 1)
        output = BaseModelOutputWithPast if network.family.mixture is None else MoeModelOutputWithPast
        return output(states[None].to(embedded.dtype), cache)

    def _buffers_for(self, cache: DynamicCache, past: int, network: Network, embedded: Tensor) -> "_Buffers | None":
        buffers = self.buffers.get(cache)
        if buffers is None or not buffers.hold(cache, past):
            buffers = _Buffers.copy_of(cache, past, network, embedded)
            if buffers is not None:
                self.buffers[cache] = buffers
        return buffers


def computes(embedded: Tensor) -> bool:
    """Whether a decoder with these embeddings computes in a dtype and on a device that kernels have."""
    halves = embedded.is_cuda and embedded.dtype in HALVES
    return embedded.dtype == torch.float32 or halves


def _itself(value: Any) -> Any:
    return value


def _computes_plainly(base: Any) -> bool:
    """Whether the decoder's pass, asked for now, is one without gradients and autocast, through all of its layers."""
    config, device = base.config, base.norm.weight.device.type
    return not (
        base.training
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled(device)
        or attention_of(base) not in _ATTENTIONS
        or config.num_hidden_layers != len(base.layers)  # assistant_early_exit
    )


_MAY_BE = {"input_ids", "attention_mask", "position_ids", "cache", "past_key_values", "use_cache", "return_dict"}


def _is_plain(given: dict[str, Any], config: Any) -> bool:
    """Whether these arguments of a forward pass ask for one more token of one row, and for nothing else."""
    ids, positions = given.get("input_ids"), given.get("position_ids")
    asked = {"use_cache": True, "return_dict": True}
    asked |= dict.fromkeys(("output_attentions", "output_hidden_states", "output_router_logits"), False)
    for name, value in asked.items():
        got = given.get(name)
        if bool(getattr(config, name, value) if got is None else got) is not value:
            return False
    return (
        isinstance(ids, Tensor)
        and ids.shape == (1, 1)
        and (positions is None or positions.shape == (1, 1))
        and all(name in _MAY_BE or value is None or value is False for name, value in given.items())
    )


def _sees_all(mask: Any, length: int) -> bool:
    """Whether a forward pass with this attention mask lets the token see all `length` tokens."""
    if mask is None:
        return True
    return isinstance(mask, Tensor) and mask.shape == (1, length) and bool(mask.all())


def _has_windows(cache: Any, network: Network) -> bool:
    """Whether what a layer of the cache drops is what the mask of the decoder's layer hides."""
    pairs = zip(cache.layers, network.windows, strict=True)
    return all(layer.sliding_window == window for layer, window in pairs if type(layer) is DynamicSlidingWindowLayer)


def _held(layer: Any, length: int) -> int:
    """How many of a text's tokens a layer of a cache holds: the last ones that the next token sees."""
    return min(length, layer.sliding_window - 1) if type(layer) is DynamicSlidingWindowLayer else length


def _length(cache: Any, layers: int) -> int | None:
    """How many tokens are in a cache whose layers kernels can go on with; None for another cache, and for an empty one."""
    if type(cache) is not DynamicCache or len(cache.layers) != layers or getattr(cache, "offloading", False):
        return None
    length = cache.get_seq_length()
    for layer in cache.layers:
        if type(layer) is DynamicSlidingWindowLayer:
            if layer.record_past or layer.sliding_window < 2:
                return None
        elif type(layer) is not DynamicLayer:
            return None
    return length or None


class _Buffers:
    """Keys and values of all layers with room for more tokens, [2 layers, 1, groups, capacity, channels].

    Of a layer that holds the last tokens only, the places of those before are empty where they were not written here.
    """

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.pairs = [(memory[at, 0], memory[at + 1, 0]) for at in range(0, len(memory), 2)]
        self.views: tuple[Tensor, ...] = ()  # what the cache's layers hold: keys and values of the first layer, ...

    @classmethod
    def copy_of(cls, cache: Any, length: int, network: Network, like: Tensor) -> "_Buffers | None":
        """New buffers with what the cache holds; None where that is not of the decoder's shape, or not as `like`."""
        groups, channels = network.decoder.groups, network.decoder.channels
        held = [(tensor, _held(layer, length)) for layer in cache.layers for tensor in (layer.keys, layer.values)]
        kind = (like.dtype, like.device)
        for tensor, count in held:
            if tensor.shape != (1, groups, count, channels) or (tensor.dtype, tensor.device) != kind:
                return None
        memory = like.new_empty(len(held), 1, groups, length + ROOM, channels)
        for part, (tensor, count) in zip(memory, held, strict=True):
            part[:, :, length - count : length] = tensor
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
        whole, found = self.memory.narrow(3, 0, length).unbind(0), list[Tensor]()
        for index, layer in enumerate(cache.layers):
            keys, values = whole[2 * index : 2 * index + 2]
            count = _held(layer, length)
            if count < length:
                keys, values = (part.narrow(2, length - count, count) for part in (keys, values))
            layer.keys, layer.values = keys, values
            found += [keys, values]
        self.views = tuple(found)
