"""Prefixes on a model: what is trained, what is active, and the same result by every way of computing it."""

import copy
import gc
import re
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache

import qgraft
from qgraft.adapters.attach import attach_lora, detach_adapter, find_targets
from qgraft.adapters.attach_prefix import attach_encoder, attach_prefix, counted_positions, prefixes_of
from qgraft.adapters.base import adapter_names, find_adapter, selection_of
from qgraft.adapters.choose import active_adapters, adapters_off, use_adapter
from qgraft.adapters.prefix import Geometry, PrefixConfig, PrefixEncoder, encoder_of
from qgraft.adapters.states import lora_state_dict
from qgraft.attention import PREFIX
from qgraft.compat import CACHE, cap_scores, hide_what_comes, reads_ahead_by_prefix
from qgraft.data.batches import IGNORED, collate
from qgraft.data.tokenizing import Sample
from qgraft.errors import AdapterError, OptionError, UnsupportedError
from qgraft.linear import QuantizedLinear
from qgraft.models.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration
from qgraft.models.chatglm2 import ChatGLM2Config, ChatGLM2ForConditionalGeneration
from qgraft.passes.decoder import padding_free
from qgraft.passes.limits import sample_limit
from qgraft.passes.loss import batch_loss

Maker = Callable[..., Any]
SHAPE = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": None,
}  # fmt: skip
GLM = {"vocab_size": 160, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 4, "inner_hidden_size": 48,
       "max_sequence_length": 64, "bos_token_id": 154, "eos_token_id": 155, "tie_word_embeddings": False}  # fmt: skip
GLM2 = {"num_layers": 2, "padded_vocab_size": 97, "hidden_size": 32, "ffn_hidden_size": 48, "kv_channels": 8,
        "num_attention_heads": 4, "multi_query_group_num": 2, "seq_length": 64, "eos_token_id": None}  # fmt: skip
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**SHAPE, sliding_window=4)),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**SHAPE, head_dim=16, sliding_window=4)
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=0, bos_token_id=1,
            eos_token_id=None, loss_type="ForCausalLM", attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
        )
    ),
    "chatglm": lambda: ChatGLMForConditionalGeneration(ChatGLMConfig(**GLM)),
    "chatglm2": lambda: ChatGLM2ForConditionalGeneration(ChatGLM2Config(**GLM2)),
}  # fmt: skip


def tiny(architecture: str = "llama") -> Any:
    """A random model whose weights are large enough that every part of it moves the logits."""
    torch.manual_seed(0)
    model = MODELS[architecture]().eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.15)
    cap_scores(model)
    return model


