"""The three ops on packed weights: both kernels against float64, and against each other bit for bit."""

import itertools
from collections.abc import Callable

import pytest
import torch
from pretended_gpu import pretended_gpu
from torch import Tensor

from qgraft.formats import FORMATS, PackedTensor
from qgraft.formats import dequantize as format_dequantize
from qgraft.kernels import (
    dequantize,
    linear,
    linear_grad_input,
    linear_grad_input_int8,
    linear_int8,
    native_status,
    ops,
)
from qgraft.kernels.cpu import packed as native
from qgraft.kernels.cpu.abi import FORMAT_IDS
from qgraft.kernels.table import PACKED_OPS

MakePacked = Callable[..., PackedTensor]
UseKernels = Callable[[str | None], None]

ROWS = (1, 3, 33, 577)
LEADING = (
    (),
    (0,),
    (1,),
    (2,),
    (4,),
    (7,),
    (16,),
    (17,),
    (64,),
    (2, 3),
    (2, 0),
)  # around the loops for few and for many rows, odd ones

needs_native = pytest.mark.skipif(not native_status()[0], reason=f"native kernels are {native_status()[1]}")
NATIVE = [pytest.param("native", name, marks=needs_native, id=f"native-{name}") for name in FORMAT_IDS]
KERNELS = [*NATIVE, *[pytest.param("reference", name, id=f"reference-{name}") for name in FORMATS]]
FEW = [  # one of each way to store weights, for the slower checks
    *[pytest.param("native", name, marks=needs_native, id=f"native-{name}") for name in ("q4_1", "chatglm-int4")],
    *[pytest.param("reference", name, id=f"reference-{name}") for name in ("q4_1", "q6_k", "chatglm-int4", "f32")],
]
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def widths(format: str) -> tuple[int, ...]:
    """One block, a few blocks and a wide row of `format`."""
    block = FORMATS[format].block_size
    return {1: (1, 7, 576), 2: (2, 50, 576), 32: (32, 96, 576), 64: (64, 192, 576), 256: (256, 512)}[block]


def assert_product(got: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype) -> None:
    """`got` [..., n] is left [..., k] @ right [k, n] with the rounding errors of `dtype` at most."""
    left, right = left.double(), right.double()
    bound = TOLERANCE[dtype] * (left.abs() @ right.abs()) + (1e-6 if dtype == torch.float16 else 1e-30)
    assert got.shape == (*left.shape[:-1], right.shape[1])
    assert got.dtype == dtype
    assert bool(((got.double() - left @ right).abs() <= bound).all())


@pytest.mark.parametrize(("kernel", "format"), NATIVE)
def test_native_dequantize_is_bit_identical_to_the_reference(
    kernel: str, format: str, random_packed: MakePacked, use_kernels: UseKernels
) -> None:
    use_kernels(kernel)
    for rows in ROWS:
        for columns in widths(format):
            packed = random_packed(format, rows, columns)
            got, expected = dequantize(packed), format_dequantize(packed, torch.float32)
            assert torch.equal(got.view(torch.int32), expected.view(torch.int32)), (rows, columns)
            for dtype in (torch.float64, torch.float16, torch.bfloat16):
                assert torch.equal(dequantize(packed, dtype), format_dequantize(packed, dtype)), (rows, columns, dtype)


@pytest.mark.parametrize("format", FORMATS)
def test_dequantize_returns_memory_of_its_own(format: str, random_packed: MakePacked, use_kernels: UseKernels) -> None:
    use_kernels(None)
    packed = random_packed(format, 3, widths(format)[1])
    before = packed.parts[0].clone()
    dequantize(packed).fill_(7.0)
    assert torch.equal(packed.parts[0], before)


