"""How pairs of source and target go through an encoder-decoder: padded side by side, by the model's own forward pass.

    input_ids       [B, S]  sources, padded at the right
    attention_mask  [B, S]  1 where a source is
    labels          [B, T]  targets, -100 behind them
    weights         [B]     of a pair's labels; only where one is not 1

What the decoder reads is the labels behind its start token, and which token that is the model knows
(prepare_decoder_input_ids_from_labels). Padding behind a target changes nothing before it; that padding behind a source does
not either, and that the loss is the model's own, is found out on the longest pair and the shortest (`padded_together`).

Padding-free passes as those of decoders were not chosen: these models add a bias of positions to the scores of their
attention, and attend from one sequence to another, which no varlen kernel here computes. Targets are short, so the logits of
all of them are made at once.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qgraft.data.batches import IGNORED, Batch
from qgraft.data.pairs import PairSample
from qgraft.errors import UnsupportedError
from qgraft.linear import computing
from qgraft.model_parts import computed_dtype, hears
from qgraft.passes.broken import of_numbers
from qgraft.passes.decoder import EXACT, ROUNDED, evaluating
from qgraft.passes.loss import as_they_are, weighted_cross_entropy

S = TypeVar("S")
Pair = TypeVar("Pair", bound=PairSample)


def collate_pairs(samples: Sequence[PairSample], pad: int) -> Batch:
    """One padded batch of these pairs, on the CPU, in their order."""
    longest = max(len(sample.input_ids) for sample in samples)
    return {
        "input_ids": _padded([sample.input_ids for sample in samples], longest, pad),
        "attention_mask": _padded([[1] * len(sample.input_ids) for sample in samples], longest, 0),
        **collate_targets(samples),
    }


def collate_targets(samples: Sequence[PairSample]) -> Batch:
    """The labels of a batch, and weights where one is not 1."""
    most = max(len(sample.labels) for sample in samples)
    batch = {"labels": _padded([sample.labels for sample in samples], most, IGNORED)}
    if any(sample.weight != 1 for sample in samples):
        batch["weights"] = torch.tensor([sample.weight for sample in samples])
    return batch


def _padded(rows: Sequence[list[int]], length: int, value: int) -> Tensor:
    return torch.tensor([row + [value] * (length - len(row)) for row in rows], dtype=torch.int64)


def split_pairs(samples: Sequence[Pair], tokens: int) -> list[list[Pair]]:
    """Pairs of similar lengths together, with at most so many tokens of both sides and padding; 0 for one in each."""
    parts, wide, high = list[list[Pair]](), 0, 0
    for sample in sorted(samples, key=lambda each: (each.positions, len(each.labels))):
        wide, high = max(wide, sample.positions), max(high, len(sample.labels))
        if parts and (len(parts[-1]) + 1) * (wide + high) <= tokens:
            parts[-1].append(sample)
        else:
            parts.append([sample])
            wide, high = sample.positions, len(sample.labels)
    return parts


def pad_of(model: PreTrainedModel) -> int:
    """An id to pad sources with, which the attention mask hides."""
    return getattr(model.config, "pad_token_id", None) or 0


def pair_losses(
    model: PreTrainedModel, samples: Sequence[PairSample], label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(The sum of weight times cross-entropy over the labels of a pass, differentiable; that of each label, unweighted).

    float32 scalar and [labels], pair after pair.
    """
    return target_losses(model, collate_pairs(samples, pad_of(model)), label_smoothing)


