"""Stores on both kinds of database: SQLite in a file, and a PostgreSQL server that the session starts where it can."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dfastllm.tenants import keys
from dfastllm.tenants.store import Store
from tests.kit.cheap_keys import cheap_keys
from tests.kit.postgres import Postgres, binaries, postgres


@pytest.fixture(autouse=True)
def _cheap(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "costly" not in request.fixturenames:
        cheap_keys(monkeypatch)


@pytest.fixture
def costly() -> None:
    """For a test that wants keys hashed as the server does."""
    keys._nobodys.cache_clear()


@pytest.fixture(scope="session")
def server() -> Iterator[Postgres]:
    if binaries() is None:
        pytest.skip("no PostgreSQL here: neither initdb on the path nor /usr/lib/postgresql")
    with postgres() as running:
        yield running


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of a database that is not there yet (SQLite), or is empty (PostgreSQL)."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'tenants.db'}"
    running: Postgres = request.getfixturevalue("server")
    return running.database()


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    opened = Store(url, create=True)
    yield opened
    opened.close()
