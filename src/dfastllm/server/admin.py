"""The admin API, /admin/v1: tenants, their keys, what they used, who changed what; and /v1/usage, a tenant's own.

`access` asks for the scope `admin` (`usage` for /v1/usage) before a route is reached. The database works on a thread,
not on the event loop, and so do lists of any length: ten thousand keys would hold every stream up for a quarter of a
second. A key's text is in one answer only, that of its making, which no cache may keep.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from fastapi import Query, Request
from fastapi.responses import Response
from pydantic import Field

from dfastllm.errors import NotReadyError
from dfastllm.server.access import identity_of
from dfastllm.server.body import Body
from dfastllm.server.replies import Out, dump
from dfastllm.server.serving import Serving
from dfastllm.tenants import Identity, Key, Tenant

if TYPE_CHECKING:
    from dfastllm.tenants.store import Store

__all__ = [
    "AuditLine",
    "AuditList",
    "KeyCard",
    "KeyList",
    "NewKey",
    "NewKeyCard",
    "NewTenant",
    "RotateKey",
    "TenantCard",
    "TenantChange",
    "TenantList",
    "UsageLine",
    "UsageList",
    "audit",
    "create_key",
    "create_tenant",
    "disable_key",
    "keys",
    "own_usage",
    "rotate_key",
    "set_tenant",
    "tenant_card",
    "tenants",
    "usage",
]

T = TypeVar("T")
Scope = Literal["generate", "adapters", "pipelines", "metrics", "usage", "admin"]
_Names = Annotated[list[Annotated[str, Field(min_length=1, max_length=256)]], Field(fail_fast=True, max_length=1024)]
_Scopes = Annotated[list[Scope], Field(min_length=1, max_length=6)]
_Limit = Annotated[int, Field(ge=1, le=10**9)]
_Time = Annotated[int, Field(ge=0, lt=1 << 53)]
_Asked = Annotated[str | None, Query(max_length=80)]
_By = Annotated[list[Literal["tenant", "model", "adapter", "key"]] | None, Query(max_length=4)]


class _TenantFields(Body):
    """null is absence, as everywhere; a word lifts a limit."""

    weight: Annotated[float, Field(ge=0.01, le=100)] | None = Field(
        None, description="Share of the engine against other tenants: 2 gets twice what 1 gets. Default 1."
    )
    requests_per_minute: _Limit | Literal["none"] | None = Field(None, description="Requests in any 60 seconds.")
    tokens_per_minute: _Limit | Literal["none"] | None = Field(
        None, description="Tokens, prompts included, in any 60 seconds."
    )
    max_concurrent: _Limit | Literal["none"] | None = Field(None, description="Requests at once.")
    priority_min: Annotated[int, Field(ge=-(1 << 31), lt=1 << 31)] | None = Field(
        None, description="Lowest number that a request's priority may have; lower runs first. Default 0."
    )
    models: _Names | Literal["all"] | None = Field(None, description="Models it may use. Default: all.")
    adapters: _Names | Literal["all"] | None = Field(None, description="LoRA adapters it may use. Default: all.")

    def given(self) -> dict[str, Any]:
        """The fields that were sent, as the store takes them."""
        sent = self.model_dump(exclude_unset=True)
        return {name: None if value in ("none", "all") and name != "name" else value for name, value in sent.items()}


class NewTenant(_TenantFields):
    name: str = Field(max_length=64, description="Letters, digits, '.', '_' and '-'; unique.")

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"name": "acme", "requests_per_minute": 60},)


class TenantChange(_TenantFields):
    name: Annotated[str, Field(max_length=64)] | None = Field(None, description="Its new name.")
    disabled: bool | None = Field(None, description="Whether all its keys are refused.")

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"tokens_per_minute": "none"},)


class NewKey(Body):
    tenant: str = Field(max_length=64, description="Name or id.")
    scopes: _Scopes | None = Field(None, description="What it may do. Default: generate.")
    models: _Names | None = Field(None, description="Models it may use. Default: those of its tenant.")
    adapters: _Names | None = Field(None, description="LoRA adapters it may use. Default: those of its tenant.")
    expires: _Time | None = Field(None, description="Seconds since 1970. Default: never.")
    note: Annotated[str, Field(max_length=200)] | None = Field(None, description="What it is for.")

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"tenant": "acme", "scopes": ["generate", "usage"]},)


class RotateKey(Body):
    grace: Annotated[int, Field(ge=0, le=366 * 86400)] | None = Field(
        None, description="Seconds that the old key goes on. Default 0."
    )

    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"grace": 3600},)


class TenantCard(Out):
    object: Literal["tenant"] = "tenant"
    id: str
    name: str
    weight: float
    requests_per_minute: int | None = Field(description="null: no limit, here and below.")
    tokens_per_minute: int | None
    max_concurrent: int | None
    priority_min: int
    models: list[str] | None = Field(description="null: all.")
    adapters: list[str] | None = Field(description="null: all.")
    disabled: bool


class TenantList(Out):
    object: Literal["list"] = "list"
    data: list[TenantCard]


class KeyCard(Out):
    object: Literal["key"] = "key"
    id: str = Field(description="The middle part of the key's text.")
    tenant_id: str
    scopes: list[Scope]
    models: list[str] | None = Field(description="null: those of its tenant.")
    adapters: list[str] | None = Field(description="null: those of its tenant.")
    created: int = Field(description="Seconds since 1970.")
    expires: int | None = Field(description="Seconds since 1970; null: never.")
    disabled: bool
    note: str


class NewKeyCard(KeyCard):
    key: str = Field(description="The key itself, in this answer only.")


class KeyList(Out):
    object: Literal["list"] = "list"
    data: list[KeyCard]


class UsageLine(Out):
    tenant: str | None = Field(None, description="Where the sums are by tenant, as the others are.")
    model: str | None = None
    adapter: str | None = Field(None, description='"" for none.')
    key: str | None = None
    requests: int = Field(description="All; those that still run, or ended with their server, are in no other count.")
    ok: int
    cancelled: int
    failed: int
    prompt_tokens: int
    completion_tokens: int
    seconds: float = Field(description="From beginning to end, summed up.")


class UsageList(Out):
    object: Literal["list"] = "list"
    since: int | None = Field(description="Seconds since 1970; null: from the beginning.")
    until: int | None = Field(description="Seconds since 1970; null: up to now.")
    data: list[UsageLine]


class AuditLine(Out):
    at: int = Field(description="Seconds since 1970.")
    actor: str = Field(description="key:ID, or cli:USER.")
    action: str
    target: str = Field(description="Id of what was changed.")
    detail: str = Field(description="What was set, as JSON.")


class AuditList(Out):
    object: Literal["list"] = "list"
    data: list[AuditLine] = Field(description="Newest first.")


async def tenants(request: Request) -> Response:
    """Every tenant, by name."""
    store, _ = _admin(request)
    return await _run(lambda: _reply(TenantList(data=[_tenant_card(tenant) for tenant in store.tenants()])))


async def create_tenant(body: NewTenant, request: Request) -> Response:
    """Make a tenant. It has no key yet."""
    store, actor = _admin(request)
    return _reply(_tenant_card(await _run(store.create_tenant, actor=actor, **body.given())))


async def tenant_card(tenant: str, request: Request) -> Response:
    """One tenant, by name or id."""
    store, _ = _admin(request)
    return _reply(_tenant_card(await _run(store.tenant, tenant)))


async def set_tenant(body: TenantChange, request: Request, tenant: str) -> Response:
    """Change the fields that are sent; the rest stays."""
    store, actor = _admin(request)
    return _reply(_tenant_card(await _run(store.set_tenant, tenant, actor=actor, **body.given())))


async def keys(request: Request, tenant: _Asked = None) -> Response:
    """Keys without their secrets, of all tenants or of one."""
    store, _ = _admin(request)
    return await _run(lambda: _reply(KeyList(data=[_key_card(key) for key in store.keys(tenant)])))


async def create_key(body: NewKey, request: Request) -> Response:
    """Make a key. This answer alone shows it."""
    store, actor = _admin(request)
    fields = body.model_dump(exclude_unset=True)
    return _shown_once(*await _run(store.create_key, fields.pop("tenant"), actor=actor, **fields))


async def rotate_key(body: RotateKey, request: Request, key: str) -> Response:
    """Make a key that may do what this one may, and end this one. This answer alone shows the new one."""
    store, actor = _admin(request)
    return _shown_once(*await _run(store.rotate_key, key, actor=actor, grace=float(body.grace or 0)))


async def disable_key(key: str, request: Request) -> Response:
    """Refuse a key for ever: here at once, on other servers of this database within 5 seconds."""
    store, actor = _admin(request)
    return _reply(_key_card(await _run(store.disable_key, key, actor=actor)))


async def usage(
    request: Request,
    since: _Asked = None,
    until: _Asked = None,
    by: _By = None,
    tenant: _Asked = None,
) -> Response:
    """What was used: since and until are spans (24h, 7d), dates or times (UTC); by: tenant, model, adapter, key."""
    store, _ = _admin(request)
    whose = None if tenant is None else (await _run(store.tenant, tenant)).id
    return await _usage(store, since, until, by or ["tenant"], whose)


async def own_usage(
    request: Request,
    since: _Asked = None,
    until: _Asked = None,
    by: _By = None,
) -> Response:
    """What the tenant of this key used: the same questions as /admin/v1/usage."""
    store, identity = _identity(request)
    return await _usage(store, since, until, by or ["model"], identity.tenant.id)


async def audit(request: Request, limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> Response:
    """The newest lines of the audit log."""
    from dfastllm.tenants.records import audit_record

    store, _ = _admin(request)
    rows = await _run(store.audited, limit)
    return _reply(AuditList(data=[AuditLine(**audit_record(row)) for row in rows]))


async def _usage(
    store: Store, since: str | None, until: str | None, by: Sequence[str], tenant_id: str | None
) -> Response:
    from dfastllm.tenants.records import usage_record
    from dfastllm.tenants.usage import moment, used

    now = time.time()
    begin, end = (
        None if text is None else moment(text, now, name) for name, text in (("since", since), ("until", until))
    )

    def summed() -> Response:
        rows = used(store.database, since=begin, until=end, by=by, tenant_id=tenant_id)
        lines = [UsageLine(**usage_record(row, by)) for row in rows]
        return _reply(UsageList(since=_whole(begin), until=_whole(end), data=lines))

    return await _run(summed)


def _identity(request: Request) -> tuple[Store, Identity]:
    """The store and who asks. Raises AuthenticationError where nobody proved who they are."""
    serving: Serving = request.app.state.serving
    identity = identity_of(request)
    if serving.tenants is None:
        raise NotReadyError("The database of tenants is not open yet.")
    return serving.tenants, identity


def _admin(request: Request) -> tuple[Store, str]:
    """The store and the actor's name for the audit log."""
    store, identity = _identity(request)
    return store, f"key:{identity.key.id}"


async def _run(work: Callable[..., T], *arguments: Any, **options: Any) -> T:
    return await asyncio.to_thread(work, *arguments, **options)


def _whole(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds)


def _tenant_card(tenant: Tenant) -> TenantCard:
    from dfastllm.tenants.records import tenant_record

    return TenantCard(**tenant_record(tenant))


def _key_card(key: Key) -> KeyCard:
    from dfastllm.tenants.records import key_record

    return KeyCard(**key_record(key))


def _shown_once(key: Key, text: str) -> Response:
    from dfastllm.tenants.records import key_record

    return _reply(NewKeyCard(**key_record(key), key=text), {"Cache-Control": "no-store"})


def _reply(body: Out, headers: Mapping[str, str] | None = None) -> Response:
    return Response(dump(body), headers=dict(headers or {}), media_type="application/json")
