"""fast_decoding() against transformers' own forward pass."""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import gguf
import pytest
import torch
import transformers
from decoded_in_c import assert_same, counted, logits
from gguf import GGMLQuantizationType as Q
from transformers import DynamicCache

import qgraft
from qgraft.compat import CACHE
from qgraft.kernels import native_status
from qgraft.linear import QuantizedLinear, computing
from qgraft.passes import decoding
from qgraft.passes.decoding import fast_decoding

pytestmark = pytest.mark.skipif(not native_status()[0], reason="the native kernels are not built")
KINDS = ("llama", "qwen2", "qwen3")


@pytest.fixture
def load(tiny_gguf: Callable[..., Any]) -> Callable[..., Any]:
    """A packed model of an architecture."""
    return lambda architecture="llama", **options: qgraft.load(tiny_gguf(architecture, **options).path)[0]


def attach(model: Any, name: str, scale: float = 0.1) -> None:
    qgraft.attach_lora(model, r=4, name=name)
    for key, tensor in qgraft.lora_state_dict(model, name).items():
        if "lora_B" in key:
            tensor.copy_(torch.randn(tensor.shape) * scale)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("architecture", KINDS)
def test_every_token_as_transformers_computes_it(load, random_ids, monkeypatch, architecture, threads):
    model = load(architecture)
    ids = random_ids(model, 1, 40)
    want = logits(model, ids)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with fast_decoding(model) as problem, counted(monkeypatch) as steps:
            got = logits(model, ids)
    finally:
        torch.set_num_threads(before)
    assert problem is None
    assert steps == list(range(5, 40))
    assert_same(got, want)


def test_mistral_decodes_in_c_beyond_its_window(tiny_gguf, random_ids, monkeypatch):
    """The tiny file of Llama's architecture as a folder of Mistral's: the same weights, but a sliding window."""
    tiny = tiny_gguf("llama")
    model = qgraft.load(tiny.path)[0]
    config = transformers.MistralConfig(
        **{
            **{
                key: value
                for key, value in model.config.to_dict().items()
                if key not in ("model_type", "architectures")
            },
            "sliding_window": 24,
        }
    )
    mistral = transformers.MistralForCausalLM(config).eval()
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            parent, _, leaf = path.rpartition(".")
            setattr(mistral.get_submodule(parent), leaf, module)
    mistral.load_state_dict(tiny.model.state_dict(), strict=False)
    ids = random_ids(mistral, 1, 40)
    want = logits(mistral, ids)
    with fast_decoding(mistral) as problem, counted(monkeypatch) as steps:
        got = logits(mistral, ids)
    assert problem is None
    assert steps == list(range(5, 40))
    assert_same(got, want)


@pytest.mark.parametrize("kind", [Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1, Q.Q8_0, Q.F16, Q.BF16])
def test_every_format(load, random_ids, monkeypatch, kind):
    model = load("llama", types=(kind,))
    ids = random_ids(model, 1, 12)
    want = logits(model, ids)
    with fast_decoding(model) as problem, counted(monkeypatch) as steps:
        got = logits(model, ids)
    assert (problem, len(steps)) == (None, 7)
    assert_same(got, want)


@pytest.mark.parametrize("format", ["q4_k", "q5_k", "q6_k", "chatglm-int8", "chatglm-int4"])
def test_every_other_format(load, random_ids, monkeypatch, format):
    model = load("llama", config={"hidden_size": 256, "head_dim": 64})
    for module in model.base_model.layers.modules():
        if isinstance(module, QuantizedLinear):
            module.replace(_random(format, module.packed.shape))
    ids = random_ids(model, 1, 12)
    want = logits(model, ids)
    with fast_decoding(model) as problem, counted(monkeypatch) as steps:
        got = logits(model, ids)
    assert (problem, len(steps)) == (None, 7)
    assert_same(got, want)


