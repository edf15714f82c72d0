"""Which rows calibrate a merge, which judge its steps, and which measure what was kept.

    the adapter's task   calibrating rows | judging rows | measuring rows (the run's held-out set where there is one)
    unrelated text       calibrating rows | judging rows | measuring rows       neutral.jsonl: even lines | odd lines

The unrelated text is there because the moments of the task alone leave directions free in which the merged model may
drift, and because drift must be measured on text that neither calibrated nor judged.

A few thousand tokens are enough: a row of a Q4_1 weight has 36 to 96 numbers to solve for. Models of billions of weights, for
which a token costs ten and more gigaflops, are given a quarter of them.
"""

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from itertools import islice
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qgraft.adapters.base import base_of
from qgraft.data.held_out import hold_out
from qgraft.data.messages import Conversation
from qgraft.data.reading import Accounting, Dataset, as_dataset, named_columns, read_dataset
from qgraft.data.templates import remembered_template
from qgraft.data.tokenizing import IGNORED, ChatGlmOptions, Sample, WritesPrompts, build_samples, resolve_template
from qgraft.errors import DataError, OptionError, worded
from qgraft.linear import QuantizedLinear
from qgraft.passes.limits import sample_limit, stated_ends

TASK_TOKENS, NEUTRAL_TOKENS = 4096, 1536  # that calibrate and judge
MEASURE_TOKENS, DRIFT_TOKENS = 1536, 1024  # to measure: of the task, of unrelated text
FULL_WEIGHTS, FEWEST_SHARE = 4e8, 0.25  # up to so many weights all these tokens; larger models this share at least
JUDGED = 12  # one row of so many judges
LONGEST = 512  # tokens of a calibrating row
FEW_ROWS = 200  # below it a merge says what to expect
TRAINED_LENGTH, TRAINED_SEED = 2048, 42  # of a run whose arguments do not say it: their defaults in TrainArguments
FEWEST_ROWS, FEWEST_TOKENS = 4, 128
# Options of reading rows, as evaluate() has them; all but the last are remembered by adapters
READING = ("dataset_dir", "template", "system", "name", "author", "allow_outside_files")


@dataclass(frozen=True)
class Calibration:
    """Samples by what they are for; no sample is in two lists.

    Attributes:
        fit, judge: of the task and of unrelated text.
        measure: of the task.
        drift: of unrelated text.
        held_out: whether `measure` was given apart from the calibration rows.
        notes: what a reader should know of the choice.
    """

    fit: list[Sample]
    judge: list[Sample]
    measure: list[Sample]
    drift: list[Sample]
    held_out: bool
    notes: tuple[str, ...] = ()

    def tokens(self) -> int:
        """How many tokens calibrate and judge."""
        return _tokens([*self.fit, *self.judge])


