"""Which tokens end an answer: by what a file says, by their texts, and by what the chat template writes."""

import pytest
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast

from qgraft.data.ends import ENDS, STARTS, end_token_ids, until_end
from qgraft.data.messages import Conversation, Message
from qgraft.data.templates import ChatTemplate
from qgraft.data.tokenizing import encode_conversation

WORDS = {"[UNK]": 0, "<s>": 1, "<eos_of_text>": 2, "hello": 3}

# What families' templates put around turns, shortened to two roles.
TURNS = "{% for m in messages %}"
TEMPLATES = {  # the template, what ends an answer
    "chatml": (TURNS + "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}", "<|im_end|>"),
    "llama-2": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}", "<eos_of_text>",
    ),
    "llama-3": (
        TURNS + "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + (m.content | trim) + '<|eot_id|>' }}"
        "{% endfor %}", "<|eot_id|>",
    ),
    "a turn that nothing but the next one ends": (
        TURNS + "{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}", "<|user|>",
    ),
    "a token of nobody else": (TURNS + "{{ m.content + '<over>' }}{% endfor %}", "<over>"),
    "the longest of several": (TURNS + "{{ m.content + '<over>>' }}{% endfor %}", "<over>>"),
    "words": (TURNS + "{{ m.role + ': ' + m.content + '\n' }}{% endfor %}", None),
    "a word before a token": (TURNS + "{{ m.content + ' thanks<over>' }}{% endfor %}", None),
    "refuses": ("{{ raise_exception('only one turn') }}", None),
    "breaks": ("{{ messages[7].content }}", None),
}  # fmt: skip
TOKENS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|user|>",
          "<|assistant|>", "[INST]", "<over>", "<over>>"]  # fmt: skip


def tokenizer_with(tokens: list[str], special: bool = True, **roles: str | None) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel(WORDS, unk_token="[UNK]"))
    made.add_tokens([AddedToken(token, special=special) for token in tokens])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, **{"bos_token": "<s>", "eos_token": "<eos_of_text>", "unk_token": "[UNK]", **roles}
    )


@pytest.mark.parametrize("special", [True, False], ids=["special", "user-defined"])
@pytest.mark.parametrize("case", TEMPLATES)
def test_the_template_tells(case: str, special: bool) -> None:
    template, end = TEMPLATES[case]
    tokenizer = tokenizer_with(TOKENS, special)
    by_text = [text for text in (*ENDS, *STARTS) if text in TOKENS]
    ends = tokenizer.convert_ids_to_tokens(end_token_ids(tokenizer, None, ChatTemplate(template, case)))
    assert ends[0] == "<eos_of_text>" and ends == list(dict.fromkeys(ends))
    assert set(ends) == {"<eos_of_text>", *by_text, *([end] if end else [])}


@pytest.mark.parametrize("text", [*ENDS, *STARTS])
def test_texts_tell(text: str) -> None:
    tokenizer = tokenizer_with([text, "<other>"])
    assert end_token_ids(tokenizer) == [2, tokenizer.convert_tokens_to_ids(text)]


def test_a_word_that_looks_like_an_end_is_none() -> None:
    made = Tokenizer(models.WordLevel({**WORDS, "</s>": 4}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos_of_text>", unk_token="[UNK]")
    assert end_token_ids(tokenizer) == [2]


def test_parts_of_an_answer_end_nothing() -> None:
    """gpt-oss and Solar Open end each part of an answer by <|end|>, Gemma 4 has </s> as a word."""
    for tokens, ends in (
        (["<|end|>", "<|return|>", "<|call|>"], ["<|return|>", "<|call|>"]),
        (["<|end|>", "<|flush|>", "<|calls|>"], ["<|calls|>", "<|flush|>"]),
        (["<|end|>", "<|return|>"], ["<|end|>", "<|return|>"]),
        (["</s>", "<|tool_response>"], ["<|tool_response>"]),
    ):
        tokenizer = tokenizer_with(tokens)
        assert tokenizer.convert_ids_to_tokens(end_token_ids(tokenizer)) == ["<eos_of_text>", *ends]


HARMONY = (
    TURNS
    + "<|start|>{{ m.role }}<|channel|>{% if m.reasoning_content %}analysis<|message|>{{ m.reasoning_content }}<|end|>"
    "<|start|>{{ m.role }}<|channel|>{% endif %}final<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)


def test_a_token_that_ends_a_part_is_no_end_where_the_last_answer_ends_otherwise() -> None:
    """gpt-oss: what it thinks ends by <|end|>, as earlier answers do; Command R7B ends the answer and then the turn."""
    tokenizer = tokenizer_with(["<|end|>", "<|return|>", "<|call|>"], eos_token="<|return|>")
    template = ChatTemplate(HARMONY, "harmony")
    ends = end_token_ids(tokenizer, None, template)
    assert tokenizer.convert_ids_to_tokens(ends) == ["<|return|>", "<|call|>"]
    thought = Message("assistant", "hello", reasoning="hello")
    (sample,) = encode_conversation(
        tokenizer, Conversation((Message("user", "hello"), thought), "row"), template=template
    )
    first = next(place for place, label in enumerate(sample.labels) if label >= 0)
    assert sample.labels[first:] == sample.input_ids[first:] and sample.labels[-1] == tokenizer.eos_token_id
    assert tokenizer.convert_tokens_to_ids("<|end|>") in sample.labels
    both = tokenizer_with(["<answered>", "<turn_ended>", "<turn>"], eos_token="<turn_ended>")
    turns = ChatTemplate(TURNS + "{{ '<turn>' + m.content + '<answered><turn_ended>' }}{% endfor %}", "two tokens")
    assert both.convert_ids_to_tokens(end_token_ids(both, None, turns)) == ["<turn_ended>"]


def test_what_the_file_says_counts_and_the_tokenizers_own_comes_first() -> None:
    tokenizer = tokenizer_with(["<|im_end|>"])
    assert end_token_ids(tokenizer, 3) == [2, 3, 4]
    assert end_token_ids(tokenizer, [4, 2, 1]) == [2, 4, 1]
    assert end_token_ids(tokenizer_with(["<|im_end|>"], eos_token=None), None) == [4]
    assert end_token_ids(tokenizer_with([], eos_token=None), None) == []


def test_until_end() -> None:
    assert until_end([5, 6, 2, 7, 3], [3, 2]) == [5, 6]
    assert until_end([5, 6], [3]) == [5, 6] == until_end([5, 6], [])
