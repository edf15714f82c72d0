"""The loss of a model on held-out samples: the mean over all label tokens, each by its weight, not of batch means."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace

import torch
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qgraft.adapters.base import alone
from qgraft.data.batches import collate, count_labels, split_batch, weigh_labels
from qgraft.data.reading import Dataset, read_dataset
from qgraft.data.tokenizing import ChatGlmOptions, ChatTemplate, Sample, build_samples, resolve_template
from qgraft.linear import computing
from qgraft.memory.budget import CPU_EVAL_TOKENS, GPU_EVAL_TOKENS, evaluation_tokens
from qgraft.passes.decoder import evaluating, padding_free
from qgraft.passes.limits import sample_limit, stated_ends
from qgraft.passes.loss import batch_loss
from qgraft.progress import Display, shown
from qgraft.ranges import LENGTH, check_ranges
from qgraft.training.arguments import TrainArguments
from qgraft.training.given import check_pair
from qgraft.training.processes import ALONE, Processes


@dataclass(frozen=True)
class Evaluation:
    """What evaluate() measured: `loss` in nats a label token, `perplexity` = exp(loss).

    Of the dataset's rows, `dropped` gave no sample, and `truncated` were cut at max_length.
    """

    loss: float
    perplexity: float
    samples: int
    labels: int
    dropped: int = 0
    truncated: int = 0

    def as_dict(self) -> dict[str, float]:
        """The fields by name, for JSON."""
        return asdict(self)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    *,
    dataset_dir: str | None = None,
    template: str | None = None,
    system: str | None = None,
    name: str | None = None,
    author: str | None = None,
    columns: Mapping[str, str] | None = None,
    max_length: int = 2048,
    train_on_prompt: bool = False,
    enable_thinking: bool | None = None,
    allow_outside_files: bool = False,
    progress: bool | Console | None = None,
) -> Evaluation:
    """The loss of the model with its active adapters on a dataset (see read_dataset for what can be named).

    Naming the history's column numbers the prompts of ChatGLM-6B from the first question on, as in training. Progress is
    shown in a terminal and a notebook, or as `progress` says.

    Raises DataError when the dataset cannot be read or holds no answers.
    """
    check_pair(model, tokenizer)
    check_ranges({"max_length": (max_length, LENGTH)})
    conversations, accounting = read_dataset(dataset, dataset_dir, name=name, author=author, columns=columns,
                                             allow_outside_files=allow_outside_files)  # fmt: skip
    chosen = resolve_template(tokenizer, template, enable_thinking=enable_thinking)
    samples = build_samples(
        tokenizer, conversations, accounting, template=chosen, system=system,
        max_length=sample_limit(model, max_length), train_on_prompt=train_on_prompt,
        chatglm=ChatGlmOptions(numbered="history" in (columns or ())), eos_ids=stated_ends(model),
    )  # fmt: skip
    shows = (TextColumn("evaluated {task.completed:.0f}/{task.total:.0f}"), BarColumn(bar_width=8),
             TimeRemainingColumn(compact=True))  # fmt: skip
    with Display(*shows, console=shown(progress)) as display:
        task = display.add_task("", total=len(samples))
        found = evaluate_samples(model, samples, passed=lambda count: display.advance(task, count))
    return replace(found, dropped=sum(accounting.dropped.values()), truncated=accounting.truncated)


def template_of(tokenizer: PreTrainedTokenizerBase, args: TrainArguments) -> ChatTemplate:
    """The chat template that a run's options ask for."""
    return resolve_template(
        tokenizer, args.template, enable_thinking=args.enable_thinking, system_text=args.system_text
    )


@torch.no_grad()
@alone("evaluated")
def evaluate_samples(
    model: PreTrainedModel,
    samples: Sequence[Sample],
    tokens: int | None = None,
    compute: str | None = None,
    processes: Processes = ALONE,
    passed: Callable[[int], None] = lambda _: None,
) -> Evaluation:
    """The loss on samples that are tokenized already, so many tokens in a pass. The model's training mode is kept.

    Args:
        compute: how products are computed, see QuantizedLinear; None for as they are.
        processes: those that share the work, each with all samples.
        passed: called after each pass with the number of samples that were in it.
    """
    tokens = tokens or (GPU_EVAL_TOKENS if model.device.type == "cuda" else CPU_EVAL_TOKENS)
    total, labels, weight = 0.0, 0, 0.0
    products = nullcontext() if compute is None else computing(model, compute)
    with products, evaluating(model), padding_free(model, samples) as problem:
        # neighbours of similar length waste least where attention is masked
        ordered = sorted(processes.share(samples), key=lambda sample: len(sample.input_ids))
        for part in split_batch(collate(ordered), 0 if problem else tokens) if ordered else ():
            total += float(batch_loss(model, part))
            labels += count_labels(part)
            weight += weigh_labels(part)
            passed(int((part["position_ids"] == 0).sum()))  # each sample begins with one
    sums = torch.tensor([total, labels, weight], dtype=torch.float64, device=model.device)
    total, labels, weight = processes.add(sums).tolist()
    loss = total / (weight or 1.0)
    return Evaluation(loss, math.exp(min(loss, 700.0)), len(samples), int(labels))


def held_out_loss(
    model: PreTrainedModel, args: TrainArguments, samples: Sequence[Sample], processes: Processes = ALONE
) -> float | None:
    """The loss on a run's held-out samples, where there are any."""
    return evaluate_samples(model, samples, evaluation_tokens(args), processes=processes).loss if samples else None
