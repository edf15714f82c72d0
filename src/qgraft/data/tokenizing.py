"""From conversations to token ids, and which of them are learned.

A conversation is rendered once as a whole, and once up to each answer as the prompt that a server would send there:

    whole     <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n
    prompt    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n
    learned                                                        Hello<|im_end|>

Each prompt must be a prefix of the whole, or training would teach answers to prompts that serving never sends. Text is
cut into segments at those places and each segment is tokenized as what follows the text before it, so that the ids of
the prompt are the ids at serving (`encode_prompt`). Looking for the answer's tokens in the ids of the whole was not
chosen: merges across the border would change the last ids of the prompt.

An answer is learned up to and with its first end token. What a template puts after that (a newline) is input only: the
model never writes it.

Tokenizers that put special ids between pieces of text write prompts and samples themselves (`WritesPrompts`, ChatGLM):
no template can. Their samples are those of the model's official scripts: the last answer is learned, the rounds before
it are its history.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from jinja2 import TemplateError

from qgraft.data.reading import Accounting, Conversation
from qgraft.errors import DataError, OptionError, UnsupportedError, near_match

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that torch's cross entropy leaves out

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

OWN_PROMPTS = (
    "the tokenizer writes the model's own prompts; of a conversation the last answer is learned, the rounds before it are "
    "its history"
)

BUILT_IN = {"plain": PLAIN_TEMPLATE, "default": PLAIN_TEMPLATE, "chatml": CHATML_TEMPLATE}
# LLaMA-Factory's names for what the tokenizers of these models bring themselves.
FAMILIES = re.compile(
    r"(alpaca|baichuan|bluelm|chatglm|codegeex|cohere|command|deepseek|falcon|gemma|glm|gpt|granite|hunyuan|intern|llama"
    r"|minicpm|ministral|mistral|olmo|openchat|orion|phi|qwen|smollm|solar|starchat|telechat|vicuna|xverse|yi"
    r"|yuan|zephyr)[\w.-]*"
)


@dataclass(frozen=True)
class ChatTemplate:
    """A jinja chat template and where it is from; `note` says what the user should be told about the choice, or ""."""

    text: str
    origin: str
    note: str = ""


@dataclass(frozen=True)
class Sample:
    """Token ids and their labels: the same ids where learned, -100 elsewhere; as long as the ids, not shifted."""

    input_ids: list[int]
    labels: list[int]
    source: str


@dataclass(frozen=True)
class Recipe:
    """What ChatGLM's official scripts can be told beside our own options; see models/prompt_tokenizer.py."""

    max_source_length: int | None = None
    max_target_length: int | None = None
    numbered: bool = False
    learn_padding: bool = False
    source_prefix: str = ""  # with other tokenizers in front of the first question


@runtime_checkable
class WritesPrompts(Protocol):
    """A tokenizer that needs no chat template; models/prompt_tokenizer.py says what each method returns."""

    def prompt_ids(
        self, messages: Sequence[tuple[str, str]], max_source_length: int | None = None, *, source_prefix: str = ""
    ) -> list[int]: ...

    def generated_length(self, max_source_length: int | None, max_target_length: int | None) -> int: ...

    def sample_ids(
        self,
        messages: Sequence[tuple[str, str]],
        max_source_length: int | None = None,
        max_target_length: int | None = None,
        *,
        numbered: bool = False,
        learn_padding: bool = False,
        source_prefix: str = "",
    ) -> tuple[list[int], list[int]]: ...

    def clean_answer(self, text: str) -> str: ...


