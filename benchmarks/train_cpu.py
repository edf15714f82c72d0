"""LoRA training side by side: qgraft on the packed file, transformers + PEFT on its float32 copy and on other formats.

    python benchmarks/train_cpu.py                     # half an hour: qgraft, peft and nf4 in three rounds, the others once
    python benchmarks/train_cpu.py --dataset identity --contestants qgraft,peft --rounds 5 --steps 24
    python benchmarks/train_cpu.py --packages FOLDER   # where hqq, optimum-quanto, torchao, unsloth lie, if nowhere else

Every contestant (peers.py says what each is) runs in a process of its own and gets the same rows in the same order, the same
first adapter weights, the same optimizer, learning rate and batch size: r=8 on all linear layers of SmolLM2-135M.

    identity   who the assistant is: 216 rows of much the same length, 16 % padding at batch 8
    mixed      docstrings of Python's standard library, 38 to 400 tokens: 58 % padding at batch 8
    dense      one row of 512 tokens a step, all of them learned: no gain but that of the kernels

Losses. Held-out losses are compared where the base is the same, bit for bit: all qgraft runs and both of PEFT in float32
must be within 1 % of `peft`, `nf4-packed` within 1 % of `nf4`; otherwise the benchmark fails. The bases of NF4, HQQ, quanto
and torchao are rounded again, each in another way, and the bfloat16 recipe rounds the activations as well: their losses are
printed beside the others, and nothing follows from a difference.

Shares of the limit. Operations of a step: 4 for each weight of a layer and each token (products with W and with W^T), 4 for
each weight of the head and each token that is learned, 6 r (in + out) for each adapter and each token; attention and all
else count nothing, padding neither. Divided by the time and by the machine's sgemm rate (machine.py), which is measured in
the same process right after the last step.

Written to benchmarks/results/train_cpu.csv and .png: tokens a second count no padding and no warm-up, peak memory is that of
the whole process until the last step. The machine is noisy: quote the ratios.
"""

import argparse
import csv
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
import peers

RESULTS = Path(__file__).with_name("results") / "train_cpu.csv"
# data set -> steps, samples in a batch
WORK = {"identity": (8, 8), "mixed": (5, 8), "dense": (5, 1)}
TITLES = {
    "identity": "identity: 216 short rows, batches of 8",
    "mixed": "mixed: rows of 38 to 400 tokens, batches of 8",
    "dense": "dense: 512 tokens a step, no padding",
}
EVERY_ROUND = ("qgraft", "peft", "nf4")  # unless others are asked for
SLOW = ("nf4-bf16", "hqq", "quanto", "torchao", *peers.UNSLOTH)  # with fewer steps, unless a number is given
STEPS_OF_SLOW = 4
WARMUP_STEPS = 1
PACKAGES = ("qgraft", "torch", "transformers", "peft", "bitsandbytes", "hqq", "optimum-quanto", "torchao", "unsloth")
Run = dict[str, Any]


