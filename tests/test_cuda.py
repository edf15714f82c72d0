"""The same results on a GPU, by its own kernels and by the reference. Run with `pytest -m cuda` where there is one."""

from collections.abc import Callable
from typing import Any

import pytest
import tiny_classifiers
import tiny_pairs
import torch
import torch.nn.functional as F
from decoder_float64 import CHANNELS, HIDDEN, TestedDecoder, texts
from gguf import GGMLQuantizationType as Q
from test_devices import EXPERTS as PARAMETERS
from test_devices import FEATURES, TRANSLATED, TYPES, merged_after_a_run, run_on_both, seen
from test_devices import learned as learned_packed
from torch import Tensor
from transformers import DynamicCache

import qgraft
from qgraft.attention import SAMPLES, attending
from qgraft.compat import CACHE
from qgraft.data.batches import collate
from qgraft.data.tokenizing import Sample
from qgraft.experts import QuantizedExperts, Segment, Stack, route
from qgraft.formats import FORMATS, PackedTensor, quantize
from qgraft.formats import dequantize as format_dequantize
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
    varlen,
    varlen_attention,
)
from qgraft.kernels.choice import serving
from qgraft.kernels.decoder import Row
from qgraft.kernels.lora import lora_backward, lora_forward
from qgraft.kernels.terms import Term, Weight
from qgraft.passes import graphed, static_pass
from qgraft.passes.batched import CACHED, Piece
from qgraft.passes.decoder import padding_free
from qgraft.passes.decoding import fast_decoding
from qgraft.passes.fused import fused_modules
from qgraft.passes.key_values import BLOCK, KeyValues, slots_of
from qgraft.passes.loss import batch_loss
from qgraft.passes.native_texts import NativeTexts
from qgraft.serving.engine import Engine, answer_all
from qgraft.serving.passes_of import SharedPasses
from qgraft.serving.requests import Request
from qgraft.serving.sampling import Sampling

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

ROWS = [{"instruction": f"question {i}", "output": f"answer {i % 3}"} for i in range(12)]
EPS = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


