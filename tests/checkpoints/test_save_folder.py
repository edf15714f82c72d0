"""save() of folders: safetensors and transformers read what was written, and load() reads it back bit for bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qgraft import storage
from qgraft.adapters.attach import attach_lora
from qgraft.adapters.choose import use_adapter
from qgraft.checkpoints import folder_write
from qgraft.checkpoints.folder_model import load_folder
from qgraft.checkpoints.save import check_target, current_fingerprint, save
from qgraft.checkpoints.shards import INDEX
from qgraft.errors import CheckpointError, OptionError, StorageError, UnsupportedError
from qgraft.formats import quantize
from qgraft.linear import QuantizedLinear

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
PART = "model.layers.1.mlp.down_proj"
Maker = Callable[..., Any]


def tiny_llama(**options: Any) -> LlamaForCausalLM:
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        **{**shape, "num_key_value_heads": 2, "vocab_size": 100, "tie_word_embeddings": False, **options}
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder with everything that a folder on the hub may have."""
    folder = tmp_path / "source"
    tiny_llama().to(torch.float16).save_pretrained(folder)
    word_level = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=word_level, chat_template="{{ messages }}").save_pretrained(folder)
    for name in ("modeling_x.py", "pytorch_model.bin", "LICENSE", "README.md", "manifest.json", "notes.csv"):
        (folder / name).write_text("{}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("tools")
    return folder


def load(folder: Path, quantized: str | None = None) -> Any:
    return load_folder(folder, torch.float32, quantized)[0]


def linears(model: nn.Module) -> dict[str, QuantizedLinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def packed_equal(a: nn.Module, b: nn.Module) -> bool:
    """Whether all packed weights, norms and biases have the same formats and bits."""

    def state(model: nn.Module) -> dict[str, Any]:
        formats = {path: layer.packed.format for path, layer in linears(model).items()}
        return {**{k: (v.dtype, v.tolist()) for k, v in model.state_dict().items()}, "formats": formats}

    return state(a) == state(b)


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_rowwise_layout(tmp_path: Path, random_ids: Maker, stored: str, bits: int) -> None:
    tiny_llama().to(DTYPES[stored]).save_pretrained(tmp_path / "source")
    model = load(tmp_path / "source", f"chatglm-int{bits}")
    report = save(model, tmp_path / "copy")
    scale = "F32" if stored == "f32" else "F16"
    floats = load_file(tmp_path / "source" / "model.safetensors")
    with safe_open(tmp_path / "copy" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == floats.keys() | {f"{n}_scale" for n in floats if "proj" in n}
        for name, before in floats.items():
            if "proj" not in name:
                assert torch.equal(file.get_tensor(name), before)
                assert file.get_tensor(name).dtype == before.dtype
                continue
            expected = quantize(before, f"chatglm-int{bits}")
            assert file.get_slice(name).get_dtype() == "I8"
            assert file.get_slice(name).get_shape() == [before.shape[0], before.shape[1] * bits // 8]
            assert file.get_slice(f"{name}_scale").get_dtype() == scale
            assert torch.equal(file.get_tensor(name), expected.parts[0])
            assert torch.equal(file.get_tensor(f"{name}_scale"), expected.parts[1])
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    assert json.loads((tmp_path / "copy" / "config.json").read_text()) == {**config, "quantization_bit": bits}
    assert storage.check_folder(tmp_path / "copy") == []
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("copy", "source")]
    assert [report.nbytes, report.source_nbytes] == sizes
    assert (report.changed, report.notes, report.formats) == (14, (), model.qgraft.info.formats)

    again = load(tmp_path / "copy")
    assert packed_equal(again, model)
    ids = random_ids(model)
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert again.qgraft.info.fingerprint == model.qgraft.info.fingerprint == current_fingerprint(model)
    assert again.qgraft.info.formats == model.qgraft.info.formats
    assert again.qgraft.info.notes == ()
    assert save(again, tmp_path / "third").changed == 0
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "third" / name).read_bytes() == (tmp_path / "copy" / name).read_bytes()


def test_what_is_copied(source: Path, tmp_path: Path) -> None:
    save(load(source, "chatglm-int4"), tmp_path / "copy")
    left = {"modeling_x.py", "pytorch_model.bin", "notes.csv"}
    assert names(tmp_path / "copy") == names(source) - left
    changed = {"config.json", "model.safetensors", "manifest.json"}
    for name in names(tmp_path / "copy") - changed:
        assert (tmp_path / "copy" / name).read_bytes() == (source / name).read_bytes()
    _, tokenizer = load_folder(tmp_path / "copy", torch.float32)
    assert tokenizer.chat_template == {"default": "{{ messages }}", "tools": "tools"}
    assert tokenizer("b")["input_ids"] == [1]
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "copy").iterdir() if path.is_file()}
    assert modes == {(tmp_path / "source" / "config.json").stat().st_mode & 0o777}


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("shard", ["1GB", "30KB"])
def test_floats_as_they_were(tmp_path: Path, stored: str, shard: str) -> None:
    tiny_llama().to(DTYPES[stored]).save_pretrained(tmp_path / "source", max_shard_size=shard)
    model = load(tmp_path / "source")
    layer = model.get_submodule(PART)
    layer.replace(quantize(layer.dequantize() + 1, stored))
    report = save(model, tmp_path / "copy")
    assert report.changed == 1
    assert (tmp_path / "copy" / "config.json").read_bytes() == (tmp_path / "source" / "config.json").read_bytes()
    states = [
        LlamaForCausalLM.from_pretrained(tmp_path / name, dtype="auto").state_dict() for name in ("source", "copy")
    ]
    for name, before in states[0].items():
        assert before.dtype == states[1][name].dtype == DTYPES[stored]
        assert torch.equal(before, states[1][name]) == (name != f"{PART}.weight")
    assert torch.equal(states[1][f"{PART}.weight"].float(), layer.dequantize())
    files = [sorted(path.name for path in (tmp_path / n).glob("*.safetensors")) for n in ("source", "copy")]
    assert files[0] == files[1]
    if shard == "30KB":
        assert len(files[1]) > 3
        maps = [json.loads((tmp_path / name / INDEX).read_text())["weight_map"] for name in ("source", "copy")]
        assert maps[0] == maps[1]
        assert report.nbytes == sum(path.stat().st_size for path in (tmp_path / "copy").glob("*.safetensors"))
    else:
        assert not (tmp_path / "copy" / INDEX).exists()
    assert load(tmp_path / "copy").qgraft.info.fingerprint == current_fingerprint(model)


