"""Learning from texts with images, on the loop that all runs have.

    sample   a conversation as the model's processor writes it, labels on its answers (data/image_samples.py)
    loss     cross-entropy of the answers' tokens, each times its weight; the mean over the labels of a step
    pass     texts of similar lengths, padded (passes/images.py)

The rows decide, not an option: where a model sees images and some row of a run holds one, all of its rows are learned so.
What has no meaning there is refused by `check_image_run`, all at once.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from qgraft.adapters.base import alone
from qgraft.data.image_samples import ImageSample, build_image_samples, require_processor
from qgraft.data.messages import Conversation
from qgraft.data.reading import Accounting, Dataset, named_columns, read_dataset
from qgraft.data.scripted import ChatGlmOptions
from qgraft.data.templates import ChatTemplate
from qgraft.data.tokenizing import IGNORED, Learning
from qgraft.errors import OptionError
from qgraft.linear import computing
from qgraft.memory.budget import CPU_TOKENS
from qgraft.memory.settings import UNCOUNTED
from qgraft.model_parts import vision_of
from qgraft.passes.decoder import evaluating
from qgraft.passes.images import image_losses, images_together, split_images
from qgraft.passes.limits import stated_ends
from qgraft.training.objective import Evaluation, Outcome
from qgraft.training.option_names import PACKED
from qgraft.training.processes import ALONE, Processes

if TYPE_CHECKING:
    from qgraft.training.arguments import TrainArguments


@dataclass(frozen=True)
class ImageTextToText:
    """An Objective, see objective.py. `alone`: every text passes through the model by itself."""

    label_smoothing: float = 0.0
    alone: bool = False
    names: Sequence[str] = ()

    def begin(
        self,
        model: PreTrainedModel,
        every: Sequence[ImageSample],
        own: Sequence[ImageSample],
        tokens: int,
        processes: Processes,
        step: int,
    ) -> tuple[list[ImageSample], float]:
        """As they are, and the weight of all labels: each is learned by itself."""
        return list(own), self.count(every)

    def count(self, samples: Sequence[ImageSample]) -> float:
        """The weight of all labels."""
        return weigh_labels(samples)

    def batches(self, samples: Sequence[ImageSample], tokens: int) -> list[list[ImageSample]]:
        """See split_images."""
        return split_images(samples, 0 if self.alone else tokens)

    def outcome(self, model: PreTrainedModel, batch: Sequence[ImageSample]) -> Outcome:
        """The weighted sum of the losses at the labels."""
        return Outcome(image_losses(model, batch, self.label_smoothing)[0])

    def means(self, sums: Mapping[str, float], count: float) -> dict[str, float]:
        """None, as there are no metrics."""
        return {name: value / count for name, value in sums.items()}

    def evaluate(
        self, model: PreTrainedModel, samples: Sequence[ImageSample], tokens: int, processes: Processes
    ) -> Evaluation:
        """The mean over all labels, without smoothing."""
        return evaluate_images(model, samples, 0 if self.alone else tokens, processes=processes, found_out=True)


def weigh_labels(samples: Sequence[ImageSample]) -> float:
    """The weight of all labels; the first of a text is predicted from nothing and is none."""
    return float(
        sum(
            (1.0 if sample.weights is None else sample.weights[at])
            for sample in samples
            for at, label in enumerate(sample.labels)
            if at and label != IGNORED
        )
    )


@torch.no_grad()
@alone("evaluated")
def evaluate_images(
    model: PreTrainedModel,
    samples: Sequence[ImageSample],
    tokens: int | None = None,
    compute: str | None = None,
    processes: Processes = ALONE,
    passed: Callable[[int], None] = lambda _: None,
    *,
    found_out: bool = False,
) -> Evaluation:
    """The loss on samples with images; the arguments are those of evaluate_samples, and:

    Args:
        found_out: whether it is known already how they pass through the model.
    """
    tokens = _tokens(model) if tokens is None else tokens
    total, labels, weight = 0.0, 0, 0.0
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(nullcontext() if compute is None else computing(model, compute))
        apart = None if found_out else stack.enter_context(images_together(model, samples))
        for part in split_images(processes.share(samples), 0 if apart else tokens):
            total += float(image_losses(model, part)[0])
            labels += sum(label != IGNORED for sample in part for label in sample.labels[1:])
            weight += weigh_labels(part)
            passed(len(part))
    sums = torch.tensor([total, labels, weight], dtype=torch.float64, device=model.device)
    total, labels, weight = processes.add(sums).tolist()
    loss = total / (weight or 1.0)
    return Evaluation(loss, math.exp(min(loss, 700.0)), len(samples), int(labels))


def _tokens(model: PreTrainedModel) -> int:
    """Of a pass, where nobody says."""
    return UNCOUNTED if model.device.type == "cuda" else CPU_TOKENS


@contextmanager
def image_passes(
    model: PreTrainedModel, args: "TrainArguments", samples: Sequence[ImageSample], notes: list[str]
) -> Iterator[int]:
    """Within the block a run's texts take the fastest way through the model; yields the tokens of a pass, 0 for one text."""
    with computing(model, args.compute), images_together(model, samples) as apart:
        if apart:
            notes.append(apart)
        yield 0 if apart else args.max_tokens_per_pass or _tokens(model)


