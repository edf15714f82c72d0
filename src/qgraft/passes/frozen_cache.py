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

Is it exact? The states are kept as they are, not rounded. The question is whether a sample's states depend on the
others in its pass. Attention goes sample by sample (passes/sample_attention.py), everything else row by row; but a matrix
product may sum a row in another order when there are more or fewer rows. Our own loops (kernels/linear.c) do so for few
rows only, whatever the threads. Where torch multiplies instead, measured (torch 2.13, MKL's sgemm, AVX-512, K of 32,
576 and 1536, N of 64 to 1536, M of 1 to 599, also into slices of a wider result): a row is the same bits for all M from
4 on with one thread, from 12 on with 2 to 8 threads, from 28 on with 16 (a thread that is left with 1 to 3 rows sums
them otherwise); in bfloat16 (oneDNN) for every M. So passes of few tokens always go the long way (`least_tokens`), if
samples share passes. What other libraries do is not known, so it is found out at the start of each run, by trying: a
few samples go through the model in two orders and numbers. Where a single bit differs, a note says that losses are
equal to rounding only, and so it does where attention is not sample by sample but masked (models that cap their scores
or do not hand the bounds on, GPUs): there the sums depend on where in the pass a sample stands. Everywhere else losses
and adapter were those of a run without the cache, bit for bit, in every pair of runs compared
(tests/training/test_frozen_cache.py, benchmarks/frozen_cache.py).

Not chosen: states in half precision (half the file, but other losses); the file mapped into memory (its pages would
count as memory of the process, and a full disk would be a SIGBUS); a pass of its own before the first epoch, sample by
sample (exact by construction only if runs without the cache were made slower as well).
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
from qgraft.attention import SAMPLES, attention_of
from qgraft.compat import given_cache
from qgraft.data.batches import Batch, collate
from qgraft.data.tokenizing import Sample
from qgraft.errors import OptionError, UnsupportedError
from qgraft.model_parts import decoder_layers, decoder_of, decoder_states
from qgraft.passes.decoder import attention_arguments, evaluating

PROBED_TOKENS = 128  # at most, in the passes that find out whether it is exact, if two samples have so few
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
            hint=f"--layers_to_transform {len(layers) // 2}-{len(layers) - 1} puts it in the upper half",
        )
    training = [name for layer in layers[:first] for name, p in layer.named_parameters() if p.requires_grad]
    if training:
        raise OptionError(f"cache_frozen_layers: below layer {first} weights are trained: {', '.join(training[:3])}")
    return first


@contextmanager
def frozen_layers_cached(
    model: PreTrainedModel, samples: Sequence[Sample], folder: Path, *, alone: bool = False
) -> Iterator[list[str]]:
    """Within the block the layers below the first adapter run once for each of these samples, in whatever passes.

    Args:
        samples: training and held-out ones.
        folder: where the file is, as long as the block runs.
        alone: every sample has a pass of its own; otherwise several share one.

    Yields sentences that say what it takes and whether it is exact. Raises OptionError where no layer is frozen or a
    frozen one drops at random, UnsupportedError for a model whose upper layers take more from below than states,
    StorageError when the disk has no room.
    """
    first = first_adapted_layer(model)
    layers = decoder_layers(model)
    with ExitStack() as stack:
        detour = stack.enter_context(_detour(model, layers[:first], 1 if alone else least_tokens()))
        few = _few(samples)[: 1 if alone else None]
        states_TH = _probe(model, detour, few)
        apart = alone or detour.attention == SAMPLES
        exact = _is_exact(model, detour, few, states_TH) and apart
        rows, tokens = _places(samples)
        width = states_TH.shape[1] * states_TH.element_size()
        file = stack.enter_context(storage.scratch_file(folder / FILE, tokens * width))
        detour.kept, detour.seen = Kept(file, rows, states_TH[:0].clone()), None
        notes = [
            f"cache_frozen_layers: layers 0 to {first - 1} of {len(layers)} run once for each sample; "
            f"{tokens} tokens x {width} bytes = {tokens * width / 1e6:.0f} MB in {folder} until the run ends"
        ]
        if not exact:
            why = "on this machine" if apart else "attention is masked, not sample by sample"
            notes.append(f"cache_frozen_layers: the states of a sample depend on its batch in their last bits ({why}), "
                         "so losses equal those of a run without the cache to rounding only")  # fmt: skip
        yield notes


