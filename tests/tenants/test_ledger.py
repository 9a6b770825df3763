"""delivered <= recorded <= generated, never twice: through kills, and a database that is down, full or unsure."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from dfastllm.errors import StorageError
from dfastllm.settings import Settings
from dfastllm.tenants import ANYONE
from dfastllm.tenants import database as databases
from dfastllm.tenants import ledger as ledgers
from dfastllm.tenants.database import Database
from dfastllm.tenants.journal import Journal
from dfastllm.tenants.ledger import Ledger, open_ledger
from dfastllm.tenants.store import Store
from dfastllm.tenants.tables import USAGE
from tests.kit.postgres import Postgres
from tests.kit.source import ROOT
from tests.tenants.killed import Unsure


def rows(database: Database) -> dict[str, Any]:
    """By request id, each of which there is once."""
    with database.reading() as connection:
        found = connection.execute(sa.select(USAGE)).all()
    assert len({row.request_id for row in found}) == len(found)
    return {row.request_id: row for row in found}


def tokens(database: Database) -> dict[str, int]:
    return {name: row.completion_tokens for name, row in rows(database).items()}


def until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not done():
        assert time.monotonic() < end
        time.sleep(0.005)


@contextmanager
def opened(database: Database, journal: Path, days: int = 0) -> Iterator[Ledger]:
    ledger = Ledger(database, journal, days)
    try:
        yield ledger
    finally:
        ledger.close()


async def serve(ledger: Ledger, name: str, parts: list[int], status: str = "ok") -> None:
    entry = ledger.open(name, ANYONE, "m", "a", 7)
    for part in parts:
        await entry.add(part)
    entry.close(status)  # type: ignore[arg-type]


def test_a_request_is_a_row(store: Store, tmp_path: Path) -> None:
    tenant = store.create_tenant("acme", actor="me")
    key, text = store.create_key("acme", actor="me")
    identity = store.authenticate(text)

    async def one(ledger: Ledger) -> None:
        entry = ledger.open("chatcmpl-1", identity, "demo-ar", "french", 11)
        assert rows(store.database) == {}, "not written before its first tokens"
        await entry.add(2)
        row = rows(store.database)["chatcmpl-1"]
        assert (row.completion_tokens, row.prompt_tokens, row.status, row.seconds) == (2, 11, "running", None)
        await entry.add(3)
        assert rows(store.database)["chatcmpl-1"].completion_tokens == 5
        entry.close("cancelled")
        entry.close("ok")

    before = time.time()
    with opened(store.database, tmp_path / "j") as ledger:
        asyncio.run(one(ledger))
        refused = ledger.open("chatcmpl-2", identity, "demo-ar", "", 4)
        refused.close("failed")
        left = ledger.open("chatcmpl-3", identity, "demo\0-\ud800", "", 4)
    found = rows(store.database)
    row = found["chatcmpl-1"]
    assert (row.tenant_id, row.key_id, row.model, row.adapter) == (tenant.id, key.id, "demo-ar", "french")
    assert (row.completion_tokens, row.status) == (5, "cancelled")
    assert before <= row.started <= time.time()
    assert 0 < row.seconds < 60
    row = found["chatcmpl-2"]
    assert (row.completion_tokens, row.prompt_tokens, row.status) == (0, 4, "failed")
    assert left.status == found["chatcmpl-3"].status == "cancelled", "the server ended before it did"
    assert found["chatcmpl-3"].model == "demo-?"
    assert not (tmp_path / "j").exists()


def test_two_requests_of_one_id_stay_two(store: Store, tmp_path: Path) -> None:
    async def both(ledger: Ledger) -> None:
        await asyncio.gather(serve(ledger, "same", [3]), serve(ledger, "same", [4]))

    with opened(store.database, tmp_path / "j") as ledger:
        asyncio.run(both(ledger))
    with store.database.reading() as connection:
        assert sorted(connection.execute(sa.select(USAGE.c.completion_tokens)).scalars()) == [3, 4]


def test_what_is_waited_for_is_there(store: Store, tmp_path: Path) -> None:
    """Many requests on three event loops; after each wait the database holds as much as was waited for. Waits that are
    cut off leave their tokens recorded."""
    short: list[tuple[str, int]] = []

    async def one(ledger: Ledger, name: str) -> None:
        draws, total = random.Random(name), 0
        entry = ledger.open(name, ANYONE, "m", "", 1)
        for turn in range(6):
            total += (more := draws.randint(1, 9))
            if turn == 3:
                waiting = asyncio.create_task(entry.add(more))
                await asyncio.sleep(0)
                waiting.cancel()
                continue
            await entry.add(more)
            if draws.random() < 0.2:
                row = (await asyncio.to_thread(rows, store.database))[name]
                if row.completion_tokens < total:
                    short.append((name, total))
        entry.close("ok")
        totals[name] = total

    async def many(ledger: Ledger, loop: int) -> None:
        await asyncio.gather(*(one(ledger, f"{loop}-{number}") for number in range(20)))

    totals: dict[str, int] = {}
    with opened(store.database, tmp_path / "j") as ledger:
        threads = [threading.Thread(target=lambda n=n: asyncio.run(many(ledger, n))) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        health = ledger.health()
    assert short == []
    assert tokens(store.database) == totals
    assert health.up
    assert health.commits < health.rows, "some were committed together"


def test_killed_at_any_moment(url: str, tmp_path: Path) -> None:
    modes = ["up", "down", "flapping", "down", "up", "flapping"]
    command = [sys.executable, "-m", "tests.tenants.killed", url, str(tmp_path / "j"), *modes]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout)
    recorded = Counter[str]()
    for request, completion, prompt, status in said["recorded"]:
        assert request not in recorded, "counted twice"
        recorded[request] = completion
        assert prompt == 3
        assert status in ("ok", "lost")
    ended = [status for *_, status in said["recorded"]]
    assert 0 < ended.count("lost") <= 6 * len(modes) < len(ended), "of each process, what ran when it was killed"
    delivered, generated = said["delivered"], said["generated"]
    assert len(delivered) > 20
    assert all(sent <= recorded[request] for request, sent in delivered.items())
    assert all(count <= generated[request] for request, count in recorded.items())
    assert not list(tmp_path.glob("j*")), "nothing is owed any more"


def test_a_database_that_answers_now_and_then(url: str, tmp_path: Path) -> None:
    """Commits fail, half of them after they were done: in the end every row is exact."""
    database = Unsure(url, create=True)
    database.fails = 0.6
    random.seed(5)
    parts = {f"r{number}": [random.randint(1, 5) for _ in range(random.randint(0, 12))] for number in range(60)}

    async def many(ledger: Ledger) -> None:
        await asyncio.gather(*(serve(ledger, name, part) for name, part in parts.items()))

    with opened(database, tmp_path / "j") as ledger:
        asyncio.run(asyncio.wait_for(many(ledger), 60))
        assert ledger.health().failures > 0
        database.fails = 0.0
        until(lambda: ledger.health().up)
        assert ledger.health().owed == 0
    assert tokens(database) == {n: sum(p) for n, p in parts.items()}
    database.close()


def test_an_older_form_of_a_row_changes_nothing(store: Store, tmp_path: Path) -> None:
    """What a journal from before a crash would write again."""
    with opened(store.database, tmp_path / "j") as ledger:
        entry = ledger.open("one", ANYONE, "m", "", 1)
        forms = []
        for count in (3, 5, 9):
            entry.tokens, entry.version = count, entry.version + 1
            forms.append(entry.row())
        for form in (forms[1], forms[0], forms[1], forms[2], forms[0], forms[1]):
            ledger._commit([form])
        assert tokens(store.database) == {"one": 9}


def test_a_file_that_is_taken_away_owes_nothing_in_the_end(tmp_path: Path) -> None:
    """SQLite goes on writing to a file that has no name any more."""
    file, away = tmp_path / "x.db", tmp_path / "away.db"
    database = Database(str(file), create=True)
    with opened(database, tmp_path / "j") as ledger:
        asyncio.run(serve(ledger, "before", [1, 2]))
        file.rename(away)
        asyncio.run(serve(ledger, "while", [3] * 4))
        assert not ledger.health().up
        assert b"while" in (tmp_path / "j").read_bytes()
        away.rename(file)
        until(lambda: ledger.health().up)
    assert tokens(database) == {"before": 3, "while": 12}
    database.close()


def test_a_database_that_hangs_holds_a_request_up_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(databases, "TIMEOUT", 0.3)
    database = Database(str(tmp_path / "x.db"), create=True)
    other = sqlite3.connect(tmp_path / "x.db", isolation_level=None)
    with opened(database, tmp_path / "j") as ledger:
        other.execute("BEGIN EXCLUSIVE")
        began = time.monotonic()
        asyncio.run(serve(ledger, "one", [1] * 100))
        assert time.monotonic() - began < 15, "each addition waiting for it would take 30 seconds"
        assert not ledger.health().up
        other.execute("COMMIT")
        until(lambda: ledger.health().up)
    assert tokens(database) == {"one": 100}
    other.close()
    database.close()


def test_postgres_goes_and_comes_back(server: Postgres, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    database = Database(server.database(), create=True)
    with opened(database, tmp_path / "j") as ledger:
        asyncio.run(serve(ledger, "before", [1, 2]))
        until(lambda: rows(database)["before"].status == "ok")
        server.stop()
        try:
            began = time.monotonic()
            asyncio.run(serve(ledger, "during", [3, 4]))
            assert time.monotonic() - began < 10
            health = ledger.health()
            assert (health.up, health.owed) == (False, 1)
            assert health.journal_bytes > 100
            assert health.failures >= 1
        finally:
            server.start()
        asyncio.run(serve(ledger, "after", [5]))
        until(lambda: ledger.health().up)
        asyncio.run(serve(ledger, "later", [6]))
    assert tokens(database) == {
        "before": 3,
        "during": 7,
        "after": 5,
        "later": 6,
    }
    told = [record.getMessage() for record in caplog.records if record.name == "dfastllm.tenants"]
    assert any("until the database answers" in line for line in told)
    assert any("has everything" in line for line in told)
    database.close()


def test_a_full_database(tmp_path: Path) -> None:
    database = Database(str(tmp_path / "x.db"), create=True)
    pages = 0

    @sa.event.listens_for(database._engine, "checkout")
    def bound(connection: Any, *_: Any) -> None:
        connection.execute(f"PRAGMA max_page_count = {pages or 1 << 30}").close()

    with database.reading() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
    with opened(database, tmp_path / "j") as ledger:
        for number in range(300):
            asyncio.run(serve(ledger, f"r{number}", [number]))
        health = ledger.health()
        assert not health.up
        assert health.owed > 0
        pages = 0
        until(lambda: ledger.health().up)
    assert tokens(database) == {f"r{n}": n for n in range(300)}
    database.close()


def test_no_place_for_the_journal_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows stay in memory, are told of as such, and reach the journal with the next write that works."""
    database = Unsure(str(tmp_path / "x.db"), create=True)
    database.fails = 1.0

    def full(self: Journal, rows: Any) -> None:
        raise StorageError("The journal cannot be written: No space left on device.")

    with opened(database, tmp_path / "j") as ledger:
        with monkeypatch.context() as patched:
            patched.setattr(Journal, "append", full)
            patched.setattr(Journal, "rewrite", full)
            asyncio.run(serve(ledger, "one", [1]))
            asyncio.run(serve(ledger, "two", [2]))
            until(lambda: ledger.health().owed == 2)
        critical = [record for record in caplog.records if record.levelno == logging.CRITICAL]
        assert len(critical) == 1
        assert "in memory only" in critical[0].getMessage()
        assert (tmp_path / "j").read_text().count('"request_id"') == 0
        asyncio.run(serve(ledger, "three", [3]))
        assert {name for name in ("one", "two", "three") if f'"{name}"' in (tmp_path / "j").read_text()} == {
            "one",
            "two",
            "three",
        }
        database.fails = 0.0
        until(lambda: ledger.health().up)
    assert tokens(database) == {"one": 1, "two": 2, "three": 3}
    database.close()


