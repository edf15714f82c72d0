"""A tiny encoder's tokenizer and rows for classifiers: words, one of which says what a text is."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

GOOD, BAD, PLAIN = ("good", "fine", "great"), ("bad", "poor", "awful"), ("the", "food", "was", "a", "film", "it", "is")
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *GOOD, *BAD, *PLAIN)
SHAPE = {
    "vocab_size": len(WORDS), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def write_tokenizer(folder: Path) -> None:
    """Words apart, [CLS] before and [SEP] behind."""
    inner = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = Whitespace()
    inner.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=inner, model_input_names=["input_ids", "token_type_ids", "attention_mask"],
                            **special).save_pretrained(folder)  # fmt: skip


def write_encoder(folder: Path) -> Path:
    """Save a random BERT without a head and its tokenizer, as encoders are published."""
    torch.manual_seed(0)
    BertModel(BertConfig(**SHAPE, initializer_range=0.1)).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def rows_of(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Texts of several lengths with one word that says what they are."""
    draw = torch.Generator().manual_seed(seed)

    def pick(words: tuple[str, ...]) -> str:
        return words[int(torch.randint(len(words), (), generator=draw))]

    rows = []
    for number in range(count):
        words = [pick(PLAIN) for _ in range(2 + number % 5)]
        words.insert(number % len(words), pick(BAD if number % 2 else GOOD))
        rows.append({"text": " ".join(words), "label": "bad" if number % 2 else "good"})
    return rows
