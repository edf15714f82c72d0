"""Compile the Triton kernels for GPUs that are not there: python tests/kernels/compile_triton.py 90 [80:FORMAT,FORMAT ...]

Prints registers, spilled bytes and shared memory of each; exits with 1 where one does not compile, spills, needs more
shared memory than a block of that GPU has, or multiplies matrices of bfloat16 without the instructions for it. The tools
come with triton.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qgraft.kernels import (
    gpu_decode,
    gpu_experts,
    triton_blocks,
    triton_decoding,
    triton_experts,
    triton_gemv,
    triton_ops,
    triton_rows,
)

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED = {80: 163 << 10, 90: 227 << 10, 120: 99 << 10}  # bytes a block may have
Case = tuple[str, Any, dict[str, Any], dict[str, Any], int]


def compiled(kernel: Any, arguments: dict[str, Any], constants: dict[str, Any], warps: int, level: int) -> Any:
    """As the launcher would: pointers, and whole numbers that 16 divides, are known to be so, and a 1 is compiled in."""
    signature, attributes, values = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[index,] = "constexpr", constants[name]
            continue
        given = arguments[name]
        if given == 1:
            signature[name], values[index,] = "constexpr", 1
            continue
        signature[name] = "i32" if isinstance(given, int) else given
        if (isinstance(given, int) and given % 16 == 0) or (isinstance(given, str) and given.startswith("*")):
            attributes[index,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=values, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", level, 32), options={"num_warps": warps})


def resources(kernel: Any, level: int) -> tuple[int, int, int, bool]:
    """(registers of a thread, bytes spilled, bytes of shared memory, whether matrices are multiplied by tensor cores)."""
    code = kernel.asm["ptx"]
    target = re.search(r"\.target (sm_\w+)", code)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(code)
        assembler = TOOLS / ("ptxas-blackwell" if level >= 100 else "ptxas")
        words = [str(assembler), "-v", f"--gpu-name={target[1]}", str(path), "-o", str(path) + ".cubin"]
        log = subprocess.run(words, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", log)
    assert registers is not None, log
    return (
        int(registers[1]),
        sum(map(int, re.findall(r"(\d+) bytes spill", log))),
        int(kernel.metadata.shared),
        "mma" in code,
    )


def cases(formats: tuple[str, ...], experts: bool) -> Iterator[Case]:
    """Each kernel as it is launched for a model of 7 billion weights."""
    for format in formats:
        size, run, units = triton_ops.UNITS[format]
        block = size * 4096 // (2 * run * units)
        p16, beside = ("*u8", "*fp32") if format.startswith("chatglm") else ("*fp16", "*i8")
        shared = {
            "p8": "*u8",
            "p16": p16,
            "beside": beside,
            "rows": 4096,
            "units": 2048 // run,
            "row_bytes": block,
            "K": 4096,
        }
        same = {"F": format, "RUN": run, "EXACT": False}
        yield ("unpack " + format, triton_blocks.dequantize_kernel, shared | {"out": "*bf16", "ld": 4112},
               same | {"BR": 4, "NU": 1024 // run}, 8)  # fmt: skip
        some_rows, some_units, warps = triton_ops.tile(format)
        more = {"bias": "*bf16", "residual": "*fp32", "table": "*i64", "h": "*fp32", "ld": 4096}
        tile = same | {"BN": some_rows, "NU": some_units}
        for name, kind, extra in (("gemv", "*bf16", False), ("gemv with a LoRA", "*fp32", True)):
            yield (f"{name} {format}", triton_gemv.gemv_kernel, shared | more | {"x": kind, "y": kind},
                   tile | {"BIAS": extra, "ADD": extra, "NA": int(extra), "R": 16 * extra}, warps)  # fmt: skip
        few = {"x": "*bf16", "y": "*bf16", "experts": "*i64", "y_row": 4096, "y_column": 1}
        yield (f"few rows {format}", triton_experts.few_kernel, shared | few,
               same | {"BN": some_rows, "NU": some_units, "ADD": True}, warps)  # fmt: skip
    yield from decoding_cases()
    if experts:
        yield from expert_cases()
    wide = {"BLOCK": 4096, "EXACT": False}
    norm = {"x": "*bf16", "w": "*bf16", "y": "*bf16", "r": "*fp32", "H": 4096, "eps": "fp32"}
    yield "norm", triton_rows.norm_kernel, norm, wide | {"KNOWN": False}, 8
    yield ("norm backward", triton_rows.norm_backward_kernel,
           {"g": "*bf16", "x": "*bf16", "w": "*bf16", "r": "*fp32", "gx": "*bf16", "H": 4096}, wide, 8)  # fmt: skip
    for act in (0, 1, 2):
        flat = {"BLOCK": 1024, "EXACT": False, "ACT": act}
        gated = {"gate": "*bf16", "up": "*bf16", "n": 1 << 20}
        yield f"gated {act}", triton_rows.gated_kernel, gated | {"h": "*bf16"}, flat, 4
        yield (f"gated backward {act}", triton_rows.gated_backward_kernel,
               gated | {"g": "*bf16", "g_gate": "*bf16", "g_up": "*bf16"}, flat, 4)  # fmt: skip
    turned = {"x": "*bf16", "y": "*bf16", "cos": "*bf16", "sin": "*bf16", "stride_head": 128, "stride_token": 4096,
              "heads": 32, "channels": 128, "width": 128}  # fmt: skip
    for rest in (0, 64):
        yield (f"rotate, {rest} copied", triton_rows.rotate_kernel, turned,
               {"BACKWARD": False, "BH": 16, "HALF": 64, "REST": rest, "EXACT": False}, 4)  # fmt: skip
    yield ("loss", triton_rows.loss_kernel,
           {"z": "*bf16", "target": "*i64", "losses": "*fp32", "V": 32000, "stride": 32000, "smoothing": "fp32"},
           {"BLOCK": 4096, "EXACT": False}, 8)  # fmt: skip


def decoding_cases() -> Iterator[Case]:
    """The other kernels of a step of decoding: 32 heads of 128 channels, keys and values in bfloat16."""
    lora = {"table": "*i64", "h": "*fp32"}
    one = {"NA": 1, "R": 16}
    yield ("down", triton_gemv.down_kernel, lora | {"x": "*fp32", "M": 16, "K": 4096}, one | {"BLOCK": 2048}, 4)
    yield ("add", triton_gemv.add_kernel,
           lora | {"product": "*bf16", "y": "*fp32", "bias": "*bf16", "residual": "*fp32", "rows": 4096, "ld": 4096},
           one | {"BLOCK": 512, "BIAS": True, "ADD": True}, 4)  # fmt: skip
    texts = {"places": "*i64", "shape": "*i64", "rows": "*i64", "slots": "*i64", "S": 256}
    heads = {"H": 32, "G": 8, "D": 128, "KV": tl.bfloat16}
    yield ("rotate new tokens", triton_decoding.rotate_kernel,
           texts | {"qkv": "*fp32", "q_norm": "*bf16", "k_norm": "*bf16", "cos": "*fp32", "sin": "*fp32", "q": "*fp32",
                    "eps": "fp32"}, heads | {"HALF": 64, "NORM": True, "EXACT": False}, 1)  # fmt: skip
    split = {"WIDE": 128, "SPLITS": 16}
    yield ("attend", triton_decoding.attend_kernel,
           texts | {"q": "*fp32", "parts": "*fp32", "window": 4096, "scale": "fp32"},
           heads | split | {"BLOCK": gpu_decode.BLOCK}, 4)  # fmt: skip
    yield "join", triton_decoding.join_kernel, {"parts": "*fp32", "y": "*fp32", "H": 32}, split | {"D": 128}, 1


def expert_cases() -> Iterator[Case]:
    """128 experts of 768 inner numbers in a model of 2048, LoRAs of rank 16: few rows an expert, and many."""
    bounds = {"bounds": "*i64", "tokens": "*i64", "first": 16, "last": 32}
    for dtype, name in ((torch.bfloat16, "*bf16"), (torch.float32, "*fp32")):
        sizes = {"E": 128, "x_row": 2048, "y_row": 1536, "y_column": 1, "w_expert": 1 << 20}
        for rows, N, K, strides in ((4, 768, 2048, (2048, 1)), (512, 768, 2048, (2048, 1)), (512, 2048, 768, (1, 2048)),
                                    (512, 16, 2048, (2048, 1)), (512, 768, 16, (16, 1))):  # fmt: skip
            BM, BN, BK, warps = gpu_experts._tile(rows, N, K, dtype)
            given = (
                bounds | sizes | {"x": name, "w": name, "y": name, "N": N, "K": K, "w_n": strides[0], "w_k": strides[1]}
            )
            tile = {"EP": 128, "BM": BM, "BN": BN, "BK": BK, "ADD": True, "SOME": True, "EXACT": False}
            yield f"experts {name} {rows} {N} {K}", triton_experts.grouped_kernel, given, tile, warps
        for M, N in ((16, 2048), (768, 16)):
            BM, BN, BK, warps = gpu_experts._tile(M, N, 512, dtype)
            given = bounds | {
                "a": name,
                "b": name,
                "out": "*fp32",
                "scaling": "fp32",
                "M": M,
                "N": N,
                "a_row": M,
                "b_row": N,
            }
            tile = {"BM": BM, "BN": BN, "BK": BK, "SOME": True, "EXACT": False}
            yield f"experts' LoRA {name} {M} {N}", triton_experts.outer_kernel, given, tile, warps


def main(words: list[str]) -> int:
    """0 where all is well. Each word is a level, with all kernels; or with those of the formats behind a colon, and of
    experts where it ends in `:experts`."""
    bad = 0
    for word in words:
        number, formats, more = (*word.split(":"), "", "")[:3]
        level, wanted = int(number), tuple(formats.split(",")) if formats else tuple(triton_ops.UNITS)
        for name, kernel, arguments, constants, warps in cases(wanted, experts=not formats or more == "experts"):
            registers, spilled, shared, cores = resources(compiled(kernel, arguments, constants, warps, level), level)
            wrong = (
                bool(spilled) or shared > SHARED[level] or (name.startswith("experts") and "bf16" in name and not cores)
            )
            bad += wrong
            print(f"sm_{level} {name:30} {registers:4} registers {spilled:5} spilled {shared:6} shared{' <--' * wrong}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
