"""Answers that must be of a form: JSON of a schema, or calls of tools, and with which tokens they can still become that.

A form is written as a grammar in Lark's way, which llguidance follows token by token: it says which tokens of the
vocabulary may come next. Its grammar of a call of Qwen's, behind reasoning that the prompt has begun:

    start: thought blank body
    thought[suffix="</think>"]: /(.|\\n)*/
    blank: /[ \\t\\n\\r]{0,24}/
    body: call (more call)*
    more: /[ \\n]{0,2}/
    call: "<tool_call>\\n{\\"name\\": \\"time\\", \\"arguments\\": " schema_0 "}\\n</tool_call>"
    schema_0: %json {"type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]}

What JSON Schema says and llguidance does not keep is refused, with its reason; so are numbers that it rounds. Blanks between
values are bounded: a model that has nothing to say would write blanks for ever. Tokens that a tokenizer writes as text are
known by their bytes, special ones by their ids. Not chosen: a follower of our own (JSON alone is little, JSON Schema is not).
"""

import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qgraft.errors import OptionError, UnsupportedError
from qgraft.serving.fields import shown
from qgraft.serving.requests import BusyError
from qgraft.serving.schema_check import EXTENSION
from qgraft.serving.schemas import check_numbers, counts_keys, settled

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHECKS = 2  # schemas that are read at once
CHECK_SECONDS = 5.0  # that one may compute
PATIENCE = 20.0  # seconds that a busy machine is waited for
BLANKS = 24  # of these, one after another
LONGEST = 1 << 18  # characters of a grammar: some of a few megabytes take seconds, and hundreds of megabytes
_BLANK = rf"[ \t\n\r]{{1,{BLANKS}}}"
_JSON = {"whitespace_pattern": _BLANK, "whitespace_flexible": True, "lenient": False, "coerce_one_of": False}
_WORDS = {  # what llguidance says -> for who has not written its code
    r"^NoExtensionBias$": "nothing can be written that it allows",
    r"^Unimplemented keys: \[(.*)\]$": r"answers cannot be held to \1",
    r"json-schema:///(#?)": r"\1",
    r" ?Enable 'coerce_one_of' option to approximate oneOf with anyOf": " unless at most one of them can be right",
    r"min/maxProperties only supported": "minProperties and maxProperties are kept only",
    r" and retrieving it failed: .*": "; nothing is fetched from elsewhere",
}
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class CallText:
    """How one function is called: text, its arguments as JSON of the schema, text.

    Attributes:
        where: how errors call the schema.
    """

    before: str
    arguments: Mapping[str, Any]
    after: str
    where: str = "parameters"


@dataclass(frozen=True)
class Form:
    """What an answer must be: JSON of the schema, or calls; where both are given, one of the two.

    Attributes:
        where: how errors call the schema.
        several: whether calls may follow one another.
        behind: what ends the reasoning that the prompt has begun; "" where there is none.
        optional: whether text may come before calls, or in their place; where they begin with no `mark`, in their place.
        free: tokens that may stand in such text, though they are special.
    """

    schema: Mapping[str, Any] | None = None
    where: str = "schema"
    calls: tuple[CallText, ...] = ()
    several: bool = False
    behind: str = ""
    optional: bool = False
    mark: str = ""
    free: tuple[str, ...] = ()


@dataclass(frozen=True)
class Refused:
    """Why a form is refused: which of its schemas, and which part of it."""

    reason: str
    number: int | None = None
    place: Sequence[str | int] = ()

    def of(self, named: Sequence[tuple[str, Any]]) -> str:
        """In words, which name the part and what it is."""
        if self.number is None:
            return f"{', '.join(where for where, _ in named)[:300]} is refused: {self.reason}"
        where, part = named[self.number]
        for key in self.place:
            part, where = part[key], f"{where}[{key}]" if isinstance(key, int) else f"{where}.{key}"
        return f"{where[:300]} is refused: {self.reason}: got {shown(part)}"


