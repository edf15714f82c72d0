"""qgraft estimate: the table, the same numbers as JSON and from Python, limits and options."""

import json

import pytest

import qgraft
from qgraft.cli.main import main
from qgraft.memory.settings import estimate
from qgraft.training.adapter import prepare_adapter


@pytest.fixture
def path(tiny_gguf):
    return str(tiny_gguf("llama").path)


def test_the_json_is_what_the_library_says(path, capsys):
    assert main(["estimate", "--model", path, "--r", "4", "--tokens", "100", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    model, _ = qgraft.load(path)
    args = qgraft.TrainArguments(r=4, max_tokens_per_pass=100, use_cpu=True)
    prepare_adapter(model, args)
    found = estimate(model, args)
    assert [each["setting"]["checkpointing"] for each in printed] == [False, True]
    for shown, own in zip(printed, found, strict=True):
        assert shown["layers"] == list(own.layers)
        assert {key: shown[key] for key in ("base", "adapter", "outside", "working", "activations")} == {
            "base": own.base, "adapter": own.adapter, "outside": own.outside, "working": own.working,
            "activations": own.activations,
        }  # fmt: skip
        parts = ("process", "base", "adapter", "activations", "working")
        assert shown["total"] == sum(shown[part] for part in parts)


def test_the_table_has_a_column_for_each_setting_and_the_one_below_the_limit(path, capsys):
    assert main(["estimate", "--model", path, "--tokens=100", "--memory_limit", "900GB", "--optim", "sgd"]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = {line[:22].strip(): line[22:].split() for line in lines}
    assert table["tokens in a pass"] == ["100", "100", "100"]
    assert table["checkpointing"] == ["no", "yes", "no"]
    assert {"process", "base", "adapter", "activations", "each of 2 layers", "working", "peak memory"} <= set(table)
    last = " ".join(lines[-2:])
    assert last.startswith("below the limit: ") and "checkpointing off" in last


def test_without_a_limit_the_peak_is_that_of_a_run_without_one(path, capsys):
    assert main(["estimate", "--model", path, "--tokens=100"]) == 0
    table = {line[:22].strip(): line[22:] for line in capsys.readouterr().out.splitlines()}
    units = {"MB": 1, "GB": 1000}
    sizes = (table[row].split()[:2] for row in ("peak memory, at most", "with a memory_limit"))
    most, limited = (float(number) * units[unit] for number, unit in sizes)
    assert most >= limited > 0


def test_a_prefix_can_be_estimated(path, capsys):
    assert main(["estimate", "--model", path, "--pre_seq_len", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["adapter"] == 4 * (4 * 2 * 2 * 2 * 16 * 4)  # 4 x keys, values, layers


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--memory_limit", "1MB"], "smallest setting needs"),
        (["--memory_limit", "6 apples"], "no amount of memory"),
        (["--max_lenght", "6"], "max_length"),
        (["--tokens", "0"], "--tokens: got 0, expected a whole number from 1 "),
    ],
)
def test_what_cannot_be_is_an_error(path, capsys, words, complaint):
    assert main(["estimate", "--model", path, *words]) == 2
    assert complaint in capsys.readouterr().err
