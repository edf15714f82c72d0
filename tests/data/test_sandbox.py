"""Templates in the sandbox: what transformers writes, and a bound on what they may ask for."""

import resource

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import Environment
from transformers import PreTrainedTokenizerFast

from qgraft.data import metering, sandbox
from qgraft.data.metering import ALLOWANCE, LONGEST, TooCostly
from qgraft.data.sandbox import CLOSE, FAILURES, OPEN, compiled, render

TOOL = {
    "type": "function",
    "function": {"name": "look", "description": "a <b> & 'é'", "parameters": {"maximum": 10**9}},
}
CALL = {"id": "a1B2c3D4e", "type": "function", "function": {"name": "look", "arguments": {"at": "Paris"}}}
ORIGINALS = ["qwen3", "qwen2_5", "llama3", "llama3_1", "gemma", "phi3", "glm4moe", "qwen3_5_think", "lfm2_2_5",
             "qwen3_marked", "r1_distill", "mistral_7b_v0_2", "hermes", "glm4"]  # fmt: skip
CHATS = [
    [{"role": "user", "content": " Hi \n"}],
    [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"},
     {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello"}, {"role": "user", "content": "And?"}],
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": [CALL]},
     {"role": "tool", "content": "12", "name": "look", "tool_call_id": "a1B2c3D4e"},
     {"role": "assistant", "content": "12 C", "reasoning_content": "so", "thinking": "so"}],
]  # fmt: skip


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("name", ORIGINALS)
def test_published_templates_are_rendered_as_transformers_does(chat_tokenizer, original, name, prompt):
    tokenizer: PreTrainedTokenizerFast = chat_tokenizer("</s>", original(name))
    for chat in CHATS:
        for tools in (None, [TOOL]):
            variables = {"messages": chat, "tools": tools, "documents": None, "add_generation_prompt": prompt,
                         **tokenizer.special_tokens_map}  # fmt: skip
            try:
                expected = tokenizer.apply_chat_template(
                    chat, tools=tools, add_generation_prompt=prompt, tokenize=False
                )
            except FAILURES:
                with pytest.raises(FAILURES):
                    render(original(name), variables)
                continue
            assert render(original(name), variables).replace(OPEN, "").replace(CLOSE, "") == expected


HOSTILE = [  # each asks for hours, or for gigabytes
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "{% set x = range(99999) | list %}{% for a in x %}{% for b in x %}{% if a == b %}{% endif %}{% endfor %}{% endfor %}",
    "{% set s = 'a' * 900000 %}{% for i in range(99999) %}{% set t = s[1:] %}{% endfor %}",
    "{% set x %}{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}{% endset %}",
    "{% filter upper %}{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}{% endfilter %}",
    "{% for i in range(99999) %}" + "x" * 10000 + "{% endfor %}",
    "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "{% set n = namespace(x=3) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x }}",
    "{{ 'a' * 10**9 }}", "{{ 10**9 * 'a' }}", "{{ [[1] * 1000000] * 1000000 }}", "{{ 10**(10**9) }}",
    "{{ range(10**9) | list }}",
    "{{ 'x'.center(10**9) }}", "{{ 'x' | center(10**9) }}", "{{ 'x'.ljust(10**9) }}", "{{ '{:1000000000}'.format(1) }}",
    "{{ '%1000000000d' % 1 }}", "{{ '%1000000000d' | format(1) }}", "{{ '{:{}}'.format('x', 10**9) }}",
    "{{ '%*d' % (10**9, 1) }}", "{{ [[1]] | tojson(indent=10**8) }}", "{{ ('a\n' * 100000) | indent(99999) }}",
    "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}", "{{ ('a' * 1000000) | replace('a', 'b' * 1000000) }}",
    "{{ (['a'] * 100000) | join('b' * 1000000) }}", "{{ ('b' * 1000000).join(['a'] * 100000) }}",
    "{% set t = 'a' * 900000 %}{% for i in range(99999) %}{% if 'b' in t %}{% endif %}{% endfor %}",
    "{% set t = range(90000) | list %}{% for i in range(99999) %}{% if -1 in t %}{% endif %}{% endfor %}",
    "{% set t = 'a' * 900000 %}{% for i in range(99999) %}{% if t is lower %}{% endif %}{% endfor %}",
    "{{ 10**60000 // 7 }}",
    "{{ ('\t' * 900000).expandtabs(99999) }}", "{{ ('a' * 900000) | wordwrap(1) }}",
    "{% for i in range(99999) %}{% for j in range(99999) if false %}x{% endfor %}{% endfor %}",
    "{{ ('a' * 900000).rfind('a' * 200000 ~ 'b' ~ 'a' * 200000) }}", "{{ ('<>' * 400000) | striptags }}",
    "{{ ('(' * 400000) | urlize }}", "{{ ([[1]] * 90000) | sum(start=[]) }}",
    "{% for i in range(99999) %}{% set x = [1] | batch(99999, 'x') | list %}{% endfor %}",
    "{% for i in range(99999) %}{% set x = range(99999) | map(attribute='a') | select | list %}{% endfor %}",
    "{% for i in range(99999) %}{% if 0 in range(99999) | reject('number') %}{% endif %}{% endfor %}",
    "{{ range(99999) | map(attribute='" + "a." * 9999 + "a') | list }}",
    "{% set n = namespace(x=[1]) %}{% for i in range(900) %}{% set n.x = [n.x] %}{% endfor %}{{ n.x | tojson }}",
    "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x | safe }}",
    "{% for i in range(99999) %}" + "{% if i %}{% endif %}" * 3000 + "{% endfor %}",
    "{% for i in range(99999) %}{% set x = 'a' * 900000 ~ i %}{% endfor %}", "{{ ('ab' * 450000) | max }}" * 999,
    "{% set t, c = 'ab' * 400000, 'x' * 100000 ~ 'ab' %}{% for i in range(99) %}{% set x = t.strip(c) %}{% endfor %}",
    "{% autoescape 'a' * 10**9 %}{% endautoescape %}",
]  # fmt: skip
BROKEN = [  # each raises another type
    "{{ 1 / 0 }}", "{{ '{0}'.format() }}", "{{ '{a}'.format() }}", "{{ 'x'.encode('nope') }}", "{{ 'x' | xmlattr }}",
    "{{ x.y }}", "{{ 1 + 'a' }}", "{% if %}", "{{ raise_exception('no') }}", "{{ lipsum() }}", "{{ ''.__class__.__mro__ }}",
    "{{ messages.append(1) }}", "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", 
    "{{ " + "(" * 2000 + "1" + ")" * 2000 + " }}",
    "{% for a in [1] %}" * 30 + "{% endfor %}" * 30, "{% set n = namespace() %}{% set n.__class__ = 1 %}", "{{ x | tojson }}",
    "{% include 'a' %}", "{{ cycler() }}",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_templates_that_ask_for_too_much_are_refused(text, monkeypatch):
    """In bounded memory; the bound on time is the allowance, which counts the same on every machine (a tenth of it here)."""
    monkeypatch.setattr(metering, "ALLOWANCE", ALLOWANCE // 10)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(TooCostly):
        render(text, {"messages": []})
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


@pytest.mark.parametrize("text", BROKEN, ids=range(len(BROKEN)))
def test_what_broken_templates_raise_is_known(text):
    with pytest.raises(FAILURES):
        render(text, {"messages": []})


@pytest.mark.parametrize("rounds, characters", [(1, 2_000_000), (50, 6_000), (500, 100)])
@pytest.mark.parametrize("name", ORIGINALS)
def test_what_chats_take_is_far_from_the_bound(original, name, rounds, characters, monkeypatch):
    """Half of it is enough for a text of megabytes, and for thousands of turns, with tools."""
    for bound in ("ALLOWANCE", "FOR_TEXT", "FOR_VALUE"):
        monkeypatch.setattr(metering, bound, getattr(metering, bound) // 2)
    chat = [
        {"role": "user", "content": "word " * (characters // 5)},
        {"role": "assistant", "content": "<think>\nhm\n</think>\na"},
    ]
    tools = [TOOL] * 30 if characters == 6_000 else None
    text = render(original(name), {"messages": chat * rounds, "tools": tools, "bos_token": "", "eos_token": "",
                                   "add_generation_prompt": True})  # fmt: skip
    assert len(text) > rounds * characters


def test_no_template_is_longer_than_templates_are():
    with pytest.raises(TooCostly, match="characters, more than"):
        compiled("a" * (sandbox.LONGEST + 1))
    with pytest.raises(TooCostly):
        render(f"{{{{ 'a' * {LONGEST + 100} }}}}", {})


SMALL = (
    "{{ number | string }} {{ number + 1 }} {{ number * 2 }} {{ text ~ number ~ text }} {{ text + 'x' }} {{ text * 2 }} "
    "{{ numbers | join(', ') }} {{ numbers | sum }} {{ '%s-%d' % (text, number) }} {{ '{}{}'.format(text, number) }} "
    "{{ text | replace('a', 'bc') }} {{ text[1:] }} {{ numbers[::-1] }} {{ text | default('d', true) }}"
    "{% for n in numbers %}{{ loop.index }}{{ loop.last }}{{ loop.length }}{{ n }}{% endfor %}"
    "{% macro m(a) %}[{{ a }}{{ caller() if caller else '' }}]{% endmacro %}{{ m(text) }}{% call m('c') %}d{% endcall %}"
)
PLAIN_JINJA = Environment(trim_blocks=True, lstrip_blocks=True).from_string(SMALL)


@given(st.integers(-(10**12), 10**12), st.text(max_size=20), st.lists(st.integers(), max_size=5))
@settings(max_examples=40, deadline=None)
def test_small_computations_are_those_of_jinja(number, text, numbers):
    variables = {"number": number, "text": text, "numbers": numbers}
    assert render(SMALL, variables) == PLAIN_JINJA.render(variables)


def test_marks_stand_around_what_the_model_writes():
    text = "a{% generation %}b{% set x = 1 %}{% endgeneration %}{{ x is defined }}{% generation %}{% endgeneration %}"
    assert render(text, {}) == f"a{OPEN}b{CLOSE}False{OPEN}{CLOSE}"