def _random(format: str, shape: tuple[int, int]) -> qgraft.formats.PackedTensor:
    layout = qgraft.formats.get_format(format)
    if layout.quantize is not None:
        return layout.quantize(torch.randn(shape) * 0.12)
    data = torch.from_numpy(gguf.quants.quantize((torch.randn(shape) * 0.12).numpy(), Q[format.upper()]))
    return qgraft.formats.PackedTensor(format, shape, (data,))


@pytest.mark.parametrize("threads", [1, 2])
def test_layers_that_compute_in_8_bits(load, random_ids, monkeypatch, threads):
    """A sum in another order may round a code of the next layer to its neighbour, so the two agree less closely."""
    model = load("qwen2")
    attach(model, "law")
    ids = random_ids(model, 1, 20)
    exact = logits(model, ids)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    with computing(model, "int8"), fast_decoding(model) as problem, counted(monkeypatch) as steps:
        got = logits(model, ids)
    assert (problem, len(steps)) == (None, 15)
    with computing(model, "int8"):
        want = logits(model, ids)
    assert (got - want).norm() < 0.3 * (exact - want).norm()


def test_adapters_are_switched_attached_and_detached_in_one_block(load, random_ids, monkeypatch):
    def outputs(model: Any) -> list[torch.Tensor]:
        torch.manual_seed(7)
        ids, layers, found = random_ids(model, 1, 14), model.base_model.layers, []
        changes: list[Callable[[], object]] = [
            lambda: None,
            lambda: attach(model, "law"),
            lambda: attach(model, "med"),
            lambda: qgraft.use_adapter(model, {"law": 0.7, "med": -0.4}),
            lambda: qgraft.use_adapter(model, "law"),
            lambda: layers[0].self_attn.q_proj.loras["law"].lora_A.data.mul_(2),
            lambda: setattr(layers[1].mlp.up_proj.loras["law"].lora_A, "data", torch.ones(4, 64)),
            lambda: qgraft.detach_adapter(model),
            lambda: layers[0].mlp.down_proj.replace(_random("q8_0", (64, 256))),
            lambda: layers[0].input_layernorm.weight.data.neg_(),
        ]
        for change in changes:
            change()
            found.append(logits(model, ids))
        return found

    want = outputs(load())
    model = load()
    with fast_decoding(model) as problem, counted(monkeypatch) as steps:
        got = outputs(model)
    assert (problem, len(steps)) == (None, 9 * len(want))
    for mine, theirs in zip(got, want, strict=True):
        assert_same(mine, theirs)
    assert not any(torch.equal(a, b) for a, b in pairwise(want))


def test_a_switch_within_the_block_counts_from_the_next_token(load, random_ids, monkeypatch):
    model = load()
    attach(model, "law")
    ids = random_ids(model, 1, 10)

    def halfway() -> torch.Tensor:
        cache = DynamicCache(config=model.config)
        qgraft.use_adapter(model, "law")
        first = logits(model, ids[:, :8], cache=cache)
        qgraft.use_adapter(model, None)
        second = logits(model, ids[:, 8:], prompt=1, cache=cache)
        attach(model, "med", scale=0.3)
        third = logits(model, ids[:, 8:], prompt=1, cache=cache)
        qgraft.detach_adapter(model, "med")
        fourth = logits(model, ids[:, 8:], prompt=1, cache=cache)
        return torch.cat([first, second, third, fourth])

    torch.manual_seed(3)
    want = halfway()
    torch.manual_seed(3)
    with fast_decoding(model) as problem, counted(monkeypatch) as steps:
        got = halfway()
    assert (problem, steps) == (None, list(range(5, 14)))
    assert_same(got, want)


