"""The memory of a pass through the model, counted: what it keeps for the backward pass, and what it needs for moments.

    kept in a layer     tensors saved for the layer's backward pass, each storage once; weights of the model do not count
    inputs              of all layers: what gradient checkpointing keeps instead
    outside             saved before the first and after the last layer, and the states that the labels are predicted from
    work                what one layer's forward and backward pass hold at most beyond what the layer keeps
    head                the same of the chunked loss, whose logits do not grow with the tokens

Nothing here knows an architecture. Three short passes (32, 64 and 96 tokens) run with hooks that see every tensor that
autograd saves, ours and torch's functions alike; the hooks drop it at once, so counting needs hardly any memory. What
is saved is a polynomial of the tokens: linear, or quadratic where attention keeps its scores. Formulas for each
architecture, as in the papers, were not chosen: they would be wrong after the next change of a layer.
"""

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from qgraft.data.batches import IGNORED, collate
from qgraft.data.tokenizing import Sample
from qgraft.errors import UnsupportedError
from qgraft.model_parts import computed_dtype, decoder_layers
from qgraft.passes import loss
from qgraft.passes.decoder import label_states, output_head

SIZES = (32, 64, 96)  # tokens of the passes; equally far apart


@dataclass(frozen=True)
class Growth:
    """Bytes as a function of a pass's tokens: the parabola through the values at SIZES, in most cases a line."""

    values: tuple[int, int, int]

    def at(self, tokens: int) -> int:
        """The bytes of a pass of so many tokens."""
        first, second, third = self.values
        t = tokens / SIZES[0] - 1  # 0, 1, 2 at SIZES
        return round(first + t * (second - first) + t * (t - 1) / 2 * (third - 2 * second + first))

    @property
    def is_line(self) -> bool:
        """Whether nothing grows with the square."""
        first, second, third = self.values
        return third - second == second - first

    def straightened(self) -> "Growth":
        """The line through the two larger values."""
        _, second, third = self.values
        return Growth((2 * second - third, second, third))


@dataclass(frozen=True)
class Activations:
    """Bytes of a pass by its tokens; see the module's docstring. `layers` has one entry for each decoder layer."""

    layers: tuple[Growth, ...]
    inputs: Growth
    outside: Growth
    work: Growth
    head: int
    head_rows: int = 1  # labels from which on `head` does not grow

    def working(self, tokens: int, checkpointing: bool = False) -> int:
        """The largest of what is needed for a moment, every token being a label."""
        recomputed = max(layer.at(tokens) for layer in self.layers) if checkpointing else 0
        return max(round(self.head * min(1.0, tokens / self.head_rows)), self.work.at(tokens) + recomputed)


def measure_activations(model: PreTrainedModel, most: int = 1024) -> Activations:
    """Count a model as it is about to train: adapters attached and active, attention as in the run.

    Args:
        most: tokens of the largest pass that will be asked for; counting the loss of more would itself take memory.

    Raises UnsupportedError for a model without decoder layers as transformers marks them.
    """
    layers = decoder_layers(model)
    if not all(hasattr(layer, "gradient_checkpointing") for layer in layers):
        raise UnsupportedError(
            f"{type(model).__name__} has no layers that gradient checkpointing knows, so its memory cannot be counted"
        )
    with torch.random.fork_rng(), _as_in_training(model, layers):
        passes = [_measure_pass(model, layers, tokens) for tokens in SIZES]
        rows = min(_chunked_rows(model), most)
        head = _head_bytes(model, rows)
    kept = tuple(_growth(values) for values in zip(*(each.layers for each in passes), strict=True))
    work = _growth(each.work for each in passes)
    return Activations(
        layers=kept,
        inputs=_growth(each.inputs for each in passes),
        outside=_growth(each.outside for each in passes),
        # a maximum of lines has corners, which no parabola must be laid through
        work=work.straightened() if all(layer.is_line for layer in kept) else work,
        head=head,
        head_rows=rows,
    )


