"""Chat templates, run as what they are: programs from a model's folder. jinja2's immutable sandbox, with a bound.

The sandbox keeps a template from code and files. It does not keep it from `range(99999)` within itself, from
`'a' * 10**9`, or from a list of lists of lists. So whatever a rendering does is paid for out of one allowance, counted in
units and not in seconds, so that a row renders on every machine or on none. A unit is what 20 ns suffice for; the whole is
a second, and what a chat takes grows with it (`Allowance.of`):

    each turn of a loop, each call of a macro      TICK, and the text and the expressions in it
    each call, filter, test, product               TICK and what is looked at: texts by their length, lists by their entries
    each text or list that comes out               its length; no text grows beyond what a rendering is allowed
    each expression that is written                its length

What only asks for a length or a type costs nothing of what is in it: templates do so in each turn of a loop over all turns.
Loops, macros, concatenations, comparisons and slices do not come by any hook of the sandbox: the parsed template is changed
so that they do (`_Metered`). Everything else is what transformers gives a template: blocks trimmed, `break` and `continue`,
`tojson` that escapes no HTML, `raise_exception`, `strftime_now`, `{% generation %}`.

Not chosen: a clock (the same row would be dropped on a slow machine), a process of its own (a third of a second for each),
signals (the main thread's alone).
"""

import json
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context
from jinja2.visitor import NodeTransformer

from qgraft.data import metering
from qgraft.data.metering import TICK, TooCostly

LONGEST = 100_000  # characters of a template; published ones have 30,000 at most
OPEN, CLOSE = "\ufdd0", "\ufdd1"  # noncharacters of Unicode around what {% generation %} holds

FAILURES = (
    jinja2.TemplateError, ArithmeticError, LookupError, AttributeError, TypeError, ValueError, NameError, RuntimeError,
    MemoryError, AssertionError, SyntaxError, SystemError, StopIteration, ImportError, OSError,
)  # fmt: skip
"""What a template's own mistakes raise, from 1/0 to nesting that Python's compiler gives up at."""


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """As transformers has it: no HTML escapes."""
    metering.check_nesting(value, len(indent) if isinstance(indent, str) else indent or 0)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def strftime_now(format: str) -> str:
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
    """Puts a payment where jinja2 has no hook: in loops, macros and blocks, around `~`, comparisons and slices."""

    def _paying(self, node: Any) -> Any:
        self.generic_visit(node)
        text = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        units = TICK + text + 8 * sum(1 for _ in node.find_all(nodes.Node))
        pay = _call("tick", [nodes.Const(units)], node)
        node.body.insert(0, nodes.ExprStmt(pay, lineno=node.lineno))
        if getattr(node, "test", None) is not None:  # {% for ... if ... %}: asked for each entry, also those left out
            node.test = nodes.And(_call("tick", [nodes.Const(units)], node), node.test, lineno=node.lineno)
        return node

    visit_For = visit_Macro = visit_CallBlock = _paying  # noqa: N815

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("concatenated", node.nodes, node)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        """`==` and `in` look at all of what they compare."""
        self.generic_visit(node)
        seeks = any(operand.op in ("in", "notin") for operand in node.ops)
        sides: list[Any] = [node, *node.ops]
        for side in sides:
            if not isinstance(side.expr, nodes.Const):
                side.expr = _call("searched" if seeks else "looked_at", [side.expr], node)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _call("made", [node], node) if isinstance(node.arg, nodes.Slice) else node


def _call(name: str, values: list[nodes.Expr], of: nodes.Node) -> nodes.Call:
    """A call of one of `_OWN`."""
    return nodes.Call(nodes.EnvironmentAttribute(name), values, [], None, None, lineno=of.lineno)


_OWN: dict[str, Any] = {
    each.__name__: each
    for each in (metering.tick, metering.concatenated, metering.searched, metering.looked_at, metering.made)
}


@pass_context
def _written(_: Context, value: Any) -> Any:
    """An expression's value, before it becomes text. That a context is asked for keeps it from being done on compiling."""
    return metering.written(value)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, in which calls and products are paid for; it has its own names for what `_Metered` puts in."""

    intercepted_binops = frozenset({"+", "-", "*", "**", "/", "//", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            finalize=_written,
            optimized=False,  # or what is worked out on compiling is made again by each turn of a loop, unpaid
        )
        filters: dict[str, Any] = self.filters
        self.filters = metering.metered_filters({**filters, "tojson": _tojson})
        tests: dict[str, Any] = self.tests
        self.tests = metering.metered_tests(tests)
        del self.globals["lipsum"]
        self.globals.update(raise_exception=_raise_exception, strftime_now=strftime_now, namespace=_Names)
        vars(self).update(_OWN)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """As the sandbox, paid for. The names are those of the method that this replaces."""
        if any(__obj is own for own in _OWN.values()):  # what _Metered put in
            return __obj(*args)
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(__obj, Macro):
            metering.pay_entries((*args, *kwargs.values()))
        else:
            metering.pay_call(name, (owner, *args) if isinstance(owner, (str, list, tuple)) else args, kwargs)
        return metering.made(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """`+`, `*`, `**` and `%` of numbers, texts and lists, refused before the result is made where it is too large."""
        metering.product(operator, left, right)
        return metering.made(super().call_binop(context, operator, left, right))


@lru_cache(maxsize=64)
def compiled(text: str) -> jinja2.Template:
    """The template, ready to be rendered; raises what FAILURES lists for one that is none."""
    if len(text) > LONGEST:
        raise TooCostly(f"it has {len(text):,} characters, more than {LONGEST:,}")
    environment = _environment()
    with metering.allowed({}):  # jinja2 works out now what {% autoescape %} is told
        return environment.from_string(_Metered().visit(environment.parse(text)))


@lru_cache(maxsize=64)
def names_read(text: str) -> frozenset[str]:
    """The names of the variables that a template asks for; raises as compiled() does."""
    compiled(text)
    return frozenset(meta.find_undeclared_variables(_environment().parse(text)))


@lru_cache(maxsize=1)
def _environment() -> _Environment:
    return _Environment()


def render(text: str, variables: Mapping[str, Any]) -> str:
    """What the template writes, OPEN and CLOSE where it says {% generation %}; raises what FAILURES lists."""
    template, pieces, length = compiled(text), [], 0
    with metering.allowed(variables) as allowance:
        for piece in template.generate(**variables):
            pieces.append(piece)
            length += len(piece)
            allowance.check(length)
    return "".join(pieces)
