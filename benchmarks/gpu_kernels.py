"""The kernels of a GPU, in microseconds beside plain torch and cuBLAS: lines of gpu_kernels.csv.

    python benchmarks/gpu_kernels.py --out results [--seconds 60]

unpack     packed weights to bfloat16: Triton, and plain torch
product    y = x W^T for M rows of x and packed q4_1: the op, cuBLAS on weights that are in bfloat16 already
rows       norms, gated products, rotations, the loss of logits
"""

import argparse
import csv
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from triton.testing import do_bench

from qgraft.formats import FORMATS, PackedTensor, quantize
from qgraft.formats import dequantize as format_dequantize
from qgraft.kernels import dequantize, linear, pointwise, reference, triton_ops
from qgraft.kernels.lora import lora_backward, lora_forward
from qgraft.kernels.terms import Term, Weight

ROWS: list[dict[str, Any]] = []
SOME = 64


def timed(function: Callable[[], Any]) -> float:
    """The median in microseconds."""
    return round(1e3 * do_bench(function, warmup=10, rep=40, return_mode="median"), 1)


def say(**row: Any) -> None:
    """A line, kept and printed."""
    ROWS.append(row)
    print(" ".join(f"{name}={value}" for name, value in row.items()), flush=True)


def weights(format: str, rows: int, columns: int) -> PackedTensor:
    """Random ones of a format, SOME rows again and again; bytes at random where it is only read, with NaN among them."""
    if FORMATS[format].quantize is not None:  # on a GPU some formats take seconds for a million weights
        some = quantize(torch.randn(SOME, columns, device="cuda") * 0.02, format)
        parts = (part.repeat(rows // SOME, *[1] * (part.dim() - 1)) for part in some.parts)
        return PackedTensor(format, (rows, columns), tuple(parts))
    data = torch.randint(0, 256, FORMATS[format].parts[0].shape(rows, columns), dtype=torch.uint8, device="cuda")
    return PackedTensor(format, (rows, columns), (data,))


def unpacking() -> None:
    """Every format; bytes moved over time is what memory gives."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    us = timed(lambda: target.copy_(source))
    say(what="copy", us=us, tb_per_s=round(2 * source.numel() / us / 1e6, 2))
    for format in triton_ops.UNITS:
        packed = weights(format, 11008, 4096)
        us = timed(lambda packed=packed: dequantize(packed, torch.bfloat16))
        moved = packed.nbytes + 2 * 11008 * 4096
        plain = timed(lambda packed=packed: format_dequantize(packed, torch.bfloat16)) if format == "q4_1" else ""
        say(what="unpack", format=format, us=us, torch_us=plain, tb_per_s=round(moved / us / 1e6, 2))


def products() -> None:
    """The op, and a layer with a LoRA on it, forward and backward."""
    packed, B, A = weights("q4_1", 4096, 4096), torch.randn(4096, 16).cuda(), torch.randn(16, 4096).cuda()
    unpacked = dequantize(packed, torch.bfloat16)
    for tokens in (1, 2, 8, 64, 512, 2048, 8192, 16384):
        x, g = (torch.randn(tokens, 4096, device="cuda").bfloat16() for _ in range(2))
        row = {"cublas_us": timed(lambda x=x: x @ unpacked.T), "us": timed(lambda x=x: linear(x, packed))}
        if tokens > triton_ops.FEW_ROWS:
            term, base = Term(0, tokens, 1.0, A, B, x), Weight(packed, None, "float32")
            hs = lora_forward(x, base, [term])[1]
            row["lora_us"] = timed(lambda x=x, term=term, base=base: lora_forward(x, base, [term]))
            row["lora_backward_us"] = timed(lambda g=g, term=term, base=base, hs=hs: lora_backward(g, base, [term], hs))
        say(what="product", format="q4_1", rows=tokens, **row)


def rows() -> None:
    """What a step computes beside products, 8192 tokens of a 7B's shape."""
    x, weight = torch.randn(8192, 4096, device="cuda").bfloat16(), torch.randn(4096, device="cuda").bfloat16()
    _, r = pointwise.norm(x, weight, 1e-5)
    norm = torch.nn.functional.rms_norm
    say(
        what="norm", us=timed(lambda: pointwise.norm(x, weight, 1e-5)), torch_us=timed(lambda: norm(x, (4096,), weight))
    )
    say(what="norm backward", us=timed(lambda: pointwise.norm_backward(x, x, weight, r)))
    gate, up = (torch.randn(8192, 11008, device="cuda").bfloat16() for _ in range(2))
    act = pointwise.ACTIVATIONS[0]
    plain = timed(lambda: torch.nn.functional.silu(gate) * up)
    say(what="gated", us=timed(lambda: pointwise.gated(act, gate, up)), torch_us=plain)
    say(what="gated backward", us=timed(lambda: pointwise.gated_backward(act, gate, gate, up)))
    q = torch.randn(1, 8192, 32, 128, device="cuda").bfloat16().transpose(1, 2)
    cos, sin = (torch.randn(1, 8192, 128, device="cuda").bfloat16() for _ in range(2))
    plain = timed(lambda: reference._rotated(q, cos, sin, False))
    say(what="rotate q and k", us=timed(lambda: pointwise.rotate(q, q, cos, sin)), torch_us=2 * plain)
    from qgraft.kernels.gpu_rows import loss_to_gradient

    logits, targets = torch.randn(4096, 32000, device="cuda").bfloat16(), torch.randint(0, 32000, (4096,)).cuda()
    plain = timed(lambda: reference.loss_to_gradient(logits.float(), targets, 0.0).sum())
    say(what="loss of 4096 x 32000", us=timed(lambda: loss_to_gradient(logits, targets, 0.0)), torch_us=plain)


def main() -> None:
    """All of it, as far as the time goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=".")
    parser.add_argument("--seconds", type=float, default=60)
    options = parser.parse_args()
    begun = time.time()
    torch.manual_seed(0)
    try:
        for part in (unpacking, rows, products):
            if time.time() - begun < options.seconds:
                part()
    finally:  # what there is, if it is cut
        write(Path(options.out) / "gpu_kernels.csv")


def write(path: Path) -> None:
    """The lines so far."""
    keys = list(dict.fromkeys(["device", "torch", "triton", *(key for row in ROWS for key in row)]))
    device = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton_ops.triton_status()[1],
    }
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, keys)
        writer.writeheader()
        writer.writerows(device | row for row in ROWS)


if __name__ == "__main__":
    main()
