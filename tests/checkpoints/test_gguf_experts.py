"""Mixtures of experts out of GGUF files, and LoRAs on the experts themselves: PEFT's own layers on transformers' float model
of the weights that the file's bytes mean give the same logits and gradients; merged, saved, exported they are what they were.

test_gguf_architectures.py and test_gguf_model.py go through these architectures with all others, tests/oracle has llama.cpp.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gguf import GGMLQuantizationType as Q
from gguf_copies import fuse
from peft import PeftModel
from torch import Tensor, nn

import qgraft
from qgraft.adapter_files.gguf_lora import export_gguf_lora
from qgraft.adapters.lora_experts import ExpertLora
from qgraft.errors import AdapterError, CheckpointError, OptionError, UnsupportedError
from qgraft.experts import ExpertStack
from qgraft.linear import computing

Maker = Callable[..., Any]
BOTH = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
ARCHITECTURES = (
    "qwen3moe", "gpt-oss", "granitemoe", "mixtral", "olmoe", "qwen2moe", "deepseek2", "deepseek3", "dots1", "ernie4_5-moe",
    "glm4moe", "lfm2moe", "qwen35moe", "hunyuan-moe", "minimax-m2", "granitemoeshared",
)  # fmt: skip
ROWS = [{"instruction": f"question {i}", "output": f"the cat {i} sat on the mat"} for i in range(24)]
EACH = pytest.mark.parametrize(
    "architecture",
    ["gpt-oss", *(pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES if name != "gpt-oss")],
)


def names_of(architecture: str, parameters: tuple[str, ...] = BOTH) -> list[str]:
    block = {"granitemoe": "block_sparse_moe", "granitemoeshared": "block_sparse_moe", "lfm2moe": "feed_forward"}.get(
        architecture, "mlp"
    )
    return [name.replace("mlp", block) for name in parameters]


def adapted(path: Path, architecture: str, parameters: tuple[str, ...] = BOTH, **options: Any) -> Any:
    """The file's model with a LoRA on its experts, whose numbers are large enough to change all it says."""
    model, _ = qgraft.load(path, dtype="float32", device="cpu")
    qgraft.attach_lora(
        model, **{"r": 2, "lora_alpha": 4, "target_parameters": names_of(architecture, parameters), **options}
    )
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.12)
    return model


def logits(model: Any, ids: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids, **options).logits
    return found


