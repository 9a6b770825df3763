"""How large a result may become, said before it is made: operators, methods and filters of templates.

Only what can make more than it is given is here: repeating, padding, joining, replacing, formatting, cutting into
pieces. Each function raises TooMuch by the `Budget` of the rendering. Methods that no template needs are denied.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jinja2.exceptions import SecurityError

from dfastllm.text.templates.budget import BITS, Budget, TooMuch

__all__ = ["FILTERS", "SHRINKING", "called", "formatted", "power", "times"]

_NUMBER = re.compile(r"\d+")
_TEXT_METHODS = frozenset(
    "capitalize casefold center count endswith expandtabs find format format_map index isalnum isalpha isascii "
    "isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle isupper join ljust lower lstrip "
    "partition removeprefix removesuffix replace rfind rindex rjust rpartition rsplit rstrip split splitlines "
    "startswith strip swapcase title upper zfill".split()
)
_METHODS: Mapping[type, frozenset[str]] = {
    str: _TEXT_METHODS,
    dict: frozenset(("copy", "get", "items", "keys", "values")),
    list: frozenset(("copy", "count", "index")),
    tuple: frozenset(("count", "index")),
    int: frozenset(("bit_length", "is_integer")),
    float: frozenset(("is_integer",)),
}


def times(budget: Budget, left: Any, right: Any) -> None:
    """left * right: a text or a list so many times, or a product."""
    for value, count in ((left, right), (right, left)):
        if isinstance(count, int) and isinstance(value, str):
            budget.room(len(value) * count)
        elif isinstance(count, int) and isinstance(value, list | tuple):
            budget.entries(len(value) * count)
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > BITS:
        raise TooMuch(f"it multiplies to a number of more than {BITS:,} bits")


def power(left: Any, right: Any) -> None:
    """left ** right."""
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() * max(right, 0) > BITS:
        raise TooMuch(f"it raises to a number of more than {BITS:,} bits")


def formatted(budget: Budget, pattern: str, values: Iterable[Any], named: Mapping[str, Any]) -> None:
    """A pattern filled in, by % or by format: each place may take the largest value, as wide as the largest number in
    sight."""
    listed = [*values, *named.values()]
    listed += [one for value in listed if isinstance(value, Mapping) for one in value.values()]
    numbers = [int(digits[:12]) for digits in _NUMBER.findall(pattern)]
    if "*" in pattern or re.search(r"\{[^}]*\{", pattern):  # a width that is a value
        numbers += [value for value in listed if isinstance(value, int)]
    places = pattern.count("%") + pattern.count("{")
    widest = max((budget.weight(value) for value in listed), default=0)
    budget.room(len(pattern) + places * (widest + max(numbers, default=0)))


def called(budget: Budget, function: Any, args: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Any, ...]:
    """The arguments to call a method with. Raises SecurityError for a method that templates have no use for."""
    method = getattr(function, "__wrapped__", function)  # the sandbox wraps str.format
    owner = getattr(method, "__self__", None)
    kind = next((kind for kind in _METHODS if isinstance(owner, kind)), None)
    if kind is None:
        return args
    name = method.__name__
    if name not in _METHODS[kind]:
        raise SecurityError(f"the method {name} of {type(owner).__name__}")
    if kind is str and name in _GROWING:
        return _GROWING[name](budget, owner, *args, **named)[1:]
    return args


# Each takes the value and the arguments as a template gives them, and returns both as they are to be used. What does
# not fit the operation's signature is left to the operation, whose error names it.

Bounded = Callable[..., tuple[Any, ...]]


def _padded(budget: Budget, value: Any, *args: Any, **named: Any) -> tuple[Any, ...]:
    width = args[0] if args else named.get("width")
    if isinstance(width, int):
        budget.room(width)
    return (value, *args)


def _expanded(budget: Budget, value: Any, *args: Any, **named: Any) -> tuple[Any, ...]:
    width = args[0] if args else named.get("tabsize", 8)
    if isinstance(width, int):
        budget.room(len(value) + value.count("\t") * max(width, 0))
    return (value, *args)


def _replaced(budget: Budget, value: Any, *args: Any, **named: Any) -> tuple[Any, ...]:
    old = args[0] if args else named.get("old", named.get("s", ""))
    new = args[1] if len(args) > 1 else named.get("new", "")
    if isinstance(value, str) and isinstance(old, str) and isinstance(new, str):
        budget.room(len(value) + value.count(old) * max(len(new) - len(old), 0))
    return (value, *args)


def _listed(budget: Budget, value: Any) -> Any:
    """A generator's items, which can be counted only once they are there; anything else as it is."""
    if isinstance(value, str | list | tuple | Mapping) or not isinstance(value, Iterable):
        return value
    return list(budget.metered(value))


