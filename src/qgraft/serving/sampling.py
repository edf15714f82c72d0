"""Which token comes next: logits of one text -> penalties -> temperature -> cuts -> a draw from the text's own generator.

    penalties     repetition (Keskar et al. 2019): of every token that is in the text already, logits above 0 are divided by
                  it and those below multiplied; presence and frequency (OpenAI): of the answer's tokens, p is subtracted
                  once, f for every time; logit_bias is added
    form          tokens that an answer's form (grammars.py) does not allow have no share, nor those that the model's files
                  rule out (suppress_tokens, and before the penalties checkpoints/answer_rules.py)
    temperature   logits / t; 0 takes the likeliest token, and nothing is drawn
    cuts          top_k tokens; of these the fewest that have the share top_p; of these those with at least min_p of the
                  likeliest one's share

The order is that of transformers and vLLM. Each text has a generator of its own, made of its seed: what it draws does not
depend on who else is in the batch. Log probabilities are those of the model, before all of the above, as OpenAI's are.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from qgraft.checkpoints.answer_rules import AnswerRules
from qgraft.errors import OptionError
from qgraft.passes.broken import BrokenLogitsError
from qgraft.ranges import COUNT, SHARE_ABOVE_0, TEMPERATURE, Range, check_ranges

_PENALTY = Range(-2, 2)
_SHARE = Range(0, 1)
_REPETITION = Range(0.01, 100)
_BIAS = Range(-100, 100)  # OpenAI's
_TOP_K = Range(-1, 2**31 - 1, whole=True)
TOP_LOGPROBS = Range(0, 20, whole=True)
SEED = Range(0, 2**64 - 1, whole=True)  # all of its bits count: torch's generator on a CPU goes by 32 of them
LIKELIEST = 512  # tokens among which the cuts are looked for first


@dataclass(frozen=True)
class Sampling:
    """How the tokens of an answer are chosen, by the names of OpenAI and vLLM.

    Attributes:
        top_k: 0 and -1 are all tokens.
        seed: None for one that nobody knows.
        logprobs: of how many likeliest tokens the log probabilities are told, beside the chosen one's; None for none.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        check_ranges({
            "temperature": (self.temperature, TEMPERATURE), "top_p": (self.top_p, SHARE_ABOVE_0),
            "top_k": (self.top_k, _TOP_K), "min_p": (self.min_p, _SHARE),
            "repetition_penalty": (self.repetition_penalty, _REPETITION),
            "presence_penalty": (self.presence_penalty, _PENALTY),
            "frequency_penalty": (self.frequency_penalty, _PENALTY),
            "seed": (0 if self.seed is None else self.seed, SEED),
            "logprobs": (self.logprobs or 0, TOP_LOGPROBS),
        })  # fmt: skip
        wrong = [f"{token}: {bias}" for token, bias in self.logit_bias.items() if bias not in _BIAS]
        if wrong or not all(token in Range(0, COUNT.most, whole=True) for token in self.logit_bias):
            raise OptionError(f"logit_bias: got {wrong or dict(self.logit_bias)}, expected {_BIAS} by token ids")


