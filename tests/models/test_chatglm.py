"""ChatGLM-6B against the numbers of its original code (tests/golden/chatglm_*), and against itself: one sample computed in
several ways. Every tensor of the golden folders is compared: a test names those it reads, and together they are all."""

import copy
import json
import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DynamicCache

from qgraft.adapters.attach import attach_layers, attach_lora
from qgraft.adapters.base import find_adapter
from qgraft.adapters.lora import LoraConfig
from qgraft.attention import SAMPLES
from qgraft.compat import CACHE, cache_in
from qgraft.data.batches import IGNORED, collate
from qgraft.data.tokenizing import Sample
from qgraft.formats import PackedTensor, dequantize, quantize, unpack
from qgraft.linear import QuantizedLinear
from qgraft.models.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration, rotary_tables, rotate
from qgraft.models.prefix_lm import Marks, context_positions, visible_keys
from qgraft.passes.decoder import padding_free
from qgraft.passes.loss import batch_loss

TOLERANCE = {"rtol": 0.0, "atol": 1e-4}  # that of the golden data; sums of another order differ by up to 9e-5
QUANTIZED = ("chatglm_int4", "chatglm_int8")
FOLDERS = ("chatglm_fp32", *QUANTIZED)
PACKED = [
    f"transformer.layers.0.{name}.weight"
    for name in ("attention.dense", "attention.query_key_value", "mlp.dense_4h_to_h", "mlp.dense_h_to_4h")
]
MASK, GMASK, SOP, PAD = 150, 151, 154, 3

claimed: dict[str, set[str]] = {folder: set() for folder in FOLDERS}


def reads(*keys: str, folders: tuple[str, ...] = FOLDERS):
    """Run a test on these golden folders and give it these tensors, every one of which it must use."""

    def mark(test):
        for folder in folders:
            claimed[folder].update(keys)
        test.keys = set(keys)
        return pytest.mark.parametrize("folder", folders)(test)

    return mark


class Reading(dict[str, Tensor]):
    """Tensors, and which of them were looked at."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__(tensors)
        self.seen: set[str] = set()

    def __getitem__(self, key: str) -> Tensor:
        self.seen.add(key)
        return super().__getitem__(key)


@pytest.fixture
def io(request: pytest.FixtureRequest, golden, folder: str) -> Iterator[Reading]:
    keys = request.function.keys
    reading = Reading({key: value for key, value in golden(folder)[2].items() if key in keys})
    yield reading
    assert reading.seen == keys


@pytest.fixture(scope="module")
def build(golden):
    """build(folder): a model of its own with the weights of that folder, in float32."""
    made: dict[str, ChatGLMForConditionalGeneration] = {}

    def copy_of(folder: str = "chatglm_fp32") -> ChatGLMForConditionalGeneration:
        if folder not in made:
            config, weights, _ = golden(folder)
            made[folder] = filled(ChatGLMForConditionalGeneration(ChatGLMConfig(**config)), folder, weights)
        return copy.deepcopy(made[folder])

    return copy_of


def filled(model: ChatGLMForConditionalGeneration, folder: str, weights: dict[str, Tensor]):
    for name in [name for name in weights if name.endswith("weight_scale")]:
        path = name.removesuffix(".weight_scale")
        layer = model.get_submodule(path)
        packed = packed_weight(folder, weights, path, (layer.out_features, layer.in_features))
        model.set_submodule(path, QuantizedLinear(packed, weights[f"{path}.bias"].float()))
    own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    floats = {name: weights[name].float() for name in own}
    expected = {name for name in weights if "rotary_emb" not in name}
    packed_keys = {name for name in weights if weights[name].dtype == torch.int8 or name.endswith("weight_scale")}
    assert own == expected - packed_keys  # the names of the checkpoint are the names of the model
    model.load_state_dict(floats, strict=False)
    return model.eval()


def packed_weight(folder: str, weights: dict[str, Tensor], path: str, shape: tuple[int, int]) -> PackedTensor:
    format = folder.replace("chatglm_", "chatglm-")
    return PackedTensor(format, shape, (weights[f"{path}.weight"], weights[f"{path}.weight_scale"]))


def same(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, **TOLERANCE)


def cache_tensors(cache: DynamicCache) -> Tensor:
    """In the original's layout: [layers, 2, tokens, batch, heads, head dim]."""
    return torch.stack([torch.stack([layer.keys, layer.values]) for layer in cache.layers]).permute(0, 1, 4, 2, 3, 5)


