"""What a chat template writes for messages: the prompt that asks for an answer, and the conversation with the answer in it.

A template is a program, and what it can say is found out by asking it. `Writer` renders, and says what the rendering leaves
out: a part of a message that is not in the text, and whose change does not change the text either, is not expressed, and
the conversation is refused (`ConversationError`). Three things differ among templates in form, not in meaning, and are
found out once, with a conversation of our own:

    system     whether there is a system role; if not, its text stands in front of the first question, or is refused
    tool       what a tool's turn is called: tool, observation, ipython, function
    calls      whether a call's arguments are an object (transformers' documentation) or JSON text (OpenAI, DeepSeek), and
               what an answer of calls alone has as content: nothing, None or ""

A template is rendered in the sandbox of sandbox.py.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, Any

from qgraft.data.messages import Call, ConversationError, Message, Tool
from qgraft.data.pictures import MARK
from qgraft.data.sandbox import CLOSE, FAILURES, OPEN, names_read, render
from qgraft.data.templates import VARIANTS_HINT, ChatTemplate
from qgraft.errors import OptionError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROLE_TEST = (
    r"role\W{{0,4}}(==|!=|in)[^%]*?['\"]{}['\"]"  # message.role == 'tool', message['role'] in ["tool", "ipython"]
)
_ROLE_TOKEN = (
    r"<\|(\{\{-?|['\"] ?\+) ?\w+(\.|\[['\"])role"  # GLM-4: <|{{ item['role'] }}|>, the role's name is the token
)
_TOOL_ROLES = ("tool", "observation", "ipython", "function")
_PROBE_CALL = Call(
    "probe_function", '{"probe_key": "probe value"}', "a1B2c3D4e"
)  # Mistral wants nine letters and digits
_PROBE = Message("assistant", "probe answer")
_ASKED = Message("user", "probe question")
_READS_PARTS = re.compile(r"type\W{1,4}(==|equalto|in\b)|selectattr")
_GIVEN = ("messages", "tools", "documents", "add_generation_prompt", "enable_thinking")  # by others, or not at all
_FUNCTIONS = {"raise_exception", "strftime_now", "namespace", "range", "dict"}
CHANCE = 12  # characters that do not stand in a template's own words by chance
_TAGS = re.compile(r"</?think>")
REWRITTEN = "the chat template changes the words of answers; they are learned as it writes them"
MOVED_SYSTEM = "the chat template has no system role: system texts stand in front of the first question"


@dataclass(frozen=True)
class Rendered:
    """Text, and the (start, stop) of what {% generation %} says the model writes; None without such marks."""

    text: str
    marked: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True)
class _Form:
    """How calls are handed to a template."""

    content: str | None = "absent"
    as_text: bool = False


class Writer:
    """A chat template with the tokenizer whose special tokens it writes."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", template: ChatTemplate) -> None:
        self.template, self._tokenizer = template, tokenizer
        self._special = dict(tokenizer.special_tokens_map)
        self._knows = tokenizer.get_added_vocab().keys()
        self._remarks: set[str] = set()

    def remark(self, sentence: str) -> None:
        """Keep in mind what somebody should know about the conversation at hand."""
        self._remarks.add(sentence)

    def remarks(self) -> set[str]:
        """What was remarked since the last time this was asked."""
        found, self._remarks = self._remarks, set()
        return found

    def prompt(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> str:
        """The text that a server sends to have the next answer."""
        return self._render(messages, tools, prompt=True).text

    def answered(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> Rendered:
        """The text of messages that end in an answer."""
        return self._render(messages, tools, prompt=False)

    def settled(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """The messages as this template can write them: a system text in the first question where there is no system role."""
        first = messages[0] if messages else None
        if first is None or first.role != "system" or self.has_system:
            return tuple(messages)
        if self.template.system_text == "drop":
            raise ConversationError("a system text, and the chat template has no system role")
        if len(messages) < 2 or messages[1].role != "user":
            raise ConversationError("a system text without a question, and the chat template has no system role")
        self.remark(MOVED_SYSTEM)
        return (replace(messages[1], content=f"{first.content}\n\n{messages[1].content}"), *messages[2:])

    def check_asked(self, prompt: str, messages: Sequence[Message], tools: Sequence[Tool]) -> None:
        """Raise ConversationError where the prompt leaves out what a question, a tool's result or a tool says."""
        for index, message in enumerate(messages):
            if message.role == "assistant" or _stands_in(message.content, prompt):
                continue
            other = replace(message, content=message.content + "x")
            if self.prompt([*messages[:index], other, *messages[index + 1 :]], tools) == prompt:
                raise ConversationError(
                    f"the chat template leaves out turns of role {message.role}", hint=VARIANTS_HINT
                )
        if tools and self.prompt(messages) == prompt:
            raise ConversationError("tools: the chat template writes no tools", hint=VARIANTS_HINT)
        if unsaid := [name for tool in tools if (name := tool["function"]["name"]) not in prompt]:
            raise ConversationError(
                f"tools: the chat template writes the name of a tool otherwise: {unsaid[0][:100]!r}"
            )
        for key, values in (("name", [m.name for m in messages]), ("tool_call_id", [m.call_id for m in messages])):
            if any(value is not None and value not in prompt for value in values):
                self.remark(f"the chat template writes no {key}; it has no effect")

    def check_said(self, body: str, whole: str, messages: Sequence[Message], tools: Sequence[Tool]) -> None:
        """Raise ConversationError where the last answer's text, at the end of the whole, leaves out its words or calls."""
        said = messages[-1]
        words = without_reasoning(said.content)
        other = replace(said, content=said.content + "x")
        if words.strip() and not _stands_in(words, body) and self._ignores(whole, messages, tools, other):
            beside = " beside tool_calls" if said.calls else ""
            raise ConversationError(f"the chat template leaves out what an answer says{beside}", hint=VARIANTS_HINT)
        if words.strip() not in body:
            self.remark(REWRITTEN)
        elif lost := [part.strip() for part in _TAGS.split(said.content) if part.strip() not in body]:
            raise ConversationError(f"the chat template leaves out a part of an answer: {lost[0][:40]!r}",
                                    hint=VARIANTS_HINT)  # fmt: skip
        for number, call in enumerate(said.calls):
            others = [replace(call, name=call.name + "x")]
            if json.loads(call.arguments):
                others.append(replace(call, arguments="{}"))
            for changed in others:
                calls = (*said.calls[:number], changed, *said.calls[number + 1 :])
                if self._ignores(whole, messages, tools, replace(said, calls=calls)):
                    raise ConversationError("the chat template writes no tool_calls", hint=VARIANTS_HINT)
            if json.dumps(json.dumps(json.loads(call.arguments))) in body:
                raise ConversationError("the chat template writes the arguments of tool_calls as quoted text")

    def writes_reasoning(self, body: str, whole: str, messages: Sequence[Message], tools: Sequence[Tool]) -> bool:
        """Whether the last answer's text, at the end of the whole, holds what it thought, if anything."""
        said = messages[-1]
        thought = reasoning_of(said)
        if not thought.strip() or _stands_in(thought, body):
            return True
        kept = said.content if said.reasoning else said.content.replace(thought, f"{thought}x", 1)
        other = replace(said, reasoning=said.reasoning and said.reasoning + "x", content=kept)
        return thought.strip() in body and not self._ignores(whole, messages, tools, other)

    @cached_property
    def has_system(self) -> bool:
        """Whether the template has a system role."""
        asked = [Message("system", "probe system text"), _ASKED]
        try:
            return "probe system text" in self.prompt(asked)
        except ConversationError:
            return not self._can([_ASKED])

    @cached_property
    def tail(self) -> str | None:
        """What the template writes after an answer's words; None where that cannot be told."""
        try:
            text = self.answered([_ASKED, _PROBE]).text
        except ConversationError:
            return None
        _, found, tail = text.rpartition(_PROBE.content)
        return tail if found else None

    @cached_property
    def tails(self) -> list[str]:
        """What may be left out of the tail, from one of the tokenizer's special tokens on to its end; the shortest first."""
        tail = self.tail or ""
        starts = [at for token in self._knows for at in range(len(tail)) if tail.startswith(token, at)]
        return [tail[at:] for at in sorted(set(starts), reverse=True)]

    def is_token_at(self, body: str, stop: int) -> bool:
        """Whether one of the tokenizer's special tokens ends at this place, blanks aside."""
        return body[:stop].rstrip().endswith(tuple(self._knows))

    @cached_property
    def reads_thinking(self) -> bool:
        """Whether the template asks for the option enable_thinking."""
        return "enable_thinking" in self.template.text

    def told(self, variables: Mapping[str, str | float]) -> "Writer":
        """A writer whose template is told these, too. Raises OptionError for a name that it does not ask for."""
        names, own = names_read(self.template.text), {*_GIVEN, *self._special}
        for name in variables:
            if name not in names or name in own:
                hint = ", ".join(sorted(names - own - _FUNCTIONS)) or "nothing"
                raise OptionError(
                    f"{name}: the chat template ({self.template.origin}) does not ask for it",
                    hint=f"beside the messages it asks for {hint[:300]}",
                )
        return Writer(self._tokenizer, replace(self.template, variables=tuple(variables.items())))

    @cached_property
    def _tool_role(self) -> str:
        named = [role for role in _TOOL_ROLES if re.search(_ROLE_TEST.format(role), self.template.text)]
        if not named and "<|observation|>" in self._knows and re.search(_ROLE_TOKEN, self.template.text):
            return "observation"
        return named[0] if named else "tool"

    @cached_property
    def _form(self) -> _Form:
        """The form of calls that a template writes as they are meant; where none is, transformers' own."""
        called = replace(_PROBE, content="", calls=(_PROBE_CALL,))
        for content, as_text in product(("absent", None, ""), (False, True)):
            form = _Form(content, as_text)
            try:
                text = self._render([_ASKED, called], (), prompt=False, form=form).text
            except ConversationError:
                continue
            quoted = json.dumps(_PROBE_CALL.arguments)[1:-1] in text or "{'probe_key'" in text
            if _PROBE_CALL.name in text and "probe_key" in text and "probe value" in text and not quoted:
                return form
        return _Form("")

    @cached_property
    def _lists(self) -> bool:
        """Whether the template reads contents as lists of parts alone, as those of some models of images do."""
        return (
            bool(_READS_PARTS.search(self.template.text)) and not self._writes(lists=False) and self._writes(lists=True)
        )

    def _writes(self, *, lists: bool) -> bool:
        """Whether the template writes a question, given as text or as a list of parts."""
        try:
            return _ASKED.content in self._render([_ASKED], (), prompt=True, lists=lists).text
        except ConversationError:
            return False

    def _can(self, messages: Sequence[Message]) -> bool:
        try:
            self.prompt(messages)
        except ConversationError:
            return False
        return True

    def _ignores(self, whole: str, messages: Sequence[Message], tools: Sequence[Tool], other: Message) -> bool:
        """Whether the text stays what it is with another last answer."""
        return self.answered([*messages[:-1], other], tools).text == whole

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool],
        *,
        prompt: bool,
        form: _Form | None = None,
        lists: bool | None = None,
    ) -> Rendered:
        if any(mark in message.content for message in messages for mark in (OPEN, CLOSE)):
            raise ConversationError("a message holds a noncharacter of Unicode, U+FDD0 or U+FDD1")
        if any(message.content.count(MARK) != len(message.images) for message in messages):
            raise ConversationError("a message holds a noncharacter of Unicode, U+FDD2")
        text = self.template.with_tools if tools and self.template.with_tools else self.template.text
        options = {} if self.template.enable_thinking is None else {"enable_thinking": self.template.enable_thinking}
        variables = {
            **dict(self.template.variables),
            "messages": [self._as_dict(message, form, lists) for message in messages], "tools": list(tools) or None,
            "documents": None, "add_generation_prompt": prompt, **self._special, **options,
        }  # fmt: skip
        try:
            return _unmarked(render(text, variables))
        except FAILURES as error:  # also what the template itself raises: "no system role"
            why = str(error).partition("\n")[0][:200] or type(error).__name__
            raise ConversationError(f"chat template ({self.template.origin}) fails: {why}",
                                    hint=VARIANTS_HINT) from error  # fmt: skip

    def _as_dict(self, message: Message, form: _Form | None, lists: bool | None) -> dict[str, Any]:
        """A message under the names that transformers' documentation gives its parts."""
        role = self._tool_role if message.role == "tool" else message.role
        said: dict[str, Any] = {"role": role, "content": message.content}
        if message.images or (message.content and (self._lists if lists is None else lists)):
            said["content"] = _parts(message.content)
        if message.calls:
            form = form or self._form
            if not message.content:
                said = {"role": role} if form.content == "absent" else {"role": role, "content": form.content}
            said["tool_calls"] = [call.as_dict(as_text=form.as_text) for call in message.calls]
        if message.reasoning:
            said |= {"reasoning_content": message.reasoning, "thinking": message.reasoning}
        named = {"tool_call_id": message.call_id, "name": message.name}
        return {**said, **{key: value for key, value in named.items() if value is not None}}


def asks_alike(tokenizer: "PreTrainedTokenizerBase", one: ChatTemplate, other: ChatTemplate) -> bool:
    """Whether two templates ask for an answer with the same text, in chats with and without a system text and history."""
    history = [_ASKED, _PROBE, Message("user", " another\n")]
    writers = Writer(tokenizer, one), Writer(tokenizer, other)
    try:
        return all(
            len({writer.prompt(writer.settled(chat)) for writer in writers}) == 1
            for chat in ([_ASKED], history, [Message("system", "probe system text"), *history])
        )
    except ConversationError:
        return False


def reasoning_of(message: Message) -> str:
    """What an answer thought, kept apart or in its text."""
    return message.reasoning or message.content.rpartition("</think>")[0].rpartition("<think>")[2]


def without_reasoning(content: str) -> str:
    """What an answer says after it has thought."""
    return content.rpartition("</think>")[2]


def _parts(content: str) -> list[dict[str, str]]:
    """A content as the list of its parts, texts and images."""
    found: list[dict[str, str]] = []
    for number, text in enumerate(content.split(MARK)):
        found += [{"type": "image"}] if number else []
        found += [{"type": "text", "text": text}] if text else []
    return found


def _stands_in(part: str, text: str) -> bool:
    """Whether a part of a message is surely in a text; a short one may be there by chance, in the word of a special token."""
    return len(part.strip()) >= CHANCE and part.strip() in text


def _unmarked(text: str) -> Rendered:
    """The text without OPEN and CLOSE, and where they stood."""
    if OPEN not in text:
        return Rendered(text)
    pieces = text.split(OPEN)
    whole, marked = pieces[0], []
    for piece in pieces[1:]:
        inside, _, after = piece.partition(CLOSE)
        marked.append((len(whole), len(whole) + len(inside)))
        whole += inside + after
    return Rendered(whole, tuple(marked))
