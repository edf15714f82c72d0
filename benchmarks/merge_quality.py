"""How much of what an adapter learned is still there after it was merged, by format, rank, task and method.

    python benchmarks/merge_quality.py                          # everything: hours on two cores
    python benchmarks/merge_quality.py --formats q4_1 --ranks 8 # one format
    python benchmarks/merge_quality.py --model gemma-3-270m-Q4_K_M.gguf --formats own --ranks 8   # another model
    python benchmarks/merge_quality.py --plot                   # only draw the chart from the CSV

For each task and rank one adapter is trained on the model, SmolLM2-135M in Q4_1 unless another is given (tasks.py). The base
is then converted to each format (K-quants as llama.cpp does where a width is no multiple of 256: q4_k -> q5_0, q5_k -> q5_1,
q6_k -> q8_0), or left in its own mix, the same adapter put on it, and merged: loss of base, adapter and merged model on
held-out rows of the task, or on rows kept back where a task has none, and KL on unrelated text. Every merge runs in a
process of its own, which gives its seconds and its peak memory.

    nearest     dequantize, add, quantize again: what everybody does
    auto        qgraft's
    peft-nf4    transformers + bitsandbytes NF4 of the same float weights, PEFT's merge_and_unload, the same adapter and rows

`before` is what was kept before rows took part that measure, in last rounds, where a task has no held-out rows.

Results are appended to benchmarks/results/merge_quality.csv, one line a merge; a line that is there already is not run
again. The chart is merge_quality.png beside it.
"""

import argparse
import csv
import datetime
import itertools
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results") / "merge_quality.csv"
FORMATS = ("q4_1", "q5_1", "q4_k", "q5_k", "q4_0", "q5_0", "q6_k", "chatglm-int4", "q8_0", "chatglm-int8")
FALLBACK = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}  # llama.cpp's, for widths that K-quants have no blocks for
METHODS = ("nearest", "auto")
KEY = ("model", "task", "r", "format", "method")
SMOLLM2 = "smollm2-135m"
OWN = "own"  # the formats that the file has
FIELDS = (
    *KEY, "retained_gain", "before", "base", "adapter", "merged", "task_kl", "drift_kl", "adapter_kl", "distilled_steps",
    "calibration_tokens", "seconds", "peak_mb", "rows", "date", "threads", "cpu", "qgraft", "torch",
)  # fmt: skip


