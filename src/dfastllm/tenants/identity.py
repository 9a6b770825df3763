"""Who asks: a tenant, one of its keys, and what both together allow. Values only: no database, no clock, no HTTP.

A request reaches the engine with an `Identity`. A server without a database of tenants serves `ANYONE`, or, to who
carries its one API key, `OWNER`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from dfastllm.errors import ForbiddenError, ValidationError

__all__ = ["ANYONE", "OWNER", "SCOPES", "Identity", "Key", "Tenant"]

# scope -> what a key with it may do.
SCOPES: dict[str, str] = {
    "generate": "completions, chat, tokens and models over HTTP and WebSocket",
    "adapters": "load and unload LoRA adapters",
    "pipelines": "register, delete and run pipelines",
    "metrics": "read /metrics",
    "usage": "read the usage of its own tenant",
    "admin": "everything under /admin/v1, for every tenant",
}
NAME = re.compile(r"(?!tn-)[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # of a tenant: a label of metrics, a word of a shell
LOWEST = -(1 << 31)  # a priority_min that bounds nothing
MOST_NAMES = 1024  # of an allow-list


@dataclass(frozen=True)
class Tenant:
    """One customer of the server.

    id: made by the store, never used again.
    name: chosen by people, unique; may change.
    weight: its share of the engine against other tenants that wait: 2 gets twice the tokens of 1.
    requests_per_minute, tokens_per_minute, max_concurrent: limits, None for none.
    priority_min: the lowest number that a request's priority may have; lower runs first.
    models, adapters: names that may be used, None for all.

    Raises ValidationError naming the field.
    """

    id: str
    name: str
    weight: float = 1.0
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent: int | None = None
    priority_min: int = 0
    models: frozenset[str] | None = None
    adapters: frozenset[str] | None = None
    disabled: bool = False

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ValidationError(
                f"name must be 1 to 64 letters, digits, '.', '_' or '-', beginning with a letter or digit"
                f" and not with 'tn-', which ids do; got {self.name[:80]!r}.",
                param="name",
            )
        if not (math.isfinite(self.weight) and 0.01 <= self.weight <= 100):
            raise ValidationError(f"weight must be 0.01 to 100; got {self.weight}.", param="weight")
        for field in ("requests_per_minute", "tokens_per_minute", "max_concurrent"):
            limit = getattr(self, field)
            if limit is not None and not 1 <= limit <= 10**9:
                raise ValidationError(f"{field} must be 1 to 1000000000, or none; got {limit}.", param=field)
        if not LOWEST <= self.priority_min < 1 << 31:
            raise ValidationError(f"priority_min must fit 32 bits; got {self.priority_min}.", param="priority_min")
        _check_names("models", self.models)
        _check_names("adapters", self.adapters)


@dataclass(frozen=True)
class Key:
    """One key of a tenant, without its secret.

    id: the middle part of the key's text; no secret.
    scopes: of SCOPES.
    models, adapters: names that may be used, None for all that the tenant may; a key never widens its tenant's list.
    created, expires: seconds since 1970, UTC; expires None for never.
    note: what people wrote about it.

    Raises ValidationError naming the field.
    """

    id: str
    tenant_id: str
    scopes: frozenset[str]
    models: frozenset[str] | None = None
    adapters: frozenset[str] | None = None
    created: float = 0.0
    expires: float | None = None
    disabled: bool = False
    note: str = ""

    def __post_init__(self) -> None:
        unknown = sorted(self.scopes - SCOPES.keys())
        if unknown or not self.scopes:
            got = f"got {unknown[0][:80]!r}" if unknown else "got none"
            raise ValidationError(f"scopes must be of: {', '.join(SCOPES)}; {got}.", param="scopes")
        if len(self.note) > 200:
            raise ValidationError(f"note must have at most 200 characters; got {len(self.note)}.", param="note")
        if self.expires is not None and not math.isfinite(self.expires):
            raise ValidationError(f"expires must be a time; got {self.expires}.", param="expires")
        _check_names("models", self.models)
        _check_names("adapters", self.adapters)


@dataclass(frozen=True)
class Identity:
    """Who a request comes from, proved.

    salt: keeps the tenant's cached beginnings from others': derived from its id and a secret of the database, always of
    one length; "" where there is one tenant only.
    """

    tenant: Tenant
    key: Key
    salt: str = ""

    def has(self, scope: str) -> bool:
        """Whether the key has a scope. Raises KeyError for a word that is no scope."""
        SCOPES[scope]
        return scope in self.key.scopes

    @property
    def limited(self) -> bool:
        """Whether tenant or key list what may be used, so that there are names which must not be told."""
        lists = (self.tenant.models, self.tenant.adapters, self.key.models, self.key.adapters)
        return any(names is not None for names in lists)

    def require(self, scope: str) -> None:
        """Raises ForbiddenError unless the key has the scope."""
        if not self.has(scope):
            raise ForbiddenError(
                f"This key has not the scope {scope!r} ({SCOPES[scope]}).",
                hint=f"It has: {', '.join(sorted(self.key.scopes))}.",
            )

    def allows_model(self, name: str) -> bool:
        """Whether tenant and key both allow a model, by the name that it is served under."""
        return _allowed(name, self.tenant.models) and _allowed(name, self.key.models)

    def allows_adapter(self, name: str) -> bool:
        """Whether tenant and key both allow an adapter, by the name that it is served under."""
        return _allowed(name, self.tenant.adapters) and _allowed(name, self.key.adapters)


def _allowed(name: str, names: frozenset[str] | None) -> bool:
    return names is None or name in names


def _check_names(field: str, names: Iterable[str] | None) -> None:
    if names is None:
        return
    listed = list(names)
    if len(listed) > MOST_NAMES or any(not 1 <= len(name) <= 256 or not name.isprintable() for name in listed):
        raise ValidationError(
            f"{field} must be at most {MOST_NAMES} names of 1 to 256 printable characters.", param=field
        )


_DEFAULT = Tenant("default", "default", priority_min=LOWEST)
ANYONE = Identity(_DEFAULT, Key("", "default", frozenset(SCOPES) - {"admin"}))  # of a server without keys
OWNER = Identity(_DEFAULT, Key("", "default", frozenset(SCOPES)))  # who carries the one key of --api-key
