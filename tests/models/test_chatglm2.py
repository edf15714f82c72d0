"""ChatGLM2 against the numbers of its original code, transformers' GLM, and itself in other words."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, GlmConfig, GlmForCausalLM

from qgraft.adapters.attach import attach_layers
from qgraft.adapters.base import find_adapter
from qgraft.adapters.lora import LoraConfig
from qgraft.compat import CACHE, cache_in
from qgraft.data.batches import collate
from qgraft.data.tokenizing import Sample
from qgraft.formats import PackedTensor, quantize, unpack
from qgraft.linear import QuantizedLinear
from qgraft.models.chatglm2 import ChatGLM2Config, ChatGLM2ForConditionalGeneration, rotary_table, rotate
from qgraft.passes.decoder import sample_attention
from qgraft.passes.loss import batch_loss

GOLDEN = Path(__file__).parent.parent / "golden"
FOLDERS = ("chatglm2_fp32", "chatglm2_int4", "chatglm2_int8")
FORMAT = {"chatglm2_int4": "chatglm-int4", "chatglm2_int8": "chatglm-int8"}
GIVEN = (
    "input_ids", "attention_mask", "labels", "batch.position_ids", "prefill_len", "lora.scale", "lora.A.", "lora.B.",
    "source.",
)  # fmt: skip
TINY = {
    "num_layers": 2, "padded_vocab_size": 61, "hidden_size": 32, "ffn_hidden_size": 48, "kv_channels": 8,
    "num_attention_heads": 6, "multi_query_group_num": 2, "seq_length": 64, "eos_token_id": None,
}  # fmt: skip
Model = ChatGLM2ForConditionalGeneration


def names(folder: str) -> list[str]:
    with safe_open(GOLDEN / folder / "io.safetensors", framework="pt") as file:
        return [name for name in sorted(file.keys()) if not any(part in name for part in GIVEN)]


def tiny(seed: int = 0, **options: Any) -> Model:
    """A random model whose norms, biases and projections are all large enough to matter."""
    torch.manual_seed(seed)
    model = Model(ChatGLM2Config(**{**TINY, **options}))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(3, TINY["padded_vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def packed_weights(folder: str, weights: dict[str, Tensor]) -> dict[str, PackedTensor]:
    """The quantized matrices of a checkpoint, by the name of their weight."""
    packed = {}
    for name, scale in weights.items():
        if name.endswith(".weight_scale"):
            data = weights[name.removesuffix("_scale")]
            columns = data.shape[1] * (2 if "int4" in folder else 1)
            packed[name.removesuffix("_scale")] = PackedTensor(FORMAT[folder], (len(data), columns), (data, scale))
    return packed


def golden_model(folder: str, config: dict[str, Any], weights: dict[str, Tensor], dtype: torch.dtype) -> Model:
    model = Model(ChatGLM2Config(**config)).to(dtype)
    packed = packed_weights(folder, weights)
    floats = {name: value for name, value in weights.items() if value.is_floating_point() and "_scale" not in name}
    missing, unexpected = model.load_state_dict(floats, strict=False)
    assert set(missing) == set(packed) and unexpected == ["transformer.rotary_pos_emb.inv_freq"]
    for name, weight in packed.items():
        path = name.removesuffix(".weight")
        bias = model.get_submodule(path).bias
        model.set_submodule(path, QuantizedLinear(weight, None if bias is None else bias.detach()))
    return model.eval().requires_grad_(False)


def stacked(cache: DynamicCache) -> Tensor:
    """The cache as the original lays it out: [layers, 2, tokens, batch, groups, channels]."""
    return torch.stack([torch.stack((la.keys, la.values)).permute(0, 3, 1, 2, 4) for la in cache.layers])


def run_case(model: Model, io: dict[str, Tensor], case: str) -> dict[str, Tensor]:
    """One forward pass on the inputs of a case, by the names of its outputs."""
    given = {key: io[f"{case}.{key}"] for key in ("attention_mask", "position_ids") if f"{case}.{key}" in io}
    out = model(io[f"{case}.input_ids"], labels=io[f"{case}.labels"], output_hidden_states=True, **given)
    last = model.transformer(io[f"{case}.input_ids"], use_cache=False, **given).last_hidden_state
    states = torch.stack(out.hidden_states)
    results = {"logits": out.logits, "loss": out.loss, "last_hidden": last, "hidden_states": states}
    return {f"{case}.{key}": value for key, value in results.items()} | {f"{case}.kv": stacked(cache_in(out))}


def run_block(model: Model, ids: Tensor) -> dict[str, Tensor]:
    """What passes through the modules of block 0, and query and key as attention gets them."""
    seen: dict[str, Tensor] = {}
    block = model.transformer.encoder["layers"][0]
    outputs = {
        "ln1": block.input_layernorm, "qkv": block.self_attention.query_key_value, "mlp_out": block.mlp,
        "attn_out": block.self_attention.dense, "ln2": block.post_attention_layernorm,
        "h_to_4h": block.mlp.dense_h_to_4h,
    }  # fmt: skip
    hooks = [
        module.register_forward_hook(lambda _m, _x, out, name=name: seen.update({f"layer0.{name}": out}))
        for name, module in outputs.items()
    ]
    hooks.append(
        block.self_attention.dense.register_forward_hook(lambda _m, x, _: seen.update({"layer0.attn_ctx": x[0]}))
    )

    def record(module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        if module.layer_idx == 0:
            seen.update({"layer0.q_rot": query.transpose(1, 2), "layer0.k_rot": key.transpose(1, 2)})
        return AttentionInterface()["sdpa"](module, query, key, *args, **kwargs)

    AttentionInterface.register("recorded", record)
    model.set_attn_implementation("recorded")
    model(ids)
    model.set_attn_implementation("sdpa")
    for hook in hooks:
        hook.remove()
    return seen


def run_decoding(model: Model, io: dict[str, Tensor]) -> dict[str, Tensor]:
    """A prefill and single steps with the cache; greedy generation of a left-padded batch."""
    ids, start = io["single.input_ids"], int(io["decode.prefill_len"])
    out = model(ids[:, :start])
    logits = [out.logits]
    for index in range(start, ids.shape[1]):
        out = model(ids[:, index : index + 1], **{CACHE: cache_in(out)})
        logits.append(out.logits)
    positions: list[Tensor] = []
    hook = model.transformer.register_forward_pre_hook(
        lambda _m, _x, given: positions.append(given["position_ids"]), with_kwargs=True
    )
    made = model.generate(
        io["gen.input_ids"], attention_mask=io["gen.attention_mask"], max_new_tokens=8, do_sample=False,
        eos_token_id=None, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    hook.remove()
    steps = torch.stack(made.logits, dim=1)
    best = steps.topk(2).values
    return {
        "decode.logits": torch.cat(logits, dim=1), "decode.kv": stacked(cache_in(out)),
        "gen.sequences": made.sequences, "gen.step_logits": steps, "gen.margin": best[..., 0] - best[..., 1],
        "gen.position_ids": positions[0],
    }  # fmt: skip


def run_lora(model: Model, io: dict[str, Tensor]) -> dict[str, Tensor]:
    paths = [f"transformer.encoder.layers.{i}.self_attention.query_key_value" for i in range(model.config.num_layers)]
    values = {path: (io[f"lora.A.{i}"], io[f"lora.B.{i}"]) for i, path in enumerate(paths)}
    rank = io["lora.A.0"].shape[0]
    config = LoraConfig(r=rank, lora_alpha=float(io["lora.scale"]) * rank)
    attach_layers(model, "golden", dict.fromkeys(paths, config), values)
    embedded = model.get_input_embeddings()(io["train.input_ids"]).detach().requires_grad_()
    with torch.enable_grad():
        out = model(inputs_embeds=embedded, labels=io["train.labels"])
        out.loss.backward()
    results = {"lora.logits": out.logits.detach(), "lora.loss": out.loss.detach(), "lora.grad_embedding": embedded.grad}
    for i, (_, lora) in enumerate(find_adapter(model, "golden").parts.items()):
        results |= {f"lora.grad_A.{i}": lora.lora_A.grad, f"lora.grad_B.{i}": lora.lora_B.grad}
    return results


@pytest.fixture(scope="module")
def computed(golden: Callable[[str], Any]) -> dict[str, dict[str, Tensor]]:
    """Everything that the golden folders hold, computed here."""
    results = {}
    for folder in FOLDERS:
        config, weights, io = golden(folder)
        model = golden_model(folder, config, weights, torch.float32)
        with torch.no_grad():
            results[folder] = {
                **run_case(model, io, "single"), **run_case(model, io, "batch"), **run_case(model, io, "train"),
                **run_block(model, io["single.input_ids"]), **run_decoding(model, io), **run_lora(model, io),
                "fp16.single.logits": golden_model(folder, config, weights, torch.float16)(io["single.input_ids"]).logits,
            }  # fmt: skip
        for name, packed in packed_weights(folder, weights).items():
            results[folder] |= {
                f"unpacked.{name}": unpack(packed).codes,
                f"dequant_fp32.{name}": QuantizedLinear(packed).dequantize(torch.float32),
                f"dequant_fp16.{name}": QuantizedLinear(packed).dequantize(torch.float16),
            }
    return results


@pytest.mark.spread(40)
@pytest.mark.parametrize(("folder", "name"), [(folder, name) for folder in FOLDERS for name in names(folder)])
def test_equals_the_original(folder: str, name: str, computed: Any, golden: Callable[[str], Any]):
    io = golden(folder)[2]
    got, expected = computed[folder][name], io[name]
    if name in ("batch.logits", "batch.last_hidden", "batch.hidden_states"):  # elsewhere padding: meaningless
        real = io["batch.attention_mask"].bool()
        got, expected = got[..., real, :], expected[..., real, :]
    assert got.dtype == expected.dtype
    tolerance = 0.03 if name.startswith("fp16") else 1e-5 if got.dtype == torch.float32 else 0.0  # there fp16 tables
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance if tolerance < 1e-3 else 0.0)


@pytest.mark.parametrize("folder", sorted(FORMAT))
def test_quantizing_gives_the_originals_bytes(folder: str, golden: Callable[[str], Any]):
    _, weights, io = golden(folder)
    stored = packed_weights(folder, weights)
    sources = {name.removeprefix("source."): value for name, value in io.items() if name.startswith("source.")}
    assert len(sources) == 4 and len(stored) == 12  # the sources of block 0
    for name, source in sources.items():
        packed = quantize(source, FORMAT[folder])
        assert torch.equal(packed.parts[0], stored[name].parts[0]) and torch.equal(
            packed.parts[1], stored[name].parts[1]
        ), name


def test_rotary_tables_equal_the_originals(golden: Callable[[str], Any]):
    io, config = golden("rotary_tables")[2], ChatGLM2Config()
    table = torch.stack(rotary_table(io["positions.v2"][None], config), dim=-1)[0, :, 0]
    assert torch.equal(table, io["v2.cache.float32"])
    assert torch.equal(rotate(io["v2.apply.q"], *rotary_table(io["v2.apply.positions"], config)), io["v2.apply.q_rot"])


def test_rotary_is_exact_in_bfloat16():
    x = torch.randn(1, 3, 2, 128, dtype=torch.bfloat16)
    table = rotary_table(torch.tensor([[300, 5001, 32767]]), ChatGLM2Config())
    assert torch.equal(rotate(x, *table), rotate(x.float(), *table).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norm_rounds_once(dtype: torch.dtype):
    norm = tiny().transformer.encoder["final_layernorm"].to(dtype)
    x = 200 * torch.randn(64, 32, dtype=dtype)  # squares beyond the range of float16
    x_double = x.double()
    exact = norm.weight.double() * x_double / (x_double.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert (norm(x) == exact.to(dtype)).float().mean() > 0.999  # a tie in float32 may round the other way


def glm_twin(model: Model, theta: float) -> GlmForCausalLM:
    """transformers' GLM with the weights of `model`: the same function with separate projections and other names."""
    ours = model.config
    glm = GlmForCausalLM(
        GlmConfig(
            vocab_size=ours.vocab_size, hidden_size=ours.hidden_size, intermediate_size=ours.ffn_hidden_size,
            num_hidden_layers=ours.num_layers, num_attention_heads=ours.num_attention_heads, head_dim=ours.kv_channels,
            num_key_value_heads=ours.multi_query_group_num, rms_norm_eps=ours.layernorm_epsilon, attention_bias=True,
            rope_parameters={"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": 0.5},
            pad_token_id=0,
        )
    )  # fmt: skip
    names = {
        "transformer.embedding.word_embeddings": "model.embed_tokens", "transformer.output_layer": "lm_head",
        "transformer.encoder.layers": "model.layers", "transformer.encoder.final_layernorm": "model.norm",
        "self_attention.dense": "self_attn.o_proj", "dense_h_to_4h": "gate_up_proj", "dense_4h_to_h": "down_proj",
    }  # fmt: skip
    state = {}
    for key, value in model.state_dict().items():
        for old, new in names.items():
            key = key.replace(old, new)
        heads, groups = (ours.kv_channels * n for n in (ours.num_attention_heads, ours.multi_query_group_num))
        if "query_key_value" in key:
            for part, rows in zip("qkv", value.split([heads, groups, groups]), strict=True):
                state[key.replace("self_attention.query_key_value", f"self_attn.{part}_proj")] = rows
        else:
            state[key] = value
    glm.load_state_dict(state)
    return glm.eval()


