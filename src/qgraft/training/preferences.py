"""Learning from preferences: stage dpo, ipo, orpo, simpo and kto, beside supervised fine-tuning on the same loop.

    reference   what the model says as the run finds it, its base where the adapter is new: the log-probability of every text,
                computed once before the first step and kept in output_dir, so that a run goes on to the same bytes
    pass        the texts of some rows; log-probability of every label, chunk by chunk (passes/loss.py), one sum for each text
    loss        preference_losses.py of these sums, a mean over the rows of a step

The reference is the model itself: no second one is held, and none is asked in a step. For KTO's divergence the texts whose
answers do not belong to their prompts pass in each step, too, without gradient, before those that are learned.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qgraft.data.batches import neighbours
from qgraft.data.preference_samples import Preference
from qgraft.data.tokenizing import IGNORED, Sample
from qgraft.passes.decoder import evaluating
from qgraft.passes.log_probs import Texts, lay_out, log_probs, text_sums
from qgraft.training.objective import Outcome
from qgraft.training.preference_losses import (
    Answers,
    PreferenceOptions,
    labelled_losses,
    pair_losses,
    rewards,
)
from qgraft.training.processes import ALONE, Processes

PAIRS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected",
         "logps/accuracies", "nll_loss")  # fmt: skip
SINGLE = ("chosen", "rejected", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "logps/chosen",
          "logps/rejected", "kl")  # fmt: skip


@dataclass(frozen=True)
class PreferenceEvaluation:
    """The mean loss over the rows, and the means that TRL logs beside it, by its names.

    `logps/accuracies` is the share of pairs whose chosen answer is the likelier one, whatever a reference says.
    """

    loss: float
    samples: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    dropped: int = 0
    truncated: int = 0

    def as_dict(self) -> dict[str, float]:
        """All numbers by name, for JSON."""
        return {"loss": self.loss, "samples": self.samples, **self.metrics,
                "dropped": self.dropped, "truncated": self.truncated}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Judged:
    """Rows whose loss is computed together, and the passes of their texts: one, or one for each text."""

    rows: tuple[Preference, ...]
    passes: tuple[Texts, ...]


class PreferenceOptimization:
    """An Objective, see objective.py.

    Args:
        alone: every text passes through the model by itself.
        shared: the texts of a pair have their beginning in a pass once.
    """

    def __init__(self, options: PreferenceOptions, *, alone: bool = False, shared: bool = False) -> None:
        self.options, self.alone, self.shared = options, alone, shared
        self.names: Sequence[str] = SINGLE if options.labelled else PAIRS if options.alpha else PAIRS[:-1]
        self._divergence, self._share = 0.0, 0.0

    def begin(
        self,
        model: PreTrainedModel,
        every: Sequence[Preference],
        own: Sequence[Preference],
        tokens: int,
        processes: Processes = ALONE,
        step: int = 0,
    ) -> tuple[list[Preference], float]:
        """What the losses of a step must know of all of it: KTO's divergence; what each chosen token counts."""
        options = self.options
        labels = sum(self._learned(each) for each in every) if options.alpha else 0
        self._share = options.alpha * len(every) / labels if labels else 0.0
        if options.loss_type != "kto":
            return list(own), self.count(every)
        others = [each.mismatched for each in own if each.mismatched is not None]
        now = text_log_probs(model, others, tokens, self.alone, training=True)
        gained = sum(value - each.reference[1] for value, each in zip(now, own, strict=True))
        both = torch.tensor([gained, len(own)], dtype=torch.float64, device=model.device)
        total, count = processes.add(both).tolist()
        self._divergence = max(total / (count or 1.0), 0.0)
        return list(own), self.count(every)

    def count(self, samples: Sequence[Preference]) -> float:
        """The rows."""
        return float(len(samples))

    def batches(self, samples: Sequence[Preference], tokens: int) -> list[Judged]:
        """Rows with at most so many tokens together; a row alone may have more."""
        lengths = [len(each.input_ids) - (each.shared if self.shared else 0) for each in samples]
        return [self._laid_out(samples[part]) for part in neighbours(lengths, tokens)]

    def outcome(self, model: PreTrainedModel, batch: Judged) -> Outcome:
        """The sum of the losses of the rows."""
        found = [text_sums(log_probs(model, texts), texts) for texts in batch.passes]
        logps = torch.cat([each for each, _ in found])
        reference = [value for row in batch.rows for value in row.reference[: len(row.texts)]] or [0.0] * len(logps)
        tokens = logps.new_tensor([count for texts in batch.passes for count in texts.counts])
        answers = Answers(logps - logps.new_tensor(reference), tokens.clamp(min=1))
        if self.options.labelled:
            return self._single(batch.rows, answers, logps.detach())
        learned = sum((prompts for _, prompts in found), logps[::2].sum())
        said = logps if self.options.refers else answers.by_token  # as TRL logs them
        return self._paired(answers, said.detach(), learned)

    def means(self, sums: Mapping[str, float], count: float) -> dict[str, float]:
        """What sums of metrics over so many rows come to, as they are logged."""
        if not self.options.labelled:
            return {name: value / count for name, value in sums.items()}
        many = {"chosen": sums["chosen"], "rejected": sums["rejected"]}
        found = {name: value / many.get(name.partition("/")[2], count) for name, value in sums.items()
                 if name not in many and many.get(name.partition("/")[2], count)}  # fmt: skip
        if all(many.values()):
            found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
        return found

    def evaluate(
        self, model: PreTrainedModel, samples: Sequence[Preference], tokens: int, processes: Processes = ALONE
    ) -> PreferenceEvaluation:
        """The mean loss on these rows; dropout is off, and the training mode is kept."""
        own, kept = processes.share(samples), (self._divergence, self._share)
        totals = dict.fromkeys(("loss", *self.names), 0.0)
        tokens = 0 if self.alone else tokens
        with torch.no_grad(), evaluating(model):
            self.begin(model, samples, own, tokens, processes)
            for batch in self.batches(own, tokens):
                outcome = self.outcome(model, batch)
                found = {"loss": outcome.loss, **outcome.metrics}
                totals = {name: value + float(found[name]) for name, value in totals.items()}
        self._divergence, self._share = kept
        added = processes.add(torch.tensor(list(totals.values()), dtype=torch.float64, device=model.device)).tolist()
        totals = dict(zip(totals, added, strict=True))
        loss = totals.pop("loss") / len(samples)
        return PreferenceEvaluation(loss, len(samples), self.means(totals, len(samples)))

    def _laid_out(self, rows: Sequence[Preference]) -> Judged:
        asked = bool(self.options.alpha) and self.options.train_on_prompt
        if self.alone:
            every = [(text, asked and not number) for row in rows for number, text in enumerate(row.texts)]
            return Judged(tuple(rows), tuple(lay_out([[text]], [0], prompts=first) for text, first in every))
        once = [row.shared if self.shared else 0 for row in rows]
        return Judged(tuple(rows), (lay_out([row.texts for row in rows], once, prompts=asked),))

    def _learned(self, row: Preference) -> int:
        """How many tokens of the chosen answer the mean loss beside that of the pair is of."""
        chosen = row.texts[0]
        return len(chosen.labels) - 1 if self.options.train_on_prompt else labels_of(chosen)

    def _paired(self, answers: Answers, logps: Tensor, learned: Tensor) -> Outcome:
        chosen, rejected = (Answers(answers.ratios[side::2], answers.tokens[side::2]) for side in (0, 1))
        loss = pair_losses(chosen, rejected, self.options).sum()
        if self.options.alpha:
            loss = loss - self._share * learned
        won, lost = rewards(chosen, self.options), rewards(rejected, self.options)
        values = [won.sum(), lost.sum(), (won > lost).sum(), (won - lost).sum(), logps[::2].sum(), logps[1::2].sum(),
                  (logps[::2] > logps[1::2]).sum()]  # fmt: skip
        if self.options.alpha:
            values.append(-self._share / self.options.alpha * learned.detach())
        return Outcome(loss, dict(zip(self.names, values, strict=True)))

    def _single(self, rows: Sequence[Preference], answers: Answers, logps: Tensor) -> Outcome:
        wanted = torch.tensor([bool(row.desirable) for row in rows], device=logps.device)
        losses = labelled_losses(answers.ratios, wanted, self._divergence, self.options)
        reward = rewards(answers, self.options)
        values = [wanted.sum(), (~wanted).sum(), reward[wanted].sum(), reward[~wanted].sum(),
                  ((reward > 0) == wanted).sum(), logps[wanted].sum(), logps[~wanted].sum(),
                  logps.new_tensor(self._divergence * len(rows))]  # fmt: skip
        return Outcome(losses.sum(), dict(zip(self.names, values, strict=True)))


