"""PEFT's adapters on the embedding and the output layer, with the copies of the base that it puts beside them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import qgraft
from qgraft.adapter_files.combine import combine_files
from qgraft.adapter_files.folder import WEIGHTS, load_adapter, save_adapter
from qgraft.adapter_files.gguf_lora import export_gguf_lora
from qgraft.adapter_files.peft_config import unknown_note
from qgraft.adapters.attach import attach_layers, detach_adapter
from qgraft.adapters.choose import adapters_off, use_adapter
from qgraft.adapters.lora import LoraConfig
from qgraft.adapters.states import lora_state_dict
from qgraft.checkpoints.gguf_file import read_gguf
from qgraft.checkpoints.gguf_model import gguf_config, load_gguf
from qgraft.errors import AdapterError, OptionError, UnsupportedError
from qgraft.linear import QuantizedEmbedding
from qgraft.passes.decoding import fast_decoding

Maker = Callable[..., Any]
TABLE, HEAD = "model.embed_tokens", "lm_head"
CASES = {  # architecture, tied, target_modules
    "head": ("llama", False, ["q_proj", "lm_head"]),
    "tied head": ("qwen2", True, ["q_proj", "lm_head"]),
    "table": ("llama", False, ["embed_tokens", "v_proj"]),
    "tied table": ("qwen2", True, ["embed_tokens", "v_proj"]),
    "table alone": ("llama", False, ["embed_tokens"]),
    "both": ("llama", False, ["embed_tokens", "lm_head", "up_proj"]),
    "scaled table": ("gemma2", True, ["embed_tokens", "v_proj"]),
    "scaled table, tied head": ("gemma2", True, ["embed_tokens", "lm_head"]),
    "words and positions": ("gpt2", True, ["wte", "wpe", "c_attn"]),
}


def logits(model: nn.Module, ids: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **options).logits.float()


def close(got: Tensor, expected: Tensor) -> bool:
    return float((got - expected).abs().max()) < 1e-4 * float(expected.abs().max())


def load_base(tiny: Any) -> PreTrainedModel:
    return load_gguf(tiny.path, torch.float32)[0]


def load_float(tiny: Any) -> PreTrainedModel:
    config = gguf_config(read_gguf(tiny.path))  # transformers' own reader passes over the scale of Gemma's attention
    told = {"config": config, "dtype": torch.float32, "attn_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(tiny.path.parent, gguf_file=tiny.path.name, **told).eval()


def by_peft(tiny: Any, folder: Path, targets: list[str], seed: int = 1, **options: Any) -> peft.PeftModel:
    config = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", target_modules=targets, **options)
    model = peft.get_peft_model(load_float(tiny), config).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    return model


def change(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    state = load_file(folder / WEIGHTS)
    edit(state)
    save_file(state, folder / WEIGHTS, {"format": "pt"})


@pytest.mark.spread(3)
@pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
@pytest.mark.parametrize("case", CASES)
def test_the_logits_are_pefts(tiny_gguf: Maker, tmp_path: Path, random_ids: Maker, case: str) -> None:
    architecture, tied, targets = CASES[case]
    tiny = tiny_gguf(architecture, tied=tied)
    theirs = by_peft(tiny, tmp_path / "theirs", targets)
    assert any("base_layer" in key or "embed" in key for key in load_file(tmp_path / "theirs" / WEIGHTS))
    model = load_base(tiny)
    ids = random_ids(model)
    base = logits(model, ids)
    report = load_adapter(model, tmp_path / "theirs", "a")
    expected = logits(theirs, ids)
    assert report.applied == report.total and len(report.notes) == 1  # that it has no seal
    assert close(logits(model, ids), expected) and not close(base, expected)
    with adapters_off(model):
        assert torch.equal(logits(model, ids), base)

    save_adapter(model, tmp_path / "ours", "a")
    load_adapter(model, tmp_path / "ours", "b")
    state = lora_state_dict(model, "a")
    assert all(torch.equal(value, state[key]) for key, value in lora_state_dict(model, "b").items())
    read_back = peft.PeftModel.from_pretrained(load_float(tiny), tmp_path / "ours").eval()
    assert close(logits(read_back, ids), expected)
    detach_adapter(model)
    assert torch.equal(logits(model, ids), base)
    assert not any("Lora" in type(module).__name__ for module in model.modules())


@pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
def test_rows_with_adapters_of_their_own_and_mixtures(tiny_gguf: Maker, tmp_path: Path, random_ids: Maker) -> None:
    tiny = tiny_gguf("llama")
    expected = {}
    model = load_base(tiny)
    ids = random_ids(model)[:1]
    for seed, name in enumerate(("a", "b")):
        theirs = by_peft(tiny, tmp_path / name, ["embed_tokens", "q_proj"], seed)
        load_adapter(model, tmp_path / name, name)
        expected[name] = logits(theirs, ids)
    both = logits(model, ids.repeat(2, 1), adapter_names=["a", "b"])
    assert close(both[:1], expected["a"]) and close(both[1:], expected["b"])
    qgraft.combine(model, {"a": 0.5, "b": 0.25}, "c")
    combined = logits(model, ids)
    use_adapter(model, {"a": 0.5, "b": 0.25})
    assert close(logits(model, ids), combined)
    combine_files({tmp_path / "a": 0.5, tmp_path / "b": 0.25}, tmp_path / "c", force=True)
    detach_adapter(model)
    load_adapter(model, tmp_path / "c")
    assert close(logits(model, ids), combined)


@pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
def test_generating_is_pefts(tiny_gguf: Maker, tmp_path: Path, random_ids: Maker) -> None:
    """Decoding in C takes no adapted embedding: it must hand the work over, not pass the adapter by."""
    tiny = tiny_gguf("llama")
    theirs = by_peft(tiny, tmp_path / "theirs", ["embed_tokens", "q_proj"])
    model = load_base(tiny)
    ids = random_ids(model)[:1]
    load_adapter(model, tmp_path / "theirs")
    told = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    with fast_decoding(model):
        got = model.generate(ids, **told)
    assert torch.equal(got, theirs.generate(ids, **told))


@pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
def test_it_can_be_trained_further(tiny_gguf: Maker, tmp_path: Path, random_ids: Maker) -> None:
    tiny = tiny_gguf("llama")
    theirs = by_peft(tiny, tmp_path / "theirs", ["embed_tokens", "q_proj"])
    model = load_base(tiny)
    ids = random_ids(model)
    load_adapter(model, tmp_path / "theirs")
    model(ids, labels=ids).loss.backward()
    theirs(ids, labels=ids).loss.backward()
    expected = {name.replace(".default", ""): p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    layer = model.get_submodule(TABLE).loras["default"]
    for part in "AB":
        grad = expected[f"base_model.model.{TABLE}.lora_embedding_{part}"]
        assert close(getattr(layer, f"lora_{part}").grad, grad)


@pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
def test_copies_of_another_base_are_a_difference(tiny_gguf: Maker, tmp_path: Path) -> None:
    tiny = tiny_gguf("llama")
    by_peft(tiny, tmp_path / "theirs", ["q_proj", "lm_head"])
    key = f"base_model.model.{HEAD}.base_layer.weight"
    copy = load_file(tmp_path / "theirs" / WEIGHTS)[key]

    def refused(new: Tensor, words: str) -> None:
        change(tmp_path / "theirs", lambda state: state.update({key: new}))
        model = load_base(tiny)
        with pytest.raises(AdapterError, match=words):
            load_adapter(model, tmp_path / "theirs")
        assert load_adapter(model, tmp_path / "theirs", force=True).applied > 0

    refused(torch.cat([copy, copy[:1]]), "was its vocabulary extended?")
    refused(torch.randn_like(copy), "another than this base's")
    change(tmp_path / "theirs", lambda state: state.update({key: (copy * (1 + 0.01 * torch.randn_like(copy)))}))
    assert len(load_adapter(load_base(tiny), tmp_path / "theirs").notes) == 1  # as near as rounding to a few bits is
    change(tmp_path / "theirs", lambda state: state.update({f"base_model.model.{HEAD}2.weight": state.pop(key)}))
    with pytest.raises(AdapterError, match=f"a weight of {HEAD}2, which the model does not have"):
        load_adapter(load_base(tiny), tmp_path / "theirs")


@pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
def test_a_lora_of_the_wrong_kind_of_layer(tiny_gguf: Maker, tmp_path: Path) -> None:
    tiny = tiny_gguf("llama")
    by_peft(tiny, tmp_path / "theirs", ["embed_tokens", "q_proj"])
    table = f"base_model.model.{TABLE}.lora_embedding_"
    change(
        tmp_path / "theirs",
        lambda state: state.update({f"base_model.model.{TABLE}.lora_{p}.weight": state.pop(table + p) for p in "AB"}),
    )
    with pytest.raises(AdapterError, match="got the LoRA of a linear layer, and the model has an embedding there"):
        load_adapter(load_base(tiny), tmp_path / "theirs")


@pytest.mark.filterwarnings("ignore::UserWarning:peft.*")
def test_what_cannot_hold_it_refuses_it(tiny_gguf: Maker, tmp_path: Path) -> None:
    tiny = tiny_gguf("llama")
    by_peft(tiny, tmp_path / "theirs", ["embed_tokens", "q_proj"])
    model, _ = qgraft.load(str(tiny.path), device="cpu")
    load_adapter(model, tmp_path / "theirs")
    before = model.get_submodule(TABLE).base.packed_weight.get().parts[0].clone()
    with pytest.raises(UnsupportedError, match=f"{TABLE} is the embedding"):
        qgraft.merge(model, calibration=[{"instruction": "x", "output": "y"}] * 4)
    with pytest.raises(AdapterError, match="a LoRA on the embedding, which a GGUF-LoRA of qgraft does not hold"):
        export_gguf_lora(model, tmp_path / "lora.gguf")
    assert torch.equal(model.get_submodule(TABLE).base.packed_weight.get().parts[0], before)
    assert not (tmp_path / "lora.gguf").exists()
    use_adapter(model, None)
    qgraft.save(model, tmp_path / "same.gguf")
    assert isinstance(load_gguf(tmp_path / "same.gguf", torch.float32)[0].get_submodule(TABLE), QuantizedEmbedding)


OTHERS: dict[str, dict[str, Any]] = {
    "use_dora": {"target_modules": ["embed_tokens"], "use_dora": True},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "lora_bias": {"target_modules": ["q_proj"], "lora_bias": True},
}


@pytest.mark.parametrize("key", OTHERS)
def test_other_kinds_are_refused_with_what_to_do(tiny_gguf: Maker, tmp_path: Path, key: str) -> None:
    tiny = tiny_gguf("qwen2")
    by_peft(tiny, tmp_path / "theirs", OTHERS[key].pop("target_modules"), **OTHERS[key])
    with pytest.raises(UnsupportedError, match=key) as caught:
        load_adapter(load_base(tiny), tmp_path / "theirs")
    assert "merge_and_unload" in str(caught.value)


def test_options_that_nobody_knows_are_told(tiny_gguf: Maker, tmp_path: Path) -> None:
    """PEFT warns of them and goes on; all that it knows itself is known, or refused."""
    tiny = tiny_gguf("qwen2")
    by_peft(tiny, tmp_path / "theirs", ["q_proj"])
    path = tmp_path / "theirs" / "adapter_config.json"
    config = json.loads(path.read_text())
    assert unknown_note(dict.fromkeys(peft.LoraConfig().to_dict() | config, 1)) == []
    path.write_text(json.dumps({**config, "use_gate": True, "gate_alpha": 3, "off": False, "empty": [], "none": None}))
    loaded = load_adapter(load_base(tiny), tmp_path / "theirs")
    (note,) = [note for note in loaded.notes if "unknown" in note]
    assert note == "adapter_config.json: unknown options, which are not gone by: use_gate, gate_alpha"


def test_another_chat_template_beside_the_adapter_is_told(tiny_gguf: Maker, tmp_path: Path) -> None:
    """As TRL and LLaMA-Factory leave it there, in the file of its own or in the tokenizer's options."""
    tiny = tiny_gguf("qwen2")
    by_peft(tiny, tmp_path / "theirs", ["q_proj"])
    own = qgraft.load(str(tiny.path), device="cpu")[1]

    def noted() -> list[str]:
        model, _ = qgraft.load(str(tiny.path), device="cpu")
        return [note for note in load_adapter(model, tmp_path / "theirs").notes if "chat template" in note]

    assert noted() == []
    own.save_pretrained(tmp_path / "theirs")
    assert (tmp_path / "theirs" / "chat_template.jinja").is_file() and noted() == []
    own.chat_template = "{{ messages[0].content }}"
    own.save_pretrained(tmp_path / "theirs")
    (note,) = noted()
    assert "(chat_template.jinja)" in note and str(tmp_path / "theirs" / "chat_template.jinja") in note
    (tmp_path / "theirs" / "chat_template.jinja").unlink()
    for stored in ("{{ messages[0].content }}", [{"name": "default", "template": "other"}], {"default": "other"}):
        (tmp_path / "theirs" / "tokenizer_config.json").write_text(json.dumps({"chat_template": stored}))
        assert "(tokenizer_config.json)" in noted()[0]


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".safetensors"])
def test_a_state_dict_comes_back(tiny_gguf: Maker, tmp_path: Path, random_ids: Maker, suffix: str) -> None:
    """torch.save(lora_state_dict(model), "lora.pt") of the tutorials holds no alpha: it is asked for, never made up."""
    tiny = tiny_gguf("llama")
    model = load_base(tiny)
    attach_layers(model, "a", {"model.layers.0.mlp.up_proj": LoraConfig(4, 24), HEAD: LoraConfig(2, 24)})
    with torch.no_grad():
        for tensor in (state := lora_state_dict(model)).values():
            tensor.normal_(0, 0.1)
    ids = random_ids(model)
    expected, file = logits(model, ids), tmp_path / f"lora{suffix}"
    state = {key: tensor.clone() for key, tensor in state.items()}
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    again = load_base(tiny)
    with pytest.raises(AdapterError, match=r"by which lora_alpha is it scaled\?.*\n.*lora_alpha=16"):
        load_adapter(again, file)
    assert load_adapter(again, file, lora_alpha=24).applied == 2
    assert torch.equal(logits(again, ids), expected)
    with torch.no_grad():
        for tensor in lora_state_dict(again).values():
            tensor.zero_()
    qgraft.load_lora_state_dict(again, state)
    assert torch.equal(logits(again, ids), expected)


