r'''A Modelfile, from which `ollama create` makes a model of a GGUF file, with an adapter beside it or merged in.

    FROM /path/base.gguf            the file that llama.cpp runs
    ADAPTER ./adapter.gguf          a GGUF-LoRA
    TEMPLATE """..."""              in Go's template language, over .Messages; with the text that the training put in front of
                                    the first question (source_prefix)
    SYSTEM """..."""                the system text that the adapter was trained with, or the template's own
    PARAMETER stop "<|im_end|>"     tokens that end an answer

Ollama does not run the chat template that a GGUF file holds: it looks whether that text is at most 99 letters from one of
some twenty that it knows, and otherwise sends questions without any role, without a word. So TEMPLATE is written here
wherever it can be: the chat template is asked for what it puts around a message of each role, and what was found must give
what the template itself gives, letter for letter, for conversations of several turns. Templates that do more (trim, count,
strip reasoning, refuse a system text) are left out, and that is said.

Sources: docs/modelfile.md, template/template.go (Named) and server/model.go (detectChatTemplate) of ollama/ollama.
'''

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qgraft.data.messages import ConversationError, Message
from qgraft.data.rendering import Writer
from qgraft.data.templates import ChatTemplate, named_template
from qgraft.errors import QgraftError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SYSTEM, _USER, _ANSWER = "qsystemq", "quserq", "qanswerq"
_TALK = [("user", "Hi!"), ("assistant", "Hello. {x}"), ("user", "1 + 1?\nquick"), ("assistant", "2"), ("user", "好")]


@dataclass(frozen=True)
class Modelfile:
    """The text of a Modelfile, and what its reader should know, each one sentence."""

    text: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Around:
    """What a chat template writes before and behind a message of each role, and before an answer."""

    pieces: dict[str, tuple[str, str]]
    answer: str
    default: str | None
    lead: str = ""

    def written(self, messages: list[Message]) -> str:
        parts = (self.pieces[each.role] for each in messages)
        return "".join(a + each.content + b for each, (a, b) in zip(messages, parts, strict=True)) + self.answer

    def in_go(self, source_prefix: str = "") -> str:
        """The same over Ollama's .Messages, with a text in front of the first question."""
        first = f"{{{{ if not $asked }}}}{source_prefix}{{{{ $asked = true }}}}{{{{ end }}}}" if source_prefix else ""
        cases = [
            f'{{{{ {"if" if number == 0 else "else if"} eq .Role "{role}" }}}}{before}{first if role == "user" else ""}'
            f"{{{{ .Content }}}}{behind}"
            for number, (role, (before, behind)) in enumerate(self.pieces.items())
        ]
        begin = "{{ $asked := false }}" if source_prefix else ""
        return begin + self.lead + "{{ range .Messages }}" + "".join(cases) + "{{ end }}{{ end }}" + self.answer


def modelfile(
    base: Path | str,
    adapter: Path | str | None,
    tokenizer: "PreTrainedTokenizerBase",
    ends: list[int],
    system: str | None = None,
    template: str | None = None,
    source_prefix: str = "",
) -> Modelfile:
    """The Modelfile for a GGUF file, with `adapter` (a GGUF-LoRA) or without one.

    Args:
        ends: ids of the tokens that end an answer.
        system, template: the system text and the template of the training.
        source_prefix: the text that the training put in front of the first question.
    """
    lines, notes = [f"FROM {base}"], []
    if adapter is not None:
        lines.append(f"ADAPTER {adapter}")
    around, why = _around(tokenizer, system, template, source_prefix)
    if around is None:
        if source_prefix:
            notes.append(f"source_prefix is not in it: put {source_prefix!r} in front of the first question")
        notes.append(
            f"no TEMPLATE is written: {why}. Ollama takes one of its own where it knows the file's chat template, and sends "
            "questions without roles where it does not: `ollama show --template NAME` shows which"
        )
    else:
        lines.append(f'TEMPLATE """{around.in_go(source_prefix)}"""')
        system = system if system is not None else around.default
    if system is not None:
        if '"""' in system:
            notes.append("no SYSTEM is written: the text has three quotes in a row, which a Modelfile cannot hold")
        else:
            lines.append(f'SYSTEM """{system}"""')
    texts = [str(text) for text in tokenizer.convert_ids_to_tokens(ends)]
    lines += [f'PARAMETER stop "{text}"' for text in texts if '"' not in text]
    return Modelfile("\n".join(lines) + "\n", tuple(notes))


