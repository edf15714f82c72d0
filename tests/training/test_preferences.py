"""Losses of preferences and their gradients: TRL's numbers, closed forms in float64, and a pair's prompt in a pass once."""

import json
import math
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qgraft.adapters.attach import attach_lora
from qgraft.adapters.base import find_adapter
from qgraft.adapters.choose import adapters_off
from qgraft.data.preference_samples import Preference, mismatched
from qgraft.data.tokenizing import IGNORED, Sample
from qgraft.errors import OptionError
from qgraft.passes.decoder import padding_free, sample_attention
from qgraft.passes.log_probs import lay_out, log_probs, shares_prompts, text_sums
from qgraft.training.preference_losses import PAIRED, Answers, PreferenceOptions, labelled_losses, pair_losses
from qgraft.training.preferences import PreferenceOptimization, with_reference
from qgraft.training.stages import STAGES, preferring

GOLDEN = Path(__file__).parent.parent / "golden" / "preferences"
sys.path.insert(0, str(GOLDEN))

from tiny import ALPHA, NUMBERS, PAIRS, RANK, TARGETS, fill_lora, tiny_model  # noqa: E402

FOUND = json.loads((GOLDEN / "golden.json").read_text())["losses"]


def sample(prompt: list[int], answer: list[int]) -> Sample:
    return Sample([*prompt, *answer], [*([IGNORED] * len(prompt)), *answer], "rows:1")


def pairs() -> list[Preference]:
    return [Preference((sample(prompt, chosen), sample(prompt, rejected))) for prompt, chosen, rejected in PAIRS]


def singles(kto: bool) -> list[Preference]:
    rows = [Preference((sample(prompt, answer),), label) for prompt, chosen, rejected in PAIRS
            for answer, label in ((chosen, True), (rejected, False))]  # fmt: skip
    return mismatched(rows, 64) if kto else rows


def options(loss: str) -> PreferenceOptions:
    smoothed = loss in ("robust", "exo_pair", "simpo")
    numbers = {name: value for name, value in NUMBERS.items() if name != "label_smoothing" or smoothed}
    return PreferenceOptions(loss, **numbers, train_on_prompt=loss == "orpo")


def adapted():
    model = tiny_model()
    attach_lora(model, r=RANK, lora_alpha=ALPHA, target_modules=",".join(TARGETS))
    fill_lora(lora_parameters(model))
    return model


def lora_parameters(model) -> dict[str, torch.nn.Parameter]:
    """By PEFT's names: model.layers.0.mlp.down_proj.lora_A.weight."""
    found = {}
    for path, part in find_adapter(model, "default").parts.items():
        found |= {f"{path}.lora_A.weight": part.lora_A, f"{path}.lora_B.weight": part.lora_B}
    return found


def learned(model, rows, objective, tokens: int, asked: bool = True):
    """(loss, {name: gradient}, metrics) of one step on these rows, in passes of so many tokens."""
    if objective.options.refers and asked:
        with adapters_off(model):
            rows = with_reference(model, rows, 64, objective)
    objective.begin(model, rows, rows, tokens)
    total, sums = 0.0, dict.fromkeys(objective.names, 0.0)
    for batch in objective.batches(rows, tokens):
        outcome = objective.outcome(model, batch)
        loss = outcome.loss / objective.count(rows)
        loss.backward()
        total += float(loss.detach())
        sums = {name: value + float(outcome.metrics[name]) for name, value in sums.items()}
    gradients = {name: parameter.grad.clone() for name, parameter in lora_parameters(model).items()}
    model.zero_grad()
    return total, gradients, objective.means(sums, len(rows))


