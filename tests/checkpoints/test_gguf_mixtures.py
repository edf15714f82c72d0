"""Mixtures with shared experts and dense layers in front, and DeepSeek's narrow states: what files may have beside what
test_gguf_architectures.py goes through, and what they are refused for. The judge is transformers' model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Q
from tiny_latent import APART, YARN_KEYS, keyed, kv_b_apart
from torch import Tensor, nn

import qgraft
from qgraft.adapter_files.gguf_lora import export_gguf_lora
from qgraft.errors import AdapterError, CheckpointError, OptionError, UnsupportedError

Maker = Callable[..., Any]
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "original_max_position_embeddings": 32,
    "mscale": 0.707, "mscale_all_dim": 0.707, "beta_fast": 32, "beta_slow": 1,
}  # fmt: skip
GROUPS = {"expert_group_count": 3, "expert_group_used_count": 2}


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids).logits
    return found


def off(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.fixture
def apart(tiny_gguf: Maker, make_gguf: Maker, tmp_path: Path) -> Any:
    """A file of DeepSeek 2 that has keys and values of its narrow states in a tensor each, with yarn."""
    made = kv_b_apart(tiny_gguf("deepseek2").model)
    drop = tuple(f"blk.{number}.attn_kv_b.weight" for number in range(3))
    return make_gguf(
        tmp_path / "apart.gguf", "deepseek2", config={"rope_parameters": YARN}, metadata=keyed(APART | YARN_KEYS),
        extra=made, drop=drop,
    )  # fmt: skip


def test_keys_and_values_of_narrow_states_that_lie_apart(apart: Any, random_ids: Maker, tmp_path: Path) -> None:
    model, _ = qgraft.load(apart.path, dtype="float32", device="cpu")
    ids = random_ids(apart.model, length=40)
    expected = logits(apart.model, ids)
    assert off(logits(model, ids), expected) < 1e-5
    (note,) = model.qgraft.info.notes
    assert note.startswith("kv_b_proj is held as floats and takes no LoRA")
    with pytest.raises(OptionError, match="no linear layer is named kv_b_proj"):
        qgraft.attach_lora(model, target_modules=["kv_b_proj"])
    qgraft.attach_lora(model, r=2, target_modules="all-linear")
    with pytest.raises(AdapterError, match=r"llama\.cpp passes over a LoRA on blk\.0\.attn_q\.weight"):
        export_gguf_lora(model, tmp_path / "lora.gguf")
    qgraft.detach_lora(model)
    qgraft.save(model, tmp_path / "saved.gguf")
    assert (tmp_path / "saved.gguf").read_bytes() == apart.path.read_bytes()


MORE: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # architecture, configuration, keys
    "yarn": ("deepseek2", {"rope_parameters": YARN}, YARN_KEYS),
    "yarn of DeepSeek 3": ("deepseek3", {"rope_parameters": YARN}, YARN_KEYS),
    "yarn of DeepSeek 3 without a multiplier": (
        "deepseek3",
        {"rope_parameters": {key: value for key, value in YARN.items() if not key.startswith("mscale")}},
        {**YARN_KEYS, "rope.scaling.yarn_log_multiplier": None},
    ),
    "queries out of a narrow state": ("deepseek2", {"q_lora_rank": 32}, {}),
    "groups": (
        "deepseek2", {"n_group": 3, "topk_group": 1, "topk_method": "group_limited_greedy"},
        GROUPS | {"expert_group_used_count": 1},
    ),
    "groups chosen by two": ("glm4moe", {"n_group": 3, "topk_group": 2}, GROUPS),
    "weights that are not divided": ("deepseek3", {"norm_topk_prob": False}, {"expert_weights_norm": False}),
    "norms of each head": ("command-r", {"use_qk_norm": True}, {}),
    "no dense layer": ("dots1", {"first_k_dense_replace": 0}, {"leading_dense_block_count": None}),
    "biases": ("ernie4_5", {"use_bias": True}, {}),
    "every second layer": ("ernie4_5-moe", {"moe_layer_interval": 2}, {"interleave_moe_layer_step": 2}),
    "other layers": (
        "qwen35moe", {"layer_types": ["linear_attention", "full_attention"] * 2}, {"full_attention_interval": 2},
    ),
}  # fmt: skip


@pytest.mark.spread(1)
@pytest.mark.parametrize("name", MORE)
def test_what_keys_and_tensors_say_is_computed(name: str, tiny_gguf: Maker, random_ids: Maker) -> None:
    architecture, config, keys = MORE[name]
    stored = "deepseek2" if architecture == "deepseek3" else architecture
    tiny = tiny_gguf(architecture, config=config, metadata=keyed(keys, stored))
    model, _ = qgraft.load(tiny.path, dtype="float32", device="cpu")
    ids = random_ids(tiny.model, length=60)
    expected = logits(tiny.model, ids)
    assert off(logits(model, ids), expected) < 1e-5
    plain = tiny_gguf(architecture)
    if plain.model.state_dict().keys() == tiny.model.state_dict().keys():  # with the same weights another model
        plain.model.load_state_dict(tiny.model.state_dict())
        assert off(logits(plain.model, ids), expected) > 1e-3


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "another gate": ("deepseek2", {"expert_gating_func": 3}, "expert_gating_func: got 3, expected 1 or 2"),
    "divided weights": ("deepseek2", {"expert_weights_norm": True}, "expert_weights_norm: got True, expected false, where"),
    "no word on groups": ("deepseek2", {"expert_group_count": 3}, "group_used_count: got None, expected a number of the 3"),
    "uneven groups": ("deepseek2", GROUPS | {"expert_group_count": 4}, "group_count: got 4, expected a divisor of 6"),
    "more groups than there are": ("glm4moe", GROUPS | {"expert_group_used_count": 4}, "used_count: got 4, expected an"),
    "dense layers past all": ("deepseek2", {"leading_dense_block_count": 4}, "dense_block_count: got 4, expected an integer"),
    "other layers": ("deepseek2", {"leading_dense_block_count": 0}, r"missing model\.layers\.0\.mlp\.experts\.gate_up_proj"),
    "all of a head rotated": ("deepseek2", {"rope.dimension_count": 48}, "dimension_count: got 48, expected an even"),
    "few key heads": ("deepseek2", {"attention.head_count_kv": 2}, "head_count_kv: got 2, expected attention.head_count"),
    "many key heads, apart": ("deepseek2", APART | {"attention.head_count_kv": 4}, "head_count_kv: got 4, expected 1, and"),
    "scores scaled": ("deepseek2", {"rope.scaling.attn_factor": 2.0}, "attn_factor: got 2.0, expected 1"),
    "linear": ("deepseek2", {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}, "type: got 'linear', expected none"),
    "softmax": ("glm4moe", {"expert_gating_func": 1}, "expert_gating_func: got 1, expected 2"),
    "a number for a word": ("dots1", {"expert_weights_norm": 2}, "expert_weights_norm: got 2, expected true or false"),
    "a factor": ("lfm2moe", {"expert_weights_scale": 2.5}, "expert_weights_scale: got 2.5, expected 0 or 1"),
    "another shared expert": ("ernie4_5-moe", {"expert_shared_feed_forward_length": 7}, "got 7, expected expert_feed"),
    "two shared experts": ("hunyuan-moe", {"expert_shared_count": 2}, "expert_shared_count: got 2, expected 1"),
    "weights that are not divided": ("minimax-m2", {"expert_weights_norm": False}, "weights_norm: got False, expected True"),
    "softmax of MiniMax": ("minimax-m2", {"expert_gating_func": 1}, "expert_gating_func: got 1, expected 2"),
    "a bias too many": ("qwen35moe", {"expert_shared_count": 1}, "expert_shared_count: got 1, expected 0"),
}  # fmt: skip


@pytest.mark.spread(2)
@pytest.mark.parametrize("name", REFUSED)
def test_what_mixtures_are_refused_for(name: str, make_gguf: Maker, tmp_path: Path) -> None:
    architecture, keys, message = REFUSED[name]
    tiny = make_gguf(tmp_path / "tiny.gguf", architecture, metadata=keyed(keys, architecture), types=(Q.F32,))
    with pytest.raises((CheckpointError, UnsupportedError), match=rf"(?s){message}"):
        qgraft.load(tiny.path, device="cpu")
