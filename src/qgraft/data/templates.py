"""Which chat template a run uses: the tokenizer's own, one of ours, or a file.

Ours are training variants of the common ones: for inference they write what the models' own templates write, tested against
them, and around what the model writes they have transformers' `{% generation %}` marks. They keep the reasoning that some
originals strip from the answer that is learned. None is needed where the own template can be trained on (masks.py).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qgraft.errors import OptionError, near_match, option

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + (eos_token or '') + '\\n' }}"
    "{% else %}{{ message['role'] | capitalize + ': ' + message['content'] + '\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)
"""For tokenizers without a template: "SYSTEM\\n\\nUser: ...\\nAssistant: ...EOS\\n", a tool's turn as "Tool: ..."."""

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

BUILT_IN = {"plain": PLAIN_TEMPLATE, "default": PLAIN_TEMPLATE, "chatml": CHATML_TEMPLATE}
VARIANTS = {  # training variant -> tokens that its tokenizer must have
    "llama-3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "qwen3": ("<|im_start|>", "<|im_end|>"),
    "r1-distill": ("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
    "mistral": ("[INST]", "[/INST]"),
    "phi": ("<|user|>", "<|assistant|>", "<|end|>"),
    "glm": ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>"),
}
# LLaMA-Factory's names for what the tokenizers of these models bring themselves.
FAMILIES = re.compile(
    r"(alpaca|baichuan|bluelm|chatglm|codegeex|cohere|command|deepseek|falcon|gemma|glm|gpt|granite|hunyuan|intern|llama"
    r"|minicpm|ministral|mistral|olmo|openchat|orion|phi|qwen|smollm|solar|starchat|telechat|vicuna|xverse|yi"
    r"|yuan|zephyr)[\w.-]*"
)
VARIANTS_HINT = f"give another template: the built-in training variants chatml, {', '.join(VARIANTS)}, or a .jinja file"
SYSTEM_TEXTS = ("question", "drop")


@dataclass(frozen=True)
class ChatTemplate:
    """A jinja chat template, where it is from, and what it is told.

    Attributes:
        note: what the user should be told about the choice, or "".
        with_tools: the template for conversations with tools, where a tokenizer has another one for them.
        enable_thinking: what the template is told under this name; None for nothing.
        variables: what it is told beside that: (("reasoning_effort", "low"),).
        system_text: where the template has no system role: "question" puts the text in front of the first question, "drop"
            refuses the conversation.
    """

    text: str
    origin: str
    note: str = ""
    with_tools: str = ""
    enable_thinking: bool | None = None
    system_text: str = "question"
    variables: tuple[tuple[str, str | float], ...] = ()


def variant(name: str) -> str:
    """The text of a built-in training variant."""
    return (resources.files("qgraft.data") / "variants" / f"{name}.jinja").read_text(encoding="utf-8")


def tokenizers_own(tokenizer: "PreTrainedTokenizerBase") -> tuple[str, str]:
    """The tokenizer's template and the one that it has for tools beside it; "" for what it has not. As in llama.cpp one for
    tools alone is for all conversations; transformers refuses those without tools."""
    held = tokenizer.chat_template
    if isinstance(held, dict):
        with_tools = held.get("tool_use") or ""
        return held.get("default") or with_tools, with_tools
    return (tokenizer.get_chat_template(), "") if held else ("", "")


PROMPT_OPTIONS = (
    "system",
    "template",
    "enable_thinking",
    "source_prefix",
    "language",
    "task",
)  # what prompts depend on, of a training's options


def remembered_template(arguments: Mapping[str, Any]) -> str | None:
    """The template that an adapter says it was trained with; a name counts, a file has to be named by the user.

    An adapter comes from anywhere, and its word alone must not make a program of any file of the machine. To pass over it
    would prompt the model in another way than it was trained. Raises OptionError.
    """
    template = arguments.get("template")
    if not isinstance(template, str):
        return None
    if template.endswith(".jinja"):
        raise OptionError(
            f"the adapter was trained with the template file {template}, which is not read unless you name it",
            hint=f"{option('template', template)}, or {option('template', 'auto')} for the tokenizer's own",
        )
    return template


def named_template(tokenizer: "PreTrainedTokenizerBase", template: str | None) -> ChatTemplate:
    """The chat template for an option's value.

    None or "auto" is the tokenizer's own, or else "plain"; "plain", "chatml" and "r1-distill" are built in; a name ending
    in .jinja is a file. A model family's name, as LLaMA-Factory has it ("llama3", "gemma"), is the tokenizer's own template;
    the training variant of that name takes its place where both ask for answers with the same prompts, or where the
    tokenizer has no template, but the family's tokens.
    """
    own, with_tools = tokenizers_own(tokenizer)
    if template is None or template == "auto":
        if own:
            return ChatTemplate(own, "tokenizer", with_tools=with_tools)
        return ChatTemplate(PLAIN_TEMPLATE, "plain", "the tokenizer has no chat template; the plain one is used")
    if template in BUILT_IN:
        return ChatTemplate(BUILT_IN[template], "plain" if template == "default" else template)
    if template == "r1-distill":
        return ChatTemplate(variant(template), template)
    if template.endswith(".jinja"):
        try:
            return ChatTemplate(Path(template).read_text(encoding="utf-8"), template)
        except (OSError, UnicodeDecodeError) as error:
            raise OptionError(f"template {template} cannot be read: {error}") from error
    if not FAMILIES.fullmatch(template.lower()):
        hint = near_match(template, [*BUILT_IN, *VARIANTS, "auto", "llama3", "qwen", "chatglm2"])
        raise OptionError(f"unknown template {template!r}, expected auto, {', '.join([*BUILT_IN, *VARIANTS])} or a .jinja "
                          "file", hint=hint)  # fmt: skip
    return _of_family(tokenizer, template, own, with_tools)


def _of_family(tokenizer: "PreTrainedTokenizerBase", template: str, own: str, with_tools: str) -> ChatTemplate:
    from qgraft.data.rendering import asks_alike

    chosen = ChatTemplate(own, "tokenizer", f"template {template!r}: the tokenizer's own template is used", with_tools)
    known = template in VARIANTS and set(VARIANTS[template]) <= tokenizer.get_vocab().keys()
    ours = ChatTemplate(variant(template), template) if known else None
    if ours is not None and (not own or asks_alike(tokenizer, ours, chosen)):
        return ours
    if not own:
        raise OptionError(f"template {template!r} is the tokenizer's own, and this tokenizer has none",
                          hint=VARIANTS_HINT)  # fmt: skip
    return chosen
