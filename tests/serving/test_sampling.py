"""Penalties and cuts are those of transformers' own; draws follow the seed."""

from typing import Any

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qgraft.errors import OptionError
from qgraft.passes.broken import BrokenLogitsError
from qgraft.serving.sampling import Sampler, Sampling


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_p": 1e-6}, {"top_k": 1},
     {"top_k": 512}, {"top_k": 600, "top_p": 0.5, "temperature": 5.0}, {"temperature": 9.0, "top_p": 0.9},
     {"top_k": 1000, "min_p": 1e-9},
     {"temperature": 1.3, "top_k": 9, "top_p": 0.7, "min_p": 0.05}, {"temperature": 0.5, "top_p": 0.95, "min_p": 0.3}],
)  # fmt: skip
def test_cuts_are_those_of_transformers(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    for size in (*[40] * 4, *[3000] * 4):
        logits = torch.randn(size) * 3
        s = Sampling(**options)
        expected = logits[None]
        for warper in (
            TemperatureLogitsWarper(s.temperature), TopKLogitsWarper(s.top_k or size), TopPLogitsWarper(s.top_p),
            MinPLogitsWarper(s.min_p),
        ):  # fmt: skip
            expected = warper(torch.zeros(1, 1, dtype=torch.long), expected)
        tokens, shares = Sampler(s, []).shares(logits / s.temperature)
        got = torch.zeros(size).index_copy(0, tokens, shares / shares.sum())
        torch.testing.assert_close(got, expected[0].softmax(-1))


def test_penalties() -> None:
    torch.manual_seed(1)
    logits, prompt, said = torch.randn(20) * 3, [3, 4, 4], [7, 7, 4]
    sampler = Sampler(Sampling(temperature=0, repetition_penalty=1.7), prompt)
    for token in said:
        sampler.draw(torch.nn.functional.one_hot(torch.tensor(token), 20).float() * 99)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt + said]), logits[None].clone())[0]
    torch.testing.assert_close(sampler.penalized(logits), expected)
    # platform.openai.com/docs: mu[j] -= c[j] * alpha_frequency + float(c[j] > 0) * alpha_presence, and logit_bias added
    options = {"presence_penalty": 0.5, "frequency_penalty": 0.25, "logit_bias": {2: -100, 9: 3}}
    sampler = Sampler(Sampling(temperature=0, **options), prompt)
    for token in said:
        sampler.draw(torch.nn.functional.one_hot(torch.tensor(token), 20).float() * 999)
    expected = logits.clone()
    for token, change in ((7, -1.0), (4, -0.75), (2, -100), (9, 3)):
        expected[token] += change
    torch.testing.assert_close(sampler.penalized(logits), expected)


def test_draws_follow_the_seed_and_the_shares() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    one, same, other = (Sampler(Sampling(seed=seed), []) for seed in (1, 1, 2))
    drawn = [[sampler.draw(logits).id for _ in range(800)] for sampler in (one, same, other)]
    assert drawn[0] == drawn[1] != drawn[2]
    counts = torch.bincount(torch.tensor(drawn[0]), minlength=3) / 800
    torch.testing.assert_close(counts, logits.exp(), atol=0.07, rtol=0)  # four standard deviations


def test_every_bit_of_a_seed_counts() -> None:
    """torch's generator on a CPU takes seeds modulo 2^32."""
    logits = torch.zeros(30000)
    seeds = (7, 7 + 2**32, 7 + 2**63, 2**64 - 1)
    drawn = [tuple(Sampler(Sampling(seed=seed), []).draw(logits).id for _ in range(2)) for seed in (*seeds, *seeds)]
    assert drawn[:4] == drawn[4:] and len(set(drawn)) == 4
    with pytest.raises(OptionError, match="seed"):
        Sampling(seed=2**64)


def test_what_is_not_allowed_has_no_share() -> None:
    torch.manual_seed(0)
    logits, allowed = torch.randn(1500), torch.arange(1504) % 10 == 7
    expected = max(range(7, 1500, 10), key=lambda token: float(logits[token]))
    assert expected != int(logits.argmax())
    for options in ({"temperature": 0}, {"temperature": 1}, {"temperature": 9, "top_p": 0.9}, {"min_p": 0.01}):
        sampler = Sampler(Sampling(seed=3, **options), [])
        drawn = {sampler.draw(logits, allowed).id for _ in range(60)}
        assert all(token % 10 == 7 for token in drawn) and (len(drawn) > 5 or drawn == {expected}), options
    token = Sampler(Sampling(top_k=1, logprobs=1), []).draw(logits, allowed)  # the cut is of what is allowed
    assert token.id == expected and token.top[0][0] == int(logits.argmax())
    with pytest.raises(BrokenLogitsError, match="form"):
        Sampler(Sampling(), []).draw(logits, torch.zeros(1504, dtype=torch.bool))


def test_log_probabilities_are_the_models() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, -1.0])
    token = Sampler(Sampling(temperature=0, logprobs=2, logit_bias={3: 100}), []).draw(logits)
    assert token.id == 3 and token.logprob == pytest.approx(float(logits.log_softmax(-1)[3]))
    assert [each for each, _ in token.top] == [1, 2]
    assert Sampler(Sampling(temperature=0, logprobs=0), []).draw(logits).top == ()


def test_broken_logits_and_options() -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(BrokenLogitsError, match="not finite"):
            Sampler(Sampling(), []).draw(torch.tensor([1.0, value]))
    with pytest.raises(BrokenLogitsError):
        Sampler(Sampling(), []).draw(torch.full((3,), -torch.inf))
    assert Sampler(Sampling(temperature=0), []).draw(torch.tensor([-torch.inf, 0.0])).id == 1
    for options in ({"temperature": -1}, {"top_p": 0}, {"min_p": 2}, {"seed": -1}, {"logprobs": 21}, {"top_k": -2},
                    {"presence_penalty": 3}, {"repetition_penalty": 0}, {"logit_bias": {5: float("nan")}}):  # fmt: skip
        with pytest.raises(OptionError):
            Sampling(**options)
