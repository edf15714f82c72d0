"""merge() and unmerge(): what is kept, what stays as it was, and what happens when something goes wrong half-way."""

import copy
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qgraft
from qgraft.adapters.attach import attach_layers
from qgraft.adapters.base import find_adapter, selection_of
from qgraft.adapters.lora import LoraConfig
from qgraft.adapters.targets import lora_layers
from qgraft.checkpoints.save import save
from qgraft.data.tokenizing import Sample
from qgraft.errors import AdapterError, CheckpointError, DataError, MergeError, OptionError, UnsupportedError
from qgraft.formats import PackedTensor
from qgraft.merging import calibration, finish, layer, measure
from qgraft.merging import merge as merge_module
from qgraft.merging.merge import merge, unmerge

Maker = Callable[..., Any]
ANY = -100.0  # of min_retained: whatever is kept


@pytest.fixture(autouse=True)
def _little_unrelated_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "NEUTRAL_TOKENS", 1000)
    monkeypatch.setattr(calibration, "DRIFT_TOKENS", 300)


def packed_of(model: nn.Module) -> dict[str, PackedTensor]:
    """Every packed matrix of the model, wrapped or not, by the path of its layer."""
    found = {}
    for path, module in model.named_modules():
        if hasattr(module, "packed_weight"):
            found[path.removesuffix(".base")] = module.packed_weight.get()
    return found


def raw(packed: PackedTensor) -> tuple[Any, ...]:
    return packed.format, packed.shape, *(part.numpy().tobytes() for part in packed.parts)


def bytes_of(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    return {path: raw(packed) for path, packed in packed_of(model).items()}


def loras_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def logits_of(model: nn.Module, length: int = 40) -> Tensor:
    ids = torch.randint(4, model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(ids).logits


def everything(model: nn.Module) -> dict[str, Any]:
    """All that a merge which did not happen must leave as it was, comparable with ==."""
    return {
        "bytes": bytes_of(model),
        "modules": {path: type(module).__name__ for path, module in model.named_modules()},
        "training": {path: m.training for path, m in model.named_modules() if ".loras" not in path},
        "gradients": {name: (p.requires_grad, p.grad is None) for name, p in model.named_parameters()},
        "loras": {name: value.numpy().tobytes() for name, value in loras_of(model).items()},
        "active": qgraft.active_adapters(model),
        "attached": qgraft.adapter_names(model),
        "base": model.qgraft.info,
        "attention": model.config._attn_implementation,
        "logits": logits_of(model).numpy().tobytes(),
    }


def plain(model: nn.Module) -> bool:
    return not list(lora_layers(model)) and not qgraft.adapter_names(model)


# ---------------------------------------------------------------- what is kept


@pytest.mark.spread(2)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "phi3", "gpt2"])
def test_a_merge_keeps_what_rounding_loses_and_the_file_is_of_the_same_kind(
    trained, rows, tmp_path, monkeypatch, architecture
):
    if architecture == "gemma2":  # its attention is a whole square over all tokens of the pass
        monkeypatch.setattr(calibration, "NEUTRAL_TOKENS", 350)
        monkeypatch.setattr(measure, "PASS_TOKENS", 256)
    made = trained(architecture)
    model, tokenizer = made.load()
    paths = [path for path, _ in lora_layers(model)]
    before, base = packed_of(model), model.qgraft.info
    losses = [measured(model, tokenizer, rows, off=True), measured(model, tokenizer, rows)]
    rounded = merge(model, tokenizer, calibration=rows, eval_dataset=rows, method="nearest", min_retained=ANY)
    unmerge(model)
    report = merge(model, tokenizer, calibration=rows, eval_dataset=rows)

    assert report.retained_gain > 0.9
    assert rounded.retained_gain < report.retained_gain - 0.15
    assert plain(model)
    assert {each.path for each in report.layers} == set(paths)
    after = packed_of(model)
    for path, packed in before.items():
        assert (after[path].format, after[path].shape, after[path].nbytes) == (
            packed.format,
            packed.shape,
            packed.nbytes,
        )
        assert torch.equal(after[path].parts[0], packed.parts[0]) == (path not in paths), path
    kept = report.kept  # against an evaluation of its own
    losses.append(measured(model, tokenizer, rows))
    assert [kept.base, kept.adapter, kept.merged] == pytest.approx(losses, rel=1e-4)
    assert report.retained_gain == pytest.approx((losses[0] - losses[2]) / (losses[0] - losses[1]), rel=1e-3)
    assert kept.rows == len(rows) and kept.held_out
    assert model.qgraft.info.fingerprint != base.fingerprint
    check_file(model, made.base, tmp_path / "merged.gguf", set(paths))


