"""What gguf_llamacpp.py says that llama.cpp does not load, asked of llama.cpp: tiny files, each with the model's odd part."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Q

from qgraft.checkpoints.gguf_file import read_gguf
from qgraft.checkpoints.gguf_llamacpp import why_unread
from qgraft.checkpoints.gguf_model import load_gguf

TIED: dict[str, Any] = {"tied": True}
BIASES: dict[str, Any] = {"config": {"attention_bias": True}}
OF_MLP: dict[str, Any] = {"config": {"mlp_bias": True}}
KINDS = [f"{kind}_attention" for kind in ("sliding", "full", "full", "sliding", "sliding", "full")]
SHARED: dict[str, Any] = {"config": {"layer_types": KINDS, "num_hidden_layers": 6}}


def of_one_kind(kind: str, every: int) -> dict[str, Any]:
    """All four layers of this kind; every so many-th has attention, as the file says it."""
    return {"config": {"layer_types": [kind] * 4}, "metadata": {"qwen35.full_attention_interval": every}}


CASES: list[tuple[str, dict[str, Any], bool]] = [  # architecture, options of the file, whether llama.cpp loads it
    ("arcee", BIASES, False), ("granite", BIASES, True), ("arcee", OF_MLP, False), ("cohere2", BIASES, False),
    ("command-r", BIASES, False), ("command-r", {"config": {"use_qk_norm": True}}, False),
    ("ernie4_5", {"config": {"use_bias": True}}, False), ("hunyuan-dense", BIASES, False), ("hunyuan-moe", BIASES, False),
    ("smollm3", BIASES, False), ("seed_oss", OF_MLP, False), ("seed_oss", BIASES, True), ("llama", OF_MLP, True),
    ("gpt-oss", TIED, False), ("minimax-m2", TIED, False), ("nemotron", TIED, False), ("olmo2", TIED, False),
    ("olmoe", TIED, False), ("qwen2moe", TIED, False), ("stablelm", TIED, False), ("llama", TIED, True),
    ("nemotron", {"config": {"head_dim": 32}}, False), ("olmoe", {"config": {"num_key_value_heads": 1}}, False),
    ("gemma4", SHARED, False), ("gemma4", {}, True), ("olmo2", {}, True),
    ("lfm2", {"config": {"layer_types": ["full_attention"] * 3}}, False), ("lfm2", {}, True),
    ("qwen35", of_one_kind("full_attention", 1), False), ("qwen35", of_one_kind("linear_attention", 5), False),
]  # fmt: skip


@pytest.mark.spread(1)
@pytest.mark.parametrize(("architecture", "options", "loads"), CASES)
def test_what_llamacpp_does_not_load_is_known(
    architecture: str,
    options: dict[str, Any],
    loads: bool,
    make_gguf: Callable[..., Any],
    llamacpp_behind: Callable[..., Any],
    tmp_path: Path,
) -> None:
    tiny = make_gguf(tmp_path / "tiny.gguf", architecture, types=(Q.F32,), **options)
    model, _ = load_gguf(tiny.path, torch.float32)  # here it is one like any other
    why = why_unread(architecture, model.config, read_gguf(tiny.path).tensors.keys())
    assert (why is None) == loads
    if loads:
        assert llamacpp_behind([(tiny.path, [5, 6, 7], 256)])
    else:
        with pytest.raises(AssertionError, match=r"llama\.cpp failed"):
            llamacpp_behind([(tiny.path, [5, 6, 7], 256)])
