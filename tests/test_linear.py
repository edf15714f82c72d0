"""QuantizedLinear and QuantizedEmbedding behave like the torch modules that hold the dequantized weight."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qgraft
from qgraft.adapters.lora import LoraConfig, LoraLinear
from qgraft.formats import FORMATS, PackedTensor, quantize
from qgraft.kernels import choose
from qgraft.kernels.autocast import to_autocast
from qgraft.kernels.cpu import library
from qgraft.linear import (
    LinearLike,
    PackedWeight,
    QuantizedEmbedding,
    QuantizedLinear,
    computing,
    grad_input,
    in_stored_order,
)

WRITABLE = sorted(name for name, each in FORMATS.items() if each.quantize)
CASTS = {
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "double": lambda module: module.to(torch.float64),
    "to_cpu_half": lambda module: module.to("cpu", torch.float16),
}


def make_packed(format: str, rows: int = 6, columns: int = 32, seed: int = 0) -> PackedTensor:
    generator = torch.Generator().manual_seed(seed)
    return quantize(torch.randn(rows, columns, generator=generator), format)


def as_bytes(packed: PackedTensor) -> list[bytes]:
    return [tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in packed.parts]


def torch_twin(layer: QuantizedLinear, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """An nn.Linear with the dequantized weight."""
    twin = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, dtype=dtype)
    with torch.no_grad():
        twin.weight.copy_(layer.dequantize())
        if layer.bias is not None:
            twin.bias.copy_(layer.bias)
    return twin.requires_grad_(False)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("format", WRITABLE)
def test_linear_and_its_gradient_are_those_of_nn_linear(format: str, with_bias: bool) -> None:
    width = max(32, FORMATS[format].block_size)
    layer = QuantizedLinear(make_packed(format, columns=width), torch.randn(6) if with_bias else None)
    twin = torch_twin(layer)
    for leading in ((), (1,), (5,), (0,), (2, 7), (2, 1, 9)):
        x = torch.randn(*leading, width, requires_grad=True)
        x_twin = x.detach().clone().requires_grad_()
        y, y_twin, grad = layer(x), twin(x_twin), torch.randn(*leading, 6)
        y.backward(grad)
        y_twin.backward(grad)
        torch.testing.assert_close(y, y_twin, rtol=1e-5, atol=3e-5)
        torch.testing.assert_close(x.grad, x_twin.grad)


@pytest.mark.parametrize("compute", ["float32", "bf16", "int8"])
@pytest.mark.parametrize("format", ["q4_1", "q4_k", "q6_k", "f16"])
def test_a_linear_whose_columns_are_in_another_order(format: str, compute: str) -> None:
    """Each of them multiplies its own input, whatever computes the product and its gradient."""
    layer, order = QuantizedLinear(make_packed(format, columns=256), torch.randn(6)), torch.randperm(256)
    layer.compute, weight = compute, layer.dequantize()
    layer.input_order = order
    meant = torch.stack([weight[:, order.tolist().index(i)] for i in range(256)], dim=1)
    assert torch.equal(layer.dequantize(), meant)
    assert torch.equal(in_stored_order(layer, meant), weight)
    lora, rounds = LoraLinear(layer), compute != "float32"
    lora.add("a", lora.make(LoraConfig(2, 4)))
    lora.active = {"a": 1.0}
    nn.init.normal_(lora.loras["a"].lora_B)
    for module, added in ((layer, 0.0), (lora, lora.loras["a"].delta().detach())):
        for tokens in (1, 3, 40):
            x, grad = torch.randn(tokens, 256, requires_grad=True), torch.randn(tokens, 6)
            y = module(x)
            y.backward(grad)
            for got, wanted in (
                (y.detach(), x.detach() @ (meant + added).T + layer.bias),
                (x.grad, grad @ (meant + added)),
            ):
                assert float((got - wanted).norm() / wanted.norm()) < (0.02 if rounds else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("format", ["q4_1", "chatglm-int8", "f16"])
def test_linear_computes_in_the_dtype_of_its_input(format: str, dtype: torch.dtype) -> None:
    """The bias follows: it may be stored in another dtype."""
    layer = QuantizedLinear(make_packed(format), torch.randn(6))
    x = torch.randn(4, 32).to(dtype)
    torch.testing.assert_close(layer(x), torch_twin(layer, dtype)(x), rtol=2e-2, atol=2e-2)


def test_linear_has_no_trainable_parameters_and_names_its_format() -> None:
    layer = QuantizedLinear(make_packed("q4_1"), torch.randn(6))
    assert [name for name, parameter in layer.named_parameters() if parameter.requires_grad] == []
    assert (
        repr(layer)
        == "QuantizedLinear(\n  32, 6, q4_1, bias=True; adapters: qgraft.attach_lora\n  (packed_weight): PackedWeight()\n)"
    )
    assert "6, 32, q4_1" in repr(QuantizedEmbedding(make_packed("q4_1"), torch.float32))


@pytest.mark.parametrize("format", WRITABLE)
def test_embedding_is_that_of_nn_embedding(format: str) -> None:
    packed = make_packed(format, rows=11, columns=max(32, FORMATS[format].block_size))
    embedding = QuantizedEmbedding(packed, torch.float32)
    table = QuantizedLinear(packed).dequantize()
    for ids in (torch.tensor(3), torch.tensor([10, 0, 0]), torch.tensor([[1, 2], [9, 9]]), torch.zeros(2, 0).long()):
        assert torch.equal(embedding(ids), nn.functional.embedding(ids, table))


def test_embedding_dtype_and_scale() -> None:
    """Gemma multiplies by sqrt(width), rounded to the dtype of the table first."""
    packed, ids = make_packed("q8_0", rows=11), torch.tensor([[4, 7]])
    plain = QuantizedEmbedding(packed, torch.bfloat16)(ids)
    scaled = QuantizedEmbedding(packed, torch.bfloat16, scale=5.657)(ids)
    assert plain.dtype == scaled.dtype == torch.bfloat16
    assert torch.equal(scaled, plain * torch.tensor(5.657).bfloat16())


@pytest.mark.parametrize("ids", [torch.tensor([11]), torch.tensor([-12])], ids=["too_large", "too_small"])
def test_embedding_refuses_ids_outside_of_the_table(ids: Tensor) -> None:
    with pytest.raises(IndexError):
        QuantizedEmbedding(make_packed("q8_0", rows=11), torch.float32)(ids)


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("format", ["q4_1", "chatglm-int4", "chatglm-int8", "f32", "f16"])
def test_casting_leaves_the_stored_bytes_and_scales_as_they_are(format: str, cast: str) -> None:
    layer = QuantizedLinear(make_packed(format), torch.randn(6))
    packed = layer.packed
    before, dtypes = as_bytes(packed), [part.dtype for part in packed.parts]
    CASTS[cast](layer)
    after = layer.packed
    assert as_bytes(after) == before
    assert [part.dtype for part in after.parts] == dtypes
    assert layer.bias is not None
    assert layer.bias.dtype == {"bfloat16": torch.bfloat16, "double": torch.float64}.get(cast, torch.float16)


def test_casting_works_on_strided_rows_and_scales() -> None:
    """Every second row of a larger table, as a view."""
    whole = make_packed("chatglm-int8")
    view = PackedTensor("chatglm-int8", (3, 32), (whole.parts[0][::2], whole.parts[1][::2]))
    layer = QuantizedLinear(view)
    before = as_bytes(view)
    layer.half()
    assert as_bytes(layer.packed) == before


@pytest.mark.parametrize(
    ("cast", "dtype"), [("half", torch.float16), ("bfloat16", torch.bfloat16), ("double", torch.float64)]
)
def test_embedding_output_follows_a_cast_but_its_table_does_not(cast: str, dtype: torch.dtype) -> None:
    """As with nn.Embedding: what comes out must fit the layers that were cast with it."""
    model = nn.Sequential(QuantizedEmbedding(make_packed("chatglm-int8", rows=11), torch.float32), nn.LayerNorm(32))
    before = as_bytes(model[0].packed_weight.get())
    CASTS[cast](model)
    assert model[0](torch.tensor([1, 2])).dtype == dtype
    assert model(torch.tensor([1, 2])).dtype == dtype
    assert as_bytes(model[0].packed_weight.get()) == before


def test_moving_to_another_device_moves_bytes_and_scales() -> None:
    layer = QuantizedLinear(make_packed("chatglm-int4"), torch.randn(6)).to("meta")
    assert {layer.packed.parts[0].device.type, layer.packed.parts[1].device.type} == {"meta"}
    assert (layer.packed.parts[0].dtype, layer.packed.parts[0].shape) == (torch.int8, (6, 16))
    assert layer(torch.empty(2, 3, 32, device="meta")).shape == (2, 3, 6)


@pytest.mark.parametrize("format", ["q4_1", "chatglm-int4"])
def test_state_dict_round_trip(format: str) -> None:
    source, target = (QuantizedLinear(make_packed(format, seed=seed), torch.randn(6)) for seed in (0, 1))
    state = {key: tensor.clone() for key, tensor in source.state_dict().items()}
    expected = {"packed_weight.data", "bias"} | ({"packed_weight.scale"} if format == "chatglm-int4" else set())
    assert set(state) == expected
    assert as_bytes(target.packed) != as_bytes(source.packed)
    assert target.load_state_dict(state).missing_keys == []
    assert as_bytes(target.packed) == as_bytes(source.packed)
    x = torch.randn(3, 32)
    assert torch.equal(target(x), source(x))


def tied_model() -> nn.ModuleDict:
    embedding = QuantizedEmbedding(make_packed("q8_0", rows=11), torch.float32)
    return nn.ModuleDict({"embed": embedding, "head": QuantizedLinear(embedding.packed_weight)})


@pytest.mark.parametrize("change", ["half", "deepcopy", "pickle", "meta"])
def test_tied_output_layer_stays_tied(change: str) -> None:
    model = tied_model()
    if change == "deepcopy":
        model = copy.deepcopy(model)
    elif change == "pickle":
        model = pickle.loads(pickle.dumps(model))
    else:
        model = model.half() if change == "half" else model.to("meta")
    assert model["head"].packed_weight is model["embed"].packed_weight
    assert sum(buffer.nbytes for buffer in model.buffers()) == 11 * 34


def test_replacing_the_weight_of_a_tied_layer_changes_both() -> None:
    model, other = tied_model(), make_packed("q8_0", rows=11, seed=5)
    model["head"].replace(other)
    expected = QuantizedLinear(other).dequantize()
    assert torch.equal(model["embed"](torch.arange(11)), expected)


def test_replace_changes_the_output_and_may_change_the_format() -> None:
    layer, x = QuantizedLinear(make_packed("chatglm-int8")), torch.randn(3, 32)
    before = layer(x)
    layer.replace(make_packed("chatglm-int8", seed=1))
    after = layer(x)
    assert not torch.allclose(before, after)
    layer.replace(make_packed("q4_1", seed=1))
    assert layer.packed.format == "q4_1"
    assert set(layer.state_dict()) == {"packed_weight.data"}
    torch.testing.assert_close(layer(x), torch_twin(layer)(x))


def test_replace_refuses_another_shape_and_keeps_the_weight() -> None:
    layer = QuantizedLinear(make_packed("q4_0"))
    before = as_bytes(layer.packed)
    with pytest.raises(ValueError, match=r"replace: got shape \(6, 64\), expected \(6, 32\)"):
        layer.replace(make_packed("q4_0", columns=64))
    assert as_bytes(layer.packed) == before


def test_linear_like_is_what_quantized_and_lora_layers_are() -> None:
    layer = QuantizedLinear(make_packed("q4_0"))
    assert isinstance(layer, LinearLike)
    assert isinstance(LoraLinear(layer), LinearLike)
    assert not isinstance(nn.Linear(32, 6), LinearLike)
    assert not isinstance(PackedWeight(make_packed("q4_0")), LinearLike)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_autocast_gives_the_dtype_that_nn_linear_gives(x_dtype: torch.dtype) -> None:
    """bfloat16, except that torch leaves float64 alone."""
    layer = QuantizedLinear(make_packed("q4_1"), torch.randn(6))
    twin, x = torch_twin(layer, x_dtype), torch.randn(4, 32).to(x_dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y, y_twin = layer(x), twin(x)
    assert y.dtype == y_twin.dtype == (torch.float64 if x_dtype == torch.float64 else torch.bfloat16)
    torch.testing.assert_close(y, y_twin, rtol=2e-2, atol=5e-2)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == x_dtype


def test_to_autocast_changes_nothing_outside_of_autocast() -> None:
    x = torch.randn(3)
    assert to_autocast(x) is x
    with torch.autocast("cpu", torch.float16):
        assert to_autocast(x).dtype == torch.float16
    with torch.autocast("cpu", enabled=False):
        assert to_autocast(x) is x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_grad_input_is_the_gradient_times_the_weight(dtype: torch.dtype) -> None:
    layer = QuantizedLinear(make_packed("q4_1"))
    grad = torch.randn(2, 3, 6, dtype=dtype)
    expected = grad @ layer.dequantize(dtype)
    torch.testing.assert_close(grad_input(layer, grad), expected)
    torch.testing.assert_close(grad_input(torch_twin(layer), grad), expected)


@pytest.mark.parametrize("module", [nn.Identity(), nn.Embedding(6, 32), nn.Conv1d(32, 6, 1)], ids=repr)
def test_grad_input_refuses_other_modules(module: nn.Module) -> None:
    with pytest.raises(TypeError, match=f"no input gradient for {type(module).__name__}"):
        grad_input(module, torch.randn(2, 6))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("format", ["q4_1", "chatglm-int4"])
def test_copies_are_equal_and_independent(format: str, how: str) -> None:
    layer = QuantizedLinear(make_packed(format), torch.randn(6))
    twin = copy.deepcopy(layer) if how == "deepcopy" else pickle.loads(pickle.dumps(layer))
    x = torch.randn(3, 32)
    before = layer(x)
    assert torch.equal(twin(x), before)
    assert (twin.packed.format, twin.packed.shape) == (format, (6, 32))
    twin.packed.parts[0].zero_()
    assert torch.equal(layer(x), before)
    assert not torch.equal(twin(x), before)


@pytest.mark.parametrize("bits", [4, 8])
def test_from_params_keeps_the_tensors_of_a_checkpoint(bits: int) -> None:
    packed = make_packed(f"chatglm-int{bits}")
    bias = torch.randn(6)
    layer = QuantizedLinear.from_params(bits, packed.parts[0], packed.parts[1], bias)
    assert (layer.in_features, layer.out_features, layer.packed.format) == (32, 6, packed.format)
    assert layer.packed.parts[0].data_ptr() == packed.parts[0].data_ptr()
    assert layer.packed.parts[1].data_ptr() == packed.parts[1].data_ptr()
    x = torch.randn(3, 32)
    torch.testing.assert_close(layer(x), QuantizedLinear(packed, bias)(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, torch.ones(2, 4).char(), torch.ones(2)), "3 bits"),
        ((4, torch.ones(2, 4), torch.ones(2)), "torch.float32"),
        ((4, torch.ones(8).char(), torch.ones(8)), r"\[8\], expected 4 or 8 bits"),
        ((8, torch.ones(2, 4).char(), torch.ones(3)), r"weight_scale: got torch.float32 \[3\], expected floats \[2\]"),
        ((8, torch.ones(2, 4).char(), torch.ones(2).int()), "weight_scale: got torch.int32"),
        ((8, torch.ones(2, 4).char(), torch.ones(2), torch.ones(1)), "bias: got"),
    ],
)
def test_from_params_refuses_what_is_no_checkpoint(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizedLinear.from_params(*arguments)


@pytest.mark.parametrize("tokens", [1, 40])
def test_8_bit_products_and_gradients_are_near_the_float32_ones(tokens: int) -> None:
    layer = QuantizedLinear(make_packed("q4_1", columns=64), torch.randn(6))
    x, grad = torch.randn(tokens, 64, requires_grad=True), torch.randn(tokens, 6)
    exact = layer(x)
    with computing(layer, "int8"):
        y = layer(x)
        assert layer(x.detach().double()).dtype == torch.float64
    assert not torch.equal(y, exact)
    torch.testing.assert_close(y, exact, rtol=0, atol=0.02 * float(exact.detach().abs().max()))
    gx, exact_gx = torch.autograd.grad(y, x, grad)[0], torch.autograd.grad(exact, x, grad)[0]
    torch.testing.assert_close(gx, exact_gx, rtol=0, atol=0.02 * float(exact_gx.abs().max()))
    assert torch.equal(grad_input(layer, grad, "int8"), gx)


def test_bf16_products_are_those_of_rounded_numbers_and_only_within_the_block() -> None:
    """On every CPU, whether it multiplies bfloat16 numbers in hardware or not.

    What may differ: the order of float32 sums, 2^-20 of the sum of absolute products; and with AMX, where torch multiplies,
    the sum itself is rounded to bfloat16, half a step of 2^-8.
    """
    step = 2**-9 if choose("linear", "q4_1", "cpu").kernel == "native" and library.has_amx() else 0.0
    layer = QuantizedLinear(make_packed("q4_1", 128, 64))
    x = torch.randn(40, 64, requires_grad=True)
    exact = layer(x)
    with computing(layer, "bf16"):
        y = layer(x)
        few = layer(x[:3])
    rounded, w_OI = x.detach().bfloat16().double(), layer.dequantize(torch.bfloat16).double()
    expected, size = rounded @ w_OI.T, rounded.abs() @ w_OI.abs().T
    assert y.dtype == torch.float32
    assert bool(((y.double() - expected).abs() <= step * expected.abs() + 2**-20 * size).all())
    assert not torch.equal(y, exact)
    assert torch.equal(layer(x), exact)
    assert torch.equal(few, layer(x[:3])), "few rows are computed in float32"
    y.sum().backward()
    sums = w_OI.sum(0).expand(40, -1)  # of 128 products with a gradient of ones
    assert bool(((x.grad.double() - sums).abs() <= step * sums.abs() + 2**-20 * w_OI.abs().sum(0)).all())


def test_bf16_does_not_swallow_a_delta_below_its_step() -> None:
    """y is about 1, a delta of 1e-3 is a quarter of bfloat16's step there: added in bfloat16 it would change nothing."""
    layer = LoraLinear(nn.Linear(64, 8, bias=False))
    layer.base = QuantizedLinear(quantize(torch.full((8, 64), 1 / 64), "q8_0"))
    layer.add("a", layer.make(LoraConfig(r=1, lora_alpha=1), (torch.full((1, 64), 1 / 64), torch.full((8, 1), 1e-3))))
    layer.active = {"a": 1.0}
    x = torch.ones(20, 64)
    with computing(layer, "bf16"):
        delta = layer(x) - layer.base(x)
    torch.testing.assert_close(delta, torch.full((20, 8), 1e-3), rtol=1e-2, atol=0)