@pytest.mark.parametrize(("options", "theta"), [({}, 1e4), ({"rope_ratio": 50, "rope_ratio_scales": "base"}, 5e5)])
def test_equals_transformers_glm(options: dict[str, Any], theta: float):
    model, ids = tiny(**options), tokens(2, 20)
    torch.testing.assert_close(model(ids).logits, glm_twin(model, theta)(ids).logits, atol=2e-5, rtol=1e-5)


def test_ratio_of_the_32k_release_divides_positions():
    plain, long = tiny(), tiny(rope_ratio=16, _name_or_path="THUDM/chatglm2-6b-32k")
    given = {"input_ids": tokens(1, 10), "attention_mask": torch.ones(1, 10, dtype=torch.int64)}
    positions = torch.arange(10)[None]
    assert torch.equal(long(**given, position_ids=16 * positions).logits, plain(**given, position_ids=positions).logits)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("seed", range(4))
def test_cached_parts_equal_the_whole(seed: int, implementation: str):
    model, ids = tiny(), tokens(2, 17, seed=seed)
    model.set_attn_implementation(implementation)
    mask = torch.ones_like(ids)
    mask[1, : 3 * (seed % 2)] = 0  # without padding and with it
    whole = model(ids, attention_mask=mask).logits
    cuts = sorted({0, 17, *torch.randint(1, 17, (3,), generator=torch.Generator().manual_seed(seed)).tolist()})
    cache = DynamicCache(config=model.config)
    parts = [
        model(ids[:, start:stop], attention_mask=mask[:, :stop], **{CACHE: cache}).logits
        for start, stop in pairwise(cuts)
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1)[mask.bool()], whole[mask.bool()], atol=2e-5, rtol=1e-5)


