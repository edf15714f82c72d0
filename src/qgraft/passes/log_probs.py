"""The log-probability of each label of texts that pass through the model together, differentiable.

Texts are samples with labels, one after another as in any padding-free batch; of two texts that begin alike the second may
begin where the first one's answer does (shared_prompts.py), where the model's attention goes sample by sample and a trial on
the longest pair comes to the same numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qgraft.attention import SAMPLES, attention_of
from qgraft.data.preference_samples import Preference
from qgraft.data.tokenizing import IGNORED, Sample
from qgraft.linear import computing
from qgraft.model_parts import computed_dtype
from qgraft.passes.decoder import EXACT, ROUNDED, attention_arguments, evaluating, output_head, rows_at
from qgraft.passes.loss import label_log_probs
from qgraft.shared_prompts import SharedPrompts


@dataclass(frozen=True, eq=False)
class Texts:
    """One row of T tokens with N labels, as it passes through the model, on the CPU.

    Attributes:
        input_ids, position_ids: [1, T].
        places, targets: [N], the token that predicts each label, and the label; those of a text together, and behind
            them those of prompts, where these are asked for.
        counts: labels of each text.
        shared: where texts begin with the same tokens of the row.
    """

    input_ids: Tensor
    position_ids: Tensor
    places: Tensor
    targets: Tensor
    counts: tuple[int, ...]
    shared: SharedPrompts | None = None


def lay_out(groups: Sequence[Sequence[Sample]], shared: Sequence[int], *, prompts: bool = False) -> Texts:
    """The texts of all groups in one row.

    Args:
        shared: of each group, how many tokens its texts begin with that stand in the row once; 0 for none.
        prompts: whether what is no label in the first text of each group is one behind those of the texts.
    """
    ids, positions, places, targets = list[int](), list[int](), list[int](), list[int]()
    asked = list[tuple[int, int]]()
    texts, counts = list[list[int]](), list[int]()
    for group, common in zip(groups, shared, strict=True):
        for number, text in enumerate(group):
            own = common if number else 0  # the first text of a group brings what they share
            start = len(ids) - own
            placed = [*(texts[-number][:own] if own else ()), *range(start + own, start + len(text.input_ids))]
            ids += text.input_ids[own:]
            positions += range(own, len(text.input_ids))
            learned = [at for at, label in enumerate(text.labels) if at and label != IGNORED]
            places += [placed[at - 1] for at in learned]
            targets += [text.labels[at] for at in learned]
            texts.append(placed)
            counts.append(len(learned))
            if prompts and not number:
                asked += [
                    (placed[at - 1], text.input_ids[at]) for at in range(1, len(placed)) if at not in set(learned)
                ]
    places, targets = [*places, *(place for place, _ in asked)], [*targets, *(target for _, target in asked)]
    once = SharedPrompts.of(texts, len(ids)) if any(shared) else None
    return Texts(
        torch.tensor([ids]), torch.tensor([positions]), torch.tensor(places), torch.tensor(targets), tuple(counts), once
    )


def log_probs(model: PreTrainedModel, texts: Texts) -> Tensor:
    """The log-probability of each label, [N] float32, with a gradient where there is one."""
    return label_log_probs(*text_states(model, texts), output_head(model))


def text_states(model: PreTrainedModel, texts: Texts) -> tuple[Tensor, Tensor]:
    """What output_head makes logits of, [N, hidden], and the labels, [N], both on the model's device."""
    places_N, targets_N = (part.to(model.device, non_blocking=True) for part in (texts.places, texts.targets))
    batch = {"input_ids": texts.input_ids, "position_ids": texts.position_ids}
    return rows_at(model, places_N, batch, **sharing_arguments(model, texts.position_ids, texts.shared)), targets_N


def sharing_arguments(model: PreTrainedModel, position_ids: Tensor, shared: SharedPrompts | None) -> dict[str, Any]:
    """What the forward pass must be given beside positions [1, T], on the CPU, of a row that tells what its texts share."""
    if shared is None:
        return dict(attention_arguments(model, position_ids))
    positions = position_ids[0]
    gaps = (positions[1:] != positions[:-1] + 1).nonzero()[:, 0] + 1
    bounds = torch.cat([gaps.new_tensor([0]), gaps, gaps.new_tensor([len(positions)])])
    return {"cu_seq_lens_q": bounds, "shared_prompts": shared.to(model.device)}


def text_sums(each_N: Tensor, texts: Texts) -> tuple[Tensor, Tensor]:
    """(The sum over the labels of each text, [texts], in the same order every time; the sum over those of prompts)."""
    *parts, prompts = each_N.split([*texts.counts, len(each_N) - sum(texts.counts)])
    return torch.stack([part.sum() for part in parts]), prompts.sum()


def shares_prompts(model: PreTrainedModel, preferences: Sequence[Preference]) -> bool:
    """Whether pairs can have their prompts in a pass once: tried on the pair whose prompt is the longest."""
    if attention_of(model) != SAMPLES:
        return False
    longest = max(preferences, key=lambda each: each.shared)
    if not longest.shared:
        return False
    return agree(model, lay_out([longest.texts], [0]), lay_out([longest.texts], [longest.shared]))


@torch.no_grad()
def agree(model: PreTrainedModel, texts: Texts, shared: Texts) -> bool:
    """Whether the model comes to the same numbers of the same texts where these share what they begin with."""
    with evaluating(model), computing(model, "float32"):
        apart = log_probs(model, texts)
        try:
            together = log_probs(model, shared)
        except (torch.OutOfMemoryError, torch.AcceleratorError, RecursionError):
            raise  # RuntimeErrors that say nothing about the model
        except (RuntimeError, TypeError, ValueError):
            return False  # it does not pass the places on, or computes more than attention over the row
    off, scale = (together - apart).abs(), apart.abs().clamp(min=1.0)
    if computed_dtype(model) == torch.float32:
        return bool((off <= EXACT * scale).all())
    return float(off.mean()) <= ROUNDED * float(scale.mean())
