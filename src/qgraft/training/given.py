"""What train() and evaluate() were given, looked at before anything is read or written."""

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from qgraft.adapters.base import require_model
from qgraft.errors import OptionError
from qgraft.given import described
from qgraft.training.arguments import TrainArguments

_ORDER = "the order is model, tokenizer, rows, args"


def check_pair(model: Any, tokenizer: Any) -> None:
    """Raise OptionError where these are no model and no tokenizer, for example the other way round."""
    if isinstance(model, PreTrainedTokenizerBase) and isinstance(tokenizer, nn.Module):
        raise OptionError("model and tokenizer are given the other way round", hint=_ORDER)
    require_model(model)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        hint = "model, tokenizer = qgraft.load(...)" if tokenizer is None else _ORDER
        raise OptionError(f"tokenizer: got {described(tokenizer)}, expected a tokenizer of transformers", hint=hint)


def check_arguments(args: Any) -> None:
    """Raise OptionError where `args` are no TrainArguments."""
    if isinstance(args, TrainArguments):
        return
    hint = "qgraft.TrainArguments(output_dir='out', ...)"
    if isinstance(args, dict):
        hint = "qgraft.TrainArguments(**options)"
    elif isinstance(args, TrainingArguments):
        hint = "qgraft.TrainArguments takes the same options, and its own"
    raise OptionError(f"args: got {described(args)}, expected a qgraft.TrainArguments", hint=hint)


def ready_callbacks(callbacks: Any) -> list[TrainerCallback]:
    """The callbacks, of which classes are made objects. Raises OptionError for what is none."""
    given = callbacks if isinstance(callbacks, Sequence) and not isinstance(callbacks, str) else [callbacks]
    made = [each() if isinstance(each, type) and issubclass(each, TrainerCallback) else each for each in given]
    wrong = [each for each in made if not isinstance(each, TrainerCallback)]
    if wrong or given is not callbacks:
        got = described(wrong[0] if wrong else callbacks)
        raise OptionError(
            f"callbacks: got {got}, expected a list of transformers' TrainerCallbacks",
            hint="callbacks=[transformers.EarlyStoppingCallback(2)], for example",
        )
    return made
