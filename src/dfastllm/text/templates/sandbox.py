"""The Jinja environment of chat templates: what Hugging Face's has, nothing that reaches out, and every step charged.

It has trim_blocks and lstrip_blocks, loop controls, a `tojson` that neither escapes HTML nor sorts keys,
`raise_exception(message)`, `strftime_now(format)`, and the `{% generation %}` tag, which only marks its body and is
rendered through here. The sandbox denies attribute tricks and any change to the values handed in. Compiling computes
nothing, and what a rendering computes is charged to its `Budget` beforehand wherever the result may be larger than what
it is made of: `bounds` says which operations those are.
"""

from __future__ import annotations

import functools
import itertools
import json
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import TrackingCodeGenerator
from jinja2.parser import Parser
from jinja2.runtime import str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from dfastllm.text.templates import bounds
from dfastllm.text.templates.budget import BITS, Budget, TooMuch

__all__ = ["Refused", "Sandbox"]

SOURCE = 1 << 18  # characters of a template; the longest in the field have some 60,000
NESTING = 100  # of statements and expressions
_NO_FILTERS = ("pprint", "striptags", "urlize", "wordwrap", "xmlattr")  # for web pages, and none is linear in its text
_INDENT = 16  # of tojson
_FORMAT = 200  # characters of a format of strftime
_NODES = 16  # of a loop's body that make a step
_OPERANDS = 32  # of a sum that is charged only as a whole
_PIECES = 4096  # of output that are joined at once
_SMALL = 512  # characters of a text that need no charge on their own
# Filters that make no more than they are given, so that what they make is charged only where it is kept.
_LIGHT = frozenset(
    "attr abs capitalize count d default first float items last length lower safe string title trim upper".split()
)
_SORTING = frozenset(("dictsort", "groupby", "sort", "unique"))
_WRITING = frozenset("capitalize e escape forceescape lower string title trim upper".split())  # what is no text, too


class Refused(jinja2.TemplateError):
    """The template itself called raise_exception: it refuses these messages."""


