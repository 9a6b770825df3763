"""What a text with tool calls is made of: content, the beginning of a call, its arguments as they come, its end."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CallBegin", "CallText", "ParsedMessage", "Piece", "ToolCall"]


@dataclass(frozen=True, slots=True)
class CallBegin:
    """A call of this tool begins. All that follows up to its ToolCall is its arguments."""

    name: str


@dataclass(frozen=True, slots=True)
class CallText:
    """More of the arguments of the call that began last; never empty."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """The end of a call, with all of it.

    name       the tool's name.
    arguments  the texts of its CallText pieces, joined: the JSON object that the model wrote, in its own words.
    whole      the arguments are a complete JSON object. Otherwise they are what the model wrote before the text ended
               or after it stopped being JSON.
    """

    name: str
    arguments: str
    whole: bool = True


Piece = str | CallBegin | CallText | ToolCall  # text is content


@dataclass(frozen=True, slots=True)
class ParsedMessage:
    """A whole answer. `content` is the text around the calls, "" when there is none."""

    content: str
    tool_calls: tuple[ToolCall, ...] = ()
