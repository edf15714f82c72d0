"""Mixtures of experts out of folders, packed on the way in: transformers' forward pass on the weights that the blocks mean,
by the `gguf` package, is the judge; then what they become: a merge, a GGUF file, a LoRA for llama.cpp."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from compared import logits, off
from gguf import GGMLQuantizationType as Q
from peft import PeftModel
from torch import Tensor, nn

import qgraft
from qgraft.adapter_files.gguf_lora import export_gguf_lora
from qgraft.checkpoints.gguf_from_folder import why_not_gguf
from qgraft.errors import CheckpointError, OptionError, UnsupportedError
from qgraft.experts import ExpertStack
from qgraft.training.prepare import balance_note

Maker = Callable[..., Any]
EACH = pytest.mark.parametrize(
    "architecture",
    [
        "gpt-oss",  # [E, in, out], outputs of gate and up alternate, biases
        "qwen3moe",  # a file has a matrix for each expert
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("granitemoe", "mixtral", "olmoe", "qwen2moe")),
    ],
)


def as_folder(tiny: Any, folder: Path) -> Path:
    _, tokenizer = qgraft.load(tiny.path, device="cpu")
    tiny.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rounded(w_OI: Tensor, kind: Q) -> Tensor:
    """What the blocks of a matrix mean."""
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(w_OI.contiguous().numpy(), kind), kind))


@torch.no_grad()
def round_model(model: Any, kind: Q) -> None:
    """transformers' float model with the weights that the blocks of its linear layers and experts mean."""
    output = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not output:
            module.weight.copy_(rounded(module.weight, kind))
        for leaf in ("gate_up_proj", "down_proj"):
            stack = getattr(module, leaf, None)
            if isinstance(stack, nn.Parameter):
                w_EOI = stack.transpose(1, 2) if module.is_transposed else stack
                w_EOI.copy_(torch.stack([rounded(w_OI, kind) for w_OI in w_EOI]))


def packed_formats(model: Any) -> set[str]:
    return {module.packed.format for module in model.modules() if isinstance(module, ExpertStack)}


@EACH
def test_experts_of_a_folder_mean_what_their_blocks_do(
    architecture: str, make_gguf: Maker, random_ids: Maker, tmp_path: Path
) -> None:
    tiny = make_gguf(tmp_path / "tiny.gguf", architecture, types=(Q.F32,))
    folder = as_folder(tiny, tmp_path / "folder")
    model, _ = qgraft.load(folder, dtype="float32", device="cpu", quantize="q4_0")
    later, _ = qgraft.load(folder, dtype="float32", device="cpu")
    assert packed_formats(model) == {"q4_0"} and not packed_formats(later)
    assert not qgraft.quantize(later, "q4_0")
    ids = random_ids(model, rows=2, length=40)
    before = logits(tiny.model, ids)
    round_model(tiny.model, Q.Q4_0)
    expected = logits(tiny.model, ids)
    assert off(before, expected) > 0.01
    for each in (model, later):
        assert off(logits(each, ids), expected) < 1e-5
    assert why_not_gguf(model) is None
    for number, each in enumerate((model, later)):
        qgraft.save(each, tmp_path / f"new-{number}.gguf")
        again, _ = qgraft.load(tmp_path / f"new-{number}.gguf", dtype="float32", device="cpu")
        assert torch.equal(logits(again, ids), logits(model, ids))
        assert packed_formats(again) == {"q4_0"}
    written = gguf.GGUFReader(tmp_path / "new-0.gguf")
    shapes = {tensor.name: tensor.shape.tolist() for tensor in written.tensors}
    experts = next(module for module in model.modules() if isinstance(module, ExpertStack))
    assert shapes["blk.1.ffn_gate_exps.weight"] == [experts.in_features, experts.out_features, 6]
    with pytest.raises(UnsupportedError, match=r"6 stacks of experts .* are in q4_0: a folder can have"):
        qgraft.save(model, tmp_path / "copy")  # test_folder_experts.py writes them as floats


def test_what_an_adapter_learned_goes_into_packed_experts_of_a_folder(
    make_gguf: Maker, random_ids: Maker, tmp_path: Path
) -> None:
    tiny = make_gguf(tmp_path / "tiny.gguf", "gpt-oss", types=(Q.F32,))
    folder = as_folder(tiny, tmp_path / "folder")
    model, _ = qgraft.load(folder, dtype="float32", device="cpu", quantize="q8_0")
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    qgraft.attach_lora(model, r=2, target_modules=(), target_parameters=names)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.12)
    ids = random_ids(model, rows=1)
    learned = logits(model, ids)
    qgraft.save_adapter(model, tmp_path / "adapter")
    round_model(tiny.model, Q.Q8_0)
    base = logits(tiny.model, ids)
    assert off(learned, logits(PeftModel.from_pretrained(tiny.model, tmp_path / "adapter"), ids)) < 1e-5
    export_gguf_lora(model, tmp_path / "lora.gguf", dtype="float32")
    sign = model.qgraft.info.fingerprint
    qgraft.merge(model, method="nearest", min_retained=-1e9)
    assert model.qgraft.info.fingerprint != sign
    merged = logits(model, ids)
    assert float((merged - learned).norm()) < 0.15 * float((learned - base).norm())
    qgraft.save(model, tmp_path / "merged.gguf")
    again, _ = qgraft.load(tmp_path / "merged.gguf", dtype="float32", device="cpu")
    assert torch.equal(logits(again, ids), merged)
    qgraft.unmerge(model)
    assert torch.equal(logits(model, ids), learned)
    again, _ = qgraft.load(folder, dtype="float32", device="cpu", quantize="q8_0")
    assert again.qgraft.info.fingerprint == sign
    for stored in ("adapter", "lora.gguf"):
        qgraft.load_adapter(again, tmp_path / stored)
        assert torch.equal(logits(again, ids), learned), stored
        qgraft.detach_lora(again)


