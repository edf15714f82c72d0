"""save() of GGUF models: the `gguf` package and transformers read what was written, and a failed save leaves no trace."""

import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Q
from tiny_models import ALWAYS_TIED, READ_BY_TRANSFORMERS
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qgraft import storage
from qgraft.adapters.attach import attach_lora
from qgraft.adapters.choose import use_adapter
from qgraft.checkpoints.gguf_model import load_gguf
from qgraft.checkpoints.gguf_rules import ARCHITECTURES
from qgraft.checkpoints.pull import KNOWN_MODELS, cache_folder
from qgraft.checkpoints.save import check_target, current_fingerprint, save
from qgraft.errors import AdapterError, CheckpointError, OptionError, StorageError, UnsupportedError
from qgraft.experts import PackedLayer
from qgraft.formats import FORMATS, quantize
from qgraft.linear import QuantizedLinear

CASES = [(name, tied) for name in sorted(ARCHITECTURES) for tied in (False, True) if tied or name not in ALWAYS_TIED]
READ_ONLY = next(name for name, each in FORMATS.items() if each.quantize is None)
Maker = Callable[..., Any]


def load(path: Path) -> Any:
    return load_gguf(path, torch.float32)[0]


def fields(path: Path) -> list[Any]:
    reader = gguf.GGUFReader(path)
    return [(k, f.types, f.contents()) for k, f in reader.fields.items() if not k.startswith("GGUF.")]


def tensors(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def floats(tensor: gguf.ReaderTensor) -> Tensor:
    return torch.from_numpy(gguf.quants.dequantize(np.array(tensor.data), tensor.tensor_type).astype(np.float32))


def linears(model: nn.Module) -> dict[str, QuantizedLinear]:
    output = model.get_output_embeddings()
    return {path: m for path, m in model.named_modules() if isinstance(m, QuantizedLinear) and m is not output}


def change(layer: Any, seed: int = 0) -> None:
    """Other weights in the same format."""
    noise = torch.randn(layer.out_features, layer.in_features, generator=torch.Generator().manual_seed(seed))
    layer.replace(quantize(layer.dequantize() + 0.05 * noise, layer.packed.format))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.spread(6)
@pytest.mark.parametrize(("architecture", "tied"), CASES)
def test_an_unchanged_model_gives_an_identical_file(
    tiny_gguf: Maker, tmp_path: Path, architecture: str, tied: bool
) -> None:
    tiny = tiny_gguf(architecture, tied=tied)
    model = load(tiny.path)
    report = save(model, tmp_path / "copy.gguf")
    assert storage.sha256(tmp_path / "copy.gguf") == storage.sha256(tiny.path)
    size = tiny.path.stat().st_size
    assert (report.nbytes, report.source_nbytes, report.changed, report.notes) == (size, size, 0, ())
    assert report.formats == model.qgraft.info.formats
    assert report.path == tmp_path / "copy.gguf"
    assert names(tmp_path) == {"copy.gguf"}


@pytest.mark.slow
def test_the_real_model(tmp_path: Path) -> None:
    path = cache_folder() / KNOWN_MODELS["smollm2-135m"].file
    if not path.is_file():
        pytest.skip("smollm2-135m is not in the cache; `qgraft pull smollm2-135m` fetches it")
    model = load(path)
    save(model, tmp_path / "copy.gguf")
    assert storage.sha256(tmp_path / "copy.gguf") == KNOWN_MODELS["smollm2-135m"].gguf_sha256
    change(model.model.layers[7].self_attn.q_proj)
    report = save(model, tmp_path / "copy.gguf", overwrite=True)
    assert (report.changed, report.nbytes) == (1, path.stat().st_size)
    assert current_fingerprint(model) == load(tmp_path / "copy.gguf").qgraft.info.fingerprint


@pytest.mark.spread(6)
@pytest.mark.parametrize(("architecture", "tied"), CASES)
def test_changed_layers(
    tiny_gguf: Maker, tmp_path: Path, random_ids: Maker, gemma_scaled: Maker, architecture: str, tied: bool
) -> None:
    tiny, copy = tiny_gguf(architecture, tied=tied), tmp_path / "copy.gguf"
    model = load(tiny.path)
    changed = [path for path, layer in linears(model).items() if FORMATS[layer.packed.format].quantize is not None]
    for path in changed:
        change(model.get_submodule(path))
    report = save(model, copy)
    places = [model.qgraft.origin.matrices.get(path) for path in changed]
    assert (
        report.changed == len({path if at is None else at.name for path, at in zip(changed, places, strict=True)}) > 7
    )
    assert copy.stat().st_size == tiny.path.stat().st_size == report.nbytes
    assert fields(copy) == fields(tiny.path)
    parameters = {gguf_name: name.removesuffix(".weight") for gguf_name, name in tiny.parameters.items()}
    old, new = tensors(tiny.path), tensors(copy)
    assert list(new) == list(old)
    for name, tensor in new.items():
        assert (tensor.tensor_type, tensor.data_offset) == (old[name].tensor_type, old[name].data_offset)
        written = {each.name for each in places if each is not None} if name not in parameters else ()
        assert np.array_equal(tensor.data, old[name].data) == (
            parameters.get(name) not in changed and name not in written
        )

    if architecture not in READ_BY_TRANSFORMERS:
        return
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=copy.name, dtype=torch.float32).eval()
    gemma_scaled(theirs, tiny.model)
    for path in changed:
        weight = theirs.get_submodule(path).weight
        ours = model.get_submodule(path).dequantize()
        assert torch.equal(weight.T if type(theirs.get_submodule(path)).__name__ == "Conv1D" else weight, ours), path
    ids = random_ids(theirs)
    again = load(copy)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
        assert (theirs(ids).logits - again(ids).logits).abs().max() < 1e-4 * again(ids).logits.abs().max()
    assert current_fingerprint(model) == again.qgraft.info.fingerprint != model.qgraft.info.fingerprint


