"""Tiny random encoder-decoders with a tokenizer, without dropout: folders as transformers saves them, and T5's GGUF files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as Q
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
    "umt5-untied": ("UMT5ForConditionalGeneration", "UMT5Config", {**GATED, "tie_word_embeddings": False}),
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


def made_causal(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """The model; of transformers 5.17, whose umT5 sees what comes, with a decoder that does not."""
    for module in model.modules():
        if getattr(module, "has_relative_attention_bias", False):
            module.is_causal = module.is_decoder
    return model


def write_pairs_model(kind: str, folder: Path, **options: Any) -> transformers.PreTrainedModel:
    """Save a random model of this kind and a tokenizer in the folder; returns the model, in evaluation mode."""
    name, config, more = KINDS[kind]
    torch.manual_seed(0)
    model = made_causal(getattr(transformers, name)(getattr(transformers, config)(**{**more, **options})).eval())
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


def unigram_keys(rows: int) -> dict[str, Any]:
    """The words and letters of WORDS as T5's tokens, and rows of the embedding that no token has."""
    words = dict.fromkeys(f"\u2581{word}" for text in WORDS for word in text.split())
    letters = dict.fromkeys("".join(WORDS).replace(" ", "\u2581"))
    tokens = ["<pad>", "</s>", "<unk>", *words, *(each for each in letters if each not in words)]
    scores = [0.0] * 3 + [-2.0 - 0.01 * number for number in range(len(tokens) - 3)]
    kinds, left = [3, 3, 2] + [1] * (len(tokens) - 3), rows - len(tokens)
    return {
        "model": "t5", "pre": "default", "tokens": tokens + [f"[PAD{n}]" for n in range(left)],
        "scores": scores + [-10000.0] * left, "token_type": kinds + [5] * left, "add_space_prefix": True,
        "remove_extra_whitespaces": True, "eos_token_id": 1, "padding_token_id": 0, "unknown_token_id": 2,
    }  # fmt: skip


def write_t5_gguf(
    path: Path, kind: str = "t5", types: Sequence[Q] = (Q.F32,), *, keys: Mapping[str, Any] | None = None,
    drop: Sequence[str] = (), extra: Mapping[str, np.ndarray] | None = None, **options: Any,
) -> transformers.PreTrainedModel:  # fmt: skip
    """Write a random model of this kind as llama.cpp's converter does, its linear layers in these types by turns.

    Args:
        keys: beside those of the converter, or instead of them; None leaves one out.
        drop, extra: tensors that are not written, and others.

    Returns transformers' model with the weights that the bytes mean, in evaluation mode.
    """
    name, config_name, more = KINDS[kind]
    config = getattr(transformers, config_name)(**{**more, **options})
    torch.manual_seed(0)
    model = made_causal(getattr(transformers, name)(config).eval().requires_grad_(False))
    tied = {**more, **options}.get("tie_word_embeddings", True)
    if not tied:
        config.tie_word_embeddings = hasattr(config, "scale_decoder_outputs")  # transformers 5.17 scales umT5's by this
        model.lm_head.weight = torch.nn.Parameter(torch.empty(model.shared.weight.shape), requires_grad=False)
    writer, names = gguf.GGUFWriter(path, "t5"), gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5, 8)
    stated = {
        "context_length": 512, "embedding_length": config.d_model, "feed_forward_length": config.d_ff,
        "block_count": config.num_layers, "decoder_block_count": config.num_decoder_layers,
        "attention.head_count": config.num_heads, "attention.key_length": config.d_kv,
        "attention.value_length": config.d_kv, "attention.layer_norm_epsilon": config.layer_norm_epsilon,
        "attention.layer_norm_rms_epsilon": config.layer_norm_epsilon,
        "attention.relative_buckets_count": config.relative_attention_num_buckets,
        "decoder_start_token_id": config.decoder_start_token_id,
    }  # fmt: skip
    metadata = {f"t5.{key}": value for key, value in stated.items()}
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in unigram_keys(config.vocab_size).items()}
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
              list: writer.add_array, bytes: writer.add_array}  # fmt: skip
    for key, value in {**metadata, **(keys or {})}.items():
        if value is not None:
            adders[type(value)](key, value)
    for number, (parameter, value) in enumerate(model.named_parameters()):
        stem, _, suffix = parameter.rpartition(".")
        centre = 1.0 if value.dim() == 1 else 0.0
        value.copy_(centre + torch.randn(value.shape) * (1.0 if stem == "shared" else 0.15))
        stored = f"{names.get_name(stem)}.{suffix}"
        plain = value.dim() == 1 or "relative_attention" in stem
        made = Q.F32 if plain else types[number % len(types)]
        data = gguf.quants.quantize(value.numpy(), made)
        value.copy_(torch.from_numpy(np.array(gguf.quants.dequantize(data, made), np.float32)))
        if stored not in drop and stored not in (extra or {}):
            writer.add_tensor(stored, data, raw_dtype=made)
    for stored, each in (extra or {}).items():
        writer.add_tensor(stored, each)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    return model
