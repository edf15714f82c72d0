"""qgraft train: flags or a configuration file in, a sealed adapter out; or answers to test rows, with their scores."""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qgraft.cli.options import comma_lines, print_note, print_notes, prompt_as_in_training, without_tokenizer

if TYPE_CHECKING:
    from rich.console import Console

    from qgraft.training.arguments import TrainArguments
    from qgraft.training.predict import Predictions
    from qgraft.training.report import TrainReport

UNSAID = "trainer_output"  # what transformers takes where nothing is said; nobody finds it there

DESCRIPTION = """usage: qgraft train --model_name_or_path MODEL --dataset FILE
                    --output_dir FOLDER [options]
       qgraft train --do_predict --model_name_or_path MODEL
                    --adapter_name_or_path FOLDER --test_dataset FILE
                    --output_dir FOLDER [options]
       qgraft train CONFIG.yaml [CONFIG.yaml ...] [option=value ...]

Train an adapter (a LoRA, or P-Tuning v2) on the packed weights of a model file,
measure it, or let it answer test rows. CONFIG.yaml (or .json) holds the same
options as the flags; later option=value words win. Names known from PEFT,
LLaMA-Factory, ChatGLM-Efficient-Tuning and ChatGLM's ptuning/main.py are
understood.

Several configurations train their LoRAs on one base at once, in shared passes,
each with the result that it has alone. They may differ in all that is not about
the base: rows, rank, targets, learning rate, steps, seed, ...; option=value
words apply to all of them.

"""


def run(words: Sequence[str]) -> int:
    """Parse, load, do what is asked for, say what came of it."""
    from qgraft.training.arguments import parse_jobs
    from qgraft.training.option_help import option_help

    if not words or words[0] in ("-h", "--help", "--help_all"):
        print(DESCRIPTION + option_help(everything="--help_all" in words), end="")
        return 0
    jobs = parse_jobs(words)
    return _work(jobs[0]) if len(jobs) == 1 else _work_together(jobs)


def _work(arguments: "TrainArguments") -> int:
    from rich.console import Console

    from qgraft.training.processes import Processes, leave

    first = Processes.of(arguments).first
    try:
        with nullcontext() if first else _silent(), _locked(arguments if first else None):
            _check(arguments)
            console = Console(stderr=True)
            model, tokenizer = load_with_adapter(arguments)
            if arguments.find_lr:
                return _find_lr(model, tokenizer, arguments, console)
            report = None
            if arguments.do_train:
                report = _train(model, tokenizer, arguments, console)
                if report.exit_code:
                    return report.exit_code
            if first:
                _after_training(model, tokenizer, arguments, console, report)
    finally:
        leave()
    return 0


@contextmanager
def _locked(*every: "TrainArguments | None") -> Iterator[None]:
    """Within the block nobody else trains into these output_dirs. Said before the minutes that loading may take."""
    from qgraft.locks import folder_locked

    with ExitStack() as stack:
        for arguments in every:
            if arguments is not None and arguments.do_train:
                stack.enter_context(folder_locked(Path(str(arguments.output_dir))))
        yield


