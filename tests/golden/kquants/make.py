"""Write io.safetensors again: `pip install xllamacpp`, then `python make.py SmolLM2-135M-Instruct.Q4_1.gguf`."""

import ctypes
import sys
from pathlib import Path

import torch
import xllamacpp
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import save_file
from torch import Tensor

ROW_BYTES = {"q4_k": 144, "q5_k": 176, "q6_k": 210}  # of 256 weights


def by_llamacpp(w_OI: Tensor, name: str) -> Tensor:
    """[out, in] float32 -> [out, row_bytes] uint8 by `quantize_row_*_K_ref` of the compiled library."""
    library = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("*.so"))))
    w_OI = w_OI.float().contiguous()
    stored = torch.zeros(w_OI.shape[0], w_OI.shape[1] // 256 * ROW_BYTES[name], dtype=torch.uint8)
    function = getattr(library, f"quantize_row_{name[:-1]}K_ref")
    function.restype = None
    function(ctypes.c_void_p(w_OI.data_ptr()), ctypes.c_void_p(stored.data_ptr()), ctypes.c_int64(w_OI.numel()))
    return stored


def sources(model: Path) -> dict[str, Tensor]:
    """The matrices by name, float32."""
    generator = torch.Generator().manual_seed(3)

    def normal(rows: int, width: int = 512) -> Tensor:
        return torch.randn(rows, width, generator=generator)

    def some(share: float, run: int) -> Tensor:
        """[4, 512] of zeros and ones, `share` of them ones, in runs of `run`."""
        return (torch.rand(4, 512 // run, generator=generator) < share).float().repeat_interleave(run, dim=1)

    tensors = {each.name: each for each in GGUFReader(model).tensors}
    real = [tensors[f"blk.{layer}.ffn_down.weight"] for layer in (0, 14, 29)]
    exponents = torch.rand(4, 16, generator=generator) * 20 - 10
    constants = torch.tensor([1.5, -0.3, 1e-9, 7e4, -7e4, -1e8])[:, None]
    return {
        "real": torch.cat([torch.from_numpy(dequantize(each.data[:3], each.tensor_type)) for each in real]),
        "normal": normal(24),
        "scales apart": normal(4) * exponents.exp().repeat_interleave(32, dim=1),
        "scales apart, runs of 16": normal(4, 256) * exponents.exp().repeat_interleave(16, dim=1),
        "outliers": normal(4) * (1 + 1000 * some(0.01, 1)),
        "sparse": normal(4) * some(0.05, 1),
        "runs of zeros": normal(4) * some(0.5, 32),
        "positive": normal(4).abs() + 1,
        "negative": -normal(4).abs() - 1,
        "whole numbers": (normal(4) * 4).round(),
        "two values": some(0.5, 1),
        "almost constant": -1000 + normal(4) * 1e-4,
        "constant": constants.expand(6, 512).clone(),
        "zero": torch.zeros(1, 512),
        "negative zero": -torch.zeros(1, 512),
        "range overflows": torch.tensor([[3e38, -3e38, 0.0, 1.0] * 64]),
    } | {
        f"times {size:g}": normal(2) * size for size in (1e-44, 1e-38, 1e-20, 1e-15, 1e-12, 1e-7, 1e-5, 6e4, 1e12, 1e37)
    }


def main() -> None:
    golden = {}
    for name, w_OI in sources(Path(sys.argv[1])).items():
        golden[f"{name}/w"] = w_OI
        golden |= {f"{name}/{format}": by_llamacpp(w_OI, format) for format in ROW_BYTES}
    save_file(golden, Path(__file__).with_name("io.safetensors"))


if __name__ == "__main__":
    main()