def main() -> None:
    """Run what is asked for and not yet in the CSV, then draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--model", default=SMOLLM2, help="another GGUF")
    parser.add_argument("--tasks", default="identity,identity64,faq,chinese,style,reviews,docstrings")
    parser.add_argument("--ranks", default="4,8,32")
    parser.add_argument("--methods", default=",".join(METHODS), help="also peft-nf4, for format nf4, and parts of auto")
    parser.add_argument(
        "--adapters", type=Path, default=Path("merge_quality_adapters"), help="trained ones are kept here"
    )
    parser.add_argument("--plot", action="store_true", help="only draw")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(run_one(json.loads(options.only))))
        return
    if not options.plot:
        wanted = itertools.product(
            options.tasks.split(","), options.ranks.split(","), options.formats.split(","), options.methods.split(",")
        )
        for case in wanted:
            run_new(dict(zip(KEY, (Path(options.model).stem, *case), strict=True)), options.model, options.adapters)
    plot()
    print_table()


def run_new(case: dict[str, str], file: str, adapters: Path) -> None:
    """Run one merge in its own process and append its line, unless the CSV has it."""
    if any(all(row[key] == case[key] for key in KEY) for row in read()):
        return
    folder = adapters / f"{case['model']}-{case['task']}-r{case['r']}"
    if not (folder / "qgraft.json").is_file():
        call({**case, "file": file, "train": str(folder)})
    result = call({**case, "file": file, "adapter": str(folder)})
    about = {
        "date": datetime.date.today().isoformat(), "threads": os.environ.get("OMP_NUM_THREADS", os.cpu_count()),
        "cpu": platform.processor() or platform.machine(), "qgraft": version("qgraft"), "torch": version("torch"),
    }  # fmt: skip
    RESULTS.parent.mkdir(exist_ok=True)
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        writer.writerow({**case, **result, **about})
    print({key: round(v, 4) if isinstance(v, float) else v for key, v in {**case, **result}.items()}, flush=True)


def call(case: dict[str, str]) -> dict[str, Any]:
    """run_one in a process of its own."""
    command = [sys.executable, __file__, "--only", json.dumps(case)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def run_one(case: dict[str, str]) -> dict[str, Any]:
    """Train an adapter, or merge one and measure."""
    from tasks import TASKS, train_adapter

    import qgraft

    model, tokenizer = qgraft.load(case["file"])
    if "train" in case:
        train_adapter(model, tokenizer, case["task"], int(case["r"]))
        qgraft.save_adapter(model, case["train"])
        return {}
    rows, held_out = TASKS[case["task"]]()
    if case["method"] == "peft-nf4":
        from peft_nf4 import merge_with_peft

        return merge_with_peft(model, tokenizer, case["adapter"], rows, held_out)
    if case["format"] != OWN:
        convert(model, case["format"])
    qgraft.load_adapter(model, case["adapter"], force=True)  # trained on the file as it is: another fingerprint
    report = qgraft.merge(
        model, tokenizer, calibration=rows, eval_dataset=held_out, method=case["method"], min_retained=-1e9
    )
    kept = report.kept
    assert kept is not None
    figures = ("base", "adapter", "merged", "task_kl", "drift_kl", "adapter_kl", "rows")
    return {
        "retained_gain": report.retained_gain, "before": kept.before, **{key: getattr(kept, key) for key in figures},
        "distilled_steps": report.distilled_steps, "calibration_tokens": report.calibration_tokens,
        "seconds": report.seconds, "peak_mb": report.peak_memory_bytes / 1e6,
    }  # fmt: skip


def convert(model: Any, format_: str) -> None:
    """The linear layers, but the output layer, in another format."""
    from qgraft.adapters.targets import find_targets
    from qgraft.formats import get_format, quantize

    for path in find_targets(model, "all-linear"):
        layer = model.get_submodule(path)
        fits = layer.in_features % get_format(format_).block_size == 0
        chosen = format_ if fits else FALLBACK[format_]
        if layer.packed.format != chosen:
            layer.replace(quantize(layer.dequantize(), chosen))


def read() -> list[dict[str, str]]:
    """The lines of the CSV."""
    if not RESULTS.exists():
        return []
    with RESULTS.open(newline="") as file:
        return list(csv.DictReader(file))


def print_table() -> None:
    """The merges by `auto` as Markdown, a line each; drift as a share of the adapter's own."""
    print("| model | task | r | format | retained gain | drift | seconds | peak |\n|---|---|---|---|---|---|---|---|")
    for row in read():
        if row["method"] == "auto":
            drift, gain = float(row["drift_kl"]) / float(row["adapter_kl"]), float(row["retained_gain"])
            before = f" ({float(row['before']):.1%} before last rounds)" if row["before"] else ""
            seconds = f"{float(row['seconds']):.0f}" if row["seconds"] else ""
            print(
                f"| {row['model']} | {row['task']} | {row['r']} | {row['format']} | {gain:.1%}{before} | {drift:.2f} "
                f"| {seconds} | {float(row['peak_mb']) / 1e3:.2f} GB |"
            )


def plot() -> None:
    """Retained gain of `nearest` and `auto` by format, the worst of all tasks and ranks, with every merge as a dot."""
    from matplotlib.figure import Figure

    rows = read()
    formats = [each for each in (*FORMATS, OWN, "nf4") if any(row["format"] == each for row in rows)]
    figure = Figure(figsize=(9, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    styles = {
        "nearest": ("#c8796a", "requantized"),
        "auto": ("#3a9a5b", "qgraft"),
        "peft-nf4": ("#8f8f8f", "PEFT + NF4"),
    }
    for offset, (method, (color, label)) in zip((-0.2, 0.2, 0.0), styles.items(), strict=True):
        gains = {
            each: [100 * float(r["retained_gain"]) for r in rows if (r["format"], r["method"]) == (each, method)]
            for each in formats
        }
        places = [n for n, each in enumerate(formats) if gains[each]]
        heights = [max(0.0, min(gains[formats[n]])) for n in places]
        bars = axes.bar([n + offset for n in places], heights, 0.38, color=color, label=label, alpha=0.85)
        axes.bar_label(
            bars, [f"{height:.0f}" if height < 95 else f"{height:.1f}" for height in heights], fontsize=7, padding=3
        )
        for n in places:
            values = gains[formats[n]]
            axes.plot([n + offset] * len(values), [max(0.0, v) for v in values], "k.", markersize=3)
    axes.axhline(100, color="black", linewidth=0.8)
    labels = ["gemma-3-270m\nQ4_K_M" if each == OWN else each for each in formats]
    axes.set_xticks(range(len(formats)), labels, rotation=20)
    axes.set_ylabel("retained gain, % (bar: worst case)")
    axes.set_ylim(0, 126)
    axes.set_title("What an adapter learned and a merged file still knows (SmolLM2-135M; each dot a task and rank)")
    axes.legend(loc="upper center", ncols=3, frameon=False)
    figure.savefig(RESULTS.with_suffix(".png"))


if __name__ == "__main__":
    main()