def find_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    calibration: Dataset | None,
    eval_dataset: Dataset | None,
    trained: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
    seed: int,
) -> Calibration | None:
    """The rows that the caller gives, or else those that the adapters were trained on; None where neither is there.

    Args:
        trained: the arguments that each adapter was trained with, empty where they are not known.
        options: any of READING; what is not given is as in training.

    Raises DataError, OptionError.
    """
    calibration, eval_dataset = (None if each is None else as_dataset(each) for each in (calibration, eval_dataset))
    if unknown := [key for key in options if key not in READING]:
        raise OptionError(f"merge: unknown option {unknown[0]!r}; options of reading rows: {', '.join(READING)}")
    tokenizer = tokenizer or base_of(model).tokenizer
    if tokenizer is None:
        raise OptionError(
            "merge: the model came without a tokenizer",
            hint=worded(flags="put its vocabulary file beside config.json", python="give tokenizer="),
        )
    reader = _Reader(model, tokenizer, options)
    first: Mapping[str, Any] = trained[0] if trained else {}
    known = [arguments for arguments in trained if arguments.get("dataset")]
    if calibration is not None:
        task, source = reader.samples(calibration, first), "the rows given"
    elif known:
        for arguments in known:
            reader.check_rows(arguments, eval_dataset is None)
        task = _once(sample for each in known for sample in reader.samples(each["dataset"], each))
        source = f"the training set: {', '.join(dict.fromkeys(arguments['dataset'] for arguments in known))}"
    else:
        return None
    held, notes = None, [f"calibrated on {source}"]
    if eval_dataset is not None:
        held = reader.samples(eval_dataset, first)
    elif known and all(
        _holds_out(each)
        and (calibration is None or (calibration == each["dataset"] and reader.changed_rows(each) is None))
        for each in trained
    ):
        task, held, said = _training_held_out(reader, task, known)
        notes += said
    if not task:
        raise DataError("calibration: the dataset holds no rows", hint="give rows of the adapter's task")
    if len(task) < FEW_ROWS:
        notes.append(
            f"a set of {len(task)} rows: with fewer than about {FEW_ROWS} a merge keeps less, and what it keeps is measured "
            "roughly; more rows of the kind can be given as " + worded(flags="--dataset", python="calibration=")
        )
    chosen, share = choose_samples(task, held, tokenizer, seed, *notes), _share(model)
    fit, judge, measure, drift = (
        _evenly(rows, share) for rows in (chosen.fit, chosen.judge, chosen.measure, chosen.drift)
    )
    return replace(chosen, fit=fit, judge=judge, measure=measure, drift=drift)


def _share(model: PreTrainedModel) -> float:
    """Which part of the tokens a model of this size is given: less, as the root of its size grows."""
    linear = [each for each in model.modules() if isinstance(each, QuantizedLinear | nn.Linear)]
    weights = sum(each.in_features * each.out_features for each in linear)
    return max(FEWEST_SHARE, min(1.0, (FULL_WEIGHTS / max(weights, 1)) ** 0.5))


