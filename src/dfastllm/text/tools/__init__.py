"""Tool calls: the forms in which models write them, finding them in a text, and which form a chat template teaches.

Nothing here runs a tool or knows a tool's schema.
"""

from dfastllm.text.tools.events import CallBegin, CallText, ParsedMessage, Piece, ToolCall
from dfastllm.text.tools.forms import FORMS, CallForm
from dfastllm.text.tools.parser import ToolCallParser, parse_tool_calls
from dfastllm.text.tools.taught import CallReading, Taught, call_reading, taught

__all__ = [
    "FORMS",
    "CallBegin",
    "CallForm",
    "CallReading",
    "CallText",
    "ParsedMessage",
    "Piece",
    "Taught",
    "ToolCall",
    "ToolCallParser",
    "call_reading",
    "parse_tool_calls",
    "taught",
]
