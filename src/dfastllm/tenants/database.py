"""One database, SQLite by a file or PostgreSQL by URL, opened so that its answers come soon or not at all.

Everything here blocks, for some seconds at most: a database that does not answer raises DatabaseError. Says nothing of
what is in the tables.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dfastllm.errors import DatabaseError, UnsupportedError, ValidationError
from dfastllm.tenants.tables import no_database, prepare, sa

__all__ = ["TIMEOUT", "Database"]

log = logging.getLogger("dfastllm.tenants")
TIMEOUT = 3.0  # seconds: to connect, to wait for a lock, of a statement
LONG = 120.0  # seconds of a statement that reads many rows
_LOCK = 0x64666173  # of PostgreSQL's advisory locks: who changes the schema
_SYNCHRONOUS = ("normal", "full")


class Database:
    """Tables made or upgraded on opening. Thread-safe.

    url: sqlite:///FILE, postgresql://..., or the path of an SQLite file, which is made with mode 0600. A commit of
    SQLite outlives the process; a power cut may take the last ones, unless the URL ends in `?synchronous=full`, which
    costs a sync of the disk each.

    create: whether to make the tables where there are none.

    Raises ValidationError for another URL and where there are none, UnsupportedError where a package is missing or the
    schema is newer, DatabaseError where it does not answer.
    """

    def __init__(self, url: str, *, create: bool = False) -> None:
        parsed = _parse(url)
        self.file = Path(str(parsed.database)) if parsed.get_backend_name() == "sqlite" else None
        self.name = str(self.file) if self.file else parsed.render_as_string(hide_password=True)
        self._engine = _sqlite(parsed, self.file, create) if self.file else _postgres(parsed)
        with self.writing() as connection:
            if self.file is None:
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
            self.secret = prepare(connection, create=create)

    @contextmanager
    def reading(self, *, long: bool = False) -> Iterator[sa.Connection]:
        """A connection to read with. long: the statement may take minutes."""
        with self._answering(), self._engine.begin() as connection:
            if long and self.file is None:
                connection.exec_driver_sql(f"SET LOCAL statement_timeout = {int(LONG * 1000)}")
            yield connection

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """A transaction: committed at the end, rolled back by an exception."""
        engine = self._engine.execution_options(dfastllm_writes=True)
        with self._answering(), engine.begin() as connection:
            yield connection

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except sa.exc.IntegrityError:
            raise  # of what was asked, not of the database
        except sa.exc.SQLAlchemyError as error:
            reason = " ".join(str(getattr(error, "orig", None) or error).split())[:300]
            raise DatabaseError(f"The database of tenants ({self.name}) does not answer: {reason}.") from error

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()


def _parse(url: str) -> sa.URL:
    if "://" not in url:
        return sa.URL.create("sqlite", database=url)
    try:
        parsed = sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError):
        raise ValidationError("tenants_db is no URL.", param="tenants_db", hint=_FORMS) from None
    if parsed.get_backend_name() in ("postgresql", "postgres"):
        return parsed.set(drivername="postgresql+psycopg")
    if parsed.get_backend_name() != "sqlite" or parsed.database in (None, "", ":memory:"):
        raise ValidationError(
            f"tenants_db must be a file or a PostgreSQL database; got {parsed.render_as_string(hide_password=True)!r}.",
            param="tenants_db",
            hint=_FORMS,
        )
    return parsed


_FORMS = "Write a path, sqlite:///PATH, or postgresql://USER:PASSWORD@HOST/NAME."


def _sqlite(url: sa.URL, file: Path, create: bool) -> sa.Engine:
    synchronous = str(url.query.get("synchronous", "normal")).lower()
    if set(url.query) - {"synchronous"} or synchronous not in _SYNCHRONOUS:
        raise ValidationError(
            f"tenants_db: of an SQLite URL only ?synchronous=normal or full is known; got {dict(url.query)}.",
            param="tenants_db",
        )
    if not file.exists():
        if not create:
            raise no_database()
        try:
            os.close(os.open(file, os.O_CREAT | os.O_RDWR, 0o600))
        except OSError as error:
            raise ValidationError(
                f"tenants_db: {file} cannot be made: {error.strerror}.",
                param="tenants_db",
                hint="Make its directory first.",
            ) from None
    if file.stat().st_mode & 0o077:
        log.warning("others of this machine may open %s, which holds hashes of keys: chmod 600 it", file)
    there = _which(file)

    def connect() -> sqlite3.Connection:
        """Makes no file: SQLite by itself would put an empty one in the place of one that was removed."""
        name = f"file:{quote(str(file.absolute()))}?mode=rw"
        return sqlite3.connect(name, uri=True, timeout=TIMEOUT, check_same_thread=False)

    engine = sa.create_engine(url.set(query={}), creator=connect)

    @sa.event.listens_for(engine, "connect")
    def configure(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # BEGIN is ours, below; the driver's own is late, and no writer's
        _write_ahead(connection)
        for pragma in (f"synchronous={synchronous}", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}").close()

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        if _which(file) != there:  # what is written to a file without a name is lost with the process
            raise DatabaseError(
                f"The database of tenants ({file}) does not answer: its file was removed or replaced.",
                hint="Put it back, or start the server again with the one that is to hold.",
            )
        writes = connection.get_execution_options().get("dfastllm_writes")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _write_ahead(connection: Any) -> None:
    """Set the journal's mode, which is kept in the file. Where two set it at once, SQLite refuses one of them without
    waiting."""
    deadline = time.monotonic() + TIMEOUT
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL").close()
            return
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.01)


def _which(file: Path) -> tuple[int, int] | None:
    """Tells a file from another one of its name; None: it is not there."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _postgres(url: sa.URL) -> sa.Engine:
    milliseconds = int(TIMEOUT * 1000)
    limits = {
        "connect_timeout": str(int(TIMEOUT)),
        "tcp_user_timeout": str(milliseconds),  # a cut cable, too, is noticed
        "options": f"-c statement_timeout={milliseconds} -c lock_timeout={milliseconds}",
    }
    try:
        return sa.create_engine(
            url, connect_args=limits, pool_size=4, max_overflow=4, pool_timeout=TIMEOUT, pool_pre_ping=True
        )
    except ImportError:
        raise UnsupportedError(
            "A PostgreSQL database needs psycopg, which is not installed.",
            param="tenants_db",
            hint="pip install 'dfastllm[postgres]', or ./run setup postgres in a clone.",
        ) from None
