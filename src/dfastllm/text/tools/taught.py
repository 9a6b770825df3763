"""Which form of calls a chat template teaches, found by asking it to write one.

A conversation with a call in it is rendered through the template, and the form is the one whose parser reads that call
back. So what counts is what the template does, not which family it is from. Where a template shows tools but never
writes a call, its own words say how calls are to look. A template of a form that nobody here reads, or one that never
shows tools to the model, is refused for requests with tools: their calls would silently stay text.

Two kinds of template teach nothing and leave no doubt all the same; every form is read then, of the request's own
tools only: one that shows tools and says nothing of calls, and one whose prompt is the message alone, so that what the
model knows of tools stands in the client's own text.
"""

from __future__ import annotations

import hashlib
import json
import string
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from dfastllm.errors import DFastLLMError, UnsupportedError
from dfastllm.text.tools.events import ParsedMessage, ToolCall
from dfastllm.text.tools.forms import FORMS, UNREAD, CallForm
from dfastllm.text.tools.parser import ToolCallParser, parse_tool_calls

if TYPE_CHECKING:
    from dfastllm.text import ChatTemplates, Tokenizer

__all__ = ["CallReading", "Taught", "call_reading", "taught"]

Messages = Sequence[Mapping[str, Any]]

_SHORT = 9  # characters of an id where a template demands so many: Mistral's
_ALPHABET = string.ascii_letters + string.digits
_ASKED, _SAID, _TOOL, _CALLED = "Qzquestionz", "Qzanswerz", "qztoolz", "qzcalledz"  # found again in what is rendered
_ARGUMENTS = {"qzkeyz": "qzvaluez"}
_ID = "abcDEF123"
_LONG_ID = "call_0123456789abcdef01234567"
_WAY_OUT = (
    "Leave tools out or send tool_choice none, describe the tools in a message and read the call in the answer's text; "
    "or serve the model with --chat-template FILE and a template that teaches one of these forms: {forms}."
)


@dataclass(frozen=True, slots=True)
class Taught:
    """What a template teaches of calls.

    forms      the forms to read, none where calls cannot be read.
    strict     calls of other names than the request's tools are none.
    refusal    why there are no forms, "" otherwise.
    short_ids  the template takes ids of nine letters and digits only.
    unsaid     the template shows tools and says nothing of calls.
    """

    forms: tuple[CallForm, ...]
    strict: bool = False
    refusal: str = ""
    short_ids: bool = False
    unsaid: bool = False

    def require(self) -> None:
        """Raises UnsupportedError where the calls of this template's models cannot be read."""
        if self.refusal:
            forms = "; ".join(f"{form.name}, {form.example}" for form in FORMS)
            raise UnsupportedError(self.refusal, param="tools", hint=_WAY_OUT.format(forms=forms))

    def reading(self, names: Collection[str]) -> CallReading:
        """How the answers to a request with tools of these names are read. Raises UnsupportedError, as `require`."""
        self.require()
        return CallReading(self, frozenset(names))

    def shown_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Special tokens that are part of calls, so that they must stay in the text that is parsed."""
        texts = [text for form in self.forms for text in (*form.openings, *form.markup)]
        ids = [tokenizer.token_to_id(text) for text in texts]
        return tuple(id for id in ids if id is not None and id in tokenizer.special_ids)

    def new_id(self) -> str:
        """A fresh id of a call, in the form that the template takes back."""
        return _short_id(uuid.uuid4().bytes) if self.short_ids else f"call_{uuid.uuid4().hex[:24]}"

    def fitted(self, messages: Messages) -> Messages:
        """The messages with ids that the template takes. A conversation may have begun with another model: its ids are
        replaced by short ones made from them, the same for a call and for its result."""
        if not self.short_ids:
            return messages
        return [_with_short_ids(message) for message in messages]


@dataclass(frozen=True, slots=True)
class CallReading:
    """How the calls in the answers to one request are read. names: the request's tools."""

    taught: Taught
    names: frozenset[str]

    def parser(self) -> ToolCallParser:
        """A parser of one answer."""
        return ToolCallParser(self.taught.forms, self.names, strict=self.taught.strict)

    def parse(self, text: str) -> ParsedMessage:
        """Content and calls of a whole answer."""
        return parse_tool_calls(text, self.taught.forms, self.names, strict=self.taught.strict)

    def fits(self, call: ToolCall) -> bool:
        """The call is complete and names one of the request's tools."""
        return call.whole and call.name in self.names


def call_reading(tokenizer: Tokenizer, names: Collection[str]) -> CallReading:
    """How calls of these tools are read in the answers of a model with this tokenizer. A template that says nothing of
    calls leaves it to the vocabulary: one with the markup of a form that is not read here is that form's. Raises
    UnsupportedError as `Taught.require`."""
    found = taught(tokenizer.templates)
    if found.unsaid:
        other = next((form for mark, form in UNREAD if tokenizer.token_to_id(mark) is not None), None)
        found = found if other is None else _unread(other)
    return found.reading(names)