@pytest.mark.spread(9)
@pytest.mark.parametrize(("kernel", "format"), KERNELS)
def test_linear_and_its_input_gradient_agree_with_float64_over_odd_shapes(
    kernel: str, format: str, random_packed: MakePacked, use_kernels: UseKernels
) -> None:
    use_kernels(kernel)
    for rows in ROWS:
        for columns in widths(format):
            packed = random_packed(format, rows, columns)
            w_OI = format_dequantize(packed, torch.float64)
            for leading in LEADING:
                x, grad = torch.randn(*leading, columns), torch.randn(*leading, rows)
                assert_product(linear(x, packed), x, w_OI.T, torch.float32)
                assert_product(linear_grad_input(grad, packed), grad, w_OI, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kernel", "format"), KERNELS)
def test_results_have_the_dtype_of_the_input(
    kernel: str, format: str, dtype: torch.dtype, random_packed: MakePacked, use_kernels: UseKernels
) -> None:
    use_kernels(kernel)
    packed = random_packed(format, 33, widths(format)[-1])
    w_OI = format_dequantize(packed, torch.float64)
    for batch in (3, 16, 17):
        x, grad = torch.randn(batch, packed.shape[1]).to(dtype), torch.randn(batch, 33).to(dtype)
        assert_product(linear(x, packed), x, w_OI.T, dtype)
        assert_product(linear_grad_input(grad, packed), grad, w_OI, dtype)


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "batch_transposed"])
@pytest.mark.parametrize(("kernel", "format"), KERNELS)
def test_inputs_need_not_be_contiguous(
    kernel: str, format: str, layout: str, random_packed: MakePacked, use_kernels: UseKernels
) -> None:
    use_kernels(kernel)
    packed = random_packed(format, 33, widths(format)[-1])
    w_OI = format_dequantize(packed, torch.float64)

    def lay_out(batch: int, width: int) -> Tensor:
        return {
            "transposed": lambda: torch.randn(width, batch).T,
            "strided": lambda: torch.randn(2 * batch, 2 * width)[::2, ::2],
            "expanded": lambda: torch.randn(1, width).expand(batch, width),
            "batch_transposed": lambda: torch.randn(batch, 3, width).transpose(0, 1),
        }[layout]()

    for batch in (5, 12):
        x, grad = lay_out(batch, packed.shape[1]), lay_out(batch, 33)
        assert not x.is_contiguous()
        assert_product(linear(x, packed), x, w_OI.T, torch.float32)
        assert_product(linear_grad_input(grad, packed), grad, w_OI, torch.float32)


@pytest.mark.parametrize(("kernel", "format"), KERNELS)
def test_packed_rows_need_not_be_contiguous(
    kernel: str, format: str, random_packed: MakePacked, use_kernels: UseKernels
) -> None:
    """Every second row of a packed matrix, as a view of its bytes and scales."""
    use_kernels(kernel)
    whole = random_packed(format, 34, widths(format)[1])
    data, *scales = whole.parts
    scales = [scale.float()[::2] for scale in scales]  # float32: no conversion that would copy them
    half = PackedTensor(format, (17, whole.shape[1]), (data[::2], *scales))
    assert not half.parts[0].is_contiguous()
    w_OI = format_dequantize(whole, torch.float32)[::2]
    assert torch.equal(dequantize(half), w_OI)
    for batch in (2, 20):
        x, grad = torch.randn(batch, whole.shape[1]), torch.randn(batch, 17)
        assert_product(linear(x, half), x, w_OI.T, torch.float32)
        assert_product(linear_grad_input(grad, half), grad, w_OI, torch.float32)


