"""The labelled rows of a run: read and tokenized as its options and the model's labels say; and the labels that rows have."""

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qgraft.data.label_samples import LabelSample, build_label_samples
from qgraft.data.label_schemes import LabelScheme, label_note, scheme_of
from qgraft.data.reading import Accounting, Dataset, named_columns, read_labels
from qgraft.passes.labels import classifier_of
from qgraft.training.arguments import TrainArguments
from qgraft.training.classification_options import task_given


def read_label_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    args: TrainArguments,
    limit: int,
    notes: list[str],
    *,
    most: int | None = None,
) -> tuple[list[LabelSample], Accounting]:
    """The samples of one dataset, of at most `limit` tokens, for a classifier; `notes` gets how often each label is there."""
    classifier = classifier_of(model)
    assert classifier is not None  # the caller asked
    rows, accounting = read_labels(dataset, args.dataset_dir, tokens=classifier.words, **_reading(args, most))
    samples = build_label_samples(
        tokenizer, rows, accounting, classifier.scheme, tokens=classifier.words, max_length=limit
    )
    notes.append(label_note(rows, classifier.scheme, tokens=classifier.words))
    return samples, accounting


def labels_of_rows(dataset: Dataset, args: TrainArguments) -> LabelScheme:
    """What the rows of a dataset tell apart, before there is a model."""
    words = args.task_type == "TOKEN_CLS"
    rows, _ = read_labels(dataset, args.dataset_dir, tokens=words, **_reading(args, args.max_train_samples))
    return scheme_of(rows, tokens=words, problem_type=args.problem_type, names=task_given(args).labels)


def _reading(args: TrainArguments, most: int | None) -> dict[str, Any]:
    return {
        "name": args.name, "author": args.author, "columns": named_columns(vars(args)),
        "max_samples": most or args.max_samples, "allow_outside_files": args.allow_outside_files,
    }  # fmt: skip
