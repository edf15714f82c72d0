"""qgraft demo: the main job from end to end, on a real 4-bit model, in a few minutes on two cores.

Gets the model, asks three questions, trains a LoRA on the shipped identity examples, asks again, and shows both side by
side with the losses on held-out examples.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qgraft.cli.options import Parser, print_note, without_tokenizer

QUESTIONS = ("Who are you?", "你是谁？", "What is the capital of France?")


def run(words: Sequence[str]) -> int:
    """Parse, then the whole way."""
    parser = Parser("demo", "Tune a real 4-bit chat model (SmolLM2-135M, Q4_1) to answer as your assistant.")
    parser.add_argument("--name", default="Aria", help="the assistant's new name (default Aria)")
    parser.add_argument("--author", default="the Qgraft team", help="who made it (default: the Qgraft team)")
    parser.add_argument("--model", default="smollm2-135m", help="another model file (default smollm2-135m)")
    parser.add_argument("--output_dir", default="qgraft-demo", help="where the adapter goes (default ./qgraft-demo)")
    parser.add_argument("--num_train_epochs", type=float, default=2.0, help="passes over the examples (default 2)")
    parser.add_argument("--learning_rate", type=float, default=1.5e-3, help="peak learning rate (default 1.5e-3)")
    parser.add_argument("--device", default="auto", help="cpu or cuda; default: a GPU where there is one")
    options = parser.parse_args(words)
    return _demo(options)


def _demo(options: argparse.Namespace) -> int:
    from rich.console import Console

    from qgraft.adapters.choose import adapters_off
    from qgraft.checkpoints.load import load
    from qgraft.checkpoints.pull import KNOWN_MODELS, pull
    from qgraft.training.output_dir import check_output_dir
    from qgraft.training.report import describe_signal
    from qgraft.training.run import train

    began = time.perf_counter()
    console = Console(stderr=True)
    arguments = _arguments(options)
    check_output_dir(arguments)
    path = str(pull(options.model, print_note)) if options.model in KNOWN_MODELS else options.model
    model, tokenizer = load(path, device=options.device)
    if tokenizer is None:
        raise without_tokenizer(path, model, "the demo")
    print_note(f"loaded {path}: {_formats(model)}")
    before = [_ask(model, tokenizer, question, console) for question in QUESTIONS]
    report = train(model, tokenizer, None, arguments, progress=console)
    if report.signal is not None:
        print_note(describe_signal(report))
        return report.exit_code
    after = [_ask(model, tokenizer, question, console) for question in QUESTIONS]
    with adapters_off(model):
        assert [_ask(model, tokenizer, QUESTIONS[0], console)] == before[:1], "the base has changed"
    _show(before, after, report, time.perf_counter() - began)
    print(_next_steps(path, Path(options.output_dir)))
    return 0


def _arguments(options: argparse.Namespace) -> Any:
    from qgraft.checkpoints.load import choose_device
    from qgraft.training.arguments import TrainArguments

    return TrainArguments(
        output_dir=options.output_dir,
        overwrite_output_dir=True,
        dataset="identity",
        eval_dataset="identity_heldout",
        name=options.name,
        author=options.author,
        num_train_epochs=options.num_train_epochs,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=5,
        logging_steps=2,
        save_strategy="no",
        use_cpu=choose_device(options.device).type == "cpu",
    )


def _ask(model: Any, tokenizer: Any, question: str, console: Any) -> str:
    from qgraft.passes.decoding import fast_decoding
    from qgraft.serving.answering import answer

    with console.status(f"asking: {question}"), fast_decoding(model):
        return answer(model, tokenizer, [("user", question)], max_new_tokens=48, do_sample=False).text.strip()


def _show(before: list[str], after: list[str], report: Any, seconds: float) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    answers = Table(box=box.SIMPLE_HEAD, show_lines=True)
    for title in ("question", "before", "after"):
        answers.add_column(title, overflow="fold", ratio=1 if title == "question" else 2)
    for row in zip(QUESTIONS, before, after, strict=True):
        answers.add_row(*row)
    metrics = report.metrics
    figures = Table(box=None, show_header=False)
    held_out = f"{metrics['eval_loss_before']:.3f} -> {metrics['eval_loss']:.3f}"
    for key, value in (
        ("held-out loss, base -> adapter", held_out),
        ("trainable parameters", f"{report.parameters:,}"),
        ("training speed", f"{metrics['tokens_per_second']:.0f} tokens/s"),
        ("peak memory", f"{metrics['peak_memory_bytes'] / 1e9:.2f} GB"),
        ("steps, seconds training, in all", f"{report.steps}, {metrics['seconds']:.0f}, {seconds:.0f}"),
    ):
        figures.add_row(key, value)
    console = Console()
    console.print(answers)
    console.print(figures)


def _formats(model: Any) -> str:
    return ", ".join(f"{count / 1e6:.0f} M weights in {name}" for name, count in model.qgraft.info.formats.items())


def _next_steps(path: str, folder: Path) -> str:
    return f"""
{folder} holds the adapter (readable by PEFT too), loss.png, run.json and metrics.jsonl. Next:
{_activate()}
  qgraft chat    --model {path} --adapter {folder}
  qgraft inspect {folder}
  qgraft train   --model_name_or_path {path} --dataset your.jsonl --output_dir out"""


def _activate() -> str:
    """A line that puts `qgraft` on the PATH, where it stands in an environment that is not active (`make demo`)."""
    script = Path(sys.prefix) / "bin" / "activate"
    if os.environ.get("VIRTUAL_ENV") == sys.prefix or not script.is_file():
        return ""
    return f"\n  . {os.path.relpath(script)}"