def measured(model: nn.Module, tokenizer: Any, rows: Any, off: bool = False) -> float:
    if off:
        with qgraft.adapters_off(model):
            return float(qgraft.evaluate(model, tokenizer, rows).loss)
    return float(qgraft.evaluate(model, tokenizer, rows).loss)


def check_file(model: nn.Module, source: Path, target: Path, merged: set[str]) -> None:
    """The saved file is the source but for the merged tensors, and holds the model bit for bit."""
    save(model, target)
    old, new = gguf.GGUFReader(source), gguf.GGUFReader(target)
    assert target.stat().st_size == source.stat().st_size
    assert [(k, f.contents()) for k, f in new.fields.items()] == [(k, f.contents()) for k, f in old.fields.items()]
    assert [(t.name, t.tensor_type, t.data_offset) for t in new.tensors] == [
        (t.name, t.tensor_type, t.data_offset) for t in old.tensors
    ]
    changed = {t.name for t, o in zip(new.tensors, old.tensors, strict=True) if not np.array_equal(t.data, o.data)}
    assert changed == {model.qgraft.origin.matrices[path].name for path in merged}
    again, _ = qgraft.load(target)
    assert again.qgraft.info.fingerprint == model.qgraft.info.fingerprint
    assert bytes_of(again) == bytes_of(model)
    assert torch.equal(logits_of(again), logits_of(model))


def test_the_report_says_what_was_done(trained, rows):
    model, tokenizer = trained().load("law")
    report = merge(model, tokenizer, calibration=rows, eval_dataset=rows[:5])
    assert report.adapters == {"law": 1.0} and report.method == "auto"
    assert report.kept.rows == 5 and report.kept.labels == qgraft.evaluate(model, tokenizer, rows[:5]).labels
    assert report.kept.drift_kl < report.kept.adapter_kl
    assert report.calibration_rows > len(rows)  # unrelated text counts
    assert report.calibration_tokens > 600 and report.seconds > 0 and report.peak_memory_bytes > 1 << 20
    assert report.notes[0] == "rows of the task: the rows given"
    assert re.match(r"a set of \d+ rows: with fewer than about 200", report.notes[1])
    gridded = [each for each in report.layers if each.format != "f16"]
    floats = [each for each in report.layers if each.format == "f16"]
    assert gridded and floats
    assert all(0 < each.error < 0.95 for each in report.layers)
    assert all(0 < each.delta_in_steps < 1 and each.codes_changed > 0 and each.steps for each in gridded)
    assert all(each.steps == ("nearest",) for each in floats)
    kinds = [each.path.split(".")[2] for each in report.layers]
    assert kinds == sorted(kinds) and set(kinds) == {"0", "1"}  # in the order of the pass


@pytest.mark.spread(2)
@pytest.mark.parametrize("method", [name for name in layer.METHODS if name != "auto"])
def test_every_method_merges_and_says_its_name(trained, rows, method):
    model, tokenizer = trained().load()
    before = bytes_of(model)
    report = merge(model, tokenizer, calibration=rows, method=method, min_retained=ANY)
    assert report.method == method and report.distilled_steps == 0
    assert plain(model) and bytes_of(model) != before
    touched = any(each.codes_changed > 0 for each in report.layers)
    assert touched == (method != "scales")
    if method in ("nearest", "grid"):
        floats = [each for each in report.layers if each.format == "f16"]
        assert all(each.error is None for each in report.layers) and all(each.steps == ("nearest",) for each in floats)
        step = "nearest_codes" if method == "grid" else method
        assert {each.steps for each in report.layers if each not in floats} == {(step,)}
    else:
        assert report.retained_gain > 0.3


def test_nearest_and_grid_need_no_rows_and_measure_nothing_without(trained):
    for method in ("nearest", "grid"):
        model, _ = trained().load()
        for name in qgraft.adapter_names(model):
            selection_of(model).change(name, trained={})
        report = merge(model, method=method)
        assert report.kept is None and report.retained_gain is None and report.calibration_rows == 0
        assert plain(model)


