"""transformers' caches, and what generate() asks of a model that is not its own."""

import inspect
from typing import Any

import pytest
import torch
from transformers import Cache, DynamicCache, GenerationMixin, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

KNOWN = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE = next((name for name in ("cache", "past_key_values") if name in KNOWN), None)


def test_generate_calls_the_cache_by_one_of_two_names():
    assert CACHE is not None, f"prepare_inputs_for_generation takes {', '.join(KNOWN)}: what is the cache?"


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3", "gemma2"])
def test_a_dynamic_cache_has_a_layer_with_keys_and_values_for_each_of_the_models(kind, tiny, ids):
    model = tiny(kind)
    cache = DynamicCache(config=model.config)
    model(ids[:, :3], use_cache=True, **{CACHE: cache})
    assert type(cache) is DynamicCache and isinstance(cache, Cache) and len(cache.layers) == 3
    assert {type(layer) for layer in cache.layers} <= {DynamicLayer, DynamicSlidingWindowLayer}
    assert cache.get_seq_length() == 3 and getattr(cache, "offloading", False) is False
    assert cache.layers[0].keys.shape == cache.layers[0].values.shape == (1, 2, 3, 8)


def test_layers_of_a_window_count_all_tokens_and_keep_those_within(tiny, ids):
    model = tiny("mistral")  # a window of 4
    cache = DynamicCache(config=model.config)
    model(ids, use_cache=True, **{CACHE: cache})
    layer = cache.layers[0]
    assert type(layer) is DynamicSlidingWindowLayer and layer.sliding_window == 4
    assert layer.cumulative_length == 10 == cache.get_seq_length() and layer.keys.shape[2] == 3
    assert layer.record_past is False


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_keys_and_values_may_be_put_into_a_layer(kind, tiny, ids):
    model = tiny(kind)
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    for cache in caches:
        model(ids[:, :3], use_cache=True, **{CACHE: cache})
    for layer in caches[1].layers:
        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
    got, expected = (model(ids[:, 3:4], use_cache=True, **{CACHE: cache}).logits for cache in caches)
    torch.testing.assert_close(got, expected)


def test_what_prepare_inputs_for_generation_is_given_and_gives(tiny, ids):
    model = tiny("llama")
    names = list(KNOWN)
    assert names[1:4] == ["input_ids", "next_sequence_length", CACHE]
    assert {"attention_mask", "inputs_embeds", "is_first_iteration"} <= set(names)
    cache = DynamicCache(config=model.config)
    given = model.prepare_inputs_for_generation(ids, None, cache, torch.ones_like(ids), None, True)
    assert torch.equal(given["input_ids"], ids) and given[CACHE] is cache


class Watched(LlamaForCausalLM):
    """Writes down what generate() calls."""

    calls: list[str]

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append("prepare")
        return super().prepare_inputs_for_generation(*args, **kwargs)

    @staticmethod
    def create_masks_for_generate(*args: Any, **kwargs: Any) -> Any:
        Watched.masks = kwargs
        return kwargs["attention_mask"]


def test_generate_asks_the_model_for_inputs_in_every_step_and_for_masks_of_fixed_caches(tiny, ids):
    model = Watched(tiny("llama").config).eval()
    model.calls = []
    model.generate(ids, max_new_tokens=3, do_sample=False)
    assert model.calls == ["prepare"] * 3
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, cache_implementation="static")
    assert "attention_mask" in Watched.masks, "masks for caches of a fixed size are made elsewhere"


def test_generate_on_the_instance_is_what_is_called_and_the_class_still_has_its_own(tiny, ids):
    model = tiny("llama")
    expected = model.generate(ids, max_new_tokens=2, do_sample=False)
    model.generate = lambda *args, **kwargs: type(model).generate(model, *args, **kwargs)
    assert torch.equal(model.generate(ids, max_new_tokens=2, do_sample=False), expected)


def test_generate_calls_the_forward_of_the_base_model_on_the_instance(tiny, ids):
    model, calls = tiny("llama"), []
    base = model.base_model
    own = base.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return own(*args, **kwargs)

    base.forward = forward
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    args, kwargs = calls[-1]
    assert len(calls) == 3 and args == () and kwargs["input_ids"].shape == (1, 1)
    mask = kwargs.get("attention_mask")
    assert (mask is None or mask.shape == (1, 12)) and isinstance(kwargs[CACHE], DynamicCache)
    known = {"input_ids", "attention_mask", "position_ids", CACHE, "use_cache", "return_dict", "inputs_embeds"}
    asked = {name for name, value in kwargs.items() if value is not None and value is not False}
    assert asked <= known, "generate() gives a decoder arguments that decoding in C does not know"


@pytest.mark.parametrize("hook", ["register_forward_pre_hook", "register_forward_hook"])
def test_generate_runs_the_hooks_of_a_model(hook, tiny, ids):
    model, calls = tiny("llama"), []
    getattr(model, hook)(lambda *call: calls.append(call) and None)
    model.generate(ids, max_new_tokens=2, do_sample=False)
    assert len(calls) == 2


def test_collecting_states_leaves_hooks_of_transformers_alone(tiny, ids):
    model = tiny("llama")
    model(ids, output_hidden_states=True, output_attentions=False)
    hooks = [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert all(getattr(hook, "__module__", "").startswith("transformers.") for hook in hooks)
