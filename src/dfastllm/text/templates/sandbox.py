"""The Jinja environment of chat templates: what Hugging Face's has, nothing that reaches out, and every step charged.

It has trim_blocks and lstrip_blocks, loop controls, a `tojson` that neither escapes HTML nor sorts keys,
`raise_exception(message)`, `strftime_now(format)`, and the `{% generation %}` tag, which only marks its body and is
rendered through here. The sandbox denies attribute tricks and any change to the values handed in. Compiling computes
nothing, and what a rendering computes is charged to its `Budget` beforehand wherever the result may be larger than what
it is made of: `bounds` says which operations those are.
"""

from __future__ import annotations

import functools
import json
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
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
_TICK = nodes.ExprStmt(nodes.Const("tick"))


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
            finalize=self.shown,
        )
        self._state = threading.local()
        self.code_generator_class = _Metered
        filters = {name: one for name, one in self.filters.items() if name not in _NO_FILTERS}
        filters["tojson"] = self._tojson
        self.filters = {name: self._charged(name, one) for name, one in filters.items()}
        del self.globals["lipsum"]
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now, "namespace": _Namespace}

    @property
    def budget(self) -> Budget:
        """Of the rendering that this thread is in."""
        budget: Budget = self._state.budget
        return budget

    # ---- compiling and rendering

    def compiled(self, source: str) -> jinja2.Template:
        """Raises TemplateSyntaxError and TooMuch, and what Python's compiler raises for what it cannot compile."""
        if len(source) > SOURCE:
            raise TooMuch(f"it has {len(source):,} characters, more than {SOURCE:,}")
        tree = self.parse(source)
        _check_tree(tree)
        return jinja2.Template.from_code(self, self.compile(tree), self.make_globals(None), None)

    def rendered(self, template: jinja2.Template, values: Mapping[str, Any]) -> str:
        """The template's text. Raises what the template raises, and TooMuch."""
        outer = getattr(self._state, "budget", None)
        self._state.budget = Budget(values)
        try:
            return template.render(values)
        finally:
            self._state.budget = outer

    # ---- what compiled templates call

    def tick(self) -> None:
        """A round of a loop."""
        self.budget.tick()

    def shown(self, value: Any) -> Any:
        """A value that is about to be written out."""
        if not isinstance(value, str):
            self.budget.weight(value)
        return value

    def concat(self, pieces: Iterable[str]) -> str:
        """The output of a template, a macro or a block, joined."""
        budget, kept, size = self.budget, [], 0
        for piece in pieces:
            size += len(piece)
            if size > budget.longest:
                budget.room(size)
            kept.append(piece)
        text: str = budget.made("".join(kept))
        return text

    def joined(self, values: tuple[Any, ...]) -> Any:
        """The operator ~."""
        budget = self.budget
        budget.room(sum(map(budget.weight, values)))
        return budget.made(str_join(values))

    def plus(self, value: Any, *others: Any) -> Any:
        """The operator +, from left to right."""
        made = self.budget.made
        for other in others:
            value = made(value + other)
        return value

    def times(self, left: Any, right: Any) -> Any:
        """The operator *."""
        bounds.times(self.budget, left, right)
        return self.budget.made(left * right)

    def power(self, left: Any, right: Any) -> Any:
        """The operator **."""
        bounds.power(left, right)
        return self.budget.made(left**right)

    def modulo(self, left: Any, right: Any) -> Any:
        """The operator %, which formats where it has a text on its left."""
        if isinstance(left, str):
            bounds.formatted(self.budget, left, right if isinstance(right, tuple) else (right,), {})
        return self.budget.made(left % right)

    def built(self, value: Any) -> Any:
        """A list, a tuple or a dict that the template spells out, or a slice."""
        return self.budget.made(value)

    def call(self, context: Any, called: Any, /, *args: Any, **kwargs: Any) -> Any:
        """A function, a macro or a method that the template calls."""
        budget = self.budget
        budget.tick()
        kind = type(called)
        if kind is types.BuiltinMethodType or kind is types.MethodType or kind is types.FunctionType:
            args = bounds.called(budget, called, args, kwargs)
        return budget.made(super().call(context, called, *args, **kwargs))

    # ---- filters

    def _charged(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter as a template sees it: a step, bounded beforehand, and its result charged."""
        first = 0 if getattr(function, "jinja_pass_arg", None) is None else 1
        bound = bounds.FILTERS.get(name)

        @functools.wraps(function)
        def charged(*args: Any, **kwargs: Any) -> Any:
            budget = self.budget
            budget.tick()
            if bound is not None:
                args = (*args[:first], *bound(budget, *args[first:], **kwargs))
                budget.look()
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
        budget.weight(value)
        wide = indent if isinstance(indent, int) else len(indent or "")
        if max(wide, *map(len, separators or ("", ""))) > _INDENT:
            raise TooMuch(f"its tojson indents or separates by more than {_INDENT} characters")
        encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        return encoder.encode(value) if indent is None else self.concat(encoder.iterencode(value))


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
    """Writes Python that calls the sandbox's operators, and that computes nothing while it is compiled."""

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        if not node.body or node.body[0] is not _TICK:
            node.body.insert(0, _TICK)
        super().visit_For(node, frame)

    def visit_ExprStmt(self, node: nodes.ExprStmt, frame: Frame) -> None:
        if node is _TICK:
            self.writeline("environment.tick()")
        else:
            super().visit_ExprStmt(node, frame)

    def _output_child_to_const(self, node: nodes.Expr, frame: Frame, finalize: Any) -> str:
        if not isinstance(node, nodes.TemplateData | nodes.Const):
            raise nodes.Impossible
        return super()._output_child_to_const(node, frame, finalize)

    def _operator(self, name: str, operands: Iterable[nodes.Node], frame: Frame) -> None:
        self.write(f"environment.{name}(")
        for operand in operands:
            self.visit(operand, frame)
            self.write(", ")
        self.write(")")

    def visit_Add(self, node: nodes.Add, frame: Frame) -> None:
        self._operator("plus", _operands(node), frame)

    def visit_Mul(self, node: nodes.Mul, frame: Frame) -> None:
        self._operator("times", (node.left, node.right), frame)

    def visit_Pow(self, node: nodes.Pow, frame: Frame) -> None:
        self._operator("power", (node.left, node.right), frame)

    def visit_Mod(self, node: nodes.Mod, frame: Frame) -> None:
        self._operator("modulo", (node.left, node.right), frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.joined((")
        for operand in node.nodes:
            self.visit(operand, frame)
            self.write(", ")
        self.write("))")

    def _built(self, node: Any, frame: Frame, visit: Callable[[Any, Frame], None], parts: Iterable[nodes.Node]) -> None:
        plain = all(isinstance(part, nodes.Const) for part in parts)
        if not plain:
            self.write("environment.built(")
        visit(node, frame)
        if not plain:
            self.write(")")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._built(node, frame, super().visit_List, node.items)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "load":
            self._built(node, frame, super().visit_Tuple, node.items)
        else:
            super().visit_Tuple(node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._built(node, frame, super().visit_Dict, [pair.value for pair in node.items])

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        self._built(node, frame, super().visit_Getitem, [node] if isinstance(node.arg, nodes.Slice) else [])


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
