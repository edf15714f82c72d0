"""Chat templates, run as what they are: programs from a model's folder. jinja2's immutable sandbox, with a bound.

The sandbox keeps a template from code and files. It does not keep it from `range(99999)` within itself, from
`'a' * 10**9`, or from a list of lists of lists. So whatever a rendering does is paid for out of one allowance, counted in
characters and not in seconds, so that a row renders on every machine or on none:

    each turn of a loop, each call of a macro      TICK and the constant text in it
    each call, filter, concatenation, product      the characters of what goes in and of what comes out
    each expression that is written                its characters

No text grows beyond LONGEST on the way. Loops, macros, concatenations and slices do not come by any hook of the sandbox:
the parsed template is changed so that they do (`_Metered`). Everything else is what transformers gives a template: blocks
trimmed, `break` and `continue`, `tojson` that escapes no HTML, `raise_exception`, `strftime_now`, `{% generation %}`.

Not chosen: a clock (the same row would be dropped on a slow machine), a process of its own (a third of a second for each),
signals (the main thread's alone).
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache, wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import Context, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context
from jinja2.visitor import NodeTransformer

ALLOWANCE = 50_000_000  # characters a rendering may move: seconds of the worst template; a chat takes thousands of them
LONGEST = 4_000_000  # characters of a text
TICK, ENTRY = 250, 8  # what a step costs, and an entry of a list, which takes that much longer to look at
_COUNTED = {
    "center",
    "ljust",
    "rjust",
    "zfill",
    "expandtabs",
    "indent",
    "tojson",
    "wordwrap",
    "batch",
    "slice",
    "safe_range",
}
_SLOW = {"wordwrap", "urlize", "striptags", "title", "wordcount", "pprint", "sort", "unique", "groupby", "dictsort"}
WIDEST = 100_000  # an integer that a function or filter is given: widths, counts
OPEN, CLOSE = "\ufdd0", "\ufdd1"  # noncharacters of Unicode around what {% generation %} holds
_WIDTH = re.compile(r"\d{5,}")  # in a format: '{:99999999}'
_WIDTH_GIVEN = re.compile(r"\{[^}]*\{|%[^a-zA-Z%]*\*")  # '{:{}}', '%*d': the width is an argument

FAILURES = (
    jinja2.TemplateError, ArithmeticError, LookupError, AttributeError, TypeError, ValueError, NameError, RuntimeError,
    MemoryError, AssertionError, SyntaxError, SystemError, StopIteration, ImportError, OSError,
)  # fmt: skip
"""What a template's own mistakes raise, from 1/0 to nesting that Python's compiler gives up at."""


class TooCostly(jinja2.TemplateError):
    """A template that asks for more than a rendering is allowed."""


@dataclass
class _Allowance:
    left: int

    def spend(self, amount: int) -> None:
        self.left -= amount
        if self.left < 0:
            raise TooCostly(f"it asks for more than {ALLOWANCE:,} steps and characters")


_allowance: ContextVar[_Allowance | None] = ContextVar("allowance", default=None)


@contextmanager
def _allowed() -> Iterator[None]:
    token = _allowance.set(_Allowance(ALLOWANCE))
    try:
        yield
    finally:
        _allowance.reset(token)


def _spend(amount: int) -> None:
    allowance = _allowance.get()
    if allowance is not None:
        allowance.spend(amount)


def _size(*values: Any) -> int:
    """What these values cost to look at; what is shared counts wherever it is."""
    total, waiting = 0, list(values)
    while waiting:
        each = waiting.pop()
        if isinstance(each, (str, bytes)):
            total += len(each)
        elif isinstance(each, (list, tuple, set, frozenset)):
            total += ENTRY
            waiting.extend(each)
        elif isinstance(each, Mapping):
            total += ENTRY
            waiting.extend(each.keys())
            waiting.extend(each.values())
        elif isinstance(each, int):
            total += ENTRY + each.bit_length() // 3
        else:
            total += ENTRY
        if total > 2 * LONGEST:
            raise TooCostly(f"it asks for a text or list longer than {LONGEST:,}")
    return total


def _paid(value: Any) -> Any:
    """`value`, paid for."""
    size = _size(value)
    if size > LONGEST:
        raise TooCostly(f"it asks for a text or list longer than {LONGEST:,}")
    _spend(size)
    return value


def _bounded(size: int) -> None:
    """Raise TooCostly before something of this size is made."""
    if size > LONGEST:
        raise TooCostly(f"it asks for a text or list longer than {LONGEST:,}")


def _check_growth(name: str, values: tuple[Any, ...], options: Mapping[str, Any]) -> None:
    """Refuse calls whose result is much larger than what goes in: widths, formats, replacements, joins."""
    everything = (*values, *options.values())
    large = any(isinstance(value, int) and abs(value) > WIDEST for value in everything)
    if large and name in _COUNTED:
        raise TooCostly(f"{name} is given a number beyond {WIDEST:,}")
    texts = [value for value in everything if isinstance(value, str)]
    if name in ("format", "format_map", "%") and texts:
        if _WIDTH.search(texts[0]) or (large and _WIDTH_GIVEN.search(texts[0])):
            raise TooCostly("a format asks for a width beyond 10,000")
        _bounded((1 + texts[0].count("{") + texts[0].count("%")) * _size(*everything))
    elif name == "replace" and len(texts) >= 3:
        _bounded(len(texts[0]) + (texts[0].count(texts[1]) if texts[1] else len(texts[0]) + 1) * len(texts[2]))
    elif name in ("join", "indent") and everything:
        counted = [value for value in everything if isinstance(value, (list, tuple))]
        lines = max(map(len, counted), default=0) + sum(text.count("\n") + 1 for text in texts[:1])
        width = max(
            [len(text) for text in texts] + [value for value in everything if isinstance(value, int)], default=0
        )
        _bounded(
            _size(*everything) + lines * (width if name == "indent" or counted else max(map(len, texts), default=0))
        )
    elif name in ("expandtabs", "urlize") and texts:
        _bounded(_size(*everything) * 64)


def _metered(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that pays for what it is given and for what it gives."""

    @wraps(function)
    def paying(*values: Any, **options: Any) -> Any:
        own = values[1:] if hasattr(function, "jinja_pass_arg") else values
        _spend(TICK + _size(*own, *options.values()) * (20 if name in _SLOW else 1))
        _check_growth(name, own, options)
        return _paid(function(*values, **options))

    return paying


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """As transformers has it: no HTML escapes."""
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    parts = []
    for part in encoder.iterencode(value):
        _spend(len(part))
        parts.append(part)
    return "".join(parts)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


