"""JSON as a model writes it, read while it is being written, and handed on as text that every JSON parser takes.

The model's own words are kept: digits of numbers, order and repetition of keys, white space. Three things that models
write and JSON does not know are mended: control characters inside a string (raw line breaks) are escaped, and NaN,
Infinity and -Infinity are null, as ECMAScript's JSON.stringify writes them. What else is no JSON ends the value as
broken; the cursor then stands where it broke.
"""

from __future__ import annotations

import json
import re

from dfastllm.text.tools.cursor import Cursor, Reader, peek, run, word

__all__ = ["json_text", "quoted_json_text", "skip_value", "string_value"]

_CLOSE = {"{": "}", "[": "]"}
_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')  # of a string
_SPACE = re.compile(r"[ \t\r\n]+")
_WORD = re.compile(r'[^\s,\[\]{}":<]+')  # a number, or a name such as true
_LONGEST_WORD = 1024  # characters; parsers refuse numbers of some thousand digits
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_NAMES = {"true": "true", "false": "false", "null": "null", "NaN": "null", "Infinity": "null", "-Infinity": "null"}
_ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})')
_HALF_ESCAPE = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?")


def json_text(cursor: Cursor) -> Reader[str, bool]:
    """One value as pieces of JSON text; whether it was whole. Depth costs memory, never the interpreter's stack."""
    open_: list[str] = []
    while True:
        yield from _space(cursor)
        character = yield from peek(cursor)
        if character in ("{", "["):
            cursor.at += 1
            yield character
            open_.append(character)
            yield from _space(cursor)
            if (yield from peek(cursor)) != _CLOSE[character]:
                if character == "{" and not (yield from _key(cursor)):
                    return False
                continue
        elif character == '"':
            if not (yield from _string(cursor)):
                return False
        elif not (yield from _word(cursor)):
            return False
        while open_:  # what may follow a value
            yield from _space(cursor)
            character = yield from peek(cursor)
            if character == _CLOSE[open_[-1]]:
                open_.pop()
            elif character != ",":
                return False
            cursor.at += 1
            yield character
            if character == ",":
                if open_[-1] == "{" and not (yield from _key(cursor)):
                    return False
                break
        else:
            return True


def quoted_json_text(cursor: Cursor) -> Reader[str, bool]:
    """A string that holds a value as JSON text, the form in which OpenAI's API has arguments: that value. A string of
    nothing but white space is whole."""
    inner = Cursor()
    value = json_text(inner)
    string = _characters(cursor)
    closed: bool | None = None  # whether the string was closed, None while it goes on
    whole: bool | None = None
    blank = True
    while whole is None:
        try:
            characters = next(string)
        except StopIteration as end:
            closed, inner.last = bool(end.value), True
        else:
            if characters is None:
                yield None
                continue
            inner.push(characters)
            blank = blank and not characters.strip()
        whole = yield from _until_pause(value)
    left = inner.text[inner.at :]
    if left:
        yield left
    if whole and closed is None:
        closed = yield from _rest_is_space(string)
    return (whole or blank) and bool(closed) and not left.strip()


def skip_value(cursor: Cursor) -> Reader[str, bool]:
    """Pass over a value; whether it was whole. Yields nothing but pauses."""
    _, whole = yield from _joined(json_text(cursor))
    return whole


def string_value(cursor: Cursor) -> Reader[str, str | None]:
    """The string at the cursor, None where there is no whole one. Yields nothing but pauses."""
    text, whole = yield from _joined(_characters(cursor))
    return text if whole else None


def _joined(reader: Reader[str, bool]) -> Reader[str, tuple[str, bool]]:
    """All that a reader finds, and its verdict. Yields nothing but pauses."""
    parts: list[str] = []
    while True:
        try:
            part = next(reader)
        except StopIteration as end:
            return "".join(parts), bool(end.value)
        if part is None:
            yield None
        else:
            parts.append(part)


