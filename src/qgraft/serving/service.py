"""What a server does, without HTTP: from what is asked to requests of the engine, and from its events to answers.

Ask -> which adapters -> may this key? -> loaded -> prompts -> Request, Request, ...    (prepare)
events of each -> Choice: text, reasoning, calls, tokens                               (Reading)
"""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from qgraft.errors import AdapterError, CheckpointError, DataError, OptionError, QgraftError, UnsupportedError
from qgraft.model_parts import marker_ids
from qgraft.serving.answer_reader import AnswerReader
from qgraft.serving.answers import Choice
from qgraft.serving.catalogue import Catalogue
from qgraft.serving.engine import Engine
from qgraft.serving.fields import ApiError
from qgraft.serving.grammars import Form, Grammar
from qgraft.serving.keys import Keys, Permission
from qgraft.serving.lora_protocol import lora_given, mix_named
from qgraft.serving.origins import Origins
from qgraft.serving.prompting import Prompter, Prompting, Reader
from qgraft.serving.protocol import Ask
from qgraft.serving.requests import BusyError, ContextError, Delta, Finish, Listener, Request, StoppedError, Thinking
from qgraft.serving.running import Running
from qgraft.serving.sampling import Sampling
from qgraft.serving.tool_calls import CLOSE, OPEN, call_texts

MIXED = 8  # adapters of a mix
_FIELD = re.compile(r"(\w+)[:=]")


@dataclass(frozen=True)
class Limits:
    """What a request may cost.

    Attributes:
        body: bytes.
        seconds: until an answer is complete.
        body_seconds: until a body has arrived.
        upload, upload_seconds: the same of a file of rows.
    """

    body: int = 4 * 2**20
    seconds: float = 600.0
    body_seconds: float = 30.0
    upload: int = 64 * 2**20
    upload_seconds: float = 300.0

    def of(self, method: str) -> tuple[int, float]:
        """(bytes, seconds) of a request's body; files are PUT."""
        return (self.upload, self.upload_seconds) if method == "PUT" else (self.body, self.body_seconds)


@dataclass
class Reading:
    """An answer that comes, as the client gets it."""

    choice: Choice
    reader: Reader = field(default_factory=AnswerReader)
    one_call: bool = False

    def take(self, event: Delta | Finish) -> tuple[str, str]:
        """(more reasoning, more content) of an event."""
        if isinstance(event, Finish):
            self.choice.finish = event
            reasoning, content = self.reader.push("", last=True, cut=event.reason == "length" or event.stop is not None)
            self.choice.calls = self.reader.calls[:1] if self.one_call else self.reader.calls
            self.choice.unfinished = self.reader.unfinished and len(self.choice.calls) == len(self.reader.calls)
        else:
            self.choice.tokens += event.tokens
            reasoning, content = self.reader.push(event.text)
        self.choice.reasoning += reasoning
        self.choice.text += content
        return reasoning, content


@dataclass(frozen=True)
class Prepared:
    """The requests of an Ask, a reader for each answer, what prompts are called in its API, whether answers have a form."""

    requests: tuple[Request, ...]
    readers: tuple[Reader, ...]
    adapters: Mapping[str, float]
    prompts: int
    param: str
    formed: bool


