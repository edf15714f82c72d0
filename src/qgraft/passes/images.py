"""How texts with images go through a model that sees: padded side by side, by the model's own forward pass.

    input_ids, attention_mask   [B, T]  as the processor writes them, padded at the right
    pixel_values, ...                   what the processor makes of the images, under the names that the model takes
    labels                      [B, T]  already shifted, as of other batches: the token that each position predicts

Texts with images and texts without go in batches of their own: processors take a list of images for every text or for none.
That padding changes nothing, and that the loss is the model's own, is found out on the longest sample and the shortest
(`images_together`). Padding-free passes as those of texts were not chosen: what an image's tokens see, and which positions
they have, each architecture's own code decides (Gemma's images are seen in both directions, Qwen's have three positions).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from qgraft.data.batches import IGNORED, Batch
from qgraft.data.image_samples import ImageSample, process, require_processor
from qgraft.data.pictures import Picture
from qgraft.errors import DataError
from qgraft.linear import computing
from qgraft.model_parts import argument_names, decoder_states, has_decoder
from qgraft.passes.broken import of_numbers
from qgraft.passes.decoder import JUDGED, Head, evaluating, output_head
from qgraft.passes.limits import context_length
from qgraft.passes.loss import as_they_are, weighted_cross_entropy
from qgraft.passes.pairs import alike, tried_together

_BY_OWN_LOGITS: WeakSet[nn.Module] = WeakSet()  # models whose logits are not output_head of their decoder's states


def split_images(samples: Sequence[ImageSample], tokens: int) -> list[list[ImageSample]]:
    """Samples of similar lengths together, with at most so many tokens with padding; 0 for one in each."""
    parts, wide = list[list[ImageSample]](), 0
    for sample in sorted(samples, key=lambda each: (not each.images, len(each.input_ids))):
        wide = max(wide, len(sample.input_ids))
        if parts and bool(parts[-1][0].images) == bool(sample.images) and (len(parts[-1]) + 1) * wide <= tokens:
            parts[-1].append(sample)
        else:
            parts.append([sample])
            wide = len(sample.input_ids)
    return parts


def collate_images(processor: Any, samples: Sequence[ImageSample]) -> Batch:
    """One padded batch of these samples, on the CPU, in their order: what the processor makes, labels, and weights if any.

    Raises DataError where an image is not what it was when the rows were read.
    """
    batch = process(processor, [sample.text for sample in samples], [[i.open() for i in s.images] for s in samples])
    ids, wide = batch["input_ids"], max(len(sample.input_ids) for sample in samples)
    for row, sample in zip(ids, samples, strict=True):
        if row[: len(sample.input_ids)].tolist() != sample.input_ids:
            raise DataError(f"{sample.source}: an image has another size than when the rows were read")
    shape = ids.shape
    cut = {key: value[:, :wide] for key, value in batch.items() if isinstance(value, Tensor) and value.shape == shape}
    batch = {**{key: value for key, value in batch.items() if isinstance(value, Tensor)}, **cut}
    lengths = torch.tensor([len(sample.input_ids) for sample in samples])
    batch["attention_mask"] = (torch.arange(wide) < lengths[:, None]).to(torch.int64)
    batch["labels"] = _rows([[*sample.labels[1:], IGNORED] for sample in samples], wide, IGNORED)
    if any(sample.weights is not None for sample in samples):
        weights = [sample.weights or [1.0] * len(sample.labels) for sample in samples]
        batch["weights"] = _rows([[*each[1:], 0.0] for each in weights], wide, 0.0)
    return batch


def _rows(rows: Sequence[list[Any]], length: int, value: Any) -> Tensor:
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])


def image_losses(
    model: PreTrainedModel, samples: Sequence[ImageSample], label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(The sum of weight times cross-entropy over the labels of a pass, differentiable; that of each label, unweighted).

    float32 scalar and [labels], sample after sample. The logits of all labels are never there at once (loss.py), but where
    only the model's own forward pass makes them.
    """
    batch = {key: value.to(model.device) for key, value in collate_images(require_processor(model), samples).items()}
    labels_BT, weights_BT = batch.pop("labels"), batch.pop("weights", None)
    learned_BT = labels_BT != IGNORED
    weights_N = None if weights_BT is None else weights_BT[learned_BT]
    head: Head = as_they_are
    if model in _BY_OWN_LOGITS or not has_decoder(model):
        rows_N = _own_logits(model, batch, learned_BT)
    else:
        rows_N, head = decoder_states(model, **batch)[learned_BT], output_head(model)
    total, each_N = weighted_cross_entropy(rows_N, labels_BT[learned_BT], weights_N, head, label_smoothing)
    if torch.is_grad_enabled() and not total.requires_grad and not samples[0].images:
        # what is trained sees images alone: its gradient is zero here, and none at all would be taken for a fault
        total = total + 0.0 * sum(each.flatten()[0] for each in model.parameters() if each.requires_grad)
    return total, each_N


