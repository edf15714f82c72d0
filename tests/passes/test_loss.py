"""The chunked, label-only loss against the model's own, in values and gradients, for every architecture."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qgraft
from qgraft.attention import SAMPLES
from qgraft.data.batches import IGNORED, collate, count_labels, split_batch, weigh_labels
from qgraft.data.tokenizing import Sample
from qgraft.passes import loss as loss_module
from qgraft.passes.decoder import padding_free
from qgraft.passes.loss import batch_loss, summed_cross_entropy
from qgraft.training.objective import evaluate_samples

MASKED = {"gemma2", "nemotron", "stablelm"}  # these cap their scores or do not pass the bounds of samples on
ARCHITECTURES = ["gemma2", "gemma3", "gpt2", "llama", "nemotron", "phi3", "qwen2", "qwen3", "stablelm", "starcoder2"]


def make_samples(seed: int = 0, count: int = 4, vocabulary: int = 250) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for number in range(count):
        ids = torch.randint(3, vocabulary, (5 + 3 * number,), generator=generator).tolist()
        prompt = 2 + number
        samples.append(Sample(ids, [IGNORED] * prompt + ids[prompt:], f"rows:{number}"))
    return samples


def own_loss(model: nn.Module, samples: list[Sample]) -> torch.Tensor:
    """The sum that transformers computes when each sample is given alone, in the ordinary way."""
    total = torch.zeros(())
    for sample in samples:
        labels = torch.tensor([sample.labels])
        count = int((labels[:, 1:] != IGNORED).sum())
        total = total + model(input_ids=torch.tensor([sample.input_ids]), labels=labels).loss * count
    return total


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_loss_and_lora_gradients_equal_those_of_single_samples(architecture, tiny_gguf):
    model, _ = qgraft.load(tiny_gguf(architecture).path)
    qgraft.attach_lora(model, r=2)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.05)
    samples = make_samples()
    expected = own_loss(model, samples)
    expected.backward()
    reference = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    usual = model.config._attn_implementation  # "sdpa", for gemma2 "eager" in some releases
    with padding_free(model, samples) as problem:
        assert problem is None
        assert (model.config._attn_implementation == SAMPLES) == (architecture not in MASKED)
        total = batch_loss(model, collate(samples))
        total.backward()
    assert model.config._attn_implementation == usual
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-4)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, reference[name], rtol=2e-3, atol=2e-4, msg=name)


@pytest.mark.parametrize("rows", [1, 2, 31, 32, 33, 100])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_chunks_equal_plain_cross_entropy_in_value_and_gradient(rows, smoothing, monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 40 * 4 * 50)  # 40 rows of a vocabulary of 50 at a time
    torch.manual_seed(rows)
    layer = nn.Linear(8, 50).double()
    states = torch.randn(rows, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 50, (rows,))

    def head(x):
        return layer(x)

    head.parameters = list(layer.parameters())
    expected = F.cross_entropy(layer(states), targets, reduction="sum", label_smoothing=smoothing) * 0.25
    wanted = torch.autograd.grad(expected, [states, *layer.parameters()])
    got = summed_cross_entropy(states, targets, head, smoothing) * 0.25
    grads = torch.autograd.grad(got, [states, *layer.parameters()])
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    for grad, reference in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, reference, rtol=1e-4, atol=1e-6)


def test_no_full_logits_matrix_is_ever_made():
    sizes = []

    def head(x):
        sizes.append(len(x))
        return x @ torch.zeros(4, 60_000)

    states = torch.randn(500, 4, requires_grad=True)
    summed_cross_entropy(states, torch.zeros(500, dtype=torch.int64), head).backward()
    assert sum(sizes) == 500
    assert max(sizes) * 60_000 * 4 <= loss_module.CHUNK_BYTES


def test_without_gradients_only_the_value_is_computed(tiny_gguf):
    model, _ = qgraft.load(tiny_gguf("llama").path)
    samples = make_samples()
    with torch.no_grad():
        value = batch_loss(model, collate(samples))
    assert not value.requires_grad
    torch.testing.assert_close(value, own_loss(model, samples), rtol=1e-4, atol=1e-4)


def test_a_model_that_mixes_samples_is_found_out(tiny_gguf, monkeypatch):
    model, _ = qgraft.load(tiny_gguf("llama").path)
    samples = make_samples()
    forward = model.base_model.forward

    def mixing(position_ids=None, cu_seq_lens_q=None, **kwargs):
        if cu_seq_lens_q is not None:
            kwargs["cu_seq_lens_q"] = cu_seq_lens_q[[0, -1]]
        return forward(**kwargs)

    monkeypatch.setattr(model.base_model, "forward", mixing)
    with padding_free(model, samples) as problem:
        assert "does not keep samples apart" in problem
        assert model.config._attn_implementation == "sdpa"


def test_transformers_own_mask_serves_where_the_bounds_are_not_passed_on(tiny_gguf, monkeypatch):
    model, _ = qgraft.load(tiny_gguf("llama").path)
    forward = model.base_model.forward
    monkeypatch.setattr(model.base_model, "forward", lambda cu_seq_lens_q=None, **kwargs: forward(**kwargs))
    samples = make_samples()
    with padding_free(model, samples) as problem:
        assert problem is None
        assert model.config._attn_implementation == "sdpa"
        torch.testing.assert_close(batch_loss(model, collate(samples)), own_loss(model, samples), rtol=1e-4, atol=1e-4)


def test_batches_count_and_split_between_samples():
    samples = make_samples()
    batch = collate(samples)
    lengths = [len(s.input_ids) for s in samples]  # 5, 8, 11, 14
    assert batch["input_ids"].shape == (1, sum(lengths))
    assert count_labels(batch) == sum(sum(label != IGNORED for label in s.labels[1:]) for s in samples)
    assert [part["input_ids"].shape[1] for part in split_batch(batch, 16)] == [13, 11, 14]
    assert [part["input_ids"].shape[1] for part in split_batch(batch, 0)] == lengths
    assert len(split_batch(batch, 1000)) == 1
    assert [part["input_ids"].shape[1] for part in split_batch(batch, 26)] == [24, 14], "as few as possible, then even"
    rejoined = torch.cat([part["labels"] for part in split_batch(batch, 16)], dim=1)
    assert torch.equal(rejoined, batch["labels"])


def weighed_samples() -> list[Sample]:
    """Samples of which some labels weigh 0.25 to 3, and one that has no weights of its own."""
    samples = []
    for number, sample in enumerate(make_samples(seed=5)):
        weights = [
            0.0 if label == IGNORED else 0.25 + (place + number) % 12 / 4 for place, label in enumerate(sample.labels)
        ]
        samples.append(Sample(sample.input_ids, sample.labels, sample.source, weights if number else None))
    return samples


def plain_weighted_loss(model: nn.Module, samples: list[Sample]) -> tuple[torch.Tensor, float]:
    """(sum of weight times cross-entropy over all labels, sum of weights) in float64, from the model's own logits."""
    total, weight = torch.zeros((), dtype=torch.float64), 0.0
    for sample in samples:
        log_p = model(input_ids=torch.tensor([sample.input_ids])).logits[0].double().log_softmax(-1)
        for place, label in enumerate(sample.labels[1:]):
            if label != IGNORED:
                each = 1.0 if sample.weights is None else sample.weights[place + 1]
                total, weight = total - each * log_p[place, label], weight + each
    return total, weight


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_weights_of_labels_reach_loss_and_gradients_of_packed_samples(architecture, tiny_gguf):
    model, _ = qgraft.load(tiny_gguf(architecture).path)
    qgraft.attach_lora(model, r=2)
    torch.manual_seed(1)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        nn.init.normal_(parameter, std=0.05)
    samples = weighed_samples()
    expected, weight = plain_weighted_loss(model, samples)
    wanted = torch.autograd.grad(expected, trained)
    with padding_free(model, samples):
        batch = collate(samples)
        total = batch_loss(model, batch)
        found = torch.autograd.grad(total, trained)
    assert weigh_labels(batch) == pytest.approx(weight)
    torch.testing.assert_close(total.double(), expected, rtol=1e-4, atol=1e-4)
    for grad, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(grad, other, rtol=2e-3, atol=2e-4)


def test_a_held_out_loss_is_the_weighted_mean(tiny_gguf):
    model, _ = qgraft.load(tiny_gguf("llama").path)
    with torch.no_grad():
        total, weight = plain_weighted_loss(model, weighed_samples())
    for tokens in (1, 1000):  # in parts, and at once
        assert evaluate_samples(model, weighed_samples(), tokens).loss == pytest.approx(float(total) / weight, rel=1e-5)
