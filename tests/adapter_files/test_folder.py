"""save_adapter and load_adapter: PEFT is the oracle of the numbers; whatever PEFT would swallow is refused and listed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from qgraft.adapter_files.combine import combine_files
from qgraft.adapter_files.folder import (
    CONFIG,
    WEIGHTS,
    load_adapter,
    read_peft_config,
    save_adapter,
)
from qgraft.adapter_files.seal import SEAL, read_seal
from qgraft.adapters.attach import attach_layers, attach_lora, detach_lora
from qgraft.adapters.base import adapter_names, find_adapter
from qgraft.adapters.choose import active_adapters
from qgraft.adapters.lora import LoraConfig
from qgraft.adapters.states import lora_state_dict
from qgraft.checkpoints.gguf_model import load_gguf
from qgraft.errors import AdapterError, OptionError, StorageError, UnsupportedError
from qgraft.json_files import covered_text
from qgraft.linear import QuantizedLinear
from qgraft.storage import describe_file

Maker = Callable[..., Any]
PREFIX = "base_model.model."
UP = "model.layers.1.mlp.up_proj"


def load_base(tiny: Any) -> PreTrainedModel:
    return load_gguf(tiny.path, torch.float32)[0]


def load_float(tiny: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny.path.parent, gguf_file=tiny.path.name, dtype=torch.float32).eval()


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits.float()


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def randomize(model: nn.Module) -> None:
    """Random values in every B, which start as zeros."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)


def with_adapter(tiny: Any, **options: Any) -> PreTrainedModel:
    model = load_base(tiny)
    attach_lora(model, **{"r": 4, "lora_alpha": 8, **options})
    randomize(model)
    return model


@pytest.fixture
def tiny(tiny_gguf: Maker) -> Any:
    return tiny_gguf("llama")


@pytest.fixture
def saved(tiny: Any, tmp_path: Path) -> Path:
    """A sealed adapter on all linear layers of the tiny llama."""
    save_adapter(with_adapter(tiny), tmp_path / "adapter")
    return tmp_path / "adapter"


