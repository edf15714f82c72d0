"""One layer: a chain never does worse than not merging, the baselines round as gguf does, the report counts right."""

from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from qgraft.errors import OptionError
from qgraft.formats import FORMATS, PackedTensor, dequantize, quantize, take_rows, unpack
from qgraft.merging import layer as layer_module
from qgraft.merging.layer import (
    CHAINS,
    DAMPING,
    METHODS,
    Inputs,
    Wanted,
    check_method,
    collapse,
    merge_layer,
    merge_nearest,
    seen,
)
from qgraft.merging.problem import TokenProblem

WRITABLE = [name for name, each in FORMATS.items() if each.quantize is not None]
GRIDS = [name for name in WRITABLE if FORMATS[name].unpack is not None]
TYPES = {name: getattr(gguf.GGMLQuantizationType, name.upper()) for name in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")}
WIDTH = 256


def a_layer(format_: str, out: int = 24) -> tuple[PackedTensor, Tensor, Inputs]:
    """(packed weight, a small low-rank delta, inputs of uneven energy), stream m a little off stream a."""
    generator = torch.Generator().manual_seed(11)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weight = 0.05 * normal(out, WIDTH)
    # row-wise scales have the dtype of what was quantized
    packed = quantize(weight.half() if len(FORMATS[format_].parts) > 1 else weight, format_)
    delta = normal(out, 4) @ normal(4, WIDTH) * 6e-4
    directions = torch.logspace(0, -2, 24)[:, None] * normal(24, WIDTH)
    x_a = normal(900, 24) @ directions + 0.01 * normal(900, WIDTH)
    x_m = x_a + 0.02 * x_a.std() * normal(900, WIDTH)
    fit_a, fit_m, held_a, held_m = x_a[:700], x_m[:700], x_a[700:], x_m[700:]
    return packed, delta, seen(fit_a.clone(), fit_m.clone(), held_a, held_m)


def held_error(weight: Tensor, packed: PackedTensor, delta: Tensor, inputs: Inputs) -> float:
    """Float64: how far the outputs on held-out tokens are from the wanted ones, 1 for the unmerged weight."""
    base, held_a, held_m = dequantize(packed, torch.float32).double(), inputs.held_a.double(), inputs.held_m.double()
    wanted = held_a @ (base + delta.double()).T
    return float((held_m @ weight.double().T - wanted).norm() / (held_m @ base.T - wanted).norm())


@pytest.mark.spread(12)
@pytest.mark.parametrize("format_", GRIDS)
@pytest.mark.parametrize("method", [*CHAINS])
def test_the_outputs_come_closer_and_the_report_says_how_close(format_, method):
    packed, delta, inputs = a_layer(format_)
    merged, report = merge_layer("some.layer", packed, delta, inputs, method)
    assert (merged.format, merged.shape, merged.nbytes) == (format_, packed.shape, packed.nbytes)
    if len(packed.parts) > 1:
        assert merged.parts[1].dtype == packed.parts[1].dtype == torch.float16
    error = held_error(dequantize(merged, torch.float32), packed, delta, inputs)
    assert report.error == pytest.approx(error, rel=1e-3)
    assert error <= 1.0 + 1e-6
    if method == "auto":
        rounded, _ = merge_nearest("some.layer", packed, delta, "nearest")
        assert error < 0.95
        # the steps of 8 bits are finer than this delta, so that rounding does not lose it
        assert "8" in format_ or error < held_error(dequantize(rounded, torch.float32), packed, delta, inputs)
    allowed = [algorithm.__name__ for algorithm in CHAINS[method]]
    assert set(report.steps) <= set(allowed) and (report.path, report.format) == ("some.layer", format_)
    before, after = unpack(packed), unpack(merged)
    assert report.codes_changed == pytest.approx(float((before.codes != after.codes).double().mean()), abs=1e-6)
    step = before.spacing() * before.steps().double().square().mean().sqrt()
    assert report.delta_in_steps == pytest.approx(float(delta.double().square().mean().sqrt() / step), rel=1e-4)
    if method == "scales":
        assert torch.equal(before.codes, after.codes)


@pytest.mark.parametrize("tokens", [40, 128, 129])
def test_wide_layers_of_few_tokens_keep_the_tokens_and_pose_the_same_problem(monkeypatch, tokens):
    monkeypatch.setattr(layer_module, "WIDE", WIDTH)
    generator = torch.Generator().manual_seed(2)
    x_a, x_m = (torch.randn(tokens, WIDTH, generator=generator) for _ in range(2))
    target, w = (0.05 * torch.randn(5, WIDTH, generator=generator) for _ in range(2))
    inputs = seen(x_a.clone(), x_m.clone(), x_a[:3], x_m[:3])
    problem = inputs.problem(target)
    assert inputs.few == isinstance(problem, TokenProblem) == (2 * tokens < WIDTH)
    assert torch.equal(inputs.held_a, x_a[:3]) and torch.equal(inputs.held_m, x_m[:3])
    a, m = x_a.double(), x_m.double()
    H, noise = m.T @ m / tokens, DAMPING * float(m.square().sum()) / tokens / WIDTH
    expected = w.double() @ H - target.double() @ (a.T @ m / tokens) + noise * (w - target).double()
    wanted = Wanted((a @ target.double().T).float() * tokens**-0.5, x_a[:3] @ target.T)
    for posed in (problem, inputs.problem(target, wanted)):
        assert float((posed.gradient(w) - expected).norm()) < 1e-5 * float(expected.norm())
    H.diagonal().add_(noise)
    assert float((problem.H - H).norm()) < 1e-5 * float(H.norm())
    monkeypatch.setattr(layer_module, "WIDE", WIDTH + 1)
    assert not inputs.few


@pytest.mark.parametrize("out", [24, WIDTH])
def test_the_moments_with_the_wanted_outputs_are_the_same_by_way_of_the_smaller_matrix(out):
    """24 rows by the outputs, which may be known; as many as inputs by what the inputs of both models have in common."""
    packed, delta, inputs = a_layer("q4_1", out)
    target = dequantize(packed, torch.float32) + delta
    X_a, X_m, t = (each.double() for each in (inputs.X_a, inputs.X_m, target))
    known = Wanted((X_a @ t.T).float(), inputs.held_a @ target.T)
    noise = DAMPING * float(X_m.square().sum()) / WIDTH
    expected = t @ X_a.T @ X_m + noise * t
    for wanted in (None, known):
        P = inputs.problem(target, wanted).P
        assert float((P - expected).norm()) < 1e-6 * float(expected.norm())
    assert ("C" in vars(inputs)) == (out == WIDTH)
    merged, _ = merge_layer("x", packed, delta, inputs, "scales", lambda rows: known)
    alone, _ = merge_layer("x", packed, delta, inputs, "scales")
    one, other = (dequantize(each, torch.float32) for each in (merged, alone))
    assert float((one - other).norm()) < 0.02 * float((one - target + delta).norm())


@pytest.mark.parametrize(
    ("format_", "method"), [("q4_1", "auto"), ("q4_k", "auto"), ("q8_0", "codes"), ("f16", "auto")]
)
def test_a_large_layer_is_solved_in_panels_of_rows(monkeypatch, format_, method):
    """As layers of their own; the report is of all of them."""
    packed, delta, inputs = a_layer(format_, out=20)
    whole, told = merge_layer("x", packed, delta, inputs, method)
    parts = [slice(0, 8), slice(8, 16), slice(16, 20)]
    alone = [
        merge_layer("x", take_rows(packed, torch.arange(20)[rows]), delta[rows], inputs, method)[0] for rows in parts
    ]
    monkeypatch.setattr(layer_module, "PANEL_BYTES", 8 * 4 * WIDTH)
    asked: list[slice] = []

    def some_of_it(rows: slice) -> Tensor:
        asked.append(rows)
        return delta[rows]

    merged, report = merge_layer("x", packed, some_of_it, inputs, method)
    assert asked == parts and merged.shape == packed.shape
    assert torch.equal(merged.parts[0], torch.cat([each.parts[0] for each in alone]))
    assert torch.equal(merge_layer("x", packed, delta, inputs, method)[0].parts[0], merged.parts[0])
    assert report.error == pytest.approx(held_error(dequantize(merged, torch.float32), packed, delta, inputs), rel=1e-3)
    assert (report.path, report.format) == ("x", format_)
    assert report.delta_in_steps == pytest.approx(told.delta_in_steps, rel=1e-4)
    if format_ != "f16":
        changed = float((unpack(packed).codes != unpack(merged).codes).double().mean())
        assert report.codes_changed == pytest.approx(changed, abs=1e-6)
    assert report.error < 1.05 * told.error and whole.shape == merged.shape


@pytest.mark.spread(3)
@pytest.mark.parametrize("format_", GRIDS)
def test_a_step_that_does_worse_on_tokens_it_has_not_seen_is_not_taken(format_):
    """Held-out tokens on which the base is exactly right already: only the base's own bytes are as good."""
    packed, delta, inputs = a_layer(format_)
    off = torch.linalg.qr(delta.T).Q[:, :4]  # the delta lives there; take it out of the held-out tokens
    held = inputs.held_a - inputs.held_a @ off @ off.T
    for method in CHAINS:
        merged, report = merge_layer("x", packed, delta, Inputs(inputs.X_a, inputs.X_m, held, held), method)
        assert torch.equal(merged.parts[0], packed.parts[0]) and report.steps == () and report.codes_changed == 0
        assert report.error == pytest.approx(1.0)


@pytest.mark.parametrize(("format_", "larger"), [("q4_1", 1), ("q8_0", 40)])
def test_some_rows_tell_whether_requantizing_may_help(monkeypatch, format_, larger):
    packed, delta, inputs = a_layer(format_, out=200)
    rows, requantize = [], layer_module._requantize
    monkeypatch.setattr(layer_module, "_requantize", lambda *args: rows.append(len(args[1])) or requantize(*args))
    merged, report = merge_layer("x", packed, larger * delta, inputs, "auto")
    assert rows == ([67] if format_ == "q4_1" else [67, 200])
    assert ("nearest" in report.steps) == (format_ == "q8_0")
    monkeypatch.setattr(layer_module, "TRIED_ROWS", 200)  # all or nothing
    assert torch.equal(merge_layer("x", packed, larger * delta, inputs, "auto")[0].parts[0], merged.parts[0])
    assert rows[-1] == 200


@pytest.mark.parametrize("format_", sorted(TYPES))
def test_nearest_requantizes_as_the_gguf_package_does(format_):
    packed, delta, _ = a_layer(format_)
    delta = 20 * delta  # so that rounding changes something
    merged, report = merge_nearest("x", packed, delta, "nearest")
    weight = gguf.quants.dequantize(packed.parts[0].numpy(), TYPES[format_]) + delta.numpy()
    expected = gguf.quants.quantize(weight.astype(np.float32), TYPES[format_])
    assert np.array_equal(merged.parts[0].numpy(), expected.reshape(merged.parts[0].shape))
    assert report.steps == ("nearest",) and report.error is None and report.codes_changed > 0.1


@pytest.mark.parametrize("format_", GRIDS)
def test_grid_keeps_the_scales_of_the_base(format_):
    packed, delta, _ = a_layer(format_)
    merged, report = merge_nearest("x", packed, 20 * delta, "grid")
    before, after = unpack(packed), unpack(merged)
    assert report.steps == ("nearest_codes",)
    for name in ("d", "m", "sub_scales", "sub_minimums"):
        old, new = getattr(before, name), getattr(after, name)
        assert (old is None and new is None) or torch.equal(old, new)
    assert not torch.equal(before.codes, after.codes)
    error = (after.weight() - before.weight() - 20 * delta).abs()
    levels = torch.arange(before.low, before.high + 1.0) if before.levels is None else before.levels.sort().values
    inside = (after.values() > levels[0]) & (after.values() < levels[-1])
    gap = float(levels.diff().max())
    steps = before.steps().abs().repeat_interleave(WIDTH // before.steps().shape[1], 1)
    assert (error <= 0.5001 * gap * steps)[inside].all()


@pytest.mark.parametrize("format_", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("method", [*METHODS])
def test_float_formats_take_the_delta_as_it_is(format_, method):
    packed, delta, inputs = a_layer(format_)
    if method in CHAINS:
        merged, report = merge_layer("x", packed, delta, inputs, method)
        error = held_error(dequantize(merged, torch.float32), packed, delta, inputs)
        assert report.error == pytest.approx(error, rel=1e-3)
    else:
        merged, report = merge_nearest("x", packed, delta, method)
        assert report.error is None
    dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[format_]
    expected = (dequantize(packed, torch.float32) + delta).to(dtype)
    assert torch.equal(dequantize(merged, dtype), expected)
    assert report.steps == ("nearest",) and report.codes_changed == report.delta_in_steps == 0.0


def test_a_delta_of_zeros_changes_nothing():
    packed, delta, inputs = a_layer("q4_1")
    a = inputs.held_a
    merged, report = merge_layer("x", packed, 0 * delta, seen(a.clone(), a.clone(), a, a), "auto")
    assert torch.equal(merged.parts[0], packed.parts[0])
    assert report.delta_in_steps == report.codes_changed == 0.0


@pytest.mark.parametrize(("name", "hint"), [("autoo", "auto"), ("scale", "scales"), ("GPTQ", None), ("", None)])
def test_an_unknown_method_is_refused_with_the_closest(name, hint):
    with pytest.raises(OptionError, match="expected one of auto, scales, codes, feedback, nearest, grid") as caught:
        check_method(name)
    assert caught.value.hint == (f"did you mean {hint}?" if hint else None)
    for method in METHODS:
        check_method(method)


def test_repeated_steps_are_named_once():
    cases: dict[tuple[str, ...], tuple[str, ...]] = {(): (), ("a",): ("a",), ("a", "a", "b", "a"): ("a", "b", "a")}
    for steps, expected in cases.items():
        got: Any = collapse(steps)
        assert got == expected