def test_float_weights_embeddings_and_tied_output(tiny_gguf: Maker, tmp_path: Path) -> None:
    tiny = tiny_gguf("llama", tied=True, types=(Q.F16, Q.F32, Q.BF16))
    model = load(tiny.path)
    layers = [
        model.model.layers[0].self_attn.q_proj,
        model.model.layers[0].mlp.up_proj,
        model.model.layers[1].mlp.gate_proj,
    ]
    assert {layer.packed.format for layer in layers} == {"f16", "f32", "bf16"}
    for layer in layers:
        change(layer)
    output = model.get_output_embeddings()
    change(output)  # tied: the bytes of token_embd
    report = save(model, tmp_path / "copy.gguf")
    assert report.changed == 4
    new = tensors(tmp_path / "copy.gguf")
    assert "output.weight" not in new
    assert torch.equal(floats(new["token_embd.weight"]), output.dequantize())
    assert torch.equal(floats(new["blk.0.ffn_up.weight"]), layers[1].dequantize())
    again = load(tmp_path / "copy.gguf")
    assert torch.equal(again.model.layers[0].self_attn.q_proj.dequantize(), layers[0].dequantize())


def test_alignment_and_order_of_another_writer(tiny_gguf: Maker, tmp_path: Path) -> None:
    reader = gguf.GGUFReader(tiny_gguf("llama").path)
    writer = gguf.GGUFWriter(tmp_path / "wide.gguf", "llama")
    writer.add_custom_alignment(512)
    for key, field in list(reader.fields.items())[::-1]:
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1])
    for tensor in list(reader.tensors)[::-1]:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = load(tmp_path / "wide.gguf")
    save(model, tmp_path / "copy.gguf")
    assert (tmp_path / "copy.gguf").read_bytes() == (tmp_path / "wide.gguf").read_bytes()
    save(model, tmp_path / "q8.gguf", to="q8_0")
    assert all(tensor.data_offset % 512 == 0 for tensor in gguf.GGUFReader(tmp_path / "q8.gguf").tensors)
    assert fields(tmp_path / "q8.gguf") == fields(tmp_path / "wide.gguf")
    assert list(tensors(tmp_path / "q8.gguf")) == list(tensors(tmp_path / "wide.gguf"))


