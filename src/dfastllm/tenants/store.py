"""The store: tenants, their keys and pipelines, and who changed what, in one database.

Every change is one transaction with its line of the audit log, which never holds a secret. Everything blocks for some
seconds at most; only `identify` is for an event loop.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
import secrets
import time
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dfastllm.errors import KeyNotFoundError, TenantNotFoundError, ValidationError
from dfastllm.tenants.database import Database
from dfastllm.tenants.identity import Identity, Key, Tenant
from dfastllm.tenants.keys import hashed, new_key, split
from dfastllm.tenants.proofs import Found, Proofs
from dfastllm.tenants.tables import AUDIT, KEYS, PIPELINES, TENANTS, sa

__all__ = ["AuditRow", "Store"]

_LISTS = ("models", "adapters", "scopes")
_TENANT = tuple(field.name for field in dataclasses.fields(Tenant) if field.name != "id")
_KEY = ("scopes", "models", "adapters", "expires", "note")  # what is given for a new one
_DETAIL = 2000  # characters of an audit line's detail


@dataclass(frozen=True)
class AuditRow:
    """A line of the audit log.

    at: seconds since 1970.
    actor: who: "cli:USER" or "key:ID".
    action: tenant.create, tenant.set, key.create, key.disable, key.rotate, pipeline.save, ...
    target: the id of what was changed.
    detail: what was set, as JSON, or "".
    """

    at: float
    actor: str
    action: str
    target: str
    detail: str


class Store:
    """One database of tenants. Thread-safe.

    url, create: see `database.Database`, whose errors it raises. A tenant is named by its id or its name.
    """

    def __init__(self, url: str, *, create: bool = False) -> None:
        self.database = Database(url, create=create)
        self._proofs = Proofs(self._find)

    @property
    def name(self) -> str:
        """The database, without its password."""
        return self.database.name

    async def identify(self, text: str) -> Identity:
        """Who carries this key: from memory at once, else looked up and proved off the event loop. A key that was
        disabled, here or by another process, is refused within `proofs.REMEMBERED` seconds.

        Raises AuthenticationError (not known, or disabled or expired), RateLimitError (too many that are not known at
        once), DatabaseError (it does not answer, and the key was not used lately)."""
        return await self._proofs.identify(text)

    def authenticate(self, text: str) -> Identity:
        """`identify` for a thread that may wait."""
        return self._proofs.authenticate(text)

    def salt(self, tenant_id: str) -> str:
        """32 hexadecimal digits that only this database gives to this tenant."""
        return hmac.new(self.database.secret.encode(), tenant_id.encode(), hashlib.sha256).hexdigest()[:32]

    # Tenants.

    def create_tenant(self, name: str, *, actor: str, **fields: Any) -> Tenant:
        """A new tenant. fields: of `Tenant`, those not given have its defaults. Raises ValidationError for a bad field
        and for a name that is taken."""
        tenant = Tenant(_new_id(), name, **_listed(fields, _TENANT))
        try:
            with self.database.writing() as connection:
                row = _row(dataclasses.asdict(tenant))
                connection.execute(TENANTS.insert().values(**row, created=time.time()))
                _write_audit(connection, actor, "tenant.create", tenant.id, _changes({"name": name, **fields}))
        except sa.exc.IntegrityError:
            raise _taken(name) from None
        return tenant

    def set_tenant(self, tenant: str, *, actor: str, **fields: Any) -> Tenant:
        """Change fields of a tenant: any of `Tenant` but its id. Raises TenantNotFoundError and ValidationError."""
        given = _listed(fields, _TENANT)
        try:
            with self.database.writing() as connection:
                before = _tenant(connection, tenant)
                after = dataclasses.replace(before, **given)
                if given:  # only these columns: another change at the same time stays
                    connection.execute(TENANTS.update().where(TENANTS.c.id == before.id).values(**_row(given)))
                _write_audit(connection, actor, "tenant.set", before.id, _changes(fields))
        except sa.exc.IntegrityError:
            raise _taken(str(given.get("name"))) from None
        self._proofs.forget()
        return after

    def tenants(self) -> list[Tenant]:
        """All, by name."""
        with self.database.reading() as connection:
            return [_read_tenant(row) for row in connection.execute(sa.select(TENANTS).order_by(TENANTS.c.name))]

    def tenant(self, tenant: str) -> Tenant:
        """One. Raises TenantNotFoundError."""
        with self.database.reading() as connection:
            return _tenant(connection, tenant)

    # Keys.

    def create_key(self, tenant: str, *, actor: str, **fields: Any) -> tuple[Key, str]:
        """A new key of a tenant and its text, which is kept nowhere. fields: scopes (only `generate` where not given),
        models, adapters, expires, note. Raises TenantNotFoundError and ValidationError."""
        if any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in fields.get("note") or ""):
            raise ValidationError("note must be one line of text.", param="note")  # and a text that databases take
        with self.database.writing() as connection:
            owner = _tenant(connection, tenant)
            given = _listed({"scopes": ("generate",), **fields}, _KEY)
            key, text = _insert_key(connection, owner.id, given)
            _write_audit(connection, actor, "key.create", key.id, _changes({"tenant": owner.name, **_some(fields)}))
        return key, text

    def rotate_key(self, key_id: str, *, actor: str, grace: float = 0.0) -> tuple[Key, str]:
        """A key with new text that may do what this one may; this one ends after `grace` seconds. Raises
        KeyNotFoundError, and ValidationError for one that has ended or is disabled."""
        if not 0 <= grace <= 366 * 86400:
            raise ValidationError(f"grace must be 0 seconds to a year; got {grace}.", param="grace")
        now = time.time()
        with self.database.writing() as connection:
            old = _key(connection, key_id)
            if old.disabled or (old.expires is not None and old.expires <= now):
                raise ValidationError(f"The key {key_id} is {'disabled' if old.disabled else 'expired'}.", param="key")
            key, text = _insert_key(connection, old.tenant_id, {name: getattr(old, name) for name in _KEY})
            ends = now + grace if old.expires is None else min(old.expires, now + grace)
            connection.execute(KEYS.update().where(KEYS.c.id == old.id).values(expires=ends))
            _write_audit(connection, actor, "key.rotate", old.id, _changes({"new": key.id, "grace": grace}))
        self._proofs.forget()
        return key, text

    def keys(self, tenant: str | None = None) -> list[Key]:
        """All, or those of one tenant, oldest first. Raises TenantNotFoundError."""
        with self.database.reading() as connection:
            wanted = sa.select(KEYS).order_by(KEYS.c.created)
            if tenant is not None:
                wanted = wanted.where(KEYS.c.tenant_id == _tenant(connection, tenant).id)
            return [_read_key(row) for row in connection.execute(wanted)]

    def key(self, key_id: str) -> Key:
        """One. Raises KeyNotFoundError."""
        with self.database.reading() as connection:
            return _key(connection, key_id)

    def disable_key(self, key_id: str, *, actor: str) -> Key:
        """Refuse a key from now on. Raises KeyNotFoundError."""
        with self.database.writing() as connection:
            key = dataclasses.replace(_key(connection, key_id), disabled=True)
            connection.execute(KEYS.update().where(KEYS.c.id == key.id).values(disabled=True))
            _write_audit(connection, actor, "key.disable", key.id, "")
        self._proofs.forget()
        return key

    # Pipelines and the audit log.

    def save_pipeline(self, tenant_id: str, name: str, document: str, *, actor: str) -> None:
        """Keep a pipeline of a tenant, in place of one of that name."""
        with self.database.writing() as connection:
            same = sa.and_(PIPELINES.c.tenant_id == tenant_id, PIPELINES.c.name == name)
            values = {"document": document, "changed": time.time()}
            if not connection.execute(PIPELINES.update().where(same).values(**values)).rowcount:
                connection.execute(PIPELINES.insert().values(tenant_id=tenant_id, name=name, **values))
            _write_audit(connection, actor, "pipeline.save", tenant_id, _changes({"name": name}))

    def pipelines(self, tenant_id: str) -> dict[str, str]:
        """The documents of a tenant's pipelines, by name."""
        wanted = sa.select(PIPELINES).where(PIPELINES.c.tenant_id == tenant_id).order_by(PIPELINES.c.name)
        with self.database.reading() as connection:
            return {row.name: row.document for row in connection.execute(wanted)}

    def delete_pipeline(self, tenant_id: str, name: str, *, actor: str) -> bool:
        """Whether there was one."""
        with self.database.writing() as connection:
            same = sa.and_(PIPELINES.c.tenant_id == tenant_id, PIPELINES.c.name == name)
            was_there = connection.execute(PIPELINES.delete().where(same)).rowcount > 0
            if was_there:
                _write_audit(connection, actor, "pipeline.delete", tenant_id, _changes({"name": name}))
        return was_there

    def audit(self, actor: str, action: str, target: str, detail: Mapping[str, Any] | None = None) -> None:
        """A line of the audit log for what is not changed here (an adapter that was loaded). detail: never a secret."""
        with self.database.writing() as connection:
            _write_audit(connection, actor, action, target, "" if detail is None else _changes(detail))

    def audited(self, limit: int = 100) -> list[AuditRow]:
        """The newest lines, newest first."""
        columns = (AUDIT.c.at, AUDIT.c.actor, AUDIT.c.action, AUDIT.c.target, AUDIT.c.detail)
        with self.database.reading() as connection:
            rows = connection.execute(sa.select(*columns).order_by(AUDIT.c.id.desc()).limit(limit))
            return [AuditRow(*row) for row in rows]

    def close(self) -> None:
        """Close the database and end the threads that prove keys."""
        self._proofs.close()
        self.database.close()

    def _find(self, key_id: str) -> Found | None:
        """What is kept of a key, for `Proofs`."""
        with self.database.reading() as connection:
            row = connection.execute(sa.select(KEYS).where(KEYS.c.id == key_id)).one_or_none()
            if row is None:
                return None
            key, tenant = _read_key(row), _tenant(connection, row.tenant_id)
        return Found(Identity(tenant, key, self.salt(tenant.id)), row.hash)