def edit_json(path: Path, **values: Any) -> None:
    """Change values in a JSON file; a seal is sealed again."""
    changed = {**json.loads(path.read_text()), **values}
    path.write_text(covered_text(changed) if path.name == SEAL else json.dumps(changed))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of an adapter that has no seal any more."""
    (folder / SEAL).unlink()
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS, {"format": "pt"})


OPTIONS: dict[str, dict[str, Any]] = {
    "all linear layers": {},
    "rank-stabilized": {"use_rslora": True, "r": 3, "lora_alpha": 5},
    "two kinds of layers": {"target_modules": ["q_proj", "down_proj"]},
    "one layer": {"target_modules": ["model.layers.0.self_attn.q_proj"]},
    "regular expression": {"target_modules": r"model\.layers\.1\..*_proj"},
    "the output layer too": {"target_modules": "v_proj,lm_head"},
    "dropout": {"lora_dropout": 0.5},
    "fraction": {"lora_alpha": 0.5},
}


@pytest.mark.spread(3)
@pytest.mark.parametrize("case", OPTIONS)
def test_peft_computes_the_same(tiny: Any, tmp_path: Path, random_ids: Maker, case: str) -> None:
    model = with_adapter(tiny, **OPTIONS[case])
    save_adapter(model, tmp_path / "adapter")
    ids = random_ids(model)
    got = logits(model, ids)
    theirs = peft.PeftModel.from_pretrained(load_float(tiny), tmp_path / "adapter").eval()
    ours = set(find_adapter(model, "default").parts)
    wrapped = {path.removeprefix(PREFIX) for path, module in theirs.named_modules() if hasattr(module, "lora_A")}
    assert wrapped == ours
    assert relative(got, logits(theirs, ids)) < 1e-4
    assert relative(got, logits(load_base(tiny), ids)) > 1e-3


def test_saving_walks_the_modules_once(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, own, seen = with_adapter(tiny), nn.Module.named_children, []
    modules = {id(module) for module in model.modules()}

    def named_children(module: nn.Module) -> Any:
        seen.append(id(module))
        return own(module)

    monkeypatch.setattr(nn.Module, "named_children", named_children)
    monkeypatch.setattr(nn.Module, "named_modules", None)
    save_adapter(model, tmp_path / "adapter")
    assert 0 < len(seen) == len(set(seen)) <= len(modules)


@pytest.mark.parametrize("case", OPTIONS)
def test_round_trip_is_exact(tiny: Any, tmp_path: Path, random_ids: Maker, case: str) -> None:
    model = with_adapter(tiny, **OPTIONS[case])
    save_adapter(model, tmp_path / "adapter")
    again = load_base(tiny)
    report = load_adapter(again, tmp_path / "adapter", "mine")
    ids = random_ids(model)
    assert torch.equal(logits(again, ids), logits(model, ids))
    layers = len(find_adapter(model, "default").parts)
    assert str(report) == f"adapter mine: applied to {layers}/{layers} layers"
    assert (report.name, report.applied, report.total, report.notes) == ("mine", layers, layers, ())
    assert active_adapters(again) == {"mine": 1.0}
    config, loaded = (
        next(iter(find_adapter(m, n).parts.values())).config for m, n in ((model, "default"), (again, "mine"))
    )
    assert (loaded.r, loaded.lora_alpha, loaded.lora_dropout, loaded.use_rslora) == (
        config.r, config.lora_alpha, config.lora_dropout, config.use_rslora
    )  # fmt: skip


def test_a_second_save_writes_the_same_bytes(tiny: Any, saved: Path, tmp_path: Path) -> None:
    model = load_base(tiny)
    load_adapter(model, saved, "other")
    save_adapter(model, tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (saved / WEIGHTS).read_bytes()
    assert (tmp_path / "again" / CONFIG).read_bytes() == (saved / CONFIG).read_bytes()


PEFT_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "regular expression": {"target_modules": r".*\.1\.mlp\.(up|down)_proj"},
    "patterns": {
        "target_modules": ["q_proj", "up_proj", "down_proj"],
        "rank_pattern": {"up_proj": 2, r"layers\.0\.self_attn\.q_proj": 8},
        "alpha_pattern": {"down_proj": 32},
    },
    "stabilized patterns": {
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"up_proj": 2},
        "use_rslora": True,
    },
    "some layers": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "without some": {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["k_proj"]},
}


def peft_model(tiny: Any, **options: Any) -> peft.PeftModel:
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **options})
    model = peft.get_peft_model(load_float(tiny), config).eval()
    randomize(model)
    return model


@pytest.mark.spread(5)
@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("case", PEFT_OPTIONS)
def test_adapters_made_by_peft_load(tiny: Any, tmp_path: Path, random_ids: Maker, case: str, safe: bool) -> None:
    theirs = peft_model(tiny, **PEFT_OPTIONS[case])
    theirs.save_pretrained(tmp_path / "theirs", safe_serialization=safe)
    assert (tmp_path / "theirs" / (WEIGHTS if safe else "adapter_model.bin")).is_file()
    model = load_base(tiny)
    report = load_adapter(model, tmp_path / "theirs")
    layers = sum(hasattr(module, "lora_A") for module in theirs.modules())
    assert (report.applied, report.total) == (layers, layers)
    assert report.notes == (f"no {SEAL} beside it: which base it was trained on cannot be verified",)
    assert str(report).startswith(f"adapter default: applied to {layers}/{layers} layers\nno {SEAL}")
    ids = random_ids(model)
    assert relative(logits(model, ids), logits(theirs, ids)) < 1e-4
    assert relative(logits(model, ids), logits(load_base(tiny), ids)) > 1e-3
    save_adapter(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(load_float(tiny), tmp_path / "ours").eval()
    assert relative(logits(again, ids), logits(theirs, ids)) < 1e-4


def test_adapters_on_conv1d_layers(tiny_gguf: Maker, tmp_path: Path, random_ids: Maker) -> None:
    """PEFT sets fan_in_fan_out for them; A and B are the same matrices nevertheless."""
    tiny = tiny_gguf("gpt2")
    theirs = peft_model(tiny, target_modules=["c_attn"], fan_in_fan_out=True)
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_base(tiny)
    load_adapter(model, tmp_path / "theirs")
    ids = random_ids(model)
    assert relative(logits(model, ids), logits(theirs, ids)) < 1e-4


def test_everything_that_differs_is_listed_at_once(tiny: Any, tiny_gguf: Maker, saved: Path) -> None:
    state = load_file(saved / WEIGHTS)
    del state[f"{PREFIX}model.layers.0.mlp.up_proj.lora_B.weight"]
    for part in "AB":
        del state[f"{PREFIX}model.layers.0.self_attn.q_proj.lora_{part}.weight"]
    state[f"{PREFIX}{UP}.lora_A.weight"] = torch.ones(4, 63)
    state[f"{PREFIX}model.layers.1.self_attn.v_proj.lora_A.weight"][0, 0] = float("nan")
    state[f"{PREFIX}model.layers.7.mlp.up_proj.lora_A.weight"] = torch.ones(4, 64)
    state[f"{PREFIX}model.layers.7.mlp.up_proj.lora_B.weight"] = torch.ones(256, 4)
    state[f"{PREFIX}model.layers.1.mlp.gate_proj.lora_A.weight"] = torch.ones(2, 64)
    state[f"{PREFIX}model.layers.1.mlp.gate_proj.lora_B.weight"] = torch.ones(256, 2)
    state[f"{PREFIX}{UP}.lora_magnitude_vector"] = torch.ones(256)
    save_file(state, saved / WEIGHTS, {"format": "pt"})
    seal = json.loads((saved / SEAL).read_text())
    base = {**seal["base"], "fingerprint": "qg1:0", "source": "elsewhere.gguf"}
    files = {name: describe_file(saved / name) for name in seal["files"]}
    edit_json(saved / SEAL, files=files, base=base)
    model = load_base(tiny)
    with pytest.raises(AdapterError) as caught:
        load_adapter(model, saved)
    lines = str(caught.value).splitlines()
    assert sorted(line.strip() for line in lines[1:-1]) == sorted([
        f"unexpected tensor {PREFIX}{UP}.lora_magnitude_vector",
        f"missing tensor {PREFIX}model.layers.0.mlp.up_proj.lora_B.weight",
        f"trained on another base: qg1:0 (elsewhere.gguf), this one is {model.qgraft.info.fingerprint} ({tiny.path})",
        f"{UP}: got A [4, 63], B [256, 4], expected [4, 64], [256, 4]",
        "the model has no layer model.layers.7.mlp.up_proj",
        f"model.layers.1.mlp.gate_proj: rank 2, but {CONFIG} says r=4",
        "missing tensors of model.layers.0.mlp.up_proj",
        "missing tensors of model.layers.0.self_attn.q_proj",
        f"{PREFIX}model.layers.1.self_attn.v_proj.lora_A.weight: NaN or infinity",
    ])  # fmt: skip
    assert lines[0] == f"{saved} does not fit this model:"
    assert "force=True" in lines[-1]


def test_force_loads_what_fits_and_says_so(tiny: Any, saved: Path) -> None:
    def change(state: dict[str, Tensor]) -> None:
        state[f"{PREFIX}{UP}.lora_A.weight"] = torch.ones(4, 63)
        del state[f"{PREFIX}model.layers.0.mlp.up_proj.lora_B.weight"]

    edit_weights(saved, change)
    model = load_base(tiny)
    report = load_adapter(model, saved, force=True)
    assert (report.applied, report.total) == (12, 13)
    assert [note for note in report.notes if UP in note] == [
        f"forced although: {UP}: got A [4, 63], B [256, 4], expected [4, 64], [256, 4]"
    ]
    assert any("missing tensor" in note for note in report.notes)
    assert UP not in find_adapter(model, "default").parts
    state = load_file(saved / WEIGHTS)
    for key, tensor in lora_state_dict(model).items():
        assert torch.equal(tensor, state[key])


def test_force_on_another_base(tiny: Any, tiny_gguf: Maker, saved: Path) -> None:
    other = load_base(tiny_gguf("llama", seed=1))
    with pytest.raises(AdapterError, match="trained on another base: qg1:"):
        load_adapter(other, saved)
    report = load_adapter(other, saved, force=True)
    assert (report.applied, report.total) == (14, 14)
    assert len(report.notes) == 1
    assert report.notes[0].startswith("forced although: trained on another base")


def test_force_cannot_load_what_fits_nowhere(tiny_gguf: Maker, saved: Path) -> None:
    with pytest.raises(AdapterError, match="none of its 14 layers exists in this model"):
        load_adapter(load_base(tiny_gguf("gpt2")), saved, force=True)


def unsealed(change: Callable[[Path], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / SEAL).unlink()
        change(folder)

    return spoil


def options(**values: Any) -> Callable[[Path], None]:
    return unsealed(lambda folder: edit_json(folder / CONFIG, **values))


def weights_become(key: str, tensor: Tensor) -> Callable[[Path], None]:
    return lambda folder: edit_weights(folder, lambda state: state.update({PREFIX + key: tensor}))


def pickle_instead(value: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        torch.save(value, folder / "adapter_model.bin")

    return unsealed(spoil)


def flip_last_byte(folder: Path) -> None:
    raw = bytearray((folder / WEIGHTS).read_bytes())
    raw[-1] ^= 1
    (folder / WEIGHTS).write_bytes(raw)


class RunsCode:
    """Unpickling it would create the file `executed` in the current folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("executed", "w"))