def _joined(budget: Budget, separator: Any, parts: Any = (), *args: Any, **named: Any) -> tuple[Any, ...]:
    parts = _listed(budget, parts)
    if isinstance(parts, list | tuple | str) and isinstance(separator, str):
        budget.room(len(separator) * len(parts) + sum(map(budget.weight, parts)))
    return (separator, parts, *args)


def _joins(budget: Budget, value: Any, *args: Any, **named: Any) -> tuple[Any, ...]:
    separator = args[0] if args else named.get("d", "")
    value = _listed(budget, value)
    if isinstance(value, str | list | tuple | Mapping):
        budget.room(budget.weight(separator) * len(value) + sum(map(budget.weight, value)))
    return (value, *args)


def _split(budget: Budget, value: Any, *args: Any, **named: Any) -> tuple[Any, ...]:
    by = args[0] if args else named.get("sep")
    budget.entries(value.count(by) if isinstance(by, str) and by else len(value) / 2)
    return (value, *args)


def _formats(budget: Budget, value: Any, *args: Any, **named: Any) -> tuple[Any, ...]:
    formatted(budget, str(value), args, named)
    return (value, *args)


def _indented(budget: Budget, value: Any, *args: Any, **named: Any) -> tuple[Any, ...]:
    width = args[0] if args else named.get("width", 4)
    wide = len(width) if isinstance(width, str) else width
    if isinstance(value, str) and isinstance(wide, int):
        budget.room(len(value) + (len(value.splitlines()) + 1) * max(wide, 0))
    return (value, *args)


def _counted(budget: Budget, value: Any, *args: Any, **named: Any) -> tuple[Any, ...]:
    """Filters whose numbers say how many entries, or digits, come out."""
    for number in (*args, *named.values()):
        if isinstance(number, int):
            budget.entries(number)
            if number > BITS:
                raise TooMuch(f"it asks for {number:,} entries or digits, more than {BITS:,}")
    return _taken(budget, value, *args)


def _taken(budget: Budget, value: Any, *args: Any, **named: Any) -> tuple[Any, ...]:
    """What may make an entry of each character."""
    if isinstance(value, str):
        budget.entries(len(value))
    return (value, *args)


def _written(budget: Budget, value: Any, *args: Any, **named: Any) -> tuple[Any, ...]:
    """Filters that write out what is no text."""
    return (budget.written(value), *args)


_GROWING: Mapping[str, Bounded] = {
    "center": _padded,
    "expandtabs": _expanded,
    "format": _formats,
    "format_map": _formats,
    "join": _joined,
    "ljust": _padded,
    "replace": _replaced,
    "rjust": _padded,
    "rsplit": _split,
    "split": _split,
    "splitlines": _taken,
    "zfill": _padded,
}
SHRINKING = _TEXT_METHODS - _GROWING.keys()  # they make no more than their text
FILTERS: Mapping[str, Bounded] = {
    "batch": _counted,
    "center": _padded,
    "format": _formats,
    "indent": _indented,
    "join": _joins,
    "list": _taken,
    "replace": _replaced,
    "reverse": _taken,
    "round": _counted,
    "slice": _counted,
    "sort": _taken,
    "unique": _taken,
    **dict.fromkeys(("e", "escape", "forceescape", "truncate", "urlencode", "wordcount"), _written),
}
