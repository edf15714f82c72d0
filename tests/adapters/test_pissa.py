"""A start from the principal components of the base: what PEFT's PiSSA learns, in a LoRA's files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import qgraft
from qgraft.adapter_files.folder import load_adapter, save_adapter
from qgraft.adapter_files.gguf_lora import export_gguf_lora
from qgraft.adapters.attach import attach_lora, detach_adapter
from qgraft.adapters.base import find_adapter
from qgraft.adapters.choose import use_adapter
from qgraft.adapters.combine import combine
from qgraft.errors import CheckpointError, OptionError
from qgraft.training.run import train

Maker = Callable[..., Any]
ROWS = [{"instruction": f"question {i}", "output": f"answer {i % 3} " * (1 + i % 4)} for i in range(12)]


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def learn(model: Any, parameters: list[Any], ids: Tensor, steps: int = 20) -> list[float]:
    """The losses of a few steps of AdamW."""
    optimizer, losses = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0), []
    for step in range(steps):
        rows = ids[step % 3 :: 3]
        loss = model.train()(rows, labels=rows).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    return losses


def ours_learns(model: Any, ids: Tensor, **steps: int) -> list[float]:
    return learn(model, [parameter for _, parameter in find_adapter(model).named_parameters()], ids, **steps)


def drawing_the_same(svd: Callable[..., Any]) -> Callable[..., Any]:
    def seeded(*given: Any, **options: Any) -> Any:
        torch.manual_seed(5)
        return svd(*given, **options)

    return seeded


@pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
@pytest.mark.parametrize(
    ("init", "stabilized"), [("pissa", False), pytest.param("pissa_niter_3", True, marks=pytest.mark.slow)]
)
def test_it_learns_what_pefts_learns(
    init: str, stabilized: bool, tiny_gguf: Maker, tmp_path: Path, random_ids: Maker, monkeypatch: Any
) -> None:
    for module in (torch, peft.tuners.lora.layer):  # which come to the layers in another order
        monkeypatch.setattr(module, "svd_lowrank", drawing_the_same(torch.svd_lowrank))
    tiny = tiny_gguf("qwen2")
    chosen: dict[str, Any] = {"r": 4, "lora_alpha": 8, "use_rslora": stabilized, "init_lora_weights": init}
    base = AutoModelForCausalLM.from_pretrained(tiny.path.parent, gguf_file=tiny.path.name, dtype=torch.float32)
    theirs = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj", "down_proj"], **chosen))
    theirs.save_pretrained(tmp_path / "first")
    model, _ = qgraft.load(tiny.path)
    ids = random_ids(model, rows=6)
    before = logits(model, ids)
    attach_lora(model, target_modules=["q_proj", "down_proj"], **chosen)
    assert torch.equal(logits(model, ids), before)  # packed bytes and all
    losses = learn(theirs, [p for p in theirs.parameters() if p.requires_grad], ids)
    torch.testing.assert_close(ours_learns(model, ids), losses, rtol=1e-5, atol=1e-5)
    assert losses[-1] < 0.95 * losses[0]
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "first"))
    save_adapter(model, tmp_path / "ours")
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("theirs", "ours")]
    for key in ("r", "lora_alpha", "use_rslora", "init_lora_weights"):
        assert configs[0][key] == pytest.approx(configs[1][key])
    assert configs[1]["r"] == 8 and configs[1]["init_lora_weights"] is True
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours")]
    assert files[0].keys() == files[1].keys()
    for path, part in find_adapter(model).parts.items():
        first, second = (file[f"base_model.model.{path}.lora_B.weight"].double()
                         @ file[f"base_model.model.{path}.lora_A.weight"].double() for file in files)  # fmt: skip
        assert (
            float((first - second).norm()) < 1e-4 * float(first.norm()) and float((first - second).abs().max()) < 1e-5
        )
        torch.testing.assert_close(part.delta() / part.config.scaling, second.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_its_files_are_those_of_a_lora(tiny_gguf: Maker, tmp_path: Path, random_ids: Maker) -> None:
    """In half precision too: the difference of two large products would lose what it learned."""
    tiny = tiny_gguf("llama")
    model, _ = qgraft.load(tiny.path)
    attach_lora(model, 3, 5, rank_pattern={"q_proj": 2}, init_lora_weights="pissa", use_rslora=True)
    ids = random_ids(model, rows=3)
    base = logits(model, ids)
    ours_learns(model, ids, steps=3)
    expected = logits(model, ids)
    assert float((expected - base).norm()) > 0.01
    combine(model, {"default": 1.0}, "made")
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=1e-5)
    use_adapter(model, "default")
    save_adapter(model, tmp_path / "half", "default", dtype="float16")
    save_adapter(model, tmp_path / "single", "default")
    export_gguf_lora(model, tmp_path / "lora.gguf", "default")
    for name, close in {"single": 1e-5, "half": 3e-3, "lora.gguf": 3e-3}.items():
        detach_adapter(model)
        load_adapter(model, tmp_path / name)
        assert float((logits(model, ids) - expected).norm()) < close * float((expected - base).norm())
    back = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny.path.parent, gguf_file=tiny.path.name, dtype=torch.float32),
        tmp_path / "single",
    ).eval()
    torch.testing.assert_close(logits(back, ids), expected, rtol=1e-4, atol=1e-5)


def run(tiny_gguf: Maker, folder: Path, **options: Any) -> Any:
    model, tokenizer = qgraft.load(tiny_gguf("llama").path)
    chosen = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "save_steps": 2, "use_cpu": True, "r": 2,
              "learning_rate": 1e-3, "plot_loss": False, "init_lora_weights": "pissa_niter_2", **options}  # fmt: skip
    return train(model, tokenizer, ROWS, qgraft.TrainArguments(output_dir=str(folder), **chosen)), model


def test_a_run_goes_on_to_the_same_bytes(tiny_gguf: Maker, tmp_path: Path) -> None:
    run(tiny_gguf, tmp_path / "whole", num_train_epochs=1)
    run(tiny_gguf, tmp_path / "part", num_train_epochs=1)
    for folder in (tmp_path / "part").glob("checkpoint-3"):
        for file in sorted(folder.rglob("*"), reverse=True):
            file.unlink()
        folder.rmdir()
    (tmp_path / "part" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="init_lora_weights: was pissa_niter_2, now None"):
        run(tiny_gguf, tmp_path / "part", num_train_epochs=1, resume_from_checkpoint="true", init_lora_weights="true")
    run(tiny_gguf, tmp_path / "part", num_train_epochs=1, resume_from_checkpoint="true")
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "part")]
    assert weights[0] == weights[1]


def test_what_has_no_such_start_is_refused(tiny_gguf: Maker, tmp_path: Path) -> None:
    model, _ = qgraft.load(tiny_gguf("llama").path)
    for init in ("pissa_niter_0", "gaussian", False, None):
        with pytest.raises(OptionError, match=r"init_lora_weights=.*: expected true, pissa, or pissa_niter_16"):
            attach_lora(model, init_lora_weights=init)
    for wrong in ({"exact": True}, {"lora_dropout": 0.1}, {"lora_alpha": -1}, {"lora_alpha": 0}):
        with pytest.raises(OptionError, match="init_lora_weights=pissa"):
            attach_lora(model, init_lora_weights="pissa", **wrong)
    with pytest.raises(
        OptionError, match=r"more components than a weight has:\n  .*q_proj: r=65, the weight is \[64, 64\]"
    ):
        attach_lora(model, 65, init_lora_weights="pissa")
    with pytest.raises(OptionError, match="init_lora_weights: a prefix has no A and B"):
        qgraft.TrainArguments(output_dir=str(tmp_path), use_cpu=True, init_lora_weights="pissa", pre_seq_len=4)
    assert (
        qgraft.TrainArguments(output_dir=str(tmp_path), use_cpu=True, init_lora_weights=True).init_lora_weights
        == "true"
    )
    assert not qgraft.adapter_names(model)
