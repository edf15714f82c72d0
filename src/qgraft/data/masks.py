"""Which text of a conversation is learned: each answer from its own rendering as the last one.

    prompt      <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n                        what a server sends
    answered    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n
    body                                                              Hello<|im_end|>\\n
    learned                                                           Hello<|im_end|>

So an answer is learned after the prompt that serving sends for it, whatever the template makes of it once others follow:
reasoning models' templates strip what earlier answers thought. Where the text goes on from one answer to the next prompt,
both are in one sample; where the template has rewritten what was before, the next answer begins a sample of its own.

A body is learned up to and with its first end token, or as the template's `{% generation %}` marks say. Of what a model
thinks first, an empty block that the template alone has put there is input: learned, it would teach not to think.

Where a template strips the reasoning even from the last answer (DeepSeek-R1's), or opens the thinking in its prompt and
writes no such answer, the body is the row's own text behind the prompt, with what the template writes behind an answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from qgraft.data.messages import ConversationError, Message, Tool
from qgraft.data.rendering import Writer, reasoning_of, without_reasoning
from qgraft.data.templates import VARIANTS_HINT

_THOUGHTS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<|START_THINKING|>", "<|END_THINKING|>"),
             ("<seed:think>", "</seed:think>"))  # fmt: skip
EMPTY_BLOCK = (
    "the chat template puts an empty thinking block in front of answers without reasoning; it is input, not learned "
    "(enable_thinking false has prompts end in one, where the template reads that)"
)
OWN_WORDS = "the chat template strips the reasoning of answers; it is learned as the rows have it"
CUT_SHORT = "an answer holds the text of an end token; what is behind it is not learned"
THINKS_ANYWAY = "enable_thinking is false, and answers with reasoning are learned behind prompts that ask for none"
NO_END = "the chat template's {% generation %} marks leave out the token that ends an answer, so it is not learned"
SEVERAL = (
    "the chat template rewrites earlier answers when others follow: several samples, each learning what is last in it"
)
ENDLESS = (
    "the chat template writes no token that ends an earlier answer: several samples, each with the tokenizer's end token "
    "behind its answer"
)
RETOKENIZED = (
    "later prompts have earlier answers in other tokens than they are learned in (the prompt ends in a blank): several "
    "samples, each behind the ids of its prompt"
)


@dataclass(frozen=True)
class Piece:
    """Text, and whether it is learned."""

    text: str
    learned: bool


@dataclass(frozen=True)
class Answer:
    """An answer behind its prompt.

    Attributes:
        body: what the template writes behind the prompt, to the end.
        ranges: (start, stop) in the body of what is learned.
        cut: where the body ends in a sample; what is behind is no part of it.
        ends: whether the body holds an end token, learned or not.
        marked: whether the ranges are the template's own marks, to be learned as they are.
        weight: what its loss is multiplied by.
    """

    prompt: str
    body: str
    ranges: tuple[tuple[int, int], ...]
    cut: int
    ends: bool
    marked: bool
    weight: float

    def pieces(self) -> list[Piece]:
        """The body up to its cut. What follows an end token that is no mark's is told apart by its ids."""
        if not self.marked:
            start = self.ranges[0][0]
            pieces = [Piece(self.body[:start], False), Piece(self.body[start : self.cut], True)]
            return [piece for piece in pieces if piece.text]
        found, at = list[Piece](), 0
        for start, stop in self.ranges:
            found += [Piece(self.body[at:start], False), Piece(self.body[start:stop], True)]
            at = stop
        return [piece for piece in [*found, Piece(self.body[at : self.cut], False)] if piece.text]


@dataclass(frozen=True)
class Choice:
    """What of a conversation is learned: the last answer alone, answers without what they thought; texts that end one."""

    last_only: bool = False
    mask_reasoning: bool = False
    end_texts: tuple[str, ...] = ()


def learned_answers(writer: Writer, messages: Sequence[Message], tools: Sequence[Tool], choice: Choice) -> list[Answer]:
    """The answers to learn, in their order; raises ConversationError where the template cannot write what is said."""
    messages = writer.settled(messages)
    answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
    learned = [index for index in (answers[-1:] if choice.last_only else answers) if messages[index].weight]
    if not learned:
        raise ConversationError("no answer is learned: its weight is 0")
    prompts = [writer.prompt(messages[:index], tools) for index in learned]
    writer.check_asked(prompts[-1], messages[: learned[-1]], tools)
    return [
        _answer(writer, prompt, messages[: index + 1], tools, choice, answers.index(index) + 1)
        for index, prompt in zip(learned, prompts, strict=True)
    ]


def continued(answer: Answer, prompt: str, choice: Choice, tails: Sequence[str]) -> Answer | None:
    """The answer as it stands in a later prompt, which goes on from it; None where the prompt has it otherwise.

    What a template puts behind the last answer only (Phi-3: the tokenizer's end token) is no part of it, if there is an end
    before.

    Args:
        tails: what the template may leave out of a body's end, from the shortest to the longest.
    """
    whole = answer.prompt + answer.body
    if prompt.startswith(whole):
        return answer
    kept = (whole.removesuffix(tail) for tail in tails if answer.body.endswith(tail))
    if (common := next((text for text in kept if prompt.startswith(text)), None)) is None:
        return None
    body = common[len(answer.prompt) :]
    start = answer.ranges[0][0]
    stop, ends = _end(body, start, choice.end_texts)
    if answer.ends and not ends:
        return None
    ranges = tuple((first, min(last, stop)) for first, last in answer.ranges if first < stop)
    return replace(answer, body=body, ranges=ranges, cut=len(body) if ends else stop, ends=ends)