def test_a_state_dict_that_does_not_fit_changes_nothing(tiny_gguf: Maker) -> None:
    model = load_base(tiny_gguf("llama"))
    attach_layers(model, "a", {"model.layers.0.mlp.up_proj": LoraConfig(4, 24)})
    own = lora_state_dict(model)
    before = {key: tensor.clone() for key, tensor in own.items()}
    (a, A), (b, B) = own.items()
    other = {a: A + 1, b: B[:-1], "x": A}
    with pytest.raises(AdapterError, match=r"expected floats \[.*\]\n  unexpected tensor x"):
        qgraft.load_lora_state_dict(model, other)
    with pytest.raises(AdapterError, match=f"missing tensor {b}"):
        qgraft.load_lora_state_dict(model, {a: A})
    with pytest.raises(AdapterError, match="NaN or infinity"):
        qgraft.load_lora_state_dict(model, {a: A * torch.nan, b: B})
    assert all(torch.equal(tensor, before[key]) for key, tensor in lora_state_dict(model).items())


def test_the_file_of_weights_stands_for_its_folder(tiny_gguf: Maker, tmp_path: Path) -> None:
    model = load_base(tiny_gguf("llama"))
    attach_layers(model, "a", {"model.layers.0.mlp.up_proj": LoraConfig(4, 24)})
    save_adapter(model, tmp_path / "a")
    assert load_adapter(model, tmp_path / "a" / WEIGHTS, "b").applied == 1
    with pytest.raises(OptionError, match="has options of its own"):
        load_adapter(model, tmp_path / "a", "c", lora_alpha=8)


