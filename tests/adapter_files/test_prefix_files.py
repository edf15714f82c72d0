"""save_adapter and load_adapter with prefixes: PEFT's PREFIX_TUNING is the oracle of the numbers, and what it loses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BertConfig, BertLMHeadModel, PreTrainedModel

import qgraft
from qgraft import storage
from qgraft.adapter_files.combine import combine_files
from qgraft.adapter_files.folder import (
    WEIGHTS,
    load_adapter,
    read_peft_config,
    read_trained,
    save_adapter,
)
from qgraft.adapter_files.gguf_lora import export_gguf_lora
from qgraft.adapter_files.peft_config import CONFIG
from qgraft.adapter_files.prefix import ENCODER, PROMPT
from qgraft.adapter_files.seal import SEAL, read_seal
from qgraft.adapters.attach import attach_lora
from qgraft.adapters.attach_prefix import attach_encoder, attach_prefix
from qgraft.adapters.base import adapter_names, find_adapter
from qgraft.adapters.choose import active_adapters
from qgraft.adapters.prefix import PrefixConfig, encoder_of
from qgraft.checkpoints.gguf_model import load_gguf
from qgraft.errors import AdapterError, OptionError, StorageError, UnsupportedError
from qgraft.json_files import covered_text

Maker = Callable[..., Any]
LENGTH = 5


def load_base(tiny: Any) -> PreTrainedModel:
    return load_gguf(tiny.path, torch.float32)[0]


def load_float(tiny: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny.path.parent, gguf_file=tiny.path.name, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids, attention_mask=torch.ones_like(ids)).logits.float()


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def with_prefix(tiny: Any, projection: bool = False, seed: int = 0, **options: Any) -> PreTrainedModel:
    model = load_base(tiny)
    torch.manual_seed(seed)
    attach_prefix(model, options.pop("pre_seq_len", LENGTH), projection, **options)
    return model


@pytest.fixture
def tiny(tiny_gguf: Maker) -> Any:
    return tiny_gguf("llama")


@pytest.fixture(params=[False, True], ids=["plain", "projection"])
def projection(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def saved(tiny: Any, projection: bool, tmp_path: Path) -> Path:
    """A sealed prefix of the tiny llama."""
    save_adapter(with_prefix(tiny, projection), tmp_path / "prefix")
    return tmp_path / "prefix"


def edit_json(path: Path, **values: Any) -> None:
    """Change values in a JSON file; a seal is sealed again."""
    changed = {**json.loads(path.read_text()), **values}
    path.write_text(covered_text(changed) if path.name == SEAL else json.dumps(changed))


@pytest.mark.spread(3)
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "phi3", "gpt2", "starcoder2"])
def test_peft_serves_the_folder(
    tiny_gguf: Maker, tmp_path: Path, random_ids: Maker, architecture: str, projection: bool
) -> None:
    tiny = tiny_gguf(architecture)
    model = with_prefix(tiny, projection)
    save_adapter(model, tmp_path / "prefix")
    theirs = peft.PeftModel.from_pretrained(load_float(tiny), tmp_path / "prefix").eval()
    ids = random_ids(model)
    got = logits(model, ids)
    assert relative(got, logits(theirs, ids)) < 1e-4
    with qgraft.adapters_off(model):
        assert relative(got, logits(model, ids)) > 1e-2


def test_the_folder_is_peft_s_and_the_projection_lies_beside(tiny: Any, saved: Path, projection: bool) -> None:
    """What PEFT's own save writes for the same prefix: the same keys, the same values under them, one tensor."""
    heads = load_base(tiny).config.num_key_value_heads
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, prefix_projection=projection, inference_mode=True
    )
    theirs = peft.get_peft_model(load_float(tiny), config)
    theirs.save_pretrained(saved.parent / "theirs")
    ours, expected = read_peft_config(saved), read_peft_config(saved.parent / "theirs")
    passed = {"auto_mapping", "peft_version", "revision", "base_model_name_or_path"}
    assert ours["num_attention_heads"] == heads
    assert {k: v for k, v in ours.items() if k not in passed} == {k: v for k, v in expected.items() if k not in passed}
    shapes = [{k: v.shape for k, v in load_file(f / WEIGHTS).items()} for f in (saved, saved.parent / "theirs")]
    assert shapes[0] == shapes[1]
    assert {path.name for path in saved.iterdir()} == {CONFIG, WEIGHTS, SEAL} | ({ENCODER} if projection else set())