@pytest.mark.parametrize("method", ["nearest", "grid"])
def test_nearest_and_grid_measure_on_rows_and_do_not_say_that_they_calibrate(trained, rows, method):
    model, tokenizer = trained().load()
    report = merge(model, tokenizer, calibration=rows, method=method, min_retained=ANY)
    assert report.kept is not None and report.calibration_rows == 0 and "calibrated" not in str(report)


@pytest.mark.slow
def test_the_rest_of_a_row_wise_folder_stays_and_its_merge_is_kept(tiny_gguf, rows, tmp_path):
    tiny = tiny_gguf("llama")
    tokenizer = qgraft.load(tiny.path)[1]
    folder = tmp_path / "float"
    tiny.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model, tokenizer = qgraft.load(folder, quantize="chatglm-int4")
    options = {"learning_rate": 2e-3, "max_steps": 15, "save_strategy": "no", "use_cpu": True, "plot_loss": False}
    qgraft.train(model, tokenizer, rows, qgraft.TrainArguments(output_dir=str(tmp_path / "out"), **options))
    with pytest.raises(MergeError, match="would be kept, expected at least 100%") as caught:
        merge(model, tokenizer, calibration=rows, method="nearest", min_retained=1)
    assert "f16" in caught.value.hint and "q8_0" not in caught.value.hint  # which a folder cannot hold
    report = merge(model, tokenizer, calibration=rows)
    assert {each.format for each in report.layers} == {"chatglm-int4"}
    save(model, tmp_path / "merged")
    again, _ = qgraft.load(tmp_path / "merged")
    assert again.qgraft.info.fingerprint == model.qgraft.info.fingerprint
    assert torch.equal(logits_of(again), logits_of(model))


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes(trained, rows):
    results = []
    for seed in (1, 1, 2):
        model, tokenizer = trained().load()
        merge(model, tokenizer, calibration=rows, seed=seed)
        results.append(bytes_of(model))
    assert results[0] == results[1] != results[2]


def test_rows_come_from_the_training_set_that_the_adapter_remembers(tiny_gguf, rows, tmp_path, monkeypatch):
    import json

    for name, part in (("train.jsonl", rows[:14]), ("held.jsonl", rows[14:])):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    model, tokenizer = qgraft.load(tiny_gguf().path)
    arguments = qgraft.TrainArguments(
        output_dir=str(tmp_path / "out"), dataset=str(tmp_path / "train.jsonl"), system="Be brief.", max_steps=10,
        eval_dataset=str(tmp_path / "held.jsonl"), learning_rate=3e-3, save_strategy="no", use_cpu=True, plot_loss=False,
        save_calibration=False,
    )  # fmt: skip
    qgraft.train(model, tokenizer, None, arguments)
    fresh, _ = qgraft.load(tiny_gguf().path)
    qgraft.load_adapter(fresh, tmp_path / "out")
    seen = []
    make = merge_module.Measurement
    monkeypatch.setattr(merge_module, "Measurement", lambda *args: seen.append(args[2]) or make(*args))
    remembered = merge(fresh, method="nearest", min_retained=ANY)
    assert remembered.notes[0] == f"rows of the task: the training set: {tmp_path / 'train.jsonl'}"
    assert remembered.notes[1] == f"measured on the run's held-out set: {tmp_path / 'held.jsonl'}"
    assert remembered.kept.held_out and remembered.kept.rows == 6
    assert sum(not each.source.startswith("neutral") for each in seen[0].fit + seen[0].judge) == 14
    texts = [tokenizer.decode(sample.input_ids) for sample in seen[0].measure]
    assert all("Be brief." in text for text in texts)
    assert sorted(text.split("question ")[1][:2] for text in texts) == [str(i) for i in range(14, 20)]
    monkeypatch.undo()
    unmerge(fresh)
    given = merge(
        fresh, tokenizer, calibration=rows[:14], eval_dataset=rows[14:], system="Be brief.", method="nearest",
        min_retained=ANY,
    )  # fmt: skip
    assert given.notes[0] == "rows of the task: the rows given"
    assert given.kept.adapter == pytest.approx(remembered.kept.adapter, rel=1e-6)


# ---------------------------------------------------------------- back again


