"""Gemma 4 and 3n from the keys of a GGUF file, and back: what its two kinds of layers have each of their own.

    layers with a window    attention.key_length_swa, rope.freq_base_swa; every pair of a head is rotated
    layers without one      attention.key_length, rope.freq_base; of a head only the first pairs are: rope_freqs.weight, by
                            which frequencies are divided, is 1 for them and 1e30 for the others
    the last layers         attention.shared_kv_layers of them take keys and values from the last layer of their kind before;
                            some have feed-forward layers of twice the width (feed_forward_length is a list, then)

A file without attn_v in layers without a window is of a model whose values there are its keys (attention_k_eq_v).

Gemma 3n states the share of activations that a layer drops as what llama.cpp multiplies their deviation by, the quantile of
it: activation_sparsity_scale, -inf for none. Its altup projections are slices of one tensor each.

Source: Gemma3NModel and Gemma4Model in llama.cpp's conversion/gemma.py; models/gemma3n.cpp, gemma4.cpp.
"""

import re
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from qgraft.checkpoints.gguf_file import GgufFile
from qgraft.checkpoints.gguf_header import Header
from qgraft.checkpoints.gguf_key_parts import PATTERN, PER_LAYER, SHARED, SPARSITY, WINDOW
from qgraft.checkpoints.gguf_rope import FREQS, floats
from qgraft.errors import CheckpointError

NOT_ROTATED = 1e30  # what the frequency of such a pair is divided by
_KINDS = ("full_attention", "sliding_attention")
_UNREAD = ("attn_k.weight", "attn_v.weight", "attn_k_norm.weight")  # of a layer that shares keys and values


def gemma4_fields(header: Header, file: GgufFile) -> dict[str, Any]:
    """The fields of transformers' configuration that no single key sets."""
    windowed, shared = _windowed(header), header.shared
    full = [layer for layer, each in enumerate(windowed) if not each]
    heads = header.per_layer("attention.head_count_kv", header.heads)
    table = file.tensors.get("per_layer_token_embd.weight")
    same = f"blk.{full[0]}.attn_v.weight" not in file.tensors
    own = {"head_dim": header.count("attention.key_length_swa"), "global_head_dim": header.head_dim}
    values = {
        **own,
        **_widths(header, shared),
        "layer_types": [_KINDS[each] for each in windowed],
        "sliding_window": header.count(WINDOW),
        "num_kv_shared_layers": shared,
        "attention_k_eq_v": same,
        "num_key_value_heads": _of_kind(header, heads, windowed, kind=True),
        "num_global_key_value_heads": _of_kind(header, heads, windowed, kind=False),
        "hidden_size_per_layer_input": header.count(PER_LAYER) if header.get(PER_LAYER) else 0,
        "vocab_size_per_layer_input": table.shape[0] if table is not None else 1,
        "rope_parameters": _rotations(header, file),
    }
    if not same and values["num_key_value_heads"] != values["num_global_key_value_heads"]:
        raise header.refused("attention.head_count_kv", "one number for all layers, where there are tensors attn_v")
    return values


def gemma3n_fields(header: Header, file: GgufFile) -> dict[str, Any]:
    """The same of Gemma 3n, whose layers have heads of one width."""
    table, low = (file.tensors.get(name) for name in ("per_layer_token_embd.weight", "blk.0.laurel_l.weight"))
    scales = header.get(SPARSITY)
    if not isinstance(scales, list) or len(scales) != header.layers or not all(type(each) is float for each in scales):
        raise header.wrong(SPARSITY, f"{header.layers} numbers")
    ropes = {"full_attention": ("rope.freq_base", 10000.0), "sliding_attention": ("rope.freq_base_swa", 10000.0)}
    return {
        "layer_types": [_KINDS[each] for each in _pattern(header)],
        "sliding_window": header.count(WINDOW),
        "num_kv_shared_layers": header.shared,
        "intermediate_size": header.per_layer("feed_forward_length"),
        "vocab_size_per_layer_input": table.shape[0] if table is not None else 1,
        "laurel_rank": low.shape[0] if low is not None else 1,
        "altup_active_idx": header.get("altup.active_idx") or 0,
        "activation_sparsity_pattern": [round(NormalDist().cdf(each), 6) for each in scales],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": header.number(*key)} for kind, key in ropes.items()
        },
    }


