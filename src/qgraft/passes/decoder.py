"""How tokens go through a model of transformers: the only place that knows how such models are put together.

    ids -> decoder -> states [T, hidden] -> those that predict a label -> output layer -> logits -> their transform

The decoder without its output layer is `base_model`; what is done to the logits is written in the forward pass of each
model (capped, scaled, divided), and known here by the names of their options (`output_head`). Whether that is all is
found out by the model's own forward pass on the longest sample of the run (`padding_free`): per label, not in sum, so
that a window or a scaled position shows. Where it is not, or where a model has no such decoder, the model's own logits
are used: `label_states` then gives logits, and `output_head` hands them through. A model that counts positions in a way of
its own (RoBERTa's kind begins behind the padding token's id) is not told any.

In which way the samples of a batch share a pass is found out there too: attention sample by sample, else transformers'
mask, else one sample in each pass. All three are right; which is the fastest that a model keeps to is what is tried. The
last it is always where layers carry a state, convolve along the row or count the tokens in it, and where rotations go by
the longest text of a pass and there is one that is long enough.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from qgraft.attention import PREFIX, SAMPLES, attending, attention_of
from qgraft.compat import counts_chunks_over_samples
from qgraft.data.batches import IGNORED, Batch, collate, split_batch
from qgraft.data.tokenizing import Sample
from qgraft.errors import UnsupportedError
from qgraft.linear import QuantizedLinear, computing
from qgraft.model_parts import argument_names, computed_dtype, decoder_states, has_decoder, mixes_neighbours
from qgraft.rotary import changes_with

Head = Callable[[Tensor], Tensor]

JUDGED = 256  # labels of a sample whose losses are compared: of 2048 tokens, the logits of all would be a gigabyte
EXACT, ROUNDED = 2e-3, 3e-2  # how far a loss may be off in float32 and in half precision, relative to it or to 1

_BY_OWN_FORWARD: WeakSet[nn.Module] = WeakSet()  # models whose logits are not head(states)
_BY_OWN_POSITIONS: WeakSet[nn.Module] = WeakSet()  # of these, the ones that count positions otherwise than from 0


def label_states(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """What output_head makes logits of, one row for each label of a padding-free batch, and the labels.

    A batch on the CPU goes to the model's device here, after what must be known of it was read: where labels are and where
    samples begin. Asked of a batch on a GPU, that waits until the GPU has done all it was given before.

    Args:
        batch: input_ids, position_ids, labels, each [1, tokens]; labels are aligned with the token that predicts them.

    Returns [labels, hidden] and [labels] int64; for a model whose own forward pass is used, [labels, vocabulary].
    """
    labels_T = batch["labels"][0]
    chosen_N = (labels_T != IGNORED).nonzero()[:, 0]
    arguments = attention_arguments(model, batch["position_ids"])
    chosen_N, labels_N = (part.to(model.device, non_blocking=True) for part in (chosen_N, labels_T[chosen_N]))
    return rows_at(model, chosen_N, batch, **arguments), labels_N


def rows_at(model: PreTrainedModel, places_N: Tensor, batch: Batch, **arguments: Any) -> Tensor:
    """The same at these places of the row, [n] on the model's device; a place may come more than once.

    Args:
        arguments: of the forward pass, beside ids and positions: see attention_arguments.
    """
    ids, positions = (batch[key].to(model.device, non_blocking=True) for key in ("input_ids", "position_ids"))
    if model not in _BY_OWN_FORWARD:
        return states_at(model, places_N, ids, positions, **arguments)
    told = {} if model in _BY_OWN_POSITIONS else {"position_ids": positions}
    return _own_logits(model, {"input_ids": ids, **told, **arguments}, places_N)


def states_at(
    model: PreTrainedModel, places_N: Tensor, input_ids: Tensor, position_ids: Tensor, **arguments: Any
) -> Tensor:
    """The states [n, hidden] of the decoder at these tokens of one row, all on the model's device."""
    states_1TH = decoder_states(model, input_ids=input_ids, position_ids=position_ids, **arguments)
    return states_1TH[0].index_select(0, places_N)


