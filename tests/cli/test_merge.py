"""qgraft merge as a user types it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Q

import qgraft
from qgraft.cli import main as cli
from qgraft.storage import unlisted_files

ROWS = [{"instruction": f"question {i}", "output": f"answer {i % 3} " * (1 + i % 4)} for i in range(20)]
TYPES = (Q.Q4_1, Q.Q4_0, Q.Q5_1)


@pytest.fixture(autouse=True)
def _no_environment_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line sets defaults of libraries; tests of other files must not inherit them."""
    for name in ("GOMP_SPINCOUNT", "TOKENIZERS_PARALLELISM", "TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, os.environ.get(name, "20000" if name == "GOMP_SPINCOUNT" else "false"))


@pytest.fixture(scope="module")
def trained(tiny_gguf, tmp_path_factory) -> tuple[Path, Path, Path]:
    """(base, folder of an adapter that `qgraft train` made, the rows it was trained on)."""
    base, folder = tiny_gguf("llama", types=TYPES).path, tmp_path_factory.mktemp("run")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = ["train", "--model_name_or_path", base, "--dataset", folder / "rows.jsonl", "--output_dir", folder / "out",
             "--max_steps", "20", "--learning_rate", "2e-3", "--use_cpu", "--save_strategy", "no", "--plot_loss", "false",
             "--system", "Be brief.", "--enable_thinking", "false"]  # fmt: skip
    assert cli.main([str(word) for word in words]) == 0
    return base, folder / "out", folder / "rows.jsonl"


def merge(*words: Any) -> int:
    return cli.main(["merge", "--device", "cpu", *(str(word) for word in words)])


def formats(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


def test_a_merge_writes_the_same_kind_of_file_and_a_report_beside_it(trained, tmp_path, capsys):
    base, adapter, rows = trained
    before = base.read_bytes()
    output = tmp_path / "merged.gguf"
    assert merge("--model", base, "--adapter", adapter, "--output", output) == 0
    printed = capsys.readouterr()
    assert {path.name for path in tmp_path.iterdir()} == {"merged.gguf", "merged.merge.json", "merged.merge.png"}
    assert output.stat().st_size == len(before) and base.read_bytes() == before
    assert formats(output) == formats(base)
    report = json.loads((tmp_path / "merged.merge.json").read_text())
    assert report["retained_gain"] > 0.9 and len(report["layers"]) == 14
    assert report["notes"][0].startswith(
        "rows of the task: the rows that the adapter keeps (calibration.safetensors): "
    )
    assert (tmp_path / "merged.merge.png").read_bytes().startswith(b"\x89PNG")
    assert "merged layers" in printed.out and "down_proj" in printed.out
    assert f"retained gain: {report['retained_gain']:.1%}" in printed.out
    assert "applied to 14/14 layers" in printed.err and "14 tensors changed" in printed.err
    assert "adapter out: the rows that it keeps" in printed.err
    losses = []
    for model in (["--model", base, "--adapter", adapter], ["--model", output]):
        words = ["eval", *model, "--device", "cpu", "--dataset", rows, "--system", "Be brief.", "--json"]
        assert cli.main([str(word) for word in words]) == 0
        losses.append({name: each["loss"] for name, each in json.loads(capsys.readouterr().out)["results"].items()})
    gain = losses[0]["base"] - losses[0]["out"]
    assert losses[1]["base"] < losses[0]["base"] - 0.9 * gain


def test_a_dataset_can_be_given_and_several_adapters_weighted(trained, tmp_path, capsys):
    base, adapter, rows = trained
    words = ["--model", base, "--adapter", adapter, "--adapter", adapter, "--weight", "0.25", "--weight", "0.75"]
    output = tmp_path / "merged.gguf"
    more = ["--dataset", rows, "--eval_dataset", rows, "--method", "scales", "--min-retained", "0"]
    for name, seed in (("merged.gguf", 0), ("other.gguf", 1)):
        assert merge(*words, *more, "--seed", seed, "--output", tmp_path / name) == 0
    assert output.read_bytes() != (tmp_path / "other.gguf").read_bytes()
    report = json.loads((tmp_path / "merged.merge.json").read_text())
    assert report["adapters"] == {"out": 0.25, "out-2": 0.75}
    assert report["notes"][0] == "rows of the task: the rows given" and report["kept"]["held_out"]
    assert report["kept"]["rows"] == len(ROWS)


@pytest.mark.parametrize("spelling", ["same", "relative", "link"])
def test_the_input_is_not_overwritten_and_nothing_is_begun(trained, tmp_path, capsys, monkeypatch, spelling):
    base, adapter, _ = trained
    before, output = base.read_bytes(), base
    if spelling == "relative":
        monkeypatch.chdir(base.parent)
        output = Path(base.name)
    if spelling == "link":
        output = tmp_path / "link.gguf"
        output.symlink_to(base)

    def begun(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the merge was begun")

    monkeypatch.setattr("qgraft.merging.merge.merge", begun)
    assert merge("--model", base, "--adapter", adapter, "--output", output, "--overwrite") == 2
    assert "is what is read" in capsys.readouterr().err
    assert base.read_bytes() == before


@pytest.mark.parametrize(
    ("output", "words", "told"),
    [
        ("nowhere/merged.gguf", [], "does not exist"),
        (".", [], "it is a folder"),
        ("merged.gguf", ["--to", "q4_kk"], "did you mean q4_k"),
        ("merged.gguf", ["--to", "q2_k"], "q2_k"),
        ("merged.gguf", ["--to", "chatglm-int8"], "chatglm-int8"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_first(trained, tmp_path, capsys, monkeypatch, output, words, told):
    base, adapter, _ = trained

    def begun(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the merge was begun")

    monkeypatch.setattr("qgraft.merging.merge.merge", begun)
    assert merge("--model", base, "--adapter", adapter, "--output", tmp_path / output, *words) == 2
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_too_little_kept_ends_with_the_table_and_no_file(trained, tmp_path, capsys):
    base, adapter, _ = trained
    words = ["--model", base, "--adapter", adapter, "--output", tmp_path / "merged.gguf"]
    assert merge(*words, "--method", "nearest") == 2
    printed = capsys.readouterr()
    assert "merged layers" in printed.out and "retained gain: " in printed.out
    assert "error: merge: " in printed.err and "expected at least 90%; nothing is replaced" in printed.err
    assert "hint: method auto keeps more" in printed.err and "Traceback" not in printed.err
    assert not list(tmp_path.iterdir())
    assert merge(*words, "--method", "nearest", "--min-retained", "0.05") == 0
    assert json.loads((tmp_path / "merged.merge.json").read_text())["method"] == "nearest"


def test_an_adapter_that_remembers_no_rows(trained, tmp_path, capsys):
    base, _, rows = trained
    model, _ = qgraft.load(base)
    qgraft.attach_lora(model, r=2, target_modules="q_proj")
    qgraft.lora_state_dict(model)["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"].fill_(0.1)
    qgraft.save_adapter(model, tmp_path / "made")
    words = ["--model", base, "--adapter", tmp_path / "made", "--output", tmp_path / "merged.gguf"]
    assert merge(*words) == 2
    assert "needs rows of the adapter's task" in (told := capsys.readouterr().err) and "--dataset" in told
    assert not (tmp_path / "merged.gguf").exists()
    assert merge(*words, "--method", "nearest") == 0
    assert "retained gain: not measured" in capsys.readouterr().out
    assert json.loads((tmp_path / "merged.merge.json").read_text())["kept"] is None
    # rows on which the adapter makes the model worse: said, and warned of
    assert merge(*words, "--dataset", rows) == 2
    assert "merged.gguf exists already" in (told := capsys.readouterr().err) and "--overwrite" in told
    assert merge(*words, "--dataset", rows, "--overwrite") == 0
    printed = capsys.readouterr().out
    assert "retained gain: none to keep, the adapter makes the loss on these rows worse" in printed
    assert "warning: with the adapter the loss on these rows is higher than without it" in printed
    assert max(len(line) for line in printed.splitlines()) <= 80


def test_an_exact_adapter_needs_no_rows(tiny_gguf, tmp_path, capsys):
    base, rows, out = tiny_gguf("llama", types=(Q.Q4_1,)).path, tmp_path / "rows.jsonl", tmp_path / "merged.gguf"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:6]))
    words = ["train", "--model_name_or_path", base, "--dataset", rows, "--output_dir", tmp_path / "out", "--max_steps", "2",
             "--use_cpu", "--save_strategy", "no", "--plot_loss", "false", "--exact",
             "--save_calibration", "false"]  # fmt: skip
    assert cli.main([str(word) for word in words]) == 0
    rows.unlink()
    capsys.readouterr()
    assert merge("--model", base, "--adapter", tmp_path / "out", "--output", out) == 0
    shown = capsys.readouterr().out
    assert "exact" in shown
    assert "what was kept is not measured: " in shown
    assert "retained gain: not measured" in shown
    report = json.loads((tmp_path / "merged.merge.json").read_text())
    assert {tuple(layer["steps"]) for layer in report["layers"]} == {("exact",)}
    assert formats(out) == formats(base)


def test_exact_names_the_layers_that_cannot_and_the_option_that_leaves_them_out(tiny_gguf, tmp_path, capsys):
    base, rows = tiny_gguf("llama", types=TYPES).path, tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:6]))
    words = [
        "train",
        "--model_name_or_path",
        base,
        "--dataset",
        rows,
        "--output_dir",
        tmp_path / "out",
        "--use_cpu",
        "--exact",
    ]
    assert cli.main([str(word) for word in words]) != 0
    told = capsys.readouterr().err
    assert "target layers hold no minimums" in told
    assert "_proj: q4_0" in told
    assert "--target_modules" in told or "target_modules with a regular expression" in told
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_another_format_is_stated_as_growing_the_file(trained, tmp_path, capsys):
    base, adapter, _ = trained
    output = tmp_path / "merged.gguf"
    assert merge("--model", base, "--adapter", adapter, "--output", output, "--to", "q8_0", "--method", "nearest") == 0
    printed = capsys.readouterr()
    assert f"{output.stat().st_size / 1e6:.1f} MB (was {base.stat().st_size / 1e6:.1f} MB)" in printed.err
    assert output.stat().st_size > 1.2 * base.stat().st_size
    weights = {name: kind for name, kind in formats(output).items() if name.startswith("blk") and "norm" not in name}
    assert set(weights.values()) == {"Q8_0"} and len(weights) == 14
    assert json.loads((tmp_path / "merged.merge.json").read_text())["retained_gain"] > 0.99


def test_layers_that_only_change_their_format_are_said_not_to_be_measured(trained, tiny_gguf, tmp_path, capsys):
    """All linear layers are written in the format, those without an adapter as they are when all is measured."""
    base, _, rows = trained
    model, _ = qgraft.load(base)
    qgraft.attach_lora(model, r=2, target_modules="q_proj")
    qgraft.save_adapter(model, tmp_path / "adapter")
    words = ["--model", base, "--adapter", tmp_path / "adapter", "--dataset", rows, "--method", "nearest"]
    told = "12 linear layers without an adapter are written in q8_0, too: not measured"
    for to in ([], ["--to", "q8_0"]):
        output = tmp_path / f"merged{len(to)}.gguf"
        assert merge(*words, *to, "--output", output) == 0
        printed = " ".join(capsys.readouterr().out.split())
        report = json.loads(output.with_name(f"merged{len(to)}.merge.json").read_text())
        assert (told in printed) == (told in report["notes"]) == bool(to)
    before, after = formats(base), formats(output)
    assert sum(before[name] != after[name] for name in before) == 14


def test_an_adapter_of_another_base_is_refused(trained, tiny_gguf, tmp_path, capsys):
    other = tiny_gguf("llama", types=TYPES, seed=1).path
    assert merge("--model", other, "--adapter", trained[1], "--output", tmp_path / "merged.gguf") == 2
    assert "trained on another base" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "required: --output"),
        (["--output", "x.gguf"], "no --adapter is given"),
        (["--output", "x.gguf", "--adapter", "a", "--weight", "1", "--weight", "2"], "got 2 --weight for 1 --adapter"),
        (["--output", "x.gguf", "--adapter", "a", "--min_retaine", "0"], "did you mean --min-retained"),
        (["--output", "x.gguf", "--adapter", "a", "--min-retained", "much"], "got much, expected a finite number"),
        (
            ["--output", "x.gguf", "--adapter", "a", "--min-retained", "nan"],
            "got nan, expected a finite number, at most 1",
        ),
        (["--output", "x.gguf", "--adapter", "a", "--min-retained", "2"], "got 2, expected a finite number, at most 1"),
        (["--output", "x.gguf", "--adapter", "a", "--seed", "-1"], "--seed: got -1, expected a whole number from 0"),
        (["--output", "x.gguf", "--adapter", "a", "--weight", "-inf"], "--weight: got -inf, expected a finite number"),
        (["--output", "x.gguf", "--adapter", "a", "--method", "nearst"], "did you mean nearest?"),
        (["--output", "x.gguf", "--adapter", "a", "--to", "q8"], "did you mean q8_0"),
        (["--output", "x.gguf", "--adapter", "a"], "a: no such file or folder"),
    ],
)
def test_mistakes_end_in_a_message(trained, tmp_path, capsys, monkeypatch, words, told):
    monkeypatch.chdir(tmp_path)
    assert merge("--model", trained[0], *words) == 2
    printed = capsys.readouterr().err
    assert told in printed and "Traceback" not in printed
    assert not list(tmp_path.iterdir())


