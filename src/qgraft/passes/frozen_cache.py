"""The layers below the first adapter, computed once: what they hand on is kept on disk for later epochs.

    epoch 1     tokens -> embedding -> layer 0 ... k-1 -> x_k -> layer k (adapters) ... -> loss
                                                           |
                                                      file on disk: [tokens of the dataset, hidden], in the dtype of x_k
                                                           |
    epoch 2 ...                                           x_k -> layer k (adapters) ... -> loss

Nothing below layer k trains, so x_k depends on the sample alone and is the same in every epoch. With adapters in the
upper half (`layers_to_transform`) a step costs 3 P operations a token for P weights: P/2 + P/2 forward at 2 operations each,
P/2 backward; adapters everywhere cost 4 P, and with x_k from the disk it is 2 P. x_k costs hidden x 4 bytes a token.

How it is put in: within the block the layers 0 ... k-1 have another `forward`, which either computes or hands the kept
states on, so models of transformers and ours take part without knowing (all of them call their layers one after
another, states first). A sample is known by its token ids: which batch it comes in, how often, and whether in
training or in an evaluation does not matter. A pass goes the short way when all of its samples are there.

The states are kept as they are, not rounded, and a run with the cache ends where one without does, to the rounding of sums:
a matrix product may add a row up in another order when there are more or fewer rows beside it, and a sample's states come
from whichever pass it was in first. What must hold is found out on the longest sample before the first step: that the
layers above compute the same from these states alone, and that the layers below hand on the same in training, where some
drop at random. That a sample's states do not depend on its neighbours is what padding_free has found out (decoder.py).

Not chosen: states in half precision (half the file, but other losses); the file mapped into memory (its pages would
count as memory of the process, and a full disk would be a SIGBUS); the same bits as without the cache, which would rest on
how other people's matrix products round.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qgraft import storage
from qgraft.adapters.base import adapters_of
from qgraft.adapters.choose import active_adapters
from qgraft.adapters.lora import LoraLayer
from qgraft.adapters.targets import adapted_layers
from qgraft.attention import attention_of
from qgraft.compat import given_cache
from qgraft.data.batches import Batch, collate
from qgraft.data.tokenizing import Sample
from qgraft.errors import OptionError, UnsupportedError, option
from qgraft.model_parts import decoder_layers, decoder_of, decoder_states
from qgraft.passes.decoder import attention_arguments, evaluating

FILE = "frozen-states"

Key = bytes


def first_adapted_layer(model: PreTrainedModel) -> int:
    """The lowest layer of the decoder that an active adapter is in; raises OptionError where nothing below is frozen."""
    layers, names = decoder_layers(model), list(active_adapters(model))
    if prefixes := [name for name in names if adapters_of(model)[name].is_prefix]:
        raise OptionError(f"cache_frozen_layers: {', '.join(prefixes)} is a prefix, which is in every layer")
    adapted = {layer for _, layer in adapted_layers(model) if any(name in layer.loras for name in names)}
    within = [{module for module in layer.modules() if isinstance(module, LoraLayer)} for layer in layers]
    first = next((index for index, modules in enumerate(within) if modules & adapted), len(layers))
    outside = adapted - set().union(*within) - {model.get_output_embeddings()}
    if first == 0 or outside or not adapted:
        where = "in layer 0" if first == 0 else "outside of the layers" if outside else "nowhere"
        raise OptionError(
            f"cache_frozen_layers: the adapter is {where}, so no layer below it stays as it is",
            hint=f"{option('layers_to_transform', f'{len(layers) // 2}-{len(layers) - 1}')} puts it in the upper half",
        )
    training = [name for layer in layers[:first] for name, p in layer.named_parameters() if p.requires_grad]
    if training:
        raise OptionError(f"cache_frozen_layers: below layer {first} weights are trained: {', '.join(training[:3])}")
    return first


@contextmanager
def frozen_layers_cached(model: PreTrainedModel, samples: Sequence[Sample], folder: Path) -> Iterator[list[str]]:
    """Within the block the layers below the first adapter run once for each of these samples, in whatever passes.

    Args:
        samples: training and held-out ones.
        folder: where the file is, as long as the block runs.

    Yields a sentence that says what it takes. Raises OptionError where no layer is frozen or a frozen one drops at random,
    UnsupportedError for a model whose upper layers take more from below than states, StorageError when the disk has no room.
    """
    first, layers = first_adapted_layer(model), decoder_layers(model)
    with ExitStack() as stack:
        detour = stack.enter_context(_detour(model, layers[:first]))
        states_TH = _probe(model, detour, max(samples, key=lambda sample: len(sample.input_ids)))
        rows, tokens = _places(samples)
        width = states_TH.shape[1] * states_TH.element_size()
        file = stack.enter_context(storage.scratch_file(folder / FILE, tokens * width))
        detour.kept, detour.seen = Kept(file, rows, states_TH[:0].clone()), None
        yield [
            f"cache_frozen_layers: layers 0 to {first - 1} of {len(layers)} run once for each sample; "
            f"{tokens} tokens x {width} bytes = {tokens * width / 1e6:.0f} MB in {folder} until the run ends"
        ]


class Kept:
    """The states of whole samples in a file.

    Args:
        rows: key of a sample -> (its first row, how many).
        like: an empty tensor [0, hidden] of the states' dtype and device.
    """

    def __init__(self, file: storage.ScratchFile, rows: dict[Key, tuple[int, int]], like: Tensor) -> None:
        self.file, self.rows, self.like = file, rows, like
        self.width = like.shape[1] * like.element_size()
        self.there: set[Key] = set()

    def read(self, keys: Sequence[Key]) -> Tensor | None:
        """The states [tokens, hidden] of these samples one after another; None where one of them is not there."""
        if not self.there.issuperset(keys):
            return None
        tokens = sum(self.rows[key][1] for key in keys)
        states_TH = torch.empty(tokens, self.like.shape[1], dtype=self.like.dtype)
        view, start = _bytes_of(states_TH), 0
        for key in keys:
            row, count = self.rows[key]
            self.file.read_at(row * self.width, view[start : start + count * self.width])
            start += count * self.width
        return states_TH.to(self.like.device)

    def write(self, keys: Sequence[Key], states_TH: Tensor) -> None:
        """Keep the states of those samples that belong in the file and are not there."""
        counts = [self.rows[key][1] if key in self.rows else None for key in keys]
        if None in counts or states_TH.dtype != self.like.dtype:
            return
        view, start = _bytes_of(states_TH.detach().cpu().contiguous()), 0
        for key in keys:
            row, count = self.rows[key]
            if key not in self.there:
                self.file.write_at(row * self.width, view[start : start + count * self.width])
                self.there.add(key)
            start += count * self.width


class _Detour:
    """What the layers below know of the present pass.

    Attributes:
        given: the states that enter the first adapted layer; None where they have to be computed.
        keys: the samples of the pass where it may take part, else empty.
        kept: the states on disk; None until it is known that they may be kept.
        seen: before that, what the last layer below handed on, [1, tokens, hidden].
    """

    def __init__(self, attention: str) -> None:
        self.attention = attention
        self.kept: Kept | None = None
        self.given: Tensor | None = None
        self.keys: list[Key] = []
        self.seen: Tensor | None = None

    def begin(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a pass: look whether its samples are there."""
        self.given, self.keys = None, []
        ids, positions = kwargs.get("input_ids"), kwargs.get("position_ids")
        plain = kwargs.get("attention_mask") is None and given_cache(kwargs) is None
        if self.kept is None or ids is None or positions is None or not plain:
            return
        if len(ids) != 1 or ids.shape != positions.shape or attention_of(decoder) != self.attention:
            return  # somebody tries another attention
        starts = (positions[0] == 0).nonzero()[:, 0].tolist()
        self.keys = [_key(ids[0, start:stop]) for start, stop in pairwise([*starts, ids.shape[1]])]
        states_TH = self.kept.read(self.keys)
        self.given = None if states_TH is None else states_TH[None]

    def computed(self, states: Any) -> None:
        """The last layer below has computed its states."""
        if self.kept is None:
            self.seen = states
        elif self.keys:
            self.kept.write(self.keys, states[0])

    def end(self, *_: Any) -> None:
        """After a pass."""
        self.given, self.keys = None, []


