"""A chat completion as a value: content, calls, usage, and the tokens with their log-probabilities.

Reads the form of OpenAI's API and the additions of vLLM and dfastllm: `token_ids` of a choice, and tokens written as
"token_id:123" in the log-probabilities. Knows no tokenizer: what the tokens mean to a student is `align`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dfastllm.text import ToolCall

__all__ = ["Alternative", "Answer", "TokenRecord", "read_answer"]

_ID = re.compile(r"token_id:(\d{1,9})")
_BYTES = re.compile(r"bytes:((?:\\x[0-9a-f]{2})+)")


@dataclass(frozen=True, slots=True)
class Alternative:
    """A token that could have stood at a position. logprob: natural logarithm.

    id: where the server told it. data: the bytes it stands for, None where they cannot be told.
    """

    id: int | None
    data: bytes | None
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """A token of the answer and the best tokens at its position, which need not hold the one that was taken."""

    taken: Alternative
    top: tuple[Alternative, ...]


@dataclass(frozen=True)
class Answer:
    """One answer of a teacher.

    content        the text around the calls; the server has taken the calls out of it.
    calls          arguments in the model's own words; `whole` says whether they are a JSON object.
    finish_reason  stop, tool_calls, length, ...; None: the server named none.
    prompt_tokens, completion_tokens   of usage; None where the server told none.
    token_ids      of the answer, where the server told them.
    records        one for each token, () where the server gave no log-probabilities.
    """

    content: str
    calls: tuple[ToolCall, ...]
    finish_reason: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    token_ids: tuple[int, ...] | None = None
    records: tuple[TokenRecord, ...] = ()

    @property
    def empty(self) -> bool:
        return not self.content.strip() and not self.calls


def read_answer(response: Mapping[str, Any]) -> Answer:
    """The first choice of a response. Raises ValueError naming what is not in the form of a chat completion."""
    choices = response.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise ValueError("choices is no list of objects")
    choice = choices[0]
    message = choice.get("message")
    if not isinstance(message, dict):
        raise ValueError("choices[0].message is no object")
    reason = choice.get("finish_reason")
    usage = response.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    ids = choice.get("token_ids", message.get("token_ids"))
    return Answer(
        _content(message.get("content")),
        tuple(_calls(message.get("tool_calls"))),
        reason if isinstance(reason, str) else None,
        _count(usage.get("prompt_tokens")),
        _count(usage.get("completion_tokens")),
        tuple(ids) if isinstance(ids, list) and all(type(i) is int for i in ids) else None,
        tuple(_records(choice.get("logprobs"))),
    )


def _content(content: Any) -> str:
    """A text, a list of text parts, or null."""
    if isinstance(content, list):
        content = "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    if content is None or isinstance(content, str):
        return content or ""
    raise ValueError("choices[0].message.content is no text")


def _calls(calls: Any) -> Iterator[ToolCall]:
    for call in calls or ():
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError("choices[0].message.tool_calls holds what is no call of a function")
        arguments = function.get("arguments") or "{}"
        if isinstance(arguments, dict):  # as Ollama's own form has them
            arguments = json.dumps(arguments, ensure_ascii=False)
        if not isinstance(arguments, str):
            raise ValueError("the arguments of a call are no text")
        yield ToolCall(function["name"], arguments, _is_object(arguments))


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _count(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None


def _records(logprobs: Any) -> Iterator[TokenRecord]:
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    for entry in content or ():
        if not isinstance(entry, dict):
            raise ValueError("logprobs.content holds what is no object")
        yield TokenRecord(_alternative(entry), tuple(_alternative(other) for other in entry.get("top_logprobs") or ()))


def _alternative(entry: Any) -> Alternative:
    """From {"token", "logprob", "bytes"}. The logarithm may be anything here; `align` judges it."""
    if not isinstance(entry, dict) or not isinstance(entry.get("token"), str):
        raise ValueError("logprobs.content holds what is no token")
    token, logprob = entry["token"], entry.get("logprob")
    value = float(logprob) if isinstance(logprob, int | float) and not isinstance(logprob, bool) else math.nan
    id = int(found[1]) if (found := _ID.fullmatch(token)) else None
    data = entry.get("bytes")
    if isinstance(data, list) and all(type(byte) is int and 0 <= byte < 256 for byte in data):
        said: bytes | None = bytes(data)
    elif found := _BYTES.fullmatch(token):
        said = bytes.fromhex(found[1].replace("\\x", ""))
    else:
        said = token.encode("utf-8", "surrogatepass")
    if id is not None and said == token.encode():  # vLLM gives the bytes of "token_id:123"
        said = None
    return Alternative(id, said, value)
