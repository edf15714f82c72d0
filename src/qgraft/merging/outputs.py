"""What a merge compares of two models: the next tokens of one that writes, the labels of a classifier.

    states   whatever logits are made of, a row for each label: of a writer its last hidden states, of a classifier its
             logits, made by the adapter's head (heads.heads_lent)
    head     states -> logits [n, choices], whose softmax is what the model says

Several labels of a text are a choice between two for each of them: softmax(0, logit) is its sigmoid, so losses and
divergences are those of next tokens. A number (regression) is no choice, and not merged by what it says.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from qgraft.data.batches import IGNORED, Batch, collate, label_weights, neighbours
from qgraft.data.label_samples import LabelSample, collate_texts
from qgraft.data.label_schemes import SEVERAL
from qgraft.data.tokenizing import Sample
from qgraft.model_parts import argument_names, decoder_of
from qgraft.passes.beginnings import lay_out_samples, shares_beginnings
from qgraft.passes.decoder import Head, output_head, padding_free
from qgraft.passes.fused import fused_modules
from qgraft.passes.labels import Classifier, apart, classifier_of
from qgraft.passes.log_probs import Texts, text_states
from qgraft.passes.loss import as_they_are

_SHARING: ContextVar[bool | None] = ContextVar("sharing", default=None)  # within `together`: whether beginnings are


class Outputs(Protocol):
    """See the module's docstring. A batch is on the CPU; what it is made of is known here alone."""

    @property
    def unit(self) -> str:
        """What a row of states is about."""

    def together(self, model: PreTrainedModel, samples: Sequence[Any]) -> AbstractContextManager[str | None]:
        """Within the block samples share passes; yields why not, where each has to pass alone."""

    @property
    def shares(self) -> bool:
        """Whether, within `together`, samples of a row have what they begin with in it once."""

    def batches(self, samples: Sequence[Any], tokens: int) -> list[Any]:
        """The samples in their order, at most so many tokens in each; 0 for one sample in each."""

    def rows(self, sample: Any) -> int:
        """How many rows of states a sample gives."""

    def states(self, model: PreTrainedModel, batch: Any) -> tuple[Tensor, Tensor]:
        """States [n, width] and labels [n], in the order of the samples."""

    def count(self, batch: Any) -> int:
        """How many rows of states a batch gives."""

    def weights(self, batch: Any) -> Tensor | None:
        """What the loss of each label is multiplied by, [n]; None for 1 each."""

    def head(self, model: PreTrainedModel) -> Head:
        """See the module's docstring."""

    def padded(self, samples: Sequence[Any]) -> Batch:
        """The samples as padded rows, input_ids and attention_mask [B, T] among them."""

    def reach(self, model: PreTrainedModel, batch: Batch, bounds: Mapping[str, Any]) -> None:
        """Pass rows, on the model's device, through all layers; `bounds` as passes.log_probs.sharing_arguments."""


def outputs_of(model: PreTrainedModel) -> Outputs:
    """Those of this model."""
    classifier = classifier_of(model)
    return _NextTokens() if classifier is None else _Labels(classifier)


class _NextTokens:
    """Of a causal language model: padding-free rows, of which the decoder facade knows all; beginnings in them once."""

    unit = "token"

    @contextmanager
    def together(self, model: PreTrainedModel, samples: Sequence[Sample]) -> Iterator[str | None]:
        with padding_free(model, samples) as problem:
            if problem is not None or _SHARING.get() is not None:  # found out already, for more samples
                yield problem
                return
            with fused_modules(model):
                before = _SHARING.set(shares_beginnings(model, samples))
                try:
                    yield None
                finally:
                    _SHARING.reset(before)

    @property
    def shares(self) -> bool:
        return bool(_SHARING.get())

    def batches(self, samples: Sequence[Sample], tokens: int) -> list["_Row"]:
        lengths = [sample.length for sample in samples]
        return [_Row.of(samples[part], self.shares) for part in neighbours(lengths, tokens)]

    def rows(self, sample: Sample) -> int:
        return sum(label != IGNORED for label in sample.labels)

    def states(self, model: PreTrainedModel, batch: "_Row") -> tuple[Tensor, Tensor]:
        return text_states(model, batch.texts)

    def count(self, batch: "_Row") -> int:
        return len(batch.texts.targets)

    def weights(self, batch: "_Row") -> Tensor | None:
        return batch.weights

    def head(self, model: PreTrainedModel) -> Head:
        return output_head(model)

    def padded(self, samples: Sequence[Sample]) -> Batch:
        width = max(sample.length for sample in samples)
        ids = torch.tensor([[*sample.input_ids, *[0] * (width - sample.length)] for sample in samples])
        mask = torch.tensor([[n < sample.length for n in range(width)] for sample in samples])
        return {"input_ids": ids, "attention_mask": mask.long()}

    def reach(self, model: PreTrainedModel, batch: Batch, bounds: Mapping[str, Any]) -> None:
        decoder_of(model)(**batch, use_cache=False, **bounds)