@contextmanager
def _detour(model: PreTrainedModel, layers: Sequence[nn.Module]) -> Iterator[_Detour]:
    """Within the block these layers, the model's first ones, let states through that are given."""
    detour = _Detour(attention_of(model))
    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            own = vars(layer).get("forward")
            if own is None:
                stack.callback(delattr, layer, "forward")
            else:
                stack.callback(setattr, layer, "forward", own)
            layer.forward = _either_way(layer.forward, detour, last=index == len(layers) - 1)
        decoder = decoder_of(model)
        stack.callback(decoder.register_forward_pre_hook(detour.begin, with_kwargs=True).remove)
        stack.callback(decoder.register_forward_hook(detour.end, always_call=True).remove)
        yield detour


def _either_way(compute: Callable[..., Any], detour: _Detour, last: bool) -> Callable[..., Any]:
    """The forward of a layer that computes, or hands on what is given, in a tuple where `compute` returns one."""
    others = -1  # what is in a returned tuple beside the states; -1: none is returned

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal others
        if detour.given is not None:
            return detour.given if others < 0 else (detour.given, *[None] * others)
        output = compute(*args, **kwargs)
        others = len(output) - 1 if isinstance(output, tuple) else -1
        if last:
            detour.computed(output if others < 0 else output[0])
        return output

    return forward


