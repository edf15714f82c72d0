"""Gradients of scales against autograd in float64; distilling lowers what it minimizes and leaves the codes.

What distills by an exact LoRA is held to what an exact LoRA is elsewhere (tests/adapters/test_exact.py has its gradients):
only the minimums of the weight change, and the layer computes what its merged weight computes.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gguf import GGMLQuantizationType as Q
from torch import Tensor, nn

import qgraft
from qgraft.adapters.choose import adapters_off
from qgraft.adapters.exact import minimums_of
from qgraft.adapters.targets import lora_layers
from qgraft.data.batches import collate, label_weights
from qgraft.formats import FORMATS, Grid, PackedTensor, pack, quantize, unpack
from qgraft.formats.grid import stored_reals
from qgraft.linear import QuantizedLinear
from qgraft.merging import calibration, finish
from qgraft.merging.calibration import find_rows
from qgraft.merging.distill import (
    MOST_LABELS,
    SCALE_RATE,
    Distillation,
    _FreeMinimums,
    _FreeScales,
    _Labels,
    _ScaleFunction,
    distill,
)
from qgraft.merging.layer import has_fine_reals, has_grid
from qgraft.merging.measure import Compared, compare, in_place, states_of
from qgraft.merging.merge import merge
from qgraft.merging.near_rows import near_rows
from qgraft.passes.decoder import output_head

SYMMETRIC = {  # odd shapes where the blocks of the format allow them: (out, in)
    "q4_0": (7, 96), "q5_0": (1, 32), "q8_0": (5, 160), "q6_k": (5, 256), "chatglm-int4": (11, 38), "chatglm-int8": (3, 17),
    "iq4_nl": (7, 96), "iq4_xs": (5, 256), "mxfp4": (5, 96), "nvfp4": (5, 192),
}  # fmt: skip
MINIMUMS = {"q4_1": (5, 160), "q5_1": (1, 32), "q4_k": (3, 512), "q5_k": (9, 256)}
OTHERS = ["levels", "act_order"]  # as NF4 and GPTQ have them


def a_weight(format_: str, seed: int = 0) -> PackedTensor:
    weight = torch.randn({**SYMMETRIC, **MINIMUMS}[format_], generator=torch.Generator().manual_seed(seed)) * 0.05
    return quantize(weight.half() if len(FORMATS[format_].parts) > 1 else weight, format_)


def a_grid(kind: str) -> Grid:
    """That of a format, or 5 rows of 96 weights in 3 groups."""
    if kind not in OTHERS:
        return unpack(a_weight(kind))
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


def explicit_weight(grid: Grid, d: Tensor) -> Tensor:
    """The formula at the top of formats/grid.py for a format without minimums, in float64."""
    scale = spread(grid, d) * (1.0 if grid.sub_scales is None else spread(grid, grid.sub_scales.double()))
    value = grid.codes.double() if grid.levels is None else grid.levels.double()[grid.codes.long()]
    return scale * (value if grid.zeros is None else value - spread(grid, grid.zeros.double()))


def close(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    expected = expected.detach()
    assert float((got.detach().double() - expected).norm()) < 1e-5 * float(expected.norm())


# ---------------------------------------------------------------- layers whose numbers are free


@pytest.mark.parametrize("format_", [*SYMMETRIC, *MINIMUMS])
def test_what_small_steps_cannot_change_is_not_trained(format_):
    """Scales a hundredth larger, more than a round moves most of them, are stored as other numbers, or are not trained."""
    grid = unpack(a_weight(format_))
    minimums = None if grid.m is None else 1.01 * grid.m
    moved = replace(grid, d=1.01 * grid.d, m=minimums).rounded()
    changed = float((moved.d != grid.d).float().mean()) > 0.5
    assert changed == (format_ not in ("mxfp4", "nvfp4"))
    assert has_fine_reals(a_weight(format_)) == changed


def test_floats_have_no_scales_to_train():
    assert not has_fine_reals(quantize(torch.ones(2, 32), "f16"))


def test_every_format_that_a_merge_writes_is_looked_at():
    written = {name for name, each in FORMATS.items() if each.unpack is not None and each.quantize is not None}
    assert written == {*SYMMETRIC, *MINIMUMS}
    assert {name for name in written if minimums_of(name) is not None} == {*MINIMUMS}


@pytest.mark.parametrize("kind", [*SYMMETRIC, *OTHERS])
@pytest.mark.parametrize("batch", [(13,), (2, 3)])
def test_gradients_are_those_of_the_formula(kind, batch):
    grid = a_grid(kind)
    generator = torch.Generator().manual_seed(1)
    rows, width = grid.codes.shape
    x = torch.randn(*batch, width, generator=generator, dtype=torch.float64)
    g = torch.randn(*batch, rows, generator=generator, dtype=torch.float64)
    layer = _FreeScales(lambda: grid, kind, None)

    x_64 = x.clone().requires_grad_()
    d_64 = torch.zeros(grid.d.shape, dtype=torch.float64, requires_grad=True)
    y_64 = x_64 @ explicit_weight(grid, grid.d.double() + d_64 * layer.unit.double()).T
    (y_64 * g).sum().backward()

    x_free = x.clone().requires_grad_()
    y = _ScaleFunction.apply(x_free, layer.d, layer.grid, layer.unit)
    (y * g).sum().backward()
    close(y, y_64)
    close(x_free.grad, x_64.grad)
    close(layer.d.grad, d_64.grad)


def test_the_inputs_gradient_is_skipped_where_nobody_asks():
    layer = _FreeScales(partial(a_grid, "q4_0"), "q4_0", None)
    x = torch.randn(4, 96)
    layer(x).sum().backward()
    assert x.grad is None and layer.d.grad.abs().sum() > 0


@pytest.mark.parametrize("format_", [*SYMMETRIC])
@pytest.mark.parametrize("biased", [False, True])
def test_scales_are_the_start_plus_offsets_as_they_are_stored(format_, biased):
    packed, generator = a_weight(format_), torch.Generator().manual_seed(3)
    grid, (out, width) = unpack(packed), packed.shape
    bias = torch.randn(out, generator=generator) if biased else None
    layer = _FreeScales(lambda: grid, format_, bias)
    assert torch.equal(layer.grid().weight(), grid.weight())
    nn.init.normal_(
        layer.d, std=1.0 if format_ in ("mxfp4", "nvfp4") else 0.05, generator=generator
    )  # powers of two move by halves
    moved = layer.grid()
    assert torch.equal(moved.codes, grid.codes)
    assert torch.equal(moved.d, stored_reals(grid.d + layer.d.detach() * layer.unit, grid.real_dtype, grid.real_unit))
    assert not torch.equal(moved.d, grid.d)
    x = torch.randn(3, width, generator=generator)
    expected = QuantizedLinear(layer.merged(), bias)(x)
    torch.testing.assert_close(layer(x).detach(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("format_", [*SYMMETRIC, *OTHERS])
def test_a_step_of_one_moves_a_row_as_far_in_every_format(format_):
    """Offsets of 1 and -1 in the groups of a row change the length of (d_1 .. d_G) by about a mean scale."""
    grid = a_grid(format_)
    layer = _FreeScales(lambda: grid, format_, None)
    assert layer.rate == SCALE_RATE and layer.unit.shape == (len(grid.d), 1)
    torch.testing.assert_close(
        (layer.unit * torch.ones_like(grid.d)).norm(dim=1), grid.d.abs().mean(dim=1), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("format_", [*MINIMUMS])
@pytest.mark.parametrize("biased", [False, True])
def test_minimums_are_changed_by_what_the_exact_lora_adds(format_, biased):
    packed, generator = a_weight(format_), torch.Generator().manual_seed(3)
    grid, (out, width) = unpack(packed), packed.shape
    bias = torch.randn(out, generator=generator) if biased else None
    layer = _FreeMinimums(packed, bias)
    x = torch.randn(6, width, generator=generator)
    torch.testing.assert_close(layer(x), QuantizedLinear(packed, bias)(x), rtol=1e-6, atol=1e-6)  # B is zero
    trainable = {name for name, each in layer.named_parameters() if each.requires_grad}
    assert {name.rpartition(".")[2] for name in trainable} == {"lora_A", "lora_B"}
    for parameter in layer.lora.parameters():
        nn.init.normal_(parameter, std=0.03, generator=generator)
    merged = layer.merged()
    assert (merged.format, merged.shape) == (packed.format, packed.shape)
    moved = unpack(merged)
    assert torch.equal(moved.m, (grid.m + layer.lora.change()).float().half().float())
    assert not torch.equal(moved.m, grid.m) and torch.equal(moved.d, grid.d) and torch.equal(moved.codes, grid.codes)
    for name in ("sub_scales", "sub_minimums"):
        assert getattr(grid, name) is None or torch.equal(getattr(moved, name), getattr(grid, name))
    expected, before = (QuantizedLinear(each, bias)(x) for each in (merged, packed))
    assert float((layer(x).detach() - expected).norm()) < 0.02 * float((expected - before).norm())
    assert torch.equal(layer.packed.parts[0], packed.parts[0])


# ---------------------------------------------------------------- a model of them


def perturbed(packed: PackedTensor, seed: int) -> PackedTensor:
    """Every real number off by some percent: what a merge that went wrong could leave."""
    grid, generator = unpack(packed), torch.Generator().manual_seed(seed)

    def shake(values: Tensor) -> Tensor:
        return values * (1 + 0.04 * torch.randn(values.shape, generator=generator))

    shaken = replace(grid, d=shake(grid.d), m=None if grid.m is None else shake(grid.m))
    return pack(shaken.rounded(), packed.format)


def shaken_merge(model: Any) -> dict[str, PackedTensor]:
    """Of every layer with a grid: what its adapter makes of the weight, rounded and perturbed."""
    merged = {}
    for n, (path, layer) in enumerate(lora_layers(model)):
        target = layer.dequantize() + layer.loras["default"].delta().detach()
        if has_grid(layer.packed):
            merged[path] = perturbed(quantize(target, layer.packed.format), n)
    return merged


def divergence(model: Any, merged: Mapping[str, PackedTensor], samples: Any, targets: Tensor) -> float:
    with in_place(dict(lora_layers(model)), merged), adapters_off(model):
        states, _ = states_of(model, samples)
    return compare(targets, states, output_head(model)).divergence


def silent(done: int, total: int) -> None:
    """Progress that nobody looks at."""


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])  # gpt2 has biases
def test_distilling_lowers_the_divergence_and_leaves_the_codes(trained, rows, architecture):
    model, tokenizer = trained(architecture).load()
    samples = find_rows(model, tokenizer, rows, None, [], {}, 0).fit[:-2]
    targets, _ = states_of(model, samples)
    merged = shaken_merge(model)
    formats = {packed.format for packed in merged.values()}
    assert {minimums_of(format_) is None for format_ in formats} == {True, False}
    before = {path: layer.packed.parts[0].clone() for path, layer in lora_layers(model)}
    modules, active = {path: type(each) for path, each in model.named_modules()}, qgraft.active_adapters(model)
    seen: list[tuple[int, int]] = []
    random = torch.get_rng_state()
    distilled, steps = distill(model, merged, samples, targets, progress=lambda *each: seen.append(each))
    assert torch.equal(torch.get_rng_state(), random)
    assert seen == [(n + 1, steps) for n in range(steps)] and steps >= 4
    assert distilled.keys() == merged.keys()
    for path, packed in distilled.items():
        old, new = unpack(merged[path]), unpack(packed)
        assert (packed.format, packed.shape) == (merged[path].format, merged[path].shape)
        assert [part.dtype for part in packed.parts] == [part.dtype for part in merged[path].parts]
        changed = {name for name in ("codes", "d", "m", "sub_scales", "sub_minimums") if differs(old, new, name)}
        assert changed == ({"d"} if old.m is None else {"m"}), path
    start, end = (divergence(model, each, samples, targets) for each in (merged, distilled))
    assert end < 0.8 * start
    # the model is as it was, adapters of layers that are not distilled (f16) included
    assert all(torch.equal(layer.packed.parts[0], before[path]) for path, layer in lora_layers(model))
    assert {path: type(each) for path, each in model.named_modules()} == modules
    assert qgraft.active_adapters(model) == active and all(p.grad is None for p in model.parameters())
    for only in (True, False):  # each kind of format has its part in it
        part = {path: distilled[path] for path in merged if (minimums_of(merged[path].format) is None) == only}
        assert divergence(model, {**merged, **part}, samples, targets) < start


@pytest.mark.parametrize("kind", [Q.Q4_K, Q.Q6_K], ids=str)  # minimums, scales
def test_distilling_a_layer_whose_columns_are_in_another_order(kind, tiny_gguf, rows):
    """Value heads of Qwen 3.5, four of which share a block."""
    config = {"linear_value_head_dim": 64, "linear_key_head_dim": 64, "linear_num_key_heads": 4,
              "linear_num_value_heads": 8, "num_hidden_layers": 2,
              "layer_types": ["linear_attention", "full_attention"]}  # fmt: skip
    tiny = tiny_gguf("qwen35", config=config, metadata={"qwen35.full_attention_interval": 2}, types=(kind,))
    model, tokenizer = qgraft.load(tiny.path, dtype="float32", device="cpu")
    qgraft.attach_lora(model, r=2, target_modules=["out_proj"])
    samples = find_rows(model, tokenizer, rows, None, [], {}, 0).fit[:-2]
    targets, _ = states_of(model, samples)
    ((path, layer),) = lora_layers(model)
    merged = {path: perturbed(layer.packed, 0)}
    distilled, _ = distill(model, merged, samples, targets, progress=silent)
    start, end = (divergence(model, each, samples, targets) for each in (merged, distilled))
    assert end < 0.8 * start


def differs(old: Grid, new: Grid, name: str) -> bool:
    one, other = getattr(old, name), getattr(new, name)
    assert (one is None) == (other is None)
    return one is not None and not torch.equal(one, other)


def test_codes_that_stay_are_not_held_twice(trained, rows):
    model, tokenizer = trained().load()
    for _, layer in lora_layers(model):
        layer.replace(quantize(layer.dequantize().half(), "chatglm-int4"))
    samples = find_rows(model, tokenizer, rows, None, [], {}, 0).fit[:4]
    merged, (targets, _) = shaken_merge(model), states_of(model, samples)
    distilled, _ = distill(model, merged, samples, targets, progress=silent)
    for path, packed in distilled.items():
        (codes, scale), (codes_before, scale_before) = packed.parts, merged[path].parts
        assert codes is codes_before and not torch.equal(scale, scale_before), path


def test_the_same_seed_gives_the_same_bytes(trained, rows):
    model, tokenizer = trained().load()
    samples = find_rows(model, tokenizer, rows, None, [], {}, 0).fit[:6]
    targets, _ = states_of(model, samples)
    merged = dict([*shaken_merge(model).items()][:4])

    def bytes_with(seed: int) -> list[bytes]:
        torch.rand(3)  # whatever the generator is at
        distilled, _ = distill(model, merged, samples, targets, progress=silent, seed=seed)
        return [part.numpy().tobytes() for path in merged for part in distilled[path].parts]

    first = bytes_with(1)
    assert bytes_with(1) == first != bytes_with(2)


def test_nothing_of_the_generator_is_left_behind_by_an_exception(trained, rows):
    model, tokenizer = trained().load()
    samples = find_rows(model, tokenizer, rows, None, [], {}, 0).fit[:3]
    targets, _ = states_of(model, samples)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    random, modules = torch.get_rng_state(), [*map(type, model.modules())]
    with pytest.raises(KeyboardInterrupt):
        distill(model, shaken_merge(model), samples, targets, progress=stop)
    assert torch.equal(torch.get_rng_state(), random) and [*map(type, model.modules())] == modules


# ---------------------------------------------------------------- what the labels lost


def test_labels_count_by_what_they_lost_in_this_step_and_on_the_mean():
    """The slope of lost^2; nothing where the step's labels, or those of the last steps, are as likely as they were."""
    lost = _Labels(0.25)
    assert lost.share(0.1) == pytest.approx(0.2)
    assert lost.share(0.3) == pytest.approx(0.4)  # of the mean, 0.2
    assert lost.share(-0.1) == 0.0 and lost.share(0.02) == pytest.approx(0.04)
    assert lost.share(9.0) == MOST_LABELS
    gained = _Labels(0.25)
    assert [gained.share(each) for each in (-0.4, 0.1, 0.1)] == [0.0, 0.0, 0.0]