ROWS: dict[str, tuple[str, bool, Any]] = {
    "there": ("llama", False, [3, 5]),
    "new": ("llama", False, {"embed_tokens": [5, 294], "lm_head": [294, 5]}),
    "new, of the input alone": ("llama", False, [5, 294]),  # the output layer's is in the copy of it
    "new, tied": ("qwen2", True, [5, 294]),
}


@pytest.mark.slow
@pytest.mark.parametrize("key", ROWS)
def test_rows_of_tokens_with_the_copies_of_a_resized_model(tiny_gguf: Maker, tmp_path: Path, key: str) -> None:
    architecture, tied, indices = ROWS[key]
    tiny = tiny_gguf(architecture, tied=tied)
    theirs = load_float(tiny)
    if key != "there":
        theirs.resize_token_embeddings(295)
    options = {"target_modules": ["q_proj"], "trainable_token_indices": indices, "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(theirs, peft.LoraConfig(r=4, **options)).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.2)
    model.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    ours = load_base(tiny)
    load_adapter(ours, tmp_path / "theirs")
    ids = torch.tensor([[3, 5, 7, 5 if key == "there" else 294]])
    assert close(logits(ours, ids), logits(model, ids))
    change(tmp_path / "theirs", lambda state: state.update({
        name: tensor + 1 for name, tensor in state.items() if name.endswith("base_layer.weight")
    }))  # fmt: skip
    with pytest.raises(AdapterError, match="another than this base's"):
        load_adapter(load_base(tiny), tmp_path / "theirs")
