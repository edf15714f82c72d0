"""Where the time of a training step goes, ours and PEFT's: a stacked bar from torch.profiler.

    python benchmarks/profile_step.py                                     # identity rows, batch 8
    python benchmarks/profile_step.py --dataset dense --contestants qgraft,peft --steps 4

The contestants are those of train_cpu.py, each in a process of its own. A few steps pass under the profiler, from the end of
one optimizer step to the end of another, so everything that a step needs is in it. The time that each operator spends in
itself, without those that it calls, goes to one category, by what it is and what it is called by:

    base products     matrix products with frozen weights, forward and backward, unpacking them included: one loop does both;
                      ours with what the LoRAs add, which is in the same call
    adapter           other matrix products of which a side is the rank
    attention         scaled_dot_product_attention or our own, both ways
    loss and head     whatever has the vocabulary as a dimension, and what the loss function calls
    optimizer         AdamW and the clipping of gradients
    elementwise       norms, activations, rotations, additions, copies
    overhead          the rest of the wall time: Python, dispatch, views, autograd's bookkeeping, data loading

The profiler itself costs some microseconds an operator, which end up in the overhead; the time of a step without it is in
the CSV and the printed table beside the profiled one. Written to benchmarks/results/profile_step.csv and .png.
"""

import argparse
import csv
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
import peers

RESULTS = Path(__file__).with_name("results") / "profile_step.csv"
CONTESTANTS = "qgraft,qgraft-float32,peft"
CATEGORIES = (
    "base products", "adapter", "attention", "loss and head", "optimizer", "elementwise", "overhead",
)  # fmt: skip
COLORS = ("#2f6fb0", "#6fa8dc", "#3a9a5b", "#b05fa0", "#8c6d46", "#c9b458", "#9aa5b1")
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::mv", "aten::addmv", "mkldnn::")
PACKED = ("qgraft::", "bitsandbytes::", "aten::_weight_")
LOSS = ("_ChunkedLoss", "aten::cross_entropy", "aten::nll_loss", "aten::log_softmax", "aten::_log_softmax")
OPTIMIZER = ("Optimizer.", "aten::_foreach_", "aten::linalg_vector_norm", "aten::_fused_adamw")
ATTENTION = ("aten::scaled_dot_product", "aten::_scaled_dot_product", "ScaledDotProduct", "attention::")
NATIVE = {  # C functions, which the profiler does not see by itself -> what they are called here
    "qgraft_linear": "qgraft::layer",
    "qgraft_varlen_attention": "attention::forward",
    "qgraft_varlen_attention_backward": "attention::backward",
    "qgraft_norm": "pointwise::norm",
    "qgraft_normalized": "pointwise::again",
    "qgraft_norm_backward": "pointwise::norm_backward",
    "qgraft_gated": "pointwise::gated",
    "qgraft_gated_backward": "pointwise::gated_backward",
    "qgraft_rotate": "pointwise::rotate",
}
WITHOUT_WORK = {
    "linear", "matmul", "t", "transpose", "view", "_unsafe_view", "reshape", "expand", "expand_as", "slice", "select",
    "as_strided", "unsqueeze", "squeeze", "permute", "detach", "alias", "empty", "empty_like", "empty_strided", "resize_",
    "contiguous", "to", "type_as", "lift_fresh", "item", "_local_scalar_dense", "narrow", "split", "numpy_T",
}  # fmt: skip
RANKS = tuple(peers.RANK * parts for parts in (1, 2, 3))  # layers that share an input may be stacked
WARMUP_STEPS = 2


