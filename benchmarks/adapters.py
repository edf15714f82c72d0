"""Many adapters on SmolLM2-135M Q4_1: switching, loading, files, and batches whose rows use different ones; beside PEFT.

    python benchmarks/adapters.py [--without-peft]

    switch        use_adapter between two of 2 and of 100 attached adapters (r=8 on all 210 linear layers)
    load          load_adapter for the first and the hundredth, from files that the page cache holds
    files         an adapter's folder in float32 and float16, and a small one (r=4, q and v only)
    memory        growth of the process for each further adapter
    batches       8 rows of 32 tokens with four adapters: in one call, and adapter by adapter; and the base alone

PEFT runs on the dequantized float32 model, with 2 adapters: set_adapter, and such a batch. Written to
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
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

import qgraft
from qgraft.adapters.base import find_adapter

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
        load = partial(qgraft.load_adapter, model, temporary / "large", f"a{number}")
        loads.append(seconds(load))
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

    def apart() -> None:
        for name in sorted(set(names(4))):
            qgraft.use_adapter(model, name)
            model(ids[[row for row, used in enumerate(names(4)) if used == name]])

    def base() -> None:
        qgraft.use_adapter(model, None)
        model(ids)

    works = {
        "batch with four adapters, one call": lambda: model(ids, adapter_names=names(4)),
        "batch with four adapters, one by one": apart,
        "batch with two adapters, one call": lambda: model(ids, adapter_names=names(2)),
        "same batch, base alone": base,
    }
    figures += [(measure, value, "ms") for measure, value in best_ms(works).items()]
    return [("qgraft", *figure) for figure in figures]


def measure_peft(temporary: Path) -> list[tuple[str, str, float, str]]:
    """PEFT, on the model that transformers dequantizes."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    path = qgraft.pull("smollm2-135m")
    base = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, temporary / "large", adapter_name="a0").eval()
    model.load_adapter(temporary / "large", adapter_name="a1")
    figures = [("switch, 2 attached", switch_ms(model.set_adapter), "ms")]
    ids = torch.randint(4, 1000, (ROWS, TOKENS))
    works = {"batch with two adapters, one call": lambda: model(ids, adapter_names=names(2))}
    figures += [(measure, value, "ms") for measure, value in best_ms(works).items()]
    return [("peft", *figure) for figure in figures]


def names(adapters: int) -> list[str]:
    """The adapters of the rows, in turn."""
    return [f"a{row % adapters}" for row in range(ROWS)]


def save_some(model: Any, temporary: Path) -> None:
    """Adapters with an effect, of two sizes, in files; none stays attached."""
    for name, options in (("large", {"r": 8}), ("small", SMALL)):
        qgraft.attach_lora(model, name=name, **options)
        for lora in find_adapter(model, name).parts.values():
            torch.nn.init.normal_(lora.lora_B, 0, 0.01)
    qgraft.save_adapter(model, temporary / "large", "large")
    qgraft.save_adapter(model, temporary / "half", "large", dtype="float16")
    qgraft.save_adapter(model, temporary / "small", "small", dtype="float16")
    qgraft.detach_lora(model)


def switch_ms(switch: Callable[[str], object]) -> float:
    """Median milliseconds of switching to and fro."""
    turns = itertools.cycle(["a0", "a1"])
    return statistics.median(seconds(lambda: switch(next(turns))) for _ in range(201)) * 1e3


@torch.inference_mode()
def best_ms(works: dict[str, Callable[[], object]], rounds: int = 7) -> dict[str, float]:
    """Milliseconds of each in the best of some rounds, in which they take turns: others may use the machine as well."""
    times = [{name: seconds(work) for name, work in works.items()} for _ in range(rounds)]
    return {name: min(measured[name] for measured in times) * 1e3 for name in works}


def seconds(work: Callable[[], object]) -> float:
    """Of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def folder_bytes(folder: Path) -> int:
    """All files of an adapter together."""
    return sum(path.stat().st_size for path in folder.iterdir())


if __name__ == "__main__":
    main()