def main() -> None:
    """Run all contestants in turn, compare, write the CSV, draw the chart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of every contestant on every data set")
    parser.add_argument("--batch", type=int, help="samples in a batch; dense has one")
    parser.add_argument("--dataset", default="both", choices=(*WORK, "both", "all"), help="both: identity and mixed")
    parser.add_argument("--contestants", help="comma list of those that run in every round; others do not run")
    parser.add_argument("--packages", help="a folder of packages (pip install --target) for the peers")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument(
        "--redraw", type=Path, metavar="CSV", help="measure nothing: the chart and table of earlier results"
    )
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(run_contestant(options)))
        return
    if options.redraw:
        runs, cpu = read(options.redraw)
        draw(runs, options.redraw.with_suffix(".png"), cpu)
        report(runs, [])
        return
    names = options.contestants.split(",") if options.contestants else default_contestants()
    if unknown := set(names) - set(peers.CONTESTANTS):
        parser.error(f"unknown contestants {', '.join(sorted(unknown))}; there are {', '.join(peers.CONTESTANTS)}")
    datasets = {"both": ["identity", "mixed"], "all": list(WORK)}.get(options.dataset, [options.dataset])
    runs = []
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        peers.prepare(Path(folder), datasets)
        for number in range(options.rounds):
            for dataset in datasets:
                for name in names if dataset != "dense" else (name for name in names if not name.endswith("-packed")):
                    if number == 0 or options.contestants or name in EVERY_ROUND:
                        runs += one_run(name, dataset, number, folder, options, problems)
    write(runs, options.output)
    draw(runs, options.output.with_suffix(".png"), machine.cpu_name())
    report(runs, problems)


def default_contestants() -> list[str]:
    """All but qgraft-bf16, the default where the CPU has it and slow elsewhere, and what is the default elsewhere."""
    from qgraft.kernels.choice import has_fast_bf16

    doubled = ("qgraft-bf16",) if has_fast_bf16() else ("qgraft-bf16", "qgraft-float32")
    return [name for name in peers.CONTESTANTS if name not in doubled]


def one_run(
    name: str,
    dataset: str,
    number: int,
    folder: str,
    options: argparse.Namespace,
    problems: list[str],
) -> list[Run]:
    """One contestant in a process of its own: its line of the CSV, or none where it could not run."""
    steps, batch = WORK[dataset]
    steps = options.steps or (min(steps, STEPS_OF_SLOW) if name in SLOW else steps)
    batch = options.batch if options.batch and dataset != "dense" else batch
    words = ["--only", name, "--folder", folder, "--dataset", dataset, "--steps", str(steps), "--batch", str(batch)]
    try:
        result = machine.in_own_process(__file__, words, options.packages if name in SLOW else None)
    except machine.ContestantError as error:
        print(error, file=sys.stderr)
        problems.append(f"{dataset}: {name} failed: {str(error).splitlines()[-1]}")
        return []
    if "skipped" in result:
        print(f"{dataset}: {name} is left out: {result['skipped']}", flush=True)
        return []
    seconds, rate = result["seconds"], result["operations"] / result["seconds"] / 1e9
    run = {
        "dataset": dataset, "round": number, "contestant": name, "steps": steps, "batch": batch,
        "tokens_per_second": result["tokens"] / seconds, "seconds_per_step": seconds / (steps - WARMUP_STEPS),
        "useful_share": result["tokens"] / result["padded_tokens"], "gflops": rate,
        "sgemm_gflops": result["sgemm"]["large"], "sgemm_gflops_shapes": result["sgemm"]["shapes"],
        "share_of_sgemm": rate / result["sgemm"]["large"], "share_on_shapes": rate / result["sgemm"]["shapes"],
        **{key: result[key] for key in ("load_seconds", "peak_mb", "held_out_loss", "total_seconds")},
    }  # fmt: skip
    print({key: round(value, 4) if isinstance(value, float) else value for key, value in run.items()}, flush=True)
    return [run]


class Clock:
    """Time and memory at the end of every optimizer step in this process, whoever makes it."""

    def __init__(self) -> None:
        from torch.optim.optimizer import register_optimizer_step_post_hook

        self.times: list[float] = []
        self.peak_mb = 0.0
        register_optimizer_step_post_hook(self.tick)

    def tick(self, optimizer: Any, *_: object) -> None:
        """A step is done, unless it is of a single number, on which ours tries its options."""
        if machine.is_trial(optimizer):
            return
        self.times.append(time.perf_counter())
        self.peak_mb = machine.peak_mb()


def run_contestant(options: argparse.Namespace) -> Run:
    """Train for so many steps in this process; returns the measurements."""
    from qgraft import OptionError

    if missing := peers.missing_package(options.only):
        return {"skipped": f"{missing} is not installed"}
    shared = json.loads((options.folder / f"{options.dataset}.json").read_text())
    clock, began = Clock(), time.perf_counter()
    try:
        load_seconds, loss = peers.train(options.only, shared, options.folder, options.steps, options.batch)
    except OptionError as error:
        if options.only == "qgraft":
            raise
        return {"skipped": str(error)}  # a way to compute that this release or this CPU lacks
    assert len(clock.times) == options.steps
    rows = shared["train"]["tokens"][: options.steps * options.batch]
    assert len(rows) == options.steps * options.batch, "the data set is shorter than the run"
    counted = rows[WARMUP_STEPS * options.batch :]
    lengths = [len(row["input_ids"]) for row in counted]
    batches = [lengths[start : start + options.batch] for start in range(0, len(lengths), options.batch)]
    labels = sum(label != -100 for row in counted for label in row["labels"][1:])
    sizes = json.loads((options.folder / "sizes.json").read_text())
    token = 4 * sizes["body_weights"] + sizes["lora_flops"]
    shapes = [tuple(layer) for layer in sizes["layers"]] + [(*sizes["head"], 1)]
    return {
        "operations": sum(lengths) * token + labels * 4 * sizes["head_weights"],
        "sgemm": machine.sgemm_rates(shapes),
        "seconds": clock.times[-1] - clock.times[WARMUP_STEPS - 1],
        "tokens": sum(lengths),
        "padded_tokens": sum(max(batch) * len(batch) for batch in batches),
        "load_seconds": load_seconds,
        "peak_mb": clock.peak_mb,
        "held_out_loss": loss(),
        "total_seconds": time.perf_counter() - began,
    }


def write(runs: list[Run], path: Path) -> None:
    """The CSV, with date, device and versions."""
    about = machine.describe(*PACKAGES)
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*about, *runs[0]])
        writer.writeheader()
        writer.writerows({**about, **run} for run in runs)


def read(path: Path) -> tuple[list[Run], str]:
    """The lines of a CSV, and the CPU they were measured on."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    words = {"dataset", "contestant"}
    kept = list(rows[0])[list(rows[0]).index("dataset") :]
    runs = [{key: row[key] if key in words else float(row[key]) for key in kept} for row in rows]
    return runs, rows[0]["cpu"]


