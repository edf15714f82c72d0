"""What qgraft makes of one architecture, measured by transformers' own model of the same weights."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from kinds import WORDS, tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel

import qgraft
from qgraft.data.batches import IGNORED, collate
from qgraft.data.tokenizing import Sample
from qgraft.errors import QgraftError
from qgraft.experts import ExpertStack, QuantizedExperts
from qgraft.formats import dequantize
from qgraft.linear import QuantizedEmbedding, QuantizedLinear
from qgraft.passes.decoder import padding_free
from qgraft.passes.decoding import fast_decoding
from qgraft.passes.fused import fused_modules
from qgraft.passes.loss import batch_loss, check_gradient

GREEDY: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
LENGTHS = (7, 9, 40)  # the last one is longer than every window


def ids_of(length: int, seed: int) -> list[int]:
    return torch.randint(3, WORDS - 10, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def samples() -> list[Sample]:
    rows = [ids_of(length, seed) for seed, length in enumerate(LENGTHS)]
    return [Sample(ids, [IGNORED] * (len(ids) // 2) + ids[len(ids) // 2 :], "") for ids in rows]


def judge(model: PreTrainedModel, folder: Path) -> None:
    """Assert that the model, written to a folder, is computed exactly. Raises QgraftError where it is refused.

    The measure is the model itself, not what transformers reads from the folder: with some kinds that is another one.
    """
    model.save_pretrained(folder / "float")
    reference = copy.deepcopy(model)
    same(logits(qgraft.load(folder / "float", device="cpu")[0]), logits(reference), "logits of the float folder")
    packed, _ = qgraft.load(folder / "float", device="cpu", quantize="q8_0")
    reference = dequantized(reference, packed)
    same(logits(packed), logits(reference), "logits, packed")
    sees_the_past_alone(packed)
    answers_alike(packed, reference)
    written_and_read(packed, folder)
    trains_alike(packed)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids_of(40, 5)]), use_cache=False).logits


def same(got: Tensor, expected: Tensor, what: str, tolerance: float = 2e-4) -> None:
    off = float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
    assert got.shape == expected.shape and off <= tolerance, f"{what}: off by {off:.2g} of the largest"


def sees_the_past_alone(model: nn.Module) -> None:
    """The last token changes nothing of what is said before it."""
    ids = torch.tensor([ids_of(40, 5)])
    other = torch.cat([ids[:, :-1], 3 + (ids[:, -1:] + 7) % 100], 1)
    with torch.no_grad():
        before, after = (model(each, use_cache=False).logits[:, :-1] for each in (ids, other))
    same(after, before, "logits before another last token", 1e-5)


def dequantized(reference: PreTrainedModel, packed: nn.Module) -> PreTrainedModel:
    """transformers' model with the values that the packed weights stand for."""
    for path, module in packed.named_modules():
        if isinstance(module, QuantizedLinear | QuantizedEmbedding):
            weight: Any = reference.get_submodule(path).weight
            value = dequantize(module.packed_weight.get(), torch.float32)
            weight.data = value if isinstance(reference.get_submodule(path), nn.Linear | nn.Embedding) else value.T
        if isinstance(module, QuantizedExperts):
            experts: Any = reference.get_submodule(path.rpartition(".")[0])
            parts = [
                dequantize(stack.packed, torch.float32).unflatten(0, stack_shape(stack))
                for stack in module.stacks().values()
            ]
            value = torch.stack(parts, 2).flatten(1, 2) if module.alternates and parts[1:] else torch.cat(parts, 1)
            parameter = getattr(experts, path.rpartition(".")[2])
            parameter.data = (value.transpose(1, 2) if experts.is_transposed else value).contiguous()
    return reference


def stack_shape(stack: ExpertStack) -> tuple[int, int]:
    return stack.num_experts, stack.out_features


def answers_alike(packed: PreTrainedModel, reference: PreTrainedModel) -> None:
    """Greedy tokens, from a prompt longer than the window, with fast decoding on."""
    prompt = torch.tensor([ids_of(20, 9)])
    expected = reference.generate(prompt, **GREEDY)
    with fast_decoding(packed):
        got = packed.generate(prompt, **GREEDY)
    assert torch.equal(got, expected), f"greedy tokens: {got[0, 20:].tolist()} for {expected[0, 20:].tolist()}"


def written_and_read(packed: PreTrainedModel, folder: Path) -> None:
    """A float folder that was loaded is saved as it was."""
    model, _ = qgraft.load(folder / "float", device="cpu")
    qgraft.save(model, folder / "saved")
    same(logits(qgraft.load(folder / "saved", device="cpu")[0]), logits(model), "logits after saving", 1e-6)


def trains_alike(model: PreTrainedModel) -> None:
    """Loss and gradients of LoRAs on three samples: as a run computes them, and by the model's own forward pass."""
    qgraft.attach_lora(model, r=2)
    generator = torch.Generator().manual_seed(3)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    expected = gradients(model, trained, lambda: own_loss(model))
    with padding_free(model, samples()) as problem:
        for fused in (nullcontext(), fused_modules(model)):
            with fused:
                if problem is None:
                    alike(gradients(model, trained, lambda: batch_loss(model, collate(samples()))), expected, "packed")
                alone = lambda: sum(batch_loss(model, collate([sample])) for sample in samples())  # noqa: E731
                alike(gradients(model, trained, alone), expected, "alone")


def own_loss(model: nn.Module) -> Tensor:
    total = torch.zeros(())
    for sample in samples():
        rows = model(torch.tensor([sample.input_ids]), use_cache=False).logits[0, :-1].float()
        labels = torch.tensor(sample.labels[1:])
        total = total + F.cross_entropy(rows, labels, ignore_index=IGNORED, reduction="sum")
    return total


def gradients(
    model: nn.Module, trained: dict[str, nn.Parameter], loss: Callable[[], Any]
) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    value = loss()
    check_gradient(model, value)
    value.backward()
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in trained.items()}
    return float(value), found


def alike(got: tuple[float, dict[str, Tensor]], expected: tuple[float, dict[str, Tensor]], what: str) -> None:
    assert abs(got[0] - expected[0]) <= 1e-4 * abs(expected[0]), f"loss {what}: {got[0]:.4f} for {expected[0]:.4f}"
    largest = max(float(grad.abs().max()) for grad in expected[1].values())
    for name, grad in expected[1].items():
        off = float((got[1][name] - grad).abs().max()) / largest
        assert off <= 1e-3, f"gradient {what} of {name}: off by {off:.2g} of the largest"


def outcome(kind: str, folder: Path) -> str:
    """`exact`, `refused: why`, `wrong: what`, or `not tried: why` where no tiny model of the kind works in transformers."""
    try:
        own_answers(tiny_model(kind))
        model = tiny_model(kind)  # some keep what they answered in their modules
    except Exception as error:
        return f"not tried: {one_line(error)}"
    try:
        judge(model, folder)
    except AssertionError as error:
        return f"wrong: {one_line(error)}"
    except QgraftError as error:
        return f"refused: {one_line(error).replace(str(folder), 'the folder')}"
    return "exact"


def own_answers(model: PreTrainedModel) -> None:
    """That transformers' own model computes, answers and has a gradient, without any of ours."""
    logits(model)
    model.generate(torch.tensor([ids_of(20, 9)]), **GREEDY)
    own_loss(model).backward()
    model.zero_grad()


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split()).replace("|", "/")[:160]