class Sandbox(ImmutableSandboxedEnvironment):
    """Compiles and renders templates. One may be used by many threads: each rendering has its own budget."""

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, loopcontrols],
            loader=jinja2.DictLoader({}),
            optimized=False,
        )
        self._state = threading.local()
        self.code_generator_class = _Metered
        filters = {name: one for name, one in self.filters.items() if name not in _NO_FILTERS}
        self.filters = {name: one if name in _LIGHT else self._charged(name, one) for name, one in filters.items()}
        self.filters["tojson"] = self._tojson
        del self.globals["lipsum"]
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now, "namespace": _Namespace}

    @property
    def budget(self) -> Budget:
        """Of the rendering that this thread is in."""
        budget: Budget = self._state.budget
        return budget

    # ---- compiling and rendering

    def compiled(self, source: str) -> tuple[jinja2.Template, frozenset[str]]:
        """The template, and the texts that its code has. Raises TemplateSyntaxError and TooMuch, and what Python's
        compiler raises for what it cannot compile."""
        if len(source) > SOURCE:
            raise TooMuch(f"it has {len(source):,} characters, more than {SOURCE:,}")
        tree = self.parse(source)
        _check_tree(tree)
        literals = frozenset(one.value for one in tree.find_all(nodes.Const) if isinstance(one.value, str))
        return jinja2.Template.from_code(self, self.compile(tree), self.make_globals(None), None), literals

    def names(self, source: str) -> frozenset[str]:
        """What a template that compiles reads and does not set itself, functions of the sandbox left out."""
        reader = _Names(self)
        reader.visit(self.parse(source))
        return frozenset(reader.undeclared_identifiers) - set(self.globals)

    def rendered(self, template: jinja2.Template, values: Mapping[str, Any]) -> str:
        """The template's text. Raises what the template raises, and TooMuch."""
        outer = getattr(self._state, "budget", None)
        self._state.budget = Budget(values)
        try:
            return template.render(values)
        finally:
            self._state.budget = outer

    # ---- what compiled templates call; the rest they ask of the budget itself

    def concat(self, pieces: Iterable[str]) -> str:
        """The output of a template, a macro or a block, joined."""
        budget, texts, size = self.budget, [], 0
        rest = iter(pieces)
        while part := list(itertools.islice(rest, _PIECES)):
            size += sum(map(len, part))
            budget.room(size)
            texts.append("".join(part))
        text: str = budget.made("".join(texts) if len(texts) > 1 else texts[0] if texts else "")
        return text

    def joined(self, values: tuple[Any, ...]) -> Any:
        """The operator ~."""
        if len(values) < _OPERANDS and all(value.__class__ is str for value in values):
            text = "".join(values)
            return text if len(text) <= _SMALL else self.budget.made(text)
        budget = self.budget
        budget.room(sum(map(budget.weight, values)))
        return budget.made(str_join(values))

    def plus(self, value: Any, *others: Any) -> Any:
        """The operator +, from left to right, of many."""
        made = self.budget.made
        for other in others:
            value = made(value + other)
        return value

    def times(self, left: Any, right: Any) -> Any:
        """The operator *."""
        budget = self.budget
        bounds.times(budget, left, right)
        product = left * right
        return budget.built(product) if isinstance(product, list | tuple) else budget.made(product)

    def power(self, left: Any, right: Any) -> Any:
        """The operator **."""
        bounds.power(left, right)
        return left**right

    def modulo(self, left: Any, right: Any) -> Any:
        """The operator %, which formats where it has a text on its left."""
        if not isinstance(left, str):
            return left % right
        budget = self.budget
        bounds.formatted(budget, left, right if isinstance(right, tuple) else (right,), {})
        return budget.made(left % right)

    def call(self, context: Any, called: Any, /, *args: Any, **kwargs: Any) -> Any:
        """A function, a macro or a method that the template calls."""
        budget = self.budget
        budget.tick()
        kind = type(called)
        if kind is types.BuiltinMethodType and type(called.__self__) is str and called.__name__ in bounds.SHRINKING:
            kwargs.pop("_loop_vars", None)  # what Jinja hands to functions that want the context
            kwargs.pop("_block_vars", None)
            result = called(*args, **kwargs)
            return budget.made(result) if result.__class__ is str and len(result) > _SMALL else result
        if kind is types.BuiltinMethodType or kind is types.MethodType or kind is types.FunctionType:
            args = bounds.called(budget, called, args, kwargs)
        result = super().call(context, called, *args, **kwargs)
        return budget.built(result) if called is dict else budget.made(result)

    # ---- filters

    def _charged(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter as a template sees it: a step, bounded beforehand, and its result charged."""
        first = 0 if getattr(function, "jinja_pass_arg", None) is None else 1
        bound = bounds.FILTERS.get(name)
        dear = 0 if name in _SORTING else 3  # a step for each entry, or for some

        @functools.wraps(function)
        def charged(*args: Any, **kwargs: Any) -> Any:
            budget = self.budget
            value = args[first] if len(args) > first else None
            budget.spend(1 + (len(value) >> dear if isinstance(value, list | tuple | dict | range) else 0))
            if bound is not None:
                args = (*args[:first], *bound(budget, *args[first:], **kwargs))
            result = function(*args, **kwargs)
            if isinstance(result, Iterator):
                return budget.metered(result)
            return budget.made(result)

        return charged

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        budget = self.budget
        budget.tick()
        budget.written(value)
        if indent is None and separators is None:
            text: str = budget.made(_encoder(bool(ensure_ascii), bool(sort_keys)).encode(value))
            return text
        wide = indent if isinstance(indent, int) else len(indent or "")
        if max(wide, *map(len, separators or ("", ""))) > _INDENT:
            raise TooMuch(f"its tojson indents or separates by more than {_INDENT} characters")
        encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        return self.concat(encoder.iterencode(value))  # an indentation for each entry of each level


@functools.cache
def _encoder(ensure_ascii: bool, sort_keys: bool) -> json.JSONEncoder:
    return json.JSONEncoder(ensure_ascii=ensure_ascii, sort_keys=sort_keys)


class _GenerationTag(Extension):
    """`{% generation %} ... {% endgeneration %}` marks the assistant's text for training masks; it renders its body."""

    tags = {"generation"}  # noqa: RUF012  (the attribute's type is set by jinja2)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Namespace(Namespace):
    """Written out it would show what it holds, which may hold it again."""

    def __repr__(self) -> str:
        return "<namespace>"


class _Metered(CodeGenerator):
    """Writes Python that charges the budget, and that computes nothing while it is compiled.

    What an expression makes is charged where it is kept: assigned, passed on, or put into a list. What is only written
    out or compared is gone with its statement, and no larger than its few operands together.
    """

    _kept = True  # what is being visited stays

    @contextmanager
    def _keeping(self, kept: bool) -> Iterator[None]:
        before, self._kept = self._kept, kept
        yield
        self._kept = before

    @contextmanager
    def _charging(self, charge: bool, method: str = "made") -> Iterator[None]:
        """Around an expression whose value the budget is told of."""
        self.write(f"budget.{method}(" if charge else "")
        yield
        self.write(")" if charge else "")

    def write_commons(self) -> None:
        super().write_commons()
        self.writeline("budget = environment.budget")

    # ---- statements

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        steps = 1 + sum(1 for one in node.body for _ in one.find_all(nodes.Node)) // _NODES
        node.body.insert(0, nodes.ExprStmt(_asked("tick", nodes.Const(steps))))
        if node.test is not None:  # what the test leaves out never reaches the body
            node.iter = _asked("metered", node.iter)
        super().visit_For(node, frame)

    def visit_ExprStmt(self, node: nodes.ExprStmt, frame: Frame) -> None:
        [steps] = node.find_all(nodes.Const)  # what `visit_For` put there; there is no other statement of this kind
        self.writeline(f"budget.steps -= {steps.value}")
        self.writeline("if budget.steps < 0: budget.exhausted()")

    def visit_Output(self, node: nodes.Output, frame: Frame) -> None:
        with self._keeping(False):
            super().visit_Output(node, frame)

    def _output_child_to_const(self, node: nodes.Expr, frame: Frame, finalize: Any) -> str:
        if not isinstance(node, nodes.TemplateData | nodes.Const):
            raise nodes.Impossible
        return super()._output_child_to_const(node, frame, finalize)

    def _output_child_pre(self, node: nodes.Expr, frame: Frame, finalize: Any) -> None:
        self.write("(out if (out := ")

    def _output_child_post(self, node: nodes.Expr, frame: Frame, finalize: Any) -> None:
        self.write(").__class__ is str else str(budget.written(out)))")

    # ---- expressions

    def visit_Call(self, node: nodes.Call, frame: Frame, forward_caller: bool = False) -> None:
        if not isinstance(node.node, nodes.EnvironmentAttribute):
            with self._keeping(True):
                super().visit_Call(node, frame, forward_caller=forward_caller)
        elif node.node.name == "text":
            self.write("(out if (out := ")
            self.visit(node.args[0], frame)
            self.write(").__class__ is str else budget.written(out))")
        else:
            with self._charging(True, node.node.name):
                self.visit(node.args[0], frame)

    def visit_Filter(self, node: nodes.Filter, frame: Frame) -> None:
        if node.name in _WRITING and node.node is not None:
            node.node = _asked("text", node.node)
        with self._charging(self._kept and node.name in _LIGHT), self._keeping(False):
            super().visit_Filter(node, frame)

    def visit_Test(self, node: nodes.Test, frame: Frame) -> None:
        with self._keeping(False):
            super().visit_Test(node, frame)

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:
        with self._keeping(False):
            super().visit_Compare(node, frame)

    def visit_Add(self, node: nodes.BinExpr, frame: Frame) -> None:
        operands = _operands(node)
        if len(operands) > _OPERANDS or sum(1 for one in operands for _ in one.find_all(nodes.Expr)) > _OPERANDS:
            with self._keeping(False):
                self._operator("plus", operands, frame)
            return
        with self._charging(self._kept), self._keeping(False):
            for index, operand in enumerate(operands):
                self.write(" + " if index else "(")
                self.visit(operand, frame)
            self.write(")")

    def _operator(self, name: str, operands: Iterable[nodes.Node], frame: Frame) -> None:
        self.write(f"environment.{name}(")
        for operand in operands:
            self.visit(operand, frame)
            self.write(", ")
        self.write(")")

    def visit_Mul(self, node: nodes.BinExpr, frame: Frame) -> None:
        self._operator("times", (node.left, node.right), frame)

    def visit_Pow(self, node: nodes.BinExpr, frame: Frame) -> None:
        self._operator("power", (node.left, node.right), frame)

    def visit_Mod(self, node: nodes.BinExpr, frame: Frame) -> None:
        self._operator("modulo", (node.left, node.right), frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.joined((")
        for operand in node.nodes:
            self.visit(operand, frame)
            self.write(", ")
        self.write("))")

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        with self._charging(self._kept and isinstance(node.arg, nodes.Slice)):
            super().visit_Getitem(node, frame)

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        with self._charging(not _constant(node.items), "built"), self._keeping(True):
            super().visit_List(node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        with self._charging(node.ctx == "load" and not _constant(node.items), "built"), self._keeping(True):
            super().visit_Tuple(node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        with self._charging(not _constant(pair.value for pair in node.items), "built"), self._keeping(True):
            super().visit_Dict(node, frame)


class _Names(TrackingCodeGenerator):
    """Jinja's own finder of names, which would compute what is constant: a text of a thousand million characters."""

    def __init__(self, environment: Sandbox) -> None:
        super().__init__(environment)
        self.optimizer = None

    def _output_child_to_const(self, node: nodes.Expr, frame: Frame, finalize: Any) -> str:
        raise nodes.Impossible


def _asked(method: str, value: nodes.Node) -> nodes.Call:
    """An expression that `_Metered` writes as the budget's method of the value."""
    return nodes.Call(nodes.EnvironmentAttribute(method), [value], [], None, None)


def _constant(parts: Iterable[nodes.Node]) -> bool:
    return all(isinstance(part, nodes.Const) for part in parts)


def _operands(node: nodes.Expr) -> list[nodes.Expr]:
    """Of a sum, from left to right; of another expression itself."""
    operands = []
    while isinstance(node, nodes.Add):
        operands.append(node.right)
        node = node.left
    return [node, *reversed(operands)]


def _check_tree(tree: nodes.Template) -> None:
    """Raises TooMuch for a template that nests more than compilers take, or has numbers that nobody writes."""
    rest: list[tuple[nodes.Node, int]] = [(tree, 0)]
    while rest:
        node, depth = rest.pop()
        if depth > NESTING:
            raise TooMuch(f"it nests more than {NESTING} deep")
        if isinstance(node, nodes.Const) and isinstance(node.value, int) and node.value.bit_length() > BITS:
            raise TooMuch(f"it has a number of more than {BITS:,} bits")
        inside = _operands(node) if isinstance(node, nodes.Add) else node.iter_child_nodes()
        rest += [(child, depth + 1) for child in inside]


def _raise_exception(message: str) -> None:
    raise Refused(message)


def _strftime_now(format: str) -> str:
    if len(format) > _FORMAT:
        raise TooMuch(f"its strftime_now has a format of more than {_FORMAT} characters")
    return datetime.now().strftime(format)
