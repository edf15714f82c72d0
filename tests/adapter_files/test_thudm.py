"""Prefixes as THUDM's scripts leave them: alone or beside a whole model, against what the original code computed."""

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
from qgraft.adapter_files.folder import SEAL, load_adapter, save_adapter
from qgraft.adapter_files.thudm import BIN, export_thudm
from qgraft.adapters.attach import attach_lora, detach_adapter
from qgraft.adapters.attach_prefix import attach_prefix
from qgraft.adapters.base import adapter_names, find_adapter
from qgraft.adapters.choose import active_adapters
from qgraft.adapters.prefix import PrefixConfig, encoder_of
from qgraft.checkpoints.folder_model import load_folder
from qgraft.checkpoints.gguf_model import load_gguf
from qgraft.checkpoints.quantize import quantize
from qgraft.checkpoints.save import save
from qgraft.checkpoints.shards import BIN_INDEX
from qgraft.checkpoints.thudm_prefix import KEY
from qgraft.errors import AdapterError, CheckpointError, OptionError, StorageError, UnsupportedError

GOLDEN = Path(__file__).parent.parent / "golden"
NAMES = ["chatglm_prefix", "chatglm_prefix_proj", "chatglm2_prefix", "chatglm2_prefix_proj"]
Maker = Callable[..., Any]


def weights_of(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / name / "weights.safetensors")


def config_of(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / name / "config.json").read_text())


def write(path: Path, weights: dict[str, Tensor], config: dict[str, Any] | None, layout: str = "bin") -> Path:
    path.mkdir()
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    if layout == "bin":
        torch.save(weights, path / BIN)
    elif layout == "safetensors":
        save_file(weights, path / "model.safetensors", {"format": "pt"})
    else:
        files = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(weights)}
        for file in set(files.values()):
            torch.save({name: weights[name] for name, where in files.items() if where == file}, path / file)
        (path / BIN_INDEX).write_text(json.dumps({"weight_map": files}))
    return path


def base_of(tmp_path: Path, name: str, kind: str = "fp32") -> Path:
    """A folder with the base of the golden prefix `name`."""
    generation = name.partition("_")[0]
    path, config = tmp_path / f"{generation}_{kind}", config_of(f"{generation}_{kind}")
    return path if path.exists() else write(path, weights_of(f"{generation}_{kind}"), config, "safetensors")


def load_base(tmp_path: Path, name: str, kind: str = "fp32") -> PreTrainedModel:
    return qgraft.load(base_of(tmp_path, name, kind), device="cpu")[0]


def whole(path: Path, name: str, layout: str = "bin", **changes: Any) -> Path:
    """A folder with the base and the golden prefix in it."""
    config = {key: value for key, value in {**config_of(name), **changes}.items() if value is not None}
    return write(path, weights_of(f"{name.partition('_')[0]}_fp32") | weights_of(name), config, layout)


