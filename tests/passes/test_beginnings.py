"""Samples that share their beginnings in a row against passes of each by itself."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qgraft
from qgraft.adapters.targets import lora_layers
from qgraft.data.tokenizing import IGNORED, Sample
from qgraft.passes.beginnings import lay_out_samples, multiplicities, row_of, shares_beginnings
from qgraft.passes.decoder import output_head, padding_free, sample_attention
from qgraft.passes.log_probs import text_states
from qgraft.shared_prompts import SharedPrompts

PROMPT = [5, 9, 9, 4, 7]
TEXTS = [
    [*PROMPT, 11, 3], [8, 8, 2], [*PROMPT, 11, 6, 21], [*PROMPT, 2], [8, 8], [*PROMPT, 11, 6, 21], [30, 31, 32],
    [*PROMPT[:3], 40],
]  # fmt: skip


def samples_of(texts: list[list[int]]) -> list[Sample]:
    """Every token but the first a label, so that shared ones predict several."""
    return [Sample(text, [IGNORED, *text[1:]], f"row {n}") for n, text in enumerate(texts)]


@pytest.fixture(params=["llama", "qwen2"])
def model(tiny_gguf, request):
    made, _ = qgraft.load(tiny_gguf(request.param).path, device="cpu")
    qgraft.attach_lora(made, r=2)
    torch.manual_seed(1)
    for _, layer in lora_layers(made):
        nn.init.normal_(layer.loras["default"].lora_B, std=0.05)
    return made.eval()


@pytest.mark.parametrize("seed", range(4))
def test_a_row_holds_every_beginning_once(seed):
    draw = random.Random(seed)
    texts = [[draw.randrange(3) for _ in range(draw.randrange(1, 9))] for _ in range(20)] if seed else TEXTS
    row = row_of(texts, share=True)
    beginnings = {(*text[: n + 1],) for text in texts for n in range(len(text))}
    assert len(row.ids) == len(row.positions) == len(beginnings)
    for text, places in zip(texts, row.texts, strict=True):
        assert [row.ids[place] for place in places] == text
        assert [row.positions[place] for place in places] == [*range(len(text))]
    counts = multiplicities(row.texts, len(row.ids))
    assert int(counts.sum()) == sum(map(len, texts)) and int(counts.min()) >= 1
    apart = row_of(texts, share=False)
    assert apart.ids == [token for text in texts for token in text] and apart.shared() is None


def test_states_and_gradients_are_those_of_samples_alone(model):
    """Up to five copies of a token; its gradient is the sum of theirs."""
    samples, parameters = samples_of(TEXTS), [each for each in model.parameters() if each.requires_grad]
    assert len(parameters) > 10
    found = []
    with sample_attention(model):
        for share in (True, False):
            texts = lay_out_samples(samples, share)
            states, labels = text_states(model, texts)
            loss = F.cross_entropy(output_head(model)(states), labels)
            found.append((states.detach(), labels, torch.autograd.grad(loss, parameters)))
    assert texts.input_ids.shape[1] == sum(map(len, TEXTS))
    (shared, labels, gradients), (_, same_labels, others) = found
    assert torch.equal(labels, same_labels) and labels.tolist() == [token for text in TEXTS for token in text[1:]]
    with torch.no_grad():
        logits = torch.cat([model(torch.tensor([text])).logits[0, :-1] for text in TEXTS])
        torch.testing.assert_close(output_head(model)(shared), logits, rtol=1e-4, atol=1e-5)
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_sharing_is_found_out_where_it_is_worth_it(model, monkeypatch):
    samples, apart = samples_of(TEXTS), samples_of([[n, *range(40, 60)] for n in range(6)])
    assert not shares_beginnings(model, samples)  # attention is transformers' own
    with padding_free(model, samples) as problem:
        assert problem is None and shares_beginnings(model, samples)
        assert not shares_beginnings(model, apart) and not shares_beginnings(model, samples[:1])
        # attention that looks at the row as it stands
        monkeypatch.setattr(SharedPrompts, "spread", lambda self, row: row.repeat(1, 1, 2, 1)[:, :, : len(self.places)])
        assert not shares_beginnings(model, samples)


def test_gradients_of_copies_are_summed_in_one_order():
    row = row_of(TEXTS, share=True)
    shared = row.shared()
    assert shared.copies.shape == (5, len(row.ids))
    x = torch.randn(1, 2, len(row.ids), 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(shared.spread, x)
    y = torch.randn(1, len(shared.places), 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(shared.gathered, y)
