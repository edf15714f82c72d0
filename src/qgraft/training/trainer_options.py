"""What becomes here of each option of transformers' TrainingArguments, all of them, on every release we work with.

TrainArguments inherits more than a hundred. Some the loop obeys; some cannot change anything, because batches are free of
padding, evaluation is our own, or processes share one gradient; others would be obeyed in part, or in silence not at all.
So each stands in one of three tables:

    HONOURED        does what transformers' documentation says; tests/training/test_trainer_options.py sets every one of
                    them. Where not every value is, CHOICES has those that are
    WITHOUT_NEED    changes no result here: the default is put back, and a note says why
    REFUSED         an error with the reason

An option of a newer release that stands nowhere is refused too, unless it is left alone: we cannot know what it does.
tests/contract/test_training_arguments.py fails for it.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from enum import Enum
from typing import Any

from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from qgraft.errors import OptionError, UnsupportedError, option, worded
from qgraft.training.optimization import OF_TORCH, OPTIMIZERS

ONE_GRADIENT = "each process holds the whole model, and one sum makes their gradients one"
IN_MEMORY = "the samples are in memory already"
OWN_EVALUATION = "evaluation takes the mean loss over all answer tokens, nothing else"
NO_PADDING = "batches are always free of padding"
NOTHING_IS_PUSHED = "nothing is pushed to the hub"

MOST_USED = {  # of transformers' options, in the short help: name -> text
    "output_dir": "Where the adapter, logs, plot, checkpoints and predictions go.",
    "do_train": "Train; what is done where none of these three is given.",
    "do_eval": "Measure the loss on eval_dataset and write eval_results.json.",
    "do_predict": "Answer the rows of test_dataset, write generated_predictions.txt, report BLEU-4 and ROUGE.",
    "num_train_epochs": "Passes over the dataset.",
    "max_steps": "Optimizer steps; overrides the passes when positive.",
    "per_device_train_batch_size": "Samples in a batch.",
    "per_device_eval_batch_size": "Rows that are answered at once by do_predict.",
    "gradient_accumulation_steps": "Batches in an optimizer step.",
    "lr_scheduler_type": "linear, cosine, constant, ...",
    "warmup_steps": "Steps until the peak learning rate (a share of all steps when below 1).",
    "weight_decay": "Of AdamW.",
    "max_grad_norm": "Gradients are clipped to this norm.",
    "optim": "Optimizer.",
    "neftune_noise_alpha": "NEFTune: noise on the embeddings of what is learned, as 5; of each sample's length.",
    "eval_steps": "Steps between evaluations.",
    "save_strategy": "no, steps or epoch.",
    "save_steps": "Steps between checkpoints.",
    "resume_from_checkpoint": "true: go on from the newest whole checkpoint in output_dir; or a checkpoint's folder.",
    "gradient_checkpointing": "Recompute activations in the backward pass: less memory, more time.",
    "bf16": "Compute in bfloat16, where the device has it.",
    "fp16": "Compute in float16 with loss scaling, on a GPU.",
    "use_cpu": "Do not use the GPU.",
    "seed": "Of everything random.",
}

HONOURED = {
    "output_dir", "do_train", "do_eval", "do_predict", "resume_from_checkpoint",
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
    "num_train_epochs", "max_steps",
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps",
    "optim", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "label_smoothing_factor",
    "neftune_noise_alpha",
    "bf16", "fp16", "bf16_full_eval", "fp16_full_eval", "tf32",
    "gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing", "activation_checkpointing_kwargs",
    "logging_strategy", "logging_steps", "logging_first_step", "log_level",
    "report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id",
    "eval_strategy", "eval_steps", "eval_delay",
    "save_strategy", "save_steps", "save_total_limit", "save_only_model",
    "load_best_model_at_end", "metric_for_best_model", "greater_is_better",
    "seed", "data_seed", "full_determinism", "use_cpu", "ddp_backend", "ddp_timeout",
    "dataloader_drop_last", "dataloader_pin_memory", "train_sampling_strategy",
}  # fmt: skip

CHOICES: dict[str, tuple[tuple[Any, ...], str]] = {  # honoured for these values only, and why
    "optim": (
        OPTIMIZERS,
        "others come with packages that are not tested here, or hang on the layers of a float model; an adapter's "
        "optimizer is small",
    ),
    "train_sampling_strategy": (("random", "sequential"), f"{NO_PADDING}, so samples need not be grouped by length"),
    "ddp_backend": ((None, "gloo", "nccl"), "processes add up their gradients on CPUs or on NVIDIA's GPUs"),
    "metric_for_best_model": ((None, "loss", "eval_loss"), OWN_EVALUATION),
    "greater_is_better": ((None, False), "the best checkpoint is the one with the lowest held-out loss"),
    "gradient_checkpointing_kwargs": (
        (None, {"use_reentrant": False}),
        "the reentrant kind finds no gradient under a frozen embedding, and the others are not tested",
    ),
}
CHOICES["activation_checkpointing_kwargs"] = CHOICES["gradient_checkpointing_kwargs"]

WITHOUT_NEED = {  # why it changes no result
    "average_tokens_across_devices": "the loss is always the mean over the tokens of all processes",
    "log_on_each_node": "the first process alone writes and logs",
    "log_level_replica": "the first process alone writes and logs",
    "save_on_each_node": "the first process alone writes and logs",
    "local_rank": "the launcher says it in the environment",
    **dict.fromkeys(
        ("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph"), ONE_GRADIENT,
    ),
    **dict.fromkeys(
        ("dataloader_num_workers", "dataloader_persistent_workers", "dataloader_prefetch_factor",
         "dataloader_multiprocessing_context", "dataloader_in_order"), IN_MEMORY,
    ),
    "remove_unused_columns": "samples are tokenized already",
    "label_names": "the labels are the tokens of the answers",
    "length_column_name": NO_PADDING,
    "prediction_loss_only": OWN_EVALUATION,
    "eval_do_concat_batches": OWN_EVALUATION,
    "eval_use_gather_object": OWN_EVALUATION,
    "eval_accumulation_steps": OWN_EVALUATION,
    "include_for_metrics": OWN_EVALUATION,
    "batch_eval_metrics": OWN_EVALUATION,
    "eval_on_start": "the held-out loss before the first step is always measured",
    "include_num_input_tokens_seen": "tokens are always counted; run.json and metrics.jsonl have them",
    "skip_memory_metrics": "peak memory is always measured; run.json has it",
    "disable_tqdm": "the display is our own; it shows where there is a terminal",
    "enable_jit_checkpoint": "SIGTERM always ends the step and saves a checkpoint",
    "restore_callback_states_from_checkpoint": "callbacks that keep a state always go on with it",
    "use_cache": "no pass of training makes a cache",
    "torch_empty_cache_steps": "the budget of a pass (max_tokens_per_pass, memory_limit) bounds memory",
    "use_liger_kernel": "norms, gated products and the loss are computed without intermediate copies anyway",
    "liger_kernel_config": "norms, gated products and the loss are computed without intermediate copies anyway",
    "torch_compile": "the kernels are compiled already",
    "torch_compile_backend": "the kernels are compiled already",
    "torch_compile_mode": "the kernels are compiled already",
    **dict.fromkeys(
        ("hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision"),
        NOTHING_IS_PUSHED,
    ),
}  # fmt: skip

REFUSED = {  # why it cannot be obeyed
    "optim_args": "the optimizers that read it are not supported",
    "optim_target_modules": "the optimizers that read it are not supported",
    "auto_find_batch_size": "it tries again with other batches, so with another result; memory_limit keeps them",
    "logging_nan_inf_filter": "steps whose loss is not finite are skipped, counted, and end the run when they go on",
    "ignore_data_skip": "a run goes on where it stopped, to the same result",
    "push_to_hub": f"{NOTHING_IS_PUSHED}; `hf upload` does it",
    **dict.fromkeys(("accelerator_config", "parallelism_config", "fsdp", "fsdp_config", "deepspeed"), ONE_GRADIENT),
    "debug": "its hooks sit in layers that are computed otherwise here",
}

# What mpirun and `accelerate launch` tell the processes they start beside their number, and the values that mean nothing
# special: options of a run stand in its own words.
_LAUNCHED = {
    **dict.fromkeys(("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"), ("", "1")),
    **dict.fromkeys(
        ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM"),
        ("", "0", "false", "no"),
    ),
    **dict.fromkeys(("ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND"), ("", "no")),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("", "1"),
}


def settle_options(args: TrainingArguments) -> list[str]:
    """Put back the options that change nothing, and return a note on each; call it before TrainingArguments reads them.

    Raises UnsupportedError for all that cannot be obeyed, at once; and for what a launcher asks for beside its options.
    """
    check_launcher()
    args.optim = OF_TORCH.get(str(args.optim), args.optim)
    notes, problems = [], []
    for name, default in inherited_options(type(args)).items():
        value = _plain(getattr(args, name))
        if value == _plain(default):
            if name in REFUSED or name in CHOICES:
                setattr(args, name, default)  # "" and {} say as little, and transformers reads a file of that name
            continue
        if name in WITHOUT_NEED:
            notes.append(f"{name} has no effect: {WITHOUT_NEED[name]}")
            setattr(args, name, default)
        elif name in CHOICES and value not in CHOICES[name][0]:
            known = ", ".join(str(choice) for choice in CHOICES[name][0] if choice is not None)
            problems.append(f"{name}={value}: {CHOICES[name][1]}; supported: {known}")
        elif name not in HONOURED:
            why = REFUSED.get(name, "an option of a newer transformers than qgraft was tested with")
            problems.append(f"{name}={value}: {why}")
    if problems:
        raise UnsupportedError(
            "options of transformers that cannot be obeyed here:\n  " + "\n  ".join(problems),
            hint="leave them out; "
            + worded(flags="`qgraft train --help_all`", python="`qgraft train --help_all` in a terminal")
            + " lists those that are obeyed",
        )
    return notes


def inherited_options(kind: type[TrainingArguments]) -> dict[str, Any]:
    """The options that transformers declares, with the defaults they have in `kind`."""
    declared = {option.name for option in dataclasses.fields(TrainingArguments) if option.init}
    return {option.name: _default(option) for option in dataclasses.fields(kind) if option.name in declared}


def check_launcher(environment: Mapping[str, str] = os.environ) -> None:
    """Raise UnsupportedError where a launcher set options over ours in the environment, or is none that we know.

    Before anything is loaded: precision, compiler or accumulation set there would change a run whose options say nothing
    of it. Of several processes only their number may be told, as torchrun and `accelerate launch` do (processes.py).
    """
    said = {name: environment.get(name, "").strip() for name in _LAUNCHED}
    wrong = [f"{name}={value}" for name, value in said.items() if value.lower() not in _LAUNCHED[name]]
    if wrong:
        raise UnsupportedError(
            f"started by a launcher that set {', '.join(wrong)}: a run goes by its own options",
            hint="torchrun --nproc_per_node 2 -m qgraft train ..., or `accelerate launch` without such options",
        )


def tracking_callbacks(args: TrainingArguments) -> list[Any]:
    """transformers' own callbacks for what report_to names, tensorboard or wandb. Raises OptionError where one is missing."""
    try:
        return [kind() for kind in get_reporting_integration_callbacks(args.report_to)]
    except (ValueError, RuntimeError, ImportError) as error:
        raise OptionError(
            f"report_to={args.report_to}: {error}", hint=f"pip install it, or {option('report_to', 'none')}"
        ) from error


