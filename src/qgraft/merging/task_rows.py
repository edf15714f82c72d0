"""The rows of a task that a merge is given, that the adapters bring, or that their training sets hold.

    given      rows, or what read_dataset takes; read as the first adapter's training read its own
    kept       by the adapters (adapters/kept_rows.py): samples as they were learned, and some that were held out
    named      the training set that an adapter remembers, read as then; refused where it holds other rows now

Rows that two adapters share count once. Those that runs held out measure, where every one of the runs held some out.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qgraft.adapter_files.calibration import CALIBRATION, check_text, samples_of
from qgraft.adapters.kept_rows import LONGEST, KeptRows, united_rows
from qgraft.data.held_out import hold_out
from qgraft.data.label_samples import build_label_samples
from qgraft.data.messages import Conversation
from qgraft.data.preference_samples import Preference, build_preferences
from qgraft.data.reading import Accounting, Dataset, named_columns, read_dataset, read_labels, read_preferences
from qgraft.data.templates import remembered_template
from qgraft.data.tokenizing import ChatGlmOptions, Sample, build_samples, resolve_template
from qgraft.errors import DataError, option, worded
from qgraft.model_parts import marker_ids, vision_of
from qgraft.passes.labels import Classifier, classifier_of
from qgraft.passes.limits import sample_limit, stated_ends

TRAINED_LENGTH, TRAINED_SEED = 2048, 42  # of a run whose arguments do not say it: their defaults in TrainArguments
# Options of reading rows, as evaluate() has them; all but the last are remembered by adapters
READING = ("dataset_dir", "template", "system", "name", "author", "allow_outside_files")
PROMPTING = READING[:-1]  # those that make other samples of the same rows, or read other ones


@dataclass(frozen=True)
class Found:
    """Rows of a task.

    Attributes:
        task: that no run held out.
        held: that runs did; None where they did not, or it is not asked.
        size: how many rows the adapters learned, of which these may be a part.
        source: where they are from.
        measured_on: what to say of those held out.
    """

    task: list[Sample]
    held: list[Sample] | None
    size: int
    source: str
    measured_on: list[str]


@dataclass(frozen=True)
class Reader:
    """Reads rows as the adapters' trainings did, where the caller says nothing else."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    options: Mapping[str, Any]

    @cached_property
    def classifier(self) -> Classifier | None:
        """What the model tells apart, where it is a classifier."""
        return classifier_of(self.model)

    def samples(
        self, dataset: Dataset, arguments: Mapping[str, Any], longest: int = LONGEST, most: int | None = None
    ) -> list[Any]:
        """The answers of a dataset; of a training on preferences those chosen or wanted; of a classifier the texts."""
        return [each.texts[0] if isinstance(each, Preference) else each
                for each in self._built(dataset, arguments, longest, most) if each.desirable is not False]  # fmt: skip

    def _built(self, dataset: Dataset, arguments: Mapping[str, Any], longest: int, most: int | None) -> Sequence[Any]:
        rows, accounting, columns = self._read(dataset, arguments, most)
        if self.classifier is not None:
            labelled = [row for row in rows if isinstance(row, Conversation)]
            most = sample_limit(self.model, min(longest, arguments.get("max_length", longest)))
            return build_label_samples(self.tokenizer, labelled, accounting, self.classifier.scheme,
                                       tokens=self.classifier.words, max_length=most)  # fmt: skip
        chosen = self.options.get("template") or remembered_template(arguments)
        template = resolve_template(self.tokenizer, chosen, enable_thinking=arguments.get("enable_thinking"),
                                    system_text=arguments.get("system_text", "question"))  # fmt: skip
        system = self.options.get("system") or arguments.get("system")
        learning: dict[str, Any] = {
            "template": template, "system": system, "max_length": sample_limit(self.model, longest),
            "mask_reasoning": bool(arguments.get("mask_reasoning")), "eos_ids": stated_ends(self.model),
            "markers": marker_ids(self.model),
            "chatglm": ChatGlmOptions(numbered="history" in (columns or ())),
        }  # fmt: skip
        if judged := [row for row in rows if isinstance(row, tuple)]:
            return build_preferences(self.tokenizer, judged, accounting, **learning)
        plain = [row for row in rows if isinstance(row, Conversation)]
        if any(message.images for row in plain for message in row.messages):
            raise DataError(f"merge: the rows of {dataset if isinstance(dataset, str) else 'the task'} hold images, and "
                            "merges go by texts alone", hint=f"{option('method', 'nearest')} needs no rows")  # fmt: skip
        return build_samples(self.tokenizer, plain, accounting, **learning)

    def _read(
        self, dataset: Dataset, arguments: Mapping[str, Any], most: int | None
    ) -> tuple[Sequence[Conversation | tuple[Conversation, ...]], Accounting, dict[str, str] | None]:
        """Rows as the training read them; others than its own may hold plain answers, whatever it learned."""
        folder, name, author = (
            self.options.get(key) or arguments.get(key) for key in ("dataset_dir", "name", "author")
        )
        known = dataset in (arguments.get("dataset"), arguments.get("eval_dataset"))
        columns = named_columns(arguments) if known else None
        reading: dict[str, Any] = {"name": name, "author": author, "columns": columns, "max_samples": most,
                                   "allow_outside_files": bool(self.options.get("allow_outside_files"))}  # fmt: skip
        if self.classifier is not None:
            return *read_labels(dataset, folder, tokens=self.classifier.words, **reading), columns
        stage = arguments.get("stage", "sft")
        if stage not in ("sft", "distill"):
            try:
                return *read_preferences(dataset, folder, labelled=stage == "kto", **reading), columns
            except DataError:
                if known:
                    raise
        return *read_dataset(dataset, folder, images=bool(vision_of(self.model)), **reading), columns

    def changed_rows(self, arguments: Mapping[str, Any], held_out: bool = True) -> str | None:
        """The name of a dataset of a run that holds other rows today than then; None where it is not known to."""
        if any(self.options.get(key) not in (None, arguments.get(key)) for key in ("name", "author")):
            return None  # which are words of the rows
        most = arguments.get("max_samples")
        sets = [("dataset", "max_train_samples", "rows_sha256")]
        sets += [("eval_dataset", "max_eval_samples", "held_out_rows_sha256")] if held_out else []
        for name, limit, sha256 in sets:
            if arguments.get(name) and arguments.get(sha256):
                _, accounting, _ = self._read(arguments[name], arguments, arguments.get(limit) or most)
                if accounting.sha256 != arguments[sha256]:
                    return str(arguments[name])
        return None

    def check_rows(self, arguments: Mapping[str, Any], held_out: bool) -> None:
        """Raise DataError where the rows of the training, or its held-out ones, are other ones today."""
        if changed := self.changed_rows(arguments, held_out):
            raise DataError(
                f"{changed} holds other rows than the adapter was trained with",
                hint="give the rows of then, or name the ones to go by: "
                + worded(flags="--dataset", python="calibration="),
            )

    def trained_on(self, arguments: Mapping[str, Any]) -> Sequence[Any]:
        """All samples of a run before it held some out, as long as it had them: which rows gave one decides the choice."""
        most = arguments.get("max_train_samples") or arguments.get("max_samples")
        return self._built(arguments["dataset"], arguments, arguments.get("max_length", TRAINED_LENGTH), most)