@needs_native
@pytest.mark.parametrize("panel_rows", [0, 1, 5, 33])
@pytest.mark.parametrize("format", FORMAT_IDS)
def test_native_panels_cover_every_row(
    format: str,
    panel_rows: int,
    random_packed: MakePacked,
    use_kernels: UseKernels,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Panels that are smaller than a row, that divide the rows, that leave a rest, that are one whole weight."""
    use_kernels("native")
    monkeypatch.setattr(native, "PANEL_BYTES", 4 * panel_rows * 96 + 1)
    monkeypatch.setattr(native, "BF16_PANEL_BYTES", 2 * panel_rows * 96 + 1)
    monkeypatch.setattr(native, "has_panels", lambda: False)  # as on a CPU without AVX2
    monkeypatch.setattr(native, "PANEL_ROWS", 1)
    packed = random_packed(format, 33, {64: 192, 256: 256}.get(FORMATS[format].block_size, 96))
    w_OI = format_dequantize(packed, torch.float64)
    x, grad = torch.randn(20, packed.shape[1]), torch.randn(20, 33)
    assert_product(linear(x, packed), x, w_OI.T, torch.float32)
    assert_product(linear_grad_input(grad, packed), grad, w_OI, torch.float32)


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_input_gradient_keeps_growing_over_many_panels(
    dtype: torch.dtype, use_kernels: UseKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4096 rows of ones, one row a panel: a sum kept in bfloat16 would stop at 256, in float16 at 2048."""
    use_kernels("native")
    monkeypatch.setattr(native, "PANEL_BYTES", 1)
    monkeypatch.setattr(native, "BF16_PANEL_BYTES", 1)
    monkeypatch.setattr(native, "PANEL_ROWS", 1)
    packed = PackedTensor("chatglm-int8", (4096, 2), (torch.ones(4096, 2, dtype=torch.int8), torch.ones(4096).half()))
    got = linear_grad_input(torch.ones(1, 4096, dtype=dtype), packed)
    assert got.tolist() == [[4096.0, 4096.0]]


@needs_native
@pytest.mark.parametrize("format", FORMAT_IDS)
def test_native_results_do_not_depend_on_the_number_of_threads(
    format: str, random_packed: MakePacked, use_kernels: UseKernels, threads: Callable[[int], None]
) -> None:
    """Bit for bit where our own loops compute; torch's sgemm may cut its sums elsewhere."""
    use_kernels("native")
    columns = max(128, FORMATS[format].block_size)  # more weights than one thread is given
    packed = random_packed(format, 577, columns)
    few, many, grad = torch.randn(3, columns), torch.randn(64, columns), torch.randn(64, 577)
    results = []
    for count in (1, 2):
        threads(count)
        assert torch.get_num_threads() == count
        results.append((dequantize(packed), linear(few, packed), linear(many, packed), linear_grad_input(grad, packed)))
    one, two = results
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    torch.testing.assert_close(one[2], two[2])
    torch.testing.assert_close(one[3], two[3], rtol=1e-5, atol=1e-5)


D_AT = {"q2_k": 80, "q3_k": 108, "q6_k": 208, "tq1_0": 52, "tq2_0": 64}  # where a block's float16 is, if not at 0
NO_HALF = ("mxfp4", "nvfp4", "iq1_m")  # scales of bytes, which are never NaN; a float16 in four pieces


@pytest.mark.parametrize(("kernel", "format"), [each for each in KERNELS if each.values[1] not in NO_HALF])
def test_nan_scale_reaches_exactly_its_own_weights(
    kernel: str, format: str, random_packed: MakePacked, use_kernels: UseKernels
) -> None:
    """A NaN in the first block (row-wise: row; unscaled formats: weight) of row 1 must not vanish or spread."""
    use_kernels(kernel)
    layout = FORMATS[format]
    packed = random_packed(format, 3, widths(format)[0] * 2)
    block = packed.shape[1] if len(layout.parts) > 1 else layout.block_size
    if len(packed.parts) > 1:
        packed.parts[1][1] = torch.nan
    else:
        offset = 2 if format == "f32" else D_AT.get(format, 0)
        packed.parts[0][1, offset : offset + 2] = torch.tensor(
            [0xFF, 0x7F], dtype=torch.uint8
        )  # NaN in all three types
    expected = torch.zeros(3, packed.shape[1], dtype=torch.bool)
    expected[1, :block] = True
    assert torch.equal(dequantize(packed).isnan(), expected)
    for batch in (1, 20):
        assert torch.equal(linear(torch.ones(batch, packed.shape[1]), packed).isnan().any(dim=0), expected.any(dim=1))
        grad = linear_grad_input(torch.ones(batch, 3), packed)
        assert torch.equal(grad.isnan().any(dim=0), expected.any(dim=0))


@pytest.mark.parametrize(("kernel", "format"), [each for each in NATIVE if each.values[1] not in NO_HALF])
def test_infinite_scale_is_read_like_the_reference_does(
    kernel: str, format: str, random_packed: MakePacked, use_kernels: UseKernels
) -> None:
    use_kernels(kernel)
    packed = random_packed(format, 2, widths(format)[0])
    if len(packed.parts) > 1:
        packed.parts[1][0] = torch.inf
    else:
        infinity = torch.bfloat16 if format == "bf16" else torch.float16
        offset = D_AT.get(format, 0)
        packed.parts[0][0, offset : offset + 2] = torch.tensor([torch.inf], dtype=infinity).view(torch.uint8)
    got = dequantize(packed)
    assert not bool(got[0].isfinite().all())
    torch.testing.assert_close(got, format_dequantize(packed, torch.float32), rtol=0, atol=0, equal_nan=True)


@needs_native
def test_every_half_is_read_as_torch_reads_it(use_kernels: UseKernels) -> None:
    """All 65536 float16 scales, subnormals, infinities and NaN included, through a q8_0 block of ones."""
    use_kernels("native")
    halves = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16)
    data = torch.ones(65536, 34, dtype=torch.uint8)
    data[:, :2] = halves[:, None].view(torch.uint8)
    got = dequantize(PackedTensor("q8_0", (65536, 32), (data,)))
    assert torch.equal(got.isnan(), halves.isnan()[:, None].expand(-1, 32))
    number = ~halves.isnan()
    assert torch.equal(got[number, 0].view(torch.int32), halves[number].float().view(torch.int32))


