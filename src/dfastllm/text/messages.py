"""The messages of a conversation as every front takes them, checked, in the one form that templates are then fitted to.

OpenAI's form: role, content (a text, or a list of text parts), name, tool_calls, tool_call_id; null is absence. Output
fields that clients send back are dropped, older names become their newer ones, and a name that does not exist is
refused: a message with a misspelt field would otherwise be rendered without it.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dfastllm.errors import ValidationError

__all__ = ["REPLAYED", "ROLES", "conversation"]

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# What an answer holds beside content and calls, which clients send back with it.
REPLAYED: frozenset[str] = frozenset(
    {
        *("annotations", "audio", "cache_control", "parsed", "provider_specific_fields", "reasoning"),
        *("reasoning_content", "reasoning_details", "thinking_blocks", "id", "status", "finish_reason"),
    }
)
_KNOWN_AS = {"developer": "system", "function": "tool"}  # by templates
_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id", "function_call", "refusal")
_OF_PARTS = ("type", "text", "refusal")
_OF_CALLS = ("id", "type", "function")
_DROPPED_OF_PARTS = frozenset({"annotations", "cache_control"})
_DROPPED_OF_CALLS = frozenset({"cache_control", "index", "provider_specific_fields"})
_DROPPED_OF_FUNCTIONS = frozenset({"parsed_arguments"})
_ALIKE = 0.75

Read = Callable[[str], Any]


def conversation(messages: Any, read: Read = json.loads) -> list[dict[str, Any]]:
    """The messages with text content, the arguments of calls as objects, and no field that is null. read: how the JSON
    text of arguments is read; what it raises for too much of it is raised here. Raises ValidationError naming the
    place."""
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence) or not messages:
        raise ValidationError(
            f"messages must be a non-empty list of {{role, content}} objects, got {messages!r:.80}.", param="messages"
        )
    return [_message(f"messages[{index}]", message, read) for index, message in enumerate(messages)]


def _message(where: str, given: Any, read: Read) -> dict[str, Any]:
    message = _object(where, given, _FIELDS, REPLAYED)
    role = message.get("role")
    if role not in ROLES:
        raise ValidationError(
            f"{where}.role must be one of {', '.join(ROLES)}, got {role!r:.80}.", param=f"{where}.role"
        )
    calls = _calls(where, message, read)
    _check_role(where, role, message)
    content = message.get("content", message.get("refusal"))
    out = {"role": _KNOWN_AS.get(role, role), "content": _content(where, role, content)}
    for name in ("name", "tool_call_id"):
        if name in message:
            out[name] = _is_text(f"{where}.{name}", message[name])
    if calls:
        out["tool_calls"] = calls
    return out


def _object(where: str, given: Any, fields: Sequence[str], dropped: frozenset[str]) -> dict[str, Any]:
    """The fields that are not null. Raises ValidationError for what is no object and for unknown ones."""
    if not isinstance(given, Mapping):
        wanted = "a role" if "role" in fields else f"fields {', '.join(fields)}"
        raise ValidationError(f"{where} must be an object with {wanted}, got {given!r:.80}.", param=where)
    kept = {name: value for name, value in given.items() if value is not None and name not in dropped}
    for name in kept:
        if name not in fields:
            near = difflib.get_close_matches(str(name), fields, n=1, cutoff=_ALIKE)
            raise ValidationError(
                f"{where} has no field {name!r:.80}.",
                param=f"{where}.{name}",
                hint=f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(fields)}.",
            )
    return kept


def _is_text(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValidationError(f"{where} must be text, got {value!r:.80}.", param=where)
    return value


def _content(where: str, role: str, content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    where = f"{where}.content"
    if isinstance(content, Mapping) or not isinstance(content, Sequence):
        raise ValidationError(f"{where} must be text or a list of text parts, got {content!r:.80}.", param=where)
    texts = []
    for index, given in enumerate(content):
        place = f"{where}[{index}]"
        part = _object(place, given, (*_OF_PARTS, *given) if isinstance(given, Mapping) else (), _DROPPED_OF_PARTS)
        kind = part.get("type")
        if kind not in ("text", "refusal"):
            raise ValidationError(
                f"{place}.type must be text, got {kind!r:.80}: the models served here read and write text only.",
                param=f"{place}.type",
            )
        if kind == "refusal" and role != "assistant":
            raise ValidationError(f"{place} is a refusal, which only the assistant makes.", param=where)
        _object(place, part, ("type", kind), frozenset())
        texts.append(_is_text(f"{place}.{kind}", part.get(kind)))
    return "".join(texts)


def _check_role(where: str, role: str, message: Mapping[str, Any]) -> None:
    """What only one role has, and what every other must have."""
    for name in ("tool_calls", "function_call"):
        if message.get(name) and role != "assistant":
            raise ValidationError(f"{where} has {name}, which only the assistant makes.", param=f"{where}.{name}")
    if "content" not in message and role != "assistant":
        raise ValidationError(f"{where} has no content.", param=where)
    if "tool_call_id" in message and role != "tool":
        raise ValidationError(f"{where} has a tool_call_id but is no tool message.", param=f"{where}.tool_call_id")


def _calls(where: str, message: Mapping[str, Any], read: Read) -> list[dict[str, Any]]:
    given = message.get("tool_calls") or ()
    if isinstance(given, str | Mapping) or not isinstance(given, Sequence):
        raise ValidationError(f"{where}.tool_calls must be a list, got {given!r:.80}.", param=f"{where}.tool_calls")
    calls = []
    for index, one in enumerate(given):
        place = f"{where}.tool_calls[{index}]"
        call = _object(place, one, _OF_CALLS, _DROPPED_OF_CALLS)
        if call.get("type", "function") != "function":
            raise ValidationError(f"{place}.type must be function, got {call['type']!r:.80}.", param=f"{place}.type")
        named = {"id": _is_text(f"{place}.id", call["id"])} if "id" in call else {}
        function = _function(f"{place}.function", call.get("function"), read)
        calls.append({**named, "type": "function", "function": function})
    if not calls and message.get("function_call") is not None:
        function = _function(f"{where}.function_call", message["function_call"], read)
        calls.append({"id": function["name"], "type": "function", "function": function})
    return calls


def _function(where: str, given: Any, read: Read) -> dict[str, Any]:
    function = _object(where, given, ("name", "arguments"), _DROPPED_OF_FUNCTIONS)
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = read(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, Mapping):
        at = where.partition(".")[0]
        raise ValidationError(f"{at} has a tool call whose arguments are no JSON object.", param=f"{at}.tool_calls")
    return {"name": _is_text(f"{where}.name", function.get("name")), "arguments": dict(arguments)}
