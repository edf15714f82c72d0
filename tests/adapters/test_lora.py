"""LoRA in one layer: values and gradients against plain torch and PEFT, what is saved, dropout, dtypes."""

import math
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import qgraft.adapters.lora_function as lora_module
from qgraft.adapters.lora import Lora, LoraConfig, LoraLinear
from qgraft.adapters.lora_function import LayerSegment, LoraFunction
from qgraft.errors import AdapterError, OptionError
from qgraft.formats import quantize
from qgraft.kernels import lora as lora_kernels
from qgraft.kernels.choice import Choice
from qgraft.kernels.summed_lora import casts_kept, kept_casts
from qgraft.linear import QuantizedLinear

IN, OUT = 32, 6
BASES = ["linear", "linear_no_bias", "q4_1", "chatglm-int4", "chatglm-int8"]


def make_base(kind: str, dtype: torch.dtype = torch.float32) -> nn.Linear | QuantizedLinear:
    """An nn.Linear, or a QuantizedLinear of the format `kind` with a bias."""
    torch.manual_seed(1)
    if kind.startswith("linear"):
        return nn.Linear(IN, OUT, bias=kind == "linear", dtype=dtype)
    return QuantizedLinear(quantize(torch.randn(OUT, IN), kind), torch.randn(OUT, dtype=dtype))


def make_layer(kind: str = "q4_1", names: tuple[str, ...] = ("default",), **options: float | bool) -> LoraLinear:
    """A LoraLinear whose adapters are all active with weight 1 and have a B that is not zero."""
    layer = LoraLinear(make_base(kind))
    for number, name in enumerate(names):
        layer.add(name, layer.make(LoraConfig(**{"r": 3 + number, "lora_alpha": 7, **options})))
        nn.init.normal_(layer.loras[name].lora_B)
    layer.active = dict.fromkeys(names, 1.0)
    return layer


def weight_and_bias(base: nn.Linear | QuantizedLinear, dtype: torch.dtype) -> tuple[Tensor, Tensor | float]:
    weight = base.weight.detach().to(dtype) if isinstance(base, nn.Linear) else base.dequantize(dtype)
    return weight, 0.0 if base.bias is None else base.bias.detach().to(dtype)


