"""Classifiers: which class of transformers a folder becomes, and the modules above its decoder.

    task_type   CAUSAL_LM    AutoModelForCausalLM                     what a folder is loaded for where it says nothing else
                SEQ_CLS      AutoModelForSequenceClassification       a label, several, or a number for each text
                TOKEN_CLS    AutoModelForTokenClassification          a label for each token
                IMAGE_TEXT_TO_TEXT    AutoModelForImageTextToText     a model that writes, and sees images
    head        classifier, score, pre_classifier, pooler, ...        (model_parts.heads_of)

A folder whose config.json names such a class is one already. Any other gets a head that is drawn as transformers draws it,
with a seed of its own, so that loading twice gives the same one; the load says which tensors those are. A head is never
packed: it is small, and an adapter trains a copy of it whole. What a save writes of it into the folder is said here, too.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from qgraft.adapters.whole import WholeHolder
from qgraft.compat import reads_ahead
from qgraft.errors import OptionError, UnsupportedError, worded
from qgraft.model_parts import (
    CAUSAL,
    CLASSIFIERS,
    IMAGES,
    SEQUENCE_TO_SEQUENCE,
    heads_of,
    is_encoder_decoder,
    is_within,
    sees_what_comes,
    stated_task,
    task_of,
)
from qgraft.models.find import architecture_of

_CLASSES: dict[str, Any] = {
    "SEQ_CLS": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "TOKEN_CLS": MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
}
SINGLE, SEVERAL, NUMBER = "single_label_classification", "multi_label_classification", "regression"
PROBLEMS = (SINGLE, SEVERAL, NUMBER)  # problem_type of transformers
MOST_LABELS = 100_000
WRITERS = (CAUSAL, SEQUENCE_TO_SEQUENCE, IMAGES)


@dataclass(frozen=True)
class Task:
    """What a folder is loaded for.

    Attributes:
        task_type: CAUSAL_LM, SEQ_2_SEQ_LM, IMAGE_TEXT_TO_TEXT, SEQ_CLS or TOKEN_CLS; None for what the folder says.
        labels: names by their ids; None for the folder's.
        problem_type: one of PROBLEMS; None for the folder's, or else for one label of several.
    """

    task_type: str | None = None
    labels: Sequence[str] | None = None
    problem_type: str | None = None

    def __post_init__(self) -> None:
        known = (*WRITERS, *CLASSIFIERS)
        if self.task_type is not None and self.task_type not in known:
            raise OptionError(f"task_type={self.task_type!r}: expected {', '.join(known)}")
        if self.problem_type is not None and self.problem_type not in PROBLEMS:
            raise OptionError(f"problem_type={self.problem_type!r}: expected {', '.join(PROBLEMS)}")
        if self.task_type in WRITERS and (self.labels is not None or self.problem_type is not None):
            raise OptionError("labels and problem_type are of classifiers", hint=_asks())
        if self.task_type == "TOKEN_CLS" and self.problem_type not in (None, SINGLE):
            raise OptionError(f"problem_type={self.problem_type!r}: tokens have one label each ({SINGLE})")
        _check_labels(self.labels, self.problem_type)


def _asks() -> str:
    return worded(flags="--task_type SEQ_CLS or TOKEN_CLS", python="task_type='SEQ_CLS' or 'TOKEN_CLS'")


def _check_labels(labels: Any, problem_type: str | None) -> None:
    """Raise OptionError for what are no names of labels."""
    if labels is None:
        return
    if isinstance(labels, str) or not all(isinstance(label, str) and label.strip() for label in labels):
        raise OptionError(f"labels={str(labels)[:80]!r}: expected their names, in the order of their ids")
    least = 1 if problem_type in (NUMBER, SEVERAL) else 2
    if twice := sorted({label for label in labels if list(labels).count(label) > 1}) if len(labels) < 1000 else []:
        raise OptionError(f"labels: {twice[0]!r} stands twice")
    if not least <= len(labels) <= MOST_LABELS or (problem_type == NUMBER and len(labels) > 1):
        expected = "1" if problem_type == NUMBER else f"{least} to {MOST_LABELS:,}"
        raise OptionError(f"labels: got {len(labels)}, expected {expected}")


def settle_task(config: PreTrainedConfig, task: Task, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    """Let the configuration describe a model for this task; returns what a reader should know.

    Raises OptionError where it is not known what is told apart, UnsupportedError for an architecture without such a class.
    """
    stated = stated_task(config.architectures)
    wanted = task.task_type or (stated if task.labels is None and task.problem_type is None else "SEQ_CLS")
    if wanted in (CAUSAL, IMAGES) and (seeing := _seeing(config)) is not None:
        return _settle_images(config, wanted, seeing)
    if wanted in WRITERS:
        writes = SEQUENCE_TO_SEQUENCE if is_encoder_decoder(config) else CAUSAL
        if task.task_type not in (None, writes):
            raise OptionError(f"task_type={wanted!r}: {config.model_type} is loaded for {writes}")
        if sees_what_comes(config) or reads_ahead(config):
            said = "" if getattr(config, "is_decoder", False) else ", as config.json does not say is_decoder"
            raise UnsupportedError(
                f"{config.model_type}: an encoder{said}; it reads a text in both directions, and would see the answers that "
                "it is to write", hint=f"as a classifier: {_asks()}"
            )  # fmt: skip
        if stated != CAUSAL:
            config.architectures = None
        return []
    if architecture_of(config) is not None or type(config) not in _CLASSES[wanted]:
        raise UnsupportedError(
            f"task_type={wanted!r}: transformers has no {CLASSIFIERS[wanted]} of {config.model_type}"
        )
    labels = task.labels
    if labels is None and task.problem_type == NUMBER:
        labels = [str(name) for name in (config.id2label or {}).values()] if config.num_labels == 1 else ["LABEL_0"]
    if labels is None and stated != wanted:
        raise OptionError(
            f"task_type={wanted!r}: the folder has no such head, and no labels are given for a new one",
            hint=worded(flags="--labels negative,positive, or a dataset to train on",
                        python="labels=['negative', 'positive'], or problem_type='regression'"),
        )  # fmt: skip
    if labels is not None:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: number for number, label in enumerate(labels)}
    kept = config.problem_type if stated == wanted and labels is None else None
    problem: Any = task.problem_type or kept or (NUMBER if config.num_labels == 1 else SINGLE)
    config.problem_type = problem
    config.architectures = [_CLASSES[wanted][type(config)].__name__]
    return _settle_padding(config, tokenizer)


def _seeing(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class of transformers that reads images and texts by this configuration; None where there is none."""
    if architecture_of(config) is not None or is_encoder_decoder(config):
        return None
    return _class_in(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, config)


