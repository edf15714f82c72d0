"""load_gguf against transformers' own GGUF loader, which turns everything into floats, and against the float model that
each file was written from. The files are tiny and random; tests/conftest.py writes them as llama.cpp's converter would."""

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import ALWAYS_TIED, KERNELS, MOVED, PAIRS, READ_BY_TRANSFORMERS, SENTENCEPIECE
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from vocabularies import llamacpp

from qgraft.adapters.attach import attach_lora
from qgraft.adapters.targets import lora_layers
from qgraft.checkpoints.gguf_file import read_gguf
from qgraft.checkpoints.gguf_model import gguf_fingerprint, load_gguf
from qgraft.checkpoints.gguf_rules import ARCHITECTURES
from qgraft.errors import CheckpointError, UnsupportedError
from qgraft.experts import PackedLayer
from qgraft.linear import QuantizedLinear

CAUSAL = sorted(ARCHITECTURES.keys() - PAIRS)
CASES = [(name, tied) for name in CAUSAL for tied in (False, True) if tied or name not in ALWAYS_TIED]
Maker = Callable[..., Any]


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits.float()


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def packed_modules(model: nn.Module) -> dict[str, PackedLayer]:
    return {path: module for path, module in model.named_modules() if isinstance(module, PackedLayer)}


@pytest.mark.spread(6)
@pytest.mark.parametrize(("architecture", "tied"), CASES)
def test_logits_equal_the_float_models(
    tiny_gguf: Maker, random_ids: Maker, gemma_scaled: Maker, architecture: str, tied: bool
) -> None:
    tiny = tiny_gguf(architecture, tied=tied)
    ids = random_ids(tiny.model, length=24)  # longer than gemma's window of 8
    model, _ = load_gguf(tiny.path, torch.float32)
    got, expected = logits(model, ids), logits(tiny.model, ids)
    if architecture in READ_BY_TRANSFORMERS:
        theirs = AutoModelForCausalLM.from_pretrained(tiny.path.parent, gguf_file=tiny.path.name, dtype=torch.float32)
        theirs.set_attn_implementation(tiny.model.config._attn_implementation)
        assert relative(logits(gemma_scaled(theirs.eval(), tiny.model), ids), expected) < 1e-5, (
            "the oracle disagrees with the weights it was written from"
        )
    assert relative(got, expected) < 1e-5
    assert expected.std() > 0.5
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.spread(20)
@pytest.mark.parametrize("architecture", CAUSAL)
def test_every_weight_moves_the_logits(tiny_gguf: Maker, random_ids: Maker, architecture: str) -> None:
    """Without this, equal logits would prove little."""
    tiny = tiny_gguf(architecture, tied=architecture in ALWAYS_TIED)
    ids = random_ids(tiny.model, length=24)
    before = logits(tiny.model, ids)
    for name, parameter in tiny.model.named_parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.copy_(kept.roll(1, 0 if len(kept) > 1 else 1))
            moved = relative(logits(tiny.model, ids), before)
            parameter.copy_(kept)
        shifts_all_keys = "k_proj.bias" in name  # softmax hardly sees it
        assert moved > (1e-7 if shifts_all_keys else 1e-4), name


def test_attention_biases_are_read(tiny_gguf: Maker) -> None:
    tiny = tiny_gguf("qwen2")
    model, _ = load_gguf(tiny.path, torch.float32)
    for part in ("q_proj", "k_proj", "v_proj"):
        bias = model.get_submodule(f"model.layers.1.self_attn.{part}").bias
        assert torch.equal(bias, tiny.model.get_submodule(f"model.layers.1.self_attn.{part}").bias)
        assert bias.abs().sum() > 0


@pytest.mark.parametrize("architecture", ["llama", "nemotron"])
def test_biases_that_only_tensors_announce(
    make_gguf: Maker, random_ids: Maker, tmp_path: Path, architecture: str
) -> None:
    tiny = make_gguf(tmp_path / "biased.gguf", architecture, config={"attention_bias": True, "mlp_bias": True})
    ids = random_ids(tiny.model)
    model, _ = load_gguf(tiny.path, torch.float32)
    assert sum(name.endswith("_proj.bias") for name, _ in model.named_parameters()) >= 12
    assert relative(logits(model, ids), logits(tiny.model, ids)) < 1e-5


