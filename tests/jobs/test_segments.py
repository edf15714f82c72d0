"""Tokens of one packed row with different LoRAs, against a float64 model that adds B·A to the weights itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import qgraft
from qgraft.adapters.base import find_adapter
from qgraft.errors import UnsupportedError
from qgraft.jobs.segments import Segment, serving_segments

NAMES = ("law", "med", "art")


def model_with(ranks, dropout=0.0, targets=None, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    for name, r in zip(NAMES, ranks, strict=False):
        target_modules = (targets or {}).get(name, "all-linear")
        qgraft.attach_lora(
            model, r=r, lora_alpha=3.0 * r, lora_dropout=dropout, target_modules=target_modules, name=name
        )
        for lora in find_adapter(model, name).parts.values():
            nn.init.normal_(lora.lora_B)
    for parameter in (p for name, p in model.named_parameters() if "lora" in name):
        parameter.requires_grad_(True)
    return model


def segments_of(lengths, names=NAMES, seed=5):
    found, start = [], 0
    for index, (name, length) in enumerate(zip(names, lengths, strict=False)):
        found.append(Segment(name, start, start + length, torch.Generator().manual_seed(seed + index)))
        start += length
    return found


def reference(model, x, segments):
    """In float64, with one weight matrix for each adapter."""
    outputs = []
    for segment in segments:
        h = x[0, segment.start : segment.stop]
        for layer in model:
            if isinstance(layer, nn.Tanh):
                h = torch.tanh(h)
                continue
            weight = layer.base.weight.double()
            if segment.adapter in layer.loras:
                lora = layer.loras[segment.adapter]
                weight = weight + lora.config.scaling * (lora.lora_B.double() @ lora.lora_A.double())
            h = h @ weight.T + layer.base.bias.double()
        outputs.append(h)
    return torch.cat(outputs)[None]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.lists(st.integers(1, 4), min_size=3, max_size=3),
    st.booleans(),
)
def test_every_segment_has_the_output_and_gradients_of_its_adapter(lengths, ranks, some_layers_only):
    model = model_with(ranks, targets={"med": "2"} if some_layers_only else None)
    segments = segments_of(lengths)
    x = torch.randn(1, sum(lengths), 6, requires_grad=True)
    out_gradient = torch.randn(1, sum(lengths), 4)
    parameters = [p for name in NAMES for lora in find_adapter(model, name).parts.values() for p in lora.parameters()]
    with serving_segments(model, segments):
        y = model(x)
        got = torch.autograd.grad(y, [x, *parameters], out_gradient, allow_unused=True)
    expected_y = reference(model, x.double(), segments)
    expected = torch.autograd.grad(expected_y, [x, *parameters], out_gradient.double(), allow_unused=True)
    torch.testing.assert_close(y.double(), expected_y, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(got, expected, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs.to(mine.dtype), rtol=1e-3, atol=1e-4)


def test_nan_in_one_adapter_stays_in_its_tokens():
    model = model_with((2, 2, 2))
    segments = segments_of((3, 4, 2))
    x = torch.randn(1, 9, 6, requires_grad=True)
    with torch.no_grad():
        next(iter(find_adapter(model, "med").parts.values())).lora_A.fill_(float("nan"))
    with serving_segments(model, segments):
        y = model(x)
        y[0, torch.tensor([0, 1, 2, 7, 8])].sum().backward()
    assert y[0, 3:7].isnan().all() and y[0, :3].isfinite().all() and y[0, 7:].isfinite().all()
    for name in ("law", "art"):
        assert all(
            p.grad.isfinite().all() and p.grad.any()
            for lora in find_adapter(model, name).parts.values()
            for p in lora.parameters()
        )


def test_dropout_is_drawn_from_the_segments_generator_as_if_it_were_alone():
    model = model_with((2, 3, 2), dropout=0.5).train()
    x = torch.randn(1, 12, 6)
    with serving_segments(model, segments_of((5, 4, 3))):
        together = model(x)
    for segment in segments_of((5, 4, 3)):
        qgraft.use_adapter(model, segment.adapter)
        with torch.random.fork_rng():
            torch.set_rng_state(segment.generator.get_state())
            alone = model(x[:, segment.start : segment.stop])
        torch.testing.assert_close(together[:, segment.start : segment.stop], alone)


def test_a_layer_that_is_run_again_drops_the_same_inputs():
    gradients = []
    for wrap in (lambda model, x: model(x), lambda model, x: checkpoint(model, x, use_reentrant=False)):
        model = model_with((2, 3, 2), dropout=0.5).train()
        x = torch.ones(1, 12, 6)
        with serving_segments(model, segments_of((5, 4, 3))):
            wrap(model, x).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == 12
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


def test_an_input_of_other_tokens_is_refused_and_the_model_is_as_before():
    model = model_with((2, 2, 2))
    x = torch.randn(1, 9, 6)
    before = model(x)
    with pytest.raises(UnsupportedError, match="expected 9 tokens"), serving_segments(model, segments_of((3, 4, 2))):
        model(x[:, :5])
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