def test_what_labels_lost_is_the_difference_of_the_losses_where_they_weigh(trained, rows):
    model, tokenizer = trained().load()
    samples = find_rows(model, tokenizer, rows, None, [], {}, 0).fit
    task = [sample for sample in samples if sample.weights is None]
    assert 0 < len(task) < len(samples)  # unrelated text weighs 0

    def losses(samples: Any) -> list[float]:
        found = []
        for off in (nullcontext(), adapters_off(model)):
            with off, torch.no_grad():
                logits = [model(torch.tensor([sample.input_ids])).logits[0, :-1] for sample in samples]
            labels = [torch.tensor(sample.labels[1:]) for sample in samples]
            found.append(float(F.cross_entropy(torch.cat(logits).double(), torch.cat(labels))))
        return found

    states_p, labels = states_of(model, samples)
    with adapters_off(model):
        states_q, _ = states_of(model, samples)
    weights = label_weights(collate(samples))
    adapter, base = losses(task)
    known, got = compare(states_p, states_q, output_head(model), labels, weights).losses
    assert got - known == pytest.approx(base - adapter, rel=1e-4)
    assert compare(states_p, states_q, output_head(model), labels, torch.zeros_like(weights)).losses == (0.0, 0.0)


def test_distilling_gives_the_labels_back_what_they_lost(trained, rows, monkeypatch):
    model, tokenizer = trained().load()
    samples = find_rows(model, tokenizer, rows, None, [], {}, 0).fit
    targets, labels = states_of(model, samples)
    merged, weights, layers = shaken_merge(model), label_weights(collate(samples)), dict(lora_layers(model))
    distilled, _ = distill(model, merged, samples, targets, progress=silent)
    monkeypatch.setattr("qgraft.merging.distill.MOST_LABELS", 0.0)
    by_divergence, _ = distill(model, merged, samples, targets, progress=silent)
    lost = []
    for packed in (merged, by_divergence, distilled):
        with in_place(layers, packed), adapters_off(model):
            states, _ = states_of(model, samples)
        known, got = compare(targets, states, output_head(model), labels, weights).losses
        lost.append(got - known)
    assert lost[0] > lost[1] > lost[2] > 0