# --- the original's numbers ---


@reads(*(f"single.{key}" for key in (
    "input_ids", "labels", "logits", "loss", "hidden_states", "kv", "attention_mask", "position_ids")))  # fmt: skip
def test_one_sequence_with_masks_and_positions_given_or_derived(build, folder, io):
    model, ids, labels = build(folder), io["single.input_ids"], io["single.labels"]
    mask, positions = io["single.attention_mask"], io["single.position_ids"]
    ordinary = torch.arange(ids.shape[1])[None]
    ways = [
        {}, {"attention_mask": mask}, {"position_ids": positions}, {"attention_mask": mask, "position_ids": positions},
        {"position_ids": ordinary}, {"attention_mask": torch.ones_like(ids)},
        {"attention_mask": torch.ones_like(ids), "position_ids": ordinary},
    ]  # fmt: skip
    for way in ways:
        with torch.no_grad():
            out = model(input_ids=ids, labels=labels, output_hidden_states=True, **way)
        same(out.logits, io["single.logits"])
        same(out.loss, io["single.loss"])
        same(torch.stack(out.hidden_states), io["single.hidden_states"])
        same(cache_tensors(cache_in(out)), io["single.kv"])


@reads(*(f"batch.{key}" for key in (
    "input_ids", "labels", "logits", "loss", "hidden_states", "valid", "attention_mask", "position_ids")))  # fmt: skip
def test_a_left_padded_batch_with_the_original_s_mask_or_an_ordinary_one(build, folder, io):
    model, ids, real = build(folder), io["batch.input_ids"], io["batch.valid"].bool()
    counted = (real.cumsum(1) - 1).clamp(min=0)
    for way in (
        {"attention_mask": io["batch.attention_mask"], "position_ids": io["batch.position_ids"]},
        {"attention_mask": io["batch.attention_mask"]},
        {"attention_mask": real.long()},
        {"attention_mask": real},
        {"attention_mask": real, "position_ids": counted},
        {"attention_mask": real, "implementation": "eager"},
        {"attention_mask": io["batch.attention_mask"], "implementation": "eager"},
    ):
        model.set_attn_implementation(way.pop("implementation", "sdpa"))
        with torch.no_grad():
            out = model(input_ids=ids, labels=io["batch.labels"], output_hidden_states=True, **way)
        assert bool(out.logits.isfinite().all())  # also where a query sees nothing
        same(out.logits[real], io["batch.logits"][real])
        same(out.loss, io["batch.loss"])
        same(torch.stack(out.hidden_states)[:, real], io["batch.hidden_states"][:, real])
    derived = context_positions(ids, Marks(SOP, GMASK, MASK), seen_BT=real)
    assert torch.equal(derived, io["batch.position_ids"])


@reads("single.input_ids", "single.position_ids", "decode.prefill_len", "decode.logits", "decode.kv")
def test_steps_with_a_cache(build, folder, io):
    model, ids, positions = build(folder), io["single.input_ids"], io["single.position_ids"]
    prompt, cache, logits = int(io["decode.prefill_len"]), DynamicCache(), []
    with torch.no_grad():
        logits.append(model(input_ids=ids[:, :prompt], **{CACHE: cache}).logits)
        for token in range(prompt, ids.shape[1]):
            new = slice(token, token + 1)
            logits.append(model(input_ids=ids[:, new], position_ids=positions[..., new], **{CACHE: cache}).logits)
    same(torch.cat(logits, dim=1), io["decode.logits"])
    same(cache_tensors(cache), io["decode.kv"])


@reads(*(f"gen.{key}" for key in (
    "input_ids", "attention_mask", "position_ids", "sequences", "step_logits", "margin")))  # fmt: skip
def test_greedy_generation_from_every_kind_of_input(build, folder, io):
    model, ids = build(folder), io["gen.input_ids"]
    original = {"attention_mask": io["gen.attention_mask"], "position_ids": io["gen.position_ids"]}
    for way in (
        original, {}, {"attention_mask": (ids != PAD).long()}, {"use_cache": False}, {**original, "use_cache": False},
        {"cache_implementation": "static"}, {**original, "cache_implementation": "static"},
        {"attention_mask": io["gen.attention_mask"]}, {"prompt_lookup_num_tokens": 3},
    ):  # fmt: skip
        rows = range(1) if "prompt_lookup_num_tokens" in way else range(2)  # transformers looks up in one row only
        out = model.generate(
            ids[: len(rows)], max_new_tokens=8, do_sample=False, eos_token_id=None, return_dict_in_generate=True,
            output_logits=True, **way,
        )  # fmt: skip
        assert torch.equal(out.sequences, io["gen.sequences"][: len(rows)]), way
        same(torch.stack(out.logits, dim=1), io["gen.step_logits"][: len(rows)])
    best = io["gen.step_logits"].topk(2).values
    same(best[..., 0] - best[..., 1], io["gen.margin"])


