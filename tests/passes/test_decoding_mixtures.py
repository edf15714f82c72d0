"""Mixtures of experts in C against transformers' own forward pass: every family, LoRAs on experts, what is not served."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers
from decoded_in_c import assert_same, counted, logits
from torch import nn

import qgraft
from qgraft.adapters.base import find_adapter
from qgraft.attention import attending
from qgraft.kernels import native_status
from qgraft.passes.batched import CACHED, Piece
from qgraft.passes.decoding import fast_decoding, why_not
from qgraft.passes.key_values import BLOCK, KeyValues, slots_of
from qgraft.passes.native_texts import NativeTexts

pytestmark = pytest.mark.skipif(not native_status()[0], reason="the native kernels are not built")
SHARING = (  # those whose texts share passes
    "qwen3moe", "qwen2moe", "mixtral", "olmoe", "granitemoe", "glm4moe", "dots1", "ernie4_5-moe",
)  # fmt: skip
CHOSEN = {"num_experts": 5, "num_experts_per_tok": 3}  # of an odd number


def packed(kind: str = "Qwen3Moe", **options: Any) -> Any:
    torch.manual_seed(0)
    shape = {
        "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "max_position_embeddings": 64, "pad_token_id": None, "moe_intermediate_size": 32,
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**{**shape, **CHOSEN, **options})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval().requires_grad_(False)
    qgraft.quantize(model, "q8_0")
    return model


def with_adapters(model: Any) -> Any:
    """With "law" on the experts and "med" on all linear layers, neither of which is active."""
    block = next(name for name, _ in model.named_modules() if name.endswith(".experts"))
    stem = ".".join(block.split(".")[-2:])
    parameters = (f"{stem}.gate_up_proj", f"{stem}.down_proj")
    torch.manual_seed(1)
    qgraft.attach_lora(model, r=4, name="law", target_modules=(), target_parameters=parameters)
    qgraft.attach_lora(model, r=3, name="med")
    for name in ("law", "med"):
        for lora in find_adapter(model, name).parts.values():
            nn.init.normal_(lora.lora_B, 0, 0.2)
    qgraft.use_adapter(model, None)
    return model


@pytest.mark.spread(2)
@pytest.mark.parametrize("architecture", [*SHARING, "gpt-oss"])
def test_every_token_as_transformers_computes_it(
    architecture: str, tiny_gguf: Callable[..., Any], random_ids: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the window of gpt-oss, on two threads, with LoRAs on experts and others."""
    model = with_adapters(qgraft.load(tiny_gguf(architecture).path)[0])
    ids = random_ids(model, 1, 14)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for weights in (None, {"law": 0.5, "med": -1.0}):
        qgraft.use_adapter(model, weights)
        want = logits(model, ids)
        with fast_decoding(model) as problem, counted(monkeypatch) as steps:
            got = logits(model, ids)
        assert (problem, steps) == (None, list(range(5, 14)))
        assert_same(got, want)


@pytest.mark.spread(2)
@pytest.mark.parametrize("architecture", SHARING)
def test_texts_that_share_passes(architecture: str, tiny_gguf: Callable[..., Any]) -> None:
    """A prompt whole and in parts, beside a text with other adapters."""
    model = with_adapters(qgraft.load(tiny_gguf(architecture).path)[0])
    memory, native = KeyValues(8 * BLOCK), NativeTexts(model)
    texts = [torch.randint(4, 64, (length,)).tolist() for length in (24, 9)]
    mixes: list[dict[str, float]] = [{"law": 1.0}, {"law": 0.3, "med": -0.7}]

    def alone(n: int, stop: int) -> torch.Tensor:
        qgraft.use_adapter(model, mixes[n])
        own = model(torch.tensor([texts[n][:stop]]), use_cache=False).logits[0, -1]
        qgraft.use_adapter(model, None)
        return own

    with torch.inference_mode():
        for first, second in (((0, 20), (0, 8)), ((20, 24), (8, 9))):
            pieces = [
                Piece(texts[n][:stop], past, slots_of(([3, 1], [2])[n], stop), loras=mixes[n])
                for n, (past, stop) in enumerate((first, second))
            ]
            with attending(model, CACHED):
                got = native.next_logits(memory, pieces)
            assert got is not None
            assert_same(got, torch.stack([alone(0, first[1]), alone(1, second[1])]))
    assert native.steps == 2


