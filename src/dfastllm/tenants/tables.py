"""The tables of the database of tenants, its schema's version, and the steps from an older version to this one.

Every name begins with dfastllm_, so that a PostgreSQL database may be shared. Times are seconds since 1970, UTC. A row
of a tenant or a key is never deleted, only disabled: what was used stays explained.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence

from dfastllm.errors import UnsupportedError, ValidationError

try:
    import sqlalchemy as sa
    from sqlalchemy.dialects import postgresql
    from sqlalchemy.dialects import sqlite as sqlite_dialect
except ImportError:
    raise UnsupportedError(
        "A database of tenants needs SQLAlchemy, which is not installed.",
        param="tenants_db",
        hint="pip install 'dfastllm[tenants]', or ./run setup tenants in a clone.",
    ) from None

__all__ = [
    "AUDIT",
    "KEYS",
    "META",
    "PIPELINES",
    "TENANTS",
    "UPGRADES",
    "USAGE",
    "no_database",
    "prepare",
    "sa",
    "upsert",
]

_TABLES = sa.MetaData()
_Names = sa.Text  # a JSON list, NULL for all

META = sa.Table(
    "dfastllm_meta",
    _TABLES,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)
TENANTS = sa.Table(
    "dfastllm_tenants",
    _TABLES,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("name", sa.Text, nullable=False, unique=True),
    sa.Column("weight", sa.Double, nullable=False),
    sa.Column("requests_per_minute", sa.BigInteger),
    sa.Column("tokens_per_minute", sa.BigInteger),
    sa.Column("max_concurrent", sa.BigInteger),
    sa.Column("priority_min", sa.BigInteger, nullable=False),
    sa.Column("models", _Names),
    sa.Column("adapters", _Names),
    sa.Column("disabled", sa.Boolean, nullable=False),
    sa.Column("created", sa.Double, nullable=False),
)
KEYS = sa.Table(
    "dfastllm_keys",
    _TABLES,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("tenant_id", sa.Text, sa.ForeignKey(TENANTS.c.id), nullable=False, index=True),
    sa.Column("hash", sa.Text, nullable=False),  # argon2id, its salt and costs within
    sa.Column("scopes", sa.Text, nullable=False),  # a JSON list
    sa.Column("models", _Names),
    sa.Column("adapters", _Names),
    sa.Column("created", sa.Double, nullable=False),
    sa.Column("expires", sa.Double),
    sa.Column("disabled", sa.Boolean, nullable=False),
    sa.Column("note", sa.Text, nullable=False),
)
PIPELINES = sa.Table(
    "dfastllm_pipelines",
    _TABLES,
    sa.Column("tenant_id", sa.Text, primary_key=True),  # "default" of a server without keys, too
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("document", sa.Text, nullable=False),
    sa.Column("changed", sa.Double, nullable=False),
)
AUDIT = sa.Table(
    "dfastllm_audit",
    _TABLES,
    sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
    sa.Column("at", sa.Double, nullable=False),
    sa.Column("actor", sa.Text, nullable=False),
    sa.Column("action", sa.Text, nullable=False),
    sa.Column("target", sa.Text, nullable=False),
    sa.Column("detail", sa.Text, nullable=False),
)
USAGE = sa.Table(
    "dfastllm_usage",
    _TABLES,
    sa.Column("id", sa.Text, primary_key=True),  # made by the ledger: two requests of one X-Request-ID stay two
    sa.Column("request_id", sa.Text, nullable=False),
    sa.Column("tenant_id", sa.Text, nullable=False),
    sa.Column("key_id", sa.Text, nullable=False),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("adapter", sa.Text, nullable=False),  # "" for none
    sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
    sa.Column("completion_tokens", sa.BigInteger, nullable=False),
    sa.Column("version", sa.BigInteger, nullable=False),  # of this row: a write of an older one changes nothing
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("started", sa.Double, nullable=False),
    sa.Column("seconds", sa.Double),
    sa.Column("writer", sa.Text, nullable=False),  # the server that wrote it
    sa.Index("dfastllm_usage_by_time", "started"),
    sa.Index("dfastllm_usage_by_tenant", "tenant_id", "started"),
)

# UPGRADES[n] takes a database from version n + 1 to n + 2. A step writes out the tables it makes or changes as they are
# after it, and uses none of the objects above, which will have changed since.
UPGRADES: Sequence[Callable[[sa.Connection], None]] = ()


def prepare(connection: sa.Connection, *, create: bool) -> str:
    """Make the tables where there are none (create), or bring those of an older version to this one, in the transaction
    of `connection`, which must hold the database's only lock for writing. Returns the database's own secret.

    Raises ValidationError where there are none, and UnsupportedError for a database of a newer version."""
    newest = 1 + len(UPGRADES)
    if not sa.inspect(connection).has_table(META.name):
        if not create:
            raise no_database()
        _TABLES.create_all(connection)
        first = {"version": str(newest), "secret": secrets.token_hex(32)}
        connection.execute(META.insert(), [{"name": name, "value": value} for name, value in first.items()])
    found = int(connection.execute(sa.select(META.c.value).where(META.c.name == "version")).scalar_one())
    if found > newest:
        raise UnsupportedError(
            f"The database of tenants has schema version {found}; this dfastllm knows up to {newest}.",
            param="tenants_db",
            hint="Use the newer dfastllm that made it.",
        )
    for step in UPGRADES[found - 1 :]:
        step(connection)
    if found < newest:
        connection.execute(META.update().where(META.c.name == "version").values(value=str(newest)))
    return str(connection.execute(sa.select(META.c.value).where(META.c.name == "secret")).scalar_one())


def no_database() -> ValidationError:
    """For a database that nobody made: mostly a misspelt name."""
    return ValidationError(
        "tenants_db: there is no database of tenants by that name.",
        param="tenants_db",
        hint="`dfastllm tenants create NAME` makes it with its first tenant.",
    )


def upsert(*, sqlite: bool) -> sa.Insert:
    """Write rows of USAGE, each in place of an older version of it. sqlite: or PostgreSQL."""
    insert = sqlite_dialect.insert(USAGE) if sqlite else postgresql.insert(USAGE)
    changing = {name: insert.excluded[name] for name in ("completion_tokens", "version", "status", "seconds")}
    newer = USAGE.c.version < insert.excluded.version
    return insert.on_conflict_do_update(index_elements=[USAGE.c.id], set_=changing, where=newer)