def gradients(layer: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """(output, dx, gradients of the trained parameters in their order)."""
    x = x.detach().clone().requires_grad_()
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    y = layer(x)
    return (y, *torch.autograd.grad(y, [x, *trained], grad))


def saved_by(forward: Callable[[], object]) -> list[Tensor]:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        forward()
    return saved


# ---------------------------------------------------------------- values and gradients


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("leading", [(1,), (5,), (64,), (2, 7), (), (0,)], ids=str)
def test_output_and_gradients_are_those_of_the_formula_in_float64(kind: str, leading: tuple[int, ...]) -> None:
    layer = make_layer(kind)
    lora, x, grad = layer.loras["default"], torch.randn(*leading, IN), torch.randn(*leading, OUT)
    got = gradients(layer, x, grad)

    weight, bias = weight_and_bias(layer.base, torch.float64)
    x64 = x.double().requires_grad_()
    A, B = (tensor.detach().double().requires_grad_() for tensor in (lora.lora_A, lora.lora_B))
    y64 = x64 @ weight.T + bias + 7 / 3 * (x64 @ A.T) @ B.T
    expected = (y64, *torch.autograd.grad(y64, [x64, A, B], grad.double()))
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.spread(3)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", BASES)
def test_gradcheck_of_the_function(kind: str, dropout: float) -> None:
    """With a fixed seed the mask is a constant, so dropout can be differentiated numerically too."""
    base = make_base(kind, torch.float64).requires_grad_(False)
    shapes = ((2, 3, IN), (2, IN), (OUT, 2))
    x, A, B = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    segments = [LayerSegment(0, 6, 1.7, dropout, 5)]
    assert torch.autograd.gradcheck(lambda x, A, B: LoraFunction.apply(x, base, segments, None, A, B), (x, A, B))


@pytest.mark.parametrize("kind", ["linear", "q4_1"])
def test_gradcheck_of_segments(kind: str) -> None:
    """Two adapters of other ranks on tokens of their own, one token without any."""
    base = make_base(kind, torch.float64).requires_grad_(False)
    shapes = ((6, IN), (2, IN), (OUT, 2), (3, IN), (OUT, 3))
    x, *weights = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    segments = [LayerSegment(0, 2, 1.7, 0.0, 0), LayerSegment(3, 6, 0.5, 0.4, 5)]
    assert torch.autograd.gradcheck(lambda x, *w: LoraFunction.apply(x, base, segments, None, *w), (x, *weights))


@pytest.mark.parametrize("kind", ["linear", "q4_1"])
def test_second_derivatives_are_refused(kind: str) -> None:
    """Gradient penalties differentiate the backward pass: it must not be wrong in silence."""
    layer, x = make_layer(kind), torch.randn(2, IN, requires_grad=True)
    (grad_x,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad_x.square().sum().backward()


@pytest.mark.parametrize("kind", ["linear", "q4_1"])
def test_inputs_need_not_be_contiguous(kind: str) -> None:
    layer = make_layer(kind)
    for x in (torch.randn(IN, 5).T, torch.randn(4, 3, IN).transpose(0, 1), torch.randn(1, IN).expand(5, IN)):
        grad = torch.randn(OUT, *x.shape[:-1]).movedim(0, -1)
        assert not x.is_contiguous()
        assert not grad.is_contiguous()
        for strided, packed in zip(gradients(layer, x, grad), gradients(layer, x.clone(), grad.clone()), strict=True):
            torch.testing.assert_close(strided, packed)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize(("r", "alpha"), [(1, 1), (4, 8), (5, 3.5)])
def test_same_numbers_as_peft(r: int, alpha: float, use_rslora: bool) -> None:
    linear = make_base("linear")
    options = peft.LoraConfig(r=r, lora_alpha=alpha, use_rslora=use_rslora, target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(IN, OUT)), options)
    peft_layer = theirs.base_model.model[0]
    peft_layer.base_layer.load_state_dict(linear.state_dict())
    ours = LoraLinear(linear)
    ours.add("default", ours.make(LoraConfig(r=r, lora_alpha=alpha, use_rslora=use_rslora)))
    ours.active = {"default": 1.0}
    with torch.no_grad():
        nn.init.normal_(peft_layer.lora_B["default"].weight)
        ours.loras["default"].lora_A.copy_(peft_layer.lora_A["default"].weight)
        ours.loras["default"].lora_B.copy_(peft_layer.lora_B["default"].weight)

    x, grad = torch.randn(2, 7, IN), torch.randn(2, 7, OUT)
    for got, expected in zip(gradients(ours, x, grad), gradients(theirs, x, grad), strict=True):
        torch.testing.assert_close(got, expected)
    torch.testing.assert_close(ours.loras["default"].delta(), peft_layer.get_delta_weight("default"))


def test_initial_a_is_pefts_for_the_same_random_state() -> None:
    torch.manual_seed(3)
    theirs = nn.Linear(IN, 4, bias=False).weight  # PEFT: nn.Linear, then kaiming_uniform_ again
    nn.init.kaiming_uniform_(theirs, a=math.sqrt(5))
    torch.manual_seed(3)
    nn.Linear(IN, 4, bias=False)
    ours = Lora(IN, OUT, LoraConfig(r=4), torch.device("cpu"))
    assert torch.equal(ours.lora_A, theirs)


def test_initial_distribution_of_a_and_zeros_in_b() -> None:
    """kaiming_uniform(a=sqrt(5)) is uniform in +-1/sqrt(in): within its bounds, up to them, variance of a uniform."""
    torch.manual_seed(0)
    lora = Lora(400, OUT, LoraConfig(r=64), torch.device("cpu"))
    bound, A = 1 / math.sqrt(400), lora.lora_A.detach()
    assert 0.999 * bound < float(A.abs().max()) <= bound
    assert float(A.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not bool(lora.lora_B.any())
    assert lora.lora_A.dtype == lora.lora_B.dtype == torch.float32


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("kind", BASES)
def test_a_new_adapter_changes_nothing_bit_for_bit(kind: str, dropout: float) -> None:
    layer, x = LoraLinear(make_base(kind)), torch.randn(2, 9, IN)
    layer.add("default", layer.make(LoraConfig(r=4, lora_dropout=dropout)))
    layer.active = {"default": 1.0}
    assert torch.equal(layer(x), layer.base(x))


def test_without_an_active_adapter_the_base_answers() -> None:
    layer, x = make_layer(), torch.randn(2, IN)
    assert not torch.allclose(layer(x), layer.base(x))
    layer.active = {}
    assert torch.equal(layer(x), layer.base(x))


@pytest.mark.parametrize("weights", [{"a": 1.0, "b": 1.0}, {"a": 0.7, "b": -0.3}, {"a": 0.0, "b": 2.0, "c": 0.25}])
def test_several_active_adapters_are_the_weighted_sum(weights: dict[str, float]) -> None:
    """Outputs and every gradient, against one call for each adapter."""
    layer = make_layer("q4_1", ("a", "b", "c"))
    layer.active = weights
    x = torch.randn(5, IN, requires_grad=True)
    parameters = [p for name in weights for p in layer.loras[name].parameters()]
    y, grad = layer(x), torch.randn(5, OUT)
    got = torch.autograd.grad(y, [x, *parameters], grad)

    expected = layer.base(x)
    for name, weight in weights.items():
        lora = layer.loras[name]
        expected = expected + weight * lora.config.scaling * x @ lora.lora_A.T @ lora.lora_B.T
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(got, torch.autograd.grad(expected, [x, *parameters], grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_weight_of_a_single_adapter_scales_its_delta() -> None:
    layer, x = make_layer(), torch.randn(5, IN)
    full = layer(x) - layer.base(x)
    layer.active = {"default": 0.5}
    torch.testing.assert_close(layer(x) - layer.base(x), 0.5 * full, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- memory and work


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", BASES)
def test_saves_x_a_and_b_once_and_one_narrow_product(kind: str, dropout: float) -> None:
    layer = make_layer(kind, lora_dropout=dropout)
    lora, x = layer.loras["default"], torch.randn(50, IN, requires_grad=True)
    saved = saved_by(lambda: layer(x))
    expected = {x.data_ptr(), lora.lora_A.data_ptr(), lora.lora_B.data_ptr()}
    others = [tensor for tensor in saved if tensor.data_ptr() not in expected]
    assert len(saved) == 4
    assert [list(tensor.shape) for tensor in others] == [[50, lora.config.r]]


def test_layers_that_share_an_input_share_what_they_save() -> None:
    x = torch.randn(50, IN, requires_grad=True)
    layers = [make_layer("q4_1") for _ in "qkv"]
    large = [tensor for tensor in saved_by(lambda: [layer(x) for layer in layers]) if tensor.shape == (50, IN)]
    assert len(large) == 3
    assert {tensor.data_ptr() for tensor in large} == {x.data_ptr()}


@pytest.mark.parametrize("needs_x", [False, True])
@pytest.mark.parametrize("kind", ["linear", "q4_1"])
def test_input_gradient_is_computed_only_where_it_is_needed(
    kind: str, needs_x: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bool] = []
    real = lora_module.lora_backward

    def counted(grad: Tensor, base: Any, *others: Any) -> Any:
        calls.append(base is not None)
        return real(grad, base, *others)

    monkeypatch.setattr(lora_module, "lora_backward", counted)
    layer, x = make_layer(kind), torch.randn(4, IN, requires_grad=needs_x)
    layer(x).sum().backward()
    assert calls == [needs_x]
    assert (x.grad is not None) == needs_x
    assert layer.loras["default"].lora_A.grad is not None


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
def test_a_frozen_part_gets_no_gradient_and_the_other_the_same_one(frozen: str) -> None:
    layer, x = make_layer(), torch.randn(4, IN)
    lora = layer.loras["default"]
    other = "lora_B" if frozen == "lora_A" else "lora_A"
    layer(x).sum().backward()
    expected = getattr(lora, other).grad
    lora.zero_grad()
    getattr(lora, frozen).requires_grad_(False)
    layer(x).sum().backward()
    assert getattr(lora, frozen).grad is None
    assert torch.equal(getattr(lora, other).grad, expected)


@pytest.mark.parametrize("kind", BASES)
def test_base_gets_no_gradient(kind: str) -> None:
    layer = make_layer(kind)
    layer(torch.randn(4, IN, requires_grad=True)).sum().backward()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in layer.base.parameters())
    assert [name for name, p in layer.named_parameters() if p.grad is not None] == [
        "loras.default.lora_A",
        "loras.default.lora_B",
    ]


# ---------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_input_with_float32_adapters(dtype: torch.dtype) -> None:
    """The output has the dtype of x, gradients that of what they belong to."""
    layer = make_layer("q4_1")
    x, grad = torch.randn(4, IN).to(dtype), torch.randn(4, OUT).to(dtype)
    got, expected = gradients(layer, x, grad), gradients(layer, x.float(), grad.float())
    assert [tensor.dtype for tensor in got] == [dtype, dtype, torch.float32, torch.float32]
    for ours, theirs in zip(got, expected, strict=True):
        error = ((ours.float() - theirs).norm() / theirs.norm()).detach()
        assert float(error) < 0.02


@pytest.mark.parametrize("kind", ["linear", "q4_1"])
def test_autocast_computes_in_bfloat16_and_trains_float32(kind: str) -> None:
    layer, x = make_layer(kind), torch.randn(4, IN, requires_grad=True)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=5e-2, atol=0.3)
    y.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert {p.grad.dtype for p in layer.loras.parameters()} == {torch.float32}


# ---------------------------------------------------------------- dropout and checkpointing


def test_dropout_is_off_in_eval_mode() -> None:
    layer, plain = make_layer(lora_dropout=0.5), make_layer()
    plain.loras.load_state_dict(layer.loras.state_dict())
    x = torch.randn(20, IN)
    assert torch.equal(layer.eval()(x), plain(x))
    assert not torch.allclose(layer.train()(x), plain(x))


def test_dropout_draws_a_new_mask_each_call_and_the_same_for_the_same_seed() -> None:
    layer, x, grad = make_layer(lora_dropout=0.5), torch.randn(20, IN), torch.randn(20, OUT)
    torch.manual_seed(0)
    first, second = gradients(layer, x, grad), gradients(layer, x, grad)
    torch.manual_seed(0)
    again = gradients(layer, x, grad)
    assert not torch.allclose(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_dropout_zeroes_inputs_of_a_only_and_keeps_their_mean() -> None:
    """With A and B as identity, y - base(x) is the masked x itself: 0 or x / (1 - p)."""
    base = nn.Linear(IN, IN)
    layer = LoraLinear(base)
    layer.add("default", layer.make(LoraConfig(r=IN, lora_alpha=IN, lora_dropout=0.25)))
    layer.active = {"default": 1.0}
    with torch.no_grad():
        layer.loras["default"].lora_A.copy_(torch.eye(IN))
        layer.loras["default"].lora_B.copy_(torch.eye(IN))
    x = torch.ones(1000, IN)
    masked = (layer(x) - base(x)).detach()
    kept = masked > 0.5
    torch.testing.assert_close(masked, kept / 0.75, rtol=1e-4, atol=1e-5)
    assert float(kept.float().mean()) == pytest.approx(0.75, abs=0.01)


def test_no_random_number_is_drawn_without_dropout() -> None:
    """A run without dropout must not depend on how many LoRA layers it went through."""
    layer, x = make_layer(), torch.randn(4, IN)
    state = torch.get_rng_state()
    layer(x)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant: bool, dropout: float) -> None:
    first, second = make_layer(lora_dropout=dropout), LoraLinear(nn.Linear(OUT, OUT))
    second.add("default", second.make(LoraConfig(r=2, lora_dropout=dropout)))
    nn.init.normal_(second.loras["default"].lora_B)
    second.active = {"default": 1.0}
    model = nn.Sequential(first, nn.GELU(), second)
    x, results = torch.randn(20, IN), []
    for checkpointed in (False, True):
        torch.manual_seed(4)
        model.zero_grad()
        x_run = x.clone().requires_grad_()
        y = checkpoint(model, x_run, use_reentrant=use_reentrant) if checkpointed else model(x_run)
        y.square().sum().backward()
        results.append([y, x_run.grad, *[p.grad for p in model.parameters() if p.requires_grad]])
    assert len(results[0]) == 6
    assert all(torch.equal(plain, again) for plain, again in zip(*results, strict=True))


# ---------------------------------------------------------------- the layer as a LinearLike, options


@pytest.mark.parametrize("kind", ["linear", "q4_1"])
def test_dequantize_gives_the_weight_without_adapters(kind: str) -> None:
    layer = make_layer(kind)
    weight, _ = weight_and_bias(layer.base, torch.float64)
    assert torch.equal(layer.dequantize(torch.float64), weight)
    assert (layer.in_features, layer.out_features) == (IN, OUT)


def test_replace_reaches_the_packed_base() -> None:
    layer, other = make_layer("q4_1"), quantize(torch.zeros(OUT, IN), "q4_1")
    layer.replace(other)
    assert layer.base.packed.parts[0] is other.parts[0]
    with pytest.raises(AdapterError, match="Linear holds no packed weight to replace"):
        make_layer("linear").replace(other)


@pytest.mark.parametrize("kind", ["linear", "q4_1"])
def test_base_plus_delta_is_the_layer(kind: str) -> None:
    layer, x = make_layer(kind), torch.randn(4, IN)
    _, bias = weight_and_bias(layer.base, torch.float32)
    merged = layer.dequantize() + layer.loras["default"].delta()
    torch.testing.assert_close(layer(x), x @ merged.T + bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"r": 0}, "r=0"), ({"r": -3}, "r=-3"), ({"lora_dropout": 1.0}, "lora_dropout=1.0"),
     ({"lora_dropout": -0.1}, "lora_dropout=-0.1"), ({"lora_dropout": math.nan}, "lora_dropout=nan")],
)  # fmt: skip
def test_impossible_options_are_refused_by_name_and_value(options: dict[str, float], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        LoraConfig(**options)


def test_scaling() -> None:
    assert LoraConfig(r=16, lora_alpha=8).scaling == 0.5
    assert LoraConfig(r=16, lora_alpha=8, use_rslora=True).scaling == 2.0


# ---------------------------------------------------------------- half precision, as on a GPU


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("names", [("default",), ("default", "other")], ids=["one", "two"])
def test_half_precision_is_one_sum_with_gradients_in_float32(
    names: tuple[str, ...], dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU that is taken for a GPU: values near those of float32, the same bits with casts that a step keeps."""
    real, on_gpu = lora_kernels._choice, lambda format: Choice("lora", format, "cuda", "torch", "as on a GPU")

    def choice(format: str | None, x: torch.Tensor, bf16: bool = False) -> Choice:
        return on_gpu(format) if format and x.dtype == torch.bfloat16 else real(format, x, bf16)

    monkeypatch.setattr(lora_kernels, "_choice", choice)
    layer, x, grad = make_layer(names=names, lora_dropout=dropout), torch.randn(2, 50, IN), torch.randn(2, 50, OUT)
    with torch.random.fork_rng():
        expected = gradients(layer, x, grad)
    with torch.random.fork_rng():
        got = gradients(layer, x.bfloat16(), grad.bfloat16())
    with casts_kept(), torch.random.fork_rng():
        kept = gradients(layer, x.bfloat16(), grad.bfloat16())
        assert len(kept_casts() or {}) == 2 * len(names)
    for exact, mine, again in zip(expected, got, kept, strict=True):
        assert torch.equal(mine, again)
        assert (
            dropout or float((mine.float() - exact).detach().norm() / exact.detach().norm()) < 2e-2
        )  # masks are drawn in the dtype
    assert all(g.dtype == torch.float32 for g in got[2:]) and got[0].dtype == got[1].dtype == torch.bfloat16