def _answer(
    writer: Writer, prompt: str, messages: Sequence[Message], tools: Sequence[Tool], choice: Choice, number: int
) -> Answer:
    said, rendered = messages[-1], writer.answered(messages, tools)
    body, marked = rendered.text[len(prompt) :], rendered.marked
    begins = rendered.text.startswith(prompt)
    if begins and writer.writes_reasoning(body, rendered.text, messages, tools):
        writer.check_said(body, rendered.text, messages, tools)
    elif (closed := _closed(writer, prompt, rendered.text, said)) is not None:
        body, marked = closed, None
        writer.check_said(body, rendered.text, messages, tools)
    elif (own := _own_words(writer, prompt, said)) is not None:
        body, marked = own, None
    elif begins:
        raise ConversationError("the chat template writes no reasoning", hint=VARIANTS_HINT)
    else:
        raise ConversationError(
            f"the chat template ({writer.template.origin}) writes the prompt of answer {number} with {prompt[-20:]!r} at its "
            "end, and the answered conversation otherwise; the first must begin the second", hint=VARIANTS_HINT
        )  # fmt: skip
    start = _unlearned(writer, body, prompt, said, choice.mask_reasoning)
    stop, ends = _end(body, start, choice.end_texts)
    if any(text in said.content for text in choice.end_texts):
        writer.remark(CUT_SHORT)
    if writer.template.enable_thinking is False and writer.reads_thinking and reasoning_of(said).strip():
        writer.remark(THINKS_ANYWAY)
    ranges: tuple[tuple[int, int], ...] = ((start, stop),)
    if marked is not None:
        inside = [(max(first - len(prompt), start), last - len(prompt)) for first, last in marked]
        ranges = tuple((first, last) for first, last in inside if first < last)
        at_token = any(writer.is_token_at(body, last) for _, last in ranges[-1:])
        if ends and not at_token and not any(first < stop <= last for first, last in ranges):
            writer.remark(NO_END)
        ends = ends or at_token
    if not "".join(body[first:last] for first, last in ranges).strip():
        raise ConversationError("the chat template writes nothing of an answer", hint=VARIANTS_HINT)
    return Answer(
        prompt,
        body,
        ranges,
        len(body) if ends else max(last for _, last in ranges),
        ends,
        marked is not None,
        said.weight,
    )


def _own_words(writer: Writer, prompt: str, said: Message) -> str | None:
    """The row's own text as the model would write it behind the prompt; None where the template cannot be so helped."""
    if said.calls or "</think>" not in writer.template.text or writer.tail is None:
        return None
    if not reasoning_of(said).strip() or (said.reasoning and "<think>" in said.content):
        return None
    writer.remark(OWN_WORDS)
    opened = prompt.rstrip().endswith("<think>")
    words = without_reasoning(said.content)
    thought = f"<think>\n{said.reasoning.strip(chr(10))}\n</think>\n\n{words.lstrip(chr(10))}"
    text = thought if said.reasoning else said.content
    if opened and "<think>" in text:
        text = text.partition("<think>")[2]
    return (text.lstrip("\n") if opened and prompt.endswith("\n") else text) + writer.tail


def _closed(writer: Writer, prompt: str, whole: str, said: Message) -> str | None:
    """The body of an answer without reasoning behind a prompt that opens the thinking: closed, and then as it is written."""
    before, opening, blanks = prompt.rpartition("<think>")
    if not opening or "</think>" not in writer.template.text:
        return None
    if blanks.strip() or reasoning_of(said).strip() or not whole.startswith(before):
        return None
    stop, _ = _block(whole[len(before) :], "")
    return ("" if blanks else "\n") + "\n</think>\n\n" + whole[len(before) + stop :]


def _unlearned(writer: Writer, body: str, prompt: str, said: Message, mask_reasoning: bool) -> int:
    """How much of the beginning of a body is not learned: an empty thinking block, or what was thought."""
    stop, empty = _block(body, prompt)
    if empty and "</think>" not in said.content:
        writer.remark(EMPTY_BLOCK)
        return stop
    if not mask_reasoning:
        return 0
    thought = reasoning_of(said).strip()
    start = stop or (body.index(thought) + len(thought) if thought and thought in body else 0)
    if any(tag in body[start:] for tags in _THOUGHTS for tag in tags):
        raise ConversationError(
            "mask_reasoning: thinking tags elsewhere than around one block at an answer's beginning"
        )
    return start


def _block(body: str, prompt: str) -> tuple[int, bool]:
    """(Where the block of what was thought ends, blanks behind it included; whether it is empty); 0 where there is none."""
    for opening, closing in _THOUGHTS:
        lead = len(body) - len(body.lstrip())
        if prompt.rstrip().endswith(opening):
            start = 0
        elif body.startswith(opening, lead):
            start = lead + len(opening)
        else:
            continue
        stop = body.find(closing, start)
        if stop >= 0:
            after = stop + len(closing)
            return after + len(body[after:]) - len(body[after:].lstrip()), not body[start:stop].strip()
    return 0, False


def _end(body: str, start: int, end_texts: Sequence[str]) -> tuple[int, bool]:
    """(Where what is learned stops: behind the first end token, else before the blanks at the end; whether there is one)."""
    found = [at + len(text) for text in end_texts if (at := body.find(text, start)) >= 0]
    return (min(found), True) if found else (max(len(body.rstrip()), start), False)
