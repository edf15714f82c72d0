"""Every architecture of a GGUF file, measured by transformers' own float model of the weights that the file's bytes mean:
logits, losses and gradients of LoRAs, greedy tokens; and refused where the file says what is not computed.

tests/oracle has llama.cpp read the same files.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from gguf import GGMLQuantizationType as Q
from gguf import GGUFReader
from safetensors.torch import load_file
from tiny_models import PAIRS, STORED_AS
from torch import Tensor, nn

import qgraft
from qgraft.adapter_files.gguf_lora import export_gguf_lora
from qgraft.checkpoints.gguf_keys import TABLE
from qgraft.data.batches import IGNORED, collate
from qgraft.data.tokenizing import Sample
from qgraft.errors import CheckpointError, UnsupportedError
from qgraft.merging.exact import merge_exactly
from qgraft.merging.lockstep import merge_in_step
from qgraft.passes.batched_trial import why_not_batched
from qgraft.passes.decoder import padding_free
from qgraft.passes.decoding import fast_decoding
from qgraft.passes.decoding_families import FAMILIES
from qgraft.passes.loss import batch_loss

Maker = Callable[..., Any]
# with the penalty, as a tied model of random weights repeats its last token
GREEDY: dict[str, Any] = {"max_new_tokens": 32, "do_sample": False, "eos_token_id": None, "pad_token_id": 0,
                          "repetition_penalty": 20.0}  # fmt: skip
LENGTHS, SCALING = (7, 9, 40), 2.0  # the last one is longer than every window
RECURRENT = {
    "lfm2",
    "lfm2moe",
    "qwen35",
    "qwen35moe",
}  # layers that carry a state, or convolve along the row: one sample in each pass
ALL = pytest.mark.parametrize("architecture", sorted(TABLE.keys() - PAIRS))
MODELS_OF_ALL = pytest.mark.parametrize("architecture", sorted((TABLE.keys() | STORED_AS.keys()) - PAIRS))


def samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(4, 250, (length,), generator=generator).tolist() for length in LENGTHS]
    return [Sample(ids, [IGNORED] * (len(ids) // 2) + ids[len(ids) // 2 :], "") for ids in rows]


def own_losses(model: nn.Module) -> Tensor:
    """The sum over the labels of all samples, each passed alone through transformers' model."""
    total = torch.zeros(())
    for sample in samples():
        rows = model(torch.tensor([sample.input_ids]), use_cache=False).logits[0, :-1].float()
        total = total + F.cross_entropy(rows, torch.tensor(sample.labels[1:]), ignore_index=IGNORED, reduction="sum")
    return total