def test_round_trip_is_exact(tiny: Any, saved: Path, projection: bool, random_ids: Maker) -> None:
    model, again = with_prefix(tiny, projection), load_base(tiny)
    report = load_adapter(again, saved, "mine")
    ids = random_ids(model)
    assert torch.equal(logits(again, ids), logits(model, ids))
    text = "prefix of 5 tokens with projection, " if projection else "prefix of 5 tokens, "
    assert str(report) == f"adapter mine: {text}applied to 2/2 layers"
    assert active_adapters(again) == {"mine": 1.0}
    assert encoder_of(find_adapter(again)).config == encoder_of(find_adapter(model)).config
    for key, tensor in find_adapter(model).state_dict().items():
        assert torch.equal(find_adapter(again).state_dict()[key], tensor)
        assert torch.equal(read_trained(saved)[key], tensor)
        assert encoder_of(find_adapter(again)).get_parameter(key).requires_grad


def test_options_of_the_training_come_back(tiny: Any, tmp_path: Path, projection: bool) -> None:
    model = with_prefix(tiny, projection, prefix_dropout=0.25)
    save_adapter(model, tmp_path / "prefix", details={"arguments": {"system": "Be brief."}})
    again = load_base(tiny)
    load_adapter(again, tmp_path / "prefix")
    assert encoder_of(find_adapter(again)).config == PrefixConfig(LENGTH, projection, None, 0.25)
    assert find_adapter(again, "default").trained == {"system": "Be brief."}


def test_another_width_of_the_projection_comes_back(tiny: Any, tmp_path: Path) -> None:
    model, again = load_base(tiny), load_base(tiny)
    attach_encoder(model, "default", PrefixConfig(LENGTH, True, 48))
    save_adapter(model, tmp_path / "prefix")
    assert read_peft_config(tmp_path / "prefix")["encoder_hidden_size"] == 48
    load_adapter(again, tmp_path / "prefix")
    assert encoder_of(find_adapter(again)).config.prefix_hidden_size == 48


def test_dropout_is_not_in_what_is_served(tiny: Any, tmp_path: Path, projection: bool) -> None:
    model = with_prefix(tiny, projection, prefix_dropout=0.9).train()
    save_adapter(model, tmp_path / "prefix")
    served = load_file(tmp_path / "prefix" / WEIGHTS)[PROMPT]
    encoder_of(find_adapter(model)).eval()
    expected = encoder_of(find_adapter(model))(torch.arange(LENGTH)[None])[0]
    assert torch.equal(served, expected)