def test_a_long_journal_is_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledgers, "_COMPACT", 4096)
    database = Unsure(str(tmp_path / "x.db"), create=True)
    database.fails = 1.0
    with opened(database, tmp_path / "j") as ledger:
        asyncio.run(serve(ledger, "one", [1] * 200))
        assert ledger.health().journal_bytes < 3 * 4096
        database.fails = 0.0
    assert rows(database)["one"].completion_tokens == 200
    database.close()


def test_what_a_server_leaves_the_next_one_pays(tmp_path: Path) -> None:
    database = Unsure(str(tmp_path / "x.db"), create=True)
    database.fails = 1.0
    with opened(database, tmp_path / "j") as ledger:
        asyncio.run(serve(ledger, "one", [1, 2]))
    assert rows(database) == {}
    assert (tmp_path / "j").exists()
    database.fails = 0.0
    with opened(database, tmp_path / "j") as ledger:
        asyncio.run(serve(ledger, "two", [5]))
        until(lambda: ledger.health().up)
    assert tokens(database) == {"one": 3, "two": 5}
    assert not (tmp_path / "j").exists()
    database.close()


def test_two_servers_of_one_database(tmp_path: Path) -> None:
    database = Database(str(tmp_path / "x.db"), create=True)
    with opened(database, tmp_path / "j") as one, opened(database, tmp_path / "j") as two:
        left = one.open("open", ANYONE, "m", "", 1)

        async def both() -> None:
            await left.add(1)
            await asyncio.gather(serve(one, "a", [1] * 50), serve(two, "b", [1] * 60))

        asyncio.run(both())
        assert rows(database)["open"].status == "running", "the other server's start did not touch it"
    assert tokens(database) == {"open": 1, "a": 50, "b": 60}
    database.close()


