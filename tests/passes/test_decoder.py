"""How tokens go through a model: windows, transformed logits and positions of models' own, on the longest sample."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV32Config,
    FalconH1Config,
    Llama4TextConfig,
    LlamaConfig,
    PhimoeConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    RobertaConfig,
)

import qgraft
from qgraft.attention import SAMPLES
from qgraft.data.batches import IGNORED, collate
from qgraft.data.tokenizing import Sample
from qgraft.errors import UnsupportedError
from qgraft.model_parts import computed_dtype
from qgraft.passes import decoder
from qgraft.passes.decoder import label_states, output_head, padding_free
from qgraft.passes.loss import batch_loss, check_gradient

SMALL: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 100,
}  # fmt: skip
EXPERTS = {"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 64}
RELEASE = tuple(int(part) for part in transformers.__version__.split(".")[:2])
KINDS: dict[str, Any] = {  # the configuration, whether samples are attended one by one, whether they share a pass
    "phimoe, window by its mask": (PhimoeConfig(**SMALL, **EXPERTS, sliding_window=8), True, True),
    "qwen2_moe, layers with a window": (
        Qwen2MoeConfig(
            **SMALL, **EXPERTS, shared_expert_intermediate_size=64, use_sliding_window=True, sliding_window=8,
            max_window_layers=0, layer_types=["sliding_attention", "full_attention"],
        ), True, True,
    ),
    "llama4, chunks, and its own base model": (
        Llama4TextConfig(**SMALL, intermediate_size_mlp=64, head_dim=32, num_local_experts=2, attention_chunk_size=8),
        False, RELEASE >= (5, 23),  # the mask of 5.17 counts chunks through, over the borders of samples
    ),
    "falcon_h1, a factor of its own": (
        FalconH1Config(
            **SMALL, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, lm_head_multiplier=20.0
        ), False, False,
    ),
    "roberta, positions of its own": (
        RobertaConfig(**SMALL, is_decoder=True, max_position_embeddings=128), False, False
    ),
}  # fmt: skip


def model_of(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.15)
    return model


def sample(length: int, seed: int) -> Sample:
    ids = torch.randint(3, 90, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Sample(ids, [IGNORED] * (length // 2) + ids[length // 2 :], "")


def own_loss(model: PreTrainedModel, each: Sample) -> float:
    rows = model(torch.tensor([each.input_ids]), use_cache=False).logits[0, :-1]
    return float(F.cross_entropy(rows, torch.tensor(each.labels[1:]), ignore_index=IGNORED, reduction="sum").detach())


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_sample_has_the_models_own_loss(kind):
    config, one_by_one, shared = KINDS[kind]
    model = model_of(config)
    samples = [sample(6, 1), sample(7, 2), sample(60, 3)]
    with torch.no_grad(), padding_free(model, samples) as problem:
        assert (model.config._attn_implementation == SAMPLES) == one_by_one
        assert (problem is None) == shared
        groups = [samples] if shared else [[each] for each in samples]
        got = sum(float(batch_loss(model, collate(group))) for group in groups)
    expected = sum(own_loss(model, each) for each in samples)
    assert got == pytest.approx(expected, rel=1e-4)


def test_it_is_the_longest_sample_that_is_tried(monkeypatch):
    """A window that only it reaches shows: with the mask's note gone, the short ones alone would not tell."""
    model = model_of(KINDS["phimoe, window by its mask"][0])
    monkeypatch.setattr("qgraft.attention.MaskNote.window", lambda *_: None)  # as if there were none
    with torch.no_grad():
        with padding_free(model, [sample(6, 1), sample(7, 2)]):
            assert model.config._attn_implementation == SAMPLES
        with padding_free(model, [sample(6, 1), sample(7, 2), sample(60, 3)]):
            assert model.config._attn_implementation != SAMPLES


LONG = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32,
        "short_factor": [1.0 + i / 8 for i in range(16)], "long_factor": [2.0 + i for i in range(16)]}  # fmt: skip
