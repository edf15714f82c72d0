"""A request that is being answered: its ids so far, what others are told of it, and where it ends."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from qgraft.checkpoints.answer_rules import AnswerRules
from qgraft.errors import QgraftError
from qgraft.serving.grammars import Matching
from qgraft.serving.mixes import Mix
from qgraft.serving.requests import Delta, Finish, Listener, Request
from qgraft.serving.sampling import Sampler, Token
from qgraft.serving.text import AnswerText


@dataclass(eq=False)
class Running:
    """One request in the engine, from its queue to its end.

    Attributes:
        limit: how many ids it may have: the model's context beside its prefixes.
        ids: the prompt's and the answer's.
        past: how many of them have gone through the model.
        place: what the passes keep for it: blocks, or a cache (passes_of.py).
        cancelled: whether nobody waits for it any more; set by any thread.
        cached: how many of the prompt's tokens another request has passed through.
        reason: why it is finished.
    """

    request: Request
    listener: Listener
    mix: Mix
    limit: int
    text: AnswerText
    sampler: Sampler
    ids: list[int]
    past: int = 0
    place: Any = None
    cancelled: bool = False
    cached: int = 0
    finished: bool = False
    reason: str = ""
    _ended: bool = False  # by a token, which counts as one of the answer's
    _untold: list[Token] = field(default_factory=list)
    _matching: Matching | None = None

    @classmethod
    def of(
        cls, request: Request, listener: Listener, mix: Mix, limit: int, text: AnswerText, never: Sequence[int] = (),
        rules: AnswerRules | None = None,
    ) -> "Running":  # fmt: skip
        """A request at its beginning; `never` are ids that no answer may have, `rules` as of Sampler."""
        prompt = list(request.prompt)
        matching = None if request.grammar is None else request.grammar.begin()
        sampler = Sampler(request.sampling, prompt, never, rules)
        return cls(request, listener, mix, limit, text, sampler, prompt, _matching=matching)

    @property
    def new(self) -> int:
        """How many ids have not gone through."""
        return len(self.ids) - self.past

    @property
    def answered(self) -> int:
        """How many tokens the answer has."""
        return len(self.ids) - len(self.request.prompt)

    def take(self, logits_V: Tensor, ends: Collection[int]) -> None:
        """Choose the next token and tell it; with it the answer may end."""
        matching = self._matching
        try:
            if (closing := self._closing()) is None:
                token = self.sampler.draw(logits_V, None if matching is None else matching.allowed())
            else:
                token = self.sampler.take(closing, logits_V)
            if matching is not None:
                matching.take(token.id)
        except QgraftError as error:
            self.finish("error", error)
            return
        if token.id in ends and (matching is not None or not self.request.ignore_ends):
            self._ended = True
            self.finish("stop")
            return
        self.ids.append(token.id)
        self._untold.append(token)
        self._tell(self.text.push(token.id))
        if self.text.stopped is not None or (matching is not None and matching.complete):
            self.finish("stop")
        elif self.answered == self.request.max_tokens or len(self.ids) >= self.limit:
            self.finish("length")

    def _closing(self) -> int | None:
        """The token that closes what it thinks, where it has thought as long as it may."""
        told, said = self.request.thinking, self.ids[len(self.request.prompt) :]
        if told is None or len(said) < told.budget or told.close in said:
            return None
        return told.close if told.begun or (said and said[0] == told.open) else None

    def finish(self, reason: str, error: QgraftError | None = None) -> None:
        """Tell what is left of the answer, and that it ends here."""
        if self.finished:
            return
        self.reason = reason
        self._tell(self.text.end(), last=True)
        self._finish(error)

    def fail(self, error: QgraftError) -> None:
        """End it without what is left of its text, which may be what failed."""
        if not self.finished:
            self.reason = "error"
            self._finish(error)

    def _finish(self, error: QgraftError | None) -> None:
        self.finished = True
        prompt, answered = len(self.request.prompt), self.answered + self._ended
        self.listener(Finish(self.reason, prompt, answered, self.cached, self.text.stopped, error))

    def _tell(self, text: str, last: bool = False) -> None:
        if text or (self._untold and (last or self.request.sampling.logprobs is not None)):
            self.listener(Delta(text, tuple(self._untold)))
            self._untold.clear()