def test_a_copy_of_a_merged_model_unmerges_by_itself(trained):
    model, _ = trained().load("law")
    want = {name: tensor.clone() for name, tensor in qgraft.lora_state_dict(model).items()}
    merge(model, method="nearest", min_retained=-1e9)
    twin = copy.deepcopy(model)
    assert twin.qgraft.merged is model.qgraft.merged  # the bytes of the base are not copied
    unmerge(model)
    assert plain(twin) and twin.qgraft.info != model.qgraft.info
    unmerge(twin)
    assert twin.qgraft.info == model.qgraft.info and twin.qgraft.merged is None
    for tensor in qgraft.lora_state_dict(model).values():
        tensor.zero_()
    assert all(torch.equal(tensor, want[name]) for name, tensor in qgraft.lora_state_dict(twin).items())


def test_unmerge_puts_the_bytes_and_the_adapter_back(trained, rows):
    model, tokenizer = trained().load("law")
    qgraft.use_adapter(model, {"law": 0.75})
    before = everything(model)
    merge(model, tokenizer, calibration=rows, min_retained=ANY)
    assert bytes_of(model) != before["bytes"] and logits_of(model).numpy().tobytes() != before["logits"]
    unmerge(model)
    assert everything(model) == before
    assert qgraft.active_adapters(model) == {"law": 0.75}
    merge(model, tokenizer, calibration=rows, method="scales", min_retained=ANY)  # and again
    unmerge(model)
    assert everything(model) == before


def test_a_chain_of_merges_is_undone_as_a_whole(trained, rows, tmp_path):
    model, tokenizer = trained().load("law")
    before, laws = everything(model), loras_of(model)
    merge(model, tokenizer, calibration=rows)
    between = model.qgraft.info.fingerprint
    qgraft.attach_lora(model, r=4, target_modules="q_proj,down_proj", name="med")
    generator = torch.Generator().manual_seed(0)
    for lora in find_adapter(model, "med").parts.values():
        nn.init.normal_(lora.lora_B, std=0.05, generator=generator)
    meds = loras_of(model)
    merge(model, method="nearest", min_retained=ANY)
    assert plain(model)
    assert len({before["base"].fingerprint, between, model.qgraft.info.fingerprint}) == 3
    save(model, tmp_path / "both.gguf")
    assert qgraft.load(tmp_path / "both.gguf")[0].qgraft.info.fingerprint == model.qgraft.info.fingerprint
    unmerge(model)
    assert qgraft.active_adapters(model) == {"law": 1.0, "med": 1.0}
    assert {name: value.tolist() for name, value in loras_of(model).items()} == {
        name: value.tolist() for name, value in {**laws, **meds}.items()
    }
    qgraft.detach_lora(model, "med")
    assert everything(model) == before


def test_merging_twice_is_refused(trained, rows):
    model, tokenizer = trained().load("law")
    merge(model, tokenizer, calibration=rows, method="scales", min_retained=ANY)
    done = bytes_of(model)
    with pytest.raises(AdapterError, match=r"no adapter is active \(attached: none; merged already: law\)"):
        merge(model, tokenizer, calibration=rows)
    with pytest.raises(AdapterError, match="trained on another base"):  # nor by the way of its file
        qgraft.load_adapter(model, trained().folder, "again")
    qgraft.attach_lora(model, name="law")
    with pytest.raises(AdapterError, match="would bring back law, but adapters of that name are attached"):
        unmerge(model)
    assert bytes_of(model) == done and qgraft.adapter_names(model) == ["law"]
    qgraft.detach_lora(model)
    unmerge(model)
    with pytest.raises(AdapterError, match="nothing is merged"):
        unmerge(model)
    assert qgraft.active_adapters(model) == {"law": 1.0}


def test_adapters_of_one_name_all_come_back(trained, rows):
    """`train` calls every adapter "default": a chain of merges has them one after another."""
    name = "a" * 64  # as long as names may be
    model, tokenizer = trained().load(name)
    before, first = bytes_of(model), loras_of(model)
    merge(model, method="nearest", calibration=rows, min_retained=ANY)
    seconds = []
    for n in range(2):
        qgraft.attach_lora(model, r=2, target_modules="q_proj", name=name)
        for lora in find_adapter(model, name).parts.values():
            nn.init.constant_(lora.lora_B, 0.01 * (n + 1))
        seconds.append(loras_of(model))
        merge(model, tokenizer, method="nearest", calibration=rows, min_retained=ANY)
    unmerge(model)
    assert bytes_of(model) == before
    again = [f"{'a' * 50}-again{n}" for n in (1, 2)]
    assert qgraft.active_adapters(model) == dict.fromkeys([name, *again], 1.0)
    back = loras_of(model)
    for called, values in zip([name, *again], [first, *seconds], strict=True):
        for path, value in values.items():
            assert torch.equal(back[path.replace(name, called)], value)