def test_the_cache_is_transformers_own_and_what_looks_at_it_stays_as_it_was(load, random_ids, monkeypatch):
    model = load("qwen3")
    ids = random_ids(model, 1, 30)

    def conversation() -> tuple[torch.Tensor, DynamicCache, torch.Tensor]:
        cache = DynamicCache(config=model.config)
        first = logits(model, ids[:, :12], cache=cache)
        second = logits(model, ids[:, 12:20], prompt=4, cache=cache)  # the next turn: a prompt on top of the cache
        kept = cache.layers[0].keys
        cache.crop(-5)
        third = logits(model, ids[:, 20:], prompt=1, cache=cache)
        return torch.cat([first, second, third]), cache, kept

    want, expected, kept = conversation()
    with fast_decoding(model), counted(monkeypatch) as steps:
        got, cache, kept_too = conversation()
    assert len(steps) == 7 + 4 + 10
    assert_same(got, want)
    assert_same(kept_too, kept)
    for layer, other in zip(cache.layers, expected.layers, strict=True):
        assert_same(layer.keys, other.keys)
        assert_same(layer.values, other.values)


def test_two_conversations_in_turns_and_room_for_more_tokens(load, random_ids, monkeypatch):
    monkeypatch.setattr(decoding, "ROOM", 7)
    model = load()
    ids = random_ids(model, 1, 60)
    want = logits(model, ids)
    with fast_decoding(model), counted(monkeypatch) as steps:
        caches = [DynamicCache(config=model.config) for _ in range(2)]
        got = [torch.cat([logits(model, ids[:, :20], cache=cache)]) for cache in caches]
        for start in (20, 40):
            for index, cache in enumerate(caches):
                part = logits(model, ids[:, start : start + 20], prompt=1, cache=cache)
                got[index] = torch.cat([got[index], part])
    assert len(steps) == 2 * 55
    for mine in got:
        assert_same(mine, want)


def test_more_tokens_than_a_buffer_holds(load, random_ids, monkeypatch):
    model = load("llama", config={"max_position_embeddings": 512})
    ids = random_ids(model, 1, decoding.ROOM + 20)
    want = logits(model, ids)
    with fast_decoding(model), counted(monkeypatch) as steps:
        got = logits(model, ids)
    assert len(steps) == decoding.ROOM + 15
    assert_same(got, want)


@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True, "temperature": 1.5}, {"num_beams": 3}])
def test_generate_gives_the_same_tokens(load, random_ids, monkeypatch, options):
    model = load("qwen2")
    ids = random_ids(model, 1, 6)

    def answer() -> torch.Tensor:
        torch.manual_seed(5)
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, min_new_tokens=30, **options)

    want = answer()
    with fast_decoding(model), counted(monkeypatch) as steps:
        got = answer()
    assert got.tolist() == want.tolist()
    assert len(steps) == (0 if "num_beams" in options else 29)
    assert answer().tolist() == want.tolist()
    assert "forward" not in vars(model.base_model)


def test_what_c_does_not_compute_is_left_to_transformers(load, random_ids, monkeypatch):
    model = load()
    two, one = random_ids(model, 2, 9), random_ids(model, 1, 9)
    hidden = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1]])

    def outputs() -> list[Any]:
        cache, found = DynamicCache(config=model.config), []
        with torch.no_grad():
            model(two[:, :8], **{CACHE: cache})
            found.append(model(two[:, 8:], **{CACHE: cache}).logits)
            cache = DynamicCache(config=model.config)
            model(one[:, :8], attention_mask=hidden[:, :8], **{CACHE: cache})
            found.append(model(one[:, 8:], attention_mask=hidden, **{CACHE: cache}).logits)
            states = model(one[:, 8:], **{CACHE: cache}, output_hidden_states=True).hidden_states
            found += [*states, model(one[:, :1]).logits]
        embedded = model.get_input_embeddings()(one[:, :1]).requires_grad_()
        model(inputs_embeds=embedded, **{CACHE: cache}).logits.sum().backward()
        return [*found, embedded.grad]

    want = outputs()
    with fast_decoding(model) as problem, counted(monkeypatch) as steps:
        got = outputs()
    assert (problem, steps) == (None, [])
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine, theirs)


