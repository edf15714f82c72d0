"""Which rows calibrate a merge, which judge its steps, and which measure what was kept.

The rows of the task are those that are given, else those that the adapters keep (adapters/kept_rows.py), else the training
sets that they name.

    the adapter's task   calibrating rows | judging rows | measuring rows (the run's held-out set where there is one)
                         | further rows, for rounds of distilling
    unrelated text       calibrating rows | judging rows | measuring rows       neutral.jsonl: even lines | odd lines

The unrelated text is there because the moments of the task alone leave directions free in which the merged model may
drift, and because drift must be measured on text that neither calibrated nor judged.

A few thousand tokens are enough: a row of a Q4_1 weight has 36 to 96 numbers to solve for. Models of billions of weights, for
which a token costs ten and more gigaflops, are given a quarter of them.
"""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from itertools import islice
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qgraft.adapters.base import base_of
from qgraft.adapters.kept_rows import LONGEST, KeptRows
from qgraft.data.label_samples import LabelSample
from qgraft.data.reading import Dataset, as_dataset
from qgraft.data.tokenizing import IGNORED, Sample, WritesPrompts
from qgraft.errors import DataError, OptionError, worded
from qgraft.linear import QuantizedLinear
from qgraft.merging.task_rows import READING, Reader, as_asked, brought_rows, given_rows
from qgraft.passes.limits import sample_limit

TASK_TOKENS, NEUTRAL_TOKENS = 4096, 1536  # that calibrate and judge
MEASURE_TOKENS, DRIFT_TOKENS = 1536, 1024  # to measure: of the task, of unrelated text
LABELLED = 4  # times as many of the task for a classifier, whose rows say one thing each and need no vocabulary
FULL_WEIGHTS, FEWEST_SHARE = 4e8, 0.25  # up to so many weights all these tokens; larger models this share at least
FURTHER, LEAST_PART = 3, 0.75  # parts of further rows, and how much of the tokens of the first there must be in one
JUDGED = 12  # one row of so many judges
FEW_ROWS = 200  # below it a merge says what to expect
FEWEST_ROWS, FEWEST_TOKENS = 4, 128


@dataclass(frozen=True)
class Calibration:
    """Samples by what they are for; no sample is in two lists.

    Attributes:
        fit, judge: of the task and of unrelated text.
        further: what a round of distilling after another learns from instead of `fit`, as long as there is some: as many
            tokens of the task that nothing has seen, and the unrelated text again.
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
    further: tuple[list[Sample], ...] = ()

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
    kept: Sequence[KeptRows | None] = (),
) -> Calibration | None:
    """The rows that the caller gives, or else those that the adapters were trained on; None where neither is there.

    Args:
        trained: the arguments that each adapter was trained with, empty where they are not known.
        options: any of READING; what is not given is as in training.
        kept: the rows that each adapter brings. One whose rows shall be read in another way is asked for its training set.

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
    reader = Reader(model, tokenizer, options)
    first: Mapping[str, Any] = trained[0] if trained else {}
    if calibration is None:
        pairs = zip(trained, kept or [None] * len(trained), strict=True)
        found = brought_rows(
            reader, [(each, as_asked(rows, each, options)) for each, rows in pairs], eval_dataset is None
        )
    else:
        found = given_rows(reader, calibration, trained, eval_dataset is None)
    if found is None:
        return None
    task, held, size, notes = (
        found.task,
        found.held,
        found.size,
        [f"rows of the task: {found.source}", *found.measured_on],
    )
    if eval_dataset is not None:
        held = reader.samples(eval_dataset, first)
    if not task:
        raise DataError("calibration: the dataset holds no rows", hint="give rows of the adapter's task")
    if size < FEW_ROWS:
        notes.append(
            f"a set of {size} rows: with fewer than about {FEW_ROWS} a merge keeps less, and what it keeps is measured "
            "roughly; more rows of the kind can be given as " + worded(flags="--dataset", python="calibration=")
        )
    labelled = reader.classifier is not None
    neutral = neutral_texts(tokenizer, sample_limit(model, LONGEST)) if labelled else neutral_samples(tokenizer)
    chosen = choose_samples(task, held, neutral, seed, *notes, times=LABELLED if labelled else 1)
    share = _share(model)
    fit, judge, measure, drift, *further = (
        _evenly(rows, share) for rows in (chosen.fit, chosen.judge, chosen.measure, chosen.drift, *chosen.further)
    )
    return replace(chosen, fit=fit, judge=judge, measure=measure, drift=drift, further=tuple(further))