def by_own_forward(model: PreTrainedModel) -> bool:
    """Whether label_states takes the model's own forward pass."""
    return model in _BY_OWN_FORWARD


def output_head(model: PreTrainedModel) -> Head:
    """The function from what label_states gives, [n, hidden], to logits [n, vocabulary] of a causal language model."""
    if model in _BY_OWN_FORWARD:
        return _hand_through
    layer = model.get_output_embeddings()
    config = model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)  # Gemma 2
    factor = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)

    def head(states_NH: Tensor, layer: Head = layer) -> Tensor:
        logits_NV = layer(states_NH)
        if factor != 1.0:  # Cohere multiplies, Granite divides
            logits_NV = logits_NV * factor
        return torch.tanh(logits_NV / softcap) * softcap if softcap else logits_NV

    head.parameters = [p for p in layer.parameters() if p.requires_grad]  # type: ignore[attr-defined]
    head.vocabulary = getattr(layer, "out_features", None)  # type: ignore[attr-defined]
    if isinstance(layer, QuantizedLinear):
        head.unpacked = lambda dtype: partial(head, layer=_unpacked(layer, dtype))  # type: ignore[attr-defined]
    # for its own gradient; what a LoRA's function returns may not be overwritten either
    head.keeps_logits = bool(softcap or head.parameters)  # type: ignore[attr-defined]
    return head


def _unpacked(layer: QuantizedLinear, dtype: torch.dtype) -> Head:
    """The layer as a function with its weight unpacked in `dtype`, for as long as the function lives."""
    return partial(F.linear, weight=layer.dequantize(dtype), bias=None if layer.bias is None else layer.bias.to(dtype))


def _hand_through(logits_NV: Tensor) -> Tensor:
    """The head of a model whose own forward pass made the logits."""
    return logits_NV


def _own_logits(model: PreTrainedModel, inputs: dict[str, Tensor], chosen_N: Tensor) -> Tensor:
    """The logits [n, vocabulary] of the model's own forward pass at these positions of one row."""
    given: Any = inputs
    if "logits_to_keep" in argument_names(model):
        return model(use_cache=False, logits_to_keep=chosen_N, **given).logits[0]
    return model(use_cache=False, **given).logits[0, chosen_N]


@contextmanager
def padding_free(model: PreTrainedModel, samples: Sequence[Sample]) -> Iterator[str | None]:
    """Within the block batch_loss computes what the model itself computes for single samples, the fastest way that does.

    Found out by trying, on the longest sample and the shortest one: attention sample by sample; else transformers' own
    mask; else the value yielded is a sentence that says what differs, and the caller must put one sample in each pass.

    Raises UnsupportedError for a model whose loss of a single sample is not that of its own forward pass in any way.
    """
    ordered = sorted(samples, key=lambda sample: len(sample.input_ids))
    longest = len(ordered[-1].input_ids) if ordered else 0
    if attention_of(model) == SAMPLES:  # an evaluation within a run: found out already, but of its own samples
        yield _apart(model) if changes_with(model, longest) else None
        return
    batch = {key: value.to(model.device) for key, value in collate([ordered[-1], *ordered[:-1][:1]]).items()}
    with torch.no_grad(), evaluating(model), computing(model, "float32"):
        fast, problem = _found_out(model, batch, changes_with(model, longest))
    with sample_attention(model) if fast else nullcontext():
        yield problem


def _apart(model: PreTrainedModel) -> str:
    return f"{type(model).__name__} does not keep samples apart"