def test_a_prefix_is_left_to_transformers_until_it_is_off(load, random_ids, monkeypatch):
    model = load("qwen2")
    qgraft.attach_prefix(model, pre_seq_len=4, name="p")
    attach(model, "law")
    qgraft.use_adapter(model, "p")
    ids = random_ids(model, 1, 10)
    want = logits(model, ids)
    with fast_decoding(model) as problem, counted(monkeypatch) as steps:
        assert torch.equal(logits(model, ids), want)
        assert (problem, steps) == (None, [])
        qgraft.use_adapter(model, "law")
        got = logits(model, ids)
        assert len(steps) == 5
    assert_same(got, logits(model, ids))


def test_a_row_with_its_adapter_is_decoded_in_c_and_several_are_left_to_the_layers(load, random_ids, monkeypatch):
    model = load()
    attach(model, "law")
    attach(model, "med")
    ids = random_ids(model, 2, 6)
    for names in (["law"], [None], ["law", "med"]):
        rows = ids[: len(names)]
        options = {"attention_mask": torch.ones_like(rows), "max_new_tokens": 6, "min_new_tokens": 6}
        want = model.generate(rows, adapter_names=names, **options)
        with fast_decoding(model), counted(monkeypatch) as steps:
            assert model.generate(rows, adapter_names=names, **options).tolist() == want.tolist()
        assert len(steps) == (5 if len(names) == 1 else 0)


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3", "gpt2", "nemotron", "phi3", "stablelm", "starcoder2"])
def test_other_architectures_are_refused_with_a_reason(load, random_ids, architecture):
    model = load(architecture)
    ids = random_ids(model, 1, 8)
    want = logits(model, ids)
    with fast_decoding(model) as problem:
        assert problem is not None and type(model.base_model).__name__ in problem
        assert torch.equal(logits(model, ids), want)


def test_floats_are_refused(tiny_gguf):
    with fast_decoding(tiny_gguf("llama").model) as problem:
        assert problem is not None and "packed" in problem


# ---------------------------------------------------------------- long texts, and what only shows in them


SHAPE = {
    "vocab_size": 100, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 128, "pad_token_id": None,
}  # fmt: skip
ROPES = {
    "default": {},
    "linear": {"factor": 2.5},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32.0, "beta_slow": 1.0},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
    },
    "longrope": {
        "short_factor": [1.0 + i / 16 for i in range(16)], "long_factor": [2.0 + i for i in range(16)],
        "original_max_position_embeddings": 16, "factor": 4.0,
    },
}  # fmt: skip


def packed(kind: str, **options: Any) -> Any:
    """A packed model of a class of transformers, with weights large enough that every token moves the logits."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SHAPE, **options})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(4)
    return qgraft.quantize(model, "q8_0") or model


@pytest.mark.spread(7)
@pytest.mark.parametrize("prompt", [3, 24])
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_every_rotation_beyond_the_length_it_was_made_for(random_ids, monkeypatch, kind, rope, prompt):
    """Tokens from within the original 16 positions, or for "dynamic" 20, and from far beyond them."""
    options = {"max_position_embeddings": 20} if rope == "dynamic" else {}
    model = packed(kind, rope_parameters={"rope_type": rope, "rope_theta": 1e4, **ROPES[rope]}, **options)
    ids = random_ids(model, 1, 60)
    want = logits(copy.deepcopy(model), ids, prompt)  # "dynamic" goes on from the longest text there was
    with fast_decoding(model) as problem, counted(monkeypatch) as steps:
        got = logits(model, ids, prompt)
    assert (problem, steps) == (None, list(range(prompt, 60)))
    assert_same(got, want)


WINDOWS = {
    "Mistral": {"sliding_window": 12},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 2},
    "Qwen3": {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 2},
}


@pytest.mark.spread(6)
@pytest.mark.parametrize("prompt", [5, 11, 30])
@pytest.mark.parametrize("with_config", [True, False], ids=["sliding cache", "whole cache"])
@pytest.mark.parametrize("kind", WINDOWS)
def test_beyond_a_window_c_decodes_as_transformers(random_ids, monkeypatch, kind, with_config, prompt):
    model = packed(kind, **WINDOWS[kind])
    ids = random_ids(model, 1, 40)

    def cache() -> DynamicCache:
        return DynamicCache(config=model.config) if with_config else DynamicCache()

    want = logits(model, ids, prompt, cache())
    with fast_decoding(model) as problem, counted(monkeypatch) as steps:
        got = logits(model, ids, prompt, cache())
    assert problem is None
    assert steps == list(range(prompt, 40))
    assert_same(got, want)


def test_scaled_positions_are_refused(random_ids):
    """Ministral 3 is made of Llama's parts, and scales queries by their positions beyond the original 16."""
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "llama_4_scaling_beta": 0.5, "mscale": 1.0, "mscale_all_dim": 1.0}
    model = packed("Ministral3", rope_parameters={**ROPES["yarn"], **rope}, sliding_window=None)
    ids = random_ids(model, 1, 60)
    want = logits(model, ids)
    with fast_decoding(model) as problem:
        assert problem is not None and problem.startswith("Ministral3Model: it decodes LlamaModel, MistralModel")
        assert torch.equal(logits(model, ids), want)