@lru_cache(maxsize=32)
def taught(templates: ChatTemplates) -> Taught:
    """What these templates teach. Renders a few short conversations the first time it is asked."""
    if not templates:
        return Taught((), refusal="This model has no chat template, so it is shown no tools.")
    plain = _rendered(templates, [{"role": "user", "content": _ASKED}])
    if plain is not None and plain.strip() == _ASKED:
        return Taught(FORMS, strict=True, short_ids=_takes_short_ids_only(templates))
    if not _shows_tools(templates):
        return Taught((), refusal="The chat template of this model does not read tools, so it is shown none.")
    found = _written_form(templates) or _described_form(templates)
    return replace(found, short_ids=bool(found.forms) and _takes_short_ids_only(templates))


def _described_form(templates: ChatTemplates) -> Taught:
    """What the template's own text says of calls, where it writes none that can be read."""
    text = "\n".join(templates.source(name) or "" for name in templates.names)
    other = next((form for mark, form in UNREAD if mark in text), None)
    if other is None and _CALLED not in (_answer(templates) or ""):
        known = tuple(form for form in FORMS if form.taught.search(text))
        return Taught(known or FORMS, strict=True, unsaid=not known)
    return _unread(other)


def _unread(form: str | None) -> Taught:
    which = "a form of its own, which is not read here" if form is None else f"a form that is not read here ({form})"
    return Taught((), refusal=f"The chat template of this model teaches tool calls in {which}.")


def _written_form(templates: ChatTemplates) -> Taught | None:
    """The form in which the template writes a call, None when it writes none that a parser reads back."""
    answer = _answer(templates)
    for form in FORMS if answer is not None else ():
        for call in parse_tool_calls(answer or "", (form,), (_CALLED,)).tool_calls[:1]:
            if call.name == _CALLED and call.whole and json.loads(call.arguments) == _ARGUMENTS:
                return Taught((form,))
    return None


def _answer(templates: ChatTemplates) -> str | None:
    """How the template writes an answer that is one call, without what opens every answer. None: it cannot."""
    question = {"role": "user", "content": _ASKED}
    said = _rendered(templates, [question, {"role": "assistant", "content": _SAID}], [_tool()])
    opening = (said or "").rpartition(_ASKED)[2].partition(_SAID)[0]
    for arguments in (_ARGUMENTS, json.dumps(_ARGUMENTS)):
        for content in ("", None):
            text = _rendered(templates, [question, _calling(_ID, arguments, content)], [_tool()])
            if text is not None:
                return text.rpartition(_ASKED)[2].removeprefix(opening)
    return None


def _shows_tools(templates: ChatTemplates) -> bool:
    question = {"role": "user", "content": _ASKED}
    talks: list[Messages] = [[question], [{"role": "system", "content": _SAID}, question]]
    return any(_TOOL in (_rendered(templates, talk, [_tool()]) or "") for talk in talks)


def _takes_short_ids_only(templates: ChatTemplates) -> bool:
    def takes(id: str) -> bool:
        talk = [{"role": "user", "content": _ASKED}, _calling(id, _ARGUMENTS, "")]
        result = {"role": "tool", "tool_call_id": id, "name": _CALLED, "content": _SAID}
        return _rendered(templates, [*talk, result], [_tool()]) is not None

    return not takes(_LONG_ID) and takes(_ID)


def _rendered(
    templates: ChatTemplates, messages: Messages, tools: Sequence[Mapping[str, Any]] | None = None
) -> str | None:
    """The conversation as the template writes it, None when it refuses or fails."""
    try:
        return templates.render(messages, tools, add_generation_prompt=False)
    except DFastLLMError:
        return None


def _tool() -> dict[str, Any]:
    schema = {"type": "object", "properties": {next(iter(_ARGUMENTS)): {"type": "string", "description": "Text."}}}
    return {"type": "function", "function": {"name": _TOOL, "description": "A tool.", "parameters": schema}}


def _calling(id: str, arguments: Any, content: str | None) -> dict[str, Any]:
    call = {"id": id, "type": "function", "function": {"name": _CALLED, "arguments": arguments}}
    return {"role": "assistant", "content": content, "tool_calls": [call]}


def _with_short_ids(message: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(message)
    if isinstance(id := out.get("tool_call_id"), str):
        out["tool_call_id"] = _fitted(id)
    if out.get("tool_calls"):
        out["tool_calls"] = [
            {**call, "id": _fitted(call["id"])} if isinstance(call.get("id"), str) else call
            for call in out["tool_calls"]
        ]
    return out


def _fitted(id: str) -> str:
    if len(id) == _SHORT and all(character in _ALPHABET for character in id):
        return id
    return _short_id(hashlib.sha256(id.encode("utf-8", "surrogatepass")).digest())


def _short_id(data: bytes) -> str:
    number = int.from_bytes(data)
    characters = []
    for _ in range(_SHORT):
        number, digit = divmod(number, len(_ALPHABET))
        characters.append(_ALPHABET[digit])
    return "".join(characters)
