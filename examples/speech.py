"""Whisper learns to write down what it hears. / 让 Whisper 学会写下听到的内容。

    python examples/speech.py --dataset rows.jsonl --language zh     whisper-tiny from the hub on your rows, on a GPU or a CPU
    python examples/speech.py --model openai/whisper-small --quantize q8_0 --dataset rows.jsonl --language en
    python examples/speech.py --tiny                                 no network: a tiny random Whisper, and tones

A row is a recording with its text: {"audio": "1.wav", "text": "Good morning."}, the file beside the rows' file (pip install
'qgraft[speech]'). The rows of --tiny are arrays: tones, each with a word for its pitch. A random model shows the way, and
learns only these. PEFT, where it is installed, reads the adapter and writes the same.
一行是一段录音和它的文本，音频文件放在数据文件旁边。--tiny 的数据是纯音数组和表示音高的词；随机初始化的模型只用来走通流程。
装了 PEFT 的话，会用它读入适配器，写出同样的文本。
"""

import argparse
import math
from pathlib import Path

import torch

import qgraft
from qgraft.serving.answering import answer
from qgraft.training.predict import predict

PITCHES = {"low": 200, "middle": 600, "high": 1800}
RATE = 16_000


def tones(shift):
    """A row for each pitch, a little off. / 每种音高一行，略有偏差。"""
    seconds = torch.arange(RATE // 2) / RATE
    rows = []
    for word, pitch in PITCHES.items():
        wave = 0.5 * torch.sin(2 * math.pi * (pitch + shift) * seconds)
        rows.append({"audio": {"array": wave.numpy(), "sampling_rate": RATE}, "text": word})
    return rows


def make_tiny_whisper(folder):
    """A Whisper of random weights that hears one second, one token a byte. / 随机权重的小 Whisper，一个字节一个 token。"""
    from tokenizers import pre_tokenizers
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperTokenizer,
    )
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = WhisperTokenizer({letter: number for number, letter in enumerate(letters)}, [])
    tokenizer.add_tokens(["<|endoftext|>"], special_tokens=True)
    languages, tasks = [f"<|{code}|>" for code in LANGUAGES], ["translate", "transcribe"]
    others = ["<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
    special = ["<|startoftranscript|>", *languages, *(f"<|{task}|>" for task in tasks), *others]
    tokenizer.add_special_tokens({"extra_special_tokens": special})
    tokenizer.pad_token = "<|endoftext|>"
    ids = dict(zip(special, tokenizer.convert_tokens_to_ids(special), strict=True))
    ends = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), tokenizer.eos_token_id)
    ends["decoder_start_token_id"] = ids["<|startoftranscript|>"]
    sides = {f"{side}_{name}": number for side in ("encoder", "decoder")
             for name, number in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 128))}  # fmt: skip
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=len(tokenizer), d_model=64, num_mel_bins=20, max_source_positions=50, max_target_positions=32,
        init_std=0.1, begin_suppress_tokens=None, **sides, **ends,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        is_multilingual=True, no_timestamps_token_id=ids["<|notimestamps|>"], return_timestamps=False, max_length=32, **ends,
        lang_to_id={token: ids[token] for token in languages}, task_to_id={task: ids[f"<|{task}|>"] for task in tasks},
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=20, chunk_length=1).save_pretrained(folder)
    return folder


def written_by_peft(source, adapter, row, language):
    """What PEFT's model writes of a row, with transformers' own processor. / 用 PEFT 和 transformers 写出的文本。"""
    from peft import PeftModel
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    processor = WhisperProcessor.from_pretrained(source)
    model = PeftModel.from_pretrained(WhisperForConditionalGeneration.from_pretrained(source), adapter).eval()
    features = processor.feature_extractor(row["audio"]["array"], sampling_rate=RATE, return_tensors="pt")
    ids = model.generate(**features, language=language, task="transcribe", max_new_tokens=12)
    return processor.decode(ids[0], skip_special_tokens=True)


def main():
    """Load, train, write down, score, read again. / 加载、训练、转写、评分、重新读入。"""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="openai/whisper-tiny")
    parser.add_argument("--tiny", action="store_true", help="a tiny random Whisper and tones / 随机的小模型和纯音")
    parser.add_argument("--quantize", help="packs the linear layers: q8_0, q4_1, ... / 量化线性层")
    parser.add_argument("--dataset", help="your own rows; a tenth is held out / 自己的数据，十分之一留作评估")
    parser.add_argument("--language", default="en")
    parser.add_argument("--output_dir", type=Path, default=Path("speech"))
    parser.add_argument("--max_steps", type=int, default=100)
    options = parser.parse_args()
    if not options.tiny and not options.dataset:
        parser.error("give --dataset, or --tiny / 请给出 --dataset 或 --tiny")

    source = make_tiny_whisper(options.output_dir / "tiny-whisper") if options.tiny else options.model
    rows = [row for shift in range(0, 80, 20) for row in tones(shift)] if options.tiny else options.dataset
    model, tokenizer = qgraft.load(source, quantize=options.quantize)
    args = qgraft.TrainArguments(
        output_dir=str(options.output_dir / "adapter"), language=options.language, task="transcribe", r=8, lora_alpha=16,
        learning_rate=1e-2 if options.tiny else 1e-3, max_steps=options.max_steps, per_device_train_batch_size=6,
        max_tokens_per_pass=20_000, logging_steps=20, overwrite_output_dir=True, val_size=0.0 if options.tiny else 0.1,
    )  # fmt: skip
    held_out = tones(10) if options.tiny else None
    report = qgraft.train(model, tokenizer, rows, args, eval_dataset=held_out)
    print(f"held-out loss {report.metrics['eval_loss_before']:.3f} -> {report.metrics['eval_loss']:.3f}")

    model, tokenizer = qgraft.load(source, quantize=options.quantize)
    qgraft.load_adapter(model, options.output_dir / "adapter")
    found = predict(model, tokenizer, held_out or rows, args)
    print(", ".join(f"{name} {value:.2f}" for name, value in found.scores.items()))
    for said, written in found.pairs[:3]:
        print(f"{said}: {written}")
    if options.tiny:
        own = answer(
            model, tokenizer, [], audio=held_out[0]["audio"], language=options.language, max_new_tokens=12
        ).text
        try:
            same = written_by_peft(source, options.output_dir / "adapter", held_out[0], options.language) == own
        except ImportError:
            print("PEFT is not installed")
        else:
            print(f"read by PEFT, same text: {same}")


if __name__ == "__main__":
    main()