def test_bf16_leaves_the_output_layer_in_float32(tiny_gguf: Callable[..., Any]) -> None:
    model, _ = qgraft.load(tiny_gguf("llama", tied=True).path)
    with computing(model, "bf16"):
        computes = {name: m.compute for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert computes.pop("lm_head", "float32") == "float32"
    assert set(computes.values()) == {"bf16"}
    assert all(m.compute == "float32" for m in model.modules() if isinstance(m, QuantizedLinear))


def test_keys_and_values_of_grouped_heads_are_not_computed_in_8_bits(tiny_gguf: Callable[..., Any]) -> None:
    for architecture, narrow in (("llama", {"k_proj", "v_proj"}), ("gpt2", set())):
        model, _ = qgraft.load(tiny_gguf(architecture).path)
        with computing(model, "int8"):
            layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
            exact = {name.rpartition(".")[2] for name, layer in layers.items() if layer.compute == "float32"}
            assert exact - {"lm_head"} == narrow
        assert {layer.compute for layer in layers.values()} == {"float32"}


def test_a_layer_refuses_data_of_another_size() -> None:
    """The C loops trust these sizes: a wrong one would read past the end."""
    good = make_packed("q4_1", 6, 64)
    narrow = r"data: got torch.uint8 \[6, 39\], expected torch.uint8 \[6, 40\]"
    for data, message in ((good.parts[0][:, :-1], narrow), (good.parts[0][:5], "5 rows")):
        with pytest.raises(ValueError, match=message):
            QuantizedLinear(PackedTensor("q4_1", (6, 64), (data,)))
