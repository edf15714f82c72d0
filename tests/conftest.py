"""Tiny random GGUF files of every architecture, with the float models they stand for.

`tiny_gguf("llama")` writes a file of about 200 kB the way llama.cpp's converter would (names, permuted rows, norms plus
one, transposed Conv1D) and keeps a float model whose weights are what the written bytes mean, decoded by the `gguf`
package.
"""

import gc
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece
import torch
import transformers
from gguf import GGMLQuantizationType as Q
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import qgraft
from qgraft.cli.main import main
from qgraft.errors import CheckpointError
from qgraft.models.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration
from qgraft.models.chatglm2 import ChatGLM2Config, ChatGLM2ForConditionalGeneration
from qgraft.models.chatglm2_tokenizer import ChatGLM2Tokenizer
from qgraft.models.chatglm_tokenizer import ChatGLMTokenizer

sys.path.insert(
    0, str(Path(__file__).parent)
)  # what several rooms import: disks.py, tiny_models.py, decoder_float64.py

from tiny_models import ALWAYS_TIED, EXPERTS, FFN, KERNELS, LAYERS, MODELS, PERMUTED, PLUS_ONE, SENTENCEPIECE, STORED_AS


@pytest.hookimpl(tryfirst=True)
def pytest_collection_finish() -> None:
    """Spare the collector the million objects of torch and transformers, which it would look through again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`spread(n)`: of a test's cases n run by default, evenly spread over them in their order; the others are slow."""
    cases: dict[tuple[Path, str], list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("spread") is not None:
            cases.setdefault((item.path, getattr(item, "originalname", item.name)), []).append(item)
    for found in cases.values():
        marker = found[0].get_closest_marker("spread")
        kept = {round(k * (len(found) - 1) / max(marker.args[0] - 1, 1)) for k in range(marker.args[0])}
        for number, item in enumerate(found):
            if number not in kept:
                item.add_marker(pytest.mark.slow)


MIX = (Q.Q4_1, Q.Q4_0, Q.Q5_1, Q.Q8_0, Q.F16, Q.Q5_0, Q.BF16)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass
class TinyGguf:
    """A file, the float model that it stands for, and the parameter that each of its tensors came from."""

    path: Path
    model: transformers.PreTrainedModel
    parameters: dict[str, str] = field(default_factory=dict)


TinyMaker = Callable[..., TinyGguf]


@pytest.fixture(scope="session")
def make_gguf() -> TinyMaker:
    """Writes a file at a path; see write_tiny for the options."""
    return write_tiny


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> TinyMaker:
    """Like make_gguf without a path; each combination of options is written once a session. Do not change the file."""
    made: dict[str, TinyGguf] = {}

    def get(architecture: str = "llama", **options: Any) -> TinyGguf:
        key = repr((architecture, sorted(options.items())))
        if key not in made:
            made[key] = write_tiny(tmp_path_factory.mktemp(architecture) / "tiny.gguf", architecture, **options)
        return made[key]

    return get


def write_tiny(
    path: Path,
    architecture: str = "llama",
    *,
    tied: bool = False,
    config: dict[str, Any] | None = None,
    metadata: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray] | None = None,
    drop: tuple[str, ...] = (),
    tokenizer: bool = True,
    types: tuple[Q, ...] = MIX,
    seed: int = 0,
) -> TinyGguf:
    """Write a random model of `architecture` to `path`.

    Args:
        tied: leave output.weight out, as llama.cpp does where the output layer is the embedding.
        config: options of the transformers configuration beside the tiny ones.
        metadata: keys to add or replace; None leaves a key out.
        extra: float32 tensors to add or replace, by their name in the file.
        drop: names of tensors to leave out.
        tokenizer: whether the vocabulary is written.
        types: the formats that matrices are stored in, one after another.
    """
    tied = tied or architecture in ALWAYS_TIED
    model = float_model(architecture, tied, config or {}, seed)
    written = STORED_AS.get(architecture, architecture)
    names = gguf.get_tensor_name_map(_arch(written), model.config.num_hidden_layers)
    keys = {
        **model_metadata(model, architecture),
        **(vocabulary(architecture) if tokenizer else {}),
        **(metadata or {}),
    }
    writer = gguf.GGUFWriter(path, written)
    for key, value in keys.items():
        if value is not None:
            _add(writer, key, value)
    tiny = TinyGguf(path, model)
    slices: dict[str, list[tuple[np.ndarray, Q]]] = {}  # Gemma 3n's altup projections are slices of one tensor
    of_heads: dict[str, list[np.ndarray]] = {}  # StableLM's norms of each head are rows of one tensor
    for index, (name, parameter) in enumerate(stored_tensors(model)):
        stem, _, suffix = name.rpartition(".")
        if ".experts." in name:
            for gguf_name, stored, kind in _experts(model, name, parameter, types[index % len(types)], index):
                tiny.parameters[gguf_name] = name
                if gguf_name not in drop and gguf_name not in (extra or {}):
                    writer.add_tensor(gguf_name, stored, raw_dtype=kind)
            continue
        if ".norms." in stem:
            of_heads.setdefault(f"{names.get_name(stem.partition('.norms.')[0])}.{suffix}", []).append(
                parameter.numpy()
            )
            continue
        if stacked_in := re.fullmatch(r"(model\.altup_(?:unembed_)?projections)\.\d+", stem):
            value, kind = _encode("", parameter.detach(), types[0], index)
            meant = torch.from_numpy(np.array(gguf.quants.dequantize(value, kind), np.float32))
            with torch.no_grad():
                parameter.copy_(meant)
            slices.setdefault(f"{names.get_name(stacked_in[1])}.weight", []).append((value, kind))
            continue
        if stem.endswith("shared_mlp.input_linear"):  # llama.cpp: GraniteMoeModel.modify_tensors
            kind = types[index % len(types)]
            for number, part in enumerate(("gate", "up")):
                rows = parameter.chunk(2)[number]
                stored, used = _encode("", rows.detach(), kind, index)
                rows.copy_(torch.from_numpy(np.array(gguf.quants.dequantize(stored, used), np.float32)))
                writer.add_tensor(f"blk.{name.split('.')[2]}.ffn_{part}_shexp.weight", stored, raw_dtype=used)
            continue
        stem = stem.removeprefix("transformer.") if architecture == "chatglm" else stem
        gguf_name = names.get_name(name) or f"{names.get_name(stem) or names.get_name(f'{stem}.layer')}.{suffix}"
        gguf_name += ".weight" if gguf_name.endswith("_sinks") else ""
        if name.endswith(("expert_bias", "score_correction_bias")):
            gguf_name = f"blk.{name.split('.')[2]}.exp_probs_b.bias"
        if name.endswith("dt_bias"):
            gguf_name = gguf_name.replace("None.dt_bias", f"blk.{name.split('.')[2]}.ssm_dt.bias")
        if name.endswith(("layer_scalar", "correct_output_scale")):
            gguf_name += ".weight"
        stored, kind = _encode(
            gguf_name, _to_file(model, architecture, name, parameter), types[index % len(types)], index
        )
        with torch.no_grad():
            meant = gguf.quants.dequantize(stored, kind)
            parameter.copy_(_from_file(model, architecture, name, torch.from_numpy(np.array(meant, np.float32))))
        tiny.parameters[gguf_name] = name
        if gguf_name not in drop and gguf_name not in (extra or {}):
            writer.add_tensor(gguf_name, stored, raw_dtype=kind)
    stacked = {gguf_name: np.stack(rows) for gguf_name, rows in of_heads.items()}
    for gguf_name, parts in slices.items():
        writer.add_tensor(gguf_name, np.stack([value for value, _ in parts]), raw_dtype=parts[0][1])
    if architecture == "gemma3n":  # their file has them, and nothing reads them
        own = model.config.num_hidden_layers - model.config.num_kv_shared_layers
        for layer in range(own, model.config.num_hidden_layers):
            shape = (model.config.num_key_value_heads * model.config.head_dim, model.config.hidden_size)
            stacked |= {f"blk.{layer}.attn_{name}.weight": np.ones(shape, np.float32) for name in "kv"}
            stacked[f"blk.{layer}.attn_k_norm.weight"] = np.ones(model.config.head_dim, np.float32)
    if architecture == "gemma4":  # Gemma4Model.generate_extra_tensors
        pairs = keys["gemma4.attention.key_length"] // 2
        stacked["rope_freqs.weight"] = np.array([1.0] * (pairs // 4) + [1e30] * (pairs - pairs // 4), np.float32)
    for gguf_name, value in {**stacked, **(extra or {})}.items():
        writer.add_tensor(gguf_name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tiny


def float_model(architecture: str, tied: bool, options: dict[str, Any], seed: int) -> transformers.PreTrainedModel:
    """A random model with weights large enough that every part of it moves the logits."""
    class_name, config_name, tiny = MODELS[architecture]
    tokens = len(vocabulary(architecture)["tokenizer.ggml.tokens"])
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    if "hidden_size_per_layer_input" in tiny:
        ids["vocab_size_per_layer_input"] = tokens
    own = (
        globals()
        if architecture == "chatglm"
        else {name: getattr(transformers, name) for name in (class_name, config_name)}
    )
    words = "padded_vocab_size" if architecture == "chatglm" else "vocab_size"
    config = own[config_name](**{words: tokens, "tie_word_embeddings": tied, **ids, **tiny, **options})
    torch.manual_seed(seed)
    model = own[class_name](config).eval().requires_grad_(False)
    if architecture == "gemma2":  # transformers 5.17 leaves the cap of its scores out of every other attention
        model.set_attn_implementation("eager")
    for name, parameter in stored_tensors(model):
        if parameter.dim() > 1:
            parameter.copy_(torch.randn(parameter.shape) * (1.0 if "embed" in name or "wte" in name else 0.12))
        else:
            plain = "linear_attn.norm" in name or not _offset(architecture)
            centre = 1.0 if name.endswith((".weight", ".layer_scalar")) and plain else 0.0
            parameter.copy_(centre + 0.2 * torch.randn(parameter.shape))
    return model


def stored_tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters, and buffers that a checkpoint holds."""
    held = model.state_dict().keys()
    return [*model.named_parameters(), *((name, buffer) for name, buffer in model.named_buffers() if name in held)]


def model_metadata(model: transformers.PreTrainedModel, architecture: str) -> dict[str, Any]:
    """What llama.cpp's converter writes about the shape of a model."""
    c = model.config
    if architecture == "gemma4":
        return gemma4_metadata(c.to_dict())
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    key_heads = getattr(c, "num_key_value_heads", None) or getattr(c, "num_kv_heads", None)
    if architecture in ("lfm2", "lfm2moe"):
        key_heads = [0 if kind == "conv" else key_heads for kind in c.layer_types]
    grouped = {"attention.head_count_kv": key_heads} if architecture != "gpt2" else {}
    epsilon = next(getattr(c, k) for k in ("rms_norm_eps", "norm_eps", "layer_norm_eps", "norm_epsilon",
                                           "layer_norm_epsilon", "layernorm_epsilon") if getattr(c, k, None))  # fmt: skip
    rms = "_rms" if hasattr(c, "rms_norm_eps") or architecture in ("chatglm", "lfm2", "lfm2moe") else ""
    keys = {
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "block_count": c.num_hidden_layers,
        "feed_forward_length": getattr(c, "intermediate_size", None)
        or getattr(c, "n_inner", None)
        or getattr(c, "ffn_hidden_size", FFN),
        "attention.head_count": c.num_attention_heads,
        f"attention.layer_norm{rms}_epsilon": float(epsilon),
    }
    if architecture in ("cohere2", "command-r"):
        keys["logit_scale"] = c.logit_scale
    if architecture == "cohere2":
        keys["attention.sliding_window"] = c.sliding_window
    if experts := getattr(c, "num_experts", None) or getattr(c, "num_local_experts", None):
        keys |= {"expert_count": experts, "expert_used_count": c.num_experts_per_tok}
        if hasattr(c, "moe_intermediate_size"):
            keys["expert_feed_forward_length"] = c.moe_intermediate_size
        if hasattr(c, "shared_expert_intermediate_size"):
            keys["expert_shared_feed_forward_length"] = c.shared_expert_intermediate_size
        if architecture in ("gpt-oss", "hunyuan-moe", "minimax-m2"):
            keys["expert_feed_forward_length"] = c.intermediate_size
        if architecture == "gpt-oss":
            keys["attention.sliding_window"] = c.sliding_window
    if rope := getattr(c, "rope_parameters", None):
        rope = rope.get("full_attention", rope)
        keys["rope.freq_base"] = float(rope["rope_theta"])
        keys["rope.dimension_count"] = int(head_dim * rope.get("partial_rotary_factor", 1.0))
        keys["attention.key_length"] = keys["attention.value_length"] = head_dim
    if "gemma" in architecture or architecture == "phi3":
        keys["attention.sliding_window"] = getattr(c, "sliding_window", None) or 0
    if architecture in ("qwen35", "qwen35moe"):
        keys |= {
            "ssm.conv_kernel": c.linear_conv_kernel_dim, "ssm.state_size": c.linear_key_head_dim,
            "ssm.group_count": c.linear_num_key_heads, "ssm.time_step_rank": c.linear_num_value_heads,
            "ssm.inner_size": c.linear_value_head_dim * c.linear_num_value_heads, "full_attention_interval": 4,
            "rope.dimension_sections": [11, 11, 10, 0],
        }  # fmt: skip
    keys |= mixture_metadata(c, architecture)
    if architecture == "gemma3n":  # Gemma3NModel.set_gguf_parameters
        del keys["rope.dimension_count"]
        normal = torch.distributions.normal.Normal(0, 1)
        keys |= {
            "feed_forward_length": c.intermediate_size, "altup.active_idx": c.altup_active_idx,
            "altup.num_inputs": c.altup_num_inputs, "embedding_length_per_layer_input": c.hidden_size_per_layer_input,
            "attention.shared_kv_layers": c.num_kv_shared_layers,
            "activation_sparsity_scale": [normal.icdf(torch.tensor(s)).item() for s in c.activation_sparsity_pattern],
            "attention.sliding_window_pattern": [kind == "sliding_attention" for kind in c.layer_types],
        }  # fmt: skip
    if architecture == "chatglm":
        keys |= {"rope.dimension_count": head_dim // 2, "rope.freq_base": 10000.0 * c.rope_ratio}
    if architecture in ("lfm2", "lfm2moe"):
        keys["shortconv.l_cache"] = c.conv_L_cache
    if architecture.startswith("granite"):
        keys |= {"attention.scale": c.attention_multiplier, "embedding_scale": c.embedding_multiplier,
                 "residual_scale": c.residual_multiplier, "logit_scale": c.logits_scaling}  # fmt: skip
    if architecture == "mistral3":
        keys |= {
            "rope.scaling.type": "yarn", "rope.scaling.factor": rope["factor"],
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
            "rope.scaling.yarn_beta_fast": rope["beta_fast"], "rope.scaling.yarn_beta_slow": rope["beta_slow"],
            "rope.scaling.yarn_log_multiplier": rope["mscale_all_dim"],
            "attention.temperature_scale": rope["llama_4_scaling_beta"],
        }  # fmt: skip
    prefix = STORED_AS.get(architecture, architecture)
    return {"general.name": "tiny", **{f"{prefix}.{k}": v for k, v in {**keys, **grouped}.items()}}


def mixture_metadata(c: Any, architecture: str) -> dict[str, Any]:
    """llama.cpp: set_gguf_parameters of DeepseekV2Model and those like it."""
    keys: dict[str, Any] = {}
    if hasattr(c, "n_shared_experts"):
        keys |= {
            "leading_dense_block_count": c.first_k_dense_replace, "expert_shared_count": c.n_shared_experts,
            "expert_weights_scale": c.routed_scaling_factor, "expert_weights_norm": bool(c.norm_topk_prob),
            "expert_gating_func": 1 if architecture == "deepseek2" else 2,
        }  # fmt: skip
        if (c.n_group or 1) > 1:
            keys |= {"expert_group_count": c.n_group, "expert_group_used_count": c.topk_group}
    if architecture in ("deepseek2", "deepseek3"):
        keys |= {
            "attention.kv_lora_rank": c.kv_lora_rank, "rope.dimension_count": c.qk_rope_head_dim,
            "attention.key_length": c.qk_head_dim, "attention.value_length": c.v_head_dim,
            **({"attention.q_lora_rank": c.q_lora_rank} if c.q_lora_rank else {}),
        }  # fmt: skip
    if architecture == "ernie4_5-moe":
        keys |= {
            "leading_dense_block_count": c.moe_layer_start_index, "expert_shared_count": c.moe_num_shared_experts,
            "interleave_moe_layer_step": c.moe_layer_interval,
            "expert_shared_feed_forward_length": c.moe_num_shared_experts * c.moe_intermediate_size,
        }  # fmt: skip
    if architecture == "hunyuan-moe":
        keys |= {"expert_shared_count": 1, "expert_shared_feed_forward_length": c.intermediate_size}
    if architecture == "granitemoeshared":
        keys["expert_shared_feed_forward_length"] = c.shared_intermediate_size
    if architecture == "minimax-m2":
        keys["expert_gating_func"] = 2
    if architecture == "lfm2moe":
        keys |= {"leading_dense_block_count": c.num_dense_layers, "expert_gating_func": 2}
    return keys


def gemma4_metadata(c: dict[str, Any]) -> dict[str, Any]:
    """llama.cpp: Gemma4Model.set_gguf_parameters, after those of TextModel."""
    own = {**c, **c["per_layer_config"]["1"]}  # of layers without a window
    windowed = [kind == "sliding_attention" for kind in c["layer_types"]]
    ropes = c["rope_parameters"]
    shared, ffn = c["num_kv_shared_layers"], c["intermediate_size"]
    keys = {
        "context_length": c["max_position_embeddings"], "embedding_length": c["hidden_size"],
        "block_count": len(windowed), "attention.head_count": c["num_attention_heads"],
        "feed_forward_length": [ffn] * (len(windowed) - shared) + [ffn * (1 + c["use_double_wide_mlp"])] * shared,
        "attention.head_count_kv": [(c if each else own)["num_key_value_heads"] for each in windowed],
        "attention.layer_norm_rms_epsilon": c["rms_norm_eps"], "attention.sliding_window": c["sliding_window"],
        "attention.sliding_window_pattern": windowed, "attention.shared_kv_layers": shared,
        "embedding_length_per_layer_input": c["hidden_size_per_layer_input"],
        "attention.key_length": own["head_dim"], "attention.value_length": own["head_dim"],
        "attention.key_length_swa": c["head_dim"], "attention.value_length_swa": c["head_dim"],
        "rope.dimension_count": own["head_dim"], "rope.dimension_count_swa": c["head_dim"],
        "rope.freq_base": ropes["full_attention"]["rope_theta"],
        "rope.freq_base_swa": ropes["sliding_attention"]["rope_theta"],
        **({"final_logit_softcapping": c["final_logit_softcapping"]} if c["final_logit_softcapping"] else {}),
    }  # fmt: skip
    return {"general.name": "tiny", **{f"gemma4.{key}": value for key, value in keys.items()}}


def vocabulary(architecture: str) -> dict[str, Any]:
    """A byte-level BPE vocabulary, or a sentencepiece one for the architectures that have them in the field."""
    if architecture in SENTENCEPIECE:
        return _sentencepiece_vocabulary()
    letters = _byte_alphabet()
    merges = []
    for word in ("Ġthe", "Ġand", "Ġcat", "Ġsat", "hello", "Ġworld", "user", "assistant", "Ġmat"):
        merges += [f"{word[:i]} {word[i]}" for i in range(1, len(word))]
    merges = list(dict.fromkeys(merges))
    tokens = [*SPECIAL, *letters, *(merge.replace(" ", "") for merge in merges)]
    keys = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "merges": merges,
        "token_type": [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)),
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    template = {"tokenizer.chat_template": CHAT_TEMPLATE} if architecture in ("llama", "qwen2") else {}
    return {**{f"tokenizer.ggml.{k}": v for k, v in keys.items()}, **template}


def _byte_alphabet() -> list[str]:
    """GPT-2's spelling of the 256 bytes: printable ones as themselves, the others as the characters from 256 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _sentencepiece_vocabulary() -> dict[str, Any]:
    pieces = ["▁", *"abcdefghijklmnopqrstuvwxyz", "▁t", "he", "▁the", "at", "▁cat", "ll"]
    tokens = ["<unk>", "<bos>", "<eos>", "<pad>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    keys = {
        "model": "llama",
        "tokens": tokens,
        "scores": [0.0] * 260 + [-float(i) for i in range(len(pieces))],
        "token_type": [2, 3, 3, 3] + [6] * 256 + [1] * len(pieces),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "padding_token_id": 3,
    }
    return {f"tokenizer.ggml.{k}": v for k, v in keys.items()}


def ids_for(model: nn.Module, rows: int = 2, length: int = 12, seed: int = 1) -> torch.Tensor:
    """Random token ids [rows, length], without the special ones."""
    return torch.randint(4, model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def _arch(architecture: str) -> gguf.MODEL_ARCH:
    known = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        pytest.skip(f"this release of the package gguf does not know {architecture}")
    return known[architecture]


def _offset(architecture: str) -> float:
    return 1.0 if architecture in PLUS_ONE else 0.0


def _heads(model: nn.Module, architecture: str, name: str) -> int | None:
    """Heads whose rows llama.cpp permutes in this parameter, or None."""
    if architecture not in PERMUTED:
        return None
    return {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}.get(
        name.split(".")[-2]
    )


def _to_file(model: nn.Module, architecture: str, name: str, parameter: torch.Tensor) -> torch.Tensor:
    """What the converter stores for a parameter of the transformers model."""
    value = parameter.detach()
    if isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D) and value.dim() == 2:
        value = value.T
    if heads := _heads(model, architecture, name):  # llama.cpp: LlamaModel.permute
        value = (
            value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
        )
    if architecture == "falcon" and "query_key_value" in name:
        groups = model.config.num_kv_heads if model.config.new_decoder_architecture else 1
        qkv = value.view(groups, -1, model.config.head_dim, value.shape[1])
        value = torch.cat([part.reshape(-1, value.shape[1]) for part in (qkv[:, :-2], qkv[:, -2], qkv[:, -1])])
    if ".conv.conv." in name or ".conv1d." in name:
        value = value.squeeze(1)
    if ".linear_attn." in name:
        value = _value_heads(value, model.config, name, to_file=True)
        return -value.exp() if name.endswith("A_log") else value
    is_norm = name.endswith("norm.weight") or name.endswith("layernorm.weight")
    return value + _offset(architecture) if is_norm else value


def _from_file(model: nn.Module, architecture: str, name: str, value: torch.Tensor) -> torch.Tensor:
    """The inverse of _to_file."""
    if isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D) and value.dim() == 2:
        value = value.T
    if heads := _heads(model, architecture, name):
        value = (
            value.reshape(heads, value.shape[0] // heads // 2, 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
        )
    if architecture == "falcon" and "query_key_value" in name:
        width, wide = model.config.head_dim, value.shape[1]
        groups = model.config.num_kv_heads if model.config.new_decoder_architecture else 1
        q, k, v = value.split([model.config.num_attention_heads * width, groups * width, groups * width])
        parts = [q.view(groups, -1, wide), k.view(groups, -1, wide), v.view(groups, -1, wide)]
        value = torch.cat(parts, 1).reshape(-1, wide)
    if ".linear_attn." in name:
        value = _value_heads(value, model.config, name, to_file=False)
        value = (-value).log() if name.endswith("A_log") else value
        return value.unsqueeze(1) if ".conv1d." in name else value
    if ".conv.conv." in name:
        value = value.unsqueeze(1)
    is_norm = name.endswith("norm.weight") or name.endswith("layernorm.weight")
    return value - _offset(architecture) if is_norm else value


def _experts(
    model: nn.Module, name: str, parameter: torch.Tensor, kind: Q, seed: int
) -> list[tuple[str, np.ndarray, Q]]:
    """(name, stored bytes, type) of what the converter makes of a parameter of all experts, which gets what they mean."""
    leaf, module = name.rpartition(".")[2].removesuffix("_bias"), model.get_submodule(name.rpartition(".")[0])
    value = parameter.detach()
    value = value.transpose(1, 2) if module.is_transposed and value.dim() == 3 else value  # [experts, out, ...]
    stems, block, made = EXPERTS[leaf], name.split(".")[2], []
    for number, stem in enumerate(stems):
        size = value.shape[1] // len(stems)
        rows = slice(number * size, (number + 1) * size) if module.is_concatenated else slice(number, None, len(stems))
        part = value[:, rows].contiguous()
        stored, used = _encode(stem, part, Q.F32 if part.dim() == 2 else kind, seed)
        with torch.no_grad():
            value[:, rows] = torch.from_numpy(np.array(gguf.quants.dequantize(stored, used), np.float32)).view(
                part.shape
            )
        made.append((f"blk.{block}.{stem}.{'bias' if part.dim() == 2 else 'weight'}", stored, used))
    return made


def _value_heads(value: torch.Tensor, config: Any, name: str, *, to_file: bool) -> torch.Tensor:
    """llama.cpp: _LinearAttentionVReorderBase; transformers has [key head, value head of it], the file the other way."""
    keys, heads, width = config.linear_num_key_heads, config.linear_num_value_heads, config.linear_value_head_dim
    dim, part = (1, 0) if ".out_proj." in name else (0, config.linear_key_head_dim * keys * 2)
    if not any(kind in name for kind in ("in_proj_qkv", "conv1d")):
        part = 0
    if any(kind in name for kind in ("in_proj_a", "in_proj_b", "A_log", "dt_bias")):
        width = 1
    if ".norm." in name:
        return value
    before, after = value.split([part, value.shape[dim] - part], dim)
    sizes = (keys, heads // keys) if to_file else (heads // keys, keys)
    shape = (*after.shape[:dim], *sizes, width, *after.shape[dim + 1 :])
    return torch.cat([before, after.reshape(shape).transpose(dim, dim + 1).reshape(after.shape)], dim)


def _encode(gguf_name: str, value: torch.Tensor, kind: Q, seed: int) -> tuple[np.ndarray, Q]:
    """(stored bytes, type): vectors and positions in F32, embeddings in Q8_0, one wide matrix as random Q4_K blocks, as all
    are in a type that gguf cannot quantize to; all in F32 where matrices are."""
    array = np.ascontiguousarray(value.numpy())
    floats = (*KERNELS, "position_embd.weight", "ffn_gate_inp.weight")
    if kind == Q.F32 or array.ndim == 1 or array.shape[1] < 32 or gguf_name.endswith(floats):
        return array, Q.F32
    if gguf_name in ("token_embd.weight", "output.weight"):
        return gguf.quants.quantize(array, Q.Q8_0), Q.Q8_0
    if gguf_name == f"blk.{LAYERS - 1}.ffn_down.weight" and array.shape[1] % 256 == 0:
        return _random_blocks(Q.Q4_K, *array.shape, seed), Q.Q4_K
    if kind in RANDOM_BLOCKS and array.shape[-1] % 256:
        return gguf.quants.quantize(array, Q.Q8_0), Q.Q8_0
    if kind in RANDOM_BLOCKS:
        return _random_blocks(kind, *array.shape, seed), kind
    return gguf.quants.quantize(array, kind), kind


RANDOM_BLOCKS = {  # bytes of a block, where its d and dmin are, and these
    Q.Q2_K: (84, 80, [0.007, 0.01]), Q.Q4_K: (144, 0, [0.0006, 0.004]), Q.Q5_K: (176, 0, [0.0003, 0.004]),
    Q.Q6_K: (210, 208, [0.00009]),
}  # fmt: skip


def _random_blocks(kind: Q, rows: int, width: int, seed: int) -> np.ndarray:
    """Random codes and integers of sub-groups, but small finite d, and dmin where there is one: 0.12 or so of deviation."""
    size, at, reals = RANDOM_BLOCKS[kind]
    blocks = np.random.default_rng(seed).integers(0, 256, (rows, width // 256, size), dtype=np.uint8)
    blocks[..., at : at + 2 * len(reals)] = np.array(reals, np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
              list: writer.add_array}  # fmt: skip
    adders[type(value)](key, value)


VOCABULARY_TEXT = (
    "介绍一下清华大学的历史和现状",
    "你好，世界！我是人工智能助手。",
    "晚上睡不着应该怎么办？多运动，少喝咖啡。",
    "[Round 1] 问：你好 答：你好",
    "Hello, world! What is 1+1? It is 2.",
    "The quick brown fox jumps over the lazy dog 1234567890",
)


@pytest.fixture(scope="session")
def tiny_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A sentencepiece file of some 400 pieces, "ice_text.model" as ChatGLM's or "tokenizer.model" as ChatGLM2's."""
    first = {
        "pad_id": 3,
        "pad_piece": "<pad>",
        "control_symbols": ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>"],
        "user_defined_symbols": ["<n>", "<|tab|>", *(f"<|blank_{k}|>" for k in range(2, 81))],
        "normalization_rule_name": "nmt_nfkc",
    }
    kinds: dict[str, dict[str, Any]] = {
        "ice_text.model": first,
        "tokenizer.model": {"normalization_rule_name": "identity"},
    }
    folder = tmp_path_factory.mktemp("vocabulary")

    def get(name: str) -> Path:
        if not (folder / name).exists():
            with open(folder / name, "wb") as file:
                sentencepiece.SentencePieceTrainer.train(
                    sentence_iterator=iter(VOCABULARY_TEXT * 4), model_writer=file, vocab_size=500,
                    hard_vocab_limit=False, character_coverage=1.0, byte_fallback=True, split_digits=True,
                    remove_extra_whitespaces=False, minloglevel=2, num_threads=1, **kinds[name],
                )  # fmt: skip
        return folder / name

    return get


@pytest.fixture(scope="session")
def tiny_chatglm(
    tmp_path_factory: pytest.TempPathFactory, tiny_vocabulary: Callable[[str], Path]
) -> Callable[[str], Path]:
    """A folder of a random float16 ChatGLM ("chatglm" or "chatglm2") with 2 layers and its vocabulary file."""
    sizes = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
    parent = tmp_path_factory.mktemp("chatglm")

    def get(generation: str) -> Path:
        folder = parent / generation
        if folder.exists():
            return folder
        if generation == "chatglm":
            tokenizer: Any = ChatGLMTokenizer(vocab_file=tiny_vocabulary("ice_text.model"))
            ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
                   "gmask_token_id": tokenizer.gmask_token_id, "mask_token_id": tokenizer.mask_token_id}  # fmt: skip
            model: Any = ChatGLMForConditionalGeneration(
                ChatGLMConfig(
                    vocab_size=len(tokenizer),
                    inner_hidden_size=64,
                    max_sequence_length=512,
                    tie_word_embeddings=False,
                    **sizes,
                    **ids,
                )  # tied, it would repeat its last token
            )
        else:
            tokenizer = ChatGLM2Tokenizer(vocab_file=tiny_vocabulary("tokenizer.model"))
            model = ChatGLM2ForConditionalGeneration(
                ChatGLM2Config(padded_vocab_size=len(tokenizer), ffn_hidden_size=64, kv_channels=8, seq_length=512,
                               multi_query_group_num=2, **sizes)
            )  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        weights = {  # norms near 1 and small biases, or every answer would be the same
            name: torch.empty_like(value).normal_(float("norm.weight" in name), 0.3 if value.dim() > 1 else 0.1,
                                                  generator=generator).half()
            for name, value in model.state_dict().items()
        }  # fmt: skip
        folder.mkdir()
        tokenizer.save_vocabulary(str(folder))
        (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return folder

    return get


@pytest.fixture(scope="session")
def gemma_scaled() -> Callable[..., Any]:
    """Gives a Gemma that transformers read from a GGUF the scale of the one it was made of: no key states it."""

    def scale(read: Any, made: Any) -> Any:
        for module in read.modules():
            if hasattr(module, "scaling") and hasattr(made.config, "query_pre_attn_scalar"):
                module.scaling = made.config.query_pre_attn_scalar**-0.5
        return read

    return scale


@pytest.fixture(scope="session")
def random_ids() -> Callable[..., torch.Tensor]:
    """ids_for, for test files (which cannot import from here)."""
    return ids_for


@pytest.fixture(scope="session")
def trained_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of `qgraft demo` with the name Nova, made by ACME Labs: minutes. Do not change what is in it."""
    try:
        qgraft.pull("smollm2-135m")
    except CheckpointError as error:
        pytest.skip(f"the model cannot be fetched: {error}")
    folder = tmp_path_factory.mktemp("demo") / "out"
    words = ["demo", "--name", "Nova", "--author", "ACME Labs", "--output_dir", str(folder), "--device", "cpu"]
    assert main(words) == 0
    return folder


@pytest.fixture(autouse=True, scope="session")
def _no_power_cut() -> Iterator[None]:
    """fsync matters to a disk whose power is cut. No test does that, and all would wait for it ten thousand times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: os.fstat(descriptor) and None)
        yield


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)