def test_other_adapters_stay_attached(trained, rows):
    model, tokenizer = trained().load("law")
    qgraft.attach_lora(model, r=2, target_modules="q_proj", name="med")
    qgraft.use_adapter(model, "law")
    merge(model, tokenizer, calibration=rows, method="scales", min_retained=ANY)
    assert qgraft.adapter_names(model) == ["med"] and qgraft.active_adapters(model) == {}
    assert {path.rpartition(".")[2] for path, _ in lora_layers(model)} == {"q_proj"}
    unmerge(model)
    assert set(qgraft.adapter_names(model)) == {"law", "med"} and qgraft.active_adapters(model) == {"law": 1.0}


# ---------------------------------------------------------------- a merge that does not happen


def test_losses_that_are_no_numbers_end_a_merge_whatever_is_asked_to_be_kept(trained, rows):
    model, tokenizer = trained().load()
    before = everything(model)
    qgraft.use_adapter(model, dict.fromkeys(qgraft.adapter_names(model), 1e30))
    with pytest.raises(MergeError, match=r"losses are no numbers \(adapter nan, merged nan\); nothing is replaced"):
        merge(model, tokenizer, calibration=rows, eval_dataset=rows, method="nearest", min_retained=ANY)
    qgraft.use_adapter(model, dict.fromkeys(qgraft.adapter_names(model), 1.0))
    assert everything(model) == before


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"min_retained": float("nan")}, "min_retained=nan: expected a finite number, at most 1"),
        ({"min_retained": 2}, "min_retained=2: expected"),
        ({"min_retained": "x", "seed": -1}, "min_retained='x': .*; seed=-1: expected a whole number"),
        ({"seed": 1.5}, "seed=1.5: expected"),
    ],
)
def test_numbers_out_of_their_ranges_are_named(trained, options, told):
    model, _ = trained().load()
    with pytest.raises(OptionError, match=told):
        merge(model, calibration="nowhere.jsonl", **options)


def test_a_merge_that_keeps_too_little_replaces_nothing(trained, rows):
    model, tokenizer = trained().load()
    before = everything(model)
    with pytest.raises(MergeError, match=r"of the adapter's gain would be kept, expected at least 90%") as caught:
        merge(model, tokenizer, calibration=rows, method="nearest")
    assert caught.value.report.retained_gain < 0.9 and len(caught.value.report.layers) == 14
    assert "auto keeps more" in caught.value.hint and "q8_0" in caught.value.hint
    assert everything(model) == before
    with pytest.raises(MergeError, match="would be kept, expected at least 100%") as caught:
        merge(model, tokenizer, calibration=rows, min_retained=1.0)
    assert caught.value.report.retained_gain > 0.9 and "more calibration rows" in caught.value.hint
    assert everything(model) == before
    with pytest.raises(AdapterError, match="nothing is merged"):
        unmerge(model)


class Bomb:
    """An algorithm that does nothing until its n-th call."""

    def __init__(self, calls: int, error: type[BaseException]) -> None:
        self.calls, self.error, self.__name__ = calls, error, "bomb"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls -= 1
        if not self.calls:
            raise self.error("boom")
        return args[0]


@pytest.mark.spread(2)
@pytest.mark.parametrize("place", ["in a layer", "distilling", "at the end"])
@pytest.mark.parametrize(("error", "to"), [(KeyboardInterrupt, None), (RuntimeError, "q8_0")])
def test_an_exception_half_way_leaves_the_model_as_it_was(trained, rows, monkeypatch, place, error, to):
    model, tokenizer = trained().load("law")
    qgraft.attach_lora(model, r=2, target_modules="v_proj", name="med")
    qgraft.use_adapter(model, {"law": 0.9, "med": 0.2})
    model.train()
    before = everything(model)
    if place == "in a layer":
        monkeypatch.setitem(layer.CHAINS, "auto", (Bomb(6, error),))
    elif place == "distilling":
        monkeypatch.setattr(finish, "TARGET", 10.0)
        monkeypatch.setattr("qgraft.merging.distill.summed_divergence", Bomb(1, error))
    else:
        monkeypatch.setattr(merge_module, "current_fingerprint", Bomb(2, error))  # the first is before the work
    with pytest.raises(error, match="boom"):
        merge(model, tokenizer, calibration=rows, to=to, min_retained=ANY)
    assert everything(model) == before
    monkeypatch.undo()
    model.eval()
    merge(model, tokenizer, calibration=rows, method="nearest", min_retained=ANY)
    assert plain(model)


