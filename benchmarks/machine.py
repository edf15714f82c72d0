"""What the benchmarks of speed ask of the machine: its sgemm rate, a process's memory, a contestant in a process of its own.

    float32 torch.mm      the limit of training in float32: a step is little else. Measured twice: on one large product
                          (512 x 4096 x 4096), and on the model's own products at 512 tokens, forward x W^T and backward
                          g W, each as often as a step has it; small matrices run a little slower or, in cache, faster.

Peak memory is the kernel's own count for the process (VmHWM): torch, all libraries and mapped file pages are in it.
"""

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

TOKENS = 512


class ContestantError(RuntimeError):
    """A contestant's process failed; the message is the end of what it wrote."""


def in_own_process(script: str, words: list[str], packages: str | None = None) -> dict[str, Any]:
    """Run a script in a fresh interpreter; its last line of output is a JSON result.

    Args:
        packages: a folder of more packages for this process alone.

    Raises ContestantError.
    """
    paths = [packages, os.environ.get("PYTHONPATH")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    done = subprocess.run(
        [sys.executable, script, *words], capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        raise ContestantError(done.stderr.strip()[-3000:] or f"exit code {done.returncode}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def is_trial(optimizer: Any) -> bool:
    """Whether an optimizer has a single number to train: ours tries its options on one before it loads anything."""
    return sum(each.numel() for group in optimizer.param_groups for each in group["params"]) == 1


def describe(*packages: str) -> dict[str, Any]:
    """Date, device and versions: the first columns of a results file."""
    import torch

    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{package: installed(package) for package in packages},
    }


def installed(package: str) -> str:
    """The version of a package, "" where it is missing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def cpu_name() -> str:
    """The CPU's model and the widest vector unit that torch uses."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()} ({torch.backends.cpu.get_cpu_capability()})"


def peak_mb() -> float:
    """The most memory this process has held resident, in MB."""
    import resource

    status = Path("/proc/self/status")
    if status.exists():  # not getrusage: on Linux that begins with the size of the process that started this one
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def sgemm_rates(shapes: list[tuple[int, int, int]], tokens: int = TOKENS) -> dict[str, float]:
    """GFLOP/s of float32 products: "large", and "shapes", of a model's layers.

    Args:
        shapes: (out, in, how many such layers).
    """
    import torch

    seconds, flops = 0.0, 0.0
    for rows, columns, count in shapes:
        w_OI, x_NI, g_NO = torch.randn(rows, columns), torch.randn(tokens, columns), torch.randn(tokens, rows)
        seconds += count * (_seconds(lambda x=x_NI, w=w_OI: x @ w.T) + _seconds(lambda g=g_NO, w=w_OI: g @ w))
        flops += count * 4.0 * tokens * rows * columns
    x_NI, w_OI = torch.randn(tokens, 4096), torch.randn(4096, 4096)
    large = 2.0 * tokens * 4096 * 4096 / _seconds(lambda: x_NI @ w_OI.T)
    return {"large": large / 1e9, "shapes": flops / seconds / 1e9}


def _seconds(product: Callable[[], Any], least: float = 0.1) -> float:
    """The median time of a call, of as many as fit into `least` seconds and at least five."""
    product()
    times: list[float] = []
    while len(times) < 5 or sum(times) < least:
        began = time.perf_counter()
        product()
        times.append(time.perf_counter() - began)
    return statistics.median(times)
