"""Fused norms, MLPs and rotations: the same loss and gradients as transformers' own, from less memory."""

import copy
import functools
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers.activations import ACT2FN, ClippedGELUActivation
from transformers.models.cohere import modeling_cohere
from transformers.models.deepseek_v4 import modeling_deepseek_v4
from transformers.models.gemma import modeling_gemma
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.glm import modeling_glm
from transformers.models.granite import modeling_granite
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral import modeling_mistral
from transformers.models.phi3 import modeling_phi3
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.seed_oss import modeling_seed_oss

import qgraft
from qgraft.data.batches import collate
from qgraft.data.tokenizing import Sample
from qgraft.kernels.pointwise import ACTIVATIONS, gated, rotates
from qgraft.passes.decoder import label_states, padding_free
from qgraft.passes.fused import GatedProduct, RmsNorm, fused_modules
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
        with fused_modules(model) as count:
            fused_loss, got, fused_saved = gradients()
        assert gradients()[2] == saved, "the modules must be as they were"
    assert fused_loss == pytest.approx(loss, rel=1e-6)
    assert len(got) == len(expected) > 0
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
    if name == "gpt2":  # layer norms and an MLP without a gate
        assert count == 0
    else:
        assert count > 0
        assert checkpointing or fused_saved < 0.95 * saved


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
    with padding_free(model, SAMPLES), fused_modules(model):
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
    with fused_modules(norms) as count:
        assert count == 2
        assert [("forward" in vars(norm)) for norm in norms] == [True, True, False, False]
        for norm, y in zip(norms, expected, strict=True):
            torch.testing.assert_close(norm(x), y)
    assert not any("forward" in vars(norm) for norm in norms)


def attention_of(module: Any) -> Any:
    """A layer with the forward pass of the attention layers of `module`, and nothing else."""
    kind = next(kind for name, kind in vars(module).items() if name.endswith("Attention"))
    return type("Attention", (nn.Module,), {"forward": kind.forward})()


def rotation_of(layer: nn.Module) -> Any:
    """The function that the layer's forward pass finds under the name of transformers' rotation."""
    return inspect.unwrap(layer.forward.__func__).__globals__["apply_rotary_pos_emb"]


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
    own, layer = module.apply_rotary_pos_emb, attention_of(module)
    width = 12 if module is modeling_phi3 else 16  # of 16: its rotation may be partial
    q = torch.randn(1, length, 4 * 16, requires_grad=True)
    k = torch.randn(1, length, 2 * 16, requires_grad=True)
    cos, sin = torch.randn(1, length, width), torch.randn(1, length, width)
    weights = torch.randn(1, 4, length, 16), torch.randn(1, 2, length, 16)

    def run() -> list[Tensor]:
        heads = [x.view(1, length, -1, 16).transpose(1, 2) for x in (q, k)]
        outputs = rotation_of(layer)(*heads, cos, sin)
        return [*outputs, *torch.autograd.grad(outputs, (q, k), weights)]

    expected = run()
    with fused_modules(layer):
        assert rotation_of(layer) is not own
        with fused_modules(layer):  # once is enough
            got = run()
        assert rotation_of(layer) is not own
        halves = [x.detach().view(1, length, -1, 16).transpose(1, 2).bfloat16() for x in (q, k)]
        for mine, theirs in zip(
            rotation_of(layer)(*halves, cos.bfloat16(), sin.bfloat16()),
            own(*halves, cos.bfloat16(), sin.bfloat16()),
            strict=True,
        ):
            assert mine.dtype == torch.bfloat16 and torch.equal(mine, theirs)
    assert rotation_of(layer) is own
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("module", [modeling_cohere, modeling_glm], ids=["cohere", "glm"])
def test_a_rotation_of_another_kind_is_left_alone(module: Any) -> None:
    layer = attention_of(module)  # they turn neighbouring channels
    with fused_modules(layer):
        assert "forward" not in vars(layer)


def test_nothing_that_other_models_see_is_changed() -> None:
    own, forward = modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaAttention.forward
    layer, other = attention_of(modeling_llama), attention_of(modeling_llama)
    with fused_modules(layer):
        assert "forward" not in vars(other) and rotation_of(other) is own
        assert modeling_llama.apply_rotary_pos_emb is own and modeling_llama.LlamaAttention.forward is forward


