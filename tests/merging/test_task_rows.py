"""Where the rows of a merge come from: with those that the adapter keeps it is the merge that the training set would give."""

import json
from pathlib import Path
from typing import Any

import pytest

import qgraft
from qgraft.adapter_files.calibration import CALIBRATION, keep_samples
from qgraft.adapters.base import find_adapter, selection_of
from qgraft.data.tokenizing import Sample
from qgraft.errors import DataError
from qgraft.merging import calibration
from qgraft.merging.calibration import Calibration, find_rows
from qgraft.training.arguments import TrainArguments
from qgraft.training.samples import prepare_samples


@pytest.fixture(autouse=True)
def _little_unrelated_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "NEUTRAL_TOKENS", 300)
    monkeypatch.setattr(calibration, "DRIFT_TOKENS", 200)


def write_rows(path: Path, rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def options_of(folder: Path, **options: Any) -> TrainArguments:
    return TrainArguments(
        output_dir=str(folder), use_cpu=True, max_steps=2, save_strategy="no", plot_loss=False, r=2,
        eval_strategy="no", **options,
    )  # fmt: skip


def kept_and_named(model: Any, tokenizer: Any, tmp_path: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    """(what a run of these options keeps, what it remembers), without training."""
    args = options_of(tmp_path / "out", **options)
    learned, held, *_ = prepare_samples(model, tokenizer, None, None, args, 128, [])
    return keep_samples(tokenizer, learned, held, args.seed), options


def plain(samples: list[Sample]) -> list[Any]:
    return [(each.input_ids, each.labels, each.weights) for each in samples]


def numbers(chosen: Calibration) -> list[Any]:
    return [plain(part) for part in (chosen.fit, chosen.judge, chosen.measure, chosen.drift)]


@pytest.mark.parametrize("options", [{}, {"val_size": 0.25}, {"system": "Be brief."}, {"eval": True}])
def test_kept_rows_are_those_that_the_training_set_gives(tiny_gguf, rows, tmp_path, options):
    model, tokenizer = qgraft.load(tiny_gguf().path)
    task, held = write_rows(tmp_path / "task.jsonl", rows[:14]), write_rows(tmp_path / "held.jsonl", rows[14:])
    options = {"dataset": task, **({"eval_dataset": held} if "eval" in options else options)}
    kept, trained = kept_and_named(model, tokenizer, tmp_path, **options)
    named = find_rows(model, tokenizer, None, None, [trained], {}, 3)
    Path(task).unlink()
    Path(held).unlink()
    brought = find_rows(model, tokenizer, None, None, [trained], {}, 3, [kept])
    assert numbers(brought) == numbers(named) and brought.held_out == named.held_out == (
        len(options) > 1 and "system" not in options
    )
    count = len(kept.of(held_out=False))
    assert brought.notes[0] == f"rows of the task: the rows that the adapter keeps ({CALIBRATION}): {count} rows"
    assert brought.held_out == any("measured on what was held out" in note for note in brought.notes)
    with pytest.raises(DataError):
        find_rows(model, tokenizer, None, None, [trained], {}, 3)


@pytest.mark.parametrize("val_size", [0.0, 0.25])
@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_a_training_set_of_preferences_gives_the_answers_that_were_learned(tiny_gguf, tmp_path, stage, val_size):
    """Those chosen or wanted, which a run keeps: merging without what it kept goes by the same rows."""
    model, tokenizer = qgraft.load(tiny_gguf().path)
    pairs = [{"prompt": f"question {i}", "chosen": f"good {i} " * 3, "rejected": f"bad {i}"} for i in range(24)]
    single = [{"prompt": f"question {i}", "completion": f"answer {i} " * 3, "label": i % 3 > 0} for i in range(24)]
    task = write_rows(tmp_path / "task.jsonl", single if stage == "kto" else pairs)
    options = {"dataset": task, "stage": stage, **({"val_size": val_size} if val_size else {})}
    args = options_of(tmp_path / "out", **options)
    learned, held, accounting, _ = prepare_samples(model, tokenizer, None, None, args, 128, [])
    answers = [[each.texts[0] for each in part if each.desirable is not False] for part in (learned, held)]
    kept = keep_samples(tokenizer, *answers, args.seed)
    trained = {**options, "rows_sha256": accounting.sha256}
    named = find_rows(model, tokenizer, None, None, [trained], {}, 3)
    assert numbers(named) == numbers(find_rows(model, tokenizer, None, None, [trained], {}, 3, [kept]))
    assert named.held_out == bool(val_size)
    answered = write_rows(
        tmp_path / "other.jsonl", [{"prompt": f"ask {i}", "response": "well " * 9} for i in range(24)]
    )
    assert find_rows(model, tokenizer, answered, None, [trained], {}, 3).fit
    write_rows(Path(task), pairs[:20] if stage == "dpo" else single[:20])
    with pytest.raises(DataError, match="holds other rows than the adapter was trained with"):
        find_rows(model, tokenizer, None, None, [trained], {}, 3)


@pytest.mark.parametrize("generation", ["chatglm", "chatglm2"])
def test_kept_rows_of_tokenizers_that_write_prompts(tiny_chatglm, rows, tmp_path, generation):
    model, tokenizer = qgraft.load(tiny_chatglm(generation))
    kept, trained = kept_and_named(
        model, tokenizer, tmp_path, dataset=write_rows(tmp_path / "task.jsonl", rows),
        prompt_column="instruction", response_column="output",
    )  # fmt: skip
    one, two = (find_rows(model, tokenizer, None, None, [trained], {}, 0, [each]) for each in (kept, None))
    assert numbers(one) == numbers(two) and one.notes[0] != two.notes[0]


def test_what_is_given_or_asked_for_wins(tiny_gguf, rows, tmp_path):
    model, tokenizer = qgraft.load(tiny_gguf().path)
    task = write_rows(tmp_path / "task.jsonl", rows)
    kept, trained = kept_and_named(model, tokenizer, tmp_path, dataset=task, system="Be brief.", val_size=4)

    def find(given: Any = None, measure: Any = None, arguments: Any = trained, **options: Any) -> Any:
        return find_rows(model, tokenizer, given, measure, [arguments], options, 0, [kept])

    assert find(rows).notes[0] == "rows of the task: the rows given"
    measured = find(None, rows[:3])
    assert (
        "keeps" in measured.notes[0] and len(measured.measure) == 3 and not any("what was" in n for n in measured.notes)
    )
    same = find(system="Be brief.", template=None, allow_outside_files=False)
    assert "keeps" in same.notes[0]
    anew = find(system="Else.")
    assert anew.notes[0] == f"rows of the task: the training set: {task}"
    assert all("Else." in tokenizer.decode(sample.input_ids) for sample in anew.measure)
    with pytest.raises(DataError, match="merge: template, system cannot be followed: the rows that the adapter keeps"):
        find(arguments={}, system="Else.", template="chatml")


def test_rows_of_several_adapters_are_put_together_each_once(tiny_gguf, rows, tmp_path):
    model, tokenizer = qgraft.load(tiny_gguf().path)
    whole, some = write_rows(tmp_path / "whole.jsonl", rows), write_rows(tmp_path / "some.jsonl", rows[:9])
    one, of_one = kept_and_named(model, tokenizer, tmp_path, dataset=whole)
    two, of_two = kept_and_named(model, tokenizer, tmp_path, dataset=some, system="Be brief.")
    back, of_back = kept_and_named(model, tokenizer, tmp_path, dataset=whole, val_size=5)
    held, counted = len(back.of(held_out=True)), []

    def find(*adapters: Any) -> tuple[int, int | None, str]:
        trained, kept = ([each[part] for each in adapters] for part in (1, 0))
        found = find_rows(model, tokenizer, None, None, trained, {}, 0, kept)
        small = next(note for note in found.notes if note.startswith("a set of "))
        counted.append(int(small.split()[3]))
        task = [each for each in (*found.fit, *found.judge) if not each.source.startswith("neutral")]
        if not found.held_out:
            task += found.measure
        return len(task), len(found.measure) if found.held_out else None, found.notes[0]

    assert find((one, of_one), (one, of_one))[:2] == (20, None)
    assert find((one, of_one), (None, of_one))[:2] == (20, None) and counted == [
        20,
        20,
    ]  # kept by one, named by another
    total, _, told = find((one, of_one), (two, of_two))
    assert total == 29 and f"the rows that 2 adapters keep ({CALIBRATION}): 29 rows" in told
    total, _, told = find((one, of_one), (None, of_two))  # one keeps rows, one names some
    assert total == 29 and told.endswith(f"20 rows, and the training set: {some}")
    assert find((None, {"dataset": some}), (one, of_one))[0] == 20
    assert find((back, of_back), (back, of_back))[:2] == (20 - held, held)
    assert find((back, of_back), (None, of_back))[:2] == (20 - held, held)
    assert find((back, of_back), (one, of_one))[:2] == (20, None)  # what one held out the other has learned
    assert find((None, {}), (one, of_one))[:2] == (20, None)


def test_a_run_keeps_rows_and_its_adapter_merges_where_nothing_else_is(tiny_gguf, rows, tmp_path):
    """In the process of the training, and wherever the folder is."""
    model, tokenizer = qgraft.load(tiny_gguf().path)
    report = qgraft.train(model, tokenizer, rows[:14], options_of(tmp_path / "out"), eval_dataset=rows[14:])
    said = [note for note in report.notes if CALIBRATION in note]
    assert len(said) == 1 and "keeps 20 rows" in said[0] and "save_calibration=False" in said[0]
    merged = [qgraft.merge(model, method="nearest", min_retained=-1e9)]
    fresh, _ = qgraft.load(tiny_gguf().path)
    qgraft.load_adapter(fresh, tmp_path / "out")
    merged.append(qgraft.merge(fresh, method="nearest", min_retained=-1e9))
    for each in merged:
        assert each.notes[0] == f"rows of the task: the rows that the adapter keeps ({CALIBRATION}): 14 rows"
        assert each.notes[1] == "measured on what was held out: 6 rows that the adapter keeps" and each.kept.rows == 6
    assert merged[0].kept == merged[1].kept
    again = qgraft.train(fresh, tokenizer, rows, options_of(tmp_path / "out", overwrite_output_dir=True,
                                                            save_calibration=False))  # fmt: skip
    assert not (tmp_path / "out" / CALIBRATION).exists() and not any(CALIBRATION in note for note in again.notes)
    assert find_adapter(fresh, "default").kept is None
    with pytest.raises(DataError, match="names no training set"):
        qgraft.merge(fresh)


def test_a_prefix_keeps_no_rows_and_a_run_that_had_ended_has_them_again(tiny_gguf, rows, tmp_path):
    model, tokenizer = qgraft.load(tiny_gguf().path)
    qgraft.train(model, tokenizer, rows, options_of(tmp_path / "prefix", pre_seq_len=4, adapter_name="p"))
    assert not (tmp_path / "prefix" / CALIBRATION).exists() and find_adapter(model, "p").kept is None
    model, tokenizer = qgraft.load(tiny_gguf().path)
    task, auto = write_rows(tmp_path / "task.jsonl", rows), {"resume_from_checkpoint": "auto"}
    qgraft.train(model, tokenizer, task, options_of(tmp_path / "out"))
    kept = find_adapter(model, "default").kept
    for gone in (False, True):  # whoever deletes the rows has the run all the same
        selection_of(model).change("default", kept=None)
        if gone:
            (tmp_path / "out" / CALIBRATION).unlink()
        assert qgraft.train(model, tokenizer, task, options_of(tmp_path / "out", **auto)).unchanged
        assert find_adapter(model, "default").kept == (None if gone else kept)