@pytest.mark.spread(3)
@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_prefixes_made_by_peft_load(
    tiny_gguf: Maker, tmp_path: Path, random_ids: Maker, architecture: str, projection: bool, safe: bool
) -> None:
    tiny = tiny_gguf(architecture)
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, prefix_projection=projection)
    theirs = peft.get_peft_model(load_float(tiny), config).eval()
    theirs.save_pretrained(tmp_path / "theirs", safe_serialization=safe)
    model = load_base(tiny)
    report = load_adapter(model, tmp_path / "theirs")
    assert report.notes[-1] == f"no {SEAL} beside it: which base it was trained on cannot be verified"
    assert len(report.notes) == 1 + projection
    if projection:
        assert report.notes[0].startswith("its projection is not in the folder")
    ids = random_ids(model)
    assert relative(logits(model, ids), logits(theirs, ids)) < 1e-4
    assert list(find_adapter(model).state_dict()) == ["embedding.weight"]
    assert encoder_of(find_adapter(model)).config == PrefixConfig(LENGTH, prefix_dropout=0.0)
    save_adapter(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(load_float(tiny), tmp_path / "ours").eval()
    assert relative(logits(again, ids), logits(theirs, ids)) < 1e-5  # the projection, evaluated once more


def test_without_the_seal_the_values_load_and_the_projection_does_not_count(tiny: Any, tmp_path: Path) -> None:
    model = with_prefix(tiny, True)
    save_adapter(model, tmp_path / "prefix")
    (tmp_path / "prefix" / SEAL).unlink()
    save_file({"embedding.weight": torch.ones(3)}, tmp_path / "prefix" / ENCODER)
    again = load_base(tiny)
    report = load_adapter(again, tmp_path / "prefix")
    assert "projection is not in the folder" in report.notes[0]
    ids = torch.arange(3, 20)[None]
    torch.testing.assert_close(logits(again, ids), logits(model, ids))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_files(tiny: Any, saved: Path, tmp_path: Path, dtype: str, projection: bool) -> None:
    model = load_base(tiny)
    load_adapter(model, saved)
    save_adapter(model, tmp_path / "half", dtype=dtype)
    for file in {WEIGHTS, ENCODER} if projection else {WEIGHTS}:
        assert {tensor.dtype for tensor in load_file(tmp_path / "half" / file).values()} == {getattr(torch, dtype)}
    load_adapter(model, tmp_path / "half", "rounded")
    for key, tensor in find_adapter(model, "rounded").state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, find_adapter(model, "default").state_dict()[key].to(getattr(torch, dtype)).float())


def test_the_seal_remembers(tiny: Any, saved: Path, projection: bool) -> None:
    seal, model = read_seal(saved), with_prefix(tiny, projection)
    assert seal is not None
    assert seal["kind"] == "prefix"
    assert seal["base"]["fingerprint"] == model.qgraft.info.fingerprint
    assert seal["parameters"] == sum(tensor.numel() for tensor in find_adapter(model).state_dict().values())
    assert set(seal["files"]) == {CONFIG, WEIGHTS} | ({ENCODER} if projection else set())
    assert seal["prefix"] == {
        "pre_seq_len": LENGTH, "prefix_projection": projection, "prefix_hidden_size": None, "prefix_dropout": 0.1,
        "layout": "peft", "layers": [0, 1], "kv_heads": 2, "head_dim": 16,
    }  # fmt: skip


def test_beside_other_adapters(tiny: Any, saved: Path, tmp_path: Path, random_ids: Maker) -> None:
    model = load_base(tiny)
    attach_lora(model, name="law")
    load_adapter(model, saved, "first")
    load_adapter(model, saved, "second")
    assert adapter_names(model) == ["law", "first", "second"]
    assert active_adapters(model) == {"second": 1.0}
    with pytest.raises(AdapterError, match="'first' is already attached"):
        load_adapter(model, saved, "first")
    with pytest.raises(OptionError, match="adapter name"):
        load_adapter(model, saved, "a.b")
    save_adapter(model, tmp_path / "law", "law")
    save_adapter(model, tmp_path / "again", "first")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (saved / WEIGHTS).read_bytes()
    assert (read_seal(tmp_path / "law") or {})["kind"] == "lora"
    load_adapter(model, tmp_path / "law", "law2")
    model(random_ids(model), adapter_names=["law2", "second"])


def test_a_lora_saved_over_a_prefix_and_back(tiny: Any, tmp_path: Path) -> None:
    model = with_prefix(tiny, True, name="prefix")
    attach_lora(model, name="lora")
    for name in ("prefix", "lora", "prefix", "lora"):
        save_adapter(model, tmp_path / "out", name)
        assert (tmp_path / "out" / ENCODER).exists() == (name == "prefix")
        again = load_base(tiny)
        load_adapter(again, tmp_path / "out")
        for key, tensor in find_adapter(model, name).state_dict().items():
            assert torch.equal(find_adapter(again).state_dict()[key], tensor)


# ---------------------------------------------------------------- what does not fit


