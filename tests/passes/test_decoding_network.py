"""Which decoders C is given, and that it is not, where anything is not as it was, or not as the class says."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import StaticCache
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import qgraft
from qgraft.compat import CACHE
from qgraft.kernels import native_status
from qgraft.kernels.cpu import decode
from qgraft.linear import PackedWeight
from qgraft.passes.decoding import fast_decoding, why_not
from qgraft.passes.decoding_families import FAMILIES
from qgraft.passes.decoding_network import Network
from qgraft.passes.fused import fused_modules

pytestmark = pytest.mark.skipif(not native_status()[0], reason="the native kernels are not built")
SHAPE = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None,
}  # fmt: skip

OPTIONS: dict[str, dict[str, Any]] = {  # of mixtures, whose second layer has experts
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "mixtral": {"num_local_experts": 4}, "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 4}, "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    **{name: {
        "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "first_k_dense_replace": 1, "head_dim": 16,
    } for name in ("glm4_moe", "dots1")},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32},
}  # fmt: skip


def packed(kind: str = "Llama", **options: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SHAPE, **options})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval().requires_grad_(False)
    qgraft.quantize(model, "q8_0")
    return model


def in_c(monkeypatch: pytest.MonkeyPatch, model: Any, cache: Any = None, **options: Any) -> bool:
    """Whether the token after a prompt is decoded in C within fast_decoding."""
    ids, steps = torch.arange(6)[None], []
    with monkeypatch.context() as patch, torch.inference_mode():
        step = decode.step
        patch.setattr(decode, "step", lambda *given: (steps.append(1), step(*given)))
        held = model(ids[:, :5], use_cache=True, **{CACHE: cache})
        model(ids[:, 5:], use_cache=True, **{CACHE: getattr(held, CACHE)}, **options)
    return bool(steps)


class OwnModel(transformers.LlamaModel):
    pass


class OwnRotation(LlamaRotaryEmbedding):
    pass


class OwnNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(64)), 1e-6


def _hook(*_: Any) -> None:
    pass


def _own_forward(module: Any) -> None:
    module.forward = module.forward  # as accelerate's hooks do it


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {  # what is done to a decoder, and what is said of it
    "a class of its own": (lambda base: setattr(base, "__class__", OwnModel), "it decodes LlamaModel"),
    "another norm": (lambda base: setattr(base, "norm", OwnNorm()), "norm is a OwnNorm"),
    "another norm in a layer": (
        lambda base: setattr(base.layers[1], "input_layernorm", OwnNorm()), "input_layernorm is a OwnNorm",
    ),
    "another activation": (lambda base: setattr(base.layers[1].mlp, "act_fn", nn.ReLU()), "expected silu"),
    "another activation by name": (lambda base: setattr(base.config, "hidden_act", "relu"), "activation is relu"),
    "another rotation": (
        lambda base: setattr(base, "rotary_emb", OwnRotation(base.config)), "rotation is a OwnRotation",
    ),
    "a layer twice": (lambda base: base.layers.__setitem__(1, base.layers[0]), "made for another place"),
    "a float layer": (
        lambda base: setattr(base.layers[1].mlp, "up_proj", nn.Linear(64, 96)), "up_proj is a Linear",
    ),
    "another shape": (
        lambda base: setattr(base.layers[1].mlp, "up_proj", base.layers[1].self_attn.q_proj), "has the shape",
    ),
    "another scaling": (lambda base: setattr(base.layers[1].self_attn, "scaling", 1.0), "not alike"),
    "another epsilon": (lambda base: setattr(base.layers[1].input_layernorm, "variance_epsilon", 1.0), "not alike"),
    "a hook on a layer": (lambda base: base.layers[1].register_forward_hook(_hook), "has a forward hook"),
    "a hook before a norm": (lambda base: base.norm.register_forward_pre_hook(_hook), "has a forward hook"),
    "a hook on a packed layer": (
        lambda base: base.layers[0].mlp.up_proj.register_forward_hook(_hook), "has a forward hook",
    ),
    "columns in another order": (
        lambda base: setattr(base.layers[0].mlp.up_proj, "input_order", torch.arange(64).flip(0)), "in another order",
    ),
    "an MLP's forward": (lambda base: _own_forward(base.layers[1].mlp), "forward pass of its own"),
    "the decoder's forward": (lambda base: setattr(base, "forward", base.forward), "was replaced"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_decoder_that_is_not_what_its_class_says_is_refused(change: str) -> None:
    model = packed()
    assert why_not(model.model) is None
    make, said = CHANGES[change]
    make(model.model)
    problem = why_not(model.model)
    assert problem is not None and said in problem
    with fast_decoding(model) as same:
        assert same == problem


LATER = {name: make for name, (make, _) in CHANGES.items() if name not in (
    "a class of its own", "another activation by name", "another scaling", "another epsilon", "the decoder's forward",
)}  # fmt: skip
LATER |= {
    "fewer layers": lambda base: setattr(base.config, "num_hidden_layers", 1),
    "another attention": lambda base: setattr(base.config, "_attn_implementation", "flex_attention"),
    "training": lambda base: base.train(),
}


@pytest.mark.parametrize("change", LATER)
def test_what_changes_within_the_block_is_noticed_by_the_next_token(
    monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    model = packed()
    with fast_decoding(model) as problem:
        assert problem is None and in_c(monkeypatch, model)
        decoder = vars(model.model)["forward"]
        LATER[change](model.model)
        with torch.inference_mode():
            cache = transformers.DynamicCache()
            for layer in range(2):
                cache.update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16), layer)
            given = {"input_ids": torch.tensor([[3]]), "use_cache": True, CACHE: cache}
            assert decoder._step(given) is None


def test_other_packed_weights_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By replace(), by another PackedWeight, by other numbers in the same tensor's place."""
    model, ids = packed(), torch.arange(12)[None]
    layer = model.model.layers[0].mlp.up_proj

    def states() -> torch.Tensor:
        with torch.inference_mode():
            cache = transformers.DynamicCache(config=model.config)
            model(ids[:, :5], use_cache=True, **{CACHE: cache})
            return torch.cat([model(ids[:, t : t + 1], use_cache=True, **{CACHE: cache}).logits for t in range(5, 12)])

    def other() -> Any:
        return qgraft.formats.quantize(torch.randn(96, 64) * 0.3, "q8_0")

    changes: list[Callable[[], object]] = [
        lambda: layer.replace(other()),
        lambda: setattr(layer, "packed_weight", PackedWeight(other())),
        lambda: setattr(layer.packed_weight.get().parts[0], "data", other().parts[0]),
    ]
    before = states()
    for change in changes:
        with fast_decoding(model):
            states()
            change()
            got = states()
        want = states()
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
        assert not torch.allclose(want, before, rtol=1e-2)
        before = want