class Service:
    """A base with its adapters, as people ask for them.

    Args:
        drawn: how tokens are chosen where a request says nothing of it, by the names of Sampling; None for OpenAI's way.

    Raises OptionError for a number in `drawn` that cannot be.

    Attributes:
        base: the name of the base, as `model` says it.
        unasked: how tokens are chosen for who says nothing of it.
    """

    def __init__(
        self,
        engine: Engine,
        catalogue: Catalogue,
        *,
        keys: Keys | None = None,
        prompting: Prompting | None = None,
        limits: Limits | None = None,
        origins: Origins | None = None,
        drawn: Mapping[str, Any] | None = None,
    ) -> None:
        self.engine, self.catalogue, self.base = engine, catalogue, catalogue.base
        self.tokenizer: PreTrainedTokenizerBase = engine.tokenizer
        self.keys, self.limits, self.origins = keys or Keys({}), limits or Limits(), origins or Origins()
        self.prompter = Prompter(self.tokenizer, prompting or Prompting(), marker_ids(engine.model))
        self.drawn = dict(drawn or {})
        self.unasked = Sampling(**self.drawn)
        self.started = int(time.time())

    def settled(self, ask: Ask) -> Ask:
        """The Ask with what is done where it says nothing."""
        return replace(ask, sampling=replace(ask.sampling, **{k: v for k, v in self.drawn.items() if k in ask.unsaid}))

    def prepare(self, ask: Ask, permission: Permission) -> Prepared:
        """The requests that a settled Ask comes to; adapters that are not loaded are.

        Raises ApiError with the status that the client gets.
        """
        adapters = self._adapters(ask, permission)
        most = self.engine.max_batch + self.engine.max_queue
        if (wanted := max(len(ask.prompts), 1) * ask.count) > most:
            raise ApiError(400, f"{wanted} answers are asked for at once, expected at most {most}",
                           param="n" if ask.count > 1 else ask.param)  # fmt: skip
        with errors_as_answers(ask.param):
            self.catalogue.need(adapters, permission.allows)
            if ask.messages is None:
                prompts = [self.prompter.plain(each) if isinstance(each, str) else list(each) for each in ask.prompts]
                readers: list[Reader] = [AnswerReader() for _ in prompts]
            else:
                ids, reader = self.prompter.chat(ask, self.catalogue.trained(adapters))
                prompts, readers = [ids], [reader]
        with errors_as_answers(ask.param):
            grammar = self._grammar(ask, readers[0])
            thinking = self._thinking(ask, readers[0])
        requests = [
            self._request(ask, prompt, adapters, choice, grammar, thinking, readers[0].keeps_special)
            for prompt in prompts
            for choice in range(ask.count)
        ]
        each = [replace(reader) for reader in readers for _ in range(ask.count)]
        return Prepared(tuple(requests), tuple(each), adapters, len(prompts), ask.param, ask.formed)

    def submit(self, prepared: Prepared, listeners: Sequence[Listener]) -> list[Running]:
        """Hand the requests to the engine, all of them or none. Raises ApiError."""
        running: list[Running] = []
        with errors_as_answers(prepared.param), self.catalogue.holding(prepared.adapters):
            try:
                for request, listener in zip(prepared.requests, listeners, strict=True):
                    running.append(self.engine.submit(request, listener))
            except QgraftError:
                for each in running:
                    self.engine.cancel(each)
                raise
        return running

    def _grammar(self, ask: Ask, reader: Reader) -> Grammar | None:
        """The form that answers must have, from their beginning, or behind the reasoning that the prompt has begun."""
        if not ask.formed and not ask.strict:
            return None
        schema, written = None if ask.must_call else ask.schema, reader.format
        param = "tools" if schema is None else ask.schema_param.partition(".")[0]
        try:
            calls = call_texts(written, ask.tools, ask.must_call, strict=ask.strict)
            form = Form(
                schema, ask.schema_param, calls,
                several=len(ask.must_call) != 1 and not ask.one_call and bool(written and written.repeats),
                behind=reader.close if reader.thinking else "", optional=not ask.formed,
                mark="" if written is None else written.mark, free=(OPEN, CLOSE),
            )  # fmt: skip
            if form.optional and written is not None and written.separate and not form.mark:
                raise UnsupportedError("strict: where a call begins is not certain with this chat template")
            return self.engine.grammars.compile(form)
        except (OptionError, UnsupportedError) as error:
            message = error.message if error.message.startswith(param) else f"{param}: {error.message}"
            raise ApiError(400, message, code="invalid_value", param=param, hint=error.hint) from error

    def _thinking(self, ask: Ask, reader: Reader) -> Thinking | None:
        """How long answers may think; nothing of those of a model that does not."""
        if ask.thinking_budget is None or not (reader.thinking or reader.reasons):
            return None
        own = self.tokenizer.get_added_vocab()
        if (close := own.get(reader.close)) is None:
            raise OptionError("thinking_token_budget: it is no single token that ends what the model thinks")
        return Thinking(ask.thinking_budget, reader.thinking, own.get(reader.open.strip()), close)

    def _request(
        self, ask: Ask, prompt: list[int], adapters: Mapping[str, float], choice: int, grammar: Grammar | None,
        thinking: Thinking | None, special: bool,
    ) -> Request:  # fmt: skip
        sampling = ask.sampling
        if sampling.seed is not None and choice:
            sampling = replace(sampling, seed=(sampling.seed + choice) % 2**64)
        return Request(
            tuple(prompt), adapters, sampling, ask.max_tokens, ask.stop, ask.ignore_ends, special, grammar,
            cleaned=ask.messages is not None and grammar is None, thinking=thinking,
        )  # fmt: skip

    def _adapters(self, ask: Ask, permission: Permission) -> dict[str, float]:
        """The adapters that are asked for, with their weights; each of them is there, and the key is good for it.

        What weighs 0 takes no part, and must be there as well: a name with a slip of the pen is no base.
        """
        asked = self._asked(ask, permission)
        if len(asked) > MIXED:
            raise ApiError(400, f"a mix of {len(asked)} adapters, expected at most {MIXED}", param="model")
        mix = {name: weight for name, weight in asked.items() if weight}
        for name in asked if mix else (*asked, self.base):
            if not permission.allows(name):
                raise ApiError(403, f"this key is not for {name[:200]!r}", kind="permission_error", param="model")
            if name != self.base and not self.catalogue.knows(name):
                raise self.catalogue.unknown(name, permission.allows)
        return mix

    def _asked(self, ask: Ask, permission: Permission) -> dict[str, float]:
        if ask.model == self.base:
            if ask.lora is None:
                return {name: scale for name, scale in self.catalogue.scales.items() if scale}
            numbered = self.catalogue.numbered()
            return lora_given(ask.lora, {number: name for number, name in numbered.items() if permission.allows(name)})
        if ask.lora is not None:
            raise ApiError(400, "model names an adapter, and lora is given, too", param="lora")
        found = mix_named(ask.model)
        if found is None:
            raise self.catalogue.unknown(ask.model)
        if self.base in found:
            raise ApiError(400, f"{self.base!r} is the base, which every answer has whole: it has no weight in a mix",
                           param="model")  # fmt: skip
        return found

    def spell(self, token: int) -> str:
        """The text of a token within others: alone, sentencepiece leaves out its blank."""
        once, twice = str(self.tokenizer.decode([token])), str(self.tokenizer.decode([token, token]))
        return twice.removeprefix(once) if twice.startswith(once) else once


