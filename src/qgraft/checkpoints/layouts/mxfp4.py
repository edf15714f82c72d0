"""The released gpt-oss: the experts of a layer in MXFP4, in two tensors for each of their parameters.

    X_blocks   uint8 [experts, out, in / 32, 16]   32 codes of E2M1, two neighbours a byte, the first in the low nibble
    X_scales   uint8 [experts, out, in / 32]       e, a code means 2^(e - 127) times its float of 4 bits
    config.json    "quantization_config": {"quant_method": "mxfp4", ...}

X is a parameter of transformers' experts, `gate_up_proj` or `down_proj`; floats are kept as `X` itself, [experts, in, out].
A block of GGUF's mxfp4 (formats/codebooks.py) has the same scale and the same codes in another order, weight j beside weight
j + 16; so reading and writing move nibbles and lose nothing. Scales of 255, NaN in OCP's specification and a number in
llama.cpp, are refused.

    byte        0     1    ...   7     8    ...    15
    X_blocks    0 1   2 3  ...  14 15  16 17 ...  30 31      low nibble, high nibble
    mxfp4       0 16  1 17 ...   7 23   8 24 ...  15 31

Source: openai/gpt-oss-20b on the hub, and `convert_moe_packed_tensors` of transformers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qgraft.checkpoints.layouts.layout import Layout, StoredMatrix
from qgraft.errors import CheckpointError
from qgraft.formats import PackedTensor

FORMAT = "mxfp4"
_BLOCKS, _SCALES = "_blocks", "_scales"
_KEY, _METHOD = "quantization_config", "quant_method"
_LEFT = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]  # as released


def is_stated(config: Mapping[str, Any]) -> bool:
    """Whether config.json says that experts are kept so."""
    stated = config.get(_KEY)
    return isinstance(stated, dict) and stated.get(_METHOD) == FORMAT


def _holds(matrix: StoredMatrix) -> bool:
    return matrix.tensor(_BLOCKS) is not None


def _read(matrix: StoredMatrix, shape: tuple[int, int], _: bool) -> PackedTensor:
    blocks, scales = matrix.tensor(_BLOCKS), matrix.tensor(_SCALES)
    assert blocks is not None
    name = matrix.name + _BLOCKS
    if not is_stated(matrix.config):
        raise CheckpointError(f"{name}: config.json says nothing of it, expected {_METHOD} {FORMAT!r} in {_KEY}")
    if blocks.dtype != torch.uint8 or blocks.dim() != 4 or blocks.shape[3] != 16:
        raise CheckpointError(
            f"{name}: got {blocks.dtype} {list(blocks.shape)}, expected uint8 [experts, out, in / 32, 16]"
        )
    expected = list(blocks.shape[:3])
    if scales is None:
        raise CheckpointError(f"{name} is there, and {matrix.name}{_SCALES} {expected} is missing beside it")
    if scales.dtype != torch.uint8 or list(scales.shape) != expected:
        raise CheckpointError(
            f"{matrix.name}{_SCALES}: got {scales.dtype} {list(scales.shape)}, expected uint8 {expected}"
        )
    if bool((scales == 255).any()):
        raise CheckpointError(f"{matrix.name}{_SCALES}: got 255, which is NaN, expected scales from 0 to 254")
    rows, width = expected[0] * expected[1], expected[2] * 32
    if (rows, width) != shape:
        raise CheckpointError(
            f"{name}: got matrices of {rows} x {width} numbers in all, expected {shape[0]} x {shape[1]}"
        )
    data = torch.cat([scales.unsqueeze(3), _to_halves(blocks)], 3)
    return PackedTensor(FORMAT, shape, (data.view(rows, -1),))


def _to_halves(blocks: Tensor) -> Tensor:
    """[..., 16] bytes of neighbours -> weight j beside weight j + 16."""
    first, second = blocks.split(8, -1)
    even, odd = first & 15 | second << 4, first >> 4 | second & 240
    return torch.stack([even, odd], -1).flatten(-2)


def _to_neighbours(codes: Tensor) -> Tensor:
    """The inverse of `_to_halves`."""
    even, odd = codes.unflatten(-1, (8, 2)).unbind(-1)
    return torch.cat([even & 15 | odd << 4, even >> 4 | odd & 240], -1)


def _write(packed: PackedTensor, _: bool) -> dict[str, Tensor]:
    data = packed.parts[0].view(packed.shape[0], -1, 17)
    return {_BLOCKS: _to_neighbours(data[..., 1:]), _SCALES: data[..., 0].contiguous()}


def _configure(config: Mapping[str, Any], formats: Sequence[str]) -> Mapping[str, Any]:
    if is_stated(config) == (FORMAT in formats):
        return config
    if is_stated(config):
        return {key: value for key, value in config.items() if key != _KEY}
    return {**config, _KEY: {_METHOD: FORMAT, "modules_to_not_convert": _LEFT}}


LAYOUT = Layout(
    (FORMAT,), (_BLOCKS, _SCALES), "mxfp4", is_stated, _holds, _read, _write, _configure, experts=True
)  # fmt: skip
