"""Many adapters on SmolLM2-135M Q4_1: switching, loading, files, and batches whose rows use different ones; beside PEFT.

    python benchmarks/adapters.py [--without-peft]

    switch        use_adapter between two of 2 and of 100 attached adapters (r=8 on all 210 linear layers)
    load          load_adapter for the first and the hundredth, from files that the page cache holds
    files         an adapter's folder in float32 and float16, and a small one (r=4, q and v only)
    memory        growth of the process for each further adapter
    mixed batch   8 rows of 32 tokens with four adapters: in one call, and adapter by adapter; and the base alone

PEFT runs on the dequantized float32 model, with 2 adapters: set_adapter, and a mixed batch with the same rows. Written to
benchmarks/results/adapters.csv.
"""

import argparse
import csv
import datetime
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

import qgraft
from qgraft.adapters.attach import lora_modules

RESULTS = Path(__file__).with_name("results") / "adapters.csv"
MANY, ROWS, TOKENS = 100, 8, 32
SMALL = {"r": 4, "target_modules": "q_proj,v_proj"}


def main() -> None:
    """Measure, print, write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--without-peft", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        figures = measure_qgraft(Path(temporary))
        if not options.without_peft:
            figures += measure_peft(Path(temporary))
    packages = {package: version(package) for package in ("qgraft", "torch", "transformers", "peft")}
    about = {"date": datetime.date.today().isoformat(), **packages}
    RESULTS.parent.mkdir(exist_ok=True)
    with open(RESULTS, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*about, "contestant", "measure", "value", "unit"])
        writer.writeheader()
        for contestant, measure, value, unit in figures:
            print(f"{contestant:<8}{measure:<44}{value:10.3f} {unit}")
            writer.writerow(
                {**about, "contestant": contestant, "measure": measure, "value": f"{value:.4g}", "unit": unit}
            )


def measure_qgraft(temporary: Path) -> list[tuple[str, str, float, str]]:
    """Ours."""
    model, _ = qgraft.load(qgraft.pull("smollm2-135m"))
    save_some(model, temporary)
    figures = [
        ("file, r=8 on all layers, float32", folder_bytes(temporary / "large") / 1e6, "MB"),
        ("file, r=8 on all layers, float16", folder_bytes(temporary / "half") / 1e6, "MB"),
        ("file, r=4 on q and v, float16", folder_bytes(temporary / "small") / 1e6, "MB"),
    ]
    loads, before = [], 0
    for number in range(MANY):
        began = time.perf_counter()
        qgraft.load_adapter(model, temporary / "large", f"a{number}")
        loads.append(time.perf_counter() - began)
        if number == 1:
            figures.append(("switch, 2 attached", switch_ms(lambda name: qgraft.use_adapter(model, name)), "ms"))
        if number == 9:
            before = psutil.Process().memory_info().rss
    grown = psutil.Process().memory_info().rss - before
    figures += [
        (f"switch, {MANY} attached", switch_ms(lambda name: qgraft.use_adapter(model, name)), "ms"),
        ("load, median of the first ten", statistics.median(loads[:10]) * 1e3, "ms"),
        (f"load, median of the last ten of {MANY}", statistics.median(loads[-10:]) * 1e3, "ms"),
        ("memory of each further adapter", grown / (MANY - 10) / 1e6, "MB"),
    ]
    ids = torch.randint(4, 1000, (ROWS, TOKENS))
    names = [f"a{row % 4}" for row in range(ROWS)]

    def apart() -> None:
        for name in sorted(set(names)):
            qgraft.use_adapter(model, name)
            model(ids[[row for row, used in enumerate(names) if used == name]])

    with torch.inference_mode():
        figures += [
            ("mixed batch, one call", median_ms(lambda: model(ids, adapter_names=names)), "ms"),
            ("mixed batch, adapter by adapter", median_ms(apart), "ms"),
        ]
        qgraft.use_adapter(model, None)
        figures.append(("same batch, base alone", median_ms(lambda: model(ids)), "ms"))
    return [("qgraft", *figure) for figure in figures]


def measure_peft(temporary: Path) -> list[tuple[str, str, float, str]]:
    """PEFT, on the model that transformers dequantizes."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    path = qgraft.pull("smollm2-135m")
    base = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, temporary / "large", adapter_name="a0").eval()
    model.load_adapter(temporary / "large", adapter_name="a1")
    figures = [("switch, 2 attached", switch_ms(model.set_adapter), "ms")]
    ids = torch.randint(4, 1000, (ROWS, TOKENS))
    names = [f"a{row % 2}" for row in range(ROWS)]
    with torch.inference_mode():
        figures.append(("mixed batch of two, one call", median_ms(lambda: model(ids, adapter_names=names)), "ms"))
    return [("peft", *figure) for figure in figures]


def save_some(model: Any, temporary: Path) -> None:
    """Adapters with an effect, of two sizes, in files; none stays attached."""
    for name, options in (("large", {"r": 8}), ("small", SMALL)):
        qgraft.attach_lora(model, name=name, **options)
        for _, lora in lora_modules(model, name):
            torch.nn.init.normal_(lora.lora_B, 0, 0.01)
    qgraft.save_adapter(model, temporary / "large", "large")
    qgraft.save_adapter(model, temporary / "half", "large", dtype="float16")
    qgraft.save_adapter(model, temporary / "small", "small", dtype="float16")
    qgraft.detach_lora(model)


def switch_ms(switch: Callable[[str], object]) -> float:
    """Median milliseconds of switching to and fro."""
    names = itertools.cycle(["a0", "a1"])
    return median_ms(lambda: switch(next(names)), runs=101)


def median_ms(work: Callable[[], object], runs: int = 5) -> float:
    """Median milliseconds of a call, after one that does not count."""
    work()
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e3


def folder_bytes(folder: Path) -> int:
    """All files of an adapter together."""
    return sum(path.stat().st_size for path in folder.iterdir())


if __name__ == "__main__":
    main()