def off(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


@EACH
def test_loras_on_experts_are_those_of_peft(
    architecture: str, make_gguf: Maker, random_ids: Maker, tmp_path: Path
) -> None:
    tiny = make_gguf(tmp_path / "tiny.gguf", architecture)
    # PEFT takes gate_proj and up_proj of layers beside the experts for those of experts, as transformers 4 had them
    beside = (
        {}
        if architecture in ARCHITECTURES[:6]
        else {"target_modules": ["o_proj" if architecture != "lfm2moe" else "out_proj"]}
    )
    model = adapted(tiny.path, architecture, **beside)
    layers = sum(".experts.down_proj" in name and "bias" not in name for name in tiny.model.state_dict())
    ids = random_ids(tiny.model, length=24)
    base = logits(tiny.model, ids)
    qgraft.save_adapter(model, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(tiny.model, tmp_path / "adapter", is_trainable=True)
    losses = []
    for each in (model, theirs):
        out = each(ids).logits
        losses.append(F.cross_entropy(out[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
        losses[-1].backward()
    expected = logits(theirs, ids)
    assert off(base, expected) > 0.05, "the adapter does too little"
    assert off(logits(model, ids), expected) < 1e-5
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    gradients = {name.replace(".default", ""): p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    found: dict[str, Tensor] = {}
    for path, part in model.qgraft.adapters["default"].parts.items():
        for parameter in part.parameters():
            parameter.data = parameter.grad
        found |= part.tensors(path)
    assert found.keys() == gradients.keys()
    assert sum("experts" in name for name in found) == 4 * layers
    for name, gradient in gradients.items():
        assert float((found[name] - gradient).abs().max()) < 1e-4 * largest, name


@pytest.mark.spread(1)
@pytest.mark.parametrize("parameters", [BOTH, BOTH[:1], BOTH[1:], ("model.layers.1.mlp.experts.gate_up_proj", BOTH[1])])
def test_files_of_an_adapter_on_some_of_the_experts(
    parameters: tuple[str, ...], tiny_gguf: Maker, random_ids: Maker, tmp_path: Path
) -> None:
    tiny = tiny_gguf("qwen3moe")
    model, ids = adapted(tiny.path, "qwen3moe", parameters, target_modules=()), random_ids(tiny.model, rows=1)
    expected = logits(model, ids)
    qgraft.save_adapter(model, tmp_path / "adapter")
    export_gguf_lora(model, tmp_path / "lora.gguf", dtype="float32")
    for stored in ("adapter", "lora.gguf"):
        again, _ = qgraft.load(tiny.path, dtype="float32", device="cpu")
        loaded = qgraft.load_adapter(again, tmp_path / stored)
        assert loaded.applied == loaded.total == len(model.qgraft.adapters["default"].parts)
        assert torch.equal(logits(again, ids), expected), stored
    if len(parameters[0]) == len(BOTH[0]):
        theirs = PeftModel.from_pretrained(tiny_gguf("qwen3moe", seed=0, tied=False).model, tmp_path / "adapter")
        assert off(expected, logits(theirs, ids)) < 1e-5
        theirs.unload()


@pytest.mark.slow
def test_gate_and_up_with_an_a_of_their_own_are_one_lora_of_both_ranks(
    tiny_gguf: Maker, random_ids: Maker, tmp_path: Path
) -> None:
    """As a GGUF-LoRA may have them that was trained elsewhere."""
    tiny, generator = tiny_gguf("gpt-oss"), np.random.default_rng(0)
    path, sizes = tmp_path / "lora.gguf", {"ffn_gate_exps": (64, 96), "ffn_up_exps": (64, 96)}
    writer = gguf.GGUFWriter(path, "gpt-oss")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 4.0)
    pairs = {}
    for name, (width, out) in sizes.items():
        A, B = (generator.normal(0, 0.2, shape).astype(np.float32) for shape in ((6, 2, width), (6, out, 2)))
        pairs[name] = torch.from_numpy(B @ A * 2.0)
        writer.add_tensor(f"blk.1.{name}.weight.lora_a", A)
        writer.add_tensor(f"blk.1.{name}.weight.lora_b", B)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model, _ = qgraft.load(tiny.path, dtype="float32", device="cpu")
    qgraft.load_adapter(model, path)
    weight = tiny.model.model.layers[1].mlp.experts.gate_up_proj
    kept, ids = weight.detach().clone(), random_ids(tiny.model, rows=1)
    with torch.no_grad():
        weight += torch.stack([pairs[name] for name in sizes], 2).flatten(1, 2).transpose(1, 2)
        expected = logits(tiny.model, ids)
        weight.copy_(kept)
    assert off(logits(model, ids), expected) < 1e-5


@pytest.mark.spread(1)
@pytest.mark.parametrize("method", ["codes", "auto", "nearest"])
def test_experts_take_what_an_adapter_learned(
    method: str, make_gguf: Maker, random_ids: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = make_gguf(tmp_path / "tiny.gguf", "qwen3moe", types=(Q.Q8_0 if method == "nearest" else Q.Q4_1,))
    model = adapted(tiny.path, "qwen3moe", target_modules=())
    for part in model.qgraft.adapters["default"].parts.values():
        part.lora_B.data[3].zero_()  # an expert that no token of the training came to
    monkeypatch.setattr("qgraft.merging.experts.FEWEST", 200)
    ids = random_ids(tiny.model, rows=1, length=60)
    base, learned = logits(tiny.model, ids), logits(model, ids)
    report = qgraft.merge(model, calibration=ROWS, min_retained=-1e9, method=method)
    assert len(report.layers) == 6
    merged = logits(model, ids)
    far, near = (float((merged - each).norm() / (learned - base).norm()) for each in (base, learned))
    assert near < {"nearest": 0.15, "codes": 0.9, "auto": 0.6}[method] < far
    few = [note for note in report.notes if "too few calibration tokens" in note]
    assert bool(few) == (method != "nearest")
    stacks = {path: module for path, module in model.named_modules() if isinstance(module, ExpertStack)}
    untouched, _ = qgraft.load(tiny.path, dtype="float32", device="cpu")
    for path, stack in stacks.items():
        before, after = untouched.get_submodule(path).packed.parts[0].chunk(6), stack.packed.parts[0].chunk(6)
        assert torch.equal(before[3], after[3])
        assert not torch.equal(before[0], after[0])
    saved = qgraft.save(model, tmp_path / "merged.gguf")
    assert saved.changed == 6
    again, _ = qgraft.load(tmp_path / "merged.gguf", dtype="float32", device="cpu")
    assert torch.equal(logits(again, ids), merged)
    qgraft.unmerge(model)
    assert torch.equal(logits(model, ids), learned)
    with pytest.raises(AdapterError, match="is active and would not be in the saved weights"):
        qgraft.save(model, tmp_path / "unmerged.gguf")


def test_rows_of_a_batch_have_their_own_adapters(tiny_gguf: Maker, random_ids: Maker) -> None:
    tiny = tiny_gguf("qwen3moe")
    model, ids = adapted(tiny.path, "qwen3moe", name="one"), random_ids(tiny.model, rows=3)
    qgraft.attach_lora(model, r=3, name="two", target_parameters=BOTH[1:], target_modules=())
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.12)
    got = logits(model, ids, adapter_names=["two", "__base__", "one"])
    for row, name in enumerate(("two", None, "one")):
        qgraft.use_adapter(model, name)
        assert off(got[row], logits(model, ids)[row]) < 1e-5
    qgraft.detach_adapter(model)
    assert not any(isinstance(module, ExpertLora) for module in model.modules())
    assert off(logits(model, ids), logits(tiny.model, ids)) < 1e-5


def test_experts_compute_in_the_dtype_and_the_way_that_is_asked_for(tiny_gguf: Maker, random_ids: Maker) -> None:
    tiny = tiny_gguf("gpt-oss")
    model, ids = adapted(tiny.path, "gpt-oss"), random_ids(tiny.model)
    expected = logits(model, ids)
    with computing(model, "int8"):
        rounded = logits(model, ids)
    assert 0 < off(rounded, expected) < 0.2
    assert 0 < off(logits(model.to(torch.bfloat16), ids).float(), expected) < 0.3


def test_rotations_of_gpt_oss_are_its_authors(make_gguf: Maker, random_ids: Maker, tmp_path: Path) -> None:
    """llama.cpp begins and ends the ramp of yarn at whole frequencies; the released model does not."""
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
            "truncate": False, "original_max_position_embeddings": 16}  # fmt: skip
    keys = {"gpt-oss.rope.scaling.type": "yarn", "gpt-oss.rope.scaling.factor": 32.0,
            "gpt-oss.rope.scaling.original_context_length": 16}  # fmt: skip
    tiny = make_gguf(tmp_path / "tiny.gguf", "gpt-oss", config={"rope_parameters": rope}, metadata=keys)
    model, _ = qgraft.load(tiny.path, dtype="float32", device="cpu")
    ids = random_ids(tiny.model, length=40)
    assert off(logits(model, ids), logits(tiny.model, ids)) < 1e-5


@pytest.mark.slow
def test_a_file_called_llama_with_experts_is_a_mixtral(tiny_gguf: Maker, random_ids: Maker) -> None:
    tiny = tiny_gguf("mixtral")
    model, _ = qgraft.load(tiny.path, dtype="float32", device="cpu")
    assert model.config.model_type == "mixtral"
    ids = random_ids(tiny.model, length=24)
    assert off(logits(model, ids), logits(tiny.model, ids)) < 1e-5
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), tiny.model.generate(ids, **options))


def test_experts_are_quantized_and_saved_in_another_format(tiny_gguf: Maker, random_ids: Maker, tmp_path: Path) -> None:
    tiny = tiny_gguf("qwen3moe", types=(Q.F32,))
    model, _ = qgraft.load(tiny.path, dtype="float32", device="cpu")
    qgraft.save(model, tmp_path / "saved.gguf", to="q8_0")
    qgraft.quantize(model, "q8_0")
    again, _ = qgraft.load(tmp_path / "saved.gguf", dtype="float32", device="cpu")
    for each in (model, again):
        kinds = {module.packed.format for module in each.modules() if isinstance(module, ExpertStack)}
        assert kinds == {"q8_0"}
    ids = random_ids(tiny.model)
    assert torch.equal(logits(model, ids), logits(again, ids))
    for path, stack in again.named_modules():
        if isinstance(stack, ExpertStack):
            whole = model.get_submodule(path).packed
            meant = gguf.quants.dequantize(stack.packed.parts[0].numpy(), Q.Q8_0)
            assert np.array_equal(meant, qgraft.formats.dequantize(whole, torch.float32).numpy())


def test_gate_and_up_in_one_tensor(make_gguf: Maker, random_ids: Maker, tmp_path: Path) -> None:
    tiny = make_gguf(tmp_path / "tiny.gguf", "qwen3moe", types=(Q.Q4_0,))
    fused = fuse(tiny.path, tmp_path / "fused.gguf")
    ids, found = random_ids(tiny.model, rows=1, length=30), []
    for path in (tiny.path, fused):
        model = adapted(path, "qwen3moe", target_modules=())
        found.append(logits(model, ids))
        qgraft.save_adapter(model, tmp_path / path.stem)
        export_gguf_lora(model, tmp_path / f"{path.stem}.lora.gguf", dtype="float32")
        qgraft.merge(model, method="nearest", min_retained=-1e9)
        found.append(logits(model, ids))
        qgraft.save(model, tmp_path / f"merged-{path.name}")
    assert off(found[2], found[0]) < 1e-5
    assert off(found[3], found[1]) < 1e-5
    names = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "merged-fused.gguf").tensors}
    assert "blk.0.ffn_gate_up_exps.weight" in names and "blk.0.ffn_up_exps.weight" not in names
    again, _ = qgraft.load(tmp_path / "merged-fused.gguf", dtype="float32", device="cpu")
    assert torch.equal(logits(again, ids), found[3])
    for stored in ("tiny", "fused.lora.gguf"):
        again, _ = qgraft.load(fused, dtype="float32", device="cpu")
        qgraft.load_adapter(again, tmp_path / stored, force=stored == "tiny")  # whose base is another file
        assert off(logits(again, ids), found[0]) < 1e-5, stored