def _until_pause(value: Reader[str, bool]) -> Reader[str, bool | None]:
    """What a reader of another cursor finds until it pauses (None) or ends (its verdict)."""
    while True:
        try:
            piece = next(value)
        except StopIteration as end:
            return bool(end.value)
        if piece is None:
            return None
        yield piece


def _rest_is_space(string: Reader[str, bool]) -> Reader[str, bool]:
    """Hand on the rest of a string; whether it was white space and then closed."""
    blank = True
    while True:
        try:
            characters = next(string)
        except StopIteration as end:
            return blank and bool(end.value)
        if characters is not None:
            blank = blank and not characters.strip()
        yield characters


def _space(cursor: Cursor) -> Reader[str, None]:
    while (yield from peek(cursor)) in (" ", "\t", "\r", "\n"):
        end = run(cursor, _SPACE)
        piece, cursor.at = cursor.text[cursor.at : end], end
        yield piece


def _key(cursor: Cursor) -> Reader[str, bool]:
    """A key and its colon."""
    yield from _space(cursor)
    if (yield from peek(cursor)) != '"' or not (yield from _string(cursor)):
        return False
    yield from _space(cursor)
    if (yield from peek(cursor)) != ":":
        return False
    cursor.at += 1
    yield ":"
    return True


def _string(cursor: Cursor) -> Reader[str, bool]:
    """A string as JSON text; whether it was closed."""
    cursor.at += 1
    yield '"'
    while True:
        character = yield from peek(cursor)
        if character == '"':
            cursor.at += 1
            yield '"'
            return True
        if character == "":
            return False
        if character == "\\":
            escape = yield from _escape(cursor)
            if not escape:
                return False
            yield escape
        elif character < " ":
            cursor.at += 1
            yield json.dumps(character)[1:-1]
        else:
            end = run(cursor, _PLAIN)
            piece, cursor.at = cursor.text[cursor.at : end], end
            yield piece


def _characters(cursor: Cursor) -> Reader[str, bool]:
    """What a string stands for, without quotes and escapes; whether it was closed. A surrogate that is not half of a
    pair becomes U+FFFD: it could not be sent."""
    cursor.at += 1
    high = ""
    while True:
        character = yield from peek(cursor)
        escape = ""
        if character == "\\":
            escape = yield from _escape(cursor)
            if not escape:
                return False
            piece = json.loads(f'"{escape}"')
        elif character in ('"', ""):
            piece = ""
        elif character < " ":
            piece, cursor.at = character, cursor.at + 1
        else:
            end = run(cursor, _PLAIN)
            piece, cursor.at = cursor.text[cursor.at : end], end
        if high:
            joined = json.loads(f'"{high}{escape}"') if escape else high
            piece = joined if len(joined) == 1 and escape else "\ufffd" + piece
            high = ""
        if "\ud800" <= piece[-1:] <= "\udbff":
            high, piece = escape, piece[:-1]
        elif "\udc00" <= piece[-1:] <= "\udfff":
            piece = piece[:-1] + "\ufffd"
        if piece:
            yield piece
        if character == '"':
            cursor.at += 1
            return True
        if character == "":
            return False


def _escape(cursor: Cursor) -> Reader[str, str]:
    """The escape at the cursor in its own words, "" where there is none."""
    while True:
        found = _ESCAPE.match(cursor.text, cursor.at)
        if found is not None:
            cursor.at = found.end()
            return found[0]
        half = _HALF_ESCAPE.match(cursor.text, cursor.at)
        if cursor.last or half is None or half.end() < len(cursor.text):
            return ""
        yield None


def _word(cursor: Cursor) -> Reader[str, bool]:
    """A number or a name. Nothing of it is handed on before it has ended."""
    found = yield from word(cursor, _WORD, _LONGEST_WORD)
    written = found if _NUMBER.fullmatch(found) else _NAMES.get(found)
    if written is None:
        cursor.at -= len(found)
        return False
    yield written
    return True
