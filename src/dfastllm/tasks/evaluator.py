"""A restricted evaluator for short Python functions: no builtins but a short list, no attributes but string and list
methods that end quickly, no loops but those over short lists, assignments to plain names, if and return. It walks the
syntax tree; nothing is passed to `exec` or `eval`."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["Refused", "run_function"]

LONGEST = 2000  # characters of source, and items or characters of any value
LARGEST = 10**12  # magnitude of any integer
MOST = 10_000  # statements that a call may run

BINARY: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
COMPARE: Mapping[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
FUNCTIONS: Mapping[str, Callable[..., Any]] = {"len": len, "max": max, "min": min, "sum": sum, "abs": abs}
METHODS: Mapping[type, set[str]] = {str: {"startswith", "endswith", "count", "upper", "lower"}, list: {"count"}}


class Refused(Exception):
    """The source is not a function this evaluator runs, or running it failed."""


def run_function(source: str, name: str, arguments: Sequence[object]) -> Any:
    """Call the function `name` that `source` defines (a single `def`, which must return). Raises Refused."""
    if len(source) > LONGEST:
        raise Refused("too long")
    try:
        tree = ast.parse(source.strip())
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Refused(str(error)) from error
    match tree.body:
        case [ast.FunctionDef(name=found, body=body) as node] if found == name:
            names = [arg.arg for arg in node.args.args]
        case _:
            raise Refused("not one function")
    if len(names) != len(arguments):
        raise Refused(f"takes {len(names)} arguments, not {len(arguments)}")
    try:
        returned = _Frame(dict(zip(names, arguments, strict=True))).run(body)
    except (TypeError, ValueError, ArithmeticError, RecursionError, KeyError, AttributeError) as error:
        raise Refused(str(error)) from error
    if returned is None:
        raise Refused("returns nothing")
    return returned[0]


class _Frame:
    """A call in progress: its variables, and how many statements it may still run."""

    def __init__(self, scope: dict[str, Any]) -> None:
        self.scope, self.left = scope, MOST

    def run(self, body: Sequence[ast.stmt]) -> tuple[Any] | None:
        """The value returned, in a tuple, or None where the statements end without a return."""
        for statement in body:
            self.left -= 1
            if self.left < 0:
                raise Refused("too many statements")
            returned = self._step(statement)
            if returned is not None:
                return returned
        return None

    def _step(self, statement: ast.stmt) -> tuple[Any] | None:
        match statement:
            case ast.Return(value=ast.expr() as value):
                return (_value(value, self.scope),)
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                self.scope[name] = _value(value, self.scope)
            case ast.AugAssign(target=ast.Name(id=name), op=op, value=value):
                sum_ = ast.BinOp(left=ast.Name(id=name, ctx=ast.Load()), op=op, right=value)
                self.scope[name] = _value(sum_, self.scope)
            case ast.If(test=test, body=then, orelse=otherwise):
                return self.run(then if _value(test, self.scope) else otherwise)
            case ast.For(target=ast.Name(id=name), iter=it, body=inner, orelse=[]):
                return self._loop(name, _value(it, self.scope), inner)
            case _:
                raise Refused(type(statement).__name__)
        return None

    def _loop(self, name: str, items: Any, inner: Sequence[ast.stmt]) -> tuple[Any] | None:
        if not isinstance(items, list):
            raise Refused("a loop over what is no list")
        for item in list(items):
            self.scope[name] = item
            returned = self.run(inner)
            if returned is not None:
                return returned
        return None


def _bounded(value: Any) -> Any:
    if isinstance(value, int) and abs(value) > LARGEST:
        raise Refused("number too large")
    if isinstance(value, str | list) and len(value) > LONGEST:
        raise Refused("value too long")
    return value


def _value(node: ast.expr, scope: dict[str, Any]) -> Any:
    match node:
        case ast.Constant(value=bool() | int() | str() as constant):
            return _bounded(constant)
        case ast.Name(id=name):
            return scope[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, scope)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not _value(operand, scope)
        case ast.BinOp(left=left, op=op, right=right):
            a, b = _value(left, scope), _value(right, scope)
            repeats = isinstance(op, ast.Mult) and not (isinstance(a, int) and isinstance(b, int))
            if type(op) not in BINARY or repeats or (isinstance(op, ast.Mod) and not isinstance(a, int)):
                raise Refused(type(op).__name__)
            return _bounded(BINARY[type(op)](a, b))
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in COMPARE:
            return COMPARE[type(op)](_value(left, scope), _value(right, scope))
        case ast.BoolOp(op=op, values=values):
            results = [_value(value, scope) for value in values]
            return all(results) if isinstance(op, ast.And) else any(results)
        case ast.IfExp(test=test, body=body, orelse=orelse):
            return _value(body if _value(test, scope) else orelse, scope)
        case ast.List(elts=items):
            return _bounded([_value(item, scope) for item in items])
        case ast.Call(func=func, args=args, keywords=[]):
            return _call(func, [_value(arg, scope) for arg in args], scope)
        case ast.ListComp(elt=elt, generators=[ast.comprehension(target=ast.Name(id=name), iter=it, ifs=ifs)]):
            items = _value(it, scope)
            inner = [{**scope, name: item} for item in items]
            return [_value(elt, s) for s in inner if all(_value(test, s) for test in ifs)]
        case _:
            raise Refused(type(node).__name__)


def _call(func: ast.expr, arguments: list[Any], scope: dict[str, Any]) -> Any:
    match func:
        case ast.Name(id=name) if name in FUNCTIONS:
            return _bounded(FUNCTIONS[name](*arguments))
        case ast.Attribute(value=owner, attr=method):
            value = _value(owner, scope)
            if method in METHODS.get(type(value), set()):
                return _bounded(getattr(value, method)(*arguments))
    raise Refused("call")