class Grammars:
    """What follows forms with a tokenizer's vocabulary.

    Args:
        size: rows of the vocabulary.
        ends: the tokens that end an answer.

    Raises UnsupportedError for a tokenizer whose tokens are not known by their bytes.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", size: int, ends: Collection[int]) -> None:
        self._known, self._checks = lru_cache(maxsize=64)(self._compiled), threading.Semaphore(CHECKS)
        self._tokens = _tokens_of(tokenizer, size, sorted(ends))
        added = {text: token for text, token in tokenizer.get_added_vocab().items() if token < size}
        self._special = {text: token for text, token in added.items() if self._tokens.is_special_token(token)}
        self._split = re.compile("|".join(map(re.escape, sorted(self._special, key=len, reverse=True))) or r"(?!)")

    def compile(self, form: Form) -> "Grammar":
        """What follows this form; kept for who asks for it again.

        Raises OptionError for a schema that is none, or of which not all can be kept, BusyError where others are being read.
        """
        schema = None if form.schema is None else settled(form.schema, form.where)
        calls = tuple(replace(call, arguments=settled(call.arguments, call.where)) for call in form.calls)
        form = replace(form, schema=schema, calls=calls)
        named = [(form.where, schema)] if schema is not None else []
        named += [(call.where, call.arguments) for call in calls]
        for where, each in named:
            self._check(each, where)
        lark = self.lark(form)
        if len(lark) > LONGEST:
            raise OptionError(
                f"{', '.join(where for where, _ in named)[:300]} is refused: as a grammar it has {len(lark)} characters, "
                f"expected at most {LONGEST}"
            )
        found = self._known(lark, tuple(_json(each) for _, each in named))
        if isinstance(found, Refused):
            raise OptionError(found.of(named))
        return found

    def _check(self, schema: Mapping[str, Any], where: str) -> None:
        """Raise OptionError for what can be told not to be kept before anything is written."""
        try:
            _json(schema)
            check_numbers(schema)
            self._check_texts(schema)
        except ValueError as error:  # NaN in an enum
            raise OptionError(f"{where} is refused: it holds NaN or infinity, which are no JSON") from error
        except RecursionError:
            raise OptionError(f"{where} is refused: its brackets are nested too deep") from None
        except OptionError as error:
            raise OptionError(f"{where} is refused: {error.message}") from error

    def _compiled(self, lark: str, schemas: tuple[str, ...]) -> "Grammar | Refused":
        """The grammar, or why there is none."""
        import llguidance

        if (problem := self._problem(schemas)) is not None:
            return problem
        limits = llguidance.LLParserLimits(verbose_errors=False)
        text = llguidance.LLMatcher.grammar_from_lark(lark)
        grammar = Grammar(llguidance.LLMatcher(self._tokens, text, log_level=0, limits=limits))
        try:
            grammar.begin().allowed()
        except OptionError as error:
            return Refused(error.message)
        return grammar

    def _problem(self, schemas: tuple[str, ...]) -> "Refused | None":
        """Why schemas cannot be read, found out where that harms nobody (schema_check.py)."""
        words = [sys.executable, "-m", "qgraft.serving.schema_check", str(CHECK_SECONDS)]
        if not self._checks.acquire(timeout=PATIENCE):
            raise BusyError("other schemas are being read")
        try:
            done = subprocess.run(words, input=json.dumps(schemas), capture_output=True, text=True, timeout=PATIENCE)
        except subprocess.TimeoutExpired as error:  # which says nothing of the schema where others compute
            raise BusyError(f"the schema could not be read in {PATIENCE:g} seconds") from error
        finally:
            self._checks.release()
        if done.returncode == 0:
            return None
        if done.stdout:
            (number, reason), *place = map(json.loads, done.stdout.splitlines())
            return Refused(_reason(reason), number, place[0] if place else ())
        if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
            return Refused(f"to read it takes longer than {CHECK_SECONDS:g} seconds")
        return Refused("to read it takes too much memory, or too deep a stack")

    def _check_texts(self, schema: object) -> None:
        """Raise OptionError for what asks for a text that is a token of its own, and for keys that are counted."""
        if isinstance(schema, str):
            if found := self._split.search(re.sub(r"\\(.)", r"\1", schema)):
                raise OptionError(f"{found[0]!r} is a token of this model and no text in an answer")
        elif isinstance(schema, list):
            for value in schema:
                self._check_texts(value)
        elif isinstance(schema, Mapping):
            if counts_keys(schema):
                raise OptionError(
                    "minProperties is kept where properties and required name all keys, with additionalProperties false"
                )
            for key, value in schema.items():
                self._check_texts(key)
                self._check_texts(value)

    def lark(self, form: Form) -> str:
        """The grammar of a form."""
        schemas: list[Mapping[str, Any]] = []
        mark, opening, text = self._opening(form) if form.optional else ("", "call", [])
        bodies = []
        if form.schema is not None:
            bodies.append(("" if form.behind else "blank ") + _schema(schemas, form.schema))
        if form.calls:
            bodies.append(opening if form.optional else "call (more call)*" if form.several else "call")
        calls = [
            " ".join(
                (
                    *self._literal(call.before.removeprefix(mark)),
                    _schema(schemas, call.arguments),
                    *self._literal(call.after),
                )
            )
            for call in form.calls
        ]
        lines = ["start: thought blank body" if form.behind else "start: body", f"blank: /[ \\t\\n\\r]{{0,{BLANKS}}}/"]
        if form.behind:
            lines += self._thought(form.behind)
        lines += [f"body: {' | '.join(bodies)}", *([r"more: /[ \n]{0,2}/"] if form.calls and form.several else [])]
        lines += text
        lines += [f"call: {' | '.join(calls)}"] if calls else []
        lines += [f"schema_{number}: %json {_json(schema)}" for number, schema in enumerate(schemas)]
        return "\n".join(lines)

    def _thought(self, mark: str) -> list[str]:
        if mark in self._special:
            return [f"thought: reasoning <[{self._special[mark]}]>", r"reasoning: /(.|\n)*/"]
        return [rf"thought[suffix={json.dumps(mark)}]: /(.|\n)*/"]

    def _opening(self, form: Form) -> tuple[str, str, list[str]]:
        """Of calls that may come: (what has been written when it is certain that one does, the body, its rules)."""
        if not form.mark:
            return "", "call | plain", [r"plain: /([ \t\n\r]*[^ \t\n\r{\[](.|\n)*)?/"]
        piece = next(self._literal(form.mark))
        special = self._split.match(form.mark)
        mark = json.loads(piece) if special is None else special[0]
        without = rf" & ~/(.|\n)*{_pattern(mark)}(.|\n)*/" if special is None else ""
        until = rf"until[suffix={piece}]: /(.|\n)*/" if special is None else f"until: any {piece}"
        free = [f"<[{self._special[text]}]>" for text in form.free if text in self._special]
        lead = f"(any ({' | '.join(free)}))*" if free else '""'
        rules = [until, "any: ANY", rf"ANY: /(.|\n)*/{without}", f"lead: {lead}"]
        return mark, "(lead until call)* lead any" if form.several else "lead (until call | any)", rules

    def _literal(self, text: str) -> Iterator[str]:
        """A text as the grammar writes it: pieces in quotation marks, special tokens by their ids."""
        at = 0
        for found in self._split.finditer(text):
            if found.start() > at:
                yield json.dumps(text[at : found.start()], ensure_ascii=False)
            yield f"<[{self._special[found[0]]}]>"
            at = found.end()
        if at < len(text):
            yield json.dumps(text[at:], ensure_ascii=False)


class Grammar:
    """A form that answers can be held to."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def begin(self) -> "Matching":
        """The state at the beginning of an answer."""
        return Matching(self._matcher.deep_copy())


