"""Text in and out of token ids: tokenizer files, chat templates, incremental detokenising and stop strings, tools.

It reads a checkpoint directory's tokenizer files and knows nothing of models, decoding or the engine. Imports no torch
and no transformers: the `tokenizers` library encodes and decodes, a Jinja sandbox renders templates.
"""

from dfastllm.text.chat import ChatTemplates, Rendering
from dfastllm.text.detokenizer import Detokenizer, TextOffsets
from dfastllm.text.files import read_text
from dfastllm.text.prompt import chat_prompt
from dfastllm.text.tokenizer import Tokenizer
from dfastllm.text.tools import (
    CallBegin,
    CallReading,
    CallText,
    ParsedMessage,
    Piece,
    ToolCall,
    ToolCallParser,
    call_reading,
    parse_tool_calls,
    taught,
)

__all__ = [
    "CallBegin",
    "CallReading",
    "CallText",
    "ChatTemplates",
    "Detokenizer",
    "ParsedMessage",
    "Piece",
    "Rendering",
    "TextOffsets",
    "Tokenizer",
    "ToolCall",
    "ToolCallParser",
    "call_reading",
    "chat_prompt",
    "parse_tool_calls",
    "read_text",
    "taught",
]