REFUSED: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "edited weights": (flip_last_byte, AdapterError, rf"(?s)changed since it was saved:.*{WEIGHTS}: SHA-256 differs"),
    "edited options": (lambda f: edit_json(f / CONFIG, lora_alpha=99), AdapterError, f"(?s)changed since.*{CONFIG}"),
    "weights gone": (lambda f: (f / WEIGHTS).unlink(), AdapterError, f"(?s)changed since.*{WEIGHTS}: missing"),
    "weights and seal gone": (unsealed(lambda f: (f / WEIGHTS).unlink()), AdapterError, f"holds no {WEIGHTS}"),
    "options gone": (lambda f: (f / CONFIG).unlink(), AdapterError, f"holds no {CONFIG}"),
    "no folder": (shutil.rmtree, AdapterError, "no such file or folder"),
    "options not JSON": (lambda f: (f / CONFIG).write_text("{"), AdapterError, f"{CONFIG} is not JSON"),
    "options a list": (lambda f: (f / CONFIG).write_text("[]"), AdapterError, "got a JSON list, expected an object"),
    "seal not JSON": (lambda f: (f / SEAL).write_text("?"), AdapterError, f"{SEAL} is not JSON"),
    "seal not text": (lambda f: (f / SEAL).write_bytes(b"\xff"), AdapterError, f"{SEAL} is not JSON"),
    "seal without files": (lambda f: (f / SEAL).write_text("{}"), AdapterError, f"{SEAL} is not a seal"),
    "seal of numbers": (
        lambda f: edit_json(f / SEAL, files={WEIGHTS: 1, CONFIG: 1}), AdapterError, f"(?s)changed.*{WEIGHTS}: listed without"
    ),
    "seal of another kind of base": (lambda f: edit_json(f / SEAL, base="x"), AdapterError, f"{SEAL} is not a seal"),
    "weights not safetensors": (unsealed(lambda f: (f / WEIGHTS).write_text("x")), AdapterError, "header cannot be read"),
    "pickle that runs code": (pickle_instead(RunsCode()), AdapterError, "is refused: its pickle asks for"),
    "pickle of a list": (pickle_instead([1]), AdapterError, "expected a mapping of names to tensors"),
    "pickle of numbers": (pickle_instead({"a": 1}), AdapterError, "expected a mapping of names to tensors"),
    "NaN": (
        weights_become(f"{UP}.lora_A.weight", torch.full((4, 64), float("nan"))), AdapterError,
        rf"{UP}\.lora_A\.weight: NaN",
    ),
    "infinity": (
        weights_become(f"{UP}.lora_B.weight", torch.full((256, 4), float("inf"))), AdapterError,
        rf"{UP}\.lora_B\.weight: NaN or infinity",
    ),
    "number": (weights_become(f"{UP}.lora_A.weight", torch.tensor(1.0)), AdapterError, r"got A \[\]"),
    "integers": (weights_become(f"{UP}.lora_A.weight", torch.ones(4, 64, dtype=torch.int32)), AdapterError, "floating point"),
    "neither a linear layer nor an embedding": (
        lambda f: edit_weights(
            f, lambda s: s.update({f"{PREFIX}model.norm.lora_{part}.weight": torch.ones(4, 4) for part in "AB"})
        ),
        AdapterError,
        "model.norm is a LlamaRMSNorm, neither a linear layer nor an embedding",
    ),
    "DoRA without magnitudes": (
        options(use_dora=True), AdapterError, rf"missing tensor .*{UP}\.lora_magnitude_vector"
    ),
    "magnitudes of another size": (
        lambda f: (options(use_dora=True)(f), weights_become(f"{UP}.lora_magnitude_vector", torch.ones(3))(f)),
        AdapterError, rf"{UP}: got magnitudes \[3\] torch.float32, expected floats \[256\]"
    ),
    "bias": (options(bias="all"), UnsupportedError, "a LoRA with bias"),
    "several": (options(bias="all", modules_to_save=["lm_head"]), UnsupportedError, "with modules_to_save, bias"),
    "another kind": (
        options(peft_type="P_TUNING"), UnsupportedError, "peft_type 'P_TUNING'; supported: LORA, PREFIX_TUNING"
    ),
    "options of a prefix": (
        options(peft_type="PREFIX_TUNING"), AdapterError, "num_virtual_tokens: got None, expected a whole number"
    ),
    "PiSSA": (options(init_lora_weights="pissa_niter_4"), UnsupportedError, "init_lora_weights=pissa_niter_4"),
    "rank missing": (options(r=None), AdapterError, "r: got None, expected a whole number"),
    "alpha of text": (options(lora_alpha="8"), AdapterError, "lora_alpha: got '8', expected a number"),
    "patterns a list": (options(rank_pattern=[1]), AdapterError, "rank_pattern"),
    "patterns broken": (options(alpha_pattern={"(": 1}), AdapterError, "alpha_pattern"),
    "alpha of infinity": (options(lora_alpha=float("inf")), AdapterError, "Infinity is no JSON"),
    "alpha of 400 digits": (options(lora_alpha=10**400), AdapterError, "lora_alpha: got 1000.*expected a number"),
    "alpha true": (options(lora_alpha=True), AdapterError, "lora_alpha: got True"),
    "pattern of NaN": (options(rank_pattern={"q_proj": float("nan")}), AdapterError, "NaN is no JSON"),
    "pattern without end": (options(alpha_pattern={"(([a-z_.0-9]+)+)+!": 8}), AdapterError, "alpha_pattern: got"),
    "targets without end": (options(target_modules="(([a-z_.0-9]+)+)+!"), AdapterError, "target_modules: got"),
    "targets true": (options(target_modules=True), AdapterError, "target_modules: got True"),
    "targets that name other layers": (
        options(target_modules=["q_proj"]), AdapterError, r"k_proj: it has tensors, but target_modules does not name it"
    ),
    "nested deep": (
        unsealed(lambda f: (f / CONFIG).write_text('{"r": ' + "[" * 99_999 + "]" * 99_999 + "}")),
        AdapterError, "nested deeper",
    ),
    "a key twice": (unsealed(lambda f: (f / CONFIG).write_text('{"r": 4, "r": 8}')), AdapterError, "'r' stands twice"),
    "8-bit floats": (
        weights_become(f"{UP}.lora_A.weight", torch.ones(4, 64).to(torch.float8_e4m3fn)), AdapterError, "float8_e4m3fn"
    ),
    "pickle of numbered tensors": (pickle_instead({0: torch.ones(1)}), AdapterError, "0: its name is a int"),
    "pickle of sparse tensors": (pickle_instead({"a": torch.eye(2).to_sparse()}), AdapterError, "'a': torch.sparse_coo"),
    "pickle of a tensor that is not there": (
        pickle_instead({"a": torch.ones(1).expand(1 << 20, 1 << 20)}), AdapterError, "larger than the file"
    ),
    "seal of no base": (lambda f: edit_json(f / SEAL, base={}), AdapterError, "`base` has no fingerprint"),
    "seal of no files": (lambda f: edit_json(f / SEAL, files={}), AdapterError, "says nothing of adapter_config.json"),
    "seal edited": (
        lambda f: (f / SEAL).write_text((f / SEAL).read_text().replace("LoRA", "lora").replace('"lora"', '"Lora"')),
        AdapterError, f"{SEAL} changed since it was written"
    ),
    "other rank": (options(r=2), AdapterError, f"rank 4, but {CONFIG} says r=2"),
    "dropout": (options(lora_dropout=1.5), AdapterError, "lora_dropout"),
    "alpha of null": (options(lora_alpha=None), AdapterError, "lora_alpha: got None, expected a number"),
    "a rank of 19 digits": (options(r=2**63), AdapterError, "r: got 9223372036854775808, expected a whole number"),
    "a pattern that only stands alone": (
        options(rank_pattern={"(?x)q_proj #": 4}), AdapterError, "rank_pattern: got"
    ),
    "a list of layers that only stands alone": (
        options(layers_pattern="(?x)layers #", layers_to_transform=[0]), AdapterError, "layers_pattern: got"
    ),
    "more targets": (
        options(target_modules=["lm_head", "q_proj"]), AdapterError, "missing tensors of lm_head"
    ),
    "more targets by expression": (options(target_modules=".*"), AdapterError, "missing tensors of lm_head"),
}  # fmt: skip


