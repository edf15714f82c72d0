"""From recordings with texts to what a model that hears learns: the sound that its encoder reads, and the ids of its decoder.

    decoder reads   <|startoftranscript|> <|en|> <|transcribe|> <|notimestamps|> The text.
    labels          <|en|> <|transcribe|> <|notimestamps|> The text. <|endoftext|>

These are the labels of Hugging Face's recipe (https://huggingface.co/blog/fine-tune-whisper): the ids that WhisperTokenizer
writes of a text, without the first, which is the decoder's start. An English-only model has no token of language and task. A
text that begins with a timestamp (<|0.00|> The text.<|1.20|>) is learned with those that it has, without <|notimestamps|>.

The numbers of a recording are made when its batch passes (passes/speech.py); it is read once before, to see that it can be
heard. Nothing is cut: a text is no longer that of its recording where an end of either is missing.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qgraft.data.files import undecoded
from qgraft.data.messages import Conversation, ConversationError
from qgraft.data.pairs import PairSample
from qgraft.data.reading import Accounting, Dataset, read_rows
from qgraft.data.sounds import Sound
from qgraft.data.spoken import read_spoken
from qgraft.errors import DataError, OptionError, UnsupportedError, near_match, option

TASKS = ("transcribe", "translate")
_STAMP = re.compile(r"<\|\d+\.\d\d\|>")
_MULTILINGUAL = 51_865  # rows of the vocabulary, from which on OpenAI's code takes a model for multilingual


@dataclass(frozen=True)
class SpeechSample(PairSample):
    """A recording, of which the encoder reads `positions`, and the ids of its text, which are learned."""

    images: tuple[Sound, ...] = ()
    heard: int = 0
    text: str = ""

    @property
    def positions(self) -> int:
        """How many the encoder reads: the same of every recording."""
        return self.heard


@dataclass(frozen=True)
class Spoken:
    """How texts of recordings are written.

    Attributes:
        prefix: the ids between the decoder's start and the text, with the one that says there are no timestamps.
        told: what generate() is told to begin with the same.
        longest: most labels, with the prefix and the end.
        room: most ids that the model can write behind the prefix.
    """

    prefix: list[int]
    told: dict[str, str]
    longest: int
    room: int


def read_recordings(
    names: Dataset, dataset_dir: str | None = None, **reading: Any
) -> tuple[list[Conversation], Accounting]:
    """Rows of recordings with texts; see read_dataset."""
    found, accounting = read_rows(read_spoken, undecoded(names), dataset_dir, images=True, **reading)
    return [conversation for (conversation,) in found], accounting


def spoken_as(model: Any, language: str | None, task: str | None, longest: int) -> Spoken:
    """How a model that hears writes texts of this language (a code or a name, as in transformers) and for this task.

    Args:
        language, task: None for what the folder's tokenizer or generation_config.json says, and then for transcribe.

    Raises OptionError for what the model cannot be told, or must; UnsupportedError where its files contradict each other.
    """
    tokenizer, config = require_listener(model).tokenizer, model.generation_config
    stated = getattr(config, "is_multilingual", None)
    multilingual = model.config.vocab_size >= _MULTILINGUAL if stated is None else bool(stated)
    if task not in (None, *TASKS):
        raise OptionError(f"task={task!r}: expected {' or '.join(TASKS)}")
    silent, room = _id_of(tokenizer, "<|notimestamps|>"), model.config.max_target_positions - 1
    wanted = [("<|startoftranscript|>", model.config.decoder_start_token_id),
              ("<|notimestamps|>", getattr(config, "no_timestamps_token_id", silent))]  # fmt: skip
    if not multilingual:
        if language is not None and code_of(language) != "en":
            raise OptionError(f"language={language!r}: the model is of English only", hint="leave language out")
        if task == "translate":
            raise OptionError("task='translate': the model is of English only, and transcribes", hint="leave task out")
        _agree(tokenizer, wanted)
        return Spoken([silent], {}, longest, room - 1)
    language = language or getattr(tokenizer, "language", None) or getattr(config, "language", None)
    task = task or getattr(tokenizer, "task", None) or getattr(config, "task", None) or TASKS[0]
    if not language:
        raise OptionError("the model is multilingual, and no language is given", hint=option("language", "en"))
    code = code_of(language)
    tokens = [f"<|{code}|>", f"<|{task}|>"]
    wanted += [(tokens[0], getattr(config, "lang_to_id", {}).get(tokens[0], _id_of(tokenizer, tokens[0]))),
               (tokens[1], getattr(config, "task_to_id", {}).get(task, _id_of(tokenizer, tokens[1])))]  # fmt: skip
    _agree(tokenizer, wanted)
    prefix = [*(_id_of(tokenizer, token) for token in tokens), silent]
    return Spoken(prefix, {"language": code, "task": task}, longest, room - len(prefix))


def code_of(language: str) -> str:
    """The code of a language, given as one or by its name. Raises OptionError for what transformers does not know."""
    from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

    known: dict[str, str] = {**TO_LANGUAGE_CODE, **{code: code for code in LANGUAGES}}
    said = language.lower().removeprefix("<|").removesuffix("|>")
    if said not in known:
        hint = near_match(said, [*known]) or "a code as in Whisper: en, zh, de, ..."
        raise OptionError(f"language={language!r}: unknown to Whisper", hint=hint)
    return known[said]


def require_listener(model: Any) -> Any:
    """The processor of a model that hears. Raises UnsupportedError where it has none, or one that does not fit."""
    processor, config = getattr(getattr(model, "qgraft", None), "processor", None), model.config
    if processor is None:
        raise UnsupportedError(
            "the model was loaded without a feature extractor of recordings", hint="its load says why"
        )
    made = processor.feature_extractor
    got, expected = (made.feature_size, made.nb_max_frames), (config.num_mel_bins, 2 * config.max_source_positions)
    if got != expected:
        raise UnsupportedError(
            f"preprocessor_config.json makes {got[0]} numbers of each of {got[1]} frames, and the model reads "
            f"{expected[0]} of {expected[1]}", hint="take the file of the model's release",
        )  # fmt: skip
    return processor


def build_speech(
    model: Any, conversations: Sequence[Conversation], accounting: Accounting, written: Spoken
) -> list[SpeechSample]:
    """A sample for each row; `accounting` moves what gives none to its place. Raises DataError for none at all."""
    processor, samples = require_listener(model), list[SpeechSample]()
    for conversation in conversations:
        try:
            samples.append(_sample(processor, conversation, written, model.config.max_source_positions))
        except DataError as error:
            accounting.kept -= 1
            accounting.drop(error.message, conversation.source)
    accounting.check()
    if not samples:
        raise DataError(f"no sample is left: {accounting.summary()}")
    return samples


def _sample(processor: Any, conversation: Conversation, written: Spoken, positions: int) -> SpeechSample:
    question, answer = conversation.messages
    listen(processor, question.images[0])
    labels = encode_text(processor.tokenizer, answer.content, written)
    return SpeechSample([], labels, conversation.source, images=question.images, heard=positions, text=answer.content)


def listen(processor: Any, sound: Sound) -> Any:
    """The samples of a recording as the feature extractor reads them; raises DataError, see Sound.heard."""
    made = processor.feature_extractor
    return sound.heard(made.sampling_rate, made.n_samples / made.sampling_rate)


def encode_text(tokenizer: Any, text: str, written: Spoken) -> list[int]:
    """The labels of a text. Raises ConversationError for one that is too long, or holds tokens that are no text."""
    ids, silent = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]), written.prefix[-1]
    stamps = [token > silent for token in ids]  # all of them stand behind <|notimestamps|>
    if {*tokenizer.all_special_ids} & {token for token, stamp in zip(ids, stamps, strict=True) if not stamp}:
        raise ConversationError("a text holds a special token of the model's")
    if sum(stamps) != len(_STAMP.findall(text)) or (any(stamps) and not stamps[0]):
        raise ConversationError("a text holds timestamps, and does not begin with one that the model knows")
    labels = [*(written.prefix[:-1] if any(stamps) else written.prefix), *ids, tokenizer.eos_token_id]
    if len(labels) > written.longest:
        raise ConversationError(
            f"a text is longer than {written.longest} tokens with its prefix and end, and none is cut",
            hint="give a larger max_target_length, or shorter recordings",
        )
    return labels


def without_stamps(text: str) -> str:
    """A text as it is compared with others."""
    return _STAMP.sub("", text).strip()


def _id_of(tokenizer: Any, token: str) -> int:
    """The id of a token of the model's own. Raises UnsupportedError where the vocabulary has it not."""
    found = tokenizer.convert_tokens_to_ids(token)
    if found is None or tokenizer.convert_ids_to_tokens(found) != token:
        raise UnsupportedError(f"the tokenizer has no token {token}, which the model needs",
                               hint="give a language that it knows, and the tokenizer of its release")  # fmt: skip
    return int(found)


def _agree(tokenizer: Any, stated: Sequence[tuple[str, int]]) -> None:
    """Raise UnsupportedError where the model's files mean other tokens than its tokenizer."""
    for token, number in stated:
        if (own := _id_of(tokenizer, token)) != number:
            raise UnsupportedError(f"{token} is token {own} of the tokenizer, and {number} in the model's files",
                                   hint="take the files of one release")  # fmt: skip