def loras(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def with_loras(model: nn.Module, values: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Add x A^T B^T * SCALING to the layers of a float model, by hooks; the leaves by the names that qgraft gives them."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in values.items()}
    for name in [name for name in leaves if name.endswith("lora_A")]:
        a, b = leaves[name], leaves[name[:-1] + "B"]
        layer = model.get_submodule(name.partition(".loras.")[0])
        layer.register_forward_hook(lambda _, x, y, a=a, b=b: y + SCALING * (x[0] @ a.T) @ b.T)
    return leaves


@pytest.mark.spread(8)
@MODELS_OF_ALL
def test_losses_and_gradients_are_those_of_transformers_model(
    architecture: str, make_gguf: Maker, tmp_path: Path
) -> None:
    tiny = make_gguf(tmp_path / "tiny.gguf", architecture)
    model, _ = qgraft.load(tiny.path, dtype="float32", device="cpu")
    qgraft.attach_lora(model, r=2, lora_alpha=4)
    torch.manual_seed(1)
    trained = loras(model)
    for parameter in trained.values():
        nn.init.normal_(parameter, std=0.05)
    leaves = with_loras(tiny.model, trained)
    expected = own_losses(tiny.model)
    expected.backward()
    largest = max(float(leaf.grad.abs().max()) for leaf in leaves.values())

    def check(loss: Tensor, how: str) -> None:
        torch.testing.assert_close(loss.float(), expected, rtol=1e-5, atol=1e-4, msg=how)
        model.zero_grad()
        loss.backward()
        for name, leaf in leaves.items():
            off = float((trained[name].grad - leaf.grad).abs().max()) / largest
            assert off < 1e-4, f"{how}, {name}: off by {off:.2g} of the largest gradient"

    check(own_losses(model), "the model's own pass")
    with padding_free(model, samples()) as problem:
        assert problem is not None or architecture not in RECURRENT
        check(sum(batch_loss(model, collate([sample])) for sample in samples()), "alone")
        if problem is None:
            check(batch_loss(model, collate(samples())), "packed")


@pytest.mark.parametrize("architecture", sorted(RECURRENT))
def test_recurrent_layers_see_one_sample_whatever_a_trial_would_say(
    architecture: str, tiny_gguf: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = qgraft.load(tiny_gguf(architecture).path, dtype="float32", device="cpu")
    alone = sum(float(batch_loss(model, collate([sample]))) for sample in samples())
    together = float(batch_loss(model, collate(samples())))
    assert abs(together - alone) > 1e-4 * alone  # what would be learned
    monkeypatch.setattr("qgraft.passes.decoder.EXACT", 1e9)
    with padding_free(model, samples()) as problem:
        assert problem is not None and "does not keep samples apart" in problem
    assert why_not_batched(model) is not None


@pytest.mark.spread(8)
@MODELS_OF_ALL
def test_logits_and_greedy_tokens_are_those_of_transformers_model(
    architecture: str, tiny_gguf: Maker, random_ids: Maker
) -> None:
    tiny = tiny_gguf(architecture)
    model, _ = qgraft.load(tiny.path, dtype="float32", device="cpu")
    ids = random_ids(tiny.model, rows=1, length=40)
    with torch.no_grad():
        expected = tiny.model(ids).logits
        assert float((model(ids).logits - expected).abs().max() / expected.abs().max()) < 1e-5
    mask = torch.ones_like(ids)
    expected = tiny.model.generate(ids, attention_mask=mask, **GREEDY)
    assert len(set(expected[0, 40:].tolist())) > 3
    assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), expected)
    with fast_decoding(model) as problem:
        assert (problem is None) == (model.config.model_type in FAMILIES)
        assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), expected)


@pytest.mark.spread(4)
@MODELS_OF_ALL
def test_what_an_adapter_learned_is_in_the_merged_file(architecture: str, tiny_gguf: Maker, tmp_path: Path) -> None:
    tiny = tiny_gguf(architecture)
    model, tokenizer = qgraft.load(tiny.path, dtype="float32", device="cpu")
    qgraft.attach_lora(model, r=2, lora_alpha=4)
    torch.manual_seed(1)
    for parameter in loras(model).values():
        nn.init.normal_(parameter, std=0.15)
    ids = torch.tensor([samples()[-1].input_ids])
    with torch.no_grad():
        base, adapted = tiny.model(ids).logits, model(ids).logits
    rows = [{"instruction": f"question {i}", "output": f"the cat {i} sat on the mat"} for i in range(24)]
    report = qgraft.merge(model, tokenizer, calibration=rows, min_retained=-1e9)
    assert len(report.layers) > 7
    qgraft.save(model, tmp_path / "merged.gguf")
    again, _ = qgraft.load(tmp_path / "merged.gguf", dtype="float32", device="cpu")
    with torch.no_grad():
        merged = again(ids).logits
        assert torch.equal(merged, model(ids).logits)
    far, near = (float((merged - each).norm() / (adapted - base).norm()) for each in (base, adapted))
    assert near < 0.8 < far, (near, far)


@pytest.mark.spread(20)
@ALL
def test_a_tensor_too_many_is_refused(architecture: str, make_gguf: Maker, tmp_path: Path) -> None:
    extra = {"blk.1.attn_gain.weight": np.ones(64, np.float32), "blk.0.attn_q.scale": np.ones(1, np.float32)}
    tiny = make_gguf(tmp_path / "tiny.gguf", architecture, extra=extra)
    with pytest.raises(
        CheckpointError, match=r"2 tensors have no place in .*: blk\.0\.attn_q\.scale, blk\.1\.attn_gain"
    ):
        qgraft.load(tiny.path, device="cpu")


