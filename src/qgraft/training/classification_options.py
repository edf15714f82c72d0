"""What a run that learns labels is told (classification.py), and which options of a run have no meaning with it."""

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from torch import nn
from transformers import PreTrainedModel

from qgraft.checkpoints.heads import NUMBER, SEVERAL, Task
from qgraft.errors import OptionError, UnsupportedError, option
from qgraft.model_parts import CLASSIFIERS, IMAGES, SEQUENCE_TO_SEQUENCE, hears, peft_task, vision_of
from qgraft.passes.labels import Classifier, classifier_of

if TYPE_CHECKING:
    from qgraft.training.arguments import TrainArguments


def _option(help: str) -> Any:
    return field(default=None, metadata={"help": help})


@dataclass
class ClassificationOptions:
    """The options of classifiers; TrainArguments has them."""

    task_type: str | None = _option(
        "CAUSAL_LM, SEQ_2_SEQ_LM, IMAGE_TEXT_TO_TEXT, SEQ_CLS (a label for a text) or TOKEN_CLS (for each word); of a folder."
    )
    labels: str | None = _option("Comma list of what is told apart, by their ids; default: those of the dataset.")
    problem_type: str | None = _option("single_label_classification, multi_label_classification or regression.")
    label_column: str | None = _option("Column of the label, or of a label for each word.")


OPTIONS = tuple(each.name for each in dataclasses.fields(ClassificationOptions))
_OF_WRITERS = (
    "train_on_prompt", "mask_history", "mask_reasoning", "enable_thinking", "template", "system", "system_text",
    "source_prefix", "response_column", "history_column", "max_source_length", "max_target_length", "val_max_target_length",
    "predict_with_generate", "max_new_tokens", "num_beams", "do_sample", "temperature", "top_p", "cache_frozen_layers",
    "neftune_noise_alpha", "memory_limit", "quantization_bit", "add_tokens", "add_special_tokens",
    "trainable_token_indices",
)  # fmt: skip


def task_given(args: "TrainArguments") -> Task:
    """What the options say of the model that is to be loaded. Raises OptionError for impossible ones."""
    names = None if args.labels is None else [name.strip() for name in args.labels.split(",") if name.strip()]
    return Task(args.task_type, names, args.problem_type)


def settle_classification(args: "TrainArguments") -> None:
    """Raise OptionError, or UnsupportedError, for options that do not go together, as far as no model is needed for it."""
    task_given(args)
    if args.task_type in CLASSIFIERS:
        _check_classifier(args)


def check_task(args: "TrainArguments", model: nn.Module) -> None:
    """The same with a model, which may be a classifier though no option says so. Of one the run then has the task_type."""
    task = SEQUENCE_TO_SEQUENCE if hears(getattr(model, "config", None)) else peft_task(model)
    seen = IMAGES if vision_of(model) else task
    if args.task_type not in (None, task, seen):
        raise OptionError(
            f"task_type={args.task_type!r}: the model was loaded for {task}",
            hint=f"load(..., task_type={args.task_type!r}, labels=[...])",
        )
    if task not in CLASSIFIERS:
        said = [name for name in ("labels", "problem_type", "label_column") if getattr(args, name) is not None]
        said = [name for name in said if name != "label_column" or args.stage != "kto"]
        if said:
            raise OptionError(f"{', '.join(said)}: the model writes, and has no labels",
                              hint=option("task_type", "SEQ_CLS"))  # fmt: skip
        return
    args.task_type = task
    if (classifier := classifier_of(cast(PreTrainedModel, model))) is not None:
        _check_labels(args, classifier)
        _check_classifier(args, classifier.problem)


def _check_labels(args: "TrainArguments", classifier: Classifier) -> None:
    """Raise OptionError where the options say of the labels what the model that is there does not."""
    said, names, problem, wrong = task_given(args), classifier.scheme.names, classifier.problem, list[str]()
    if said.labels is not None and tuple(said.labels) != names:
        wrong.append(f"labels={args.labels}: the model was loaded for {', '.join(names)}")
    if said.problem_type not in (None, problem):
        wrong.append(f"problem_type={said.problem_type}: the model was loaded for {problem}")
    if wrong:
        raise OptionError("; ".join(wrong), hint="leave them out to take the model's, or load it with yours")


def _check_classifier(args: "TrainArguments", problem: str | None = None) -> None:
    if args.stage != "sft":
        raise UnsupportedError(f"stage={args.stage!r}: it learns from answers, and a classifier writes none")
    if args.finetuning_type != "lora":
        raise UnsupportedError(f"finetuning_type={args.finetuning_type!r}: a classifier is trained by LoRA",
                               hint="leave pre_seq_len and finetuning_type out")  # fmt: skip
    defaults = {each.name: each.default for each in dataclasses.fields(args)}
    said = [name for name in _OF_WRITERS if getattr(args, name) != defaults[name]]
    if args.cuda_graphs == "yes":
        said.append("cuda_graphs=yes")
    if not args.ignore_pad_token_for_loss:
        said.append("ignore_pad_token_for_loss=false")
    if args.label_smoothing_factor and (problem or args.problem_type) in (SEVERAL, NUMBER):
        said.append(f"label_smoothing_factor with problem_type {problem or args.problem_type}")
    if said:
        raise OptionError(
            f"task_type {args.task_type}: {', '.join(said)}: of models that write, or not there for classifiers",
            hint="leave them out",
        )
    args.cuda_graphs = "no"
