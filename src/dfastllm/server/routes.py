"""Every route but the two that generate: models, health, metrics, tokens, cancelling, documentation."""

from __future__ import annotations

import asyncio
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

from fastapi import Request
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response

from dfastllm.errors import MalformedRequestError, ValidationError
from dfastllm.server.access import identity_of, require_names
from dfastllm.server.docs import docs_page
from dfastllm.server.jobs import while_connected
from dfastllm.server.prompts import chat_ids, encode
from dfastllm.server.refusals import error_response
from dfastllm.server.replies import (
    AdapterGone,
    Cancelled,
    Health,
    ModelCard,
    ModelList,
    Out,
    Text,
    Tokens,
    Versions,
    dump,
)
from dfastllm.server.schemas import DetokenizeRequest, LoadLoraRequest, TokenizeRequest, UnloadLoraRequest
from dfastllm.server.serving import Phase, ServedModel, Serving

if TYPE_CHECKING:
    from dfastllm.engine.adapters import Named

__all__ = [
    "cancel_request",
    "detokenize",
    "docs",
    "health",
    "home",
    "live",
    "load_lora_adapter",
    "metrics",
    "model_card",
    "models",
    "openapi",
    "ready",
    "tokenize",
    "unload_lora_adapter",
    "upgrade",
    "version_info",
]


def _serving(request: Request) -> Serving:
    serving: Serving = request.app.state.serving
    return serving


