"""Whether generated text holds a complete tool call, and whether the call fits the JSON Schema of the tool it names.

`CallFinder` reads a text as it grows and answers once: with the first call that fits, in any of the forms that
`text.tools` parses, an answer that begins with the call's JSON among them. The `jsonschema` library validates (drafts 4
to 2020-12, by the schema's `$schema`); references out of a schema are never fetched.

Schemas are run as they are, regular expressions included: give this the schemas of people you trust.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dfastllm.errors import ValidationError
from dfastllm.text.tools import FORMS, ToolCall, ToolCallParser

__all__ = ["CallFinder", "ToolSchemas", "argument_writings", "is_valid_tool_json"]

Tools = Sequence[Mapping[str, Any]]


class ToolSchemas:
    """The tools of one request in OpenAI's form ({"type": "function", "function": {name, parameters}}).

    Raises ValidationError for a tool without a name and for parameters that are no JSON Schema."""

    def __init__(self, tools: Tools) -> None:
        from jsonschema import Draft202012Validator
        from jsonschema.exceptions import SchemaError
        from jsonschema.validators import validator_for
        from referencing import Registry

        self._validators: dict[str, Any] = {}
        nowhere: Registry[Any] = Registry()  # the library's own default would fetch http references
        for i, tool in enumerate(tools):
            function = tool.get("function", tool)
            name = function.get("name") if isinstance(function, Mapping) else None
            if not isinstance(name, str) or not name:
                raise ValidationError(f"tools[{i}] has no function name.", param="tools")
            schema = function.get("parameters")
            schema = {"type": "object"} if schema is None else schema
            kind = validator_for(schema, default=Draft202012Validator)
            try:
                kind.check_schema(schema)
            except SchemaError as error:
                raise ValidationError(
                    f"the parameters of tool {name!r} are no JSON Schema: {error.message}.", param="tools"
                ) from error
            self._validators[name] = kind(schema, registry=nowhere)

    def accepts(self, call: ToolCall) -> bool:
        """The call names one of the tools and its arguments fit that tool's schema. Raises ValidationError for a schema
        that refers to another one which is not inside it."""
        from referencing.exceptions import Unresolvable

        validator = self._validators.get(call.name)
        if validator is None:
            return False
        try:
            return bool(validator.is_valid(json.loads(call.arguments)))
        except Unresolvable as error:
            raise ValidationError(
                f"the parameters of tool {call.name!r} refer to {error.ref!r}, which is not inside them.",  # type: ignore[attr-defined]
                param="tools",
            ) from error


class CallFinder:
    """The first call in a growing text, in any form that `text.tools` reads. tools None: any complete call counts."""

    def __init__(self, tools: Tools | ToolSchemas | None = None) -> None:
        self._schemas = ToolSchemas(tools) if tools is not None and not isinstance(tools, ToolSchemas) else tools
        self._parser = ToolCallParser()
        self._said = ""
        self._passed = 0  # characters of it up to the end of the last call that did not fit
        self.found: ToolCall | None = None

    def push(self, text: str) -> ToolCall | None:
        """The first call that fits, once the text so far holds it; None before."""
        if self.found is None:
            self._said += text
            calls = [piece for piece in self._parser.push(text) if isinstance(piece, ToolCall)]
            self.found = next((call for call in calls if self.fits(call)), None)
            if calls and self.found is None:
                self._passed = len(self._said)
        return self.found

    def writings(self) -> tuple[str, ...]:
        """The call that was found, written alone: without the text before it, as it stands and with its arguments in
        each of their `argument_writings`. () before one is found."""
        if self.found is None:
            return ()
        said, arguments = self._said[self._passed :], self.found.arguments
        at = said.rfind(arguments)
        openings = [opening for form in FORMS for opening in form.openings]
        start = max(said.rfind(opening, 0, len(said) if at < 0 else at) for opening in openings)
        if start < 0:  # no markup: an answer that is the call's JSON, or a second call behind one opening
            start = len(said) - len(said.lstrip())
        if at < start:  # arguments in a form of their own, such as JSON inside a string
            return (said[start:],)
        before, after = said[start:at], said[at + len(arguments) :]
        return tuple(before + written + after for written in argument_writings(arguments))

    def fits(self, call: ToolCall) -> bool:
        return call.whole and (self._schemas is None or self._schemas.accepts(call))


def argument_writings(arguments: str) -> tuple[str, ...]:
    """A call's arguments as they stand, in JSON with a space behind colons and commas, and without spaces. Which takes
    the fewest tokens is the tokenizer's business."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return (arguments,)
    spaced = json.dumps(value, ensure_ascii=False)
    tight = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return (arguments, *(text for text in (spaced, tight) if text.isascii() or _is_utf8(text)))


def _is_utf8(text: str) -> bool:
    """False for half a surrogate pair, which JSON can spell out and no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def is_valid_tool_json(text: str, tools: Tools | None = None) -> bool:
    """Whether the text holds a complete tool call that fits the schema of one of the tools (None: any tool)."""
    return CallFinder(tools).push(text) is not None