class Matching:
    """An answer that is being followed."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    @property
    def complete(self) -> bool:
        """Whether nothing may follow but an end."""
        return bool(self._matcher.is_stopped())

    def allowed(self) -> Tensor:
        """The tokens [vocabulary, or a little more] that may come next, bool. Raises OptionError where none is found."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        return torch.from_numpy(np.unpackbits(bits, bitorder="little")).bool()

    def take(self, token: int) -> None:
        """The next token of the answer, one that may come. Raises OptionError for another."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise OptionError(f"the form of the answer is refused: {_reason(self._matcher.get_error())}")


def _pattern(text: str) -> str:
    """The pattern, between slashes, that is this text."""
    return "".join(f"\\{each}" if each in r"\.+*?()|[]{}^$/&~#-" else each for each in text).replace("\n", r"\n")


def _schema(schemas: list[Mapping[str, Any]], schema: Mapping[str, Any]) -> str:
    """The name of a schema's rule."""
    schemas.append(schema)
    return f"schema_{len(schemas) - 1}"


def _json(schema: Mapping[str, Any]) -> str:
    return json.dumps({**schema, EXTENSION: _JSON}, allow_nan=False)


def _reason(told: str) -> str:
    """What llguidance says is wrong, without the places in a grammar that nobody has seen."""
    lines = re.split(r"\n\s*\d+ \| |\n<state>", told)[0].splitlines()
    text = " ".join(line.strip() for line in lines if line.strip(" ^"))
    text = re.sub(r"^(at \d+\(\d+\): )?(failed to compile JSON schema: )?", "", text).replace("<non-verbose/>", "")
    for theirs, ours in _WORDS.items():
        text = re.sub(theirs, ours, text)
    return text.strip()[:300]