def test_biases_of_a_part_are_not_dropped(make_gguf: Maker, tmp_path: Path) -> None:
    options = {"config": {"attention_bias": True}, "drop": ("blk.0.attn_output.bias",)}
    tiny = make_gguf(tmp_path / "biased.gguf", "llama", **options)
    with pytest.raises(CheckpointError, match=r"missing model\.layers\.0\.self_attn\.o_proj\.bias"):
        load_gguf(tiny.path, torch.float32)
    tiny = make_gguf(tmp_path / "biased.gguf", "qwen3", config={"attention_bias": True})
    with pytest.raises(
        CheckpointError, match=r"8 tensors have no place in the architecture qwen3: blk\.0\.attn_k\.bias"
    ):
        load_gguf(tiny.path, torch.float32)


@pytest.mark.parametrize("parallel", [False, True])
def test_norms_of_each_head_of_stablelm(make_gguf: Maker, random_ids: Maker, tmp_path: Path, parallel: bool) -> None:
    """StableLM 2 12B: llama.cpp keeps the norms of all heads in one tensor; no key says so."""
    config = {"qk_layernorm": True, "use_parallel_residual": parallel}
    tiny = make_gguf(tmp_path / "made.gguf", "stablelm", config=config)
    ids = random_ids(tiny.model)
    model, _ = load_gguf(tiny.path, torch.float32)
    assert relative(logits(model, ids), logits(tiny.model, ids)) < 1e-5
    short = make_gguf(tmp_path / "short.gguf", "stablelm", config=config,
                      extra={"blk.0.attn_q_norm.weight": np.ones((3, 16), np.float32)})  # fmt: skip
    with pytest.raises(CheckpointError, match=r"got shape \[3, 16\], expected \[16\]"):
        load_gguf(short.path, torch.float32)