def main() -> None:
    """Profile each contestant, write the CSV, draw the bars."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="identity", choices=("identity", "mixed", "dense"))
    parser.add_argument("--contestants", default=CONTESTANTS, help="comma list of those of train_cpu.py")
    parser.add_argument("--steps", type=int, default=3, help="under the profiler, and as many before it")
    parser.add_argument("--batch", type=int, default=8, help="samples in a batch; dense has one")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--only", choices=peers.CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.dataset == "dense":
        options.batch = 1
    if options.only:
        print(json.dumps(profile(options)))
        return
    results = []
    with tempfile.TemporaryDirectory() as folder:
        peers.prepare(Path(folder), [options.dataset])
        for name in options.contestants.split(","):
            words = ["--only", name, "--folder", folder, "--dataset", options.dataset]
            words += ["--steps", str(options.steps), "--batch", str(options.batch)]
            results.append({"contestant": name, **machine.in_own_process(__file__, words)})
            show(results[-1])
    write(results, options)
    draw(results, options)


def profile(options: argparse.Namespace) -> dict[str, float]:
    """Train in this process, with the profiler on for the last steps; seconds a step by category."""
    from torch.optim.optimizer import register_optimizer_step_post_hook
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as Profiler

    shared = json.loads((options.folder / f"{options.dataset}.json").read_text())
    profiler = Profiler(activities=[ProfilerActivity.CPU], record_shapes=True)
    begins, ends = WARMUP_STEPS + options.steps, WARMUP_STEPS + 2 * options.steps
    times: list[float] = []
    before: list[float] = []  # when the profiler began to start, which takes a while

    def stepped(optimizer: Any, *_: object) -> None:
        if machine.is_trial(optimizer):
            return
        times.append(time.perf_counter())
        if len(times) == begins:
            before.append(times[-1])
            profiler.start()
            times[-1] = time.perf_counter()
        elif len(times) == ends:
            profiler.stop()

    register_optimizer_step_post_hook(stepped)
    if options.only.startswith("qgraft"):
        name_native_functions()
    peers.train(options.only, shared, options.folder, ends, options.batch)
    wall = times[ends - 1] - times[begins - 1]
    seconds = dict.fromkeys(CATEGORIES, 0.0)
    vocabulary = json.loads((options.folder / "float" / "config.json").read_text())["vocab_size"]
    for event in profiler.events():
        if (category := category_of(event, vocabulary)) is not None:
            seconds[category] += event.self_cpu_time_total / 1e6
    seconds["overhead"] = wall - sum(seconds.values())
    return {
        "seconds_per_step": (before[0] - times[WARMUP_STEPS - 1]) / options.steps,
        "profiled_seconds_per_step": wall / options.steps,
        **{category: each / options.steps for category, each in seconds.items()},
    }


def name_native_functions() -> None:
    """Let the profiler see the C functions of qgraft."""
    from torch.profiler import record_function

    from qgraft.kernels.cpu.library import loaded

    library = loaded()

    def named(function: Any, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            with record_function(name):
                return function(*arguments)

        return call

    for function, name in NATIVE.items():
        setattr(library, function, named(getattr(library, function), name))


def category_of(event: Any, vocabulary: int) -> str | None:
    """Where the time belongs that an operator spends in itself; None for overhead."""
    chain = [event]
    while chain[-1].cpu_parent is not None:
        chain.append(chain[-1].cpu_parent)

    def within(prefixes: tuple[str, ...]) -> bool:
        return any(each.name.startswith(prefixes) for each in chain)

    is_product = event.name.startswith(PRODUCTS)
    if within(OPTIMIZER):
        return "optimizer"
    family, _, operator = event.name.partition("::")
    if not operator or family in ("autograd", "torch") or (family == "aten" and operator in WITHOUT_WORK):
        return None
    if within(LOSS) or any(vocabulary in shape for each in chain for shape in each.input_shapes or ()):
        return "loss and head"
    if within(ATTENTION):
        return "attention"
    if is_product and any(side in RANKS for shape in event.input_shapes or () for side in shape):
        return "adapter"
    return "base products" if is_product or within(PACKED) else "elementwise"


def show(result: dict[str, Any]) -> None:
    """One line of the printed table."""
    parts = ", ".join(f"{category} {result[category]:.2f}" for category in CATEGORIES)
    print(f"{result['contestant']}: {result['seconds_per_step']:.2f} s a step, "
          f"{result['profiled_seconds_per_step']:.2f} under the profiler: {parts}", flush=True)  # fmt: skip


def write(results: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """The CSV, with date, device and versions."""
    about = machine.describe("qgraft", "torch", "transformers", "peft")
    about |= {"dataset": options.dataset, "steps": options.steps, "batch": options.batch}
    options.output.parent.mkdir(exist_ok=True)
    with open(options.output, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*about, *results[0]])
        writer.writeheader()
        writer.writerows({**about, **result} for result in results)


def draw(results: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """A bar for each contestant, a piece for each category."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.0 + 0.7 * len(results)), dpi=120, layout="constrained")
    axes = figure.subplots()
    names = [result["contestant"] for result in results]
    longest = max(sum(result[category] for category in CATEGORIES) for result in results)
    starts = [0.0] * len(results)
    for category, color in zip(CATEGORIES, COLORS, strict=True):
        pieces = [max(result[category], 0.0) for result in results]
        bars = axes.barh(names, pieces, left=starts, color=color, label=category)
        labels = [f"{piece:.2f}" if piece > 0.04 * longest else "" for piece in pieces]
        axes.bar_label(bars, labels, label_type="center", fontsize=8)
        starts = [start + piece for start, piece in zip(starts, pieces, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("seconds a step")
    axes.set_title(f"A step of LoRA r=8 on SmolLM2-135M: {options.dataset} rows, batch {options.batch}, on a CPU")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(CATEGORIES) // 2)
    figure.savefig(options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