def resolve_template(tokenizer: "PreTrainedTokenizerBase", template: str | None = None) -> ChatTemplate:
    """The chat template for an option's value.

    None or "auto" is the tokenizer's own, or else "plain"; "plain" and "chatml" are built in; a name ending in .jinja
    is a file; a model family of LLaMA-Factory ("llama3") is the tokenizer's own, which must then exist. A tokenizer
    that writes prompts itself has no other.
    """
    if isinstance(tokenizer, WritesPrompts):
        if template not in (None, "auto") and not re.fullmatch(r"chatglm(?!3)[\w.-]*", str(template).lower()):
            raise OptionError(f"template {template!r}: this tokenizer puts special ids between pieces of text, which no "
                              "template can write", hint="leave template out")  # fmt: skip
        return ChatTemplate("", "tokenizer", OWN_PROMPTS)
    own = tokenizer.get_chat_template() if tokenizer.chat_template else None
    if template is None or template == "auto":
        if own:
            return ChatTemplate(own, "tokenizer")
        return ChatTemplate(PLAIN_TEMPLATE, "plain", "the tokenizer has no chat template; the plain one is used")
    if template in BUILT_IN:
        return ChatTemplate(BUILT_IN[template], "plain" if template == "default" else template)
    if template.endswith(".jinja"):
        try:
            return ChatTemplate(Path(template).read_text(encoding="utf-8"), template)
        except (OSError, UnicodeDecodeError) as error:
            raise OptionError(f"template {template} cannot be read: {error}") from error
    if not FAMILIES.fullmatch(template.lower()):
        hint = near_match(template, [*BUILT_IN, "auto", "llama3", "qwen", "gemma", "phi", "mistral", "chatglm2"])
        raise OptionError(f"unknown template {template!r}, expected auto, {', '.join(BUILT_IN)} or a .jinja file",
                          hint=hint)  # fmt: skip
    if not own:
        raise OptionError(f"template {template!r} is the tokenizer's own, and this tokenizer has none",
                          hint="take plain, chatml or a .jinja file")  # fmt: skip
    return ChatTemplate(own, "tokenizer", f"template {template!r}: the tokenizer's own template is used")


def encode_prompt(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[tuple[str, str]],
    *,
    template: ChatTemplate | None = None,
    system: str | None = None,
    recipe: Recipe | None = None,
) -> list[int]:
    """The ids of a prompt that asks for the next answer, as training saw them."""
    template, recipe = template or resolve_template(tokenizer), recipe or Recipe()
    turns = _with_system(messages, system)
    if isinstance(tokenizer, WritesPrompts):
        return tokenizer.prompt_ids(turns, recipe.max_source_length, source_prefix=recipe.source_prefix)
    turns = _with_prefix(turns, recipe.source_prefix)
    return _with_bos(tokenizer, _ids(tokenizer, _render(tokenizer, template, turns, True)))