# ---------------------------------------------------------------- rounds


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "NEUTRAL_TOKENS", 300)
    monkeypatch.setattr(calibration, "DRIFT_TOKENS", 100)


@pytest.mark.usefixtures("few_rows")
def test_a_round_counts_only_if_the_judging_rows_come_closer(trained, rows, monkeypatch):
    model, tokenizer = trained().load()
    chosen, layers = find_rows(model, tokenizer, rows, None, [], {}, 0), dict(lora_layers(model))
    merged = shaken_merge(model)
    targets, _ = states_of(model, chosen.judge)
    distillation = Distillation(model, layers, {}, chosen, 1.0)
    better, steps = distillation.round(merged, silent)
    apart = [divergence(model, each, chosen.judge, targets) for each in (merged, better)]
    assert steps > 0 and apart[1] < apart[0]
    for name in ("SCALE_RATE", "LORA_RATE"):
        monkeypatch.setattr(f"qgraft.merging.distill.{name}", 0.5)  # destroys the weights
    assert distillation.round(merged, silent) == (merged, 0)
    assert Distillation(model, layers, {}, chosen, 1.0).round(merged, silent)[0] is merged


@pytest.mark.usefixtures("few_rows")
def test_a_round_is_judged_with_the_rest_of_the_merge_in_place(trained, rows, monkeypatch):
    """Layers that are merged in closed form are not distilled, but the merged model has them."""
    model, tokenizer = trained().load()
    chosen, layers = find_rows(model, tokenizer, rows, None, [], {}, 0), dict(lora_layers(model))
    merged = shaken_merge(model)
    others = {path: packed for path, packed in merged.items() if path.endswith("up_proj")}
    solved = {path: packed for path, packed in merged.items() if path not in others}
    targets, _ = states_of(model, chosen.judge)
    seen: list[float] = []

    def spied(*args: Any) -> Compared:
        compared = compare(*args)
        seen.append(compared.divergence)
        return compared

    monkeypatch.setattr("qgraft.merging.distill.compare", spied)
    monkeypatch.setattr("qgraft.merging.distill.PASSES", 1)
    better, steps = Distillation(model, layers, others, chosen, 1.0).round(solved, silent)
    assert better.keys() == solved.keys()
    assert seen[0] == pytest.approx(divergence(model, merged, chosen.judge, targets), rel=1e-4)
    assert (steps > 0) == (seen[1] < seen[0])
    assert seen[0] != pytest.approx(divergence(model, solved, chosen.judge, targets), rel=1e-2)