def test_what_was_written_is_given_back(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both mappings of the source: the model's, and the one that it is compared with."""
    given_back: list[int] = []
    real = folder_write.release
    monkeypatch.setattr(
        folder_write,
        "release",
        lambda *tensors: (given_back.extend(each.data_ptr() for each in tensors), real(*tensors)),
    )
    model = load(source)
    save(model, tmp_path / "saved")
    held = {layer.packed.parts[0].data_ptr() for layer in linears(model).values()}
    assert {*given_back} >= held and len({*given_back}) >= 2 * len(held)
    load(tmp_path / "saved")


def test_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One large file becomes several, never more than a few tensors at a time."""
    tiny_llama().save_pretrained(tmp_path / "source")
    model = load(tmp_path / "source", "chatglm-int8")
    monkeypatch.setattr(folder_write, "SHARD_BYTES", 40_000)
    save(model, tmp_path / "copy")
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "copy").glob("*.safetensors")}
    assert len(sizes) > 2
    assert max(sizes.values()) < 43_000
    assert set(json.loads((tmp_path / "copy" / INDEX).read_text())["weight_map"].values()) == sizes.keys()
    assert packed_equal(load(tmp_path / "copy"), model)


@pytest.mark.parametrize("quantized", [None, "chatglm-int4", "chatglm-int8"])
def test_conv1d_layers(tmp_path: Path, random_ids: Maker, quantized: str | None) -> None:
    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=100, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "source")
    model = load(tmp_path / "source", quantized)
    layer = model.get_submodule("transformer.h.1.attn.c_attn")  # 64 -> 192
    layer.replace(quantize(layer.dequantize() * 2, layer.packed.format))
    save(model, tmp_path / "copy")
    again = load(tmp_path / "copy")
    ids = random_ids(model)
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert again.qgraft.info.fingerprint == current_fingerprint(model)
    weights = load_file(tmp_path / "copy" / "model.safetensors")
    shape = list(weights["transformer.h.1.attn.c_attn.weight"].shape)
    assert shape == {None: [64, 192], "chatglm-int4": [192, 32], "chatglm-int8": [192, 64]}[quantized]
    if quantized is None:
        theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "copy").eval()
        assert (logits(theirs, ids) - logits(model, ids)).abs().max() < 1e-5


def test_a_tied_output_that_the_file_repeats(tmp_path: Path) -> None:
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "source")
    weights = load_file(tmp_path / "source" / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["extra.weight"] = torch.arange(6).view(2, 3)
    save_file(weights, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    model = load(tmp_path / "source")
    assert current_fingerprint(model) == model.qgraft.info.fingerprint
    model.lm_head.replace(quantize(model.lm_head.dequantize() + 1, "f32"))
    report = save(model, tmp_path / "copy", to={"*_proj": "chatglm-int8"})
    written = load_file(tmp_path / "copy" / "model.safetensors")
    assert torch.equal(written["lm_head.weight"], weights["lm_head.weight"] + 1)
    assert torch.equal(written["model.embed_tokens.weight"], weights["lm_head.weight"] + 1)
    assert torch.equal(written["extra.weight"], weights["extra.weight"])
    assert report.formats == load(tmp_path / "copy").qgraft.info.formats
    with pytest.raises(OptionError, match="no linear layer is named so"):
        save(model, tmp_path / "copy", to={"lm_head": "f16"}, overwrite=True)


def test_changed_and_wrapped_layers(source: Path, tmp_path: Path) -> None:
    model = load(source, "chatglm-int4")
    attach_lora(model, r=2)
    use_adapter(model, None)
    layer = model.get_submodule(PART).base
    layer.replace(quantize(layer.dequantize() * 1.5 + 0.1, "chatglm-int4"))
    save(model, tmp_path / "copy")
    again = load(tmp_path / "copy")
    assert torch.equal(again.get_submodule(PART).packed.parts[0], layer.packed.parts[0])
    assert torch.equal(again.get_submodule(PART).packed.parts[1], layer.packed.parts[1])
    assert again.qgraft.info.fingerprint == current_fingerprint(model) != model.qgraft.info.fingerprint


def test_other_formats(source: Path, tmp_path: Path, random_ids: Maker) -> None:
    model = load(source, "q4_1")
    with pytest.raises(
        UnsupportedError, match=r"14 matrices in q4_1: a folder of safetensors can hold: bf16,"
    ) as caught:
        save(model, tmp_path / "copy")
    assert caught.value.hint == 'load with quantize="chatglm-int4", or save with to="chatglm-int8" or to="f16"'
    with pytest.raises(UnsupportedError, match=r"to='q8_0': a folder of safetensors can get: bf16, chatglm-int4,"):
        save(model, tmp_path / "copy", to="q8_0")
    save(model, tmp_path / "half", to="f16")
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    for path, layer in linears(model).items():
        assert torch.equal(theirs.get_submodule(path).weight, layer.dequantize(torch.float16)), path
    save(model, tmp_path / "int8", to="chatglm-int8")
    eight = load(tmp_path / "int8")
    report = save(eight, tmp_path / "mixed", to={"layers.0.*": "chatglm-int4", "lm_head": "bf16", "o_proj": "f16"})
    assert report.changed == 7 + 1 + 1
    assert "quantization_bit" not in json.loads((tmp_path / "mixed" / "config.json").read_text())
    mixed = load(tmp_path / "mixed")
    formats = {path: layer.packed.format for path, layer in linears(mixed).items()}
    for path, layer in linears(eight).items():
        wanted = (
            "chatglm-int4" if "layers.0." in path else "bf16" if "head" in path else "f16" if "o_proj" in path else None
        )
        assert formats[path] == (wanted or "chatglm-int8")
        expected = quantize(layer.dequantize(), wanted) if wanted else layer.packed
        assert torch.equal(mixed.get_submodule(path).packed.parts[0], expected.parts[0])
    assert mixed.qgraft.info.formats == report.formats
    ids = random_ids(mixed)
    assert (logits(mixed, ids) - logits(eight, ids)).abs().max() < 0.2 * logits(eight, ids).abs().max()


@pytest.mark.parametrize("stored", DTYPES)
def test_quantizing_while_saving_is_quantizing_while_loading(tmp_path: Path, stored: str) -> None:
    tiny_llama().to(DTYPES[stored]).save_pretrained(tmp_path / "source")
    save(load(tmp_path / "source", "chatglm-int4"), tmp_path / "loading")
    report = save(load(tmp_path / "source"), tmp_path / "saving", to="chatglm-int4")
    assert report.changed == 14
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "loading" / name).read_bytes() == (tmp_path / "saving" / name).read_bytes()


def test_tensors_lie_at_multiples_of_their_item_size(tmp_path: Path) -> None:
    tensors = {
        "a": ("I8", torch.arange(3, dtype=torch.int8)),
        "b": ("F16", torch.rand(5, 1).half()),
        "c": ("F32", torch.tensor(1.5)),
        "数": ("BOOL", torch.tensor([True])),
        "e": ("I64", torch.arange(2)),
        "empty": ("F16", torch.empty(0, 4).half()),
    }
    nbytes = folder_write.write_safetensors(tmp_path / "x.safetensors", tensors, {"format": "pt", "a": "数"})
    raw = (tmp_path / "x.safetensors").read_bytes()
    assert len(raw) == nbytes
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert length % 8 == 0
    for name, (_, tensor) in tensors.items():
        assert header[name]["data_offsets"][0] % tensor.itemsize == 0
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "a": "数"}
        for name, (_, tensor) in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor)
            assert file.get_tensor(name).dtype == tensor.dtype


# ---------------------------------------------------------------- reading folders of others


def spoil(folder: Path, **tensors: Tensor | None) -> None:
    """Replace tensors of PART ("weight", "weight_scale"), or take them out."""
    weights = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor is None:
            del weights[f"{PART}.{name}"]
        else:
            weights[f"{PART}.{name}"] = tensor
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


BROKEN: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "no scale": (lambda f: spoil(f, weight_scale=None), CheckpointError, "weight_scale is missing beside it"),
    "scale zero": (lambda f: spoil(f, weight_scale=torch.zeros(64)), CheckpointError, r"got 0 for 64 rows .*\(row 0\)"),
    "too few scales": (lambda f: spoil(f, weight_scale=torch.ones(63)), CheckpointError, r"got torch.float32 \[63\], exp"),
    "scales in a matrix": (lambda f: spoil(f, weight_scale=torch.ones(64, 1)), CheckpointError, r"torch.float32 \[64, 1\]"),
    "scales of integers": (lambda f: spoil(f, weight_scale=torch.ones(64).int()), CheckpointError, "got torch.int32"),
    "scale NaN": (lambda f: spoil(f, weight_scale=torch.full((64,), torch.nan)), CheckpointError, "got NaN or infinity"),
    "another width": (
        lambda f: (spoil(f, weight=torch.ones(64, 96).char()), edit_json(f / "config.json", quantization_bit=None)),
        CheckpointError, r"got shape \[64, 96\], expected \[64, 128\]",
    ),
    "other bits than stated": (
        lambda f: edit_json(f / "config.json", quantization_bit=8), CheckpointError,
        r"4 bits a weight, but config.json says quantization_bit=8",
    ),
    "bits of text": (
        lambda f: edit_json(f / "config.json", quantization_bit="four"), CheckpointError, "quantization_bit='four'"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_rowwise_folders(source: Path, tmp_path: Path, case: str) -> None:
    change, kind, message = BROKEN[case]
    save(load(source, "chatglm-int4"), tmp_path / "copy")
    change(tmp_path / "copy")
    with pytest.raises(kind, match=message):
        load(tmp_path / "copy")


def test_bits_are_told_by_shape_where_the_config_says_nothing(source: Path, tmp_path: Path) -> None:
    model = load(source, "chatglm-int4")
    save(model, tmp_path / "copy")
    edit_json(tmp_path / "copy" / "config.json", quantization_bit=0)
    assert packed_equal(load(tmp_path / "copy"), model)


def test_quantizing_what_is_quantized(source: Path, tmp_path: Path) -> None:
    save(load(source, "chatglm-int4"), tmp_path / "copy")
    with pytest.raises(
        UnsupportedError, match=r"quantize='q4_1': .*proj\.weight is stored in int8 with scales already"
    ) as e:
        load(tmp_path / "copy", "q4_1")
    assert e.value.hint is not None


# ---------------------------------------------------------------- source and target


CHANGED: dict[str, Callable[[Path], Any]] = {
    "config": lambda f: edit_json(f / "config.json", rms_norm_eps=0.5),
    "norm": lambda f: save_file(
        {**load_file(f / "model.safetensors"), "model.norm.weight": torch.zeros(64).half()}, f / "model.safetensors"
    ),
    "shape": lambda f: save_file({**load_file(f / "model.safetensors"), "x": torch.zeros(1)}, f / "model.safetensors"),
    "no config": lambda f: (f / "config.json").unlink(),
    "no weights": lambda f: (f / "model.safetensors").unlink(),
    "cut off": lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:500]),
}


@pytest.mark.parametrize("case", CHANGED)
def test_a_source_that_changed(source: Path, tmp_path: Path, case: str) -> None:
    model = load(source, "chatglm-int4")
    (source / "model.safetensors").rename(source / "old")  # stays mapped; what is spoilt is a copy
    (source / "model.safetensors").write_bytes((source / "old").read_bytes())
    assert current_fingerprint(model) == model.qgraft.info.fingerprint
    CHANGED[case](source)
    for call in (lambda: save(model, tmp_path / "copy"), lambda: current_fingerprint(model)):
        with pytest.raises(CheckpointError, match="source changed since the model was loaded: "):
            call()
    assert not (tmp_path / "copy").exists()


def test_targets(source: Path, tmp_path: Path) -> None:
    model = load(source, "chatglm-int4")
    before = {name: (source / name).read_bytes() for name in names(source)}
    (tmp_path / "file").write_text("old")
    (tmp_path / "mine" / "deep").mkdir(parents=True)
    (tmp_path / "mine" / "deep" / "thesis.txt").write_text("thesis")
    (tmp_path / "run").mkdir()
    storage.write_json(tmp_path / "run" / "manifest.json", {"files": {}})
    for path, kind, message in (
        (source, OptionError, "is what is read"),
        (tmp_path, OptionError, "holds source, which is read"),
        (tmp_path / "mine", StorageError, "holds files that no save wrote: deep/thesis.txt"),
        (tmp_path / "run", StorageError, "holds files that no save wrote: a training run"),
        (tmp_path / "file", StorageError, "it is a file; a model from a folder is saved as a folder"),
        (tmp_path / "model.gguf", UnsupportedError, "it came without a tokenizer"),
        (tmp_path / "no" / "copy", StorageError, "no does not exist"),
    ):
        for call in (save, check_target):
            with pytest.raises(kind, match=message):
                call(model, path, overwrite=True)
    check_target(model, tmp_path / "new")
    assert {name: (source / name).read_bytes() for name in names(source)} == before
    assert (tmp_path / "mine" / "deep" / "thesis.txt").read_text() == "thesis"
    (tmp_path / "empty").mkdir()
    save(model, tmp_path / "empty")
    with pytest.raises(StorageError, match="empty exists already"):
        save(load(source, "chatglm-int8"), tmp_path / "empty")
    save(load(source, "chatglm-int8"), tmp_path / "empty", overwrite=True)  # written by an earlier save: replaced
    assert load(tmp_path / "empty").get_submodule(PART).packed.format == "chatglm-int8"
    (tmp_path / "empty" / "my notes").write_text("")
    with pytest.raises(StorageError, match="no save wrote: my notes"):
        save(model, tmp_path / "empty", overwrite=True)


@pytest.mark.parametrize("before", [True, False])
def test_a_disk_that_fills_up(source: Path, tmp_path: Path, full_disk: Callable[[], Any], before: bool) -> None:
    old, new = load(source, "chatglm-int4"), load(source, "chatglm-int8")
    if before:
        save(old, tmp_path / "copy")

    with full_disk(), pytest.raises(StorageError, match="No space left on device"):
        save(new, tmp_path / "copy", overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"source"} | ({"copy"} if before else set())
    if before:
        assert packed_equal(load(tmp_path / "copy"), old)
        assert storage.check_folder(tmp_path / "copy") == []
