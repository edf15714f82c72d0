"""Answers that a model gives to prompts while it is in training: texts that go on together, each drawn by its own numbers.

    softmax(logits / temperature)   over the first `width` ids, without those that the model's files rule out; nothing else
                                    is cut away: the model's own distribution. One number of a text's generator says where
                                    in the sum of the shares its next token lies
    temperature 0                   the likeliest token

So what a text draws depends on its seed, not on who else is drawn with it, up to the rounding of products with other numbers
of rows. Passes are those that a server's requests share: in one call of kernels where they compute the decoder
(native_texts.py), else in the facade's (batched.py), else each text by the model's own with a cache (own_passes.py); a trial
says which. What a run has put in the place of the model's own attention and modules steps aside meanwhile.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qgraft.adapters.attach_prefix import prefixes_of
from qgraft.adapters.choose import active_adapters
from qgraft.attention import PREFIX, SAMPLES, attending, attention_of
from qgraft.checkpoints.answer_rules import rules_of
from qgraft.data.batches import neighbours
from qgraft.errors import TrainingError, UnsupportedError
from qgraft.passes.batched import CACHED, Piece, next_logits
from qgraft.passes.batched_trial import why_not_batched, why_not_own
from qgraft.passes.decoder import evaluating
from qgraft.passes.fused import unfused
from qgraft.passes.key_values import KeyValues
from qgraft.passes.limits import suppressed_tokens
from qgraft.passes.native_texts import NativeTexts
from qgraft.passes.own_passes import OwnPasses


@dataclass(frozen=True)
class Asked:
    """A prompt, how many tokens its answer may have at most, and the seed that it is drawn by."""

    prompt: list[int]
    room: int
    seed: int


class Rollouts:
    """What draws a model's answers, with the adapters that are active when it is asked.

    Args:
        ends: ids that end an answer.
        width: only the first so many ids are drawn.
        tokens: most of a pass that prompts go through in.

    Raises UnsupportedError for a model whose texts cannot go on token by token in any way.

    Attributes:
        problem: why texts do not share passes; None where they do.
    """

    def __init__(
        self, model: PreTrainedModel, *, ends: Sequence[int], width: int, tokens: int, temperature: float = 1.0
    ) -> None:
        self.model, self.ends, self.width, self.tokens = model, frozenset(ends), width, tokens
        self.temperature = temperature
        self._never_N = torch.tensor([token for token in suppressed_tokens(model) if token < width], dtype=torch.int64)
        with _by_itself(model):
            self.problem = "it has a prefix" if prefixes_of(model) else why_not_batched(model)
            if self.problem is not None and (reason := why_not_own(model)) is not None:
                raise UnsupportedError(f"no answers can be drawn in training: {reason}")
            self._native = None if self.problem is not None else NativeTexts(model)

    @torch.no_grad()
    def answers(self, asked: Sequence[Asked]) -> list[list[int]]:
        """The ids of an answer to each prompt, the one that ends it included. Raises TrainingError for broken logits."""
        with _by_itself(self.model), evaluating(self.model):
            if self.problem is not None:
                return [self._alone(each) for each in asked]
            with attending(self.model, CACHED):
                return self._together(asked)

    def _together(self, asked: Sequence[Asked]) -> list[list[int]]:
        assert self._native is not None
        texts = [_Text(each, self._chooser(each)) for each in asked]
        self._native.changed, weights = True, active_adapters(self.model)
        memory = KeyValues(sum(text.most for text in texts))
        every = torch.arange(memory.slots, device=self.model.device).split([text.most for text in texts])
        slots = dict(zip(map(id, texts), every, strict=True))
        while going_on := [text for text in texts if text.goes_on]:
            for part in neighbours([len(text.ids) - text.past for text in going_on], self.tokens):
                pieces = [Piece(text.ids[:], text.past, slots[id(text)][: len(text.ids)], loras=weights)
                          for text in going_on[part]]  # fmt: skip
                found_NV = self._native.next_logits(memory, pieces)
                logits_NV = next_logits(self.model, memory, pieces) if found_NV is None else found_NV
                on_cpu = logits_NV[:, : self.width].cpu()  # a GPU is waited for once, and not for each text
                for text, logits_V in zip(going_on[part], on_cpu, strict=True):
                    text.add(logits_V, self.ends)
        return [text.answer for text in texts]

    def _alone(self, asked: Asked) -> list[int]:
        text, passes, weights = _Text(asked, self._chooser(asked)), OwnPasses(self.model), active_adapters(self.model)
        while text.goes_on:
            text.add(passes.next_logits(text.ids, weights), self.ends)
        return text.answer

    def _chooser(self, asked: Asked) -> Callable[[Tensor], int]:
        generator = torch.Generator().manual_seed(asked.seed)
        rules = rules_of(self.model, asked.prompt, len(asked.prompt) + asked.room, self.ends)

        def choose(logits_V: Tensor) -> int:
            token = drawn(logits_V)
            rules.push(token)
            return token

        def drawn(logits_V: Tensor) -> int:
            logits_W = rules(logits_V[: self.width].to("cpu", torch.float32))
            logits_W = logits_W.index_fill(0, self._never_N, -torch.inf) if len(self._never_N) else logits_W
            if not bool(logits_W.isfinite().any()) or bool(logits_W.isnan().any()):
                raise TrainingError("no answer can be drawn: the model's logits are NaN or infinite")
            if not self.temperature:
                return int(logits_W.argmax())
            sums_W = (logits_W / self.temperature).softmax(-1).double().cumsum(-1)
            at = torch.rand((), generator=generator, dtype=torch.float64) * sums_W[-1]
            last = torch.searchsorted(sums_W, sums_W[-1])  # that has a share
            return int(torch.minimum(torch.searchsorted(sums_W, at, right=True), last))

        return choose


class _Text:
    """A prompt with what was drawn so far; `past` of its ids have gone through."""

    def __init__(self, asked: Asked, choose: Callable[[Tensor], int]) -> None:
        self.ids, self.past, self.most = list(asked.prompt), 0, len(asked.prompt) + asked.room
        self.goes_on = asked.room > 0
        self._begins, self._choose = len(asked.prompt), choose

    @property
    def answer(self) -> list[int]:
        return self.ids[self._begins :]

    def add(self, logits_V: Tensor, ends: frozenset[int]) -> None:
        """The next token, by the logits after all ids."""
        self.past = len(self.ids)
        self.ids.append(self._choose(logits_V))
        self.goes_on = self.ids[-1] not in ends and len(self.ids) < self.most


@contextmanager
def _by_itself(model: PreTrainedModel) -> Iterator[None]:
    """Within the block the model computes as outside of a run: by its own attention and modules."""
    with ExitStack() as stack:
        stack.enter_context(unfused(model))
        if attention_of(model) == SAMPLES:
            stack.enter_context(attending(model, PREFIX if prefixes_of(model) else "sdpa"))
        yield
