"""Calls and reasoning come back out of what training's templates write, whole and piece by piece."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from talkers import MISTRAL_TEMPLATE

import qgraft
from qgraft.data.messages import Call, ConversationError, Message
from qgraft.data.rendering import Writer
from qgraft.data.templates import ChatTemplate, variant
from qgraft.errors import OptionError, UnsupportedError
from qgraft.serving.answer_reader import AnswerReader
from qgraft.serving.call_probe import call_format
from qgraft.serving.tagged_arguments import Braces
from qgraft.serving.tool_calls import CallFormat, call_texts

Maker = Callable[..., Any]
QWEN = CallFormat(
    "<tool_call>",
    "</tool_call>",
    written=('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>"),
    repeats=True,
    joint="\n</tool_call>\n<tool_call>\n",
)
MISTRAL = '[TOOL_CALLS] [{"name": "time", "arguments": {"at": "Rome"}}]'
TIME = Call("time", '{"at": "Rome"}')


def pieces(reader: AnswerReader, text: str, step: int) -> tuple[str, str]:
    """(reasoning, content) of an answer that comes `step` characters at a time."""
    shown = [reader.push(text[at : at + step]) for at in range(0, len(text), step)] + [reader.push("", last=True)]
    return "".join(each[0] for each in shown), "".join(each[1] for each in shown)


@pytest.mark.parametrize("step", [1, 3, 1000])
@pytest.mark.parametrize(
    "text,content,calls",
    [
        ("Hello <tool world>", "Hello <tool world>", ()),
        ('<tool_call>\n{"name": "time", "arguments": {"at": "Rome"}}\n</tool_call>', "", (TIME,)),
        ('Wait.\n<tool_call>\n{"name": "time", "arguments": {"at": "Rome"}}\n</tool_call>\n<tool_call>'
         '{"name": "time", "arguments": {}}</tool_call>', "Wait.", (TIME, Call("time", "{}"))),
        ('<tool_call>{"name": "other", "arguments": {}}</tool_call>',
         '<tool_call>{"name": "other", "arguments": {}}</tool_call>', ()),
        ('<tool_call>{"name": "time", "arguments"', '<tool_call>{"name": "time", "arguments"', ()),
        ('I use <tool_call>.\n<tool_call>{"name": "time", "arguments": {"at": "Rome"}}</tool_call> And '
         '<tool_call>{"name": "other"}</tool_call><tool_call>{"name": "time", "arguments": {}}</tool_call>',
         'I use <tool_call>.\n And <tool_call>{"name": "other"}</tool_call>', (TIME, Call("time", "{}"))),
        *((text, text, ()) for value in ("NaN", "-Infinity", "1e999", '"\\ud800"')
          for text in [f'<tool_call>{{"name": "time", "arguments": {{"at": {value}}}}}</tool_call>']),
        ('<tool_call>{"name": "time", "arguments": [1]}</tool_call>',
         '<tool_call>{"name": "time", "arguments": [1]}</tool_call>', ()),
    ],
)  # fmt: skip
def test_calls_between_marks(text: str, content: str, calls: tuple[Call, ...], step: int) -> None:
    reader = AnswerReader(format=QWEN, names=["time"])
    reasoning, shown = pieces(reader, text, step)
    assert (reasoning, shown.rstrip() if calls else shown, reader.calls) == ("", content, calls)


@pytest.mark.parametrize("step", [1, 4, 1000])
def test_calls_without_marks_and_lists_and_names_apart(step: int) -> None:
    for form, text in (
        (CallFormat("", ""), '{"name": "time", "parameters": {"at": "Rome"}}'),
        (CallFormat("[TOOL_CALLS]", ""), MISTRAL),
        (CallFormat("", "", True, "\n"), 'time\n{"at": "Rome"}'),
    ):
        reader = AnswerReader(format=form, names=["time"])
        assert pieces(reader, text, step) == ("", "") and reader.calls == (TIME,)
    for text in ("It is noon.", 'It is noon. {"name": "time", "parameters": {}}'):
        reader = AnswerReader(format=CallFormat("", ""), names=["time"])
        assert pieces(reader, text, step) == ("", text) and reader.calls == ()


@pytest.mark.parametrize("step", [1, 5, 1000])
def test_reasoning(step: int) -> None:
    assert pieces(AnswerReader(reasons=True), "<think>\nHm </thin\n</think>\n\nYes.", step) == ("\nHm </thin\n", "Yes.")
    assert pieces(AnswerReader(thinking=True, reasons=True), "Hm</think>Yes.", step) == ("Hm", "Yes.")
    assert pieces(AnswerReader(reasons=True), "<this> is", step) == ("", "<this> is")
    assert pieces(AnswerReader(), "<think>Hm</think>Yes.", step) == ("", "<think>Hm</think>Yes.")
    assert pieces(AnswerReader(thinking=True, reasons=True), "Hm </th", step) == ("Hm </th", "")
    reader = AnswerReader(reasons=True, format=QWEN, names=["time"])
    text = '<think>Which?</think>\n<tool_call>{"name": "time", "arguments": {"at": "Rome"}}</tool_call>'
    assert pieces(reader, text, step) == ("Which?", "") and reader.calls == (TIME,)


ORIGINALS = Path(__file__).parents[1] / "data" / "originals"
KNOWN = {"qwen2_5": QWEN, "qwen3": QWEN, "llama3_1": CallFormat("", "", written=('{"name": "', '", "parameters": ', "}")),
         "deepseekv3": None}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_what_a_template_writes_is_read_back(tiny_gguf: Maker, name: str) -> None:
    """The models' own templates, which training knows: their calls come back out of what they write."""
    _, tokenizer = qgraft.load(str(tiny_gguf("llama").path), device="cpu")
    template = ChatTemplate((ORIGINALS / f"{name}.jinja").read_text(encoding="utf-8"), name)
    form = call_format(tokenizer, template)
    assert form is not None and (KNOWN[name] is None or form == KNOWN[name])
    writer, asked = Writer(tokenizer, template), Message("user", "What time is it in Rome?")
    said = Message("assistant", calls=(replace(TIME, id="a1B2c3D4e"),))
    tools = [{"type": "function", "function": {"name": "time", "description": "", "parameters": {"type": "object"}}}]
    prompt, whole = writer.prompt([asked], tools), writer.answered([asked, said], tools).text
    written = whole.removeprefix(prompt).rpartition("<｜Assistant｜>")[2]
    for end in ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<｜end▁of▁sentence｜>"):
        written = written.partition(end)[0]
    assert form.read(written, ["time"])[1] == (TIME,)
    (call,) = call_texts(form, tools, ())
    assert (call.before + TIME.arguments + call.after).strip() == written.strip().removeprefix(
        "<think>\n\n</think>\n\n"
    )