def check_golden(model: nn.Module, name: str) -> None:
    io = load_file(GOLDEN / name / "io.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(model(io["single.input_ids"]).logits, io["single.logits"], atol=1e-4, rtol=0)


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# ---------------------------------------------------------------- as an adapter


@pytest.mark.parametrize("layout", ["bin", "safetensors", "shards"])
def test_a_folder_of_the_scripts_is_an_adapter(tmp_path: Path, name: str, layout: str) -> None:
    model, config = load_base(tmp_path, name), config_of(name)
    report = load_adapter(model, write(tmp_path / "out", weights_of(name), config, layout), "ad")
    text = f"prefix of {config['pre_seq_len']} tokens{' with projection' if config['prefix_projection'] else ''}"
    assert str(report).splitlines() == [
        f"adapter ad: {text}, applied to 3/3 layers",
        f"no {SEAL} beside it: which base it was trained on cannot be verified",
    ]
    check_golden(model, name)
    for key, value in weights_of(name).items():
        assert torch.equal(find_adapter(model).state_dict()[key.removeprefix(KEY)], value)


@pytest.mark.parametrize("with_config", [True, False])
def test_a_single_file_is_an_adapter(tmp_path: Path, name: str, with_config: bool) -> None:
    folder = write(tmp_path / "out", weights_of(name), config_of(name) if with_config else None)
    model = load_base(tmp_path, name)
    load_adapter(model, folder / BIN)
    check_golden(model, name)
    assert encoder_of(find_adapter(model)).config.prefix_dropout == 0.1


def test_of_a_whole_checkpoint_only_the_prefix_counts(tmp_path: Path, name: str) -> None:
    model, folder = load_base(tmp_path, name), whole(tmp_path / "whole", name)
    report = load_adapter(model, folder)
    others = len(weights_of(f"{name.partition('_')[0]}_fp32"))
    assert report.notes[0] == f"{others} other tensors beside it are not read: as an adapter only the prefix counts"
    check_golden(model, name)


def test_half_precision_values_load_as_float32(tmp_path: Path) -> None:
    half = {key: value.half() for key, value in weights_of("chatglm2_prefix_proj").items()}
    model = load_base(tmp_path, "chatglm2")
    load_adapter(model, write(tmp_path / "out", half, None))
    for key, value in find_adapter(model).state_dict().items():
        assert torch.equal(value, half[KEY + key].float())


@pytest.mark.parametrize("kind", ["int4", "int8"])
@pytest.mark.parametrize("generation", ["chatglm", "chatglm2"])
def test_on_a_quantized_base(tmp_path: Path, generation: str, kind: str) -> None:
    """Sealed on one, it does not go on the other without force."""
    name = f"{generation}_prefix_proj"
    model = load_base(tmp_path, name, kind)
    load_adapter(model, write(tmp_path / "out", weights_of(name), config_of(name)))
    ids = load_file(GOLDEN / name / "io.safetensors")["single.input_ids"]
    save_adapter(model, tmp_path / "sealed")
    again = load_base(tmp_path, name, kind)
    assert load_adapter(again, tmp_path / "sealed").notes == ()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)
    with pytest.raises(AdapterError, match="trained on another base"):
        load_adapter(load_base(tmp_path, name), tmp_path / "sealed")


def test_from_the_scripts_to_our_folder_and_back(tmp_path: Path, name: str) -> None:
    """What is exported is what the scripts wrote: keys, shapes, dtype, values, config.json."""
    model = load_base(tmp_path, name)
    load_adapter(model, write(tmp_path / "out", weights_of(name), None))
    save_adapter(model, tmp_path / "ours")
    again = load_base(tmp_path, name)
    load_adapter(again, tmp_path / "ours", "mine")
    check_golden(again, name)
    attach_lora(again)
    nbytes = export_thudm(again, tmp_path / "thudm", "mine")
    assert nbytes == (tmp_path / "thudm" / BIN).stat().st_size
    state, expected = torch.load(tmp_path / "thudm" / BIN, weights_only=True), weights_of(name)
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert state[key].dtype == value.dtype == torch.float32
        assert torch.equal(state[key], value)
    assert json.loads((tmp_path / "thudm" / "config.json").read_text()) == config_of(name)
    fresh = load_base(tmp_path, name)
    load_adapter(fresh, tmp_path / "thudm")
    check_golden(fresh, name)