@pytest.mark.spread(2)
@pytest.mark.parametrize(("kernel", "format"), FEW)
def test_ops_pass_opcheck(kernel: str, format: str, random_packed: MakePacked, use_kernels: UseKernels) -> None:
    """Schema, autograd registration and shape functions agree with what the kernels do."""
    use_kernels(kernel)
    packed = random_packed(format, 3, 256 if format == "q6_k" else 32)
    parts, width = packed.parts, packed.shape[1]
    table = torch.ops.qgraft
    checks = [
        (table.dequantize.default, (parts, format, width, torch.float32)),
        (table.dequantize.default, (parts, format, width, torch.bfloat16)),
    ]
    for leading in ((9,), (2, 3)):
        x = torch.randn(*leading, width, requires_grad=True)
        grad = torch.randn(*leading, 3, requires_grad=True)
        checks.append((table.linear.default, (x, parts, format)))
        checks.append((table.linear_int8.default, (x, parts, format)))
        checks.append((table.linear_grad_input_int8.default, (grad, parts, format, width)))
        checks.append((table.linear_bf16.default, (x, parts, format)))
        checks.append((table.linear_grad_input_bf16.default, (grad, parts, format, width)))
        checks.append((table.linear_grad_input.default, (grad, parts, format, width)))
    for op, arguments in checks:
        results = torch.library.opcheck(op, arguments)
        assert set(results.values()) == {"SUCCESS"}, op


@pytest.mark.spread(2)
@pytest.mark.parametrize(("kernel", "format"), FEW)
def test_first_and_second_derivatives_of_both_ops(
    kernel: str, format: str, random_packed: MakePacked, use_kernels: UseKernels
) -> None:
    use_kernels(kernel)
    packed = random_packed(format, 3, 256 if format == "q6_k" else 32)
    x = torch.randn(2, packed.shape[1], dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 1, 3, dtype=torch.float64, requires_grad=True)
    for op, value in ((linear, x), (linear_grad_input, grad)):
        assert torch.autograd.gradcheck(lambda v, op=op: op(v, packed), (value,))
        assert torch.autograd.gradgradcheck(lambda v, op=op: op(v, packed).square(), (value,))