def test_retention(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledgers, "_BATCH", 10)
    old, young = time.time() - 8 * 86400, time.time() - 6 * 86400
    with opened(store.database, tmp_path / "j") as ledger:
        for number in range(45):
            entry = ledger.open(f"r{number}", ANYONE, "m", "", 1)
            entry._fixed["started"] = old if number < 35 else young
            entry.close("ok")
    with opened(store.database, tmp_path / "j", days=0):
        pass
    assert len(rows(store.database)) == 45
    with opened(store.database, tmp_path / "j", days=7):
        until(lambda: len(rows(store.database)) == 10)
    assert set(rows(store.database)) == {f"r{number}" for number in range(35, 45)}


def test_where_the_journal_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Postgres) -> None:
    database = Database(str(tmp_path / "x.db"), create=True)
    named = open_ledger(database, Settings(usage_journal=str(tmp_path / "mine"), usage_retention_days=3))
    beside = open_ledger(database, Settings())
    assert (named._journal.path, named._retention) == (tmp_path / "mine", 3 * 86400)
    assert beside._journal.path == tmp_path / "x.db-usage.journal"
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    far = open_ledger(Database(server.database(), create=True), Settings())
    assert far._journal.path.parent == tmp_path / "state" / "dfastllm"
    for ledger in (named, beside, far):
        ledger.close()