DEEP = Call("weather", '{"city": "1", "days": 3, "deep": {"a": [1, "x"]}}')  # which is a text, and which a number
SCHEMAS = {"time": None, "weather": {"properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}}


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "glm4moe", "deepseekv3", "lfm2_2_5", "gemma4"])
def test_several_calls_are_read_back_also_where_they_are_cut(tiny_gguf: Maker, name: str) -> None:
    _, tokenizer = qgraft.load(str(tiny_gguf("llama").path), device="cpu")
    template = ChatTemplate((ORIGINALS / f"{name}.jinja").read_text(encoding="utf-8"), name)
    form, writer, asked = call_format(tokenizer, template), Writer(tokenizer, template), Message("user", "What now?")
    assert form is not None and form.ids == 0
    tools = [{"type": "function", "function": {"name": each, "description": "", "parameters": {"type": "object"}}}
             for each in SCHEMAS]  # fmt: skip
    calls = (TIME, DEEP, TIME)
    whole = writer.answered([asked, Message("assistant", "Let me look.", calls=calls)], tools).text
    asks = whole.index("What now?")
    begins = min(
        whole.index(text, asks) for text in ("Let me look.", form.mark)
    )  # Gemma's template has the calls first
    written = whole[begins:]
    for end in ("<|im_end|>", "<｜end▁of▁sentence｜>", "<|user|>", "</s>", "<|tool_response>"):
        written = written.partition(end)[0]
    for step in (1, 7, 1000):
        reader = AnswerReader(format=form, names=SCHEMAS)
        assert pieces(reader, written.rstrip(), step)[1].strip() == "Let me look." and reader.calls == calls
    begins = written.index(form.mark) + len(form.mark)
    for stop in range(begins, written.find("Let me look.", 1) % (len(written.rstrip()) + 1), 3):
        reader = AnswerReader(format=form, names=SCHEMAS)
        shown = reader.push(written[:stop], last=True, cut=True)[1]
        sure = len(reader.calls) - (reader.unfinished and bool(reader.calls) and reader.calls[-1] not in calls)
        assert reader.calls[:sure] == calls[:sure], stop
        rest = shown.removeprefix("Let me look.").strip()
        assert not rest or form.mark.startswith(rest) or form.after.startswith(rest), (stop, shown)


