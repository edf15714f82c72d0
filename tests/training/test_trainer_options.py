"""Every option that is inherited from transformers: obeyed as documented, without effect and said so, or refused."""

import json
from enum import Enum
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import TrainerCallback, get_scheduler
from transformers.trainer_utils import SchedulerType

import qgraft
from qgraft.errors import CheckpointError, OptionError, UnsupportedError
from qgraft.training import trainer_options
from qgraft.training.arguments import arguments_from_dict, changed_arguments, parse_arguments
from qgraft.training.loop import Step, TrainingLoop
from qgraft.training.option_help import option_help
from qgraft.training.run import train
from qgraft.training.trainer_options import (
    CHOICES,
    HONOURED,
    REFUSED,
    WITHOUT_NEED,
    check_launcher,
    inherited_options,
)
from qgraft.training.unread import unread_of_held_out

ROWS = [{"instruction": f"question {i}", "output": f"answer {i} " * (1 + i % 4)} for i in range(20)]
ON_THIS_RELEASE = inherited_options(qgraft.TrainArguments)


def arguments(folder: Path, **options: Any) -> qgraft.TrainArguments:
    defaults = {"max_steps": 4, "per_device_train_batch_size": 4, "save_strategy": "no", "logging_steps": 1}
    fixed = {"output_dir": str(folder), "use_cpu": True, "r": 2, "plot_loss": False, "overwrite_output_dir": True}
    return qgraft.TrainArguments(**{**defaults, "learning_rate": 1e-2, **fixed, **options})


