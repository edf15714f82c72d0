"""transformers' table of a checkpoint's names, by which files are read that are older than the code."""

from typing import Any

import torch
import transformers
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key


def place_of(model: Any, name: str) -> tuple[str, str | None]:
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    return rename_source_key(name, renamings, converters, base_model_prefix=model.base_model_prefix,
                             meta_state_dict=model.state_dict())  # fmt: skip


def mixtral() -> Any:
    config = transformers.MixtralConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


def test_a_name_without_the_models_prefix_finds_its_place():
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=10))
    assert place_of(model, "h.0.attn.c_attn.weight") == ("transformer.h.0.attn.c_attn.weight", None)


def test_an_older_name_finds_its_place():
    config = transformers.GPTNeoXConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=10
    )
    model = transformers.GPTNeoXForCausalLM(config)
    assert place_of(model, "embed_out.weight") == ("lm_head.weight", None)


def test_experts_kept_apart_are_put_together_by_a_rule_with_patterns():
    model = mixtral()
    place, pattern = place_of(model, "model.layers.0.block_sparse_moe.experts.1.w1.weight")
    assert place in model.state_dict() and place.endswith("experts.gate_up_proj")
    converters = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightConverter)]
    rule = next(rule for rule in converters if pattern in rule.source_patterns)
    assert len(rule.source_patterns) == 2 and len(rule.target_patterns) == 1


def test_a_rule_computes_a_parameter_of_functions_that_read_its_tensors():
    model = mixtral()
    names = [f"model.layers.0.block_sparse_moe.experts.{e}.{w}.weight" for e in range(2) for w in ("w1", "w3")]
    tensors = {name: torch.randn(24, 16) for name in names}
    found = {name: place_of(model, name) for name in sorted(names, key=dot_natural_key)}
    (place,) = {place for place, _ in found.values()}
    converters = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightConverter)]
    patterns = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    rule = patterns[found[names[0]][1]]
    for name, (_, pattern) in found.items():
        rule.add_tensor(place, name, pattern, lambda name=name: tensors[name])
    made = rule.convert(place, model=model, config=model.config)[place]
    made = made[0] if isinstance(made, list) else made
    halves = [torch.cat([tensors[name] for name in names[2 * e : 2 * e + 2]]) for e in range(2)]
    torch.testing.assert_close(made, torch.stack(halves))


def test_numbers_in_names_are_sorted_as_numbers():
    assert sorted(["a.10.b", "a.9.b"], key=dot_natural_key) == ["a.9.b", "a.10.b"]


def test_models_name_the_parameters_that_stay_float32():
    model = mixtral()
    assert hasattr(model, "_keep_in_fp32_modules") and hasattr(model, "_keep_in_fp32_modules_strict")