@pytest.mark.parametrize(
    ("arguments", "read"),
    [
        ('{at:<|"|>a,b}c<|"|>,n:[1,-2.5,null,true,{<|"|>k<|"|>:{}}]}',
         {"at": "a,b}c", "n": [1, -2.5, None, True, {"k": {}}]}),
        ("{}", {}), ("{at:NaN}", None), ("{at:1e999}", None), ("{at:x}", None), ("{at:1", None), ("{at}", None),
        ('{at:<|"|>x}', None), ("{at:" + "[" * 99 + "]" * 99 + "}", None), ("{1,2}", None), ("[1]", None), ("{:1}", None),
    ],
)  # fmt: skip
def test_gemmas_braces(arguments: str, read: dict[str, Any] | None) -> None:
    form = CallFormat("<|tool_call>call:", "<tool_call|>", True, tags=Braces())
    text = f"<|tool_call>call:time{arguments}<tool_call|>"
    shown, calls, _ = form.read(text, ["time"])
    assert (shown, [json.loads(call.arguments) for call in calls]) == (("", [read]) if read is not None else (text, []))
    begun = form.read('<|tool_call>call:time{at:<|"|>a,b<|"|>,n:[1,2', ["time"], cut=True)
    assert begun == ("", (Call("time", '{"at": "a,b"'),), True)


def test_ids_of_calls_are_those_that_a_template_takes(tiny_gguf: Maker) -> None:
    """Mistral's take nine letters and digits alone, and those of other servers are longer."""
    _, tokenizer = qgraft.load(str(tiny_gguf("llama").path), device="cpu")
    checks = "{%- if c.id | length != 9 %}{{ raise_exception('ids') }}{% endif %}"
    template = ChatTemplate(MISTRAL_TEMPLATE.replace("m.tool_calls %}{", f"m.tool_calls %}}{checks}{{"), "mistral")
    form = call_format(tokenizer, template)
    assert form is not None and form.ids == 9
    reader = AnswerReader(format=form, names=["time"])
    reader.push(MISTRAL, last=True)
    assert len(reader.calls[0].id or "") == 9
    both = (replace(TIME, id="call_012345"), replace(TIME, id="a1B2c3D4e"))
    turns = [Message("user", "x"), Message("assistant", calls=both), Message("tool", "noon", call_id="call_012345")]
    with pytest.raises(ConversationError, match="ids"):
        Writer(tokenizer, template).prompt(turns)
    _, said, told = taken = form.with_ids(turns)
    assert said.calls[0].id == told.call_id and said.calls[1].id == "a1B2c3D4e"
    assert "call_012345" not in Writer(tokenizer, template).prompt(taken)


ROME = {"at": "Rome", "days": [1, -2.5, None], "who": {"it's": True}}
GLM = {
    "chatglm3": """time\n ```python\ntool_call(at='Rome', days=[1, -2.5, None], who={"it's": True})\n```""",
    "glm": 'time\n{"at": "Rome", "days": [1, -2.5, null], "who": {"it\'s": true}}',
}


