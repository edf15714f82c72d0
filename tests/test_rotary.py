"""Texts of different lengths through one model, as they go through a model that has just been loaded."""

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import qgraft
from qgraft.rotary import by_call

ROPES = {
    "dynamic": {"factor": 2.0},
    "longrope": {
        "short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [2.0 + i for i in range(8)],
        "original_max_position_embeddings": 16, "factor": 2.0,
    },
}  # fmt: skip


def fresh(rope: str, kind: str = "Llama") -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16 if rope == "dynamic" else 32, pad_token_id=None,
        rope_parameters={"rope_type": rope, "rope_theta": 1e4, **ROPES[rope]},
    )  # fmt: skip
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def text(length: int) -> Tensor:
    return torch.randint(3, 64, (1, length), generator=torch.Generator().manual_seed(length))


@torch.inference_mode()
def logits(model: Any, length: int) -> Tensor:
    return model(text(length)).logits


LENGTHS = (30, 12, 24, 8, 30, 20)


@pytest.mark.parametrize(("kind", "rope"), [("Llama", "dynamic"), ("Llama", "longrope"), ("Phi3", "longrope")])
def test_each_text_goes_by_its_own_length(kind: str, rope: str) -> None:
    """The judge: transformers' model, never used before."""
    model = fresh(rope, kind)
    qgraft.attach_lora(model, r=2)
    for length in LENGTHS:
        assert torch.equal(logits(model, length), logits(fresh(rope, kind), length))
    assert torch.equal(logits(copy.deepcopy(model), 24), logits(model, 24))


@pytest.mark.parametrize("rope", ROPES)
def test_texts_in_threads_do_not_share_their_frequencies(rope: str) -> None:
    model = fresh(rope)
    by_call(model)
    want = {length: logits(fresh(rope), length) for length in LENGTHS}
    wrong: list[int] = []

    def ask(length: int) -> None:
        for _ in range(30):
            wrong.extend([length] * (not torch.equal(logits(model, length), want[length])))

    with ThreadPoolExecutor(len(LENGTHS)) as pool:
        list(pool.map(ask, LENGTHS))
    assert wrong == []


@pytest.mark.parametrize("rope", ROPES)
def test_an_answer_that_grows_is_that_of_a_fresh_model(rope: str) -> None:
    model = fresh(rope)
    logits(model, 30)
    by_call(model)  # also where it was used before
    told = {"max_new_tokens": 20, "do_sample": False, "attention_mask": torch.ones(1, 10, dtype=torch.long)}
    answer = model.generate(text(10), **told)
    assert torch.equal(answer, fresh(rope).generate(text(10), **told))


def test_other_rotations_are_left_as_they_are(tiny_gguf: Any) -> None:
    model, _ = qgraft.load(tiny_gguf("llama").path)
    assert "forward" not in vars(model.model.rotary_emb)
