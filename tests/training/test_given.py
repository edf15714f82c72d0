"""Python hands over anything: each of its doors takes what says the same, or refuses in words, before anything is written."""

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
import transformers
from transformers import EarlyStoppingCallback, TrainerCallback

import qgraft
from qgraft.errors import AdapterError, DataError, OptionError, QgraftError

ROWS = [{"instruction": f"question {i}", "output": f"answer {i % 3}"} for i in range(12)]
Loaded = tuple[Any, Any]


@pytest.fixture
def loaded(tiny_gguf: Any) -> Loaded:
    return qgraft.load(tiny_gguf("llama").path)


def arguments(folder: Path, **options: Any) -> qgraft.TrainArguments:
    return qgraft.TrainArguments(output_dir=folder, use_cpu=True, max_steps=1, save_strategy="no", **options)


def trained(loaded: Loaded, rows: Any, folder: Path, **options: Any) -> bytes:
    """The adapter that a run on these rows leaves; the model is as it was afterwards."""
    qgraft.train(*loaded, rows, arguments(folder, **options))
    qgraft.detach_adapter(loaded[0])
    return (folder / "adapter_model.safetensors").read_bytes()


def test_a_path_and_a_table_are_the_rows_that_they_hold(loaded: Loaded, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [ROWS[0] | {"input": "more"}, *ROWS[1:]]  # a column that one row has
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = pandas.DataFrame(rows)
    assert table["input"].isna().sum() == 11
    same = [trained(loaded, given, tmp_path / f"out{n}") for n, given in enumerate((rows, file, str(file), table))]
    assert len(set(same)) == 1
    assert trained(loaded, None, tmp_path / "named", dataset=file) == same[0]
    assert json.loads((tmp_path / "out1" / "run.json").read_text())["arguments"]["dataset"] == str(file)
    losses = {qgraft.evaluate(*loaded, given).loss for given in (rows, file, table)}
    assert len(losses) == 1
    report = qgraft.train(*loaded, file, arguments(tmp_path / "held"), eval_dataset=table)
    assert report.held_out_accounting is not None and report.held_out_accounting.kept == 12
    for given in (file, table):
        merged = qgraft.merge(loaded[0], calibration=given, eval_dataset=given, min_retained=-1e9, method="nearest")
        assert merged.kept is not None and merged.kept.rows == 12 and merged.kept.held_out
        qgraft.unmerge(loaded[0])


class Fails(TrainerCallback):  # type: ignore[misc]
    def __init__(self, needed: int) -> None: ...


@pytest.mark.parametrize(
    "callbacks", [["x"], "x", 3, None, [print], [int], [None], [object()], [TrainerCallback, "x"], [str]]
)
def test_what_is_no_callback_is_refused_before_anything_is_written(
    callbacks: Any, loaded: Loaded, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=r"callbacks: got .*, expected a list of transformers' TrainerCallbacks"):
        qgraft.train(*loaded, ROWS, arguments(tmp_path / "out"), callbacks=callbacks)
    assert not (tmp_path / "out" / "run.json").exists()
    qgraft.train(
        *loaded, ROWS, arguments(tmp_path / "out"), callbacks=[TrainerCallback, TrainerCallback()]
    )  # corrected


def test_a_callback_that_cannot_be_made_leaves_nothing(loaded: Loaded, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="needed"):
        qgraft.train(*loaded, ROWS, arguments(tmp_path / "out"), callbacks=[Fails])
    assert not (tmp_path / "out" / "run.json").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda m, t, r, a: (t, m, r, a), "model and tokenizer are given the other way round"),
        (lambda m, t, r, a: ("m.gguf", t, r, a), r"model: got a str \('m.gguf'\).*\n.*qgraft.load\('m.gguf'\)"),
        (
            lambda m, t, r, a: ((m, t), t, r, a),
            "model: got a tuple, expected a model\nhint: model, tokenizer = qgraft.load",
        ),
        (lambda m, t, r, a: (m, None, r, a), "tokenizer: got None, expected a tokenizer"),
        (lambda m, t, r, a: (m, r, t, a), "tokenizer: got a list.*\nhint: the order is model, tokenizer, rows, args"),
        (lambda m, t, r, a: (m, t, r, {"output_dir": "x"}), r"args: got a dict, .*\n.*TrainArguments\(\*\*options\)"),
        (lambda m, t, r, a: (m, t, r, None), "args: got None, expected a qgraft.TrainArguments"),
        (lambda m, t, r, a: (m, t, r, transformers.TrainingArguments("x", use_cpu=True)), "takes the same options"),
        (lambda m, t, r, a: (m, t, r[0], a), r"dataset: got a dict, .*\n.*in a list: \[row\]"),
        (lambda m, t, r, a: (m, t, 5, a), r"dataset: got an int \(5\), expected names of files, or a list of rows"),
        (lambda m, t, r, a: (m, t, b"rows.jsonl", a), "dataset: got a bytes"),
        (lambda m, t, r, a: (m, t, ["a.jsonl"], a), "row is a str, not an object"),
        (lambda m, t, r, a: (m, t, [], a), "rows: holds no rows"),
        (lambda m, t, r, a: (m, t, None, a), "no dataset is given"),
    ],
)
def test_what_train_cannot_take_is_said(change: Callable[..., Any], told: str, loaded: Loaded, tmp_path: Path) -> None:
    with pytest.raises((OptionError, DataError), match=told):
        qgraft.train(*change(*loaded, ROWS, arguments(tmp_path / "out")))
    assert not (tmp_path / "out" / "run.json").exists()
    assert not qgraft.adapter_names(loaded[0])