@reads("mask_in.input_ids", "mask_in.logits", "mask_in.position_ids")
def test_a_mask_token_inside_of_the_context(build, folder, io):
    model, ids = build(folder), io["mask_in.input_ids"]
    assert torch.equal(context_positions(ids, Marks(SOP, GMASK, MASK)), io["mask_in.position_ids"])
    for way in ({}, {"position_ids": io["mask_in.position_ids"]}):
        with torch.no_grad():
            same(model(input_ids=ids, **way).logits, io["mask_in.logits"])


@reads(*(f"train.{key}" for key in (
    "input_ids", "labels", "logits", "loss", "attention_mask", "position_ids")))  # fmt: skip
def test_a_right_padded_batch_of_the_official_trainer(build, folder, io):
    model, ids = build(folder), io["train.input_ids"]
    assert torch.equal(context_positions(ids, Marks(SOP, GMASK, MASK)), io["train.position_ids"])
    visible = visible_keys(io["train.position_ids"], 0, ids.shape[1], None, None)
    assert torch.equal(~visible, io["train.attention_mask"])
    with torch.no_grad():
        out = model(input_ids=ids, labels=io["train.labels"])
        same(out.logits, io["train.logits"])
        same(out.loss, io["train.loss"])
        real = ids != PAD  # masked as padding instead of being seen by itself: the same for all that counts
        same(model(input_ids=ids, attention_mask=real).logits[real], io["train.logits"][real])


@reads("single.input_ids", "single.position_ids", *(f"layer0.{key}" for key in (
    "attn_ctx", "attn_out", "h_to_4h", "k1_rot", "k2_rot", "ln1", "ln2", "mlp_out", "q1_rot", "q2_rot", "qkv")))  # fmt: skip
def test_inside_of_the_first_block(build, folder, io):
    model = build(folder)
    block, seen = model.transformer.layers[0], {}
    outputs = {
        "ln1": block.input_layernorm, "qkv": block.attention.query_key_value, "attn_out": block.attention.dense,
        "ln2": block.post_attention_layernorm, "h_to_4h": block.mlp.dense_h_to_4h, "mlp_out": block.mlp,
    }  # fmt: skip
    for name, module in outputs.items():
        module.register_forward_hook(lambda _, __, out, name=name: seen.__setitem__(name, out))
    block.attention.dense.register_forward_hook(lambda _, args, __: seen.__setitem__("attn_ctx", args[0]))
    with torch.no_grad():
        model(input_ids=io["single.input_ids"])
    rotary = rotary_tables(io["single.position_ids"], 16)
    query, key, _ = seen["qkv"].unflatten(-1, (4, 48)).transpose(1, 2).split(16, dim=-1)
    for name, x in (("q", query), ("k", key)):
        seen[f"{name}1_rot"], seen[f"{name}2_rot"] = rotate(x, *rotary).transpose(1, 2).split(8, dim=-1)
    for name, tensor in seen.items():
        same(tensor, io[f"layer0.{name}"])


@reads(
    "train.input_ids", "train.labels", "lora.scale", "lora.logits", "lora.loss", "lora.grad_embedding",
    *(f"lora.{key}.{layer}" for key in ("A", "B", "grad_A", "grad_B") for layer in range(3)),
)  # fmt: skip
@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_on_query_key_value(build, folder, io, checkpointing):
    model = build(folder)
    paths = [f"transformer.layers.{layer}.attention.query_key_value" for layer in range(3)]
    config = LoraConfig(r=4, lora_alpha=4 * float(io["lora.scale"]))
    values = {path: (io[f"lora.A.{layer}"], io[f"lora.B.{layer}"]) for layer, path in enumerate(paths)}
    attach_layers(model, "golden", dict.fromkeys(paths, config), values)
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        model.train()  # there is no dropout
        enable()
    embedded = []
    model.transformer.word_embeddings.register_forward_hook(lambda _, __, out: embedded.append(out.requires_grad_()))
    out = model(input_ids=io["train.input_ids"], labels=io["train.labels"])
    out.loss.backward()
    same(out.logits, io["lora.logits"])
    same(out.loss, io["lora.loss"])
    same(embedded[0].grad, io["lora.grad_embedding"])
    for layer, (path, lora) in enumerate(find_adapter(model, "golden").parts.items()):
        assert path == paths[layer]
        same(lora.lora_A.grad, io[f"lora.grad_A.{layer}"])
        same(lora.lora_B.grad, io[f"lora.grad_B.{layer}"])