def _reply(body: Out, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(dump(body), status, headers, media_type="application/json")


def _card(model: ServedModel) -> ModelCard:
    return ModelCard(
        id=model.name,
        created=model.created,
        root=model.info.name,
        max_model_len=model.context,
        family=model.info.family,
        kind=model.info.kind,
    )


def _adapter_card(name: str, model: ServedModel, named: Named) -> ModelCard:
    card = _card(model)
    return card.model_copy(update={"id": name, "created": named.created, "root": str(named.path), "parent": model.name})


async def models(request: Request) -> Response:
    """Every model that this key may use, and then every LoRA adapter of one."""
    serving = _serving(request)
    serving.require_ready()
    identity = identity_of(request)
    cards = [_card(model) for model in serving.seen_by(identity).values()]
    seen = serving.adapters_seen_by(identity)
    adapters = [_adapter_card(name, serving.models[model], named) for name, model, named in seen]
    return _reply(ModelList(data=[*cards, *adapters]))


async def model_card(model_id: str, request: Request) -> Response:
    """One model, or one adapter."""
    serving = _serving(request)
    model = serving.model(identity_of(request), model_id)
    if not model.lora:
        return _reply(_card(model))
    named = next(each for _, of, each in serving.shelf.named() if (of, each.name) == (model.name, model.lora))
    return _reply(_adapter_card(model_id, model, named))


async def load_lora_adapter(body: LoadLoraRequest, request: Request) -> Response:
    """Load a LoRA adapter while the server runs."""
    serving, actor = _changing_adapters(request, body)
    how = {"replace": bool(body.load_inplace)}
    load = asyncio.to_thread(serving.shelf.load, body.lora_name, body.lora_path, body.model, **how)
    model, named = await load
    await _audit(serving, actor, "adapter.load", body.lora_name, {"model": model, "hash": named.hash.hex()})
    return _reply(_adapter_card(body.lora_name, serving.models[model], named))


async def unload_lora_adapter(body: UnloadLoraRequest, request: Request) -> Response:
    """Forget a LoRA adapter; requests that run on it end as they would have."""
    serving, actor = _changing_adapters(request, body)
    model = await asyncio.to_thread(serving.shelf.unload, body.lora_name, body.model)
    await _audit(serving, actor, "adapter.unload", body.lora_name, {"model": model})
    return _reply(AdapterGone(id=body.lora_name, parent=model))


def _changing_adapters(request: Request, body: LoadLoraRequest | UnloadLoraRequest) -> tuple[Serving, str]:
    """The server's, and the actor's name for the audit log. Raises ForbiddenError for names that are not the key's."""
    serving = _serving(request)
    serving.require_ready()
    identity = identity_of(request)
    require_names(identity, body.lora_name, body.model)
    return serving, f"key:{identity.key.id}"


async def _audit(serving: Serving, actor: str, action: str, target: str, detail: Mapping[str, str]) -> None:
    if serving.tenants is not None:
        await asyncio.to_thread(serving.tenants.audit, actor, action, target, detail)


async def live(request: Request) -> Response:
    """200 while the process does its work, loading included; 503 when the engine's thread has died."""
    phase = _serving(request).phase
    return _phase(phase, wait=phase == "failed")


async def ready(request: Request) -> Response:
    """200 when requests are taken; 503 while loading, shutting down or failed."""
    serving = _serving(request)
    phase = serving.phase
    if phase == "ready":
        if serving.tenants is not None:
            return _reply(Health(status=phase))  # nobody proves who they are here, and a tenant may not know of all
        return _reply(Health(status=phase, models=list(serving.models)))
    return _phase(phase, wait=True)


def _phase(phase: Phase, *, wait: bool) -> Response:
    return _reply(Health(status=phase), 503, {"Retry-After": "1"}) if wait else _reply(Health(status=phase))


health = ready


async def version_info() -> Response:
    """Versions of the server and of what it runs on."""
    return _reply(Versions(version=version("dfastllm"), torch=version("torch"), python=platform.python_version()))


async def metrics(request: Request) -> Response:
    """Prometheus metrics."""
    body, content_type = _serving(request).metrics.render(request.headers.get("accept", ""))
    return Response(body, headers={"Content-Type": content_type})


async def cancel_request(request_id: str, request: Request) -> Response:
    """Cancel what runs under a response id or an X-Request-ID; the request itself ends with the error `cancelled`."""
    return _reply(Cancelled(id=request_id, cancelled=_serving(request).cancel(identity_of(request), request_id)))


async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """Token ids of a prompt, or of messages as the chat template writes them."""
    serving = _serving(request)
    model, most = serving.model(identity_of(request), body.model), serving.settings.max_tokenize_length
    if (body.prompt is None) == (body.messages is None):
        raise ValidationError("Send either prompt or messages.", param="prompt")
    if body.messages is not None:
        encoding = chat_ids(model, body, body.messages, body.tools, most)
    else:
        how = {"add_special": body.add_special_tokens is not False, "parse_special": body.parse_special is not False}
        encoding = encode(model, body.prompt or "", param="prompt", most=most, **how)
    ids = await while_connected(request, encoding)
    return await serving.readers.run(len(ids), _tokens, model, ids, bool(body.return_token_strs))


def _tokens(model: ServedModel, ids: Sequence[int], spelled: bool) -> Response:
    tokens = Tokens(count=len(ids), max_model_len=model.context, tokens=list(ids))
    if spelled:
        tokens.token_strs = [model.tokenizer.id_to_token(token) for token in ids]
    return _reply(tokens)


async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    """The text of token ids, special tokens included."""
    serving = _serving(request)
    model, most = serving.model(identity_of(request), body.model), serving.settings.max_tokenize_length
    if len(body.tokens) > most:
        raise ValidationError(f"tokens has {len(body.tokens):,} ids; {most:,} are taken.", param="tokens")
    bad = next((token for token in body.tokens if not 0 <= token < model.info.vocab_size), None)
    if bad is not None:
        raise ValidationError(
            f"tokens holds the id {bad}; {model.name!r} has ids 0 to {model.info.vocab_size - 1}.", param="tokens"
        )
    text = await serving.readers.run(len(body.tokens), model.tokenizer.decode, body.tokens, skip_special=False)
    return _reply(Text(prompt=text))


async def upgrade() -> Response:
    """What /ws says to who asks without an upgrade."""
    error = MalformedRequestError("/ws speaks WebSocket.", hint="See docs/websocket.md.")
    error.status = 426
    response = error_response(error)
    response.headers["Upgrade"] = "websocket"
    response.headers["Connection"] = "Upgrade"
    return response


async def home() -> RedirectResponse:
    """The documentation, until there is a page."""
    return RedirectResponse("docs")


async def openapi(request: Request) -> JSONResponse:
    """The OpenAPI description."""
    return JSONResponse(request.app.openapi())


async def docs(request: Request) -> HTMLResponse:
    """The OpenAPI description as a page that needs no network and no script."""
    return HTMLResponse(docs_page(request.app.openapi()))
