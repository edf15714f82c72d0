"""What a model that hears writes of recordings: its part of predict(), beside the error rates and the loss."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qgraft.data.reading import Accounting, Dataset
from qgraft.data.speech_samples import without_stamps
from qgraft.passes.decoder import evaluating
from qgraft.passes.speech import generate_spoken
from qgraft.progress import Display
from qgraft.training.arguments import TrainArguments
from qgraft.training.error_rates import error_rates
from qgraft.training.padded import evaluate_padded
from qgraft.training.speech import SPEECH, check_run, read_speech, speech_options

ANSWERED = (TextColumn("answered {task.completed:.0f}/{task.total:.0f}"), BarColumn(bar_width=8),
            TimeRemainingColumn(compact=True))  # fmt: skip


def predict_speech(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dataset: Dataset, args: TrainArguments,
    settings: Mapping[str, Any], most: int | None, console: Console | None,
) -> tuple[list[tuple[str, str]], dict[str, float], dict[str, Any], Accounting]:  # fmt: skip
    """((expected, written) texts, wer, cer and loss, what generate() was told, where the rows went).

    Args:
        settings: what generate() is told, with the most tokens of an answer as max_new_tokens.
        most: so many rows at most.
    """
    check_run(model.config, args)
    samples, accounting = read_speech(model, dataset, args, held_out=True, most=most)
    spoken, written, at_once = speech_options(model, args), list[str](), args.per_device_eval_batch_size
    told = {**settings, **spoken.told, "max_new_tokens": min(settings["max_new_tokens"], spoken.room)}
    with evaluating(model), Display(*ANSWERED, console=console) as progress:
        task = progress.add_task("", total=len(samples))
        for start in range(0, len(samples), at_once):
            sounds = [sample.images[0] for sample in samples[start : start + at_once]]
            for ids in generate_spoken(model, sounds, **told):
                written.append(without_stamps(str(tokenizer.decode(ids, skip_special_tokens=True))))
            progress.advance(task, len(sounds))
    texts = [(without_stamps(sample.text), answer) for sample, answer in zip(samples, written, strict=True)]
    loss = evaluate_padded(model, SPEECH, samples, compute=args.compute).loss
    return texts, error_rates(texts) | {"loss": loss}, told, accounting