@reads("single.input_ids", "single.logits", "fp16.single.logits")
def test_half_precision_is_as_close_to_single_as_the_original_s(build, folder, io):
    with torch.no_grad():
        logits = build(folder).half()(input_ids=io["single.input_ids"]).logits
    assert logits.dtype == torch.float16
    torch.testing.assert_close(logits, io["fp16.single.logits"], rtol=0.0, atol=0.06)
    ours, theirs = (half.float() - io["single.logits"] for half in (logits, io["fp16.single.logits"]))
    assert ours.pow(2).mean() <= 1.3 * theirs.pow(2).mean()


@reads(*(f"{kind}.{name}" for kind in ("source", "unpacked", "dequant_fp16", "dequant_fp32") for name in PACKED),
       folders=QUANTIZED)  # fmt: skip
def test_packed_weights_bit_by_bit(golden, folder, io):
    weights = golden(folder)[1]
    for name in PACKED:
        packed = packed_weight(folder, weights, name.removesuffix(".weight"), tuple(io[f"source.{name}"].shape))
        again = quantize(io[f"source.{name}"], packed.format)
        assert torch.equal(again.parts[0], packed.parts[0]) and torch.equal(again.parts[1], packed.parts[1])
        assert torch.equal(
            unpack(packed).codes.view(packed.shape), io[f"unpacked.{name}"].to(unpack(packed).codes.dtype)
        )
        assert torch.equal(dequantize(packed, torch.float16), io[f"dequant_fp16.{name}"])
        assert torch.equal(dequantize(packed, torch.float32), io[f"dequant_fp32.{name}"])


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_golden_tensor_is_left_out(golden, folder):
    assert set(golden(folder)[2]) == claimed[folder]


def test_rotary_tables_at_the_released_size(golden):
    io = golden("rotary_tables")[2]
    positions = io["positions.v1"]
    cos, sin = rotary_tables(torch.stack([positions, 0 * positions])[None], 128)
    for table, name in ((cos, "cos"), (sin, "sin")):
        twice = table[0, 0, :, 0].expand(-1, 2, -1).flatten(1)  # both halves of a pair turn by the same angle
        torch.testing.assert_close(twice, io[f"v1.{name}.float32"], rtol=0.0, atol=1e-6)
    tables = rotary_tables(io["v1.apply.positions"], 128)
    for name in ("q", "k"):
        rotated = rotate(io[f"v1.apply.{name}"].transpose(1, 2), *tables).transpose(1, 2)
        torch.testing.assert_close(rotated, io[f"v1.apply.{name}_rot"], rtol=0.0, atol=1e-5)
    frequency = tables[0].new_tensor([1.0])
    angle = torch.atan2(*(t[0, 0, 0, 0, 0] for t in rotary_tables(frequency.long().expand(1, 2, 1), 128)[::-1]))
    assert torch.equal(angle.half(), io["v1.inv_freq"])


# --- positions and masks against plain loops ---


def loop_positions(ids: list[int]) -> list[list[int]]:
    """The original's way to the positions of one sequence."""
    context = ids.index(SOP)
    marked = ids.index(GMASK) if GMASK in ids[:context] else ids.index(MASK)
    block = [0] * context + list(range(1, len(ids) - context + 1))
    return [list(range(context)) + [marked] * (len(ids) - context), block]


@st.composite
def sequences(draw: st.DrawFn) -> list[int]:
    word = st.integers(4, 149)
    marks = draw(st.sampled_from([[GMASK], [MASK], [MASK, GMASK], [GMASK, MASK]]))
    context = draw(st.lists(word, max_size=6)) + marks[:1] + draw(st.lists(word, max_size=3)) + marks[1:]
    return [*context, SOP, *draw(st.lists(st.one_of(word, st.sampled_from([SOP, GMASK, PAD])), max_size=5))]


