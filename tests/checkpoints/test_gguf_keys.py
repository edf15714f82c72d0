"""The table of metadata keys: what it says of the configurations and of its own page. Meanings are judged by llama.cpp in
tests/oracle/test_gguf_keys.py."""

import subprocess
import sys
from pathlib import Path

import pytest
from gguf import MODEL_ARCH_NAMES
from transformers import AutoConfig

from qgraft.checkpoints.gguf_file import read_gguf
from qgraft.checkpoints.gguf_header import Header
from qgraft.checkpoints.gguf_key_parts import IGNORED, MUSTS
from qgraft.checkpoints.gguf_key_report import key_report
from qgraft.checkpoints.gguf_keys import TABLE
from qgraft.checkpoints.gguf_rules import ARCHITECTURES
from qgraft.models.chatglm2 import ChatGLM2Config


def test_the_table_has_every_architecture():
    assert TABLE.keys() == ARCHITECTURES.keys()
    assert TABLE.keys() <= set(MODEL_ARCH_NAMES.values())


@pytest.mark.parametrize("architecture", TABLE)
def test_fields_are_those_of_transformers_configuration(architecture):
    keys = TABLE[architecture]
    known = ChatGLM2Config() if architecture == "chatglm" else AutoConfig.for_model(keys.model_type)
    stated = {*known.to_dict(), *known.attribute_map, *(["head_dim"] if architecture == "qwen3moe" else [])}
    assert {*keys.fields.values(), *keys.fixed} <= stated
    mixture = known if keys.other is None else AutoConfig.for_model(keys.other[1])  # llama's is Mixtral
    assert {*keys.experts.values()} <= {*mixture.to_dict(), *mixture.attribute_map}
    assert not keys.fields.keys() & keys.used.keys()
    assert not (keys.fields.keys() | keys.used.keys()) & (keys.musts.keys() | keys.ignored.keys())
    assert not MUSTS.keys() & IGNORED.keys()


def test_each_key_of_a_file_is_in_one_list(make_gguf, tmp_path):
    metadata = {
        "llama.logit_scale": 0.5, "llama.residual_scale": 1.0, "llama.rope.scale_linear": 4.0, "llama.new": 1,
        "llama.expert_count": 0, "llama.expert_weights_scale": 2.5, "llama.vocab_size": 7, "other.key": 1,
    }  # fmt: skip
    file = read_gguf(make_gguf(tmp_path / "tiny.gguf", "llama", metadata=metadata).path)
    report = key_report(Header(file))
    lists = [list(report.used), list(report.without_effect), list(report.refused), report.unknown]
    assert sorted(key for keys in lists for key in keys) == sorted(file.metadata)
    assert report.refused == {"llama.logit_scale": "0 or 1"}
    assert report.unknown == ["llama.new", "other.key"]
    assert {"llama.rope.scale_linear", "llama.block_count", "llama.rope.freq_base"} <= report.used.keys()
    assert {"llama.vocab_size", "llama.residual_scale", "llama.expert_weights_scale", "general.architecture",
            "tokenizer.ggml.tokens", "llama.attention.value_length"} <= report.without_effect.keys()  # fmt: skip


def test_experts_are_refused_with_all_their_keys(make_gguf, tmp_path):
    metadata = {"qwen2.expert_count": 8, "qwen2.expert_used_count": 2, "qwen2.expert_weights_scale": 2.5}
    report = key_report(Header(read_gguf(make_gguf(tmp_path / "tiny.gguf", "qwen2", metadata=metadata).path)))
    assert report.refused.keys() == metadata.keys()
    metadata = {"llama.expert_count": 8, "llama.expert_used_count": 2, "llama.expert_weights_scale": 2.5}
    report = key_report(Header(read_gguf(make_gguf(tmp_path / "mixtral.gguf", "llama", metadata=metadata).path)))
    assert report.refused.keys() == {"llama.expert_weights_scale"}


def test_the_page_is_the_table():
    docs = Path(__file__).parents[2] / "docs"
    words = [sys.executable, "-c", "import make_gguf_keys; print(make_gguf_keys.page(), end='')"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=docs)
    assert done.stdout == (docs / "gguf-keys.md").read_text(encoding="utf-8"), "run `make docs`"


def test_the_section_of_architectures_is_the_tables():
    docs = Path(__file__).parents[2] / "docs"
    words = [sys.executable, "-c", "import make_architectures as page; print(page.gguf_section(), end='')"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=docs)
    written = (docs / "architectures.md").read_text(encoding="utf-8")
    assert written.endswith(done.stdout), "run `python docs/make_architectures.py --gguf`"