class Run:
    """A whole run, with what its loop saw."""

    def __init__(self, tiny_gguf: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        self.batches: list[list[list[int]]] = []
        self.loop: TrainingLoop | None = None
        self.checkpointing = False
        original = TrainingLoop.learn

        def learn(loop: TrainingLoop, step: Step) -> None:
            self.loop = loop
            self.checkpointing = any(
                getattr(module, "gradient_checkpointing", False) for module in loop.model.modules()
            )
            self.batches.append([])
            for batch in step.batches:
                ends = batch["position_ids"][0].eq(0).nonzero().flatten().tolist()[1:]
                self.batches[-1] += [ids.tolist() for ids in batch["input_ids"][0].tensor_split(ends)]
            original(loop, step)

        torch.manual_seed(0)
        model, tokenizer = qgraft.load(tiny_gguf("llama").path)
        with monkeypatch.context() as patch:
            patch.setattr(TrainingLoop, "learn", learn)
            self.report = train(model, tokenizer, ROWS, arguments(folder, **options))
        lines = (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").exists() else []
        self.logged = [json.loads(line) for line in lines]
        self.adapter = (folder / "adapter_model.safetensors").read_bytes()

    def steps(self, key: str) -> list[int]:
        """The steps at which `key` was logged."""
        return [entry["step"] for entry in self.logged if key in entry]


@pytest.fixture
def run(tiny_gguf: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda **options: Run(tiny_gguf, tmp_path / "out", monkeypatch, **options)


# --- the tables


def test_the_tables_do_not_overlap():
    assert not HONOURED & WITHOUT_NEED.keys() and not HONOURED & REFUSED.keys()
    assert not WITHOUT_NEED.keys() & REFUSED.keys()
    assert CHOICES.keys() <= HONOURED


def test_every_option_that_is_honoured_is_set_in_a_test():
    text = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.parent.rglob("test_*.py"))
    assert {name for name in HONOURED if f"{name}=" not in text and f'"{name}"' not in text} == set()


def test_help_all_shows_what_is_honoured_and_nothing_else():
    shown = {line.split()[0][2:] for line in option_help(everything=True).splitlines() if line.strip().startswith("--")}
    assert shown & ON_THIS_RELEASE.keys() == HONOURED & ON_THIS_RELEASE.keys()
    assert {"r", "memory_limit", "dataset"} <= shown


OTHER_VALUES: dict[str, Any] = {  # where a value of the default's type will not do
    "include_num_input_tokens_seen": "all", "hub_strategy": "end", "log_level_replica": "info", "local_rank": 0,
    "hub_token": "hf_secret", "debug": "underflow_overflow", "fsdp": "full_shard", "fsdp_config": {"version": 2},
    "deepspeed": "zero2.json", "accelerator_config": {"split_batches": True}, "include_for_metrics": ["inputs"],
    "label_names": ["labels"], "optim_args": "beta1=0.8", "optim_target_modules": "all-linear",
    "parallelism_config": object(), "liger_kernel_config": {"rope": False}, "dataloader_prefetch_factor": 2,
    "ddp_bucket_cap_mb": 25, "eval_accumulation_steps": 3, "torch_empty_cache_steps": 3,
    "dataloader_multiprocessing_context": "spawn", "ddp_backend": "gloo", "torch_compile_backend": "inductor",
    "torch_compile_mode": "default", "hub_model_id": "me/adapter", "hub_revision": "main",
}  # fmt: skip


def another_value(name: str) -> Any:
    default = ON_THIS_RELEASE[name]
    if name in OTHER_VALUES:
        return OTHER_VALUES[name]
    return (
        not default if isinstance(default, bool | None) else default + "x" if isinstance(default, str) else default + 7
    )


@pytest.mark.parametrize("name", sorted(WITHOUT_NEED.keys() & ON_THIS_RELEASE.keys()))
def test_what_changes_nothing_is_said_and_put_back(name, tmp_path):
    args = arguments(tmp_path, **{name: another_value(name)})
    assert args.notes == [f"{name} has no effect: {WITHOUT_NEED[name]}"]
    assert getattr(args, name) == getattr(arguments(tmp_path), name)
    assert name not in changed_arguments(args)


@pytest.mark.parametrize("name", sorted(REFUSED.keys() & ON_THIS_RELEASE.keys()))
def test_what_cannot_be_obeyed_is_refused_by_name(name, tmp_path):
    with pytest.raises(UnsupportedError, match=name) as caught:
        arguments(tmp_path, **{name: another_value(name)})
    assert REFUSED[name] in str(caught.value) and "--help_all" in str(caught.value)


def test_all_that_is_refused_is_told_at_once(tmp_path):
    with pytest.raises(UnsupportedError) as caught:
        arguments_from_dict({"output_dir": str(tmp_path), "use_cpu": True, "optim_args": "a=1", "optim": "lomo",
                             "train_sampling_strategy": "group_by_length"})  # fmt: skip
    for part in (
        "optim_args=a=1",
        "optim=lomo",
        "train_sampling_strategy=group_by_length",
        "supported: random",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("name", sorted(CHOICES.keys() & ON_THIS_RELEASE.keys()))
def test_values_that_are_not_supported_are_refused(name, tmp_path):
    wrong = {"greater_is_better": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    wrong["activation_checkpointing_kwargs"] = wrong["gradient_checkpointing_kwargs"]
    known = {
        "optim": "lomo",
        "ddp_backend": "mpi",
        "train_sampling_strategy": "batch_rebalance",
        "metric_for_best_model": "accuracy",
    }
    with pytest.raises(UnsupportedError, match=name):
        arguments(tmp_path, **{name: {**wrong, **known}[name]})


def test_an_option_of_a_newer_release_is_refused_unless_it_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_options, "HONOURED", HONOURED - {"weight_decay"})
    arguments(tmp_path)
    with pytest.raises(UnsupportedError, match=r"weight_decay=0\.5: an option of a newer transformers"):
        arguments(tmp_path, weight_decay=0.5)


def test_settled_options_can_be_settled_again(tmp_path):
    args = arguments(tmp_path, gradient_checkpointing=True, eval_strategy="steps", val_size=2)
    values = {name: getattr(args, name) for name in ON_THIS_RELEASE if name != "accelerator_config"}
    again = qgraft.TrainArguments(**values, r=2)
    changed = {name: getattr(again, name) for name, value in values.items() if getattr(again, name) != value}
    assert changed == {}


# --- those that are honoured


@pytest.mark.slow
def test_samples_come_in_their_order_with_sequential_sampling(run):
    first = run(train_sampling_strategy="sequential", max_steps=5, seed=1).batches
    assert [len(batch) for batch in first] == [4] * 5
    assert first == run(train_sampling_strategy="sequential", max_steps=5, seed=2).batches
    drawn = run(max_steps=5).batches
    assert drawn != first and sorted(chain(*drawn)) == sorted(chain(*first))


def test_the_order_is_drawn_with_data_seed(run):
    runs = [run(seed=seed, data_seed=data_seed).batches for seed, data_seed in ((1, 7), (2, 7), (1, 8))]
    assert runs[0] == runs[1] != runs[2]


def test_an_incomplete_batch_is_dropped_if_asked(run):
    options = {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 8}
    assert [len(batch) for batch in run(**options).batches] == [8, 8, 4]
    assert [len(batch) for batch in run(**options, dataloader_drop_last=True).batches] == [8, 8]


@pytest.mark.slow
def test_logging_is_when_it_is_asked_for(run):
    options = {"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 4}
    assert run(**options, logging_strategy="epoch").steps("loss") == [5, 10]
    assert run(**options, logging_strategy="no").steps("loss") == []
    assert run(**options, logging_steps=4, logging_first_step=True).steps("loss") == [1, 4, 8]


def test_evaluation_is_when_it_is_asked_for(run):
    found = run(max_steps=6, eval_strategy="steps", eval_steps=2, eval_delay=3, val_size=4)
    assert found.steps("eval_loss") == [0, 4, 6]  # 0: before the first step, always


def test_the_adapter_alone_is_saved_if_asked_and_cannot_be_gone_on_from(run, tmp_path):
    run(save_strategy="steps", save_steps=2, save_only_model=True)
    names = {path.name for path in (tmp_path / "out" / "checkpoint-4").iterdir()}
    assert "adapter_model.safetensors" in names and "optimizer.pt" not in names
    for which in ("true", str(tmp_path / "out" / "checkpoint-2")):
        with pytest.raises(CheckpointError, match="save_only_model"):
            run(resume_from_checkpoint=which, save_strategy="steps", save_steps=2)


def test_the_best_checkpoints_are_saved(run, tmp_path):
    found = run(max_steps=6, save_strategy="best", eval_strategy="steps", eval_steps=2, val_size=4)
    losses = {entry["step"]: entry["eval_loss"] for entry in found.logged if "eval_loss" in entry and entry["step"]}
    best = min(losses, key=lambda step: losses[step])
    assert (tmp_path / "out" / f"checkpoint-{best}").is_dir()


@pytest.mark.parametrize("options", [{"eval_strategy": "steps"}, {"save_strategy": "best"}])
def test_what_needs_held_out_rows_says_so_where_there_are_none(options, run):
    with pytest.raises(OptionError, match=r"no held-out rows[\s\S]*val_size="):
        run(**options)


SCHEDULES: dict[str, dict[str, Any]] = {
    "cosine_with_min_lr": {"min_lr": 1e-3},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-3},
    "warmup_stable_decay": {"num_decay_steps": 2},
}


@pytest.mark.spread(4)
@pytest.mark.parametrize("kind", [kind.value for kind in SchedulerType])
def test_the_learning_rate_follows_every_schedule(kind, run):
    by_loss = kind in ("reduce_lr_on_plateau", "greedy")
    more = {"eval_strategy": "steps", "eval_steps": 1, "val_size": 4} if by_loss else {}
    found = run(max_steps=6, lr_scheduler_type=kind, warmup_steps=2, lr_scheduler_kwargs=SCHEDULES.get(kind), **more)
    rates = [entry["learning_rate"] for entry in found.logged if "learning_rate" in entry]
    if by_loss:
        assert len(rates) == 6
        return
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-2)
    schedule = get_scheduler(kind, optimizer, 2, 6, scheduler_specific_kwargs=SCHEDULES.get(kind))
    expected = []
    for _ in range(6):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize(
    "options", [{"lr_scheduler_type": "cosine_with_min_lr"}, {"lr_scheduler_kwargs": {"no_such": 1}}]
)
def test_a_schedule_that_its_options_do_not_fit_is_refused_before_anything_is_loaded(options, tmp_path):
    with pytest.raises(OptionError, match="lr_scheduler_type="):
        arguments(tmp_path, **options)


OPTIMIZERS = {
    "adamw_torch": torch.optim.AdamW, "adamw_torch_fused": torch.optim.AdamW, "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad, "rmsprop": torch.optim.RMSprop, "adafactor": transformers.optimization.Adafactor,
}  # fmt: skip


def test_every_optimizer_that_is_supported_is_tried():
    assert set(CHOICES["optim"][0]) == OPTIMIZERS.keys()


@pytest.mark.spread(2)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_lowers_the_loss(name, run):
    found = run(optim=name, max_steps=12, learning_rate=0.5 if name == "sgd" else 1e-2, weight_decay=0.01)
    losses = [entry["loss"] for entry in found.logged if "loss" in entry]
    assert sum(losses[-4:]) < sum(losses[:4])
    optimizer = found.loop.optimization.optimizer
    assert type(optimizer) is OPTIMIZERS[name]
    assert {group["weight_decay"] for group in optimizer.param_groups if group["params"]} == {0.01}


def test_the_numbers_of_adam_are_those_given(run):
    found = run(adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6)
    group = found.loop.optimization.optimizer.param_groups[0]
    assert group["betas"] == (0.8, 0.95) and group["eps"] == 1e-6


def test_label_smoothing_is_that_of_torch(run, tiny_gguf):
    found = run(label_smoothing_factor=0.2, max_steps=1, train_on_prompt=True, compute="float32")
    base, _ = qgraft.load(tiny_gguf("llama").path)  # which a new LoRA leaves as it is, and which computes in float32
    logits = [base(torch.tensor([ids])).logits[0, :-1] for ids in found.batches[0]]
    labels = [torch.tensor(ids[1:]) for ids in found.batches[0]]
    expected = nn.functional.cross_entropy(torch.cat(logits), torch.cat(labels), label_smoothing=0.2)
    assert found.logged[0]["loss"] == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_checkpointing_goes_by_both_names(name, run):
    if name not in ON_THIS_RELEASE:
        pytest.skip("this release of transformers has one name for it")
    kwargs = {f"{name}_kwargs": {"use_reentrant": False}}
    found = run(**{name: True}, **kwargs)
    assert found.checkpointing
    assert not any(getattr(module, "gradient_checkpointing", False) for module in found.loop.model.modules())


def test_flags_that_are_not_given_are_not_spoken_of(tmp_path):
    assert parse_arguments(["--output_dir", str(tmp_path), "--use_cpu"]).notes == []
    assert arguments_from_dict({"output_dir": str(tmp_path), "use_cpu": True, "eval_strategy": False}).notes == []


def test_checkpointing_by_flags_takes_its_kwargs_as_json(tmp_path):
    words = ["--output_dir", str(tmp_path), "--use_cpu", "--gradient_checkpointing"]
    parse_arguments([*words, "--gradient_checkpointing_kwargs", '{"use_reentrant": false}'])
    with pytest.raises(UnsupportedError, match="gradient_checkpointing_kwargs"):
        parse_arguments([*words, "--gradient_checkpointing_kwargs", '{"use_reentrant": true}'])


class Tracker(TrainerCallback):
    """Stands for what sends a run's log somewhere: tensorboard, wandb, ..."""

    seen: list[dict[str, Any]]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        Tracker.seen = [{"name": args.run_name, "project": args.project, "space": args.trackio_space_id,
                         "bucket": args.trackio_bucket_id, "static": args.trackio_static_space_id}]  # fmt: skip

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        Tracker.seen.append(dict(logs))


def test_a_tracker_gets_the_log_and_its_options(run, monkeypatch):
    monkeypatch.setitem(transformers.integrations.integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Tracker)
    found = run(report_to="tensorboard", run_name="first", project="mine", trackio_space_id="me/space",
                trackio_bucket_id="bucket", trackio_static_space_id="me/static")  # fmt: skip
    assert Tracker.seen[0] == {
        "name": "first", "project": "mine", "space": "me/space", "bucket": "bucket", "static": "me/static",
    }  # fmt: skip
    losses = [logs["loss"] for logs in Tracker.seen[1:] if "loss" in logs]
    assert losses == [entry["loss"] for entry in found.logged if "loss" in entry] and len(losses) == 4


def test_full_determinism_asks_torch_for_it_and_gives_the_same_bytes(run, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda mode, **_: asked.append(mode))
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", torch.backends.cudnn.deterministic)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    for name in ("CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "ASCEND_LAUNCH_BLOCKING", "HCCL_DETERMINISTIC"):
        monkeypatch.setenv(name, "")  # transformers sets them: monkeypatch puts back what was
    monkeypatch.setenv("FLASH_ATTENTION_DETERMINISTIC", "")
    assert run(full_determinism=True).adapter == run().adapter
    assert asked[:1] == [True]


def test_the_log_level_is_that_of_transformers(run):
    before = transformers.logging.get_verbosity()
    try:
        run(log_level="debug", max_steps=1)
        assert transformers.logging.get_verbosity() == transformers.logging.DEBUG
    finally:
        transformers.logging.set_verbosity(before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_tf32_is_an_error_without_a_gpu():
    with pytest.raises(OptionError, match="tf32"):
        arguments_from_dict({"output_dir": "out", "use_cpu": True, "tf32": True})
    assert arguments_from_dict({"output_dir": "out", "use_cpu": True, "tf32": False}).tf32 is False


@pytest.mark.parametrize("name", ["fp16_full_eval", "bf16_full_eval"])
def test_the_precision_of_an_evaluation_is_that_of_the_model(name, tmp_path):
    args = arguments(tmp_path, **{name: True})
    assert not getattr(args, name) and f"{name} has no effect: a run evaluates as it trains" in args.notes
    assert not getattr(arguments(tmp_path, do_eval=True, **{name: True}), name)


def test_pinning_memory_is_off_on_a_cpu(tmp_path):
    assert arguments(tmp_path, dataloader_pin_memory=True).dataloader_pin_memory is False


# --- processes and devices


def test_with_two_gpus_one_process_takes_one(tmp_path):
    args = arguments(tmp_path)
    args._n_gpu = 2  # what transformers finds where two are visible
    assert (args.n_gpu, args.train_batch_size) == (1, args.per_device_train_batch_size)


@pytest.mark.parametrize(
    "name,value",
    [("OMPI_COMM_WORLD_SIZE", "4"), ("ACCELERATE_USE_FSDP", "true"),
     ("ACCELERATE_MIXED_PRECISION", "bf16"), ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")],
)  # fmt: skip
def test_what_a_launcher_asks_for_beside_the_options_is_refused_before_anything_is_loaded(
    name, value, monkeypatch, tmp_path
):
    monkeypatch.setenv(name, value)
    with pytest.raises(UnsupportedError, match=f"{name}={value}.*its own options"):
        arguments(tmp_path)


def test_a_launcher_that_starts_one_process_is_none_of_our_business():
    check_launcher({"WORLD_SIZE": "1", "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "False"})
    check_launcher({})


def test_options_of_held_out_rows_that_are_none_are_said(tmp_path):
    args = arguments(tmp_path, max_eval_samples=3, val_max_target_length=9)
    names = ("max_eval_samples", "val_max_target_length")
    assert unread_of_held_out(args, None) == [f"{name} has no effect: eval_dataset is not given" for name in names]
    assert unread_of_held_out(args, [{"prompt": "q", "response": "a"}]) == []


def test_enums_are_compared_by_their_values(tmp_path):
    class Kind(Enum):
        SGD = "sgd"

    assert trainer_options._plain(Kind.SGD) == "sgd"
    assert arguments(tmp_path, optim=transformers.training_args.OptimizerNames.SGD).optim.value == "sgd"


@pytest.mark.parametrize(
    ("given", "unread"),
    [
        (
            {"early_stopping_threshold": 0.5},
            "early_stopping_threshold has no effect: early_stopping_patience is not given",
        ),
        ({"loraplus_lr_embedding": 0.1}, "loraplus_lr_embedding has no effect: loraplus_lr_ratio is not given"),
        ({"test_dataset": "a.jsonl"}, "test_dataset has no effect: do_predict is not asked for"),
        (
            {"response_column": "best", "stage": "dpo"},
            "response_column has no effect: the answers of a pair are chosen",
        ),
        ({"response_column": "best", "stage": "kto"}, None),
        ({"num_beams": 2, "stage": "dpo"}, "num_beams has no effect: nothing is answered"),
        ({"temperature": 0.5, "do_eval": True, "eval_dataset": "a"}, "temperature has no effect: nothing is answered"),
        ({"pre_seq_len": 4, "r": 16}, "r has no effect on a prefix"),
        ({"pre_seq_len": 4, "target_modules": "q_proj"}, "target_modules has no effect on a prefix"),
        ({"loraplus_lr_embedding": 0.1, "loraplus_lr_ratio": 4}, None),
        ({"test_dataset": "a.jsonl", "top_p": 0.5, "do_predict": True}, None),
        ({"top_p": 0.5, "do_eval": True, "predict_with_generate": True, "eval_dataset": "a"}, None),
        ({"max_new_tokens": 5, "temperature": 0.5, "stage": "distill", "teacher": "a.gguf", "lmbda": 0.5}, None),
    ],
)
def test_an_option_that_nothing_reads_is_said(tmp_path, given, unread):
    notes = arguments_from_dict({"output_dir": str(tmp_path), "use_cpu": True, **given}).notes
    found = [note for note in notes if "has no effect" in note]
    assert [note.startswith(str(unread)) for note in found] == [True] * (unread is not None)
