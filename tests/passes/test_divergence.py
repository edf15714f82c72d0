"""The divergence of a student from a teacher and its gradient: TRL's numbers, and closed forms in float64."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from qgraft.passes.divergence import Divergence, Said, likeliest
from qgraft.passes.loss import weighted_loss

GOLDEN = Path(__file__).parent.parent / "golden" / "distillation"
spec = importlib.util.spec_from_file_location("distillation_make", GOLDEN / "make.py")
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)

FOUND = json.loads((GOLDEN / "golden.json").read_text())["losses"]
V = make.VOCABULARY
LABELS = torch.arange(make.PLACES) * 3


def head(states):
    return states


def said(k: int, width: int = V, temperature: float = 1.0) -> Said:
    return likeliest(make.logits(2).float(), head, k=k, width=width, temperature=temperature)


def learned(said: Said, weights=None, **options):
    """(summed loss, gradient of the logits, the loss's own numbers), of logits that are states."""
    asked = {"width": V, "beta": 0.0, "temperature": 1.0, "share": 1.0, **options}
    loss, states = Divergence(LABELS, said, **asked), make.logits(1).float().requires_grad_()
    total, each = weighted_loss(states, weights, head, loss)
    total.backward()
    return total.detach(), states.grad, loss, each


@pytest.mark.parametrize("case", FOUND)
def test_losses_and_gradients_over_all_tokens_are_those_of_trl(case):
    beta, temperature = map(float, case.split())
    total, gradient, *_ = learned(said(V, temperature=temperature), beta=beta, temperature=temperature)
    assert float(total) / make.PLACES == pytest.approx(FOUND[case]["loss"][0], rel=2e-6)
    got = (gradient[:, :3].flatten() / make.PLACES).tolist()
    assert got == pytest.approx(FOUND[case]["gradient"], rel=2e-4, abs=1e-7)


def test_trl_still_says_so():
    pytest.importorskip("trl")
    for case, numbers in make.made().items():
        assert numbers["loss"] == pytest.approx(FOUND[case]["loss"], rel=1e-9)
        assert numbers["gradient"] == pytest.approx(FOUND[case]["gradient"], rel=1e-7, abs=1e-12)


def by_hand(k: int, width: int, beta: float, temperature: float, share: float):
    """(each loss, gradient of their sum, the whole divergence, what the forward KL leaves out), float64 and autograd."""
    student, teacher = make.logits(1).requires_grad_(), make.logits(2)
    log_q, log_p = (F.log_softmax(each[:, :width] / temperature, -1) for each in (student, teacher))
    order = log_p.argsort(descending=True, stable=True)
    log_q, log_p = log_q.gather(1, order), log_p.gather(1, order)

    def apart(q, p):
        if beta in (0.0, 1.0):
            one, other = (p, q) if beta == 0 else (q, p)
            return (one.exp() * (one - other)).sum(-1)
        m = (beta * p.exp() + (1 - beta) * q.exp()).log()
        return beta * (p.exp() * (p - m)).sum(-1) + (1 - beta) * (q.exp() * (q - m)).sum(-1)

    def bucket(each):
        return torch.cat([each[:, :k], each[:, k:].exp().sum(-1, keepdim=True).log()], 1) if k < width else each

    nll = F.cross_entropy(student, LABELS, reduction="none")
    each = share * apart(bucket(log_q), bucket(log_p)) + (1 - share) * nll
    (gradient,) = torch.autograd.grad(each.sum(), student)
    tails = [each[:, k:].log_softmax(-1) for each in (log_q, log_p)]
    left = log_p[:, k:].exp().sum(-1) * (tails[1].exp() * (tails[1] - tails[0])).sum(-1)
    return each.detach(), gradient, apart(log_q, log_p).detach(), left.detach()


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    ("k", "width", "temperature", "share"), [(4, V, 1.0, 1.0), (1, V, 2.0, 0.6), (5, 17, 0.7, 0.25), (17, 17, 1.0, 0.5)]
)
def test_few_tokens_and_the_rest_as_one(k, width, temperature, share, beta):
    options = {"width": width, "beta": beta, "temperature": temperature, "share": share}
    total, gradient, loss, each = learned(said(k, width, temperature), **options)
    expected, slope, whole, left = by_hand(k, width, beta, temperature, share)
    torch.testing.assert_close(each.double(), expected, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), slope, rtol=2e-4, atol=2e-5)
    torch.testing.assert_close(loss.missed.double(), F.cross_entropy(make.logits(1), LABELS, reduction="none"))
    assert (loss.apart.double() <= whole + 1e-5).all()  # what is taken together only looks nearer
    if beta == 0 and k < width:
        torch.testing.assert_close(loss.apart.double() + left, whole, rtol=2e-5, atol=2e-6)
    assert float(total) == pytest.approx(float(expected.sum()), rel=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_the_more_tokens_the_nearer_to_the_whole(beta):
    found = [float(learned(said(k), beta=beta)[0]) for k in (1, 2, 5, 12, V - 1, V)]
    assert found == sorted(found) and found[-1] == pytest.approx(found[-2], rel=1e-5)


def test_labels_weigh_what_they_weigh():
    weights = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 3.0])
    total, gradient, _, each = learned(said(3), weights, beta=0.5)
    _, plain, *_ = learned(said(3), beta=0.5)
    assert float(total) == pytest.approx(float(each @ weights), rel=1e-6)
    torch.testing.assert_close(gradient, plain * weights[:, None])


def test_a_teacher_that_is_certain_and_a_student_that_is_not_at_all():
    """No NaN where probabilities are 0 in float32."""
    teacher, student = torch.full((1, 8), -200.0), torch.zeros(1, 8)
    teacher[0, 3] = 200.0
    student[0, 3] = -300.0
    for beta in (0.0, 0.5, 1.0):
        for k in (2, 8):
            told = likeliest(teacher, head, k=k, width=8, temperature=1.0)
            states = student.clone().requires_grad_()
            loss = Divergence(torch.tensor([3]), told, width=8, beta=beta, temperature=1.0, share=1.0)
            weighted_loss(states, None, head, loss)[0].backward()
            assert states.grad.isfinite().all() and loss.apart.isfinite().all()
    assert float(loss.apart) > 100 and math.isfinite(float(loss.missed))