def test_keys_and_values_that_nothing_reads_are_left_as_they_are(tiny_gguf: Maker, tmp_path: Path) -> None:
    tiny = tiny_gguf("gemma3n")
    model, _ = qgraft.load(tiny.path, device="cpu")
    (note,) = model.qgraft.info.notes
    assert note.startswith("6 tensors of layers that take keys and values of others are not loaded")
    qgraft.save(model, tmp_path / "saved.gguf")
    assert (tmp_path / "saved.gguf").read_bytes() == tiny.path.read_bytes()


GEMMA4: dict[str, tuple[dict[str, Any], dict[str, np.ndarray], str]] = {
    "a last layer with a window": ({"attention.sliding_window_pattern": [False, True] * 2}, {}, "pattern: got .*at its end"),
    "too short a list": ({"feed_forward_length": [256] * 3}, {}, "feed_forward_length: got .*one for each of 4 layers"),
    "other widths": ({"feed_forward_length": [256, 512, 256, 512]}, {}, "feed_forward_length: got .*one width, twice it"),
    "more shared layers than there are": ({"attention.shared_kv_layers": 4}, {}, "shared_kv_layers: got 4, expected an int"),
    "heads of all kinds": ({"attention.head_count_kv": [2, 2, 1, 1]}, {}, "head_count_kv: got .*the layers of each kind"),
    "heads past all tensors": ({"attention.key_length_swa": 2**31 - 1}, {}, "key_length_swa: got 2147483647"),
    "rotations of another kind": ({}, {"rope_freqs.weight": np.full(16, 2.0, np.float32)}, "rope_freqs.weight: expected 16"),
}  # fmt: skip


@pytest.mark.parametrize("name", GEMMA4)
def test_what_gemma4_is_refused_for(name: str, make_gguf: Maker, tmp_path: Path) -> None:
    keys, extra, message = GEMMA4[name]
    tiny = make_gguf(
        tmp_path / "tiny.gguf", "gemma4", metadata={f"gemma4.{key}": value for key, value in keys.items()}, extra=extra
    )
    with pytest.raises((CheckpointError, UnsupportedError), match=rf"(?s){message}"):
        qgraft.load(tiny.path, device="cpu")


def test_gemma3n_has_no_active_input_past_all_inputs(make_gguf: Maker, tmp_path: Path) -> None:
    tiny = make_gguf(tmp_path / "tiny.gguf", "gemma3n", metadata={"gemma3n.altup.active_idx": 4})
    with pytest.raises(CheckpointError, match=r"altup\.active_idx: got 4, expected an integer from 0 to 3"):
        qgraft.load(tiny.path, device="cpu")


def test_gemma3n_computes_the_same_while_it_trains(tiny_gguf: Maker) -> None:
    """transformers clamps weights of its altup in each pass of a training, which therefore are floats."""
    model, _ = qgraft.load(tiny_gguf("gemma3n").path, dtype="float32", device="cpu")
    expected = logits_of(model)
    qgraft.attach_lora(model, r=2)
    assert not [name for name in loras(model) if "coefs" in name]
    assert torch.equal(logits_of(model.train()), expected)


@pytest.mark.parametrize("ratio", [1, 500])
def test_chatglm_is_what_transformers_glm_computes(ratio: int, tiny_gguf: Maker) -> None:
    """Its model is our own code, so transformers' GLM with the same weights judges it: theirs has q, k and v apart."""
    tiny = tiny_gguf("chatglm", config={"rope_ratio": ratio, "rope_ratio_scales": "base" if ratio != 1 else None})
    c, weights = tiny.model.config, {}
    for name, value in tiny.model.state_dict().items():
        name = (
            name.removeprefix("transformer.").replace("encoder.layers", "model.layers").replace(".dense.", ".o_proj.")
        )
        name = name.replace("self_attention", "self_attn").replace("dense_h_to_4h", "gate_up_proj")
        name = name.replace("dense_4h_to_h", "down_proj").replace("embedding.word_embeddings", "model.embed_tokens")
        name = name.replace("encoder.final_layernorm", "model.norm").replace("output_layer", "lm_head")
        if "query_key_value" in name:
            groups = c.kv_channels * c.multi_query_group_num
            parts = value.split([c.kv_channels * c.num_attention_heads, groups, groups])
            weights |= {
                name.replace("query_key_value", f"{kind}_proj"): part for kind, part in zip("qkv", parts, strict=True)
            }
        else:
            weights[name] = value
    config = transformers.GlmConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, num_hidden_layers=c.num_layers, pad_token_id=None,
        num_attention_heads=c.num_attention_heads, num_key_value_heads=c.multi_query_group_num, head_dim=c.kv_channels,
        intermediate_size=c.ffn_hidden_size, attention_bias=True, rms_norm_eps=c.layernorm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0 * ratio, "partial_rotary_factor": 0.5},
    )  # fmt: skip
    glm = transformers.GlmForCausalLM(config).eval()
    glm.load_state_dict(weights)
    model, _ = qgraft.load(tiny.path, dtype="float32", device="cpu")
    expected = logits_of(glm)
    assert float((logits_of(model) - expected).abs().max() / expected.abs().max()) < 1e-5


