"""Which adapter a run trains: exact ones stay exact through checkpoints, resumed runs and continued training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file

import qgraft
from qgraft import storage
from qgraft.adapters.base import find_adapter
from qgraft.adapters.exact import BlockLora, MinimumLora
from qgraft.errors import CheckpointError, OptionError
from qgraft.training.adapter import misread_by_peft

Maker = Callable[..., Any]
ROWS = [{"instruction": f"question {i}", "output": f"answer {i % 3} " * (1 + i % 4)} for i in range(8)]
TYPES = {"q4_1": BlockLora, "q5_k": MinimumLora}


def tiny_in(tiny_gguf: Maker, format: str) -> Any:
    shape = {"hidden_size": 256, "head_dim": 64} if format.endswith("k") else {"intermediate_size": 128}
    return tiny_gguf("llama", types=(gguf.GGMLQuantizationType[format.upper()],), config=shape)


def run(path: Path, folder: Path, **options: Any) -> tuple[Any, Any]:
    model, tokenizer = qgraft.load(path)
    chosen = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "save_steps": 2, "use_cpu": True, "exact": True,
              "learning_rate": 1e-2, "r": 2, "lora_dropout": 0.1, "plot_loss": False, **options}  # fmt: skip
    return model, qgraft.train(model, tokenizer, ROWS, qgraft.TrainArguments(output_dir=str(folder), **chosen))


@pytest.mark.parametrize("format", TYPES)
def test_an_exact_run_resumes_to_the_same_bytes(tiny_gguf: Maker, tmp_path: Path, format: str) -> None:
    path = tiny_in(tiny_gguf, format).path
    model, report = run(path, tmp_path / "out")
    assert {type(part) for part in find_adapter(model).parts.values()} >= {TYPES[format]}
    assert report.metrics["train_loss"] > 0
    whole = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    storage.remove_folder(tmp_path / "out" / "checkpoint-4")
    (tmp_path / "out" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="adapter: exact"):
        run(path, tmp_path / "out", resume_from_checkpoint="true", exact=False)
    run(path, tmp_path / "out", resume_from_checkpoint="true")
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == whole


def test_going_on_with_an_exact_adapter_keeps_it_exact(tiny_gguf: Maker, tmp_path: Path) -> None:
    path = tiny_in(tiny_gguf, "q4_1").path
    run(path, tmp_path / "out")
    before = load_file(tmp_path / "out" / "adapter_model.safetensors")
    more = {"adapter_name_or_path": str(tmp_path / "out")}
    model, tokenizer = qgraft.load(path)
    qgraft.load_adapter(model, tmp_path / "out")
    arguments = qgraft.TrainArguments(output_dir=str(tmp_path / "more"), max_steps=2, learning_rate=1e-2, use_cpu=True,
                                      plot_loss=False, **more)  # fmt: skip
    qgraft.train(model, tokenizer, ROWS, arguments)
    after = load_file(tmp_path / "more" / "adapter_model.safetensors")
    for name, A in after.items():
        assert not torch.equal(A, before[name])
        if "lora_A" in name:
            assert torch.equal(A, A[:, ::32].repeat_interleave(32, 1))
    assert {each.steps for each in qgraft.merge(model, calibration=ROWS, min_retained=-1e9).layers} == {("exact",)}


def test_options_that_do_not_go_with_it(tiny_gguf: Maker, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="exact: a prefix changes no weight"):
        qgraft.TrainArguments(output_dir=str(tmp_path), exact=True, pre_seq_len=4)
    model, tokenizer = qgraft.load(tiny_in(tiny_gguf, "q4_1").path)
    qgraft.attach_lora(model, r=8)
    arguments = qgraft.TrainArguments(output_dir=str(tmp_path / "out"), exact=True, use_cpu=True)
    with pytest.raises(OptionError, match="exact=True, the adapter has False"):
        qgraft.train(model, tokenizer, ROWS, arguments)


def test_layers_that_peft_would_take_for_experts_are_named(tiny_gguf: Maker) -> None:
    """tests/adapters/test_peft_names.py has PEFT as the judge of which they are."""
    experts = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    said = {}
    for architecture in (
        "glm4moe",
        "qwen3moe",
        "qwen2moe",
    ):  # dense and shared layers, none, and some that PEFT leaves alone
        model = qgraft.load(tiny_gguf(architecture).path)[0]
        qgraft.attach_lora(model, r=2, target_parameters=experts)
        said[architecture] = misread_by_peft(model, "default")
    (sentence,) = said.pop("glm4moe")
    assert "PEFT takes down_proj, gate_proj, up_proj of glm4_moe" in sentence
    assert "target_modules='k_proj,o_proj,q_proj,v_proj'" in sentence
    assert not any(said.values())