def test_null_is_as_good_as_left_out(tiny: Any, saved: Path, tmp_path: Path, random_ids: Maker) -> None:
    """Of what may be left out; combining reads the same options."""
    expected, (model, ids) = load_base(tiny), (load_base(tiny), random_ids(load_base(tiny)))
    load_adapter(expected, saved)
    nulls = dict.fromkeys(
        ("lora_dropout", "use_rslora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "layers_to_transform",
         "layers_pattern", "exclude_modules", "modules_to_save", "use_dora", "init_lora_weights")
    )  # fmt: skip
    options(**nulls)(saved)
    load_adapter(model, saved)
    assert torch.equal(logits(model.train(), ids), logits(expected.eval(), ids))
    assert {each.lora_dropout for each in find_adapter(model).configs.values()} == {0.0}
    combine_files({saved: 1.0}, tmp_path / "combined", force=True)
    again = load_base(tiny)
    load_adapter(again, tmp_path / "combined")
    torch.testing.assert_close(
        logits(again, ids), logits(expected, ids), atol=1e-5, rtol=1e-5
    )  # alpha / r is in B then


@pytest.mark.spread(29)
@pytest.mark.parametrize("case", REFUSED)
def test_refused_and_the_model_is_unchanged(
    tiny: Any, saved: Path, random_ids: Maker, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    spoil, kind, message = REFUSED[case]
    spoil(saved)
    model = load_base(tiny)
    attach_lora(model, r=2, target_modules="q_proj", name="before")
    randomize(model)
    ids = random_ids(model)
    modules, expected = {path: id(m) for path, m in model.named_modules()}, logits(model, ids)
    with pytest.raises(kind, match=message):
        load_adapter(model, saved)
    assert {path: id(m) for path, m in model.named_modules()} == modules
    assert active_adapters(model) == {"before": 1.0}
    assert torch.equal(logits(model, ids), expected)
    assert not (tmp_path / "executed").exists()


def test_names(tiny: Any, saved: Path, tmp_path: Path) -> None:
    model = load_base(tiny)
    load_adapter(model, saved, "law")
    load_adapter(model, saved, "med")
    assert adapter_names(model) == ["law", "med"]
    with pytest.raises(AdapterError, match="'law' is already attached"):
        load_adapter(model, saved, "law")
    with pytest.raises(OptionError, match="adapter name"):
        load_adapter(model, saved, "a.b")
    with pytest.raises(AdapterError, match="which adapter"):
        save_adapter(model, tmp_path / "which")
    assert not (tmp_path / "which").exists()
    with torch.no_grad():
        find_adapter(model, "med").parts[UP].lora_B.zero_()
    for name in ("law", "med"):
        save_adapter(model, tmp_path / name, name)
    stored = {name: load_file(tmp_path / name / WEIGHTS)[f"{PREFIX}{UP}.lora_B.weight"] for name in ("law", "med")}
    assert stored["law"].any()
    assert not stored["med"].any()
    detach_lora(model)
    assert isinstance(model.get_submodule(UP), QuantizedLinear)


def test_save_refuses_nan(tiny: Any, tmp_path: Path) -> None:
    model = with_adapter(tiny)
    with torch.no_grad():
        find_adapter(model, "default").parts[UP].lora_A[0, 0] = float("inf")
    with pytest.raises(AdapterError, match=rf"NaN or infinity in 1 tensors, {PREFIX}{UP}\.lora_A\.weight first"):
        save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_half_precision_files(
    tiny: Any, saved: Path, tmp_path: Path, random_ids: Maker, dtype: str, tolerance: float
) -> None:
    """Half the size, each number rounded once, read as float32 by us and by PEFT."""
    model = load_base(tiny)
    load_adapter(model, saved)
    save_adapter(model, tmp_path / "half", dtype=dtype)
    stored = load_file(tmp_path / "half" / WEIGHTS)
    assert {tensor.dtype for tensor in stored.values()} == {getattr(torch, dtype)}
    sizes = [
        sum(t.numel() * t.element_size() for t in load_file(f / WEIGHTS).values()) for f in (saved, tmp_path / "half")
    ]
    assert sizes[1] * 2 == sizes[0]
    load_adapter(model, tmp_path / "half", "rounded")
    for key, tensor in lora_state_dict(model, "rounded").items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, stored[key].float())
        torch.testing.assert_close(tensor, lora_state_dict(model, "default")[key], rtol=tolerance, atol=1e-7)
    theirs = peft.PeftModel.from_pretrained(load_float(tiny), tmp_path / "half").eval()
    ids = random_ids(model)
    assert relative(logits(model, ids), logits(theirs, ids)) < 1e-4