@settings(max_examples=60, deadline=None)
@given(st.lists(sequences(), min_size=1, max_size=4), st.booleans())
def test_positions_and_masks_of_batches_and_packed_rows_equal_plain_loops(samples, left):
    marks, width = Marks(SOP, GMASK, MASK), max(map(len, samples))
    pads = [[PAD] * (width - len(ids)) for ids in samples]
    ids = torch.tensor([[*pad, *ids] if left else [*ids, *pad] for pad, ids in zip(pads, samples, strict=True)])
    seen = torch.tensor([
        [0] * len(pad) + [1] * len(ids) if left else [1] * len(ids) + [0] * len(pad)
        for pad, ids in zip(pads, samples, strict=True)
    ])  # fmt: skip
    rows = context_positions(ids, marks, seen_BT=seen)
    visible = visible_keys(rows, 0, width, None, seen)
    packed_ids = torch.tensor([[token for ids in samples for token in ids]])
    ordinary = torch.tensor([[place for ids in samples for place in range(len(ids))]])
    packed_rows = context_positions(packed_ids, marks, ordinary)
    number = torch.repeat_interleave(torch.arange(len(samples)), torch.tensor([len(s) for s in samples]))[None]
    packed_visible = visible_keys(packed_rows, 0, packed_ids.shape[1], number, None)
    start = 0
    for row, sample in enumerate(samples):
        expected, real, inside = loop_positions(sample), seen[row].bool(), slice(start, start + len(sample))
        assert rows[row][:, real].tolist() == packed_rows[0, :, inside].tolist() == expected
        assert not rows[row][:, ~real].any()
        allowed = [
            [key <= query or key < sample.index(SOP) for key in range(len(sample))] for query in range(len(sample))
        ]
        assert visible[row, 0][real][:, real].tolist() == packed_visible[0, 0, inside, inside].tolist() == allowed
        assert not visible[row, 0][real][:, ~real].any()
        outside = packed_visible[0, 0, inside].clone()
        outside[:, inside] = False
        assert not outside.any()
        start += len(sample)


# --- the same sample computed in several ways ---

PROMPTS = [
    [9, 12, 33, GMASK, SOP],
    [40, MASK, 7, 8, 9, 10, SOP],
    [GMASK, SOP],
    [5, 6, 77, 78, 79, 80, 81, 82, GMASK, SOP],
]


def make_samples() -> list[Sample]:
    samples = []
    for number, prompt in enumerate(PROMPTS):
        answer = torch.randint(4, 149, (3 + number,), generator=torch.Generator().manual_seed(number)).tolist()
        samples.append(Sample([*prompt, *answer], [IGNORED] * len(prompt) + answer, f"rows:{number}"))
    return samples


@pytest.mark.parametrize("implementation", ["sdpa", "eager", SAMPLES])
def test_packed_samples_equal_single_ones_in_loss_and_gradients(build, implementation):
    model, samples = build("chatglm_int8"), make_samples()
    attach_lora(model, r=2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    expected = sum(own_loss(model, sample) for sample in samples)
    expected.backward()
    reference = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    model.set_attn_implementation(implementation)
    total = batch_loss(model, collate(samples))
    total.backward()
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, reference[name], rtol=1e-4, atol=1e-3, msg=name)


def own_loss(model: nn.Module, sample: Sample) -> Tensor:
    labels = torch.tensor([sample.labels])
    out = model(input_ids=torch.tensor([sample.input_ids]), labels=labels)
    return out.loss * int((labels != IGNORED).sum())


def test_training_finds_out_that_samples_may_be_packed(build):
    model, samples = build(), make_samples()
    with padding_free(model, samples) as problem:
        assert problem is None
        assert model.config._attn_implementation == SAMPLES
        total = batch_loss(model, collate(samples))
    with torch.no_grad():
        torch.testing.assert_close(total, sum(own_loss(model, sample) for sample in samples), rtol=1e-5, atol=1e-5)


