"""The forms in which models write calls, one `CallForm` each. A new form is a reader function and its row in `FORMS`.

A reader begins behind the form's opening and yields a CallBegin, CallTexts and a Closed for each call, text for what
turned out to be none. A call begins as soon as its name is known and its arguments have begun as a JSON object does; it
stands from then on, as a stream has shown it. What breaks before that is content.

Read here as well are the near misses of models: `parameters` for `arguments` and the reverse, arguments as JSON text,
null or left out, a list of calls, several calls behind one opening, no closing tag or brace at the end, one too many,
raw line breaks in strings.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Literal

from dfastllm.text.detokenizer import overlap
from dfastllm.text.tools.cursor import Cursor, Reader, literal, peek, space, word
from dfastllm.text.tools.events import CallBegin, CallText
from dfastllm.text.tools.jsontext import json_text, quoted_json_text, skip_value, string_value

__all__ = ["FORMS", "UNREAD", "CallForm", "Closed", "Found", "Rule", "bare_calls"]


@dataclass(frozen=True, slots=True)
class Closed:
    """The call that began last has ended. whole: its arguments are a complete JSON object."""

    whole: bool


Found = str | CallBegin | CallText | Closed


@dataclass(frozen=True, slots=True)
class Rule:
    """What counts as a call.

    names    the only names that a call may have, None for any.
    strict   nothing around the call says that it is one: it must have arguments, and no key that calls do not have.
    closing  what ends a group of calls, "" for nothing.
    """

    names: Collection[str] | None = None
    strict: bool = False
    closing: str = ""


@dataclass(frozen=True, slots=True)
class CallForm:
    """One form.

    name      how it is known.
    example   how a call looks, for messages.
    openings  texts that begin a call anywhere in an answer.
    markup    further texts of the form. Where they or the openings are special tokens they must stay in the text.
    read      reads the calls behind an opening.
    bare      an answer that begins with the call's JSON is a call too, if it names one of the request's tools.
    taught    found in the text of templates that teach the form but write no call themselves.
    """

    name: str
    example: str
    openings: tuple[str, ...]
    markup: tuple[str, ...]
    read: Callable[[Cursor, Rule], Reader[Found, None]]
    bare: bool
    taught: re.Pattern[str]


_ARGUMENTS = ("arguments", "parameters")
_KEYS = frozenset({"name", "type", "id", *_ARGUMENTS})
_BETWEEN = re.compile(r"[\s,;]*")  # of two calls
_STRAY = re.compile(r"[\s,;}\]]*")  # between the last call and the closing tag
_LONGEST_NAME = 256  # characters, where no quotes show its end
_NAME = re.compile(r"[A-Za-z0-9_.:/-]*")
_ID = re.compile(r"[A-Za-z0-9]*")
_CALL_ID, _ARGS = "[CALL_ID]", "[ARGS]"

_Outcome = Literal["none", "broken", "whole"]


def bare_calls(cursor: Cursor, rule: Rule) -> Reader[Found, None]:
    """An answer that begins with JSON: held back until it is clear whether that is a call."""
    yield from _calls(cursor, replace(rule, strict=True, closing=""))


def _hermes(cursor: Cursor, rule: Rule) -> Reader[Found, None]:
    yield from _calls(cursor, replace(rule, closing="</tool_call>"))


def _llama(cursor: Cursor, rule: Rule) -> Reader[Found, None]:
    yield from _calls(cursor, rule)


def _mistral(cursor: Cursor, rule: Rule) -> Reader[Found, None]:
    """`[{"name": ...}]`, or `name[ARGS]{...}`, where an id may stand before [ARGS] and [ARGS] may be left out."""
    yield from space(cursor)
    if (yield from peek(cursor)) in ("[", "{"):
        yield from _calls(cursor, rule)
        return
    name = yield from word(cursor, _NAME, _LONGEST_NAME)
    yield from space(cursor)
    if (yield from literal(cursor, _CALL_ID)):
        yield from word(cursor, _ID, _LONGEST_NAME)
    yield from literal(cursor, _ARGS)
    yield from space(cursor)
    if not _may_call(name, rule) or (yield from peek(cursor)) != "{":
        yield cursor.release()
        return
    outcome, _ = yield from _arguments(cursor, name)
    if outcome == "none":
        yield cursor.release()
    elif outcome == "broken":
        yield from _broken(cursor, rule)
    else:
        yield Closed(True)


def _calls(cursor: Cursor, rule: Rule) -> Reader[Found, None]:
    """Objects one after the other, or one list of them, then the closing tag if the form has one. Where it has one, the
    last call ends with it."""
    yield from space(cursor)
    listed = (yield from peek(cursor)) == "["
    cursor.at += listed
    count = 0
    while True:
        yield from space(cursor, _BETWEEN)
        if (yield from peek(cursor)) != "{":
            break
        if count and rule.closing:
            yield Closed(True)
        outcome = yield from _call(cursor, rule)
        if outcome == "none":
            yield cursor.release()
            return
        if outcome == "broken":
            yield from _broken(cursor, rule)
            return
        count += 1
        if not rule.closing:
            yield Closed(True)
        cursor.hold()
    if not count:
        yield cursor.release()
        return
    if listed and (yield from peek(cursor)) == "]":
        cursor.at += 1
        cursor.hold()
    yield from _tail(cursor, rule)


def _tail(cursor: Cursor, rule: Rule) -> Reader[Found, None]:
    """What follows the last object of a group: the closing tag, the end of the text, or content."""
    if rule.closing:
        yield from space(cursor, _STRAY)
        tagged = yield from literal(cursor, rule.closing)
        yield Closed(True)
    else:
        yield from space(cursor, _BETWEEN)
        tagged = False
    if tagged or (yield from peek(cursor)) == "":
        cursor.drop()
    else:
        yield cursor.release()


def _broken(cursor: Cursor, rule: Rule) -> Reader[Found, None]:
    """A call whose arguments stopped being JSON: all up to its closing tag belongs to them."""
    while True:
        text, closing = cursor.text, rule.closing
        end = text.find(closing, cursor.at) if closing else -1
        held = 0 if cursor.last or not closing else overlap(text[cursor.at :], closing)
        stop = end if end >= 0 else len(text) - held
        if stop > cursor.at:
            yield CallText(text[cursor.at : stop])
        cursor.at = stop + len(closing) if end >= 0 else stop
        if end >= 0 or cursor.last:
            yield Closed(False)
            return
        yield None


def _may_call(name: str | None, rule: Rule) -> bool:
    return bool(name) and (rule.names is None or name in rule.names)


def _call(cursor: Cursor, rule: Rule) -> Reader[Found, _Outcome]:
    """One object with a name and arguments, in any order, among other keys."""
    cursor.at += 1
    name: str | None = None
    held: str | None = None  # arguments that came before the name
    begun = False
    while True:
        yield from space(cursor)
        if (yield from peek(cursor)) != '"':
            break
        key = yield from string_value(cursor)
        if key is None or (rule.strict and key not in _KEYS) or not (yield from _colon(cursor)):
            return "whole" if begun else "none"
        if key == "name" and name is None:
            name = (yield from string_value(cursor)) if (yield from peek(cursor)) == '"' else None
            if name is None or not _may_call(name, rule):
                return "none"
            if held is not None:
                yield from _begin(cursor, name, held)
                begun = True
        elif key in _ARGUMENTS and held is None and not begun:
            outcome, held = yield from _arguments(cursor, name)
            begun = name is not None
            if outcome != "whole":
                return outcome
        elif not (yield from skip_value(cursor)):
            return "whole" if begun else "none"
        yield from space(cursor)
        if (yield from peek(cursor)) != ",":
            break
        cursor.at += 1
    closed = yield from literal(cursor, "}")
    if not begun:
        if not closed or name is None or rule.strict:
            return "none"
        yield from _begin(cursor, name, "{}")
    return "whole"


def _colon(cursor: Cursor) -> Reader[Found, bool]:
    """A colon and the white space around it."""
    yield from space(cursor)
    found = yield from literal(cursor, ":")
    yield from space(cursor)
    return found


def _begin(cursor: Cursor, name: str, arguments: str) -> Reader[Found, None]:
    cursor.drop()
    yield CallBegin(name)
    yield CallText(arguments)


def _arguments(cursor: Cursor, name: str | None) -> Reader[Found, tuple[_Outcome, str]]:
    """The arguments of a call. With a name the call begins here, and nothing is returned of them; without one they are
    returned. "none": they do not begin as a JSON object."""
    first = yield from peek(cursor)
    if first not in ("{", '"', "n"):
        return "none", ""
    value = quoted_json_text(cursor) if first == '"' else json_text(cursor)
    held, begun = "", False
    while True:
        try:
            piece = next(value)
        except StopIteration as end:
            whole = bool(end.value)
            break
        if piece is None:
            yield None
        elif begun:
            yield CallText(piece)
        elif held or not piece.isspace():
            certain = held.startswith("{") and not piece.isspace()  # what comes behind a brace is its key or its end
            held += piece
            if certain and name is not None:
                yield from _begin(cursor, name, held)
                begun = True
    if begun:
        return ("whole" if whole else "broken"), ""
    if whole and held in ("null", ""):
        held = "{}"
    if not whole or not held.startswith("{"):
        return "none", ""
    if name is not None:
        yield from _begin(cursor, name, held)
        return "whole", ""
    return "whole", held


# Most telling first: a template that teaches none in so many words is asked for each in this order.
FORMS = (
    CallForm(
        name="Hermes",
        example='<tool_call>{"name": ..., "arguments": {...}}</tool_call>',
        openings=("<tool_call>",),
        markup=("</tool_call>",),
        read=_hermes,
        bare=False,
        taught=re.compile(r"<tool_call>"),
    ),
    CallForm(
        name="Mistral",
        example='[TOOL_CALLS][{"name": ..., "arguments": {...}}]',
        openings=("[TOOL_CALLS]",),
        markup=(_CALL_ID, _ARGS),
        read=_mistral,
        bare=False,
        taught=re.compile(r"\[TOOL_CALLS\]"),
    ),
    CallForm(
        name="Llama 3",
        example='{"name": ..., "parameters": {...}}',
        openings=("<|python_tag|>",),
        markup=(),
        read=_llama,
        bare=True,
        taught=re.compile(r"""\{\s*\\?"name\\?"\s*:[^{}]*\\?"parameters\\?"\s*:"""),
    ),
)

# Texts that only the templates of other forms have, to say which form a template teaches.
UNREAD: tuple[tuple[str, str], ...] = (
    ("<｜tool▁call", "DeepSeek's"),
    ("｜DSML｜", "DeepSeek's since V3.2"),
    ("<seed:tool_call>", "Seed-OSS's"),
    ("<function=", "<function=NAME> tags, as Qwen3-Coder's"),
    ("<arg_key>", "<arg_key> tags, as GLM's"),
    ("<|tool_call_start|>", "LFM2's"),
    ("<|tool_list_start|>", "LFM2's"),
    ("<|tool_calls_section_begin|>", "Kimi K2's"),
    ("<|tool_call_begin|>", "Kimi K2's"),
    ("<|tool_call|>", "<|tool_call|>, as Granite 3's and Phi-4-mini's"),
    ("<|START_ACTION|>", "Command R's"),
    ("<TOOLCALL>", "<TOOLCALL> tags, as Nemotron's"),
    ("<start_function_call>", "FunctionGemma's"),
    ("<|tool_call>", "Gemma 4's"),
    ("<function_calls>", "<function_calls> tags"),
    ("<invoke name=", "<invoke> tags"),
    ("functools[", "functools[...]"),
    ("<|channel|>", "gpt-oss's channels"),
)