def _probe(model: PreTrainedModel, detour: _Detour, sample: Sample) -> Tensor:
    """The states [tokens, hidden] of a sample that enter the first adapted layer.

    Raises UnsupportedError where the layers above compute something else from nothing but these, OptionError where those
    below hand on others in training.
    """
    name, batch = type(model).__name__, _batch(model, [sample])
    with torch.no_grad(), evaluating(model), torch.random.fork_rng():
        final, states = _decode(model, batch), detour.seen
        if states is None or states.dim() != 3 or states.shape[:2] != batch["input_ids"].shape:
            got = "nothing" if states is None else list(states.shape)
            raise UnsupportedError(
                f"cache_frozen_layers: the layers of {name} hand on {got}, expected one state [1, tokens, hidden]"
            )
        if not _same(_decode_above(model, detour, batch, states), final):
            raise UnsupportedError(
                f"cache_frozen_layers: the upper layers of {name} take more from below than the states",
                hint="leave the option out for this architecture",
            )
        model.train()
        _decode(model, batch)
    if not _same(detour.seen, states):
        raise OptionError(
            "cache_frozen_layers: the frozen layers do not hand on the same twice, so they drop at random in training",
            hint="set the dropout of the model's configuration to 0 (attention_dropout, hidden_dropout, resid_pdrop ...)",
        )
    return states[0]


def _decode_above(model: PreTrainedModel, detour: _Detour, batch: Batch, states: Tensor) -> Tensor | None:
    """What the decoder gives when its lower layers hand these states on; None where an upper one misses something."""
    hook = decoder_of(model).register_forward_pre_hook(lambda *_: setattr(detour, "given", states))
    try:
        return _decode(model, batch)
    except (TypeError, ValueError, KeyError, AttributeError, IndexError):
        return None
    finally:
        hook.remove()
        detour.end()


def _same(found: Tensor | None, expected: Tensor) -> bool:
    """Whether they are the same but for the rounding of sums."""
    if found is None or found.shape != expected.shape:
        return False
    tolerance = 1e-3 if expected.dtype == torch.float32 else 3e-2
    return float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


def _places(samples: Sequence[Sample]) -> tuple[dict[Key, tuple[int, int]], int]:
    """(key of each sample -> (its first row in the file, how many), rows in all); equal samples share a place."""
    rows: dict[Key, tuple[int, int]] = {}
    tokens = 0
    for sample in samples:
        if (key := _key(torch.tensor(sample.input_ids))) not in rows:
            rows[key] = (tokens, len(sample.input_ids))
            tokens += len(sample.input_ids)
    return rows, tokens


def _decode(model: PreTrainedModel, batch: Batch) -> Tensor:
    positions = batch["position_ids"]
    given = {"input_ids": batch["input_ids"], "position_ids": positions, **attention_arguments(model, positions)}
    return decoder_states(model, **given)


def _batch(model: PreTrainedModel, samples: Sequence[Sample]) -> Batch:
    return {key: value.to(model.device) for key, value in collate(samples).items()}


def _key(ids_T: Tensor) -> Key:
    return hashlib.blake2b(ids_T.cpu().numpy().tobytes(), digest_size=16).digest()


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data
