"""load_folder: folders written by transformers, against transformers models with the same (dequantized) weights."""

import copy
import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from qgraft.checkpoints import folder_model
from qgraft.checkpoints.folder_model import load_folder
from qgraft.checkpoints.shards import INDEX
from qgraft.errors import CheckpointError, UnsupportedError
from qgraft.formats import dequantize, quantize
from qgraft.linear import QuantizedEmbedding, QuantizedLinear

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
QUANTIZED = ["q4_1", "q8_0", "chatglm-int8", "chatglm-int4"]
Maker = Callable[..., Any]


def tiny_llama(**options: Any) -> LlamaForCausalLM:
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        **{**shape, "num_key_value_heads": 2, "vocab_size": 100, "tie_word_embeddings": False, **options}
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape) * (0.15 if parameter.dim() == 2 else 0.2) + (parameter.dim() == 1))
    return model


def save(folder: Path, model: PreTrainedModel, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    model.to(dtype).save_pretrained(folder, **options)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tmp_path / "tiny", tiny_llama())


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits.float()


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.spread(5)
@pytest.mark.parametrize("quantized", [None, *QUANTIZED])
@pytest.mark.parametrize("stored", DTYPES)
def test_weights_and_logits(tmp_path: Path, random_ids: Maker, stored: str, quantized: str | None) -> None:
    source = tiny_llama()
    folder = save(tmp_path / "tiny", source, DTYPES[stored])
    model, tokenizer = load_folder(folder, torch.float32, quantized)
    assert tokenizer is None
    linears = [path for path, m in source.named_modules() if isinstance(m, nn.Linear) and path != "lm_head"]
    assert len(linears) == 14
    expecteds = {path: quantize(source.get_submodule(path).weight, quantized or stored) for path in linears}
    source = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
    for path, expected in expecteds.items():
        packed = model.get_submodule(path).packed
        assert packed.format == (quantized or stored)
        assert all(torch.equal(*pair) for pair in zip(packed.parts, expected.parts, strict=True))
        source.get_submodule(path).weight.copy_(dequantize(expected, torch.float32))
    assert model.get_submodule("lm_head").packed.format == stored
    assert model.get_input_embeddings().packed_weight.format == stored
    ids = random_ids(source)
    assert relative(logits(model, ids), logits(source, ids)) < 1e-5
    numbers = sum(source.get_submodule(path).weight.numel() for path in linears)
    assert model.qgraft.info.formats == (
        {quantized: numbers, stored: 12800} if quantized else {stored: numbers + 12800}
    )
    assert model.qgraft.info.notes == ()
    assert (model.qgraft.info.container, model.qgraft.info.architecture) == ("folder", "llama")


def test_shards_are_one_checkpoint(tmp_path: Path, random_ids: Maker) -> None:
    source = tiny_llama()
    whole, parts = save(tmp_path / "whole", source), save(tmp_path / "parts", source, max_shard_size="40KB")
    assert len(list(parts.glob("*.safetensors"))) > 3
    assert (parts / INDEX).is_file()
    models = [load_folder(folder, torch.float32, "q4_1")[0] for folder in (whole, parts)]
    assert models[0].qgraft.info.fingerprint == models[1].qgraft.info.fingerprint
    ids = random_ids(source)
    assert torch.equal(logits(models[0], ids), logits(models[1], ids))


def test_tied_embeddings(tmp_path: Path, random_ids: Maker) -> None:
    source = tiny_llama(tie_word_embeddings=True)
    model, _ = load_folder(save(tmp_path / "tiny", source), torch.float32, "q8_0")
    assert isinstance(model.get_input_embeddings(), QuantizedEmbedding)
    assert model.get_output_embeddings().packed_weight is model.get_input_embeddings().packed_weight
    assert model.get_output_embeddings().packed_weight.format == "f32"


@pytest.mark.parametrize("quantized", [None, "q8_0"])
def test_conv1d_layers_are_stored_the_other_way_round(tmp_path: Path, random_ids: Maker, quantized: str | None) -> None:
    config = transformers.GPT2Config(
        n_embd=64, n_layer=2, n_head=4, vocab_size=100, n_positions=64, initializer_range=0.2
    )
    source = transformers.GPT2LMHeadModel(config).eval().requires_grad_(False)
    model, _ = load_folder(save(tmp_path / "gpt2", source), torch.float32, quantized)
    if quantized:
        for path, module in source.named_modules():
            if type(module).__name__ == "Conv1D":
                packed = quantize(module.weight.T.contiguous(), quantized)
                assert torch.equal(model.get_submodule(path).packed.parts[0], packed.parts[0])
                module.weight.copy_(dequantize(packed, torch.float32).T)
    ids = random_ids(source)
    assert relative(logits(model, ids), logits(source, ids)) < 1e-5


