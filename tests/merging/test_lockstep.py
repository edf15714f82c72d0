"""The two streams against ordinary forward passes, one sample at a time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qgraft.adapters.attach import attach_lora, detach_lora
from qgraft.adapters.choose import adapters_off
from qgraft.adapters.targets import lora_layers
from qgraft.data.tokenizing import Sample
from qgraft.errors import UnsupportedError
from qgraft.formats import PackedTensor, dequantize, quantize
from qgraft.linear import QuantizedLinear
from qgraft.merging import lockstep, outputs
from qgraft.merging.layer import Inputs, LayerReport, Wanted
from qgraft.merging.lockstep import merge_in_step
from qgraft.merging.merge import merge

LENGTHS, HELD_LENGTHS = (17, 40, 9, 33), (21, 12)
Solve = Callable[..., tuple[PackedTensor, LayerReport]]
KnownOutputs = Callable[[slice], Wanted]


def random_samples(vocabulary: int, lengths: tuple[int, ...], seed: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(4, vocabulary, (length,), generator=generator).tolist() for length in lengths]
    return [Sample(row, [-100, *row[1:]], f"row {n}") for n, row in enumerate(rows)]


def work_of(model: nn.Module) -> tuple[dict[str, PackedTensor], dict[str, Callable[[], Tensor]]]:
    """What the layers are merged from, and their deltas."""
    layers = dict(lora_layers(model))
    return {path: layer.packed for path, layer in layers.items()}, {
        path: partial(delta_of, layer) for path, layer in layers.items()
    }


def delta_of(layer: Any) -> Tensor:
    with torch.no_grad():
        return sum(layer.loras[name].delta() for name in layer.active)


def inputs_of(model: nn.Module, samples: list[Sample]) -> dict[str, Tensor]:
    """What each wrapped layer is given in ordinary passes, one a sample: float64 [tokens, in]."""
    seen: dict[str, list[Tensor]] = {}

    def hook(path: str, module: nn.Module, args: tuple[Tensor]) -> None:
        seen.setdefault(path, []).append(args[0][0].double())

    handles = [layer.register_forward_pre_hook(partial(hook, path)) for path, layer in lora_layers(model)]
    with torch.no_grad():
        for sample in samples:
            model(torch.tensor([sample.input_ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return {path: torch.cat(parts) for path, parts in seen.items()}


def recorded(monkeypatch: pytest.MonkeyPatch, solve: Solve) -> dict[str, Inputs]:
    """The inputs that each layer's solver is given from now on."""
    inputs: dict[str, Inputs] = {}

    def record(path: str, packed: PackedTensor, delta: Tensor, given: Inputs, method: str, wanted: KnownOutputs) -> Any:
        inputs[path] = given
        rows = slice(3, len(delta) - 2)  # as of a panel
        known, target = wanted(rows), (dequantize(packed, torch.float32) + delta)[rows]
        torch.testing.assert_close(known.fit, given.X_a @ target.T, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(known.held, given.held_a @ target.T, rtol=1e-3, atol=1e-4)
        return solve(path, packed, delta, given, method, wanted)

    monkeypatch.setattr(lockstep, "merge_layer", record)
    return inputs


def not_merging(
    path: str, packed: PackedTensor, delta: Tensor, given: Inputs, method: str, wanted: KnownOutputs
) -> Any:
    return packed, LayerReport(path, packed.format, 0.0, 0.0, None, ())


def pad(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the pass take the way of architectures that do not keep samples of one row apart."""

    @contextmanager
    def padding_free(*args: Any) -> Iterator[str]:
        yield "not kept apart"

    monkeypatch.setattr(outputs, "padding_free", padding_free)


def check_inputs(got: dict[str, Inputs], a: dict[str, Tensor], m: dict[str, Tensor], calibrating: int) -> None:
    for path, inputs in got.items():
        x_a, x_m = a[path][:calibrating], m[path][:calibrating]
        for name, tensor, expected in (
            ("H", inputs.H, x_m.T @ x_m / calibrating),
            ("C", inputs.C, x_a.T @ x_m / calibrating),
            ("held_a", inputs.held_a, a[path][calibrating:]),
            ("held_m", inputs.held_m, m[path][calibrating:]),
        ):
            assert tensor.shape == expected.shape
            assert float((tensor - expected).norm() / expected.norm()) < 2e-5, (path, name)


@pytest.mark.spread(2)
@pytest.mark.parametrize("way", ["one row", "padded"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3"])
def test_the_streams_are_the_adapters_model_and_the_base_while_nothing_merges(trained, monkeypatch, architecture, way):
    model, _ = trained(architecture).load()
    samples, held = (random_samples(model.config.vocab_size, *each) for each in ((LENGTHS, 0), (HELD_LENGTHS, 1)))
    a = inputs_of(model, [*samples, *held])
    with adapters_off(model):
        m = inputs_of(model, [*samples, *held])
    got = recorded(monkeypatch, not_merging)
    if way == "padded":
        pad(monkeypatch)
    packed, reports = merge_in_step(model, *work_of(model), samples, held, "auto", lambda _: None)
    assert set(got) == set(packed) == set(a) and [report.path for report in reports] == list(got)
    check_inputs(got, a, m, sum(LENGTHS))
    path = list(got)[-1]
    assert (a[path] - m[path]).norm() > 0.02 * m[path].norm()  # the streams do differ


@pytest.mark.parametrize("way", ["one row", "padded"])
def test_stream_m_is_what_the_merged_model_computes(trained, monkeypatch, way):
    """Every layer is solved on the inputs that the finished merged model has there."""
    model, _ = trained().load()
    if way == "padded":
        pad(monkeypatch)
    samples, held = (random_samples(model.config.vocab_size, *each) for each in ((LENGTHS, 0), (HELD_LENGTHS, 1)))
    a = inputs_of(model, [*samples, *held])
    got = recorded(monkeypatch, lockstep.merge_layer)
    progress: list[str] = []
    packed, _ = merge_in_step(
        model, *work_of(model), samples, held, "auto", lambda report: progress.append(report.path)
    )
    assert progress == list(packed) == list(got)
    for path, layer in lora_layers(model):
        layer.replace(packed[path])
    with adapters_off(model):
        m = inputs_of(model, [*samples, *held])
    check_inputs(got, a, m, sum(LENGTHS))


def test_layers_without_the_adapter_compute_as_they_are(trained, monkeypatch):
    """A merge of some layers only; the biases of Qwen 2 are in both streams."""
    model, _ = trained("qwen2").load()
    detach_lora(model)
    attach_lora(model, r=2, target_modules="v_proj,up_proj")
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.loras["default"].lora_B, std=0.1)
    samples, held = (random_samples(model.config.vocab_size, *each) for each in ((LENGTHS, 0), (HELD_LENGTHS, 1)))
    a = inputs_of(model, [*samples, *held])
    got = recorded(monkeypatch, lockstep.merge_layer)
    packed, _ = merge_in_step(model, *work_of(model), samples, held, "codes", lambda _: None)
    assert {path.rpartition(".")[2] for path in packed} == {"v_proj", "up_proj"}
    for path, layer in lora_layers(model):
        layer.replace(packed[path])
    with adapters_off(model):
        m = inputs_of(model, [*samples, *held])
    check_inputs(got, a, m, sum(LENGTHS))


@pytest.mark.parametrize("merges", [False, True])
def test_samples_that_begin_alike_count_as_often_as_they_are(trained, monkeypatch, merges):
    """Their beginnings pass once for each stream; the moments are those of all tokens, the judging ones' as well."""
    model, _ = trained().load()
    prompt = random_samples(model.config.vocab_size, (14,), 5)[0].input_ids
    plain, plain_held = (random_samples(model.config.vocab_size, *each) for each in ((LENGTHS, 0), (HELD_LENGTHS, 1)))
    samples, held = (
        [
            Sample([*prompt, *s.input_ids], [-100] * 14 + s.input_ids, s.source) if n % 3 else s
            for n, s in enumerate(each)
        ]
        for each in (plain * 2, plain_held * 2)
    )
    a = inputs_of(model, [*samples, *held])
    got = recorded(monkeypatch, lockstep.merge_layer if merges else not_merging)
    rows: list[int] = []
    row_of = lockstep.row_of
    monkeypatch.setattr(lockstep, "row_of", lambda *args: rows.append(len((row := row_of(*args)).ids)) or row)
    packed, _ = merge_in_step(model, *work_of(model), samples, held, "scales", lambda _: None)
    assert rows == [len({(*s.input_ids[: n + 1],) for s in [*samples, *held] for n in range(s.length)})]
    for path, layer in lora_layers(model):
        layer.replace(packed[path])
    with adapters_off(model):
        m = inputs_of(model, [*samples, *held])
    calibrating = sum(sample.length for sample in samples)
    for path, inputs in got.items():
        judging = len(a[path]) - calibrating
        for name, tensor, of, tokens in (
            ("H", inputs.H, m[path][:calibrating], calibrating),
            ("held_m", inputs.held_m.T @ inputs.held_m / len(inputs.held_m), m[path][calibrating:], judging),
            ("held_a", inputs.held_a.T @ inputs.held_a / len(inputs.held_a), a[path][calibrating:], judging),
        ):
            expected = of.T @ of / tokens
            assert float((tensor - expected).norm() / expected.norm()) < 2e-5, (path, name)
        crossed = a[path][:calibrating].T @ m[path][:calibrating] / calibrating
        assert float((inputs.C - crossed).norm() / crossed.norm()) < 2e-5, path


def test_the_padded_way_solves_the_same_problems(trained, monkeypatch):
    """Its attention sums in another order, so inputs differ in their last bits.

    Scales move with them by a rounding here and there (12 thousandths of the way at most, over six sets of samples). A
    descent over codes does not: it takes the best step of many that are equally good, so one last bit can lead to other
    codes, and these to other inputs of all later layers. What it reaches is as good: errors within 0.013 of each other
    where not merging is 1. On other levels of CPU other bits are the last ones; hence the room.
    """
    model, _ = trained().load()
    lengths = [(60, 75, 90, 110, 120, 80, 70), (55, 65)]  # enough for layers of 256 inputs
    samples, held = (random_samples(model.config.vocab_size, each, n) for n, each in enumerate(lengths))
    results: dict[str, list[Any]] = {"scales": [], "auto": []}
    for padded in (False, True):
        if padded:
            pad(monkeypatch)
        for method, found in results.items():
            found.append(merge_in_step(model, *work_of(model), samples, held, method, lambda _: None))
    moved = 0
    (free, _), (padded_, _) = results["scales"]
    for path, layer in lora_layers(model):
        base, one, other = (dequantize(each, torch.float32) for each in (layer.packed, free[path], padded_[path]))
        assert (one - other).norm() <= 0.05 * (one - base).norm(), path
        moved += bool((one - base).norm() > 0)
    assert moved >= 10
    for one, other in zip(*(reports for _, reports in results["auto"]), strict=True):
        assert one.path == other.path
        assert abs(one.error - other.error) < 0.05, one.path


@pytest.mark.spread(2)
@pytest.mark.parametrize("method", ["auto", "scales", "codes", "feedback"])
def test_a_layer_that_the_pass_does_not_reach_is_named(trained, rows, method):
    model, tokenizer = trained().load()
    detach_lora(model)
    model.model.spare = QuantizedLinear(quantize(torch.randn(64, 64), "q4_1"))
    attach_lora(model, r=2, target_modules="q_proj,spare")
    before = {path: layer.packed.parts[0].clone() for path, layer in lora_layers(model)}
    with pytest.raises(UnsupportedError, match=r"does not reach model.spare, so their inputs") as caught:
        merge(model, tokenizer, calibration=rows, method=method)
    assert "method nearest" in caught.value.hint
    assert all(torch.equal(layer.packed.parts[0], before[path]) for path, layer in lora_layers(model))
    merge(model, tokenizer, calibration=rows, method="nearest")
    assert not list(lora_layers(model))


def test_a_layer_that_is_given_some_of_the_tokens_is_refused(trained, rows, monkeypatch):
    """A mixture of experts would give each expert its own tokens, of both streams in any order."""
    model, tokenizer = trained().load()
    mlp = model.model.layers[0].mlp

    def routed(x: Tensor, forward: Callable[[Tensor], Tensor] = mlp.forward) -> Tensor:
        chosen = x[..., 0] > 0
        y = torch.zeros_like(x)
        y[chosen] = forward(x[chosen])
        return y

    monkeypatch.setattr(mlp, "forward", routed)
    with pytest.raises(UnsupportedError, match=r"model.layers.0.mlp.gate_proj is given \d+ tokens, expected"):
        merge(model, tokenizer, calibration=rows)
    assert [type(layer).__name__ for _, layer in lora_layers(model)] == ["LoraLinear"] * 14
