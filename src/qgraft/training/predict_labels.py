"""What a classifier says of rows, written down with the probabilities: what predict() does with such a model.

output_dir/
  predictions.jsonl      a line for each row: {"label": "good", "predict": "good", "probabilities": {"bad": 0.02, ...}}
                         several labels       {"label": ["a"], "predict": ["a", "b"], "probabilities": {...}}
                         a number             {"label": 3.5, "predict": 3.31}
                         words                {"label": ["O", ...], "predict": ["O", ...], "probabilities": [0.99, ...]},
                                              those of what is predicted; null for words that are cut off at max_length,
                                              have no token, or the label -100
  predict_results.json   loss, accuracy, macro-F1, number of rows, seconds, where every row went
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qgraft import storage
from qgraft.data.batches import IGNORED
from qgraft.data.label_samples import LabelSample
from qgraft.data.label_schemes import NUMBER, SEVERAL
from qgraft.data.reading import Accounting, Dataset
from qgraft.linear import computing
from qgraft.memory.budget import evaluation_tokens
from qgraft.passes.decoder import evaluating
from qgraft.passes.labels import Classifier, classifier_of, settled
from qgraft.passes.limits import sample_limit
from qgraft.training.arguments import TrainArguments
from qgraft.training.classification import (
    LabelEvaluation,
    evaluate_labelled,
    passed,
    predicted,
)
from qgraft.training.label_rows import read_label_samples

LINES = "predictions.jsonl"


@dataclass(frozen=True)
class LabelPredictions:
    """What predict() found of a classifier.

    Attributes:
        rows: a dictionary for each row, in their order, as they are written.
        measured: loss and metrics.
        accounting: where every row went.
        notes: what a reader should know, each one sentence.
    """

    rows: list[dict[str, Any]]
    measured: LabelEvaluation
    accounting: Accounting
    seconds: float
    notes: list[str]

    def metrics(self, prefix: str) -> dict[str, Any]:
        """The figures by their names, with how they came about."""
        figures = {"loss": self.measured.loss, **self.measured.metrics, "samples": len(self.rows)}
        return {
            **{f"{prefix}_{name}": value for name, value in figures.items()},
            f"{prefix}_runtime": round(self.seconds, 4),
            "accounting": self.accounting.as_dict(),
            "notes": self.notes,
        }


def predict_labels(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    args: TrainArguments,
    *,
    most: int | None = None,
) -> LabelPredictions:
    """What the model says of each row, without writing anything; `most` goes before args.max_samples."""
    classifier = classifier_of(model)
    assert classifier is not None  # the caller asked
    limit, notes = sample_limit(model, args.max_length), list[str]()
    samples, accounting = read_label_samples(model, tokenizer, dataset, args, limit, notes, most=most)
    began, tokens = time.perf_counter(), evaluation_tokens(args)
    classifier, said = settled(model, classifier, samples)
    with computing(model, args.compute):
        rows = predicted_rows(model, samples, classifier, tokens)
        measured = evaluate_labelled(model, samples, classifier, tokens)
    return LabelPredictions(
        rows, measured, accounting, time.perf_counter() - began, [*accounting.said(), *notes, *said]
    )


def write_predictions(found: LabelPredictions, folder: Path, results: str) -> None:
    """Both files, see the module's docstring; `results` is the name of the second."""
    lines = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in found.rows)
    storage.write_file(folder / LINES, lines.encode())
    storage.write_json(folder / results, found.metrics("predict"))


def predicted_rows(
    model: PreTrainedModel, samples: Sequence[LabelSample], classifier: Classifier, tokens: int
) -> list[dict[str, Any]]:
    """A dictionary for each sample, in their order."""
    order = sorted(range(len(samples)), key=lambda number: len(samples[number].input_ids))  # that of label_batches
    with torch.no_grad(), evaluating(model):
        parts = [each.cpu() for each, _ in passed(model, [samples[number] for number in order], classifier, tokens)]
    logits = torch.cat(parts)
    rows: list[dict[str, Any]] = [{} for _ in samples]
    begin = 0
    for number in order:
        sample, count = samples[number], 1
        if classifier.words:
            count = sum(label != IGNORED for label in sample.labels)
        rows[number] = _row(sample, logits[begin : begin + count], classifier)
        begin += count
    return rows


def _row(sample: LabelSample, logits: Tensor, classifier: Classifier) -> dict[str, Any]:
    names, problem = classifier.scheme.names, classifier.problem
    said = predicted(logits, problem)
    if classifier.words:
        told = [names[int(label)] for label in sample.labels if label != IGNORED]
        chosen = _rounded(logits.softmax(-1).amax(-1).tolist())
        columns = {"label": told, "predict": [names[int(each)] for each in said], "probabilities": chosen}
        return {key: _with_missing(values, sample.missing) for key, values in columns.items()}
    if problem == NUMBER:
        return {"label": sample.labels[0], "predict": round(float(said[0]), 6)}
    if problem == SEVERAL:
        both = ([name for name, holds in zip(names, each, strict=True) if holds] for each in (sample.labels, said[0]))
        label, predict = both
        return {"label": label, "predict": predict, "probabilities": _named(names, logits[0].sigmoid())}
    return {"label": names[int(sample.labels[0])], "predict": names[int(said[0])],
            "probabilities": _named(names, logits[0].softmax(-1))}  # fmt: skip


def _with_missing(values: Sequence[Any], missing: Sequence[int]) -> list[Any]:
    """A value for each word: None at these places, the values in the others."""
    gaps, rest = set(missing), iter(values)
    return [None if place in gaps else next(rest) for place in range(len(values) + len(gaps))]


def _named(names: Sequence[str], values: Tensor) -> Mapping[str, float]:
    return dict(zip(names, _rounded(values.tolist()), strict=True))


def _rounded(values: Sequence[float]) -> list[Any]:
    return [round(value, 6) for value in values]