def test_an_unknown_method_names_the_closest(trained, tmp_path, capsys):
    base, adapter, _ = trained
    words = ["--model", base, "--adapter", adapter, "--output", tmp_path / "merged.gguf"]
    assert merge(*words, "--method", "nearst") == 2
    assert "did you mean nearest?" in capsys.readouterr().err


def test_a_folder_is_merged_into_a_folder_again_and_again(tiny_gguf, tmp_path, capsys):
    tiny = tiny_gguf("llama")
    model, tokenizer = qgraft.load(tiny.path)
    tiny.model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model, _ = qgraft.load(tmp_path / "base", quantize="chatglm-int4")
    qgraft.attach_lora(model, r=2)
    qgraft.save_adapter(model, tmp_path / "made")
    words = ["--model", tmp_path / "base", "--quantize", "chatglm-int4", "--adapter", tmp_path / "made"]
    for _ in range(2):  # the second replaces what the first wrote
        assert merge(*words, "--output", tmp_path / "merged", "--method", "nearest", "--overwrite") == 0
        assert unlisted_files(tmp_path / "merged") == []
        assert (tmp_path / "merged.merge.json").is_file() and (tmp_path / "merged.merge.png").is_file()
    again, _ = qgraft.load(tmp_path / "merged")
    with torch.no_grad():
        assert again(torch.arange(4, 20)[None]).logits.isfinite().all()


def test_a_target_that_another_process_writes_is_refused_before_anything_is_loaded(trained, tmp_path, capsys):
    base, adapter, _ = trained
    script = (
        "import sys, time; from pathlib import Path; from qgraft.locks import file_locked\n"
        f"with file_locked(Path({str(tmp_path / 'merged.gguf')!r})): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        assert merge("--model", base, "--adapter", adapter, "--output", tmp_path / "merged.gguf") == 2
        assert str(other.pid) in (told := capsys.readouterr().err) and "applied to" not in told
        other.communicate("")
    assert sorted(tmp_path.iterdir()) == []