ODD = {
    "attention.causal": False, "attention.max_alibi_bias": 8.0, "attention.clamp_kqv": 3.0, "expert_count": 4,
    "attention.scale": 0.77, "logit_scale": 0.5, "residual_scale": 0.5, "embedding_scale": 2.0,
    "attention.temperature_scale": 0.1, "attn_logit_softcapping": 3.0, "nextn_predict_layers": 1,
}  # fmt: skip


@pytest.mark.spread(20)
@ALL
def test_keys_that_would_change_the_computation_are_refused(
    architecture: str, make_gguf: Maker, tmp_path: Path
) -> None:
    keys = TABLE[architecture]
    served = {*keys.fields, *keys.used, *keys.experts}
    odd = {key: value for key, value in ODD.items() if key not in served}
    assert len(odd) > 5
    tiny = make_gguf(tmp_path / "tiny.gguf", architecture, metadata={f"{architecture}.{k}": v for k, v in odd.items()})
    with pytest.raises(UnsupportedError, match="metadata that is not served") as caught:
        qgraft.load(tiny.path, device="cpu")
    assert all(f"{architecture}.{key}: got " in str(caught.value) for key in odd)
    if keys.rotates:
        metadata = {f"{architecture}.rope.scaling.type": "su", f"{architecture}.rope.scaling.factor": 2.0}
        tiny = make_gguf(tmp_path / "su.gguf", architecture, metadata=metadata)
        with pytest.raises(UnsupportedError, match=r"rope\.scaling\.type: got 'su', expected none or "):
            qgraft.load(tiny.path, device="cpu")


