"""Answers drawn in training, judged by the teacher at once: generalized knowledge distillation (arXiv:2306.13649).

    lmbda    of every batch (per_device_train_batch_size samples of each process) a number says whether its answers are the
             student's own, drawn now, with its adapter as it is
    seq_kd   of the other batches the teacher draws them; else they are the rows'

A sample is asked for its last answer (drawn.py). The numbers follow from the seed, the step and the sample's place in it, and
nothing else draws by them: a run that goes on, or has other processes, draws as one that never ended. Names are those of
TRL's GKDTrainer; there the numbers are of Python's one generator, and batches are those of each process.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from qgraft.data.ends import end_token_ids
from qgraft.data.tokenizing import Sample
from qgraft.memory.budget import CPU_EVAL_TOKENS, GPU_EVAL_TOKENS
from qgraft.passes.limits import sample_limit, stated_ends
from qgraft.passes.rollouts import Asked, Rollouts
from qgraft.training.distillation import Taught
from qgraft.training.drawn import answer_begins, answered, room_behind
from qgraft.training.evaluate import template_of
from qgraft.training.stages import DistillOptions
from qgraft.training.teacher import LiveTeacher

if TYPE_CHECKING:
    from qgraft.training.prepare import Prepared


@dataclass(frozen=True)
class DrawnAnswers:
    """Where the answers of a run's steps come from.

    Attributes:
        batch: samples of a batch, of all processes together.
        at_once: how many texts of one process are drawn together.
        limit: the longest sample.
        by_student, by_teacher: what draws; None where it never does.
    """

    options: DistillOptions
    teacher: LiveTeacher
    seed: int
    batch: int
    at_once: int
    limit: int
    by_student: Rollouts | None
    by_teacher: Rollouts | None

    def taught(self, every: Sequence[Sample], own: Sequence[Sample], step: int) -> list[Taught]:
        """`own` of the samples of a step, with the answers that are learned and what the teacher says of them."""
        places = {id(sample): place for place, sample in enumerate(every)}
        chosen = self._of_batches(step, -(-len(every) // self.batch))
        asked = [(chosen[places[id(sample)] // self.batch], places[id(sample)], sample) for sample in own]
        learned = list[Taught]()
        for rollouts, group in groupby(asked, key=lambda each: each[0]):
            numbered = [(place, sample) for _, place, sample in group]
            if rollouts is None:
                learned += [sample for _, sample in numbered if isinstance(sample, Taught)]
            else:
                learned += self.teacher.taught(list(self._drawn(rollouts, numbered, step)))
        return learned

    def _of_batches(self, step: int, count: int) -> list[Rollouts | None]:
        """What draws the answers of each batch of a step; None for the rows' own."""
        generator = torch.Generator().manual_seed(_number(self.seed, step))
        drawn = torch.rand(count, generator=generator, dtype=torch.float64) < self.options.lmbda
        return [self.by_student if own else self.by_teacher for own in drawn.tolist()]

    def _drawn(self, rollouts: Rollouts, numbered: Sequence[tuple[int, Sample]], step: int) -> Iterator[Sample]:
        for start in range(0, len(numbered), self.at_once):
            group = numbered[start : start + self.at_once]
            asked = [self._asked(sample, _number(self.seed, step, place)) for place, sample in group]
            for (_, sample), each, answer in zip(group, asked, rollouts.answers(asked), strict=True):
                yield answered(sample, len(each.prompt), answer)

    def _asked(self, sample: Sample, seed: int) -> Asked:
        begins = answer_begins(sample)
        return Asked(sample.input_ids[:begins], room_behind(begins, self.limit, self.options), seed)


def draws_answers(
    model: PreTrainedModel, prepared: "Prepared", options: DistillOptions, processes: int
) -> DrawnAnswers:
    """What draws the answers of a run. Raises UnsupportedError for a model that cannot go on token by token."""
    args, lesson, tokenizer = prepared.args, prepared.lesson, prepared.tokenizer
    assert lesson is not None and lesson.teacher is not None and tokenizer is not None
    template = template_of(tokenizer, args)

    def rollouts(of: PreTrainedModel, name: str) -> Rollouts:
        tokens = GPU_EVAL_TOKENS if of.device.type == "cuda" else CPU_EVAL_TOKENS
        made = Rollouts(of, ends=end_token_ids(tokenizer, stated_ends(of), template), width=lesson.width, tokens=tokens,
                        temperature=options.drawn_at)  # fmt: skip
        if made.problem is not None:
            prepared.notes.append(f"the {name}'s answers are drawn one by one: {made.problem}")
        return made

    return DrawnAnswers(
        options, lesson.teacher, args.seed, args.per_device_train_batch_size * processes, args.per_device_train_batch_size,
        sample_limit(model, args.max_length),
        rollouts(model, "student") if options.lmbda > 0 else None,
        rollouts(lesson.teacher.model, "teacher") if options.seq_kd else None,
    )  # fmt: skip


def _number(*parts: int) -> int:
    """A seed that these numbers alone decide."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8]) >> 1