@pytest.mark.parametrize("step", [1, 1000])
@pytest.mark.parametrize("name", GLM)
def test_calls_of_glm_are_what_its_template_writes(tiny_gguf: Maker, name: str, step: int) -> None:
    """The prompts of the releases' own code (tests/checkpoints/test_glm_tokenizer.py), and several parts of one answer."""
    _, tokenizer = qgraft.load(str(tiny_gguf("llama").path), device="cpu")
    template = ChatTemplate(variant(name), name)
    form = call_format(tokenizer, template)
    assert form is not None and form.turn == "<|assistant|>"
    call = Call("time", json.dumps(ROME))
    writer, asked = Writer(tokenizer, template), Message("user", "What time is it in Rome?")
    tools = [{"type": "function", "function": {"name": "time", "description": "", "parameters": {"type": "object"}}}]
    prompt = writer.prompt([asked], tools)

    def written(*calls: Call, text: str = "") -> str:
        said = Message("assistant", text, calls=calls)
        return writer.answered([asked, said], tools).text.removeprefix(prompt)

    assert written(call) == GLM[name]
    for text, content, calls in (
        (written(call), "", (call,)),
        (written(call, call), "", (call, call)),
        (written(call, text="I look it up."), "I look it up.", (call,)),
        (written(text="It is noon."), "It is noon.", ()),
        (GLM[name].replace("time", "other"), GLM[name].replace("time", "other"), ()),
        (GLM[name][:-5], GLM[name][:-5], ()),
        (GLM[name] + " is what I would call", GLM[name] + " is what I would call", ()),
    ):
        reader = AnswerReader(format=form, names=["time"])
        assert (pieces(reader, text, step)[1].strip(), reader.calls) == (content, calls), text


@pytest.mark.parametrize(
    "given",
    ["at=now()", "'Rome'", "**{'at': 'Rome'}", "at=b'Rome'", "at={1, 2}", "at=1j", "at=1e999", "at=(1, 2)", "at={1: 2}",
     "at=1, at=2", "at='Rome", "at=" + "[" * 70 + "]" * 70, "at=__import__('os')", "at=\0",
     r"at='\ud800'", "at=1, at:=2", "at==1"],
)  # fmt: skip
def test_keywords_are_literals_that_json_has(given: str) -> None:
    form = CallFormat("", "```", True, "\n ```python\ntool_call(", keywords=True)
    text = f"time\n ```python\ntool_call({given})\n```"
    assert form.read(text, ["time"]) == (text, (), False)
    assert form.read(text.replace(given, "at='a)b'"), ["time"])[1] == (Call("time", '{"at": "a)b"}'),)
    for name in ("from", "max-days", "ｆ"):  # a schema may have them, and the template writes them as they are
        read = (Call("time", f'{{"{name}": "a=b, c", "in": 1}}'),)
        assert form.read(text.replace(given, f"{name}='a=b, c', in=1"), ["time"])[1] == read


def test_a_call_of_chatglm3_that_is_cut_has_the_keywords_that_are_whole() -> None:
    form = CallFormat("", "```", True, "\n ```python\ntool_call(", keywords=True, turn="<|assistant|>")
    text, told = "I ask.<|assistant|>time\n ```python\ntool_call(at='a, b', days=[1, 2], who='me')\n```", []
    for end in range(text.index("at="), len(text) + 1):
        reader = AnswerReader(format=form, names=["time"])
        assert reader.push(text[:end])[1] + reader.push("", last=True, cut=True)[1] == "I ask."
        told.append(reader.calls[0].arguments)
    begun = ["{", '{"at": "a, b"', '{"at": "a, b", "days": [1, 2]', '{"at": "a, b", "days": [1, 2], "who": "me"}']
    assert list(dict.fromkeys(told)) == begun
    with pytest.raises(UnsupportedError, match="arguments as Python's keywords"):
        call_texts(form, [{"type": "function", "function": {"name": "time"}}], ())


