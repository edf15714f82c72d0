"""What experts.py takes for granted of transformers: the registry of functions for experts, what their modules say."""

import inspect

import pytest
import torch
import transformers
from tiny_models import MODELS
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from qgraft.experts import IMPLEMENTATION, experts_forward, holds_experts

MIXTURES = ("gpt-oss", "granitemoe", "mixtral", "olmoe", "qwen2moe", "qwen3moe")


def test_our_function_is_in_the_registry():
    assert ALL_EXPERTS_FUNCTIONS[IMPLEMENTATION] is experts_forward
    theirs = inspect.signature(ALL_EXPERTS_FUNCTIONS["grouped_mm"]).parameters
    assert list(inspect.signature(experts_forward).parameters) == list(theirs)


@pytest.mark.parametrize("architecture", MIXTURES)
def test_modules_of_experts_say_how_their_weights_lie(architecture):
    class_name, config_name, options = MODELS[architecture]
    config = getattr(transformers, config_name)(**{"vocab_size": 100, **options, "num_hidden_layers": 1})
    with torch.device("meta"):
        model = getattr(transformers, class_name)(config)
    (experts,) = [module for module in model.modules() if holds_experts(module)]
    biases = {"gate_up_proj_bias", "down_proj_bias"} if experts.has_bias else set()
    assert [name for name, _ in experts.named_parameters() if name not in biases] == ["gate_up_proj", "down_proj"]
    assert isinstance(experts.gate_up_proj, nn.Parameter) and experts.gate_up_proj.dim() == 3
    both = torch.arange(8.0).view(1, 8)
    halves = both.chunk(2, -1) if experts.is_concatenated else (both[..., ::2], both[..., 1::2])
    reads = torch.autograd.functional.jacobian(experts._apply_gate, both)[0, :, 0, :] != 0  # [out, in]
    gate, up = (half[0].long() for half in halves)
    outs = torch.arange(1, 4)  # at 0 the gate lets nothing through
    assert bool(reads[outs, gate[outs]].all() | reads[outs, up[outs]].all())
    assert int(reads.sum(1).max()) <= 2
    model.set_experts_implementation(IMPLEMENTATION)
    assert experts.config._experts_implementation == IMPLEMENTATION