@pytest.mark.spread(20)
@pytest.mark.parametrize("architecture", CAUSAL)
def test_packed_weights_are_views_of_the_mapped_file(
    tiny_gguf: Maker, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = tiny_gguf(architecture, tied=True)
    opened = []
    monkeypatch.setattr(
        "qgraft.checkpoints.gguf_model.read_model", lambda path: opened.append(read_gguf(path)) or opened[0]
    )
    model, _ = load_gguf(tiny.path, torch.float32)
    start, size = opened[0].data.data_ptr(), opened[0].data.nbytes
    permuted = MOVED.get(architecture, ())
    modules = packed_modules(model)
    for path, module in modules.items():
        data = module.packed_weight.get().parts[0]
        inside = start <= data.data_ptr() and data.data_ptr() + data.nbytes <= start + size
        assert inside == (path.rpartition(".")[2] not in permuted), path
    stored = {info.name: info for info in opened[0].tensors.values()}
    floats = (*KERNELS, *ARCHITECTURES[architecture].floats, "ffn_gate_inp.weight", ".bias")
    matrices = {name for name in tiny.parameters if len(stored[name].shape) > 1 and not name.endswith(floats)}
    slices = {name: n for name, (n, *size) in ((name, info.shape) for name, info in stored.items())
              if len(size) == 2 and name not in tiny.parameters}  # fmt: skip
    # each slice is a layer of its own, and the tied output layer is one more
    assert len(modules) == len(matrices) + sum(slices.values()) + 1
    assert {m.packed_weight.format for m in modules.values()} == {stored[name].format for name in (*matrices, *slices)}


def test_permuted_rows_keep_their_bytes(tiny_gguf: Maker) -> None:
    tiny = tiny_gguf("llama")
    model, _ = load_gguf(tiny.path, torch.float32)
    file = read_gguf(tiny.path)
    for part in "qk":
        ours = model.get_submodule(f"model.layers.0.self_attn.{part}_proj").packed.parts[0]
        stored = file.packed(f"blk.0.attn_{part}.weight").parts[0]
        assert not torch.equal(ours, stored)
        assert sorted(map(bytes, ours.numpy())) == sorted(map(bytes, stored.numpy()))


def test_tied_output_shares_the_embedding(tiny_gguf: Maker) -> None:
    tied, _ = load_gguf(tiny_gguf("llama", tied=True).path, torch.float32)
    assert tied.get_output_embeddings().packed_weight is tied.get_input_embeddings().packed_weight
    untied, _ = load_gguf(tiny_gguf("llama").path, torch.float32)
    assert untied.get_output_embeddings().packed_weight is not untied.get_input_embeddings().packed_weight


def test_training_leaves_the_file_and_the_weights_alone(make_gguf: Maker, random_ids: Maker, tmp_path: Path) -> None:
    tiny = make_gguf(tmp_path / "tiny.gguf", "llama")
    before, ids = tiny.path.read_bytes(), random_ids(tiny.model)
    model, _ = load_gguf(tiny.path, torch.float32)
    base = logits(model, ids)
    attach_lora(model, r=4)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    losses = []
    for _ in range(3):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for _, layer in lora_layers(model):
        layer.active = {}
    assert torch.equal(logits(model, ids), base)
    assert tiny.path.read_bytes() == before


def test_bfloat16_computes_near_float32(tiny_gguf: Maker, random_ids: Maker) -> None:
    tiny = tiny_gguf("llama")
    ids = random_ids(tiny.model)
    model, _ = load_gguf(tiny.path, torch.bfloat16)
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        raw = model(ids).logits
    assert raw.dtype == torch.bfloat16
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert 1e-5 < relative(raw.float(), logits(tiny.model, ids)) < 0.1


@pytest.mark.parametrize("architecture", CAUSAL)
def test_greedy_generation_equals_the_float_model(tiny_gguf: Maker, random_ids: Maker, architecture: str) -> None:
    tiny = tiny_gguf(architecture, tied=True)
    ids = random_ids(tiny.model, rows=1)
    model, _ = load_gguf(tiny.path, torch.float32)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    got, expected = (m.generate(ids, attention_mask=mask, **options) for m in (model, tiny.model))
    assert got.shape == (1, ids.shape[1] + 6)
    assert torch.equal(got, expected)


def test_base_info(tiny_gguf: Maker) -> None:
    tiny = tiny_gguf("llama")
    base = load_gguf(tiny.path, torch.float32)[0].qgraft.info
    file = read_gguf(tiny.path)
    weights: dict[str, int] = {}
    for info in file.tensors.values():
        if len(info.shape) == 2:
            weights[info.format] = weights.get(info.format, 0) + info.shape[0] * info.shape[1]
    assert {"q4_1", "q4_0", "q5_1", "q8_0", "f16", "q4_k"} <= weights.keys()
    assert (base.source, base.container, base.architecture) == (str(tiny.path), "gguf", "llama")
    assert base.formats == weights
    assert base.fingerprint == gguf_fingerprint(file)
    assert base.notes == ()


def test_fingerprint_ignores_path_and_metadata_but_not_weights(make_gguf: Maker, tmp_path: Path) -> None:
    variants: list[dict[str, Any]] = [{}, {"metadata": {"general.name": "other"}}, {"seed": 1}, {"tied": True}]
    files = [make_gguf(tmp_path / f"{i}.gguf", "llama", **options).path for i, options in enumerate(variants)]
    first, renamed, reseeded, tied = (gguf_fingerprint(read_gguf(path)) for path in files)
    assert first == renamed
    assert len({first, reseeded, tied}) == 3


def test_rope_factors_divide_the_frequencies(make_gguf: Maker, random_ids: Maker, tmp_path: Path) -> None:
    factors = np.array([1, 1, 2, 4, 8, 8, 8, 8], np.float32)
    tiny = make_gguf(tmp_path / "tiny.gguf", "llama", extra={"rope_freqs.weight": factors})
    ids = random_ids(tiny.model, length=32)
    plain = logits(tiny.model, ids)
    tiny.model.model.rotary_emb.inv_freq /= torch.from_numpy(factors)
    model, _ = load_gguf(tiny.path, torch.float32)
    assert relative(logits(model, ids), logits(tiny.model, ids)) < 1e-5
    assert relative(logits(model, ids), plain) > 1e-3
    assert model.qgraft.info.fingerprint != gguf_fingerprint(read_gguf(make_gguf(tmp_path / "plain.gguf").path))


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, [2]),
        ({"eot": 5}, [2, 5]),
        ({"eot": 2}, [2]),
        ({"eos": None, "eot": 5}, [5]),
        ({"eot": 5, "eom": 6}, [2, 5, 6]),
    ],
)
def test_generation_stops_at_end_of_text_and_of_turn(
    make_gguf: Maker, tmp_path: Path, keys: dict[str, int | None], expected: list[int]
) -> None:
    metadata = {f"tokenizer.ggml.{key}_token_id": value for key, value in keys.items()}
    tiny = make_gguf(tmp_path / "tiny.gguf", "llama", metadata=metadata)
    assert load_gguf(tiny.path, torch.float32)[0].generation_config.eos_token_id == expected