@pytest.mark.parametrize(("kernel", "format"), KERNELS)
def test_8_bit_products_have_the_8_bit_gradient_and_that_one_theirs(
    kernel: str, format: str, random_packed: MakePacked, use_kernels: UseKernels
) -> None:
    use_kernels(kernel)
    packed = random_packed(format, 33, widths(format)[-1])
    x = torch.randn(2, 6, packed.shape[1], requires_grad=True)
    g = torch.randn(2, 6, 33, requires_grad=True)
    w_OI = format_dequantize(packed, torch.float64)
    y, gx = linear_int8(x, packed), linear_grad_input_int8(g, packed)
    for got, exact in ((y.detach(), x.detach().double() @ w_OI.T), (gx.detach(), g.detach().double() @ w_OI)):
        assert got.shape == exact.shape
        assert float((got - exact).norm() / exact.norm()) < 0.02
    assert torch.equal(torch.autograd.grad(y, x, g.detach())[0], gx)
    assert torch.equal(torch.autograd.grad(gx, g, x.detach())[0], y)


def test_8_bit_products_are_for_float32_only(random_packed: MakePacked) -> None:
    with pytest.raises(ValueError, match=r"got torch.bfloat16, expected torch.float32"):
        linear_int8(torch.randn(2, 32).bfloat16(), random_packed("q4_0", 3, 32))


def test_linear_keeps_nothing_but_the_packed_bytes_for_its_backward(
    random_packed: MakePacked, use_kernels: UseKernels
) -> None:
    use_kernels(None)
    packed = random_packed("chatglm-int8", 5, 8)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        linear(torch.randn(4, 8, requires_grad=True), packed)
    assert sorted(saved) == sorted([packed.parts[0].data_ptr(), packed.parts[1].data_ptr()])


def test_ops_never_change_their_inputs(random_packed: MakePacked, use_kernels: UseKernels) -> None:
    use_kernels(None)
    packed = random_packed("q4_0", 33, 64)
    bytes_before, x, grad = packed.parts[0].clone(), torch.randn(12, 64), torch.randn(12, 33)
    x_before, grad_before = x.clone(), grad.clone()
    linear(x, packed), linear_grad_input(grad, packed), dequantize(packed)
    assert torch.equal(packed.parts[0], bytes_before)
    assert torch.equal(x, x_before)
    assert torch.equal(grad, grad_before)


@pytest.mark.parametrize("format", FORMATS)
def test_wrong_data_width_says_what_was_got_and_expected(format: str, random_packed: MakePacked) -> None:
    width = widths(format)[0] * 2
    good = random_packed(format, 3, width)
    data, *scales = good.parts
    bad = PackedTensor(format, good.shape, (data[:, :-1], *scales))
    got = f"data: got {data.dtype} [3, {data.shape[1] - 1}]"
    expected = f"expected {data.dtype} [3, {data.shape[1]}]"
    for call in (
        lambda: dequantize(bad),
        lambda: linear(torch.randn(2, width), bad),
        lambda: linear_grad_input(torch.randn(2, 3), bad),
    ):
        with pytest.raises(ValueError) as caught:
            call()
        assert got in str(caught.value)
        assert expected in str(caught.value)
        assert format in str(caught.value)


@pytest.mark.parametrize(("format", "width"), [("q4_0", 32), ("q8_0", 64), ("q6_k", 256), ("chatglm-int4", 32)])
def test_input_that_is_wider_by_less_than_a_block_is_refused(
    format: str, width: int, random_packed: MakePacked
) -> None:
    """The bytes of 33 weights, rounded down to blocks, are those of 32: the width itself must be looked at."""
    packed = random_packed(format, 3, width)
    for batch in (2, 20):
        with pytest.raises(ValueError, match=f"weight of {width + 1} inputs: expected a multiple of"):
            linear(torch.randn(batch, width + 1), packed)


