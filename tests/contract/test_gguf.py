"""The gguf package, and what transformers reads of a GGUF file."""

import inspect
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from transformers import AutoConfig, PreTrainedTokenizerFast

KEYS = {
    "context_length": 64, "embedding_length": 32, "block_count": 2, "feed_forward_length": 48,
    "attention.head_count": 4, "attention.head_count_kv": 2,
}  # fmt: skip


def header(path: Path, **more: Any) -> None:
    """A file whose vocabulary is zeros and whose tensors are names, as qgraft hands it to transformers."""
    writer = GGUFWriter(path, "llama")
    for key, value in KEYS.items():
        writer.add_key_value(f"llama.{key}", value, GGUFValueType.UINT32)
    writer.add_key_value("llama.attention.layer_norm_rms_epsilon", 1e-5, GGUFValueType.FLOAT32)
    writer.add_key_value("llama.rope.freq_base", 5000.0, GGUFValueType.FLOAT32)
    writer.add_key_value("tokenizer.ggml.tokens", [0] * 40, GGUFValueType.ARRAY, GGUFValueType.INT8)
    for name in ("token_embd.weight", "blk.0.attn_q.weight"):
        writer.add_tensor_info(name, [1], np.dtype(np.float32), 4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.fout[0].write(bytes(writer.data_alignment + 4 * writer.data_alignment * 2))
    writer.close()


def test_a_header_without_data_is_a_file_that_transformers_reads_a_configuration_from(tmp_path):
    header(tmp_path / "header.gguf")
    config = AutoConfig.from_pretrained(tmp_path, gguf_file="header.gguf")
    assert (config.model_type, config.hidden_size, config.num_hidden_layers) == ("llama", 32, 2)
    assert config.vocab_size == 40, "the size of the vocabulary is no longer the length of tokenizer.ggml.tokens"


def test_rotary_parameters_are_one_dictionary_in_the_configuration(tmp_path):
    header(tmp_path / "header.gguf")
    rope = AutoConfig.from_pretrained(tmp_path, gguf_file="header.gguf").rope_parameters
    assert rope["rope_theta"] == 5000.0 and rope["rope_type"] == "default"


def test_a_writer_has_one_open_file_and_an_alignment(tmp_path):
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.write_header_to_file()
    assert len(writer.fout) == 1 and writer.data_alignment == gguf.GGUF_DEFAULT_ALIGNMENT == 32
    writer.close()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_transformers_builds_a_tokenizer_of_a_files_vocabulary(kind, tiny_gguf, tmp_path):
    path = tiny_gguf("llama" if kind == "gpt2" else "phi3").path
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(path.parent), gguf_file=path.name)
    tokens = next(f for f in GGUFReader(path).fields.values() if f.name == "tokenizer.ggml.tokens")
    assert len(tokenizer) >= len(tokens.data)
    ids = tokenizer("the cat", add_special_tokens=False)["input_ids"]
    assert ids and tokenizer.decode(ids).replace(" ", "") == "thecat"


def test_names_of_tensors_are_translated_by_the_tables_of_the_package():
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == "llama")
    names = gguf.get_tensor_name_map(arch, 2)
    assert isinstance(names, gguf.TensorNameMap)
    assert names.get_name("model.layers.1.self_attn.q_proj") == "blk.1.attn_q"
    assert names.get_name("model.embed_tokens") == "token_embd" and names.get_name("lm_head") == "output"


def test_names_of_metadata_and_kinds_of_files_are_constants_of_the_package():
    assert gguf.GGUFType.ADAPTER == "adapter" and gguf.Keys.Adapter.TYPE == "adapter.type"
    assert gguf.Keys.Adapter.LORA_ALPHA == "adapter.lora.alpha" and gguf.Keys.General.TYPE == "general.type"
    assert gguf.LlamaFileType.MOSTLY_Q4_1 == 3 and gguf.LlamaFileType.MOSTLY_Q8_0 == 7


def test_a_value_is_added_with_its_type_and_that_of_its_elements():
    names = list(inspect.signature(GGUFWriter.add_key_value).parameters)
    assert names[1:5] == ["key", "val", "vtype", "sub_type"]
    assert list(inspect.signature(GGUFWriter.add_tensor_info).parameters)[1:5] == [
        "name", "tensor_shape", "tensor_dtype", "tensor_nbytes",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_the_package_quantizes_and_dequantizes_what_the_tests_compare_with(name):
    kind = gguf.GGMLQuantizationType[name]
    values = np.random.default_rng(0).standard_normal((2, 64), dtype=np.float32)
    back = gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)
    assert np.abs(back - values).max() < 0.4 and torch.from_numpy(back).shape == (2, 64)