def _windowed(header: Header) -> list[bool]:
    """For each layer whether it has a window. transformers' last layer has none, whatever its configuration says."""
    pattern = _pattern(header)
    if pattern[-1]:
        raise header.refused(PATTERN, "false at its end: the last layer has no window")
    return pattern


def _pattern(header: Header) -> list[bool]:
    pattern = header.get(PATTERN)
    if not isinstance(pattern, list) or len(pattern) != header.layers or not all(each in (0, 1) for each in pattern):
        raise header.wrong(PATTERN, f"{header.layers} times true or false")
    return [bool(each) for each in pattern]


def _of_kind(header: Header, values: list[int], windowed: list[bool], *, kind: bool) -> int:
    """What all layers with a window, or without one, have; what the others have where there is no such layer."""
    found = {value for value, each in zip(values, windowed, strict=True) if each is kind} or set(values)
    if len(found) != 1:
        raise header.refused("attention.head_count_kv", "one number for the layers of each kind")
    return found.pop()


def _widths(header: Header, shared: int) -> dict[str, Any]:
    """The width of the feed-forward layers; of those that share keys and values it may be twice that."""
    widths = header.per_layer("feed_forward_length")
    first, own = widths[0], header.layers - shared
    double = shared > 0 and widths[-1] == 2 * first
    if widths != [first] * own + [first * (1 + double)] * shared:
        raise header.refused("feed_forward_length", f"one width, twice it in the last {shared} layers, or not")
    return {"intermediate_size": first, "use_double_wide_mlp": double}


def _rotations(header: Header, file: GgufFile) -> dict[str, Any]:
    pairs, base = header.head_dim // 2, header.number("rope.freq_base", 10000.0)
    divisors = floats(file, FREQS) if FREQS in file.tensors else torch.ones(pairs)
    rotated = int((divisors == 1).sum())
    if not torch.equal(divisors, _divisors(rotated, pairs)):
        raise CheckpointError(
            f"{file.path}: {FREQS}: expected {pairs} numbers, ones and behind them {NOT_ROTATED:g}: the pairs of a head "
            "that are rotated, and those that are not"
        )
    local = header.number("rope.freq_base_swa", base)
    return {
        "full_attention": {
            "rope_type": "proportional",
            "rope_theta": base,
            "partial_rotary_factor": rotated / pairs,
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": local},
    }


def _divisors(rotated: int, pairs: int) -> Tensor:
    return torch.cat([torch.ones(rotated), torch.full((pairs - rotated,), NOT_ROTATED)])


def unread_tensors(header: Header, file: GgufFile) -> set[str]:
    """Keys and values of layers that take those of others: files may have them, and nothing is computed with them."""
    first = header.layers - header.shared
    layers = {name: re.match(r"blk\.(\d+)\.", name) for name in file.tensors if name.endswith(_UNREAD)}
    return {name for name, match in layers.items() if match and first <= int(match[1]) < header.layers}


def gemma4_keys(config: PreTrainedConfig) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The keys of a file, beside those that one field states, and rope_freqs.weight."""
    values, shared = config.to_dict(), config.num_kv_shared_layers
    windowed = [kind == "sliding_attention" for kind in config.layer_types]
    own = {**values, **values["per_layer_config"].get(str(windowed.index(False)), {})}  # of layers without a window
    wide = config.intermediate_size * (1 + config.use_double_wide_mlp)
    keys: dict[str, Any] = {
        "feed_forward_length": [config.intermediate_size] * (len(windowed) - shared) + [wide] * shared,
        "attention.head_count_kv": [(values if each else own)["num_key_value_heads"] for each in windowed],
        PATTERN: windowed,
        WINDOW: config.sliding_window,
        SHARED: shared,
        PER_LAYER: config.hidden_size_per_layer_input or 0,
        "attention.key_length": own["head_dim"],
        "attention.key_length_swa": values["head_dim"],
        "rope.dimension_count": own["head_dim"],
        "rope.dimension_count_swa": values["head_dim"],
    }
    keys |= {key.replace("key", "value"): keys[key] for key in ("attention.key_length", "attention.key_length_swa")}
    full, local = (config.rope_parameters[kind] for kind in _KINDS)
    keys |= {"rope.freq_base": float(full["rope_theta"]), "rope.freq_base_swa": float(local["rope_theta"])}
    pairs = own["head_dim"] // 2
    rotated = int(full.get("partial_rotary_factor", 1.0) * own["head_dim"] // 2)
    return keys, {FREQS: _divisors(rotated, pairs)}
