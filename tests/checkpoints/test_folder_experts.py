"""Experts in folders: gpt-oss as it is released, in MXFP4, and packed experts written back into what a folder had.

transformers is the judge: its own dequantization of the blocks, and its models loaded from what was written.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compared import logits, off
from gguf import GGMLQuantizationType as Q
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import qgraft
from qgraft.errors import CheckpointError, UnsupportedError
from qgraft.experts import ExpertStack
from qgraft.formats import dequantize

Maker = Callable[..., Any]
EXPERTS = ("gate_up_proj", "down_proj")
STATED = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


def read_all(folder: Path) -> dict[str, Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def as_folder(tiny: Any, folder: Path, **options: Any) -> Path:
    _, tokenizer = qgraft.load(tiny.path, device="cpu")
    tiny.model.save_pretrained(folder, **options)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def released(make_gguf: Maker, tmp_path: Path) -> tuple[Path, Any]:
    """(a tiny gpt-oss as the released one lies in its folder, with random bytes; transformers' model of what these mean)."""
    tiny = make_gguf(tmp_path / "tiny.gguf", "gpt-oss", types=(Q.F32,))
    for parameter in tiny.model.parameters():
        parameter.data = parameter.to(torch.bfloat16).float()
    folder, generator = as_folder(tiny, tmp_path / "released"), torch.Generator().manual_seed(0)
    tensors = {name: value.to(torch.bfloat16) for name, value in read_all(folder).items()}
    for layer in tiny.model.model.layers:
        for leaf in EXPERTS:
            parameter = getattr(layer.mlp.experts, leaf)
            experts, width, out = parameter.shape
            blocks = torch.randint(0, 256, (experts, out, width // 32, 16), generator=generator, dtype=torch.uint8)
            scales = torch.randint(118, 124, (experts, out, width // 32), generator=generator, dtype=torch.uint8)
            parameter.data = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
            name = f"model.layers.{layer.self_attn.layer_idx}.mlp.experts.{leaf}"
            del tensors[name]
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, quantization_config=STATED)
    return folder, tiny.model


def in_two_files(folder: Path) -> None:
    """The scales in another one than the blocks."""
    tensors = read_all(folder)
    scales = {name: tensors.pop(name) for name in list(tensors) if name.endswith("_scales")}
    (folder / "model.safetensors").unlink()
    for number, part in enumerate((tensors, scales), 1):
        save_file(part, folder / f"model-{number:05d}-of-00002.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def packed_formats(model: Any) -> set[str]:
    return {module.packed.format for module in model.modules() if isinstance(module, ExpertStack)}


def with_noise(model: Any) -> None:
    """LoRAs on attention and on the experts, whose numbers change all that the model says."""
    names = [f"mlp.experts.{leaf}" for leaf in EXPERTS]
    qgraft.attach_lora(model, r=2, lora_alpha=4, target_modules=["q_proj", "o_proj"], target_parameters=names)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.12)


def test_released_experts_are_read_and_written_bit_for_bit(
    released: tuple[Path, Any], random_ids: Maker, tmp_path: Path
) -> None:
    folder, theirs = released
    in_two_files(folder)
    model, _ = qgraft.load(folder, dtype="float32", device="cpu")
    assert packed_formats(model) == {"mxfp4"} and not model.qgraft.info.notes
    for layer, expected in zip(model.model.layers, theirs.model.layers, strict=True):
        for leaf in EXPERTS:
            stacks = [stack.packed for stack in getattr(layer.mlp.experts, leaf).stacks().values()]
            w_EIO = [dequantize(each, torch.float32).view(6, -1, each.shape[1]).transpose(1, 2) for each in stacks]
            assert torch.equal(torch.stack(w_EIO, 3).flatten(2), getattr(expected.mlp.experts, leaf))
    ids = random_ids(theirs, length=40)
    assert off(got := logits(model, ids), logits(theirs, ids)) < 1e-5
    assert qgraft.save(model, tmp_path / "copy").changed == 0
    before, after = read_all(folder), read_all(tmp_path / "copy")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert (tmp_path / "copy" / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    qgraft.save(model, tmp_path / "new.gguf")
    again, _ = qgraft.load(tmp_path / "new.gguf", dtype="float32", device="cpu")
    assert packed_formats(again) == {"mxfp4"}
    assert torch.equal(logits(again, ids), got)


@pytest.mark.slow
def test_released_experts_are_trained_and_merged(released: tuple[Path, Any], random_ids: Maker, tmp_path: Path) -> None:
    """Losses and gradients are PEFT's; a merged folder is loaded by transformers, its MXFP4 or its floats."""
    folder, theirs = released
    model, _ = qgraft.load(folder, dtype="float32", device="cpu")
    with_noise(model)
    ids, base = random_ids(theirs, rows=1, length=40), logits(theirs, random_ids(theirs, rows=1, length=40))
    qgraft.save_adapter(model, tmp_path / "adapter")
    adapted = PeftModel.from_pretrained(theirs, tmp_path / "adapter", is_trainable=True)
    losses = []
    for each in (model, adapted):
        losses.append(each(ids, labels=ids).loss)
        losses[-1].backward()
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    gradients = {name.replace(".default", ""): p.grad for name, p in adapted.named_parameters() if p.requires_grad}
    found: dict[str, Tensor] = {}
    for path, part in model.qgraft.adapters["default"].parts.items():
        kept = {name: parameter.data for name, parameter in part.named_parameters()}
        for parameter in part.parameters():
            parameter.data = parameter.grad
        found |= {name: value.clone() for name, value in part.tensors(path).items()}
        for name, parameter in part.named_parameters():
            parameter.data = kept[name]
    largest = max(float(each.abs().max()) for each in gradients.values())
    assert found.keys() == gradients.keys()
    assert all(float((found[name] - value).abs().max()) < 1e-4 * largest for name, value in gradients.items())
    learned = logits(model, ids)
    assert off(learned, logits(adapted, ids)) < 1e-5
    qgraft.merge(model, method="nearest", min_retained=-1e9)
    merged = logits(model, ids)
    assert float((merged - learned).norm()) < 0.9 * float((learned - base).norm())
    saved = qgraft.save(model, tmp_path / "merged")
    assert saved.nbytes == saved.source_nbytes and saved.changed == 2 * 4
    again, _ = qgraft.load(tmp_path / "merged", dtype="float32", device="cpu")
    assert torch.equal(logits(again, ids), merged) and packed_formats(again) == {"mxfp4"}
    for name, options in (("merged", {}), ("floats", {"to": "f32"})):
        if options:
            qgraft.save(model, tmp_path / name, **options)
        loaded = type(theirs).from_pretrained(tmp_path / name)
        exact = type(theirs)(theirs.config).eval()  # transformers computes in bfloat16 where the experts are MXFP4
        exact.load_state_dict({key: value.float() for key, value in loaded.state_dict().items()})
        assert off(logits(exact, ids), merged) < 1e-5, name
    assert "quantization_config" not in json.loads((tmp_path / "floats" / "config.json").read_text())
    packed, _ = qgraft.load(tmp_path / "floats", dtype="float32", device="cpu", quantize="mxfp4")
    qgraft.save(packed, tmp_path / "again", to={f"{leaf}_proj": "bf16" for leaf in "qkvo"})
    assert (
        json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]["quant_method"] == "mxfp4"
    )
    for name in ("merged", "again"):
        experts = {key: value for key, value in read_all(tmp_path / name).items() if "experts" in key}
        assert all(
            torch.equal(value.float(), read_all(tmp_path / "merged")[key].float()) for key, value in experts.items()
        )


def spoilt(tensors: dict[str, Tensor], end: str, change: Callable[[Tensor], Tensor | None]) -> dict[str, Tensor]:
    name = f"model.layers.1.mlp.experts.{end}"
    changed = change(tensors.pop(name))
    return tensors | ({} if changed is None else {name: changed})


def with_nan(scales: Tensor) -> Tensor:
    scales[2, 3, 0] = 255
    return scales


BROKEN: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "NaN": (lambda t: spoilt(t, "down_proj_scales", with_nan), "down_proj_scales: got 255, which is NaN"),
    "no scales": (lambda t: spoilt(t, "down_proj_scales", lambda _: None), "down_proj_scales .* is missing beside it"),
    "no blocks": (lambda t: spoilt(t, "down_proj_blocks", lambda _: None), "missing .*experts.down_proj"),
    "other scales": (
        lambda t: spoilt(t, "down_proj_scales", lambda s: s[:, :, :2].contiguous()),
        r"down_proj_scales: got torch.uint8 \[6, 64, 2\], expected uint8 \[6, 64, 3\]",
    ),
    "floats": (lambda t: spoilt(t, "down_proj_blocks", lambda b: b.float()), "blocks: got torch.float32 .* expected uint8"),
    "too few experts": (
        lambda t: spoilt(t, "gate_up_proj_blocks", lambda b: b[:5].contiguous()), "expected 6 experts of 192 rows",
    ),
    "too narrow": (
        lambda t: spoilt(spoilt(t, "down_proj_blocks", lambda b: b[:, :, :2].contiguous()), "down_proj_scales",
                         lambda s: s[:, :, :2].contiguous()),
        "matrices of 384 x 64 numbers in all, expected 384 x 96",
    ),
}  # fmt: skip


@pytest.mark.spread(1)
@pytest.mark.parametrize("case", BROKEN)
def test_broken_released_experts(case: str, released: tuple[Path, Any]) -> None:
    change, message = BROKEN[case]
    save_file(change(read_all(released[0])), released[0] / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        qgraft.load(released[0], device="cpu")


@pytest.mark.slow
def test_what_lies_beside_released_experts(released: tuple[Path, Any]) -> None:
    folder, _ = released
    floats = {"model.layers.1.mlp.experts.down_proj": torch.zeros(6, 96, 64)}
    save_file(read_all(folder) | floats, folder / "model.safetensors")
    model, _ = qgraft.load(folder, device="cpu")
    (note,) = model.qgraft.info.notes
    assert note.startswith("1 tensors of the folder have no place in the model: model.layers.1.mlp.experts.down_proj")
    with pytest.raises(UnsupportedError, match=r"quantize='q4_0': .*gate_up_proj is stored in mxfp4 already"):
        qgraft.load(folder, device="cpu", quantize="q4_0")
    edit_config(folder, quantization_config=None)
    with pytest.raises(CheckpointError, match=r"_blocks: config\.json says nothing of it, expected quant_method"):
        qgraft.load(folder, device="cpu")


@pytest.mark.parametrize(
    "architecture",
    [
        "qwen3moe",  # a file has a matrix for each expert
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("gpt-oss", "mixtral", "olmoe", "granitemoe", "qwen2moe", "glm4moe", "ernie4_5-moe", "lfm2moe",
                         "qwen35moe", "deepseek3")
        ),
    ],
)  # fmt: skip
def test_packed_experts_go_back_into_what_the_folder_had(
    architecture: str, make_gguf: Maker, random_ids: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = make_gguf(tmp_path / "tiny.gguf", architecture, types=(Q.F32,))
    folder = as_folder(tiny, tmp_path / "folder", max_shard_size="200KB")
    model, _ = qgraft.load(folder, dtype="float32", device="cpu", quantize="q4_0")
    later, _ = qgraft.load(folder, dtype="float32", device="cpu")
    qgraft.quantize(later, "q4_0")
    monkeypatch.setattr("qgraft.checkpoints.folder_write.SHARD_BYTES", 100_000)
    for each, name in ((model, "back"), (later, "later")):
        with pytest.raises(UnsupportedError, match=r"\d+ stacks of experts .* are in q4_0: a folder can have"):
            qgraft.save(each, tmp_path / name)
        qgraft.save(each, tmp_path / name, to="f32")
    written, ids = read_all(tmp_path / "back"), random_ids(model, length=30)
    assert {name: value.shape for name, value in read_all(folder).items()} == {
        name: value.shape for name, value in written.items()
    }
    assert all(torch.equal(value, written[name]) for name, value in read_all(tmp_path / "later").items())
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > len(list(folder.glob("*.safetensors"))) > 1
    theirs = type(tiny.model).from_pretrained(tmp_path / "back", dtype=torch.float32)
    assert off(logits(model, ids), logits(theirs, ids)) < 1e-5
    assert off(logits(model, ids), logits(tiny.model, ids)) > 0.01


@pytest.mark.slow
def test_what_experts_learned_goes_back_into_the_folder(make_gguf: Maker, random_ids: Maker, tmp_path: Path) -> None:
    """In float32 a merge is W + BA, which PEFT computes, too."""
    tiny = make_gguf(tmp_path / "tiny.gguf", "qwen3moe", types=(Q.F32,))
    folder = as_folder(tiny, tmp_path / "folder")
    model, _ = qgraft.load(folder, dtype="float32", device="cpu", quantize="f32")
    with_noise(model)
    qgraft.save_adapter(model, tmp_path / "adapter")
    ids = random_ids(tiny.model, rows=1, length=30)
    expected = logits(PeftModel.from_pretrained(tiny.model, tmp_path / "adapter"), ids)
    qgraft.merge(model, method="nearest", min_retained=-1e9)
    qgraft.save(model, tmp_path / "merged")
    theirs = type(tiny.model).from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert off(logits(theirs, ids), expected) < 1e-5


def test_experts_of_a_token_that_a_configuration_lists_by_layers(
    make_gguf: Maker, random_ids: Maker, tmp_path: Path
) -> None:
    """As Hunyuan's released one does: one number where all are the same, and no file where they differ."""
    tiny = make_gguf(tmp_path / "tiny.gguf", "hunyuan-moe", types=(Q.F32,))
    folder = as_folder(tiny, tmp_path / "folder")
    edit_config(folder, moe_topk=[2, 2])
    model, _ = qgraft.load(folder, dtype="float32", device="cpu", quantize="f32")
    qgraft.save(model, tmp_path / "new.gguf")
    again, _ = qgraft.load(tmp_path / "new.gguf", dtype="float32", device="cpu")
    ids = random_ids(tiny.model, rows=1)
    assert again.config.moe_topk == 2
    for each in (model, again):
        assert off(logits(each, ids), logits(tiny.model, ids)) < 1e-5
    edit_config(folder, moe_topk=[2, 1])
    other, _ = qgraft.load(folder, dtype="float32", device="cpu", quantize="f32")
    assert off(logits(other, ids), logits(model, ids)) > 0.01
    with pytest.raises(
        UnsupportedError, match=r"as a GGUF file: moe_topk \[2, 1\]: layers have other numbers of experts"
    ):
        qgraft.save(other, tmp_path / "other.gguf")
    for given, message in (
        ([2, 7], "moe_topk: got 7, expected a number from 1 to 6"),
        ([2], "got a list of 1, expected 2"),
    ):
        edit_config(folder, moe_topk=given)
        with pytest.raises(CheckpointError, match=message):
            qgraft.load(folder, device="cpu")


@pytest.mark.slow
def test_experts_that_a_folder_has_no_place_for(make_gguf: Maker, tmp_path: Path) -> None:
    tiny = make_gguf(tmp_path / "tiny.gguf", "qwen3moe", types=(Q.F32,))
    folder = as_folder(tiny, tmp_path / "folder")
    model, _ = qgraft.load(folder, dtype="float32", device="cpu", quantize="f16")
    with pytest.raises(
        UnsupportedError, match=r"are in f16, mxfp4: a folder can have .* those of gpt-oss, all of them"
    ):
        qgraft.save(model, tmp_path / "copy", to={"down_proj.down": "mxfp4"})
    with pytest.raises(
        UnsupportedError, match=r"to='q8_0': a folder of safetensors can get in experts: bf16, f16, f32"
    ):
        qgraft.save(model, tmp_path / "copy", to={"down_proj.down": "q8_0"})
    with pytest.raises(UnsupportedError, match="bf16, f16"):
        qgraft.save(model, tmp_path / "copy", to={"gate_up_proj.up": "bf16"})
    qgraft.save(model, tmp_path / "copy", to={"down_proj.down": "bf16"})
