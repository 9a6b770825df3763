"""A conversation to the text of a prompt: the way of every front, from the messages that a caller gives."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dfastllm.text.chat import Rendering
from dfastllm.text.messages import Read, conversation
from dfastllm.text.tokenizer import Tokenizer
from dfastllm.text.tools import taught

__all__ = ["chat_prompt"]


def chat_prompt(
    tokenizer: Tokenizer,
    messages: Any,
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    add_generation_prompt: bool = True,
    variables: Mapping[str, Any] | None = None,
    parse_special: bool | None = None,
    read: Read = json.loads,
) -> Rendering:
    """The prompt of a conversation, for `Tokenizer.encode`.

    messages: in OpenAI's form, see `messages.conversation`, where `read` is told too. variables: of the template.
    parse_special: special tokens that people spell in messages and tools are those tokens; None: as the tokenizer's
    owner chose, who chose that they stay text if nothing else. Raises ValidationError for messages that are none and as
    `ChatTemplates.render`.
    """
    turns: Sequence[Mapping[str, Any]] = conversation(messages, read)
    if any("tool_calls" in turn or "tool_call_id" in turn for turn in turns):
        turns = taught(tokenizer.templates).fitted(turns)
    if tokenizer.chat_parse_special if parse_special is None else parse_special:
        text = tokenizer.templates.render(
            turns, tools, add_generation_prompt=add_generation_prompt, variables=variables
        )
        return Rendering(text, None)
    return tokenizer.templates.quoted(
        turns, tools, tokenizer.spellings, add_generation_prompt=add_generation_prompt, variables=variables
    )