def _class_in(table: Any, config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """What a table of transformers has for this configuration."""
    found: type[PreTrainedModel] | None = table.get(type(config), None)
    return found


def _settle_images(config: PreTrainedConfig, wanted: str, seeing: type[PreTrainedModel]) -> list[str]:
    """Let the configuration describe the model that sees, or where transformers has it apart and nobody asks, its text's."""
    text = _class_in(MODEL_FOR_CAUSAL_LM_MAPPING, config)
    if wanted == CAUSAL and text not in (None, seeing):
        config.architectures = None
        asked = worded(flags=f"--task_type {IMAGES}", python=f"task_type={IMAGES!r}")
        return [f"{config.model_type}: the decoder of text alone is loaded; {asked} loads the whole, which sees images"]
    config.architectures = [seeing.__name__]
    return []


def _settle_padding(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    """A token to pad with, where the model has none: without it transformers finds the end of a text in no batch."""
    text: Any = config.get_text_config()
    if getattr(text, "pad_token_id", None) is not None or tokenizer is None:
        return []
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if padding is None:
        return []
    text.pad_token_id = config.pad_token_id = padding
    return [f"texts of a batch are padded with token {padding}, as config.json names none"]


class Heads:
    """The modules above the decoder, as a folder's reader needs them; of no classifier there are none.

    Args:
        model: with its parameters on the meta device.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.paths = model, heads_of(model)
        self.drawn: list[str] = []
        self._values: dict[str, Tensor] = {}

    def value(self, name: str, stored: Callable[[], Tensor] | None) -> Tensor | None:
        """The parameter `name` where it is one of them: as it is stored, or drawn where the folder has none of its shape."""
        if not is_within(name, self.paths):
            return None
        value = None if stored is None else stored()
        if value is None or value.shape != self.model.get_parameter(name).shape:
            self._values = self._values or drawn_heads(self.model)
            self.drawn.append(name)
            return self._values[name]
        return None

    def notes(self) -> list[str]:
        """Which parameters were drawn."""
        if not self.drawn:
            return []
        return [f"{', '.join(self.drawn)}: not in the folder, so drawn anew; training an adapter trains them"]


def drawn_heads(model: PreTrainedModel) -> dict[str, Tensor]:
    """The parameters of the head as transformers draws them, in float32, the same ones every time."""
    found = dict[str, Tensor]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for path in heads_of(model):
            module = copy.deepcopy(model.get_submodule(path)).to_empty(device="cpu").float()
            for each in module.modules():
                if callable(reset := getattr(each, "reset_parameters", None)):
                    reset()  # what the model's own way leaves as it is
                model._init_weights(each)
            found |= {f"{path}.{name}": tensor.detach() for name, tensor in module.named_parameters()}
    return found


def head_state(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of the base's own head by their names in the model, whatever adapters have copies of it."""
    found = dict[str, Tensor]()
    for path in heads_of(model):
        module: Any = model.get_submodule(path)
        module = module.base if isinstance(module, WholeHolder) else module
        found |= {f"{path}.{name}": tensor.detach() for name, tensor in module.named_parameters()}
    return found


def changed_head(
    model: nn.Module, names: Mapping[str, str], tensors: Mapping[str, Callable[[], Tensor]]
) -> dict[str, Tensor]:
    """What of the head a folder lacks or has otherwise, by the names that it gets there.

    Args:
        names: parameter -> its tensor in the folder, where there is one.
        tensors: those of the folder.
    """
    found = {}
    for parameter, value in head_state(model).items():
        name = names.get(parameter, parameter)
        old = tensors[name]() if name in tensors else None
        if old is None or old.shape != value.shape or not torch.equal(old.to(value), value):
            found[name] = value.cpu().contiguous()
    return found


def head_config(model: nn.Module) -> dict[str, Any]:
    """What config.json says of a classifier; nothing of other models."""
    if task_of(model) == CAUSAL:
        return {}
    config = cast(Any, model).config
    padding = getattr(config.get_text_config(), "pad_token_id", None)
    return {
        "architectures": [type(model).__name__],
        "id2label": {str(number): label for number, label in config.id2label.items()},
        "label2id": dict(config.label2id),
        "problem_type": config.problem_type,
        **({} if padding is None else {"pad_token_id": padding}),
    }


def head_names(stored: Mapping[str, str], paths: Iterable[str]) -> dict[str, str]:
    """Those of {parameter: tensor} that are of the head at these paths."""
    inside = list(paths)
    return {name: tensor for name, tensor in stored.items() if is_within(name, inside)}