@pytest.mark.spread(3)
@pytest.mark.parametrize("architecture", CAUSAL)
def test_tokenizer_is_llamacpps(tiny_gguf: Maker, architecture: str) -> None:
    """test_gguf_tokenizer.py asks more. transformers' reader goes by the architecture: no blank in front for a Gemma, and in
    some releases no bos for a Phi-3."""
    pytest.importorskip("xllamacpp")
    tiny = tiny_gguf(architecture, tied=True)
    _, ours = load_gguf(tiny.path, torch.float32)
    text = "the cat sat on the mat, héllo"
    assert [ours(text).input_ids] == llamacpp([(tiny.path, [text])], special=True)[0]["ids"]
    assert len(ours(text).input_ids) > 5
    sentencepiece = architecture in SENTENCEPIECE
    assert (ours.bos_token_id, ours.eos_token_id) == (1, 2)
    assert (ours.unk_token_id, ours.pad_token_id) == ((0, 3) if sentencepiece else (None, None))
    if not sentencepiece and architecture in READ_BY_TRANSFORMERS:
        theirs = AutoTokenizer.from_pretrained(tiny.path.parent, gguf_file=tiny.path.name)
        assert ours(text).input_ids == theirs(text).input_ids


def test_chat_template_of_the_file(tiny_gguf: Maker) -> None:
    _, tokenizer = load_gguf(tiny_gguf("llama").path, torch.float32)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer(chat, add_special_tokens=False).input_ids[0] == 1