def test_eager_attention_gives_weights_that_obey_the_mask(build):
    model = build()
    ids = torch.tensor([make_samples()[3].input_ids])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        model.set_attn_implementation("eager")
        out = model(input_ids=ids, output_attentions=True)
    same(out.logits, expected)
    visible = visible_keys(context_positions(ids, Marks(SOP, GMASK, MASK)), 0, ids.shape[1], None, None)
    assert len(out.attentions) == 3
    for weights in out.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(1, 4, ids.shape[1]))
        assert torch.equal(weights > 0, visible.expand_as(weights))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_scores_that_do_not_fit_in_half_precision_are_no_infinities(build, implementation):
    model = build().half()
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        for layer in model.transformer.layers:
            layer.attention.query_key_value.weight.mul_(200)
        query, key, _ = (
            model.transformer.layers[0].attention.query_key_value(torch.randn(1, 4, 64).half()).split(64, dim=-1)
        )
        assert (query.float() @ key.float().mT).abs().max() > 4 * torch.finfo(torch.float16).max
        assert bool(model(input_ids=torch.tensor([PROMPTS[3]])).logits.isfinite().all())


def test_several_tokens_at_once_continue_a_padded_cache(build):
    model = build()
    ids = torch.tensor([[PAD] * 3 + PROMPTS[0] + [20, 21, 22, 23], [4] + PROMPTS[1] + [30, 31, 32, 33]])
    seen = (ids != PAD).long()
    positions = context_positions(ids, Marks(SOP, GMASK, MASK), seen_BT=seen)
    with torch.no_grad():
        full = model(input_ids=ids, attention_mask=seen).logits
        start = model(input_ids=ids[:, :9], attention_mask=seen[:, :9], use_cache=True)
        rest = model(
            input_ids=ids[:, 9:], attention_mask=seen, position_ids=positions[..., 9:],
            **{CACHE: cache_in(start)},
        )  # fmt: skip
    same(torch.cat([start.logits, rest.logits], dim=1)[seen.bool()], full[seen.bool()])


def test_embeddings_in_place_of_ids(build, golden):
    model, io = build(), golden("chatglm_fp32")[2]
    ids, positions, mask = io["gen.input_ids"], io["gen.position_ids"], io["gen.attention_mask"]
    embedded = model.transformer.word_embeddings(ids).detach()
    options = {"position_ids": positions, "attention_mask": mask, "max_new_tokens": 8, "eos_token_id": None}
    sequences = model.generate(inputs_embeds=embedded, do_sample=False, **options)
    assert torch.equal(sequences, io["gen.sequences"][:, ids.shape[1] :])
    with torch.no_grad():  # one sequence without padding: the mask follows from the positions
        got = model(inputs_embeds=embedded[:1], position_ids=positions[:1]).logits
        same(got, model(input_ids=ids[:1]).logits)


@pytest.mark.parametrize("original", [False, True])
def test_beam_search_scores_are_those_of_a_full_forward_pass(build, golden, original):
    model, io = build(), golden("chatglm_fp32")[2]
    ids = io["gen.input_ids"]
    way = {"attention_mask": io["gen.attention_mask"], "position_ids": io["gen.position_ids"]} if original else {}
    out = model.generate(
        ids, num_beams=3, num_return_sequences=3, max_new_tokens=6, do_sample=False, eos_token_id=None,
        length_penalty=1.0, return_dict_in_generate=True, output_scores=True, **way,
    )  # fmt: skip
    seen = F.pad((ids != PAD).long().repeat_interleave(3, 0), (0, 6), value=1)
    with torch.no_grad():
        log_probs = model(input_ids=out.sequences, attention_mask=seen).logits[:, ids.shape[1] - 1 : -1].log_softmax(-1)
    chosen = log_probs.gather(-1, out.sequences[:, ids.shape[1] :, None])[..., 0]
    torch.testing.assert_close(chosen.sum(-1) / 6, out.sequences_scores, rtol=0.0, atol=1e-4)


def test_a_beam_as_wide_as_the_vocabulary_finds_the_best_of_all_continuations(build, golden):
    model, ids = build(), golden("chatglm_fp32")[2]["gen.input_ids"]
    words = torch.arange(160)
    out = model.generate(
        ids, num_beams=160, num_return_sequences=3, max_new_tokens=2, do_sample=False, eos_token_id=None
    )
    for row, found in zip(ids, out.view(2, 3, -1), strict=True):
        prompt = row[row != PAD]
        with torch.no_grad():
            logits = model(input_ids=torch.cat([prompt.expand(160, -1), words[:, None]], dim=1)).logits.log_softmax(-1)
        best = (logits[0, -2][:, None] + logits[:, -1]).flatten().topk(3).indices
        assert found[:, -2:].tolist() == torch.stack([best // 160, best % 160], dim=1).tolist()


def test_a_padded_prompt_is_continued_as_the_prompt_alone(build):
    model, prompts = build(), [PROMPTS[0], PROMPTS[3]]
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts])
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    together = model.generate(ids, **options)[:, width:]
    for row, prompt in enumerate(prompts):
        assert torch.equal(model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :], together[row])


