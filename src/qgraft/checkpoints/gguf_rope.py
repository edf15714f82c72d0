"""The rotations that a GGUF file states, in transformers' words and, where these lack one, in the model's own module.

    theta_i = position / factor * base^(-2i/d) / f_i        f_i from rope_freqs.weight (Llama 3.1) or longrope's tensors
    cos, sin of theta_i, both times attn_factor

yarn divides slow frequencies by the factor and leaves fast ones (beta_fast, beta_slow, original_context_length), and its
cos and sin have a factor of their own, 1 + ln(factor) / 10, on which attn_factor comes. Converters write what a model's
authors chose beside that as yarn_beta_fast, yarn_beta_slow, yarn_attn_factor; llama.cpp passes over these for the
architectures here, transformers does not, and the authors' model is followed. So it is for gpt-oss, whose ramp between
fast and slow frequencies begins and ends between two of them, and not at one.

longrope (Phi-3) has a list of f for short texts and one for long ones. As in the authors' code the length of the text
decides, which is long when it is longer than original_context_length; llama.cpp goes by the context of its session, and
computes a short text in a long session with the long list.
"""

import math
from typing import Any

import torch
from torch import Tensor

from qgraft.checkpoints.gguf_file import GgufFile
from qgraft.checkpoints.gguf_header import Header
from qgraft.checkpoints.gguf_keys import TABLE
from qgraft.errors import CheckpointError
from qgraft.formats import PackedTensor, dequantize

FREQS = "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
_LAYERS = ("", "full_attention_", "sliding_attention_")  # gemma3 has rotations for two kinds of layers


def floats(file: GgufFile, name: str) -> Tensor:
    """The tensor `name` of any shape and format as float32."""
    info = file.tensors[name]
    flat = PackedTensor(info.format, (1, math.prod(info.shape)), (file.tensor(name).view(torch.uint8).view(1, -1),))
    return dequantize(flat, torch.float32).view(info.shape)


def scaling(header: Header, file: GgufFile) -> tuple[str, float]:
    """(none, linear, yarn or longrope; what positions are divided by).

    As llama.cpp: linear where no type is stated, a factor of 0 is none, and the older key counts without the newer one.
    """
    key = "rope.scaling.factor" if header.get("rope.scaling.factor") is not None else "rope.scale_linear"
    factor = header.number(key, 1.0, zero=True) or 1.0
    kind = header.get("rope.scaling.type") or "linear"
    served = TABLE[header.architecture].scalings
    if kind not in served:
        raise header.refused("rope.scaling.type", " or ".join(served))
    if kind == "none" and factor != 1 and header.architecture == "gemma2":
        raise header.refused(
            "rope.scaling.type", f"linear with {key} {factor:g}", "llama.cpp scales half of the layers"
        )
    if header.architecture == "phi3" and {LONG, SHORT} & file.tensors.keys():
        kind = "longrope"
    return kind, 1.0 if kind == "none" else factor


def rope_tensors(header: Header, file: GgufFile) -> set[str]:
    """The tensors of the file that are part of its rotations."""
    keys = TABLE[header.architecture]
    long = header.architecture == "phi3" or scaling(header, file)[0] == "longrope"
    wanted = {LONG, SHORT} if long else {FREQS} if keys.freqs else set()
    return wanted & file.tensors.keys()


def rope_parameters(header: Header, file: GgufFile) -> dict[str, Any]:
    """transformers' `rope_parameters` for the layers without a window."""
    kind, factor = scaling(header, file)
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": header.number("rope.freq_base", 10000.0),
        **_partial(header),
    }
    original = header.count("rope.scaling.original_context_length", header.count("context_length"))
    if kind == "linear" and factor != 1 and header.architecture == "deepseek2":
        raise header.refused("rope.scaling.type", "none or yarn, or a factor of 1")
    if kind == "yarn":
        return rope | _yarn(header, factor) | {"original_max_position_embeddings": original}
    if kind == "longrope":
        return rope | _longrope(header, file, factor, original)
    if (
        kind == "linear" and factor != 1 and header.architecture != "phi3"
    ):  # transformers' Phi-3 knows none but longrope
        return rope | {"rope_type": "linear", "factor": factor}
    return rope


