"""In what form a template reads messages, found by trying it, and messages brought into that form.

Templates disagree on more than their markup: whether content is a text or a list of parts, what an assistant's message
that only calls has for content, whether the arguments of a call are an object or its JSON text, and whether there is a
system's turn. A template that gets another form than its own writes nothing, without a word. So each is shown short
conversations of made-up words once, and the form is what brings the words out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dfastllm.errors import DFastLLMError, TokenizerError

__all__ = ["ABSENT", "Form", "adapted", "probed"]

Message = dict[str, Any]
Render = Callable[[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]] | None], str]

ABSENT = object()  # the content of a message that has no such key
_USER, _SYSTEM, _ANSWER, _RESULT = "zqvasked", "zqvsystem", "zqvanswer", "zqvresult"
_NAME, _KEY, _VALUE = "zqvname", "zqvkey", "zqvvalue"
_CALL_ID = "zqvcall01"  # nine letters and digits: Mistral's templates take no other
_TOOL = {"type": "function", "function": {"name": "zqvtool", "description": "", "parameters": {"type": "object"}}}


@dataclass(frozen=True, slots=True)
class Form:
    """parts         roles whose content is a list of {"type": "text", "text": ...} rather than a text.
    empty         content of an assistant's message that only calls: "", None, a list or ABSENT.
    arguments     of a call are an "object" or its JSON "text".
    system        there is a system's turn; where there is none, the first user's turn begins with its text.
    bare          the template adds nothing to what a user says: the message is the whole prompt, markup included.
    """

    parts: frozenset[str] = frozenset()
    empty: Any = ""
    arguments: str = "object"
    system: bool = True
    bare: bool = False


def probed(render: Render) -> Form:
    """The form of the template that `render` renders with messages and tools. What the template shows in no form is
    left as most templates have it. A template that is broken has the common form: rendering it will say so."""
    try:
        return _Probe(render).form()
    except TokenizerError:
        return Form()


class _Probe:
    def __init__(self, render: Render) -> None:
        self._render = render
        self._parts: set[str] = set()

    def form(self) -> Form:
        """Each question is asked in the form that the answers before it gave."""
        self._content("user", _USER, lambda tried: [tried])
        user = self._turn("user", _USER)
        self._content("assistant", _ANSWER, lambda tried: [user, tried, user])
        empty, arguments = self._calls(user)
        called = _called(empty, arguments)
        self._content("tool", _RESULT, lambda tried: [user, called, tried], {"tool_call_id": _CALL_ID, "name": _NAME})
        self._content("system", _SYSTEM, lambda tried: [tried, user])
        bare = self._shows([{"role": "user", "content": f"{_USER} {_USER}"}], (), None) == f"{_USER} {_USER}"
        return Form(frozenset(self._parts), empty, arguments, self._has_system(user), bare)

    def _shows(self, messages: Sequence[Message], words: Iterable[str], tools: Any) -> str:
        """The text, "" where it lacks one of the words. Raises TokenizerError for a template that is broken."""
        try:
            text = self._render(messages, tools)
        except TokenizerError:
            raise
        except DFastLLMError:  # it refuses the messages
            return ""
        shown = text.casefold()  # a template may write in capitals
        return text if all(word in shown for word in words) else ""

    def _turn(self, role: str, text: str, rest: Mapping[str, Any] | None = None) -> Message:
        content: Any = [{"type": "text", "text": text}] if role in self._parts else text
        return {"role": role, "content": content, **(rest or {})}

    def _content(
        self,
        role: str,
        word: str,
        conversation: Callable[[Message], Sequence[Message]],
        rest: Mapping[str, Any] | None = None,
    ) -> None:
        """Whether the content of a role's messages is a list of parts."""
        tools = [_TOOL] if role == "tool" else None
        if self._shows(conversation(self._turn(role, word, rest)), [word], tools):
            return
        self._parts.add(role)
        text = self._shows(conversation(self._turn(role, word, rest)), [word], tools)
        if (
            not text or "'type'" in text or '"type"' in text.replace(json.dumps(_TOOL), "")
        ):  # the list itself, written out
            self._parts.discard(role)

    def _calls(self, user: Message) -> tuple[Any, str]:
        """What stands for no content beside a call, and the form of the call's arguments."""
        empties: tuple[Any, ...] = ("", None, ABSENT)
        if "assistant" in self._parts:
            empties = ([{"type": "text", "text": ""}], [], *empties)
        for arguments in ("object", "text"):
            for empty in empties:
                text = self._shows([user, _called(empty, arguments), user], [_NAME, _KEY, _VALUE], [_TOOL])
                text = text or self._shows([user, _called(empty, arguments)], [_NAME, _KEY, _VALUE], [_TOOL])
                # Python's own way to write an object is no JSON: the template wrote out what it took for a text.
                if text and f"'{_KEY}': '{_VALUE}'" not in text:
                    return empty, arguments
        return empties[0], "object"

    def _has_system(self, user: Message) -> bool:
        """False only for a template that shows every turn but the system's, or refuses that one alone."""
        if self._shows([self._turn("system", _SYSTEM), user], [_SYSTEM], None):
            return True
        return not self._shows([user, self._turn("assistant", _ANSWER), user], [_USER, _ANSWER], None)


