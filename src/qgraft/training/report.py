"""What a run did: the report, and the files that it ends in."""

import dataclasses
import signal
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedModel

from qgraft import plots, storage
from qgraft.adapter_files.folder import save_adapter
from qgraft.adapters.base import base_of
from qgraft.data.reading import Accounting
from qgraft.data.tokenizing import Sample, samples_sha256
from qgraft.errors import option, worded
from qgraft.training.adapter import describe_adapter
from qgraft.training.arguments import TrainArguments, changed_arguments
from qgraft.training.callbacks import METRICS
from qgraft.training.checkpoints import Bound
from qgraft.training.output_dir import RUN


@dataclass(frozen=True)
class TrainReport:
    """What a run did; the same numbers stand in run.json.

    Attributes:
        output_dir: where everything is.
        steps: optimizer steps in all; `finished` tells whether these are all that were planned.
        signal: the number of the signal that ended the run early, or None.
        metrics: train_loss, eval_loss_before, eval_loss, tokens_per_second, seconds, peak_memory_bytes, ...
        accounting: where every row of the dataset went; held_out_accounting likewise of the held-out one, if given.
        notes: what a reader should know, each one sentence.
        unchanged: whether the run had ended before and nothing was done; metrics are those of then.
    """

    output_dir: Path
    steps: int
    finished: bool
    signal: int | None
    parameters: int
    metrics: dict[str, float]
    accounting: Accounting
    held_out_accounting: Accounting | None = None
    notes: list[str] = field(default_factory=list)
    unchanged: bool = False

    @property
    def exit_code(self) -> int:
        """0, or the shell's code for the signal: 130 for Ctrl-C, 143 for SIGTERM."""
        return 0 if self.signal is None else 128 + self.signal


def save_run(
    model: PreTrainedModel,
    args: TrainArguments,
    report: TrainReport,
    samples: list[Sample],
    held_out: list[Sample],
    bound: Bound,
    planned_steps: int,
) -> None:
    """The adapter, run.json and loss.png; a run that a signal ended leaves its checkpoint and run.json only."""
    folder = report.output_dir
    run = {
        "finished": report.finished,
        "compute": args.compute,
        "steps": report.steps,
        "planned_steps": planned_steps,
        "adapter": describe_adapter(model, args.adapter_name),
        "parameters": report.parameters,
        "metrics": report.metrics,
        "dataset": {
            "name": args.dataset,
            "samples": len(samples),
            "held_out": len(held_out),
            "sha256": samples_sha256(samples),
            "accounting": report.accounting.as_dict(),
            "held_out_accounting": report.held_out_accounting.as_dict() if report.held_out_accounting else None,
        },
        "arguments": changed_arguments(args),
        "bound": bound.fixed,
        "notes": report.notes,
    }
    if report.finished:
        details = {key: run[key] for key in ("dataset", "arguments", "metrics")}
        save_adapter(model, folder, args.adapter_name, details, save_calibration=True)
    base = base_of(model).info
    storage.write_json(folder / RUN, {**run, "base": None if base is None else dataclasses.asdict(base)})
    if args.plot_loss and (folder / METRICS).is_file():
        plots.plot_losses(folder / METRICS, folder / "loss.png")


def describe_signal(report: TrainReport) -> str:
    """What to tell somebody whose run was interrupted."""
    assert report.signal is not None
    name = signal.Signals(report.signal).name
    return (
        f"{name}: stopped after step {report.steps}; checkpoint-{report.steps} is saved in {report.output_dir}.\n"
        f"{worded(flags='Give the same command with', python='Call train() again with')} "
        f"{option('resume_from_checkpoint', 'auto')} to go on to the same result."
    )