def _partial(header: Header) -> dict[str, float]:
    rotated, head_dim = header.rotated, header.head_dim
    if rotated > head_dim or rotated % 2:
        raise header.wrong("rope.dimension_count", f"an even integer up to {head_dim}")
    part = rotated / head_dim
    if int(head_dim * part) < rotated:  # transformers cuts off what rounding took
        part = math.nextafter(part, 2.0)
    return {"partial_rotary_factor": part} if TABLE[header.architecture].partial else {}


def _attn_factor(header: Header) -> float:
    return header.number("rope.scaling.attn_factor", 1.0)


def _yarn(header: Header, factor: float) -> dict[str, Any]:
    """yarn's own words. Ministral 3 divides its factor by one of another multiplier, and scales queries by position."""
    growth, beta = 0.1 * math.log(max(factor, 1.0)), header.get("attention.temperature_scale")
    log_multiplier = header.number("rope.scaling.yarn_log_multiplier", 0.0, zero=True)
    if header.architecture == "deepseek2":  # scores are scaled instead of cos and sin, where a multiplier says how
        return {
            "rope_type": "yarn",
            "factor": factor,
            "attention_factor": 1.0 if log_multiplier else 1 + growth,
            "mscale_all_dim": 10 * log_multiplier,
            "beta_fast": header.number("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": header.number("rope.scaling.yarn_beta_slow", 1.0),
        }
    own = header.number("rope.scaling.yarn_attn_factor", (1 + growth) / (1 + log_multiplier * growth))
    return {
        **({"llama_4_scaling_beta": header.number("attention.temperature_scale")} if beta else {}),
        "rope_type": "yarn",
        "factor": factor,
        "attention_factor": own * _attn_factor(header),
        "beta_fast": header.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": header.number("rope.scaling.yarn_beta_slow", 1.0),
        **({"truncate": False} if header.architecture == "gpt-oss" else {}),  # where the ramp begins and ends
    }


def _longrope(header: Header, file: GgufFile, factor: float, original: int) -> dict[str, Any]:
    factors = {}
    for field, name in (("long_factor", LONG), ("short_factor", SHORT)):
        if name not in file.tensors:
            raise header.refused("rope.scaling.type", f"no longrope, or a tensor {name}")
        factors[field] = (_checked(header, file, name) * factor).tolist()
    return {
        "rope_type": "longrope",
        **factors,
        "factor": max(header.count("context_length") / original, 1.0),
        "attention_factor": _attn_factor(header),
        "original_max_position_embeddings": original,
    }


def _checked(header: Header, file: GgufFile, name: str) -> Tensor:
    """The factors of a tensor, one for each frequency, positive."""
    values = floats(file, name)
    if values.shape != (header.rotated // 2,):
        raise CheckpointError(
            f"{file.path}: {name} {list(values.shape)} fits no rotary embedding of the model: expected "
            f"[{header.rotated // 2}]"
        )
    if not bool(((values > 0) & values.isfinite()).all()):
        raise CheckpointError(f"{file.path}: {name}: expected positive numbers")
    return values


def apply_rotation(rotary: Any, header: Header, file: GgufFile) -> None:
    """Set what the configuration cannot state in `rotary`, the module that makes cos and sin of positions."""
    if header.architecture in ("gemma3n", "gemma4"):
        return  # it states all of them
    kind, factor = scaling(header, file)
    divisor = torch.ones(1)
    if FREQS in rope_tensors(header, file):
        divisor = _checked(header, file, FREQS)
    if kind == "linear" and header.architecture == "phi3":
        divisor = divisor * factor
    if bool((divisor != 1).any()):
        rotary.inv_freq = rotary.inv_freq / divisor
        rotary.original_inv_freq = rotary.inv_freq
    stated = kind in ("yarn", "longrope")  # with attn_factor in it already
    for layers in _LAYERS if header.architecture != "olmo2" else _LAYERS[:2]:
        name = f"{layers}attention_scaling"
        if hasattr(rotary, name) and not (stated and layers != "sliding_attention_"):
            setattr(rotary, name, getattr(rotary, name) * _attn_factor(header))