def rename_checkpointing(args: Any) -> None:
    """Give gradient_checkpointing and its kwargs the names that newer releases of transformers have for them."""
    for suffix in ("", "_kwargs"):
        old, new = f"gradient_checkpointing{suffix}", f"activation_checkpointing{suffix}"
        if getattr(args, old) and hasattr(args, new):
            setattr(args, new, getattr(args, old))
            setattr(args, old, None)


def settle_strategies(args: Any, *, held_out: bool) -> None:
    """Evaluate each epoch where there are held-out rows and nothing is said; the best checkpoint has the lowest loss."""
    if args.eval_strategy is None:
        args.eval_strategy = unsaid_strategy(args) if held_out else "no"
    if _plain(args.save_strategy) == "best" and args.metric_for_best_model is None:
        args.metric_for_best_model = "loss"


def unsaid_strategy(args: Any) -> str:
    """When the held-out loss is measured where that is not said: each epoch, or so often as eval_steps says."""
    return "epoch" if args.eval_steps is None else "steps"


def settle_best(args: Any) -> list[str]:
    """The best adapter is kept where the held-out loss is measured and nothing else is said; returns what to say of it."""
    measured, saved = _plain(args.eval_strategy) is not None, _plain(args.save_strategy) is not None
    unsaid = args.load_best_model_at_end is None
    if unsaid:
        args.load_best_model_at_end = measured and saved
    if args.load_best_model_at_end and not saved:
        raise OptionError(
            "load_best_model_at_end: nothing is saved, as save_strategy=no asks", hint="leave save_strategy out"
        )
    if args.load_best_model_at_end or args.early_stopping_patience is not None:
        args.metric_for_best_model, args.greater_is_better = "loss", False
    if unsaid and measured and not saved:
        return ["save_strategy=no: no earlier adapter is there at the end, so the last one is kept, not the best"]
    return []