def test_a_forced_call_is_what_templates_write_without_ids(tiny_gguf: Maker) -> None:
    _, tokenizer = qgraft.load(str(tiny_gguf("llama").path), device="cpu")
    form = call_format(tokenizer, ChatTemplate(MISTRAL_TEMPLATE, "mistral"))
    assert form is not None and not form.repeats
    tools = tuple({"type": "function", "function": {"name": name}} for name in ("time", 'a"b'))
    time, other = call_texts(form, tools, ())
    assert (time.before + "{}" + time.after, time.arguments) == (
        '[TOOL_CALLS] [{"name": "time", "arguments": {}}]', {"type": "object"}
    )  # fmt: skip
    assert form.read(other.before + "{}" + other.after, ['a"b'])[1] == (Call('a"b', "{}"),)
    assert call_texts(form, tools, ["time"]) == (time,) and call_texts(None, (), ()) == ()
    with pytest.raises(UnsupportedError, match="not known"):
        call_texts(None, tools, ())
    for parameters in ([], {"type": ["object", "null"]}):
        with pytest.raises(OptionError, match="the schema of an object"):
            call_texts(form, [{"type": "function", "function": {"name": "f", "parameters": parameters}}], ())


def test_a_template_without_calls_has_no_format(tiny_gguf: Maker) -> None:
    _, tokenizer = qgraft.load(str(tiny_gguf("llama").path), device="cpu")
    assert call_format(tokenizer, ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", "none")) is None
    assert call_format(tokenizer, ChatTemplate(variant("qwen3"), "qwen3")) == QWEN
    gemma = (ORIGINALS / "gemma.jinja").read_text(encoding="utf-8")
    assert call_format(tokenizer, ChatTemplate(gemma, "gemma")) is None


def test_a_name_that_a_template_writes_otherwise_is_told_as_that(tiny_gguf: Maker) -> None:
    _, tokenizer = qgraft.load(str(tiny_gguf("llama").path), device="cpu")
    template = ChatTemplate((ORIGINALS / "qwen3.jinja").read_text(encoding="utf-8"), "qwen3")
    writer, asked = Writer(tokenizer, template), [Message("user", "What time is it?")]
    for name, told in (('a"b', "writes the name of a tool otherwise: 'a\"b'"), ("time", None)):
        tools = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}]
        prompt = writer.prompt(asked, tools)
        if told is None:
            writer.check_asked(prompt, asked, tools)
            continue
        with pytest.raises(ConversationError, match=told):
            writer.check_asked(prompt, asked, tools)


@pytest.mark.parametrize(
    "form,text,before",
    [
        (QWEN, '<tool_call>\n{"name": "time", "arguments": {"at": "Rome"}}\n</tool_call>', "<tool_call>"),
        (CallFormat("", ""), '{"name": "time", "parameters": {"at": "Rome"}}', '{"name": "time"'),
        (CallFormat("[TOOL_CALLS]", ""), MISTRAL, "[TOOL_CALLS]"),
        (CallFormat("", "", True, "\n"), 'time\n{"at": "Rome"}', "time\n{"),
    ],
    ids=["qwen", "llama", "mistral", "glm"],
)
def test_a_call_that_is_cut_anywhere_is_told_as_far_as_it_goes(form: CallFormat, text: str, before: str) -> None:
    """From where it is certain that it is one, nothing of it is text, and what comes is the beginning of its arguments."""
    for end in range(len(text) + 1):
        for lead in ("", "Wait.\n") if form.mark else ("",):
            reader = AnswerReader(format=form, names=["time"])
            shown = reader.push(lead + text[:end])[1] + reader.push("", last=True, cut=True)[1]
            if end < len(before):
                assert reader.calls == () and (lead + text[:end]).startswith(shown)
                continue
            assert shown == lead and len(reader.calls) <= 1
            for call in reader.calls:
                assert call.name == "time" and '{"at": "Rome"}'.startswith(call.arguments)
            assert reader.unfinished or reader.calls == (TIME,)
        forced = AnswerReader(format=form, names=["time"], must_call=True)
        assert forced.push(text[:end], last=True, cut=True)[1] == ""
    other = AnswerReader(format=form, names=["other"])
    assert other.push(text[:-1])[1] + other.push("", last=True, cut=True)[1] == text[:-1] and other.calls == ()
