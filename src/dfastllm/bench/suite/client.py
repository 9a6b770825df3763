"""One request, timed as its user feels it: when it was sent, when each chunk of the stream came, what it said.

A failure of the server is an answer too (`Answer.error`), never an exception. Tokens come from the server's usage, or
from whatever the server offers to count them with; a chunk is never taken for a token.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import httpx2

__all__ = ["Answer", "Api", "Call", "Chunk", "Client", "Features"]

Api = Literal["chat", "completions"]
LONGEST_EVENT = 16 << 20  # bytes of one server-sent event
ENDED = ("stop", "tool_calls")  # finish reasons of answers that end with an end of text
SHOWN = 200  # characters of a server's own words in a message


@dataclass(frozen=True, slots=True)
class Chunk:
    """One event of the stream with content. at: seconds since the request was sent. tokens: None where not told."""

    at: float
    characters: int
    tokens: int | None


@dataclass(frozen=True)
class Call:
    """What is asked. `options`: further fields of the body; one named here wins over the client's own."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    max_tokens: int = 128
    temperature: float = 0.0
    seed: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Features:
    """What this server takes. `include_usage`: stream_options.include_usage. `token_ids`: return_token_ids (vLLM and
    dfastllm): the ids of each chunk, for token equality and gaps between tokens. `counts_end`: its usage counts the end
    of text (vLLM, transformers serve), which is taken off here: nobody reads it."""

    include_usage: bool = True
    token_ids: bool = True
    counts_end: bool = False
    api: Api = "chat"


@dataclass
class Answer:
    """What came of a call. Times are seconds since `sent` (time.perf_counter).

    first: first content (text, token ids or a tool call; a role alone is none). last: last content. end: last byte.
    call_at: the first complete tool call. completion_tokens: None until somebody counts them; tokens_source says who.
    vendor: the `dfastllm` figures. error: kind of failure: connect, disconnected, timeout, http_<status>, refused (400,
    404, 422: the server understood and said no), not_sse, malformed, truncated, server_error. message: in words.
    """

    sent: float
    first: float | None = None
    last: float | None = None
    end: float | None = None
    call_at: float | None = None
    chunks: list[Chunk] = field(default_factory=list)
    text: str = ""
    token_ids: list[int] | None = None
    tool_calls: list[dict[str, str]] = field(default_factory=list)
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    tokens_source: Literal["usage", "tokenize", "estimate", "none"] = "none"
    vendor: dict[str, Any] | None = None
    error: str | None = None
    message: str | None = None

    @property
    def ok(self) -> bool:
        return self.error is None

    @property
    def e2e(self) -> float | None:
        """Seconds from the send to the last byte."""
        return self.end if self.ok else None

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first: (e2e - ttft) / (n - 1). None for fewer than two tokens."""
        n = self.completion_tokens
        if not self.ok or self.end is None or self.first is None or n is None or n < 2:
            return None
        return (self.end - self.first) / (n - 1)

    @property
    def graded(self) -> str:
        """The answer as graders read it: tool calls in the task mix's text form after the content."""
        if not self.tool_calls:
            return self.text
        calls = [f'{{"name": {json.dumps(c["name"])}, "arguments": {c["arguments"]}}}' for c in self.tool_calls]
        return self.text + "".join(f"<tool_call>{call}</tool_call>" for call in calls)