class errors_as_answers:  # noqa: N801 (used like a function)
    """Within the block errors of ours become those of the API, with their status.

    Args:
        param: what prompts are called; None where nothing is asked.
    """

    def __init__(self, param: str | None = None) -> None:
        self.param = param

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ApiError) or not isinstance(error, QgraftError):
            return
        raise as_api_error(error, self.param) from error


def as_api_error(error: QgraftError, param: str | None = None) -> ApiError:
    """The answer that an error of ours is; with `param`, what prompts are called, it names the field that is to blame."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, StoppedError):
        return ApiError(503, error.message, kind="server_error")
    if isinstance(error, BusyError):
        return ApiError(429, error.message, kind="rate_limit_error", code="rate_limit_exceeded", retry_after=1)
    if isinstance(error, ContextError):
        return ApiError(400, error.message, code="context_length_exceeded", param=param, hint=error.hint)
    if isinstance(error, (AdapterError, CheckpointError, DataError, OptionError)):
        return ApiError(400, error.message, param=param and _blamed(error, param), hint=error.hint)
    return ApiError(500, error.message, kind="server_error", hint=error.hint)


def _blamed(error: QgraftError, param: str) -> str | None:
    """The field of a request that an error is of: what it begins with, else adapters are named by `model`."""
    named = _FIELD.match(error.message)
    if isinstance(error, DataError):
        return "tools" if named and named[1] == "tools" else param
    if isinstance(error, OptionError):
        return named[1] if named else None
    return "model"
