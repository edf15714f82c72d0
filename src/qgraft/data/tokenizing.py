"""From conversations to token ids, how much each of them is learned, and how long they may be.

Which text is learned after which prompt is decided in masks.py. Here each piece of text is tokenized as what follows the
text before it, so that the ids in front of an answer are those of the prompt at serving (`encode_prompt`); where a later
prompt would come out in other ids, its answer begins a sample of its own. Looking for the answer's tokens in the ids of the
whole text was not chosen: merges across the border would change the last ids of the prompt.

An answer is learned up to and with its first end token. What a template puts after that (a newline) is input only: the
model never writes it.

Tokenizers that put special ids between pieces of text write prompts and samples themselves (`WritesPrompts`, ChatGLM):
no template can. Their samples are those of the model's official scripts: the last answer is learned, the rounds before
it are its history.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, TypedDict, Unpack

from qgraft.data.accounted import S, accounted
from qgraft.data.ends import end_token_ids
from qgraft.data.markers import marker_texts, refuse_markers
from qgraft.data.masks import ENDLESS, RETOKENIZED, SEVERAL, Answer, Choice, continued, learned_answers
from qgraft.data.messages import Conversation, ConversationError, Message, Pair, Tool, as_messages, as_pairs
from qgraft.data.reading import Accounting
from qgraft.data.rendering import Writer
from qgraft.data.scripted import LAST_LEARNED, ChatGlmOptions, WritesPrompts, check_chatglm_options, scripted_ids
from qgraft.data.templates import SYSTEM_TEXTS, ChatTemplate, named_template
from qgraft.data.turn_tokens import READ_AS_TEXT, turn_tokens
from qgraft.errors import DataError, OptionError, UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qgraft.data.pairs import PairSample
    from qgraft.data.preference_samples import Preference

Segment = tuple[str, float, bool]  # text, what its tokens weigh, whether those behind an end token do too
IGNORED = -100  # the label that torch's cross entropy leaves out


@dataclass(frozen=True)
class Sample:
    """Token ids and their labels: the same ids where learned, -100 elsewhere; as long as the ids, not shifted.

    `weights` says what the loss of each label is multiplied by, None for 1 each; 0 where nothing is learned. `part`
    counts the samples of one row from 0.
    """

    input_ids: list[int]
    labels: list[int]
    source: str
    weights: list[float] | None = None
    part: int = 0
    desirable: ClassVar[None] = None

    @property
    def length(self) -> int:
        """How many tokens pass through the model to learn it."""
        return len(self.input_ids)

    @property
    def texts(self) -> "tuple[Sample, ...]":
        """What passes through the model to learn it: itself. A Preference has several (preference_samples.py)."""
        return (self,)


def resolve_template(
    tokenizer: "PreTrainedTokenizerBase",
    template: str | None = None,
    *,
    enable_thinking: bool | None = None,
    system_text: str = "question",
) -> ChatTemplate:
    """The chat template for an option's value, see named_template(), and what it is told.

    Args:
        enable_thinking: what templates of reasoning models read under this name; None leaves it to them.
        system_text: what becomes of a system text where the template has no system role, see ChatTemplate.

    A tokenizer that writes prompts itself has no template.
    """
    if system_text not in SYSTEM_TEXTS:
        raise OptionError(f"system_text is {system_text!r}, expected {' or '.join(SYSTEM_TEXTS)}")
    if isinstance(tokenizer, WritesPrompts):
        if template not in (None, "auto") and not re.fullmatch(r"chatglm(?!3)[\w.-]*", str(template).lower()):
            raise OptionError(f"template {template!r}: this tokenizer puts special ids between pieces of text, which no "
                              "template can write", hint="leave template out")  # fmt: skip
        return ChatTemplate("", "tokenizer")
    chosen = named_template(tokenizer, template)
    if enable_thinking is not None and not Writer(tokenizer, chosen).reads_thinking:
        said = "enable_thinking has no effect: the chat template does not read it"
        chosen = replace(chosen, note=f"{chosen.note}; {said}" if chosen.note else said)
    return replace(chosen, enable_thinking=enable_thinking, system_text=system_text)


def encode_prompt(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Message | Pair],
    *,
    template: ChatTemplate | None = None,
    system: str | None = None,
    chatglm: ChatGlmOptions | None = None,
    tools: Sequence[Tool] = (),
    markers: Sequence[int] = (),
) -> list[int]:
    """The ids of a prompt that asks for the next answer, as training saw them; `markers` as of Learning."""
    template, chatglm = template or resolve_template(tokenizer), chatglm or ChatGlmOptions()
    turns = with_system(as_messages(messages), system)
    if isinstance(tokenizer, WritesPrompts):
        return tokenizer.prompt_ids(as_pairs(turns), chatglm.max_source_length, source_prefix=chatglm.source_prefix)
    writer, marks = Writer(tokenizer, template), turn_tokens(tokenizer, template)
    asked = with_prefix(turns, chatglm.source_prefix)
    refuse_markers(marker_texts(tokenizer, markers), asked, tools)
    turns = marks.guarded(asked)
    return _with_bos(tokenizer, marks.ids(writer.prompt(writer.settled(turns), marks.guarded_tools(tools))))


def decode_answer(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> str:
    """The text of the ids that a model answered with."""
    text = str(tokenizer.decode(ids, skip_special_tokens=True))
    return tokenizer.clean_answer(text) if isinstance(tokenizer, WritesPrompts) else text


@dataclass(frozen=True)
class Learning:
    """What of conversations is learned, and what is put in front of them.

    Attributes:
        system: stands in front of conversations that have no system text.
        train_on_prompt: all ids are learned.
        mask_history: the last answer alone is.
        mask_reasoning: what answers thought before is not.
        eos_ids: more ids that end an answer, beside the tokenizer's own; an answer whose template writes no end token gets
            the tokenizer's.
        markers: ids of images, which no text may hold (model_parts.marker_ids).
    """

    system: str | None = None
    train_on_prompt: bool = False
    mask_history: bool = False
    mask_reasoning: bool = False
    eos_ids: Sequence[int] = ()
    chatglm: ChatGlmOptions | None = None
    markers: Sequence[int] = ()

    def __post_init__(self) -> None:
        if self.train_on_prompt and (self.mask_history or self.mask_reasoning):
            masked = "mask_history" if self.mask_history else "mask_reasoning"
            raise OptionError(f"train_on_prompt and {masked} exclude each other: learn all tokens, or answers only")


class LearningOptions(TypedDict, total=False):
    """The fields of Learning, as keyword arguments."""

    system: str | None
    train_on_prompt: bool
    mask_history: bool
    mask_reasoning: bool
    eos_ids: Sequence[int]
    chatglm: ChatGlmOptions | None
    markers: Sequence[int]


def encode_conversation(
    tokenizer: "PreTrainedTokenizerBase",
    conversation: Conversation,
    *,
    template: ChatTemplate | None = None,
    **learning: Unpack[LearningOptions],
) -> list[Sample]:
    """The training samples of a conversation: one, or more where the template rewrites answers once others follow.

    `learning` are the fields of Learning. Raises ConversationError where the template cannot write what the conversation
    says, or nothing is learned.
    """
    chosen = template or resolve_template(tokenizer)
    try:
        return Encoder(tokenizer, chosen, Learning(**learning)).samples(conversation)
    except DataError as error:
        raise ConversationError(f"{conversation.source}: {error.message}", hint=error.hint) from error


def answer_text(tokenizer: "PreTrainedTokenizerBase", conversation: Conversation, template: ChatTemplate) -> str:
    """The last answer as the template writes it, calls and reasoning included, without special tokens."""
    sample = Encoder(tokenizer, template, Learning(mask_history=True)).samples(conversation)[-1]
    return decode_answer(tokenizer, [label for label in sample.labels if label != IGNORED])


def build_samples(
    tokenizer: "PreTrainedTokenizerBase",
    conversations: Sequence[Conversation],
    accounting: Accounting,
    *,
    template: ChatTemplate | str | None = None,
    max_length: int | None = None,
    truncate: bool = True,
    **learning: Unpack[LearningOptions],
) -> list[Sample]:
    """The samples of at most `max_length` ids; `accounting` moves what is cut or gives no sample to its place.

    `learning` are the fields of Learning.
    """
    asked = Learning(**learning)
    check_chatglm_options(tokenizer, asked.chatglm or ChatGlmOptions())
    chosen = template if isinstance(template, ChatTemplate) else resolve_template(tokenizer, template)
    encoder = Encoder(tokenizer, chosen, asked)

    def fitting(found: Sequence[Sample]) -> list[Sample]:
        kept = [cut for sample in found if (cut := cut_sample(sample, max_length, truncate)) is not None]
        if not kept:
            learns = max_length is not None and any(_learns(sample, max_length) for sample in found)
            what = "longer than" if learns else "no answer token within"
            raise ConversationError(f"{what} max_length {max_length}", hint="give a larger max_length")
        return [replace(sample, part=part) for part, sample in enumerate(kept)]

    return accounted(conversations, accounting, encoder.samples, fitting, encoder.remarks)


def _learns(sample: Sample, length: int) -> bool:
    """Whether a label remains; the first one has no id before it to be predicted from, so it is not one."""
    return any(label != IGNORED for label in sample.labels[1:length])


def cut_sample(sample: S, max_length: int | None, truncate: bool = True) -> S | None:
    """The sample, cut to `max_length`; None where it may not be cut or no answer token would remain."""
    if max_length is None or len(sample.input_ids) <= max_length:
        return sample
    if not truncate or not _learns(sample, max_length):
        return None
    weights = None if sample.weights is None else sample.weights[:max_length]
    ids, labels = sample.input_ids[:max_length], sample.labels[:max_length]
    return replace(sample, input_ids=ids, labels=labels, weights=weights)


class Encoder:
    """Makes samples of conversations; what it finds out about the template is asked once."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", template: ChatTemplate, learning: Learning) -> None:
        ends = end_token_ids(tokenizer, learning.eos_ids, template)
        if not ends:
            raise UnsupportedError(
                "the tokenizer has no end token, so that no answer would ever end", hint="give eos_ids"
            )
        self.tokenizer, self.learning, self.ends = tokenizer, learning, ends
        self.writer = None if isinstance(tokenizer, WritesPrompts) else Writer(tokenizer, template)
        self.marks = turn_tokens(tokenizer, template)
        texts = () if self.writer is None else tuple(map(str, tokenizer.convert_ids_to_tokens(ends)))
        self._known: dict[str, list[int]] = {}  # of this conversation
        self.has_history = False  # where the tokenizer writes samples itself: rounds before the last
        self.choice = Choice(learning.mask_history, learning.mask_reasoning, texts)
        self.markers = marker_texts(tokenizer, learning.markers)

    def remarks(self) -> set[str]:
        """What somebody should know about the last conversation."""
        if self.writer is None:
            return {LAST_LEARNED} if self.has_history else set()
        return self.writer.remarks()

    def samples(self, conversation: Conversation) -> list[Sample]:
        """The samples of a conversation; raises DataError where there is none."""
        messages = with_system(conversation.messages, self.learning.system)
        if self.writer is None:
            return [self._scripted(conversation, messages)]
        said = with_prefix(messages, self.learning.chatglm.source_prefix if self.learning.chatglm else "")
        refuse_markers(self.markers, said, conversation.tools)
        messages = self.marks.guarded(said)
        if any(one is not other for one, other in zip(messages, said, strict=True)):
            self.writer.remark(READ_AS_TEXT)
        answers = learned_answers(self.writer, messages, self.marks.guarded_tools(conversation.tools), self.choice)
        self._known.clear()
        groups: list[list[Answer]] = []
        for answer in answers:
            going_on = self._going_on(groups[-1], answer) if groups else None
            groups[-1:] = [*groups[-1:], [answer]] if going_on is None else [[*going_on, answer]]
        if not self.learning.train_on_prompt:
            samples = [self._sample(group, conversation.source) for group in groups]
            return [replace(sample, part=part) for part, sample in enumerate(samples)]
        if any(message.weight != 1 for message in messages):
            raise ConversationError("weights of answers, and train_on_prompt learns every token")
        ids = self._sample(groups[-1], "").input_ids
        return [Sample(ids, list(ids), conversation.source)]

    def _going_on(self, group: list[Answer], answer: Answer) -> list[Answer] | None:
        """The answers of a sample as the prompt of the next one has them; None where its text or ids are others."""
        assert self.writer is not None
        if not group[-1].ends:
            self.writer.remark(ENDLESS)
            return None
        before = continued(group[-1], answer.prompt, self.choice, self.writer.tails)
        if before is None:
            self.writer.remark(SEVERAL)
            return None
        same = [*group[:-1], before]
        text = "".join(text for text, _, _ in segments_of(same))
        ids, _ = self._encoded([*segments_of(same), (answer.prompt[len(text) :], 0.0, False)])
        if ids != self._encoded([(answer.prompt, 0.0, False)])[0]:
            self.writer.remark(RETOKENIZED)
            return None
        return same

    def _sample(self, group: list[Answer], source: str) -> Sample:
        """The sample of these answers, each behind its prompt; the last one has an end."""
        ids, weights = self._encoded(segments_of(group))
        if not group[-1].ends:
            ids, weights = [*ids, self.ends[0]], [*weights, group[-1].weight]
        ids = _with_bos(self.tokenizer, ids)
        weights = [0.0] * (len(ids) - len(weights)) + weights
        labels = [token if weight else IGNORED for token, weight in zip(ids, weights, strict=True)]
        return Sample(ids, labels, source, None if set(weights) <= {0.0, 1.0} else weights)

    def _encoded(self, segments: Sequence[Segment]) -> tuple[list[int], list[float]]:
        """The ids of pieces of text one after another, and what each weighs: an answer up to its first end token."""
        ids: list[int] = []
        weights: list[float] = []
        before = ""
        for text, weight, exact in segments:
            new = self._following(text, before)
            ending = () if exact else self.ends
            learned = next((n + 1 for n, token in enumerate(new) if token in ending), len(new)) if weight else 0
            ids += new
            weights += [weight] * learned + [0.0] * (len(new) - learned)
            before = text
        return ids, weights

    def _following(self, text: str, before: str) -> list[int]:
        """The ids of `text` as it follows `before`: sentencepiece puts a blank in front of whatever comes first."""
        head, both = self._ids(before), self._ids(before + text)
        return both[len(head) :] if both[: len(head)] == head else self._ids(text)

    def _ids(self, text: str) -> list[int]:
        """The ids of a text alone; what the tokenizer was asked for this conversation is kept."""
        if text not in self._known:
            self._known[text] = self.marks.ids(text)
        return self._known[text]

    def _scripted(self, conversation: Conversation, messages: Sequence[Message]) -> Sample:
        """The sample of a tokenizer that writes it itself."""
        assert isinstance(self.tokenizer, WritesPrompts)
        weight = messages[-1].weight
        self.has_history = sum(message.role == "assistant" for message in messages) > 1
        if conversation.tools:
            raise ConversationError("tools: the tokenizer writes the model's own prompts, without tools")
        if not weight:
            raise ConversationError("no answer is learned: its weight is 0")
        ids, labels = scripted_ids(
            self.tokenizer, as_pairs(messages), self.learning.chatglm or ChatGlmOptions(), self.learning.train_on_prompt
        )
        weights = None if weight == 1 else [0.0 if label == IGNORED else weight for label in labels]
        return Sample(ids, labels, conversation.source, weights)


