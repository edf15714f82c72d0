"""The engine on a GPU that is pretended (pretended_gpu.py): the CPU's answers, and a wait or two in a pass."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pretended_gpu import pretended_gpu
from talkers import MIXES, with_adapters

import qgraft
from qgraft.passes.batched_trial import why_not_batched
from qgraft.serving.engine import Engine, answer_all
from qgraft.serving.passes_of import SharedPasses
from qgraft.serving.requests import Request
from qgraft.serving.sampling import Sampling


def requests(mixes: Any) -> list[Request]:
    """Prompts of several lengths, two of which begin alike, with these adapters in turn."""
    prompts = [list(range(5, 5 + n)) for n in (20, 3, 23)] + [[40, 9, 31, 7]]
    draws = [Sampling(temperature=0), Sampling(temperature=0.7, seed=3)]
    return [
        Request(tuple(prompt), mixes[at % len(mixes)], draws[at % 2], max_tokens=5) for at, prompt in enumerate(prompts)
    ]


def answers(model: Any, tokenizer: Any, mixes: Any) -> tuple[list[list[int]], Engine]:
    engine = Engine(model, tokenizer, max_batch=4)
    told = answer_all(engine, requests(mixes))
    engine.stop()
    assert all(each["finish"].error is None for each in told), told
    return [[token.id for token in each["tokens"]] for each in told], engine


def test_texts_share_a_pass(tiny_gguf: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch, "inference_mode", torch.no_grad
    )  # views of pretended tensors, in some releases' rotations
    with pretended_gpu():
        model, _ = qgraft.load(tiny_gguf("llama", config={"num_hidden_layers": 1}).path, device="cuda", dtype="float32")
        assert why_not_batched(model) is None


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_answers_are_the_cpus_and_a_pass_waits_for_its_logits(architecture: str, tiny_gguf: Callable[..., Any]) -> None:
    path = tiny_gguf(architecture).path
    on_cpu, tokenizer = qgraft.load(path, device="cpu", dtype="float32")
    expected, _ = answers(with_adapters(on_cpu), tokenizer, MIXES[:6])
    with pretended_gpu() as gpu:
        model, _ = qgraft.load(path, device="cuda", dtype="float32")
        with_adapters(model)
        for ours, theirs in zip(model.parameters(), on_cpu.parameters(), strict=True):
            ours.data.copy_(theirs.data)
        gpu.waits.clear()
        got, engine = answers(model, tokenizer, MIXES[:6])
        assert got == expected and isinstance(engine.passes, SharedPasses)
        waits = Counter(where.partition(" ")[0] for _, where in gpu.waits)
        assert (
            sum(n for where, n in waits.items() if where.startswith("serving/passes_of.py")) == engine.counts["passes"]
        )
        assert not any(where.startswith("serving/sampling.py") for where in waits), "the CPU's own"
