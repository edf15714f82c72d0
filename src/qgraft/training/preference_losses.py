"""What is made of the log-probabilities of answers: the losses of preferences, under TRL's names.

    c, r        log-probability of the chosen, the rejected answer: the sum over its tokens, minus the reference's sum
    c', r'      the same divided by the number of tokens
    s(x)        the logistic function; ls = log s;   b = beta, e = label_smoothing, g = simpo_gamma

    sigmoid     -(1 - e) ls(b (c - r)) - e ls(-b (c - r))                       DPO, arXiv:2305.18290; e > 0: conservative DPO
    robust      (-(1 - e) ls(b (c - r)) + e ls(-b (c - r))) / (1 - 2 e)         arXiv:2403.00409
    hinge       max(0, 1 - b (c - r))                                           SLiC, arXiv:2305.10425
    ipo         (c' - r' - 1 / (2 b))^2                                         arXiv:2310.12036, by tokens as its authors do
    sigmoid_norm  -ls(b (c' - r'))                                              DPO by tokens
    exo_pair    KL(s(b (c - r)), 1 - e) of two outcomes                         arXiv:2402.00856
    nca_pair    -ls(b c) - ls(-b c) / 2 - ls(-b r) / 2                          arXiv:2402.05369
    sppo_hard   (c - 1 / (2 b))^2 + (r + 1 / (2 b))^2                           arXiv:2405.00675
    apo_zero    1 - s(b c) + s(b r)                                             arXiv:2408.06266
    apo_down    s(b c) + 1 - s(b (c - r))
    simpo       sigmoid of c' - r' - g / b, without a reference                 arXiv:2405.14734
    orpo        -b ls(log odds of c' - log odds of r'), without one, and the mean loss of the chosen tokens   arXiv:2403.07691
    kto         w (1 - s(b (c - z))), or u (1 - s(b (z - r))) of an answer that is not wanted                 arXiv:2402.01306
    apo_zero_unpaired   w (1 - s(b c)), or u s(b r)

w and u are desirable_weight and undesirable_weight, z is labelled_losses' divergence. `rpo_alpha` adds the mean loss of the
chosen tokens to a loss of pairs. Not here are TRL's losses that hang on which rows share a batch (aot, aot_unpaired), and
sums of several.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class PreferenceOptions:
    """Which loss, and its numbers, as TrainArguments has them."""

    loss_type: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    simpo_gamma: float = 0.5
    rpo_alpha: float = 0.0
    train_on_prompt: bool = False

    @property
    def refers(self) -> bool:
        """Whether answers are compared with what the reference says of them."""
        return self.loss_type not in ("orpo", "simpo")

    @property
    def labelled(self) -> bool:
        """Whether it judges single answers, not pairs."""
        return self.loss_type in LABELLED

    @property
    def alpha(self) -> float:
        """What the mean loss of the chosen tokens is multiplied by."""
        return 1.0 if self.loss_type == "orpo" else self.rpo_alpha


@dataclass(frozen=True)
class Answers:
    """Answers of one side: `ratios` [n], log-probabilities minus the reference's, and their numbers of `tokens` [n]."""

    ratios: Tensor
    tokens: Tensor

    @property
    def by_token(self) -> Tensor:
        """The mean over the tokens of each, [n]."""
        return self.ratios / self.tokens


def _smoothed(margin: Tensor, smoothing: float) -> Tensor:
    return -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)


def _sigmoid(c: Answers, r: Answers, o: PreferenceOptions) -> Tensor:
    return _smoothed(o.beta * (c.ratios - r.ratios), o.label_smoothing)


def _robust(c: Answers, r: Answers, o: PreferenceOptions) -> Tensor:
    margin, e = o.beta * (c.ratios - r.ratios), o.label_smoothing
    return (-(1 - e) * F.logsigmoid(margin) + e * F.logsigmoid(-margin)) / (1 - 2 * e)


def _hinge(c: Answers, r: Answers, o: PreferenceOptions) -> Tensor:
    return torch.relu(1 - o.beta * (c.ratios - r.ratios))


def _ipo(c: Answers, r: Answers, o: PreferenceOptions) -> Tensor:
    return (c.by_token - r.by_token - 1 / (2 * o.beta)) ** 2