# ---------------------------------------------------------------- more than one user


@pytest.mark.spread(1)
@pytest.mark.parametrize("threads", [1, 2])
def test_eight_threads_each_with_its_adapter_and_its_conversation(load, random_ids, monkeypatch, threads):
    model = load("qwen2")
    names = ["law", "med", "tax", None]
    for name in names[:3]:
        attach(model, name, scale=0.3)
    qgraft.attach_prefix(model, pre_seq_len=3, name="prefix")
    prompts = [random_ids(model, 1, 5 + index % 3, index) for index in range(8)]
    users = [[*names, "prefix"][index % 5] for index in range(8)]

    def answer(index: int) -> torch.Tensor:
        told = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        ids, user = prompts[index], users[index]
        return torch.stack(
            model.generate(ids, attention_mask=torch.ones_like(ids), adapter_names=[user], **told).logits
        )

    wrong: list[int] = []
    before = torch.get_num_threads()
    torch.set_num_threads(threads)  # new threads take it over
    with fast_decoding(model) as problem, counted(monkeypatch) as steps:
        want = [answer(index) for index in range(8)]
        alone = len(steps)

        def ask(index: int) -> None:
            for _ in range(12):
                with fast_decoding(model):
                    wrong.extend([index] * (not torch.equal(answer(index), want[index])))

        try:
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(ask, range(8)))
        finally:
            torch.set_num_threads(before)
    assert (problem, wrong) == (None, [])
    assert alone > 20 and len(steps) == 13 * alone  # all but the prefix's tokens
    assert not any(torch.equal(a, b) for a, b in pairwise(want))


def test_the_last_user_puts_the_forward_pass_back(load, random_ids, monkeypatch):
    model = load()
    ids = random_ids(model, 1, 8)
    want = logits(model, ids)
    first, second = fast_decoding(model), fast_decoding(model)
    with counted(monkeypatch) as steps:
        assert first.__enter__() is None and second.__enter__() is None
        first.__exit__(None, None, None)
        assert_same(logits(model, ids), want)
        assert len(steps) == 3
        second.__exit__(None, None, None)
        assert torch.equal(logits(model, ids), want)
        assert len(steps) == 3
    assert "forward" not in vars(model.base_model)


def test_a_copy_decodes_by_its_own_weights(load, random_ids, monkeypatch):
    model = load()
    ids = random_ids(model, 1, 8)
    with fast_decoding(model), counted(monkeypatch) as steps:
        other = copy.deepcopy(model)
        for layer in other.base_model.layers:
            layer.mlp.down_proj.replace(_random("q8_0", (64, 256)))
        got = logits(other, ids)
        assert steps == []
        assert not torch.allclose(got, logits(model, ids), rtol=1e-2, atol=1e-2)
    with fast_decoding(other):
        assert_same(logits(other, ids), got)