@pytest.mark.spread(20)
@pytest.mark.parametrize("architecture", sorted(TABLE.keys() - PAIRS - {"chatglm"}))  # that is our own code
def test_an_architecture_that_transformers_has_not_is_named(
    architecture: str, tiny_gguf: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_gguf(architecture).path
    with monkeypatch.context() as patched, pytest.raises(UnsupportedError, match=r"transformers [\d.]+ has no \w+"):
        patched.setattr("qgraft.checkpoints.gguf_config.CONFIG_MAPPING", {})
        qgraft.load(path, device="cpu")
    monkeypatch.setattr("qgraft.checkpoints.gguf_rules.MODEL_ARCH_NAMES", {})
    with pytest.raises(
        UnsupportedError, match=rf"architecture '{architecture}': the package gguf [\d.]+ does not know"
    ):
        qgraft.load(path, device="cpu")


DRAFT = {f"blk.4.{name}.weight": np.ones((4, 32), np.float32) for name in ("attn_q", "nextn.eh_proj", "ffn_up")}


def test_layers_of_qwen35_that_draft_are_left_as_they_are(make_gguf: Maker, random_ids: Maker, tmp_path: Path) -> None:
    keys = {"qwen35.block_count": 5, "qwen35.nextn_predict_layers": 1,
            "qwen35.attention.recurrent_layers": [True, True, True, False, False]}  # fmt: skip
    tiny = make_gguf(tmp_path / "tiny.gguf", "qwen35", metadata=keys, extra=DRAFT)
    model, _ = qgraft.load(tiny.path, dtype="float32", device="cpu")
    ids = random_ids(tiny.model)
    with torch.no_grad():
        assert (model(ids).logits - tiny.model(ids).logits).abs().max() < 1e-4
    (note,) = model.qgraft.info.notes
    assert note.startswith("1 layers that only draft tokens are not loaded")
    qgraft.save(model, tmp_path / "saved.gguf")
    assert (tmp_path / "saved.gguf").read_bytes() == tiny.path.read_bytes()


QWEN35: dict[str, tuple[dict[str, Any], dict[str, np.ndarray], str]] = {
    "a layer too many": ({}, DRAFT, r"3 tensors have no place in .*: blk\.4\.attn_q"),
    "no layer left": ({"nextn_predict_layers": 4}, {}, "nextn_predict_layers: got 4, expected an integer from 0 on, less"),
    "another width of values": ({"ssm.inner_size": 64}, {}, "inner_size: got 64, expected ssm.state_size times"),
    "other layers": ({"attention.recurrent_layers": [False, True, True, True]}, {}, "recurrent_layers: got .*full_att"),
    "no attention where it is": ({"full_attention_interval": 2}, {}, r"missing model\.layers\.1\.self_attn"),
    "heads that do not come out even": ({"ssm.group_count": 3}, {}, "ssm.group_count: got 3, expected a divisor of"),
    "heads past all tensors": ({"ssm.inner_size": None, "ssm.time_step_rank": 2**31 - 1}, {}, "rank: got 2147483647"),
    "rotations that texts leave out": ({"rope.dimension_sections": [0, 10, 11, 11]}, {}, "dimension_sections: got .*three"),
    "sections behind which a fourth one is": ({"rope.dimension_sections": [1, 1, 1, 1]}, {}, "dimension_sections: got"),
    "too few sections": ({"rope.dimension_sections": [11, 11, 10]}, {}, "dimension_sections: got .*expected four"),
    "growth": ({}, {"blk.0.ssm_a": np.ones(4, np.float32)}, "blk.0.ssm_a: expected negative numbers"),
}  # fmt: skip


@pytest.mark.parametrize("name", QWEN35)
def test_what_qwen35_is_refused_for(name: str, make_gguf: Maker, tmp_path: Path) -> None:
    keys, extra, message = QWEN35[name]
    metadata = {f"qwen35.{key}": value for key, value in keys.items()}
    tiny = make_gguf(tmp_path / "tiny.gguf", "qwen35", metadata=metadata, extra=extra)
    with pytest.raises((CheckpointError, UnsupportedError), match=rf"(?s){message}"):
        qgraft.load(tiny.path, device="cpu")


# Heads of 64, of which four share a block of a K-quant. 4 x 2 of them: their order is not its own inverse
VALUE_HEADS: dict[str, Any] = {
    "config": {"linear_value_head_dim": 64, "linear_key_head_dim": 64, "linear_num_key_heads": 4,
               "linear_num_value_heads": 8, "num_hidden_layers": 2,
               "layer_types": ["linear_attention", "full_attention"]},
    "metadata": {"qwen35.full_attention_interval": 2},
}  # fmt: skip
OUT_PROJ = "model.layers.0.linear_attn.out_proj"
SHARED = pytest.mark.parametrize("kind", [Q.Q4_K, Q.Q6_K, Q.Q4_1], ids=str)
ROWS = [{"instruction": f"question {i}", "output": f"the cat {i} sat on the mat"} for i in range(24)]


def file_order(columns: Tensor) -> Tensor:
    """[..., in] as the file has the inputs of ssm_out: the first value head of every key head, then the second ones."""
    return columns.unflatten(-1, (4, 2, 64)).transpose(-3, -2).flatten(-3)


@pytest.fixture
def shared(tiny_gguf: Maker) -> Callable[[Q], Any]:
    """(the file, its model) of a Qwen 3.5 with twice as many value heads as key heads."""

    def load(kind: Q) -> Any:
        tiny = tiny_gguf("qwen35", **VALUE_HEADS, types=(kind,))
        return tiny, qgraft.load(tiny.path, dtype="float32", device="cpu")[0]

    return load


def with_noise(model: nn.Module, std: float = 0.05, **options: Any) -> dict[str, nn.Parameter]:
    qgraft.attach_lora(model, r=2, lora_alpha=4, **options)
    torch.manual_seed(1)
    trained = loras(model)
    for parameter in trained.values():
        nn.init.normal_(parameter, std=std)
    return trained


def logits_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([samples()[-1].input_ids])).logits
    return logits


