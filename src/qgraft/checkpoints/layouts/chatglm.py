"""ChatGLM's quantized folders: an int8 matrix and the scales of its rows beside it.

    chatglm-int8   X.weight int8 [out, in]        X.weight_scale float16 or float32 [out]
    chatglm-int4   X.weight int8 [out, in // 2]   X.weight_scale float16 or float32 [out]
    config.json    "quantization_bit": 4 or 8

Which of the two a matrix is, its width says: 8 bits where it is as wide as the layer, 4 where it is half as wide. config.json
says `quantization_bit` where all quantized matrices have the same number of bits; what it says must agree. The releases are
pickles; written are safetensors, with the same names. Any model can be kept so, not ChatGLM alone.

Source: ChatGLM-6B and ChatGLM2-6B, quantization.py and the published INT4 and INT8 folders.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qgraft.checkpoints.layouts.layout import Layout, StoredMatrix
from qgraft.errors import CheckpointError
from qgraft.formats import PackedTensor

BITS = {"chatglm-int4": 4, "chatglm-int8": 8}
_DATA, _SCALE = ".weight", ".weight_scale"


def stated_bits(config: Mapping[str, Any]) -> Any:
    """The bits that config.json says its weights have; None where it says nothing (0 means the same)."""
    return config.get("quantization_bit") or None


def _claims(config: Mapping[str, Any]) -> bool:
    return bool(stated_bits(config)) and not config.get("quantization_config")


def _holds(matrix: StoredMatrix) -> bool:
    data = matrix.tensor(_DATA)
    return data is not None and data.dtype == torch.int8 and data.dim() == 2


def _read(matrix: StoredMatrix, shape: tuple[int, int], _: bool) -> PackedTensor:
    data = matrix.tensor(_DATA)
    assert data is not None
    name, width, stated = matrix.name, shape[1], stated_bits(matrix.config)
    rows, bits = data.shape[0], 4 if data.shape[1] * 2 == width else 8
    if stated == 4 and width % 2:
        raise CheckpointError(f"{name}: config.json says quantization_bit=4, but the layer's {width} inputs are odd")
    if stated not in (None, bits):
        got = f"config.json says quantization_bit={stated!r}"
        raise CheckpointError(f"{name}: got int8 {list(data.shape)}, {bits} bits a weight, but {got}")
    return PackedTensor(f"chatglm-int{bits}", (rows, data.shape[1] * 8 // bits), (data, _read_scale(matrix, data)))


def _read_scale(matrix: StoredMatrix, data: Tensor) -> Tensor:
    """The row scales [out] of an int8 matrix."""
    name, scale = f"{matrix.name}_scale", matrix.tensor(_SCALE)
    if scale is None:
        raise CheckpointError(f"{matrix.name} holds int8 numbers, and {name} is missing beside it")
    expected = f"expected [{len(data)}] finite float16 or float32"
    if scale.shape != (len(data),) or scale.dtype not in (torch.float16, torch.float32):
        raise CheckpointError(f"{name}: got {scale.dtype} {list(scale.shape)}, {expected}")
    if not bool(scale.isfinite().all()):
        raise CheckpointError(f"{name}: got NaN or infinity, {expected}")
    lost = [row for row in (scale == 0).nonzero()[:, 0].tolist() if bool(data[row].any())]
    if lost:
        raise CheckpointError(f"{name}: got 0 for {len(lost)} rows that hold numbers (row {lost[0]}), {expected}")
    return scale


def _write(packed: PackedTensor, _: bool) -> dict[str, Tensor]:
    return dict(zip((_DATA, _SCALE), packed.parts, strict=True))


def _configure(config: Mapping[str, Any], formats: Sequence[str]) -> Mapping[str, Any]:
    bits = {BITS[format] for format in formats if format in BITS}
    wanted = bits.pop() if len(bits) == 1 else None
    if stated_bits(config) == wanted:
        return config
    others = {key: value for key, value in config.items() if key != "quantization_bit"}
    return others | ({"quantization_bit": wanted} if wanted else {})


LAYOUT = Layout(tuple(BITS), (_DATA, _SCALE), "int8 with scales", _claims, _holds, _read, _write, _configure)
