"""Learning to write what is said, on the loop that all runs have: Whisper.

    sample   a recording with its text (data/speech_samples.py)
    label    a token of the text, and of what stands in front of it
    pass     texts of similar lengths, padded (passes/speech.py, padded.py)

Which kind of model it is decides, not an option. What has no meaning there is refused by `check_speech_run`, all at once, and
on the command line before the weights are read; so are options of speech where the model reads text.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig, PreTrainedModel

from qgraft.data.pairs import check_pair_options
from qgraft.data.reading import Accounting, Dataset, named_columns
from qgraft.data.speech_samples import SpeechSample, Spoken, build_speech, read_recordings, spoken_as
from qgraft.errors import OptionError
from qgraft.model_parts import hears
from qgraft.passes.limits import sample_limit
from qgraft.passes.pairs import split_pairs
from qgraft.passes.speech import speech_losses, speech_together
from qgraft.training.padded import Kind
from qgraft.training.seq2seq import PAIRS, check_pair_run

if TYPE_CHECKING:
    from qgraft.training.arguments import TrainArguments

SPEECH = Kind[SpeechSample](
    split=split_pairs,
    losses=speech_losses,
    together=speech_together,
    labels=PAIRS.labels,
    weight=PAIRS.weight,
)
_OF_TEXTS = {
    "source_prefix": "the encoder reads sound, and no text in front of it",
    "max_source_length": "the encoder reads 30 seconds of every recording",
    "add_tokens": "new tokens are for texts alone",
    "add_special_tokens": "new tokens are for texts alone",
}
_OF_SPEECH = ("language", "task")


def kind_of(model: PreTrainedModel) -> Kind[Any]:
    """What an encoder-decoder learns: recordings with their texts where it hears, else pairs of texts."""
    return SPEECH if hears(model.config) else PAIRS


def check_run(config: PreTrainedConfig, args: "TrainArguments") -> None:
    """Raise OptionError for options of a run that have no meaning for an encoder-decoder, or one that hears, at once."""
    check_speech_options(config, vars(args))
    check_pair_run(args)


def check_speech_options(config: PreTrainedConfig | None, said: Mapping[str, Any]) -> None:
    """Raise OptionError for options of texts where the model hears, and of speech where it reads."""
    if hears(config):
        if problems := [f"{name}={said[name]}: {why}" for name, why in _OF_TEXTS.items() if said.get(name)]:
            raise OptionError("a model that hears (Whisper): " + "; ".join(problems), hint="leave these out")
        check_pair_options({"stage": said.get("stage", "sft")})
    elif given := [f"{name}={said[name]}" for name in _OF_SPEECH if said.get(name)]:
        raise OptionError(f"{', '.join(given)}: of models that hear (Whisper), and this one reads text",
                          hint="leave it out" if len(given) == 1 else "leave them out")  # fmt: skip


def read_speech(
    model: PreTrainedModel, dataset: Dataset, args: "TrainArguments", *, held_out: bool, most: int | None = None
) -> tuple[list[SpeechSample], Accounting]:
    """The samples of one dataset, as the options of a run ask for them; of at most `most` rows, where that is said."""
    most = most or (args.max_eval_samples if held_out else args.max_train_samples)
    conversations, accounting = read_recordings(
        dataset, args.dataset_dir, name=args.name, author=args.author, columns=named_columns(vars(args)),
        max_samples=most or args.max_samples, allow_outside_files=args.allow_outside_files,
    )  # fmt: skip
    longest = args.val_max_target_length if held_out else None
    return build_speech(model, conversations, accounting, speech_options(model, args, longest)), accounting


def speech_options(model: PreTrainedModel, args: "TrainArguments", longest: int | None = None) -> Spoken:
    """How a run writes texts; `longest` goes before args.max_target_length."""
    limit = sample_limit(model, longest or args.max_target_length or args.max_length)
    return spoken_as(model, args.language, args.task, limit)
