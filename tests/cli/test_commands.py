"""Every command as a user types it, on a tiny model; errors without tracebacks."""

import io
import json
import os
import re
import runpy
import shutil
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import qgraft
from qgraft.cli import main as cli
from qgraft.cli.chat import parse_mixture
from qgraft.cli.train import _print_report
from qgraft.data.reading import Accounting
from qgraft.errors import CheckpointError, OptionError
from qgraft.kernels import KERNELS_VARIABLE, choose, native_status, table
from qgraft.kernels.cpu import library
from qgraft.training.report import TrainReport

ROWS = [{"instruction": f"question {i}", "output": f"answer {i % 3}"} for i in range(12)]


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "my.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def made(tiny_gguf, rows_file, tmp_path_factory):
    """(model path, adapter folder, what was printed) of a short run of `qgraft train`. Do not change the folder."""
    model, out, printed = (
        tiny_gguf("llama").path,
        tmp_path_factory.mktemp("made") / "out",
        [io.StringIO(), io.StringIO()],
    )
    words = ["train", "--model_name_or_path", str(model), "--dataset", str(rows_file), "--output_dir", str(out)]
    with redirect_stdout(printed[0]), redirect_stderr(printed[1]), pytest.MonkeyPatch.context() as patch:
        keep_environment(patch)
        assert cli.main([*words, "--max_steps", "3", "--learning_rate", "1e-2", "--use_cpu", "--val_size", "3"]) == 0
    return model, out, [text.getvalue() for text in printed]


@pytest.fixture
def trained(made, tmp_path):
    """(model path, adapter folder), the folder a copy."""
    shutil.copytree(made[1], tmp_path / "out")
    return made[0], tmp_path / "out"


