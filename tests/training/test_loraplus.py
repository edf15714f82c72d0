"""LoRA+: the groups, rates and steps of PEFT's create_loraplus_optimizer, in runs that stop and in runs beside others."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import qgraft
from qgraft import storage
from qgraft.adapter_files.folder import load_adapter
from qgraft.adapters.base import find_adapter
from qgraft.adapters.states import lora_state_dict
from qgraft.errors import CheckpointError, OptionError
from qgraft.jobs.train import train_jobs
from qgraft.training.adapter import learning_rates, trained_parameters
from qgraft.training.optimization import Optimization
from qgraft.training.run import train

ROWS = [{"instruction": f"question {i}", "output": f"answer {i % 3} " * (1 + i % 4)} for i in range(12)]
OF_LORA_PLUS = {"loraplus_lr_ratio": 8.0, "loraplus_lr_embedding": 3e-3, "weight_decay": 0.1}


def arguments(folder: Path, **options: Any) -> qgraft.TrainArguments:
    chosen = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "save_steps": 2, "logging_steps": 1, "use_cpu": True,
              "learning_rate": 2e-3, "r": 2, "plot_loss": False, "compute": "float32", **options}  # fmt: skip
    return qgraft.TrainArguments(output_dir=str(folder), **chosen)


def run(tiny_gguf: Any, folder: Path, **options: Any) -> Any:
    model, tokenizer = qgraft.load(tiny_gguf("llama").path)
    return train(model, tokenizer, ROWS, arguments(folder, **options))


def saved(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
def test_groups_and_steps_are_pefts(tiny_gguf, tmp_path):
    tiny = tiny_gguf("llama")
    base = AutoModelForCausalLM.from_pretrained(tiny.path.parent, gguf_file=tiny.path.name, dtype=torch.float32)
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj", "up_proj"]))
    torch.manual_seed(1)
    names = {name.replace(".default", ""): p for name, p in theirs.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in names.values():
            parameter.normal_(0, 0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    model, _ = qgraft.load(tiny.path)
    load_adapter(model, tmp_path / "theirs", "default")
    args = arguments(tmp_path / "out", **OF_LORA_PLUS)
    optimizer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=2e-3, loraplus_lr_ratio=8.0, loraplus_lr_embedding=3e-3, loraplus_weight_decay=0.1
    )
    ours = Optimization(args, trained_parameters(model, "default"), 10, learning_rates(model, args))
    find_adapter(model, "default").let_train(True)

    def told(found: Any) -> list[tuple[int, float, float]]:
        return [
            (sum(p.numel() for p in g["params"]), g["lr"], g["weight_decay"]) for g in found.param_groups if g["params"]
        ]

    assert told(ours.optimizer) == told(optimizer)
    assert [rate for _, rate, _ in told(optimizer)] == [2e-3, 3e-3, 16e-3]
    state = lora_state_dict(model, "default")
    assert state.keys() == names.keys()
    ours.gradients.clear()
    own = {tensor.data_ptr(): name for name, tensor in state.items()}
    for seed in range(3):
        for parameter in trained_parameters(model, "default"):
            name = own[parameter.data_ptr()]
            generator = torch.Generator().manual_seed(seed + len(name))
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad.copy_(gradient)
            names[name].grad = gradient
        ours.optimizer.step()
        optimizer.step()
    for name, tensor in lora_state_dict(model, "default").items():
        torch.testing.assert_close(tensor, names[name].detach())


def test_a_run_learns_otherwise_logs_the_rate_of_a_and_goes_on_to_the_same_bytes(tiny_gguf, tmp_path):
    options = {"loraplus_lr_ratio": 8.0, "lora_dropout": 0.1}
    for name in ("whole", "part"):
        run(tiny_gguf, tmp_path / name, **options)
    plain = run(tiny_gguf, tmp_path / "plain", lora_dropout=0.1)
    whole, other = saved(tmp_path / "whole"), saved(tmp_path / "plain")
    assert plain.steps == 6 and any(not torch.equal(whole[key], other[key]) for key in whole)
    logged = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert next(line["learning_rate"] for line in logged if "learning_rate" in line) == 2e-3
    storage.remove_folder(tmp_path / "part" / "checkpoint-6")
    (tmp_path / "part" / "adapter_model.safetensors").unlink()
    for ratio in (None, 4.0):
        with pytest.raises(CheckpointError, match=r"loraplus_lr_ratio: was 8\.0, now"):
            run(tiny_gguf, tmp_path / "part", resume_from_checkpoint="true", lora_dropout=0.1, loraplus_lr_ratio=ratio)
    run(tiny_gguf, tmp_path / "part", resume_from_checkpoint="true", **options)
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "part")]
    assert weights[0] == weights[1]
    (tmp_path / "part" / "adapter_model.safetensors").unlink()
    changed = {"resume_from_checkpoint": "true", "force": True, "num_train_epochs": 3, "lora_dropout": 0.1}
    assert run(tiny_gguf, tmp_path / "part", **changed).steps == 9


def test_a_job_among_others_learns_as_it_does_alone(tiny_gguf, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    jobs = {"plus": {"loraplus_lr_ratio": 8.0}, "plain": {"seed": 3}}
    told = {"dataset": str(tmp_path / "rows.jsonl"), "max_tokens_per_pass": 100, "save_strategy": "no"}
    model, tokenizer = qgraft.load(tiny_gguf("llama").path)
    each = [arguments(tmp_path / "jobs" / name, adapter_name=name, **told, **own) for name, own in jobs.items()]
    assert all(report.finished for report in train_jobs(model, tokenizer, each))
    for name, own in jobs.items():
        model, tokenizer = qgraft.load(tiny_gguf("llama").path)
        train(model, tokenizer, None, arguments(tmp_path / "alone" / name, **told, **own))
        together, alone = saved(tmp_path / "jobs" / name), saved(tmp_path / "alone" / name)
        assert together.keys() == alone.keys()
        for key, tensor in alone.items():
            assert float((together[key] - tensor).norm()) < 1e-4 * float(tensor.norm())


def test_a_prefix_has_no_b(tmp_path):
    with pytest.raises(OptionError, match="loraplus_lr_ratio: a prefix has no A and B"):
        arguments(tmp_path, loraplus_lr_ratio=4.0, pre_seq_len=4)
