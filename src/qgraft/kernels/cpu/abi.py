"""What C is handed: the numbers of formats, the structures and the arguments of the library's functions.

ctypes checks nothing, so everything here is compared with the C sources by tests/kernels/cpu/test_abi.py, and the library
carries the hash of the sources that it was made from (sources.py).
"""

import ctypes
from collections.abc import Sequence

from torch import Tensor

FORMAT_IDS = {  # as in formats.h; float32 needs no unpacking, so the reference serves it
    "q4_0": 0, "q4_1": 1, "q5_0": 2, "q5_1": 3, "q8_0": 4, "chatglm-int8": 5, "chatglm-int4": 6, "f16": 7, "bf16": 8,
    "q4_k": 9, "q5_k": 10, "q6_k": 11, "iq4_nl": 12, "iq4_xs": 13, "mxfp4": 14, "nvfp4": 15, "q2_k": 16, "q3_k": 17,
    "tq1_0": 18, "tq2_0": 19, "iq1_s": 20, "iq1_m": 21, "iq2_xxs": 22, "iq2_xs": 23, "iq2_s": 24, "iq3_xxs": 25, "iq3_s": 26,
}  # fmt: skip
FLOATS = 27  # F32 of formats.h: float32 of a LoRA, of a router
# Products in 8 bits, as in formats.h: has_int8, on every level; has_int8_gradient, on AVX2.
INT8_FORMATS = (
    "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "chatglm-int8", "chatglm-int4", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs",
    "mxfp4", "nvfp4",
)  # fmt: skip
_OF_8_BITS = ("q8_0", "chatglm-int8", "iq4_nl", "iq4_xs")  # codes, or the levels that they stand for
INT8_GRADIENT_FORMATS = tuple(name for name in INT8_FORMATS if name not in _OF_8_BITS)
ROUNDINGS = ("float32", "bf16", "int8")  # of a product, as in linear.c

_pointer, _i64 = ctypes.c_void_p, ctypes.c_int64


class LoraTerm(ctypes.Structure):
    """One LoRA on the tokens start:stop of a layer, as in linear.c, where each field is explained."""

    _fields_ = [
        *((name, _i64) for name in ("start", "stop", "rank")),
        ("scaling", ctypes.c_double),
        *((name, _pointer) for name in ("A", "B", "x", "h", "gh", "grad_A", "grad_B")),
        ("adds", _i64),
    ]


class LinearCall(ctypes.Structure):
    """A packed layer and what goes through it, as in linear.c."""

    _fields_ = [
        *((name, _i64) for name in ("format", "rows", "columns", "m", "rounding", "terms")),
        *((name, _pointer) for name in ("data", "scales", "bias", "input", "output", "scratch")),
        ("term", ctypes.POINTER(LoraTerm)),
    ]


class Strided(ctypes.Structure):
    """Numbers of heads and tokens: strides in numbers, channels next to each other."""

    _fields_ = [("data", _pointer), ("token", _i64), ("head", _i64)]


class Attention(ctypes.Structure):
    """Attention of samples that share a row, as in level.h."""

    _fields_ = [
        *((name, Strided) for name in ("q", "k", "v", "front_k", "front_v")),
        *((name, _i64) for name in ("heads", "groups", "channels", "tokens", "samples", "prefix", "window")),
        ("bounds", _pointer),
        ("contexts", _pointer),
        ("scale", ctypes.c_double),
    ]


class Linear(ctypes.Structure):
    """One packed layer with its bias, as in decode.c."""

    _fields_ = [
        *((name, _i64) for name in ("format", "rows", "columns", "int8")),
        *((name, _pointer) for name in ("data", "scales", "bias")),
    ]


class Experts(ctypes.Structure):
    """The experts of a layer, as in decode_thread.h, where each field is explained."""

    _fields_ = [
        *((name, Linear) for name in ("gate", "up", "down")),
        *((name, _pointer) for name in ("gate_bias", "up_bias", "router", "router_bias", "correction")),
        *((name, _i64) for name in ("bias_step", "experts", "chosen", "scores", "expert_groups", "kept_groups")),
        ("normalized", _i64),
        ("clamped", _i64),
        *((name, ctypes.c_double) for name in ("least_sum", "added_to_sum", "scaling", "limit", "alpha")),
    ]