def test_wrapped_layers(tiny_gguf: Maker, tmp_path: Path) -> None:
    tiny = tiny_gguf("llama")
    model = load(tiny.path)
    attach_lora(model, r=2, target_modules=["q_proj", "lm_head"], name="law")
    with pytest.raises(AdapterError, match="the adapter law is active") as caught:
        save(model, tmp_path / "copy.gguf")
    assert caught.value.hint == "merge it first, write it with save_adapter(), or take it off with detach_lora()"
    assert names(tmp_path) == set()
    use_adapter(model, None)
    assert save(model, tmp_path / "copy.gguf").changed == 0
    assert (tmp_path / "copy.gguf").read_bytes() == tiny.path.read_bytes()
    change(model.model.layers[0].self_attn.q_proj.base)
    report = save(model, tmp_path / "copy.gguf", overwrite=True)
    assert report.changed == 1
    again = load(tmp_path / "copy.gguf")
    wrapped = model.model.layers[0].self_attn.q_proj
    assert torch.equal(again.model.layers[0].self_attn.q_proj.packed.parts[0], wrapped.base.packed.parts[0])
    assert current_fingerprint(model) == again.qgraft.info.fingerprint
    assert set(save(model, tmp_path / "q8.gguf", to="q8_0").formats) == {"q8_0"}


# ---------------------------------------------------------------- other formats


@pytest.mark.spread(2)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("wanted", "kind", "file_type"), [("q8_0", Q.Q8_0, 7), ("f16", Q.F16, 1), ("q4_0", Q.Q4_0, 2)])
def test_every_linear_layer_in_another_format(
    tiny_gguf: Maker, tmp_path: Path, wanted: str, kind: Q, file_type: int, tied: bool
) -> None:
    tiny, copy = (
        tiny_gguf("llama", tied=tied, metadata={"general.file_type": 3, "a.key": "after"}),
        tmp_path / "copy.gguf",
    )
    model = load(tiny.path)
    change(model.model.layers[0].mlp.up_proj)
    report = save(model, copy, to=wanted)
    old, new = tensors(tiny.path), tensors(copy)
    stays = {name for name in old if "blk." not in name or old[name].data.ndim == 1}
    assert {"token_embd.weight", "output_norm.weight", "blk.0.attn_norm.weight"} < stays
    assert ("output.weight" in stays) != tied
    for name, tensor in new.items():
        if name in stays:
            assert tensor.tensor_type == old[name].tensor_type
            assert np.array_equal(tensor.data, old[name].data)
            continue
        before = floats(old[name]) if name != "blk.0.ffn_up.weight" else model.model.layers[0].mlp.up_proj.dequantize()
        assert tensor.tensor_type == kind
        assert np.array_equal(tensor.data, gguf.quants.quantize(before.numpy(), kind)), name
    expected = [(k, t, file_type if k == "general.file_type" else v) for k, t, v in fields(tiny.path)]
    assert fields(copy) == expected
    assert report.nbytes == copy.stat().st_size
    assert report.source_nbytes == tiny.path.stat().st_size
    assert (report.nbytes > report.source_nbytes) == (wanted != "q4_0")
    again = load(copy)
    assert report.formats == again.qgraft.info.formats
    assert "MB (was " in str(report)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=copy.name, dtype=torch.float32)
    for path, layer in linears(again).items():
        assert torch.equal(layer.dequantize(), theirs.get_submodule(path).weight), path


def test_some_layers_in_other_formats(tiny_gguf: Maker, tmp_path: Path) -> None:
    tiny, copy = tiny_gguf("llama", metadata={"general.file_type": 3}), tmp_path / "copy.gguf"
    save(
        load(tiny.path), copy,
        to={"layers.1.mlp.up_proj": "q4_0", "*up_proj": "f16", "blk.1.attn_q.weight": "f32", "blk.0.attn_?": "bf16",
            "v_proj": "q5_1", "lm_head": "q5_0"},
    )  # fmt: skip
    wanted = {
        "blk.1.ffn_up.weight": Q.Q4_0, "blk.0.ffn_up.weight": Q.F16, "blk.1.attn_q.weight": Q.F32,
        "blk.0.attn_q.weight": Q.BF16, "blk.0.attn_k.weight": Q.BF16, "blk.0.attn_v.weight": Q.BF16,
        "blk.1.attn_v.weight": Q.Q5_1, "output.weight": Q.Q5_0,
    }  # fmt: skip
    old, new = tensors(tiny.path), tensors(copy)
    for name, tensor in new.items():
        assert tensor.tensor_type == wanted.get(name, old[name].tensor_type), name
        if name not in wanted:
            assert np.array_equal(tensor.data, old[name].data)
    assert fields(copy) == fields(tiny.path)  # no one file type fits
    load(copy)