def samples() -> list[Sample]:
    rows = [tokens(length, seed=length).tolist() for length in (9, 1, 5, 7)]
    return [Sample(row, [-100, *row[1:]], "test") for row in rows]


@pytest.mark.parametrize("path", ["sdpa", "eager", "samples"])
def test_packed_samples_stay_apart(path: str):
    model, wholes = tiny(), samples()
    expected = 0.0
    for sample in wholes:
        logits = model(torch.tensor([sample.input_ids])).logits[0, :-1]
        expected += F.cross_entropy(logits, torch.tensor(sample.labels[1:]), reduction="sum") if len(logits) else 0.0
    expected.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    batch = collate(wholes)
    model.set_attn_implementation("sdpa" if path == "samples" else path)
    if path == "samples":
        with sample_attention(model):
            assert model.config._attn_implementation == "qgraft_samples"
            loss = batch_loss(model, batch)
    else:
        loss = batch_loss(model, batch)
    loss.backward()
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=2e-4, rtol=1e-4, msg=name)


def test_packed_samples_stay_apart_with_the_default_arguments():
    batch = collate(samples())
    model, sizes = tiny(), [len(sample.input_ids) for sample in samples()]
    rows = model(batch["input_ids"], position_ids=batch["position_ids"]).logits[0].split(sizes)
    for row, sample in zip(rows, samples(), strict=True):
        torch.testing.assert_close(row, model(torch.tensor([sample.input_ids])).logits[0], atol=2e-5, rtol=1e-5)


