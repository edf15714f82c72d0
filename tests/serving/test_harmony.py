"""gpt-oss says of every part of an answer what it is: its channels become reasoning, content and calls."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qgraft
from qgraft.data.messages import Call, Message
from qgraft.errors import OptionError
from qgraft.serving.harmony import FINAL, HarmonyReader
from qgraft.serving.prompting import Prompter, Prompting
from qgraft.serving.protocol import read_chat

Maker = Callable[..., Any]
THOUGHT = "<|channel|>analysis<|message|>Hm <|x. <|end|><|start|>assistant"
CALLED = '<|channel|>commentary to=functions.time <|constrain|>json<|message|>{"at": "Rome"}'
TIME = Call("time", '{"at": "Rome"}')
TEMPLATE = Path(__file__).parents[1] / "data/originals/gptoss.jinja"


@pytest.mark.parametrize("step", [1, 4, 1000])
@pytest.mark.parametrize(
    ("text", "reasoning", "content", "calls"),
    [
        (f"{THOUGHT}<|channel|>final<|message|>Yes <|no.", "Hm <|x. ", "Yes <|no.", ()),
        (THOUGHT + CALLED, "Hm <|x. ", "", (TIME,)),
        (' to=functions.time<|channel|>commentary json<|message|>{"at": "Rome"}', "", "", (TIME,)),
        (f"<|channel|>commentary<|message|>I look.<|end|><|start|>assistant{CALLED}", "", "I look.", (TIME,)),
        (CALLED.replace("time", "other"), "", 'to=functions.other {"at": "Rome"}', ()),
        (CALLED.replace("}", ""), "", 'to=functions.time {"at": "Rome"', ()),
        ("no channel at all", "", "no channel at all", ()),
        (f"{THOUGHT}<|channel|>analysis<|message|>Well.<|end|><|start|>assistant{FINAL}", "Hm <|x. \nWell.", "", ()),
    ],
)  # fmt: skip
def test_channels(step: int, text: str, reasoning: str, content: str, calls: tuple[Call, ...]) -> None:
    reader = HarmonyReader(["time"])
    shown = [reader.push(text[at : at + step]) for at in range(0, len(text), step)] + [reader.push("", last=True)]
    assert ("".join(each[0] for each in shown), "".join(each[1] for each in shown)) == (reasoning, content)
    assert reader.calls == calls


def test_what_is_cut() -> None:
    reader = HarmonyReader(["time"])
    assert reader.push(CALLED[:-3], last=True, cut=True) == ("", "")
    assert reader.unfinished and reader.calls == (Call("time", '{"at": "Rom'),)
    for text in (CALLED[:20], f"{THOUGHT}<|chan"):
        assert HarmonyReader(["time"]).push(text, last=True, cut=True)[1] == ""
    assert HarmonyReader(final=True).push('{"a": 1}', last=True) == ("", '{"a": 1}')


def test_prompts_and_the_efforts_that_the_template_asks_for(tiny_gguf: Maker) -> None:
    _, tokenizer = qgraft.load(str(tiny_gguf("llama").path), device="cpu")
    tokens = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    prompter = Prompter(tokenizer, Prompting(template=str(TEMPLATE)))
    tools = [{"type": "function", "function": {"name": "time", "description": "", "parameters": {"type": "object"}}}]
    asked = {"model": "m", "messages": [{"role": "user", "content": "What time is it?"}], "tools": tools}
    ids, reader = prompter.chat(read_chat({**asked, "reasoning_effort": "high"}), [])
    text = tokenizer.decode(ids)
    assert "Reasoning: high" in text and text.endswith("<|start|>assistant") and reader.keeps_special
    writer = prompter._known(str(TEMPLATE), None)[1]
    turns = [Message("user", "What time is it?"), Message("assistant", calls=(TIME,))]
    said = writer.answered(turns, tools).text.removeprefix(writer.prompt(turns[:1], tools))
    reader.push(said.removesuffix("<|call|>"), last=True)
    assert reader.calls == (TIME,)
    formed, reader = prompter.chat(read_chat({**asked, "tools": None, "response_format": {"type": "json_object"}}), [])
    assert tokenizer.decode(formed).endswith(FINAL) and reader.final
    with pytest.raises(OptionError, match=r"mood: the chat template .* does not ask for it") as refused:
        prompter.chat(read_chat({**asked, "chat_template_kwargs": {"mood": "bright"}}), [])
    assert "reasoning_effort" in str(refused.value.hint)
    with pytest.raises(OptionError, match="messages: the chat template"):
        prompter.chat(read_chat({**asked, "chat_template_kwargs": {"messages": "x"}}), [])
