"""Tiny random Whispers of transformers' own classes, with a tokenizer and a feature extractor made here; tones to hear."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import pre_tokenizers
from transformers.models.whisper.tokenization_whisper import LANGUAGES

SECONDS, RATE, MEL = 1, 16_000, 8  # what it hears; the releases hear 30 seconds in 80 numbers a frame
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
STAMPS = [f"<|{number * 0.02:.2f}|>" for number in range(SECONDS * 50 + 1)]
SPECIAL = ["<|startoftranscript|>", *(f"<|{code}|>" for code in LANGUAGES), "<|translate|>", "<|transcribe|>",
           "<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]  # fmt: skip


def tone(pitch: float, seconds: float = 0.4, rate: int = RATE) -> np.ndarray[Any, Any]:
    """A sine of so many periods a second, float32 [seconds * rate]."""
    return (0.5 * np.sin(2 * np.pi * pitch * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def audio(pitch: float, seconds: float = 0.4, rate: int = RATE) -> dict[str, Any]:
    """The same as the Audio feature of `datasets` gives it."""
    return {"path": None, "array": tone(pitch, seconds, rate), "sampling_rate": rate}


def tiny_tokenizer() -> transformers.WhisperTokenizer:
    """One token a byte, the special ones of Whisper in its order, and the timestamps of SECONDS."""
    made = transformers.WhisperTokenizer({letter: number for number, letter in enumerate(LETTERS)}, [])
    made.add_tokens(["<|endoftext|>"], special_tokens=True)
    made.add_special_tokens({"extra_special_tokens": SPECIAL})
    made.add_tokens(STAMPS)
    made.pad_token = "<|endoftext|>"
    return made


def write_speech_model(folder: Path, multilingual: bool = True, **options: Any) -> transformers.PreTrainedModel:
    """Save a random model, its tokenizer and its feature extractor in the folder; returns the model in evaluation mode."""
    torch.manual_seed(0)
    speaks = tiny_tokenizer()
    ids = {token: speaks.convert_tokens_to_ids(token) for token in ("<|endoftext|>", *SPECIAL)}
    end = ids["<|endoftext|>"]
    shape = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
             "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "init_std": 0.1}  # fmt: skip
    config = transformers.WhisperConfig(**{
        **shape, "vocab_size": len(speaks), "num_mel_bins": MEL, "max_source_positions": SECONDS * 50,
        "max_target_positions": 48, "pad_token_id": end, "bos_token_id": end, "eos_token_id": end,
        "decoder_start_token_id": ids["<|startoftranscript|>"], "begin_suppress_tokens": None, **options,
    })  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config).eval()
    told: dict[str, Any] = {"is_multilingual": multilingual, "no_timestamps_token_id": ids["<|notimestamps|>"],
                            "return_timestamps": False, "max_length": 48}  # fmt: skip
    if multilingual:
        told["lang_to_id"] = {f"<|{code}|>": ids[f"<|{code}|>"] for code in LANGUAGES}
        told["task_to_id"] = {task: ids[f"<|{task}|>"] for task in ("transcribe", "translate")}
    told |= {
        key: getattr(config, key) for key in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
    }
    model.generation_config = transformers.GenerationConfig(**told)
    model.save_pretrained(folder)
    speaks.save_pretrained(folder)
    transformers.WhisperFeatureExtractor(feature_size=MEL, chunk_length=SECONDS).save_pretrained(folder)
    return model