@dataclass(frozen=True, eq=False)
class _Row:
    """Some samples in a row, and what their labels weigh, [n]; None for 1 each."""

    texts: Texts
    weights: Tensor | None

    @classmethod
    def of(cls, samples: Sequence[Sample], share: bool) -> "_Row":
        return cls(lay_out_samples(samples, share), label_weights(collate(samples)))


@dataclass(frozen=True)
class _Labels:
    """Of a classifier: padded batches, with `chosen` [B, T] bool where words have labels; unrelated text has none."""

    classifier: Classifier
    unit: str = "label"
    shares: bool = False

    def together(self, model: PreTrainedModel, samples: Sequence[LabelSample]) -> AbstractContextManager[str | None]:
        return nullcontext(apart(model, self.classifier.padding, samples))

    def batches(self, samples: Sequence[LabelSample], tokens: int) -> list[Batch]:
        lengths = [sample.length for sample in samples]
        return [self._batch(samples[part]) for part in neighbours(lengths, tokens)]

    def rows(self, sample: LabelSample) -> int:
        return len(self._labels(sample))

    def states(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
        taken = argument_names(model)
        inputs: dict[str, Any] = {key: value.to(model.device) for key, value in batch.items()}
        logits = model(**{key: value for key, value in inputs.items() if key in taken}).logits.float()
        if self.classifier.words:
            logits = logits[inputs["chosen"]]
        return logits.reshape(-1, 1) if self._several else logits, inputs["targets"]

    def count(self, batch: Batch) -> int:
        return len(batch["targets"])

    def weights(self, batch: Batch) -> Tensor | None:
        return batch["weights"]

    def head(self, model: PreTrainedModel) -> Head:
        return _with_zero if self._several else as_they_are

    def padded(self, samples: Sequence[LabelSample]) -> Batch:
        return collate_texts(samples, self.classifier.padding)

    def reach(self, model: PreTrainedModel, batch: Batch, bounds: Mapping[str, Any]) -> None:
        decoder = decoder_of(model)
        given: dict[str, Any] = {**batch, **bounds, "use_cache": False}
        taken = argument_names(decoder)
        decoder(**{key: value for key, value in given.items() if key in taken})

    @property
    def _several(self) -> bool:
        return self.classifier.problem == SEVERAL

    def _labels(self, sample: LabelSample) -> list[int]:
        """The label of each row; 0, which weighs nothing, of unrelated text."""
        if self.classifier.words:
            return [int(label) for label in sample.labels if label != IGNORED] or [0] * sample.length
        count = len(self.classifier.scheme.names) if self._several else 1
        return [int(label) for label in sample.labels] or [0] * count

    def _batch(self, samples: Sequence[LabelSample]) -> Batch:
        batch, labels = collate_texts(samples, self.classifier.padding), [self._labels(sample) for sample in samples]
        weights = [float(bool(sample.labels)) for sample, each in zip(samples, labels, strict=True) for _ in each]
        batch |= {
            "targets": torch.tensor([label for each in labels for label in each]),
            "weights": torch.tensor(weights),
        }
        if self.classifier.words:
            width = batch["input_ids"].shape[1]
            kept = [[label != IGNORED for label in sample.labels] or [True] * sample.length for sample in samples]
            batch["chosen"] = torch.tensor([each + [False] * (width - len(each)) for each in kept])
        return batch


def _with_zero(logits_N1: Tensor) -> Tensor:
    """What is said of one label: no, or yes."""
    return F.pad(logits_N1, (1, 0))
