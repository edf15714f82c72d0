"""GGUF-LoRA files: what `gguf` reads of ours, files made as llama.cpp's converter makes them, and files that do not fit.

That llama.cpp itself computes with them what we do is in tests/oracle/test_llamacpp.py.
"""

import dataclasses
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from qgraft.adapter_files import gguf_lora
from qgraft.adapter_files.folder import load_adapter
from qgraft.adapter_files.gguf_lora import FINGERPRINT, export_gguf_lora, read_gguf_lora
from qgraft.adapters.attach import attach_layers, attach_lora, detach_lora
from qgraft.adapters.base import adapter_names, find_adapter
from qgraft.adapters.lora import LoraConfig
from qgraft.adapters.targets import adapted_layers, find_targets
from qgraft.checkpoints.folder_model import load_folder
from qgraft.checkpoints.gguf_model import load_gguf
from qgraft.errors import AdapterError, CheckpointError, OptionError, QgraftError, StorageError, UnsupportedError

Maker = Callable[..., Any]
UP_FILE, UP = "blk.1.ffn_up.weight", "model.layers.1.mlp.up_proj"


def load_base(tiny: Any) -> PreTrainedModel:
    return load_gguf(tiny.path, torch.float32)[0]


def randomize(model: nn.Module, name: str = "default") -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for lora in find_adapter(model, name).parts.values():
            lora.lora_B.normal_(0, 0.1)


def with_adapter(tiny: Any, **options: Any) -> PreTrainedModel:
    model = load_base(tiny)
    attach_lora(model, **{"r": 4, "lora_alpha": 8, **options})
    randomize(model)
    return model


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits.float()


def deltas(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    return {path: lora.delta().detach() for path, lora in find_adapter(model, name).parts.items()}


@pytest.fixture
def tiny(tiny_gguf: Maker) -> Any:
    return tiny_gguf("llama")


def test_gguf_sees_the_layout_that_llamacpp_reads(tiny, tmp_path):
    model = with_adapter(tiny)
    report = export_gguf_lora(model, tmp_path / "a.gguf")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    values = {key: field.contents() for key, field in reader.fields.items()}
    assert values["general.type"] == "adapter"
    assert values["general.architecture"] == "llama"
    assert values["adapter.type"] == "lora"
    assert values["adapter.lora.alpha"] == 8.0
    assert reader.fields["adapter.lora.alpha"].types == [gguf.GGUFValueType.FLOAT32]
    assert values["general.file_type"] == gguf.LlamaFileType.MOSTLY_F16
    assert values["general.base_model.0.name"] == "tiny"
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    layers = find_adapter(model, "default").parts
    assert len(tensors) == 2 * len(layers) == 2 * report.layers == 28
    assert report.parameters == sum(tensor.n_elements for tensor in reader.tensors)
    assert report.nbytes == (tmp_path / "a.gguf").stat().st_size
    A, B = tensors[f"{UP_FILE}.lora_a"], tensors[f"{UP_FILE}.lora_b"]
    assert {A.tensor_type, B.tensor_type} == {gguf.GGMLQuantizationType.F16}
    np.testing.assert_array_equal(A.data, layers[UP].lora_A.detach().half().numpy())
    np.testing.assert_array_equal(B.data, layers[UP].lora_B.detach().half().numpy())


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "phi3", "qwen2"])
def test_what_is_written_is_read_back(architecture, tiny_gguf, random_ids, tmp_path):
    model = with_adapter(tiny_gguf(architecture))
    ids, expected = random_ids(model), deltas(model)
    wanted = logits(model, ids)
    for dtype, tolerance in (("float32", 0.0), ("float16", 2e-3)):
        report = export_gguf_lora(model, tmp_path / f"{dtype}.gguf", dtype=dtype)
        other = load_base(tiny_gguf(architecture))
        loaded = load_adapter(other, tmp_path / f"{dtype}.gguf")
        assert (loaded.applied, loaded.total, loaded.notes) == (report.layers, report.layers, ())
        assert deltas(other).keys() == expected.keys()
        assert (logits(other, ids) - wanted).abs().max() <= tolerance * wanted.abs().max()


