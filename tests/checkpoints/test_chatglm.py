"""Folders of both ChatGLM generations: read, quantized, saved and refused, against what the original code computed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

import qgraft
from qgraft.checkpoints.folder_model import load_folder
from qgraft.checkpoints.quantize import quantize
from qgraft.checkpoints.save import save
from qgraft.checkpoints.shards import BIN_INDEX
from qgraft.errors import AdapterError, CheckpointError, UnsupportedError
from qgraft.formats import dequantize, get_format
from qgraft.linear import QuantizedEmbedding, QuantizedLinear

GOLDEN = Path(__file__).parent.parent / "golden"
GENERATIONS = ["chatglm", "chatglm2"]
KINDS = {"fp32": None, "int8": "chatglm-int8", "int4": "chatglm-int4"}
LAYER = {
    "chatglm": "transformer.layers.0.attention.query_key_value",
    "chatglm2": "transformer.encoder.layers.0.self_attention.query_key_value",
}


def weights_of(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / name / "weights.safetensors")


def folder_of(path: Path, name: str, layout: str = "safetensors", **changes: Any) -> Path:
    """A checkpoint folder holding the golden model `name`; `changes` go to config.json."""
    path.mkdir()
    config = json.loads((GOLDEN / name / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))
    write_weights(path, weights_of(name), layout)
    return path


def write_weights(path: Path, weights: dict[str, Tensor], layout: str = "safetensors") -> None:
    if layout == "safetensors":
        save_file(weights, path / "model.safetensors", {"format": "pt"})
    elif layout == "bin":
        torch.save(weights, path / "pytorch_model.bin")
    else:
        files = {name: f"pytorch_model-0000{1 + i % 3}-of-00003.bin" for i, name in enumerate(weights)}
        for file in set(files.values()):
            torch.save({name: weights[name] for name, where in files.items() if where == file}, path / file)
        (path / BIN_INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": files}))


def load(folder: Path, quantized: str | None = None) -> PreTrainedModel:
    return load_folder(folder, torch.float32, quantized)[0]


def golden_logits(model: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    """(logits of `model`, those of the original code) on the golden sequence."""
    io = load_file(GOLDEN / name / "io.safetensors")
    with torch.no_grad():
        return model(io["single.input_ids"]).logits, io["single.logits"]


def linears(model: nn.Module) -> dict[str, QuantizedLinear]:
    return {path: m for path, m in model.named_modules() if isinstance(m, QuantizedLinear) and "layers" in path}


@pytest.fixture(params=[f"{generation}_{kind}" for generation in GENERATIONS for kind in KINDS])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.spread(6)
@pytest.mark.parametrize("layout", ["safetensors", "bin", "shards"])
def test_a_folder_computes_what_the_original_computes(tmp_path: Path, name: str, layout: str) -> None:
    model = load(folder_of(tmp_path / "m", name, layout))
    logits, expected = golden_logits(model, name)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    formats = {layer.packed.format for layer in linears(model).values()}
    assert formats == {KINDS[name.split("_")[1]] or "f16"}
    assert len(linears(model)) == 4 * model.config.num_layers
    whole = load(folder_of(tmp_path / "whole", name))
    assert model.qgraft.info.fingerprint == whole.qgraft.info.fingerprint
    assert (model.qgraft.info.container, model.qgraft.info.architecture) == ("folder", "chatglm")


def test_packed_bytes_are_those_of_the_file(tmp_path: Path, name: str) -> None:
    model, weights = load(folder_of(tmp_path / "m", name)), weights_of(name)
    for path, layer in linears(model).items():
        if layer.packed.format != "f16":
            assert torch.equal(layer.packed.parts[0], weights[f"{path}.weight"])
            assert torch.equal(layer.packed.parts[1], weights[f"{path}.weight_scale"])


@pytest.mark.spread(3)
@pytest.mark.parametrize("how", ["while loading", "in memory"])
@pytest.mark.parametrize("kind", ["int4", "int8"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_quantizing_gives_the_originals_bits(tmp_path: Path, generation: str, kind: str, how: str) -> None:
    """...and saving them the original's quantized checkpoint: keys, bytes, config."""
    folder, format = folder_of(tmp_path / "fp16", f"{generation}_fp32"), f"chatglm-{kind}"
    model = load(folder, format if how == "while loading" else None)
    if how == "in memory":
        assert quantize(model, format) == ()
    expected = weights_of(f"{generation}_{kind}")
    assert len(linears(model)) == 12
    for path, layer in linears(model).items():
        assert torch.equal(layer.packed.parts[0], expected[f"{path}.weight"]), path
        assert torch.equal(layer.packed.parts[1], expected[f"{path}.weight_scale"]), path
    save(model, tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[key].to(value.dtype), value) for key, value in expected.items())  # norms: float32 here
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config == json.loads((folder / "config.json").read_text()) | {"quantization_bit": int(kind[3:])}
    again = load(tmp_path / "saved")
    assert again.qgraft.info.fingerprint == model.qgraft.info.fingerprint
    assert again.qgraft.info.formats == model.qgraft.info.formats
    logits, original = golden_logits(again, f"{generation}_{kind}")
    torch.testing.assert_close(logits, original, atol=1e-4, rtol=0)


