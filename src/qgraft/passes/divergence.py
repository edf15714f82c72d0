"""How far a student's next tokens are from a teacher's, of whom the k likeliest and the rest in sum are known.

    p, q          teacher and student, softmax(logits / temperature) over the first `width` ids, which both have
    outcomes s    the teacher's k likeliest tokens one by one, and all others as one: k + 1 of them, k where k = width
    beta = 0      sum_s p_s (log p_s - log q_s)                     forward KL, the teacher's modes all count
    beta = 1      sum_s q_s (log q_s - log p_s)                     reverse KL
    between       b KL(p || m) + (1 - b) KL(q || m), m = b p + (1 - b) q     generalized Jensen-Shannon, arXiv:2306.13649

These are TRL's (GKDTrainer.generalized_jsd_loss), without a factor of temperature^2 as there. Tokens taken together can only
look nearer than they are. Of the forward KL exactly p_rest KL(p | rest || q | rest) is left out, so p_rest says how much the
k leave open; with k = width it is the divergence itself. Not chosen: p and q made to sum up to 1 over the k, for which a
student that gives the rest all its probability is as good as any.

The gradient, with g_s = d loss / d log q_s and G their sum, is written over the logits:

    a token of the k     (g_i - q_i G) / temperature
    another one          q_j (g_rest / q_rest - G) / temperature
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qgraft.passes.decoder import Head
from qgraft.passes.loss import CrossEntropy, chunk_bytes


@dataclass(frozen=True, eq=False)
class Said:
    """What a teacher says of N places: ids [N, k] int32 and their log-probabilities [N, k], float32, the likeliest first.

    Attributes:
        rest: [N] float32, the log-probability of all others together; -inf where there are none.
    """

    ids: Tensor
    log_probs: Tensor
    rest: Tensor

    def __getitem__(self, places: slice) -> "Said":
        """Of some of the places."""
        return Said(self.ids[places], self.log_probs[places], self.rest[places])

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device) -> "Said":
        """The same on a device."""
        return Said(*(part.to(device, non_blocking=True) for part in (self.ids, self.log_probs, self.rest)))

    @classmethod
    def joined(cls, parts: "list[Said]") -> "Said":
        """One behind another."""
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in ("ids", "log_probs", "rest")))


@torch.no_grad()
def likeliest(states_NH: Tensor, head: Head, *, k: int, width: int, temperature: float) -> Said:
    """What head(states) says of each place, on the CPU, without ever holding the logits of all."""
    rows, parts = max(1, chunk_bytes(states_NH.device) // (8 * width)), list[Said]()
    for chunk in states_NH.split(rows):
        logits_CW = head(chunk).float()[:, :width] / temperature
        top_CK, ids_CK = logits_CW.topk(k, dim=-1)
        every_C = torch.logsumexp(logits_CW, -1)
        rest_C = torch.logsumexp(logits_CW.scatter_(1, ids_CK, -math.inf), -1)
        parts.append(Said(ids_CK.int().cpu(), (top_CK - every_C[:, None]).cpu(), (rest_C - every_C).cpu()))
    return Said.joined(parts)


def divergence(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """The terms of the divergence, of each outcome one, in the shape of both."""
    if beta == 0:
        return F.kl_div(log_q, log_p, reduction="none", log_target=True)
    if beta == 1:
        return F.kl_div(log_p, log_q, reduction="none", log_target=True)
    log_m = torch.logaddexp(log_q + math.log1p(-beta), log_p + math.log(beta))
    of_p, of_q = (F.kl_div(log_m, each, reduction="none", log_target=True) for each in (log_p, log_q))
    return beta * of_p + (1 - beta) * of_q


class Divergence:
    """A RowLoss: share * divergence + (1 - share) * cross-entropy of the labels.

    Attributes:
        apart: [N] the divergence, once the loss is computed.
        missed: [N] the cross-entropy, likewise, at temperature 1 and over all ids.
    """

    tensors = 2

    def __init__(
        self, labels_N: Tensor, said: Said, *, width: int, beta: float, temperature: float, share: float
    ) -> None:
        self._labels, self._said, self._width = CrossEntropy(labels_N), said, width
        self._beta, self._temperature, self._share = beta, temperature, share
        self.apart, self.missed = (torch.empty(len(said), device=labels_N.device) for _ in range(2))

    def dtype_for(self, logits: Tensor) -> torch.dtype:
        """float32, whatever the logits are in."""
        return torch.float32

    def to_gradient(self, logits_CV: Tensor, rows: slice) -> Tensor:
        """See RowLoss."""
        own_CW = logits_CV[:, : self._width] / self._temperature
        apart_C = self.apart[rows] = self._apart(own_CW, self._said[rows])
        missed_C = self.missed[rows] = self._labels.to_gradient(logits_CV, rows)
        logits_CV.mul_(1 - self._share)
        logits_CV[:, : self._width].add_(own_CW, alpha=self._share / self._temperature)
        return self._share * apart_C + (1 - self._share) * missed_C

    def _apart(self, logits_CW: Tensor, said: Said) -> Tensor:
        """The divergence of each row [C], whose logits are overwritten with its gradient; temperature 1."""
        ids_CK, log_p_CS = said.ids.long(), said.log_probs
        every_C1 = torch.logsumexp(logits_CW, -1, keepdim=True)
        log_q_CS, rest_C1 = logits_CW.gather(1, ids_CK) - every_C1, every_C1
        if others := ids_CK.shape[1] < logits_CW.shape[1]:
            rest_C1 = torch.logsumexp(logits_CW.scatter_(1, ids_CK, -math.inf), -1, keepdim=True)
            log_q_CS = torch.cat([log_q_CS, rest_C1 - every_C1], 1)
            log_p_CS = torch.cat([log_p_CS, said.rest[:, None]], 1)
        with torch.enable_grad():
            log_q_CS.requires_grad_()
            each_C = divergence(log_q_CS, log_p_CS, self._beta).sum(-1)
            (slope_CS,) = torch.autograd.grad(each_C.sum(), log_q_CS)
        moved_CS = slope_CS - log_q_CS.detach().exp() * slope_CS.sum(-1, keepdim=True)
        k = ids_CK.shape[1]
        if others:  # their own softmax, times what goes to all of them
            logits_CW.sub_(rest_C1).exp_().mul_(moved_CS[:, k:])
        logits_CW.scatter_(1, ids_CK, moved_CS[:, :k])
        return each_C.detach()
