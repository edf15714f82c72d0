"""One run in several processes: shares, agreement, and the result of one process that takes the same samples a step."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_classifiers import BAD, GOOD, rows_of, write_encoder
from tiny_pairs import write_pairs_model

import qgraft
from qgraft.data.tokenizing import Sample
from qgraft.errors import TrainingError
from qgraft.training.processes import ALONE, Processes


@given(st.lists(st.integers(1, 200), max_size=30), st.integers(1, 5))
def test_shares_are_all_samples_once_and_about_as_many_tokens(lengths, count):
    samples = [Sample([1] * n, [1] * n, str(index)) for index, n in enumerate(lengths)]
    shares = [Processes(rank, count).share(samples) for rank in range(count)]
    assert sorted(int(sample.source) for share in shares for sample in share) == list(range(len(samples)))
    assert all([int(s.source) for s in share] == sorted(int(s.source) for s in share) for share in shares)
    tokens = [sum(len(sample.input_ids) for sample in share) for share in shares]
    assert max(tokens) - min(tokens) <= max(lengths, default=0)


def test_one_process_needs_no_group():
    tensor = torch.ones(2)
    assert ALONE.add(tensor) is tensor and ALONE.any([True, False]) == [True, False] and ALONE.gather(3) == [3]
    ALONE.check_same({"a": 1})


class Apart(Processes):
    """Two processes, of which the other has another value."""

    def gather(self, value):
        return [value, {**value, "rows": "others"}]


def test_what_differs_between_processes_is_named():
    with pytest.raises(TrainingError, match=r"do not train the same:\s+rows: \['ours', 'others'\]"):
        Apart(0, 2).check_same({"rows": "ours", "seed": 1})


# --- real ones

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2] / "src")}


OPTIONS = {
    "num_train_epochs": 2, "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 2, "template": "plain", "val_size": 3,
    "eval_strategy": "epoch", "plot_loss": False, "compute": "float32", "max_tokens_per_pass": 100, "use_cpu": True,
}  # fmt: skip


def command(model, rows, folder, processes, **options):
    chosen = {**OPTIONS, "per_device_train_batch_size": 4 // processes, **options}
    words = [f"--{key}={value}" for key, value in chosen.items()]
    words += ["--model_name_or_path", str(model), "--dataset", str(rows), "--output_dir", str(folder)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m", "qgraft"]
    start = ["-m", "qgraft"] if processes == 1 else torchrun
    return [sys.executable, *start, "train", *words]


def run(*given, **options):
    done = subprocess.run(command(*given, **options), env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def start(*given, **options):
    words = command(*given, **options)
    return subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture
def one_thread():
    """As in the processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def rows(tmp_path):
    lines = [{"instruction": f"hello {i}", "output": "the world " * (1 + i % 5)} for i in range(23)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "rows.jsonl"


def logged(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    keys = ("step", "epoch", "loss", "eval_loss", "learning_rate", "grad_norm")
    return [{key: line[key] for key in keys if key in line} for line in lines]


def assert_same_result(folder, other):
    for line, expected in zip(logged(folder), logged(other), strict=True):
        norms = line.pop("grad_norm", 0.0), expected.pop("grad_norm", 0.0)
        assert line == pytest.approx(expected, rel=1e-5)
        assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    ours, theirs = (safetensors.torch.load_file(f / "adapter_model.safetensors") for f in (folder, other))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-5)
    tokens = [json.loads((f / "run.json").read_text())["metrics"]["tokens"] for f in (folder, other)]
    assert tokens[0] == tokens[1]


def test_two_processes_come_to_the_result_of_one(tiny_gguf, rows, tmp_path, one_thread):
    model = tiny_gguf("llama").path
    options = {**OPTIONS, "output_dir": str(tmp_path / "one"), "per_device_train_batch_size": 4}
    qgraft.train(*qgraft.load(model), str(rows), qgraft.TrainArguments(**options))
    code, said = run(model, rows, tmp_path / "two", 2, ddp_timeout=60, ddp_backend="gloo")
    assert code == 0, said
    assert said.count("adapter and run.json are in") == 1, "each process speaks"
    assert_same_result(tmp_path / "two", tmp_path / "one")
    names = [sorted(p.name for p in (tmp_path / name).iterdir()) for name in ("one", "two")]
    assert names[0] == names[1]
    ours, theirs = ((tmp_path / name / "calibration.safetensors").read_bytes() for name in ("one", "two"))
    assert ours == theirs
    states = torch.load(tmp_path / "two" / "checkpoint-10" / "random_state.pt", weights_only=True)
    assert len(states) == 2 and not torch.equal(states[0]["torch"], states[1]["torch"])


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_process_ends_all_and_the_run_goes_on_with_any_number(processes, tiny_gguf, rows, tmp_path):
    model, options = tiny_gguf("llama").path, {"max_steps": 400, "save_steps": 20, "num_train_epochs": 1, "val_size": 0,
                                               "eval_strategy": "no"}  # fmt: skip
    code, said = run(model, rows, tmp_path / "whole", 1, **options)
    assert code == 0, said
    folder = tmp_path / "part"
    begun = subprocess.Popen(
        command(model, rows, folder, 2, **options),
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not list(folder.glob("checkpoint-*")):
        assert begun.poll() is None, begun.communicate()[0]
        time.sleep(0.02)
    workers = subprocess.run(["pgrep", "-P", str(begun.pid)], capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    said, _ = begun.communicate(timeout=120)
    assert begun.returncode != 0
    assert "error: another process of this run ended" in said and "--resume_from_checkpoint" in said, said
    assert not (folder / "adapter_model.safetensors").exists()
    code, said = run(model, rows, folder, processes, resume_from_checkpoint="true", **options)
    assert code == 0, said
    assert_same_result(folder, tmp_path / "whole")


@pytest.mark.slow
def test_a_signal_to_one_process_ends_all_with_a_checkpoint(tiny_gguf, rows, tmp_path):
    folder, options = tmp_path / "out", {"max_steps": 3000, "save_strategy": "no", "val_size": 0, "eval_strategy": "no"}
    model = tiny_gguf("llama").path
    begun = subprocess.Popen(
        command(model, rows, folder, 2, **options),
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not (folder / "metrics.jsonl").is_file() or len((folder / "metrics.jsonl").read_text().splitlines()) < 3:
        assert begun.poll() is None, begun.communicate()[0]
        time.sleep(0.02)
    workers = subprocess.run(["pgrep", "-P", str(begun.pid)], capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGTERM)
    said, _ = begun.communicate(timeout=120)
    assert [path.name for path in folder.glob("checkpoint-*")] and not (folder / "adapter_model.safetensors").exists()
    assert "SIGTERM: stopped after step" in said, said


@pytest.mark.slow
def test_processes_with_other_rows_are_refused(tiny_gguf, rows, tmp_path):
    """The second process is given another file by a wrapper; both end, each with the reason."""
    wrapper = tmp_path / "wrapper.py"
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(rows.read_text().splitlines()[:-1]) + "\n")
    wrapper.write_text(
        "import os, sys\nfrom qgraft.cli.main import main\n"
        f"words = [{str(other)!r} if w == {str(rows)!r} and os.environ['RANK'] == '1' else w for w in sys.argv[1:]]\n"
        "sys.exit(main(words))\n"
    )
    words = command(tiny_gguf("llama").path, rows, tmp_path / "out", 2)
    at = words.index("qgraft")
    words[at - 1 : at + 1] = [str(wrapper)]
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    said = done.stdout + done.stderr
    assert done.returncode != 0 and said.count("do not train the same") == 2 and "rows (SHA-256" in said, said


PROGRAM = """
import hashlib, os, sys
import torch, qgraft
from transformers import TrainerCallback
from qgraft.training.run import train

class OnTheSecond(TrainerCallback):
    def on_step_begin(self, args, state, control, optimizer, **_):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 if state.global_step < 4 else 30.0  # so the loss rises

    def on_step_end(self, args, state, control, **_):
        if os.environ["RANK"] == "1":
            control.should_save = state.global_step == 3
            control.should_training_stop = state.global_step == 7

model, tokenizer = qgraft.load(sys.argv[1])
args = qgraft.TrainArguments(
    output_dir=sys.argv[3], per_device_train_batch_size=2, learning_rate=0.5, lr_scheduler_type="constant", max_steps=9,
    val_size=3, eval_strategy="steps", eval_steps=1, save_steps=100, save_total_limit=None, plot_loss=False, use_cpu=True,
)
report = train(model, tokenizer, sys.argv[2], args, callbacks=[OnTheSecond])
state = qgraft.lora_state_dict(model)
digest = hashlib.sha256(b"".join(state[name].numpy().tobytes() for name in sorted(state))).hexdigest()
print(f"rank {os.environ['RANK']}: {report.steps} steps, best {report.metrics['best_step']}, {digest}", flush=True)
"""


@pytest.mark.slow
def test_what_a_callback_of_one_process_asks_for_all_do_and_all_end_with_the_best_adapter(tiny_gguf, rows, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words += [str(tmp_path / "program.py"), str(tiny_gguf("llama").path), str(rows), str(tmp_path / "out")]
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, second = sorted(line for line in done.stdout.splitlines() if line.startswith("rank "))
    assert first.partition(":")[2] == second.partition(":")[2] and ": 7 steps, best " in first
    best = int(first.split("best ")[1].partition(",")[0])
    assert best < 7 and {3, best} <= {int(p.name.partition("-")[2]) for p in (tmp_path / "out").glob("checkpoint-*")}
    saved = safetensors.torch.load_file(tmp_path / "out" / "adapter_model.safetensors")
    whole = hashlib.sha256(b"".join(saved[name].numpy().tobytes() for name in sorted(saved))).hexdigest()
    assert first.endswith(whole)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["dpo", "kto", "distill", "drawn"])
def test_other_stages_come_to_the_result_of_one_process_too(stage, tiny_gguf, tmp_path, one_thread):
    """The reference, or the teacher, is asked in shares; KTO's divergence and what is logged are of all processes."""
    kept = [
        {"prompt": f"hello {i}", "chosen": "the world " * (1 + i % 3), "rejected": f"no {i % 5}"} for i in range(14)
    ]
    if stage == "kto":
        kept = [{"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
                for row in kept for side in ("chosen", "rejected")]  # fmt: skip
    more = {"stage": "distill" if stage == "drawn" else stage}
    if stage == "drawn":  # each process draws the answers of its share, by the numbers that one alone draws them by
        more |= {"lmbda": 0.7, "beta": 0.5, "max_new_tokens": 8, "num_train_epochs": 1}
    if stage in ("distill", "drawn"):
        kept = [{"prompt": row["prompt"], "response": row["chosen"]} for row in kept]
        more["teacher_model_name_or_path"] = str(tiny_gguf("llama", seed=4).path)
    rows, model = tmp_path / "rows.jsonl", tiny_gguf("llama").path
    rows.write_text("".join(json.dumps(row) + "\n" for row in kept))
    options = {**OPTIONS, "output_dir": str(tmp_path / "one"), "per_device_train_batch_size": 4, **more}
    qgraft.train(*qgraft.load(model), str(rows), qgraft.TrainArguments(**options))
    code, said = run(model, rows, tmp_path / "two", 2, ddp_timeout=60, ddp_backend="gloo", **more)
    assert code == 0, said
    assert_same_result(tmp_path / "two", tmp_path / "one")
    one, two = ([json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
                for name in ("one", "two"))  # fmt: skip
    for line, expected in zip(
        two[1:], one[1:], strict=True
    ):  # before the first step rewards are rounding errors around 0
        rewards = {key: value for key, value in expected.items() if "/" in key or key in ("kl", "kd_loss")}
        assert {key: line[key] for key in rewards} == pytest.approx(rewards, rel=1e-3, abs=1e-5)
    assert any("rewards/margins" in line or "kd_loss" in line for line in one)


def kind_of_run(kind, tiny_gguf, tmp_path):
    """(model, rows, options of the run, of loading) of what else trains on the same loop."""
    plain = [{"prompt": f"hello {i}", "response": "the world " * (1 + i % 3)} for i in range(15)]
    if kind == "dora":
        return tiny_gguf("llama").path, plain, {"use_dora": True}, {}
    if kind == "new tokens":
        rows = [{**row, "response": "<tool> " + row["response"]} for row in plain]
        return tiny_gguf("llama").path, rows, {"add_tokens": ["<tool>"], "target_modules": "q_proj"}, {}
    if kind == "pairs":
        write_pairs_model("t5", tmp_path / "t5")
        rows = [
            {"prompt": "the service was " + "good " * (i % 4), "response": ("positive", "bad")[i % 2]}
            for i in range(15)
        ]
        return tmp_path / "t5", rows, {"template": None}, {}
    rows, names = rows_of(15), {"task_type": kind, "labels": ["bad", "good"] if kind == "SEQ_CLS" else ["O", "X"]}
    if kind == "TOKEN_CLS":
        words = [row["text"].split() for row in rows]
        rows = [{"tokens": each, "ner_tags": ["X" if word in GOOD + BAD else "O" for word in each]} for each in words]
    return (
        write_encoder(tmp_path / "bert"),
        rows,
        {"task_type": kind, "labels": names["labels"], "template": None},
        names,
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["SEQ_CLS", "TOKEN_CLS", "dora", "new tokens", "pairs"])
def test_other_kinds_come_to_the_result_of_one_process_too(kind, tiny_gguf, tmp_path, one_thread):
    """Padded batches, whole heads, magnitudes, rows of tokens, pairs: losses, gradients and what is logged beside them."""
    model, kept, more, names = kind_of_run(kind, tiny_gguf, tmp_path)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in kept))
    more = {
        "num_train_epochs": 1,
        "save_steps": 100,
        "quantize": None if kind in ("dora", "new tokens") else "q8_0",
        **more,
    }
    chosen = {key: value for key, value in {**OPTIONS, **more}.items() if value is not None}
    args = qgraft.TrainArguments(output_dir=str(tmp_path / "one"), per_device_train_batch_size=4, **chosen)
    loaded = qgraft.load(model, quantize=more["quantize"], **names)
    qgraft.train(*loaded, str(rows), args)
    words = command(model, rows, tmp_path / "two", 2, ddp_timeout=60, ddp_backend="gloo", **more)
    told = []  # without what is not said, lists as the command line has them
    for word in words:
        name, _, value = word.partition("=")
        if value == "None":
            continue
        told += [name, ",".join(more["labels"])] if name == "--labels" else [word]
        if name == "--add_tokens":
            told[-1:] = [name, *more["add_tokens"]]
    done = subprocess.run(told, env=ENVIRONMENT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_result(tmp_path / "two", tmp_path / "one")
    one, two = ([json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
                for name in ("one", "two"))  # fmt: skip
    for line, expected in zip(two, one, strict=True):
        beside = {key: value for key, value in expected.items() if "accuracy" in key or "f1" in key}
        assert {key: line[key] for key in beside} == pytest.approx(beside)
    assert any("accuracy" in line for line in one) is (kind in ("SEQ_CLS", "TOKEN_CLS"))