def test_tokens_that_the_mask_hides_are_as_if_absent(build):
    model, prompt = build(), [9, 12, 33, 44, GMASK, SOP]
    hidden = [SOP, 9, GMASK, 12, 33, MASK, 44, 44, GMASK, PAD, SOP]
    seen = torch.tensor([[0, 1, 0, 1, 1, 0, 0, 1, 1, 0, 1]])
    ids = torch.tensor([hidden])
    assert ids[seen.bool()].tolist() == prompt
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([prompt])).logits
        same(model(input_ids=ids, attention_mask=seen).logits[seen.bool()], expected[0])
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "output_logits": True}
    options["return_dict_in_generate"] = True
    one = model.generate(torch.tensor([prompt]), **options)
    other = model.generate(ids, attention_mask=seen, **options)
    assert torch.equal(one.sequences[:, len(prompt) :], other.sequences[:, len(hidden) :])
    same(torch.stack(one.logits), torch.stack(other.logits))


def test_sampling_draws_from_the_model_s_distribution(build):
    model = build()
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0, -1].softmax(-1)
    torch.manual_seed(0)
    drawn = model.generate(ids, do_sample=True, top_k=0, max_new_tokens=2, num_return_sequences=4000, eos_token_id=None)
    share = torch.bincount(drawn[:, 5], minlength=160) / 4000
    often = expected * 4000 >= 20  # else the deviation of a count is not that of a normal distribution
    deviation = (expected * (1 - expected) / 4000).sqrt()
    assert int(often.sum()) >= 10 and bool(((share - expected).abs() <= 5 * deviation)[often].all())


def test_generation_goes_on_from_a_filled_cache(build, golden):
    model, io = build(), golden("chatglm_fp32")[2]
    sequences, cache = io["gen.sequences"][:1], DynamicCache()
    options = {"do_sample": False, "eos_token_id": None, CACHE: cache}
    first = model.generate(sequences[:, :9], max_new_tokens=3, **options)
    assert torch.equal(model.generate(first, max_new_tokens=5, **options), sequences)


def test_one_mask_and_one_pair_of_positions_serve_the_whole_batch(build, golden):
    model, io = build(), golden("chatglm_fp32")[2]
    ids = io["single.input_ids"].repeat(2, 1)
    ids[1, -2:] = torch.tensor([20, 21])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        shared = {"attention_mask": io["single.attention_mask"], "position_ids": io["single.position_ids"]}
        same(model(input_ids=ids, **shared).logits, expected)
        same(model(input_ids=ids, attention_mask=shared["attention_mask"]).logits, expected)


def test_logits_to_keep(build):
    model, ids = build(), torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        full = model(input_ids=ids).logits
        same(model(input_ids=ids, logits_to_keep=2).logits, full[:, -2:])
        same(model(input_ids=ids, logits_to_keep=torch.tensor([0, 3])).logits, full[:, [0, 3]])


# --- checkpoints, configs, refusals ---


def test_a_folder_in_the_released_layout_is_read_and_saved_again(golden, tmp_path, build):
    raw, weights, _ = golden("chatglm_fp32")
    released = {**raw, "auto_map": {"AutoModel": "modeling_chatglm.X"}, "architectures": ["ChatGLMModel"]}
    (tmp_path / "config.json").write_text(json.dumps(released), encoding="utf-8")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    model, info = ChatGLMForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    assert model.generation_config.eos_token_id == 155
    model.save_pretrained(tmp_path / "again")
    again = ChatGLMForConditionalGeneration.from_pretrained(tmp_path / "again")
    ids = torch.tensor([PROMPTS[3]])
    with torch.no_grad():
        expected = build()(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, expected)
        assert torch.equal(again(input_ids=ids).logits, expected)
    assert {name: getattr(again.config, name) for name in raw if name != "torch_dtype"} == {
        name: value for name, value in raw.items() if name != "torch_dtype"
    }


def test_an_untied_head_has_weights_of_its_own(golden):
    config = ChatGLMConfig(**golden("chatglm_fp32")[0], tie_word_embeddings=False)
    model = ChatGLMForConditionalGeneration(config)
    assert model.lm_head.weight is not model.transformer.word_embeddings.weight


