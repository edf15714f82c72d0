"""transformers' attention: how a registered function is called, and what reaches it."""

import inspect
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PROBE = "contract_probe"


@pytest.fixture
def calls() -> list[dict[str, Any]]:
    """What a registered attention function, without a mask function of its own, was called with."""
    seen: list[dict[str, Any]] = []

    def attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
        seen.append({"module": module, "query": query, "key": key, "value": value, "mask": attention_mask, **kwargs})
        causal = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
        return sdpa_attention_forward(module, query, key, value, causal[None, None], scaling=kwargs.get("scaling"))

    AttentionInterface.register(PROBE, attend)
    return seen


def test_set_attn_implementation_reaches_every_layer_and_stands_in_the_configuration(kind, tiny, ids, calls):
    model = tiny(kind)
    before = model.config._attn_implementation
    model.set_attn_implementation(PROBE)
    assert model.config._attn_implementation == model.base_model.config._attn_implementation == PROBE
    model(ids, use_cache=False)
    assert [call["module"].layer_idx for call in calls] == [0, 1, 2], "modules no longer say their layer in layer_idx"
    assert len({call["module"] for call in calls}) == 3, "the first argument is no longer the layer's own module"
    model.set_attn_implementation(before)
    model(ids, use_cache=False)
    assert len(calls) == 3, "set_attn_implementation does not set an earlier implementation back"


def test_queries_keys_and_values_come_as_batch_heads_tokens_channels(kind, tiny, ids, calls):
    model = tiny(kind)
    model.set_attn_implementation(PROBE)
    model(ids, use_cache=False)
    assert calls[0]["query"].shape == (1, 4, 10, 8)
    assert calls[0]["key"].shape == calls[0]["value"].shape == (1, 2, 10, 8), "keys are repeated before the function"


def test_no_mask_is_made_for_an_implementation_without_a_mask_function(kind, tiny, ids, calls):
    model = tiny(kind)
    model.set_attn_implementation(PROBE)
    model(ids, use_cache=False)
    assert {call["mask"] is None for call in calls} == {True}, "a mask comes where none was registered"


def test_keywords_of_a_forward_pass_that_transformers_does_not_know_reach_the_attention_function(
    kind, tiny, ids, calls
):
    model = tiny(kind)
    model.set_attn_implementation(PROBE)
    marker = object()
    model(ids, use_cache=False, prefix=marker, cu_seq_lens_q=torch.tensor([0, 10]), context_lens=marker)
    assert all(call["prefix"] is marker and call["context_lens"] is marker for call in calls)
    assert all(call["cu_seq_lens_q"].tolist() == [0, 10] for call in calls)


def test_scaling_is_a_keyword(kind, tiny, ids, calls):
    model = tiny(kind)
    model.set_attn_implementation(PROBE)
    model(ids, use_cache=False)
    assert all(isinstance(call["scaling"], float) and isinstance(call["dropout"], float) for call in calls)


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text", "mistral"])
def test_the_width_of_a_window_is_a_keyword(kind, tiny, ids, calls):
    model = tiny(kind)
    model.set_attn_implementation(PROBE)
    model(ids, use_cache=False)
    assert 4 in {call["sliding_window"] for call in calls}, "attention functions no longer hear of sliding windows"


def test_capped_scores_come_as_softcap(tiny, ids, calls):
    model = tiny("gemma2", attn_logit_softcapping=50.0)
    model.set_attn_implementation(PROBE)
    model(ids, use_cache=False)
    assert {call["softcap"] for call in calls} == {50.0}


def test_a_registered_mask_function_is_asked_for_the_mask(tiny, ids, calls):
    asked = []

    def mask(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs)
        return sdpa_mask(*args, **kwargs)

    AttentionMaskInterface.register(PROBE + "_masked", mask)
    AttentionInterface.register(PROBE + "_masked", sdpa_attention_forward)
    model = tiny("llama")
    expected = model(ids, use_cache=False).logits
    model.set_attn_implementation(PROBE + "_masked")
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected)
    assert asked, "AttentionMaskInterface is no longer what masks are made by"


def test_sdpa_takes_its_own_keywords_and_gives_tokens_before_heads():
    parameters = inspect.signature(sdpa_attention_forward).parameters
    assert list(parameters)[:5] == ["module", "query", "key", "value", "attention_mask"]
    assert {"dropout", "scaling", "is_causal"} <= parameters.keys()

    class Module(torch.nn.Module):
        num_key_value_groups = 2
        is_causal = True

    query, key, value = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    out, weights = sdpa_attention_forward(Module(), query, key, value, None, scaling=0.3)
    assert weights is None and out.shape == (1, 5, 4, 8)
    scores = (query @ key.repeat_interleave(2, 1).mT * 0.3).masked_fill(~torch.ones(5, 5).tril().bool(), -torch.inf)
    expected = scores.softmax(-1) @ value.repeat_interleave(2, 1)
    torch.testing.assert_close(out, expected.transpose(1, 2))


def test_attention_functions_are_found_by_name_with_one_for_eager_beside():
    def eager() -> None: ...

    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
    assert ALL_ATTENTION_FUNCTIONS.get_interface("eager", eager) is eager
    assert ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", eager) is sdpa_attention_forward


def test_models_offer_dummy_inputs_that_they_can_compute(tiny):
    model = tiny("llama")
    assert "input_ids" in model.dummy_inputs
    model(**{name: tensor[:1] for name, tensor in model.dummy_inputs.items()}, use_cache=False)