def test_without_room_for_temporary_files(tiny, tmp_path, monkeypatch):
    model = with_adapter(tiny)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(StorageError, match=r"(?s)cannot write a temporary file: No such file.*hint: TMPDIR"):
        export_gguf_lora(model, tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


def test_a_disk_that_takes_only_some_of_the_temporary_file(tiny, tmp_path, monkeypatch):
    """numpy's tofile() says nothing of what the disk did not take."""
    closed = gguf_lora.GGUFWriter.close

    def cut(writer):
        closed(writer)
        os.truncate(writer.path, 4096)

    monkeypatch.setattr(gguf_lora.GGUFWriter, "close", cut)
    with pytest.raises(StorageError, match=r"(?s)cannot write a temporary file: .*got 4096 bytes.*hint: TMPDIR"):
        export_gguf_lora(with_adapter(tiny), tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_scaling_survives(tiny, dtype, tmp_path):
    model = load_base(tiny)
    kinds = [LoraConfig(2, 8), LoraConfig(4, 8, use_rslora=True), LoraConfig(3, 7, 0.1), LoraConfig(4, 0)]
    paths = find_targets(model, "all-linear")
    attach_layers(model, "mixed", {path: kinds[i % 4] for i, path in enumerate(paths)})
    randomize(model, "mixed")
    export_gguf_lora(model, tmp_path / "a.gguf", dtype=dtype)
    other = load_base(tiny)
    load_adapter(other, tmp_path / "a.gguf")
    read = deltas(other)
    for path, expected in deltas(model, "mixed").items():
        torch.testing.assert_close(read[path], expected, rtol=0, atol=1e-6 if dtype == "float32" else 1e-3)


def test_a_rank_stabilized_adapter_keeps_its_bits(tiny, tmp_path):
    model = with_adapter(tiny, use_rslora=True)
    export_gguf_lora(model, tmp_path / "a.gguf", dtype="float32")
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    np.testing.assert_array_equal(
        tensors[f"{UP_FILE}.lora_b"], find_adapter(model, "default").parts[UP].lora_B.detach().numpy()
    )


def test_how_prompts_were_made_is_in_the_file(tiny, tmp_path):
    said = {"system": "Be brief.", "template": "chatml", "enable_thinking": False, "source_prefix": "say: "}
    export_gguf_lora(with_adapter(tiny), tmp_path / "a.gguf", arguments={**said, "learning_rate": 1e-3})
    _, _, seal = read_gguf_lora(load_base(tiny), tmp_path / "a.gguf")
    assert seal["arguments"] == said


def converter_permute(value: np.ndarray, heads: int) -> np.ndarray:
    """LlamaModel.permute of llama.cpp's converter, on rows of B."""
    return value.reshape(heads, 2, value.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(value.shape)


def write_lora(path: Path, tensors: dict[str, np.ndarray], **keys: Any) -> Path:
    """A GGUF-LoRA as others write it; a key of value None is left out, "__" in its name stands for a dot."""
    metadata = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 8.0}
    metadata |= {key.replace("__", "."): value for key, value in keys.items()}
    writer = gguf.GGUFWriter(path, metadata.pop("general.architecture", "llama"))
    adders = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32, list: writer.add_array}
    for key, value in metadata.items():
        if value is not None:
            adders[type(value)](key, value)
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_file_as_the_converter_writes_it_computes_what_peft_computes(tiny, random_ids, tmp_path):
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    model = AutoModelForCausalLM.from_pretrained(tiny.path.parent, gguf_file=tiny.path.name, dtype=torch.float32).eval()
    options = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    tuned = peft.get_peft_model(model, options)
    tensors = {}
    for key, value in peft.get_peft_model_state_dict(tuned).items():
        path, _, part = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        array = value.numpy()
        if part == "lora_B" and path.endswith(("q_proj", "k_proj")):
            array = converter_permute(array, 4 if path.endswith("q_proj") else 2)
        tensors[f"{names.get_name(path)}.weight.{part.lower()}"] = array
    tensors["output_norm.weight"] = np.ones(64, np.float32)  # some adapters carry norms; llama.cpp passes over them
    ours = load_base(tiny)
    loaded = load_adapter(ours, write_lora(tmp_path / "a.gguf", tensors))
    assert loaded.applied == loaded.total == 14
    assert any("cannot be verified" in note for note in loaded.notes)
    ids = random_ids(ours)
    torch.testing.assert_close(logits(ours, ids), logits(tuned, ids), rtol=1e-4, atol=1e-4)


def pair(rank: int = 2, width: int = 64, out: int = 256, dtype: type = np.float32) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        f"{UP_FILE}.lora_a": random.standard_normal((rank, width)).astype(dtype),
        f"{UP_FILE}.lora_b": random.standard_normal((out, rank)).astype(dtype),
    }