def test_a_base_that_changed_on_disk_is_noticed_before_anything_is_replaced(trained, rows, tmp_path):
    made = trained()
    (tmp_path / "base.gguf").write_bytes(made.base.read_bytes())
    model, tokenizer = qgraft.load(tmp_path / "base.gguf")
    qgraft.load_adapter(model, made.folder)
    before = everything(model)
    with (tmp_path / "base.gguf").open("r+b") as file:
        file.seek(made.base.read_bytes().index(b"hello"))  # in the vocabulary
        file.write(b"jello")
    with pytest.raises(CheckpointError, match="changed since the model was loaded"):
        merge(model, tokenizer, calibration=rows, method="nearest", min_retained=ANY)
    assert bytes_of(model) == before["bytes"] and qgraft.active_adapters(model) == before["active"]


# ---------------------------------------------------------------- bad input


def test_nan_is_refused_by_name(trained, rows):
    model, tokenizer = trained().load("law")
    broken = find_adapter(model, "law").parts["model.layers.1.mlp.up_proj"]
    broken.lora_B.data[3, 1] = float("nan")
    with pytest.raises(AdapterError, match=r"NaN or infinity in 1 tensors of 'law', model.layers.1.mlp.up_proj.lora_B"):
        merge(model, tokenizer, calibration=rows)


def test_no_active_adapter_is_refused(trained, rows, tiny_gguf):
    model, tokenizer = trained().load("law")
    qgraft.use_adapter(model, None)
    with pytest.raises(AdapterError, match=r"no adapter is active \(attached: law\)"):
        merge(model, tokenizer, calibration=rows)
    bare, tokenizer = qgraft.load(tiny_gguf().path)
    with pytest.raises(AdapterError, match=r"attached: none\)"):
        merge(bare, tokenizer, calibration=rows)


@pytest.mark.parametrize(
    ("options", "error", "expected"),
    [
        ({"calibration": []}, DataError, "no sample|no row|holds no"),
        ({"calibration": 3}, DataError, r"got 3 rows with \d+ tokens, expected at least 4 rows with 128 tokens"),
        ({"calibration": "/nowhere/rows.jsonl"}, DataError, "/nowhere/rows.jsonl"),
        ({}, DataError, r"method auto needs rows of the adapter's task[^$]*hint: give calibration="),
        ({"method": "scale"}, OptionError, "did you mean scales"),
        ({"calibration": 20, "sistem": "x"}, OptionError, "unknown option 'sistem'.*dataset_dir"),
        ({"calibration": 20, "template": "chatlm"}, OptionError, "chatml"),
        ({"calibration": 20, "to": "q8"}, UnsupportedError, "did you mean"),
        ({"calibration": 20, "to": "q2_k"}, UnsupportedError, "to='q2_k': expected bf16, "),
    ],
)
def test_bad_options_are_refused_and_nothing_changes(trained, rows, options, error, expected):
    model, tokenizer = trained().load()
    before = everything(model)
    if isinstance(options.get("calibration"), int):
        options = {**options, "calibration": rows[: options["calibration"]]}
    with pytest.raises(error, match=expected):
        merge(model, tokenizer, **options)
    assert everything(model) == before


def test_layers_that_cannot_take_a_delta_are_all_named(trained, rows):
    model, tokenizer = trained().load("law")
    down = dict(lora_layers(model))["model.layers.0.mlp.down_proj"]
    q2_k = torch.zeros(down.out_features, 84, dtype=torch.uint8)
    down.replace(PackedTensor("q2_k", (down.out_features, 256), (q2_k,)))
    config = LoraConfig(r=2)
    attach_layers(model, "head", {"lm_head": config})
    float_layer = nn.Linear(64, 64, bias=False)
    qgraft.detach_lora(model, "law")
    model.set_submodule("model.layers.1.self_attn.o_proj", float_layer)
    paths = ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj", "lm_head"]
    qgraft.detach_lora(model)
    attach_layers(model, "all", dict.fromkeys(paths, config))
    with pytest.raises(UnsupportedError) as caught:
        merge(model, tokenizer, calibration=rows)
    told = str(caught.value)
    assert "model.layers.0.mlp.down_proj is q2_k, which qgraft does not write" in told
    assert "model.layers.1.self_attn.o_proj holds no packed weight" in told
    assert "lm_head is the output layer" in told
    assert "hint: formats that can be written: " in told and "q2_k" not in told.partition("hint:")[2]