def test_widths_without_blocks_stay(make_gguf: Maker, tmp_path: Path) -> None:
    tiny = make_gguf(
        tmp_path / "tiny.gguf", "llama", config={"intermediate_size": 80}, types=(Q.F16,),
        metadata={"llama.feed_forward_length": 80, "general.file_type": 1},
    )  # fmt: skip
    report = save(load(tiny.path), tmp_path / "copy.gguf", to="q8_0")
    paths = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    which = f"2 matrices ({paths[0]}, ...)"
    assert report.notes == (f"{which} stay in their format, not q8_0: 80 inputs are no multiple of 32",)
    assert str(report).splitlines()[1:] == list(report.notes)
    assert fields(tmp_path / "copy.gguf") == fields(tiny.path)
    types = {name: tensor.tensor_type for name, tensor in tensors(tmp_path / "copy.gguf").items()}
    assert types["blk.0.ffn_down.weight"] == Q.F16
    assert types["blk.0.ffn_up.weight"] == Q.Q8_0
    assert report.changed == 12


def test_layers_replaced_in_another_format(tiny_gguf: Maker, tmp_path: Path) -> None:
    model = load(tiny_gguf("llama").path)
    layer = model.model.layers[0].self_attn.k_proj
    layer.replace(quantize(layer.dequantize(), "q5_0"))
    report = save(model, tmp_path / "copy.gguf")
    again = load(tmp_path / "copy.gguf")
    assert again.model.layers[0].self_attn.k_proj.packed.format == "q5_0"
    assert torch.equal(again.model.layers[0].self_attn.k_proj.dequantize(), layer.dequantize())
    assert report.changed == 1
    layer.replace(quantize(layer.dequantize(), "chatglm-int8"))
    with pytest.raises(
        UnsupportedError, match=r"1 matrices in chatglm-int8: a GGUF file can hold: bf16, f16,"
    ) as caught:
        save(model, tmp_path / "copy.gguf", overwrite=True)
    assert "q8_0" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("to", "error", "message"),
    [
        ("q4_2", UnsupportedError, r"(?s)unknown format: got 'q4_2'.*q4_1"),
        (
            "chatglm-int8",
            UnsupportedError,
            r"to='chatglm-int8': a GGUF file can get: bf16, f16, f32, iq4_nl, iq4_xs, mxfp4, nvfp4, q4_0,",
        ),
        (READ_ONLY, UnsupportedError, rf"to='{READ_ONLY}': a GGUF file can get: bf16, f16,"),
        ({"q_prj": "q8_0"}, OptionError, r"(?s)no linear layer is named so.*did you mean .*q_proj"),
        ({"embed_tokens": "q8_0"}, OptionError, "no linear layer is named so"),
        ({"*norm*": "q8_0"}, OptionError, "no linear layer is named so"),
    ],
)
def test_impossible_formats(tiny_gguf: Maker, tmp_path: Path, to: Any, error: type[Exception], message: str) -> None:
    for call in (save, check_target):
        with pytest.raises(error, match=message):
            call(load(tiny_gguf("llama").path), tmp_path / "copy.gguf", to=to)
    assert names(tmp_path) == set()


def test_broken_weights_are_named_and_not_written(tiny_gguf: Maker, tmp_path: Path) -> None:
    model = load(tiny_gguf("llama").path)
    layer = model.model.layers[1].self_attn.o_proj
    packed = quantize(layer.dequantize(), "f32")
    packed.parts[0].view(torch.float32)[3, 3] = torch.nan
    layer.replace(packed)
    with pytest.raises(UnsupportedError, match=r"layers\.1\.self_attn\.o_proj: .*1 of 4096 weights NaN"):
        save(model, tmp_path / "copy.gguf", to="q8_0")
    assert names(tmp_path) == set()


# ---------------------------------------------------------------- the source


def edit(path: Path, position: int) -> None:
    """Change one byte, in another file of the same name, as editors do."""
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1
    path.unlink()
    path.write_bytes(raw)


SPOILED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "vanished": (lambda path: path.unlink(), "no such file"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "not a regular file"),
    "other metadata": (lambda path: edit(path, path.read_bytes().index(b"tiny")), "other metadata or tensors"),
    "another norm": (lambda path: edit(path, tensors(path)["output_norm.weight"].data_offset), "other metadata or tensors"),
    "cut off": (
        lambda path: (raw := path.read_bytes(), path.unlink(), path.write_bytes(raw[:-5000])), "bytes of tensors are missing"
    ),
    "not a GGUF": (lambda path: (path.unlink(), path.write_text("hello")), "not a GGUF file"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILED)
