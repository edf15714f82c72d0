"""What somebody asks, as the ids of a prompt: the way in which the adapter was trained.

An adapter remembers the template, the system text and the thinking option that it was trained with; prompted otherwise it
answers otherwise. So a request for one adapter is prompted so, unless the server was told a template or a system text. A mix
whose adapters differ in it, and the base, get the server's own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from qgraft.data.markers import marker_texts, refuse_markers
from qgraft.data.messages import ConversationError, Message
from qgraft.data.rendering import Writer
from qgraft.data.scripted import WritesPrompts
from qgraft.data.templates import ChatTemplate, remembered_template
from qgraft.data.tokenizing import ChatGlmOptions, encode_prompt, resolve_template
from qgraft.errors import OptionError
from qgraft.serving.answer_reader import AROUND, AnswerReader
from qgraft.serving.call_probe import call_format
from qgraft.serving.harmony import FINAL, HarmonyReader, writes_harmony
from qgraft.serving.protocol import Ask
from qgraft.serving.tool_calls import CallFormat

Reader = AnswerReader | HarmonyReader


@dataclass(frozen=True)
class Prompting:
    """What prompts depend on beside the messages."""

    template: str | None = None
    system: str | None = None
    enable_thinking: bool | None = None
    source_prefix: str | None = None

    def as_trained(self, trained: Sequence[Mapping[str, Any]]) -> "Prompting":
        """With what adapters were trained with, where it is not given here and they agree."""
        found: dict[str, Any] = {}
        for key in vars(self):
            said = [remembered_template(each) if key == "template" else each.get(key) for each in trained]
            agreed = said[0] if said and all(value == said[0] for value in said) else None
            own = getattr(self, key)
            found[key] = agreed if own is None and isinstance(agreed, str | bool) else own
        return Prompting(**found)


class Prompter:
    """Makes prompts; what it finds out about a template is asked once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompting: Prompting, markers: Sequence[int] = ()) -> None:
        self.tokenizer, self.prompting, self.markers = tokenizer, prompting, markers
        self.harmony = writes_harmony(tokenizer.get_added_vocab())
        self._known = lru_cache(maxsize=32)(self._look)

    @property
    def template(self) -> ChatTemplate:
        """The server's own."""
        return self._known(self.prompting.template, self.prompting.enable_thinking)[0]

    def chat(self, ask: Ask, trained: Sequence[Mapping[str, Any]]) -> tuple[list[int], Reader]:
        """The ids of a chat's prompt, and what reads the answer to it.

        Raises DataError where the template cannot write what the messages say.
        """
        how = self.prompting.as_trained(trained)
        thinking = how.enable_thinking if ask.enable_thinking is None else ask.enable_thinking
        template, writer, form = self._known(how.template, thinking)
        assert ask.messages is not None
        if ask.variables:
            if writer is None:
                raise OptionError(f"{next(iter(ask.variables))}: the tokenizer writes the model's own prompts")
            writer = writer.told(ask.variables)
            template = writer.template
        turns = list(ask.messages if form is None else form.with_ids(ask.messages))
        if how.system and turns[0].role != "system":
            turns = [Message("system", how.system), *turns]
        calls = "tools" if ask.tools else "tool_calls" if any(turn.calls for turn in turns) else None
        if calls and writer is None:
            raise ConversationError(f"{calls}: the tokenizer writes the model's own prompts, without tools")
        if calls and form is None and not self.harmony:
            raise ConversationError(
                f"{calls}: how the chat template ({template.origin}) writes calls is not known here"
            )
        if writer is not None:
            settled = writer.settled(turns)
            writer.check_asked(writer.prompt(settled, ask.tools), settled, ask.tools)
        prefix = ChatGlmOptions(source_prefix=how.source_prefix or "")
        ids = encode_prompt(
            self.tokenizer, turns, template=template, tools=ask.tools, chatglm=prefix, markers=self.markers
        )
        names = {tool["function"]["name"]: tool["function"].get("parameters") for tool in ask.tools}
        if self.harmony:
            final = self.tokenizer(FINAL, add_special_tokens=False)["input_ids"] if ask.formed else []
            return [*ids, *final], HarmonyReader(names, bool(final))
        own, special = self.tokenizer.get_added_vocab(), {*self.tokenizer.all_special_tokens}
        around = [marks for marks in AROUND if marks[0].strip() in template.text or marks[0] in own]
        begins, ends = around[0] if around else AROUND[0]
        ending = str(self.tokenizer.decode(ids[-8:])).rstrip()
        thinks = ending.endswith(begins.rstrip())
        return ids, AnswerReader(
            thinks, bool(around) and not ending.endswith(ends), begins, ends, not special.isdisjoint((begins, ends)),
            form, names, bool(ask.must_call),
        )  # fmt: skip

    def plain(self, text: str) -> list[int]:
        """The ids of a completion's prompt. Raises DataError where it holds a token that stands for images."""
        refuse_markers(marker_texts(self.tokenizer, self.markers), [Message("user", text)])
        return list(self.tokenizer(text, verbose=False)["input_ids"])

    def _look(self, name: str | None, thinking: bool | None) -> tuple[ChatTemplate, Writer | None, CallFormat | None]:
        template = resolve_template(self.tokenizer, name, enable_thinking=thinking)
        if isinstance(self.tokenizer, WritesPrompts):
            return template, None, None
        form = None if self.harmony else call_format(self.tokenizer, template)
        return template, Writer(self.tokenizer, template), form
