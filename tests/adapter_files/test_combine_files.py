"""Adapters combined from their folders: the same numbers as in memory, read by PEFT, on one base or not at all."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from qgraft.adapter_files.combine import combine_files
from qgraft.adapter_files.folder import (
    CONFIG,
    WEIGHTS,
    load_adapter,
    read_peft_config,
    save_adapter,
)
from qgraft.adapter_files.seal import SEAL, read_seal
from qgraft.adapters.attach import attach_lora, detach_lora
from qgraft.adapters.base import find_adapter
from qgraft.adapters.choose import use_adapter
from qgraft.adapters.combine import combine
from qgraft.checkpoints.gguf_model import load_gguf
from qgraft.errors import AdapterError, OptionError, StorageError, UnsupportedError
from qgraft.json_files import covered_text

Maker = Callable[..., Any]
WEIGHT = {"law": 0.7, "med": -0.4}
OPTIONS: dict[str, dict[str, Any]] = {
    "law": {"r": 4, "lora_alpha": 8},
    "med": {
        "r": 2,
        "lora_alpha": 3,
        "use_rslora": True,
        "target_modules": ["q_proj", "lm_head", "layers.1.mlp.up_proj"],
    },
}
PROMPTS = {"system": "Be brief.", "template": "chatml", "enable_thinking": False, "source_prefix": "say: "}
ARGUMENTS = {
    "law": {**PROMPTS, "dataset": "law.jsonl", "learning_rate": 1e-3},
    "med": {**PROMPTS, "dataset": "med.jsonl", "learning_rate": 1e-3},
}


def load_base(tiny: Any) -> PreTrainedModel:
    return load_gguf(tiny.path, torch.float32)[0].eval()


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits.float()


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.fixture
def tiny(tiny_gguf: Maker) -> Any:
    return tiny_gguf("llama")


@pytest.fixture
def model(tiny: Any) -> PreTrainedModel:
    """A base with law and med on it: other ranks, alphas, scalings and layers."""
    model = load_base(tiny)
    for seed, (name, options) in enumerate(OPTIONS.items()):
        attach_lora(model, name=name, **options)
        generator = torch.Generator().manual_seed(seed)
        for lora in find_adapter(model, name).parts.values():
            lora.lora_B.data.normal_(0, 0.05, generator=generator)
    return model


@pytest.fixture
def folders(model: PreTrainedModel, tmp_path: Path) -> dict[str | Path, float]:
    for name in WEIGHT:
        save_adapter(model, tmp_path / name, name, {"arguments": ARGUMENTS[name]})
    return {tmp_path / name: weight for name, weight in WEIGHT.items()}


def edit_json(path: Path, **values: Any) -> None:
    """Change values in a JSON file; a seal is sealed again."""
    changed = {**json.loads(path.read_text()), **values}
    path.write_text(covered_text(changed) if path.name == SEAL else json.dumps(changed))


@pytest.mark.parametrize("options", [
    {}, {"method": "svd", "r": 3}, {"method": "svd"}, {"method": "dare", "density": 0.3, "seed": 7}, {"method": "ties"},
], ids=str)  # fmt: skip
def test_files_and_memory_give_the_same_adapter(
    model: PreTrainedModel, folders: Any, tmp_path: Path, options: dict[str, Any]
) -> None:
    report = combine_files(folders, tmp_path / "both", **options)
    expected = combine(model, WEIGHT, "both", **options)
    assert report == expected
    save_adapter(model, tmp_path / "again", "both")
    stored, again = (load_file(tmp_path / folder / WEIGHTS) for folder in ("both", "again"))
    assert stored.keys() == again.keys()
    assert all(torch.equal(tensor, again[key]) for key, tensor in stored.items())


def test_the_result_loads_and_answers_as_the_weighted_set(
    model: PreTrainedModel, tiny: Any, folders: Any, tmp_path: Path, random_ids: Maker
) -> None:
    ids = random_ids(model)
    use_adapter(model, WEIGHT)
    expected = logits(model, ids)
    combine_files(folders, tmp_path / "both")
    fresh = load_base(tiny)
    report = load_adapter(fresh, tmp_path / "both")
    assert (report.applied, report.total, report.notes) == (15, 15, ())
    assert relative(logits(fresh, ids), expected) < 1e-5
    assert relative(logits(fresh, ids), logits(load_base(tiny), ids)) > 1e-2


@pytest.mark.parametrize("saved_by", ["combine_files", "save_adapter"])
@pytest.mark.parametrize("options", [{}, {"method": "svd", "r": 3}], ids=str)
def test_peft_reads_the_result(
    model: PreTrainedModel, tiny: Any, folders: Any, tmp_path: Path, random_ids: Maker, saved_by: str, options: Any
) -> None:
    """Ranks differ by layer: r, rank_pattern and alpha_pattern must give each its rank and a scaling of 1."""
    combine(model, WEIGHT, "both", **options)
    if saved_by == "combine_files":
        combine_files(folders, tmp_path / "both", **options)
    else:
        save_adapter(model, tmp_path / "both", "both")
    config = read_peft_config(tmp_path / "both")
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert bool(config["rank_pattern"])
    base = AutoModelForCausalLM.from_pretrained(tiny.path.parent, gguf_file=tiny.path.name, dtype=torch.float32).eval()
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "both").eval()
    ids = random_ids(model)
    assert relative(logits(theirs, ids), logits(model, ids)) < 1e-4
    wrapped = [path for path, module in theirs.named_modules() if hasattr(module, "lora_A")]
    assert sorted(path.removeprefix("base_model.model.") for path in wrapped) == sorted(
        find_adapter(model, "both").parts
    )


def test_the_seal_carries_the_base_over_and_says_what_was_combined(
    model: PreTrainedModel, folders: Any, tmp_path: Path
) -> None:
    report = combine_files(folders, tmp_path / "both", "dare", seed=3, density=0.25)
    seal = read_seal(tmp_path / "both")
    assert seal is not None
    assert seal["base"] == json.loads((tmp_path / "law" / SEAL).read_text())["base"]
    assert seal["base"]["fingerprint"] == model.qgraft.info.fingerprint
    assert seal["combined"] == {str(tmp_path / "law"): 0.7, str(tmp_path / "med"): -0.4}
    assert (seal["method"], seal["density"], seal["seed"]) == ("dare", 0.25, 3)
    assert seal["truncation_error"] == report.error > 0.1
    assert seal["arguments"] == PROMPTS  # what both were trained with
    combine_files({tmp_path / "both": 1.0, tmp_path / "law": -1.0}, tmp_path / "third")
    third = read_seal(tmp_path / "third")
    assert third is not None
    assert "truncation_error" not in third
    assert third["base"] == seal["base"]


def test_adapters_of_peft_need_force(model: PreTrainedModel, folders: Any, tmp_path: Path) -> None:
    """They have no seal. Half precision, patterns and a target expression are read as in load_adapter."""
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=r".*\.(up|down)_proj", rank_pattern={"up_proj": 2})
    detach_lora(model)
    float_model = AutoModelForCausalLM.from_config(model.config)
    theirs = peft.get_peft_model(float_model, config).half()
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    theirs.save_pretrained(tmp_path / "peft")
    with pytest.raises(
        AdapterError, match=r"(?s)not trained on one base.*law: qg1:\w+ \(.*peft: not known.*force=True"
    ):
        combine_files({tmp_path / "law": 1.0, tmp_path / "peft": 0.5}, tmp_path / "both")
    assert not (tmp_path / "both").exists()
    report = combine_files({tmp_path / "law": 1.0, tmp_path / "peft": 0.5}, tmp_path / "both", force=True)
    assert {report.ranks["model.layers.0.mlp.up_proj"], report.ranks["model.layers.0.mlp.down_proj"]} == {6, 8}
    assert set(read_peft_config(tmp_path / "both")["target_modules"]) == set(report.ranks)
    for name, folder in (("law", "law"), ("peft", "peft"), ("both", "both")):
        load_adapter(model, tmp_path / folder, name, force=True)
    ids = torch.arange(10, 30).view(2, 10)
    both = logits(model, ids)
    use_adapter(model, {"law": 1.0, "peft": 0.5})
    assert relative(both, logits(model, ids)) < 1e-5


def other_base(folder: Path) -> None:
    seal = json.loads((folder / SEAL).read_text())
    edit_json(folder / SEAL, base={**seal["base"], "fingerprint": "qg1:0", "source": "elsewhere.gguf"})


def test_another_base_is_refused_and_both_are_listed(model: PreTrainedModel, folders: Any, tmp_path: Path) -> None:
    other_base(tmp_path / "med")
    with pytest.raises(AdapterError) as caught:
        combine_files(folders, tmp_path / "both")
    lines = str(caught.value).splitlines()
    base = model.qgraft.info
    assert lines[1:3] == [
        f"  {tmp_path / 'law'}: {base.fingerprint} ({base.source})",
        f"  {tmp_path / 'med'}: qg1:0 (elsewhere.gguf)",
    ]
    assert not (tmp_path / "both").exists()
    combine_files(folders, tmp_path / "both", force=True)
    seal = read_seal(tmp_path / "both")
    assert seal is not None
    assert seal["base"] is None  # it was not trained on one base


def spoil_weights(folder: Path) -> None:
    """Without a seal: NaN in one tensor, half of a pair, a rank that the options do not say, a strange key."""
    (folder / SEAL).unlink()
    state = load_file(folder / WEIGHTS)
    stem = "base_model.model.model.layers"
    state[f"{stem}.0.mlp.up_proj.lora_A.weight"][0, 0] = float("nan")
    del state[f"{stem}.1.mlp.up_proj.lora_B.weight"]
    state[f"{stem}.0.mlp.down_proj.lora_A.weight"] = torch.ones(3, 256)
    state[f"{stem}.0.mlp.down_proj.lora_B.weight"] = torch.ones(64, 3)
    state[f"{stem}.0.mlp.gate_proj.lora_A.weight"] = torch.ones(3, 64)
    state["strange"] = torch.ones(1)
    save_file(state, folder / WEIGHTS)


def test_all_that_is_wrong_is_listed_at_once(folders: Any, tmp_path: Path) -> None:
    spoil_weights(tmp_path / "law")
    with pytest.raises(AdapterError) as caught:
        combine_files(folders, tmp_path / "both", force=True)
    found = [line.removeprefix(f"  {tmp_path / 'law'}: ") for line in str(caught.value).splitlines()[1:]]
    stem = "model.layers"
    assert sorted(found) == sorted([
        f"base_model.model.{stem}.0.mlp.up_proj.lora_A.weight: NaN or infinity",
        f"missing tensor base_model.model.{stem}.1.mlp.up_proj.lora_B.weight",
        f"{stem}.0.mlp.down_proj: rank 3, but {CONFIG} says r=4",
        f"{stem}.0.mlp.gate_proj: got A [3, 64] torch.float32, B [256, 4] torch.float32, expected a LoRA's pair",
        "unexpected tensor strange",
    ])  # fmt: skip
    assert not (tmp_path / "both").exists()


def test_mistakes_are_refused_before_anything_is_written(folders: Any, tmp_path: Path) -> None:
    law, med = folders
    cases: list[tuple[dict[str | Path, float], Path, dict[str, Any], type[Exception], str]] = [
        (folders, law, {}, OptionError, "law is what is read"),
        (folders, law, {"overwrite": True}, OptionError, "law is what is read"),
        (folders, tmp_path / "x" / ".." / "law", {"overwrite": True}, OptionError, "law is what is read"),
        (folders, tmp_path, {"overwrite": True}, OptionError, "holds law, which is read"),
        (folders, tmp_path / "y", {"method": "svd", "r": 0}, OptionError, "r=0"),
        ({law: 1.0, str(law) + "/../law": 2.0}, tmp_path / "y", {}, OptionError, "given twice"),
        ({}, tmp_path / "y", {}, OptionError, "got no adapters"),
        ({law: float("nan")}, tmp_path / "y", {}, OptionError, "law=nan"),
        ({law: 1.0, tmp_path / "nowhere": 1.0}, tmp_path / "y", {}, AdapterError, f"nowhere holds no {CONFIG}"),
        (folders, tmp_path / "y", {"dtype": "int8"}, OptionError, "dtype='int8': expected float32, float16"),
        ({law: 1e9}, tmp_path / "y", {"dtype": "float16"}, AdapterError, "too large for float16"),
        (folders, tmp_path / "y", {"method": "mean"}, OptionError, "method='mean'"),
    ]
    (tmp_path / "x").mkdir()
    for adapters, output, options, error, message in cases:
        with pytest.raises(error, match=message):
            combine_files(adapters, output, **options)
    assert not (tmp_path / "y").exists()
    combine_files(folders, tmp_path / "both")
    before = (tmp_path / "both" / WEIGHTS).read_bytes()
    with pytest.raises(StorageError, match="both exists already"):
        combine_files({law: 1.0}, tmp_path / "both")
    assert (tmp_path / "both" / WEIGHTS).read_bytes() == before
    combine_files({law: 1.0}, tmp_path / "both", overwrite=True)
    assert (tmp_path / "both" / WEIGHTS).read_bytes() != before
    (law / WEIGHTS).write_bytes(before)
    with pytest.raises(AdapterError, match="changed since it was saved"):
        combine_files(folders, tmp_path / "z")
    edit_json(med / CONFIG, lora_bias=True)
    with pytest.raises(UnsupportedError, match="a LoRA with lora_bias"):
        combine_files({med: 1.0}, tmp_path / "z")


def test_two_folders_of_one_name_are_told_apart(folders: Any, tmp_path: Path) -> None:
    law = next(iter(folders))
    shutil.copytree(law, tmp_path / "other" / "law")
    report = combine_files({law: 1.0, tmp_path / "other" / "law": 1.0}, tmp_path / "both")
    assert report.weights == {str(law): 1.0, str(tmp_path / "other" / "law"): 1.0}
    assert set(report.ranks.values()) == {8}
