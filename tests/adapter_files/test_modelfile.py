"""Modelfiles: their template read as Go's language would be, against the chat template itself."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qgraft
from qgraft.adapter_files.modelfile import modelfile

Maker = Callable[..., Any]
TALKS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b\n"}, {"role": "user", "content": "{c}"}],
]
SYSTEM = {"role": "system", "content": "Be brief."}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_DEFAULT = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Tiny.<|im_end|>\n{% endif %}" + CHATML
HEADERS = (
    "{% for m in messages %}[{{ m.role }}]\n\n{{ m.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n\n{% endif %}"
)
BOS = "{{ bos_token }}" + CHATML
COUNTS = CHATML + "{{ messages | length }}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + HEADERS


def go(template: str, messages: list[dict[str, str]]) -> str:
    """What Go's text/template makes of the few actions that are written here."""
    lead, body, answer = re.fullmatch(
        r"(.*?)\{\{ range \.Messages \}\}(.*)\{\{ end \}\}\{\{ end \}\}(.*)", template, re.S
    ).groups()
    cases = re.findall(
        r'\{\{ (?:else )?if eq \.Role "(\w+)" \}\}(.*?)\{\{ \.Content \}\}(.*?)(?=\{\{ else if|\Z)', body, re.S
    )
    around = {role: (before, behind) for role, before, behind in cases}
    return lead + "".join(around[m["role"]][0] + m["content"] + around[m["role"]][1] for m in messages) + answer


@pytest.fixture
def tokenizer(tiny_gguf: Maker) -> Any:
    return qgraft.load(tiny_gguf("llama").path, device="cpu")[1]


@pytest.mark.parametrize(
    ("template", "default"), [(CHATML, None), (WITH_DEFAULT, "You are Tiny."), (HEADERS, None), (BOS, None)]
)
def test_the_template_is_that_of_the_model(tokenizer: Any, template: str, default: str | None) -> None:
    tokenizer.chat_template = template
    made = modelfile(Path("/m/base.gguf"), "./adapter.gguf", tokenizer, [2])
    assert made.notes == ()
    assert made.text.startswith("FROM /m/base.gguf\nADAPTER ./adapter.gguf\n")
    assert made.text.endswith('PARAMETER stop "<|im_end|>"\n')
    written = re.search(r'TEMPLATE """(.*?)"""', made.text, re.S)
    assert written is not None
    for talk in TALKS:
        for messages in ([SYSTEM, *talk], [{"role": "system", "content": default}, *talk] if default else talk):
            expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            if list(tokenizer("a")["input_ids"])[:1] == [tokenizer.bos_token_id]:
                expected = expected.removeprefix(tokenizer.bos_token)
            assert go(written[1], messages) == expected
    assert ('SYSTEM """You are Tiny."""' in made.text) == (default is not None)
    told = modelfile("base.gguf", None, tokenizer, [2], system="Answer in rhymes.")
    assert 'SYSTEM """Answer in rhymes."""' in told.text
    assert "ADAPTER" not in told.text


@pytest.mark.parametrize("template", [COUNTS, NO_SYSTEM, CHATML.replace("<|im_end|>", "{{ '{{x}}' }}")])
def test_a_template_that_does_more_is_left_out_and_that_is_said(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    made = modelfile("base.gguf", None, tokenizer, [2], system='a """ b')
    assert "TEMPLATE" not in made.text and "SYSTEM" not in made.text
    assert ["no TEMPLATE is written" in made.notes[0], "no SYSTEM is written" in made.notes[1]] == [True, True]


def test_the_text_in_front_of_the_first_question_is_in_the_template(tokenizer: Any) -> None:
    """Once, as training has it; by hand where no template is written; braces would be a command of Go's."""
    tokenizer.chat_template = CHATML
    made = modelfile("base.gguf", None, tokenizer, [2], source_prefix="Is it good? ")
    (template,) = re.findall(r'TEMPLATE """(.*?)"""', made.text, re.S)
    once = "{{ if not $asked }}Is it good? {{ $asked = true }}{{ end }}"
    assert template.startswith("{{ $asked := false }}") and template.count(once) == 1
    for talk in TALKS:
        asked = [dict(message) for message in talk]
        next(message for message in asked if message["role"] == "user")["content"] = "Is it good? " + talk[0]["content"]
        plain = template.removeprefix("{{ $asked := false }}").replace(once, "")
        assert go(plain, asked) == tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert re.search(r'eq \.Role "user" \}\}[^{]*' + re.escape(once) + r"\{\{ \.Content \}\}", template)
    tokenizer.chat_template = COUNTS
    assert (
        "put 'Is it good? ' in front"
        in modelfile("b.gguf", None, tokenizer, [2], source_prefix="Is it good? ").notes[0]
    )
    tokenizer.chat_template = CHATML
    assert "TEMPLATE" not in modelfile("b.gguf", None, tokenizer, [2], source_prefix="{{ x").text
