"""The CPU kernels beside dense products and bitsandbytes NF4: every op, format and way to compute, few and many tokens.

    python benchmarks/kernels_cpu.py [--rounds 9] [--threads 2]

One weight [1536, 768]. All contestants of one op and number of tokens take turns, round by round, so that a slow moment
of the machine is everybody's; what is reported is the median over the rounds of one call's time. Dense contestants are
torch.mm on the same shape, in float32 and in bfloat16. bitsandbytes is its Linear4bit, where it is installed and runs.
Written to benchmarks/results/kernels_cpu.csv, drawn in kernels_cpu.png.
"""

import argparse
import csv
import datetime
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qgraft.formats import quantize
from qgraft.kernels import (
    choose,
    dequantize,
    linear,
    linear_grad_input,
    linear_grad_input_int8,
    linear_int8,
    native_status,
)
from qgraft.kernels.cpu.abi import FORMAT_IDS

RESULTS = Path(__file__).with_name("results") / "kernels_cpu.csv"
ROWS, COLUMNS = 1536, 768
TOKENS = (1, 16, 64, 256, 1024)
OPS = ("linear", "linear_grad_input")
DRAWN = ("q4_1", "q4_k", "q8_0", "chatglm-int4")
LEAST_SECONDS = 0.002  # of one measurement: shorter calls are repeated

Contestants = dict[tuple[str, str], Callable[[], Any]]  # (format, compute) -> one call