@pytest.mark.parametrize(("alpha", "scaling"), [(8.0, 4.0), (0.0, 1.0), (None, 1.0), (-2.0, -1.0)])
def test_alpha_is_read_as_llamacpp_reads_it(alpha, scaling, tiny, tmp_path):
    tensors = pair()
    model = load_base(tiny)
    load_adapter(model, write_lora(tmp_path / "a.gguf", tensors, adapter__lora__alpha=alpha))
    expected = scaling * tensors[f"{UP_FILE}.lora_b"] @ tensors[f"{UP_FILE}.lora_a"]
    np.testing.assert_allclose(deltas(model)[UP].numpy(), expected, rtol=1e-5, atol=1e-5)


def test_quantized_pairs_are_read(tiny, tmp_path):
    tensors = pair(rank=32)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    for name, value in tensors.items():
        packed = gguf.quants.quantize(value, gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = load_base(tiny)
    load_adapter(model, tmp_path / "a.gguf")
    expected = tensors[f"{UP_FILE}.lora_b"] @ tensors[f"{UP_FILE}.lora_a"]
    assert np.abs(deltas(model)[UP].numpy() - expected).max() < 0.01 * np.abs(expected).max()


BROKEN = {
    "a model": ({"general__type": "model"}, {}, AdapterError, "'model', not an adapter"),
    "no type at all": ({"general__type": None}, {}, AdapterError, "not an adapter"),
    "another architecture": ({"general__architecture": "qwen2"}, {}, AdapterError, "'qwen2', this model is 'llama'"),
    "a control vector": ({"adapter__type": "control_vector"}, {}, UnsupportedError, "control_vector"),
    "an activated LoRA": ({"adapter__alora__invocation_tokens": [1, 2]}, {}, UnsupportedError, "aLoRA"),
    "alpha is NaN": ({"adapter__lora__alpha": float("nan")}, {}, AdapterError, "expected a finite float"),
    "alpha is no float": ({"adapter__lora__alpha": 8}, {}, AdapterError, "expected a finite float"),
    "half a pair": ({}, {f"{UP_FILE}.lora_b": None}, AdapterError, f"missing tensor .*{UP}.lora_B"),
    "too narrow": ({}, {f"{UP_FILE}.lora_a": np.ones((2, 32))}, AdapterError, r"got A \[2, 32\].*expected \[2, 64\]"),
    "another rank": ({}, {f"{UP_FILE}.lora_b": np.ones((256, 3))}, AdapterError, r"B \[256, 3\]"),
    "three axes": ({}, {f"{UP_FILE}.lora_b": np.ones((2, 256, 2))}, AdapterError, r"unexpected tensor .*\[2, 256, 2\]"),
    "an unknown layer": ({}, {"blk.7.ffn_up.weight.lora_a": np.ones((2, 64))}, AdapterError, "unexpected tensor blk.7"),
    "no .weight": ({}, {"blk.0.ffn_up.lora_a": np.ones((2, 64))}, AdapterError, "unexpected tensor blk.0.ffn_up.lora_a"),
    "the embedding": ({}, {"token_embd.weight.lora_a": np.ones((2, 64))}, AdapterError, "unexpected tensor token_embd"),
    "a name of PEFT's": (
        {}, {f"base_model.model.{UP}.lora_A.weight": np.ones((2, 64))}, AdapterError, "unexpected tensor base_model",
    ),
    "something else": ({}, {"blk.0.ffn_up.weight": np.ones((2, 64))}, AdapterError, "unexpected tensor"),
    "NaN": ({}, {f"{UP_FILE}.lora_b": np.full((256, 2), np.nan)}, AdapterError, "NaN or infinity"),
    "another base": ({FINGERPRINT: "qg1:0"}, {}, AdapterError, "trained on another base: qg1:0"),
    "q of another size": (
        {}, {"blk.0.attn_q.weight.lora_a": np.ones((2, 64)), "blk.0.attn_q.weight.lora_b": np.ones((62, 2))},
        AdapterError, r"B \[62, 2\], expected",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_does_not_fit_is_refused_and_changes_nothing(case, tiny, random_ids, tmp_path):
    keys, changed, error, message = BROKEN[case]
    tensors = {name: value for name, value in {**pair(), **changed}.items() if value is not None}
    path = write_lora(tmp_path / "a.gguf", {name: value.astype(np.float32) for name, value in tensors.items()}, **keys)
    model = load_base(tiny)
    before = logits(model, random_ids(model))
    with pytest.raises(error, match=message):
        load_adapter(model, path)
    assert torch.equal(logits(model, random_ids(model)), before)
    assert not adapter_names(model) and not list(adapted_layers(model))


def test_forced_what_fits_is_loaded(tiny, tmp_path):
    ones = np.ones((2, 64), np.float32)
    odd = {"blk.7.ffn_up.weight.lora_a": ones, "blk.0.attn_q.weight.lora_a": ones}
    model = load_base(tiny)
    loaded = load_adapter(model, write_lora(tmp_path / "a.gguf", {**pair(), **odd}), force=True)
    assert (loaded.applied, loaded.total) == (1, 1)
    assert sum("forced although" in note for note in loaded.notes) == 2


def test_cut_files_are_refused_at_every_length(tiny, tmp_path):
    data = write_lora(tmp_path / "a.gguf", pair()).read_bytes()
    model = load_base(tiny)
    for length in range(0, len(data) - 32, 97):
        (tmp_path / "cut.gguf").write_bytes(data[:length])
        with pytest.raises(QgraftError, match=r"cut\.gguf"):
            load_adapter(model, tmp_path / "cut.gguf")


def test_an_adapter_is_no_model(tiny, tmp_path):
    export_gguf_lora(with_adapter(tiny), tmp_path / "a.gguf")
    with pytest.raises(UnsupportedError, match="is a GGUF adapter, not a model"):
        load_gguf(tmp_path / "a.gguf", torch.float32)


def test_a_base_from_a_folder_has_the_names_of_the_file_that_it_would_be(tiny_gguf, tmp_path):
    """Read on the folder's model again, and on the file's: the same pairs, rows in the order of each."""
    tiny = tiny_gguf("llama")
    tiny.model.save_pretrained(tmp_path / "base")
    folder, _ = load_folder(tmp_path / "base", torch.float32, None)
    from_file, made = with_adapter(tiny), find_adapter(with_adapter(tiny), "default")
    folder_lora = tmp_path / "a.gguf"
    attach_lora(folder, r=4)
    with torch.no_grad():
        for lora in find_adapter(folder, "default").parts.values():
            lora.lora_B.normal_()
    export_gguf_lora(folder, folder_lora, dtype="float32")
    for model in (folder, from_file):
        load_adapter(model, folder_lora, name="b", force=True)
        for path, lora in find_adapter(folder, "default").parts.items():
            read = find_adapter(model, "b").parts[path]
            assert torch.equal(read.lora_B, lora.lora_B) and torch.equal(read.lora_A, lora.lora_A)
    assert made.parts.keys() == find_adapter(folder, "default").parts.keys()


def test_an_output_layer_that_is_the_embedding_has_no_tensor(tiny_gguf, tmp_path):
    model = with_adapter(tiny_gguf("llama", tied=True), target_modules=["lm_head", "q_proj"])
    with pytest.raises(AdapterError, match=r"lm_head: tiny\.gguf has no tensor of its own"):
        export_gguf_lora(model, tmp_path / "a.gguf")
    untied = with_adapter(tiny_gguf("llama"), target_modules=["lm_head", "q_proj"])
    export_gguf_lora(untied, tmp_path / "a.gguf", dtype="float32")
    other = load_base(tiny_gguf("llama"))
    load_adapter(other, tmp_path / "a.gguf")
    assert torch.equal(deltas(other)["lm_head"], deltas(untied)["lm_head"])


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [(float("nan"), "float32", "NaN or infinity in 1 tensors as float32"), (1e5, "float16", "as float16")],
)
def test_values_that_cannot_be_written_leave_the_old_file(value, dtype, message, tiny, tmp_path):
    model = with_adapter(tiny)
    (tmp_path / "a.gguf").write_bytes(b"old")
    with torch.no_grad():
        find_adapter(model, "default").parts[UP].lora_B[3, 1] = value
    with pytest.raises(AdapterError, match=message):
        export_gguf_lora(model, tmp_path / "a.gguf", dtype=dtype, overwrite=True)
    assert (tmp_path / "a.gguf").read_bytes() == b"old"
    if dtype == "float16":
        with pytest.raises(StorageError, match=r"a\.gguf exists already"):
            export_gguf_lora(model, tmp_path / "a.gguf", dtype="float32")
        export_gguf_lora(model, tmp_path / "a.gguf", dtype="float32", overwrite=True)
        assert (tmp_path / "a.gguf").read_bytes()[:4] == b"GGUF"
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


def test_an_alpha_that_is_no_number(tiny, tmp_path):
    with pytest.raises(OptionError, match="lora_alpha=nan"):
        with_adapter(tiny, lora_alpha=float("nan"))
    model = with_adapter(tiny, lora_alpha=1e39)  # no float32, which the file holds it in
    with pytest.raises(AdapterError, match="lora_alpha: got inf"):
        export_gguf_lora(model, tmp_path / "a.gguf")


def test_the_base_is_never_overwritten(make_gguf, tmp_path):
    tiny = make_gguf(tmp_path / "base.gguf")
    os.symlink(tiny.path, tmp_path / "link.gguf")
    model, data = with_adapter(tiny), tiny.path.read_bytes()
    for path in (tiny.path, tmp_path / "link.gguf", tmp_path / "x" / ".." / "base.gguf"):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(OptionError, match="is what is read"):
            export_gguf_lora(model, path, overwrite=True)
    assert tiny.path.read_bytes() == data


def test_a_base_file_that_changed_since_is_noticed(make_gguf, tmp_path):
    model = with_adapter(make_gguf(tmp_path / "base.gguf"))
    make_gguf(tmp_path / "other.gguf", "qwen2").path.replace(tmp_path / "base.gguf")
    with pytest.raises(CheckpointError, match="changed since the model was loaded"):
        export_gguf_lora(model, tmp_path / "a.gguf")


def test_an_adapter_on_merged_weights_does_not_fit_the_file(tiny, tmp_path):
    model = with_adapter(tiny)
    model.qgraft.info = dataclasses.replace(model.qgraft.info, fingerprint="qg1:merged")  # as merge() leaves it
    with pytest.raises(AdapterError, match="no longer those of"):
        export_gguf_lora(model, tmp_path / "a.gguf")


def test_wrong_options_and_places(tiny, tmp_path):
    model = with_adapter(tiny)
    with pytest.raises(OptionError, match="float16"):
        export_gguf_lora(model, tmp_path / "a.gguf", dtype="float61")
    with pytest.raises(AdapterError, match="no adapter named 'law'"):
        export_gguf_lora(model, tmp_path / "a.gguf", name="law")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError):
        export_gguf_lora(model, tmp_path / "file" / "a.gguf")
    detach_lora(model)
    with pytest.raises(AdapterError, match="attached: none"):
        export_gguf_lora(model, tmp_path / "a.gguf")
