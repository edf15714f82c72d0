"""Gradients of the real numbers against autograd in float64; distilling lowers what it minimizes and keeps the codes."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qgraft
from qgraft.adapters.choose import adapters_off
from qgraft.adapters.targets import lora_layers
from qgraft.formats import FORMATS, Grid, PackedTensor, dequantize, pack, quantize, unpack
from qgraft.linear import QuantizedLinear
from qgraft.merging.calibration import find_rows
from qgraft.merging.distill import _RealFunction, _RealLinear, distill
from qgraft.merging.layer import CHAINS, has_grid
from qgraft.merging.measure import mean_divergence, states_of
from qgraft.merging.merge import merge, unmerge
from qgraft.passes.decoder import output_head

SHAPES = {  # odd shapes where the blocks of the format allow them: (out, in)
    "q4_0": (7, 96), "q4_1": (5, 160), "q5_1": (1, 32), "q4_k": (3, 512), "q5_k": (9, 256), "q6_k": (5, 256),
    "chatglm-int4": (11, 38), "chatglm-int8": (3, 17),
}  # fmt: skip
OTHERS = ["levels", "act_order"]  # as NF4 and GPTQ have them


def a_grid(format_: str, seed: int = 0) -> Grid:
    if format_ in OTHERS:
        return another_grid(format_)
    shape = SHAPES[format_]
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05
    return unpack(quantize(weight.half() if len(FORMATS[format_].parts) > 1 else weight, format_))


def another_grid(kind: str) -> Grid:
    """5 rows of 96 weights in 3 groups."""
    generator = torch.Generator().manual_seed(4)
    codes = torch.randint(0, 16, (5, 96), generator=generator, dtype=torch.int8)
    d = (torch.rand(5, 3, generator=generator) * 0.01).half().float()
    if kind == "levels":
        return Grid(codes, d, levels=torch.linspace(-1, 1, 16) ** 3, low=0, high=15)
    zeros = torch.randint(0, 16, (5, 3), generator=generator, dtype=torch.int8)
    group_of = (torch.arange(96) // 32)[torch.randperm(96, generator=generator)]
    return Grid(codes, d, zeros=zeros, low=0, high=15, zero_high=15, group_of=group_of)


def spread(grid: Grid, values: Tensor) -> Tensor:
    """Values of (sub-)groups over their columns, by the definition of Grid."""
    width = grid.codes.shape[1]
    groups = [i * values.shape[1] // width for i in range(width)] if grid.group_of is None else grid.group_of.tolist()
    return values[:, groups]


def explicit_weight(grid: Grid, d: Tensor, m: Tensor | None) -> Tensor:
    """The formula at the top of formats/grid.py, in float64."""
    scale = spread(grid, d) * (1.0 if grid.sub_scales is None else spread(grid, grid.sub_scales.double()))
    value = grid.codes.double() if grid.levels is None else grid.levels.double()[grid.codes.long()]
    weight = scale * (value if grid.zeros is None else value - spread(grid, grid.zeros.double()))
    if m is None:
        return weight
    return weight + spread(grid, m) * (1.0 if grid.sub_minimums is None else spread(grid, grid.sub_minimums.double()))


@pytest.mark.parametrize("format_", [*SHAPES, *OTHERS])
@pytest.mark.parametrize("batch", [(13,), (2, 3)])
def test_gradients_are_those_of_the_formula(format_, batch):
    grid = a_grid(format_)
    generator = torch.Generator().manual_seed(1)
    rows, width = grid.codes.shape
    x = torch.randn(*batch, width, generator=generator, dtype=torch.float64)
    g = torch.randn(*batch, rows, generator=generator, dtype=torch.float64)
    layer = _RealLinear(grid)
    d_unit, m_unit = layer._units()

    x_64 = x.clone().requires_grad_()
    d_64 = torch.zeros(grid.d.shape, dtype=torch.float64, requires_grad=True)
    m_64 = None if grid.m is None else torch.zeros(grid.m.shape, dtype=torch.float64, requires_grad=True)
    m = None if grid.m is None or m_64 is None else grid.m.double() + m_64 * m_unit.double()
    y_64 = x_64 @ explicit_weight(grid, grid.d.double() + d_64 * d_unit.double(), m).T
    (y_64 * g).sum().backward()

    x_free = x.clone().requires_grad_()
    y = _RealFunction.apply(x_free, layer.d, layer.m, layer.grid(), d_unit, m_unit)
    (y * g).sum().backward()
    close(y, y_64)
    close(x_free.grad, x_64.grad)
    close(layer.d.grad, d_64.grad)
    if m_64 is not None:
        close(layer.m.grad, m_64.grad)
    assert (layer.m is None) == (grid.m is None)


def close(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    expected = expected.detach()
    assert float((got.detach().double() - expected).norm()) < 1e-5 * float(expected.norm())


def test_the_inputs_gradient_is_skipped_where_nobody_asks():
    layer = _RealLinear(a_grid("q4_1"))
    x = torch.randn(4, 160)
    layer(x).sum().backward()
    assert x.grad is None and layer.d.grad.abs().sum() > 0


@pytest.mark.parametrize("format_", [*SHAPES])
def test_the_numbers_are_the_start_plus_offsets_as_they_are_stored(format_):
    grid = a_grid(format_)
    layer = _RealLinear(grid)
    assert torch.equal(layer.grid().weight(), grid.weight())
    generator = torch.Generator().manual_seed(3)
    nn.init.normal_(layer.d, std=0.01, generator=generator)
    if layer.m is not None:
        nn.init.normal_(layer.m, std=0.01, generator=generator)
    d_unit, m_unit = layer._units()
    moved = layer.grid()
    assert torch.equal(moved.codes, grid.codes)
    assert torch.equal(moved.d, (grid.d + layer.d.detach() * d_unit).half().float())
    if layer.m is not None:
        assert torch.equal(moved.m, (grid.m + layer.m.detach() * m_unit).half().float())
    packed = pack(moved, format_)
    x = torch.randn(3, SHAPES[format_][1], generator=generator)
    expected = QuantizedLinear(packed)(x)
    torch.testing.assert_close(layer(x).detach(), expected, rtol=1e-4, atol=1e-5)


def perturbed(packed: PackedTensor, seed: int) -> PackedTensor:
    """Every real number off by some percent: what a merge that went wrong could leave."""
    grid, generator = unpack(packed), torch.Generator().manual_seed(seed)

    def shake(values: Tensor) -> Tensor:
        return values * (1 + 0.04 * torch.randn(values.shape, generator=generator))

    shaken = replace(grid, d=shake(grid.d), m=None if grid.m is None else shake(grid.m))
    return pack(shaken.rounded(), packed.format)


def divergence(model: Any, merged: dict[str, PackedTensor], samples: Any, targets: Tensor) -> float:
    layers = dict(lora_layers(model))
    before = {path: layers[path].packed for path in merged}
    for path, packed in merged.items():
        layers[path].replace(packed)
    with adapters_off(model):
        states, _ = states_of(model, samples)
    for path, packed in before.items():
        layers[path].replace(packed)
    return mean_divergence(targets, states, output_head(model))


@pytest.mark.spread(1)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])  # gpt2 has biases
def test_distilling_lowers_the_divergence_and_changes_real_numbers_only(trained, rows, architecture):
    model, tokenizer = trained(architecture).load()
    chosen = find_rows(model, tokenizer, rows, None, [], {}, 0)
    samples = chosen.fit[: len(chosen.fit) - 2]
    targets, _ = states_of(model, samples)
    merged = {}
    for n, (path, layer) in enumerate(lora_layers(model)):
        target = layer.dequantize() + layer.loras["default"].delta().detach()
        if has_grid(layer.packed):
            merged[path] = perturbed(quantize(target, layer.packed.format), n)
    before = {path: layer.packed.parts[0].clone() for path, layer in lora_layers(model)}
    modules = {path: type(module) for path, module in model.named_modules()}
    seen: list[tuple[int, int]] = []
    trained_, steps = distill(
        model, merged, samples, targets, learning_rate=6e-3,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen == [(n + 1, steps) for n in range(steps)] and steps >= 4
    assert trained_.keys() == merged.keys()
    for path, packed in trained_.items():
        old, new = unpack(merged[path]), unpack(packed)
        assert (packed.format, packed.shape, packed.parts[0].dtype) == (
            merged[path].format,
            merged[path].shape,
            merged[path].parts[0].dtype,
        )
        assert torch.equal(old.codes, new.codes) and not torch.equal(old.d, new.d)
        for name in ("sub_scales", "sub_minimums"):
            integers = getattr(old, name), getattr(new, name)
            assert integers == (None, None) or torch.equal(*integers)
    start, end = (divergence(model, each, samples, targets) for each in (merged, trained_))
    assert end < 0.7 * start
    # the model is as it was, adapters of layers that are not distilled (f16) included
    assert all(torch.equal(layer.packed.parts[0], before[path]) for path, layer in lora_layers(model))
    assert {path: type(module) for path, module in model.named_modules()} == modules
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.slow
def test_distilled_numbers_are_taken_only_if_the_judging_rows_gain(trained, rows, monkeypatch):
    monkeypatch.setitem(CHAINS, "auto", ())  # leaves the base's numbers, so that there is much to gain
    model, tokenizer = trained().load()
    original = {path: layer.packed for path, layer in lora_layers(model)}
    results, reports = [], []

    def merged_with(target: float, rate: float = 1e-3) -> None:
        monkeypatch.setattr("qgraft.merging.merge.TARGET", target)
        monkeypatch.setattr("qgraft.merging.distill.LEARNING_RATE", rate)
        reports.append(merge(model, tokenizer, calibration=rows, min_retained=-10.0))
        results.append({path: dequantize(model.get_submodule(path).packed, torch.float32) for path in original})
        unmerge(model)

    merged_with(-10.0)  # never wanting
    merged_with(10.0, rate=2.0)  # destroys the weights
    merged_with(10.0, rate=5e-3)
    assert reports[0].distilled_steps == reports[1].distilled_steps == 0 < reports[2].distilled_steps
    assert all(torch.equal(results[0][path], results[1][path]) for path in original)
    assert any(not torch.equal(results[0][path], results[2][path]) for path in original)
    assert reports[2].kept.task_kl < reports[0].kept.task_kl
    assert reports[0].kept == reports[1].kept


def test_a_model_in_float_formats_only_has_nothing_to_distill(tiny_gguf, rows, monkeypatch):
    from gguf import GGMLQuantizationType as Q

    model, tokenizer = qgraft.load(tiny_gguf("llama", types=(Q.F16, Q.BF16)).path)
    qgraft.attach_lora(model, r=2, target_modules="q_proj,v_proj,up_proj")
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.loras["default"].lora_B, std=0.05, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("qgraft.merging.merge.TARGET", 10.0)
    report = merge(model, tokenizer, calibration=rows, min_retained=-100.0)
    assert report.distilled_steps == 0 and {each.format for each in report.layers} == {"f16", "bf16"}
    assert report.kept.task_kl < 0.05