class Client:
    """Sends calls to one server. `base`: its root, without /v1. Close it with `aclose`.

    timeout: seconds a request may take in all. Everything that is counted of the client's own cost is in `chunks`.
    """

    def __init__(
        self,
        base: str,
        model: str,
        *,
        api_key: str | None = None,
        timeout: float = 120.0,
        features: Features = Features(),
    ) -> None:
        self.base = base
        self.model = model
        self.timeout = timeout
        self.features = features
        self.chunks = 0
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.http = httpx2.AsyncClient(
            headers=headers,
            timeout=httpx2.Timeout(timeout, connect=10.0, pool=None),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),
            trust_env=False,  # a proxy between client and server is not what is measured
        )

    async def aclose(self) -> None:
        await self.http.aclose()

    def body(self, call: Call) -> dict[str, Any]:
        """The request's JSON."""
        out: dict[str, Any] = {"model": self.model, "stream": True, "max_tokens": call.max_tokens}
        out["temperature"] = call.temperature
        if call.seed is not None:
            out["seed"] = call.seed
        if self.features.api == "chat":
            out["messages"] = [dict(message) for message in call.messages]
            if call.tools:
                out["tools"] = [dict(tool) for tool in call.tools]
        else:
            out["prompt"] = as_prompt(call.messages)
        if self.features.include_usage:
            out["stream_options"] = {"include_usage": True}
        if self.features.token_ids:
            out["return_token_ids"] = True
        return out | dict(call.options)

    async def ask(self, call: Call) -> Answer:
        """The answer, timed. Raises nothing for what the server does wrong."""
        path = "/v1/chat/completions" if self.features.api == "chat" else "/v1/completions"
        body = json.dumps(self.body(call)).encode()
        answer = Answer(time.perf_counter())
        try:
            async with asyncio.timeout(self.timeout):
                headers = {"Content-Type": "application/json"}
                async with self.http.stream("POST", self.base + path, content=body, headers=headers) as response:
                    await self._read(response, answer)
        except TimeoutError:
            _fail(answer, "timeout", f"No complete answer within {self.timeout:g} s.")
        except httpx2.TimeoutException as error:
            _fail(answer, "timeout", f"{type(error).__name__} after {time.perf_counter() - answer.sent:.1f} s.")
        except httpx2.ConnectError as error:
            _fail(answer, "connect", f"No connection: {error}.")
        except httpx2.SSEError as error:
            _fail(answer, "malformed", str(error))
        except httpx2.HTTPError as error:
            _fail(answer, "disconnected", f"{type(error).__name__}: {error}")
        if answer.end is None:
            answer.end = time.perf_counter() - answer.sent
        return answer

    async def _read(self, response: httpx2.Response, answer: Answer) -> None:
        if response.status_code != 200:
            message = error_message(await response.aread())
            refused = response.status_code in (400, 404, 405, 422)
            _fail(answer, "refused" if refused else f"http_{response.status_code}", message)
            return
        kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "text/event-stream":
            _fail(answer, "not_sse", f"Asked for a stream, got {kind or 'no content type'}.")
            return
        done = False
        async for event in httpx2.EventSource(response, LONGEST_EVENT):
            at = time.perf_counter() - answer.sent
            if event.data == "[DONE]":
                done = True
                break
            if not self._absorb(event.data, at, answer):
                return
        answer.end = time.perf_counter() - answer.sent
        if answer.finish_reason is None:
            # llama-cpp-python ends the stream of a request that a newer one interrupted with [DONE] and no reason.
            sent = "[DONE] but no finish_reason" if done else "no finish_reason, no [DONE]"
            _fail(answer, "truncated", f"The stream ended before the answer did: {sent}.")
        elif self.features.counts_end and answer.finish_reason in ENDED and answer.completion_tokens:
            answer.completion_tokens -= 1
        _settle(answer)

    def _absorb(self, data: str, at: float, answer: Answer) -> bool:
        """Take in one event; False when the answer has failed."""
        self.chunks += 1
        try:
            chunk = json.loads(data)
        except ValueError:
            chunk = None
        if not isinstance(chunk, dict):
            _fail(answer, "malformed", f"A stream event is no JSON object: {data[:SHOWN]!r}.")
            return False
        if chunk.get("error"):
            _fail(answer, "server_error", error_message(data.encode()))
            return False
        try:
            self._take(chunk, at, answer)
        except (TypeError, AttributeError, KeyError, ValueError, IndexError) as error:
            _fail(answer, "malformed", f"A stream event has another form than OpenAI's ({error}): {data[:SHOWN]!r}.")
            return False
        return True

    def _take(self, chunk: dict[str, Any], at: float, answer: Answer) -> None:
        usage = chunk.get("usage")
        if usage:
            answer.prompt_tokens = int(usage.get("prompt_tokens") or 0)
            answer.completion_tokens = int(usage["completion_tokens"])
            answer.tokens_source = "usage"
        if isinstance(chunk.get("dfastllm"), dict):
            answer.vendor = chunk["dfastllm"]
        for choice in chunk.get("choices") or ():
            if choice.get("index", 0) != 0:
                continue
            delta = choice.get("delta") or {}
            text = delta.get("content") or delta.get("reasoning_content") or choice.get("text") or ""
            ids = choice.get("token_ids") or delta.get("token_ids")
            calls = delta.get("tool_calls") or []
            if text or ids or calls:
                answer.first = at if answer.first is None else answer.first
                answer.last = at
                answer.chunks.append(Chunk(at, len(text), len(ids) if ids else None))
            answer.text += text
            if ids:
                answer.token_ids = answer.token_ids if answer.token_ids is not None else []
                answer.token_ids += ids
            for call in calls:
                _add_call(answer, call, at)
            answer.finish_reason = choice.get("finish_reason") or answer.finish_reason


def _settle(answer: Answer) -> None:
    """Chunks that told no ids had none where the others' are all of the answer's tokens: a call's beginning, which is
    sent beside the token that told it."""
    if sum(chunk.tokens or 0 for chunk in answer.chunks) == answer.completion_tokens:
        answer.chunks = [replace(chunk, tokens=chunk.tokens or 0) for chunk in answer.chunks]


def _add_call(answer: Answer, call: Mapping[str, Any], at: float) -> None:
    """A tool call may come in pieces: the name first, then its arguments."""
    index = int(call.get("index") or 0)
    while len(answer.tool_calls) <= index:
        answer.tool_calls.append({"name": "", "arguments": ""})
    function = call.get("function") or {}
    into = answer.tool_calls[index]
    into["name"] += function.get("name") or ""
    into["arguments"] += function.get("arguments") or ""
    if answer.call_at is None and into["name"]:
        try:
            json.loads(into["arguments"])
        except ValueError:
            return
        answer.call_at = at


def _fail(answer: Answer, kind: str, message: str) -> None:
    answer.error, answer.message = kind, message
    answer.end = time.perf_counter() - answer.sent


def error_message(body: bytes) -> str:
    """A server's own words: OpenAI's error.message, FastAPI's detail, or the start of what it sent."""
    text = body.decode("utf-8", "replace")
    try:
        data = json.loads(text)
    except ValueError:
        return " ".join(text.split())[:SHOWN] or "(no message)"
    if isinstance(data, dict):
        found = data.get("error", data.get("detail", data.get("message", data)))
        if isinstance(found, dict) and "message" in found:
            found = found["message"]
        return (found if isinstance(found, str) else json.dumps(found))[:SHOWN]
    return text[:SHOWN]


def as_prompt(messages: Sequence[Mapping[str, Any]]) -> str:
    """Messages as plain text, for a server without a chat endpoint or a chat template."""
    parts = [str(message.get("content") or "") for message in messages]
    return "\n\n".join(part for part in parts if part) + "\n\n"
