"""Before anything is timed: which servers answer, what the one to be measured can do, which request fields it honours.

A server that takes an unknown field without a word would make two configurations the same and neither known. So every
field that a configuration uses is also sent once with a value nobody can mean (`CANARY`): a server that answers that
as if nothing were wrong ignores the field.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

import httpx2

from dfastllm.bench.suite.client import Answer, Call, Client, Features, error_message
from dfastllm.bench.suite.schema import ServerStatus, Target
from dfastllm.errors import ValidationError

__all__ = ["CANARY", "DEFAULT_SERVERS", "Fields", "connect", "normalise", "probe", "probe_all"]

DEFAULT_SERVERS: Mapping[str, str] = {
    "dfastllm or vLLM": "http://127.0.0.1:8000",
    "LM Studio": "http://127.0.0.1:1234",
    "Ollama or MLX": "http://127.0.0.1:11434",
    "llama-server": "http://127.0.0.1:8080",
}
# what the first model's `owned_by` says
OWNERS = {
    "dfastllm": "dfastllm",
    "vllm": "vLLM",
    "llamacpp": "llama.cpp",
    "library": "Ollama",
    "organization_owner": "LM Studio",
    "me": "llama-cpp-python",
}
CANARY = {"dfastllm_bench": "no server means this"}
SMALL = Call(({"role": "user", "content": "Say hello."},), max_tokens=8)

ENDING = tuple(Call(({"role": "user", "content": ask},), max_tokens=64) for ask in ("What is 12 + 30?", "Say yes."))

Honoured = Literal["yes", "no", "ignored"]


def normalise(url: str) -> str:
    """The server's root: a scheme where there is none, no /v1, no slash at the end. Raises ValidationError."""
    text = url.strip()
    text = (text if "://" in text else f"http://{text}").rstrip("/")
    try:
        parts = urlsplit(text)
        port_ok = parts.port is None or 0 < parts.port < 65536
    except ValueError as error:
        raise ValidationError(f"{url!r} is no URL: {error}.", param="url") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_ok or parts.query or parts.fragment:
        raise ValidationError(
            f"{url!r} is no URL of a server.", param="url", hint="Give one like http://127.0.0.1:8000."
        )
    return text.removesuffix("/v1").rstrip("/")


async def probe_all(urls: Mapping[str, str], api_key: str | None = None, timeout: float = 3.0) -> list[ServerStatus]:
    """Every server's status, asked at once."""
    return list(await asyncio.gather(*(probe(name, url, api_key, timeout) for name, url in urls.items())))


async def probe(name: str, url: str, api_key: str | None = None, timeout: float = 3.0) -> ServerStatus:
    """Whether an OpenAI-compatible server answers there; the reason when not."""

    def status(word: str, message: str, **rest: Any) -> ServerStatus:
        return ServerStatus(name=name, url=url, status=word, message=message, **rest)  # type: ignore[arg-type]

    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        async with httpx2.AsyncClient(timeout=timeout, headers=headers, trust_env=False) as http:
            response = await http.get(f"{url}/v1/models")
            seconds = []
            if response.status_code == 200:
                for _ in range(3):
                    began = time.perf_counter()
                    await http.get(f"{url}/v1/models")
                    seconds.append(time.perf_counter() - began)
    except httpx2.TimeoutException:
        return status("timeout", f"No answer within {timeout:g} s.")
    except httpx2.ConnectError as error:
        refused = "refused" in str(error).lower() or "111" in str(error) or "connection attempts failed" in str(error)
        return status("refused", f"Nothing listens there ({error})." if refused else f"No connection: {error}.")
    except httpx2.ProtocolError as error:
        return status("not_http", f"Something listens there that does not speak HTTP ({error}).")
    except httpx2.HTTPError as error:
        return status("error", f"{type(error).__name__}: {error}.")
    code = response.status_code
    if code in (401, 403):
        return status("unauthorised", "It wants an API key (--api-key).")
    if code == 503:
        return status("loading", f"It says 503: {error_message(response.content)}")
    try:
        rows = response.json()["data"] if code == 200 else None
        models = tuple(str(row["id"]) for row in rows) if rows is not None else None
    except (ValueError, KeyError, TypeError):
        models = None
    if models is None:
        return status("not_openai", f"GET /v1/models gives {code} and no list of models.")
    owner = str(rows[0].get("owned_by", "")) if rows else ""
    latency = statistics.median(seconds) * 1e3
    software = OWNERS.get(owner, owner) or None
    return status("running", "running", models=models, latency_ms=latency, software=software)


class _Attempt(NamedTuple):
    features: Features
    without: str  # what is given up


ATTEMPTS = (
    _Attempt(Features(), ""),
    _Attempt(Features(token_ids=False), "return_token_ids"),
    _Attempt(Features(include_usage=False, token_ids=False), "return_token_ids and stream_options"),
    _Attempt(Features(api="completions"), "chat completions"),
    _Attempt(Features(token_ids=False, api="completions"), "chat completions and return_token_ids"),
    _Attempt(
        Features(include_usage=False, token_ids=False, api="completions"),
        "chat completions, return_token_ids and stream_options",
    ),
)