def unsealed(change: Callable[[Path], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / SEAL).unlink()
        change(folder)

    return spoil


def options(**values: Any) -> Callable[[Path], None]:
    return unsealed(lambda folder: edit_json(folder / CONFIG, **values))


def prompts(tensor: Tensor, name: str = PROMPT) -> Callable[[Path], None]:
    return unsealed(lambda folder: save_file({name: tensor}, folder / WEIGHTS))


def about(**values: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        edit_json(folder / SEAL, prefix={**json.loads((folder / SEAL).read_text())["prefix"], **values})

    return spoil


def flip_last_byte(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


class RunsCode:
    """Unpickling it would create the file `executed` in the current folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("executed", "w"))


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({PROMPT: RunsCode()}, folder / "adapter_model.bin")


REFUSED: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "edited values": (lambda f: flip_last_byte(f / WEIGHTS), AdapterError, f"(?s)changed since.*{WEIGHTS}: SHA-256"),
    "edited projection": (lambda f: flip_last_byte(f / ENCODER), AdapterError, f"(?s)changed since.*{ENCODER}: SHA"),
    "projection gone": (lambda f: (f / ENCODER).unlink(), AdapterError, f"(?s)changed since.*{ENCODER}: missing"),
    "edited options": (lambda f: edit_json(f / CONFIG, num_virtual_tokens=9), AdapterError, f"(?s)changed since.*{CONFIG}"),
    "another base": (
        lambda f: edit_json(f / SEAL, base={"fingerprint": "qg1:0", "source": "elsewhere"}), AdapterError,
        r"trained on another base: qg1:0 \(elsewhere\)"
    ),
    "another layout": (
        about(layout="chatglm2"), AdapterError, "trained with the layout 'chatglm2'; this model's is 'peft'"
    ),
    "other layers": (
        about(layers=[1, 3]), AdapterError, r"trained on the layers \(1, 3\); this model attends in \(0, 1\)"
    ),
    "another count of layers": (about(layers=[0]), AdapterError, "trained on 1 layers of 2 key heads of 16; this model"),
    "seal of text": (about(layers="x", layout=1), AdapterError, "`prefix` is not as save_adapter writes it: layout, layers"),
    "layers of text": (about(layers=["0"]), AdapterError, "`prefix` is not as save_adapter writes it: layers"),
    "prefix a list": (lambda f: edit_json(f / SEAL, prefix=[]), AdapterError, "`prefix` is not as save_adapter writes"),
    "another width": (
        about(prefix_hidden_size=7), AdapterError, r"trans.0.weight: got \[32, 32\], expected \[7, 32\]"
    ),
    "other heads": (options(num_attention_heads=4), AdapterError, "trained on 2 layers of 4 key heads of 8; this model"),
    "number of tokens": (
        options(num_virtual_tokens=6), AdapterError, f"says num_virtual_tokens=6, but {PROMPT} holds 5 tokens"
    ),
    "no number of tokens": (options(num_virtual_tokens=None), AdapterError, "num_virtual_tokens: got None, expected a whole"),
    "more layers than there are numbers": (
        options(num_layers=2**63), AdapterError, "num_layers: got 9223372036854775808, expected a whole number from 1"
    ),
    "a number of 400 digits": (options(token_dim=10**400), AdapterError, r"token_dim: got 10{116}\.\.\., expected a whole"),
    "more tokens than there is memory": (
        options(num_virtual_tokens=10**12), AdapterError, "num_virtual_tokens: got 1000000000000, expected"
    ),
    "a middle of the projection of 19 digits": (
        about(prefix_hidden_size=2**63), AdapterError, "`prefix` is not as save_adapter writes it: prefix_hidden_size"
    ),
    "true for a dropout": (about(prefix_dropout=True), AdapterError, "as save_adapter writes it: prefix_dropout"),
    "a dropout of all": (about(prefix_dropout=1), AdapterError, "as save_adapter writes it: prefix_dropout"),
    "a layout that there is not": (about(layout="x"), AdapterError, "as save_adapter writes it: layout"),
    "zero layers": (options(num_layers=0, token_dim=True), AdapterError, "(?s)num_layers: got 0.*token_dim: got True"),
    "heads that do not divide": (options(num_attention_heads=3), AdapterError, "token_dim: got 32, expected a multiple"),
    "projection of text": (options(prefix_projection="no"), AdapterError, "prefix_projection: got 'no', expected true"),
    "encoder and decoder": (options(num_transformer_submodules=2), UnsupportedError, "encoder-decoder"),
    "modules_to_save": (options(modules_to_save=["lm_head"]), UnsupportedError, "modules_to_save"),
    "no values": (
        prompts(torch.ones(2), "something"), AdapterError,
        rf"(?s)unexpected tensor something.*{PROMPT}: missing, expected \[5, 128\]"
    ),
    "NaN": (prompts(torch.full((5, 128), torch.nan)), AdapterError, f"{PROMPT}: NaN or infinity"),
    "one dimension": (prompts(torch.ones(128)), AdapterError, rf"{PROMPT}: got \[128\], expected \[5, 128\]"),
    "narrow": (prompts(torch.ones(5, 64)), AdapterError, rf"{PROMPT}: got \[5, 64\], expected \[5, 128\]"),
    "no rows": (prompts(torch.ones(0, 128)), AdapterError, rf"{PROMPT}: got \[0, 128\], expected \[5, 128\]"),
    "integers": (prompts(torch.ones(5, 128, dtype=torch.int64)), AdapterError, "got torch.int64, expected floating"),
    "pickle that runs code": (unsealed(pickled), AdapterError, "is refused: its pickle asks for"),
}  # fmt: skip


@pytest.mark.spread(17)
@pytest.mark.parametrize("case", REFUSED)
def test_refused_and_the_model_is_unchanged(
    tiny: Any, tmp_path: Path, random_ids: Maker, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.chdir(tmp_path)
    save_adapter(with_prefix(tiny, True), tmp_path / "prefix")
    spoil, kind, message = REFUSED[case]
    spoil(tmp_path / "prefix")
    model = load_base(tiny)
    attach_lora(model, r=2, name="before")
    ids, attention = random_ids(model), model.config._attn_implementation
    modules, expected = {path: id(m) for path, m in model.named_modules()}, logits(model, ids)
    with pytest.raises(kind, match=message):
        load_adapter(model, tmp_path / "prefix")
    assert {path: id(m) for path, m in model.named_modules()} == modules
    assert model.config._attn_implementation == attention
    assert active_adapters(model) == {"before": 1.0}
    assert torch.equal(logits(model, ids), expected)
    assert not (tmp_path / "executed").exists()


def test_everything_that_differs_is_listed_at_once(tiny: Any, tmp_path: Path) -> None:
    folder = tmp_path / "prefix"
    save_adapter(with_prefix(tiny, True), folder)
    state = load_file(folder / ENCODER)
    state["trans.0.weight"] = torch.ones(32, 31)
    state["trans.2.bias"][3] = float("inf")
    state["trans.4.weight"] = torch.ones(2)
    del state["trans.2.weight"]
    save_file(state, folder / ENCODER)
    edit_json(folder / CONFIG, num_virtual_tokens=128)
    files = {name: storage.describe_file(folder / name) for name in (CONFIG, WEIGHTS, ENCODER)}
    edit_json(folder / SEAL, files=files, base={"fingerprint": "qg1:0", "source": "elsewhere"})
    with pytest.raises(AdapterError) as caught:
        load_adapter(load_base(tiny), folder)
    lines = [line.strip() for line in str(caught.value).splitlines()]
    for expected in (
        "trans.0.weight: got [32, 31], expected [32, 32]",
        "trans.2.weight: missing, expected [128, 32]",
        "trans.4.weight: [2], expected no such tensor",
        "trans.2.bias: NaN or infinity",
        f"{CONFIG} says num_virtual_tokens=128, but embedding.weight holds 5 tokens",
    ):
        assert expected in lines
    assert any(line.startswith("trained on another base: qg1:0") for line in lines)


def test_force_loads_in_spite_of_doubts_only(tiny: Any, tiny_gguf: Maker, saved: Path) -> None:
    other = load_base(tiny_gguf("llama", seed=1))
    with pytest.raises(AdapterError, match="trained on another base: qg1:"):
        load_adapter(other, saved)
    report = load_adapter(other, saved, force=True)
    assert [note.partition(":")[0] for note in report.notes] == ["forced although"]
    assert active_adapters(other) == {"default": 1.0}
    narrower = load_base(tiny_gguf("gpt2"))
    with pytest.raises(AdapterError, match="trained on 2 layers of 2 key heads of 16; this model has 2 layers of 4"):
        load_adapter(narrower, saved, force=True)
    assert adapter_names(narrower) == []


def test_a_model_without_a_cache_is_refused(saved: Path) -> None:
    encoder = BertLMHeadModel(
        BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40)
    ).eval()
    with pytest.raises(UnsupportedError, match="is no decoder"):
        load_adapter(encoder, saved)


def test_a_prefix_longer_than_the_context_is_refused(tiny: Any, tiny_gguf: Maker, tmp_path: Path) -> None:
    save_adapter(with_prefix(tiny, pre_seq_len=100), tmp_path / "prefix")
    short = load_base(tiny)
    short.config.max_position_embeddings = 100
    with pytest.raises(OptionError, match="pre_seq_len=100 leaves no room"):
        load_adapter(short, tmp_path / "prefix")


def test_save_refuses_nan(tiny: Any, tmp_path: Path, projection: bool) -> None:
    model = with_prefix(tiny, projection)
    with torch.no_grad():
        encoder_of(find_adapter(model)).embedding.weight[0, 0] = float("nan")
    with pytest.raises(AdapterError, match="not saved: NaN or infinity"):
        save_adapter(model, tmp_path / "prefix")
    assert not (tmp_path / "prefix").exists()


def test_what_needs_deltas_says_why_not(tiny: Any, saved: Path, tmp_path: Path) -> None:
    model = load_base(tiny)
    load_adapter(model, saved, "p")
    why = "keys and values in front of the attention, which change no weight"
    with pytest.raises(AdapterError, match=f"merge: 'p' is a prefix.*{why}"):
        qgraft.merge(model)
    with pytest.raises(AdapterError, match=f"combine: 'p' is a prefix.*{why}"):
        qgraft.combine(model, {"p": 1.0}, name="new")
    with pytest.raises(AdapterError, match=f"combine: 'prefix' is a prefix.*{why}"):
        combine_files({saved: 1.0}, tmp_path / "new")
    with pytest.raises(AdapterError, match=f"GGUF-LoRA: 'p' is a prefix.*{why}"):
        export_gguf_lora(model, tmp_path / "p.gguf")
    assert not (tmp_path / "new").exists() and not (tmp_path / "p.gguf").exists()


@pytest.mark.spread(3)
@pytest.mark.parametrize("before", ["nothing", "sealed", "without projection", "from PEFT"])
@pytest.mark.parametrize("operation", ["replace", "fsync"])
def test_a_save_that_stops_is_never_a_mixture(
    tiny: Any, tmp_path: Path, random_ids: Maker, failing_after: Maker, before: str, operation: str
) -> None:
    old, new = with_prefix(tiny, before != "without projection", seed=1), with_prefix(tiny, True, seed=2)
    ids = random_ids(old)
    allowed = [logits(old, ids), logits(new, ids)]
    outcomes = []
    for stop in range(16):
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
            phrases = "changed since it was saved", f"holds no {CONFIG}", "no such file or folder"
            assert any(phrase in refused for phrase in phrases), refused
            outcomes.append("refused")
        else:
            got = logits(model, ids)
            which = [relative(got, expected) < 1e-6 for expected in allowed]
            assert any(which), f"a mixture after {stop} calls"
            outcomes.append("new" if which[1] else "old")
        if finished:
            break
    assert finished
    assert outcomes[-1] == "new"
    assert outcomes[0] == ("refused" if before == "nothing" else "old")
    if operation == "fsync":  # a full disk is found out before anything has changed; what remains are renames
        assert set(outcomes[:-2]) == {"refused" if before == "nothing" else "old"}
