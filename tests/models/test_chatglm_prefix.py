"""P-Tuning v2 against the numbers of the original code of both generations: every tensor of tests/golden/*_prefix*.

The weights of the base are those of chatglm_fp32 and chatglm2_fp32; the folders hold the prefix alone.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import DynamicCache

from qgraft.adapters.attach_prefix import attach_encoder
from qgraft.adapters.base import find_adapter
from qgraft.adapters.prefix import PrefixConfig, encoder_of
from qgraft.compat import CACHE, cache_in
from qgraft.models.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration
from qgraft.models.chatglm2 import ChatGLM2Config, ChatGLM2ForConditionalGeneration

GOLDEN = Path(__file__).parent.parent / "golden"
FOLDERS = ("chatglm_prefix", "chatglm_prefix_proj", "chatglm2_prefix", "chatglm2_prefix_proj")
GIVEN = ("input_ids", "attention_mask", "position_ids", "labels", "valid", "prefill_len")  # what a case is made of
ENCODER = "transformer.prefix_encoder."
CASES = ("single", "batch", "train")


def names(folder: str) -> list[str]:
    with safe_open(GOLDEN / folder / "io.safetensors", framework="pt") as file:
        return sorted(name for name in file.keys() if name.rsplit(".", 1)[-1] not in GIVEN)  # noqa: SIM118


def golden_model(folder: str, golden: Callable[[str], Any]) -> Any:
    config, prefix, _ = golden(folder)
    generation = folder.partition("_")[0]
    weights = {
        name: tensor.float() for name, tensor in golden(f"{generation}_fp32")[1].items() if "inv_freq" not in name
    }
    if generation == "chatglm":
        model: Any = ChatGLMForConditionalGeneration(ChatGLMConfig(**config))
    else:
        model = ChatGLM2ForConditionalGeneration(ChatGLM2Config(**config))
    model.load_state_dict(weights)
    options = PrefixConfig(config["pre_seq_len"], config["prefix_projection"], layout=generation)
    attach_encoder(model.eval(), "golden", options, {k.removeprefix(ENCODER): v for k, v in prefix.items()})
    return model


def tokens_kv(cache: DynamicCache) -> Tensor:
    """The cache in the original's layout: [layers, 2, tokens, batch, heads, head dim]."""
    return torch.stack([torch.stack((la.keys, la.values)).permute(0, 3, 1, 2, 4) for la in cache.layers])


def prefix_kv(model: Any) -> Tensor:
    """The prefix as the cache of the original begins: [layers, 2, P, 1, heads, head dim]."""
    return (
        encoder_of(find_adapter(model))
        .key_values()
        .detach()
        .unflatten(0, (-1, 2))
        .permute(0, 1, 3, 2, 4)[:, :, :, None]
    )


def run_case(model: Any, io: dict[str, Tensor], case: str) -> dict[str, Tensor]:
    given = {key: io[f"{case}.{key}"] for key in ("attention_mask", "position_ids") if f"{case}.{key}" in io}
    ids = io[f"{case}.input_ids"]
    out = model(ids, labels=io[f"{case}.labels"], output_hidden_states=True, **given)
    kv = torch.cat([prefix_kv(model).expand(-1, -1, -1, len(ids), -1, -1), tokens_kv(cache_in(out))], dim=2)
    results = {
        "logits": out.logits, "loss": out.loss, "hidden_states": torch.stack(out.hidden_states), "kv": kv,
        "last_hidden": model.transformer(ids, use_cache=False, **given).last_hidden_state,
    }  # fmt: skip
    return {f"{case}.{key}": value for key, value in results.items()}