class DecoderLayer(ctypes.Structure):
    """One layer of the decoder. keys and values: [groups, capacity, channels] float32; window: 0 for none."""

    _fields_ = [
        *((name, Linear) for name in ("q", "k", "v", "o", "gate", "up", "shared_gate", "down")),
        *((name, _pointer) for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm", "sinks", "keys", "values")),
        ("experts", ctypes.POINTER(Experts)),
        ("window", _i64),
    ]


class Decoder(ctypes.Structure):
    """The decoder. capacity: slots of the memory of keys and values."""

    _fields_ = [
        *((name, _i64) for name in ("layers", "hidden", "inner", "heads", "groups", "channels", "capacity")),
        *((name, _i64) for name in ("rotated", "pairs", "wide_norms")),
        *((name, ctypes.c_double) for name in ("epsilon", "scale", "residual")),
        ("norm", _pointer),
        ("layer", ctypes.POINTER(DecoderLayer)),
    ]


class Lora(ctypes.Structure):
    """A [rank, columns] and B [rows, rank] of one adapter in one layer of a decoder, or of each expert."""

    _fields_ = [("A", _pointer), ("B", _pointer), ("rank", _i64), ("step", _i64), ("scaling", ctypes.c_double)]


class Loras(ctypes.Structure):
    """The adapters on one layer."""

    _fields_ = [("count", _i64), ("lora", ctypes.POINTER(Lora))]


class DecoderPart(ctypes.Structure):
    """Rows that follow each other and have the same adapters: [layers, places] Loras, or none."""

    _fields_ = [("loras", ctypes.POINTER(Loras)), ("rows", _i64)]


class DecoderRow(ctypes.Structure):
    """A token: the slots of its text, how many of them it sees, how many in front are a prefix's."""

    _fields_ = [("slots", _pointer), ("seen", _i64), ("front", _i64)]


def declare(library: ctypes.CDLL) -> None:
    """Say which arguments the functions take and what they give."""
    i32 = ctypes.c_int
    arguments: dict[str, Sequence[type]] = {
        "qgraft_dequantize": [i32, _pointer, _pointer, _i64, _i64, _pointer, i32],
        "qgraft_dequantize_bf16": [i32, _pointer, _pointer, _i64, _i64, _pointer, i32],
        "qgraft_linear": [_pointer, _i64, i32, i32],
        "qgraft_norm": [_pointer, _pointer, ctypes.c_float, _i64, _i64, _pointer, _pointer, i32],
        "qgraft_normalized": [_pointer, _pointer, _pointer, _i64, _i64, _pointer, i32],
        "qgraft_norm_backward": [_pointer, _pointer, _pointer, _pointer, _i64, _i64, _pointer, i32],
        "qgraft_gated": [i32, _pointer, _pointer, i32, _i64, _pointer, _pointer, _pointer, i32],
        "qgraft_gated_backward": [i32, _pointer, _pointer, _pointer, i32, _i64, _pointer, _pointer, i32],
        "qgraft_rotate": [
            i32, *[_pointer, _i64, _i64, _i64] * 2, _pointer, _pointer, _i64, _i64, _i64, _pointer, _pointer, i32,
        ],
        "qgraft_decode_rows": [_pointer, _pointer, _i64, _pointer, _i64, _pointer, _pointer, _pointer, i32],
        "qgraft_varlen_attention": [_pointer, _pointer, _pointer, i32],
        "qgraft_varlen_attention_backward": [*[_pointer] * 9, i32],
        "qgraft_descend": [*[_pointer] * 4, _i64, _i64, i32, i32, _pointer, i32],
        "qgraft_level_name": [i32],
        "qgraft_use_level": [i32],
    }  # fmt: skip
    for name, types in arguments.items():
        getattr(library, name).argtypes = types
    library.qgraft_level_name.restype = ctypes.c_char_p


def pointer(tensor: Tensor | None) -> int | None:
    """Where the tensor's first number lies; None for no tensor."""
    return None if tensor is None else tensor.data_ptr()
