"""Built-in training variants: for inference they write what the originals do, and an answer is what they mark."""

import pytest
from jinja2 import Environment, TemplateError

from qgraft.data.messages import Call, ConversationError, Message, as_messages
from qgraft.data.rendering import Writer
from qgraft.data.templates import CHATML_TEMPLATE, VARIANTS, ChatTemplate, named_template, remembered_template, variant
from qgraft.data.tokenizing import resolve_template
from qgraft.errors import OptionError

ORIGINALS = {  # variant -> (original, end token)
    "chatml": ("hermes", "<|im_end|>"),
    "llama-3": ("llama3", "<|eot_id|>"),
    "gemma": ("gemma", "<end_of_turn>"),
    "qwen3": ("qwen3", "<|im_end|>"),
    "r1-distill": ("r1_distill", "<｜end▁of▁sentence｜>"),
    "mistral": ("mistral_7b_v0_2", "</s>"),
    "phi": ("phi3", "</s>"),
    "glm": ("glm4", "</s>"),
}
TOOL = {"type": "function", "function": {"name": "look", "description": "a <b> 'é'", "parameters": {"type": "object"}}}
CALL = Message("assistant", "", calls=(Call("look", '{"at": "é"}'),))
CHATS = {
    "a question": [("user", " Hi \n")],
    "a system text": [("system", "Be brief."), ("user", "Hi")],
    "history": [("user", "Hi"), ("assistant", " Hello\n"), ("user", "And?")],
    "two rounds": [
        ("system", "S"),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
        ("assistant", "d"),
        ("user", "e"),
    ],
    "reasoning in history": [("user", "Hi"), ("assistant", "<think>\nhm\n</think>\n\nHello"), ("user", "And?")],
}


def text_of(name: str) -> str:
    return CHATML_TEMPLATE if name == "chatml" else variant(name)


def written_by_transformers(tokenizer, messages, template, **options):
    """What apply_chat_template writes, or None where the template refuses."""
    chat = []
    for message in messages:
        calls = {"tool_calls": [call.as_dict(as_text=True) for call in message.calls]} if message.calls else {}
        chat.append({"role": message.role, "content": message.content, **calls})
    try:
        return tokenizer.apply_chat_template(
            chat, chat_template=template, add_generation_prompt=True, tokenize=False, **options
        )
    except TemplateError:
        return None


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", ORIGINALS)
def test_variants_ask_as_the_originals_do(chat_tokenizer, original, name, chat):
    published, eos = ORIGINALS[name]
    tokenizer, messages = chat_tokenizer(eos), as_messages(CHATS[chat])
    expected = written_by_transformers(tokenizer, messages, original(published))
    ours = Writer(tokenizer, ChatTemplate(text_of(name), name))
    if expected is None:
        assert name in ("gemma", "mistral") and messages[0].role == "system"
        with pytest.raises(ConversationError):
            ours.prompt(messages)
    else:
        assert ours.prompt(messages) == expected


@pytest.mark.parametrize("thinking", [None, False, True])
def test_qwen3_with_tools_and_thinking(chat_tokenizer, original, thinking):
    tokenizer = chat_tokenizer()
    options = {} if thinking is None else {"enable_thinking": thinking}
    ours = Writer(tokenizer, ChatTemplate(variant("qwen3"), "qwen3", enable_thinking=thinking))
    chat = [*as_messages([("system", "S"), ("user", "Hi")]), CALL, Message("tool", "1"), Message("tool", "2")]
    for messages in (chat[:1], chat, chat[1:], [*chat, Message("assistant", "ok"), Message("user", "more")]):
        expected = written_by_transformers(tokenizer, messages, original("qwen3"), tools=[TOOL], **options)
        assert expected is not None
        assert ours.prompt(messages, [TOOL]) == expected


def test_r1_distill_with_tools(chat_tokenizer, original):
    tokenizer = chat_tokenizer("<｜end▁of▁sentence｜>")
    ours = Writer(tokenizer, ChatTemplate(variant("r1-distill"), "r1-distill"))
    asked = [Message("user", "Hi"), CALL, Message("tool", "1"), Message("tool", "2")]
    # The original writes calls once where the content is None, which transformers leaves out: asked of jinja2 itself.
    published = Environment(trim_blocks=True, lstrip_blocks=True).from_string(original("r1_distill"))
    for messages in (asked, [*asked, Message("assistant", "ok"), Message("user", "more")]):
        chat = [{"role": m.role, "content": None if m.calls else m.content,
                 "tool_calls": [call.as_dict(as_text=True) for call in m.calls]} for m in messages]  # fmt: skip
        assert ours.prompt(messages) == published.render(messages=chat, bos_token="<s>", add_generation_prompt=True)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_mark_the_answer_and_its_end(chat_tokenizer, name):
    eos = ORIGINALS[name][1]
    tokenizer = chat_tokenizer(eos)
    rendered = Writer(tokenizer, ChatTemplate(variant(name), name)).answered(
        as_messages([("user", "Hi"), ("assistant", "Hello")])
    )
    marked = "".join(rendered.text[start:stop] for start, stop in rendered.marked)
    ends = {"phi": "<|end|>", "glm": ""}.get(name, eos)
    assert marked.removesuffix(ends).strip().removeprefix("<think>").strip().removeprefix("</think>").strip() == "Hello"
    assert marked.endswith(ends)


def test_a_familys_name_is_the_variant_where_both_ask_alike(chat_tokenizer, original):
    for name, published in (
        ("gemma", "gemma"),
        ("llama-3", "llama3"),
        ("qwen3", "qwen3"),
        ("mistral", "mistral_7b_v0_2"),
    ):
        tokenizer = chat_tokenizer(ORIGINALS[name][1], original(published))
        assert named_template(tokenizer, name) == ChatTemplate(variant(name), name)
        assert named_template(chat_tokenizer(ORIGINALS[name][1]), name).origin == name  # it has none of its own
    other = chat_tokenizer("</s>", original("hermes"))
    assert named_template(other, "mistral").text == original("hermes")
    with pytest.raises(OptionError, match="has none"):
        named_template(chat_tokenizer(), "falcon")


def test_options_that_a_template_does_not_read_are_said(chat_tokenizer, original):
    silent = resolve_template(chat_tokenizer(template=original("hermes")), enable_thinking=False)
    assert "enable_thinking has no effect" in silent.note
    assert resolve_template(chat_tokenizer(template=original("qwen3")), enable_thinking=False).note == ""
    with pytest.raises(OptionError, match="expected question or drop"):
        resolve_template(chat_tokenizer(template=original("gemma")), system_text="keep")


def test_an_adapter_makes_no_template_of_a_file():
    assert remembered_template({"template": "chatml"}) == "chatml"
    assert remembered_template({}) is None
    with pytest.raises(OptionError, match="not read unless you name it"):
        remembered_template({"template": "/etc/x.jinja"})


def test_a_turn_is_no_dict_whose_keys_would_be_taken():
    with pytest.raises(ConversationError, match=r"expected a \(role, content\) pair"):
        as_messages([{"role": "user", "content": "Who are you?"}])  # type: ignore[list-item]