def test_values_that_overflow_the_dtype_are_refused(tiny: Any, tmp_path: Path) -> None:
    model = with_adapter(tiny)
    with torch.no_grad():
        find_adapter(model, "default").parts[UP].lora_B[3, 1] = 70000.0
    with pytest.raises(AdapterError, match=rf"1 tensors, {PREFIX}{UP}\.lora_B") as caught:
        save_adapter(model, tmp_path / "adapter", dtype="float16")
    assert caught.value.hint == "its values are too large for float16: save it as float32"
    with pytest.raises(OptionError, match="dtype='fp16': expected float32, float16, bfloat16"):
        save_adapter(model, tmp_path / "adapter", dtype="fp16")
    assert not (tmp_path / "adapter").exists()
    save_adapter(model, tmp_path / "adapter", dtype="bfloat16")


def test_an_adapter_of_two_projections_is_a_few_hundred_kilobytes(tmp_path: Path) -> None:
    """With the shapes of a model of 135 million weights."""
    shapes = {"q_proj": (576, 576), "v_proj": (576, 192)}
    model = nn.ModuleList(nn.ModuleDict({k: nn.Linear(*shape) for k, shape in shapes.items()}) for _ in range(30))
    attach_lora(model, r=4, target_modules="q_proj,v_proj")
    save_adapter(model, tmp_path / "adapter", dtype="float16")
    assert 400_000 < sum(path.stat().st_size for path in (tmp_path / "adapter").iterdir()) < 500_000