def test_no_rows_are_not_taken_for_no_dataset(loaded: Loaded, tmp_path: Path) -> None:
    """A run with nothing held out is another one than was asked for."""
    with pytest.raises(DataError, match="rows: holds no rows"):
        qgraft.train(*loaded, ROWS, arguments(tmp_path / "out"), eval_dataset=[])


def test_several_datasets_in_one_are_told_apart(loaded: Loaded) -> None:
    datasets = pytest.importorskip("datasets")
    parts = datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS), test=datasets.Dataset.from_list(ROWS[:2]))
    with pytest.raises(DataError, match=r"got several, train, test\nhint: give one: dataset\['train'\]"):
        qgraft.evaluate(*loaded, parts)
    assert qgraft.evaluate(*loaded, parts["test"]).samples == 2


ODD = [
    None,
    3,
    8.5,
    True,
    "m.gguf",
    b"x",
    ["a"],
    {"a": 1},
    ("a", 3),
    [3],
    [None],
    {3: 1.0},
    {"a": "1"},
    object(),
    float("nan"),
]


def doors(model: Any, tokenizer: Any, folder: Path) -> Iterator[tuple[str, Callable[[Any], Any]]]:
    """Functions of one value each, for everything that Python offers."""
    yield from (
        (name, functools.partial(getattr(qgraft, name), model))
        for name in ("attach_lora", "attach_prefix", "use_adapter", "load_adapter", "detach_adapter", "load_lora_state_dict",
                     "lora_state_dict", "save", "save_adapter", "quantize")
    )  # fmt: skip
    for name in ("lora_alpha", "lora_dropout", "target_modules", "name", "layers_to_transform"):
        yield f"attach_lora {name}", lambda value, name=name: qgraft.attach_lora(model, **{name: value})
    for name in ("prefix_dropout", "name"):
        yield f"attach_prefix {name}", lambda value, name=name: qgraft.attach_prefix(model, 2, **{name: value})
    yield "load_adapter name", lambda value: qgraft.load_adapter(model, folder, value)
    yield "save_adapter name", lambda value: qgraft.save_adapter(model, folder / "again", value)
    for name in ("set_adapter", "delete_adapter"):
        yield name, lambda value, name=name: getattr(model, name)(value)
    for name in ("dataset", "max_length"):
        yield (
            f"evaluate {name}",
            lambda value, name=name: qgraft.evaluate(model, tokenizer, **{"dataset": ROWS, name: value}),
        )
    for name in ("calibration", "eval_dataset", "method", "min_retained", "seed", "to"):
        yield f"merge {name}", lambda value, name=name: qgraft.merge(model, **{"calibration": ROWS, name: value})
    yield "combine", lambda value: qgraft.combine(model, value, "new")
    for name in ("name", "method", "r", "density", "seed"):
        yield (
            f"combine {name}",
            lambda value, name=name: qgraft.combine(model, **{"adapters": {"one": 1.0}, "name": "new", name: value}),
        )
    yield "load", qgraft.load
    of_a_model = "attach_lora attach_prefix use_adapter adapter_names active_adapters detach_adapter unmerge merge"
    for name in (*of_a_model.split(), "lora_state_dict"):
        more = (None,) if name == "use_adapter" else ()
        yield f"{name} of", lambda value, name=name, more=more: getattr(qgraft, name)(value, *more)
    yield "save of", lambda value: qgraft.save(value, folder / "x.gguf")
    yield "save_adapter of", lambda value: qgraft.save_adapter(value, folder / "x")
    yield "load_adapter of", lambda value: qgraft.load_adapter(value, folder)


def test_no_door_answers_with_an_exception_of_others(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # some of these values are names of files
    qgraft.attach_lora(loaded[0], r=2, name="one")
    qgraft.save_adapter(loaded[0], tmp_path / "one")
    foreign = []
    for door, call in doors(*loaded, tmp_path / "one"):
        for value in ODD:
            try:
                call(value)
            except QgraftError:
                pass
            except Exception as error:
                foreign.append(f"{door}({value!r}): {type(error).__name__}: {error}")
            if qgraft.adapter_names(loaded[0]) != ["one"]:
                qgraft.detach_adapter(loaded[0])
                qgraft.load_adapter(loaded[0], tmp_path / "one", "one")
    assert not foreign, "\n".join(foreign)


def test_the_right_function_is_named(loaded: Loaded) -> None:
    model = loaded[0]
    qgraft.attach_lora(model, r=2)
    with pytest.raises(OptionError, match=r"hint: use_adapter\(model, \{'default': 1.0\}\)"):
        qgraft.use_adapter(model, ["default"])  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="weights of adapters: got default='1', expected finite numbers"):
        qgraft.use_adapter(model, {"default": "1"})  # type: ignore[dict-item]
    with pytest.raises(AdapterError, match=r"set_adapter: got None, .*\nhint: model.disable_adapters\(\)"):
        model.set_adapter(None)
    with pytest.raises(AdapterError, match=r"lora_A.*: got an int \(3\), expected a tensor"):
        qgraft.load_lora_state_dict(model, dict.fromkeys(qgraft.lora_state_dict(model), 3))  # type: ignore[arg-type]
    assert qgraft.active_adapters(model) == {"default": 1.0}


def test_early_stopping_classes_and_objects_are_both_taken(loaded: Loaded, tmp_path: Path) -> None:
    for n, callback in enumerate((EarlyStoppingCallback, EarlyStoppingCallback(2))):
        report = qgraft.train(*loaded, ROWS, arguments(tmp_path / str(n), val_size=2), callbacks=[callback])
        assert report.finished and torch.isfinite(torch.tensor(report.metrics["eval_loss"]))