class OfficialPrefix(nn.Module):
    """The modules under the names that the original gives them; widths as reference releases have them."""

    def __init__(self, pre_seq_len: int, width: int, middle: int, total: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(pre_seq_len, width)
        self.trans = nn.Sequential(nn.Linear(width, middle), nn.Tanh(), nn.Linear(middle, total))


def test_a_new_prefix_goes_into_the_originals_modules(tmp_path: Path) -> None:
    for generation, width in (("chatglm", 64), ("chatglm2", 192)):
        model = load_base(tmp_path, generation)
        attach_prefix(model, 4, prefix_projection=True)
        export_thudm(model, tmp_path / generation)
        state = torch.load(tmp_path / generation / BIN, weights_only=True)
        total = len(state[KEY + "trans.2.bias"])
        theirs = OfficialPrefix(4, width, 64, total)
        theirs.load_state_dict({key.removeprefix(KEY): value for key, value in state.items()})
        values = theirs.trans(theirs.embedding.weight)
        torch.testing.assert_close(encoder_of(find_adapter(model))(torch.arange(4)[None])[0], values)
        config = json.loads((tmp_path / generation / "config.json").read_text())
        assert (config["pre_seq_len"], config["prefix_projection"]) == (4, True)


def test_export_refuses(tmp_path: Path, tiny_gguf: Maker) -> None:
    llama, glm = load_gguf(tiny_gguf("llama").path, torch.float32)[0], load_base(tmp_path, "chatglm2")
    attach_prefix(llama, 4)
    attach_prefix(glm, 4)
    attach_lora(glm, name="lora")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("keep me")
    with pytest.raises(UnsupportedError, match="it is of a ChatGLM, and this is a LlamaForCausalLM"):
        export_thudm(llama, tmp_path / "new")
    with pytest.raises(AdapterError, match="'lora' is a LoRA, expected a prefix"):
        export_thudm(glm, tmp_path / "new", "lora")
    with pytest.raises(OptionError, match="dtype='float61'"):
        export_thudm(glm, tmp_path / "new", "default", "float61")
    for target in (taken, taken / "thesis.txt"):
        with pytest.raises(StorageError, match="exists already"):
            export_thudm(glm, target, "default")
        with pytest.raises(StorageError, match=r"it holds other files: thesis.txt|it is a file"):
            export_thudm(glm, target, "default", overwrite=True)
    with torch.no_grad():
        encoder_of(find_adapter(glm, "default")).embedding.weight[0, 0] = 1e30
    with pytest.raises(AdapterError, match=rf"NaN or infinity as float16 in {KEY}embedding\.weight"):
        export_thudm(glm, tmp_path / "new", "default", "float16")
    assert not (tmp_path / "new").exists()
    assert (taken / "thesis.txt").read_text() == "keep me"


# ---------------------------------------------------------------- what does not fit


class RunsCode:
    """Unpickling it would create the file `executed` in the current folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("executed", "w"))


PROJ = weights_of("chatglm2_prefix_proj")
PLAIN = weights_of("chatglm2_prefix")


def without(*keys: str) -> dict[str, Tensor]:
    return {key: value for key, value in PROJ.items() if key.removeprefix(KEY) not in keys}


def having(**values: Any) -> dict[str, Any]:
    return PROJ | {KEY + key.replace("__", "."): value for key, value in values.items()}


SAID = {"pre_seq_len": 6, "prefix_projection": True}
REFUSED: dict[str, tuple[Any, dict[str, Any] | None, str]] = {
    "a missing tensor": (without("trans.2.weight"), None, rf"{KEY}trans\.2\.weight: missing, expected \[192, 64\]"),
    "only the embedding": (
        without("trans.0.weight", "trans.0.bias", "trans.2.weight", "trans.2.bias"), SAID,
        rf"(?s){KEY}trans\.0\.bias: missing.*trans\.0\.weight: missing.*trans\.2\.bias: missing.*trans\.2\.weight: miss"
    ),
    "an extra tensor": (having(trans__4__weight=torch.ones(3)), SAID, r"trans\.4\.weight: \[3\], expected no such tensor"),
    "tensors of a projection that is none": (
        PROJ, {"prefix_projection": False}, r"(?s)trans\.0\.bias: \[64\], expected no such tensor.*trans\.2\.weight"
    ),
    "fewer tokens than said": (PROJ, {"pre_seq_len": 128}, r"config\.json says pre_seq_len=128, but .*holds 6 tokens"),
    "tokens as text": (PROJ, {"pre_seq_len": "6"}, r"config\.json: pre_seq_len: got 6, expected a whole number"),
    "tokens of 19 digits": (PROJ, {"pre_seq_len": 2**63}, "pre_seq_len: got 9223372036854775808, expected a whole"),
    "no tokens said": (PROJ, {"pre_seq_len": 0}, "pre_seq_len: got 0, expected a whole number from 1"),
    "true tokens": (PROJ, {"pre_seq_len": True}, "pre_seq_len: got True, expected a whole"),
    "projection as a number": (PROJ, {"prefix_projection": 1}, "prefix_projection: got 1, expected true or false"),
    "the other generation": (
        weights_of("chatglm_prefix"), None, rf"{KEY}embedding\.weight: got \[6, 384\], expected \[6, 192\]"
    ),
    "NaN": (having(trans__0__bias=torch.full((64,), torch.nan)), SAID, r"trans\.0\.bias: NaN or infinity"),
    "integers": (having(trans__0__bias=torch.ones(64, dtype=torch.int32)), SAID, "got torch.int32, expected floating point"),
    "a vector": ({f"{KEY}embedding.weight": torch.ones(192)}, None, r"got \[192\], expected \[1, 192\]"),
    "no tokens": ({f"{KEY}embedding.weight": torch.ones(0, 192)}, None, r"got \[0, 192\], expected \[1, 192\]"),
    "no prefix": (weights_of("chatglm2_int4"), None, rf"holds no adapter_config\.json, and no {KEY}\*"),
    "a list": ([1], None, "expected a mapping of names to tensors, got list"),
    "numbers": ({f"{KEY}embedding.weight": 1}, None, "embedding.weight': int"),
    "a pickle that runs code": ({f"{KEY}embedding.weight": RunsCode()}, None, r"asks for _?io\.open"),
    "a tensor larger than its file": (
        {f"{KEY}embedding.weight": torch.ones(1).expand(1 << 30, 192)}, None, "larger than the file"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_and_the_model_is_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.chdir(tmp_path)
    weights, config, message = REFUSED[case]
    folder = write(tmp_path / "out", weights, config)
    model = load_base(tmp_path, "chatglm2")
    for path in (folder, folder / BIN):
        with pytest.raises(AdapterError, match=message.replace(r"adapter_config\.json, and no ", ".*")):
            load_adapter(model, path)
    assert adapter_names(model) == []
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("raw", [b"", b"PK\x03\x04", b"\x80\x02}q\x00.", b"no pickle"])
def test_broken_files(tmp_path: Path, raw: bytes) -> None:
    model = load_base(tmp_path, "chatglm2")
    for file in (BIN, "model.safetensors"):
        (tmp_path / file).write_bytes(raw)
        with pytest.raises(AdapterError, match=file):
            load_adapter(model, tmp_path / file)


def test_all_that_differs_is_listed_at_once(tmp_path: Path) -> None:
    weights = {**without("trans.2.weight"), f"{KEY}trans.3.weight": torch.ones(2)}
    weights[f"{KEY}trans.0.weight"] = torch.full((64, 191), torch.inf)
    folder = write(tmp_path / "out", weights, {"pre_seq_len": 7, "prefix_projection": "yes"})
    with pytest.raises(AdapterError) as caught:
        load_adapter(load_base(tmp_path, "chatglm2"), folder)
    assert [line.strip() for line in str(caught.value).splitlines()[1:-1]] == [
        "config.json: prefix_projection: got yes, expected true or false",
        f"{KEY}trans.0.weight: got [64, 191], expected [64, 192]",
        f"{KEY}trans.2.weight: missing, expected [192, 64]",
        f"{KEY}trans.3.weight: [2], expected no such tensor",
        f"config.json says pre_seq_len=7, but {KEY}embedding.weight holds 6 tokens",
        f"{KEY}trans.0.weight: NaN or infinity",
    ]


def test_force_takes_the_tensors_word_for_the_number_of_tokens(tmp_path: Path) -> None:
    folder = write(tmp_path / "out", PROJ, {"pre_seq_len": 7})
    model = load_base(tmp_path, "chatglm2")
    report = load_adapter(model, folder, force=True)
    assert report.notes[0].startswith("forced although: config.json says pre_seq_len=7")
    assert encoder_of(find_adapter(model)).config.pre_seq_len == 6
    with pytest.raises(AdapterError, match="missing"):
        load_adapter(model, write(tmp_path / "less", without("trans.0.bias"), None), "less", force=True)


def test_only_on_a_chatglm(tmp_path: Path, tiny_gguf: Maker) -> None:
    folder = write(tmp_path / "out", {f"{KEY}embedding.weight": torch.ones(4, 128)}, None)
    with pytest.raises(AdapterError, match="it is of a ChatGLM, and this is a LlamaForCausalLM"):
        load_adapter(load_gguf(tiny_gguf("llama").path, torch.float32)[0], folder)


# ---------------------------------------------------------------- in a whole checkpoint


@pytest.mark.spread(4)
@pytest.mark.parametrize("layout", ["bin", "safetensors", "shards"])
def test_a_model_loads_with_its_prefix(tmp_path: Path, name: str, layout: str) -> None:
    folder = whole(tmp_path / "whole", name, layout)
    model, _ = qgraft.load(folder, device="cpu")
    assert active_adapters(model) == {"default": 1.0}
    check_golden(model, name)
    config = config_of(name)
    projection = " with projection" if config["prefix_projection"] else ""
    note = f"the folder's prefix of 6 tokens{projection} is attached and active, as 'default'"
    assert model.qgraft.info.notes[-1] == note
    plain = load_base(tmp_path, name)
    assert model.qgraft.info.fingerprint == plain.qgraft.info.fingerprint
    ids = load_file(GOLDEN / name / "io.safetensors")["single.input_ids"]
    with torch.no_grad(), qgraft.adapters_off(model):
        torch.testing.assert_close(model(ids).logits, plain(ids).logits)


@pytest.mark.spread(4)
@pytest.mark.parametrize("layout", ["bin", "safetensors", "shards"])
def test_save_copies_the_prefix_as_it_is(tmp_path: Path, name: str, layout: str) -> None:
    folder = whole(tmp_path / "whole", name, layout)
    model, _ = qgraft.load(folder, device="cpu")
    save(model, tmp_path / "copy")
    saved = {k: v for path in (tmp_path / "copy").glob("*.safetensors") for k, v in load_file(path).items()}
    expected = weights_of(f"{name.partition('_')[0]}_fp32") | weights_of(name)
    assert saved.keys() == expected.keys()
    assert all(saved[key].dtype == value.dtype and torch.equal(saved[key], value) for key, value in expected.items())
    assert (tmp_path / "copy" / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    again, _ = qgraft.load(tmp_path / "copy", device="cpu")
    assert again.qgraft.info.fingerprint == model.qgraft.info.fingerprint
    check_golden(again, name)


def test_a_prefix_that_was_trained_on_is_not_lost_in_a_save(tmp_path: Path) -> None:
    model, _ = qgraft.load(whole(tmp_path / "whole", "chatglm2_prefix"), device="cpu")
    attach_lora(model, name="lora")
    with pytest.raises(AdapterError, match="the adapter lora is active and would not be in the saved weights"):
        save(model, tmp_path / "copy")
    qgraft.use_adapter(model, "default")
    with torch.no_grad():
        encoder_of(find_adapter(model, "default")).embedding.weight[0, 0] += 1e-3
    with pytest.raises(AdapterError, match="the adapter default is active and would not be in the saved weights"):
        save(model, tmp_path / "copy")
    detach_adapter(model)
    save(model, tmp_path / "copy")


def test_save_notices_another_prefix_in_the_source(tmp_path: Path) -> None:
    folder = whole(tmp_path / "whole", "chatglm2_prefix")
    model, _ = qgraft.load(folder, device="cpu")
    detach_adapter(model)
    shutil.rmtree(folder)
    changed = {**weights_of("chatglm2_fp32"), f"{KEY}embedding.weight": PLAIN[f"{KEY}embedding.weight"] + 1}
    write(folder, changed, config_of("chatglm2_prefix"))
    with pytest.raises(CheckpointError, match="changed since the model was loaded"):
        save(model, tmp_path / "copy")


@pytest.mark.parametrize("how", ["while loading", "in memory"])
@pytest.mark.parametrize("generation", ["chatglm", "chatglm2"])
def test_the_base_is_quantized_and_the_prefix_is_not(tmp_path: Path, generation: str, how: str) -> None:
    name = f"{generation}_prefix_proj"
    folder = whole(tmp_path / "whole", name)
    model, _ = qgraft.load(folder, quantize="chatglm-int4" if how == "while loading" else None, device="cpu")
    if how == "in memory":
        assert quantize(model, "chatglm-int4") == ()
    save(model, tmp_path / "int4")
    saved, expected = load_file(tmp_path / "int4" / "model.safetensors"), weights_of(f"{generation}_int4")
    assert saved.keys() == expected.keys() | weights_of(name).keys()
    assert all(torch.equal(saved[key], value) for key, value in weights_of(name).items())
    again, _ = qgraft.load(tmp_path / "int4", device="cpu")
    ids = load_file(GOLDEN / name / "io.safetensors")["single.input_ids"]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_config_without_pre_seq_len(tmp_path: Path, name: str) -> None:
    model, _ = qgraft.load(whole(tmp_path / "whole", name, pre_seq_len=None, prefix_projection=None), device="cpu")
    check_golden(model, name)
    assert model.qgraft.info.notes[-1] == "config.json says no pre_seq_len: the prefix has 6 rows"


def test_pre_seq_len_without_a_prefix(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", weights_of("chatglm2_fp32"), config_of("chatglm2_prefix"))
    model, _ = qgraft.load(folder, device="cpu")
    assert adapter_names(model) == []
    expected = "config.json says pre_seq_len=6, but the folder holds no prefix: load one as an adapter"
    assert model.qgraft.info.notes[-1] == expected
    load_adapter(model, write(tmp_path / "out", PLAIN, None))
    check_golden(model, "chatglm2_prefix")


@pytest.mark.parametrize(
    ("changes", "extra", "message"),
    [
        ({"pre_seq_len": 7}, {}, "says pre_seq_len=7, but .* holds 6 tokens"),
        ({"prefix_projection": True}, {}, r"trans\.0\.bias: missing"),
        ({}, {f"{KEY}trans.0.bias": torch.ones(64)}, r"trans\.0\.bias: \[64\], expected no such"),
        ({}, {f"{KEY}embedding.weight": torch.full((6, 192), torch.nan)}, "NaN or infinity"),
        ({"pre_seq_len": 64}, {f"{KEY}embedding.weight": torch.ones(64, 192)}, "leaves no room"),
    ],
)
def test_a_model_with_a_prefix_that_does_not_fit(
    tmp_path: Path, changes: dict[str, Any], extra: dict[str, Tensor], message: str
) -> None:
    weights = weights_of("chatglm2_fp32") | PLAIN | extra
    folder = write(tmp_path / "m", weights, config_of("chatglm2_prefix") | changes)
    with pytest.raises((CheckpointError, OptionError), match=message):
        qgraft.load(folder, device="cpu")


def test_a_prefix_alone_is_no_model(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "out", weights_of(name), config_of(name))
    with pytest.raises(CheckpointError, match=r"(?s)holds a prefix \(P-Tuning v2\) and no model.*load_adapter"):
        qgraft.load(folder, device="cpu")


def test_other_unexpected_tensors_are_still_refused(tmp_path: Path) -> None:
    weights = weights_of("chatglm2_fp32") | PLAIN | {"transformer.prefix_encoderx.weight": torch.ones(2)}
    with pytest.raises(CheckpointError, match=r"unexpected transformer\.prefix_encoderx\.weight"):
        load_folder(write(tmp_path / "m", weights, config_of("chatglm2_prefix")), torch.float32)


def test_options_of_the_scripts_default(tmp_path: Path) -> None:
    model, _ = qgraft.load(whole(tmp_path / "whole", "chatglm_prefix_proj"), device="cpu")
    assert encoder_of(find_adapter(model)).config == PrefixConfig(6, True, layout="chatglm")