def test_decorators_of_a_forward_pass_are_kept() -> None:
    def doubled(function: Any) -> Any:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return [2 * y for y in function(*args, **kwargs)]

        return call

    namespace = {"apply_rotary_pos_emb": modeling_llama.apply_rotary_pos_emb}
    exec(
        "def forward(self, q, k, cos, sin, *, more=1):\n    return *apply_rotary_pos_emb(q, k, cos, sin), more",
        namespace,
    )
    kind = type("Layer", (nn.Module,), {"forward": doubled(namespace["forward"])})
    layer = kind()
    tensors = [torch.randn(1, heads, 5, 8) for heads in (4, 2)] + [torch.randn(1, 5, 8) for _ in range(2)]
    expected = layer(*tensors)
    with fused_modules(layer):
        assert "forward" in vars(layer)
        got = layer(*tensors)
    assert got[2] == expected[2] == 2
    for mine, theirs in zip(got[:2], expected[:2], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


def gated_mlp(kind: Any, **options: Any) -> Any:
    """A gated MLP of transformers whose gate reaches values of some hundreds."""
    config = SimpleNamespace(
        hidden_size=8, intermediate_size=16, mlp_bias=False, attention_bias=False, hidden_act="silu", **options
    )
    mlp = kind(config).requires_grad_(False)
    for parameter in mlp.parameters():
        nn.init.normal_(parameter, std=20.0)
    return mlp


def mlp_that_clamps() -> nn.Module:
    return gated_mlp(modeling_deepseek_v4.DeepseekV4MLP, swiglu_limit=7.0)


def mlp_that_drops() -> nn.Module:
    return gated_mlp(modeling_seed_oss.SeedOssMLP, residual_dropout=0.5, head_dim=8)


def mlp_with_a_clipped_activation() -> nn.Module:
    mlp = gated_mlp(modeling_llama.LlamaMLP)
    mlp.act_fn = ClippedGELUActivation(-10, 10)
    return mlp


@pytest.mark.parametrize("make", [mlp_that_clamps, mlp_that_drops, mlp_with_a_clipped_activation])
def test_what_only_large_numbers_or_training_show_is_not_lost(make: Any) -> None:
    mlp, x = make(), torch.randn(64, 8)
    torch.manual_seed(1)
    expected = mlp.train()(x)
    with fused_modules(mlp) as count:
        torch.manual_seed(1)
        assert count == 0 and torch.equal(mlp(x), expected)


ACTIVATING = ["silu", "swish", "gelu", "gelu_python", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh"]


@pytest.mark.parametrize("name", [*ACTIVATING, "relu", "quick_gelu", "gelu_10", "mish", "relu2"])
def test_activations_that_are_replaced_compute_the_same(name: str) -> None:
    mlp = gated_mlp(modeling_llama.LlamaMLP)
    mlp.act_fn = ACT2FN[name]
    x = torch.randn(64, 8)
    expected = mlp(x)
    with fused_modules(mlp) as count:
        assert count == (name in ACTIVATING)
        torch.testing.assert_close(mlp(x), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_a_block_within_a_block_leaves_what_the_outer_one_put_there() -> None:
    norms = nn.ModuleList([LlamaRMSNorm(8), LlamaRMSNorm(8)]).requires_grad_(False)
    with fused_modules(norms) as count:
        outer = [vars(norm)["forward"] for norm in norms]
        with fused_modules(norms) as inner:
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
    with fused_modules(norm) as count:
        assert count == 0
        norm(torch.randn(3, 8))
    assert vars(norm)["forward"] is hooked and calls == [1]


def test_accelerates_hooks_are_kept() -> None:
    norm = LlamaRMSNorm(8).requires_grad_(False)
    add_hook_to_module(norm, ModelHook())
    with fused_modules(norm):
        norm(torch.randn(3, 8))
    remove_hook_from_module(norm)
    x = torch.randn(3, 8)
    assert torch.equal(norm(x), LlamaRMSNorm(8)(x))


@pytest.mark.parametrize("kind", ["norm", "mlp"])
def test_a_hook_put_over_it_runs_the_modules_own_once_the_block_has_ended(kind: str) -> None:
    module: Any = LlamaRMSNorm(8).requires_grad_(False) if kind == "norm" else gated_mlp(modeling_llama.LlamaMLP)
    x = torch.randn(3, 8)
    expected = module(x)
    with fused_modules(module) as count:
        assert count == 1
        add_hook_to_module(module, ModelHook())
    assert torch.equal(module(x), expected), "bit for bit, which the fused form is not"
    assert module.__class__.forward is type(module).forward


def test_a_copy_made_within_the_block_computes_by_its_own_weights() -> None:
    mlp = gated_mlp(modeling_llama.LlamaMLP)
    with fused_modules(mlp):
        twin = copy.deepcopy(mlp)
        nn.init.zeros_(twin.down_proj.weight)
        assert not twin(torch.randn(3, 8)).any()


def test_everything_is_back_after_an_error() -> None:
    layer, norm = attention_of(modeling_llama), LlamaRMSNorm(8).requires_grad_(False)
    with pytest.raises(ZeroDivisionError), fused_modules(nn.ModuleList([layer, norm])) as count:
        assert count == 1 and "forward" in vars(layer) and "forward" in vars(norm)
        raise ZeroDivisionError
    assert "forward" not in vars(layer) and "forward" not in vars(norm)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "phi3", "stablelm", "nemotron"])
def test_a_model_rotates_by_one_function_a_layer(name: str, tiny_gguf: Callable[..., Any]) -> None:
    model, _ = qgraft.load(tiny_gguf(name).path)
    qgraft.attach_lora(model, r=4)
    with padding_free(model, SAMPLES), fused_modules(model):
        states, _ = label_states(model, collate(SAMPLES))
    assert node_names(states).count("RotationBackward") == (2 if rotates(states) else 0)


def node_names(tensor: Tensor) -> list[str]:
    """The names of all nodes of the graph that a tensor comes from."""
    seen, todo = {}, [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen[node] = node.name()
            todo += [other for other, _ in node.next_functions]
    return list(seen.values())