def _found_out(model: PreTrainedModel, batch: Batch, mixed: bool) -> tuple[bool, str | None]:
    """(Whether attention goes sample by sample, what differs where samples cannot share a pass).

    Args:
        mixed: whether they cannot, for a reason that a trial may not show.
    """
    parts = split_batch(batch, budget=0)
    expected = [_own_losses(model, part) for part in parts]

    mixed = mixed or mixes_neighbours(model) or counts_chunks_over_samples(model.config)

    def packed() -> bool:
        return not mixed and _agrees(model, batch, expected)

    def alone() -> bool:
        return all(_agrees(model, part, [own]) for part, own in zip(parts, expected, strict=True))

    apart = _apart(model)
    if has_decoder(model):
        with sample_attention(model):
            if attention_of(model) == SAMPLES and packed():
                return True, None
        if packed():
            return False, None
        if alone():
            return False, apart
    _BY_OWN_FORWARD.add(model)
    if packed():
        return False, None
    if alone():
        return False, apart
    _BY_OWN_POSITIONS.add(model)
    if alone():
        return False, f"{type(model).__name__} counts positions in a way of its own"
    for ways in (_BY_OWN_FORWARD, _BY_OWN_POSITIONS):
        ways.discard(model)
    raise UnsupportedError(
        f"{type(model).__name__}: the loss of a sample comes out otherwise in a second pass, so it cannot be trained here"
    )


@contextmanager
def sample_attention(model: PreTrainedModel) -> Iterator[None]:
    """Within the block the model attends sample by sample, where it would by a masked square over all of them."""
    before = attention_of(model)
    with attending(model, SAMPLES if before in ("sdpa", PREFIX) else before):
        yield


def attention_arguments(model: PreTrainedModel, position_ids: Tensor) -> dict[str, Tensor]:
    """What the forward pass must be given beside positions [1, tokens]: nothing, or the bounds of the samples."""
    if attention_of(model) != SAMPLES:
        return {}
    starts = (position_ids[0] == 0).nonzero()[:, 0].cpu()  # read by the CPU in every layer
    return {"cu_seq_lens_q": F.pad(starts, (0, 1), value=position_ids.shape[1])}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the block the model is in evaluation mode (no dropout); afterwards in the mode it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _agrees(model: PreTrainedModel, batch: Batch, expected: Sequence[Tensor]) -> bool:
    """Whether the losses of the judged labels of all samples are those of the model itself."""
    judged_N = torch.cat(
        [_judged(part["labels"][0]) + offset for part, offset in _with_offsets(split_batch(batch, budget=0))]
    )
    try:
        rows, labels_N = label_states(model, batch)
        logits_NV = output_head(model)(rows[judged_N]).float()
    except (torch.OutOfMemoryError, torch.AcceleratorError, RecursionError):
        raise  # RuntimeErrors that say nothing about the model
    except (RuntimeError, TypeError, ValueError):
        # It does not pass the bounds on, masks or caps otherwise, or has more than a layer behind the states
        return False
    expected_N = torch.cat(list(expected))
    got_N = F.cross_entropy(logits_NV, labels_N[judged_N], reduction="none")
    alike_N = ~(got_N.isfinite() | expected_N.isfinite())  # NaN is NaN in any pass; the run says where it comes from
    off_N = (got_N - expected_N).abs().masked_fill(alike_N, 0.0)
    scale_N = expected_N.masked_fill(alike_N, 1.0).clamp(min=1.0)
    if computed_dtype(model) == torch.float32:
        return bool((off_N <= EXACT * scale_N).all())
    return float(off_N.mean()) <= ROUNDED * float(scale_N.mean())


def _with_offsets(parts: Sequence[Batch]) -> Iterator[tuple[Batch, int]]:
    """Each sample, and how many labels are before it."""
    before = 0
    for part in parts:
        yield part, before
        before += int((part["labels"] != IGNORED).sum())


def _judged(labels_T: Tensor) -> Tensor:
    """Which of a sample's labels are compared, [n] int64 counting labels: all, or some from the first to the last."""
    count = int((labels_T != IGNORED).sum())
    if count <= JUDGED:
        return torch.arange(count, device=labels_T.device)
    return torch.linspace(0, count - 1, JUDGED, device=labels_T.device).round().long()


def _own_losses(model: PreTrainedModel, part: Batch) -> Tensor:
    """The loss of each judged label of one sample by the model's own forward pass, as anybody would call it, [n]."""
    labels_T = part["labels"][0]
    chosen_N = (labels_T != IGNORED).nonzero()[:, 0][_judged(labels_T)]
    logits_NV = _own_logits(model, {"input_ids": part["input_ids"]}, chosen_N).float()
    return F.cross_entropy(logits_NV, labels_T[chosen_N], reduction="none")
