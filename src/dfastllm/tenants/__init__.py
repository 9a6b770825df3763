"""Tenants of one server: who may ask (identity, keys), how much (limits), and what was used (ledger), in one database.

Holds no HTTP and no engine: `server` asks it about each request. Modules that need SQLAlchemy or argon2 are imported
where a database of tenants is named, so a server without one needs neither.
"""

from dfastllm.tenants.identity import ANYONE, OWNER, SCOPES, Identity, Key, Tenant

__all__ = ["ANYONE", "OWNER", "SCOPES", "Identity", "Key", "Tenant"]
