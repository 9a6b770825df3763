"""Where the tool calls of an answer stand, and what follows from them: characters of a text, no tokens.

Calls are read by `dfastllm.text.tools`; here it is only found out from where to where.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dfastllm.text.tools import FORMS, CallBegin, CallText, ToolCall, ToolCallParser

__all__ = ["FoundCall", "Span", "any_call", "find_calls", "outside", "required_present"]

Span = tuple[int, int]  # characters [start, stop)

_OPENINGS = tuple(opening for form in FORMS for opening in form.openings)
_MARKED = tuple(form for form in FORMS if not form.bare)


@dataclass(frozen=True, slots=True)
class FoundCall:
    """A complete call in a text.

    whole      from its opening (or the end of the call before it) to where it was known to have ended.
    name       the tool's name, without its quotes; None where it is not spelled as it is.
    arguments  the JSON object; None for a call that has none written out.
    """

    call: ToolCall
    whole: Span
    name: Span | None
    arguments: Span | None


def any_call() -> ToolCallParser:
    """A parser of the calls of any tool, where the tools are not known: only those with markup of their own, since JSON
    alone may be the answer itself."""
    return ToolCallParser(_MARKED)


def find_calls(text: str, parser: ToolCallParser) -> list[FoundCall]:
    """The complete calls that `parser`, a fresh one, finds in `text`, in order, and where they stand.

    The text is pushed a character at a time, which shows when a call begins and ends; a text that can hold none is not
    read. What stopped being JSON is no complete call.
    """
    if not any(opening in text for opening in _OPENINGS) and text.lstrip()[:1] not in ("{", "["):
        return []
    found: list[FoundCall] = []
    begun, last, ended = 0, 0, 0
    for at in range(1, len(text) + 2):
        for piece in parser.push(text[at - 1]) if at <= len(text) else parser.flush():
            now = min(at, len(text))
            if isinstance(piece, CallBegin):
                begun = last = now
            elif isinstance(piece, CallText):
                last = now
            elif isinstance(piece, ToolCall):
                if piece.whole:
                    found.append(_located(text, piece, begun, last, ended, now))
                ended = now
    return found


def _located(text: str, call: ToolCall, begun: int, last: int, before: int, now: int) -> FoundCall:
    """begun, last, now: how much of the text was known when the call began, its last argument came, it ended. before:
    where the call before it had ended."""
    starts = [(at, opening) for opening in _OPENINGS if (at := text.rfind(opening, before, begun)) >= 0]
    opened, opening = max(starts, default=(before, ""))
    inner = opened + len(opening)
    arguments: Span | None = None
    at = _arguments(text, call.arguments, inner, now)
    if at >= 0:
        arguments = (at, at + len(call.arguments))
    elif last > begun and (brace := text.rfind("{", inner, begun)) >= 0:
        arguments = (brace, last)  # written as a JSON string, or with raw line breaks: what was read is not what stands
    return FoundCall(call, (opened, now), _name(text, call.name, inner, now, arguments), arguments)


def _arguments(text: str, arguments: str, start: int, stop: int) -> int:
    """Where they begin: as the value of their key, since a name may be spelled alike, or the first such text where
    there are no keys; -1 where they do not stand as they were read."""
    keyed = re.compile(rf'"(?:arguments|parameters)"\s*:\s*({re.escape(arguments)})')
    match = keyed.search(text, start, stop)
    return text.find(arguments, start, stop) if match is None else match.start(1)


def _name(text: str, name: str, start: int, stop: int, arguments: Span | None) -> Span | None:
    """Where the call's name stands: the value of a key `name` outside of the arguments, or before them."""
    spelled = json.dumps(name, ensure_ascii=False)[1:-1]
    for match in re.finditer(rf'"name"\s*:\s*"({re.escape(spelled)})"', text[start:stop]):
        found = (start + match.start(1), start + match.end(1))
        if arguments is None or not arguments[0] <= found[0] < arguments[1]:
            return found
    at = text.find(name, start, arguments[0] if arguments else stop)
    return (at, at + len(name)) if at >= 0 else None


def outside(text: str, calls: Sequence[FoundCall]) -> list[Span]:
    """What of the text is no call and no white space at its ends."""
    edges = [0, *(edge for found in calls for edge in found.whole), len(text)]
    spans = []
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        piece = text[start:stop]
        if piece.strip():
            spans.append((start + len(piece) - len(piece.lstrip()), start + len(piece.rstrip())))
    return spans


def required_present(tools: Sequence[Mapping[str, Any]], calls: Collection[ToolCall]) -> bool | None:
    """Whether every call has all arguments that its tool's schema requires; False for a tool that there is not. None
    where nothing can be said: no tools, or no call."""
    if not tools or not calls:
        return None
    functions = [tool.get("function", tool) for tool in tools]
    required = {one["name"]: _required(one.get("parameters")) for one in functions}
    return all(call.name in required and required[call.name] <= _keys(call.arguments) for call in calls)


def _required(schema: Any) -> set[str]:
    names = schema.get("required") if isinstance(schema, Mapping) else None
    return {name for name in names if isinstance(name, str)} if isinstance(names, list | tuple) else set()


def _keys(arguments: str) -> set[str]:
    try:
        return set(json.loads(arguments))
    except (ValueError, RecursionError):
        return set()
