"""Questions to the ledger against sums made by hand."""

from __future__ import annotations

import random
from datetime import UTC, datetime

import pytest

from dfastllm.errors import ValidationError
from dfastllm.tenants.store import Store
from dfastllm.tenants.tables import USAGE
from dfastllm.tenants.usage import BY, Used, moment, used


def filled(store: Store) -> list[dict[str, object]]:
    """200 rows of three tenants, one of which the store does not know (the default of a server without keys)."""
    draws = random.Random(3)
    names = {store.create_tenant(name, actor="me").id: name for name in ("acme", "beta")} | {"default": "default"}
    rows: list[dict[str, object]] = []
    for number in range(200):
        tenant = draws.choice(list(names))
        ended = draws.choice(["ok", "ok", "ok", "cancelled", "failed", "running", "lost"])
        rows.append(
            {
                "id": f"{number}",
                "request_id": f"r{number}",
                "tenant_id": tenant,
                "key_id": f"key-{tenant[-1]}{draws.randint(0, 1)}",
                "model": draws.choice(["m1", "m2"]),
                "adapter": draws.choice(["", "french"]),
                "prompt_tokens": draws.randint(0, 1000),
                "completion_tokens": draws.choice([0, draws.randint(1, 5_000_000_000)]),
                "version": 1,
                "status": ended,
                "started": 1000.0 + number,
                "seconds": None if ended in ("running", "lost") else draws.randint(0, 64) / 8,
                "writer": "w",
            }
        )
    with store.database.writing() as connection:
        connection.execute(USAGE.insert(), rows)
    return [{**row, "tenant": names[str(row["tenant_id"])], "key": row["key_id"]} for row in rows]


def by_hand(rows: list[dict[str, object]], by: tuple[str, ...]) -> list[Used]:
    groups: dict[tuple[str, ...], list[dict[str, object]]] = {}
    for row in rows:
        groups.setdefault(tuple(str(row[word]) for word in by), []).append(row)
    sums = []
    for group, members in groups.items():
        ended = [member["status"] for member in members]
        prompt, completion, seconds = (
            sum(member[field] or 0 for member in members)  # type: ignore[misc]
            for field in ("prompt_tokens", "completion_tokens", "seconds")
        )
        counts = (ended.count("ok"), ended.count("cancelled"), ended.count("failed"))
        sums.append(Used(group, len(members), *counts, prompt, completion, float(seconds)))
    return sorted(sums, key=lambda one: (-one.prompt_tokens - one.completion_tokens, one.group))


def test_sums(store: Store) -> None:
    rows = filled(store)
    for by in [(word,) for word in BY] + [("model", "adapter"), ("tenant", "key", "model"), BY]:
        assert used(store.database, by=by) == by_hand(rows, by)
    within = [row for row in rows if 1020 <= float(str(row["started"])) < 1100]
    assert used(store.database, since=1020.0, until=1100.0) == by_hand(within, ("tenant",))
    acme = store.tenant("acme").id
    theirs = [row for row in rows if row["tenant_id"] == acme]
    assert used(store.database, by=("model",), tenant_id=acme) == by_hand(theirs, ("model",))
    assert used(store.database, since=5000.0) == []
    for until in (1000.0, 999.0):
        with pytest.raises(ValidationError, match="since must lie before until"):
            used(store.database, since=1000.0, until=until)
    with pytest.raises(ValidationError, match="by must be of: tenant, model, adapter, key"):
        used(store.database, by=("colour",))


def test_a_renamed_tenant_is_told_by_its_new_name(store: Store) -> None:
    filled(store)
    store.set_tenant("acme", actor="me", name="acme2")
    assert {one.group[0] for one in used(store.database)} == {"acme2", "beta", "default"}


def test_moments() -> None:
    now = 1_000_000_000.0
    for text, seconds in (("30s", 30), ("5m", 300), ("24h", 86400), ("7d", 604800), ("2w", 1209600), ("0s", 0)):
        assert moment(text, now, "since") == now - seconds
        assert moment(text, now, "expires", ahead=True) == now + seconds
    assert moment("2026-11-28", now, "since") == datetime(2026, 11, 28, tzinfo=UTC).timestamp()
    assert moment("2026-11-28T10:30", now, "since") == datetime(2026, 11, 28, 10, 30, tzinfo=UTC).timestamp()
    assert moment("2026-11-28T10:30+02:00", now, "since") == datetime(2026, 11, 28, 8, 30, tzinfo=UTC).timestamp()
    for text in ("", "yesterday", "7", "d", "-1d", "1.5h", "7d ", "9999999d", "2026-13-01", "1 d"):
        with pytest.raises(ValidationError, match="since must be a span") as refused:
            moment(text, now, "since")
        assert refused.value.param == "since"