def _around(
    tokenizer: "PreTrainedTokenizerBase", system: str | None, name: str | None, source_prefix: str
) -> tuple[_Around | None, str]:
    """(what the chat template writes around messages, or None; why it is None)."""
    chosen = named_template(tokenizer, name)
    begins = str(tokenizer.bos_token or "")

    def render(messages: list[Message]) -> str:
        return _prompt(tokenizer, chosen, messages).removeprefix(begins)

    try:
        around = _found(render, list(tokenizer.get_added_vocab()))
        if around is None or not _holds(around, render, system):
            return None, "the chat template does more than put texts around messages"
    except (QgraftError, ConversationError) as error:
        return None, f"the chat template refuses such a conversation: {error}"
    if (
        not _adds_bos(tokenizer)
        and begins
        and _prompt(tokenizer, chosen, _messages(None, _TALK[:1])).startswith(begins)
    ):
        around = replace(around, lead=begins)  # otherwise llama.cpp puts the token there itself
    literals = (
        [source_prefix, around.lead] + [each for pair in around.pieces.values() for each in pair] + [around.answer]
    )
    if any(mark in each for each in literals for mark in ("{{", "}}", '"""')):
        return None, "the chat template writes what a Modelfile cannot hold"
    return around, ""


def _prompt(tokenizer: "PreTrainedTokenizerBase", template: ChatTemplate, messages: list[Message]) -> str:
    return Writer(tokenizer, template).prompt(messages)


def _adds_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    return list(tokenizer("a")["input_ids"])[:1] == [tokenizer.bos_token_id]


def _found(render: Any, tokens: list[str]) -> _Around | None:
    """The pieces, cut out of conversations of marked messages; None where a mark is not found once.

    Args:
        tokens: that may end an answer.
    """
    talk = _messages(None, [("user", _USER), ("assistant", _ANSWER), ("user", _USER + "2")])
    with_system = render(_messages(_SYSTEM, [("user", _USER)]))
    before, mark, rest = with_system.partition(_SYSTEM)
    user_before_and_system, user_mark, answer = rest.partition(_USER)
    text = render(talk)
    start, first, tail = text.partition(_USER)
    middle, second, last = tail.partition(_ANSWER)
    between, third, _ = last.partition(_USER + "2")
    if not (mark and user_mark and first and second and third):
        return None
    # middle = behind a user's + before an answer; the prompt ends in the same, so where it is cut makes no difference
    # before a user's message stands what follows an answer, less what is behind the answer
    ends = [between[len(token) :] for token in tokens if between.startswith(token)]
    likely = [len(between) - len(rest.lstrip()) for rest in ends]  # behind the end token and its line
    for cut in (*likely, *range(len(between) + 1)):
        user = between[cut:]
        if user_before_and_system.endswith(user) and start.endswith(user):
            behind = user_before_and_system.removesuffix(user)
            pieces = {"system": (before, behind), "user": (user, ""), "assistant": (middle, between[:cut])}
            default = start.removesuffix(user)
            inside = default.startswith(before) and default.endswith(behind) and len(default) >= len(before + behind)
            return _Around(
                pieces, answer, default[len(before) : len(default) - len(behind)] if default and inside else None
            )
    return None


def _holds(around: _Around, render: Any, system: str | None) -> bool:
    """Whether the pieces give what the template gives."""
    told = system if system is not None else around.default
    systems = [told] if told is not None else [None, "Be brief."]
    talks = [_messages(each, _TALK[:count]) for each in systems for count in (1, 3, 5)]
    return all(around.written(talk) == render(talk) for talk in talks)


def _messages(system: str | None, talk: list[tuple[str, str]]) -> list[Message]:
    first = [] if system is None else [Message("system", system)]
    return [*first, *(Message(role, content) for role, content in talk)]