def test_a_source_that_changed(make_gguf: Maker, tmp_path: Path, case: str) -> None:
    spoil, message = SPOILED[case]
    source, out = tmp_path / "in" / "tiny.gguf", tmp_path / "out"
    source.parent.mkdir()
    out.mkdir()
    make_gguf(source, "llama")
    model = load(source)
    spoil(source)
    (out / "old.gguf").write_bytes(b"old")
    for call in (
        lambda: save(model, out / "copy.gguf"),
        lambda: save(model, out / "old.gguf", overwrite=True),
        lambda: current_fingerprint(model),
    ):
        with pytest.raises(
            CheckpointError, match=rf"tiny\.gguf changed since the model was loaded: .*{message}"
        ) as caught:
            call()
        assert caught.value.hint is not None
    assert names(out) == {"old.gguf"}
    assert (out / "old.gguf").read_bytes() == b"old"


def test_a_source_that_was_copied_over_or_touched_is_the_same(
    make_gguf: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_gguf(tmp_path / "tiny.gguf", "llama").path
    monkeypatch.chdir(tmp_path)
    model = load(Path("tiny.gguf"))
    raw = source.read_bytes()
    source.unlink()
    source.write_bytes(raw)
    os.utime(source, (1, 1))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    save(model, "copy.gguf")
    assert (tmp_path / "elsewhere" / "copy.gguf").read_bytes() == raw


def test_models_that_were_not_loaded(tiny_gguf: Maker, tmp_path: Path) -> None:
    for call in (lambda model: save(model, tmp_path / "copy.gguf"), current_fingerprint):
        with pytest.raises(CheckpointError, match=r"only models from qgraft\.load can be saved"):
            call(tiny_gguf("llama").model)
    model = load(tiny_gguf("llama").path)
    model.model.layers[0].mlp.up_proj = nn.Linear(64, 256)
    with pytest.raises(
        CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj: got a Linear, expected the quantized layer"
    ):
        save(model, tmp_path / "copy.gguf")
    model = load(tiny_gguf("llama").path)
    packed = model.model.layers[0].mlp.up_proj.packed_weight
    packed.set(quantize(torch.ones(256, 32), packed.format))
    packed.shape = (256, 64)
    with pytest.raises(
        CheckpointError, match=r"up_proj: .*data: got torch.uint8 \[256, \d+\], expected torch.uint8 \[256, \d+\]"
    ):
        save(model, tmp_path / "copy.gguf")


# ---------------------------------------------------------------- the target


def test_targets_that_cannot_be(make_gguf: Maker, tmp_path: Path) -> None:
    source = make_gguf(tmp_path / "tiny.gguf", "llama").path
    before, model = source.read_bytes(), load(source)
    (tmp_path / "link.gguf").symlink_to(source)
    (tmp_path / "folder").mkdir()
    for path in (source, tmp_path / "link.gguf", tmp_path / "folder" / ".." / "tiny.gguf"):
        for overwrite in (False, True):
            with pytest.raises(OptionError, match="is what is read, and is never written over") as caught:
                save(model, path, overwrite=overwrite)
            assert caught.value.hint == "give another name"
    (tmp_path / "old.gguf").write_bytes(b"old")
    for call in (save, check_target):
        with pytest.raises(StorageError, match=r"old\.gguf exists already\nhint: .*overwrite=True"):
            call(model, tmp_path / "old.gguf")
    assert (tmp_path / "old.gguf").read_bytes() == b"old"
    save(model, tmp_path / "old.gguf", overwrite=True)
    assert (tmp_path / "old.gguf").read_bytes() == before
    with pytest.raises(StorageError, match=r"folder: it is a folder\nhint: give a file: .*folder/tiny\.gguf"):
        save(model, tmp_path / "folder")
    with pytest.raises(StorageError, match=r"absent does not exist\nhint: create the folder first"):
        save(model, tmp_path / "absent" / "copy.gguf")
    with pytest.raises(StorageError, match=r"tiny\.gguf is a file\nhint: give a place"):
        save(model, source / "copy.gguf")
    assert source.read_bytes() == before
    assert names(tmp_path) == {"tiny.gguf", "link.gguf", "folder", "old.gguf"}
    assert names(tmp_path / "folder") == set()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tiny_gguf: Maker, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(StorageError, match="no permission to write in"):
            save(load(tiny_gguf("llama").path), tmp_path / "copy.gguf")
    finally:
        tmp_path.chmod(0o700)


def test_no_room(tiny_gguf: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = tiny_gguf("llama")
    model, size = load(tiny.path), tiny.path.stat().st_size
    (tmp_path / "copy.gguf").write_bytes(b"old")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=size - 1))
    opened = []
    monkeypatch.setattr(storage, "open", lambda *args: opened.append(args), raising=False)
    with pytest.raises(
        StorageError, match=rf"No space left on device, {size} bytes to write, {size - 1} bytes free"
    ) as caught:
        save(model, tmp_path / "copy.gguf", overwrite=True)
    assert caught.value.hint == "free some space or choose another folder"
    assert opened == []
    assert (tmp_path / "copy.gguf").read_bytes() == b"old"