def medians(runs: list[Run], dataset: str) -> dict[str, dict[str, float]]:
    """Contestant -> its medians on a data set.

    "speed" is the median over the rounds of its tokens a second by the first contestant's in the same round: what the
    machine did beside is much the same for two processes that run one after the other, and is not for those of two rounds.
    For a contestant that did not run in every round it is by the first's median.
    """
    mine = [run for run in runs if run["dataset"] == dataset]
    keys = ("tokens_per_second", "peak_mb", "load_seconds", "held_out_loss", "share_of_sgemm", "share_on_shapes")
    names = list(dict.fromkeys(run["contestant"] for run in mine))
    first = "qgraft" if "qgraft" in names else names[0]
    ours = {run["round"]: run["tokens_per_second"] for run in mine if run["contestant"] == first}
    table = {}
    for name in names:
        his = [run for run in mine if run["contestant"] == name]
        table[name] = {key: statistics.median(run[key] for run in his) for key in keys}
        every, median = len(his) == len(ours), statistics.median(ours.values())
        beside = [ours[run["round"]] if every else median for run in his]
        table[name]["speed"] = statistics.median(
            run["tokens_per_second"] / own for run, own in zip(his, beside, strict=True)
        )
    return table


def report(runs: list[Run], problems: list[str]) -> None:
    """Medians, and ours against each peer; exits with an error where a run failed or losses of one base differ by 1 %."""
    for dataset in dict.fromkeys(run["dataset"] for run in runs):
        table = medians(runs, dataset)
        first = "qgraft" if "qgraft" in table else next(iter(table))
        ours = table[first]
        print(f"\n{dataset}")
        for name, figures in table.items():
            print(
                f"{name:<15} {figures['tokens_per_second']:7.1f} tokens/s ({first} x {figures['speed']:4.2f})"
                f"  {figures['share_of_sgemm']:4.0%} of sgemm, {figures['share_on_shapes']:4.0%} of it on the shapes"
                f"  peak {figures['peak_mb']:6.0f} MB ({first} {ours['peak_mb'] / figures['peak_mb']:4.0%})"
                f"  load {figures['load_seconds']:5.1f} s  held-out loss {figures['held_out_loss']:.4f}"
            )
        for group in (peers.SAME_BASE, peers.NF4):
            problems = problems + different_losses([run for run in runs if run["dataset"] == dataset], group)
    if problems:
        sys.exit("\n".join(["not a fair comparison:", *problems]))


def different_losses(runs: list[Run], group: tuple[str, ...]) -> list[str]:
    """The runs of a group whose held-out loss is more than 1 % off the reference's, where as many steps were taken."""
    mine = [run for run in runs if run["contestant"] in group]
    references = [
        run for run in mine if run["contestant"] == (peers.REFERENCE if peers.REFERENCE in group else group[0])
    ]
    if not references:
        return []
    mine = [run for run in mine if run["steps"] == references[0]["steps"]]
    expected = statistics.median(run["held_out_loss"] for run in references)
    worst = max(mine, key=lambda run: abs(run["held_out_loss"] / expected - 1))
    print(f"largest difference of losses on the base of {references[0]['contestant']}: "
          f"{worst['held_out_loss'] / expected - 1:+.3%} ({worst['contestant']})")  # fmt: skip
    return [
        f"{run['dataset']}: {run['contestant']}: held-out loss {run['held_out_loss']:.4f}, expected {expected:.4f}"
        for run in mine
        if abs(run["held_out_loss"] / expected - 1) > 0.01
    ]


def label(name: str) -> str:
    """A contestant's name for the chart; peers.py says what each is."""
    return name.replace("-packed", ", padding-free").replace("nf4-bf16", "nf4 in bf16")


def draw(runs: list[Run], path: Path, cpu: str) -> None:
    """Bars of speed and of peak memory, a row of axes for each data set."""
    from matplotlib.figure import Figure

    datasets = list(dict.fromkeys(run["dataset"] for run in runs))
    tables = {dataset: medians(runs, dataset) for dataset in datasets}
    height = 1.0 + sum(0.6 + 0.3 * len(table) for table in tables.values())
    figure = Figure(figsize=(11, height), dpi=120, layout="constrained")
    axes = figure.subplots(len(datasets), 2, squeeze=False, height_ratios=[2 + len(t) for t in tables.values()])
    for row, (dataset, table) in zip(axes, tables.items(), strict=True):
        colors = ["#2f6fb0" if name.startswith("qgraft") else "#9aa5b1" for name in table]
        for axis, key, unit, scale, style in (
            (row[0], "speed", "useful tokens a second, qgraft = 1 (medians of the rounds)", 1.0, "%.2f"),
            (row[1], "peak_mb", "peak memory (GB)", 1e-3, "%.2f"),
        ):
            bars = axis.barh(
                [label(name) for name in table], [figures[key] * scale for figures in table.values()], color=colors
            )
            axis.bar_label(bars, fmt=style, padding=3)
            axis.invert_yaxis()
            axis.margins(x=0.12)
            axis.set_xlabel(unit)
            axis.set_title(TITLES[dataset])
            axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"LoRA r=8 on all linear layers of SmolLM2-135M, two cores: {cpu}")
    figure.savefig(path)


if __name__ == "__main__":
    main()
