"""Exact merges: the gguf package reads what was written; only stored minimums may differ, by their rounding alone."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import qgraft
from qgraft.adapters.attach import attach_layers, attach_lora
from qgraft.adapters.base import find_adapter
from qgraft.adapters.choose import use_adapter
from qgraft.adapters.lora import LoraConfig
from qgraft.adapters.targets import lora_layers
from qgraft.errors import DataError, OptionError, UnsupportedError
from qgraft.formats import dequantize, pack, unpack
from qgraft.merging import calibration
from qgraft.merging.merge import merge, unmerge

Maker = Callable[..., Any]
FORMATS = {
    "q4_1": ([2, 4], 20),
    "q5_1": ([2, 4], 24),
    "q2_k": ([82, 84], 84),
    "q4_k": ([2, 4], 144),
    "q5_k": ([2, 4], 176),
}
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(autouse=True)
def _little_unrelated_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "NEUTRAL_TOKENS", 600)
    monkeypatch.setattr(calibration, "DRIFT_TOKENS", 200)


def tiny_in(tiny_gguf: Maker, format: str) -> Any:
    kind = gguf.GGMLQuantizationType[format.upper()]
    return tiny_gguf("llama", types=(kind,), config={"hidden_size": 256, "head_dim": 64})


def with_exact(model: Any, name: str = "default", size: float = 0.02, **options: Any) -> Any:
    attach_lora(model, **{"r": 3, "exact": True, "name": name, **options})
    for number, part in enumerate(find_adapter(model, name).parts.values()):
        part.lora_B.data.normal_(0, size, generator=torch.Generator().manual_seed(number + len(name)))
    return model


def deltas_of(model: Any, weight: float = 1.0) -> dict[str, Tensor]:
    return {path: weight * part.delta().detach() for path, part in find_adapter(model).parts.items()}


def logits_of(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def changes_minimums_only(before: Any, after: Any, format: str) -> bool:
    (low, high), size = FORMATS[format]
    old, new = (packed.parts[0].reshape(-1, size).clone() for packed in (before, after))
    old[:, low:high] = new[:, low:high]
    return torch.equal(old, new)


@pytest.mark.parametrize("format", FORMATS)
def test_the_written_file_is_base_and_delta_but_for_the_rounding_of_minimums(
    tiny_gguf: Maker, random_ids: Maker, tmp_path: Path, format: str
) -> None:
    tiny = tiny_in(tiny_gguf, format)
    model = with_exact(qgraft.load(tiny.path)[0])
    ids, packed = random_ids(model), {path: layer.packed for path, layer in lora_layers(model)}
    deltas, adapted = deltas_of(model), logits_of(model, ids)
    report = merge(model, tokenizer=None)

    assert {each.path: each.steps for each in report.layers} == dict.fromkeys(packed, ("exact",))
    assert (report.kept, report.calibration_rows, report.distilled_steps) == (None, 0, 0)
    assert all(each.codes_changed == 0.0 and each.delta_in_steps > 0.01 for each in report.layers)
    qgraft.save(model, tmp_path / "merged.gguf")
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "merged.gguf").tensors}
    names = {parameter.removesuffix(".weight"): name for name, parameter in tiny.parameters.items()}
    exactly, merged = (copy.deepcopy(tiny.model).double() for _ in range(2))  # transformers' own, in float64
    for path, delta in deltas.items():
        after = model.get_submodule(path).packed
        assert changes_minimums_only(packed[path], after, after.format), path
        wanted = dequantize(packed[path], torch.float64) + delta.double()
        grid = unpack(after)  # half the distance of two float16 around each minimum, times its integers
        half = torch.from_numpy(np.spacing(grid.m.abs().half().numpy()).astype(np.float64)) / 2
        n = 1.0 if grid.sub_minimums is None else grid.sub_minimums.double()
        bound = grid.spread(half.repeat_interleave(grid.steps().shape[1] // half.shape[1], 1) * n)
        got = dequantize(after, torch.float64)
        assert bool(((got - wanted).abs() <= bound * 1.01 + 1e-6).all()), path
        stored = tensors[names[path]]  # and the file holds these very numbers
        theirs = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type).copy())
        if not path.endswith(("q_proj", "k_proj")):  # whose rows llama.cpp orders otherwise
            torch.testing.assert_close(theirs.double(), got, rtol=1e-6, atol=1e-6)
        exactly.get_submodule(path).weight.copy_(wanted)
        merged.get_submodule(path).weight.copy_(got)
    again, _ = qgraft.load(tmp_path / "merged.gguf")
    assert torch.equal(logits_of(again, ids), logits_of(model, ids))
    for ours, theirs in ((adapted, exactly), (logits_of(model, ids), merged)):
        torch.testing.assert_close(ours.double(), logits_of(theirs, ids), rtol=1e-3, atol=2e-3)
    apart, moved = (
        logits_of(merged, ids) - logits_of(exactly, ids),
        logits_of(exactly, ids) - logits_of(tiny.model, ids),
    )
    assert float(apart.norm() / moved.norm()) < 0.03
    unmerge(model)
    assert torch.equal(logits_of(model, ids), adapted)
    assert all(torch.equal(layer.packed.parts[0], packed[path].parts[0]) for path, layer in lora_layers(model))


def test_what_is_exact_is_told_by_the_numbers(tiny_gguf: Maker, tmp_path: Path, random_ids: Maker) -> None:
    """Of PEFT's files without a seal, weighted, two at once."""
    tiny = tiny_in(tiny_gguf, "q4_1")
    model = with_exact(qgraft.load(tiny.path)[0], target_modules="up_proj,q_proj")
    qgraft.save_adapter(model, tmp_path / "adapter")
    (tmp_path / "adapter" / "qgraft.json").unlink()
    fresh, _ = qgraft.load(tiny.path)
    qgraft.load_adapter(fresh, tmp_path / "adapter", "plain")
    assert not any(part.config.exact for part in find_adapter(fresh, "plain").parts.values())
    with_exact(fresh, "second", target_modules="up_proj")
    use_adapter(fresh, {"plain": 0.5, "second": -0.7})
    ids, layer, second = random_ids(fresh), fresh.get_submodule(UP), find_adapter(fresh, "second").parts[UP]
    adapted = logits_of(fresh, ids)
    m = unpack(layer.packed).m.double()
    state = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    A, B = (state[f"base_model.model.{UP}.lora_{part}.weight"].double() for part in "AB")
    m += 0.5 * 16 / 3 * (B @ A)[:, ::32] - 0.7 * second.delta().detach().double()[:, ::32]
    report = merge(fresh)
    assert {each.steps for each in report.layers} == {("exact",)}
    assert torch.equal(unpack(fresh.get_submodule(UP).packed).m, m.half().float())
    assert float((logits_of(fresh, ids) - adapted).abs().max()) < 0.2


