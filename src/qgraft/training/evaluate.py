"""evaluate(): what a model, with its active adapters, says of held-out rows: their loss, or which answers it prefers."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qgraft.adapters.base import alone
from qgraft.adapters.choose import adapters_off
from qgraft.data.label_samples import build_label_samples
from qgraft.data.messages import Conversation
from qgraft.data.pairs import PairOptions, build_pairs, check_pair_options
from qgraft.data.preference_samples import Preference, build_preferences, mismatched
from qgraft.data.reading import Accounting, Dataset, read_dataset, read_labels, read_preferences
from qgraft.data.speech_samples import build_speech, read_recordings, spoken_as
from qgraft.data.tokenizing import ChatGlmOptions, ChatTemplate, Learning, build_samples, resolve_template
from qgraft.errors import OptionError
from qgraft.linear import computing
from qgraft.memory.budget import CPU_EVAL_TOKENS, GPU_EVAL_TOKENS
from qgraft.model_parts import hears, is_encoder_decoder, marker_ids, vision_of
from qgraft.passes.broken import check_held_out
from qgraft.passes.decoder import padding_free
from qgraft.passes.labels import Classifier, classifier_of, settled
from qgraft.passes.limits import sample_limit, stated_ends
from qgraft.passes.log_probs import shares_prompts
from qgraft.progress import Display, shown
from qgraft.ranges import LENGTH, check_ranges
from qgraft.training.arguments import TrainArguments
from qgraft.training.classification import LabelEvaluation, evaluate_labelled
from qgraft.training.given import check_pair
from qgraft.training.images import IMAGES, Rows, check_image_run, samples_of, with_images
from qgraft.training.objective import Evaluation, evaluate_samples
from qgraft.training.padded import evaluate_padded
from qgraft.training.preference_losses import PreferenceOptions
from qgraft.training.preferences import PreferenceEvaluation, PreferenceOptimization, with_reference
from qgraft.training.ranges import RANGES
from qgraft.training.speech import check_speech_options, kind_of
from qgraft.training.stages import preferring


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    *,
    dataset_dir: str | None = None,
    template: str | None = None,
    system: str | None = None,
    source_prefix: str = "",
    name: str | None = None,
    author: str | None = None,
    columns: Mapping[str, str] | None = None,
    max_length: int = 2048,
    max_source_length: int | None = None,
    max_target_length: int | None = None,
    train_on_prompt: bool = False,
    enable_thinking: bool | None = None,
    language: str | None = None,
    task: str | None = None,
    allow_outside_files: bool = False,
    stage: str = "sft",
    loss_type: str | None = None,
    beta: float | None = None,
    label_smoothing: float | None = None,
    desirable_weight: float | None = None,
    undesirable_weight: float | None = None,
    simpo_gamma: float | None = None,
    rpo_alpha: float | None = None,
    progress: bool | Console | None = None,
) -> Evaluation | PreferenceEvaluation | LabelEvaluation:
    """The loss of the model with its active adapters on a dataset (see read_dataset for what can be named).

    Naming the history's column numbers the prompts of ChatGLM-6B from the first question on, as in training. Progress is
    shown in a terminal and a notebook, or as `progress` says.

    Args:
        columns: see read_dataset; "prompt" and "label" of labelled texts, which a classifier is asked about.
        source_prefix: stands in front of every question, as in training.
        max_source_length, max_target_length: of an encoder-decoder, and ChatGLM: the longest of each, as in training.
        language, task: of texts of recordings, as in training; see TrainArguments.
        stage: sft, or of rows of preferences dpo, ipo, orpo, simpo, kto: the loss by `loss_type`, `beta` and the numbers
            behind it, as in TrainArguments, with rewards and accuracies beside the base.

    Raises DataError when the dataset cannot be read or holds no answers, TrainingError for a loss that is no number.
    """
    check_pair(model, tokenizer)
    sides = {"max_source_length": max_source_length, "max_target_length": max_target_length}
    numbers = {"beta": beta, "label_smoothing": label_smoothing, "desirable_weight": desirable_weight,
               "undesirable_weight": undesirable_weight, "simpo_gamma": simpo_gamma, "rpo_alpha": rpo_alpha}  # fmt: skip
    given = {name: (value, RANGES[name]) for name, value in {**numbers, **sides}.items() if value is not None}
    check_ranges({"max_length": (max_length, LENGTH), **given})
    options = preferring(stage, {"loss_type": loss_type, **numbers}, train_on_prompt=train_on_prompt and stage != "sft")
    reading: dict[str, Any] = {"names": dataset, "dataset_dir": dataset_dir, "name": name, "author": author,
                               "columns": columns, "allow_outside_files": allow_outside_files}  # fmt: skip
    limit = sample_limit(model, max_length)
    said = {"stage": stage, "train_on_prompt": train_on_prompt, "template": template, "system": system, **sides,
            "enable_thinking": enable_thinking, "history_column": (columns or {}).get("history"),
            "source_prefix": source_prefix, "language": language, "task": task}  # fmt: skip
    check_speech_options(model.config, said)
    if is_encoder_decoder(model.config):
        return _of_pairs(model, tokenizer, reading, said, limit, progress)
    chosen = resolve_template(tokenizer, template, enable_thinking=enable_thinking)
    learning: dict[str, Any] = {
        "template": chosen, "system": system, "max_length": limit, "eos_ids": stated_ends(model),
        "chatglm": ChatGlmOptions(max_source_length, max_target_length, "history" in (columns or ()), False, source_prefix),
        "markers": marker_ids(model),
    }  # fmt: skip
    if (classifier := classifier_of(model)) is not None:
        _refuse_of_writers({**said, "response_column": (columns or {}).get("response")})
        return _of_labels(model, tokenizer, read_labels(tokens=classifier.words, **reading), classifier, limit)
    if options is not None:
        judged = read_preferences(labelled=options.labelled, **reading)
        return _of_preferences(model, tokenizer, judged, options, learning)
    conversations, accounting = read_dataset(images=bool(vision_of(model)), **reading)
    if with_images(conversations):
        check_image_run({"train_on_prompt": train_on_prompt})
        return _evaluate_seen(model, (conversations, accounting), chosen, limit, system, source_prefix, progress)
    samples = build_samples(tokenizer, conversations, accounting, train_on_prompt=train_on_prompt, **learning)
    with _shown(len(samples), progress) as passed:
        return _accounted(model, evaluate_samples(model, samples, passed=passed), accounting)


def _of_preferences(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
    read: tuple[list[tuple[Conversation, ...]], Accounting], options: PreferenceOptions, learning: Mapping[str, Any],
) -> PreferenceEvaluation:  # fmt: skip
    """The same of rows of preferences, whose samples are made as `learning` says."""
    preferences = build_preferences(tokenizer, *read, **learning)
    preferences = mismatched(preferences, learning["max_length"]) if options.loss_type == "kto" else preferences
    return _accounted(model, evaluate_preferences(model, preferences, options), read[1])


def _of_labels(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, read: tuple[list[Conversation], Accounting],
    classifier: Classifier, limit: int,
) -> LabelEvaluation:  # fmt: skip
    """The same of a classifier."""
    texts = build_label_samples(tokenizer, *read, classifier.scheme, tokens=classifier.words, max_length=limit)
    return _accounted(model, evaluate_labelled(model, texts, settled(model, classifier, texts)[0]), read[1])


def _of_pairs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, places: Mapping[str, Any], said: Mapping[str, Any],
    limit: int, progress: bool | Console | None,
) -> Evaluation:  # fmt: skip
    """The same of an encoder-decoder, whose rows are pairs, or recordings with their texts where it hears."""
    check_pair_options(said)
    source, target = (min(said[side] or limit, limit) for side in ("max_source_length", "max_target_length"))
    samples: list[Any]
    if hears(model.config):
        spoken = spoken_as(model, said["language"], said["task"], target)
        conversations, accounting = read_recordings(**places)
        samples = build_speech(model, conversations, accounting, spoken)
    else:
        conversations, accounting = read_dataset(**places)
        samples = build_pairs(tokenizer, conversations, accounting, PairOptions(said["source_prefix"], source, target))
    with _shown(len(samples), progress) as passed:
        return _accounted(model, evaluate_padded(model, kind_of(model), samples, passed=passed), accounting)


def _evaluate_seen(
    model: PreTrainedModel, rows: Rows, template: ChatTemplate, limit: int, system: str | None, prefix: str,
    progress: bool | Console | None,
) -> Evaluation:  # fmt: skip
    """The loss on rows with images."""
    told = Learning(
        system, eos_ids=stated_ends(model), chatglm=ChatGlmOptions(source_prefix=prefix), markers=marker_ids(model)
    )
    samples, accounting = samples_of(model, rows, template, limit, told)
    with _shown(len(samples), progress) as passed:
        return _accounted(model, evaluate_padded(model, IMAGES, samples, passed=passed), accounting)


Measure = TypeVar("Measure", Evaluation, PreferenceEvaluation, LabelEvaluation)


def _accounted(model: PreTrainedModel, found: Measure, accounting: Accounting) -> Measure:
    """With what became of the dataset's rows. Raises TrainingError for a loss that is no number."""
    check_held_out(model, found.loss, "compute in float32")
    return replace(found, dropped=sum(accounting.dropped.values()), truncated=accounting.truncated)