def keep_environment(monkeypatch):
    """The command line sets defaults of libraries; tests of other files must not inherit them."""
    for name in ("GOMP_SPINCOUNT", "TOKENIZERS_PARALLELISM", "TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, os.environ.get(name, "20000" if name == "GOMP_SPINCOUNT" else "false"))


@pytest.fixture(autouse=True)
def _no_environment_left(monkeypatch):
    keep_environment(monkeypatch)


def test_training_says_what_was_read_and_what_was_held_out(made):
    out, err = made[2]
    assert "held-out" in out
    assert "read 12 rows, kept 12" in err


def test_train_chat_eval_and_inspect_work_on_the_same_adapter(trained, rows_file, capsys):
    model, out = trained
    base = ["--model", str(model), "--device", "cpu"]
    assert cli.main(["eval", *base, "--adapter", str(out), "--dataset", str(rows_file), "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert results["out"]["loss"] < results["base"]["loss"]
    assert cli.main(["eval", *base, "--dataset", str(rows_file)]) == 0
    assert (printed := capsys.readouterr().out).startswith("base  loss ") and "cut" not in printed
    assert printed.splitlines()[-1].endswith(" answer tokens of 12 samples, 0 rows dropped")
    assert cli.main(["eval", *base, "--adapter", str(out), "--dataset", str(rows_file), "--max_length", "24"]) == 0
    *losses, counts = capsys.readouterr().out.replace("\n  ", " ").splitlines()
    assert [line.split()[0] for line in losses] == ["base", "out"]
    assert re.search(r" of 12 samples, 0 rows dropped, \d+ cut at max_length 24: their ends are not measured", counts)
    assert cli.main(["inspect", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["seal"] == "holds"
    assert found["dataset"]["samples"] == 9
    assert found["parameters"] == found["config"]["r"] * sum_of_widths(model)
    assert cli.main(["chat", *base, "--adapter", str(out), "--prompt", "question 1", "--max_new_tokens", "4"]) == 0
    assert "applied to 14/14 layers" in capsys.readouterr().err


def sum_of_widths(path: Path) -> int:
    model, _ = qgraft.load(path)
    names = [name for name, _ in model.named_modules() if name.endswith("_proj")]
    return sum(model.get_submodule(name).in_features + model.get_submodule(name).out_features for name in names)


def test_inspect_shows_formats_and_the_fingerprint_that_adapters_carry(trained, capsys):
    model, out = trained
    assert cli.main(["inspect", str(model), "--json", "--tensors"]) == 0
    found = json.loads(capsys.readouterr().out)
    sealed = json.loads((out / "qgraft.json").read_text())
    assert found["fingerprint"] == sealed["base"]["fingerprint"]
    assert sum(entry["bytes"] for entry in found["formats"].values()) < found["bytes"]
    assert len(found["tensors"]) == sum(entry["tensors"] for entry in found["formats"].values())
    assert cli.main(["inspect", str(model)]) == 0
    assert "fingerprint: qg1:" in capsys.readouterr().out


def test_inspect_a_folder_and_a_damaged_adapter(trained, tmp_path, capsys):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 50,
    }
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path / "folder")
    assert cli.main(["inspect", str(tmp_path / "folder"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["formats"]["f32"]["weights"] > 0
    (trained[1] / "adapter_config.json").write_text("{}")
    assert cli.main(["inspect", str(trained[1])]) == 0
    assert "seal: adapter_config.json" in capsys.readouterr().out


def test_chat_commands_switch_adapters(trained, capsys, monkeypatch):
    model, out = trained
    lines = iter(["/adapters", "/base", "/adapter out=0.5", "/adapter nosuch", "/what", "hello", "/clear", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    words = ["chat", "--model", str(model), "--adapter", str(out), "--device", "cpu", "--max_new_tokens", "3"]
    assert cli.main(words) == 0
    told = capsys.readouterr().err
    assert "active: out=1; attached: out" in told
    assert "active: the base" in told
    assert "active: out=0.5" in told
    assert "no adapter named 'nosuch'" in told
    assert "/clear" in told


@pytest.mark.parametrize("terminal", [True, False])
def test_ctrl_c_in_an_answer_leaves_a_person_the_conversation(trained, capsys, monkeypatch, terminal):
    """A program that asks through a pipe is left, and gets answers without the prompt."""
    asked, prompts, lines = [], [], iter(["one", "two", "three", "/quit"])

    def answers(model, tokenizer, messages, options):
        asked.append(messages)
        if messages[-1][1] == "two":
            raise KeyboardInterrupt
        return "said"

    monkeypatch.setattr("qgraft.cli.chat._answer", answers)
    monkeypatch.setattr("builtins.input", lambda prompt: prompts.append(prompt) or next(lines))
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: terminal))
    code = cli.main(["chat", "--model", str(trained[0]), "--device", "cpu"])
    assert (code, len(asked)) == ((0, 3) if terminal else (130, 2)) and "interrupted" in capsys.readouterr().err
    assert set(prompts) == ({"> "} if terminal else {""})
    if terminal:
        assert asked[-1] == [("user", "one"), ("assistant", "said"), ("user", "three")]


def test_chat_and_eval_prompt_as_the_adapter_was_trained(tiny_gguf, tmp_path, rows_file, capsys):
    model, out = str(tiny_gguf("llama").path), str(tmp_path / "out")
    words = ["--dataset", str(rows_file), "--output_dir", out, "--max_steps", "1", "--use_cpu"]
    assert (
        cli.main(["train", "--model_name_or_path", model, *words, "--system", "Be brief.", "--template", "chatml"]) == 0
    )
    capsys.readouterr()
    common = ["--model", model, "--adapter", out, "--device", "cpu"]
    assert cli.main(["chat", *common, "--prompt", "question 1", "--max_new_tokens", "2"]) == 0
    told = capsys.readouterr().err
    assert "--system as in training: Be brief." in told
    assert "--template as in training: chatml" in told
    losses = []
    for options in (
        [],
        ["--system", "Be brief.", "--template", "chatml"],
        ["--system", "Be long.", "--template", "plain"],
    ):
        assert cli.main(["eval", *common, "--dataset", str(rows_file), "--json", *options]) == 0
        losses.append(json.loads(capsys.readouterr().out)["results"]["out"]["loss"])
    assert losses[0] == losses[1] != losses[2]


def test_mixtures():
    assert parse_mixture("law=0.7 med=0.3") == {"law": 0.7, "med": 0.3}
    assert parse_mixture("law") == {"law": 1.0}
    with pytest.raises(OptionError, match="NAME=NUMBER"):
        parse_mixture("law=x")


def test_train_from_yaml_with_overrides_and_aliases(tiny_gguf, tmp_path, rows_file, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model_name_or_path: {tiny_gguf('llama').path}\ndataset: {rows_file}\noutput_dir: {tmp_path / 'out'}\n"
        "lora_rank: 3\nlora_target: [q_proj, v_proj]\nmax_steps: 50\nlearning_rate: 1e-3\nuse_cpu: true\ncutoff_len: 64\n"
        "overwrite_cache: true\n"
    )
    assert cli.main(["train", str(config), "max_steps=2", "save_strategy=no"]) == 0
    assert "overwrite_cache has no effect" in capsys.readouterr().err
    saved = json.loads((tmp_path / "out" / "run.json").read_text())
    assert saved["steps"] == 2
    assert (saved["arguments"]["r"], saved["arguments"]["target_modules"]) == (3, "q_proj,v_proj")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_modules"] == ["q_proj", "v_proj"]


def test_several_configurations_train_at_once(tiny_gguf, tmp_path, rows_file, capsys):
    model = tiny_gguf("llama").path
    for name in ("law", "med"):
        text = f"model_name_or_path: {model}\ndataset: {rows_file}\noutput_dir: {tmp_path / name}\nr: {len(name)}\n"
        (tmp_path / f"{name}.yaml").write_text(text)
    words = ["train", str(tmp_path / "law.yaml"), str(tmp_path / "med.yaml"), "max_steps=2", "use_cpu=true"]
    assert cli.main([*words, "val_size=2", "do_train=true", "do_eval=true"]) == 0
    said = capsys.readouterr()
    assert "(adapter default)" in said.err and "(adapter default-2)" in said.err
    assert said.out.count("trained ") == said.out.count("perplexity") == 2 and "2 of 2 jobs" in said.out
    for name in ("law", "med"):
        assert json.loads((tmp_path / name / "run.json").read_text())["steps"] == 2
        assert (tmp_path / name / "adapter_model.safetensors").exists() and (
            tmp_path / name / "eval_results.json"
        ).exists()
    assert cli.main([*words, "output_dir=" + str(tmp_path / "both")]) == 2
    assert "is given to 2 jobs" in capsys.readouterr().err
    assert cli.main([*words, "lerning_rate=1"]) == 2
    told = capsys.readouterr().err
    assert "law.yaml: unknown option" in told and "med.yaml: unknown option" in told
    (tmp_path / "med.yaml").write_text((tmp_path / "med.yaml").read_text() + "learning_rate: 1e30\n")
    outcome = cli.main([*words[:-2], "max_steps=5", "use_cpu=true", "overwrite_output_dir=true"])
    said = capsys.readouterr()
    assert outcome == 2 and "3 times in a row" in said.err and "1 of 2 jobs" in said.out


def test_jobs_that_have_nothing_left_to_do_have_no_speed(tiny_gguf, tmp_path, rows_file, capsys):
    for name in ("law", "med"):
        text = f"model_name_or_path: {tiny_gguf('llama').path}\ndataset: {rows_file}\noutput_dir: {tmp_path / name}\n"
        (tmp_path / f"{name}.yaml").write_text(text + "use_cpu: true\nmax_steps: 2\nresume_from_checkpoint: auto\n")
    words = ["train", str(tmp_path / "law.yaml"), str(tmp_path / "med.yaml")]
    assert cli.main(words) == 0
    assert re.search(r"2 of 2 jobs in \d+ s, \d{1,6} tokens/s together", capsys.readouterr().out)
    assert cli.main(words) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "2 of 2 jobs; no step was left to take"
    assert cli.main([*words, "num_train_epochs=4", "max_steps=-1"]) == 0  # goes on: only what it did now counts
    taken = [json.loads((tmp_path / name / "run.json").read_text())["metrics"] for name in ("law", "med")]
    speed = int(re.findall(r"(\d+) tokens/s together", capsys.readouterr().out)[-1])
    assert 0 < speed * max(each["seconds"] for each in taken) < sum(each["tokens"] for each in taken)


def test_the_command_line_of_the_chatglm_tutorials_works_unchanged(tiny_gguf, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    (data / "self.json").write_text(json.dumps(ROWS))
    (data / "dataset_info.json").write_text(json.dumps({"self": {"file_name": "self.json"}}))
    words = (
        f"--do_train --dataset self --dataset_dir {data} --finetuning_type lora --output_dir {tmp_path / 'checkpoint'} "
        "--overwrite_cache --per_device_train_batch_size 4 --gradient_accumulation_steps 4 --lr_scheduler_type cosine "
        "--logging_steps 10 --save_steps 1000 --learning_rate 5e-5 --num_train_epochs 3.0 --plot_loss --fp16"
    ).split()
    assert cli.main(["train", "--model_name_or_path", str(tiny_gguf("llama").path), *words]) == 0
    told = capsys.readouterr().err
    assert "overwrite_cache has no effect" in told
    if not torch.cuda.is_available():
        assert "fp16: no CPU computes in it" in told
    assert (tmp_path / "checkpoint" / "loss.png").is_file()
    assert json.loads((tmp_path / "checkpoint" / "run.json").read_text())["steps"] == 3


def test_the_demo_runs_from_end_to_end_on_another_model(tiny_gguf, tmp_path, capsys):
    model = tiny_gguf("llama").path
    out = tmp_path / "demo"
    words = ["demo", "--model", str(model), "--output_dir", str(out), "--num_train_epochs", "0.1", "--device", "cpu"]
    assert cli.main([*words, "--name", "Nova", "--author", "ACME"]) == 0
    printed = capsys.readouterr().out
    for expected in ("Who are you?", "你是谁", "before", "after", "held-out loss", "trainable parameters", "tokens/s"):
        assert expected in printed
    assert "qgraft chat" in printed
    assert {"run.json", "loss.png", "adapter_model.safetensors", "metrics.jsonl"} <= {p.name for p in out.iterdir()}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["trian"], "did you mean train?"),
        (["chat"], "required: --model"),
        (["chat", "--model", "x", "--adaptor", "y"], "did you mean --adapter"),
        (["chat", "--model", "/nowhere/x.gguf"], "no such file or folder"),
        (["chat", "--modle", "x"], "did you mean --model?"),
        (["merge", "--min_retaine", "1"], "did you mean --min-retained?"),
        (["train", "--lora_rnak", "8"], "did you mean lora_rank"),
        (["train", "--r", "many"], "invalid int value"),
        (["train", "--output_dir", "x"], "no model is given"),
        (["train", "--stage", "ppo"], "expected sft, dpo, ipo, orpo, simpo, kto"),
        (["train", "--finetuning_type", "full"], "only lora"),
        (["train", "nosuch.yaml"], "cannot be read"),
        (["inspect", "/nowhere"], "nowhere"),
        (["serve"], "required: --model"),
        (["server"], "docs/guide-serve.md"),
        (["servr"], "docs/guide-serve.md"),
        (["finetune"], "`qgraft train` does that"),
        (["fintune"], "`qgraft train` does that"),
        (["--threads", "none", "doctor"], "--threads none: expected a number"),
        (["chat", "--model", "x.gguf", "--adapter", "nowhere"], "nowhere: no such file or folder"),
        (["pull", "smollm"], "or smollm2-135m or"),
        (["eval", "--model", "x", "--device", "tpu", "--dataset", "y"], "tpu"),
    ],
)
def test_mistakes_end_in_a_message_and_exit_code_2(words, expected, capsys):
    assert cli.main(words) == 2
    told = capsys.readouterr().err
    assert expected in told
    assert told.startswith("error: ")
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("flag", "values"),
    [
        ("--max_new_tokens", ("0", "-1", "2.5", "many", str(2**31))),
        ("--temperature", ("-1", "-1e-3", "nan", "inf", "1e-300", "1e300", "")),
        ("--top_p", ("0", "-0.5", "2", "nan")),
        ("--seed", ("-1", "9" * 20, "9" * 5000, "1.5")),
        ("--max_length", ("1", "-5", "1e3")),
    ],
)
def test_numbers_out_of_their_ranges_are_named_before_anything_is_loaded(flag, values, capsys):
    command = ["eval", "--dataset", "none"] if flag == "--max_length" else ["chat"]
    for value in values:
        assert cli.main([*command, "--model", "/nowhere.gguf", flag, value]) == 2
        told = capsys.readouterr().err
        assert told.startswith(f"error: qgraft {command[0]}: argument {flag}: got {value}, expected ")


@pytest.mark.parametrize("sampling", [["1e-5", "1"], ["1e5", "1e-300"], ["0", "1"]])
def test_the_edges_of_the_ranges_can_be_drawn_from(sampling, tiny_gguf, capsys):
    words = [
        "chat",
        "--model",
        str(tiny_gguf("llama").path),
        "--device",
        "cpu",
        "--prompt",
        "hi",
        "--max_new_tokens",
        "2",
    ]
    assert cli.main([*words, "--temperature", sampling[0], "--top_p", sampling[1], "--seed", str(2**32 - 1)]) == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("learning_rat: 1\n", "did you mean learning_rate"),
        ("- a\n- b\n", "expected option: value"),
        ("a: [1\n", "cannot be read"),
    ],
)
def test_a_bad_configuration_file(text, expected, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(text)
    assert cli.main(["train", str(tmp_path / "c.yaml")]) == 2
    assert expected in capsys.readouterr().err


def test_a_row_of_bad_models(tmp_path, capsys):
    for name, content in (("a.gguf", b"hello"), ("b.gguf", b""), ("c.gguf", b"GGUF" + b"\xff" * 40)):
        (tmp_path / name).write_bytes(content)
        assert cli.main(["inspect", str(tmp_path / name)]) == 2
        assert str(tmp_path / name) in capsys.readouterr().err


def test_debug_shows_the_traceback():
    with pytest.raises(CheckpointError, match="nowhere"):
        cli.main(["inspect", "/nowhere", "--debug"])


def test_doctor_names_a_kernel_and_a_reason_for_every_op_and_format(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {choice["op"] for choice in found["kernels"]} == set(table.ROWS)
    assert all(choice["why"] for choice in found["kernels"])
    assert found["packages"]["torch"] == torch.__version__
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "q4_1" in shown
    assert all(f"\n     {row.name} " in shown for row in table.ROWS.values() if not row.by_format)


def test_doctor_says_what_was_measured_on_a_cpu_of_this_kind(capsys, monkeypatch, request):
    if not native_status()[0]:
        pytest.skip("the C library is not built")
    for level, said in (("avx2", "2.2 times with --compute int8 (Zen 3)"), ("amx", None), ("plain", None)):
        monkeypatch.setattr(library, "level", lambda level=level: level)
        assert cli.main(["doctor"]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert ("speed training on a CPU of this kind" in shown) == (said is not None) and (said or "") in shown
    monkeypatch.setenv(KERNELS_VARIABLE, "reference")
    request.addfinalizer(choose.cache_clear)
    choose.cache_clear()
    monkeypatch.setattr(library, "level", lambda: "avx2")
    assert cli.main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cpu"]["measured"] is None


@pytest.mark.parametrize("command", ["", *cli.COMMANDS])
def test_every_help_page_prints_in_80_columns(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    try:
        code = cli.main([command, "--help"] if command else ["--help"])
    except SystemExit as leaving:  # argparse
        code = leaving.code
    assert not code
    printed = capsys.readouterr().out
    assert "usage: qgraft" in printed and not [line for line in printed.splitlines() if len(line) > 80]


def test_the_reference_is_what_help_prints(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")  # which it does not go by
    docs = Path(__file__).parents[2] / "docs"
    made = runpy.run_path(str(docs / "make_reference.py"))["reference"]()
    assert made == (docs / "reference.md").read_text(encoding="utf-8"), "run `make docs`"


@pytest.mark.parametrize(
    "words", [["doctor"], ["pull"], ["inspect", "MODEL"], ["inspect", "OUT"], ["estimate", "--model", "MODEL"]]
)
def test_what_is_printed_fits_80_columns(trained, words, capsys):
    model, out = trained
    assert cli.main([{"MODEL": str(model), "OUT": str(out)}.get(word, word) for word in words]) == 0
    printed = capsys.readouterr().out
    wide = [line for line in printed.splitlines() if len(line) > 80 and " " in line.strip()]  # paths are not cut
    assert printed and not wide


def test_what_a_run_reports_fits_80_columns_also_with_a_best_step(capsys):
    """A line ends behind a comma, never within a part."""
    metrics = {"seconds": 1.0, "train_loss": 25.9541, "eval_loss_before": 29.247, "eval_loss": 22.908, "best_step": 1.0,
               "eval_loss_last": 24.57, "tokens_per_second": 4400.0, "peak_memory_bytes": 4.1e8,
               "skipped_steps": 0}  # fmt: skip
    report = TrainReport(Path("out"), 3, True, None, 16384, metrics, Accounting())
    _print_report(report)
    assert capsys.readouterr().out.splitlines()[1:3] == [
        "loss 25.954, held-out 29.247 -> 22.908 at step 1 (kept),",
        "  24.570 at the end (in last), 4400 tokens/s, peak memory 0.41 GB",
    ]


def test_dashes_and_underscores_in_options_are_the_same(tiny_gguf, rows_file, capsys):
    model = tiny_gguf("llama").path
    for flag in ("--max_length", "--max-length"):
        assert (
            cli.main(["eval", "--model", str(model), "--dataset", str(rows_file), flag, "64", "--device", "cpu"]) == 0
        )
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == printed[2:]


def test_options_that_switch_off_say_so(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["train", "--help_all"]) == 0
    printed = capsys.readouterr().out
    said = " ".join(printed.split())
    assert "Switches plot_loss off" in said and "--optim WORD" in said and "One of adamw_torch, " in said
    assert not [line for line in printed.splitlines() if len(line) > 80]
