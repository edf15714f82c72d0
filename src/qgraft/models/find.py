"""Which native architecture a config.json describes.

Both generations of ChatGLM call themselves "chatglm" there, so they are told apart by the fields that only one has.
ChatGLM3-6B has the fields of the second generation and loads as one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from qgraft.errors import UnsupportedError
from qgraft.models.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration
from qgraft.models.chatglm2 import ChatGLM2Config, ChatGLM2ForConditionalGeneration
from qgraft.models.chatglm2_tokenizer import ChatGLM2Tokenizer
from qgraft.models.chatglm_tokenizer import ChatGLMTokenizer


@dataclass(frozen=True)
class Architecture:
    """One architecture of this room.

    Attributes:
        fields: of config.json, which together only this architecture has.
        vocabulary: the name of the sentencepiece file beside config.json.
    """

    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    tokenizer: type[PreTrainedTokenizerBase]
    vocabulary: str
    fields: tuple[str, ...]


NATIVE = (
    Architecture(
        ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMTokenizer, "ice_text.model",
        ("num_layers", "inner_hidden_size", "position_encoding_2d"),
    ),
    Architecture(
        ChatGLM2Config, ChatGLM2ForConditionalGeneration, ChatGLM2Tokenizer, "tokenizer.model",
        ("num_layers", "padded_vocab_size", "multi_query_attention", "ffn_hidden_size"),
    ),
)  # fmt: skip


def find_architecture(raw: Mapping[str, Any]) -> Architecture | None:
    """The architecture that a config.json describes, or None where it is not one of this room.

    Raises UnsupportedError for a "chatglm" that is neither generation.
    """
    if raw.get("model_type") != "chatglm":
        return None
    for architecture in NATIVE:
        if all(field in raw for field in architecture.fields):
            return architecture
    raise UnsupportedError(
        f"a chatglm of an unknown variant: config.json has {', '.join(sorted(raw))}",
        hint="; ".join(f"{each.model.__name__} has {', '.join(each.fields)}" for each in NATIVE),
    )


def architecture_of(config: PreTrainedConfig) -> Architecture | None:
    """The architecture that a config object belongs to, or None."""
    return next((each for each in NATIVE if type(config) is each.config), None)