class _Names(Namespace):
    """namespace() without names that begin with an underscore, and without a text of its own."""

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.TemplateError(f"a namespace takes no name like {name!r}")
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


class _Generation(Extension):
    """{% generation %}: what the model writes, between OPEN and CLOSE."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marks = [nodes.Output([nodes.TemplateData(mark)], lineno=line) for mark in (OPEN, CLOSE)]
        return [nodes.Scope([marks[0], *body, marks[1]], lineno=line)]


class _Metered(NodeTransformer):
    """Puts a payment where jinja2 has no hook: in loops, macros and blocks, around `~` and slices."""

    def _paying(self, node: Any) -> Any:
        self.generic_visit(node)
        text = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        pay = nodes.Call(nodes.EnvironmentAttribute("tick"), [nodes.Const(TICK + text)], [], None, None)
        node.body.insert(0, nodes.ExprStmt(pay, lineno=node.lineno))
        return node

    visit_For = visit_Macro = visit_CallBlock = _paying  # noqa: N815

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Call(nodes.EnvironmentAttribute("concatenated"), node.nodes, [], None, None, lineno=node.lineno)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        """`==` and `in` look at all of what they compare."""
        self.generic_visit(node)
        sides: list[Any] = [node, *node.ops]
        for side in sides:
            if not isinstance(side.expr, nodes.Const):
                call = nodes.Call(nodes.EnvironmentAttribute("paid"), [side.expr], [], None, None, lineno=node.lineno)
                side.expr = call
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        return nodes.Call(nodes.EnvironmentAttribute("paid"), [node], [], None, None, lineno=node.lineno)


@pass_context
def _written(_: Context, value: Any) -> Any:
    """An expression's value, before it becomes text. That a context is asked for keeps it from being done on compiling."""
    return _paid(value)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, in which calls and products are paid for; it has its own names for what `_Metered` puts in."""

    intercepted_binops = frozenset({"+", "-", "*", "**", "/", "//", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], finalize=_written
        )
        self.filters["tojson"] = _tojson
        self.filters = {name: _metered(name, function) for name, function in self.filters.items()}
        tests: dict[str, Any] = self.tests
        self.tests = {name: _metered(name, function) for name, function in tests.items()}
        del self.globals["lipsum"]
        self.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now, namespace=_Names)
        self.tick, self.paid = _spend, _paid

    def concatenated(self, *values: Any) -> str:
        """What `~` gives."""
        _bounded(_size(*values))
        return str(_paid(str_join(values)))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """As the sandbox, paid for. The names are those of the method that this replaces."""
        if __obj is _spend or __obj is _paid:
            return __obj(*args)  # what _Metered put in
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if owner is __self:
            return __obj(*args)
        values = (owner, *args) if isinstance(owner, (str, list, tuple, dict)) else args
        _spend(TICK + _size(*values, *kwargs.values()))
        _check_growth(name, values, kwargs)
        return _paid(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """`+`, `*`, `**` and `%` of numbers, texts and lists, refused before the result is made where it is too large."""
        if operator == "*":
            counts = [value for value in (left, right) if isinstance(value, int)]
            held = [value for value in (left, right) if isinstance(value, (str, list, tuple))]
            _bounded(_size(*held) * max([abs(count) for count in counts], default=1) if held else _size(left, right))
        elif operator == "**":
            _bounded(_size(left) * min(abs(right), LONGEST) if isinstance(right, int) else 1)
        elif operator == "%" and isinstance(left, str):
            _check_growth("%", (left, *(right if isinstance(right, tuple) else (right,))), {})
        else:
            _bounded(_size(left, right))
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, int) and result.bit_length() > WIDEST:  # dividing takes the square of the digits
            raise TooCostly("it asks for a number of more than 30,000 digits")
        return _paid(result)


@lru_cache(maxsize=64)
def compiled(text: str) -> jinja2.Template:
    """The template, ready to be rendered; raises what FAILURES lists for one that is none."""
    if len(text) > LONGEST:
        raise TooCostly(f"it has {len(text):,} characters")
    environment = _environment()
    with _allowed():
        return environment.from_string(_Metered().visit(environment.parse(text)))


@lru_cache(maxsize=1)
def _environment() -> _Environment:
    return _Environment()


def render(text: str, variables: Mapping[str, Any]) -> str:
    """What the template writes, OPEN and CLOSE where it says {% generation %}; raises what FAILURES lists."""
    template = compiled(text)
    with _allowed():
        return "".join(template.generate(**variables))