NORM = "blk.1.attn_norm.weight"
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "missing tensors": (
        {"drop": (NORM, "blk.0.ffn_up.weight")},
        CheckpointError,
        r"(?s)missing model\.layers\.0\.mlp\.up_proj\.weight \[256, 64\].*missing model\.layers\.1\.input_layernorm\.weight",
    ),
    "unexpected tensor": (
        {"extra": {"blk.0.attn_q.lora_a": np.ones((8, 64), np.float32)}},
        CheckpointError,
        r"1 tensors have no place in the architecture llama: blk\.0\.attn_q\.lora_a",
    ),
    "wrong shape of a norm": (
        {"extra": {NORM: np.ones(63, np.float32)}}, CheckpointError, r"got shape \[63\], expected \[64\]"
    ),
    "norm in three dims": ({"extra": {NORM: np.ones((2, 4, 8), np.float32)}}, CheckpointError, r"got shape \[2, 4, 8\]"),
    "norm as a matrix": ({"extra": {NORM: np.ones((4, 64), np.float32)}}, CheckpointError, r"got shape \[4, 64\]"),
    "linear in one dim": (
        {"extra": {"blk.0.ffn_up.weight": np.ones(64, np.float32)}},
        CheckpointError,
        r"up_proj\.weight: got shape \[64\], expected \[256, 64\]",
    ),
    "rows that cannot be permuted": (
        {"extra": {"blk.0.attn_q.weight": np.ones((63, 64), np.float32)}},
        CheckpointError,
        r"q_proj\.weight: got shape \[63, 64\], expected \[64, 64\]",
    ),
    "rope factors": (
        {"extra": {"rope_freqs.weight": np.ones(7, np.float32)}},
        CheckpointError,
        r"rope_freqs\.weight \[7\] fits no rotary embedding",
    ),
    "no tokenizer": ({"tokenizer": False}, CheckpointError, "no tokenizer inside"),
    "unknown tokenizer": (
        {"metadata": {"tokenizer.ggml.model": "rwkv"}}, UnsupportedError, "model 'rwkv'; supported: gpt2, llama"
    ),
    "broken merges": (
        {"metadata": {"tokenizer.ggml.merges": ["zz qq"]}},
        CheckpointError,
        "cannot build the tokenizer: ",
    ),
    "unknown architecture": ({"metadata": {"general.architecture": "lama"}}, UnsupportedError, "(?s)'lama'.*mean llama"),
    "adapter": (
        {"metadata": {"general.architecture": "bert", "general.type": "adapter"}},
        UnsupportedError,
        "is a GGUF adapter, not a model",
    ),
    "more blocks than there are": (
        {"metadata": {"llama.block_count": 200_000}},  # building them would take minutes
        CheckpointError,
        r"llama\.block_count: got 200000, expected an integer from 1 to 2",
    ),
    "no heads": ({"metadata": {"llama.attention.head_count": 0}}, CheckpointError, "head_count: got 0"),
    "heads of text": ({"metadata": {"llama.attention.head_count": "x"}}, CheckpointError, "head_count: got 'x'"),
    "heads that do not divide": (
        {"metadata": {"llama.attention.head_count": 3}}, CheckpointError, "number of attention heads"
    ),
    "no width": ({"metadata": {"llama.embedding_length": None}}, CheckpointError, "embedding_length: got None"),
    "other width": ({"metadata": {"llama.embedding_length": 128}}, CheckpointError, "does not fit the architecture"),
    "epsilon of text": ({"metadata": {"llama.attention.layer_norm_rms_epsilon": "x"}}, CheckpointError, "got 'x', expecte"),
    "theta of text": ({"metadata": {"llama.rope.freq_base": "x"}}, CheckpointError, r"freq_base: got 'x'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(make_gguf: Maker, tmp_path: Path, case: str) -> None:
    options, kind, message = REFUSED[case]
    options = copy.deepcopy(options)
    named = (options.get("metadata") or {}).pop("general.architecture", None)
    tiny = make_gguf(tmp_path / "tiny.gguf", "llama", **options)
    if named:
        raw = tiny.path.read_bytes()
        key = b"general.architecture"
        at = raw.index(key) + len(key) + 4
        tiny.path.write_bytes(raw[:at] + len(named).to_bytes(8, "little") + named.encode() + _padded(raw, at, named))
    with pytest.raises(kind, match=message) as caught:
        load_gguf(tiny.path, torch.float32)
    assert str(tiny.path) in str(caught.value) or kind is UnsupportedError


def _padded(raw: bytes, at: int, named: str) -> bytes:
    """The rest of a file behind the architecture's name, moved by whole alignments where the name got shorter."""
    rest, removed = raw[at + 8 + len("llama") :], len("llama") - len(named)
    data = read_data_offset(raw) - (at + 8 + len("llama"))
    return rest[:data] + b"\0" * removed + rest[data:]


def read_data_offset(raw: bytes) -> int:
    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        file.write(raw)
        file.flush()
        return read_gguf(file.name).data_offset


def test_tie_weights_changes_nothing(tiny_gguf: Maker, random_ids: Maker) -> None:
    for tied in (False, True):
        tiny = tiny_gguf("llama", tied=tied)
        ids = random_ids(tiny.model)
        model, _ = load_gguf(tiny.path, torch.float32)
        before = logits(model, ids)
        model.tie_weights()
        assert torch.equal(logits(model, ids), before)
        assert isinstance(model.get_output_embeddings(), QuantizedLinear)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_casting_keeps_the_stored_bytes(tiny_gguf: Maker, random_ids: Maker, dtype: torch.dtype) -> None:
    tiny = tiny_gguf("llama", tied=True)
    ids = random_ids(tiny.model)
    model, _ = load_gguf(tiny.path, torch.float32)
    stored = {path: module.packed_weight.get().parts[0].clone() for path, module in packed_modules(model).items()}
    model.to(dtype)
    for path, module in packed_modules(model).items():
        assert torch.equal(module.packed_weight.get().parts[0], stored[path])
    assert model.get_output_embeddings().packed_weight is model.get_input_embeddings().packed_weight
    assert relative(logits(model, ids), logits(tiny.model, ids)) < (1e-5 if dtype == torch.float32 else 0.1)


def test_a_deep_copy_is_a_model_of_its_own(tiny_gguf: Maker, random_ids: Maker) -> None:
    tiny = tiny_gguf("llama", tied=True)
    ids = random_ids(tiny.model)
    model, _ = load_gguf(tiny.path, torch.float32)
    twin = copy.deepcopy(model)
    before = logits(model, ids)
    assert torch.equal(logits(twin, ids), before)
    twin.get_submodule("model.layers.0.mlp.up_proj").packed_weight.get().parts[0].zero_()
    assert not torch.equal(logits(twin, ids), before)
    assert torch.equal(logits(model, ids), before)
    assert twin.get_output_embeddings().packed_weight is twin.get_input_embeddings().packed_weight


def test_memory_footprint_is_that_of_the_packed_bytes(tiny_gguf: Maker) -> None:
    tiny = tiny_gguf("llama", tied=True)
    model, _ = load_gguf(tiny.path, torch.float32)
    stored = sum(info.nbytes for info in read_gguf(tiny.path).tensors.values())
    assert stored <= model.get_memory_footprint() < stored + 1000  # the rotary tables are beside them
    floats = tiny.model.get_memory_footprint()
    assert model.get_memory_footprint() < 0.45 * floats
