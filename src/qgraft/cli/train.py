"""qgraft train: flags or a configuration file in, a sealed adapter out."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qgraft.cli.options import print_note, without_tokenizer

if TYPE_CHECKING:
    from qgraft.training.arguments import TrainArguments
    from qgraft.training.run import TrainReport

DESCRIPTION = """usage: qgraft train --model_name_or_path MODEL --dataset FILE --output_dir FOLDER [options]
       qgraft train CONFIG.yaml [option=value ...]

Train a LoRA on the packed weights of a model file. CONFIG.yaml (or .json) holds the same options as the flags; later
option=value words win. Names known from PEFT, LLaMA-Factory and ChatGLM-Efficient-Tuning are understood.

"""


def run(words: Sequence[str]) -> int:
    """Parse, load, train, say what came of it."""
    from qgraft.training.arguments import option_help, parse_arguments

    if not words or words[0] in ("-h", "--help", "--help_all"):
        print(DESCRIPTION + option_help(everything="--help_all" in words), end="")
        return 0
    return _train(parse_arguments(words))


def _train(arguments: "TrainArguments") -> int:
    from rich.console import Console

    from qgraft.checkpoints.adapter_files import load_adapter
    from qgraft.checkpoints.load import load
    from qgraft.errors import OptionError
    from qgraft.training.run import check_output_dir, describe_signal, train

    for note in arguments.notes:
        print_note(f"note: {note}")
    if not arguments.model_name_or_path:
        raise OptionError("no model is given", hint="--model_name_or_path model.gguf")
    check_output_dir(arguments)  # before the minutes that loading a large model takes
    console = Console(stderr=True)
    model, tokenizer = load(
        arguments.model_name_or_path,
        quantize=arguments.quantize,
        dtype=arguments.compute_dtype,
        device=arguments.device,
    )
    if tokenizer is None:
        raise without_tokenizer(arguments.model_name_or_path, model, "training")
    if arguments.adapter_name_or_path:
        loaded = load_adapter(model, arguments.adapter_name_or_path, arguments.adapter_name, force=arguments.force)
        print_note(str(loaded))
    seen = len(arguments.notes)
    report = train(model, tokenizer, None, arguments, console=console)
    for note in report.notes[seen:]:
        print_note(f"note: {note}")
    print_note(report.accounting.summary())
    if report.signal is not None:
        print_note(describe_signal(report))
        return report.exit_code
    _print_report(report)
    return 0


def _print_report(report: "TrainReport") -> None:
    metrics = report.metrics
    print(f"trained {report.parameters:,} parameters in {report.steps} steps, {metrics['seconds']:.0f} s")
    print(f"loss {metrics['train_loss']:.3f}", end="")
    if "eval_loss" in metrics:
        before = f"{metrics['eval_loss_before']:.3f} -> " if "eval_loss_before" in metrics else ""
        print(f", held-out {before}{metrics['eval_loss']:.3f}", end="")
    print(f", {metrics['tokens_per_second']:.0f} tokens/s, peak memory {metrics['peak_memory_bytes'] / 1e9:.2f} GB")
    if metrics["skipped_steps"]:
        print(f"{metrics['skipped_steps']:.0f} steps were skipped: their loss or gradient was not finite")
    print(f"adapter, run.json and loss.png are in {report.output_dir}")