@dataclass(frozen=True)
class Token:
    """A token of an answer.

    Attributes:
        logprob, top: its log probability, and those of the likeliest tokens; where they were asked for.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses the tokens of one answer.

    Args:
        prompt: the ids that repetition_penalty knows from the beginning.
        never: ids that have no share, whatever is asked for.
        rules: what else the model's files say of an answer.
    """

    def __init__(
        self, sampling: Sampling, prompt: list[int], never: Sequence[int] = (), rules: AnswerRules | None = None
    ) -> None:
        self._rules = rules
        self.sampling, self._never_N = sampling, torch.tensor(never, dtype=torch.int64)
        self._generator = np.random.Generator(np.random.PCG64(sampling.seed))
        self._seen = set(prompt) if sampling.repetition_penalty != 1 else set()
        self._counts: dict[int, int] = {}
        self._bias = _by_token(sampling.logit_bias)

    def draw(self, logits_V: Tensor, allowed_V: Tensor | None = None) -> Token:
        """The next token, of those that are allowed (bool, as long as the logits or longer): the others have no share.

        Raises BrokenLogitsError for logits that are NaN, and where nothing is allowed.
        """
        raw_V = logits_V.detach().to("cpu", torch.float32)
        likeliest = int(raw_V.argmax())  # the first that is NaN, where one is
        if not math.isfinite(float(raw_V[likeliest])):
            raise BrokenLogitsError("the model's logits are not finite: the adapter, or the base, is broken")
        scores_V = self.penalized(raw_V if self._rules is None else self._rules(raw_V))
        if len(self._never_N):
            scores_V = scores_V.index_fill(0, self._never_N[self._never_N < len(scores_V)], -torch.inf)
        if allowed_V is not None:
            scores_V = scores_V.masked_fill(~allowed_V[: len(scores_V)], -torch.inf)
            if not bool(scores_V.isfinite().any()):
                raise BrokenLogitsError("no token can go on with the answer in the form that was asked for")
        temperature = self.sampling.temperature
        if temperature == 0:
            chosen = likeliest if scores_V is raw_V else int(scores_V.argmax())
        else:
            chosen = self._drawn(scores_V / temperature)
        self._count(chosen)
        return self._told(chosen, raw_V)

    def take(self, token: int, logits_V: Tensor) -> Token:
        """A token that is not drawn, as the next one."""
        self._count(token)
        return self._told(token, logits_V.detach().to("cpu", torch.float32))

    def _count(self, token: int) -> None:
        self._counts[token] = self._counts.get(token, 0) + 1
        if self._rules is not None:
            self._rules.push(token)
        if self.sampling.repetition_penalty != 1:
            self._seen.add(token)

    def penalized(self, raw_V: Tensor) -> Tensor:
        """The logits with all penalties and biases."""
        s = self.sampling
        plain = s.repetition_penalty == 1 and not (s.presence_penalty or s.frequency_penalty or s.logit_bias)
        if plain:
            return raw_V
        scores_V = raw_V.clone()
        if self._seen:
            seen_N = torch.tensor(sorted(token for token in self._seen if token < len(raw_V)))
            old_N = scores_V[seen_N]
            scores_V[seen_N] = torch.where(old_N > 0, old_N / s.repetition_penalty, old_N * s.repetition_penalty)
        if self._counts and (s.presence_penalty or s.frequency_penalty):
            said_N, counts_N = _by_token(self._counts)
            scores_V[said_N] -= s.presence_penalty + s.frequency_penalty * counts_N
        if s.logit_bias:
            tokens_N, added_N = self._bias
            if int(tokens_N.max()) >= len(raw_V):
                raise OptionError(
                    f"logit_bias: there is no token {int(tokens_N.max())}, expected ids below {len(raw_V)}"
                )
            scores_V[tokens_N] += added_N
        return scores_V

    def _drawn(self, scores_V: Tensor) -> int:
        """A token by the shares that are left: one number of the generator says which."""
        tokens_N, shares_N = self.shares(scores_V)
        sums_N = shares_N.double().cumsum(-1)
        at = self._generator.random() * sums_N[-1]
        last = torch.searchsorted(sums_N, sums_N[-1])  # that has a share
        return int(tokens_N[torch.minimum(torch.searchsorted(sums_N, at, right=True), last)])

    def shares(self, scores_V: Tensor) -> tuple[Tensor, Tensor]:
        """(tokens [n], what they weigh [n]) that no cut takes away, of scores that the temperature has divided."""
        s = self.sampling
        if s.top_k <= 0 and s.top_p == 1 and s.min_p == 0:
            return torch.arange(len(scores_V)), scores_V.softmax(-1)
        # To sort all of a vocabulary takes as long as a small model's pass
        if len(scores_V) > 2 * LIKELIEST and s.top_k <= LIKELIEST:
            tokens_N, shares_N = self._cut(*scores_V.topk(LIKELIEST), scores_V)
            if len(tokens_N) < LIKELIEST or s.top_k == LIKELIEST:
                return tokens_N, shares_N
        return self._cut(*scores_V.sort(descending=True, stable=True), scores_V)

    def _cut(self, ordered_N: Tensor, tokens_N: Tensor, scores_V: Tensor) -> tuple[Tensor, Tensor]:
        """What the cuts leave of the likeliest tokens, with their scores in order, of all these scores."""
        s = self.sampling
        if s.top_k > 0:
            ordered_N, tokens_N = ordered_N[: s.top_k], tokens_N[: s.top_k]
        all_N = ordered_N if 0 < s.top_k <= len(ordered_N) else scores_V
        shares_N = (ordered_N - all_N.logsumexp(-1)).exp()
        before_N = shares_N.cumsum(-1) - shares_N
        kept_N = (before_N < s.top_p) & (shares_N >= s.min_p * shares_N[0])
        kept_N[0] = True
        return tokens_N[kept_N], shares_N[kept_N]

    def _told(self, token: int, raw_V: Tensor) -> Token:
        if self.sampling.logprobs is None:
            return Token(token)
        logprobs_V = raw_V.log_softmax(-1)
        top = logprobs_V.topk(min(self.sampling.logprobs, len(raw_V))) if self.sampling.logprobs else None
        likeliest = () if top is None else tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        return Token(token, float(logprobs_V[token]), likeliest)


def _by_token(values: Mapping[int, float]) -> tuple[Tensor, Tensor]:
    """(tokens [n], their values [n])."""
    return torch.tensor(list(values), dtype=torch.long), torch.tensor(list(values.values()), dtype=torch.float32)