def test_a_layer_with_an_ordinary_lora_too_is_solved_for_as_ever(
    tiny_gguf: Maker, rows: Any, random_ids: Maker
) -> None:
    """Exact layers in closed form, whatever happens to the others."""
    tiny = tiny_in(tiny_gguf, "q4_1")
    model = with_exact(qgraft.load(tiny.path)[0], target_modules="up_proj,q_proj")
    plain, both = "model.layers.0.mlp.gate_proj", "model.layers.1.mlp.up_proj"
    attach_layers(model, "plain", {plain: LoraConfig(r=2), both: LoraConfig(r=2)})
    for part in find_adapter(model, "plain").parts.values():
        part.lora_B.data.normal_(0, 0.002)
    use_adapter(model, {"default": 1.0, "plain": 1.0})
    with pytest.raises(DataError, match="needs rows of the adapter's task"):
        merge(model)
    m, part = unpack(model.get_submodule(UP).packed).m, find_adapter(model, "default").parts[UP]
    expected = (m.double() + part.change().detach()).half().float()
    report = merge(model, calibration=rows, min_retained=-1e9)
    steps = {each.path: each.steps for each in report.layers}
    assert {path for path, done in steps.items() if done != ("exact",)} == {plain, both}
    assert torch.equal(unpack(model.get_submodule(UP).packed).m, expected)
    assert report.kept is not None
    assert report.calibration_rows


