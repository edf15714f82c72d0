"""What a classifier makes of labelled texts, or of their words: their batches, and its logits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from qgraft.data.batches import IGNORED
from qgraft.data.label_samples import LabelSample, label_batches
from qgraft.data.label_schemes import NUMBER, SINGLE, LabelScheme
from qgraft.model_parts import CAUSAL, argument_names, labels_of, task_of


@dataclass(frozen=True)
class Classifier:
    """What a model of a classifier tells apart, and how its batches are made.

    Attributes:
        words: whether each word has a label.
        padding: the id of the token that texts are padded with.
    """

    scheme: LabelScheme
    words: bool
    padding: int

    @property
    def problem(self) -> str:
        """See the module's docstring."""
        return self.scheme.problem_type

    def batches(self, samples: Sequence[LabelSample], tokens: int) -> list[dict[str, Tensor]]:
        """See data/label_samples.py."""
        return label_batches(samples, tokens, self.scheme, words=self.words, padding=self.padding)


def classifier_of(model: PreTrainedModel) -> Classifier | None:
    """What the model tells apart; None for a model that writes."""
    if task_of(model) == CAUSAL:
        return None
    padding = getattr(model.config.get_text_config(), "pad_token_id", None)
    words = task_of(model) == "TOKEN_CLS"
    problem = model.config.problem_type or (NUMBER if model.config.num_labels == 1 and not words else SINGLE)
    return Classifier(LabelScheme(labels_of(model), problem), words, 0 if padding is None else padding)


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
