"""From rows that say which answers are preferred to token ids: a Preference for each.

Each text is made as a sample of supervised fine-tuning is (tokenizing.py), by the same template, and its labels are the
tokens whose log-probabilities are added up. A text that the template would cut into several samples has no such sum, so its
row is dropped.

KTO also asks how likely the model has become to give answers to questions that they do not belong to: here the answer of the
row before, behind the prompt of each. TRL pairs within consecutive rows of a batch and so trains them in their order; pairing
all rows once needs no order, and what the reference says of them is computed once too.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Unpack

from qgraft.data.messages import Conversation, ConversationError
from qgraft.data.reading import Accounting
from qgraft.data.tokenizing import (
    IGNORED,
    ChatGlmOptions,
    ChatTemplate,
    Encoder,
    Learning,
    LearningOptions,
    Sample,
    check_chatglm_options,
    cut_sample,
)
from qgraft.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Preference:
    """What one row says.

    Attributes:
        texts: (chosen, rejected), or the one answer that is judged.
        desirable: whether that one is wanted; None for pairs.
        mismatched: KTO: the prompt of this row with the answer of another one.
        reference: the log-probabilities of the texts, and of the mismatched one, under the reference.
    """

    texts: tuple[Sample, ...]
    desirable: bool | None = None
    mismatched: Sample | None = None
    reference: tuple[float, ...] = ()

    @property
    def input_ids(self) -> list[int]:
        """The tokens of the texts, one after another."""
        return [token for text in self.texts for token in text.input_ids]

    @property
    def length(self) -> int:
        """How many tokens pass through the model to learn it."""
        return len(self.input_ids)

    @property
    def source(self) -> str:
        """Where the row stands."""
        return self.texts[0].source

    @property
    def part(self) -> int:
        """A row gives one of them."""
        return 0

    @property
    def shared(self) -> int:
        """How many tokens chosen and rejected begin with alike, in front of what is learned; 0 of a single answer."""
        if len(self.texts) == 1:
            return 0
        limit, (one, other) = min(map(first_label, self.texts)), (text.input_ids for text in self.texts)
        return next((n for n in range(limit) if one[n] != other[n]), limit)


def first_label(sample: Sample) -> int:
    """The place of the first token that is learned; the very first token has none before it to be predicted from."""
    return next(place for place, label in enumerate(sample.labels) if place and label != IGNORED)


def build_preferences(
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[Sequence[Conversation]],
    accounting: Accounting,
    *,
    template: ChatTemplate,
    max_length: int,
    **learning: Unpack[LearningOptions],
) -> list[Preference]:
    """What these rows say, in texts of at most `max_length` ids; `accounting` moves what is cut or dropped to its place.

    `learning` are the fields of tokenizing.Learning. Raises DataError where nothing is left.
    """
    told = Learning(**learning)
    check_chatglm_options(tokenizer, told.chatglm or ChatGlmOptions())
    encoder, found = Encoder(tokenizer, template, told), list[Preference]()
    remarks, hint = Counter[str](), None
    for row in rows:
        try:
            whole = [_only(encoder.samples(each)) for each in row]
            texts = tuple(_cut(text, max_length) for text in whole)
            if len(texts) == 2 and texts[0].input_ids == texts[1].input_ids:
                raise ConversationError(f"chosen and rejected are the same within max_length {max_length}")
        except DataError as error:
            accounting.kept -= 1
            accounting.drop(error.message, row[0].source)
            hint = error.hint or hint
            continue
        finally:
            remarks.update(encoder.remarks())
        if lost := sum(len(one.input_ids) - len(other.input_ids) for one, other in zip(whole, texts, strict=True)):
            accounting.truncated += 1
            accounting.truncated_tokens += lost
        found.append(Preference(texts, row[0].desirable))
    accounting.check()
    accounting.notes += [f"{sentence} (rows: {count})" for sentence, count in sorted(remarks.items())]
    if not found:
        raise DataError(f"no row is left: {accounting.summary()}", hint=hint)
    return found


def _only(samples: Sequence[Sample]) -> Sample:
    """The sample of a text. Raises ConversationError where it has more, or weights."""
    if len(samples) > 1:
        raise ConversationError(f"the chat template cuts what is judged into {len(samples)} samples")
    if samples[0].weights is not None:
        raise ConversationError("weights of answers; a preference counts every token once")
    return samples[0]


def _cut(text: Sample, max_length: int) -> Sample:
    cut = cut_sample(text, max_length)
    if cut is None:
        raise ConversationError(f"no answer token within max_length {max_length}", hint="give a larger max_length")
    return cut


def mismatched(preferences: Sequence[Preference], max_length: int) -> list[Preference]:
    """Single answers, each with its prompt in front of the answer of the row before, as far as max_length goes."""
    if len(preferences) == 1:
        raise DataError(
            f"{preferences[0].source} is the only row, of those learned or of those held out; kto also puts the answer of "
            "one row behind the prompt of another",
            hint="give or hold out more rows, or loss_type apo_zero_unpaired, which needs no others",
        )
    found = []
    for number, each in enumerate(preferences):
        (own,), (other,) = each.texts, preferences[number - 1].texts
        start, place = first_label(own), first_label(other)
        ids = [*own.input_ids[:start], *other.input_ids[place:]]
        labels = [*own.labels[:start], *other.labels[place:]]
        cut = Sample(ids[:max_length], labels[:max_length], own.source)
        found.append(replace(each, mismatched=cut))
    return found