@pytest.mark.spread(6)
@pytest.mark.parametrize("layout", ["safetensors", "bin", "shards"])
def test_save_writes_the_same_tensors_as_safetensors(tmp_path: Path, name: str, layout: str) -> None:
    source = folder_of(tmp_path / "source", name, layout)
    (source / "modeling_chatglm.py").write_text("raise SystemExit")
    (source / "tokenizer_config.json").write_text("{}")
    save(load(source), tmp_path / "copy")
    files = {path.name for path in (tmp_path / "copy").iterdir()}
    assert not [file for file in files if file.endswith((".py", ".bin", "bin.index.json"))]
    assert "tokenizer_config.json" in files
    assert (tmp_path / "copy" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    saved = {k: v for path in (tmp_path / "copy").glob("*.safetensors") for k, v in load_file(path).items()}
    expected = weights_of(name)
    assert saved.keys() == expected.keys()
    assert all(saved[key].dtype == value.dtype and torch.equal(saved[key], value) for key, value in expected.items())


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_embeddings(tmp_path: Path, bits: int) -> None:
    """The variant of the first generation whose embedding is quantized too, stored again as the output layer."""
    folder = folder_of(tmp_path / "qe", f"chatglm_int{bits}", quantization_embeddings=True)
    weights = weights_of(f"chatglm_int{bits}")
    packed = get_format(f"chatglm-int{bits}").quantize(weights["transformer.word_embeddings.weight"])
    for key in ("transformer.word_embeddings.weight", "lm_head.weight"):
        weights[key], weights[f"{key}_scale"] = packed.parts[0].clone(), packed.parts[1].clone()
    write_weights(folder, weights)
    model = load(folder)
    assert isinstance(model.get_input_embeddings(), QuantizedEmbedding)
    assert model.get_input_embeddings().packed_weight is model.get_output_embeddings().packed_weight
    assert model.qgraft.info.notes == ("the folder has no vocabulary file (ice_text.model), so there is no tokenizer",)
    plain = {
        key: value
        for key, value in weights.items()
        if not key.endswith(("embeddings.weight_scale", "head.weight_scale"))
    }
    for key in ("transformer.word_embeddings.weight", "lm_head.weight"):
        plain[key] = dequantize(packed, torch.float32)
    twin = folder_of(tmp_path / "twin", f"chatglm_int{bits}")
    write_weights(twin, plain)
    ids = load_file(GOLDEN / "chatglm_int4" / "io.safetensors")["single.input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, load(twin)(ids).logits, atol=1e-5, rtol=0)
    save(model, tmp_path / "copy")
    saved = load_file(tmp_path / "copy" / "model.safetensors")
    assert saved.keys() == weights.keys()
    assert all(torch.equal(saved[key], value) for key, value in weights.items())


def test_an_untied_output_layer(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", "chatglm_fp32", tie_word_embeddings=False)
    weights = weights_of("chatglm_fp32")
    weights["lm_head.weight"] = weights["lm_head.weight"] * 2
    write_weights(folder, weights)
    logits, expected = golden_logits(load(folder), "chatglm_fp32")
    torch.testing.assert_close(logits, expected * 2, atol=2e-4, rtol=0)


def test_a_tied_output_layer_of_the_second_generation(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", "chatglm2_fp32", tie_word_embeddings=True)
    weights = weights_of("chatglm2_fp32")
    del weights["transformer.output_layer.weight"]
    write_weights(folder, weights)
    model = load(folder)
    assert model.get_output_embeddings().packed_weight is model.get_input_embeddings().packed_weight


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_no_code_of_the_folder_runs(tmp_path: Path, generation: str, layout: str) -> None:
    modules = ("configuration_chatglm", "modeling_chatglm", "tokenization_chatglm", "quantization")
    auto_map = {
        "AutoConfig": f"{modules[0]}.ChatGLMConfig",
        "AutoModel": f"{modules[1]}.ChatGLMForConditionalGeneration",
        "AutoModelForCausalLM": f"{modules[1]}.ChatGLMForConditionalGeneration",
    }
    folder = folder_of(tmp_path / "m", f"{generation}_int4", layout, auto_map=auto_map, architectures=["ChatGLMModel"])
    canary = tmp_path / "executed"
    for module in (*modules, "__init__"):
        (folder / f"{module}.py").write_text(f"open({str(canary)!r}, 'w').close()")
    tokenizer = {"tokenizer_class": "ChatGLMTokenizer", "auto_map": {"AutoTokenizer": [f"{modules[2]}.T", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    model, none = qgraft.load(folder, device="cpu")
    torch.testing.assert_close(*golden_logits(model, f"{generation}_int4"), atol=1e-4, rtol=0)
    assert none is None
    save(model, tmp_path / "copy")
    assert not canary.exists()
    assert not list((tmp_path / "copy").glob("*.py"))


def test_the_third_generation_has_the_seconds_layout(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", "chatglm2_int4", _name_or_path="THUDM/chatglm3-6b")
    (folder / "tokenizer.model").write_bytes(b"")
    with pytest.raises(CheckpointError, match="not a sentencepiece file"):
        load_folder(folder, torch.float32)
    (folder / "tokenizer.model").unlink()
    model, tokenizer = load_folder(folder, torch.float32)
    assert tokenizer is None
    torch.testing.assert_close(*golden_logits(model, "chatglm2_int4"), atol=1e-4, rtol=0)


def spoil(folder: Path, key: str, value: Tensor | None) -> None:
    weights = load_file(folder / "model.safetensors")
    weights = {k: v for k, v in weights.items() if k != key} | ({} if value is None else {key: value})
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def configure(folder: Path, **values: Any) -> None:
    config = {**json.loads((folder / "config.json").read_text()), **values}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


QKV = LAYER["chatglm2"]
BROKEN: dict[str, tuple[Callable[[Path], None], type[Exception], str]] = {
    "no scale": (lambda f: spoil(f, f"{QKV}.weight_scale", None), CheckpointError, "weight_scale is missing beside"),
    "scales of another layer": (
        lambda f: spoil(f, f"{QKV}.weight_scale", torch.ones(64).half()), CheckpointError, r"weight_scale: got .*\[64\]"
    ),
    "a scale of zero": (
        lambda f: spoil(f, f"{QKV}.weight_scale", torch.arange(128).half()), CheckpointError, r"got 0 for 1 rows .*row 0"
    ),
    "a scale NaN": (
        lambda f: spoil(f, f"{QKV}.weight_scale", torch.full((128,), torch.nan)), CheckpointError, "NaN or infinity"
    ),
    "odd in_features": (
        lambda f: configure(f, hidden_size=63, kv_channels=16, num_attention_heads=4), CheckpointError, "63 inputs are odd"
    ),
    "missing key": (
        lambda f: spoil(f, f"{QKV}.bias", None), CheckpointError, rf"missing {QKV}\.bias \[128\]"
    ),
    "unexpected key": (
        lambda f: spoil(f, "transformer.extra.weight", torch.ones(2)), CheckpointError, "unexpected transformer.extra.weight"
    ),
    "neither generation": (
        lambda f: configure(f, ffn_hidden_size=None), UnsupportedError, "(?s)unknown variant.*inner_hidden_size"
    ),
    "impossible sizes": (lambda f: configure(f, multi_query_group_num=3), CheckpointError, "multi_query_group_num"),
    "a number of text": (lambda f: configure(f, hidden_size="x"), CheckpointError, "hidden_size|str"),
    "8 bits said": (lambda f: configure(f, quantization_bit=8), CheckpointError, "4 bits a weight, but .*quantization_bit=8"),
    "a vocabulary of text": (
        lambda f: (f / "tokenizer.model").write_text("no sentencepiece"), CheckpointError, r"tokenizer\.model"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders(tmp_path: Path, case: str) -> None:
    change, kind, message = BROKEN[case]
    folder = folder_of(tmp_path / "m", "chatglm2_int4")
    change(folder)
    with pytest.raises(kind, match=message):
        load(folder)


def test_all_missing_and_unexpected_keys_are_listed(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", "chatglm_int4")
    weights = {
        f"model.{key}" if ".layers.1." in key else key: value for key, value in weights_of("chatglm_int4").items()
    }
    renamed = sorted(key for key in weights if key.startswith("model."))
    write_weights(folder, weights)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    lines = [line.strip() for line in str(caught.value).splitlines()]
    wanted = [key for key in renamed if not key.endswith("inv_freq")]
    assert [f"unexpected {key}" for key in wanted] == [line for line in lines if line.startswith("unexpected")]
    missing = [line.split()[1] for line in lines if line.startswith("missing")]
    assert sorted(missing) == [k.removeprefix("model.") for k in wanted if not k.endswith("_scale")]


def test_quantize_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    model = load(folder_of(tmp_path / "m", "chatglm2_fp32"))
    with pytest.raises(UnsupportedError, match="q2_k can be read but not written"):
        quantize(model, "q2_k")
    before = model.qgraft.info
    notes = quantize(model, "q4_k")
    assert len(notes) == 2
    assert all("q5_0, as llama.cpp does it, not q4_k" in note and "no multiple of 256" in note for note in notes)
    assert model.qgraft.info.formats.keys() == {*before.formats, "q5_0"}
    qgraft.attach_lora(model)
    with pytest.raises(AdapterError, match="default is on the model"):
        quantize(model, "chatglm-int4")


def test_quantize_takes_any_model_of_torch() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4, bias=False))
    x, expected = torch.randn(3, 8), [get_format("chatglm-int8").quantize(layer.weight) for layer in model]
    bias = model[0].bias
    quantize(model, "chatglm-int8")
    assert [torch.equal(layer.packed.parts[0], each.parts[0]) for layer, each in zip(model, expected, strict=True)] == [
        True
    ] * 2
    w = [dequantize(each, torch.float32) for each in expected]
    torch.testing.assert_close(model(x), (x @ w[0].T + bias) @ w[1].T)


def test_a_folder_is_not_changed_by_what_is_done_to_its_model(tmp_path: Path) -> None:
    """Weights are mapped: writing into them must not reach the file."""
    folder = folder_of(tmp_path / "m", "chatglm2_int4", "bin")
    before = (folder / "pytorch_model.bin").read_bytes()
    model = load(folder)
    for layer in linears(model).values():
        layer.packed.parts[0].zero_()
    assert (folder / "pytorch_model.bin").read_bytes() == before
    shutil.rmtree(folder)