@pytest.mark.usefixtures("few_rows")
def test_a_last_round_learns_from_all_rows_but_the_unrelated_ones_that_measure(trained, rows, monkeypatch):
    model, tokenizer = trained().load()
    chosen = find_rows(model, tokenizer, rows, None, [], {}, 0)
    given: list[Any] = []

    def distilled(model: Any, merged: Any, samples: Any, targets: Tensor, **options: Any) -> Any:
        given.append((samples, targets, options["seed"]))
        return dict(merged), 1

    monkeypatch.setattr("qgraft.merging.distill.distill", distilled)
    merged = {path: layer.packed for path, layer in lora_layers(model)}  # f16 among them
    distillation = Distillation(model, dict(lora_layers(model)), {}, chosen, 1.0)
    distillation.round(merged, silent)
    packed, steps = distillation.last_round(merged, silent)
    assert packed == merged and steps == 1
    (fit, fit_targets, first), (all_, targets, second) = given
    near = near_rows(chosen.fit, 0)
    assert near and fit == [*chosen.fit, *near]
    assert all_ == [*chosen.fit, *chosen.judge, *chosen.measure] and first != second
    torch.testing.assert_close(fit_targets, states_of(model, fit)[0])
    torch.testing.assert_close(targets, states_of(model, all_)[0], rtol=1e-4, atol=1e-4)
    assert not {sample.source for sample in all_} & {sample.source for sample in chosen.drift}