def test_left_padding_changes_nothing():
    model, ids = tiny(), tokens(1, 8)
    padded = F.pad(ids, (5, 0))
    mask = (padded != 0).long()
    alone = model(ids).logits
    for positions in (None, (mask.cumsum(-1) - 1).clamp(min=0)):
        for implementation in ("sdpa", "eager"):
            model.set_attn_implementation(implementation)
            logits = model(padded, attention_mask=mask, position_ids=positions).logits
            assert logits.isfinite().all()
            torch.testing.assert_close(logits[:, 5:], alone, atol=2e-5, rtol=1e-5)


def grown(model: Model, ids: Tensor, **options: Any) -> Tensor:
    return model.generate(ids, attention_mask=(ids != 0).long(), **{"max_new_tokens": 6, "do_sample": False} | options)


def test_batches_generate_what_single_prompts_do():
    model, short, long = tiny(), tokens(1, 4), tokens(1, 9, seed=2)
    both = grown(model, torch.cat((F.pad(short, (5, 0)), long)))
    assert both[0, 5:].tolist() == grown(model, short)[0].tolist()
    assert both[1].tolist() == grown(model, long)[0].tolist()


def test_ways_of_generating_agree_where_they_must():
    model, ids = tiny(), tokens(1, 7).repeat(1, 2)
    greedy = grown(model, ids)
    assert torch.equal(grown(model, ids, use_cache=False), greedy)
    assert torch.equal(grown(model, ids, prompt_lookup_num_tokens=3), greedy)
    assert torch.equal(grown(model, ids, assistant_model=tiny(seed=5)), greedy)
    assert torch.equal(grown(model, ids, do_sample=True, top_k=1), greedy)
    assert torch.equal(grown(model, ids, cache_implementation="static", disable_compile=True), greedy)
    third = int(greedy[0, 16])
    assert grown(model, ids, eos_token_id=third).shape[1] <= 17


