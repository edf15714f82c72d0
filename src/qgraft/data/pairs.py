"""From rows to what an encoder-decoder learns: the ids that its encoder reads, and those that its decoder writes.

    source   source_prefix + the question, with the special ids that the tokenizer puts around a text
    target   the answer, as the tokenizer writes targets (text_target: mBART's and Marian's have another language there)

Nothing is put one after the other: the question goes into the encoder, the answer comes out of the decoder. So there is no
chat template, and no place for a system text, earlier rounds or tools; a row with any of these is dropped and counted.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from qgraft.data.messages import Conversation, ConversationError, Message
from qgraft.data.reading import Accounting
from qgraft.errors import DataError, OptionError, UnsupportedError, option

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PairSample:
    """The ids of a source, and those of its target, all of which are learned, their loss times `weight`."""

    input_ids: list[int]
    labels: list[int]
    source: str
    weight: float = 1.0
    part: ClassVar[int] = 0
    desirable: ClassVar[None] = None

    @property
    def positions(self) -> int:
        """How many the encoder reads."""
        return len(self.input_ids)

    @property
    def length(self) -> int:
        """How many tokens pass through the model to learn it."""
        return len(self.input_ids) + len(self.labels)

    @property
    def texts(self) -> "tuple[PairSample, ...]":
        """What passes through the model to learn it: itself."""
        return (self,)

    @property
    def weights(self) -> list[float] | None:
        """Of the labels; None for 1 each."""
        return None if self.weight == 1 else [self.weight] * len(self.labels)


@dataclass(frozen=True)
class PairOptions:
    """How sources and targets are written: what stands in front of a source, and the longest of each, in tokens."""

    source_prefix: str = ""
    max_source_length: int | None = None
    max_target_length: int | None = None


_MEANINGLESS: dict[str, tuple[str, Callable[[Any], bool]]] = {  # option -> (why it has no meaning, which values say it)
    "stage": (
        "preferences and teachers are for decoders that read prompt and answer as one text",
        lambda value: value != "sft",
    ),
    "finetuning_type": ("a prefix goes on decoders; take lora", lambda value: value != "lora"),
    "template": ("the encoder reads the text as it is", lambda value: value not in (None, "auto", "plain")),
    "system": ("there is no chat template to put it into", bool),
    "system_text": ("there is no chat template", lambda value: value != "question"),
    "enable_thinking": ("there is no chat template to tell", lambda value: value is not None),
    "train_on_prompt": ("the encoder reads the source, and predicts none of it", bool),
    "mask_history": ("a row has no history", bool),
    "mask_reasoning": ("a target is a text", bool),
    "history_column": ("a row has no history", bool),
    "cuda_graphs": ("these passes are not recorded", lambda value: value == "yes"),
    "cache_frozen_layers": ("what enters the decoder's adapters changes with the encoder's", bool),
    "neftune_noise_alpha": ("noise is for decoders that read prompt and answer as one text", bool),
    "memory_limit": ("the memory of an encoder-decoder is not counted; give max_tokens_per_pass", bool),
    "ignore_pad_token_for_loss": ("padding is never learned", lambda value: not value),
}


def check_pair_options(said: Mapping[str, Any], *others: str) -> None:
    """Raise OptionError for options that have no meaning for an encoder-decoder, at once.

    Args:
        said: option -> value; those that are no matter of the caller's may be missing.
        others: sentences on what else has none.
    """
    problems = [
        f"{name}={said[name]}: {why}" for name, (why, says) in _MEANINGLESS.items() if name in said and says(said[name])
    ]
    instead = f"; a text in front of every source is {option('source_prefix', 'translate: ')}"
    if problems := [*problems, *others]:
        raise OptionError(
            "an encoder-decoder (T5, BART and their kind): " + "; ".join(problems),
            hint=f"leave these out{instead if said.get('system') else ''}",
        )


def encode_source(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], options: PairOptions
) -> tuple[list[int], int]:
    """(The ids that the encoder reads of a question, how many more there would be without max_source_length).

    Raises ConversationError where the messages are more than one question.
    """
    if len(messages) != 1 or messages[0].role != "user" or not messages[0].is_plain:
        roles = ", ".join(dict.fromkeys(message.role for message in messages))
        raise ConversationError(
            f"an encoder reads one text: got {len(messages)} messages ({roles}) before the answer, expected a question"
        )
    return _cut(tokenizer, options.max_source_length, text=options.source_prefix + messages[0].content)


def encode_target(tokenizer: "PreTrainedTokenizerBase", text: str, longest: int | None) -> tuple[list[int], int]:
    """(The ids of an answer with its end, how many more there would be without `longest`)."""
    ids, lost = _cut(tokenizer, longest, text_target=text)
    if not {tokenizer.eos_token_id, tokenizer.sep_token_id} & {*ids}:
        raise UnsupportedError(
            f"{type(tokenizer).__name__} puts no end token behind a target, so that no answer would ever end",
            hint="give a tokenizer that does, as those of T5 and BART",
        )
    return ids, lost


def build_pairs(
    tokenizer: "PreTrainedTokenizerBase",
    conversations: Sequence[Conversation],
    accounting: Accounting,
    options: PairOptions,
) -> list[PairSample]:
    """A sample for each row; `accounting` moves what is cut or gives no sample to its place. Raises DataError for none."""
    samples = list[PairSample]()
    for conversation in conversations:
        try:
            sample, lost = _encoded(tokenizer, conversation, options)
        except ConversationError as error:
            accounting.kept -= 1
            accounting.drop(error.message, conversation.source)
            continue
        if lost:
            accounting.truncated += 1
            accounting.truncated_tokens += lost
        samples.append(sample)
    accounting.check()
    if not samples:
        raise DataError(f"no sample is left: {accounting.summary()}")
    return samples


def _encoded(
    tokenizer: "PreTrainedTokenizerBase", conversation: Conversation, options: PairOptions
) -> tuple[PairSample, int]:
    *before, answer = conversation.messages
    if conversation.tools or not answer.is_plain:
        raise ConversationError("tools, calls or reasoning: a target is a text")
    if not answer.weight:
        raise ConversationError("no answer is learned: its weight is 0")
    source, cut_source = encode_source(tokenizer, before, options)
    target, cut_target = encode_target(tokenizer, answer.content, options.max_target_length)
    return PairSample(source, target, conversation.source, answer.weight), cut_source + cut_target


def _cut(tokenizer: "PreTrainedTokenizerBase", longest: int | None, **text: str) -> tuple[list[int], int]:
    """The ids of a text as the tokenizer cuts it, keeping the special ones around it, and how many were cut."""
    ids = tokenizer(**text, verbose=False)["input_ids"]
    if longest is None or len(ids) <= longest:
        return list(ids), 0
    cut = tokenizer(**text, truncation=True, max_length=longest, verbose=False)["input_ids"]
    return list(cut), len(ids) - len(cut)
