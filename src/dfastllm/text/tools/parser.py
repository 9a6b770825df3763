"""Splits a model's text into content and tool calls, while it is being written and the same however it is cut.

Does not run tools and does not know their schemas. What is no call stays content, so nothing the model wrote is lost.
White space between a call and the beginning or the end of the content belongs to the call's markup; between two pieces
of content it stays as it was written. Each character is read once, however often a call seems to begin.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

from dfastllm.text.detokenizer import overlap
from dfastllm.text.tools.cursor import Cursor, Reader, peek, space
from dfastllm.text.tools.events import CallBegin, CallText, ParsedMessage, Piece, ToolCall
from dfastllm.text.tools.forms import FORMS, CallForm, Found, Rule, bare_calls

__all__ = ["ToolCallParser", "parse_tool_calls"]

_FARTHEST = 64  # white space between a list's bracket and its first object


class ToolCallParser:
    """`push` and `flush` return what became certain, in order. Content is held back only while it may still be the
    start of a call, or white space before one.

    forms   those that are read.
    names   the request's tools; None: a call may have any name.
    strict  only calls of `names` are calls. Otherwise a call with another name is one too where its markup leaves no
            doubt: the client answers it with an error, from which a model learns, and markup is not shown to people.
    """

    def __init__(
        self, forms: Sequence[CallForm] = FORMS, names: Collection[str] | None = None, *, strict: bool = False
    ) -> None:
        self._openings = {opening: form for form in forms for opening in form.openings}
        self._rule = Rule(names if strict else None)
        self._bare = Rule(names) if any(form.bare for form in forms) else None
        self._cursor = Cursor()
        self._found = self._read()
        self._content = False  # some has been handed on
        self._space: list[str] = []  # white space that is content only if content follows
        self._after_call = False
        self._name = ""  # of the call that began last
        self._arguments: list[str] = []

    def push(self, text: str) -> list[Piece]:
        self._cursor.push(text)
        return list(self._pieces(last=False))

    def flush(self) -> list[Piece]:
        """The rest, once no more text comes."""
        self._cursor.last = True
        return list(self._pieces(last=True))

    def _pieces(self, last: bool) -> Iterator[Piece]:
        """What the reader finds before it pauses: content without the white space around calls, texts joined."""
        content, arguments = "", ""
        for found in self._until_pause():
            if arguments and not isinstance(found, CallText):
                yield CallText(arguments)
                arguments = ""
            if isinstance(found, str):
                content += self._solid(found)
                continue
            if content:
                yield content
                content = ""
            self._after_call = True
            if isinstance(found, CallText):
                arguments += found.text
                self._arguments.append(found.text)
            elif isinstance(found, CallBegin):
                self._name, self._arguments = found.name, []
                yield found
            else:
                yield ToolCall(self._name, "".join(self._arguments), found.whole)
        if arguments:
            yield CallText(arguments)
        if last and not self._after_call:
            content += "".join(self._space)
        if content:
            yield content

    def _until_pause(self) -> Iterator[Found]:
        for found in self._found:
            if found is None:
                return
            yield found

    def _solid(self, text: str) -> str:
        """The part of this content that may be handed on now."""
        if self._after_call and not self._content:
            text, self._space = text.lstrip(), []
        solid = text.rstrip()
        if not solid:
            self._space.append(text)
            return ""
        before, self._space = "".join(self._space), [text[len(solid) :]]
        self._content, self._after_call = True, False
        return before + solid

    def _may_open(self, tail: str) -> int:
        """Characters at the end of the text that may be the beginning of an opening."""
        return max(overlap(tail, opening) if opening[0] in tail else 0 for opening in self._openings)

    def _read(self) -> Reader[Found, None]:
        cursor = self._cursor
        if self._bare is not None:
            cursor.hold()
            if (yield from _begins_with_json(cursor)):
                yield from bare_calls(cursor, self._bare)
            else:
                yield cursor.release()
        openings = self._openings
        longest = max(map(len, openings))
        while True:
            text = cursor.text
            at, opening = min(
                ((at, opening) for opening in openings if (at := text.find(opening, cursor.at)) >= 0),
                default=(-1, ""),
            )
            held = 0 if at >= 0 or cursor.last else self._may_open(text[max(cursor.at, len(text) - longest) :])
            stop = at if at >= 0 else len(text) - held
            if stop > cursor.at:
                content, cursor.at = text[cursor.at : stop], stop
                yield content
            if at >= 0:
                cursor.hold()
                cursor.at += len(opening)
                yield from openings[opening].read(cursor, self._rule)
            elif cursor.last:
                return
            else:
                yield None


def parse_tool_calls(
    text: str, forms: Sequence[CallForm] = FORMS, names: Collection[str] | None = None, *, strict: bool = False
) -> ParsedMessage:
    """Content and calls of a whole answer; see `ToolCallParser`."""
    parser = ToolCallParser(forms, names, strict=strict)
    return _joined(parser.push(text) + parser.flush())


def _joined(pieces: Iterable[Piece]) -> ParsedMessage:
    pieces = list(pieces)
    return ParsedMessage(
        "".join(piece for piece in pieces if isinstance(piece, str)),
        tuple(piece for piece in pieces if isinstance(piece, ToolCall)),
    )


def _begins_with_json(cursor: Cursor) -> Reader[Found, bool]:
    """Whether an object or a list of objects comes next, white space aside, which is passed over."""
    yield from space(cursor)
    first = yield from peek(cursor)
    if first != "[":
        return first == "{"
    while True:  # an opening may begin with a bracket too
        rest = cursor.text[cursor.at + 1 :]
        if rest.strip() or len(rest) > _FARTHEST or cursor.last:
            return rest.lstrip()[:1] == "{"
        yield None