def _new_id() -> str:
    return f"tn-{secrets.token_hex(6)}"


def _taken(name: str) -> ValidationError:
    return ValidationError(f"There is a tenant {name!r} already.", param="name")


def _listed(fields: Mapping[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """Fields with their lists as sets. Raises ValidationError for one that is not known."""
    unknown = sorted(fields.keys() - set(known))
    if unknown:
        raise ValidationError(f"There is no field {unknown[0]!r}; there are: {', '.join(known)}.", param=unknown[0])
    return {name: frozenset(value) if name in _LISTS and value is not None else value for name, value in fields.items()}


def _changes(fields: Mapping[str, Any]) -> str:
    plain = {name: sorted(v) if isinstance(v, set | frozenset) else v for name, v in fields.items()}
    return json.dumps(plain, ensure_ascii=False, default=list)[:_DETAIL]


def _some(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value not in (None, "")}


def _text(names: Iterable[str] | None) -> str | None:
    return None if names is None else json.dumps(sorted(names))


def _names(text: str | None) -> frozenset[str] | None:
    return None if text is None else frozenset(json.loads(text))


def _row(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields as columns."""
    return {name: _text(value) if name in _LISTS else value for name, value in fields.items()}


def _read_tenant(row: Any) -> Tenant:
    values: dict[str, Any] = {name: getattr(row, name) for name in ("id", *_TENANT)}
    return Tenant(**values | {name: _names(values[name]) for name in ("models", "adapters")})


def _read_key(row: Any) -> Key:
    return Key(
        id=row.id,
        tenant_id=row.tenant_id,
        scopes=_names(row.scopes) or frozenset(),
        models=_names(row.models),
        adapters=_names(row.adapters),
        created=row.created,
        expires=row.expires,
        disabled=row.disabled,
        note=row.note,
    )


def _tenant(connection: sa.Connection, tenant: str) -> Tenant:
    """By id or name; no name has the form of an id."""
    same = sa.or_(TENANTS.c.id == tenant, TENANTS.c.name == tenant)
    row = connection.execute(sa.select(TENANTS).where(same)).one_or_none()
    if row is None:
        raise TenantNotFoundError(f"There is no tenant {tenant[:80]!r}.", param="tenant")
    return _read_tenant(row)


def _key(connection: sa.Connection, key_id: str) -> Key:
    row = connection.execute(sa.select(KEYS).where(KEYS.c.id == key_id)).one_or_none()
    if row is None:
        hint = "The id is the middle part of the key: dfk_ID_SECRET." if split(key_id) is None else None
        raise KeyNotFoundError(f"There is no key with the id {key_id[:20]!r}.", param="key", hint=hint)
    return _read_key(row)


def _insert_key(connection: sa.Connection, tenant_id: str, fields: Mapping[str, Any]) -> tuple[Key, str]:
    key_id, text = new_key()
    given = {**fields, "scopes": frozenset(fields["scopes"])}
    key = Key(key_id, tenant_id, created=time.time(), **given)
    if key.expires is not None and key.expires <= key.created:
        raise ValidationError("expires must lie in the future.", param="expires")
    parts = split(text)
    assert parts is not None
    row = _row({**dataclasses.asdict(key), "hash": hashed(parts[1])})
    connection.execute(KEYS.insert().values(**row))
    return key, text


def _write_audit(connection: sa.Connection, actor: str, action: str, target: str, detail: str) -> None:
    connection.execute(AUDIT.insert().values(at=time.time(), actor=actor, action=action, target=target, detail=detail))