def test_layers_that_differ_in_rank_and_scaling(tiny: Any, tmp_path: Path, random_ids: Maker) -> None:
    """PEFT has one use_rslora for all: what it cannot say, alpha_pattern makes up for."""
    configs = [
        LoraConfig(4, 8), LoraConfig(4, 8, use_rslora=True), LoraConfig(2, 3, use_rslora=True), LoraConfig(7, 8),
        LoraConfig(4, 5),
    ]  # fmt: skip
    model = load_base(tiny)
    attach_lora(model, name="all")
    paths = list(find_adapter(model, "all").parts)
    detach_lora(model)
    attach_layers(model, "default", {path: configs[index % 5] for index, path in enumerate(paths)})
    randomize(model)
    save_adapter(model, tmp_path / "adapter")
    ids = random_ids(model)
    theirs = peft.PeftModel.from_pretrained(load_float(tiny), tmp_path / "adapter").eval()
    again = load_base(tiny)
    load_adapter(again, tmp_path / "adapter")
    for other in (theirs, again):
        assert relative(logits(other, ids), logits(model, ids)) < 1e-4


def test_a_layer_whose_path_ends_like_another(tmp_path: Path) -> None:
    """In PEFT the key `up` of rank_pattern, and the target `up`, are `inner.up` as well."""

    def build() -> nn.ModuleDict:
        return nn.ModuleDict(
            {"up": nn.Linear(4, 4), "inner": nn.ModuleDict({"up": nn.Linear(4, 4)}), "x": nn.Linear(4, 4)}
        )

    for layers in (
        {"up": LoraConfig(1, 2), "inner.up": LoraConfig(3, 4), "x": LoraConfig(3, 4)},
        {"up": LoraConfig(1, 2), "x": LoraConfig(3, 4)},
        {"inner.up": LoraConfig(1, 2)},
    ):
        ours = build()
        attach_layers(ours, "default", layers)
        save_adapter(ours, tmp_path / "adapter")
        config = peft.LoraConfig.from_pretrained(tmp_path / "adapter")
        config.task_type = None  # of a language model, which this is not
        theirs = peft.PeftModel.from_pretrained(build(), tmp_path / "adapter", config=config).base_model.model
        found = {
            path: (int(module.r["default"]), module.scaling["default"])
            for path, module in theirs.named_modules()
            if hasattr(module, "lora_A")
        }
        assert found == {path: (config.r, config.scaling) for path, config in layers.items()}
        again = build()
        load_adapter(again, tmp_path / "adapter")
        assert {
            path: (lora.config.r, lora.config.scaling) for path, lora in find_adapter(again, "default").parts.items()
        } == found