def decode_answer(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> str:
    """The text of the ids that a model answered with."""
    text = str(tokenizer.decode(ids, skip_special_tokens=True))
    return tokenizer.clean_answer(text) if isinstance(tokenizer, WritesPrompts) else text


def encode_conversation(
    tokenizer: "PreTrainedTokenizerBase",
    conversation: Conversation,
    *,
    template: ChatTemplate | None = None,
    system: str | None = None,
    train_on_prompt: bool = False,
    mask_history: bool = False,
    eos_ids: Sequence[int] = (),
    recipe: Recipe | None = None,
) -> Sample:
    """One training sample: all answers are learned, with `mask_history` the last only, with `train_on_prompt` all ids.

    `system` stands in front of conversations that have none. `eos_ids` are more ids that end an answer, beside the
    tokenizer's own; an answer whose template writes no end token gets the tokenizer's. With a tokenizer that writes
    prompts itself only the last answer is learned, as `recipe` says.
    """
    if train_on_prompt and mask_history:
        raise OptionError("train_on_prompt and mask_history exclude each other: learn all tokens, or the last answer")
    ends = [*([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]), *eos_ids]
    if not ends:
        raise UnsupportedError("the tokenizer has no end token, so that no answer would ever end", hint="give eos_ids")
    template = template or resolve_template(tokenizer)
    messages = _with_system(conversation.messages, system)
    try:
        if isinstance(tokenizer, WritesPrompts):
            return Sample(*_scripted(tokenizer, messages, recipe or Recipe(), train_on_prompt), conversation.source)
        messages = _with_prefix(messages, recipe.source_prefix if recipe else "")
        segments = _segments(tokenizer, template, messages, ends, mask_history)
    except DataError as error:
        raise DataError(f"{conversation.source}: {error.message}", hint=error.hint) from error
    ids: list[int] = []
    labels: list[int] = []
    before = ""
    for number, (text, is_answer) in enumerate(segments, 1):
        new = _ids(tokenizer, text, before)
        if number == len(segments) and not set(new) & set(ends):
            new.append(ends[0])
        learned = next((n + 1 for n, token in enumerate(new) if token in ends), len(new)) if is_answer else 0
        ids += new
        labels += new[:learned] + [IGNORED] * (len(new) - learned)
        before = text
    ids = _with_bos(tokenizer, ids)
    labels = [IGNORED] * (len(ids) - len(labels)) + labels
    return Sample(ids, list(ids) if train_on_prompt else labels, conversation.source)


def build_samples(
    tokenizer: "PreTrainedTokenizerBase",
    conversations: Sequence[Conversation],
    accounting: Accounting,
    *,
    template: ChatTemplate | str | None = None,
    system: str | None = None,
    max_length: int | None = None,
    train_on_prompt: bool = False,
    mask_history: bool = False,
    truncate: bool = True,
    eos_ids: Sequence[int] = (),
    recipe: Recipe | None = None,
) -> list[Sample]:
    """The samples of at most `max_length` ids; `accounting` moves what is cut or too long from kept to its place."""
    check_recipe(tokenizer, recipe or Recipe())
    chosen = template if isinstance(template, ChatTemplate) else resolve_template(tokenizer, template)
    samples = []
    for conversation in conversations:
        sample = encode_conversation(tokenizer, conversation, template=chosen, system=system, eos_ids=eos_ids, recipe=recipe,
                                     train_on_prompt=train_on_prompt, mask_history=mask_history)  # fmt: skip
        excess = 0 if max_length is None else len(sample.input_ids) - max_length
        # The first label has no id before it to be predicted from, so it is not one that remains.
        learns = excess <= 0 or any(label != IGNORED for label in sample.labels[1:max_length])
        if excess > 0 and not (truncate and learns):
            what = "longer than" if learns else "no answer token within"
            accounting.kept -= 1
            accounting.drop(f"{what} max_length {max_length}", conversation.source)
            continue
        if excess > 0:
            sample = Sample(sample.input_ids[:max_length], sample.labels[:max_length], sample.source)
            accounting.truncated += 1
            accounting.truncated_tokens += excess
        samples.append(sample)
    accounting.check()
    if not samples:
        raise DataError(f"no sample is left to train on: {accounting.summary()}", hint="give a larger max_length")
    return samples


def check_recipe(tokenizer: "PreTrainedTokenizerBase", recipe: Recipe) -> None:
    """Raise OptionError for what only ChatGLM's samples can be, with another tokenizer."""
    general = replace(recipe, numbered=False, source_prefix="") == Recipe()
    if not general and not isinstance(tokenizer, WritesPrompts):
        raise OptionError("max_source_length, max_target_length and ignore_pad_token_for_loss=false are for ChatGLM's "
                          "tokenizers, and this is another", hint="max_length bounds the whole sample")  # fmt: skip


def _scripted(
    tokenizer: WritesPrompts, messages: Sequence[tuple[str, str]], recipe: Recipe, train_on_prompt: bool
) -> tuple[list[int], list[int]]:
    if train_on_prompt:
        raise OptionError("train_on_prompt: samples of ChatGLM learn their last answer only",
                          hint="leave it out; the first generation even sees all of a prompt at once")  # fmt: skip
    return tokenizer.sample_ids(
        messages, recipe.max_source_length, recipe.max_target_length,
        numbered=recipe.numbered, learn_padding=recipe.learn_padding, source_prefix=recipe.source_prefix,
    )  # fmt: skip


def _segments(
    tokenizer: "PreTrainedTokenizerBase",
    template: ChatTemplate,
    messages: Sequence[tuple[str, str]],
    ends: Sequence[int],
    last_only: bool,
) -> list[tuple[str, bool]]:
    """The rendered text in pieces, with whether a piece is an answer. Joined they are the whole, up to its last answer.

    Some templates rewrite an answer once others follow (they drop its reasoning): it then counts as the whole has it.
    """
    end_texts = [str(text) for text in tokenizer.convert_ids_to_tokens(list(ends))]
    answers = [index for index, (role, _) in enumerate(messages) if role == "assistant"]
    whole = _render(tokenizer, template, messages, False)
    segments: list[tuple[str, bool]] = []
    at = 0
    for index in answers[-1:] if last_only else answers:
        prompt = _render(tokenizer, template, messages[:index], True)
        answered = _render(tokenizer, template, messages[: index + 1], False)
        found = [whole.find(text, len(prompt)) + len(text) for text in end_texts if whole.find(text, len(prompt)) >= 0]
        end = len(answered) if whole.startswith(answered) else min(found, default=0)
        answer = whole[len(prompt) : end]
        if not whole.startswith(prompt) or not at <= len(prompt) or not answer.strip():
            raise DataError(
                f"the chat template ({template.origin}) writes the prompt of answer {answers.index(index) + 1} as "
                f"{prompt[-60:]!r} and the answered conversation as {whole[max(0, len(prompt) - 60) :][:120]!r}; "
                "the first must begin the second", hint="give another template, or mask_history if it changes history",
            )  # fmt: skip
        if not any(text in answer for text in end_texts):
            answer = answer.rstrip()  # blanks that the template put, not the model: an end token belongs here
        segments += [(whole[at : len(prompt)], False), (answer, True)]
        at = len(prompt) + len(answer)
    return segments


def _render(
    tokenizer: "PreTrainedTokenizerBase", template: ChatTemplate, messages: Sequence[tuple[str, str]], prompt: bool
) -> str:
    turns = [{"role": role, "content": content} for role, content in messages]
    try:
        text = tokenizer.apply_chat_template(
            turns, chat_template=template.text, add_generation_prompt=prompt, tokenize=False
        )
    except (TemplateError, TypeError, ValueError) as error:  # also what the template itself raises: "no system role"
        raise DataError(f"chat template ({template.origin}) fails: {error}", hint="give another template") from error
    return str(text)


def _ids(tokenizer: "PreTrainedTokenizerBase", text: str, before: str = "") -> list[int]:
    """The ids of `text` as it follows `before`: sentencepiece puts a blank in front of whatever comes first."""

    def encode(part: str) -> list[int]:
        return list(tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"])

    head = encode(before) if before else []
    both = encode(before + text)
    return both[len(head) :] if both[: len(head)] == head else encode(text)


def _with_bos(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> list[int]:
    bos = tokenizer.bos_token_id
    wanted = bos is not None and getattr(tokenizer, "add_bos_token", False)
    return [bos, *ids] if wanted and ids[:1] != [bos] else ids


def _with_system(messages: Sequence[tuple[str, str]], system: str | None) -> list[tuple[str, str]]:
    first = [("system", system)] if system and messages[0][0] != "system" else []
    return [*first, *messages]


def _with_prefix(messages: Sequence[tuple[str, str]], prefix: str) -> list[tuple[str, str]]:
    first = next((index for index, (role, _) in enumerate(messages) if role == "user"), None)
    return [(role, prefix + text if index == first else text) for index, (role, text) in enumerate(messages)]


def samples_sha256(samples: Sequence[Sample]) -> str:
    """Says which tokens were trained on, in their order."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(repr((sample.input_ids, sample.labels)).encode())
    return digest.hexdigest()