def floats(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "experts of two sizes": (
        {"extra": {"blk.0.ffn_up_exps.weight": floats(6, 40, 64)}},
        r"gate_up_proj: got experts \[\(6, 32, 64\), \(6, 40, 64\)\], expected \[\(6, 32, 64\), \(6, 32, 64\)\]",
    ),
    "too few experts": (
        {"extra": {"blk.1.ffn_down_exps.weight": floats(5, 64, 32)}}, r"down_proj: got experts \[\(5, 64, 32\)\]",
    ),
    "one matrix": ({"extra": {"blk.1.ffn_down_exps.weight": floats(64, 32)}}, r"expected matrices \[experts, out, in\]"),
    "no gate": ({"drop": ("blk.1.ffn_gate_exps.weight",)}, r"missing model\.layers\.1\.mlp\.experts\.gate_up_proj"),
    "no router": ({"drop": ("blk.1.ffn_gate_inp.weight",)}, r"missing model\.layers\.1\.mlp\.gate\.weight"),
    "tensors of another kind": (
        {"extra": {"blk.0.ffn_gate_shexp.weight": floats(32, 64)}}, r"1 tensors have no place.*ffn_gate_shexp",
    ),
    "more experts than tensors": ({"metadata": {"qwen3moe.expert_count": 10**6}}, "expert_count: got 1000000"),
    **{f"a count of {count} experts": (
        {"metadata": {"qwen3moe.expert_count": count}}, f"expert_count: got {count}, expected an integer from 1 to",
    ) for count in (None, 0)},
    "more experts a token than there are": (
        {"metadata": {"qwen3moe.expert_used_count": 7}}, "expert_used_count: got 7, expected an integer from 1 to 6",
    ),
    "gate and up twice": (
        {"extra": {"blk.0.ffn_gate_up_exps.weight": floats(6, 64, 64)}}, r"2 tensors have no place.*ffn_gate_exps",
    ),
    "half of gate and up": (
        {"extra": {"blk.0.ffn_gate_up_exps.weight": floats(6, 32, 64)},
         "drop": ("blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight")},
        r"gate_up_proj: got experts \[\(6, 32, 64\)\], expected \[\(6, 64, 64\)\]",
    ),
    "groups of experts": ({"metadata": {"qwen3moe.expert_group_count": 2}}, "expert_group_count: got 2, expected 0"),
    "another gate": ({"metadata": {"qwen3moe.expert_gating_func": 2}}, "expert_gating_func: got 2, expected 1"),
}  # fmt: skip


