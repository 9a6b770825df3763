"""Tenants, keys, usage and audit lines as plain records: what the command line prints as JSON and the admin API sends.

Times are whole seconds since 1970, UTC; lists are sorted; null is "no limit", "all" or "never".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from dfastllm.tenants.identity import Key, Tenant
from dfastllm.tenants.store import AuditRow
from dfastllm.tenants.usage import Used

__all__ = ["audit_record", "key_record", "tenant_record", "usage_record"]


def tenant_record(tenant: Tenant) -> dict[str, Any]:
    """The fields of `Tenant`."""
    return {name: _listed(value) for name, value in vars(tenant).items()}


def key_record(key: Key) -> dict[str, Any]:
    """The fields of `Key`; nothing of its secret is in it."""
    record = {name: _listed(value) for name, value in vars(key).items()}
    ends = None if key.expires is None else int(key.expires)
    return {**record, "created": int(key.created), "expires": ends}


def usage_record(used: Used, by: Sequence[str]) -> dict[str, Any]:
    """The words of `by` with their values, then the sums."""
    sums = dataclasses.asdict(used)
    del sums["group"]
    return {**dict(zip(by, used.group, strict=True)), **sums, "seconds": round(used.seconds, 3)}


def audit_record(row: AuditRow) -> dict[str, Any]:
    """The fields of `AuditRow`."""
    return {**dataclasses.asdict(row), "at": int(row.at)}


def _listed(value: Any) -> Any:
    return sorted(value) if isinstance(value, Iterable) and not isinstance(value, str) else value
