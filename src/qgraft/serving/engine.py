"""The engine: requests in, tokens out; each request has its adapters with weights, and all of them share passes.

    submit -> waiting -> running: prompt in pieces | one token a pass -> Finish
                 ^          |
                 +----------+   where memory runs out the latest one goes back, and starts again from its ids

A step is one pass: a token of every request that is being answered, and as much of the prompts as the budget of a pass
leaves. So requests come and go between tokens, and a long prompt holds nobody up by more than a budget. Each request draws
from its own seed and reads its own keys and values: its answer is what it would be alone, but for the rounding of products
with other numbers of rows, which may tip a tie.

One thread runs the steps (`start`), and owns the model meanwhile: who wants to do something with it does it while the engine
is `paused`, between two steps; who takes off LoRAs, or puts on the first, `between_passes`, which is shorter. Listeners are
called in that thread and must not block.
"""

import gc
import logging
import threading
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qgraft.adapters.token_rows import unknown_tokens
from qgraft.attention import attention_of
from qgraft.checkpoints.answer_rules import rules_of
from qgraft.data.ends import end_token_ids
from qgraft.data.scripted import WritesPrompts
from qgraft.data.templates import ChatTemplate
from qgraft.errors import DataError, OptionError, QgraftError, UnsupportedError
from qgraft.model_parts import context_of, is_encoder_decoder, pairs_unsupported
from qgraft.passes.batched import CACHED
from qgraft.passes.batched_trial import why_not_batched, why_not_own
from qgraft.passes.key_values import BLOCK
from qgraft.passes.limits import stated_ends, suppressed_tokens
from qgraft.serving.grammars import Grammars
from qgraft.serving.mixes import mix_of
from qgraft.serving.passes_of import Part, PassError, Passes, SharedPasses, SinglePasses
from qgraft.serving.requests import BusyError, ContextError, Delta, Finish, Listener, Request, StoppedError
from qgraft.serving.running import Running
from qgraft.serving.text import AnswerText, joined_ids

log = logging.getLogger("qgraft.serving")
LONGEST = (
    8192  # tokens of one text that there is room for, where the model's context is longer and nothing else is said
)