BAD_ELSEWHERE: dict[str, tuple[str, dict[str, Any], str]] = {
    "biases of two sizes": (
        "gpt-oss", {"extra": {"blk.1.ffn_up_exps.bias": floats(6, 90)}},
        r"blk\.1\.ffn_up_exps\.bias: got shapes \[\[6, 96\], \[6, 90\]\], expected biases",
    ),
    "biases of no expert": (
        "gpt-oss", {"extra": {"blk.1.ffn_down_exps.bias": floats(384)}}, r"got shapes \[\[384\]\], expected biases",
    ),
    "the choice of one layer": (
        "lfm2moe", {"drop": ("blk.2.exp_probs_b.bias",)}, r"missing model\.layers\.2\.feed_forward\.expert_bias \[6\]",
    ),
    "that of DeepSeek's": (
        "glm4moe", {"drop": ("blk.1.exp_probs_b.bias",)}, r"missing model\.layers\.1\.mlp\.gate\.e_score_correction_bias",
    ),
}  # fmt: skip


@pytest.mark.spread(2)
@pytest.mark.parametrize("name", BAD_ELSEWHERE)
def test_tensors_beside_the_experts_that_are_not_what_the_architecture_has(
    name: str, make_gguf: Maker, tmp_path: Path
) -> None:
    architecture, options, message = BAD_ELSEWHERE[name]
    tiny = make_gguf(tmp_path / "tiny.gguf", architecture, **options)
    with pytest.raises(CheckpointError, match=rf"(?s){message}"):
        qgraft.load(tiny.path, device="cpu")


