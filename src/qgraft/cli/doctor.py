"""qgraft doctor: versions, CPU features, and which kernel serves which op and format, and why.

What stops every other command, a library made from other sources or a misspelt variable, is told here with the rest.
"""

import os
import platform
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

from qgraft.cli.options import Parser, print_json
from qgraft.errors import QgraftError

T = TypeVar("T")

# Training of short rows, tokens/s beside PEFT in float32, by the level that the C library runs as: docs/guide-speed.md
MEASURED = {
    "avx2": "1.9 times the speed of PEFT in float32, 2.2 times with --compute int8 (Zen 3)",
    "avx512": "3.1 times the speed of PEFT in float32 (Zen 5 with --compute float32)",
    "avx512-vnni": "3.1 times the speed of PEFT in float32 (Zen 5 with --compute float32)",
    "avx512-bf16": "4.2 times the speed of PEFT in float32 (Zen 5)",
}

PACKAGES = ("qgraft", "torch", "transformers", "accelerate", "gguf", "safetensors", "datasets", "peft", "triton")


def run(words: Sequence[str]) -> int:
    """Parse, look, print."""
    parser = Parser("doctor", "Show versions, CPU features, and which kernel serves which op and format, and why.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(words)
    findings = examine()
    if options.json:
        print_json(findings)
    else:
        _print(findings)
    return 1 if findings["problem"] else 0


def examine() -> dict[str, Any]:
    """Everything the command shows, as JSON values."""
    import torch

    from qgraft.checkpoints.pull import cache_folder
    from qgraft.kernels import KERNELS_VARIABLE, LEVEL_VARIABLE, native_status
    from qgraft.kernels.choice import has_fast_bf16
    from qgraft.kernels.cpu.library import level
    from qgraft.kernels.triton_ops import triton_status
    from qgraft.kernels.varlen import status as varlen_status

    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    status = _answer(native_status)
    available, why = (False, str(status)) if isinstance(status, QgraftError) else status
    choices = _answer(lambda: [choice for device in devices for choice in _rows(device)])
    fast_bf16 = _answer(has_fast_bf16)
    kernels = [] if isinstance(choices, QgraftError) else [asdict(choice) for choice in choices]
    compiled = any(row["op"] == "linear" and row["kernel"] == "native" for row in kernels)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {package: _version(package) for package in PACKAGES},
        "cpu": {
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "fast_bfloat16": fast_bf16 is True,
            "measured": MEASURED.get(level()) if compiled else None,
        },
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "compute_dtype": {"cpu": "float32", "cuda": "bfloat16 where the GPU has it, else float16"},
        "native_kernels": {"available": available, "why": why},
        "triton_kernels": dict(zip(("available", "why"), triton_status(), strict=True)),
        "gpu_attention": dict(zip(("available", "why"), varlen_status(), strict=True)),
        "kernels_variable": {KERNELS_VARIABLE: os.environ.get(KERNELS_VARIABLE, "auto")},
        "cpu_level_variable": {LEVEL_VARIABLE: os.environ.get(LEVEL_VARIABLE, "the highest that is there")},
        "cache": str(cache_folder()),
        "problem": str(choices) if isinstance(choices, QgraftError) else None,
        "kernels": kernels,
    }


def _rows(device: str) -> Iterator[Any]:
    """What serves each row of the table of kernels, for each format where that matters, in what the device computes in."""
    import torch

    from qgraft.formats import FORMATS
    from qgraft.kernels import choose
    from qgraft.kernels.table import ROWS

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    for format in FORMATS:
        yield from (choose(row.name, format, device, dtype) for row in ROWS.values() if row.by_format)
    yield from (choose(row.name, None, device, dtype) for row in ROWS.values() if not row.by_format)


def _answer(ask: Callable[[], T]) -> T | QgraftError:
    """What is answered, or the error that it would stop with."""
    try:
        return ask()
    except QgraftError as error:
        return error


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _print(findings: dict[str, Any]) -> None:
    packages = ", ".join(f"{name} {number or '-'}" for name, number in findings["packages"].items())
    cpu = findings["cpu"]
    bf16 = "in hardware: training multiplies in it" if cpu["fast_bfloat16"] else "not in hardware, so never chosen"
    print(f"python {findings['python']} on {findings['platform']}")
    _print_wrapped(packages, indent=0)
    print(f"cpu    {cpu['capability']}, {cpu['threads']} threads, bfloat16 {bf16}")
    if cpu["measured"]:
        _print_wrapped(f"speed  training on a CPU of this kind ran at {cpu['measured']}; docs/guide-speed.md", indent=0)
    print(f"gpu    {findings['gpu'] or 'none'}")
    print(f"native {findings['native_kernels']['why']}")
    print(f"triton {findings['triton_kernels']['why']}")
    if findings["gpu"]:
        print(f"samples that share a pass on the GPU: {findings['gpu_attention']['why']}")
    print(f"cache  {findings['cache']}\n")
    if findings["problem"]:
        print(f"error: {findings['problem']}")
        return
    _print_rows(findings["kernels"])


def _print_rows(choices: list[dict[str, str]]) -> None:
    """For each device the rows with weights, a line for each format, and the others; then the reasons by their numbers."""
    reasons: dict[str, int] = {}

    def number(why: str) -> int:
        return reasons.setdefault(why, len(reasons) + 1)

    for device in dict.fromkeys(choice["device"] for choice in choices):
        mine = [choice for choice in choices if choice["device"] == device]
        _print_formats(device, [choice for choice in mine if choice["format"]], number)
        print(f"\n{device:<5}{'computation':<22}{'dtype':<10}{'kernel':<12}why")
        for choice in mine:
            if not choice["format"]:
                print(f"     {choice['op']:<22}{choice['dtype']:<10}{choice['kernel']:<12}{number(choice['why'])}")
        print()
    for why, its in reasons.items():
        _print_wrapped(f"{its:>3}  {why}", indent=5)


def _print_formats(device: str, choices: list[dict[str, str]], number: Callable[[str], int]) -> None:
    """A line for each format; and for each row that another reason serves than that of the line."""
    columns = {"dequantize": "dequantize", "linear": "linear", "linear_grad_input": "grad_input", "lora": "with LoRAs",
               "decode_step": "decode"}  # fmt: skip
    print(f"{device:<5}{'format':<13}{''.join(f'{name:<11}' for name in columns.values())}why")
    formats: dict[str, dict[str, dict[str, str]]] = {}
    for choice in choices:
        formats.setdefault(choice["format"], {})[choice["op"]] = choice
    others: dict[tuple[str, str], str] = {}  # (row, why) -> kernel
    for name, rows in formats.items():
        kernels = "".join(f"{rows[op]['kernel']:<11}" for op in columns)
        print(f"     {name:<13}{kernels}{number(rows['linear']['why'])}")
        others |= {(op, row["why"]): row["kernel"] for op, row in rows.items() if row["why"] != rows["linear"]["why"]}
    for (op, why), kernel in others.items():
        print(f"     {op}: {kernel}  {number(why)}")
    for op, does in (("linear_int8", "multiplies"), ("linear_grad_input_int8", "takes gradients")):
        by_8_bits = [name for name, rows in formats.items() if rows[op]["compute"] == "int8"]
        _print_wrapped(f"     compute=int8 {does} in 8 bits with {', '.join(by_8_bits) or 'none'}", indent=5)


def _print_wrapped(text: str, indent: int) -> None:
    print(textwrap.fill(text, 80, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False))