class Engine:
    """See the module.

    Args:
        template: the chat template, whose end of a turn ends answers, too.
        max_batch: how many requests are answered at once.
        max_queue: how many wait beside these.
        cache_tokens: for how many tokens there are keys and values; None for a context, or 1024 for each of the batch.
        pass_tokens: how many tokens go through in one pass at most.

    Raises UnsupportedError for a model whose texts come out otherwise in pieces.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: ChatTemplate | None = None,
        max_batch: int = 16,
        max_queue: int = 64,
        cache_tokens: int | None = None,
        pass_tokens: int = 256,
    ) -> None:
        if attention_of(model) == CACHED:
            raise UnsupportedError("the model is served by another engine")
        if is_encoder_decoder(model.config):
            raise pairs_unsupported("serve")
        self.model, self.tokenizer = model.eval(), tokenizer
        self.max_batch, self.max_queue, self.pass_tokens = max_batch, max_queue, pass_tokens
        self.ends = frozenset(end_token_ids(tokenizer, stated_ends(model), template))
        self.context = context_of(model)
        self.counts: Counter[str] = Counter()  # for /metrics
        self.why_not_shared = why_not_batched(model)
        self.room: int | None = None
        if self.why_not_shared is None:
            longest = min(self.context or LONGEST, LONGEST)
            slots = -(-(cache_tokens or max(longest, 1024 * max_batch)) // BLOCK) * BLOCK
            self.passes: Passes = SharedPasses(model, slots)
            self.room = slots
        else:
            if (problem := why_not_own(model)) is not None:
                raise UnsupportedError(f"this model cannot be served: {problem}")
            self.passes = SinglePasses(model)
        self.waiting: deque[Running] = deque()
        self.running: list[Running] = []
        self._changed = threading.Condition()
        self._one_guest, self._guests, self._stepping = threading.Lock(), 0, False
        self._thread: threading.Thread | None = None
        self._stopping = False

    # -- what any thread may call --

    def submit(self, request: Request, listener: Listener) -> Running:
        """Put a request in the queue; the listener is told of its answer.

        Raises DataError for a prompt that leaves no room for an answer, AdapterError and OptionError for adapters and
        options that cannot be, BusyError where the queue is full.
        """
        mix = mix_of(self.model, request.adapters)
        room = None if self.room is None else self.room - -(-mix.length // BLOCK) * BLOCK
        context = None if self.context is None else self.context - mix.shift
        limit = min(size for size in (context, room, 2**31) if size is not None)
        self._check(request, limit)
        size = len(request.prompt) + (limit if request.max_tokens is None else request.max_tokens)
        rules = rules_of(self.model, request.prompt, min(limit, size), self.ends)
        never = suppressed_tokens(self.model)
        running = Running.of(request, listener, mix, limit, self._text(request), never, rules)
        with self._changed:
            if self._stopping:
                raise StoppedError("the server is being stopped")
            if len(self.waiting) >= self.max_queue + max(self.max_batch - len(self.running), 0):
                raise BusyError(f"{len(self.waiting)} requests are waiting, expected at most {self.max_queue}")
            self.waiting.append(running)
            self._changed.notify_all()
        return running

    def cancel(self, running: Running) -> None:
        """Nobody waits for this answer any more: its place is free with the next step."""
        with self._changed:
            running.cancelled = True
            self._changed.notify_all()

    @contextmanager
    def between_passes(self) -> Iterator[None]:
        """Within the block no pass runs: LoRAs may be put on and taken off, and nothing else of the model may change."""
        with self._one_guest:
            with self._changed:
                self._guests += 1
                self._changed.wait_for(lambda: not self._stepping)
            try:
                yield
            finally:
                with self._changed:
                    self._guests -= 1
                    self._changed.notify_all()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within the block the model is the caller's, between two steps, and attends as it does without the engine."""
        with self.between_passes(), self.passes.own_attention():
            yield

    @cached_property
    def grammars(self) -> Grammars:
        """What holds answers to a form: up to seconds of work, done once, in the thread of who asks for one first.

        Raises UnsupportedError for a tokenizer with which that cannot be.
        """
        return Grammars(self.tokenizer, self.model.get_input_embeddings().weight.shape[0], self.ends)

    def uses(self, name: str) -> bool:
        """Whether a request that is not finished goes by this adapter."""
        with self._changed:
            return any(name in each.request.adapters for each in (*self.waiting, *self.running))

    @property
    def is_alive(self) -> bool:
        """Whether requests are taken."""
        return not self._stopping and (self._thread is None or self._thread.is_alive())

    # -- the thread --

    def start(self) -> None:
        """Answer requests in a thread of the engine's own.

        What this process holds by now stays until the engine stops, so that Python's collector need not look through it: at
        its 400 000 objects, most of them transformers', no token would come for a fifth of a second.
        """
        gc.collect()
        gc.freeze()
        self._thread = threading.Thread(target=self._run, name="qgraft-engine", daemon=True)
        self._thread.start()

    def stop(self, seconds: float = 0.0) -> None:
        """Take no more requests, go on for so many seconds with those there are, then end; the model is as it was."""
        with self._changed:
            self._stopping = True
            self._changed.wait_for(lambda: not (self.waiting or self.running), timeout=seconds)
            for each in (*self.waiting, *self.running):
                each.cancelled = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
            gc.unfreeze()
        else:
            self.step()
        self.passes.close()

    def _run(self) -> None:
        try:
            self._go_on()
        finally:  # by itself only where nothing is left
            self._stopping = True
            for each in (*self.waiting, *self.running):
                each.finish("error", StoppedError("the engine has ended"))

    def _go_on(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: not self._guests and (self.waiting or self.running or self._stopping))
                if self._stopping and not (self.waiting or self.running):
                    return
                self._stepping = True
            try:
                self.step()
            finally:
                with self._changed:
                    self._stepping = False
                    self._changed.notify_all()

    @torch.inference_mode()
    def step(self) -> bool:
        """One pass; whether there was one."""
        self._drop_cancelled()
        self._admit()
        parts = self._parts()
        if not parts:
            return False
        results = self.passes.logits(parts)
        self.counts["passes"] += 1
        self.counts["pass_tokens"] += sum(count for _, count in parts)
        for (running, count), result in zip(parts, results, strict=True):
            running.past += count
            if isinstance(result, QgraftError):
                running.finish("error", result)
            elif result is not None:
                self._take(running, result)
        self._leave([running for running, _ in parts if running.finished])
        return True

    def _take(self, running: Running, logits_V: Tensor) -> None:
        """The next token of a request; where its text or its form cannot go on with it, it fails alone."""
        if running.request.max_tokens == 0:
            running.finish("length")
            return
        try:
            running.take(logits_V, self.ends)
        except (RuntimeError, ValueError, LookupError, TypeError) as error:
            log.exception("an answer has failed")
            running.fail(PassError(f"the answer cannot go on: {type(error).__name__}: {str(error)[:300]}"))
        self.counts["generation_tokens"] += 1

    def _drop_cancelled(self) -> None:
        gone = [each for each in (*self.running, *self.waiting) if each.cancelled]
        for each in gone:
            each.finish("cancelled")
        self._leave(gone)

    def _leave(self, gone: list[Running]) -> None:
        """These have ended: their places are free."""
        with self._changed:
            for each in gone:
                self.counts[f"finished_{each.reason}"] += 1
                self.passes.release(each)
                (self.running if each in self.running else self.waiting).remove(each)
            if gone:
                self._changed.notify_all()

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_batch:
            first = self.waiting[0]
            if not self.passes.begin(first):
                return
            with self._changed:
                self.waiting.popleft()
                self.running.append(first)
            if not first.answered:
                self.counts["prompt_tokens"] += len(first.request.prompt)
                self.counts["cached_tokens"] += first.cached

    def _parts(self) -> list[Part]:
        """What goes through now: single tokens first, then prompts in their order."""
        parts: list[Part] = []
        for running in list(self.running):
            if running in self.running and running.new == 1 and self._has_room(running, 1):
                parts.append((running, 1))
        parts = [(running, count) for running, count in parts if running in self.running]
        left = max(self.pass_tokens - len(parts), BLOCK)
        for running in [each for each in self.running if each.new > 1]:
            count = running.new if self.passes.whole_prompts else min(running.new, left)
            if left <= 0 or (parts and count > left):
                break
            parts.append((running, count))
            left -= count
        return parts

    def _has_room(self, running: Running, count: int) -> bool:
        """Room for so many more ids; where there is none, the latest request goes back to the queue."""
        while not self.passes.extend(running, running.past + count):
            latest = self.running[-1]
            self.passes.release(latest)
            with self._changed:
                self.running.remove(latest)
                self.waiting.appendleft(latest)
            if latest is running:
                return False
        return True

    # -- what a request may be --

    def _check(self, request: Request, limit: int) -> None:
        size = self.model.get_input_embeddings().weight.shape[0]
        wrong = unknown_tokens(self.model, request.adapters, request.prompt)
        if not request.prompt or wrong:
            new = any(0 <= token < size for token in wrong)
            raise DataError(f"the prompt holds the ids {wrong[:5]}, expected ids below {size}" if wrong and not new
                            else f"the prompt holds new tokens of another adapter: {wrong[:5]}" if wrong
                            else "the prompt is empty, expected at least one token",
                            hint="ask the adapter that has them" if new else None)  # fmt: skip
        if len(request.prompt) >= limit:
            raise ContextError(
                f"the prompt is {len(request.prompt)} tokens, and the model's context is {limit} with the answer",
                hint="ask a shorter question, or begin a new conversation",
            )
        if request.max_tokens is not None and request.max_tokens < 0:
            raise OptionError(f"max_tokens={request.max_tokens}: expected a number from 0 on")
        if any(not text for text in request.stop):
            raise OptionError("stop: an empty text, which would end every answer")
        if beyond := [token for token in request.sampling.logit_bias if token >= size]:
            raise OptionError(f"logit_bias: there is no token {beyond[0]}, expected ids below {size}")

    def _text(self, request: Request) -> AnswerText:
        tokenizer, skip = self.tokenizer, not request.keep_special
        rewrites = request.grammar is None and bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
        as_written = {} if request.grammar is None else {"clean_up_tokenization_spaces": False}
        cleaned = request.cleaned and isinstance(tokenizer, WritesPrompts)

        def decode(ids: list[int]) -> str:
            return str(tokenizer.decode(ids, skip_special_tokens=skip, **as_written))

        clean, joined = tokenizer.clean_answer if cleaned else None, joined_ids(tokenizer, skip)
        return AnswerText(decode, request.stop, rewrites, clean, joined)


def answer_all(engine: Engine, requests: list[Request]) -> list[dict[str, Any]]:
    """Answers to all of them at once, without the thread: text, ids, and how each ended."""
    told: list[dict[str, Any]] = [{"text": "", "tokens": [], "finish": None} for _ in requests]

    def listening(answer: dict[str, Any]) -> Listener:
        def listen(event: Delta | Finish) -> None:
            if isinstance(event, Finish):
                answer["finish"] = event
            else:
                answer["text"] += event.text
                answer["tokens"] += event.tokens

        return listen

    for request, answer in zip(requests, told, strict=True):
        engine.submit(request, listening(answer))
    while engine.step():
        pass
    return told