def main() -> None:
    """Measure, write the CSV, draw the chart, print the fastest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS) * 0.05
    found = measure("dequantize", 0, unpacking(weight), options.rounds)
    for tokens in TOKENS:
        for op in OPS:
            found += measure(op, tokens, products(op, weight, tokens), options.rounds)
    write(found, options)
    draw(found, RESULTS.with_suffix(".png"))
    for row in found:
        if row["format"] in ("dense", "bitsandbytes-nf4", *DRAWN):
            print("{op:<18}{tokens:>5} {format:<17}{compute:<8}{microseconds:>10.1f} us".format(**row))


def unpacking(weight: Tensor) -> Contestants:
    """dequantize of every format, to float32 and to bfloat16."""
    calls: Contestants = {}
    for name in FORMAT_IDS:
        packed = quantize(weight, name)
        calls[name, "float32"] = lambda packed=packed: dequantize(packed, torch.float32)
        calls[name, "bf16"] = lambda packed=packed: dequantize(packed, torch.bfloat16)
    return calls


def products(op: str, weight: Tensor, tokens: int) -> Contestants:
    """linear or linear_grad_input of every format, the dense products, and bitsandbytes."""
    x = torch.randn(tokens, COLUMNS if op == "linear" else ROWS)
    dense = weight.T if op == "linear" else weight
    x_bf16, dense_bf16 = x.bfloat16(), dense.bfloat16()
    calls: Contestants = {
        ("dense", "float32"): lambda: torch.mm(x, dense),
        ("dense", "bf16"): lambda: torch.mm(x_bf16, dense_bf16),
    }
    for name in FORMAT_IDS:
        packed = quantize(weight, name)
        run = partial(linear if op == "linear" else linear_grad_input, packed=packed)
        calls[name, "float32"] = partial(run, x)
        calls[name, "bf16"] = partial(run, x_bf16)
        if choose(f"{op}_int8", name, "cpu").compute == "int8":
            calls[name, "int8"] = partial(linear_int8 if op == "linear" else linear_grad_input_int8, x, packed)
    peer = bitsandbytes_layer(weight)
    if peer is not None and op == "linear":
        calls["bitsandbytes-nf4", "float32"] = lambda: peer(x)
        calls["bitsandbytes-nf4", "bf16"] = lambda: peer(x_bf16)
    elif peer is not None:
        start = torch.zeros(tokens, COLUMNS, requires_grad=True)
        y = peer.train()(start)
        calls["bitsandbytes-nf4", "float32"] = lambda: torch.autograd.grad(y, start, x, retain_graph=True)
    return calls


def bitsandbytes_layer(weight: Tensor) -> torch.nn.Module | None:
    """The weight in its NF4 layer, or None where the package is not installed or does not run here."""
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError:
        return None
    layer = Linear4bit(COLUMNS, ROWS, bias=False, compute_dtype=None, quant_type="nf4")
    layer.weight = Params4bit(weight.clone(), requires_grad=False, quant_type="nf4")
    return layer.to("cpu").eval()


@torch.no_grad()
def measure(op: str, tokens: int, calls: Contestants, rounds: int) -> list[dict[str, Any]]:
    """One row for each contestant: the median over `rounds` of its seconds a call."""
    repeats, seconds = {}, {key: [] for key in calls}  # type: dict[tuple[str, str], int], dict[tuple[str, str], list[float]]
    for key, call in calls.items():
        call()
        repeats[key] = max(1, round(LEAST_SECONDS / max(timed(call, 1), 1e-7)))
    for _ in range(rounds):
        for key, call in calls.items():
            seconds[key].append(timed(call, repeats[key]))
    flops = 2 * tokens * ROWS * COLUMNS
    rows = []
    for (name, compute), all_seconds in seconds.items():
        median = statistics.median(all_seconds)
        rows.append(
            {"op": op, "format": name, "compute": compute, "tokens": tokens, "microseconds": round(median * 1e6, 2),
             "gflops": round(flops / median / 1e9, 1), "weights_per_ns": round(ROWS * COLUMNS / median / 1e9, 2)}
        )  # fmt: skip
    return rows


def timed(call: Callable[[], Any], repeats: int) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - began) / repeats


def write(found: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """The CSV, with what it was measured on in every row."""
    about = {"date": datetime.date.today().isoformat(), "device": device_name(), "kernels": native_status()[1]}
    about |= {package: installed(package) for package in ("qgraft", "torch", "bitsandbytes")}
    about |= {"threads": str(options.threads), "rounds": str(options.rounds), "out": str(ROWS), "in": str(COLUMNS)}
    RESULTS.parent.mkdir(exist_ok=True)
    with open(RESULTS, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*about, *found[0]])
        writer.writeheader()
        writer.writerows({**about, **row} for row in found)


def device_name() -> str:
    """The CPU's own name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def installed(package: str) -> str:
    """Its version, or "" where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def draw(found: list[dict[str, Any]], target: Path) -> None:
    """Speed of each way to compute against float32 torch.mm on the same shape, by tokens: a column for each format."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(OPS), len(DRAWN), figsize=(13, 6), sharex=True, sharey="row", squeeze=False)
    for op, line in zip(OPS, axes, strict=True):
        mine = {(r["format"], r["compute"], r["tokens"]): r["microseconds"] for r in found if r["op"] == op}
        for name, axis in zip(DRAWN, line, strict=True):
            for source, style in ((name, "-o"), ("dense", "--"), ("bitsandbytes-nf4", ":")):
                for compute, colour in (("float32", "tab:blue"), ("bf16", "tab:orange"), ("int8", "tab:green")):
                    known = [m for m in TOKENS if (source, compute, m) in mine]
                    speed = [mine["dense", "float32", m] / mine[source, compute, m] for m in known]
                    if known:
                        axis.plot(known, speed, style, color=colour, markersize=3, label=f"{source}, {compute}")
            axis.set(xscale="log", yscale="log", title=f"{op}, {name}")
            axis.set_xticks(TOKENS, [str(m) for m in TOKENS])
            axis.grid(alpha=0.3)
        line[0].set_ylabel("times as fast as torch.mm, float32")
    for axis in axes[0]:
        axis.legend(fontsize=6)
    for axis in axes[-1]:
        axis.set_xlabel("tokens")
    figure.tight_layout()
    figure.savefig(target, dpi=130)


if __name__ == "__main__":
    main()