@pytest.mark.parametrize("name", BAD)
def test_experts_that_are_not_what_the_architecture_has(name: str, make_gguf: Maker, tmp_path: Path) -> None:
    options, message = BAD[name]
    tiny = make_gguf(tmp_path / "tiny.gguf", "qwen3moe", **options)
    with pytest.raises((CheckpointError, UnsupportedError), match=rf"(?s){message}"):
        qgraft.load(tiny.path, device="cpu")


def test_what_cannot_be_adapted_is_refused(tiny_gguf: Maker, tmp_path: Path) -> None:
    model, _ = qgraft.load(tiny_gguf("qwen3moe").path, dtype="float32", device="cpu")
    with pytest.raises(
        OptionError, match=r"no packed weights of experts are named experts\.up_proj.*experts\.gate_up_proj"
    ):
        qgraft.attach_lora(model, target_parameters=["experts.up_proj"])
    with pytest.raises(OptionError, match=r"no packed weights of experts are named gate\.weight"):
        qgraft.attach_lora(model, target_parameters=["gate.weight"])
    with pytest.raises(OptionError, match="no linear layer is named gate"):
        qgraft.attach_lora(model, target_modules="gate")
    with pytest.raises(OptionError, match=r"target_parameters=None: expected names"):
        qgraft.attach_lora(model, target_parameters=None)
    with pytest.raises(UnsupportedError, match=r"lora_dropout=0\.1: a LoRA on experts has none"):
        qgraft.attach_lora(model, lora_dropout=0.1, target_parameters=BOTH)
    for other in ({"use_dora": True}, {"init_lora_weights": "pissa"}):
        with pytest.raises(
            UnsupportedError, match=r"embeddings, experts and convolutions have no .*; linear layers have"
        ):
            qgraft.attach_lora(model, target_modules=(), target_parameters=BOTH, **other)
    assert not model.qgraft.adapters
    llama, _ = qgraft.load(tiny_gguf("llama").path, dtype="float32", device="cpu")
    with pytest.raises(OptionError, match="none: it has no experts"):
        qgraft.attach_lora(llama, target_parameters=BOTH)
    model = adapted(tiny_gguf("qwen3moe").path, "qwen3moe", target_modules=())
    with pytest.raises(UnsupportedError, match=r"combine: .*a LoRA on experts is a product of two matrices for each"):
        qgraft.combine(model, {"default": 1.0}, "sum")
    qgraft.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(
        AdapterError, match=r"target_parameters: mlp\.experts\.down_proj is none of the model's experts"
    ):
        qgraft.load_adapter(llama, tmp_path / "adapter")
    state = qgraft.lora_state_dict(model)
    doubled = {name: tensor * 2 for name, tensor in state.items()}
    qgraft.load_lora_state_dict(model, doubled)
    assert all(torch.equal(tensor, doubled[name]) for name, tensor in qgraft.lora_state_dict(model).items())
