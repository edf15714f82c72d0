"""Learning from texts with images, on the loop that all runs have.

    sample   a conversation as the model's processor writes it (data/image_samples.py)
    label    a token of its answers
    pass     texts of similar lengths, padded (passes/images.py, padded.py)

The rows decide, not an option: where a model sees images and some row of a run holds one, all of its rows are learned so.
What has no meaning there is refused by `check_image_run`, all at once.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from qgraft.data.image_samples import ImageSample, build_image_samples, require_processor
from qgraft.data.messages import Conversation
from qgraft.data.reading import Accounting, Dataset, named_columns, read_dataset
from qgraft.data.scripted import ChatGlmOptions
from qgraft.data.templates import ChatTemplate
from qgraft.data.tokenizing import IGNORED, Learning
from qgraft.errors import DataError, OptionError, option
from qgraft.model_parts import marker_ids, vision_of
from qgraft.passes.images import image_losses, images_together, split_images
from qgraft.passes.limits import stated_ends
from qgraft.training.option_names import PACKED
from qgraft.training.padded import Kind

if TYPE_CHECKING:
    from qgraft.training.arguments import TrainArguments


def weight_of(sample: ImageSample) -> float:
    """The weight of a sample's labels; the first of a text is predicted from nothing and is none."""
    weights = [1.0] * len(sample.labels) if sample.weights is None else sample.weights
    return float(sum(w for w, label in zip(weights[1:], sample.labels[1:], strict=True) if label != IGNORED))


IMAGES = Kind[ImageSample](
    split=split_images,
    losses=image_losses,
    together=images_together,
    labels=lambda sample: sum(label != IGNORED for label in sample.labels[1:]),
    weight=weight_of,
)


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
        if dataset is None or dataset == "":
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


def texts_alone(conversations: Sequence[Conversation], accounting: Accounting, stage: str) -> list[Conversation]:
    """Those without images, for a stage that learns from texts; `accounting` moves the others to those dropped.

    Raises DataError where all of them hold some.
    """
    texts = list[Conversation]()
    for each in conversations:
        if not with_images([each]):
            texts.append(each)
            continue
        accounting.kept -= 1
        accounting.drop(f"holds images, and stage {stage} learns from texts alone", each.source)
    if not texts:
        raise DataError(f"no row is left: {accounting.summary()}", hint=f"{option('stage', 'sft')} learns from images")
    return texts


def learning_of(model: PreTrainedModel, args: "TrainArguments") -> Learning:
    """What a run's options say is learned of its rows."""
    return Learning(args.system, mask_history=args.mask_history, mask_reasoning=args.mask_reasoning,
                    eos_ids=stated_ends(model), chatglm=ChatGlmOptions(source_prefix=args.source_prefix),
                    markers=marker_ids(model))  # fmt: skip


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