def labels_of(sample: Sample) -> int:
    """How many tokens of a text are learned."""
    return sum(label != IGNORED for label in sample.labels[1:])


@torch.no_grad()
def text_log_probs(
    model: PreTrainedModel, texts: Sequence[Sample], tokens: int, alone: bool = False, training: bool = False
) -> list[float]:
    """The log-probability of the labels of each text, so many tokens in a pass.

    Args:
        training: whether the model passes them as it is, dropout included; else in evaluation mode.
    """
    found = list[float]()
    with nullcontext() if training else evaluating(model):
        for part in neighbours([len(text.input_ids) for text in texts], 0 if alone else tokens):
            rows = [[text] for text in texts[part]]
            laid_out = lay_out(rows, [0] * len(rows))
            found += text_sums(log_probs(model, laid_out), laid_out)[0].tolist()
    return found


def with_reference(
    model: PreTrainedModel,
    samples: Sequence[Preference],
    tokens: int,
    objective: PreferenceOptimization,
    processes: Processes = ALONE,
) -> list[Preference]:
    """The rows with what the model as it is says of them, each process asking it for its share."""
    own = range(processes.rank, len(samples), processes.count)
    found = list[tuple[float, ...]]()
    with torch.no_grad(), evaluating(model):
        for batch in objective.batches([samples[number] for number in own], tokens):
            values = torch.cat([text_sums(log_probs(model, texts), texts)[0] for texts in batch.passes]).tolist()
            per_row = len(batch.rows[0].texts)
            found += [tuple(values[at : at + per_row]) for at in range(0, len(values), per_row)]
    others = [each.mismatched for each in (samples[number] for number in own) if each.mismatched is not None]
    if others:
        more = text_log_probs(model, others, tokens, objective.alone)
        found = [(*each, value) for each, value in zip(found, more, strict=True)]
    gathered = processes.gather(found)
    return [replace(each, reference=gathered[number % processes.count][number // processes.count])
            for number, each in enumerate(samples)]  # fmt: skip