# ---------------------------------------------------------------- other formats


def too_little(*args):
    raise MergeError("kept too little")


@pytest.mark.spread(1)
@pytest.mark.parametrize("to", ["q8_0", "f16"])
def test_another_format_keeps_more_and_unmerge_brings_the_old_one_back(trained, rows, tmp_path, to, monkeypatch):
    model, tokenizer = trained().load()
    same = merge(model, tokenizer, calibration=rows, eval_dataset=rows, method="nearest", min_retained=ANY)
    unmerge(model)
    before = everything(model)
    with monkeypatch.context() as patch, pytest.raises(MergeError):  # no share would be too much for f16
        patch.setattr("qgraft.merging.merge.check_kept", too_little)
        merge(model, tokenizer, calibration=rows, to=to, method="scales")
    assert everything(model) == before
    report = merge(model, tokenizer, calibration=rows, eval_dataset=rows, method="nearest", to=to)
    assert report.retained_gain > 0.99 > same.retained_gain + 0.05
    assert {each.format for each in report.layers} == {to}
    save(model, tmp_path / "merged.gguf")
    again, _ = qgraft.load(tmp_path / "merged.gguf")
    assert again.qgraft.info.fingerprint == model.qgraft.info.fingerprint
    assert torch.equal(logits_of(again), logits_of(model))
    assert {packed_of(again)[each.path].format for each in report.layers} == {to}
    unmerge(model)
    assert everything(model) == before


@pytest.mark.parametrize("method", ["nearest", "auto"])
def test_in_a_coarser_format_the_shares_are_of_base_and_adapter_as_they_were(trained, rows, method):
    """What quantizing the base again takes away is a loss of the merge, not of base and adapter."""
    losses = {}
    for to in (None, "mxfp4"):
        model, tokenizer = trained().load()
        options = {"method": method, "to": to, "min_retained": ANY}
        kept = merge(model, tokenizer, calibration=rows, eval_dataset=rows, **options).kept
        losses[to] = kept.base, kept.adapter, kept.adapter_kl
        if to is not None:
            measured = qgraft.evaluate(model, tokenizer, rows)
            assert kept.merged == pytest.approx(measured.loss, rel=1e-4) and kept.merged > kept.adapter
    assert losses[None] == losses["mxfp4"]


def test_a_coarser_format_is_solved_for_what_base_and_adapter_computed(trained, rows):
    """The way from the rounded base goes back to the float32 sum: less is lost than by the nearest codes of that sum."""
    found = {}
    for method in ("nearest", "codes"):
        model, tokenizer = trained().load()
        report = merge(
            model, tokenizer, calibration=rows, eval_dataset=rows, method=method, to="q4_0", min_retained=ANY
        )
        found[method] = report.kept.task_kl
    assert found["codes"] < 0.7 * found["nearest"]


def test_the_format_that_a_layer_has_is_no_other_one(trained, rows):
    """Asking for it converts the rest only: what is in it already is not quantized again."""
    results = []
    for to in (None, "q4_1"):
        model, tokenizer = trained().load()
        merge(model, tokenizer, calibration=rows, method="grid", to=to, min_retained=ANY)
        results.append({path: each for path, each in packed_of(model).items() if each.format == "q4_1"})
    for path, same in results[0].items():
        assert all(torch.equal(a, b) for a, b in zip(same.parts, results[1][path].parts, strict=True)), path


def test_a_format_that_the_container_cannot_hold_changes_nothing(trained, rows):
    model, tokenizer = trained().load()
    before = everything(model)
    with pytest.raises(UnsupportedError, match="chatglm-int8"):
        merge(model, tokenizer, calibration=rows, to="chatglm-int8", min_retained=ANY)
    assert everything(model) == before


# ---------------------------------------------------------------- mixtures