def test_integers_that_have_changed_meanwhile_are_noticed(tiny_gguf: Maker, random_ids: Maker) -> None:
    model = with_exact(qgraft.load(tiny_in(tiny_gguf, "q4_k").path)[0], target_modules="up_proj")
    ids, layer, part = random_ids(model), model.get_submodule(UP), find_adapter(model).parts[UP]
    before, grid = part.delta(), unpack(layer.packed)
    layer.replace(pack(replace(grid, sub_minimums=grid.sub_minimums.flip(1)), "q4_k"))
    assert torch.equal(part.delta(), before)
    assert logits_of(model, ids).isfinite().all()
    with pytest.raises(DataError, match="needs rows of the adapter's task"):
        merge(model)


@pytest.mark.parametrize("options", [{"method": "nearest"}, {"to": "q8_0", "method": "nearest"}], ids=str)
def test_other_methods_and_formats_go_the_ordinary_way(tiny_gguf: Maker, options: Any) -> None:
    model = with_exact(qgraft.load(tiny_in(tiny_gguf, "q4_1").path)[0], target_modules="up_proj")
    report = merge(model, min_retained=-1e9, **options)
    assert {each.steps for each in report.layers} == {("nearest",)}


def test_q2_k_is_written_for_exact_loras_alone(tiny_gguf: Maker) -> None:
    model = qgraft.load(tiny_in(tiny_gguf, "q2_k").path)[0]
    attach_lora(model, r=2, target_modules="up_proj")
    with pytest.raises(UnsupportedError, match="q2_k, which qgraft does not write"):
        merge(model)
    qgraft.detach_lora(model)
    with_exact(model, target_modules="up_proj")
    with pytest.raises(UnsupportedError, match="q2_k, which qgraft does not write"):
        merge(model, method="nearest")
    assert merge(model).layers


def test_rows_are_only_measured_on_and_their_absence_is_said(tiny_gguf: Maker, rows: Any, tmp_path: Path) -> None:
    path = tiny_in(tiny_gguf, "q5_1").path
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    model, tokenizer = qgraft.load(path)
    arguments = qgraft.TrainArguments(output_dir=str(tmp_path / "out"), exact=True, r=2, dataset=str(data), max_steps=6,
                                      learning_rate=2e-2, plot_loss=False, use_cpu=True)  # fmt: skip
    qgraft.train(model, tokenizer, None, arguments)
    measured = merge(model)
    assert measured.retained_gain == pytest.approx(1.0, abs=0.02)
    assert "retained gain" in str(measured)
    assert not any("calibrated" in line for line in measured.summary())
    data.unlink()
    (tmp_path / "out" / "calibration.safetensors").unlink()
    model, _ = qgraft.load(path)
    qgraft.load_adapter(model, tmp_path / "out")
    with pytest.raises(DataError):
        merge(model, calibration=str(data))
    report = merge(model)
    assert report.kept is None
    assert any("what was kept is not measured: " in note for note in report.notes)
    unmerge(model)
    with pytest.raises(OptionError, match="unknown option 'rows'"):
        merge(model, rows=3)
    model.qgraft.tokenizer = None
    assert merge(model).notes == ("what was kept is not measured: the model came without a tokenizer",)


def test_minimums_that_cannot_be_stored_are_refused_by_name(tiny_gguf: Maker) -> None:
    model = with_exact(qgraft.load(tiny_in(tiny_gguf, "q4_1").path)[0], size=1e6, target_modules="up_proj")
    before = model.get_submodule(UP).packed
    with pytest.raises(UnsupportedError, match=r"merge: model.layers.0.mlp.up_proj: .*too large to store"):
        merge(model)
    assert model.get_submodule(UP).packed is before or torch.equal(
        model.get_submodule(UP).packed.parts[0], before.parts[0]
    )
