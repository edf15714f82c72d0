"""Metadata keys and rotary tensors of tiny float32 files, each judged by llama.cpp's log-probabilities.

Each case has a control: the plain file's model, which must be far from what llama.cpp computes of the file with the key.
Otherwise a key that nobody reads would pass. llama.cpp runs all files in one process.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Q

from qgraft.checkpoints.gguf_config import gguf_config
from qgraft.checkpoints.gguf_file import read_gguf
from qgraft.checkpoints.gguf_key_parts import IGNORED
from qgraft.checkpoints.gguf_keys import TABLE
from qgraft.checkpoints.gguf_model import load_gguf

LENGTH, CONTEXT = 96, 256
TOLERANCE, CONTROL = 1e-2, 5e-2
LAYER_NORM = ("cohere2", "command-r", "falcon", "gpt2", "nemotron", "stablelm", "starcoder2")
# of some sizes only in llama.cpp: test_llamacpp.py; T5: test_llamacpp_pairs.py
SMALL = {name: keys for name, keys in TABLE.items() if name not in ("deepseek2", "gemma3n", "t5")}
ROTATING = tuple(
    name for name, keys in SMALL.items() if keys.rotates and name != "gemma4"
)  # it takes none of these keys
GEMMA = {
    "num_hidden_layers": 6,  # the last without a window in Gemma 3
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 8,
}
CONFIGS = {
    "gemma2": GEMMA, "gemma3": GEMMA, "olmo2": {"num_hidden_layers": 6}, "smollm3": {"num_hidden_layers": 6},
}  # fmt: skip
LAYERS64 = {"num_hidden_layers": 64, "layer_types": ["full_attention"] * 64}
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32}
ATTN = {"rope.scaling.attn_factor": 1.3}
FACTORS = (1 + 3 * np.random.default_rng(0).random(8)).astype(np.float32)
LONGROPE = {"rope_factors_long.weight": FACTORS, "rope_factors_short.weight": FACTORS**0.5}


@dataclass(frozen=True)
class Case:
    """Keys and tensors that a plain file of the architecture does not have."""

    architecture: str
    keys: dict[str, Any]
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    length: int = LENGTH
    config: dict[str, Any] = field(default_factory=dict)


ROTATIONS = {  # tried on every architecture
    "base, factor, attn_factor": {"rope.freq_base": 123.0, "rope.scale_linear": 4.0, **ATTN},
    "yarn with attn_factor": {**YARN, **ATTN},
}
MORE = {  # the same code for all of them
    "base": {"rope.freq_base": 123.0},
    "linear": {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    "factor without a type": {"rope.scaling.factor": 4.0},
    "scale_linear": {"rope.scale_linear": 4.0},
    "both factors": {"rope.scale_linear": 8.0, "rope.scaling.factor": 4.0},
    "attn_factor": ATTN,
    "yarn": YARN,
    "yarn without a context": {key: value for key, value in YARN.items() if not key.endswith("length")},
}


CASES = {
    **{
        f"{name}: {label}": Case(name, keys)
        for name in ROTATING
        for label, keys in {**ROTATIONS, **(MORE if name in ("llama", "gemma3") else {})}.items()
        # transformers has no yarn for Phi 3; of gpt-oss its ramp is not rounded, as the model was trained, in llama.cpp it is
        if not (name in ("phi3", "gpt-oss") and "yarn" in label)
    },
    **{f"{name}: a part": Case(name, {"rope.dimension_count": 4 if name in ("glm4", "nemotron") else 8})
       for name in ("glm4", "nemotron", "phi3", "stablelm")},
    **{f"{name}: no count": Case(name, {"rope.dimension_count": None}) for name in ("glm4", "nemotron", "stablelm")},
    **{
        f"{name}: epsilon": Case(name, {f"attention.layer_norm_{'' if name in LAYER_NORM else 'rms_'}epsilon": 0.3})
        for name in SMALL
        # llama.cpp norms queries and keys of delta nets with it, too, where transformers has 1e-6: 0.013 apart with 0.3
        if name != "qwen35moe"
    },
    **{f"{name}: {label}": Case(name, keys) for name in ("gemma2", "gemma3") for label, keys in {
        "window": {"attention.sliding_window": 5}, "pattern": {"attention.sliding_window_pattern": 3},
        "pattern as a list": {"attention.sliding_window_pattern": [False, True, True, False, True, False]},
        "final cap": {"final_logit_softcapping": 3.0},
    }.items()},
    **{f"granite: {key}": Case("granite", {key: value}) for key, value in {
        "attention.scale": 0.05, "embedding_scale": 0.3, "residual_scale": 0.2, "logit_scale": 3.0,
    }.items()},
    "qwen35: other layers": Case(
        "qwen35", {"full_attention_interval": 2}, config={"layer_types": ["linear_attention", "full_attention"] * 2}
    ),
    "qwen35: as many key heads": Case("qwen35", {}, config={"linear_num_key_heads": 4}),
    "qwen35: the whole head": Case("qwen35", {"rope.dimension_count": 32}),
    "lfm2: other layers": Case("lfm2", {}, config={"layer_types": ["conv", "conv", "full_attention"]}),
    "granite: no scales": Case("granite", {"attention.scale": 0.0, "embedding_scale": 0.0, "residual_scale": None}),
    **{f"{name}: rope_freqs": Case(name, {}, {"rope_freqs.weight": FACTORS}) for name in ("exaone4", "granite")},
    **{f"exaone4: 64 layers, {label}": Case("exaone4", keys, config=LAYERS64) for label, keys in {
        "window": {"attention.sliding_window": 5}, "no window stated": {},
        "pattern": {"attention.sliding_window": 5, "attention.sliding_window_pattern": [True, False] * 32},
    }.items()},
    **{f"mistral3: {label}": Case("mistral3", keys) for label, keys in {
        "no temperature": {"attention.temperature_scale": None}, "temperature": {"attention.temperature_scale": 2.0},
        "no yarn": {"attention.temperature_scale": 0.0, "rope.scaling.type": "none"},
        "multiplier": {"rope.scaling.yarn_log_multiplier": 2.0}, "context": {"rope.scaling.original_context_length": 40},
        "betas": {"rope.scaling.yarn_beta_fast": 0.5, "rope.scaling.yarn_beta_slow": 0.02},
    }.items()},
    **{f"olmo2: window, {label}": Case("olmo2", {"attention.sliding_window": 5, **keys}) for label, keys in {
        "alone": {}, "yarn": {**YARN, **ATTN}, "linear": {"rope.scaling.factor": 4.0},
        "pattern": {"attention.sliding_window_pattern": 3},
        "list": {"attention.sliding_window_pattern": [False, True, True, False, True, False]},
    }.items()},
    **{f"gemma4: {label}": Case("gemma4", keys) for label, keys in {
        "base": {"rope.freq_base": 123.0}, "window's base": {"rope.freq_base_swa": 123.0},
        "window": {"attention.sliding_window": 5}, "final cap": {"final_logit_softcapping": 1.0},
    }.items()},
    "gemma4: all of a head": Case("gemma4", {}, {"rope_freqs.weight": np.ones(16, np.float32)}),
    "gemma4: keys that are values": Case(
        "gemma4", {}, config={"attention_k_eq_v": True, "num_global_key_value_heads": 1, "num_kv_shared_layers": 0,
                              "hidden_size_per_layer_input": 0, "use_double_wide_mlp": False}
    ),
    "gemma2: attention cap": Case("gemma2", {"attn_logit_softcapping": 1.0}),
    "gemma2: no window stated": Case("gemma2", {"attention.sliding_window": None}),
    "gemma3: no window": Case("gemma3", {"attention.sliding_window": 0}),
    "gemma3: window's base": Case("gemma3", {"rope.freq_base_swa": 123.0}),
    "llama: rope_freqs": Case("llama", {}, {"rope_freqs.weight": FACTORS}),
    "llama: rope_freqs, linear, attn_factor": Case(
        "llama", {"rope.scaling.factor": 4.0, **ATTN}, {"rope_freqs.weight": FACTORS}
    ),
    "llama: rope_freqs, yarn": Case("llama", YARN, {"rope_freqs.weight": FACTORS}),
    "llama: longrope": Case(
        "llama", {**ATTN, "rope.scaling.type": "longrope", "rope.scaling.original_context_length": 64}, LONGROPE
    ),
    "phi3: longrope, long text": Case("phi3", {**ATTN, "rope.scaling.original_context_length": 64}, LONGROPE),
    "phi3: longrope, short text": Case("phi3", {**ATTN, "rope.scaling.original_context_length": CONTEXT}, LONGROPE),
    "phi3: longrope with its type": Case(
        "phi3", {"rope.scaling.type": "longrope", "rope.scaling.original_context_length": 64}, LONGROPE
    ),
    "phi3: longrope with a factor": Case(
        "phi3", {"rope.scaling.factor": 2.0, "rope.scaling.original_context_length": 64}, LONGROPE
    ),
}  # fmt: skip
WITHOUT_EFFECT = {
    "none with a factor": Case("llama", {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}),
    "factor of 0": Case("qwen2", {"rope.scaling.factor": 0.0}),
    "yarn without a factor": Case("qwen3", {"rope.scaling.type": "yarn"}),
    "no base": Case("llama", {"rope.freq_base": None}),
    "no lengths": Case("llama", {"attention.key_length": None, "attention.value_length": None}),
    "lists": Case("qwen2", {"attention.head_count": [4, 4], "attention.head_count_kv": [2, 2]}),
    "another size of the vocabulary": Case("llama", {"vocab_size": 7}),
    "parallel residual by key only": Case("stablelm", {"use_parallel_residual": True}),
    "rotations of gpt2": Case("gpt2", {"rope.freq_base": 5.0, "rope.scaling.factor": 4.0, "rope.dimension_count": 8}),
    **{key: Case("llama", {key: value}) for key, value in {
        "attention.sliding_window_pattern": 3, "pooling_type": 3, "rope.freq_base_swa": 123.0,
        "rope.scaling.finetuned": True, "tensor_data_layout": "x", "vocab_size": 7, "attention.new_key": 3.0,
        "logit_scale": 1.0, "attention.causal": True, "expert_count": 0, "attention.clamp_kqv": 0.0,
    }.items()},
}  # fmt: skip


THE_SAME = ("llama: linear", "llama: scale_linear")  # the older key says what the newer ones do


def prompt_of(length: int) -> list[int]:
    return torch.randint(10, 250, (length,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module")
def judged(
    request, make_gguf: Callable[..., Any], llamacpp_behind: Any, tmp_path_factory: Any
) -> dict[str, tuple[Any, Any]]:
    """Of each case that runs its file and llama.cpp's log-probabilities; of their architectures those of the plain file."""
    folder, here = (
        tmp_path_factory.mktemp("keys"),
        [item for item in request.session.items if item.path == request.path],
    )
    labels = {item.callspec.params["label"] for item in here if hasattr(item, "callspec")} | set(THE_SAME)
    cases = {label: case for label, case in {**CASES, **WITHOUT_EFFECT}.items() if label in labels}
    cases |= {name: Case(name, {}) for name in {case.architecture for case in cases.values()}}
    files = []
    for index, case in enumerate(cases.values()):
        name, config = case.architecture, {**CONFIGS.get(case.architecture, {}), **case.config}
        metadata = {f"{name}.{key}": value for key, value in case.keys.items()}
        path = folder / f"{index}.gguf"
        make_gguf(path, name, config=config, metadata=metadata, extra=case.tensors, types=(Q.F32,))
        files.append((path, prompt_of(case.length), CONTEXT))
    theirs = llamacpp_behind(files)
    return {label: (path, found) for label, (path, _, _), found in zip(cases, files, theirs, strict=True)}


