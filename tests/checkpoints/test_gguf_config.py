"""The configuration of a GGUF file from its keys. What keys do to the log-probabilities is judged by llama.cpp in
tests/oracle/test_gguf_keys.py; here transformers' own reader, and its models, judge."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Q
from gguf_copies import write_copy
from torch import Tensor, nn
from transformers import AutoConfig

import qgraft
from qgraft.checkpoints.gguf_config import gguf_config
from qgraft.checkpoints.gguf_file import read_gguf
from qgraft.checkpoints.gguf_model import load_gguf
from qgraft.errors import CheckpointError, UnsupportedError

Maker = Callable[..., Any]
ARCHITECTURES = (
    "gemma2", "gemma3", "gpt2", "llama", "nemotron", "phi3", "qwen2", "qwen3", "stablelm", "starcoder2"
)  # fmt: skip


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits.float()


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def written(make_gguf: Maker, folder: Path, architecture: str, keys: dict[str, Any], **options: Any) -> Any:
    """A tiny file with these keys of its architecture."""
    metadata = {f"{architecture}.{key}": value for key, value in keys.items()}
    return make_gguf(folder / "tiny.gguf", architecture, metadata=metadata, **options)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_configuration_is_what_transformers_reads(tiny_gguf: Maker, architecture: str, tied: bool) -> None:
    tiny = tiny_gguf(architecture, tied=tied or architecture == "gemma2")
    ours = gguf_config(read_gguf(tiny.path)).to_dict()
    theirs = AutoConfig.from_pretrained(tiny.path.parent, gguf_file=tiny.path.name).to_dict()
    assert ours.pop("_name_or_path", str(tiny.path)) == str(tiny.path)
    rope, plain = ours.pop("rope_parameters", None), theirs.pop("rope_parameters", None)
    assert ours.get("query_pre_attn_scalar") == getattr(tiny.model.config, "query_pre_attn_scalar", None)
    known = {"query_pre_attn_scalar", "n_positions", "n_inner"}  # which transformers' reader passes over
    wide = {key: value for key, value in ours.items() if theirs.get(key) != value and key not in known}
    assert set(wide) <= {"norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "eos_token_id"}
    for key, value in wide.items():
        assert value == pytest.approx(getattr(tiny.model.config, key), rel=1e-6)  # stored in 32 bits
    assert rope == plain


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("gpt2", {"n_positions": 512}),
        ("gpt2", {"n_inner": 96}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0}}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rms_norm_eps": 0.25}),
        ("nemotron", {"norm_eps": 0.25}),
        ("qwen2", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 100.0,
                                       "original_max_position_embeddings": 16}}),
        ("qwen3", {"head_dim": 32}),
        ("stablelm", {"rope_parameters": {"rope_type": "default", "rope_theta": 10.0, "partial_rotary_factor": 0.5}}),
        ("stablelm", {"rope_parameters": {"rope_type": "default", "rope_theta": 10.0, "partial_rotary_factor": 1.0}}),
        ("starcoder2", {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}),
    ],
)  # fmt: skip
def test_keys_that_transformers_passes_over(
    make_gguf: Maker, random_ids: Maker, tmp_path: Path, architecture: str, config: dict[str, Any]
) -> None:
    """Its reader leaves these at their defaults, and computes something else without a word."""
    rope = config.get("rope_parameters", {})
    keys: dict[str, Any] = {}
    if "factor" in rope:
        keys |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": rope["factor"]}
    if "original_max_position_embeddings" in rope:
        keys["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    tiny = written(make_gguf, tmp_path, architecture, keys, config=config)
    ids = random_ids(tiny.model, length=32)
    model, _ = load_gguf(tiny.path, torch.float32)
    assert relative(logits(model, ids), logits(tiny.model, ids)) < 1e-5


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 512}
YARN_KEYS = {
    "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 512,
}  # fmt: skip
AUTHORS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # what llama.cpp passes over
    "yarn's beta_fast": ("qwen2", {"rope.scaling.yarn_beta_fast": 8.0}, {"beta_fast": 8.0}),
    "yarn's beta_slow": ("qwen3", {"rope.scaling.yarn_beta_slow": 0.05}, {"beta_slow": 0.05}),
    "yarn's attention factor": ("llama", {"rope.scaling.yarn_attn_factor": 1.4}, {"attention_factor": 1.4}),
}  # fmt: skip


@pytest.mark.parametrize("name", AUTHORS)
def test_yarn_is_that_of_the_authors_model(make_gguf: Maker, random_ids: Maker, tmp_path: Path, name: str) -> None:
    """llama.cpp's converter writes these keys from config.json, and llama.cpp passes over them."""
    architecture, keys, options = AUTHORS[name]
    tiny = written(make_gguf, tmp_path, architecture, YARN_KEYS | keys, config={"rope_parameters": {**YARN, **options}})
    ids = random_ids(tiny.model, length=100)
    model, _ = load_gguf(tiny.path, torch.float32)
    assert relative(logits(model, ids), logits(tiny.model, ids)) < 1e-5
    plain, _ = load_gguf(written(make_gguf, tmp_path, architecture, YARN_KEYS).path, torch.float32)
    assert relative(logits(plain, ids), logits(tiny.model, ids)) > 1e-3