def check_evaluation(args: Any, held_out: Sequence[object]) -> None:
    """Raise OptionError for options that need held-out rows where there are none."""
    needing = [f"eval_strategy={args.eval_strategy.value}"] if args.eval_strategy.value != "no" else []
    needing += ["save_strategy=best"] if args.save_strategy.value == "best" else []
    needing += ["load_best_model_at_end"] if args.load_best_model_at_end else []
    needing += [] if args.early_stopping_patience is None else ["early_stopping_patience"]
    if needing and not held_out:
        raise OptionError(
            f"{', '.join(needing)}: there are no held-out rows",
            hint=f"give {option('eval_dataset', 'held_out.jsonl')}, or {option('val_size', 0.1)} to hold out a share",
        )


def _default(option: "dataclasses.Field[Any]") -> Any:
    factory = option.default_factory
    return option.default if factory is dataclasses.MISSING else factory()


def _plain(value: Any) -> Any:
    """`value` as it is compared: an enum's value, what JSON text means, None for what is empty or off."""
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, str) and value.startswith("{"):
        with suppress(ValueError):  # of an option that is refused, whatever it says
            value = json.loads(value)
    if not isinstance(value, str | bool | int | float | list | dict | None):
        return repr(value)  # of an option that is refused: nothing that compares, or fails to, as it likes
    if value is False or value in ("", [], {}, "none", ["none"], "no"):  # off, in the words of different options
        return None
    return value