def test_config_reads_releases_and_answers_to_general_names():
    config = ChatGLMConfig(quantization_bit=4, quantization_embeddings=False, torch_dtype="float16")
    assert (config.num_hidden_layers, config.max_position_embeddings, config.head_dim) == (28, 2048, 128)
    assert (config.mask_token_id, config.gmask_token_id, config.quantization_bit) == (130000, 130001, 4)
    assert config.tie_word_embeddings and not config.quantization_embeddings
    old = ChatGLMConfig(vocab_size=150528, bos_token_id=150004, eos_token_id=150005)  # before April 2023
    assert (old.mask_token_id, old.gmask_token_id) == (150000, 150001)
    assert math.isclose(old.layernorm_epsilon, 1e-5)


def test_impossible_configs_are_refused_with_all_their_problems():
    with pytest.raises(ValueError, match=r"position_encoding_2d is false.*gmask_token_id is 130001"):
        ChatGLMConfig(vocab_size=130001, bos_token_id=130000, position_encoding_2d=False, gmask_token_id=130001)
    with pytest.raises(ValueError, match="num_layers is 0"):
        ChatGLMConfig(num_layers=0)
    with pytest.raises(ValueError, match="expected 32 heads of a multiple of 4"):
        ChatGLMConfig(hidden_size=4098)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": [[4, 5, GMASK]]}, r"no <sop> in sample 0 of 1\nhint: end the prompt"),
        ({"input_ids": [[4, 5, SOP]]}, "no .gMASK. or .MASK. before <sop> in sample 0 of 1"),
        ({"input_ids": [[4, SOP, GMASK]]}, "no .gMASK. or .MASK. before <sop> in sample 0 of 1"),
        ({"input_ids": [[GMASK, SOP], [4, 5]]}, "no <sop> in sample 1 of 2"),
        ({"input_ids": [[GMASK, SOP, 4, 5, 6, SOP]], "position_ids": [[0, 1, 2, 0, 1, 2]]}, "before <sop> in sample 1 of 2"),
        ({"input_ids": [[GMASK, SOP, 4]], "position_ids": [[0, 1, 1]]}, "position_ids: expected 0, 1, 2"),
        ({"input_ids": [[GMASK, SOP, 4]], "position_ids": [[3, 4, 5]]}, "position_ids: expected 0, 1, 2"),
        ({"input_ids": [[PAD, GMASK, SOP]], "position_ids": [[0, 1, 2]], "attention_mask": [[0, 1, 1]]}, "position_ids: exp"),
        ({"input_ids": [[GMASK, SOP]], "position_ids": [[0, 1, 2]]}, r"position_ids: got \[1, 3\], expected \[1, 2\]"),
        ({"input_ids": [[GMASK, SOP]], "attention_mask": [[1]]}, r"attention_mask: got torch.int64 \[1, 1\]"),
        ({"input_ids": [[GMASK, SOP]], "attention_mask": [[[[0, 1], [0, 0]]]]}, r"torch.bool \[1, 1, 2, 2\], true where"),
        ({"input_ids": [[GMASK, SOP]], "inputs_embeds": [[[0.0] * 64] * 2]}, "one of input_ids and inputs_embeds"),
        ({"inputs_embeds": [[[0.0] * 64] * 2]}, "inputs_embeds with no position_ids"),
        ({}, "one of input_ids and inputs_embeds"),
    ],
)  # fmt: skip
def test_calls_that_leave_open_where_the_context_ends_are_refused(build, arguments, message):
    with pytest.raises(ValueError, match=message):
        build()(**{name: torch.tensor(value) for name, value in arguments.items()})


def test_a_filled_cache_needs_positions_and_takes_no_context(build):
    model, cache = build(), DynamicCache()
    with torch.no_grad():
        model(input_ids=torch.tensor([PROMPTS[0]]), **{CACHE: cache})
        with pytest.raises(ValueError, match="a filled cache with no position_ids"):
            model(input_ids=torch.tensor([[7]]), **{CACHE: cache})
        with pytest.raises(ValueError, match="a context must be given at once"):
            model(input_ids=torch.tensor([[7]]), position_ids=torch.tensor([[[5], [0]]]), **{CACHE: cache})
    with pytest.raises(ValueError, match="got 1 ids, expected all 6 from the beginning"):
        model.generate(torch.tensor([[7]]), attention_mask=torch.ones(1, 6), **{CACHE: cache}, max_new_tokens=1)