SEEN_LATE: dict[str, Any] = {  # what only texts of more than 32 tokens show, or rows of as many
    "longrope": LlamaConfig(**SMALL, rope_parameters=LONG),
    "dynamic": LlamaConfig(
        **SMALL, max_position_embeddings=32, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    ),
    "longrope, in the code of phimoe": PhimoeConfig(
        **SMALL, **EXPERTS, sliding_window=None, rope_parameters={**LONG, "short_mscale": 1.0, "long_mscale": 1.4}
    ),
    "llama4, temperature by the row": Llama4TextConfig(
        **SMALL, intermediate_size_mlp=64, head_dim=32, num_local_experts=2, no_rope_layers=[1, 0], floor_scale=32,
        attn_scale=2.0,
    ),
    "deepseek_v32, the keys that are chosen": DeepseekV32Config(
        **SMALL, q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, head_dim=8,
        index_topk=32, index_head_dim=16, index_n_heads=2, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, moe_intermediate_size=32, n_shared_experts=1, first_k_dense_replace=1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SEEN_LATE)
def test_an_evaluation_within_a_run_asks_about_its_own_samples(kind):
    """The run's samples are shorter, and so are the two that its trial takes; its rows, and the others, are not."""
    model, texts = model_of(SEEN_LATE[kind]), [sample(12, number) for number in range(4)]
    texts += [sample(6, 4), sample(70, 5)]
    with torch.no_grad():
        for run, within in ((texts[:5], texts[:5]), (texts[:5], texts)):
            expected = sum(own_loss(model, each) for each in within)
            with padding_free(model, run) as outer, padding_free(model, within) as problem:
                problem = problem or outer
                groups = [within] if problem is None else [[each] for each in within]
                got = sum(float(batch_loss(model, collate(group))) for group in groups)
            assert got == pytest.approx(expected, rel=1e-5), (kind, problem)


def test_a_model_that_is_its_own_decoder_gives_logits():
    model = model_of(KINDS["llama4, chunks, and its own base model"][0])
    with torch.no_grad(), padding_free(model, [sample(9, 1)]):
        rows, labels = label_states(model, collate([sample(9, 1)]))
        assert rows.shape == (len(labels), 100) and output_head(model)(rows) is rows


def test_only_some_labels_of_a_long_sample_are_judged():
    model = model_of(LlamaConfig(**SMALL, max_position_embeddings=2048))
    long = sample(1400, 1)
    with torch.no_grad(), padding_free(model, [long, sample(5, 2)]) as problem:
        assert problem is None and model.config._attn_implementation == SAMPLES
    judged = decoder._judged(collate([long])["labels"][0])
    assert len(judged) == decoder.JUDGED and judged[0] == 0 and judged[-1] == 699


def test_a_loss_that_is_another_one_each_time_is_refused():
    model = model_of(LlamaConfig(**SMALL))
    model.lm_head.register_forward_hook(lambda module, args, out: out + torch.randn_like(out))
    with pytest.raises(UnsupportedError, match="otherwise in a second pass"), padding_free(model, [sample(9, 1)]):
        pass


def test_a_loss_without_gradient_is_refused():
    model = model_of(LlamaConfig(**SMALL)).requires_grad_(False)
    with pytest.raises(UnsupportedError, match="no gradient reaches"):
        check_gradient(model, batch_loss(model, collate([sample(9, 1)])))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RecursionError(), MemoryError()])
def test_what_says_nothing_about_the_model_is_not_taken_for_an_answer(error: Exception, monkeypatch: Any) -> None:
    """Else a run whose longest sample does not fit would go on, one sample in each pass, by a slower way."""
    model = model_of(LlamaConfig(**SMALL))

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(decoder, "label_states", fail)
    with pytest.raises(type(error)), padding_free(model, [sample(20, 0), sample(9, 1)]):
        pass


def test_what_a_model_computes_in_is_not_the_dtype_of_its_adapter(tiny_gguf: Any) -> None:
    """In bfloat16 losses are judged as rounded ones, with a LoRA in float32 as without: or none would agree."""
    model, _ = qgraft.load(tiny_gguf("llama").path, device="cpu", dtype="bfloat16")
    qgraft.attach_lora(model, r=2)
    assert model.dtype == torch.float32 and computed_dtype(model) == torch.bfloat16
    samples = [Sample(list(range(3, 3 + n)), [IGNORED, *range(4, 3 + n)], "") for n in (90, 7)]
    with padding_free(model, samples) as problem:
        assert problem is None and model.config._attn_implementation == SAMPLES
