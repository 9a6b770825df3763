"""Questions to the ledger: what was used since when, by tenant, model, adapter or key."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from dfastllm.errors import ValidationError
from dfastllm.tenants.database import Database
from dfastllm.tenants.tables import TENANTS, USAGE, sa

__all__ = ["BY", "Used", "moment", "used"]

BY = ("tenant", "model", "adapter", "key")
_SPAN = re.compile(r"(\d{1,6})([smhdw])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


@dataclass(frozen=True)
class Used:
    """A line of an answer.

    group: a value for each word of `by`: a tenant's name, a key's id, ...
    requests: all; ok, cancelled, failed: how they ended. The rest still run, or ended with their server ("lost").
    prompt_tokens, completion_tokens: of all of them.
    seconds: from beginning to end, summed up over those that ended.
    """

    group: tuple[str, ...]
    requests: int
    ok: int
    cancelled: int
    failed: int
    prompt_tokens: int
    completion_tokens: int
    seconds: float


def moment(text: str, now: float, param: str, *, ahead: bool = False) -> float:
    """Seconds since 1970 of "30m", "24h", "7d" (ago, or ahead), or of an ISO date or time, UTC where it names no zone.
    Raises ValidationError."""
    if span := _SPAN.fullmatch(text):
        return now + (1 if ahead else -1) * int(span[1]) * _SECONDS[span[2]]
    try:
        read = datetime.fromisoformat(text)
    except ValueError:
        raise ValidationError(
            f"{param} must be a span such as 30m, 24h or 7d, or a date such as 2026-11-28; got {text[:80]!r}.",
            param=param,
        ) from None
    return (read if read.tzinfo else read.replace(tzinfo=UTC)).timestamp()


def used(
    database: Database,
    *,
    since: float | None = None,
    until: float | None = None,
    by: Sequence[str] = ("tenant",),
    tenant_id: str | None = None,
) -> list[Used]:
    """Sums over the requests that began in [since, until), most tokens first. tenant_id: of this tenant only. Raises
    ValidationError for an unknown `by` and for a span of no time, DatabaseError."""
    if since is not None and until is not None and since >= until:
        raise ValidationError("since must lie before until.", param="since")
    for word in by:
        if word not in BY:
            raise ValidationError(f"by must be of: {', '.join(BY)}; got {word[:80]!r}.", param="by")
    columns = {
        "tenant": sa.func.coalesce(TENANTS.c.name, USAGE.c.tenant_id),
        "model": USAGE.c.model,
        "adapter": USAGE.c.adapter,
        "key": USAGE.c.key_id,
    }
    groups = [columns[word].label(word) for word in by]
    ended = [sa.func.sum(sa.case((USAGE.c.status == status, 1), else_=0)) for status in ("ok", "cancelled", "failed")]
    tokens = [sa.func.sum(USAGE.c.prompt_tokens), sa.func.sum(USAGE.c.completion_tokens)]
    asked = (
        sa.select(*groups, sa.func.count(), *ended, *tokens, sa.func.coalesce(sa.func.sum(USAGE.c.seconds), 0.0))
        .select_from(USAGE.outerjoin(TENANTS, USAGE.c.tenant_id == TENANTS.c.id))
        .group_by(*groups)
        .order_by((tokens[0] + tokens[1]).desc(), *groups)
    )
    if since is not None:
        asked = asked.where(USAGE.c.started >= since)
    if until is not None:
        asked = asked.where(USAGE.c.started < until)
    if tenant_id is not None:
        asked = asked.where(USAGE.c.tenant_id == tenant_id)
    with database.reading(long=True) as connection:
        rows = connection.execute(asked).all()
    return [_used(row, len(by)) for row in rows]


def _used(row: Sequence, groups: int) -> Used:
    requests, ok, cancelled, failed, prompt, completion = (int(number) for number in row[groups : groups + 6])
    return Used(tuple(row[:groups]), requests, ok, cancelled, failed, prompt, completion, float(row[groups + 6]))