def test_parts_must_be_those_of_the_format(random_packed: MakePacked) -> None:
    rowwise, blocks = random_packed("chatglm-int8", 4, 32), random_packed("q8_0", 4, 32)
    cases = [
        (rowwise, [], "got 1 stored tensors, expected 2: data, scale"),
        (rowwise, [rowwise.parts[1][:3]], r"scale: got torch.float16 \[3\], expected .* \[4\]"),
        (rowwise, [rowwise.parts[1][:, None]], r"scale: got torch.float16 \[4, 1\], expected .* \[4\]"),
        (rowwise, [rowwise.parts[0][:, 0]], r"scale: got torch.int8 \[4\], expected torch.float32 or .* \[4\]"),
        (blocks, [rowwise.parts[1]], "got 2 stored tensors, expected 1: data"),
    ]
    for packed, scales, message in cases:
        with pytest.raises(ValueError, match=message):
            linear(torch.randn(2, 32), PackedTensor(packed.format, packed.shape, (packed.parts[0], *scales)))


def test_gradient_of_another_width_is_refused(random_packed: MakePacked) -> None:
    with pytest.raises(ValueError, match="gradient of 4 outputs for a weight of 3 outputs"):
        linear_grad_input(torch.randn(2, 4), random_packed("q4_0", 3, 32))


def test_scales_of_any_float_dtype_are_computed_in_float32(use_kernels: UseKernels) -> None:
    data = torch.tensor([[1, -2], [3, 127]], dtype=torch.int8)
    for kernel in ("reference", "auto"):
        use_kernels(kernel)
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            packed = PackedTensor("chatglm-int8", (2, 2), (data, torch.tensor([0.5, -2.0], dtype=dtype)))
            assert dequantize(packed).tolist() == [[0.5, -1.0], [-6.0, -254.0]]


def test_shape_functions_work_without_data() -> None:
    """On the meta device only the registered shape functions run."""
    packed = PackedTensor("q4_1", (7, 64), (torch.empty(7, 40, dtype=torch.uint8, device="meta"),))
    assert dequantize(packed, torch.float16).shape == (7, 64)
    assert dequantize(packed, torch.float16).dtype == torch.float16
    assert linear(torch.empty(2, 3, 64, device="meta"), packed).shape == (2, 3, 7)
    assert linear_grad_input(torch.empty(2, 3, 7, device="meta"), packed).shape == (2, 3, 64)


@pytest.mark.parametrize("rows", [(2,), (40,), (3, 14)], ids=str)
@pytest.mark.parametrize("op", [op for op in PACKED_OPS if op != "dequantize"])
def test_a_result_may_be_changed_in_place(
    cpu_level_or_reference: str, op: str, rows: tuple[int, ...], random_packed: MakePacked
) -> None:
    """As the loss does with logits. Autograd forbids it where an op gives a view; the plain level once did."""
    dtypes = (torch.float32, torch.bfloat16) if op in ("linear", "linear_grad_input") else (torch.float32,)
    for format, dtype in itertools.product(("q4_1", "chatglm-int8"), dtypes):
        packed = random_packed(format, 70, 96)
        x = torch.randn(*rows, 70 if "grad" in op else 96).to(dtype).requires_grad_()
        once, twice = getattr(ops, op)(x, packed), getattr(ops, op)(x, packed)
        twice.mul_(2)
        assert torch.equal(twice, 2 * once)
        (got,), (expected,) = (torch.autograd.grad(y.sum(), x) for y in (twice, 2 * once))
        assert torch.equal(got, expected)


@pytest.mark.spread(2)
@pytest.mark.parametrize("name", FORMATS)
def test_on_a_gpu_the_reference_mixes_no_devices(name, random_packed: MakePacked) -> None:
    packed, x = random_packed(name, 33, 512), torch.randn(5, 512)
    weight, y, gx = dequantize(packed), linear(x, packed), linear_grad_input(torch.ones(5, 33), packed)
    with pretended_gpu():
        moved, x_gpu = packed.map(lambda part: part.to("cuda")), x.to("cuda")
        got = (dequantize(moved), linear(x_gpu, moved), linear_grad_input(torch.ones(5, 33, device="cuda"), moved))
    for mine, expected in zip(got, (weight, y, gx), strict=True):
        torch.testing.assert_close(mine.held, expected, rtol=1e-4, atol=1e-4)
