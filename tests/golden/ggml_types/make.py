"""Write io.safetensors again: `pip install libgguf==0.2.2`, then `python make.py`."""

from pathlib import Path

import libgguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file, save_file

WRITTEN = ("iq4_nl", "iq4_xs", "mxfp4", "nvfp4")
READ = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "tq1_0", "tq2_0", *WRITTEN)
BLOCKS = 6  # of 256 weights


def main() -> None:
    here, golden = Path(__file__).parent, {}
    for name, w_OI in load_file(here.with_name("kquants") / "io.safetensors").items():
        if name.endswith("/w"):
            for type_name in WRITTEN:
                qtype = GGMLQuantizationType[type_name.upper()]
                raw = libgguf.quantize_rows_raw(qtype, w_OI.contiguous().numpy(), *w_OI.shape, None)
                golden[f"{name[:-2]}/{type_name}"] = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(
                    len(w_OI), -1
                )
    generator = torch.Generator().manual_seed(0)
    for type_name in READ:
        qtype, width = GGMLQuantizationType[type_name.upper()], 256 * BLOCKS
        data = torch.randint(0, 256, (1, libgguf.row_size(qtype, width)), dtype=torch.uint8, generator=generator)
        golden[f"bytes/{type_name}"] = data
        values = np.frombuffer(libgguf.dequantize_rows_raw(qtype, data.numpy(), 1, width), np.float32)
        golden[f"values/{type_name}"] = torch.from_numpy(values.copy()).view(1, width)
    save_file(golden, here / "io.safetensors")


if __name__ == "__main__":
    main()