@pytest.mark.parametrize("to", [None, "q8_0"])
def test_no_room_is_found_out_before_anything_long(
    tiny_gguf: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str | None
) -> None:
    """What check_target asks room for is most of the file that save writes, and no more than it."""
    model = load(tiny_gguf("llama").path)
    least = check_target(model, tmp_path / "copy.gguf", to=to)
    size = save(model, tmp_path / "copy.gguf", to=to).nbytes
    assert size / 2 < least <= size

    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=least - 1))
    with pytest.raises(StorageError, match=rf"No space left on device, {least} bytes to write, {least - 1} bytes free"):
        check_target(model, tmp_path / "other.gguf", to=to)


@pytest.mark.parametrize("to", [None, "q8_0"])
def test_a_disk_that_fills_up(tiny_gguf: Maker, tmp_path: Path, full_disk: Callable[[], Any], to: str | None) -> None:
    model = load(tiny_gguf("llama").path)
    (tmp_path / "copy.gguf").write_bytes(b"old")

    with full_disk(), pytest.raises(StorageError, match=r"copy\.gguf: No space left on device, \d+ bytes to write"):
        save(model, tmp_path / "copy.gguf", to=to, overwrite=True)
    assert (tmp_path / "copy.gguf").read_bytes() == b"old"
    assert names(tmp_path) == {"copy.gguf"}


def test_a_save_that_is_killed(tiny_gguf: Maker, tmp_path: Path) -> None:
    """SIGKILL in the middle of the tensors: the old file stays; the next save clears up what the killed one left."""
    tiny, copy = tiny_gguf("llama"), tmp_path / "copy.gguf"
    copy.write_bytes(b"old")
    script = f"""
        import os, signal, torch
        from pathlib import Path
        from qgraft import storage
        from qgraft.checkpoints.gguf_model import load_gguf
        from qgraft.checkpoints.save import save

        class Killing:
            def __init__(self, path, mode):
                self.file, self.left = open(path, mode, buffering=0), 60_000
            def __enter__(self):
                return self
            def __exit__(self, *_):
                self.file.close()
            def write(self, data):
                self.file.write(data)
                self.left -= len(data)
                if self.left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        model, _ = load_gguf(Path({str(tiny.path)!r}), torch.float32)
        storage.open = Killing
        save(model, {str(copy)!r}, overwrite=True)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert copy.read_bytes() == b"old"
    left = names(tmp_path) - {"copy.gguf", ".copy.gguf.lock"}
    assert [name.startswith(".copy.gguf.tmp-") for name in left] == [True]
    assert 60_000 < (tmp_path / left.pop()).stat().st_size < tiny.path.stat().st_size
    save(load(tiny.path), copy, overwrite=True)
    assert copy.read_bytes() == tiny.path.read_bytes()
    assert names(tmp_path) == {"copy.gguf"}


def test_every_matrix_of_a_loaded_model_has_an_origin(tiny_gguf: Maker) -> None:
    for architecture, tied in CASES:
        tiny = tiny_gguf(architecture, tied=tied)
        model = load(tiny.path)
        matrices = {p for p, m in model.named_modules() if isinstance(m, PackedLayer)}
        output = next(path for path, module in model.named_modules() if module is model.get_output_embeddings())
        assert set(model.qgraft.origin.matrices) == matrices - ({output} if tied else set())
        for path, stored in model.qgraft.origin.matrices.items():
            if stored.name not in tiny.parameters:  # Gemma 3n's: slices of one tensor
                assert re.fullmatch(r"model\.altup_(unembed_)?projections\.[0-2]", path)
                continue
            of_experts = path.rpartition(".")[0]
            assert tiny.parameters[stored.name] == (of_experts if "_exps." in stored.name else f"{path}.weight")
