"""Folders of plain numbers, as transformers saves them.

    f32 f16 bf16   X.weight [out, in] in that dtype; [in, out] in transformers' Conv1D

config.json says nothing of it. This layout comes last in the table: what no other layout holds is plain numbers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qgraft.checkpoints.layouts.layout import WEIGHT, Layout, StoredMatrix
from qgraft.formats import PackedTensor

_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def _claims(config: Mapping[str, Any]) -> bool:
    quantization = config.get("quantization_config") or {}
    return not quantization.get("quant_method")


def _holds(matrix: StoredMatrix) -> bool:
    return True


def _read(matrix: StoredMatrix, _: tuple[int, int], transposed: bool) -> Tensor:
    return matrix.numbers().T.contiguous() if transposed else matrix.numbers()


def _write(packed: PackedTensor, transposed: bool) -> dict[str, Tensor]:
    w_OI = packed.parts[0].view(_DTYPES[packed.format])
    return {WEIGHT: w_OI.T.contiguous() if transposed else w_OI}


def _configure(config: Mapping[str, Any], _: Sequence[str]) -> Mapping[str, Any]:
    return config


LAYOUT = Layout(tuple(_DTYPES), (WEIGHT,), None, _claims, _holds, _read, _write, _configure)
