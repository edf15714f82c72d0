"""Which rows do what: no row does two things, and budgets hold."""

import itertools
import json
import math
from importlib import resources
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qgraft
from qgraft.data.tokenizing import IGNORED, Sample
from qgraft.errors import DataError, OptionError
from qgraft.merging import calibration
from qgraft.merging.calibration import Calibration, choose_samples, find_rows, neutral_samples
from qgraft.merging.task_rows import TRAINED_LENGTH, TRAINED_SEED


class Letters:
    """A tokenizer of one token a letter."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


def rows_of(lengths: list[int], name: str = "task") -> list[Sample]:
    return [Sample([7] * length, [IGNORED] + [7] * (length - 1), f"{name} {n}") for n, length in enumerate(lengths)]


def sources(samples: list[Sample]) -> list[str]:
    return [sample.source for sample in samples]


def tokens(samples: list[Sample]) -> int:
    return sum(len(sample.input_ids) for sample in samples)


def of_task(chosen: Calibration) -> list[Sample]:
    return [sample for sample in chosen.fit + chosen.judge if not sample.source.startswith("neutral")]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 512), min_size=4, max_size=120).filter(lambda each: sum(each) >= 128),
    held=st.one_of(st.none(), st.lists(st.integers(2, 512), min_size=1, max_size=40)),
    seed=st.integers(0, 9),
)
def test_rows_are_shared_out(lengths: list[int], held: list[int] | None, seed: int) -> None:
    task, measure = rows_of(lengths), None if held is None else rows_of(held, "held")
    chosen = choose_samples(task, measure, neutral_samples(Letters()), seed, "a note")
    lists = [chosen.fit, chosen.judge, chosen.measure, chosen.drift]
    assert all(lists)
    parts = [[each for each in part if not each.source.startswith("neutral")] for part in chosen.further]
    together = [source for each in (*lists, *parts) for source in sources(each)]
    assert len(together) == len(set(together))  # no sample is in two lists
    calibrating = of_task(chosen)
    assert set(sources(calibrating)) <= set(sources(task))
    for each in (chosen.fit, chosen.judge):  # the task and unrelated text are in both
        assert {source.split()[0].split(":")[0] for source in sources(each)} == {"task", "neutral"}
    assert 5 * len(chosen.judge) <= len(chosen.fit) + 10
    for samples, budget in ((calibrating, calibration.TASK_TOKENS), (chosen.measure, calibration.MEASURE_TOKENS)):
        assert tokens(samples) <= budget or len(samples) == 2
    if measure is None:
        assert set(sources(chosen.measure)) <= set(sources(task)) and not chosen.held_out
        assert len(chosen.measure) <= max(1, len(task) // 4)
    else:
        assert sources(chosen.measure) == sources(measure)[: len(chosen.measure)] and chosen.held_out
    left_out = len(task) - len(calibrating) - (0 if held else len(chosen.measure))
    if left_out:  # only because the budget is full
        assert tokens(calibrating) + 512 > calibration.TASK_TOKENS
    fit = tokens([sample for sample in calibrating if sample not in chosen.judge])
    for part, further in zip(parts, chosen.further, strict=True):
        assert 0.75 * fit <= tokens(part) <= max(fit, max(lengths) * 2)
        assert further[len(part) :] == [each for each in chosen.fit if each.source.startswith("neutral")]
    assert len(parts) == 3 or left_out - sum(map(len, parts)) < calibration.TASK_TOKENS / 2
    assert chosen.notes == ("a note",) and chosen.tokens() == tokens(chosen.fit) + tokens(chosen.judge)


def test_the_seed_chooses() -> None:
    task = rows_of([30] * 40)
    one, again, other = (choose_samples(task, None, neutral_samples(Letters()), seed) for seed in (0, 0, 1))
    assert sources(one.fit) == sources(again.fit) != sources(other.fit)
    assert sources(one.measure) == sources(again.measure) != sources(other.measure)
    assert sources(one.drift) == sources(other.drift)


def test_unrelated_text_that_measures_is_every_other_line() -> None:
    chosen = choose_samples(rows_of([60] * 8), None, neutral_samples(Letters()), 0)
    number = {source: int(source.partition(":")[2]) for source in sources(chosen.fit + chosen.judge + chosen.drift)
              if source.startswith("neutral")}  # fmt: skip
    assert {number[source] % 2 for source in sources(chosen.drift)} == {0}
    assert {number[source] % 2 for source in number if source not in sources(chosen.drift)} == {1}
    calibrating = [s for s in chosen.fit + chosen.judge if s.source in number]
    assert calibration.NEUTRAL_TOKENS - 600 < tokens(calibrating) <= calibration.NEUTRAL_TOKENS
    assert calibration.DRIFT_TOKENS - 600 < tokens(chosen.drift) <= calibration.DRIFT_TOKENS


def test_every_line_of_unrelated_text_is_text_and_none_is_there_twice() -> None:
    lines = (resources.files("qgraft.merging") / "neutral.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    samples = neutral_samples(Letters())
    assert len(samples) == len(texts) == len(set(texts)) >= 40
    for text, sample in zip(texts, samples, strict=True):
        assert "".join(map(chr, sample.input_ids)) == text.strip() == text
        assert sample.labels == [IGNORED, *sample.input_ids[1:]]
    assert {json.loads(line)["lang"] for line in lines} >= {"en", "zh"}


@pytest.mark.parametrize(
    ("lengths", "told"),
    [([200, 200, 200], "got 3 rows with 600 tokens"), ([10] * 12, "got 12 rows with 120 tokens"), ([9], "got 1 rows")],
)
def test_too_few_rows_are_refused_with_the_figures(lengths: list[int], told: str) -> None:
    with pytest.raises(DataError, match=told + ".*expected at least 4 rows with 128 tokens") as caught:
        choose_samples(rows_of(lengths), rows_of([100] * 9), neutral_samples(Letters()), 0)
    assert "calibration=" in caught.value.hint


# ---------------------------------------------------------------- where the rows come from


def write_rows(path: Any, rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_what_is_given_comes_before_what_is_remembered(tiny_gguf, rows, tmp_path):
    model, tokenizer = qgraft.load(tiny_gguf().path)
    task, held = write_rows(tmp_path / "task.jsonl", rows), write_rows(tmp_path / "held.jsonl", rows[:6])
    remembered = [{"dataset": task, "eval_dataset": held, "system": "Remembered."}]

    def find(trained: Any, given: Any = None, measure: Any = None, **options: str) -> Any:
        return find_rows(model, tokenizer, given, measure, trained, options, 0)

    def texts(samples: list[Sample]) -> list[str]:
        return [tokenizer.decode(sample.input_ids) for sample in samples]

    assert find([]) is None and find([{}]) is None and find([{"dataset": None}]) is None
    whole = find(remembered)
    assert (
        whole.held_out and len(whole.measure) == 6 and whole.notes[0] == f"rows of the task: the training set: {task}"
    )
    assert all("Remembered." in text for text in texts(of_task(whole) + whole.measure))
    given = find(remembered, rows[:12])
    assert not given.held_out and len(of_task(given)) + len(given.measure) == 12
    assert given.notes[0] == "rows of the task: the rows given"
    assert all("Remembered." in text for text in texts(of_task(given)))  # read as in training all the same
    told = find(remembered, None, rows[:3], system="Told.")
    assert told.held_out and len(told.measure) == 3
    assert all("Told." in text and "Remembered." not in text for text in texts(of_task(told) + told.measure))
    one_unknown = find([*remembered, {"dataset": task}])
    assert not one_unknown.held_out and len(of_task(one_unknown)) + len(one_unknown.measure) == 2 * len(rows)


@pytest.mark.parametrize("by", ["val_size", "eval_dataset"])
def test_rows_that_two_adapters_share_are_counted_once(tiny_gguf, rows, tmp_path, by):
    model, tokenizer = qgraft.load(tiny_gguf().path)
    task, back = write_rows(tmp_path / "task.jsonl", rows), write_rows(tmp_path / "back.jsonl", rows[:5])
    trained = {"dataset": task, by: 0.25 if by == "val_size" else back}

    def found(*adapters: dict[str, Any]) -> Any:
        return find_rows(model, tokenizer, None, None, adapters, {}, 0)

    one, two = found(trained), found(trained, dict(trained))
    assert one.held_out and (one.fit, one.judge, one.measure, one.notes) == (two.fit, two.judge, two.measure, two.notes)
    asked_otherwise = found(trained, {**trained, "system": "Answer in verse."})
    assert len(asked_otherwise.measure) == 2 * len(one.measure)


@pytest.mark.parametrize("options", [{"val_size": 0.25}, {"val_size": 5, "seed": 7, "max_train_samples": 12}])
@pytest.mark.parametrize("file", ["task.jsonl", "task.json"])  # the latter on one line
def test_what_a_run_held_out_measures_and_never_calibrates(tiny_gguf, rows, tmp_path, options, file):
    """As a run splits them: by its own functions."""
    from qgraft.training.arguments import TrainArguments
    from qgraft.training.samples import prepare_samples

    model, tokenizer = qgraft.load(tiny_gguf().path)
    task = write_rows(tmp_path / "task.jsonl", rows)
    if file != "task.jsonl":
        (tmp_path / file).write_text(json.dumps(rows), encoding="utf-8")
        task = str(tmp_path / file)
    args = TrainArguments(output_dir=str(tmp_path / "out"), dataset=task, use_cpu=True, **options)
    learned, held, *_ = prepare_samples(model, tokenizer, None, None, args, 128, [])
    assert (args.max_length, args.seed if "seed" not in options else 42) == (TRAINED_LENGTH, TRAINED_SEED)
    chosen = find_rows(model, tokenizer, None, None, [{"dataset": task, **options}], {}, 0)
    assert chosen is not None and chosen.held_out
    assert [sample.input_ids for sample in chosen.measure] == [sample.input_ids for sample in held]
    used = {sample.source for sample in of_task(chosen)}
    assert used and not used & {sample.source for sample in held}
    assert used >= {sample.source for sample in learned}
    assert any("measured on what the run held out of" in note for note in chosen.notes)


@pytest.mark.parametrize("limit", [{}, {"max_samples": 10}])
def test_other_rows_than_those_of_the_training_are_refused_unless_they_are_given(tiny_gguf, rows, tmp_path, limit):
    model, tokenizer = qgraft.load(tiny_gguf().path)
    task, back = write_rows(tmp_path / "task.jsonl", rows), write_rows(tmp_path / "back.jsonl", rows[:5])
    args = qgraft.TrainArguments(output_dir=str(tmp_path / "out"), eval_dataset=back, use_cpu=True, max_steps=1,
                                 eval_strategy="no", save_strategy="no", plot_loss=False, **limit)  # fmt: skip
    qgraft.train(model, tokenizer, task, args)
    trained = [qgraft.adapters.base.find_adapter(model, None).trained]
    assert find_rows(model, tokenizer, None, None, trained, {}, 0).held_out
    write_rows(tmp_path / "back.jsonl", rows[1:6])
    with pytest.raises(DataError, match=r"(?s)back\.jsonl holds other rows than .*hint: .*calibration="):
        find_rows(model, tokenizer, None, None, trained, {}, 0)
    write_rows(tmp_path / "back.jsonl", rows[:5])
    write_rows(tmp_path / "task.jsonl", rows[::-1])
    with pytest.raises(DataError, match=r"task\.jsonl holds other rows than"):
        find_rows(model, tokenizer, None, None, trained, {}, 0)
    given = find_rows(model, tokenizer, task, None, trained, {}, 0)
    assert not given.held_out and given.notes[0] == "rows of the task: the rows given"


def test_the_tokenizer_of_the_model_serves_where_none_is_given(tiny_gguf, rows):
    model, tokenizer = qgraft.load(tiny_gguf().path)
    own = find_rows(model, None, rows, None, [], {}, 0)
    assert own is not None
    assert own.fit == find_rows(model, tokenizer, rows, None, [], {}, 0).fit
    model.qgraft.tokenizer = None
    with pytest.raises(OptionError, match="came without a tokenizer"):
        find_rows(model, None, rows, None, [], {}, 0)


def test_rows_are_cut_at_the_models_context(tiny_gguf, rows):
    model, tokenizer = qgraft.load(tiny_gguf().path)
    long = [*rows, {"instruction": "x", "output": "word " * 400}]
    chosen = find_rows(model, tokenizer, long, rows, [], {}, 0)
    assert max(len(sample.input_ids) for sample in of_task(chosen)) == model.config.max_position_embeddings == 128


def test_no_rows_at_all_are_refused(tiny_gguf):
    model, tokenizer = qgraft.load(tiny_gguf().path)
    for empty in ([], [{"instruction": "q", "output": ""}]):
        with pytest.raises(DataError):
            find_rows(model, tokenizer, empty, None, [], {}, 0)
    with pytest.raises(OptionError, match="unknown option 'max_length'; options of reading rows: dataset_dir"):
        find_rows(model, tokenizer, None, None, [], {"max_length": "7"}, 0)


@pytest.mark.parametrize(("weights", "share"), [(1e8, 1.0), (4e8, 1.0), (1.6e9, 0.5), (6.4e9, 0.25), (1e11, 0.25)])
def test_large_models_are_given_fewer_tokens(weights, share):
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(round(weights / 1e4), 10_000, bias=False))
    assert calibration._share(model) == pytest.approx(share)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9, 1.0])
def test_a_share_of_rows_comes_from_all_over_them(share):
    rows = [Sample([n], [n], str(n)) for n in range(40)]
    taken = [sample.input_ids[0] for sample in calibration._evenly(rows, share)]
    assert len(taken) == 40 * share and taken == sorted(set(taken))
    assert max(b - a for a, b in itertools.pairwise(taken)) <= math.ceil(1 / share)
    assert len(calibration._evenly(rows[:1], share)) == 1