def test_several_active_adapters_merge_as_their_weighted_sum(trained, rows):
    """{a: 0.7, b: 0.3} gives the bytes that one adapter with the stacked sum gives."""
    model, tokenizer = trained().load("a")
    qgraft.attach_lora(model, r=2, lora_alpha=3, target_modules="q_proj,up_proj", name="b")
    generator = torch.Generator().manual_seed(1)
    for lora in find_adapter(model, "b").parts.values():
        nn.init.normal_(lora.lora_B, std=0.02, generator=generator)
    a, b = find_adapter(model, "a").parts, find_adapter(model, "b").parts
    qgraft.use_adapter(model, {"a": 0.7, "b": 0.3})
    report = merge(model, method="nearest", calibration=rows, min_retained=ANY)
    assert report.adapters == {"a": 0.7, "b": 0.3}

    single, _ = trained().load("a")
    qgraft.detach_lora(single)
    pairs, configs = {}, {}
    for path in a:
        parts = [(a[path], 0.7), *([(b[path], 0.3)] if path in b else [])]
        A = torch.cat([lora.lora_A.detach() for lora, _ in parts])
        B = torch.cat([lora.lora_B.detach() * weight * lora.config.scaling for lora, weight in parts], dim=1)
        pairs[path], configs[path] = (A, B), LoraConfig(r=len(A), lora_alpha=len(A))
    attach_layers(single, "sum", configs, pairs)
    other = merge(single, tokenizer, method="nearest", calibration=rows, min_retained=ANY)
    assert other.kept.adapter == pytest.approx(report.kept.adapter, rel=1e-5)
    differing = sum(
        int((packed.parts[0] != packed_of(single)[path].parts[0]).sum()) for path, packed in packed_of(model).items()
    )
    assert differing < 50  # codes on a rounding border, of 200 000 bytes
    assert [each.delta_in_steps for each in other.layers] == pytest.approx(
        [each.delta_in_steps for each in report.layers], rel=1e-4
    )
    auto = merge_of_mixture(trained, rows, b)
    assert auto.retained_gain > 0.9


def merge_of_mixture(trained: Maker, rows: Any, b: Mapping[str, Any]) -> Any:
    model, tokenizer = trained().load("a")
    pairs = {path: (lora.lora_A.detach(), lora.lora_B.detach()) for path, lora in b.items()}
    attach_layers(model, "b", {path: lora.config for path, lora in b.items()}, pairs)
    qgraft.use_adapter(model, {"a": 0.7, "b": 0.3})
    return merge(model, tokenizer, calibration=rows)


def test_rows_of_several_adapters_are_put_together(trained, rows, tmp_path, monkeypatch):
    """Each adapter's training set is read with that adapter's own options."""
    model, tokenizer = trained().load("a")
    qgraft.load_adapter(model, trained().folder, "b")
    qgraft.use_adapter(model, {"a": 0.5, "b": 0.5})
    sets: dict[str, list[dict[str, object]]] = {"one.jsonl": rows[:10], "two.jsonl": rows[10:]}
    for name, part in sets.items():
        (tmp_path / name).write_text(
            "".join(f'{{"instruction": "{r["instruction"]}", "output": "x y"}}\n' for r in part)
        )
    selection = selection_of(model)
    selection.change("a", trained={"dataset": "one.jsonl", "dataset_dir": str(tmp_path), "system": "Alpha"})
    selection.change("b", trained={"dataset": str(tmp_path / "two.jsonl"), "system": "Beta"})
    seen: list[Sample] = []

    def choose(task: list[Sample], *args: Any, **named: Any) -> Any:
        seen.extend(task)
        raise RuntimeError("enough")

    monkeypatch.setattr(calibration, "choose_samples", choose)
    with pytest.raises(RuntimeError, match="enough"):
        merge(model, tokenizer)
    texts = [tokenizer.decode(sample.input_ids) for sample in seen]
    assert [("Alpha" in text, "Beta" in text) for text in texts] == [(True, False)] * 10 + [(False, True)] * 10


def test_other_threads_may_not_call_a_model_that_is_merged(trained, rows):
    """Its weights are exchanged again and again meanwhile."""
    (model, _), refused = trained().load(), []
    ids = torch.arange(4, 12)[None]

    def ask(*_: Any) -> None:
        with ThreadPoolExecutor(1) as pool:
            refused.append(type(pool.submit(model, ids).exception()))

    hook = model.base_model.layers[0].mlp.register_forward_hook(ask)
    merge(model, calibration=rows, method="nearest", min_retained=ANY)
    hook.remove()
    assert set(refused) == {UnsupportedError}
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(model, ids).result().logits, model(ids).logits)
