"""What a classifier makes of labelled texts, or of their words: their batches, and its logits.

Texts of a batch are padded at the right. Some models read padding (FNet, ConvBERT), and some the end of a row for that of the
text (XLNet, whose own tokenizer pads at the left); so it is tried on the longest text and the shortest, and where they are
something else together, every text passes alone (`apart`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qgraft.data.batches import IGNORED
from qgraft.data.label_samples import LabelSample, collate_texts, label_batches
from qgraft.data.label_schemes import NUMBER, SINGLE, LabelScheme
from qgraft.linear import computing
from qgraft.model_parts import CAUSAL, argument_names, computed_dtype, labels_of, task_of
from qgraft.passes.decoder import EXACT, ROUNDED, evaluating


@dataclass(frozen=True)
class Classifier:
    """What a model of a classifier tells apart, and how its batches are made.

    Attributes:
        words: whether each word has a label.
        padding: the id of the token that texts are padded with.
        alone: whether every text passes by itself, see apart().
    """

    scheme: LabelScheme
    words: bool
    padding: int
    alone: bool = False

    @property
    def problem(self) -> str:
        """See the module's docstring."""
        return self.scheme.problem_type

    def batches(self, samples: Sequence[LabelSample], tokens: int) -> list[dict[str, Tensor]]:
        """See data/label_samples.py."""
        tokens = 0 if self.alone else tokens
        return label_batches(samples, tokens, self.scheme, words=self.words, padding=self.padding)


def classifier_of(model: PreTrainedModel) -> Classifier | None:
    """What the model tells apart; None for a model that writes."""
    if task_of(model) == CAUSAL:
        return None
    padding = getattr(model.config.get_text_config(), "pad_token_id", None)
    words = task_of(model) == "TOKEN_CLS"
    problem = model.config.problem_type or (NUMBER if model.config.num_labels == 1 and not words else SINGLE)
    return Classifier(LabelScheme(labels_of(model), problem), words, 0 if padding is None else padding)


@torch.no_grad()
def apart(model: PreTrainedModel, padding: int, samples: Sequence[LabelSample]) -> str | None:
    """Why texts may not share a pass, in words; None where padding changes nothing that the model says of any of them."""
    two = [choose(samples, key=lambda each: each.length) for choose in (min, max)] if samples else []
    if not samples or two[0].length == two[1].length:
        return None
    with evaluating(model), computing(model, "float32"):
        each = torch.cat([_logits(model, [sample], padding) for sample in two])
        off = (_logits(model, two, padding) - each).abs()
    scale = each.abs().max()
    far = off.max() > EXACT * scale if computed_dtype(model) == torch.float32 else off.mean() > ROUNDED * scale
    return (
        f"{type(model).__name__} computes otherwise beside padding; every text passes through it alone" if far else None
    )


def settled(
    model: PreTrainedModel, classifier: Classifier, samples: Sequence[LabelSample]
) -> tuple[Classifier, list[str]]:
    """(The classifier with `alone` as these texts need it, what a reader should know of that)."""
    why = apart(model, classifier.padding, samples)
    return replace(classifier, alone=why is not None), [] if why is None else [why]


def _logits(model: PreTrainedModel, samples: Sequence[LabelSample], padding: int) -> Tensor:
    """Those of each text, or of its tokens, one after another: [n, labels] float32."""
    batch, taken = collate_texts(samples, padding), argument_names(model)
    given: dict[str, Any] = {key: value.to(model.device) for key, value in batch.items() if key in taken}
    logits = model(**given).logits.float()
    return logits if logits.dim() == 2 else logits[batch["attention_mask"].bool().to(logits.device)]


def labelled_logits(
    model: PreTrainedModel, batch: Mapping[str, Tensor], classifier: Classifier
) -> tuple[Tensor, Tensor]:
    """Logits [n, labels] float32 of the texts, or of the labelled words, and their labels."""
    taken = argument_names(model)
    inputs: dict[str, Any] = {key: value.to(model.device, non_blocking=True) for key, value in batch.items()}
    labels = inputs.pop("labels")
    logits = model(**{key: value for key, value in inputs.items() if key in taken}).logits.float()
    if classifier.words:
        chosen = labels != IGNORED
        return logits[chosen], labels[chosen]
    return logits, labels