def segments_of(group: Sequence[Answer]) -> list[Segment]:
    """The text of answers and of what is between them, in pieces, with what each weighs."""
    segments: list[Segment] = []
    length = 0
    for answer in group:
        segments.append((answer.prompt[length:], 0.0, False))
        segments += [(piece.text, answer.weight if piece.learned else 0.0, answer.marked) for piece in answer.pieces()]
        length = len(answer.prompt) + answer.cut
    return segments


def _with_bos(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> list[int]:
    bos = tokenizer.bos_token_id
    wanted = bos is not None and getattr(tokenizer, "add_bos_token", False)
    return [bos, *ids] if wanted and ids[:1] != [bos] else ids


def with_system(messages: Sequence[Message], system: str | None) -> list[Message]:
    first = [Message("system", system)] if system and messages[0].role != "system" else []
    return [*first, *messages]


def with_prefix(messages: Sequence[Message], prefix: str) -> list[Message]:
    first = next((index for index, message in enumerate(messages) if message.role == "user"), None)
    return [
        replace(each, content=prefix + each.content) if index == first else each for index, each in enumerate(messages)
    ]


def samples_sha256(samples: "Sequence[Sample | Preference | PairSample]") -> str:
    """Says which tokens were trained on, in their order, and with which weights."""
    digest = hashlib.sha256()
    for sample in samples:
        for text in sample.texts:
            weights = () if text.weights is None else (text.weights,)
            seen = (image.said for image in getattr(text, "images", ()))
            digest.update(repr((text.input_ids, text.labels, *weights, *seen)).encode())
        if sample.desirable is not None:
            digest.update(repr(sample.desirable).encode())
    return digest.hexdigest()
