"""The database of tenants: tenants, keys, pipelines, the audit log."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dfastllm.tenants.identity import Identity, Key, Tenant

__all__ = ["AuditRow", "Store"]


@dataclass(frozen=True)
class AuditRow:
    """Who did what to which thing, and when. `at`: seconds since 1970."""

    at: float
    actor: str
    action: str
    target: str
    detail: str


class Store:
    """One database, by URL (sqlite:///FILE, postgresql://...) or by the path of an SQLite file. Thread-safe."""

    def __init__(self, url: str) -> None:
        raise NotImplementedError

    async def identify(self, text: str) -> Identity:
        """Who carries this key. What the server calls: from memory at once, else off the event loop. Raises
        AuthenticationError (unknown, disabled, expired), DatabaseError (it does not answer and the key is not known),
        RateLimitError (too many unknown keys at once)."""
        raise NotImplementedError

    def authenticate(self, text: str) -> Identity:
        """`identify`, blocking."""
        raise NotImplementedError

    def create_tenant(self, name: str, *, actor: str, **fields: Any) -> Tenant: ...  # type: ignore[empty-body]

    def set_tenant(self, name: str, *, actor: str, **fields: Any) -> Tenant: ...  # type: ignore[empty-body]

    def tenants(self) -> list[Tenant]: ...  # type: ignore[empty-body]

    def tenant(self, name: str) -> Tenant: ...  # type: ignore[empty-body]

    def create_key(self, tenant: str, *, actor: str, **fields: Any) -> tuple[Key, str]: ...  # type: ignore[empty-body]

    def keys(self, tenant: str | None = None) -> list[Key]: ...  # type: ignore[empty-body]

    def disable_key(self, key_id: str, *, actor: str) -> Key: ...  # type: ignore[empty-body]

    def audit(self, actor: str, action: str, target: str, detail: str = "") -> None: ...

    def audited(self, limit: int = 100) -> list[AuditRow]: ...  # type: ignore[empty-body]

    def save_pipeline(self, tenant_id: str, name: str, document: str, *, actor: str) -> None: ...

    def pipelines(self, tenant_id: str) -> dict[str, str]: ...  # type: ignore[empty-body]

    def delete_pipeline(self, tenant_id: str, name: str, *, actor: str) -> bool: ...  # type: ignore[empty-body]

    def close(self) -> None: ...
