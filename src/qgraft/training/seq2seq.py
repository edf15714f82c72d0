"""Learning from sequence to sequence: T5, BART and their kind, on the loop that all runs have.

    sample   a pair of source and target (data/pairs.py)
    loss     cross-entropy of the target's tokens given the source and the tokens before, each times its pair's weight; the
             mean over the labels of a step, as of supervised fine-tuning
    pass     pairs of similar lengths, padded (passes/pairs.py)

Which kind of model it is decides, not an option: `stage: sft` on an encoder-decoder learns so. What has no meaning there is
refused by `check_pair_options`, all at once, and on the command line before the weights are read.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qgraft.adapters.base import alone
from qgraft.data.pairs import PairOptions, PairSample, build_pairs
from qgraft.data.reading import Accounting, Dataset, named_columns, read_dataset
from qgraft.errors import OptionError, option
from qgraft.linear import computing
from qgraft.memory.budget import CPU_EVAL_TOKENS, CPU_TOKENS
from qgraft.memory.settings import UNCOUNTED
from qgraft.passes.decoder import evaluating
from qgraft.passes.pairs import pair_losses, padded_together, split_pairs
from qgraft.training.objective import Evaluation, Outcome
from qgraft.training.option_names import PACKED
from qgraft.training.processes import ALONE, Processes

if TYPE_CHECKING:
    from qgraft.training.arguments import TrainArguments


@dataclass(frozen=True)
class SequenceToSequence:
    """An Objective, see objective.py. `alone`: every pair passes through the model by itself."""

    label_smoothing: float = 0.0
    alone: bool = False
    names: Sequence[str] = ()

    def begin(
        self,
        model: PreTrainedModel,
        every: Sequence[PairSample],
        own: Sequence[PairSample],
        tokens: int,
        processes: Processes,
    ) -> None:
        """Nothing: each label is learned by itself."""

    def count(self, samples: Sequence[PairSample]) -> float:
        """The weight of all labels."""
        return float(sum(len(sample.labels) * sample.weight for sample in samples))

    def batches(self, samples: Sequence[PairSample], tokens: int) -> list[list[PairSample]]:
        """See split_pairs."""
        return split_pairs(samples, 0 if self.alone else tokens)

    def outcome(self, model: PreTrainedModel, batch: Sequence[PairSample]) -> Outcome:
        """The weighted sum of the losses at the labels."""
        return Outcome(pair_losses(model, batch, self.label_smoothing)[0])

    def means(self, sums: Mapping[str, float], count: float) -> dict[str, float]:
        """None, as there are no metrics."""
        return {name: value / count for name, value in sums.items()}

    def evaluate(
        self, model: PreTrainedModel, samples: Sequence[PairSample], tokens: int, processes: Processes
    ) -> Evaluation:
        """The mean over all labels, without smoothing."""
        return evaluate_pairs(model, samples, 0 if self.alone else tokens, processes=processes, found_out=True)


@torch.no_grad()
@alone("evaluated")
def evaluate_pairs(
    model: PreTrainedModel,
    samples: Sequence[PairSample],
    tokens: int | None = None,
    compute: str | None = None,
    processes: Processes = ALONE,
    passed: Callable[[int], None] = lambda _: None,
    *,
    found_out: bool = False,
) -> Evaluation:
    """The loss on pairs that are tokenized already; the arguments are those of evaluate_samples, and:

    Args:
        found_out: whether it is known already how pairs pass through the model.
    """
    tokens = CPU_EVAL_TOKENS if tokens is None else tokens  # of logits of a whole vocabulary, on a GPU too
    total, labels, weight = 0.0, 0, 0.0
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(nullcontext() if compute is None else computing(model, compute))
        apart = None if found_out else stack.enter_context(padded_together(model, samples))
        own = processes.share(samples)
        for part in split_pairs(own, 0 if apart else tokens):
            total += float(pair_losses(model, part)[0])
            labels += sum(len(sample.labels) for sample in part)
            weight += sum(len(sample.labels) * sample.weight for sample in part)
            passed(len(part))
    sums = torch.tensor([total, labels, weight], dtype=torch.float64, device=model.device)
    total, labels, weight = processes.add(sums).tolist()
    loss = total / (weight or 1.0)
    return Evaluation(loss, math.exp(min(loss, 700.0)), len(samples), int(labels))


@contextmanager
def pair_passes(
    model: PreTrainedModel, args: "TrainArguments", samples: Sequence[PairSample], notes: list[str]
) -> Iterator[int]:
    """Within the block a run's pairs take the fastest way through the model; yields the tokens of a pass, 0 for one pair."""
    with computing(model, args.compute), padded_together(model, samples) as apart:
        if apart:
            notes.append(apart)
        yield 0 if apart else args.max_tokens_per_pass or (UNCOUNTED if model.device.type == "cuda" else CPU_TOKENS)