def as_asked(rows: KeptRows | None, trained: Mapping[str, Any], options: Mapping[str, Any]) -> KeptRows | None:
    """The rows that an adapter keeps; None where they shall be read in another way. Raises DataError where they cannot be."""
    asked = [key for key in PROMPTING if options.get(key) not in (None, trained.get(key))]
    if rows is None or not asked:
        return rows
    if not trained.get("dataset"):
        raise DataError(
            f"merge: {', '.join(asked)} cannot be followed: the rows that the adapter keeps ({CALIBRATION}) are tokens "
            "already, and it names no training set to read again",
            hint="leave it out, or give rows as " + worded(flags="--dataset", python="calibration="),
        )
    return None


def given_rows(reader: Reader, dataset: Dataset, trained: Sequence[Mapping[str, Any]], measured: bool) -> Found:
    """The rows of a dataset; where it is the training set of all adapters, `measured` on what they held out of it."""
    task, held, said = reader.samples(dataset, trained[0] if trained else {}), None, list[str]()
    own = [_holds_out(each) and dataset == each["dataset"] and reader.changed_rows(each) is None for each in trained]
    if measured and own and all(own):
        task, held, said = _training_held_out(reader, task, trained)
    return Found(task, held, len(task), "the rows given", said)


def brought_rows(
    reader: Reader, adapters: Sequence[tuple[Mapping[str, Any], KeptRows | None]], measured: bool
) -> Found | None:
    """The rows that adapters keep, and for those that keep none, of their training sets; None where there are none at all."""
    keeping = [rows for _, rows in adapters if rows is not None]
    named = [arguments for arguments, rows in adapters if rows is None and arguments.get("dataset")]
    if not keeping and not named:
        return None
    whole = all(_holds_out(each) if rows is None else rows.of(held_out=True) for each, rows in adapters)
    parts = [
        *([_kept_rows(reader, keeping, measured and whole)] if keeping else []),
        *([_named_rows(reader, named, measured, measured and whole)] if named else []),
    ]
    return parts[0] if len(parts) == 1 else _together(*parts)