def test_what_changes_in_experts_and_their_loras_is_followed(
    tiny_gguf: Callable[..., Any], random_ids: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In gpt-oss, of whose LoRAs C reads a copy, because gate and up alternate."""

    def outputs(model: Any) -> list[torch.Tensor]:
        ids, found = random_ids(model, 1, 8), []
        mlp = model.base_model.layers[1].mlp
        experts, lora = mlp.experts, mlp.experts.gate_up_proj.loras["law"]
        stack = experts.down_proj.base.down
        changes: list[Callable[[], object]] = [
            lambda: qgraft.use_adapter(model, "law"),
            lambda: lora.lora_B.detach().mul_(-1),
            lambda: setattr(lora.lora_A, "data", lora.lora_A.data * 2),
            lambda: qgraft.use_adapter(model, {"law": 0.5}),
            lambda: stack.replace(qgraft.formats.quantize(torch.randn(stack.packed.shape) * 0.3, "q4_0")),
            lambda: mlp.router.weight.data.neg_(),
            lambda: setattr(mlp.router, "bias", nn.Parameter(torch.randn(6) * 3)),
            lambda: qgraft.detach_adapter(model),
        ]
        torch.manual_seed(3)
        for change in changes:
            change()
            found.append(logits(model, ids))
        return found

    want = outputs(with_adapters(qgraft.load(tiny_gguf("gpt-oss").path)[0]))
    model = with_adapters(qgraft.load(tiny_gguf("gpt-oss").path)[0])
    with fast_decoding(model) as problem, counted(monkeypatch) as steps:
        got = outputs(model)
    assert (problem, len(steps)) == (None, 3 * len(want))
    for mine, theirs in zip(got, want, strict=True):
        assert_same(mine, theirs)
    assert not any(torch.equal(one, other) for one, other in pairwise(want))


def test_experts_that_tie(random_ids: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of two equal experts is chosen makes no difference, and one of them it is, never both."""
    model = packed(norm_topk_prob=True)
    for layer in model.model.layers:
        experts, router = layer.mlp.experts, layer.mlp.gate
        router.weight.data[[1, 3]] = router.weight.data[4].clone()
        for projection in (experts.gate_up_proj, experts.down_proj):
            for stack in projection.stacks().values():
                (data,) = stack.packed.parts
                rows = data.view(5, -1, data.shape[1])
                rows[[1, 3]] = rows[4].clone()
    ids = random_ids(model, 1, 16)
    want = logits(model, ids)
    with fast_decoding(model) as problem, counted(monkeypatch) as steps:
        got = logits(model, ids)
    assert (problem, len(steps)) == (None, 11)
    assert_same(got, want)


class OwnRouter(nn.Module):
    pass


REFUSED: dict[str, tuple[str, dict[str, Any], Callable[[Any], object], str]] = {
    "clamped queries": ("Olmoe", {"clip_qkv": 8.0}, lambda base: None, "it has clip_qkv=8.0"),
    "another activation": ("Qwen3Moe", {"hidden_act": "gelu"}, lambda base: None, "activation is gelu"),
    "another router": (
        "Qwen3Moe", {}, lambda base: setattr(base.layers[1].mlp, "gate", OwnRouter()), "mlp.gate is a OwnRouter",
    ),
    "a hook on experts": (
        "Qwen3Moe", {}, lambda base: base.layers[1].mlp.experts.register_forward_hook(lambda *_: None), "forward hook",
    ),
    "another shape": (
        "Qwen3Moe", {}, lambda base: setattr(base.layers[1].mlp.gate, "weight", nn.Parameter(torch.zeros(6, 64))),
        "has the shape",
    ),
    "a router in half precision": (
        "Qwen3Moe", {}, lambda base: base.layers[1].mlp.gate.bfloat16(), "expected contiguous float32",
    ),
    "no experts packed": ("Qwen3Moe", {}, lambda base: unpack(base), "gate_up_proj is a NoneType"),
}  # fmt: skip


def unpack(base: Any) -> None:
    experts = base.layers[1].mlp.experts
    del experts.gate_up_proj
    experts.gate_up_proj = nn.Parameter(torch.zeros(5, 64, 64))


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_computed_is_refused(case: str) -> None:
    kind, options, change, said = REFUSED[case]
    base = packed(kind, **options).model
    change(base)
    problem = why_not(base)
    assert problem is not None and said in problem


def test_router_logits_are_transformers(random_ids: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed()
    ids = random_ids(model, 1, 6)
    with torch.inference_mode(), fast_decoding(model), counted(monkeypatch) as steps:
        held = model(ids[:, :5], use_cache=True)
        name = "cache" if getattr(held, "cache", None) is not None else "past_key_values"
        output = model(ids[:, 5:], use_cache=True, output_router_logits=True, **{name: getattr(held, name)})
    assert len(output.router_logits) == 2 and steps == []
