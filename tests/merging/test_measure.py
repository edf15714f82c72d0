"""Losses and divergences against the model's own logits in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import qgraft
from qgraft.adapters.choose import adapters_off
from qgraft.data.tokenizing import Sample
from qgraft.merging.measure import CHUNK_ROWS, compare, states_of
from qgraft.passes.decoder import output_head


def samples_of(vocabulary: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(4, vocabulary, (length,), generator=generator).tolist() for length in (30, 7, 90, 64)]
    return [Sample(row, [-100] * (n + 1) + row[n + 1 :], f"row {n}") for n, row in enumerate(rows)]


def own_logits(model, samples: list[Sample]) -> tuple[Tensor, Tensor]:
    """(float64 logits that predict the labels, the labels) by the model's own passes, one a sample."""
    logits, labels = [], []
    for sample in samples:
        with torch.no_grad():
            all_ = model(torch.tensor([sample.input_ids])).logits[0, :-1].double()
        shifted = torch.tensor(sample.labels[1:])
        logits.append(all_[shifted != -100])
        labels.append(shifted[shifted != -100])
    return torch.cat(logits), torch.cat(labels)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])  # gemma2 caps its logits
def test_loss_and_divergence_are_those_of_the_models_own_logits(trained, architecture):
    model, _ = trained(architecture).load()
    samples = samples_of(model.config.vocab_size)
    head = output_head(model)
    states, labels = states_of(model, samples)
    logits, expected_labels = own_logits(model, samples)
    assert torch.equal(labels, expected_labels) and len(labels) > CHUNK_ROWS
    expected = float(F.cross_entropy(logits, labels))
    with adapters_off(model):
        others, _ = states_of(model, samples)
        other_logits, _ = own_logits(model, samples)
    log_p, log_q = logits.log_softmax(-1), other_logits.log_softmax(-1)
    forward = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    backward = float((log_q.exp() * (log_q - log_p)).sum(-1).mean())
    assert forward != pytest.approx(backward, rel=0.01)
    other_loss, tolerance = float(F.cross_entropy(other_logits, labels)), {"rel": 1e-3, "abs": 1e-6}
    compared = compare(states, others, head, labels)
    assert compared.losses == pytest.approx((expected, other_loss), rel=1e-5)
    assert compared.divergence == pytest.approx(forward, **tolerance)
    assert compared.same == float((logits.argmax(-1) == other_logits.argmax(-1)).double().mean())
    assert compare(others, states, head).divergence == pytest.approx(backward, **tolerance)
    weights = torch.linspace(0.0, 2.0, len(labels))
    weighted = weights.double() @ F.cross_entropy(other_logits, labels, reduction="none") / weights.double().sum()
    assert compare(states, others, head, labels, weights).losses[1] == pytest.approx(float(weighted), rel=1e-5)
    itself = compare(states, states, head)
    assert itself.divergence == pytest.approx(0.0, abs=1e-6) and itself.same == 1.0


def test_measuring_leaves_no_graph_and_the_models_attention(trained):
    model, _ = trained().load()
    before = model.config._attn_implementation
    states, _ = states_of(model, samples_of(model.config.vocab_size))
    assert not states.requires_grad and model.config._attn_implementation == before
    assert qgraft.active_adapters(model) == {"default": 1.0}


def test_no_labels_are_no_loss():
    def head(states: Tensor) -> Tensor:
        return states

    empty = torch.empty(0, 5)
    compared = compare(empty, empty, head, torch.empty(0, dtype=torch.int64))
    assert compared.losses == (0.0, 0.0) and compared.divergence == 0.0