@contextmanager
def _silent() -> Iterator[None]:
    """Within the block nothing is printed: of several processes the first one speaks. Errors are told by all."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def _after_training(
    model: Any, tokenizer: Any, arguments: "TrainArguments", console: "Console", report: "TrainReport | None"
) -> None:
    if arguments.do_eval:
        _evaluate(model, tokenizer, arguments, console, report)
    if arguments.do_predict:
        _predict(model, tokenizer, arguments, console)


def _work_together(jobs: "list[TrainArguments]") -> int:
    """Train all jobs at once, then do for each what else it asks for. 2 when one failed, else as for one job."""
    from qgraft.jobs.train import check_jobs, name_jobs

    jobs = name_jobs(jobs)
    check_jobs(jobs)
    with _locked(*jobs):
        return _train_together(jobs)


def _train_together(jobs: "list[TrainArguments]") -> int:
    from rich.console import Console

    from qgraft.adapters.choose import use_adapter
    from qgraft.checkpoints.load import refuse_encoder_decoder
    from qgraft.errors import QgraftError
    from qgraft.jobs.train import raise_all, train_jobs

    wrong = []
    refuse_encoder_decoder(str(jobs[0].model_name_or_path), "training several adapters at once")
    for arguments in jobs:
        try:
            _check(arguments)
        except QgraftError as error:
            wrong.append((arguments, error))
    raise_all(wrong)
    console = Console(stderr=True)
    model, tokenizer = load_with_adapter(jobs[0])
    for arguments in jobs[1:]:
        _load_adapter(model, arguments)
    outcomes = train_jobs(model, tokenizer, jobs, progress=console)
    code = 0
    for arguments, outcome in zip(jobs, outcomes, strict=True):
        print_note(f"--- {arguments.output_dir} (adapter {arguments.adapter_name})")
        if isinstance(outcome, QgraftError):
            print_note(f"error: {outcome}")
            code = code or 2
            continue
        _say(outcome, arguments)
        code = outcome.exit_code or code
        if not outcome.exit_code:
            use_adapter(model, arguments.adapter_name)
            _after_training(model, tokenizer, arguments, console, outcome)
    if done := [outcome for outcome in outcomes if not isinstance(outcome, QgraftError)]:
        print(_together(done, len(jobs)))
    return code


def _together(done: "Sequence[TrainReport]", jobs: int) -> str:
    """How many of the jobs came to their end, and how fast those went that had steps to take now."""
    worked = [each.metrics for each in done if not each.unchanged and each.metrics["seconds"] > 0]
    if not worked:
        return f"{len(done)} of {jobs} jobs; no step was left to take"
    seconds = max(metrics["seconds"] for metrics in worked)
    tokens = sum(metrics["tokens_per_second"] * metrics["seconds"] for metrics in worked)
    return f"{len(done)} of {jobs} jobs in {seconds:.0f} s, {tokens / seconds:.0f} tokens/s together"


def _check(arguments: "TrainArguments") -> None:
    """Print the notes, and raise what can be known to be wrong before the minutes that loading a large model takes."""
    from qgraft.adapter_files.told_task import told_task
    from qgraft.errors import DataError, OptionError
    from qgraft.training.output_dir import check_output_dir
    from qgraft.training.predict import EVALUATED, check_predicting, check_results
    from qgraft.training.scores import load_libraries

    for note in arguments.notes:
        print_note(f"note: {note}")
    if not arguments.model_name_or_path:
        raise OptionError("no model is given", hint="--model_name_or_path model.gguf")
    speech = _check_kind(arguments)
    arguments.task_type = arguments.task_type or told_task(arguments.model_name_or_path, arguments.adapter_name_or_path)
    if arguments.output_dir == UNSAID:
        raise OptionError("no output_dir is given", hint="--output_dir out")
    if arguments.do_train and not arguments.find_lr:
        check_output_dir(arguments)
    if arguments.do_eval:
        check_results(arguments, EVALUATED)
        if not arguments.eval_dataset and not (arguments.do_train and arguments.val_size):
            raise DataError("do_eval has no rows", hint="--validation_file held_out.jsonl (or --eval_dataset)")
        if arguments.predict_with_generate and not speech:
            load_libraries()
    if arguments.do_predict:
        check_predicting(arguments, speech=speech)


def _check_kind(arguments: "TrainArguments") -> bool:
    """Whether the model hears; raises where it is an encoder-decoder, as the config.json of its folder says, and options do
    not go with that."""
    from qgraft.checkpoints.folder_config import folder_config
    from qgraft.model_parts import hears, is_encoder_decoder
    from qgraft.training.speech import check_run

    folder = Path(str(arguments.model_name_or_path)).expanduser()
    config = folder_config(folder) if folder.is_dir() else None
    if config is not None and is_encoder_decoder(config):
        check_run(config, arguments)
    return hears(config)


def load_with_adapter(arguments: "TrainArguments") -> tuple[Any, Any]:
    """(model, tokenizer), with the adapter that is named attached."""
    model, tokenizer = load_base(arguments)
    _load_adapter(model, arguments)
    return model, tokenizer


def load_base(arguments: "TrainArguments") -> tuple[Any, Any]:
    """(model, tokenizer) without it."""
    from qgraft.checkpoints.load import chatglm_format, load

    name, quantize = str(arguments.model_name_or_path), arguments.quantize
    if arguments.quantization_bit is not None:
        quantize = chatglm_format(name, arguments.quantization_bit)
        if quantize is None:
            print_note(
                f"note: quantization_bit {arguments.quantization_bit}: the weights are stored in so many bits already"
            )
    about = _classifier(arguments)
    model, tokenizer = load(name, quantize=quantize, dtype=arguments.compute_dtype, device=arguments.device, **about)
    if tokenizer is None:
        raise without_tokenizer(name, model, "this command")
    print_notes(model)
    return model, tokenizer


def _classifier(arguments: "TrainArguments") -> dict[str, Any]:
    """What load() is told of a classifier: what the adapter tells, the options say, the folder says, or the rows."""
    from qgraft.adapter_files.told_task import told_labels, told_task
    from qgraft.model_parts import CLASSIFIERS
    from qgraft.training.classification_options import task_given
    from qgraft.training.label_rows import labels_of_rows

    if arguments.adapter_name_or_path and (about := told_labels(*_places(arguments))):
        return about
    task, rows = task_given(arguments), arguments.dataset or arguments.eval_dataset or arguments.test_dataset
    if task.task_type not in CLASSIFIERS:
        return {} if task.task_type is None else {"task_type": task.task_type}
    own = told_task(str(arguments.model_name_or_path)) == task.task_type
    if rows is None or (own and task.labels is None and task.problem_type is None):
        return {"task_type": task.task_type, "labels": task.labels, "problem_type": task.problem_type}
    scheme = labels_of_rows(rows, arguments)
    return {"task_type": task.task_type, "labels": scheme.names, "problem_type": scheme.problem_type}


def _places(arguments: "TrainArguments") -> tuple[str, str]:
    return str(arguments.model_name_or_path), str(arguments.adapter_name_or_path)


def _load_adapter(model: Any, arguments: "TrainArguments") -> None:
    """Attach the adapter that is named, if one is."""
    from qgraft.adapter_files.folder import load_adapter
    from qgraft.adapters.base import find_adapter
    from qgraft.adapters.choose import active_adapters
    from qgraft.training.adapter import check_adapter

    if arguments.adapter_name_or_path:
        loaded = load_adapter(model, arguments.adapter_name_or_path, arguments.adapter_name, force=arguments.force)
        print_note(str(loaded))
        check_adapter(model, arguments)
        prompt_as_in_training(arguments, find_adapter(model, arguments.adapter_name).trained)
    elif not arguments.do_train and not active_adapters(model):
        print_note("note: no adapter is given, so this is about the base")


def _train(model: Any, tokenizer: Any, arguments: "TrainArguments", console: "Console") -> "TrainReport":
    from qgraft.training.run import train

    report = train(model, tokenizer, None, arguments, progress=console)
    _say(report, arguments)
    return report


def _find_lr(model: Any, tokenizer: Any, arguments: "TrainArguments", console: "Console") -> int:
    """Look for a learning rate, and say what was found."""
    from qgraft.training.find_lr import find_lr
    from qgraft.training.output_dir import RATES, RATES_PICTURE

    found = find_lr(model, tokenizer, None, arguments, progress=console)
    if found.signal is not None:
        print_note(f"stopped after {len(found.rates)} steps, so no learning rate is suggested")
        return 128 + found.signal
    end = "where it diverged" if found.diverged else "the highest that is tried"
    print(f"{len(found.rates)} steps with learning rates from {found.rates[0]:.1e} to {found.rates[-1]:.1e}, {end}")
    if found.suggested is None:
        print("the loss did not fall at any of them, so none is suggested")
    else:
        print(f"suggested: --learning_rate {found.suggested:g}")
    names = f"{RATES} and {RATES_PICTURE}" if arguments.plot_loss else RATES
    print(f"{names} are in {arguments.output_dir}; no adapter was kept")
    return 0


def _say(report: "TrainReport", arguments: "TrainArguments") -> None:
    """Print what came of a run, and the notes that were not printed before it."""
    from qgraft.training.report import describe_signal

    seen = len(arguments.notes)
    for note in report.notes[seen:]:
        print_note(note if note.startswith("warning: ") else f"note: {note}")
    if report.unchanged:
        return
    print_note(report.accounting.summary())
    if report.signal is not None:
        print_note(describe_signal(report))
    else:
        _print_report(report)


def _evaluate(
    model: Any, tokenizer: Any, arguments: "TrainArguments", console: "Console", report: "TrainReport | None"
) -> None:
    """Print the held-out loss (a run that trained has measured it), and scores if asked; both into eval_results.json."""
    from qgraft import storage
    from qgraft.model_parts import CLASSIFIERS
    from qgraft.training.classification import METRICS
    from qgraft.training.held_out import evaluate_held_out
    from qgraft.training.predict import EVALUATED, answer_rows

    if report is None:
        of_rows = evaluate_held_out(model, tokenizer, arguments)[0]
        measured = {"eval_loss": of_rows.loss, **{f"eval_{key}": value for key, value in of_rows.metrics.items()}}
    else:
        measured = report.metrics
    kept = {f"eval_{name}" for name in METRICS}
    loss = measured["eval_loss"]
    beside = {key: value for key, value in measured.items() if "/" in key or key in kept}
    results: dict[str, Any] = {"eval_loss": loss, **beside}
    writes = arguments.stage == "sft" and arguments.task_type not in CLASSIFIERS
    perplexity = f", perplexity {math.exp(min(loss, 700.0)):.2f}" if writes else ""
    print(f"held-out loss {loss:.4f}{perplexity}")
    for key, value in beside.items():
        print(f"{key} {value:.4f}")
    if arguments.predict_with_generate and arguments.eval_dataset:
        found = answer_rows(model, tokenizer, arguments.eval_dataset, arguments,
                            max_samples=arguments.max_eval_samples, console=console)  # fmt: skip
        _print_scores(found)
        results |= found.metrics("eval")
    elif arguments.predict_with_generate:
        print_note("note: predict_with_generate has no effect on rows of val_size; give --validation_file")
    storage.write_json(Path(str(arguments.output_dir)) / EVALUATED, results)


def _predict(model: Any, tokenizer: Any, arguments: "TrainArguments", console: "Console") -> None:
    from qgraft.training.predict import PREDICTIONS, RESULTS, predict
    from qgraft.training.predict_labels import LINES, LabelPredictions

    found = predict(model, tokenizer, None, arguments, progress=console)
    for note in found.notes:
        print_note(f"note: {note}")
    print_note(found.accounting.summary())
    if isinstance(found, LabelPredictions):
        said = {"loss": found.measured.loss, **found.measured.metrics}
        print(", ".join(f"{name} {value:.4f}" for name, value in said.items()) + f" of {len(found.rows)} rows")
    else:
        _print_scores(found)
    lines = LINES if isinstance(found, LabelPredictions) else PREDICTIONS
    print(f"{lines} and {RESULTS} are in {arguments.output_dir}")


def _print_scores(found: "Predictions") -> None:
    names, values = zip(*found.scores.items(), strict=True)
    print("   ".join(f"{name.upper():>7}" for name in names))
    print("   ".join(f"{value:7.2f}" for value in values) + f"   of {len(found.pairs)} answers, {found.seconds:.0f} s")


def _print_report(report: "TrainReport") -> None:
    from qgraft.training.output_dir import LAST

    metrics = report.metrics
    print(f"trained {report.parameters:,} parameters in {report.steps} steps, {metrics['seconds']:.0f} s")
    parts = [f"loss {metrics['train_loss']:.3f}"]
    if "eval_loss" in metrics:
        before = f"{metrics['eval_loss_before']:.3f} -> " if "eval_loss_before" in metrics else ""
        kept = f" at step {metrics['best_step']:.0f} (kept)" if "best_step" in metrics else ""
        parts.append(f"held-out {before}{metrics['eval_loss']:.3f}{kept}")
    if "best_step" in metrics:
        parts.append(f"{metrics['eval_loss_last']:.3f} at the end (in {LAST})")
    parts.append(f"{metrics['tokens_per_second']:.0f} tokens/s")
    print(comma_lines([*parts, f"peak memory {metrics['peak_memory_bytes'] / 1e9:.2f} GB"]))
    if "eval_accuracy" in metrics:
        print(f"held-out accuracy {100 * metrics['eval_accuracy']:.1f} %, macro-F1 {metrics['eval_macro_f1']:.3f}")
    if "eval_rewards/accuracies" in metrics:
        margin = f", by {metrics['eval_rewards/margins']:.2f}" if "eval_rewards/margins" in metrics else ""
        print(f"held-out rows rewarded the right way round: {100 * metrics['eval_rewards/accuracies']:.1f} %{margin}")
    if metrics["skipped_steps"]:
        print(f"{metrics['skipped_steps']:.0f} steps were skipped: their loss or gradient was not finite")
    files = "adapter, run.json and loss.png" if (report.output_dir / "loss.png").is_file() else "adapter and run.json"
    print(f"{files} are in {report.output_dir}")