@SHARED
def test_value_heads_that_share_a_block_compute_what_transformers_model_does(
    kind: Q, make_gguf: Maker, tmp_path: Path
) -> None:
    tiny = make_gguf(tmp_path / "tiny.gguf", "qwen35", **VALUE_HEADS, types=(kind,))
    model, _ = qgraft.load(tiny.path, dtype="float32", device="cpu")
    layer, stored = model.get_submodule(OUT_PROJ), GGUFReader(tiny.path)
    assert layer.packed.format == kind.name.lower()
    assert layer.packed.parts[0].numpy().tobytes() == next(
        t.data.tobytes() for t in stored.tensors if t.name == "blk.0.ssm_out.weight"
    )
    meant = tiny.model.get_submodule(OUT_PROJ).weight
    torch.testing.assert_close(layer.dequantize(), meant, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(file_order(meant), meant)
    expected = logits_of(tiny.model)
    assert float((logits_of(model) - expected).abs().max() / expected.abs().max()) < 1e-5
    trained = with_noise(model)
    leaves = with_loras(tiny.model, trained)
    expected = own_losses(tiny.model)
    expected.backward()
    loss = own_losses(model)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    loss.backward()
    largest = max(float(leaf.grad.abs().max()) for leaf in leaves.values())
    for name, leaf in leaves.items():
        off = float((trained[name].grad - leaf.grad).abs().max()) / largest
        assert off < 1e-4, f"{name}: off by {off:.2g} of the largest gradient"


@pytest.mark.parametrize("kind", [Q.Q4_K, pytest.param(Q.Q6_K, marks=pytest.mark.slow)], ids=str)
def test_value_heads_that_share_a_block_take_a_merge(kind: Q, shared: Callable[[Q], Any], tmp_path: Path) -> None:
    tiny, model = shared(kind)
    base = logits_of(model)
    with_noise(model, 0.15, target_modules=["out_proj"])
    adapted = logits_of(model)
    (report,) = qgraft.merge(model, calibration=ROWS, min_retained=-1e9).layers
    assert report.path == OUT_PROJ
    assert report.effect_kept is not None and report.effect_kept > 0.9
    qgraft.save(model, tmp_path / "merged.gguf")
    again, _ = qgraft.load(tmp_path / "merged.gguf", dtype="float32", device="cpu")
    merged = logits_of(again)
    assert torch.equal(merged, logits_of(model))
    far, near = (float((merged - each).norm() / (adapted - base).norm()) for each in (base, adapted))
    assert near < 0.4 < 0.8 < far, (near, far)
    qgraft.unmerge(model)
    qgraft.detach_lora(model)
    qgraft.save(model, tmp_path / "unmerged.gguf")
    assert (tmp_path / "unmerged.gguf").read_bytes() == tiny.path.read_bytes()


def test_a_merge_solves_for_the_inputs_of_value_heads_that_share_a_block(shared: Callable[[Q], Any]) -> None:
    """Few tokens leave most directions of 512 inputs free: solved for others, nothing of the delta would be in these."""
    _, model = shared(Q.Q4_K)
    with_noise(model, 0.15, target_modules=["out_proj"])
    layer, inputs = model.get_submodule(OUT_PROJ), []
    hook = layer.register_forward_hook(lambda _, x, y: inputs.append(x[0].flatten(0, 1)))
    for sample in samples():
        model(torch.tensor([sample.input_ids]), use_cache=False)
    hook.remove()
    x, delta, base = torch.cat(inputs).detach(), layer.loras["default"].delta().detach(), layer.dequantize()
    deltas = {OUT_PROJ: lambda: file_order(delta)}
    starts = {OUT_PROJ: layer.packed}
    merged, _ = merge_in_step(model, starts, deltas, samples(), samples(), "codes", lambda report: None)
    layer.replace(merged[OUT_PROJ])
    wanted, got = x @ delta.T, x @ (layer.dequantize() - base).T
    assert float((got - wanted).norm() / wanted.norm()) < 0.3


@SHARED
def test_value_heads_that_share_a_block_become_numbers(kind: Q, shared: Callable[[Q], Any], tmp_path: Path) -> None:
    """In float32 a merge is W + delta, and a file of it is the adapter's model."""
    tiny, model = shared(kind)
    with_noise(model, 0.15)
    adapted, delta = logits_of(model), model.get_submodule(OUT_PROJ).loras["default"].delta().detach()
    qgraft.merge(model, to="f32", method="nearest")
    wanted = tiny.model.get_submodule(OUT_PROJ).weight + delta
    torch.testing.assert_close(model.get_submodule(OUT_PROJ).dequantize(), wanted, rtol=1e-5, atol=1e-6)
    qgraft.save(model, tmp_path / "merged.gguf")
    again, _ = qgraft.load(tmp_path / "merged.gguf", dtype="float32", device="cpu")
    assert float((logits_of(again) - adapted).abs().max() / adapted.abs().max()) < 1e-5
    qgraft.save(qgraft.load(tiny.path, dtype="float32", device="cpu")[0], tmp_path / "f32.gguf", to="f32")
    again, _ = qgraft.load(tmp_path / "f32.gguf", dtype="float32", device="cpu")
    assert float((logits_of(again) - (base := logits_of(tiny.model))).abs().max() / base.abs().max()) < 1e-5


def test_adapters_on_value_heads_that_share_a_block(shared: Callable[[Q], Any], tmp_path: Path) -> None:
    """PEFT's files have A in transformers' order, GGUF-LoRAs in the file's; both come back as they were."""
    _, model = shared(Q.Q4_K)
    trained = with_noise(model)
    A, expected = trained[f"{OUT_PROJ}.loras.default.lora_A"].detach(), logits_of(model)
    qgraft.save_adapter(model, tmp_path / "adapter")
    peft = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert torch.equal(peft[f"base_model.model.{OUT_PROJ}.lora_A.weight"], A)
    export_gguf_lora(model, tmp_path / "lora.gguf", dtype="float32")
    stored = {t.name: t.data for t in GGUFReader(tmp_path / "lora.gguf").tensors}["blk.0.ssm_out.weight.lora_a"]
    assert torch.equal(torch.from_numpy(stored.copy()), file_order(A))
    for path in (tmp_path / "adapter", tmp_path / "lora.gguf"):
        _, again = shared(Q.Q4_K)
        qgraft.load_adapter(again, path)
        assert torch.equal(logits_of(again), expected)


def test_an_exact_lora_is_none_where_value_heads_share_a_block(shared: Callable[[Q], Any]) -> None:
    _, model = shared(Q.Q4_1)
    with pytest.raises(UnsupportedError, match=r"out_proj: q4_1, with its columns in another order than its inputs"):
        qgraft.attach_lora(model, target_modules=["out_proj"], exact=True)
    with_noise(model, target_modules=["out_proj"])
    lora = model.get_submodule(OUT_PROJ).loras["default"]
    lora.lora_A.data = lora.lora_A.detach()[:, ::32].repeat_interleave(32, dim=1)  # as a file may have it
    layer = model.get_submodule(OUT_PROJ)
    assert merge_exactly({OUT_PROJ: layer}, {"default": 1.0}) == {}
    layer.base.input_order = None
    assert len(merge_exactly({OUT_PROJ: layer}, {"default": 1.0})) == 1


def test_value_heads_that_share_a_block_where_their_order_is_transformers(tiny_gguf: Maker) -> None:
    config = {**VALUE_HEADS["config"], "linear_num_value_heads": 4}
    tiny = tiny_gguf("qwen35", config=config, metadata=VALUE_HEADS["metadata"], types=(Q.Q4_K,))
    model, _ = qgraft.load(tiny.path, dtype="float32", device="cpu")
    assert model.get_submodule(OUT_PROJ).input_order is None
    expected = logits_of(tiny.model)
    assert float((logits_of(model) - expected).abs().max() / expected.abs().max()) < 1e-5