def least_tokens() -> int:
    """How many tokens a pass has at least in which a row does not depend on their number.

    For sgemm twice what was measured, 2 tokens for each thread; our own loops change their way at 20 (linear.c).
    """
    return max(20, 4 * torch.get_num_threads())


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
        least: passes of fewer tokens do not take part.
        given: the states that enter the first adapted layer; None where they have to be computed.
        keys: the samples of the pass where it may take part, else empty.
        kept: the states on disk; None until it is known that they may be kept.
        seen: before that, what the last layer below handed on, [1, tokens, hidden].
    """

    def __init__(self, attention: str | None, least: int) -> None:
        self.attention, self.least = attention, least
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
        if len(ids) != 1 or ids.shape != positions.shape or ids.shape[1] < self.least:
            return
        if attention_of(decoder) != self.attention:  # somebody tries another one
            return
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
def _detour(model: PreTrainedModel, layers: Sequence[nn.Module], least: int) -> Iterator[_Detour]:
    """Within the block these layers, the model's first ones, let states through that are given."""
    detour = _Detour(attention_of(model), least)
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


def _probe(model: PreTrainedModel, detour: _Detour, few: list[Sample]) -> Tensor:
    """The states [tokens, hidden] of a few samples that enter the first adapted layer.

    Raises UnsupportedError where the layers above do not compute the same from nothing but these.
    """
    batch = _batch(model, few)
    with torch.no_grad(), evaluating(model):
        final = _decode(model, batch)
        states = detour.seen
        if states is None or states.dim() != 3 or states.shape[:2] != batch["input_ids"].shape:
            got = "nothing" if states is None else list(states.shape)
            raise UnsupportedError(f"cache_frozen_layers: the layers of {type(model).__name__} hand on {got}, expected "
                                   f"one state [1, tokens, hidden]")  # fmt: skip
        hook = decoder_of(model).register_forward_pre_hook(lambda *_: setattr(detour, "given", states))
        try:
            same = torch.equal(_decode(model, batch), final)
        except (TypeError, ValueError, KeyError, AttributeError, IndexError):  # something from below is missing
            same = False
        finally:
            hook.remove()
            detour.end()
    if not same:
        raise UnsupportedError(
            f"cache_frozen_layers: the upper layers of {type(model).__name__} take more from below than the states",
            hint="leave the option out for this architecture",
        )
    return states[0]


def _is_exact(model: PreTrainedModel, detour: _Detour, few: list[Sample], states_TH: Tensor) -> bool:
    """Whether the states of these samples are the same bits in training, in another order and with other neighbours.

    Raises OptionError where they are others altogether.
    """
    others = few[::-1][: -1 if len(few) > 2 else None]
    training = model.training
    model.train()
    try:
        with torch.no_grad(), torch.random.fork_rng():
            _decode(model, _batch(model, others))
    finally:
        model.train(training)
    assert detour.seen is not None
    by_sample = states_TH.split([len(sample.input_ids) for sample in few])[::-1]
    found, expected = detour.seen[0], torch.cat(by_sample[: len(others)])
    tolerance = 1e-3 if found.dtype == torch.float32 else 3e-2
    if (found - expected).abs().max() > tolerance * expected.abs().max():
        raise OptionError(
            "cache_frozen_layers: the frozen layers do not hand on the same twice, so they drop at random in training",
            hint="set the dropout of the model's configuration to 0 (attention_dropout, hidden_dropout, resid_pdrop ...)",
        )
    return torch.equal(found, expected)


def _places(samples: Sequence[Sample]) -> tuple[dict[Key, tuple[int, int]], int]:
    """(key of each sample -> (its first row in the file, how many), rows in all); equal samples share a place."""
    rows: dict[Key, tuple[int, int]] = {}
    tokens = 0
    for sample in samples:
        if (key := _key(torch.tensor(sample.input_ids))) not in rows:
            rows[key] = (tokens, len(sample.input_ids))
            tokens += len(sample.input_ids)
    return rows, tokens


def _few(samples: Sequence[Sample]) -> list[Sample]:
    """Two or more of the shortest samples, as many as PROBED_TOKENS hold."""
    few: list[Sample] = []
    for sample in sorted(samples, key=lambda sample: len(sample.input_ids)):
        if len(few) >= 2 and sum(len(each.input_ids) for each in few) + len(sample.input_ids) > PROBED_TOKENS:
            break
        few.append(sample)
    return few


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
