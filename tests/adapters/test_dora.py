"""DoRA: values, gradients, files and learned losses beside PEFT's on the same float weights; what cannot be computed is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import qgraft
from qgraft.adapter_files.combine import combine_files
from qgraft.adapter_files.folder import load_adapter, save_adapter
from qgraft.adapter_files.gguf_lora import export_gguf_lora
from qgraft.adapters.attach import attach_lora, detach_adapter
from qgraft.adapters.base import find_adapter
from qgraft.adapters.choose import use_adapter
from qgraft.adapters.combine import combine
from qgraft.adapters.states import load_lora_state_dict, lora_state_dict
from qgraft.errors import AdapterError, OptionError, UnsupportedError
from qgraft.jobs.segments import Segment, serving_segments

Maker = Callable[..., Any]
PREFIX = "base_model.model."


def float_model(tiny: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny.path.parent, gguf_file=tiny.path.name, dtype=torch.float32)


def by_peft(tiny: Any, **options: Any) -> Any:
    chosen = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "use_dora": True, **options}
    return peft.get_peft_model(float_model(tiny), peft.LoraConfig(**chosen)).eval()


def learned(parameters: Any) -> None:
    """Numbers as training leaves them: far enough from the start to be seen, magnitudes as well."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            if parameter.dim() == 1:
                parameter.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=generator))
            else:
                parameter.normal_(0, 0.1, generator=generator)


def dora_model(tiny: Any, name: str = "default", **options: Any) -> Any:
    model, _ = qgraft.load(tiny.path)
    return with_dora(model, name, **options)


def with_dora(model: Any, name: str = "default", **options: Any) -> Any:
    attach_lora(model, **{"r": 4, "lora_alpha": 8, "use_dora": True, "name": name, **options})
    learned(parameter for _, parameter in find_adapter(model, name).named_parameters())
    return model


def logits(model: Any, ids: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **options).logits


@pytest.mark.parametrize("name", ["llama", "qwen2"])  # without biases, and with them
def test_files_go_both_ways_and_logits_are_pefts(name: str, tiny_gguf: Maker, tmp_path: Path, random_ids: Maker) -> None:
    tiny = tiny_gguf(name)
    theirs = by_peft(tiny, rank_pattern={"up_proj": 2}, use_rslora=True)
    learned(parameter for parameter in theirs.parameters() if parameter.requires_grad)
    theirs.save_pretrained(tmp_path / "theirs")
    model, _ = qgraft.load(tiny.path)
    ids = random_ids(model)
    base, expected = logits(model, ids), logits(theirs, ids)
    load_adapter(model, tmp_path / "theirs")
    got = logits(model, ids)
    assert float((expected - base).norm() / base.norm()) > 0.05
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    save_adapter(model, tmp_path / "ours")
    ours, stored = (load_file(tmp_path / each / "adapter_model.safetensors") for each in ("ours", "theirs"))
    assert ours.keys() == stored.keys() and all(torch.equal(ours[key], stored[key]) for key in ours)
    back = peft.PeftModel.from_pretrained(float_model(tiny), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(back, ids), expected, rtol=1e-5, atol=1e-6)