@pytest.fixture(params=["triton", "reference"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Both that a GPU has. Triton must be there: a fallback would pass all of this."""
    monkeypatch.setenv(KERNELS_VARIABLE, request.param)
    choose.cache_clear()
    yield request.param
    choose.cache_clear()


def any_bytes(name: str, rows: int, columns: int) -> PackedTensor:
    """Codes and scales of any bytes, small and finite scales where a row has one."""
    layout = FORMATS[name]
    data = torch.randint(0, 256, layout.parts[0].shape(rows, columns), dtype=torch.uint8)
    if len(layout.parts) > 1:
        return PackedTensor(name, (rows, columns), (data.view(torch.int8), torch.randn(rows).mul_(0.01).half()))
    return PackedTensor(name, (rows, columns), (data,))


def on_gpu(packed: PackedTensor) -> PackedTensor:
    return packed.map(Tensor.cuda)


def same(got: Tensor, expected: Tensor) -> bool:
    nan = expected.isnan()
    return torch.equal(got.isnan(), nan) and torch.equal(got[~nan], expected[~nan])


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_any_bytes_unpack_as_on_the_cpu(name: str, kernels: str) -> None:
    packed = any_bytes(name, 131, 1280)
    moved = on_gpu(packed)
    assert choose("dequantize", name, "cuda").kernel == kernels
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert same(dequantize(moved, dtype).cpu(), format_dequantize(packed, dtype)), dtype


@pytest.mark.parametrize("name", sorted(name for name, each in FORMATS.items() if each.quantize is not None))
@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_products_are_those_of_float64(name: str, tokens: int, kernels: str) -> None:
    packed = quantize(torch.randn(133, 768), name)
    moved, w_OI = on_gpu(packed), format_dequantize(packed, torch.float64)
    for dtype, tolerance in EPS.items():
        x, g = torch.randn(tokens, 768).to(dtype), torch.randn(tokens, 133).to(dtype)
        for got, expected in (
            (linear(x.cuda(), moved), x.double() @ w_OI.T),
            (linear_grad_input(g.cuda(), moved), g.double() @ w_OI),
        ):
            assert got.dtype == dtype
            assert float((got.cpu().double() - expected).norm() / expected.norm()) < 2 * max(tolerance, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["q4_1", "q6_k", "chatglm-int4", "bf16"])
def test_a_layer_with_a_lora_is_one_product(name: str, dtype: torch.dtype, kernels: str) -> None:
    packed, x, g = quantize(torch.randn(200, 512), name), torch.randn(90, 512).to(dtype), torch.randn(90, 200).to(dtype)
    A, B, w_OI = torch.randn(5, 512), torch.randn(200, 5), format_dequantize(packed, torch.float64)
    term, base = Term(0, 90, 0.5, A.cuda(), B.cuda(), x.cuda()), Weight(on_gpu(packed), None, "float32")
    y, hs = lora_forward(x.cuda(), base, [term])
    gx, (grads,) = lora_backward(g.cuda(), base, [term], hs)
    h, gh = x.double() @ A.double().T, 0.5 * g.double() @ B.double()
    assert gx is not None and grads.A.dtype == grads.B.dtype == torch.float32
    for got, expected in (
        (y, x.double() @ w_OI.T + 0.5 * h @ B.double().T),
        (gx, g.double() @ w_OI + gh @ A.double()),
        (grads.A, gh.T @ x.double()),
        (grads.B, 0.5 * g.double().T @ h),
    ):
        assert float((got.cpu().double() - expected).norm() / expected.norm()) < 2 * EPS[dtype]


@pytest.mark.parametrize("dtype", EPS)
def test_rows_are_those_of_the_reference(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x, g = (torch.randn(5, 3, 300, device="cuda").to(dtype) for _ in range(2))
    weight = torch.rand(300, device="cuda").to(dtype)
    q = torch.randn(1, 7, 6 * 64, device="cuda").to(dtype).view(1, 7, 6, 64).transpose(1, 2)
    cos, sin = (torch.randn(1, 7, 48, device="cuda").to(dtype) for _ in range(2))

    def everything() -> list[Tensor]:
        y, r = pointwise.norm(x, weight, 1e-5)
        out = [y, r, pointwise.normalized(x, weight, r), pointwise.norm_backward(g, x, weight, r)]
        for act in pointwise.ACTIVATIONS:
            out += [pointwise.gated(act, x, g), *pointwise.gated_backward(act, g, x, g)]
        return [*out, *pointwise.rotate(q, q[:, :2], cos, sin), *pointwise.rotate(q, q[:, :2], cos, sin, backward=True)]

    results = []
    for value in ("triton", "reference"):
        monkeypatch.setenv(KERNELS_VARIABLE, value)
        choose.cache_clear()
        assert (serving("norm", x) is gpu_rows) == (value == "triton")
        results.append(everything())
    choose.cache_clear()
    for got, expected in zip(*results, strict=True):
        assert got.dtype == expected.dtype and got.shape == expected.shape
        torch.testing.assert_close(got.float(), expected.float(), rtol=2 * EPS[dtype], atol=2 * EPS[dtype])
    assert torch.equal(results[0][0], results[0][2]), "computed again, the same bits"


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_logits_is_that_of_float64(dtype: torch.dtype, smoothing: float) -> None:
    logits, targets = (torch.randn(9, 32001, device="cuda") * 5).to(dtype), torch.randint(0, 32001, (9,)).cuda()
    gradient = logits.double()
    losses = reference.loss_to_gradient(gradient, targets, smoothing)
    got = gpu_rows.loss_to_gradient(logits, targets, smoothing)
    torch.testing.assert_close(got.double(), losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.double(), gradient, rtol=EPS[dtype], atol=1e-7)


@pytest.mark.parametrize("window", [None, 1, 7, 100])
@pytest.mark.parametrize(("groups", "channels"), [(4, 64), (2, 128), (1, 40)])
def test_packed_samples_attend_as_each_alone(window: int | None, groups: int, channels: int) -> None:
    """torch's varlen kernel against its attention sample by sample in float32, values and gradients."""
    lengths = [130, 1, 64, 205]
    bounds, tokens = torch.tensor([0, 130, 131, 195, 400]), sum(lengths)
    shapes = [(1, tokens, heads * channels) for heads in (4, groups, groups)]
    leaves = [torch.randn(shape, device="cuda").bfloat16().requires_grad_() for shape in shapes]
    g = torch.randn(1, tokens, 4, channels, device="cuda").bfloat16()
    q, k, v = (x.unflatten(2, (-1, channels)).transpose(1, 2) for x in leaves)
    assert varlen.takes(q, k, v) and varlen.status()[0], varlen.status()[1]
    out = varlen_attention.attend(q, k, v, bounds, window=window, scale=0.2)
    got = [out, *torch.autograd.grad(out, leaves, g)]
    wide = [x.detach().float().requires_grad_() for x in leaves]
    q, k, v = (x.unflatten(2, (-1, channels)).transpose(1, 2) for x in wide)
    out = reference.attend(q, k, v, bounds, window=window, scale=0.2)
    expected = [out, *torch.autograd.grad(out, wide, g.float())]
    for mine, theirs in zip(got, expected, strict=True):  # a token that sees itself only has no gradient of its score
        assert float((mine.float() - theirs).norm()) < 2e-2 * max(float(theirs.norm()), float(g.norm()))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3"])
def test_logits_equal_the_cpu(architecture: str, tiny_gguf: Callable[..., Any]) -> None:
    path = tiny_gguf(architecture).path
    on_cpu, _ = qgraft.load(path, device="cpu")
    moved, _ = qgraft.load(path, device="cuda", dtype="float32")
    ids = torch.arange(3, 20)[None]
    torch.testing.assert_close(moved(ids.cuda()).logits.cpu(), on_cpu(ids).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("architecture", "checkpointing"),
    [("llama", True), *((name, False) for name in ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"))],
)
def test_a_packed_step_in_bfloat16_is_near_the_cpus_in_float32(
    architecture: str, checkpointing: bool, tiny_gguf: Callable[..., Any]
) -> None:
    """Loss and gradients, through varlen attention, Triton and the wide product, whatever each architecture takes of it."""
    path = tiny_gguf(architecture).path
    rows = [Sample(list(range(3, 3 + n)), [-100, -100, *range(5, 3 + n)], "") for n in (40, 9, 70)]
    results = []
    for device, dtype in (("cpu", "float32"), ("cuda", "bfloat16")):
        model, _ = qgraft.load(path, device=device, dtype=dtype)
        qgraft.attach_lora(model, r=4)
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.copy_(torch.randn(parameter.shape) * 0.05)
        if checkpointing:
            renamed = getattr(model, "activation_checkpointing_enable", None)
            (renamed or model.gradient_checkpointing_enable)({"use_reentrant": False})
        model.train()
        with padding_free(model, rows) as problem, fused_modules(model):
            assert problem is None
            if architecture == "llama":
                assert model.config._attn_implementation == SAMPLES
            loss = batch_loss(model, collate(rows))
            loss.backward()
        grads = [p.grad.float().cpu().flatten() for p in model.parameters() if p.requires_grad]
        results.append((loss.item(), torch.cat(grads)))
    (loss, gradient), (got_loss, got) = results
    assert got_loss == pytest.approx(loss, rel=0.02)
    assert float(F.cosine_similarity(got, gradient, dim=0)) > 0.98


def test_a_packed_step_of_a_mixture_is_near_the_cpus(kernels: str, tiny_gguf: Callable[..., Any]) -> None:
    path = tiny_gguf("qwen3moe").path
    loss, gradient = learned_packed(path, "cpu", "float32", False, PARAMETERS)
    got_loss, got = learned_packed(path, "cuda", "bfloat16", False, PARAMETERS)
    assert got_loss == pytest.approx(loss, rel=0.03)
    assert float(F.cosine_similarity(got, gradient, dim=0)) > 0.97


@pytest.mark.parametrize("tokens", [1, 3, 300])
@pytest.mark.parametrize("format", ["q4_1", "q6_k", "iq4_xs", "bf16"])
def test_experts_are_those_of_the_reference_and_not_waited_for(format: str, tokens: int) -> None:
    """Few rows and many, LoRAs on some of the tokens, an expert without rows; forward and backward."""
    torch.manual_seed(0)
    packed = quantize(torch.randn(5 * 200, 256), format)
    chosen = torch.stack([torch.randperm(4)[:2] for _ in range(tokens)])
    hidden, g = torch.randn(tokens, 256), torch.randn(2 * tokens, 200)
    pair = torch.randn(5, 6, 256) * 0.1, torch.randn(5, 200, 6) * 0.1
    results = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        layer = QuantizedExperts({"down": Stack(5, packed)}).to(device)
        leaves = [hidden.to(device, dtype).requires_grad_(), *(each.to(device).requires_grad_() for each in pair)]
        on_device, grad = chosen.to(device), g.to(device, dtype)
        torch.cuda.set_sync_debug_mode("error" if device == "cuda" else "default")
        try:
            routed, _ = route(leaves[0], on_device, 5)
            y = layer.with_loras(routed, [Segment(1, 200, 0.5)], leaves[1:])
            found = [y, *torch.autograd.grad(y, leaves, grad)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        results.append([each.detach().float().cpu() for each in found])
    for expected, got in zip(*results, strict=True):
        assert float((got - expected).norm()) <= 2e-2 * float(expected.norm()) + 1e-6


STEPS = {  # texts: (tokens before, new ones); choices of adapters of their rows
    "one": ([(20, 1)], [1]),
    "two": ([(3, 1), (150, 1)], [0, 2]),
    "a prompt among others": ([(3, 1), (12, 1), (2, 13), (40, 1)], [1, 2, *[3] * 13, 0]),
    "many": ([(1, 1)] * 40, [n // 3 % 4 for n in range(40)]),
}


@pytest.mark.parametrize("format", ["q4_0", "q4_1", "q8_0", "bf16"])
@pytest.mark.parametrize("step", STEPS)
def test_a_step_is_that_of_the_decoder_in_float64(step: str, format: str) -> None:
    """Computed, recorded and replayed, with other texts and adapters each time."""
    lengths, choices = STEPS[step]
    for dtype, tolerance in ((torch.float32, 2e-4), (torch.bfloat16, 4e-2)):
        decoder = TestedDecoder(gpu_decode.Structures, format=format, memory=dtype, device="cuda")
        for _ in range(4):
            rows = texts(lengths)
            x, angles = torch.randn(len(rows), HIDDEN), torch.randn(len(rows), CHANNELS)
            want = torch.stack([decoder.expected(*each) for each in zip(rows, choices, x, angles, strict=True)])
            placed = [Row(row.slots.cuda(), row.seen, row.front) for row in rows]
            got = decoder.step(placed, choices, x.cuda(), angles.cuda()).cpu()
            assert float((got.double() - want).norm() / want.norm()) < tolerance
            assert float((decoder.memory.cpu().double() - decoder.past).norm() / decoder.past.norm()) < tolerance
            decoder.past = decoder.memory.double().cpu()
            choices = choices[1:] + choices[:1]


def attach_two(model: Any) -> None:
    """LoRAs "one" and "two" with numbers that are the same on every device."""
    for name in ("one", "two"):
        qgraft.attach_lora(model, r=3, name=name)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape) * 0.2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_decoded_tokens_are_those_of_the_models_own_pass(
    architecture: str, dtype: str, tiny_gguf: Callable[..., Any]
) -> None:
    """One text by fast_decoding(), with other adapters on the way; several by the server's passes, with graphs."""
    path = tiny_gguf(architecture).path
    on_cpu, model = (qgraft.load(path, device=d, dtype=t)[0] for d, t in (("cpu", "float32"), ("cuda", dtype)))
    for each in (on_cpu, model):
        attach_two(each)
    ids, tolerance = torch.randint(3, 90, (3, 40)), 1e-3 if dtype == "float32" else 5e-2
    mixes: list[dict[str, float]] = [{"one": 1.0}, {"two": 0.5, "one": -1.0}, {}]

    def near(got: Tensor, expected: Tensor) -> bool:
        return float((got.float().cpu() - expected).norm() / expected.norm()) < tolerance

    def own(n: int, mix: dict[str, float]) -> Tensor:
        qgraft.use_adapter(on_cpu, mix or None)
        return on_cpu(ids[n : n + 1], use_cache=False).logits[0]

    with torch.inference_mode():
        cache = DynamicCache(config=model.config)
        qgraft.use_adapter(model, "one")
        with fast_decoding(model) as problem:
            assert problem is None
            model(ids[:1, :6].cuda(), use_cache=True, **{CACHE: cache})
            for t in range(6, 40):
                got = model(ids[:1, t : t + 1].cuda(), use_cache=True, **{CACHE: cache}).logits[0, 0]
                assert near(got, own(0, mixes[0])[t]), t
            decoder = vars(model.model)["forward"]
            states = decoder.structures.network.structures._states
            assert len(states) == 1 and all(state._replay is not None for state in states.values())
        qgraft.use_adapter(model, None)
        memory, native = KeyValues(12 * BLOCK), NativeTexts(model)
        expected = [own(n, mix) for n, mix in enumerate(mixes)]
        with attending(model, CACHED):
            for past, stop in ((0, 20), *((t, t + 1) for t in range(20, 40))):
                pieces = [
                    Piece(ids[n, :stop].tolist(), past, slots_of([n, 3 + n, 6 + n], stop, "cuda"), loras=mixes[n])
                    for n in range(3)
                ]
                logits = native.next_logits(memory, pieces)
                assert logits is not None
                for n in range(3):
                    assert near(logits[n], expected[n][stop - 1]), (stop, n)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_texts_of_several_adapters_are_answered_together_as_on_the_cpu(
    architecture: str, tiny_gguf: Callable[..., Any]
) -> None:
    """By the kernels of decoding and, where a decoder has none, by the facade's pass."""
    mixes: list[dict[str, float]] = [{"one": 1.0}, {"two": 0.5, "one": -1.0}, {}]
    asked = [
        Request(tuple(range(5, 9 + 7 * n)), mix, Sampling(temperature=0), max_tokens=6) for n, mix in enumerate(mixes)
    ]
    told = []
    for device in ("cpu", "cuda"):
        model, tokenizer = qgraft.load(tiny_gguf(architecture).path, device=device, dtype="float32")
        attach_two(model)
        qgraft.use_adapter(model, None)
        engine = Engine(model.eval(), tokenizer)
        told.append([[token.id for token in each["tokens"]] for each in answer_all(engine, asked)])
        engine.stop()
        assert isinstance(engine.passes, SharedPasses)
    assert told[0] == told[1] and all(told[0])


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"fp16": True}])
def test_a_run_on_the_gpu_learns_and_its_adapter_works_on_the_cpu(options, tiny_gguf, tmp_path):
    path = tiny_gguf("llama").path
    args = qgraft.TrainArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=8,
        learning_rate=1e-2,
        r=2,
        save_strategy="no",
        val_size=3,
        **options,
    )
    model, tokenizer = qgraft.load(path, device="cuda", dtype=args.compute_dtype)
    report = qgraft.train(model, tokenizer, ROWS, args)
    assert report.metrics["eval_loss"] < report.metrics["eval_loss_before"]
    on_cpu, _ = qgraft.load(path, device="cpu")
    assert qgraft.load_adapter(on_cpu, tmp_path / "out").applied == 14
    assert torch.isfinite(on_cpu(torch.arange(3, 20)[None]).logits).all()


SIZES = [(40, 9, 70), (64, 64), (3,) * 30, (100, 1, 1), (200,)]


def graphed_model(path: str) -> tuple[Any, list[torch.nn.Parameter]]:
    """A model in bfloat16 as it is about to train, with gradients that stay where they are."""
    model, _ = qgraft.load(path, device="cuda", dtype="bfloat16")
    qgraft.attach_lora(model, r=4)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.manual_seed(0)
    for parameter in trained:
        parameter.data.copy_(torch.randn(parameter.shape) * 0.05)
        parameter.grad = torch.zeros_like(parameter)
    return model.train(), trained


def batch_of(lengths: tuple[int, ...]) -> Any:
    """Half of each sample is learned."""
    rows = [[3 + (5 * n + 7 * i) % 200 for i in range(n)] for n in lengths]
    return collate([Sample(ids, [-100] * (len(ids) // 2) + ids[len(ids) // 2 :], "") for ids in rows])


def learned(trained: list[torch.nn.Parameter], learn: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """(the loss, all gradients) of one pass."""
    for parameter in trained:
        assert parameter.grad is not None
        parameter.grad.zero_()
    loss = float(learn())
    return loss, torch.cat([p.grad.flatten() for p in trained if p.grad is not None])


def eagerly(model: Any, lengths: tuple[int, ...]) -> Callable[[], Tensor]:
    def learn() -> Tensor:
        loss = batch_loss(model, batch_of(lengths)) / 50.0
        loss.backward()
        return loss.detach()

    return learn


def near(got: tuple[float, Tensor], expected: tuple[float, Tensor]) -> None:
    """To the rounding of bfloat16: products of another number of rows may be summed in another order."""
    assert got[0] == pytest.approx(expected[0], rel=3e-3)
    assert float((got[1] - expected[1]).norm()) < 3e-2 * float(expected[1].norm())


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3", "phi3"])
def test_a_replayed_pass_is_the_ordinary_pass_of_any_batch(architecture: str, tiny_gguf: Callable[..., Any]) -> None:
    """Of tables with samples of no tokens at their end; one graph, batches that were not there when it was recorded."""
    model, trained = graphed_model(tiny_gguf(architecture).path)
    rows = [Sample(list(range(3, 30)), [-100, *range(4, 30)], ""), Sample(list(range(3, 9)), [-100, *range(4, 9)], "")]
    with padding_free(model, rows) as problem, fused_modules(model):
        assert problem is None and graphed.why_eager(model) is None
        passing = static_pass.StaticPass(model, static_pass.Shape(256, 128, 64, 256))

        def replay() -> Tensor:
            assert passing.replay is not None
            passing.replay()
            return passing.loss

        def run() -> Tensor:
            passing.run()
            return passing.loss

        for number, lengths in enumerate(SIZES):
            expected = learned(trained, eagerly(model, lengths))
            passing.fill(batch_of(lengths), 50.0)
            eager = learned(trained, run)
            near(eager, expected)
            if number == 0:
                passing.record(torch.cuda.graph_pool_handle())
            replayed = learned(trained, replay)
            near(replayed, expected)
            assert replayed[0] == pytest.approx(eager[0], rel=1e-5), "the same kernels on the same numbers"
        with torch.no_grad():  # the next step has other weights at the same place
            for parameter in trained:
                parameter.mul_(0.5)
        near(learned(trained, replay), learned(trained, eagerly(model, SIZES[-1])))


def test_graphs_of_many_sizes_share_memory_and_passes_beyond_them_are_eager(
    tiny_gguf: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphed, "MOST_GRAPHS", 3)
    model, trained = graphed_model(tiny_gguf("llama").path)
    order = [*SIZES, *SIZES, (500, 300), *reversed(SIZES), (500, 300), *SIZES]
    with padding_free(model, [Sample(list(range(3, 30)), [-100, *range(4, 30)], "")]), fused_modules(model):
        passes = graphed.GraphedPasses(model, trained, 4096)
        eager = 0
        for lengths in order:
            expected = learned(trained, eagerly(model, lengths))
            for parameter in trained:
                assert parameter.grad is not None
                parameter.grad.zero_()
            loss = passes.learn(batch_of(lengths), 50.0)
            eager += loss is None
            if loss is not None:
                near((float(loss), torch.cat([p.grad.flatten() for p in trained if p.grad is not None])), expected)
        assert passes.problem is None and passes.recorded == 3 and passes.replayed > 8 and eager


def test_a_pass_that_waits_for_the_gpu_is_not_recorded_and_goes_on(
    tiny_gguf: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, trained = graphed_model(tiny_gguf("llama").path)
    head = static_pass.output_head

    def waiting(model: Any) -> Any:
        trained[0].sum().item()
        return head(model)

    monkeypatch.setattr(static_pass, "output_head", waiting)
    with padding_free(model, [Sample(list(range(3, 30)), [-100, *range(4, 30)], "")]), fused_modules(model):
        expected = learned(trained, eagerly(model, SIZES[0]))
        passes = graphed.GraphedPasses(model, trained, 4096)
        for _ in range(2):  # eagerly; then not recorded, and eagerly
            near(learned(trained, lambda: passes.learn(batch_of(SIZES[0]), 50.0) * 1.0), expected)  # type: ignore[operator]
        assert passes.problem is not None and passes.learn(batch_of(SIZES[0]), 50.0) is None
        near(learned(trained, eagerly(model, SIZES[0])), expected)
    assert torch.randn(4, device="cuda").isfinite().all()
    torch.cuda.empty_cache()


def test_a_run_of_replayed_passes_is_the_run(tiny_gguf: Callable[..., Any], tmp_path: Any) -> None:
    """And one that stopped on its way goes on."""
    path = tiny_gguf("llama").path
    rows = [{"instruction": f"question {i}", "output": f"answer {i % 3} " * (1 + i % 7)} for i in range(40)]

    def run(name: str, **options: Any) -> Any:
        given = {"max_steps": 20, "learning_rate": 1e-2, "r": 2, "val_size": 4, "per_device_train_batch_size": 4,
                 "save_strategy": "no", "bf16": True, "lr_scheduler_type": "constant"} | options  # fmt: skip
        args = qgraft.TrainArguments(output_dir=str(tmp_path / name), **given)
        model, tokenizer = qgraft.load(path, device="cuda", dtype=args.compute_dtype)
        return qgraft.train(model, tokenizer, rows, args)

    eager, replayed = run("eager", cuda_graphs="no"), run("graphs", cuda_graphs="yes")
    run("parts", cuda_graphs="yes", max_steps=11, save_strategy="steps", save_steps=11)
    parts = run("parts", cuda_graphs="yes", save_strategy="steps", save_steps=11, resume_from_checkpoint="true")
    assert any("replayed" in note for note in replayed.notes), replayed.notes
    assert replayed.metrics["eval_loss"] < replayed.metrics["eval_loss_before"]
    for report in (replayed, parts):
        assert report.steps == 20 and report.metrics["skipped_steps"] == 0
        assert report.metrics["eval_loss"] == pytest.approx(eager.metrics["eval_loss"], rel=0.05)
    assert replayed.metrics["train_loss"] == pytest.approx(eager.metrics["train_loss"], rel=0.03)


def test_triton_is_there() -> None:
    """Where it is not, everything above that it does would only be slow."""
    assert triton_ops.triton_status()[0], triton_ops.triton_status()[1]


# --- every way of training, as on the pretended GPU of test_devices.py


@pytest.mark.parametrize("feature", FEATURES)
def test_a_run_of_each_kind_is_the_cpus(feature: str, tiny_gguf: Callable[..., Any], tmp_path: Any) -> None:
    architecture, rows, options = FEATURES[feature]
    path = tiny_gguf(architecture, **({"types": TYPES[feature]} if feature in TYPES else {})).path
    if options.get("stage") == "distill":
        options = {**options, "teacher_model_name_or_path": str(tiny_gguf(architecture, seed=3).path)}
    random = feature in ("dropout", "neftune", "fp16")  # a GPU draws other numbers; a step that overflows is left out
    run_on_both(path, rows, tmp_path, {}, options, loosely=random)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_pairs(kind: str, tmp_path: Any) -> None:
    tiny_pairs.write_pairs_model(kind, tmp_path / "model")
    run_on_both(tmp_path / "model", TRANSLATED, tmp_path, {"quantize": "q8_0"}, {"target_modules": "all-linear"})


def test_a_classifier(tmp_path: Any) -> None:
    folder, rows = tiny_classifiers.write_encoder(tmp_path), tiny_classifiers.rows_of(12)
    load = {"task_type": "SEQ_CLS", "labels": ["good", "bad"], "quantize": "q8_0"}
    run_on_both(folder, rows, tmp_path, load, {"learning_rate": 1e-3})


@pytest.mark.parametrize("kind", ["llava", "gemma3"])
def test_images(kind: str, tmp_path: Any) -> None:
    tiny_images = pytest.importorskip("tiny_images")
    tiny_images.write_image_model(kind, tmp_path / "model")
    run_on_both(tmp_path / "model", seen(tiny_images), tmp_path, {}, {"val_size": 1})


@pytest.mark.parametrize("method", ["auto", "nearest"])
def test_a_merge_is_made_on_the_gpu(method: str, tiny_gguf: Callable[..., Any], tmp_path: Any) -> None:
    merged_after_a_run(tiny_gguf("llama", types=(Q.Q4_0,)).path, method, tmp_path)
