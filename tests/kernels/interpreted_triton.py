"""The Triton kernels under Triton's interpreter, on a CPU. Not collected by itself: test_triton.py runs it in a process.

TRITON_INTERPRET must be set before triton is imported, and QGRAFT_KERNELS=triton makes the ops use it for CPU tensors.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from decoder_float64 import CHANNELS, HIDDEN, TestedDecoder, texts
from gguf import GGMLQuantizationType
from gguf.quants import dequantize as gguf_dequantize
from pretended_gpu import pretended_gpu
from test_devices import learned
from torch import Tensor
from transformers import DynamicCache

import qgraft
from qgraft.attention import attending
from qgraft.compat import CACHE
from qgraft.data.batches import collate
from qgraft.data.tokenizing import Sample
from qgraft.formats import FORMATS, PackedTensor
from qgraft.formats import dequantize as format_dequantize
from qgraft.formats.lattices import LATTICES
from qgraft.kernels import (
    KERNELS_VARIABLE,
    choose,
    dequantize,
    gpu_decode,
    gpu_rows,
    linear,
    linear_grad_input,
    pointwise,
    reference,
    triton_ops,
)
from qgraft.kernels.choice import serving
from qgraft.kernels.pointwise import ACTIVATIONS
from qgraft.kernels.unpacked import kept_unpacked, unpacked
from qgraft.passes.batched import CACHED, Piece
from qgraft.passes.decoder import padding_free
from qgraft.passes.decoding import fast_decoding
from qgraft.passes.fused import fused_modules
from qgraft.passes.key_values import BLOCK, KeyValues, slots_of
from qgraft.passes.loss import batch_loss
from qgraft.passes.native_texts import NativeTexts

pytestmark = [
    pytest.mark.triton,
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),  # numpy, of NaN and infinity
]
MakePacked = Callable[..., PackedTensor]
QUICK = ("iq1_m", "iq2_xs", "iq3_xxs", "tq1_0")  # of the kinds of triton_lattices.py


def quickly(formats: Iterable[str], quick: Sequence[str] = ()) -> list[Any]:
    """Of those with tables of points the others are slow tests."""
    slow = {"tq1_0", *LATTICES}.difference(quick)
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in formats]


GGML = quickly(sorted(name for name in triton_ops.UNITS if not name.startswith("chatglm")), QUICK)
EPS = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def same(got: Tensor, expected: Tensor) -> bool:
    """Bit for bit, but for the payload of NaN."""
    nan = got.isnan()
    return got.dtype == expected.dtype and torch.equal(nan, expected.isnan()) and torch.equal(got[~nan], expected[~nan])


def any_bytes(format: str, rows: int, columns: int) -> PackedTensor:
    """Any at all: NaN, infinities and subnormals are scales, too."""
    layout = FORMATS[format]
    data = torch.randint(0, 256, layout.parts[0].shape(rows, columns), dtype=torch.uint8)
    return PackedTensor(format, (rows, columns), (data,))


def test_triton_is_what_serves() -> None:
    assert triton_ops.interpreted()
    for format in FORMATS:
        assert choose("linear", format, "cpu").kernel == "triton"


@pytest.mark.parametrize("format", GGML)
def test_blocks_of_any_bytes_unpack_as_in_gguf(format: str) -> None:
    packed = any_bytes(format, 67, 5 * 256)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        if format == "mxfp4" and dtype == torch.bfloat16:
            packed.parts[0][:, ::17].clamp_(min=3)  # the interpreter has no subnormal numbers of bfloat16
        with np.errstate(all="ignore"):
            exact = gguf_dequantize(packed.parts[0].numpy(), GGMLQuantizationType[format.upper()])
        assert same(dequantize(packed, dtype), torch.from_numpy(np.ascontiguousarray(exact)).to(dtype)), dtype


@pytest.mark.parametrize(
    ("format", "rows"),
    [
        *(
            pytest.param(format, 65, marks=pytest.mark.slow if format in {"tq1_0", *LATTICES} else ())
            for format in triton_ops.FORMATS
        ),
        *(  # what is left of a block of rows does not depend on the format
            pytest.param(format, 1, marks=() if format in ("q4_k", "chatglm-int4") else pytest.mark.slow)
            for format in triton_ops.FORMATS
        ),
    ],
)
def test_every_format_unpacks_as_the_reference(format: str, rows: int, random_packed: MakePacked) -> None:
    columns = {"chatglm-int4": 1278, "chatglm-int8": 1277}.get(format, 1280)  # a row may end anywhere
    packed = random_packed(format, rows, columns)
    data, *scales = packed.parts
    for others in (scales, [scale.float() * 1.001 for scale in scales])[: 1 + len(scales)]:
        packed = PackedTensor(format, packed.shape, (data, *others))
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            assert same(dequantize(packed, dtype), format_dequantize(packed, dtype)), (dtype, others)


@pytest.mark.parametrize("format", quickly(triton_ops.FORMATS))
def test_nothing_but_the_weight_is_written(format: str, random_packed: MakePacked) -> None:
    """Into part of a larger matrix."""
    packed = random_packed(format, 66, 512)
    out = torch.full((70, 530), 7.0, dtype=torch.bfloat16)
    triton_ops.unpack_into(packed, out[:66, :512])
    assert same(out[:66, :512].contiguous(), format_dequantize(packed, torch.bfloat16))
    assert bool((out[66:] == 7).all() and (out[:, 512:] == 7).all())


@pytest.mark.parametrize(
    ("format", "tokens"),
    [
        *(
            pytest.param(name, 2, marks=pytest.mark.slow if name in {"tq1_0", *LATTICES} else ())
            for name in sorted(triton_ops.UNITS)
        ),
        ("q4_1", 1),
        ("q4_1", 3),
    ],
)
def test_products_are_those_of_float64(format: str, tokens: int, random_packed: MakePacked) -> None:
    """One or two rows of half precision go through gemv, which does not round the weights."""
    packed = random_packed(format, 67, 512)
    w_OI = format_dequantize(packed, torch.float64)
    for dtype, tolerance in EPS.items():
        x, g = torch.randn(tokens, 512).to(dtype), torch.randn(tokens, 67).to(dtype)
        for got, expected in (
            (linear(x, packed), x.double() @ w_OI.T),
            (linear_grad_input(g, packed), g.double() @ w_OI),
        ):
            assert got.dtype == dtype
            assert float((got.double() - expected).norm() / expected.norm()) < 2 * tolerance


@pytest.mark.parametrize("format", quickly(sorted(triton_ops.UNITS), ["iq2_s"]))
def test_what_is_added_to_a_product_of_few_rows_is_in_its_sum(format: str, random_packed: MakePacked) -> None:
    packed = random_packed(format, 67, 512)
    x, residual, bias = torch.randn(2, 512), torch.randn(2, 67), torch.randn(67)
    y = torch.full((2, 100), 7.0)
    triton_ops.gemv(x, packed, y[:, :67], bias, residual)
    exact = x.double() @ format_dequantize(packed, torch.float64).T + bias + residual
    assert float((y[:, :67] - exact).norm() / exact.norm()) < 2e-6 and bool((y[:, 67:] == 7).all())


def test_a_copy_that_is_kept_serves_as_long_as_the_bytes_are_what_they_were(random_packed: MakePacked) -> None:
    one, two = random_packed("q4_1", 67, 512), random_packed("q4_1", 67, 512)
    x = torch.randn(5, 512)
    expected = [linear(x.bfloat16(), packed) for packed in (one, two)]
    with kept_unpacked([one, two], torch.bfloat16, 67 * 512 * 2 + 5) as count:
        assert count == 1 and unpacked(two, torch.bfloat16) is None and unpacked(one, torch.float16) is None
        copy = unpacked(one, torch.bfloat16)
        assert copy is not None and triton_ops.weight(one.map(Tensor.detach), torch.bfloat16) is copy
        assert same(copy, format_dequantize(one, torch.bfloat16))
        for packed, y in zip((one, two), expected, strict=True):
            assert torch.equal(linear(x.bfloat16(), packed), y)
        one.parts[0].copy_(two.parts[0])
        assert torch.equal(linear(x.bfloat16(), one), expected[1]) and unpacked(one, torch.bfloat16) is None
    assert triton_ops.weight(two, torch.bfloat16) is not triton_ops.weight(two, torch.bfloat16)


STEPS = {  # texts: (tokens before, new ones); choices of adapters of their rows; format; dtype of keys and values
    "one alone": ([(0, 1)], [0], "q8_0", torch.float32),
    "one in half precision": ([(90, 1)], [1], "q4_1", torch.bfloat16),
    "two": ([(3, 1), (30, 1)], [0, 2], "q4_0", torch.float32),
    "a prompt among others": ([(3, 1), (12, 1), (2, 2)], [1, 3, 0, 0], "q8_0", torch.float32),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_step_is_that_of_the_decoder_in_float64(step: str) -> None:
    lengths, choices, format, dtype = STEPS[step]
    decoder = TestedDecoder(gpu_decode.Structures, format=format, memory=dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for _ in range(2):  # what the first step was of does not stay
        rows = texts(lengths)
        x, angles = torch.randn(len(rows), HIDDEN), torch.randn(len(rows), CHANNELS)
        want = torch.stack([decoder.expected(*each) for each in zip(rows, choices, x, angles, strict=True)])
        got = decoder.step(rows, choices, x, angles)
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(decoder.memory.double(), decoder.past, rtol=tolerance, atol=tolerance)
        decoder.past = decoder.memory.double()
        choices = choices[::-1]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_tokens_of_a_model_are_those_of_its_own_pass(architecture: str, tiny_gguf: Callable[..., Any]) -> None:
    """fast_decoding(), and several texts with adapters of their own, through the kernels of a GPU."""
    model, _ = qgraft.load(tiny_gguf(architecture).path)
    qgraft.attach_lora(model, r=3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    ids = torch.randint(3, model.config.vocab_size, (2, 8))
    with torch.inference_mode():
        expected = model(ids, use_cache=False).logits[:, 5:]
        cache = DynamicCache(config=model.config)
        with fast_decoding(model) as problem:
            assert problem is None
            model(ids[:1, :6], use_cache=True, **{CACHE: cache})
            got = [model(ids[:1, t : t + 1], use_cache=True, **{CACHE: cache}).logits[0, 0] for t in range(6, 8)]
            buffers = next(iter(vars(model.model)["forward"].buffers.values()))
        assert cache.layers[0].keys.data_ptr() == buffers.memory.data_ptr(), "decoded by kernels"
        torch.testing.assert_close(torch.stack(got), expected[0, 1:], rtol=2e-3, atol=2e-3)
        memory, native, own = KeyValues(4 * BLOCK), NativeTexts(model), []
        for loras in ({"default": 1.0}, {}):
            qgraft.use_adapter(model, loras or None)
            own.append(model(ids, use_cache=False).logits[:, 5:])
        with attending(model, CACHED):
            for past, stop in ((0, 6), (6, 7)):
                pieces = [
                    Piece(text[:stop], past, slots_of([3 * n, 1 + n], stop), loras=loras)
                    for n, (text, loras) in enumerate(zip(ids.tolist(), ({"default": 1.0}, {}), strict=True))
                ]
                logits = native.next_logits(memory, pieces)
                wanted = torch.stack([own[n][n, stop - 6] for n in (0, 1)])
                assert logits is not None
                torch.testing.assert_close(logits, wanted, rtol=2e-3, atol=2e-3)


def test_a_number_that_is_none_stays_in_its_text() -> None:
    decoder = TestedDecoder(gpu_decode.Structures)
    rows = texts([(20, 1), (9, 1)])
    x = torch.randn(2, HIDDEN)
    x[0, 3] = float("nan")
    got = decoder.step(rows, [1, 2], x, torch.zeros(2, CHANNELS))
    assert bool(got[0].isnan().all()) and bool(got[1].isfinite().all())


def test_steps_of_inference_mode_and_without_it_share_what_a_graph_reads() -> None:
    decoder, rows = TestedDecoder(gpu_decode.Structures), texts([(2, 1)])
    x, angles = torch.randn(1, HIDDEN), torch.randn(1, CHANNELS)
    with torch.inference_mode():
        expected = decoder.step(rows, [0], x, angles).clone()
    with torch.no_grad():
        assert torch.equal(decoder.step(rows, [0], x, angles), expected)


def test_what_a_gpu_does_not_decode_is_refused() -> None:
    with pytest.raises(ValueError, match="8 bits"):
        TestedDecoder(gpu_decode.Structures, int8=True)


def test_no_rows_and_no_tokens(random_packed: MakePacked) -> None:
    packed = random_packed("q4_1", 0, 64)
    assert dequantize(packed).shape == (0, 64) and linear(torch.randn(2, 64).bfloat16(), packed).shape == (2, 0)
    assert linear(torch.randn(0, 64).bfloat16(), random_packed("q4_1", 5, 64)).shape == (0, 5)


# --- rows: against float64


def near(got: Tensor, exact: Tensor, size: float, dtype: torch.dtype) -> None:
    """One rounding of what float32 has."""
    assert got.dtype == dtype and got.shape == exact.shape
    bound = 0.51 * EPS[dtype] * exact.abs() if dtype != torch.float32 else 0.0
    assert bool(((got.double() - exact).abs() <= bound + 4e-6 * size + 1e-30).all())


def derivative(function: Callable[..., Any], inputs: list[Tensor], grads: Any) -> tuple[Tensor, ...]:
    leaves = [x.double().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*leaves), leaves, grads)


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("shape", [(1, 7), (3, 64), (2, 5, 100), (4, 1536), (0, 8)])
def test_norms(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, grad, weight = (torch.randn(shape) * 3).to(dtype), torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    assert serving("norm", x, weight) is gpu_rows
    y, r = pointwise.norm(x, weight, 1e-5)
    assert r.dtype == torch.float32 and torch.equal(pointwise.normalized(x, weight, r), y)
    if not x.numel():
        return
    near(y, F.rms_norm(x.double(), shape[-1:], weight.double(), 1e-5), 10.0, dtype)
    (exact,) = derivative(lambda x: F.rms_norm(x, shape[-1:], weight.double(), 1e-5), [x], grad.double())
    near(pointwise.norm_backward(grad, x, weight, r), exact, 10.0 * float(r.max()), dtype)


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("act", ACTIVATIONS, ids=[act.name for act in ACTIVATIONS])
def test_gated_products(act: Any, dtype: torch.dtype) -> None:
    gate, up, grad = ((torch.randn(5, 333) * 4).to(dtype) for _ in range(3))
    gate[0, :3] = torch.tensor([80.0, -80.0, 0.0])

    def exact(gate: Tensor, up: Tensor) -> Tensor:
        return (F.silu(gate) if act.name == "silu" else F.gelu(gate, approximate=act.approximate)) * up

    near(pointwise.gated(act, gate, up), exact(gate.double(), up.double()), 100.0, dtype)
    assert pointwise.gated(act, gate, up, dtype=torch.float32).dtype == torch.float32
    expected = derivative(exact, [gate, up], grad.double())
    for got, theirs in zip(pointwise.gated_backward(act, grad, gate, up), expected, strict=True):
        near(got, theirs, 300.0, dtype)


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 2, 2), (4, 2, 3, 64, 64), (9, 3, 5, 80, 20), (2, 2, 5, 7, 6), (18, 1, 4, 6, 0)]
)
def test_rotations(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    heads, groups, tokens, channels, width = sizes
    q = torch.randn(1, tokens, heads * channels).to(dtype).view(1, tokens, heads, channels).transpose(1, 2)
    k = torch.randn(1, groups, tokens, channels).to(dtype)  # the other order in memory
    cos, sin = torch.randn(1, tokens, width).to(dtype), torch.randn(1, tokens, width).to(dtype)
    assert pointwise.rotates(q, k, cos, sin)
    for backward in (False, True):
        for got, x in zip(pointwise.rotate(q, k, cos, sin, backward), (q, k), strict=True):
            exact = reference._rotated(x.double(), cos.double(), sin.double(), backward)
            near(got, exact, 10.0, dtype)
            assert got.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", EPS)
def test_the_loss_of_logits_and_its_gradient(dtype: torch.dtype, smoothing: float) -> None:
    logits, targets = (torch.randn(7, 9001) * 5).to(dtype), torch.randint(0, 9001, (7,))
    wide_logits = logits.double()
    losses = reference.loss_to_gradient(wide_logits, targets, smoothing)  # in float64
    expected_losses = F.cross_entropy(logits.double(), targets, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(losses, expected_losses)
    got = logits.clone()
    got_losses = gpu_rows.loss_to_gradient(got, targets, smoothing)
    torch.testing.assert_close(got_losses.double(), losses, rtol=1e-5, atol=1e-5)
    near(got, wide_logits, 1.0, dtype)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_row_and_is_seen(bad: float) -> None:
    logits, targets = torch.randn(3, 500).bfloat16(), torch.tensor([1, 2, 3])
    clean = logits.clone()
    expected = gpu_rows.loss_to_gradient(clean, targets, 0.0)
    logits[1, 77] = bad
    losses = gpu_rows.loss_to_gradient(logits, targets, 0.0)
    assert not losses[1].isfinite() and not logits[1].isfinite().all()
    assert torch.equal(losses[[0, 2]], expected[[0, 2]]) and torch.equal(logits[[0, 2]], clean[[0, 2]])
    x, weight = torch.randn(3, 40).bfloat16(), torch.randn(40).bfloat16()
    y, _ = pointwise.norm(x, weight, 1e-5)
    x[1, 7] = bad
    z, _ = pointwise.norm(x, weight, 1e-5)
    assert torch.equal(z[[0, 2]], y[[0, 2]]) and bool(z[1, 7].isnan())


# --- all of it


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("qwen3", "bfloat16"),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (("llama", "float32"), ("gemma3", "bfloat16"), ("gemma3", "float32"))
        ),
    ],
)
def test_a_step_of_training_is_that_of_the_reference(
    name: str, dtype: str, tiny_gguf: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradients of a packed batch, with every module in the fused form that it takes.

    The second layer has other formats and, of Gemma, another window; by default one is enough: an interpreter is slow.
    """
    config = {"num_hidden_layers": 1} if name == "qwen3" else {}
    rows = [Sample(list(range(3, 3 + n)), [-100, -100, *range(5, 3 + n)], "") for n in (9, 4)]
    results = []
    for kernels in ("triton", "reference"):
        monkeypatch.setenv(KERNELS_VARIABLE, kernels)
        choose.cache_clear()
        model, _ = qgraft.load(tiny_gguf(name, config=config).path, dtype=dtype)
        qgraft.attach_lora(model, r=2)
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.05)
        model.train()
        with padding_free(model, rows), fused_modules(model) as count:
            assert count
            loss = batch_loss(model, collate(rows))
            loss.backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.requires_grad]
        results.append((loss.item(), torch.cat(grads)))
    choose.cache_clear()
    (loss, gradient), (expected_loss, expected) = results
    assert loss == pytest.approx(expected_loss, rel=1e-5 if dtype == "float32" else 1e-2)
    off = float((gradient - expected).norm() / expected.norm())
    assert off < (1e-4 if dtype == "float32" else 0.1)