def _tokens_of(tokenizer: "PreTrainedTokenizerBase", size: int, ends: Sequence[int]) -> Any:
    """llguidance's view of a vocabulary."""
    import llguidance
    import llguidance.hf
    from transformers import PreTrainedTokenizerFast

    try:
        if isinstance(tokenizer, PreTrainedTokenizerFast):
            return llguidance.hf.from_tokenizer(tokenizer, n_vocab=size, eos_token=list(ends))
        return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Pieces(tokenizer, size, ends)), eos_token=list(ends))
    except (ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0][:300]
        raise UnsupportedError(f"answers with this tokenizer cannot be held to a form: {reason}") from error


class _Pieces:
    """The vocabulary of a tokenizer without tokenizer.json: each token's bytes, by its text among others."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", size: int, ends: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = ends[0], None
        texts = [self._bytes(token) for token in range(size)]
        special = set(tokenizer.all_special_ids) | set(ends)
        self.special_token_ids = [token for token, text in enumerate(texts) if token in special or not text]
        self.tokens = [text or b"<%d>" % token for token, text in enumerate(texts)]
        self._ids = {text: token for token, text in enumerate(texts) if text and token not in special}
        self._longest = max(map(len, texts))

    def _bytes(self, token: int) -> bytes:
        piece = self._tokenizer.convert_ids_to_tokens(token) if token < len(self._tokenizer) else ""
        if byte := _BYTE.fullmatch(str(piece)):
            return bytes([int(byte[1], 16)])
        once, twice = (
            str(self._tokenizer.decode([token] * n, clean_up_tokenization_spaces=False)) for n in (1, 2)
        )  # alone, sentencepiece leaves out its blank
        return (twice.removeprefix(once) if twice.startswith(once) else once).encode()

    def __call__(self, text: bytes) -> list[int]:
        """Ids whose bytes are the text, the longest first: where it alone may follow, answers are spelt so."""
        ids, at = [], 0
        while at < len(text):
            sizes = range(min(self._longest, len(text) - at), 0, -1)
            size = next((n for n in sizes if text[at : at + n] in self._ids), 0)
            if not size:  # no token is this byte: as far as it goes
                break
            ids.append(self._ids[text[at : at + size]])
            at += size
        return ids
