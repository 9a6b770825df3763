"""The client over HTTP: the OpenAI routes of a dfastllm server and its own."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any
from urllib.parse import quote, urlsplit

import httpx

from .backoff import Backoff
from .calls import AsyncCalls
from .deadline import again, limited, within
from .errors import (
    ClientError,
    ConnectionFailedError,
    ConnectionLostError,
    InvalidRequestError,
    NotFoundError,
    ProtocolError,
    Received,
    of_response,
)
from .options import GenerationOptions, http_body, packed
from .reading import AnswerReader, PipelineReader, health, of_answer, openapi_metadata
from .results import GenerationResult, HealthStatus, PipelineEvent, PipelineResult, RuntimeMetadata, TokenData
from .sse import EventReader
from .streams import End

__all__ = ["AsyncClient"]

_NEVER_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)


class AsyncClient(AsyncCalls):
    """Calls over HTTP. `async with AsyncClient(url) as client`, or `await client.aclose()` at the end.

    url: of the server, with or without /v1.
    api_key: sent as `Authorization: Bearer`.
    model: what calls run on that name none.
    timeout: seconds that a call without a limit of its own may take; None: no limit.
    connect_timeout: seconds to open a connection in, and to write a request in.
    backoff: when what was not run is tried again.
    transport: of httpx, for tests and for unusual ways to the server.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        api_key: str | None = None,
        model: str | None = None,
        *,
        timeout: float | None = 300.0,
        connect_timeout: float = 10.0,
        backoff: Backoff | None = None,
        headers: Mapping[str, str] | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        super().__init__(model, timeout)
        self.url = _address(url)
        self.backoff = backoff or Backoff()
        key = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers={**key, **(headers or {})},
            timeout=httpx.Timeout(connect_timeout, read=None),
            limits=httpx.Limits(max_connections=None, keepalive_expiry=3.0),  # sooner than a server gives them up
            transport=transport,
        )

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await self._http.aclose()

    async def health(self) -> HealthStatus:
        """Of a server that loads or stops too: only one that cannot be reached raises."""
        response = await self._send("GET", "/health", None, None, repeat=True, refusals=False)
        about = await self.request("GET", "/version")
        return health(_json(response), about["version"])

    async def metadata(self) -> RuntimeMetadata:
        """The operations of the server's openapi.json."""
        return openapi_metadata(await self.request("GET", "/openapi.json"))

    async def models(self) -> Sequence[Mapping[str, Any]]:
        """The models and adapters that this key may use; an adapter's `parent` is its base."""
        return tuple((await self.request("GET", "/v1/models"))["data"])

    async def cancel(self, request_id: str) -> bool:
        try:
            await self.request("DELETE", f"/v1/requests/{quote(request_id, safe='')}")
        except NotFoundError:
            return False
        return True

    async def load_adapter(
        self, name: str, path: str, *, model: str | None = None, replace: bool = False
    ) -> Mapping[str, Any]:
        """Let the server load a LoRA adapter from a directory of its own, under its --lora-root; how it is listed then.
        model: that it is for, where several are served. replace: also where one of that name is loaded."""
        body = {"lora_name": name, "lora_path": path, "model": model, "load_inplace": replace or None}
        card: Mapping[str, Any] = await self.request("POST", "/v1/load_lora_adapter", body)
        return card

    async def unload_adapter(self, name: str, *, model: str | None = None) -> None:
        """Forget an adapter; calls that run on it end as they would have."""
        await self.request("POST", "/v1/unload_lora_adapter", {"lora_name": name, "model": model})

    async def usage(self, **filters: Any) -> Mapping[str, Any]:
        """What the tenant of this key used. filters: since, until ("24h", a date), by (["model", "adapter", "key"])."""
        given = {name: value for name, value in filters.items() if value is not None}
        answer: Mapping[str, Any] = await self.request("GET", "/v1/usage", params=given)
        return answer

    async def metrics(self) -> str:
        """Prometheus metrics, as text."""
        return (await self._send("GET", "/metrics", None, None, repeat=True)).text

    async def register_pipeline(self, pipeline: Mapping[str, Any]) -> Mapping[str, Any]:
        """Register a pipeline, {name, steps: [...]}, on the running server."""
        answer: Mapping[str, Any] = await self.request("POST", "/v1/pipelines", pipeline)
        return answer

    async def request(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        params: Mapping[str, Any] | None = None,
        request_id: str | None = None,
    ) -> Any:
        """Any route of the server; its JSON, None for an answer without. Raises ClientError."""
        sending = again(
            lambda: self._send(method, path, body, request_id, repeat=method == "GET", params=params),
            self.backoff,
            self.timeout,
        )
        response = await within(sending, self.timeout, request_id or path)
        is_json = response.headers.get("content-type", "").startswith("application/json")
        return _json(response) if is_json else None

    async def _send(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        request_id: str | None,
        *,
        repeat: bool = False,
        refusals: bool = True,
        params: Mapping[str, Any] | None = None,
    ) -> httpx.Response:
        """One request. repeat: it changes nothing, so a broken one counts as never sent. refusals: they are raised."""
        names = {} if request_id is None else {"X-Request-ID": request_id}
        self._require_open(request_id)
        try:
            response = await self._http.request(method, path, **_content(body, names), params=params)
        except _NEVER_SENT as error:
            raise _failed(self.url, error, request_id) from error
        except httpx.TransportError as error:
            raise (_failed if repeat else _lost)(self.url, error, request_id) from error
        if refusals and response.status_code >= 400:
            raise _refusal(response, request_id)
        return response

    async def _whole(self, options: GenerationOptions, id: str, limit: float | None) -> GenerationResult:
        path, body = http_body(options, stream=False)
        sending = again(lambda: self._send("POST", path, body, id), self.backoff, limit)
        return of_answer(_json(await within(sending, limit, id)), id)

    def _parts(
        self, options: GenerationOptions, id: str, limit: float | None
    ) -> AsyncGenerator[TokenData | End[GenerationResult], None]:
        path, body = http_body(options, stream=True)
        return limited(self._tokens(path, body, id, limit), limit, id)

    async def _tokens(
        self, path: str, body: Mapping[str, Any], id: str, limit: float | None
    ) -> AsyncGenerator[TokenData | End[GenerationResult], None]:
        reader = AnswerReader(id)
        async with aclosing(self._events(path, body, id, limit)) as events:
            async for chunk in events:
                if (piece := reader.chunk(chunk)) is not None:
                    yield piece
        yield End(reader.ended())

    def _steps(
        self, name: str, input: Any, id: str, limit: float | None
    ) -> AsyncGenerator[PipelineEvent | End[PipelineResult], None]:
        path = f"/v1/pipelines/{quote(name, safe='')}/run"
        return limited(self._pipeline(path, {"input": input, "stream": True}, id, limit), limit, id)

    async def _pipeline(
        self, path: str, body: Mapping[str, Any], id: str, limit: float | None
    ) -> AsyncGenerator[PipelineEvent | End[PipelineResult], None]:
        reader = PipelineReader(id)
        async with aclosing(self._events(path, body, id, limit)) as events:
            async for event in events:
                ends = event.get("type") == "done"
                yield End(reader.ended(event)) if ends else reader.event(event)

    async def _events(
        self, path: str, body: Mapping[str, Any], id: str, limit: float | None
    ) -> AsyncGenerator[Mapping[str, Any], None]:
        """The events of a stream. Only its opening is tried again: what began is never sent twice."""
        response = await again(lambda: self._open(path, body, id), self.backoff, limit)
        reader = EventReader()
        try:
            async for data in response.aiter_bytes():
                for event in reader.feed(data):
                    yield event
                if reader.done:
                    return
        except httpx.TransportError as error:
            raise _lost(self.url, error, id) from error
        finally:
            await response.aclose()
        raise _lost(self.url, None, id)

    async def _open(self, path: str, body: Mapping[str, Any], id: str) -> httpx.Response:
        self._require_open(id)
        request = self._http.build_request("POST", path, **_content(body, {"X-Request-ID": id}))
        try:
            response = await self._http.send(request, stream=True)
            if response.status_code >= 400:
                await response.aread()
                raise _refusal(response, id)
        except _NEVER_SENT as error:
            raise _failed(self.url, error, id) from error
        except httpx.TransportError as error:
            raise _lost(self.url, error, id) from error
        return response

    def _require_open(self, id: str | None) -> None:
        if self._http.is_closed:
            raise ConnectionFailedError("This client is closed; make another. Nothing was sent.", request_id=id)