@pytest.mark.parametrize("architecture", ["phi3", "starcoder2"])
def test_the_window_is_that_of_the_authors_model(
    make_gguf: Maker, random_ids: Maker, tmp_path: Path, architecture: str
) -> None:
    keys, config = {"attention.sliding_window": 8}, {"sliding_window": 8}
    tiny = written(make_gguf, tmp_path, architecture, keys, config=config)
    ids = random_ids(tiny.model, length=32)
    model, _ = load_gguf(tiny.path, torch.float32)
    assert relative(logits(model, ids), logits(tiny.model, ids)) < 1e-5
    plain, _ = load_gguf(written(make_gguf, tmp_path, architecture, {**keys, "attention.sliding_window": 0}).path,
                         torch.float32)  # fmt: skip
    assert relative(logits(plain, ids), logits(tiny.model, ids)) > 1e-2


def longrope(rotated: int = 16) -> tuple[dict[str, np.ndarray], dict[str, Any], dict[str, Any]]:
    """(tensors, keys, transformers' parameters) of a longrope."""
    random = np.random.default_rng(0)
    long, short = (1 + random.random(rotated // 2).astype(np.float32) * wide for wide in (3, 1))
    parameters = {
        "rope_type": "longrope", "rope_theta": 10000.0, "long_factor": long.tolist(), "short_factor": short.tolist(),
        "original_max_position_embeddings": 32, "attention_factor": float(np.float32(1.19)), "factor": 4.0,
    }  # fmt: skip
    keys = {"rope.scaling.attn_factor": 1.19, "rope.scaling.original_context_length": 32}
    return {"rope_factors_long.weight": long, "rope_factors_short.weight": short}, keys, parameters


def test_the_length_of_the_text_decides_about_longrope(make_gguf: Maker, random_ids: Maker, tmp_path: Path) -> None:
    """As in the authors' code. llama.cpp goes by its session, and takes the long list for all texts of a long one."""
    tensors, keys, parameters = longrope()
    config = {"rope_parameters": parameters, "original_max_position_embeddings": 32}
    tiny = written(make_gguf, tmp_path, "phi3", keys, config=config, extra=tensors)
    model, _ = load_gguf(tiny.path, torch.float32)
    for length in (24, 32, 33, 64, 24):
        ids = random_ids(tiny.model, rows=1, length=length)
        assert relative(logits(model, ids), logits(tiny.model, ids)) < 1e-5
    long = {**parameters, "short_factor": parameters["long_factor"]}
    other = make_gguf(tmp_path / "long.gguf", "phi3", config={**config, "rope_parameters": long}).model
    for length, differs in ((24, True), (64, False)):
        ids = random_ids(tiny.model, rows=1, length=length)
        assert (relative(logits(model, ids), logits(other, ids)) > 1e-3) == differs


def test_longrope_of_a_part_of_a_head(make_gguf: Maker, random_ids: Maker, tmp_path: Path) -> None:
    tensors, keys, parameters = longrope(rotated=12)
    config = {"rope_parameters": {**parameters, "partial_rotary_factor": 0.75}, "original_max_position_embeddings": 32}
    tiny = written(make_gguf, tmp_path, "phi3", keys, config=config, extra=tensors)
    ids = random_ids(tiny.model, rows=1, length=64)
    model, _ = load_gguf(tiny.path, torch.float32)
    assert relative(logits(model, ids), logits(tiny.model, ids)) < 1e-5


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "longrope without its tensors": ("llama", {"rope.scaling.type": "longrope"}, r"expected no longrope, or a tensor rope_f"),
    "longrope elsewhere": ("qwen2", {"rope.scaling.type": "longrope"}, "got 'longrope', expected none or linear or yarn"),
    "yarn of phi3": ("phi3", {"rope.scaling.type": "yarn"}, "got 'yarn', expected none or linear or longrope"),
    "another type": ("llama", {"rope.scaling.type": "su"}, "got 'su'"),
    "one type and a factor": ("gemma2", {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, "expected linear with"),
    "layers that differ": ("llama", {"attention.head_count_kv": [2, 4]}, r"got \[2, 4\], expected the same number"),
    "widths that differ": ("qwen2", {"feed_forward_length": [256, 128]}, r"got \[256, 128\], expected the same number"),
    "a part of a head": ("llama", {"rope.dimension_count": 8}, "dimension_count: got 8, expected attention.key_length"),
    "head_dim": ("qwen2", {"attention.key_length": 32}, "key_length: got 32, expected embedding_length / "),
    "two lengths": ("llama", {"attention.value_length": 8}, "value_length: got 8, expected attention.key_length"),
    "experts": ("qwen2", {"expert_count": 8, "expert_used_count": 2}, "expert_count: got 8, expected 0"),
    "gpt2's heads": ("gpt2", {"attention.head_count_kv": 2}, "head_count_kv: got 2, expected attention.head_count"),
    "two bases": ("gemma2", {"rope.freq_base_swa": 123.0}, "freq_base_swa: got 123.0, expected rope.freq_base"),
    "window": ("llama", {"attention.sliding_window": 64}, "sliding_window: got 64, expected 0, or at least context_length"),
    "extrapolation": ("llama", {**YARN_KEYS, "rope.scaling.yarn_ext_factor": 0.5}, "yarn_ext_factor: got 0.5, expected 1"),
    "mscale": ("llama", {**YARN_KEYS, "rope.scaling.yarn_log_multiplier": 0.5}, "yarn_log_multiplier: got 0.5, expected 0"),
    "no cause": ("qwen3", {"attention.causal": False}, "attention.causal: got False, expected True"),
    "a number for true": ("qwen3", {"attention.causal": 0}, "attention.causal: got 0, expected True"),
    "parallel": ("llama", {"use_parallel_residual": True}, "use_parallel_residual: got True"),
    "sections": ("qwen2", {"rope.dimension_sections": [2, 2, 2, 2]}, r"dimension_sections: got \[2, 2, 2, 2\]"),
    **{
        f"{key} of {architecture}": (architecture, {key: 0.125}, f"{architecture}.{key}: got 0.125, expected ")
        for architecture in ("llama", "gemma3", "gpt2")
        for key in ("logit_scale", "residual_scale", "embedding_scale", "attention.scale", "attention.clamp_kqv",
                    "attention.max_alibi_bias", "attn_logit_softcapping", "attention.temperature_scale")
    },
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(make_gguf: Maker, tmp_path: Path, name: str) -> None:
    architecture, keys, message = REFUSED[name]
    tiny = written(make_gguf, tmp_path, architecture, keys)
    with pytest.raises(UnsupportedError, match=message) as caught:
        gguf_config(read_gguf(tiny.path))
    assert str(tiny.path) in str(caught.value)


def test_all_that_is_refused_is_named_at_once(make_gguf: Maker, tmp_path: Path) -> None:
    tiny = written(make_gguf, tmp_path, "qwen3", {"logit_scale": 0.5, "attention.causal": False, "expert_count": 4})
    with pytest.raises(UnsupportedError, match=r"(?s)logit_scale: .*causal: .*expert_count: "):
        gguf_config(read_gguf(tiny.path))


@pytest.mark.parametrize(
    "keys",
    [
        {"logit_scale": 1.0, "residual_scale": 1.0, "embedding_scale": 0.0, "attention.clamp_kqv": 0.0},
        {"attention.scale": 0.25, "attention.causal": True, "use_parallel_residual": False, "expert_count": 0},
        {"attention.sliding_window": 128, "attention.sliding_window_pattern": 3, "rope.dimension_sections": [0, 0, 0]},
        {"attention.key_length_swa": 16, "rope.dimension_count_swa": 16, "embedding_length_out": 64, "vocab_size": 7},
        {"rope.scaling.finetuned": True, "rope.scaling.yarn_ext_factor": 0.5, "pooling_type": 3},
        {"attention.head_count_kv": [2, 2], "feed_forward_length": [256, 256], "attention.head_count": [4, 4]},
    ],
)
def test_what_is_computed_anyway_is_no_problem(make_gguf: Maker, tmp_path: Path, keys: dict[str, Any]) -> None:
    tiny = written(make_gguf, tmp_path, "llama", keys)
    model, _ = load_gguf(tiny.path, torch.float32)
    assert model.qgraft.info.notes == ()
    plain = gguf_config(read_gguf(make_gguf(tiny.path, "llama").path))
    assert model.config.to_dict() | {"dtype": None} == plain.to_dict() | {"dtype": None}


BROKEN: dict[str, tuple[str, dict[str, Any], str]] = {
    "no context": ("llama", {"context_length": None}, "context_length: got None, expected a positive integer"),
    "no epsilon": ("llama", {"attention.layer_norm_rms_epsilon": None}, "rms_epsilon: got None, expected a number from 0 on"),
    "epsilon below": ("gpt2", {"attention.layer_norm_epsilon": -1.0}, "layer_norm_epsilon: got -1.0"),
    "the other epsilon": ("stablelm", {"attention.layer_norm_epsilon": None, "attention.layer_norm_rms_epsilon": 0.1},
                          "stablelm.attention.layer_norm_epsilon: got None"),
    "base of 0": ("llama", {"rope.freq_base": 0.0}, "freq_base: got 0.0, expected a number greater than 0"),
    "NaN": ("llama", {"rope.scaling.factor": float("nan")}, "factor: got nan, expected a number from 0 on"),
    "a factor of text": ("llama", {"rope.scale_linear": "4"}, "scale_linear: got '4', expected a number"),
    "an odd part": ("phi3", {"rope.dimension_count": 7}, "dimension_count: got 7, expected an even integer up to 16"),
    "too large a part": ("nemotron", {"rope.dimension_count": 32}, "dimension_count: got 32, expected an even integer up to"),
    "no list": ("llama", {"attention.head_count_kv": [2.0, 2.0]}, "head_count_kv: got"),
    "a pattern of text": ("gemma3", {"attention.sliding_window_pattern": "6"}, "got '6', expected a number of layers"),
    "a short pattern": ("gemma3", {"attention.sliding_window_pattern": [True]}, r"got \[True\], expected 2 times true"),
    "no window": ("gemma2", {"attention.sliding_window": 0}, "sliding_window: got 0, expected a positive integer"),
    "no cap": ("gemma2", {"final_logit_softcapping": 0.0}, "softcapping: got 0.0, expected a number greater than 0"),
    "another vocabulary": ("llama", {"tokens": 5}, "got 5 tokens, expected"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken(make_gguf: Maker, tmp_path: Path, name: str) -> None:
    architecture, keys, message = BROKEN[name]
    options: dict[str, Any] = {"tokenizer": False} if "tokens" in keys else {}
    metadata = {f"{architecture}.{key}": value for key, value in keys.items()}
    if "tokens" in keys:
        metadata = {"tokenizer.ggml.tokens": ["a"] * keys["tokens"]}
    tiny = make_gguf(tmp_path / "tiny.gguf", architecture, metadata=metadata, **options)
    with pytest.raises(CheckpointError, match=message):
        gguf_config(read_gguf(tiny.path))


def test_sizes_that_cannot_be_are_all_named(make_gguf: Maker, tmp_path: Path) -> None:
    tiny = written(make_gguf, tmp_path, "llama", {"block_count": 200_000, "attention.head_count": 0})
    with pytest.raises(
        CheckpointError, match=r"(?s)does not fit the tensors:\n.*block_count: got 200000.*head_count: got 0"
    ):
        gguf_config(read_gguf(tiny.path))


@pytest.mark.parametrize(
    ("tensor", "values", "message"),
    [
        ("rope_freqs.weight", np.ones(7, np.float32), r"rope_freqs\.weight \[7\] fits no rotary embedding"),
        ("rope_freqs.weight", np.zeros(8, np.float32), r"rope_freqs\.weight: expected positive numbers"),
        (
            "rope_factors_long.weight",
            np.ones(8, np.float32),
            "1 tensors have no place in the architecture llama: rope_f",
        ),
    ],
)
def test_rotary_factors_that_do_not_fit(
    make_gguf: Maker, tmp_path: Path, tensor: str, values: np.ndarray, message: str
) -> None:
    tiny = written(make_gguf, tmp_path, "llama", {}, extra={tensor: values})
    with pytest.raises(CheckpointError, match=message):
        load_gguf(tiny.path, torch.float32)


def test_half_a_longrope_is_refused(make_gguf: Maker, tmp_path: Path) -> None:
    tensors, keys, _ = longrope()
    tensors.pop("rope_factors_short.weight")
    tiny = written(make_gguf, tmp_path, "phi3", keys, extra=tensors)
    with pytest.raises(UnsupportedError, match=r"a tensor rope_factors_short\.weight"):
        load_gguf(tiny.path, torch.float32)


def test_unknown_keys_are_named_once(make_gguf: Maker, tmp_path: Path) -> None:
    keys: dict[str, Any] = {f"attention.new_{i}": i for i in range(10)}
    model, _ = load_gguf(written(make_gguf, tmp_path, "llama", keys).path, torch.float32)
    (note,) = model.qgraft.info.notes
    assert note.startswith("metadata keys unknown to qgraft, without effect: llama.attention.new_0, llama.")
    assert note.endswith(", llama.attention.new_7 and 2 more")
    metadata = {"mistral.block_count": 7, "general.mine": "x", "tokenizer.ggml.mine": 1, "quantize.imatrix.file": "x"}
    model, _ = load_gguf(make_gguf(tmp_path / "other.gguf", "llama", metadata=metadata).path, torch.float32)
    assert model.qgraft.info.notes == ("metadata keys unknown to qgraft, without effect: mistral.block_count",)


def test_sentencepiece_has_its_usual_ids_and_others_have_none(make_gguf: Maker, tmp_path: Path) -> None:
    metadata = {f"tokenizer.ggml.{role}_token_id": None for role in ("bos", "eos", "padding")}
    for architecture, expected in (("phi3", (1, 2, None)), ("llama", (None, None, None))):
        config = gguf_config(read_gguf(make_gguf(tmp_path / "tiny.gguf", architecture, metadata=metadata).path))
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == expected


def test_every_key_is_in_a_saved_file_unchanged(make_gguf: Maker, tmp_path: Path) -> None:
    keys = {"rope.scale_linear": 4.0, "attention.new": [1, 2], "rope.scaling.attn_factor": 1.3, "vocab_size": 7}
    tiny = written(make_gguf, tmp_path, "llama", keys)
    model, _ = load_gguf(tiny.path, torch.float32)
    qgraft.save(model, tmp_path / "saved.gguf")
    source, saved = read_gguf(tiny.path), read_gguf(tmp_path / "saved.gguf")
    assert list(saved.metadata.items()) == list(source.metadata.items())
    assert saved.metadata_types == source.metadata_types
    assert saved.metadata["llama.attention.new"] == [1, 2]


def test_alignment_of_the_file_does_not_reach_the_configuration(make_gguf: Maker, tmp_path: Path) -> None:
    tiny = make_gguf(tmp_path / "tiny.gguf", "llama")
    reader = gguf.GGUFReader(tiny.path)
    writer = gguf.GGUFWriter(tmp_path / "aligned.gguf", "llama")
    writer.add_custom_alignment(4096)
    write_copy(reader, writer)
    aligned = read_gguf(tmp_path / "aligned.gguf")
    assert aligned.alignment == 4096
    got, expected = gguf_config(aligned), gguf_config(read_gguf(tiny.path))
    got.name_or_path = expected.name_or_path
    assert got.to_dict() == expected.to_dict()


def test_float32_files_are_what_they_say(make_gguf: Maker, tmp_path: Path) -> None:
    """For the tests of the oracle, where nothing may be rounded."""
    tiny = make_gguf(tmp_path / "tiny.gguf", "llama", types=(Q.F32,))
    assert {info.format for info in read_gguf(tiny.path).tensors.values()} == {"f32"}