def _together(kept: Found, named: Found) -> Found:
    """Both, each row once; held-out rows are those that neither has learned."""
    new = _besides(named.task, kept.task)
    task = kept.task + new
    held = [*(kept.held or ()), *_besides(named.held or (), kept.held or ())]
    held = _besides(held, task)
    said = [*kept.measured_on, *named.measured_on] if held else []
    return Found(task, held or None, kept.size + len(new), f"{kept.source}, and {named.source}", said)


def _besides(samples: Iterable[Sample], others: Iterable[Sample]) -> list[Sample]:
    """Those that are none of the others."""
    known = {(*each.input_ids, *each.labels) for each in others}
    return [each for each in samples if (*each.input_ids, *each.labels) not in known]


def _kept_rows(reader: Reader, keeping: Sequence[KeptRows], measured: bool) -> Found:
    rows = united_rows(keeping)
    embedding: Any = reader.model.get_input_embeddings()
    check_text(reader.tokenizer, rows, embedding.num_embeddings)
    task, held = (samples_of(rows.of(held_out)) for held_out in (False, True))
    whose = "the adapter keeps" if len(keeping) == 1 else f"{len(keeping)} adapters keep"
    source, size = f"the rows that {whose} ({CALIBRATION}): {len(task)} rows", rows.learned
    if not measured or not held:
        return Found(task, None, size, source, [])
    return Found(task, held, size, source, [f"measured on what was held out: {len(held)} rows that {whose}"])


def _named_rows(reader: Reader, named: Sequence[Mapping[str, Any]], checked: bool, measured: bool) -> Found:
    """`checked`: the held-out rows, too, are those of then."""
    for arguments in named:
        reader.check_rows(arguments, checked)
    task, held, said = _once(row for each in named for row in reader.samples(each["dataset"], each)), None, list[str]()
    source = f"the training set: {', '.join(dict.fromkeys(arguments['dataset'] for arguments in named))}"
    if measured:
        task, held, said = _training_held_out(reader, task, named)
    return Found(task, held, len(task), source, said)


def _holds_out(arguments: Mapping[str, Any]) -> bool:
    """Whether a run knew rows that it was not trained on, by its arguments."""
    return bool(arguments.get("dataset") and (arguments.get("eval_dataset") or arguments.get("val_size")))


def _training_held_out(
    reader: Reader, task: list[Sample], trained: Sequence[Mapping[str, Any]]
) -> tuple[list[Sample], list[Sample] | None, list[str]]:
    """(rows to calibrate on, rows that the trainings held out or None where none did, what to say of them)."""
    kept_back, seen, held, said = set[str](), set[str](), list[Sample](), []
    for arguments in trained:
        if name := arguments.get("eval_dataset"):
            held += reader.samples(name, arguments)
            said.append(f"measured on the run's held-out set: {name}")
        elif size := arguments.get("val_size"):
            learned, back = hold_out(reader.trained_on(arguments), size, arguments.get("seed", TRAINED_SEED))
            kept_back |= {sample.source for sample in back}
            seen |= {sample.source for sample in learned}
            said.append(f"measured on what the run held out of {arguments['dataset']} (val_size {size:g})")
    held = _once([*held, *(sample for sample in task if sample.source in kept_back - seen)])
    rest = [sample for sample in task if sample.source not in kept_back]
    if kept_back and not held:
        return task, None, ["none of the rows that were held out can be told from those that were learned"]
    return (rest, held, list(dict.fromkeys(said))) if held else (task, None, [])


def _once(samples: Iterable[Sample]) -> list[Sample]:
    """Each row once that several adapters were trained on, but for one that they were asked in another way."""
    return list({(each.source, each.part, *each.input_ids, *each.labels): each for each in samples}.values())