def target_losses(model: PreTrainedModel, batch: Batch, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """The same of a batch on the CPU: labels, weights where there are some, and all that the encoder is given."""
    given: Any = {key: value.to(model.device) for key, value in batch.items()}
    labels_BT, weights_B = given.pop("labels"), given.pop("weights", None)
    logits_BTV = model(**given, decoder_input_ids=_decoder_input(model, labels_BT), use_cache=False).logits
    learned_BT = labels_BT != IGNORED
    weights_N = None if weights_B is None else weights_B[:, None].expand_as(labels_BT)[learned_BT]
    return weighted_cross_entropy(
        logits_BTV[learned_BT], labels_BT[learned_BT], weights_N, as_they_are, label_smoothing
    )


def _decoder_input(model: PreTrainedModel, labels_BT: Tensor) -> Tensor:
    """What the model's decoder reads while it learns these labels, int64 [B, T]."""
    found: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    found = found or (_shifted_sounds(model) if hears(model.config) else None)
    start = getattr(model.config, "decoder_start_token_id", None)
    if found is None:
        raise UnsupportedError(f"{type(model).__name__} does not say what its decoder reads while it learns a target")
    if start is None and getattr(model.config, "pad_token_id", None) is None:
        raise UnsupportedError(
            f"{type(model).__name__}: config.json names no decoder_start_token_id, by which every target begins",
            hint="write the one of the model's release into it",
        )
    shifted: Tensor = found(labels=labels_BT)
    return shifted


def _shifted_sounds(model: PreTrainedModel) -> Any:
    """The function of Whisper's module, which the class has not."""
    from transformers.models.whisper.modeling_whisper import shift_tokens_right

    config: Any = model.config
    return lambda labels: shift_tokens_right(labels, config.pad_token_id, config.decoder_start_token_id)


@torch.inference_mode()
def generate_targets(model: PreTrainedModel, sources: Sequence[list[int]], **told: Any) -> list[list[int]]:
    """What generate() writes for each source, behind the decoder's start token: with the end, and padding behind it."""
    batch = collate_pairs([PairSample(ids, [0], "") for ids in sources], pad_of(model))
    given = {key: batch[key].to(model.device) for key in ("input_ids", "attention_mask")}
    generate: Any = model.generate
    return [ids[1:] for ids in generate(**given, **{"logits_processor": of_numbers(model), **told}).tolist()]


@contextmanager
def padded_together(model: PreTrainedModel, samples: Sequence[PairSample]) -> Iterator[str | None]:
    """Within the block passes of several pairs compute what the model says of each alone.

    Yields None, or a sentence that says why every pair must pass alone. Raises UnsupportedError for a model whose loss of a
    single pair is not the mean cross-entropy of its labels.
    """
    two = longest_and_shortest(samples)
    what, alone = "a pair is not the mean cross-entropy of the target's tokens", "every pair passes through it alone"
    yield tried_together(model, two, pair_losses, _own_loss, what, alone)


def longest_and_shortest(samples: Sequence[Pair]) -> list[Pair]:
    """These two, or the only one."""
    ordered = sorted(samples, key=lambda sample: sample.positions + len(sample.labels))
    return [ordered[-1], *ordered[:-1][:1]]


def tried_together(
    model: PreTrainedModel, two: Sequence[S], losses: Callable[[PreTrainedModel, Sequence[S]], tuple[Tensor, Tensor]],
    own_loss: Callable[[PreTrainedModel, S], Tensor], what: str, alone: str,
) -> str | None:  # fmt: skip
    """Why two samples may not pass together, in words that end in `alone`; None where they say what each says by itself.

    Raises UnsupportedError where the model's own loss of a single one is another: of `what`.
    """
    with torch.no_grad(), evaluating(model), computing(model, "float32"):
        each = [losses(model, [sample])[1] for sample in two]
        for sample, found in zip(two, each, strict=True):
            if not alike(model, found.mean(), own_loss(model, sample)):
                raise UnsupportedError(f"{type(model).__name__}: its own loss of {what}, so it cannot be trained here")
        apart = not alike(model, losses(model, two)[1], torch.cat(each))
    return f"{type(model).__name__} computes otherwise beside padding; {alone}" if apart else None


def _own_loss(model: PreTrainedModel, sample: PairSample) -> Tensor:
    """What the model itself says of a pair, called as anybody would."""
    ids, labels = (torch.tensor([each], device=model.device) for each in (sample.input_ids, sample.labels))
    own: Any = model
    loss: Tensor = own(input_ids=ids, labels=labels, use_cache=False).loss
    return loss.float()


def alike(model: PreTrainedModel, got: Tensor, expected: Tensor) -> bool:
    """Whether losses are the same but for rounding; NaN is NaN in any pass."""
    both = got.isfinite() & expected.isfinite()
    if not torch.equal(got.isfinite(), expected.isfinite()):
        return False
    off, scale = (got - expected).abs()[both], expected[both].abs().clamp(min=1.0)
    if computed_dtype(model) == torch.float32:
        return bool((off <= EXACT * scale).all())
    return not len(off) or float(off.mean()) <= ROUNDED * float(scale.mean())
