"""Jobs that train on one base at once come out as they do alone: the oracle is train() itself, one job at a time."""

import json
import os
import signal

import pytest
import safetensors.torch
import torch

import qgraft
from qgraft.errors import DataError, OptionError, StorageError, TrainingError, UnsupportedError
from qgraft.jobs import train as jobs_module
from qgraft.jobs.train import check_jobs, name_jobs, short_names, train_jobs
from qgraft.training.callbacks import StopWith
from qgraft.training.checkpoints import checkpoints
from qgraft.training.optimization import Optimization
from qgraft.training.run import train

JOBS = {  # ranks, rows, lengths, targets, seeds, batch sizes, dropout; "med" ends first, "art" accumulates
    "law": {"r": 2, "max_steps": 6, "seed": 1, "per_device_train_batch_size": 4, "lora_dropout": 0.2},
    "med": {"r": 4, "max_steps": 3, "seed": 2, "per_device_train_batch_size": 1, "val_size": 4, "eval_strategy": "epoch"},
    "art": {
        "r": 3, "max_steps": 5, "seed": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "target_modules": "q_proj,down_proj", "learning_rate": 3e-2, "lr_scheduler_type": "constant", "max_length": 30,
        "eval_strategy": "steps", "eval_steps": 2, "val_size": 3,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A file of rows for each job."""
    folder = tmp_path_factory.mktemp("rows")
    for number, name in enumerate((*JOBS, "bad"), 1):
        found = [
            {"instruction": f"{name} {i}", "output": f"answer {i % 3} " * (1 + i % (number + 2))} for i in range(18)
        ]
        if name == "art":  # its answers weigh 0.5 to 2 each
            found = [
                {"messages": [{"role": "user", "content": row["instruction"]},
                              {"role": "assistant", "content": row["output"], "weight": (1 + i % 4) / 2}]}
                for i, row in enumerate(found)
            ]  # fmt: skip
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return folder


def arguments(rows, folder, name, **options):
    defaults = {"save_steps": 2, "logging_steps": 1, "use_cpu": True, "learning_rate": 1e-2, "plot_loss": False}
    defaults |= {"max_tokens_per_pass": 100, "compute": "float32", "dataset": str(rows / f"{name}.jsonl")}
    chosen = {**defaults, **JOBS.get(name, {}), **options}
    return qgraft.TrainArguments(output_dir=str(folder / name), adapter_name=name, **chosen)


def run_alone(tiny_gguf, rows, folder, name, **options):
    model, tokenizer = qgraft.load(tiny_gguf("llama").path)
    return train(model, tokenizer, None, arguments(rows, folder, name, **options))


def run_together(tiny_gguf, rows, folder, names=tuple(JOBS), each=None, **options):
    model, tokenizer = qgraft.load(tiny_gguf("llama").path)
    jobs = [arguments(rows, folder, name, **{**options, **(each or {}).get(name, {})}) for name in names]
    return model, dict(zip(names, train_jobs(model, tokenizer, jobs), strict=True))


@pytest.fixture(scope="module")
def alone(tiny_gguf, rows, tmp_path_factory):
    """The folder of each job's own run."""
    folder = tmp_path_factory.mktemp("alone")
    for name in JOBS:
        run_alone(tiny_gguf, rows, folder, name)
    return folder


def weights(folder):
    return safetensors.torch.load_file(folder / "adapter_model.safetensors")


def logged(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "epoch", "loss", "eval_loss", "learning_rate", "grad_norm", "skipped_steps")
    return [{key: line[key] for key in kept if key in line} for line in lines]


def assert_as_alone(folder, alone, name):
    """The adapter, and every loss, norm and rate on the way to it."""
    mine, theirs = weights(folder / name), weights(alone / name)
    assert mine.keys() == theirs.keys()
    for key in mine:
        torch.testing.assert_close(mine[key], theirs[key], rtol=1e-3, atol=1e-4 * float(theirs[key].abs().max()))
        assert float((mine[key] - theirs[key]).norm()) < 1e-4 * float(theirs[key].norm())
    lines, expected = logged(folder / name), logged(alone / name)
    assert len(lines) == len(expected) > 3
    for line, other in zip(lines, expected, strict=True):
        assert line == pytest.approx(other, rel=1e-3, abs=1e-7)


def test_three_different_jobs_come_out_as_they_do_alone(tiny_gguf, rows, alone, tmp_path):
    model, reports = run_together(tiny_gguf, rows, tmp_path)
    for name, report in reports.items():
        assert_as_alone(tmp_path, alone, name)
        saved, expected = (json.loads((where / name / "run.json").read_text()) for where in (tmp_path, alone))
        assert report.finished and saved["finished"]
        assert saved["dataset"] == expected["dataset"] and saved["adapter"] == expected["adapter"]
        assert saved["metrics"]["train_loss"] == pytest.approx(expected["metrics"]["train_loss"], rel=1e-4)
        assert saved["metrics"]["tokens"] == expected["metrics"]["tokens"]
        names = [[path.name for path in checkpoints(where / name)] for where in (tmp_path, alone)]
        assert names[0] == names[1] != []
    assert qgraft.active_adapters(model) == {"art": 1.0} and not model.training and model.config.use_cache
    other, _ = qgraft.load(tiny_gguf("llama").path)
    ids = torch.arange(3, 20)[None]
    for name in JOBS:
        qgraft.load_adapter(other, tmp_path / name, name)
        qgraft.use_adapter(model, name)
        torch.testing.assert_close(model(ids).logits, other(ids).logits)


def test_neither_their_number_nor_their_order_matters(tiny_gguf, rows, alone, tmp_path):
    run_together(tiny_gguf, rows, tmp_path, ("art", "law"), max_tokens_per_pass=60)
    run_alone(tiny_gguf, rows, tmp_path / "budget", "law", max_tokens_per_pass=60)
    assert_as_alone(tmp_path, alone, "art")
    assert_as_alone(tmp_path, tmp_path / "budget", "law")  # dropout is drawn for each pass, so it is another one


@pytest.mark.slow
def test_dropout_is_the_same_with_gradient_checkpointing(tiny_gguf, rows, tmp_path):
    options = {"gradient_checkpointing": True, "lora_dropout": 0.3, "max_steps": 4, "save_strategy": "no"}
    run_together(tiny_gguf, rows, tmp_path / "jobs", ("law", "med"), **options)
    for name in ("law", "med"):
        run_alone(tiny_gguf, rows, tmp_path / "alone", name, **options)
        assert_as_alone(tmp_path / "jobs", tmp_path / "alone", name)


def test_jobs_that_a_signal_ends_resume_to_the_same_result(tiny_gguf, rows, alone, tmp_path, monkeypatch):
    original = StopWith.on_step_end

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 4 and args.output_dir.endswith("law"):
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, args, state, control, **kwargs)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(StopWith, "on_step_end", interrupt)
        _, reports = run_together(tiny_gguf, rows, tmp_path)
    assert signal.getsignal(signal.SIGTERM) is before
    assert reports["med"].finished  # it had three steps to take
    for name in ("law", "art"):
        assert (reports[name].finished, reports[name].exit_code) == (False, 128 + signal.SIGTERM)
        assert checkpoints(tmp_path / name)[-1].name == f"checkpoint-{reports[name].steps}"
        assert not (tmp_path / name / "adapter_model.safetensors").exists()
    run_together(tiny_gguf, rows, tmp_path, ("law", "art"), resume_from_checkpoint="true")
    for name in JOBS:
        assert weights(tmp_path / name).keys() == weights(alone / name).keys()
        for key, theirs in weights(alone / name).items():
            assert float((weights(tmp_path / name)[key] - theirs).norm()) < 1e-4 * float(theirs.norm())


def test_nan_in_one_job_ends_that_job_only(tiny_gguf, rows, alone, tmp_path):
    each = {"bad": {"learning_rate": 1e30, "r": 2, "max_steps": 9, "seed": 7}}
    _, reports = run_together(tiny_gguf, rows, tmp_path, ("law", "bad", "art"), each)
    assert isinstance(reports["bad"], TrainingError) and "3 times in a row" in str(reports["bad"])
    assert not (tmp_path / "bad" / "adapter_model.safetensors").exists()
    for name in ("law", "art"):
        assert reports[name].finished and reports[name].metrics["skipped_steps"] == 0
        assert_as_alone(tmp_path, alone, name)


def test_an_error_of_torch_ends_its_job_only(tiny_gguf, rows, alone, tmp_path, monkeypatch):
    original = Optimization.step

    def step(self):
        if "broken" in self.optimizer.param_groups[0]:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory\nmore")
        original(self)

    def prepare(self, *args, **options):
        made(self, *args, **options)
        if self.optimizer.param_groups[0]["lr"] == 0.125:
            self.optimizer.param_groups[0]["broken"] = True

    made = Optimization.__init__
    monkeypatch.setattr(Optimization, "__init__", prepare)
    monkeypatch.setattr(Optimization, "step", step)
    each = {"bad": {"learning_rate": 0.125, "r": 2, "max_steps": 9, "lr_scheduler_type": "constant"}}
    _, reports = run_together(tiny_gguf, rows, tmp_path, ("law", "bad"), each)
    assert isinstance(reports["bad"], TrainingError) and "can't allocate memory" in str(reports["bad"])
    assert isinstance(reports["bad"].__cause__, RuntimeError)
    assert_as_alone(tmp_path, alone, "law")


def test_an_adapter_that_is_on_the_model_is_trained_on(tiny_gguf, rows, tmp_path):
    model, tokenizer = qgraft.load(tiny_gguf("llama").path)
    own = {name: JOBS["law"][name] for name in ("r", "lora_alpha", "lora_dropout") if name in JOBS["law"]}
    qgraft.attach_lora(model, name="old", **own)
    jobs = [arguments(rows, tmp_path, "law", adapter_name_or_path="x"), arguments(rows, tmp_path, "med")]
    jobs[0].adapter_name = "old"
    first = {key: value.clone() for key, value in qgraft.lora_state_dict(model, "old").items()}
    reports = train_jobs(model, tokenizer, jobs)
    assert all(report.finished for report in reports)
    trained = qgraft.lora_state_dict(model, "old")
    assert trained.keys() == first.keys() and all(not torch.equal(trained[key], first[key]) for key in trained)
    for key, value in weights(tmp_path / "law").items():
        torch.testing.assert_close(value, trained[key], rtol=0, atol=0)


def test_an_interrupt_in_the_middle_leaves_the_model_as_it_was(tiny_gguf, rows, tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs_module, "learn_together", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    model, tokenizer = qgraft.load(tiny_gguf("llama").path)
    with pytest.raises(KeyboardInterrupt):
        train_jobs(model, tokenizer, [arguments(rows, tmp_path, name) for name in JOBS])
    assert signal.getsignal(signal.SIGINT) is handler
    assert not model.training and model.config.use_cache
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model(torch.arange(3, 9)[None]).logits.isfinite().all()


def test_names_are_made_different(rows, tmp_path):
    jobs = [arguments(rows, tmp_path, name) for name in JOBS] + [arguments(rows, tmp_path, "bad")]
    for args, name in zip(jobs, ("default", "default", "default-2", "default"), strict=True):
        args.adapter_name = name
    assert [args.adapter_name for args in name_jobs(jobs)] == ["default", "default-3", "default-2", "default-4"]
    assert [args.adapter_name for args in jobs] == ["default", "default", "default-2", "default"]


def test_everything_that_keeps_jobs_apart_is_told_at_once(rows, tmp_path):
    first = arguments(rows, tmp_path, "law", model_name_or_path="a.gguf")
    other = {"model_name_or_path": "b.gguf", "max_tokens_per_pass": 7, "quantize": "q4_1"}
    second = arguments(rows, tmp_path, "med", cache_frozen_layers=True, **other)
    second.output_dir = first.output_dir
    with pytest.raises(OptionError) as caught:
        check_jobs([first, second])
    told = str(caught.value)
    for part in ("model_name_or_path differs", "max_tokens_per_pass differs", "quantize differs", "is given to 2 jobs",
                 "cache_frozen_layers"):  # fmt: skip
        assert part in told
    prefix = arguments(rows, tmp_path, "med", pre_seq_len=4)
    with pytest.raises(UnsupportedError, match="LoRAs only"):
        check_jobs([arguments(rows, tmp_path, "law"), prefix])


def test_what_is_wrong_with_any_job_is_told_before_one_begins(tiny_gguf, rows, tmp_path):
    model, tokenizer = qgraft.load(tiny_gguf("llama").path)
    jobs = [arguments(rows, tmp_path, name) for name in JOBS]
    jobs[1].dataset, jobs[2].dataset = str(rows / "none.jsonl"), None
    with pytest.raises(DataError) as caught:
        train_jobs(model, tokenizer, jobs)
    assert "none.jsonl" in str(caught.value) and "no dataset is given" in str(caught.value)
    (tmp_path / "art").mkdir()
    (tmp_path / "art" / "file").write_text("")
    jobs[1].dataset, jobs[2].dataset = jobs[0].dataset, jobs[0].dataset
    with pytest.raises(StorageError, match="is not empty"):
        train_jobs(model, tokenizer, jobs)
    assert [path.name for path in tmp_path.iterdir()] == ["art"]


def test_names_in_the_display_tell_jobs_apart(tmp_path):
    assert short_names([tmp_path / "anna", tmp_path / "bert"]) == ["anna", "bert"]
    assert short_names([tmp_path / "anna" / "out", tmp_path / "bert" / "out"]) == ["anna/out", "bert/out"]