def run_decoding(model: Any, io: dict[str, Tensor]) -> dict[str, Tensor]:
    """A prefill and single steps with the cache; greedy generation of a left-padded batch."""
    ids, start, cache = io["single.input_ids"], int(io["decode.prefill_len"]), DynamicCache()
    positions = io.get("single.position_ids", torch.arange(ids.shape[1])[None])
    logits = [model(ids[:, :start], **{CACHE: cache}).logits]
    for index in range(start, ids.shape[1]):
        step = {"position_ids": positions[..., index : index + 1], CACHE: cache}
        logits.append(model(ids[:, index : index + 1], **step).logits)
    made = model.generate(
        io["gen.input_ids"], attention_mask=io["gen.attention_mask"], position_ids=io["gen.position_ids"],
        max_new_tokens=8, do_sample=False, eos_token_id=None, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    steps = torch.stack(made.logits, dim=1)
    best = steps.topk(2).values
    return {
        "decode.logits": torch.cat(logits, dim=1), "decode.kv": torch.cat([prefix_kv(model), tokens_kv(cache)], dim=2),
        "gen.sequences": made.sequences, "gen.step_logits": steps, "gen.margin": best[..., 0] - best[..., 1],
    }  # fmt: skip


def run_gradients(model: Any, io: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of the loss, as the official script trains, but without dropout."""
    model(io["train.input_ids"], labels=io["train.labels"]).loss.backward()
    return {f"grad.{ENCODER}{name}": p.grad for name, p in encoder_of(find_adapter(model)).named_parameters()}


@pytest.fixture(scope="module")
def computed(golden: Callable[[str], Any]) -> dict[str, dict[str, Tensor]]:
    """Everything that the golden folders hold, computed here."""
    results = {}
    for folder in FOLDERS:
        model, io = golden_model(folder, golden), golden(folder)[2]
        results[folder] = run_gradients(model, io)
        with torch.no_grad():
            for case in CASES:
                results[folder] |= run_case(model, io, case)
            if "mask_in.input_ids" in io:
                results[folder]["mask_in.logits"] = model(
                    io["mask_in.input_ids"], position_ids=io["mask_in.position_ids"]
                ).logits
            results[folder] |= run_decoding(model, io)
            results[folder]["prefix.past"] = prefix_kv(model).expand(-1, -1, -1, 2, -1, -1)
    return results


@pytest.mark.parametrize(("folder", "name"), [(folder, name) for folder in FOLDERS for name in names(folder)])
def test_equals_the_original(folder: str, name: str, computed: Any, golden: Callable[[str], Any]) -> None:
    io = golden(folder)[2]
    got, expected = computed[folder][name], io[name]
    if name in ("batch.logits", "batch.last_hidden", "batch.hidden_states"):  # elsewhere padding: meaningless
        real = io.get("batch.valid", io["batch.attention_mask"]).bool()
        got, expected = got[..., real, :], expected[..., real, :]
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 if "2" in folder else 5e-5)


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_prefix_tensor_is_loaded_and_has_a_gradient(folder: str, golden: Callable[[str], Any]) -> None:
    config, prefix, io = golden(folder)
    tensors = dict(encoder_of(find_adapter(golden_model(folder, golden))).named_parameters())
    assert {ENCODER + name for name in tensors} == set(prefix)
    assert {f"grad.{name}" for name in prefix} == {name for name in io if name.startswith("grad.")}
    assert len(prefix) == (5 if config["prefix_projection"] else 1)


@pytest.mark.parametrize("folder", FOLDERS)
def test_checkpointing_leaves_the_originals_gradients(folder: str, golden: Callable[[str], Any]) -> None:
    model, io = golden_model(folder, golden), golden(folder)[2]
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    model.train()
    enable({"use_reentrant": False})
    encoder_of(find_adapter(model)).eval()  # no dropout
    for name, grad in run_gradients(model, io).items():
        torch.testing.assert_close(grad, io[name], rtol=1e-5, atol=1e-5)


def test_padding_of_the_official_trainer_may_be_hidden(golden: Callable[[str], Any]) -> None:
    """The same logits for all that counts when the model derives masks and positions, and when padding is masked."""
    for folder in FOLDERS[:2]:
        model, io = golden_model(folder, golden), golden(folder)[2]
        ids = io["train.input_ids"]
        real = ids != model.config.pad_token_id
        with torch.no_grad():
            for way in ({}, {"attention_mask": real}):
                logits = model(ids, **way).logits
                torch.testing.assert_close(logits[real], io["train.logits"][real], rtol=1e-5, atol=3e-5)
