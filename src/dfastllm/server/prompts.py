"""Prompts to token ids: texts, ids and conversations. Templates and encoding run on threads: a prompt may be megabytes.

What cannot fit is refused before the work: prompts are counted first, a text that has more tokens than the context
however it is cut is not encoded, and the first prompt that is too long ends the encoding of a list.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from dfastllm.errors import ContextLengthError, ValidationError
from dfastllm.server.bounds import read_json
from dfastllm.server.schemas import ChatRequest, CompletionRequest, Message, TokenizeRequest, Tool
from dfastllm.server.serving import ServedModel
from dfastllm.text import Rendering, chat_prompt

__all__ = ["chat_ids", "completion_prompts", "encode"]

Ids = tuple[int, ...]


async def encode(
    model: ServedModel,
    text: str | Rendering,
    *,
    param: str,
    add_special: bool = False,
    parse_special: bool = True,
    most: int | None = None,
) -> Ids:
    """Token ids of a text. most: characters that it may have; None: it is a prompt, and has to fit the context. Raises
    ContextLengthError and ValidationError naming `param`, QueueFullError when too many texts wait to be encoded."""
    plain = text.text if isinstance(text, Rendering) else text
    if most is not None and len(plain) > most:
        raise ValidationError(f"{param} has {len(plain):,} characters; {most:,} are taken.", param=param)
    if most is None and (least := model.tokenizer.fewest(plain)) > model.context:
        raise _too_long(model, f"at least {least:,}", param)
    try:
        encode = model.tokenizer.encode
        ids = await model.readers.run(len(plain), encode, text, add_special=add_special, parse_special=parse_special)
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
    how = {"add_special": body.add_special_tokens is not False, "parse_special": body.parse_special is not False}
    out = []
    for index, prompt in enumerate(prompts):
        if not prompt:
            which = f"prompt {index}" if len(prompts) > 1 else "prompt"
            raise ValidationError(f"{which} is empty; it must hold at least one token.", param="prompt")
        if isinstance(prompt, str):
            out.append((await encode(model, prompt, param="prompt", **how), prompt))
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
) -> Rendering:
    listed = [tool.model_dump(exclude_none=True) for tool in tools] if tools else None
    return chat_prompt(
        model.tokenizer,
        [message.model_dump(exclude_none=True) for message in messages],
        listed,
        add_generation_prompt=body.add_generation_prompt is not False,
        variables=body.chat_template_kwargs,
        parse_special=body.parse_special,
        read=_read_arguments,
    )


def _read_arguments(text: str) -> Any:
    """Raises ValueError for what is no JSON, and what `read_json` raises for too much of it."""
    return read_json(text.encode("utf-8", "surrogatepass"))