# --- on a GPU that is pretended: the code that asks for one, with the same kernels


@pytest.mark.slow
def test_a_step_of_training_there_is_the_cpus(tiny_gguf: Callable[..., Any]) -> None:
    path = tiny_gguf("llama").path
    loss, gradient = learned(path, "cpu", "float32", False)
    with pretended_gpu():
        got_loss, got = learned(path, "cuda", "bfloat16", False)
    assert got_loss == pytest.approx(loss, rel=0.03)
    assert float(F.cosine_similarity(got, gradient, dim=0)) > 0.97


@pytest.mark.slow
def test_new_tokens_there_are_recorded_and_replayed(tiny_gguf: Callable[..., Any]) -> None:
    path = tiny_gguf("llama").path
    model, _ = qgraft.load(path, device="cpu", dtype="float32")
    ids = torch.randint(3, model.config.vocab_size, (2, 12))
    with torch.inference_mode():
        expected = model(ids, use_cache=False).logits
    with pretended_gpu(), torch.no_grad():
        model, _ = qgraft.load(path, device="cuda", dtype="float32")
        cache, moved = DynamicCache(config=model.config), ids.to("cuda")
        with fast_decoding(model) as problem:
            assert problem is None
            model(moved[:1, :6], use_cache=True, **{CACHE: cache})
            for t in range(6, 12):
                got = model(moved[:1, t : t + 1], use_cache=True, **{CACHE: cache}).logits[0, 0]
                torch.testing.assert_close(got.cpu(), expected[0, t], rtol=2e-3, atol=2e-3)
            states = vars(model.model)["forward"].structures.network.structures._states
            assert len(states) == 1 and all(state._replay is not None for state in states.values())
        memory, native = KeyValues(4 * BLOCK), NativeTexts(model)
        with attending(model, CACHED):
            for past, stop in ((0, 6), (6, 7), (7, 8), (8, 9), (9, 10)):
                pieces = [
                    Piece(text[:stop], past, slots_of([3 * n, 1 + n], stop, "cuda"))
                    for n, text in enumerate(ids.tolist())
                ]
                logits = native.next_logits(memory, pieces)
                assert logits is not None
                torch.testing.assert_close(logits.cpu(), expected[:, stop - 1], rtol=2e-3, atol=2e-3)
