"""Chat templates as published, and a small tokenizer that has the special tokens of all of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = (
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|observation|>", "<|end|>", "[gMASK]",
    "<sop>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>", "[INST]", "[/INST]",
)  # fmt: skip
# How the tokenizers of Llama 3 and Qwen cut text: newlines stay together, and with the blanks before them.
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

TokenizerMaker = Callable[..., PreTrainedTokenizerFast]


@pytest.fixture(scope="session")
def original() -> Callable[[str], str]:
    """The text of a published template."""
    return lambda name: (Path(__file__).parent / "originals" / f"{name}.jinja").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def chat_tokenizer() -> TokenizerMaker:
    """A tokenizer with this end token and chat template."""
    return make_tokenizer


def make_tokenizer(eos: str = "<|im_end|>", template: str | None = None, **options: Any) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("H", "e"), ("l", "l"), ("Ġ", "H")]
    pieces = [*alphabet, *("".join(pair) for pair in merges)]
    core = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, merges))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(piece, special=True) for piece in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token=eos, **options)
    tokenizer.chat_template = template
    return tokenizer