def test_beam_search_finds_the_best_pair():
    model, ids, words = tiny(), tokens(1, 5), TINY["padded_vocab_size"]
    found = grown(model, ids, num_beams=words, max_new_tokens=2)[0, 5:]  # as many beams as words: nothing is pruned
    first = model(ids).logits[0, -1].log_softmax(-1)
    pairs = torch.cat((ids.expand(words, -1), torch.arange(words)[:, None]), dim=1)
    scores = first[:, None] + model(pairs).logits[:, -1].log_softmax(-1)
    assert found.tolist() == [int(scores.argmax()) // words, int(scores.argmax()) % words]


def test_logits_to_keep():
    model, ids = tiny(), tokens(2, 9)
    logits = model(ids).logits
    for kept, expected in ((1, logits[:, -1:]), (4, logits[:, -4:]), (torch.tensor([0, 5]), logits[:, [0, 5]])):
        torch.testing.assert_close(model(ids, logits_to_keep=kept).logits, expected, atol=1e-5, rtol=1e-5)


def test_eager_attention_shows_its_probabilities():
    model, ids = tiny(), tokens(2, 9)
    expected = model(ids).logits
    model.set_attn_implementation("eager")
    out = model(ids, output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(out.logits, expected, atol=2e-5, rtol=1e-5)
    assert len(out.attentions) == 2 and len(out.hidden_states) == 3
    for probabilities in out.attentions:
        assert probabilities.shape == (2, 6, 9, 9)
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 6, 9))
        assert not probabilities.triu(1).any()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_leaves_the_gradients(reentrant: bool):
    ids = tokens(2, 9)
    gradients = []
    for checkpointed in (False, True):
        model = tiny().train()
        if checkpointed:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": reentrant})
            calls: list[int] = []
            model.transformer.encoder["layers"][0].self_attention.register_forward_hook(
                lambda *_, seen=calls: seen.append(1)
            )
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert len(calls) == 2  # once more in the backward pass
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_loss_is_float32_and_shifted():
    model, ids = tiny().bfloat16(), tokens(2, 9)
    out = model(ids, labels=ids.masked_fill(torch.arange(9) < 3, -100))
    expected = F.cross_entropy(out.logits[:, 2:-1].float().flatten(0, 1), ids[:, 3:].flatten())
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss, expected)


def test_dropout_acts_in_training_only():
    ids = tokens(1, 9)
    for option in ("hidden_dropout", "attention_dropout"):
        model = tiny(**{option: 0.5})
        assert torch.equal(model(ids).logits, tiny()(ids).logits)
        model.train()
        assert not torch.allclose(model(ids).logits, model(ids).logits)


def test_folder_of_the_release_loads_and_is_saved_again(tmp_path: Path, golden: Callable[[str], Any]):
    _, weights, io = golden("chatglm2_fp32")
    for name, new in (("weights.safetensors", "model.safetensors"), ("config.json", "config.json")):
        (tmp_path / new).write_bytes((GOLDEN / "chatglm2_fp32" / name).read_bytes())
    model, info = Model.from_pretrained(tmp_path, output_loading_info=True)
    assert model.dtype == torch.float16
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    model.save_pretrained(tmp_path / "again")
    again = Model.from_pretrained(tmp_path / "again", dtype=torch.float32)
    torch.testing.assert_close(again(io["single.input_ids"]).logits, io["single.logits"], atol=1e-5, rtol=1e-5)
    assert again.state_dict().keys() == {name for name in weights if "inv_freq" not in name}