@contextmanager
def _shown(total: int, progress: bool | Console | None) -> Iterator[Callable[[int], None]]:
    """Yields what is told how many more samples are evaluated."""
    shows = (TextColumn("evaluated {task.completed:.0f}/{task.total:.0f}"), BarColumn(bar_width=8),
             TimeRemainingColumn(compact=True))  # fmt: skip
    with Display(*shows, console=shown(progress)) as display:
        task = display.add_task("", total=total)
        yield lambda count: display.advance(task, count)


def _refuse_of_writers(asked: Mapping[str, Any]) -> None:
    """Raise OptionError for what is of models that write."""
    unsaid = {"stage": "sft", "source_prefix": "", "train_on_prompt": False}
    given = [f"{name}={value}" for name, value in asked.items() if value != unsaid.get(name)]
    if given:
        raise OptionError(f"{', '.join(given)}: the model is a classifier, which reads texts as they are")


@alone("evaluated")
def evaluate_preferences(
    model: PreTrainedModel, preferences: list[Preference], options: PreferenceOptions, compute: str | None = None
) -> PreferenceEvaluation:
    """The same of rows that are tokenized already, beside the base: the model with its adapters off.

    Args:
        compute: how products are computed, see QuantizedLinear; None for as they are.
    """
    tokens = GPU_EVAL_TOKENS if model.device.type == "cuda" else CPU_EVAL_TOKENS
    with ExitStack() as stack:
        if compute is not None:
            stack.enter_context(computing(model, compute))
        texts = [text for each in preferences for text in each.texts]
        problem = stack.enter_context(padding_free(model, texts))
        shared = not problem and not options.labelled and shares_prompts(model, preferences)
        objective = PreferenceOptimization(options, alone=bool(problem), shared=shared)
        if options.refers:
            with adapters_off(model):
                preferences = with_reference(model, preferences, 0 if problem else tokens, objective)
        return objective.evaluate(model, preferences, tokens)


def template_of(tokenizer: PreTrainedTokenizerBase, args: TrainArguments) -> ChatTemplate:
    """The chat template that a run's options ask for."""
    return resolve_template(
        tokenizer, args.template, enable_thinking=args.enable_thinking, system_text=args.system_text
    )