async def connect(
    status: ServerStatus, model: str | None, *, api_key: str | None = None, timeout: float = 120.0
) -> tuple[Client, Target]:
    """A client for this server with what it can do, found by asking once. Raises ValidationError for a model it does
    not list, and when no form of request is answered (with its words)."""
    chosen = _pick_model(status, model)
    client = Client(status.url, chosen, api_key=api_key, timeout=timeout)
    fallbacks: list[str] = []
    answer: Answer | None = None
    for features, without in ATTEMPTS:
        client.features = features
        answer = await client.ask(SMALL)
        if answer.ok:
            if without:
                fallbacks.append(f"asked without {without}: the server refuses it")
            break
        if answer.error not in ("refused", "not_sse", "http_500", "http_501"):
            break
    assert answer is not None
    if not answer.ok:
        await client.aclose()
        raise ValidationError(
            f"{status.url} does not answer a small request to {chosen!r}: {answer.error}: {answer.message}", param="url"
        )
    if answer.tokens_source != "usage":
        fallbacks.append("the server sends no usage with a stream")
    if await _counts_end(client):
        client.features = replace(client.features, counts_end=True)
        fallbacks.append("its usage counts the end of text as a token: taken off here")
    if client.features.token_ids and answer.token_ids is None:
        fallbacks.append("the server gives no token ids: answers are compared as text, gaps between tokens are unknown")
    target = Target(
        url=status.url,
        model=chosen,
        kind=await _kind(client),
        software=await _software(client, status.software),
        api=client.features.api,
        fallbacks=tuple(fallbacks),
    )
    return client, target


async def _counts_end(client: Client) -> bool:
    """Whether completion_tokens holds one token more than came, in every answer that ended by itself. Needs two such
    answers; chunks of several tokens whose ids are not told prove nothing, and count as no."""
    answers = [await client.ask(call) for call in ENDING]
    ended = [
        a for a in answers if a.ok and a.finish_reason == "stop" and a.tokens_source == "usage" and not a.tool_calls
    ]
    return len(ended) == len(ENDING) and all(a.completion_tokens == _came(a) + 1 for a in ended)


def _came(answer: Answer) -> int:
    """Tokens with content. An id that comes without a character at the very end is the end of text."""
    known = sum(1 if chunk.tokens is None else chunk.tokens for chunk in answer.chunks)
    last = answer.chunks[-1] if answer.chunks else None
    return known - 1 if last is not None and last.tokens == 1 and not last.characters else known


def _pick_model(status: ServerStatus, model: str | None) -> str:
    if model is None:
        if not status.models:
            raise ValidationError(f"{status.url} lists no model.", param="model", hint="Load one there.")
        return status.models[0]
    if status.models and model not in status.models:
        raise ValidationError(
            f"{status.url} has no model {model!r}; it lists {', '.join(status.models)}.", param="model"
        )
    return model


async def _kind(client: Client) -> str | None:
    """ar, diffusion or block, where the model list tells (dfastllm does)."""
    try:
        rows = (await client.http.get(f"{client.base}/v1/models")).json()["data"]
        kind = next((row.get("kind") for row in rows if row.get("id") == client.model), None)
    except (httpx2.HTTPError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return kind if isinstance(kind, str) else None


async def _software(client: Client, name: str | None) -> str | None:
    """With its version, where GET /version tells it (dfastllm, vLLM)."""
    try:
        version = (await client.http.get(f"{client.base}/version")).json()["version"]
    except (httpx2.HTTPError, ValueError, KeyError, TypeError):
        return name
    return f"{name or 'unknown'} {version}" if isinstance(version, str) else name


class Fields:
    """Which request fields beyond OpenAI's the server honours; each is asked about once."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.found: dict[str, Honoured] = {}

    async def refusal(self, options: Mapping[str, Any]) -> str | None:
        """Why a configuration with these fields cannot be measured here; None when it can."""
        if not options:
            return None
        answer = await self.client.ask(_small(options))
        if not answer.ok:
            if answer.error == "refused":
                self.found |= {name: "no" for name in options if name not in self.found}
            return answer.message or str(answer.error)
        return await self._ignored(options)

    async def _ignored(self, names: Iterable[str]) -> str | None:
        for name in names:
            if self.found.get(name) != "yes":
                canary = await self.client.ask(_small({name: CANARY}))
                self.found[name] = "ignored" if canary.ok else "yes"
            if self.found[name] == "ignored":
                return f"The server ignores {name}: it answers whatever stands in it."
        return None


def _small(options: Mapping[str, Any]) -> Call:
    return Call(SMALL.messages, max_tokens=SMALL.max_tokens, options=options)
