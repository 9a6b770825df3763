"""Prompts to token ids: texts, ids and conversations. Encoding runs on a thread: a prompt may be megabytes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any, cast

from dfastllm.errors import ValidationError
from dfastllm.server.schemas import CompletionRequest, Message, Tool
from dfastllm.server.serving import ServedModel

__all__ = ["chat_ids", "chat_text", "completion_prompts", "encode"]

Ids = tuple[int, ...]


async def encode(model: ServedModel, text: str, *, param: str, add_special: bool = False) -> Ids:
    try:
        return tuple(await asyncio.to_thread(model.tokenizer.encode, text, add_special=add_special))
    except ValidationError as error:
        raise ValidationError(str(error), param=param) from error


async def completion_prompts(body: CompletionRequest, model: ServedModel) -> list[tuple[Ids, str]]:
    """(token ids, text) of each prompt; the text only if it is echoed. Raises ValidationError when one is empty."""
    given = body.prompt
    if isinstance(given, str):
        prompts: Sequence[str | list[int]] = [given]
    elif given and isinstance(given[0], int):
        prompts = [given]
    else:
        prompts = cast("list[str] | list[list[int]]", given)
    if not prompts:
        raise ValidationError("prompt must not be an empty list.", param="prompt")
    special = body.add_special_tokens is not False
    out = []
    for index, prompt in enumerate(prompts):
        if not prompt:
            which = f"prompt {index}" if len(prompts) > 1 else "prompt"
            raise ValidationError(f"{which} is empty; it must hold at least one token.", param="prompt")
        if isinstance(prompt, str):
            out.append((await encode(model, prompt, param="prompt", add_special=special), prompt))
        else:
            _check_ids(prompt, model)
            out.append((tuple(prompt), model.tokenizer.decode(prompt, skip_special=False) if body.echo else ""))
    return out


def _check_ids(ids: Sequence[int], model: ServedModel) -> None:
    """Refuse ids outside the vocabulary before the tokenizer sees them: its own limits are no named errors."""
    for token in ids:
        if not 0 <= token < model.info.vocab_size:
            raise ValidationError(
                f"prompt holds the token id {token}; {model.name!r} has ids 0 to {model.info.vocab_size - 1}.",
                param="prompt",
            )


def _template_message(message: Message) -> dict[str, Any]:
    """A message as chat templates expect it: text content, tool arguments as an object, developer as system."""
    out = message.model_dump(exclude_none=True, exclude={"content"})
    for call in out.get("tool_calls", ()):
        call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    out["role"] = "system" if message.role == "developer" else message.role
    content = message.content
    out["content"] = content if isinstance(content, str) else "".join(part.text for part in content or ())
    return out


def _check_message(index: int, message: Message) -> None:
    where = f"messages[{index}]"
    if message.content is None and not message.tool_calls:
        raise ValidationError(f"{where} has neither content nor tool_calls.", param=where)
    if message.tool_calls and message.role != "assistant":
        raise ValidationError(f"{where} has tool_calls, which only the assistant makes.", param=f"{where}.tool_calls")
    if message.tool_call_id is not None and message.role != "tool":
        raise ValidationError(f"{where} has a tool_call_id but is no tool message.", param=f"{where}.tool_call_id")
    for call in message.tool_calls or ():
        try:
            arguments = json.loads(call.function.arguments)
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise ValidationError(
                f"{where} has a tool call whose arguments are no JSON object.", param=f"{where}.tool_calls"
            )


async def chat_text(model: ServedModel, messages: Sequence[Message], tools: Sequence[Tool] | None) -> str:
    """The conversation as the model's chat template writes it."""
    for index, message in enumerate(messages):
        _check_message(index, message)
    plain = [_template_message(message) for message in messages]
    listed = [tool.model_dump(exclude_none=True) for tool in tools] if tools else None
    return await asyncio.to_thread(model.tokenizer.apply_chat_template, plain, listed)


async def chat_ids(model: ServedModel, messages: Sequence[Message], tools: Sequence[Tool] | None) -> Ids:
    return await encode(model, await chat_text(model, messages, tools), param="messages")