def test_fused_modules_are_left_to_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed()
    with fast_decoding(model):
        assert in_c(monkeypatch, model)
        with fused_modules(model) as count:
            assert count > 0 and not in_c(monkeypatch, model)
        assert in_c(monkeypatch, model)


def test_a_cache_of_a_fixed_size_is_left_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed()
    with fast_decoding(model):
        assert not in_c(monkeypatch, model, StaticCache(config=model.config, max_cache_len=16))


def test_outputs_that_transformers_collects_do_not_keep_c_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for once, its hooks stay on the layers."""
    model = packed()
    with torch.inference_mode():
        model(torch.arange(4)[None], output_hidden_states=True)
    with fast_decoding(model) as problem:
        assert problem is None and in_c(monkeypatch, model)
        assert not in_c(monkeypatch, model, output_hidden_states=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_is_of_exact_classes_of_the_installed_transformers(family: str) -> None:
    network = Network(packed(FAMILIES[family].name, **OPTIONS.get(family, {})).model)
    assert len(network.decoder.layers) == 2 and network.selection is None
    assert (network.decoder.layers[-1].experts is None) == (FAMILIES[family].mixture is None)


def test_an_adapter_without_a_layer_of_these_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed()
    qgraft.attach_lora(model, r=2, target_modules="lm_head", name="head")
    with fast_decoding(model) as problem:
        assert problem is None and in_c(monkeypatch, model)