def _called(empty: Any, arguments: str) -> Message:
    value: Any = {_KEY: _VALUE}
    function = {"name": _NAME, "arguments": value if arguments == "object" else json.dumps(value)}
    message = {"role": "assistant", "tool_calls": [{"id": _CALL_ID, "type": "function", "function": function}]}
    return message if empty is ABSENT else {**message, "content": empty}


def adapted(messages: Sequence[Mapping[str, Any]], form: Form) -> list[Message]:
    """The messages in a template's form. They may come in any: content a text, a list of text parts, None or left out;
    arguments an object or its JSON text. What is neither stays as it is."""
    turns = list(messages)
    if not form.system and turns[0].get("role") == "system":
        turns = _folded(turns)
    return [_adapted(message, form) for message in turns]


def _folded(turns: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The system's text at the head of the first user's, for templates without a system's turn."""
    system, *rest = turns
    told = _text(system.get("content"))
    for index, message in enumerate(rest):
        if message.get("role") == "user" and isinstance(said := _text(message.get("content")), str):
            if not isinstance(told, str):
                break
            return [*rest[:index], {**message, "content": f"{told}\n\n{said}"}, *rest[index + 1 :]]
    return [{**system, "role": "user"}, *rest]


def _text(content: Any) -> Any:
    """Content as one text; what is no text as it is."""
    if content is None:
        return ""
    if isinstance(content, list | tuple) and all(_is_text(part) for part in content):
        return "".join(part["text"] for part in content)
    return content


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _adapted(message: Mapping[str, Any], form: Form) -> Message:
    out = dict(message)
    if not out.get("tool_calls"):
        out.pop("tool_calls", None)
    content = _text(out.get("content"))
    if content in ("", [], ()) and "tool_calls" in out:
        content = form.empty
    elif isinstance(content, str) and out.get("role") in form.parts:
        content = [{"type": "text", "text": content}]
    out.pop("content", None)
    if content is not ABSENT:
        out["content"] = content
    if "tool_calls" in out:
        out["tool_calls"] = [_adapted_call(call, form) for call in out["tool_calls"]]
    return out


def _adapted_call(call: Any, form: Form) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or "arguments" not in function:
        return call
    arguments = function["arguments"]
    if form.arguments == "text" and isinstance(arguments, Mapping):
        arguments = json.dumps(arguments, ensure_ascii=False)
    elif form.arguments == "object" and isinstance(arguments, str):
        try:
            read = json.loads(arguments) if arguments else {}
        except (ValueError, RecursionError):
            return call
        arguments = read if isinstance(read, dict) else arguments
    return {**call, "function": {**function, "arguments": arguments}}