def test_experts_that_stay_floats(make_gguf: Maker, random_ids: Maker, tmp_path: Path) -> None:
    tiny = make_gguf(tmp_path / "tiny.gguf", "qwen3moe", types=(Q.F32,))
    folder = as_folder(tiny, tmp_path / "folder")
    model, _ = qgraft.load(folder, dtype="float32", device="cpu", quantize="chatglm-int8")
    assert any("the experts are held as floats and are not in chatglm-int8" in note for note in model.qgraft.info.notes)
    with pytest.raises(OptionError, match="none: its experts are held as floats"):
        qgraft.attach_lora(model, target_parameters=["mlp.experts.down_proj"])
    qgraft.save(model, tmp_path / "copy")
    again, _ = qgraft.load(tmp_path / "copy", dtype="float32", device="cpu")
    ids = random_ids(model)
    assert torch.equal(logits(model, ids), logits(again, ids))
    floats, _ = qgraft.load(folder, dtype="float32", device="cpu")
    assert "experts are written packed" in str(why_not_gguf(floats))
    held, _ = qgraft.load(folder, dtype="float32", device="cpu", quantize="f16")
    assert packed_formats(held) == {"f16"} and why_not_gguf(held) is None
    for parameter in floats.model.layers[0].mlp.experts.parameters():
        parameter.data[0, 0, 0] = torch.nan
    with pytest.raises(
        UnsupportedError, match=r"layers\.0\.mlp\.experts\.gate_up_proj: q4_0: got 1 of \d+ weights NaN"
    ):
        qgraft.quantize(floats, "q4_0")


def test_experts_of_a_token_are_some_of_those_that_there_are(
    make_gguf: Maker, random_ids: Maker, tmp_path: Path
) -> None:
    """transformers finds it out in the first pass; a dozen experts are in the order of their numbers, not of their names."""
    options = {"num_experts": 12, "num_experts_per_tok": 5}
    tiny = make_gguf(tmp_path / "tiny.gguf", "qwen3moe", types=(Q.F32,), config=options)
    folder = as_folder(tiny, tmp_path / "folder")
    model, _ = qgraft.load(folder, dtype="float32", device="cpu", quantize="f32")
    ids = random_ids(model)
    assert off(logits(model, ids), logits(tiny.model, ids)) < 1e-6
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "output_router_logits": True}))
    (said,) = balance_note(qgraft.load(folder, device="cpu")[0])
    assert "router_aux_loss_coef) is not added" in said and not balance_note(model)
    for chosen in (0, 13, -1):
        (folder / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": chosen}))
        with pytest.raises(
            CheckpointError, match=rf"num_experts_per_tok: got {chosen}, expected a number from 1 to 12"
        ):
            qgraft.load(folder, device="cpu")


@pytest.mark.parametrize(
    ("to", "method", "most"),
    [
        ("f32", "nearest", 1e-5),
        pytest.param("q8_0", "auto", 0.1, marks=pytest.mark.slow),
        pytest.param("q5_1", "codes", 0.9, marks=pytest.mark.slow),
    ],
)
def test_a_merge_of_experts_into_another_format(
    to: str,
    method: str,
    most: float,
    make_gguf: Maker,
    random_ids: Maker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An expert that the adapter leaves alone gets the format, too; one with too few tokens is rounded."""
    tiny = make_gguf(tmp_path / "tiny.gguf", "qwen3moe", types=(Q.Q4_0,))
    model, _ = qgraft.load(tiny.path, dtype="float32", device="cpu")
    qgraft.attach_lora(model, r=2, target_modules=(), target_parameters=["mlp.experts.down_proj"])
    torch.manual_seed(1)
    for part in model.qgraft.adapters["default"].parts.values():
        part.lora_B.data.normal_(0, 0.3)
        part.lora_B.data[3].zero_()
    monkeypatch.setattr("qgraft.merging.experts.FEWEST", 200)
    ids = random_ids(model, rows=1, length=60)
    learned = logits(model, ids)
    rows = [{"instruction": f"question {i}", "output": f"the cat {i} sat on the mat"} for i in range(24)]
    report = qgraft.merge(model, to=to, method=method, calibration=rows, min_retained=-1e9)
    merged = logits(model, ids)
    assert {layer.format for layer in report.layers} == {to}
    assert packed_formats(model) == {"q4_0", to}
    base = logits(qgraft.load(tiny.path, dtype="float32", device="cpu")[0], ids)
    assert float((merged - learned).norm()) < most * float((learned - base).norm())
    qgraft.save(model, tmp_path / "merged.gguf", to=to)
    again, _ = qgraft.load(tmp_path / "merged.gguf", dtype="float32", device="cpu")
    assert packed_formats(again) == {to}
    stack = model.model.layers[1].mlp.experts.down_proj.down.packed
    assert torch.equal(again.model.layers[1].mlp.experts.down_proj.down.packed.parts[0], stack.parts[0])
    qgraft.unmerge(model)
    assert torch.equal(logits(model, ids), learned)
