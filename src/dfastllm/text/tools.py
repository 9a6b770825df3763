"""Tool calls in generated text, in the Hermes / Qwen form: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.

Splits text into content and calls; does not run tools and does not know their schemas. What is not a well-formed call
stays text, so nothing the model wrote is lost. Whitespace next to a call belongs to the call's markup, not to the
content. `ToolCallParser` works on a stream: however the text is cut into pieces, the result is the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dfastllm.text.detokenizer import overlap

__all__ = ["ParsedMessage", "ToolCall", "ToolCallParser", "parse_tool_calls"]

_OPEN = "<tool_call>"
_CLOSE = "</tool_call>"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """`arguments` is a JSON object as text, the form OpenAI clients expect."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ParsedMessage:
    """`content` is the text around the calls, "" when there is none."""

    content: str
    tool_calls: tuple[ToolCall, ...] = ()


class ToolCallParser:
    """Incremental form. `push` and `flush` return what became certain, in order: content pieces (never empty) and
    calls. Content is held back only while it may still be the start of a call, or whitespace before one."""

    def __init__(self) -> None:
        self._text = ""  # not yet understood
        self._at, self._quoted = len(_OPEN), False  # how far the call at its beginning was searched for its end
        self._space = ""  # whitespace that is content only if content follows
        self._after_call = False

    def push(self, text: str) -> list[str | ToolCall]:
        self._text += text
        return list(self._merge(self._scan(last=False), last=False))

    def flush(self) -> list[str | ToolCall]:
        """The rest: an unfinished call is text."""
        return list(self._merge(self._scan(last=True), last=True))

    def _scan(self, last: bool) -> Iterator[str | ToolCall]:
        while True:
            start = self._text.find(_OPEN)
            if start < 0:
                cut = len(self._text) - (0 if last else overlap(self._text, _OPEN))
                yield self._take(cut)
                return
            yield self._take(start)
            end = self._call_end()
            if end is None and not last:
                return
            call = None if end is None else _parse_call(self._text[len(_OPEN) : end])
            if call is None or end is None:
                yield self._take(len(_OPEN))  # not a call: its opening is text; look again behind it
            else:
                self._take(end + len(_CLOSE))
                yield call

    def _take(self, count: int) -> str:
        head, self._text = self._text[:count], self._text[count:]
        if count:
            self._at, self._quoted = len(_OPEN), False
        return head

    def _call_end(self) -> int | None:
        """Index of the closing tag of the call that the text begins with, None when it has not come. A closing tag
        inside a JSON string is part of the string: it has an odd number of unescaped quotes before it. Goes on where
        the last search stopped, so that a long call costs each character once."""
        text = self._text
        while self._at < len(text):
            rest = text[self._at : self._at + len(_CLOSE)]
            if self._quoted and rest[0] == "\\":
                self._at += 1
            elif rest[0] == '"':
                self._quoted = not self._quoted
            elif not self._quoted and rest == _CLOSE:
                return self._at
            elif not self._quoted and _CLOSE.startswith(rest):
                return None
            self._at += 1
        return None

    def _merge(self, pieces: Iterator[str | ToolCall], last: bool) -> Iterator[str | ToolCall]:
        """Drop whitespace next to calls, join text."""
        content = ""
        for piece in pieces:
            if isinstance(piece, ToolCall):
                if content:
                    yield content
                content, self._space, self._after_call = "", "", True
                yield piece
                continue
            text = piece.lstrip() if self._after_call else self._space + piece
            if not text:
                continue
            self._after_call = False
            solid = text.rstrip()
            self._space = text[len(solid) :]
            content += solid
        if last:
            content, self._space = content + self._space, ""
        if content:
            yield content


def parse_tool_calls(text: str) -> ParsedMessage:
    """Content and calls of a whole answer. Malformed or unfinished calls stay in the content."""
    parser = ToolCallParser()
    pieces = parser.push(text) + parser.flush()
    return ParsedMessage(
        "".join(piece for piece in pieces if isinstance(piece, str)),
        tuple(piece for piece in pieces if isinstance(piece, ToolCall)),
    )


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value")


def _parse_call(body: str) -> ToolCall | None:
    try:
        value = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        return None
    arguments = value.get("arguments", {})
    if not isinstance(arguments, dict):
        return None
    text = json.dumps(arguments, ensure_ascii=False)
    if any("\ud800" <= character <= "\udfff" for character in text):  # lone surrogates cannot be sent as UTF-8
        text = json.dumps(arguments)
    return ToolCall(value["name"], text)