def _own_logits(model: PreTrainedModel, batch: Batch, learned_BT: Tensor) -> Tensor:
    """The logits [labels, vocabulary] of the model's own forward pass."""
    given: Any = batch
    if "logits_to_keep" not in argument_names(model):
        return cast(Tensor, model(**given, use_cache=False).logits)[learned_BT]
    places_K = learned_BT.any(0).nonzero()[:, 0]
    logits_BKV: Tensor = model(**given, use_cache=False, logits_to_keep=places_K).logits
    return logits_BKV[learned_BT[:, places_K]]


@torch.inference_mode()
def generate_seen(model: PreTrainedModel, text: str, images: Sequence[Picture], **told: Any) -> tuple[int, list[int]]:
    """(How many tokens a prompt with its images has, what generate() writes behind them, its end included)."""
    batch = process(require_processor(model), [text], [[image.open() for image in images]])
    given = {key: value.to(model.device) for key, value in batch.items() if isinstance(value, Tensor)}
    length, generate = given["input_ids"].shape[1], cast(Any, model).generate
    context = context_length(model)
    if context is not None and length >= context:
        raise DataError(f"the prompt is {length} tokens with its images, and the model's context is {context} with the "
                        "answer", hint="give fewer or smaller images, or a shorter question")  # fmt: skip
    if context is not None:
        told["max_new_tokens"] = min(told["max_new_tokens"], context - length)
    return length, generate(**given, **{"logits_processor": of_numbers(model), **told})[0, length:].tolist()


@contextmanager
def images_together(model: PreTrainedModel, samples: Sequence[ImageSample]) -> Iterator[str | None]:
    """Within the block passes of several samples compute what the model says of each alone.

    Yields None, or a sentence that says why every sample must pass alone. Raises UnsupportedError for a model whose logits
    of a single sample come out otherwise in a second pass.
    """
    seen = [sample for sample in samples if sample.images] or samples
    ordered = sorted(seen, key=lambda sample: len(sample.input_ids))
    two = [_judged(sample) for sample in (ordered[-1], *ordered[:-1][:1])]
    if not _states_tell(model, two[0]):
        _BY_OWN_LOGITS.add(model)
    what = "a text with images is not the mean cross-entropy of its labels"
    yield tried_together(model, two, image_losses, _own_loss, what, "every text passes through it alone")


def _states_tell(model: PreTrainedModel, sample: ImageSample) -> bool:
    """Whether the output layer on the states of the decoder makes the logits that the model itself does."""
    with torch.no_grad(), evaluating(model), computing(model, "float32"):
        own = _own_loss(model, sample)
        try:
            return alike(model, image_losses(model, [sample])[1].mean(), own)
        except (torch.OutOfMemoryError, torch.AcceleratorError, RecursionError):
            raise  # RuntimeErrors that say nothing about the model
        except (RuntimeError, TypeError, ValueError):  # its decoder takes other arguments than the model does
            return False


def _judged(sample: ImageSample) -> ImageSample:
    """The sample with so many of its labels, from the first to the last, that the logits of all fit into memory."""
    at = [place for place, label in enumerate(sample.labels) if place and label != IGNORED]
    kept = (
        {at[round(number * (len(at) - 1) / (JUDGED - 1))] for number in range(JUDGED)} if len(at) > JUDGED else set(at)
    )
    labels = [label if place in kept else IGNORED for place, label in enumerate(sample.labels)]
    return replace(sample, labels=labels)


def _own_loss(model: PreTrainedModel, sample: ImageSample) -> Tensor:
    """What the model itself says of a sample, called as anybody would."""
    batch = {key: value.to(model.device) for key, value in collate_images(require_processor(model), [sample]).items()}
    batch.pop("weights", None)
    labels_1T = batch.pop("labels")
    learned_1T = labels_1T != IGNORED
    return F.cross_entropy(_own_logits(model, batch, learned_1T).float(), labels_1T[learned_1T])
