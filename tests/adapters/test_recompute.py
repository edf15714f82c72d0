"""Inputs that a layer computes again instead of saving them; the judge is plain autograd."""

import weakref

import pytest
import torch
from torch import Tensor, nn

from qgraft.adapters.lora import LoraConfig, LoraLinear
from qgraft.adapters.recompute import recomputable, recompute_of


def layer_and_input() -> tuple[LoraLinear, Tensor]:
    torch.manual_seed(0)
    layer = LoraLinear(nn.Linear(16, 8))
    layer.add("a", layer.make(LoraConfig(r=2), (torch.randn(2, 16), torch.randn(8, 2))))
    layer.active = {"a": 1.0}
    return layer, torch.randn(3, 16)


def gradients(layer: LoraLinear, x: Tensor) -> list[Tensor]:
    """Of A and B, by ordinary operations."""
    lora = layer.loras["a"]
    A, B = (p.detach().clone().requires_grad_() for p in (lora.lora_A, lora.lora_B))
    y = layer.base(x) + (x @ A.T) @ B.T * lora.config.scaling
    return list(torch.autograd.grad(y.square().sum(), (A, B)))


def learned(layer: LoraLinear, x: Tensor) -> tuple[list[Tensor], list[int]]:
    """(the gradients of A and B, where the tensors lie that were saved for them)."""
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):  # type: ignore[func-returns-value]
        y = layer(x)
    lora = layer.loras["a"]
    return list(torch.autograd.grad(y.square().sum(), (lora.lora_A, lora.lora_B))), saved


def test_what_can_be_computed_again_is_not_saved() -> None:
    layer, source = layer_and_input()
    x = recomputable(source * 3, lambda t: t * 3, source)
    got, saved = learned(layer, x)
    assert source.data_ptr() in saved and x.data_ptr() not in saved
    torch.testing.assert_close(got, gradients(layer, source * 3), rtol=1e-4, atol=1e-3)


def test_layers_of_one_input_compute_it_once_for_each_backward_pass() -> None:
    """And hold it no longer than the last of them needs it; a second pass through the same graph computes it again."""
    layer, source = layer_and_input()
    made: list[weakref.ref[Tensor]] = []

    def make(t: Tensor) -> Tensor:
        x = t * 3
        made.append(weakref.ref(x))
        return x

    x = recomputable(source * 3, make, source)
    loss = (layer(x) + 2 * layer(x) + layer(x)).square().sum()
    trained = list(layer.loras["a"].parameters())
    first = torch.autograd.grad(loss, trained, retain_graph=True)
    assert len(made) == 1 and made[0]() is None
    second = torch.autograd.grad(loss, trained)
    assert all(map(torch.equal, first, second)) and all(each() is None for each in made)
    torch.testing.assert_close([each / 16 for each in first], gradients(layer, source * 3), rtol=1e-4, atol=1e-3)


def test_what_was_changed_in_place_is_saved() -> None:
    layer, source = layer_and_input()
    x = recomputable(source * 3, lambda t: t * 3, source)
    x.add_(1)
    assert recompute_of(x) is None
    got, saved = learned(layer, x)
    assert x.data_ptr() in saved
    torch.testing.assert_close(got, gradients(layer, source * 3 + 1), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("other", [torch.clone, lambda x: x[:2], lambda x: x.view(3, 4, 4), torch.detach])
def test_other_tensors_are_not_meant(other) -> None:
    _, source = layer_and_input()
    assert recompute_of(other(recomputable(source * 3, lambda t: t * 3, source))) is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_kept_where_nothing_is_learned(mode) -> None:
    layer, source = layer_and_input()
    with mode():
        x = recomputable(source * 3, lambda t: t * 3, source)
        assert recompute_of(x) is None
        assert torch.equal(layer(x), layer(source * 3))
