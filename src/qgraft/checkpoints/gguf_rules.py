"""What llama.cpp's converter does to tensors beside renaming them, for each architecture, in both directions.

    rows        q and k of llama-like models are stored in the order its rotary embedding wants; Falcon's rows of each
                group of heads [q ..., k, v] as all q, all k, all v. Block formats store whole rows: undone on bytes
    columns     of what takes Qwen 3.5's value heads in, which lie as its rows do (`column_order`). Two heads may share a
                block: a layer of a file keeps them so (QuantizedLinear.input_order), a file is written by whole blocks
    norms       Gemma, Nemotron and Qwen 3.5 keep 1 + w in the file where transformers keeps w
    kernels     of short convolutions, [channels, 1, width] in transformers, are stored [channels, width]
    decay       of Qwen 3.5's states: -exp(A_log) is stored

Source: `modify_tensors` of the classes in llama.cpp's conversion/.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib.metadata import version

import torch
from gguf import MODEL_ARCH_NAMES, TensorNameMap, get_tensor_name_map
from torch import Tensor
from transformers import PreTrainedConfig

from qgraft.errors import UnsupportedError

# (name in the file, rows, configuration) -> [rows] int64, which stored row is row i of transformers' tensor; None where
# the orders agree, or where the rows are so many that assemble() will report the shape
RowOrder = Callable[[str, int, PreTrainedConfig], Tensor | None]


def _rotary_pairs(name: str, rows: int, config: PreTrainedConfig) -> Tensor | None:
    """A head's rows of q and k are stored as pairs (i, i + dim/2) interleaved: [0, d/2, 1, d/2 + 1, ...]."""
    match = re.search(r"\.attn_([qk])\.", name)
    if match is None:
        return None
    heads = config.num_attention_heads if match[1] == "q" else config.num_key_value_heads
    if rows % (2 * heads):
        return None
    return torch.arange(rows).view(heads, rows // heads // 2, 2).transpose(1, 2).reshape(-1)


def _falcon_groups(name: str, rows: int, config: PreTrainedConfig) -> Tensor | None:
    """transformers keeps the rows of each key head together: its queries, itself, its values."""
    groups, width = config.num_kv_heads if config.new_decoder_architecture else 1, config.head_dim
    if ".attn_qkv." not in name or rows != (config.num_attention_heads + 2 * groups) * width:
        return None
    ours = torch.arange(rows).view(groups, -1, width)
    return torch.cat([ours[:, :-2].reshape(-1), ours[:, -2].reshape(-1), ours[:, -1].reshape(-1)]).argsort()


_DELTA = {  # Qwen 3.5's tensors with a row, or one for each channel of a head, for each value head: all rows, or the last
    **dict.fromkeys(("attn_qkv.weight", "attn_gate.weight", "ssm_conv1d.weight"), True),
    **dict.fromkeys(("ssm_alpha.weight", "ssm_beta.weight", "ssm_a", "ssm_dt.bias"), False),
}


def _value_heads(name: str, rows: int, config: PreTrainedConfig) -> Tensor | None:
    """transformers keeps the value heads of each key head together; the file the first of all, then the second ones."""
    wide = _DELTA.get(name.split(".", 2)[-1])
    count, width = config.linear_num_value_heads, config.linear_value_head_dim if wide else 1
    if wide is None or config.linear_num_key_heads == count or rows < count * width:
        return None
    before = rows - count * width  # rows of queries and keys
    return torch.cat([torch.arange(before), before + _head_order(config, width)])


def _head_order(config: PreTrainedConfig, width: int) -> Tensor:
    heads = torch.arange(config.linear_num_value_heads).view(-1, config.linear_num_key_heads).T.reshape(-1, 1)
    return (heads * width + torch.arange(width)).reshape(-1)


@dataclass(frozen=True)
class Rules:
    """How one architecture's GGUF tensors differ from transformers' parameters.

    Attributes:
        rows: the order of rows that are stored in another one.
        norm_offset: what is added to the weights of norms in the file.
        kernels: how names of the file end whose second dimension, of one element, is left out.
        plain_norms: a part of the names of norms without that offset.
        floats: how names of matrices end whose weights transformers reads itself, so that they are floats.
        alternates: whether an expert's outputs of gate and up, which the file has in a tensor each, alternate.
    """

    rows: RowOrder | None = None
    norm_offset: float = 0.0
    kernels: str = "\0"
    plain_norms: str = "\0"
    floats: tuple[str, ...] = ()
    alternates: bool = False


ARCHITECTURES = {  # general.architecture of the file
    "arcee": Rules(_rotary_pairs),
    "chatglm": Rules(),
    "cohere2": Rules(),
    "command-r": Rules(floats=("attn_q_norm.weight", "attn_k_norm.weight")),  # [heads, width of a head]
    "deepseek2": Rules(),
    "dots1": Rules(),
    "ernie4_5": Rules(),
    "ernie4_5-moe": Rules(),
    "exaone4": Rules(),
    "falcon": Rules(_falcon_groups),
    "gemma": Rules(norm_offset=1.0),
    "gemma2": Rules(norm_offset=1.0),
    "gemma3": Rules(norm_offset=1.0),
    "gemma3n": Rules(floats=(".altup_correct_coef.weight", ".altup_predict_coef.weight")),
    "gemma4": Rules(),
    "glm4": Rules(),
    "glm4moe": Rules(),
    "gpt-oss": Rules(alternates=True),
    "gpt2": Rules(),
    "granite": Rules(_rotary_pairs),
    "granitemoe": Rules(_rotary_pairs),
    "hunyuan-dense": Rules(),
    "hunyuan-moe": Rules(),
    "lfm2": Rules(kernels=".shortconv.conv.weight"),
    "lfm2moe": Rules(kernels=".shortconv.conv.weight"),
    "llama": Rules(_rotary_pairs),  # mistral files carry this name too
    "minimax-m2": Rules(),
    "mistral3": Rules(_rotary_pairs),
    "nemotron": Rules(norm_offset=1.0),
    "olmo2": Rules(),
    "olmoe": Rules(),
    "phi3": Rules(),
    "qwen2": Rules(),
    "qwen2moe": Rules(),
    "qwen3": Rules(),
    "qwen3moe": Rules(),
    "qwen35": Rules(_value_heads, 1.0, "ssm_conv1d.weight", "ssm_norm"),
    "qwen35moe": Rules(_value_heads, 1.0, "ssm_conv1d.weight", "ssm_norm"),
    "seed_oss": Rules(),
    "smollm3": Rules(_rotary_pairs),
    "stablelm": Rules(),
    "starcoder2": Rules(),
    "t5": Rules(),  # mT5, umT5 and FLAN-T5 carry this name too
}


# What llama.cpp multiplies by itself, whatever LoRAs there are: of Gemma 3n and 4, and DeepSeek's queries, keys and values
_GEMMA_ALONE = (
    "per_layer_model_proj.weight", "altup_proj.weight", "altup_unembd_proj.weight", ".altup_router.weight",
)  # fmt: skip
WITHOUT_LORA = {  # general.architecture -> how names of such matrices end
    "deepseek2": tuple(f".attn_{name}.weight" for name in ("q", "q_a", "q_b", "kv_a_mqa", "kv_b")),
    "gemma3n": _GEMMA_ALONE,
    "gemma4": _GEMMA_ALONE,
}
_SLICES = re.compile(r"(model\.altup_(?:unembed_)?projections)\.(\d+)\.weight")


def row_order(gguf_name: str, rows: int, rules: Rules, config: PreTrainedConfig) -> Tensor | None:
    """Which stored row is row i of transformers' tensor; None where the orders agree."""
    return None if rules.rows is None else rules.rows(gguf_name, rows, config)


def column_order(gguf_name: str, config: PreTrainedConfig) -> Tensor | None:
    """Which stored column is column i of transformers' matrix; None where the orders agree."""
    if not gguf_name.endswith(".ssm_out.weight") or config.linear_num_key_heads == config.linear_num_value_heads:
        return None
    return _head_order(config, config.linear_value_head_dim)


def from_file(gguf_name: str, value: Tensor, rules: Rules, config: PreTrainedConfig) -> Tensor:
    """transformers' parameter for the floats that the file has: a norm, a bias, the kernel of a convolution."""
    order = row_order(gguf_name, value.shape[0], rules, config)
    value = value if order is None else value[order]
    if gguf_name.endswith(rules.kernels):
        return value.unsqueeze(1)
    if gguf_name.endswith(".ssm_a"):
        return (-value).log()
    return value - rules.norm_offset if _is_norm(gguf_name, rules) else value


def to_file(gguf_name: str, value: Tensor, rules: Rules, config: PreTrainedConfig) -> Tensor:
    """What the file has for the floats of a parameter."""
    order = row_order(gguf_name, value.shape[0], rules, config)
    value = value if order is None else value[order.argsort()]
    if gguf_name.endswith(rules.kernels):
        return value.squeeze(1)
    if gguf_name.endswith(".ssm_a"):
        return -value.exp()
    return value + rules.norm_offset if _is_norm(gguf_name, rules) else value


def _is_norm(gguf_name: str, rules: Rules) -> bool:
    return "norm" in gguf_name and gguf_name.endswith(".weight") and rules.plain_norms not in gguf_name


def name_map(architecture: str, config: PreTrainedConfig) -> TensorNameMap:
    """The tensor of a file for a module of the model, by the tables of the `gguf` package.

    Raises UnsupportedError where the release of the package has none for the architecture.
    """
    known = {name: key for key, name in MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        raise UnsupportedError(
            f"architecture {architecture!r}: the package gguf {version('gguf')} does not know its tensors",
            hint="pip install -U gguf",
        )
    layers = max(config.num_hidden_layers, getattr(config, "num_decoder_layers", 0))
    return get_tensor_name_map(known[architecture], layers)


def slice_of(names: TensorNameMap, parameter: str) -> tuple[str, int] | None:
    """(the tensor in the file, which slice of it) of a matrix that is stored with others in one tensor [n, out, in]."""
    found = _SLICES.fullmatch(parameter)
    return None if found is None else (f"{names.get_name(found[1])}.weight", int(found[2]))


ROUTER = "ffn_gate_inp.weight"  # the end of its name
CHOICE = "exp_probs_b.bias"  # added to the scores that experts are chosen by, not to their weights; of any shape
SHARED_GATE = "ffn_gate_inp_shexp.weight"  # of a layer with one output, whose dimension files may leave out
_EXPERTS = {  # the parameters of all experts of a layer -> their tensors, by the names that these have in the model
    "gate_up_proj": {"gate": "ffn_gate_exps", "up": "ffn_up_exps"},
    "down_proj": {"down": "ffn_down_exps"},
}


_FUSED = "ffn_gate_up_exps"  # newer files may have gate and up of each expert one behind the other


def expert_tensors(parameter: str, tensors: Collection[str] = ()) -> dict[str, str]:
    """The tensors of a file that make up a parameter of all experts of a layer; none where it is no such parameter.

    Args:
        tensors: what the file has: gate and up may be in one.
    """
    found = re.search(r"\.layers\.(\d+)\..*\bexperts\.(gate_up_proj|down_proj)(_bias)?$", parameter)
    if found is None:
        return {}
    suffix = "bias" if found[3] else "weight"
    if found[2] == "gate_up_proj" and (fused := f"blk.{found[1]}.{_FUSED}.{suffix}") in tensors:
        return {"gate_up": fused}
    return {part: f"blk.{found[1]}.{stem}.{suffix}" for part, stem in _EXPERTS[found[2]].items()}


def tensor_name(names: TensorNameMap, parameter: str) -> str | None:
    """The name in the file of a parameter of the model; None where the architecture has none."""
    if found := re.search(r"\.layers\.(\d+)\..*(?:expert|score_correction)_bias$", parameter):
        return f"blk.{found[1]}.{CHOICE}"
    if (whole := names.get_name(parameter)) is not None:  # without a suffix: Qwen 3.5's A_log, gpt-oss's sinks, Gemma's
        weights = whole.endswith("_sinks") or parameter.endswith((".layer_scalar", ".correct_output_scale"))
        return f"{whole}.weight" if weights else whole
    stem, _, suffix = re.sub(r"\.dt_bias$", ".dt_proj.bias", parameter).rpartition(".")
    stems = (stem, stem.removeprefix("transformer."), f"{stem}.layer")  # ChatGLM's; GraniteMoE's router, as it once was
    known = next((name for each in stems if (name := names.get_name(each)) is not None), None)
    return None if known is None else f"{known}.{suffix}"
