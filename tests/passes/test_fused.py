"""Lean norms and MLPs: the same loss and gradients as transformers' own, from less memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers.models.cohere import modeling_cohere
from transformers.models.gemma import modeling_gemma
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.granite import modeling_granite
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral import modeling_mistral
from transformers.models.phi3 import modeling_phi3
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

import qgraft
from qgraft.data.batches import collate
from qgraft.data.tokenizing import Sample
from qgraft.kernels.pointwise import in_c
from qgraft.passes.decoder import label_states, padding_free
from qgraft.passes.fused import ACTIVATIONS, GatedProduct, RmsNorm, gated, lean_modules
from qgraft.passes.loss import batch_loss

SAMPLES = [
    Sample(list(range(1, 41)), [-100] * 20 + list(range(21, 41)), ""),
    Sample(list(range(5, 15)), [-100, *range(6, 15)], ""),
]


@pytest.mark.spread(4)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "phi3", "stablelm", "gpt2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_are_those_of_the_models_own_modules(
    name: str, checkpointing: bool, tiny_gguf: Callable[..., Any]
) -> None:
    model, _ = qgraft.load(tiny_gguf(name).path)
    qgraft.attach_lora(model, r=4, lora_dropout=0.2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    if checkpointing:
        renamed = getattr(model, "activation_checkpointing_enable", None)
        (renamed or model.gradient_checkpointing_enable)({"use_reentrant": False})
    model.train()
    batch = collate(SAMPLES)

    def gradients() -> tuple[float, list[Tensor], int]:
        model.zero_grad()
        _, saved = counting(lambda: label_states(model, batch)[0], [*model.parameters(), *model.buffers()])
        torch.manual_seed(0)
        loss = batch_loss(model, batch)
        loss.backward()
        return loss.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None], saved

    with padding_free(model, SAMPLES):
        loss, expected, saved = gradients()
        with lean_modules(model) as count:
            lean_loss, got, lean_saved = gradients()
        assert gradients()[2] == saved, "the modules must be as they were"
    assert lean_loss == pytest.approx(loss, rel=1e-6)
    assert len(got) == len(expected) > 0
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
    if name == "gpt2":  # layer norms and an MLP without a gate
        assert count == 0
    else:
        assert count > 0
        assert checkpointing or lean_saved < 0.95 * saved


def counting(run: Callable[[], Any], held: list[Tensor]) -> tuple[Any, int]:
    """The result, and how many bytes the graph keeps, beside tensors that are held anyway."""
    kept: dict[int, int] = {}
    others = {tensor.untyped_storage().data_ptr() for tensor in held}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    return result, sum(size for pointer, size in kept.items() if pointer not in others)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 16)])
def test_norm_agrees_with_float64_and_gradcheck(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(shape[-1], dtype=torch.float64)
    y, r = RmsNorm.apply(x, weight, 1e-5)
    torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (shape[-1],), weight, 1e-5))
    torch.testing.assert_close(r, (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt())
    assert torch.autograd.gradcheck(lambda x: RmsNorm.apply(x, weight, 1e-5)[0], (x,))


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=["silu", "gelu-tanh", "gelu"])
def test_gated_product_passes_gradcheck(activation: Any) -> None:
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.testing.assert_close(
        GatedProduct.apply(gate, up, gate.detach(), up.detach(), activation), gated(activation, gate, up)
    )
    assert torch.autograd.gradcheck(
        lambda gate, up: GatedProduct.apply(gate, up, gate.detach(), up.detach(), activation), (gate, up)
    )


@pytest.mark.spread(3)
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "stablelm", "gpt2"])
def test_no_module_of_a_bf16_model_in_training_sees_or_makes_float32(name: str, tiny_gguf: Callable[..., Any]) -> None:
    """One that does makes all that follows compute in float32, since the residual stream takes it up."""
    model, _ = qgraft.load(tiny_gguf(name).path, dtype="bfloat16")
    qgraft.attach_lora(model, r=4)
    model.train()
    found: dict[str, set[torch.dtype]] = {}

    def note(path: str, *values: Any) -> None:
        tensors = [t for t in tree_leaves(values) if isinstance(t, Tensor) and t.is_floating_point()]
        found.setdefault(path, set()).update(t.dtype for t in tensors)

    for path, module in model.named_modules():
        module.register_forward_hook(lambda _, args, out, path=path: note(path, args, out))
        if not list(module.children()) and not isinstance(module, nn.Embedding):
            module.register_full_backward_hook(lambda _, into, out, path=path: note(path + " (gradient)", into, out))
    with padding_free(model, SAMPLES), lean_modules(model):
        found.clear()
        batch_loss(model, collate(SAMPLES)).backward()
    others = {path: dtypes for path, dtypes in found.items() if dtypes - {torch.bfloat16}}
    assert others == {} and len(found) > 20
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


class OtherRMSNorm(LlamaRMSNorm):
    """Called a norm like the others, but it adds one."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) + 1


def test_only_what_computes_the_formula_is_replaced() -> None:
    norms = nn.ModuleList([LlamaRMSNorm(8), GemmaRMSNorm(8), OtherRMSNorm(8), LlamaRMSNorm(8)])
    norms.requires_grad_(False)
    norms[3].requires_grad_(True)  # trained: its weight needs a gradient
    for norm in norms:
        nn.init.normal_(norm.weight)
    x = torch.randn(3, 8)
    expected = [norm(x) for norm in norms]
    with lean_modules(norms) as count:
        assert count == 2
        assert [("forward" in vars(norm)) for norm in norms] == [True, True, False, False]
        for norm, y in zip(norms, expected, strict=True):
            torch.testing.assert_close(norm(x), y)
    assert not any("forward" in vars(norm) for norm in norms)