@dataclass(frozen=True)
class _Reader:
    """Reads rows as the adapters' trainings did, where the caller says nothing else."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    options: Mapping[str, Any]

    def samples(
        self, dataset: Dataset, arguments: Mapping[str, Any], longest: int = LONGEST, most: int | None = None
    ) -> list[Sample]:
        rows, accounting, columns = self._read(dataset, arguments, most)
        chosen = self.options.get("template") or remembered_template(arguments)
        template = resolve_template(self.tokenizer, chosen, enable_thinking=arguments.get("enable_thinking"),
                                    system_text=arguments.get("system_text", "question"))  # fmt: skip
        system = self.options.get("system") or arguments.get("system")
        return build_samples(self.tokenizer, rows, accounting, template=template, system=system,
                             max_length=sample_limit(self.model, longest),
                             mask_reasoning=bool(arguments.get("mask_reasoning")), eos_ids=stated_ends(self.model),
                             chatglm=ChatGlmOptions(numbered="history" in (columns or ())))  # fmt: skip

    def _read(
        self, dataset: Dataset, arguments: Mapping[str, Any], most: int | None
    ) -> tuple[list[Conversation], Accounting, dict[str, str] | None]:
        folder, name, author = (
            self.options.get(key) or arguments.get(key) for key in ("dataset_dir", "name", "author")
        )
        known = dataset in (arguments.get("dataset"), arguments.get("eval_dataset"))
        columns = named_columns(arguments) if known else None
        rows, accounting = read_dataset(dataset, folder, name=name, author=author, columns=columns, max_samples=most,
                                        allow_outside_files=bool(self.options.get("allow_outside_files")))  # fmt: skip
        return rows, accounting, columns

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

    def trained_on(self, arguments: Mapping[str, Any]) -> list[Sample]:
        """All samples of a run before it held some out, as long as it had them: which rows gave one decides the choice."""
        most = arguments.get("max_train_samples") or arguments.get("max_samples")
        return self.samples(arguments["dataset"], arguments, arguments.get("max_length", TRAINED_LENGTH), most)


def _evenly(rows: list[Sample], share: float) -> list[Sample]:
    """This share of the rows, from all over the list; at least one."""
    return [row for n, row in enumerate(rows) if int((n + 1) * share) > int(n * share)] or rows[:1]


def _holds_out(arguments: Mapping[str, Any]) -> bool:
    """Whether a run knew rows that it was not trained on, by its arguments."""
    return bool(arguments.get("dataset") and (arguments.get("eval_dataset") or arguments.get("val_size")))


def _training_held_out(
    reader: _Reader, task: list[Sample], trained: Sequence[Mapping[str, Any]]
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
    return (rest, held, list(dict.fromkeys(said))) if held else (task, None, [])


def _once(samples: Iterable[Sample]) -> list[Sample]:
    """Each row once that several adapters were trained on, but for one that they were asked in another way."""
    return list({(each.source, each.part, *each.input_ids, *each.labels): each for each in samples}.values())


def choose_samples(
    task: Sequence[Sample],
    measure: Sequence[Sample] | None,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    *notes: str,
) -> Calibration:
    """Share out the rows of a task, and the neutral ones.

    Raises DataError for fewer than FEWEST_ROWS rows or FEWEST_TOKENS tokens.
    """
    if len(task) < FEWEST_ROWS or _tokens(task) < FEWEST_TOKENS:
        raise DataError(
            f"calibration: got {len(task)} rows with {_tokens(task)} tokens, "
            f"expected at least {FEWEST_ROWS} rows with {FEWEST_TOKENS} tokens",
            hint="give more rows of the kind that the adapter was trained on: "
            + worded(flags="--dataset", python="calibration="),
        )
    rows = random.Random(seed).sample(list(task), len(task))
    if measure is None:
        measured = _up_to(rows[: max(1, len(rows) // 4)], MEASURE_TOKENS)
        rows = rows[len(measured) :]
    else:
        measured = _up_to(measure, MEASURE_TOKENS)
    chosen = _up_to(rows, TASK_TOKENS)
    neutral = neutral_samples(tokenizer)
    fit, judge = _judging(chosen)
    neutral_fit, neutral_judge = _judging(_up_to(neutral[0::2], NEUTRAL_TOKENS))
    drift = _up_to(neutral[1::2], DRIFT_TOKENS)
    return Calibration(fit + neutral_fit, judge + neutral_judge, measured, drift, measure is not None, notes)


def neutral_samples(tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
    """The passages of neutral.jsonl, every token a label, of weight 0: what is predicted there counts, not the passage.

    Where the tokenizer writes samples itself, they are answers to an empty question: ChatGLM-6B reads a prompt in both
    directions, so that nothing in it is left to predict.
    """
    lines = (resources.files("qgraft.merging") / "neutral.jsonl").read_text(encoding="utf-8").splitlines()
    samples = []
    for number, line in enumerate(lines, 1):
        text = json.loads(line)["text"]
        if isinstance(tokenizer, WritesPrompts):
            ids, labels = tokenizer.sample_ids([("user", ""), ("assistant", text)])
        else:
            ids = list(tokenizer(text)["input_ids"])
            labels = [IGNORED, *ids[1:]]
        samples.append(Sample(ids, labels, f"neutral:{number}", weights=[0.0] * len(ids)))
    return samples


def _judging(rows: list[Sample]) -> tuple[list[Sample], list[Sample]]:
    """(rows to fit, rows to judge by); at least one of each."""
    return [row for n, row in enumerate(rows) if n % JUDGED], rows[::JUDGED]


def _up_to(rows: Sequence[Sample], tokens: int) -> list[Sample]:
    """The first rows that hold so many tokens together; at least two."""
    total, count = 0, 0
    for row in rows:
        total += len(row.input_ids)
        if total > tokens and count >= 2:
            break
        count += 1
    return list(islice(rows, count))


def _tokens(samples: Sequence[Sample]) -> int:
    return sum(len(sample.input_ids) for sample in samples)