def test_rounds_learn_from_rows_that_none_before_has_seen(trained, rows, monkeypatch):
    model, tokenizer = trained().load()
    chosen = find_rows(model, tokenizer, rows, None, [], {}, 0)
    further = (chosen.measure, chosen.judge)
    given: list[Any] = []

    def distilled(model: Any, merged: Any, samples: Any, targets: Tensor, **options: Any) -> Any:
        given.append((samples, targets))
        return dict(merged), 1

    monkeypatch.setattr("qgraft.merging.distill.distill", distilled)
    merged = {path: layer.packed for path, layer in lora_layers(model)}
    distillation = Distillation(model, dict(lora_layers(model)), {}, replace(chosen, further=further), 1.0)
    unseen = []
    for _ in range(4):
        unseen.append(distillation.unseen)
        distillation.round(merged, silent)
    assert unseen == [True, True, False, False]
    seen = [[*chosen.fit, *near_rows(chosen.fit, number)] for number in (2, 3)]
    assert [samples for samples, _ in given] == [*further, *seen] and seen[0] != seen[1]
    for samples, targets in given:
        torch.testing.assert_close(targets, states_of(model, samples)[0])


@pytest.mark.usefixtures("few_rows")
def test_a_model_in_float_formats_only_has_nothing_to_distill(tiny_gguf, rows, monkeypatch):
    model, tokenizer = qgraft.load(tiny_gguf("llama", types=(Q.F16, Q.BF16)).path)
    qgraft.attach_lora(model, r=2, target_modules="q_proj,v_proj,up_proj")
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.loras["default"].lora_B, std=0.05, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(finish, "wanting", lambda kept: True)
    report = merge(model, tokenizer, calibration=rows, min_retained=-100.0)
    assert report.distilled_steps == 0 and {each.format for each in report.layers} == {"f16", "bf16"}
    assert report.kept.task_kl < 0.05 and report.kept.before is None