def read_pairs(
    tokenizer: PreTrainedTokenizerBase, dataset: Dataset, args: "TrainArguments", limit: int, *, held_out: bool
) -> tuple[list[PairSample], Accounting]:
    """The pairs of one dataset, with sources and targets of at most `limit` tokens, as the options of a run ask for them."""
    most = args.max_eval_samples if held_out else args.max_train_samples
    longest = args.val_max_target_length if held_out else None
    conversations, accounting = read_dataset(
        dataset, args.dataset_dir, name=args.name, author=args.author, columns=named_columns(vars(args)),
        max_samples=most or args.max_samples, allow_outside_files=args.allow_outside_files,
    )  # fmt: skip
    options = PairOptions(args.source_prefix, min(args.max_source_length or limit, limit),
                          min(longest or args.max_target_length or limit, limit))  # fmt: skip
    return build_pairs(tokenizer, conversations, accounting, options), accounting


def check_pair_options(args: "TrainArguments") -> None:
    """Raise OptionError for options that have no meaning for an encoder-decoder, at once."""
    wrong = {
        f"stage {args.stage}: preferences are learned of decoders that read prompt and answer as one text": (
            args.stage != "sft"
        ),
        "finetuning_type p_tuning: a prefix goes on decoders; take lora": args.finetuning_type == "p_tuning",
        "packing: source and target go into two networks, and samples are padded beside each other": (
            any(PACKED in note for note in args.notes)
        ),
        "train_on_prompt: the encoder reads the source, and predicts none of it": args.train_on_prompt,
        "mask_history: a row has no history": args.mask_history,
        "mask_reasoning: a target is a text": args.mask_reasoning,
        "history_column: a row has no history": args.history_column,
        "cuda_graphs=yes: these passes are not recorded": args.cuda_graphs == "yes",
        "cache_frozen_layers: what enters an adapter in the decoder changes with those of the encoder": (
            args.cache_frozen_layers
        ),
        "neftune_noise_alpha: noise is for decoders that read prompt and answer as one text": args.neftune_noise_alpha,
        "memory_limit: the memory of an encoder-decoder is not counted; give max_tokens_per_pass": args.memory_limit,
        "ignore_pad_token_for_loss=false: padding is never learned": not args.ignore_pad_token_for_loss,
        **prompting_problems(args.template, args.system, args.enable_thinking),
    }
    _refuse([problem for problem, holds in wrong.items() if holds])


def check_prompting(template: str | None, system: str | None, enable_thinking: bool | None) -> None:
    """Raise OptionError for what is of chat templates alone, where an encoder-decoder is asked."""
    _refuse([problem for problem, holds in prompting_problems(template, system, enable_thinking).items() if holds])


def prompting_problems(template: str | None, system: str | None, enable_thinking: bool | None) -> dict[str, Any]:
    """What of these an encoder-decoder has no place for, each with whether it is said."""
    return {
        f"template {template}: the encoder reads the text as it is": template not in (None, "auto", "plain"),
        "system: there is no chat template to put it into": system,
        "enable_thinking: there is no chat template to tell": enable_thinking is not None,
    }


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise OptionError(
            "an encoder-decoder (T5, BART and their kind): " + "; ".join(problems),
            hint=f"leave these out; a text in front of every source is {option('source_prefix', 'translate: ')}",
        )