class LiveBytes(TorchDispatchMode):
    """Within the block: the bytes of tensors made in it, `now` and at most (`peak`), and the `largest` of them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.largest = 0
        self._alive: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op and count what it returns that was not there."""
        given = {_address(t) for t in tensors_in((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            if _address(tensor) not in given:
                self._count(tensor)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), _address(tensor)
        if key in self._alive:
            return
        size = storage.nbytes()
        self._alive[key] = weakref.ref(storage, lambda _: self._forget(key, size))
        self.now += size
        self.peak, self.largest = max(self.peak, self.now), max(self.largest, size)

    def _forget(self, key: int, size: int) -> None:
        del self._alive[key]
        self.now -= size


class AllocatedBytes:
    """The same of a GPU, where the allocator counts: what kernels need inside of them as well. Reset by each block."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.before, self.peak = device, 0, 0

    def __enter__(self) -> "AllocatedBytes":
        torch.cuda.reset_peak_memory_stats(self.device)
        self.before = torch.cuda.memory_allocated(self.device)
        return self

    def __exit__(self, *_: object) -> None:
        self.peak = torch.cuda.max_memory_allocated(self.device) - self.before


def counting_live(device: torch.device) -> LiveBytes | AllocatedBytes:
    """A block whose `peak` are the most bytes that tensors made in it took on this device."""
    return AllocatedBytes(device) if device.type == "cuda" else LiveBytes()


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _Storages:
    """Tells what is new: each storage counts once for as long as it lives, those of `known` never."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._seen: dict[int, Any] = {}

    def new_bytes(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        earlier = self._seen.get(address)
        if address in self._known or (earlier is not None and earlier() is not None):
            return 0
        self._seen[address] = weakref.ref(storage)
        return storage.nbytes()


@dataclass
class _Pass:
    layers: list[int]
    inputs: int = 0
    outside: int = 0
    work: int = 0


def _growth(values: Iterable[int]) -> Growth:
    first, second, third = values
    return Growth((first, second, third))


def _measure_pass(model: PreTrainedModel, layers: list[nn.Module], tokens: int) -> _Pass:
    """One forward pass of a sample of so many tokens, half of them labels, and the heaviest layer once more alone."""
    found = _Pass([0] * len(layers))
    weights = [*model.parameters(), *model.buffers()]
    saved, inputs = _Storages(weights), _Storages(weights)
    calls: dict[int, tuple[Any, Any]] = {}
    where: list[int] = []  # the layer that runs, if one does

    def enter(number: int, args: Any, kwargs: Any) -> None:
        where.append(number)
        calls[number] = (args, kwargs)
        found.inputs += sum(inputs.new_bytes(t) for t in tensors_in((args, kwargs)))

    def save(tensor: Tensor) -> Tensor:
        size = saved.new_bytes(tensor)
        if where:
            found.layers[where[-1]] += size
        else:
            found.outside += size
        return nothing

    nothing = torch.empty(0)
    with ExitStack() as hooks:
        for number, layer in enumerate(layers):
            before = layer.register_forward_pre_hook(
                lambda _, args, kwargs, number=number: enter(number, args, kwargs), with_kwargs=True
            )
            hooks.callback(before.remove)
            hooks.callback(layer.register_forward_hook(lambda *_: where.clear()).remove)
        hooks.enter_context(torch.autograd.graph.saved_tensors_hooks(save, lambda _: nothing))
        states, _ = label_states(model, collate([sample_of(model, tokens)]))
    found.outside += 2 * tokens * states.shape[-1] * states.element_size()  # every token a label: states and gradient
    heaviest = max(calls, key=lambda number: found.layers[number])
    found.work = _work(layers[heaviest], *calls[heaviest], found.layers[heaviest])
    return found


def _work(layer: nn.Module, args: Any, kwargs: Any, kept: int) -> int:
    """The most that a layer's forward and backward pass hold, less what the layer keeps between them."""
    args, kwargs = _as_leaves(args), _as_leaves(kwargs)
    tensors = [*tensors_in((args, kwargs))]
    given = [t for t in tensors if t.requires_grad]
    with torch.enable_grad(), counting_live(tensors[0].device) as live:
        output = next(tensors_in(layer(*args, **kwargs)))
        trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        if output.requires_grad:
            torch.autograd.grad(output, [*given, *trained], torch.ones_like(output), allow_unused=True)
    return max(0, live.peak - kept)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in what a function was given or gave: in tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(part)


def _as_leaves(value: Any) -> Any:
    """The same with tensors that a gradient can be asked for in the place of those that have one."""
    if isinstance(value, Tensor):
        return value.detach().requires_grad_() if value.requires_grad else value
    if isinstance(value, dict):
        return {key: _as_leaves(part) for key, part in value.items()}
    return type(value)(map(_as_leaves, value)) if type(value) in (list, tuple) else value


def _chunked_rows(model: PreTrainedModel) -> int:
    """Labels of a small chunk and two full ones: while one is computed the one before may still be there."""
    most = loss.chunk_bytes(model.device)
    chunk = max(loss.MIN_CHUNK_ROWS, most // (4 * model.get_output_embeddings().out_features))
    return loss.MIN_CHUNK_ROWS + 2 * chunk


def _head_bytes(model: PreTrainedModel, rows: int) -> int:
    """The most that the loss of so many labels holds beside their states."""
    layer = model.get_output_embeddings()
    states = torch.zeros(rows, layer.in_features, dtype=computed_dtype(model), device=model.device, requires_grad=True)
    targets = torch.zeros(rows, dtype=torch.int64, device=model.device)
    with torch.enable_grad(), counting_live(states.device) as live:
        loss.summed_cross_entropy(states, targets, output_head(model))
    return live.peak


def sample_of(model: PreTrainedModel, tokens: int) -> Sample:
    """A sample of arbitrary ids, the second half labels; where the architecture has a context, it is the first half."""
    config = model.config
    ids = [3 + (7 * position) % (config.get_text_config().vocab_size // 2 - 3) for position in range(tokens)]
    half = tokens // 2
    if hasattr(config, "gmask_token_id"):
        ids[half - 2 : half] = [config.gmask_token_id, config.bos_token_id]
    return Sample(ids, [IGNORED] * half + ids[half:], "counted")


@contextmanager
def _as_in_training(model: PreTrainedModel, layers: list[nn.Module]) -> Iterator[None]:
    """Within the block the model is in training mode, without gradient checkpointing."""
    training = model.training
    checkpointed: list[Any] = [layer for layer in layers if layer.gradient_checkpointing]
    model.train()
    for layer in checkpointed:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        model.train(training)
        for layer in checkpointed:
            layer.gradient_checkpointing = True