def enable_checkpointing(model: Any) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def ids_for(model: Any, rows: int = 2, tokens: int = 9, seed: int = 1) -> Tensor:
    """Random ids, with the end of the context in its place where the model needs one."""
    ids = torch.randint(3, 97, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    if isinstance(model, ChatGLMForConditionalGeneration):
        ids[:, tokens // 2 : tokens // 2 + 2] = torch.tensor([model.marks.gmask, model.marks.sop])
    return ids


def prompts_for(model: Any, rows: int = 2, tokens: int = 7, seed: int = 1) -> Tensor:
    ids = torch.randint(3, 97, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    if isinstance(model, ChatGLMForConditionalGeneration):
        ids[:, -2:] = torch.tensor([model.marks.gmask, model.marks.sop])
    return ids


@torch.no_grad()
def logits(model: Any, ids: Tensor, **inputs: Any) -> Tensor:
    return model(ids, **inputs).logits


def generate(model: Any, ids: Tensor, **options: Any) -> Tensor:
    fixed = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(ids, **{"attention_mask": torch.ones_like(ids), **fixed, **options})


def gradients(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    return {key: p.grad.clone() for key, p in encoder_of(find_adapter(model, name)).named_parameters()}


def same_gradients(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert got.keys() == expected.keys()
    for key, grad in got.items():
        assert bool(expected[key].any())
        torch.testing.assert_close(grad, expected[key], rtol=1e-4, atol=tolerance * float(expected[key].abs().max()))


# ---------------------------------------------------------------- the network


@pytest.mark.parametrize("layout", ["chatglm", "chatglm2", "peft"])
@pytest.mark.parametrize("projection", [False, True])
def test_ids_become_all_keys_and_values_of_their_tokens(layout: str, projection: bool) -> None:
    geometry, hidden = Geometry((0, 1, 2), 2, 8), 20
    encoder = PrefixEncoder(PrefixConfig(5, projection, layout=layout), geometry, hidden).eval()
    ids = torch.tensor([[0, 1, 2, 3, 4], [4, 4, 0, 1, 2]])
    out = encoder(ids)
    assert out.shape == (2, 5, 2 * 3 * 2 * 8)
    weights = {name: p.detach() for name, p in encoder.named_parameters()}
    rows = weights["embedding.weight"]
    if projection:
        width, middle = {"chatglm": (20, 20), "chatglm2": (96, 20), "peft": (16, 16)}[layout]
        assert [list(w.shape) for w in weights.values()] == [[5, width], [middle, width], [middle], [96, middle], [96]]
        h = torch.tanh(rows @ weights["trans.0.weight"].T + weights["trans.0.bias"])
        rows = h @ weights["trans.2.weight"].T + weights["trans.2.bias"]
    else:
        assert list(weights) == ["embedding.weight"]
    torch.testing.assert_close(out, rows[ids])
    pairs = encoder.key_values()
    assert pairs.shape == (6, 2, 5, 8)
    for layer in range(3):  # the keys of a layer, head by head, and then its values
        at = layer * 32
        torch.testing.assert_close(pairs[2 * layer].transpose(0, 1).flatten(1), rows[:, at : at + 16])
        torch.testing.assert_close(pairs[2 * layer + 1].transpose(0, 1).flatten(1), rows[:, at + 16 : at + 32])


@pytest.mark.parametrize(
    ("layout", "hidden", "kv_heads", "total"),
    [("chatglm", 4096, 32, 29_360_128), ("chatglm2", 4096, 2, 1_835_008)],
)
def test_sizes_of_the_releases(layout: str, hidden: int, kv_heads: int, total: int) -> None:
    with torch.device("meta"):
        encoder = PrefixEncoder(PrefixConfig(128, layout=layout), Geometry(tuple(range(28)), kv_heads, 128), hidden)
    assert sum(p.numel() for p in encoder.parameters()) == total


def test_impossible_options_are_refused_all_at_once() -> None:
    with pytest.raises(OptionError) as caught:
        PrefixConfig(0, True, 0, 1.0)
    for part in ("pre_seq_len=0: expected a whole number from 1", "prefix_dropout=1.0", "prefix_hidden_size=0"):
        assert part in str(caught.value)
    with pytest.raises(OptionError, match="'glm'"):
        PrefixConfig(layout="glm")


# ---------------------------------------------------------------- what is trained and what stays


@pytest.mark.parametrize("architecture", MODELS)
def test_only_the_prefix_trains_and_taking_it_off_leaves_the_model_as_it_was(architecture: str) -> None:
    model = tiny(architecture)
    ids, before = ids_for(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    base, implementation = logits(model, ids), model.config._attn_implementation
    modules, hooks = {name: id(m) for name, m in model.named_modules()}, len(model.base_model._forward_pre_hooks)
    config = attach_prefix(model, 4, name="a")
    assert (config.pre_seq_len, config.layout) == (4, architecture if "glm" in architecture else "peft")
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert [name.rpartition(".prefixes.")[2] for name in trained] == ["encoders.a.embedding.weight"]
    assert find_adapter(model, "a").size == model.get_parameter(trained[0]).numel()
    assert active_adapters(model) == {"a": 1.0} and find_adapter(model, "a").is_prefix
    optimizer = torch.optim.SGD([model.get_parameter(trained[0])], lr=0.1)
    model.train()
    first = model(ids, labels=ids).loss
    first.backward()
    optimizer.step()
    model.eval()
    assert not torch.allclose(logits(model, ids), base)
    with adapters_off(model):
        # capped scores are computed otherwise than by the model's own attention, in another order of additions
        torch.testing.assert_close(logits(model, ids), base, rtol=1e-5, atol=5e-5)
        assert (implementation != "sdpa") or torch.equal(logits(model, ids), base)
    detach_adapter(model, "a")
    assert torch.equal(logits(model, ids), base) and adapter_names(model) == []
    assert {name: id(m) for name, m in model.named_modules()} == modules
    assert len(model.base_model._forward_pre_hooks) == hooks and model.config._attn_implementation == implementation
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_base_model_alone_may_carry_it() -> None:
    model, inner = tiny(), tiny().model
    ids = ids_for(model)
    attach_prefix(model, 4, name="a")
    attach_encoder(inner, "a", PrefixConfig(4), find_adapter(model).state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model.lm_head(inner(ids).last_hidden_state), logits(model, ids))
        torch.testing.assert_close(model.lm_head(inner(ids, None).last_hidden_state), logits(model, ids))


def test_prefixes_are_chosen_like_loras() -> None:
    model = tiny()
    ids, base = ids_for(model), logits(model, ids_for(model))
    attach_prefix(model, 4, name="a")
    attach_prefix(model, 6, True, name="b")
    assert adapter_names(model) == ["a", "b"] and active_adapters(model) == {"b": 1.0}
    assert {n.split(".")[3] for n, p in model.named_parameters() if p.requires_grad} == {"b"}
    b = logits(model, ids)
    use_adapter(model, "a")
    assert {n.split(".")[3] for n, p in model.named_parameters() if p.requires_grad} == {"a"}
    a = logits(model, ids)
    use_adapter(model, None)
    assert torch.equal(logits(model, ids), base) and not torch.allclose(a, b)
    for weights in ({"a": 0.5}, {"b": 1.0, "a": 2.0}):
        with pytest.raises(OptionError, match=r"weights of prefixes: got a=(0.5|2.0), expected 1"):
            use_adapter(model, weights)
    assert torch.equal(logits(model, ids), base)
    detach_adapter(model, "b")
    use_adapter(model, "a")
    assert torch.equal(logits(model, ids), a)
    with pytest.raises(AdapterError, match="no adapter named 'b'; attached: a"):
        detach_adapter(model, "b")
    with pytest.raises(AdapterError, match="'a' is already attached"):
        attach_prefix(model, 4, name="a")


def test_a_new_value_of_the_tensors_counts_at_once() -> None:
    model = tiny()
    attach_prefix(model, 4)
    ids, before = ids_for(model), logits(model, ids_for(model))
    generate(model, ids)
    encoder_of(find_adapter(model)).embedding.weight.data.add_(1.0)
    assert not torch.allclose(logits(model, ids), before)


def test_linear_layers_of_a_projection_are_no_targets_of_loras() -> None:
    model = tiny()
    targets = find_targets(model, "all-linear")
    attach_prefix(model, 4, True, name="a")
    assert find_targets(model, "all-linear") == targets
    attach_lora(model, 2, name="law")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".loras.law." in name for name in trained)


# ---------------------------------------------------------------- one prefix, computed in several ways


def make_samples(model: Any, count: int = 4) -> list[Sample]:
    samples = []
    for number in range(count):
        ids = ids_for(model, 1, 5 + 3 * number, seed=number)[0].tolist()
        prompt = len(ids) // 2 + 2
        samples.append(Sample(ids, [IGNORED] * prompt + ids[prompt:], f"rows:{number}"))
    return samples


def own_loss(model: Any, samples: Sequence[Sample]) -> Tensor:
    total = torch.zeros(())
    for sample in samples:
        labels = torch.tensor([sample.labels])
        total = total + model(torch.tensor([sample.input_ids]), labels=labels).loss * (labels[:, 1:] != IGNORED).sum()
    return total


@pytest.mark.spread(8)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("architecture", MODELS)
def test_packed_samples_equal_single_ones(architecture: str, projection: bool, checkpointing: bool) -> None:
    model = tiny(architecture)
    attach_prefix(model, 4, projection, prefix_dropout=0.0)
    samples = make_samples(model)
    expected = own_loss(model, samples)
    expected.backward()
    reference = gradients(model)
    if checkpointing:
        model.train()
        enable_checkpointing(model)
    for implementation in ("qgraft_samples", PREFIX):
        model.zero_grad()
        with padding_free(model, samples) as problem:
            assert problem is None
            assert model.config._attn_implementation == (PREFIX if architecture == "gemma2" else "qgraft_samples")
            if implementation == PREFIX:  # a mask instead
                model.set_attn_implementation(PREFIX)
            total = batch_loss(model, collate(samples))
            total.backward()
        torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
        same_gradients(gradients(model), reference)
    assert model.config._attn_implementation == PREFIX


@pytest.mark.parametrize("architecture", MODELS)
def test_checkpointing_and_several_passes_leave_the_gradients(architecture: str) -> None:
    model = tiny(architecture)
    attach_prefix(model, 4, True, prefix_dropout=0.3)
    batches = [ids_for(model, seed=seed) for seed in range(3)]
    model.train()
    torch.manual_seed(5)
    for ids in batches:  # one at a time
        model(ids, labels=ids).loss.backward()
    reference = gradients(model)

    def all_at_once() -> dict[str, Tensor]:
        """Several passes before the way back."""
        model.zero_grad()
        torch.manual_seed(5)
        sum(model(ids, labels=ids).loss for ids in batches).backward()
        return gradients(model)

    same_gradients(all_at_once(), reference)
    enable_checkpointing(model)
    same_gradients(all_at_once(), reference)


def test_dropout_is_drawn_once_for_each_pass_and_never_in_evaluation() -> None:
    model = tiny()
    attach_prefix(model, 4, prefix_dropout=0.5, name="a")
    ids = ids_for(model)
    assert torch.equal(logits(model, ids), logits(model, ids))
    model.train()
    torch.manual_seed(3)
    dropped = logits(model, ids)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    values = nn.functional.dropout(encoder_of(find_adapter(model)).embedding.weight, 0.5)
    assert torch.equal(torch.get_rng_state(), state)  # nothing else was drawn
    attach_encoder(model, "b", PrefixConfig(4, prefix_dropout=0.0), {"embedding.weight": values})
    assert torch.equal(logits(model, ids), dropped)
    use_adapter(model, "a")
    assert not torch.allclose(logits(model, ids), logits(model, ids))


@pytest.mark.parametrize("architecture", MODELS)
def test_a_cache_changes_nothing(architecture: str) -> None:
    model = tiny(architecture)
    attach_prefix(model, 4)
    ids = prompts_for(model)
    expected = generate(model, ids, use_cache=False)
    assert torch.equal(generate(model, ids), expected)
    assert torch.equal(generate(model, ids, cache_implementation="static"), expected)
    beams = {"num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(generate(model, ids, **beams), generate(model, ids, use_cache=False, **beams))
    with adapters_off(model):
        assert not torch.equal(generate(model, ids), expected)


def test_positions_go_on_from_a_cache_in_parts() -> None:
    model = tiny()
    attach_prefix(model, 4)
    ids, cache = ids_for(model), DynamicCache()
    parts = [logits(model, ids[:, start : start + 3], **{CACHE: cache}) for start in (0, 3, 6)]
    torch.testing.assert_close(torch.cat(parts, dim=1), logits(model, ids), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        logits(model, ids, position_ids=torch.arange(9)[None]), logits(model, ids), rtol=1e-4, atol=1e-5
    )
    embedded = model.get_input_embeddings()(ids)
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=embedded).logits, logits(model, ids))


@pytest.mark.parametrize("architecture", MODELS)
def test_left_padding_changes_nothing(architecture: str) -> None:
    model = tiny(architecture)
    attach_prefix(model, 4)
    ids = prompts_for(model)
    padded = torch.cat([torch.full((2, 3), 0 if architecture != "chatglm" else 3), ids], dim=1)
    padded[1, :3] = prompts_for(model, 2, 7, seed=9)[1, :3]
    mask = torch.ones_like(padded)
    mask[0, :3] = 0
    got = generate(model, padded, attention_mask=mask)
    assert torch.equal(got[:1, 10:], generate(model, ids[:1])[:, 7:])
    assert torch.equal(got[1:], generate(model, padded[1:]))


def test_the_network_is_evaluated_once_while_an_answer_is_generated() -> None:
    model = tiny()
    attach_prefix(model, 4, True)
    passes = []
    encoder_of(find_adapter(model)).trans.register_forward_hook(lambda *_: passes.append(1))
    generate(model, ids_for(model))
    assert len(passes) == 1 and selection_of(model).now().evaluated is None
    logits(model, ids_for(model))
    assert len(passes) == 2


# ---------------------------------------------------------------- together


def with_both(architecture: str = "llama") -> Any:
    """A LoRA "law", prefixes "a" (short) and "b" (long, with projection)."""
    model = tiny(architecture)
    attach_lora(model, 2, name="law")
    for lora in find_adapter(model, "law").parts.values():
        nn.init.normal_(lora.lora_B, std=0.1)
    attach_prefix(model, 3, name="a")
    attach_prefix(model, 6, True, name="b")
    return model


MIXED = ["b", None, "law", "a", "b", None]


def each_alone(model: Any, names: Sequence[str | None], run: Callable[[int], Tensor]) -> Tensor:
    rows = []
    for row, name in enumerate(names):
        use_adapter(model, name)
        rows.append(run(row))
    return torch.cat(rows)


@pytest.mark.spread(2)
@pytest.mark.parametrize("architecture", [name for name in MODELS if name != "gpt2"])  # whose Conv1D takes no LoRA
def test_each_row_is_what_it_is_alone(architecture: str) -> None:
    model = with_both(architecture)
    ids = ids_for(model, len(MIXED))
    expected = each_alone(model, MIXED, lambda row: logits(model, ids[row : row + 1]))
    torch.testing.assert_close(logits(model, ids, adapter_names=MIXED), expected, rtol=1e-4, atol=2e-5)
    prompts = prompts_for(model, len(MIXED))
    expected = each_alone(model, MIXED, lambda row: generate(model, prompts[row : row + 1], num_beams=2))
    assert torch.equal(generate(model, prompts, adapter_names=MIXED, num_beams=2), expected)
    one = logits(model, ids, adapter_names=["a"] * 6)
    use_adapter(model, "a")
    assert torch.equal(one, logits(model, ids))


def test_rows_of_the_base_and_of_a_lora_leave_prefixes_aside() -> None:
    model = with_both()
    ids, names = ids_for(model, 3), [None, "law", None]
    expected = each_alone(model, names, lambda row: logits(model, ids[row : row + 1]))
    use_adapter(model, "a")
    torch.testing.assert_close(logits(model, ids, adapter_names=names), expected, rtol=1e-4, atol=1e-5)


def test_rows_that_are_padded_see_their_own_prefix() -> None:
    model = with_both()
    ids, mask = ids_for(model, 3), torch.ones(3, 9, dtype=torch.long)
    mask[:, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"attention_mask": mask, "position_ids": positions}
    got = logits(model, ids, adapter_names=["b", None, "a"], **inputs)[:, 4:]
    expected = each_alone(model, ["b", None, "a"], lambda row: logits(model, ids[row : row + 1, 4:]))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_gradients_of_mixed_rows_are_the_sum_over_rows_alone() -> None:
    model = with_both()
    ids = ids_for(model, len(MIXED))
    weights = torch.randn(len(MIXED), 9, 97)
    use_adapter(model, {"law": 1.0, "a": 1.0, "b": 1.0})
    (model(ids, adapter_names=MIXED).logits * weights).sum().backward()
    got = {name: gradients(model, name) for name in ("a", "b")}
    model.zero_grad()
    for row in (row for row, name in enumerate(MIXED) if name is not None):  # nothing trains in the others
        name = MIXED[row]
        (model(ids[row : row + 1], adapter_names=[name]).logits * weights[row]).sum().backward()
    for name in ("a", "b"):
        same_gradients(got[name], gradients(model, name))


def test_a_lora_and_a_prefix_are_active_at_once() -> None:
    model = with_both()
    ids, plain = ids_for(model), tiny()
    for path, lora in find_adapter(model, "law").parts.items():
        plain.get_submodule(path).weight.data += 0.5 * lora.delta().detach()
    attach_encoder(plain, "a", encoder_of(find_adapter(model, "a")).config, find_adapter(model, "a").state_dict())
    use_adapter(model, {"law": 0.5, "a": 1.0})
    torch.testing.assert_close(logits(model, ids), logits(plain, ids), rtol=1e-4, atol=1e-5)
    assert torch.equal(generate(model, ids), generate(plain, ids))
    trained = {
        name.split(".")[-3 if ".loras." in name else 3] for name, p in model.named_parameters() if p.requires_grad
    }
    assert trained == {"loras", "a"}


@pytest.mark.parametrize("architecture", MODELS)
def test_several_prefixes_stand_one_after_another(architecture: str) -> None:
    model = tiny(architecture)
    attach_prefix(model, 3, name="a")
    attach_prefix(model, 5, name="b")
    values = torch.cat([find_adapter(model, name).state_dict()["embedding.weight"] for name in "ab"])
    attach_encoder(model, "both", PrefixConfig(8, layout=encoder_of(find_adapter(model, "a")).config.layout),
                   {"embedding.weight": values})  # fmt: skip
    ids, expected = ids_for(model), logits(model, ids_for(model))
    use_adapter(model, {"a": 1.0, "b": 1.0})
    assert torch.equal(logits(model, ids), expected)


def test_adapters_of_a_part_join_those_of_the_model() -> None:
    model = tiny()
    attach_prefix(model.model, 4, name="a")
    a = logits(model, ids_for(model))
    attach_lora(model, 2, name="law")
    attach_prefix(model, 5, name="b")
    assert adapter_names(model) == ["a", "law", "b"]
    assert len([module for module in model.modules() if type(module).__name__ == "Prefixes"]) == 1
    use_adapter(model, "a")
    assert torch.equal(logits(model, ids_for(model)), a)
    detach_adapter(model)
    assert adapter_names(model) == [] and model.config._attn_implementation == "sdpa"


def test_a_copy_is_switched_on_its_own_and_a_model_is_freed() -> None:
    model = with_both()
    ids, other = ids_for(model), copy.deepcopy(model)
    expected = logits(model, ids)
    encoder_of(find_adapter(other, "b")).trans[2].bias.data.add_(1.0)
    assert not torch.allclose(logits(other, ids), expected)
    use_adapter(other, "a")
    detach_adapter(other, "b")
    assert torch.equal(logits(model, ids), expected) and active_adapters(model) == {"b": 1.0}
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


# ---------------------------------------------------------------- packed weights


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_on_a_quantized_file(architecture: str, tiny_gguf: Maker, random_ids: Maker) -> None:
    file = tiny_gguf(architecture)
    model, float_model = qgraft.load(file.path)[0], copy.deepcopy(file.model)
    assert any(isinstance(module, QuantizedLinear) for module in model.modules())
    attach_prefix(model, 4, True, prefix_dropout=0.0)
    attach_encoder(float_model, "same", encoder_of(find_adapter(model)).config, find_adapter(model).state_dict())
    compare(model, float_model, random_ids(model))


@pytest.mark.parametrize(
    ("architecture", "format"),
    [("chatglm", "chatglm-int4"), ("chatglm2", "chatglm-int4"), ("chatglm2", "chatglm-int8")],
)
def test_on_quantized_chatglm(architecture: str, format: str) -> None:
    model = tiny(architecture)
    qgraft.quantize(model, format)
    float_model = tiny(architecture)
    for path, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            float_model.get_submodule(path).weight.data = layer.dequantize()
    attach_prefix(model, 4, True, prefix_dropout=0.0)
    attach_encoder(float_model, "same", encoder_of(find_adapter(model)).config, find_adapter(model).state_dict())
    compare(model, float_model, ids_for(model))


def compare(packed: Any, plain: Any, ids: Tensor) -> None:
    losses = [model(ids, labels=ids).loss for model in (packed, plain)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    same_gradients(gradients(packed), gradients(plain), 1e-4)


def test_a_half_precision_base_keeps_a_float32_prefix() -> None:
    model = tiny().bfloat16()
    attach_prefix(model, 4, True)
    assert {p.dtype for p in encoder_of(find_adapter(model)).parameters()} == {torch.float32}
    out = model(ids_for(model), labels=ids_for(model))
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16 and {g.dtype for g in gradients(model).values()} == {torch.float32}


# ---------------------------------------------------------------- tensors


@pytest.mark.parametrize("projection", [False, True])
def test_the_state_is_all_there_is(projection: bool) -> None:
    model, other = tiny(), tiny()
    attach_prefix(model, 4, projection, name="a")
    state = find_adapter(model).state_dict()
    parts = [f"trans.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")] if projection else []
    assert list(state) == ["embedding.weight", *parts]
    assert all(torch.equal(tensor, find_adapter(model, "a").state_dict()[name]) for name, tensor in state.items())
    attach_encoder(other, "b", encoder_of(find_adapter(model)).config, state, encoder_of(find_adapter(model)).geometry)
    assert torch.equal(logits(other, ids_for(model)), logits(model, ids_for(model)))
    state["embedding.weight"].zero_()  # shares memory with the model, and not with the other one
    assert (
        not encoder_of(find_adapter(model)).embedding.weight.any()
        and encoder_of(find_adapter(other)).embedding.weight.any()
    )
    attach_lora(model, 2, name="law")
    assert list(find_adapter(model, "law").state_dict()) == list(lora_state_dict(model, "law"))
    with pytest.raises(AdapterError, match="'law' is a LoRA, expected a prefix"):
        encoder_of(find_adapter(model, "law"))
    with pytest.raises(AdapterError, match="which adapter"):
        find_adapter(model)


def test_tensors_that_do_not_fit_are_all_named_and_nothing_is_attached() -> None:
    model = tiny()
    attach_prefix(model, 4, True, name="a")
    state = find_adapter(model).state_dict()
    wrong = {**state, "trans.4.bias": torch.zeros(3), "embedding.weight": torch.zeros(5, 16)}
    del wrong["trans.2.bias"]
    with pytest.raises(AdapterError) as caught:
        attach_encoder(model, "b", PrefixConfig(4, True), wrong)
    for part in (
        "does not fit 3 layers of 2 key heads of 8, pre_seq_len 4, prefix_projection True",
        "embedding.weight: got [5, 16], expected [4, 16]", "trans.2.bias: missing, expected [96]",
        "trans.4.bias: [3], expected no such tensor",
    ):  # fmt: skip
        assert part in str(caught.value)
    with pytest.raises(AdapterError, match="trained on 2 layers of 3 key heads of 8; this model has 3 layers of 2"):
        attach_encoder(model, "b", PrefixConfig(4, True), state, Geometry((0, 1), 3, 8))
    with pytest.raises(AdapterError, match="has the layout 'chatglm'; this model's is 'peft'"):
        attach_encoder(model, "b", PrefixConfig(4, True, layout="chatglm"), state)
    assert adapter_names(model) == ["a"]


# ---------------------------------------------------------------- refusals


def refused(model: Any, message: str) -> None:
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(UnsupportedError, match=message):
        attach_prefix(model, 4)
    assert [name for name, _ in model.named_modules()] == names and adapter_names(model) == []


def test_an_encoder_is_refused() -> None:
    config = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
              "intermediate_size": 48}  # fmt: skip
    refused(transformers.BertModel(transformers.BertConfig(**config)), "is no decoder: it attends in both directions")


def test_an_encoder_with_a_decoder_is_refused() -> None:
    config = transformers.BartConfig(
        vocab_size=97, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64,
    )  # fmt: skip
    refused(transformers.BartForConditionalGeneration(config), "BartModel: it is no decoder")


def test_attention_of_its_own_is_refused() -> None:
    config = transformers.BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4)
    refused(
        transformers.BloomForCausalLM(config).eval(), "BloomModel: it has attention of its own|does not take a prefix"
    )
    refused(nn.Sequential(nn.Linear(3, 3)), "Sequential: expected a model of transformers")


def test_attention_that_is_no_softmax_of_the_keys_is_refused() -> None:
    """Sinks: a number for each head that takes its share of the softmax and has no value."""
    config = transformers.GptOssConfig(
        vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    before = model.config._attn_implementation
    refused(model, "qgraft_prefix attends without s_aux")
    assert model.config._attn_implementation == before


def test_keys_and_values_of_different_widths_are_refused() -> None:
    config = transformers.DeepseekV3Config(
        vocab_size=97, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8, v_head_dim=8,
        qk_nope_head_dim=8, first_k_dense_replace=1, max_position_embeddings=64,
    )  # fmt: skip
    refused(transformers.DeepseekV3ForCausalLM(config).eval(), re.escape("different shapes: (2, 8), (2, 16)"))


@pytest.mark.parametrize("length", [0, -1, 64, 1000])
def test_lengths_that_leave_no_room_are_refused(length: int) -> None:
    for architecture in ("llama", "gpt2", "chatglm", "chatglm2"):
        with pytest.raises(
            OptionError, match="a whole number from 1 " if length < 1 else "leaves no room: .* is 64 tokens"
        ):
            attach_prefix(tiny(architecture), length)


def test_the_prefix_takes_room_from_the_context_where_it_is_counted() -> None:
    for architecture, left in (("gpt2", 57), ("chatglm2", 64)):
        model = tiny(architecture)
        assert sample_limit(model, 1000) == 64
        attach_prefix(model, 7)
        assert (counted_positions(model), sample_limit(model, 1000), sample_limit(model, 20)) == (64 - left, left, 20)
        use_adapter(model, None)
        assert sample_limit(model, 1000) == 64
    with pytest.raises(OptionError, match="a prefix of 63 tokens leaves no room for a sample"):
        sample_limit(tiny("gpt2"), 1000, reserved=63)


def test_another_attention_that_knows_no_prefix_is_an_error_not_a_no_op() -> None:
    model = tiny()
    attach_prefix(model, 4)
    model.set_attn_implementation("eager")
    with pytest.raises(UnsupportedError, match="the attention was set to 'eager', which knows none"):
        logits(model, ids_for(model))
    with adapters_off(model):
        assert logits(model, ids_for(model)).shape[-1] == 97


def test_what_needs_a_delta_says_that_a_prefix_has_none(tiny_gguf: Maker) -> None:
    model, _ = qgraft.load(tiny_gguf("llama").path)
    attach_lora(model, 2, name="law")
    attach_prefix(model, 4, name="a")
    for action in (
        lambda: qgraft.merge(model, method="nearest"),
        lambda: qgraft.combine(model, {"law": 1.0, "a": 1.0}, "new"),
        lambda: qgraft.lora_state_dict(model, "a"),
    ):
        with pytest.raises(AdapterError, match=r"'a' is a prefix .*change no weight, so there is no delta"):
            action()
    assert adapter_names(model) == ["law", "a"]


def test_attention_in_some_layers_only() -> None:
    """LFM2: convolutions in the others."""
    config = transformers.Lfm2Config(**{**SHAPE, "layer_types": ["conv", "full_attention", "conv"]})
    torch.manual_seed(0)
    model = transformers.Lfm2ForCausalLM(config).eval()
    ids, base = ids_for(model), logits(model, ids_for(model))
    attach_prefix(model, 4)
    assert prefixes_of(model).geometry == Geometry((1,), 2, 8)
    assert not torch.allclose(logits(model, ids), base)
    assert torch.equal(generate(model, ids), generate(model, ids, use_cache=False))


def test_no_token_sees_what_comes_where_layers_have_a_mask_of_their_own() -> None:
    """Doge's, in old releases, is given the prefix's as if there were none; then it is refused."""
    torch.manual_seed(0)
    model = transformers.DogeForCausalLM(transformers.DogeConfig(**SHAPE)).eval()
    hide_what_comes(model)
    if reads_ahead_by_prefix(model.config):
        with pytest.raises(UnsupportedError, match="would see those behind them"):
            attach_prefix(model, pre_seq_len=3)
        return
    attach_prefix(model, pre_seq_len=3)
    with torch.no_grad():
        one, other = model(torch.tensor([[7, 8, 9, 10], [7, 8, 9, 11]])).logits[:, 2]
    assert torch.equal(one, other)