def test_config_keeps_what_it_is_given(tmp_path: Path, golden: Callable[[str], Any]):
    raw = golden("chatglm2_int4")[0] | {"auto_map": {"AutoModel": "m.M"}, "_name_or_path": "THUDM/chatglm2-6b-int4"}
    config = ChatGLM2Config(**raw)
    config.save_pretrained(tmp_path)
    for again in (config, ChatGLM2Config.from_pretrained(tmp_path)):
        kept = again.to_dict()
        for name, value in raw.items():
            if name not in ("torch_dtype", "_name_or_path"):
                assert kept[name] == value, name
        assert again.dtype == torch.float16
        assert (again.num_hidden_layers, again.vocab_size, again.max_position_embeddings) == (3, 160, 64)


def test_meaning_of_rope_ratio_survives_saving(tmp_path: Path):
    for name, meaning in (("chatglm2-6b-32k", "positions"), ("chatglm3-6b-32k", "base"), ("glm-4-9b-chat", "base")):
        config = ChatGLM2Config(**TINY, rope_ratio=16, _name_or_path=f"THUDM/{name}")
        config.save_pretrained(tmp_path)
        assert ChatGLM2Config.from_pretrained(tmp_path).rope_ratio_scales == config.rope_ratio_scales == meaning


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"rmsnorm": False, "post_layer_norm": False}, ["rmsnorm is False, supported is True", "post_layer_norm is"]),
        ({"apply_residual_connection_post_layernorm": True}, ["apply_residual_connection_post_layernorm is True"]),
        ({"multi_query_attention": False, "fp32_residual_connection": True}, ["multi_query_", "fp32_residual_"]),
        ({"num_layers": 0, "hidden_size": "64"}, ["num_layers is 0, expected a positive", "hidden_size is '64'"]),
        ({"kv_channels": 6, "multi_query_group_num": 4}, ["kv_channels is 6", "num_attention_heads 6 is no multiple"]),
        ({"rope_ratio": 16}, ["rope_ratio is 16", '"rope_ratio_scales": "positions"']),
        ({"rope_ratio": 16, "rope_ratio_scales": "both"}, ["rope_ratio_scales 'both'"]),
        ({"rope_ratio": 0}, ["rope_ratio is 0, expected a positive number"]),
    ],
)
def test_config_refuses_what_it_cannot_serve(options: dict[str, Any], parts: list[str]):
    with pytest.raises(ValueError, match="ChatGLM2 config: ") as error:
        ChatGLM2Config(**{**TINY, **options})
    assert all(part in str(error.value) for part in parts)


def test_biases_follow_the_config():
    def biases(**options: Any) -> set[str]:
        return {name.split(".")[-2] for name in tiny(**options).state_dict() if name.endswith("bias")}

    assert biases() == {"query_key_value"}
    assert biases(add_qkv_bias=False) == set()
    assert biases(add_qkv_bias=False, add_bias_linear=True) == {
        "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h",
    }  # fmt: skip


def test_output_layer_can_be_tied_and_resized(tmp_path: Path):
    model = Model(ChatGLM2Config(**TINY, tie_word_embeddings=True)).eval()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    again = Model.from_pretrained(tmp_path)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert torch.equal(again(tokens(1, 5)).logits, model(tokens(1, 5)).logits)
    untied = tiny()
    assert untied.get_output_embeddings().weight is not untied.get_input_embeddings().weight
    before = untied(tokens(1, 5)).logits
    untied.resize_token_embeddings(70)
    assert untied.config.padded_vocab_size == 70
    torch.testing.assert_close(untied(tokens(1, 5)).logits[..., :61], before)


def test_exactly_one_kind_of_input():
    model = tiny()
    embedded = model.get_input_embeddings()(tokens(1, 5))
    assert torch.equal(model(inputs_embeds=embedded).logits, model(tokens(1, 5)).logits)
    for given in ({}, {"input_ids": tokens(1, 5), "inputs_embeds": embedded}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(**given)
