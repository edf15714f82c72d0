"""What transformers calls the cache: both names are taken, the installed release's is shown."""

import inspect

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    DynamicCache,
    Gemma2Config,
    LlamaConfig,
    UMT5Config,
)

from qgraft.compat import CACHE, cache_in, cap_scores, given_cache, hide_what_comes, takes_cache


@takes_cache
def function(x, cache=None, **kwargs):
    """A doc."""
    return x, cache, kwargs


def test_the_name_is_the_one_that_models_of_this_release_give_back():
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=20
    )
    model, cache = AutoModelForCausalLM.from_config(config), DynamicCache(config=config)
    out = model(torch.tensor([[1, 2]]), use_cache=True, **{CACHE: cache})
    assert cache_in(out) is cache and CACHE in out
    assert CACHE in inspect.signature(model.forward).parameters


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_function_takes_both_names(name):
    assert function(1, **{name: 2}, other=3) == (1, 2, {"other": 3})
    assert given_cache({name: 2, "input_ids": 1}) == 2


def test_a_function_shows_the_name_that_generate_looks_for():
    assert list(inspect.signature(function).parameters) == ["x", CACHE, "kwargs"]
    assert function.__doc__ == "A doc." and given_cache({"input_ids": 1, "cache": None}) is None


def test_umt5_sees_nothing_that_comes():
    """As T5 does: the first logits do not depend on what the decoder reads behind them."""
    config = UMT5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    hide_what_comes(model)
    ids = torch.arange(6)[None]
    one, other = (model(input_ids=ids, decoder_input_ids=torch.tensor([[0, second]])).logits[0, 0] for second in (3, 4))
    assert torch.allclose(one, other) and one.std() > 0


def test_capped_scores_are_computed_as_written():
    """Gemma 2's cap changes the logits, and by as much as its "eager" attention says, in every release."""
    small = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
    }
    config = Gemma2Config(**small, num_key_value_heads=2, vocab_size=20, attn_logit_softcapping=0.5)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    ids = torch.arange(12)[None]
    cap_scores(model)
    got = model(ids).logits
    model.set_attn_implementation("eager")
    assert torch.equal(got, model(ids).logits)
    model.model.layers[0].self_attn.attn_logit_softcapping = None
    assert not torch.allclose(got, model(ids).logits, rtol=1e-2)
