"""Tokenizers that write prompts and samples themselves (ChatGLM's), and what their official scripts can be told.

They put special ids between pieces of text, which no template can: a template gives text, and the text of a special id is
ordinary text there. Their samples are those of the model's official scripts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from qgraft.data.messages import Pair
from qgraft.errors import OptionError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LAST_LEARNED = "of a conversation the last answer is learned, the rounds before it are its history"


@dataclass(frozen=True)
class ChatGlmOptions:
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


def check_chatglm_options(tokenizer: "PreTrainedTokenizerBase", chatglm: ChatGlmOptions) -> None:
    """Raise OptionError for what only ChatGLM's samples can be, with another tokenizer."""
    general = replace(chatglm, numbered=False, source_prefix="") == ChatGlmOptions()
    if not general and not isinstance(tokenizer, WritesPrompts):
        raise OptionError("max_source_length, max_target_length and ignore_pad_token_for_loss=false are for ChatGLM's "
                          "tokenizers, and this is another", hint="max_length bounds the whole sample")  # fmt: skip


def scripted_ids(
    tokenizer: WritesPrompts, messages: Sequence[Pair], chatglm: ChatGlmOptions, train_on_prompt: bool
) -> tuple[list[int], list[int]]:
    """The ids and labels of a sample that ends in an answer."""
    if train_on_prompt:
        raise OptionError("train_on_prompt: samples of ChatGLM learn their last answer only",
                          hint="leave it out; the first generation even sees all of a prompt at once")  # fmt: skip
    return tokenizer.sample_ids(
        messages, chatglm.max_source_length, chatglm.max_target_length,
        numbered=chatglm.numbered, learn_padding=chatglm.learn_padding, source_prefix=chatglm.source_prefix,
    )  # fmt: skip
