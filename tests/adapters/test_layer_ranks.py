"""Ranks and alphas of single layers: those that PEFT gives them, in files that PEFT and llama.cpp's layout take back."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import qgraft
from qgraft.adapter_files.folder import load_adapter, save_adapter
from qgraft.adapter_files.gguf_lora import export_gguf_lora
from qgraft.adapters.attach import attach_lora, detach_adapter
from qgraft.adapters.base import find_adapter
from qgraft.errors import CheckpointError, OptionError
from qgraft.training.arguments import parse_arguments
from qgraft.training.run import train

TABLES: dict[str, Any] = {
    "rank_pattern": {r"layers\.0\.self_attn\.q_proj": 6, "q_proj": 3, r".*\.mlp\..*": 2},
    "alpha_pattern": {"down_proj": 32, r"layers\.1\..*": 5.0},
}
ROWS = [{"instruction": f"question {i}", "output": f"answer {i % 3} " * (1 + i % 4)} for i in range(12)]


def by_peft(tiny: Any) -> Any:
    base = AutoModelForCausalLM.from_pretrained(tiny.path.parent, gguf_file=tiny.path.name, dtype=torch.float32)
    return peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **TABLES)).eval()


def test_each_layer_has_the_rank_and_scaling_that_peft_gives_it(tiny_gguf, tmp_path, random_ids):
    tiny = tiny_gguf("llama")
    theirs = {name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
              for name, module in by_peft(tiny).named_modules() if hasattr(module, "lora_A")}  # fmt: skip
    model, _ = qgraft.load(tiny.path)
    attach_lora(model, 4, 8, **TABLES)
    adapter = find_adapter(model, "default")
    assert {path: (config.r, config.scaling) for path, config in adapter.configs.items()} == theirs
    assert len({rank for rank, _ in theirs.values()}) == 4
    torch.manual_seed(1)
    with torch.no_grad():
        for _, parameter in adapter.named_parameters():
            parameter.normal_(0, 0.1)
    ids = random_ids(model)
    with torch.no_grad():
        expected = model(ids).logits
    save_adapter(model, tmp_path / "folder")
    export_gguf_lora(model, tmp_path / "lora.gguf", dtype="float32")
    config = json.loads((tmp_path / "folder" / "adapter_config.json").read_text())
    assert config["rank_pattern"] and config["alpha_pattern"]
    base = AutoModelForCausalLM.from_pretrained(tiny.path.parent, gguf_file=tiny.path.name, dtype=torch.float32)
    back = peft.PeftModel.from_pretrained(base, tmp_path / "folder").eval()
    with torch.no_grad():
        torch.testing.assert_close(back(ids).logits, expected, rtol=1e-3, atol=1e-4)
    for file in (tmp_path / "folder", tmp_path / "lora.gguf"):
        detach_adapter(model)
        load_adapter(model, file)
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "tables, message",
    [({"rank_pattern": {"(": 2}}, "is no regular expression"), ({"rank_pattern": {"q_proj": 0}}, "q_proj=0: expected"),
     ({"rank_pattern": {"q_proj": 2.5}}, "q_proj=2.5"), ({"alpha_pattern": {"q_proj": float("nan")}}, "q_proj=nan"),
     ({"rank_pattern": [2]}, "expected {regular expression: number}"),
     ({"alpha_pattern": {"q_prj": 2}}, "no layer of this LoRA matches q_prj; it is on down_proj"),
     ({"rank_pattern": {"up_proj": 2}, "target_modules": "q_proj"}, "matches up_proj; it is on q_proj")],
)  # fmt: skip
def test_what_stands_for_no_layer_or_is_no_number_is_refused(tables, message, tiny_gguf):
    model, _ = qgraft.load(tiny_gguf("llama").path)
    with pytest.raises(OptionError) as caught:
        attach_lora(model, **tables)
    assert message in str(caught.value) and not qgraft.adapter_names(model)


def test_a_command_line_and_a_file_give_them_as_json_or_tables(tmp_path):
    given = {"q_proj": 4, r".*\.mlp\..*": 2}
    common = ["--output_dir", str(tmp_path), "--use_cpu"]
    assert parse_arguments([*common, "--rank_pattern", json.dumps(given)]).rank_pattern == given
    (tmp_path / "a.yaml").write_text(
        f"output_dir: {tmp_path}\nuse_cpu: true\nrank_pattern:\n  q_proj: 4\n  '.*\\.mlp\\..*': 2\n"
    )
    args = parse_arguments([str(tmp_path / "a.yaml"), 'alpha_pattern={"up_proj": 3}'])
    assert args.rank_pattern == given and args.alpha_pattern == {"up_proj": 3}
    for words in (["--rank_pattern", "4"], ["--rank_pattern", '{"q_proj": -1}'], ["--alpha_pattern", '{"(": 1}'],
                  ["--rank_pattern", '{"q_proj": 4}', "--pre_seq_len", "4"]):  # fmt: skip
        with pytest.raises(OptionError, match="_pattern"):
            parse_arguments([*common, *words])


def run(tiny_gguf: Any, folder: Path, **options: Any) -> Any:
    model, tokenizer = qgraft.load(tiny_gguf("llama").path)
    chosen = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "save_steps": 2, "use_cpu": True, "r": 4,
              "learning_rate": 1e-2, "plot_loss": False, **TABLES, **options}  # fmt: skip
    return train(model, tokenizer, ROWS, qgraft.TrainArguments(output_dir=str(folder), **chosen)), model


def test_a_run_is_bound_to_them(tiny_gguf, tmp_path):
    _, model = run(tiny_gguf, tmp_path / "out")
    configs = find_adapter(model, "default").configs
    assert configs["model.layers.0.self_attn.q_proj"].r == 6 and configs["model.layers.1.mlp.up_proj"].r == 2
    (tmp_path / "out" / "adapter_model.safetensors").unlink()
    for name in ("rank_pattern", "alpha_pattern"):
        with pytest.raises(CheckpointError, match=f"adapter: {name}"):
            run(tiny_gguf, tmp_path / "out", resume_from_checkpoint="true", num_train_epochs=3, **{name: {"q_proj": 5}})
    again, _ = run(tiny_gguf, tmp_path / "out", resume_from_checkpoint="true", num_train_epochs=3)
    assert again.steps == 9
    with pytest.raises(OptionError, match=r"rank_pattern: .*q_proj has r 6"):
        chosen = qgraft.TrainArguments(output_dir=str(tmp_path / "on"), use_cpu=True, rank_pattern={"q_proj": 4})
        train(model, qgraft.load(tiny_gguf("llama").path)[1], ROWS, chosen)