def _address(url: str) -> str:
    """A server's address, without /v1. Raises InvalidRequestError."""
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, half an IPv6 address
        known = False
    if not known:
        raise InvalidRequestError(f"The url of a server is like http://host:8000, got {url!r}.", param="url")
    return url.rstrip("/").removesuffix("/v1")


def _content(body: Mapping[str, Any] | None, headers: dict[str, str]) -> dict[str, Any]:
    """What httpx takes for a body and its headers. Raises InvalidRequestError."""
    if body is None:
        return {"headers": headers}
    return {"content": packed(body).encode(), "headers": {**headers, "Content-Type": "application/json"}}


def _failed(url: str, error: Exception, id: str | None) -> ClientError:
    why = str(error) or type(error).__name__
    return ConnectionFailedError(f"No connection to {url}: {why}. The call was not sent.", request_id=id)


def _lost(url: str, error: Exception | None, id: str | None) -> ClientError:
    why = (str(error) or type(error).__name__) if error else "the answer stopped before its end"
    return ConnectionLostError(
        f"The connection to {url} broke: {why}. The call was sent and is not sent again: it may have run.",
        request_id=id,
        received=Received(request_id=id),
    )


def _json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError as error:
        raise ProtocolError(f"{response.request.url} gave no JSON: {response.text[:200]!r}") from error


def _refusal(response: httpx.Response, id: str | None) -> ClientError:
    try:
        body = response.json()
    except ValueError:
        body = response.text
    headers = {name.lower(): value for name, value in response.headers.items()}
    return of_response(response.status_code, body, headers, id)