def test_save_needs_an_adapter(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="attached: none"):
        save_adapter(load_base(tiny), tmp_path / "adapter")


def test_the_seal_remembers(tiny: Any, tmp_path: Path) -> None:
    model = with_adapter(tiny)
    details = {"dataset": {"path": "数据.jsonl", "rows": 91}, "metrics": {"loss": 0.917}, "base": "forged", "files": {}}
    save_adapter(model, tmp_path / "adapter", details=details)
    seal = read_seal(tmp_path / "adapter")
    assert seal is not None
    assert (seal["dataset"], seal["metrics"]) == (details["dataset"], details["metrics"])
    assert seal["base"]["fingerprint"] == model.qgraft.info.fingerprint
    assert seal["base"]["formats"] == model.qgraft.info.formats
    assert seal["parameters"] == sum(tensor.numel() for tensor in lora_state_dict(model).values())
    assert set(seal["files"]) == {CONFIG, WEIGHTS}
    assert {"python", "qgraft", "torch", "transformers"} <= seal["versions"].keys()
    assert read_peft_config(tmp_path / "adapter")["base_model_name_or_path"] == str(tiny.path)
    assert read_seal(tmp_path) is None


def variants(tiny: Any, tmp_path: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Two adapters whose options and weights fit each other's files, so that a mixture would load."""
    old, new = with_adapter(tiny), with_adapter(tiny, lora_alpha=80)
    with torch.no_grad():
        for lora in find_adapter(new, "default").parts.values():
            lora.lora_B.mul_(-1)
    return old, new


@pytest.mark.spread(2)
@pytest.mark.parametrize("before", ["nothing", "sealed", "from PEFT"])
@pytest.mark.parametrize("operation", ["replace", "fsync"])
def test_a_save_that_stops_is_never_a_mixture(
    tiny: Any, tmp_path: Path, random_ids: Maker, failing_after: Maker, before: str, operation: str
) -> None:
    old, new = variants(tiny, tmp_path)
    ids = random_ids(old)
    allowed = [logits(old, ids), logits(new, ids)]
    outcomes = []
    for stop in range(12):
        folder = tmp_path / f"{stop}"
        if before != "nothing":
            save_adapter(old, folder)
        if before == "from PEFT":
            (folder / SEAL).unlink()
        finished = True
        try:
            with failing_after(operation, stop):
                save_adapter(new, folder)
        except StorageError:
            finished = False
        model, refused = load_base(tiny), ""
        try:
            load_adapter(model, folder)
        except AdapterError as error:
            refused = str(error)
        if refused:
            assert not finished
            assert any(why in refused for why in ("changed since it was saved", f"holds no {CONFIG}", "no such file"))
            outcomes.append("refused")
        else:
            which = [torch.equal(logits(model, ids), expected) for expected in allowed]
            assert any(which), f"a mixture after {stop} calls"
            assert which[1] or not finished
            outcomes.append("new" if which[1] else "old")
        if finished:
            break
    assert finished
    assert outcomes[-1] == "new"
    assert outcomes[0] == ("refused" if before == "nothing" else "old")
    assert "refused" in outcomes or operation == "fsync"  # all files are synced before the first takes its name