def attention_of(module: Any) -> nn.Module:
    """A layer with the forward pass of the attention layers of `module`, and nothing else."""
    kind = next(kind for name, kind in vars(module).items() if name.endswith("Attention"))
    return type("Attention", (nn.Module,), {"forward": kind.forward})()


NEOX = [
    modeling_llama,
    modeling_qwen2,
    modeling_qwen3,
    modeling_mistral,
    modeling_gemma,
    modeling_granite,
    modeling_phi3,
]


@pytest.mark.parametrize("module", NEOX, ids=lambda module: module.__name__.rpartition("_")[2])
@pytest.mark.parametrize("length", [1, 3, 33])
def test_rotations_are_those_of_the_models_own_function(module: Any, length: int) -> None:
    own = module.apply_rotary_pos_emb
    width = 12 if module is modeling_phi3 else 16  # of 16: its rotation may be partial
    q = torch.randn(1, length, 4 * 16, requires_grad=True)
    k = torch.randn(1, length, 2 * 16, requires_grad=True)
    cos, sin = torch.randn(1, length, width), torch.randn(1, length, width)
    weights = torch.randn(1, 4, length, 16), torch.randn(1, 2, length, 16)

    def run() -> list[Tensor]:
        heads = [x.view(1, length, -1, 16).transpose(1, 2) for x in (q, k)]
        outputs = module.apply_rotary_pos_emb(*heads, cos, sin)
        return [*outputs, *torch.autograd.grad(outputs, (q, k), weights)]

    expected = run()
    with lean_modules(attention_of(module)):
        assert module.apply_rotary_pos_emb is not own
        with lean_modules(attention_of(module)):  # once is enough
            got = run()
        assert module.apply_rotary_pos_emb is not own
        halves = [x.detach().view(1, length, -1, 16).transpose(1, 2).bfloat16() for x in (q, k)]
        for mine, theirs in zip(
            module.apply_rotary_pos_emb(*halves, cos.bfloat16(), sin.bfloat16()),
            own(*halves, cos.bfloat16(), sin.bfloat16()),
            strict=True,
        ):
            assert mine.dtype == torch.bfloat16 and torch.equal(mine, theirs)
    assert module.apply_rotary_pos_emb is own
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


def test_a_rotation_of_another_kind_is_left_alone() -> None:
    own = modeling_cohere.apply_rotary_pos_emb  # it turns neighbouring channels
    with lean_modules(attention_of(modeling_cohere)):
        assert modeling_cohere.apply_rotary_pos_emb is own


def test_a_block_within_a_block_leaves_what_the_outer_one_put_there() -> None:
    norms = nn.ModuleList([LlamaRMSNorm(8), LlamaRMSNorm(8)]).requires_grad_(False)
    with lean_modules(norms) as count:
        outer = [vars(norm)["forward"] for norm in norms]
        with lean_modules(norms) as inner:
            assert inner == count == 2
        assert [vars(norm)["forward"] for norm in norms] == outer
    assert not any("forward" in vars(norm) for norm in norms)


def test_a_forward_pass_that_somebody_replaced_is_kept_and_runs() -> None:
    """As accelerate's hooks replace it, to fetch weights or move inputs."""
    norm, calls = LlamaRMSNorm(8).requires_grad_(False), []
    own = norm.forward

    def hooked(x: Tensor) -> Tensor:
        calls.append(1)
        return own(x)

    norm.forward = hooked
    with lean_modules(norm) as count:
        assert count == 0
        norm(torch.randn(3, 8))
    assert vars(norm)["forward"] is hooked and calls == [1]


def test_accelerates_hooks_are_kept() -> None:
    norm = LlamaRMSNorm(8).requires_grad_(False)
    add_hook_to_module(norm, ModelHook())
    with lean_modules(norm):
        norm(torch.randn(3, 8))
    remove_hook_from_module(norm)
    x = torch.randn(3, 8)
    assert torch.equal(norm(x), LlamaRMSNorm(8)(x))


def test_the_last_of_several_runs_puts_the_function_back() -> None:
    """Runs in threads do not end in the order in which they began."""
    own = modeling_llama.apply_rotary_pos_emb
    first, second = lean_modules(attention_of(modeling_llama)), lean_modules(attention_of(modeling_llama))
    first.__enter__()
    second.__enter__()
    lean = modeling_llama.apply_rotary_pos_emb
    first.__exit__(None, None, None)
    assert modeling_llama.apply_rotary_pos_emb is lean is not own
    second.__exit__(None, None, None)
    assert modeling_llama.apply_rotary_pos_emb is own


def test_the_models_own_function_is_back_after_an_error() -> None:
    own = modeling_llama.apply_rotary_pos_emb
    with pytest.raises(ZeroDivisionError), lean_modules(attention_of(modeling_llama)):
        raise ZeroDivisionError
    assert modeling_llama.apply_rotary_pos_emb is own


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "phi3", "stablelm", "nemotron"])
def test_a_model_rotates_by_one_function_a_layer(name: str, tiny_gguf: Callable[..., Any]) -> None:
    model, _ = qgraft.load(tiny_gguf(name).path)
    qgraft.attach_lora(model, r=4)
    with padding_free(model, SAMPLES), lean_modules(model):
        states, _ = label_states(model, collate(SAMPLES))
    assert node_names(states).count("RotationBackward") == (2 if in_c(states) else 0)


def node_names(tensor: Tensor) -> list[str]:
    """The names of all nodes of the graph that a tensor comes from."""
    seen, todo = {}, [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen[node] = node.name()
            todo += [other for other, _ in node.next_functions]
    return list(seen.values())