def _share(model: PreTrainedModel) -> float:
    """Which part of the tokens a model of this size is given: less, as the root of its size grows."""
    linear = [each for each in model.modules() if isinstance(each, QuantizedLinear | nn.Linear)]
    weights = sum(each.in_features * each.out_features for each in linear)
    return max(FEWEST_SHARE, min(1.0, (FULL_WEIGHTS / max(weights, 1)) ** 0.5))


def _evenly(rows: list[Sample], share: float) -> list[Sample]:
    """This share of the rows, from all over the list; at least one."""
    return [row for n, row in enumerate(rows) if int((n + 1) * share) > int(n * share)] or rows[:1]


def choose_samples(
    task: Sequence[Sample],
    measure: Sequence[Sample] | None,
    neutral: Sequence[Any],
    seed: int,
    *notes: str,
    times: int = 1,
) -> Calibration:
    """Share out the rows of a task, `times` as many tokens as usual, and the neutral ones.

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
        measured = _up_to(rows[: max(1, len(rows) // 4)], times * MEASURE_TOKENS)
        rows = rows[len(measured) :]
    else:
        measured = _up_to(measure, times * MEASURE_TOKENS)
    chosen = _up_to(rows, times * TASK_TOKENS)
    fit, judge = _judging(chosen)
    neutral_fit, neutral_judge = _judging(_up_to(neutral[0::2], NEUTRAL_TOKENS))
    drift = _up_to(neutral[1::2], DRIFT_TOKENS)
    further = tuple(part + neutral_fit for part in _parts(rows[len(chosen) :], _tokens(fit)))
    return Calibration(fit + neutral_fit, judge + neutral_judge, measured, drift, measure is not None, notes, further)


def _parts(rows: list[Sample], tokens: int) -> Iterator[list[Sample]]:
    """The rows in up to FURTHER parts of about so many tokens each; what is left over is no part."""
    for _ in range(FURTHER):
        part = _up_to(rows, tokens)
        if _tokens(part) < LEAST_PART * tokens:
            return
        yield part
        rows = rows[len(part) :]


def neutral_samples(tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
    """The passages of neutral.jsonl, every token a label, of weight 0: what is predicted there counts, not the passage.

    Where the tokenizer writes samples itself, they are answers to an empty question: ChatGLM-6B reads a prompt in both
    directions, so that nothing in it is left to predict.
    """
    samples = []
    for number, text in enumerate(_passages(), 1):
        if isinstance(tokenizer, WritesPrompts):
            ids, labels = tokenizer.sample_ids([("user", ""), ("assistant", text)])
        else:
            ids = list(tokenizer(text)["input_ids"])
            labels = [IGNORED, *ids[1:]]
        samples.append(Sample(ids, labels, f"neutral:{number}", weights=[0.0] * len(ids)))
    return samples


def neutral_texts(tokenizer: PreTrainedTokenizerBase, longest: int) -> list[LabelSample]:
    """The same for a classifier: without labels."""
    found = [tokenizer(text, truncation=True, max_length=longest, verbose=False) for text in _passages()]
    return [LabelSample(list(each["input_ids"]), [], f"neutral:{number}",
                        None if (kinds := each.get("token_type_ids")) is None else list(kinds))
            for number, each in enumerate(found, 1)]  # fmt: skip


def _passages() -> list[str]:
    lines = (resources.files("qgraft.merging") / "neutral.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


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