def holds_images(samples: Sequence[Any]) -> bool:
    """Whether these are samples with images, or such that are learned together with them."""
    return any(isinstance(sample, ImageSample) for sample in samples)


Rows = tuple[list[Conversation], Accounting]


def image_rows(
    model: PreTrainedModel, args: "TrainArguments", *datasets: tuple[Dataset | None, int | None]
) -> list[Rows | None] | None:
    """The rows of each dataset of a run, at most so many, if the model sees images and some row holds one; else None."""
    if args.stage != "sft" or not vision_of(model):
        return None
    found: list[Rows | None] = []
    for dataset, most in datasets:
        if not dataset:
            found.append(None)
            continue
        found.append(read_dataset(
            dataset, args.dataset_dir, name=args.name, author=args.author, columns=named_columns(vars(args)),
            max_samples=most or args.max_samples, allow_outside_files=args.allow_outside_files, images=True,
        ))  # fmt: skip
    return found if any(rows and with_images(rows[0]) for rows in found) else None


def with_images(conversations: Sequence[Conversation]) -> bool:
    """Whether any of them holds an image."""
    return any(message.images for conversation in conversations for message in conversation.messages)


def learning_of(model: PreTrainedModel, args: "TrainArguments") -> Learning:
    """What a run's options say is learned of its rows."""
    return Learning(args.system, mask_history=args.mask_history, mask_reasoning=args.mask_reasoning,
                    eos_ids=stated_ends(model), chatglm=ChatGlmOptions(source_prefix=args.source_prefix))  # fmt: skip


def samples_of(
    model: PreTrainedModel, rows: Rows, template: ChatTemplate, limit: int, learning: Learning
) -> tuple[list[ImageSample], Accounting]:
    """The samples of conversations with images, of at most `limit` tokens, and where the rows went."""
    conversations, accounting = rows
    processor = require_processor(model)
    samples = build_image_samples(
        processor, conversations, accounting, template=template, max_length=limit, learning=learning
    )
    return samples, accounting


_MEANINGLESS: dict[str, tuple[str, Callable[[Any], bool]]] = {  # option -> (why it has no meaning, which values say it)
    "finetuning_type": ("a prefix goes on models of text; take lora", lambda value: value != "lora"),
    "train_on_prompt": ("an image's tokens are nothing to predict", bool),
    "cuda_graphs": ("these passes are not recorded", lambda value: value == "yes"),
    "cache_frozen_layers": ("what enters the layers is not kept for images", bool),
    "neftune_noise_alpha": ("noise is for texts alone", bool),
    "memory_limit": ("the memory of images is not counted; give max_tokens_per_pass", bool),
    "ignore_pad_token_for_loss": ("padding is never learned", lambda value: not value),
    "add_tokens": ("new tokens are for texts alone", bool),
    "add_special_tokens": ("new tokens are for texts alone", bool),
}  # fmt: skip


def check_image_run(said: Mapping[str, Any], notes: Sequence[str] = ()) -> None:
    """Raise OptionError for options that have no meaning where rows hold images, at once; `notes` are those of a run."""
    problems = [
        f"{name}={said[name]}: {why}" for name, (why, says) in _MEANINGLESS.items() if name in said and says(said[name])
    ]
    problems += (
        ["packing: texts with images pass padded, side by side"] if any(PACKED in note for note in notes) else []
    )
    if problems:
        raise OptionError("the rows hold images: " + "; ".join(problems), hint="leave these out")