def _sigmoid_norm(c: Answers, r: Answers, o: PreferenceOptions) -> Tensor:
    return -F.logsigmoid(o.beta * (c.by_token - r.by_token))


def _exo_pair(c: Answers, r: Answers, o: PreferenceOptions) -> Tensor:
    margin, e = o.beta * (c.ratios - r.ratios), torch.tensor(o.label_smoothing, dtype=torch.float64)
    won, lost = torch.sigmoid(margin), torch.sigmoid(-margin)
    return won * (F.logsigmoid(margin) - float(torch.log1p(-e))) + lost * (F.logsigmoid(-margin) - float(torch.log(e)))


def _nca_pair(c: Answers, r: Answers, o: PreferenceOptions) -> Tensor:
    chosen, rejected = o.beta * c.ratios, o.beta * r.ratios
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def _sppo_hard(c: Answers, r: Answers, o: PreferenceOptions) -> Tensor:
    return (c.ratios - 0.5 / o.beta) ** 2 + (r.ratios + 0.5 / o.beta) ** 2


def _apo_zero(c: Answers, r: Answers, o: PreferenceOptions) -> Tensor:
    return 1 - torch.sigmoid(o.beta * c.ratios) + torch.sigmoid(o.beta * r.ratios)


def _apo_down(c: Answers, r: Answers, o: PreferenceOptions) -> Tensor:
    return torch.sigmoid(o.beta * c.ratios) + 1 - torch.sigmoid(o.beta * (c.ratios - r.ratios))


def _simpo(c: Answers, r: Answers, o: PreferenceOptions) -> Tensor:
    return _smoothed(o.beta * (c.by_token - r.by_token) - o.simpo_gamma, o.label_smoothing)


def _orpo(c: Answers, r: Answers, o: PreferenceOptions) -> Tensor:
    return -o.beta * F.logsigmoid(_log_odds(c.by_token) - _log_odds(r.by_token))


def _log_odds(log_p: Tensor) -> Tensor:
    """log(p / (1 - p)); 1 - p without cancellation: log1p(-p) where p is small, log(-expm1) where it is nearly 1."""
    low = log_p < -0.6931471805599453
    rest = torch.where(
        low, torch.log1p(-log_p.where(low, -1.0).exp()), torch.log(-torch.expm1(log_p.where(~low, -0.1)))
    )
    return log_p - rest


PAIRED: dict[str, Callable[[Answers, Answers, PreferenceOptions], Tensor]] = {
    "sigmoid": _sigmoid, "hinge": _hinge, "ipo": _ipo, "exo_pair": _exo_pair, "nca_pair": _nca_pair, "robust": _robust,
    "sppo_hard": _sppo_hard, "apo_zero": _apo_zero, "apo_down": _apo_down, "sigmoid_norm": _sigmoid_norm,
    "simpo": _simpo, "orpo": _orpo,
}  # fmt: skip
LABELLED = ("kto", "apo_zero_unpaired")


def pair_losses(chosen: Answers, rejected: Answers, options: PreferenceOptions) -> Tensor:
    """The loss of each pair, [n], without what `alpha` adds."""
    return PAIRED[options.loss_type](chosen, rejected, options)


def labelled_losses(ratios: Tensor, desirable: Tensor, divergence: float, options: PreferenceOptions) -> Tensor:
    """The loss of each answer, [n].

    Args:
        ratios: [n] log-probabilities minus the reference's; desirable: [n] bool.
        divergence: z, how much likelier than for the reference answers have become that do not belong to their prompts; an
            estimate of the divergence of the two, without gradient and never below 0.
    """
    sign = torch.where(desirable, 1.0, -1.0).to(ratios)
    weights = torch.where(desirable, options.desirable_weight, options.undesirable_weight).to(ratios)
    around = divergence if options.loss_type == "kto" else 0.0
    return weights * (1 - torch.sigmoid(options.beta * sign * (ratios - around)))


def rewards(answers: Answers, options: PreferenceOptions) -> Tensor:
    """What TRL calls the rewards of answers, [n], without gradient."""
    return options.beta * (answers.ratios if options.refers else answers.by_token).detach()