def test_source_tensors_are_released_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path / "tiny", tiny_llama(), torch.float16)
    opened = folder_model.open_shards
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def watched(read: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def watching() -> Tensor:
            nonlocal most
            gc.collect(0)
            most = max(most, sum(1 for ref in alive if ref() is not None))
            value = read()
            if value.dim() == 2:
                alive.append(weakref.ref(value))
            return value

        return watching

    monkeypatch.setattr(
        folder_model, "open_shards", lambda *args: {name: watched(read) for name, read in opened(*args).items()}
    )
    model, _ = load_folder(folder, torch.float32, "q4_1")
    assert len(alive) == 16
    assert most <= 1
    assert sum(1 for ref in alive if ref() is not None) == 0
    assert model.get_submodule("model.layers.0.mlp.up_proj").packed.format == "q4_1"


def test_width_without_whole_blocks_stays_float(tmp_path: Path, random_ids: Maker) -> None:
    source = tiny_llama(intermediate_size=72)
    model, _ = load_folder(save(tmp_path / "tiny", source), torch.float32, "q4_1")
    which = "2 matrices (model.layers.0.mlp.down_proj.weight, ...)"
    notes = (f"{which} stay in their format, not q4_1: 72 inputs are no multiple of 32",)
    assert model.qgraft.info.notes == notes
    for path, module in source.named_modules():
        if isinstance(module, nn.Linear) and path != "lm_head":
            layer = model.get_submodule(path)
            assert layer.packed.format == ("f32" if "down_proj" in path else "q4_1")
            module.weight.copy_(layer.dequantize())
    ids = random_ids(source)
    assert relative(logits(model, ids), logits(source, ids)) < 1e-5


def test_fingerprint(tmp_path: Path, folder: Path) -> None:
    copied = save(tmp_path / "copied", tiny_llama())
    prints = {q: load_folder(folder, torch.float32, q)[0].qgraft.info.fingerprint for q in (None, *QUANTIZED)}
    assert len(set(prints.values())) == 5
    assert load_folder(copied, torch.float32, "q4_1")[0].qgraft.info.fingerprint == prints["q4_1"]
    assert load_folder(copied, torch.bfloat16)[0].qgraft.info.fingerprint == prints[None]
    other = tiny_llama()
    other.get_submodule("model.layers.1.mlp.up_proj").weight[0, 0] += 1
    changed = save(tmp_path / "changed", other)
    assert load_folder(changed, torch.float32, "q4_1")[0].qgraft.info.fingerprint != prints["q4_1"]


def test_tensors_without_a_place_are_noted(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    extra = {"vision.weight": torch.ones(2, 32), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file({**weights, **extra}, folder / "model.safetensors", {"format": "pt"})
    assert load_folder(folder, torch.float32)[0].qgraft.info.notes == (
        "1 tensors of the folder have no place in the model: vision.weight",
    )


def test_tokenizer_of_the_folder(folder: Path, tiny_gguf: Maker) -> None:
    source = tiny_gguf("llama").path
    transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)
    _, tokenizer = load_folder(folder, torch.float32)
    assert tokenizer is not None
    assert tokenizer.decode(tokenizer("hello world").input_ids) == "hello world"


CODE = "from pathlib import Path\nPath(__file__).with_name('executed').write_text('x')\n"


def canary(folder: Path) -> None:
    """Every file of the folder that `trust_remote_code` would run leaves a marker."""
    for name in ("modeling_x", "configuration_x", "tokenization_x"):
        (folder / f"{name}.py").write_text(CODE.replace("with_name('executed')", f"parent.joinpath('executed-{name}')"))
    auto = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XModel"}
    edit_json(folder / "config.json", auto_map=auto)
    tokens = {"tokenizer_class": "XTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))


def test_code_in_the_folder_is_not_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    canary(folder)
    model, tokenizer = load_folder(folder, torch.float32)
    assert type(model) is LlamaForCausalLM
    assert tokenizer is None
    assert not list(folder.glob("executed*"))


def test_code_of_an_unknown_model_type_is_not_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    canary(folder)
    edit_json(folder / "config.json", model_type="x")
    with pytest.raises(UnsupportedError, match="model_type 'x'"):
        load_folder(folder, torch.float32)
    assert not list(folder.glob("executed*"))


def break_tokenizer(folder: Path) -> None:
    canary(folder)
    (folder / "tokenizer.json").write_text("{}")


def broken_merges(folder: Path) -> None:
    """The tokenizers package raises a plain Exception for these."""
    vocabulary = {"type": "BPE", "vocab": {"a": 0}, "merges": [["zz", "qq"]]}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": vocabulary}))


def in_shards(folder: Path, index: str) -> None:
    """The folder has the index, and its one file under a name that only an index makes known."""
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / INDEX).write_text(index)


BROKEN: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "already quantized": (
        lambda f: edit_json(f / "config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        UnsupportedError,
        "already quantized with 'gptq'",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), CheckpointError, "no config.json"),
    "config is not JSON": (lambda f: (f / "config.json").write_text("{"), CheckpointError, "config.json is not JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[1]"), CheckpointError, "config.json"),
    "config is not text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe{"), CheckpointError, "config.json"),
    "quantization is a list": (
        lambda f: edit_json(f / "config.json", quantization_config=[1]), CheckpointError, "config.json"
    ),
    "unknown type": (lambda f: edit_json(f / "config.json", model_type="lama"), UnsupportedError, "model_type 'lama'"),
    "layers below zero": (
        lambda f: edit_json(f / "config.json", num_hidden_layers=-1), CheckpointError, "num_hidden_layers: got -1, expected"
    ),
    "no layers": (
        lambda f: edit_json(f / "config.json", num_hidden_layers=0), CheckpointError, "num_hidden_layers: got 0, expected"
    ),
    "layers without end": (
        lambda f: edit_json(f / "config.json", num_hidden_layers=2**70), CheckpointError, "num_hidden_layers: got 1180591"
    ),
    "layers without end, under another name": (
        lambda f: edit_json(f / "config.json", text_config={"n_layer": 2**31}), CheckpointError, "n_layer: got 2147483648"
    ),
    "width of text": (lambda f: edit_json(f / "config.json", hidden_size="x"), CheckpointError, "hidden_size"),
    "heads that do not divide": (
        lambda f: edit_json(f / "config.json", num_attention_heads=3), CheckpointError, "number of attention heads"
    ),
    "no language model": (
        lambda f: edit_json(f / "config.json", model_type="vit"), UnsupportedError, "(?s)architecture 'vit'"
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), CheckpointError, r"expected \*\.safetensors or"),
    "weights cut off": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]),
        CheckpointError,
        r"model\.safetensors: ",
    ),
    "weights are text": (lambda f: (f / "model.safetensors").write_text("weights"), CheckpointError, r"model\.safetensors: "),
    "index is not JSON": (lambda f: in_shards(f, "{"), CheckpointError, "is not JSON"),
    "index is a list": (lambda f: in_shards(f, "[]"), CheckpointError, "got a JSON list, expected an object"),
    "index of lists": (
        lambda f: in_shards(f, '{"weight_map": {"a": ["b"]}}'), CheckpointError, "not an index of shards"
    ),
    "index of numbers": (
        lambda f: in_shards(f, '{"weight_map": {"a": 1}}'), CheckpointError, "not an index of shards"
    ),
    "shard missing": (
        lambda f: in_shards(f, '{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}'),
        CheckpointError,
        r"missing model-2\.safetensors",
    ),
    "shard outside": (
        lambda f: in_shards(f, '{"weight_map": {"a": "../outside.safetensors"}}'),
        CheckpointError,
        r"names files outside the folder: \.\./outside\.safetensors",
    ),
    "shard by absolute path": (
        lambda f: in_shards(f, '{"weight_map": {"a": "/etc/passwd"}}'), CheckpointError, "outside the folder"
    ),
    "shard with a backslash": (
        lambda f: in_shards(f, '{"weight_map": {"a": "..\\\\outside"}}'), CheckpointError, "outside the folder"
    ),
    "shard is the parent": (lambda f: in_shards(f, '{"weight_map": {"a": ".."}}'), CheckpointError, r"\.\."),
    "tokenizer with broken merges": (
        broken_merges, CheckpointError, "cannot build the tokenizer: "
    ),
    "tokenizer broken": (break_tokenizer, CheckpointError, "tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders(folder: Path, case: str) -> None:
    spoil, kind, message = BROKEN[case]
    save_file({"a": torch.ones(1)}, folder.parent / "outside.safetensors")
    spoil(folder)
    with pytest.raises(kind, match=message):
        load_folder(folder, torch.float32)
    assert not list(folder.glob("executed*"))


def test_all_problems_of_the_weights_at_once(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"], weights["model.norm.weight"]
    weights["model.layers.1.mlp.down_proj.weight"] = torch.ones(64, 96)
    weights["model.layers.1.input_layernorm.weight"] = torch.ones(63)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        load_folder(folder, torch.float32, "q4_1")
    lines = sorted(line.strip() for line in str(caught.value).splitlines()[1:])
    assert lines == [
        "missing model.layers.0.mlp.up_proj.weight [128, 64]",
        "missing model.norm.weight [64]",
        "model.layers.1.input_layernorm.weight: got shape [63], expected [64]",
        "model.layers.1.mlp.down_proj.weight: got shape [64, 96], expected [64, 128]",
    ]


def test_weights_of_other_dtypes_are_refused(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] = torch.ones(128, 64, dtype=torch.int16)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        UnsupportedError, match=r"up_proj\.weight: dtype torch\.int16; expected float32, float16 or bfloat16"
    ):
        load_folder(folder, torch.float32)


def test_nan_weights_are_named(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedError, match="1 of 8192 weights NaN") as caught:
        load_folder(folder, torch.float32, "q4_1")
    assert "up_proj" in str(caught.value)


@pytest.mark.parametrize(("name", "message"), [("q2_k", "read but not written"), ("q4_2", "(?s)unknown format.*q4_1")])
def test_formats_that_cannot_be_written(folder: Path, name: str, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        load_folder(folder, torch.float32, name)


def test_loaded_linears_are_quantized_modules(folder: Path) -> None:
    model, _ = load_folder(folder, torch.float32)
    assert not [path for path, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)]
    assert isinstance(model.get_output_embeddings(), QuantizedLinear)


ENCODER = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
ENCODERS = {
    "roberta": (transformers.RobertaConfig(**ENCODER), {"is_decoder": True}),
    "xlm": (transformers.XLMConfig(vocab_size=50, emb_dim=16, n_layers=1, n_heads=2), {"causal": True}),
    "bert-generation": (transformers.BertGenerationConfig(**ENCODER), {"is_decoder": True}),
}


@pytest.mark.parametrize(
    "config",
    [
        transformers.BigBirdConfig(**ENCODER, attention_type="original_full", is_decoder=True),
        transformers.RoFormerConfig(**ENCODER, embedding_size=16, is_decoder=True),
        transformers.XLNetConfig(vocab_size=50, d_model=16, n_layer=1, n_head=2, d_inner=24),
        transformers.CpmAntConfig(vocab_size=50, hidden_size=16, num_attention_heads=2, dim_head=8, dim_ff=24,
                                  num_hidden_layers=1),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
def test_a_model_that_reads_ahead_is_refused(tmp_path: Path, config: Any) -> None:
    """By its own pass; some do in old releases of transformers alone."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        one, other = model(torch.tensor([[7, 8, 9, 10], [7, 8, 9, 11]])).logits[:, 1]
    if torch.equal(one, other):
        load_folder(tmp_path, torch.float32)
    else:
        with pytest.raises(UnsupportedError, match="would see the answers"):
            load_folder(tmp_path, torch.float32)


@pytest.mark.parametrize("writes", [False, True])
@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder_is_no_decoder(tmp_path: Path, kind: str, writes: bool) -> None:
    """Refused is exactly a model that says other things of a token where another one follows it, by its own pass."""
    config, decodes = copy.deepcopy(ENCODERS[kind])
    for name, value in decodes.items():
        setattr(config, name, value if writes else False)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    ids = torch.tensor([[7, 8, 9, 10], [7, 8, 9, 11]])
    with torch.no_grad():
        one, other = model(ids).logits[:, 1]
    assert torch.equal(one, other) == writes
    if writes:
        assert torch.equal(logits(load_folder(tmp_path, torch.float32)[0], ids), logits(model, ids))
    else:
        with pytest.raises(UnsupportedError, match=f"{kind}: an encoder") as refused:
            load_folder(tmp_path, torch.float32)
        assert "SEQ_CLS" in str(refused.value.hint)
