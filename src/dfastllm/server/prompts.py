"""Prompts to token ids: texts, ids and conversations. Templates and encoding run on threads: a prompt may be megabytes.

What cannot fit is refused before the work: prompts are counted first, a text that has more tokens than the context
however it is cut is not encoded, and the first prompt that is too long ends the encoding of a list.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from dfastllm.errors import ContextLengthError, ValidationError
from dfastllm.server.bounds import read_json
from dfastllm.server.schemas import (
    CalledFunction,
    ChatRequest,
    CompletionRequest,
    Message,
    RefusalPart,
    TokenizeRequest,
    Tool,
)
from dfastllm.server.serving import ServedModel
from dfastllm.text import taught

__all__ = ["chat_ids", "completion_prompts", "encode"]

Ids = tuple[int, ...]
_ROLES = {"developer": "system", "function": "tool"}  # what templates know them as


async def encode(
    model: ServedModel, text: str, *, param: str, add_special: bool = False, most: int | None = None
) -> Ids:
    """Token ids of a text. most: characters that it may have; None: it is a prompt, and has to fit the context. Raises
    ContextLengthError and ValidationError naming `param`, QueueFullError when too many texts wait to be encoded."""
    if most is not None and len(text) > most:
        raise ValidationError(f"{param} has {len(text):,} characters; {most:,} are taken.", param=param)
    if most is None and (least := model.tokenizer.fewest(text)) > model.context:
        raise _too_long(model, f"at least {least:,}", param)
    try:
        ids = await model.readers.run(len(text), model.tokenizer.encode, text, add_special=add_special)
    except ValidationError as error:
        raise ValidationError(str(error), param=param) from error
    if most is None and len(ids) > model.context:
        raise _too_long(model, f"{len(ids):,}", param)
    return tuple(ids)


def _too_long(model: ServedModel, tokens: str, param: str) -> ContextLengthError:
    return ContextLengthError(
        f"the prompt has {tokens} tokens; the context of {model.name} is {model.context:,}.",
        param=param,
        hint="Shorten the prompt.",
    )


async def completion_prompts(body: CompletionRequest, model: ServedModel, most: int) -> list[tuple[Ids, str]]:
    """(token ids, text) of each prompt; the text only if it is echoed. most: prompts that one request may have. Raises
    ValidationError when there are more, when one is empty, and what `encode` raises."""
    given = body.prompt
    if isinstance(given, str):
        prompts: Sequence[str | list[int]] = [given]
    elif given and isinstance(given[0], int):
        prompts = [given]
    else:
        prompts = cast("list[str] | list[list[int]]", given)
    if not prompts:
        raise ValidationError("prompt must not be an empty list.", param="prompt")
    if len(prompts) > most:
        raise ValidationError(f"One request may have {most} prompts, got {len(prompts):,}.", param="prompt")
    special = body.add_special_tokens is not False
    out = []
    for index, prompt in enumerate(prompts):
        if not prompt:
            which = f"prompt {index}" if len(prompts) > 1 else "prompt"
            raise ValidationError(f"{which} is empty; it must hold at least one token.", param="prompt")
        if isinstance(prompt, str):
            out.append((await encode(model, prompt, param="prompt", add_special=special), prompt))
        else:
            if len(prompt) > model.context:
                raise _too_long(model, f"{len(prompt):,}", "prompt")
            text = ""
            if body.echo:
                _check_ids(prompt, model)
                decode = model.tokenizer.decode
                text = await model.readers.run(len(prompt), decode, prompt, skip_special=False)
            out.append((tuple(prompt), text))
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
    """A message as chat templates expect it: text content, tool arguments as an object, older names by their newer."""
    out: dict[str, Any] = {"role": _ROLES.get(message.role, message.role)}
    content = message.content if message.content is not None else message.refusal
    if not isinstance(content, str):
        content = "".join(part.refusal if isinstance(part, RefusalPart) else part.text for part in content or ())
    out["content"] = content
    for name in ("name", "tool_call_id"):
        if (value := getattr(message, name)) is not None:
            out[name] = value
    calls = [(call.id, call.function) for call in message.tool_calls or ()]
    if not calls and message.function_call is not None:
        calls = [(message.function_call.name, message.function_call)]
    if calls:
        out["tool_calls"] = [
            {"id": id, "type": "function", "function": {"name": call.name, "arguments": _arguments(call)}}
            for id, call in calls
        ]
    return out


def _arguments(call: CalledFunction) -> Any:
    """Raises ValueError for what is no JSON, and what `read_json` raises for too much of it."""
    return read_json(call.arguments.encode("utf-8", "surrogatepass")) if call.arguments else {}


def _check_message(index: int, message: Message) -> None:
    where = f"messages[{index}]"
    called = {"tool_calls": message.tool_calls, "function_call": message.function_call}
    for name, given in called.items():
        if given and message.role != "assistant":
            raise ValidationError(f"{where} has {name}, which only the assistant makes.", param=f"{where}.{name}")
    parts = () if isinstance(message.content, str) else message.content or ()
    if message.role != "assistant" and any(isinstance(part, RefusalPart) for part in parts):
        raise ValidationError(f"{where} has a refusal, which only the assistant makes.", param=f"{where}.content")
    if message.content is None and message.role != "assistant":
        raise ValidationError(f"{where} has no content.", param=where)
    if message.tool_call_id is not None and message.role != "tool":
        raise ValidationError(f"{where} has a tool_call_id but is no tool message.", param=f"{where}.tool_call_id")
    for call in [call.function for call in message.tool_calls or ()] + [message.function_call]:
        try:
            arguments = {} if call is None else _arguments(call)
        except ValueError:
            arguments = None
        if not isinstance(arguments, dict):
            raise ValidationError(
                f"{where} has a tool call whose arguments are no JSON object.", param=f"{where}.tool_calls"
            )


async def chat_ids(
    model: ServedModel,
    body: ChatRequest | TokenizeRequest,
    messages: Sequence[Message],
    tools: Sequence[Tool] | None,
    most: int | None = None,
) -> Ids:
    """Token ids of the conversation as the model's chat template writes it. most: as `encode`. Raises ValidationError
    for messages that are none and for template variables that the conversation itself sets, and as `encode`."""
    text = await model.readers.run(sum(map(_length, messages)), _render, model, body, messages, tools)
    return await encode(model, text, param="messages", most=most)


def _length(message: Message) -> int:
    """Characters of what is said, roughly."""
    if isinstance(message.content, str):
        return len(message.content)
    return sum(len(call.function.arguments or "") for call in message.tool_calls or ())


def _render(
    model: ServedModel, body: ChatRequest | TokenizeRequest, messages: Sequence[Message], tools: Sequence[Tool] | None
) -> str:
    for index, message in enumerate(messages):
        _check_message(index, message)
    plain: Sequence[Mapping[str, Any]] = [_template_message(message) for message in messages]
    if any("tool_calls" in message or "tool_call_id" in message for message in plain):
        plain = taught(model.tokenizer.templates).fitted(plain)
    listed = [tool.model_dump(exclude_none=True) for tool in tools] if tools else None
    return model.tokenizer.templates.render(
        plain,
        listed,
        add_generation_prompt=body.add_generation_prompt is not False,
        variables=body.chat_template_kwargs,
    )