@functools.cache
def logprobs(path: Path, length: int) -> torch.Tensor:
    """Ours of every token behind the prompt."""
    model, _ = load_gguf(path, torch.float32)
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([prompt_of(length)])).logits[0, -1].double(), -1)


def gap(path: Path, length: int, theirs: dict[int, float]) -> float:
    """The largest difference of our log-probabilities behind the prompt to llama.cpp's."""
    ours = logprobs(path, length)
    return max(abs(float(ours[token]) - logprob) for token, logprob in theirs.items())


@pytest.mark.spread(11)
@pytest.mark.parametrize("label", CASES)
def test_a_key_does_what_it_does_in_llamacpp(judged, label):
    case, (path, theirs) = CASES[label], judged[label]
    assert gap(path, case.length, theirs) < TOLERANCE
    assert gap(judged[case.architecture][0], case.length, theirs) > CONTROL, "the key does too little"


@pytest.mark.parametrize("label", WITHOUT_EFFECT)
def test_a_key_without_effect_has_none_in_llamacpp(judged, label):
    case, (path, theirs) = WITHOUT_EFFECT[label], judged[label]
    assert theirs == judged[case.architecture][1]
    assert gap(path, case.length, theirs) < TOLERANCE


def test_every_key_that_is_ignored_was_judged():
    assert IGNORED.keys() <= WITHOUT_EFFECT.keys()


def test_the_older_keys_say_the_same(judged):
    first, second = (gguf_config(read_gguf(judged[label][0])) for label in THE_SAME)
    second.name_or_path = first.name_or_path
    assert first.to_dict() == second.to_dict()
