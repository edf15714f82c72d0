"""Tiny random encoder-decoders with a tokenizer: folders as transformers saves them, without dropout."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

WORDS = ["the service was good bad great awful and slow", "positive negative neutral translate: Is it 好 坏 ?"]
SHAPE = {"vocab_size": 160, "d_model": 32, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
T5 = {**SHAPE, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
GATED = {**T5, "feed_forward_proj": "gated-gelu"}
BART = {
    **SHAPE, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64, "dropout": 0.0, "bos_token_id": 0,
    "forced_eos_token_id": None,
}  # fmt: skip
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {  # -> (class, configuration class, its options)
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "t5-untied": ("T5ForConditionalGeneration", "T5Config", {**GATED, "tie_word_embeddings": False}),
    "mt5": ("MT5ForConditionalGeneration", "MT5Config", {**GATED, "tie_word_embeddings": False}),
    "umt5": ("UMT5ForConditionalGeneration", "UMT5Config", GATED),
    "bart": ("BartForConditionalGeneration", "BartConfig", {**BART, "scale_embedding": True}),
    "mbart": ("MBartForConditionalGeneration", "MBartConfig", {**BART, "scale_embedding": True}),
    "marian": ("MarianMTModel", "MarianConfig", BART),
    "pegasus": ("PegasusForConditionalGeneration", "PegasusConfig", BART),
    "m2m_100": ("M2M100ForConditionalGeneration", "M2M100Config", BART),
    "blenderbot": ("BlenderbotForConditionalGeneration", "BlenderbotConfig", BART),
}


def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Byte pairs of WORDS; an end token stands behind every text, as with T5's."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<pad>", "</s>", "<unk>"]
    made.train_from_iterator(WORDS, trainers.BpeTrainer(vocab_size=SHAPE["vocab_size"], special_tokens=special))
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def write_pairs_model(kind: str, folder: Path, **options: Any) -> transformers.PreTrainedModel:
    """Save a random model of this kind and a tokenizer in the folder; returns the model, in evaluation mode."""
    name, config, more = KINDS[kind]
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**{**more, **options})).eval()
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model