@pytest.mark.parametrize("shape", ["shared", "whole", "alone"])
@pytest.mark.parametrize("loss", FOUND)
def test_losses_and_gradients_are_those_of_trl(loss, shape):
    model, expected = adapted(), FOUND[loss]
    labelled = options(loss).labelled
    if labelled and shape == "shared":
        pytest.skip("single answers share no prompt")
    objective = PreferenceOptimization(options(loss), alone=shape == "alone", shared=shape == "shared")
    rows = singles(loss == "kto") if labelled else pairs()
    with sample_attention(model) if shape != "alone" else nullcontext():
        found, gradients, metrics = learned(model, rows, objective, {"alone": 0, "shared": 24, "whole": 1000}[shape])
    assert found == pytest.approx(expected["loss"], rel=2e-6, abs=1e-7)
    for name, (norm, *first) in expected["gradients"].items():
        assert float(gradients[name].norm()) == pytest.approx(norm, rel=2e-5, abs=1e-7), name
        assert gradients[name].flatten()[:4].tolist() == pytest.approx(first, rel=1e-4, abs=1e-6), name
    known = {name: value for name, value in expected["metrics"].items() if name in metrics}
    assert {"rewards/chosen", "rewards/rejected", "rewards/margins"} <= known.keys()
    for name, value in known.items():
        assert metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_trl_still_says_so():
    """Made anew where TRL is installed: its releases change their formulas."""
    pytest.importorskip("trl")
    code = "import json, sys; sys.path.insert(0, sys.argv[1]); import make; print('MADE', json.dumps(make.made()))"
    done = subprocess.run([sys.executable, "-c", code, str(GOLDEN)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    made = json.loads(done.stdout.rpartition("MADE ")[2])
    assert made.keys() == FOUND.keys()
    for loss, expected in FOUND.items():
        assert made[loss]["loss"] == pytest.approx(expected["loss"], rel=1e-5), loss
        for name, numbers in expected["gradients"].items():
            assert made[loss]["gradients"][name] == pytest.approx(numbers, rel=1e-3, abs=1e-6), (loss, name)


def test_every_loss_that_trl_was_asked_for_is_here():
    assert set(FOUND) == {*PAIRED, "kto", "apo_zero_unpaired"}


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


CLOSED = {
    "sigmoid": lambda c, r, n, m: -0.9 * math.log(sigma(0.3 * (c - r))) - 0.1 * math.log(sigma(0.3 * (r - c))),
    "robust": lambda c, r, n, m: (-0.9 * math.log(sigma(0.3 * (c - r))) + 0.1 * math.log(sigma(0.3 * (r - c)))) / 0.8,
    "hinge": lambda c, r, n, m: max(0.0, 1 - 0.3 * (c - r)),
    "ipo": lambda c, r, n, m: (c / n - r / m - 1 / 0.6) ** 2,
    "sppo_hard": lambda c, r, n, m: (c - 1 / 0.6) ** 2 + (r + 1 / 0.6) ** 2,
    "apo_zero": lambda c, r, n, m: 1 - sigma(0.3 * c) + sigma(0.3 * r),
    "apo_down": lambda c, r, n, m: sigma(0.3 * c) + 1 - sigma(0.3 * (c - r)),
    "simpo": lambda c, r, n, m: -0.9 * math.log(sigma(0.3 * (c / n - r / m) - 0.5))
    - 0.1 * math.log(sigma(0.5 - 0.3 * (c / n - r / m))),
    "orpo": lambda c, r, n, m: -0.3 * math.log(sigma(
        math.log(math.exp(c / n) / (1 - math.exp(c / n))) - math.log(math.exp(r / m) / (1 - math.exp(r / m))))),
}  # fmt: skip


@pytest.mark.parametrize("loss", CLOSED)
def test_losses_are_their_formulas(loss):
    chosen = torch.tensor([-2.0, -0.3, -7.5], dtype=torch.float64)
    rejected = torch.tensor([-3.0, -9.0, -0.4], dtype=torch.float64)
    counts = torch.tensor([3.0, 1.0, 5.0], dtype=torch.float64), torch.tensor([2.0, 4.0, 1.0], dtype=torch.float64)
    got = pair_losses(Answers(chosen, counts[0]), Answers(rejected, counts[1]),
                      PreferenceOptions(loss, beta=0.3, label_smoothing=0.1))  # fmt: skip
    columns = (column.tolist() for column in (chosen, rejected, *counts))
    assert got.tolist() == pytest.approx([CLOSED[loss](*row) for row in zip(*columns, strict=True)], rel=1e-12)


@pytest.mark.parametrize("loss", sorted(PAIRED))
def test_gradients_of_losses_are_their_differences(loss):
    ratios = [torch.tensor(values, dtype=torch.float64, requires_grad=True)
              for values in ([-2.0, -0.31, -70.0, -0.02], [-3.0, -9.0, -0.4, -60.0])]  # fmt: skip
    tokens = torch.tensor([3.0, 1.0, 5.0, 2.0], dtype=torch.float64)
    asked = PreferenceOptions(loss, beta=0.2, label_smoothing=0.1)
    assert torch.autograd.gradcheck(lambda c, r: pair_losses(Answers(c, tokens), Answers(r, tokens), asked), ratios)


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_gradients_of_labelled_losses_are_their_differences(loss):
    ratios = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64, requires_grad=True)
    wanted, asked = (
        torch.tensor([True, False, True]),
        PreferenceOptions(loss, desirable_weight=1.5, undesirable_weight=0.5),
    )
    assert torch.autograd.gradcheck(lambda x: labelled_losses(x, wanted, 0.25, asked), ratios)
    around = 0.25 if loss == "kto" else 0.0
    expected = [1.5 * (1 - sigma(0.1 * (2.0 - around))), 0.5 * (1 - sigma(0.1 * (around + 1.0))),
                1.5 * (1 - sigma(0.1 * (0.5 - around)))]  # fmt: skip
    assert labelled_losses(ratios, wanted, 0.25, asked).tolist() == pytest.approx(expected, rel=1e-12)


def test_a_label_has_the_log_probability_of_the_models_own_logits():
    model, rows = adapted(), pairs()
    with sample_attention(model):
        texts = lay_out([row.texts for row in rows], [row.shared for row in rows])
        got, prompts = text_sums(log_probs(model, texts), texts)
    assert texts.input_ids.shape[1] == sum(len(p) + len(c) + len(r) for p, c, r in PAIRS)
    assert float(prompts.detach()) == 0
    for value, text in zip(got.tolist(), (text for row in rows for text in row.texts), strict=True):
        logits = model(torch.tensor([text.input_ids])).logits[0].detach().double().log_softmax(-1)
        expected = sum(float(logits[at - 1, label]) for at, label in enumerate(text.labels) if label != IGNORED)
        assert value == pytest.approx(expected, rel=1e-5)


def test_sharing_is_found_out_on_the_model():
    model = adapted()
    with padding_free(model, [text for row in pairs() for text in row.texts]) as problem:
        assert problem is None
        assert shares_prompts(model, pairs())
        without = [Preference((sample([2], [3, 1]), sample([4], [5, 1])))]
        assert not shares_prompts(model, without)
    assert not shares_prompts(model, pairs())  # attention is transformers' own again


def test_answers_may_begin_alike_and_the_prompt_ends_before_them():
    row = pairs()[3]  # both answers begin with 27
    assert row.shared == 2
    other = Preference((sample([2, 3], [4, 1]), sample([2, 9], [5, 1])))
    assert other.shared == 1


def test_a_trained_output_layer_gets_its_gradient():
    model = tiny_model()
    attach_lora(model, r=RANK, target_modules="lm_head,q_proj")
    fill_lora(lora_parameters(model))
    rows = [replace(row, reference=(0.0, 0.0)) for row in pairs()]
    objective = PreferenceOptimization(options("sigmoid"))
    with sample_attention(model):
        _, got, _ = learned(model, rows, objective, 1000, asked=False)

    def by_hand() -> torch.Tensor:
        sums = []
        for text in (text for row in rows for text in row.texts):
            logits = model(torch.tensor([text.input_ids])).logits[0].log_softmax(-1)
            sums.append(sum(logits[at - 1, label] for at, label in enumerate(text.labels) if label != IGNORED))
        margins = torch.stack([chosen - rejected for chosen, rejected in zip(sums[::2], sums[1::2], strict=True)])
        return -torch.nn.functional.logsigmoid(NUMBERS["beta"] * margins).mean()

    by_hand().backward()
    for name, parameter in lora_parameters(model).items():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("stage", "said", "problem"),
    [
        ("ppo", {}, "stage='ppo': expected sft, dpo, ipo, orpo, simpo, kto"),
        ("DPO", {}, r"stage='DPO': expected sft, .*\n.*did you mean dpo"),
        ("sft", {"beta": 0.2}, "beta: stage sft learns no preferences"),
        ("dpo", {"loss_type": "kto"}, "loss_type='kto': stage dpo has sigmoid"),
        ("kto", {"loss_type": "hinge"}, "loss_type='hinge': stage kto has kto, apo_zero_unpaired"),
        ("dpo", {"desirable_weight": 2.0}, "desirable_weight: loss_type sigmoid does not read it"),
        ("dpo", {"loss_type": "robust", "label_smoothing": 0.5}, "below 0.5"),
        ("dpo", {"label_smoothing": 0.7}, "label_smoothing=0.7: expected the share .* below 0.5"),
        ("simpo", {"label_smoothing": 0.5}, "below 0.5"),
        ("dpo", {"loss_type": "exo_pair"}, "needs label_smoothing above 0"),
        ("dpo", {"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing: loss_type hinge does not read it"),
        ("simpo", {"rpo_alpha": 1.0, "desirable_weight": 1.0}, "desirable_weight"),
    ],
)
def test_what_has_no_meaning_is_refused(stage, said, problem):
    with pytest.raises(OptionError, match=problem.replace("[", r"\[")):
        preferring(stage, said)


def test_a_stage_has_the_loss_of_its_name():
    assert {stage: preferring(stage, {}).loss_type for stage in STAGES if STAGES[stage]} == {
        "dpo": "sigmoid", "ipo": "ipo", "orpo": "orpo", "simpo": "simpo", "kto": "kto",
    }  # fmt: skip
    assert preferring("sft", {}) is None
