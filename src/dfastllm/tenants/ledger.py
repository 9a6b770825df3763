"""The ledger: what each request took, recorded before it is sent, so that delivered <= recorded <= generated.

A row of the ledger is one request. Each change writes the row as it stands, with the next version number; a write of an
older version changes nothing. So a row may be written again after a doubtful commit, from memory or from the journal,
and nothing is counted twice.

One thread writes: it takes what all requests brought since its last turn and commits that at once (group commit). While
the database does not answer, rows go to the journal in place of it, requests go on, and a second thread tries the
database until it has everything; it also removes rows past their time.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from dfastllm.errors import DFastLLMError
from dfastllm.settings import Settings
from dfastllm.tenants.database import Database
from dfastllm.tenants.identity import Identity
from dfastllm.tenants.journal import Journal, Row
from dfastllm.tenants.tables import USAGE, sa, upsert

__all__ = ["Entry", "Ledger", "LedgerHealth", "Status", "open_ledger"]

Status = Literal["ok", "cancelled", "failed"]
_RETRY = (0.2, 10.0)  # seconds between two tries of a database that is down: first, longest
_KEEP = 3600.0  # seconds between two looks for rows past their time
_BATCH = 500  # rows of one commit of what is owed, or is removed
_COMPACT = 64 << 20  # bytes of a journal that is written anew, with the newest line of each row
_TEXT = 512  # characters of a name

log = logging.getLogger("dfastllm.tenants")


@dataclass(frozen=True)
class LedgerHealth:
    """For metrics.

    up: rows go to the database. owed: rows that it has not got. journal_bytes: of the file that keeps them.
    commits, rows: to the database, since the start; failures: tries that failed, the journal's too.
    """

    up: bool
    owed: int
    journal_bytes: int
    commits: int
    rows: int
    failures: int


class Entry:
    """One request. Made by `Ledger.open`."""

    def __init__(self, ledger: Ledger, fixed: dict[str, Any]) -> None:
        self._ledger = ledger
        self._fixed = fixed
        self._began = time.monotonic()
        self.version = 0
        self.tokens = 0
        self.status: str = "running"
        self.seconds: float | None = None

    @property
    def id(self) -> str:
        """Of the row."""
        return str(self._fixed["id"])

    async def add(self, tokens: int) -> None:
        """Returns once `tokens` more completion tokens, and the prompt's, outlive this process: in the database, or in
        the journal while that is down. Call it before they are sent. A cancelled wait leaves them recorded."""
        await self._ledger._recorded(self, tokens)

    def close(self, status: Status) -> None:
        """How it ended; written soon, and waited for by nobody. A second call does nothing."""
        if self.status == "running":
            self.status, self.seconds = status, time.monotonic() - self._began
            self._ledger._ended(self)

    def row(self) -> Row:
        """As it stands."""
        return {
            **self._fixed,
            "completion_tokens": self.tokens,
            "version": self.version,
            "status": self.status,
            "seconds": self.seconds,
        }


class Ledger:
    """The ledger of one server process, over the database of its store. Entries may be used from any event loop.

    journal: the file for hard times, see `journal`; retention_days: after which rows are removed, 0 for never.
    Raises ValidationError for a journal that cannot be.
    """

    def __init__(self, database: Database, journal: Path, retention_days: int = 0) -> None:
        self._database = database
        self._retention = retention_days * 86400.0
        self._writer = uuid.uuid4().hex
        self._journal = Journal(journal, _mark(database), self._writer)
        self._wake = threading.Condition()  # of what the event loops share with the writer
        self._changed: dict[str, Entry] = {}
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        self._open: dict[str, Entry] = {}
        self._stopping = False
        self._owing = threading.Lock()  # of what the writer shares with the other thread
        self._owed: dict[str, Row] = dict(self._journal.left)
        self._up = not self._owed
        self._journal_fails = False
        self._commits = self._rows = self._failures = 0
        self._upsert = upsert(sqlite=database.file is not None)
        self._mend = threading.Event()  # something is owed
        self._stopped = threading.Event()  # the writer has ended
        if self._journal.dead:
            log.warning("the ledger: an earlier server was killed; it owes %d rows", len(self._owed))
        self._threads = [
            threading.Thread(target=self._write, name="dfastllm-ledger", daemon=True),
            threading.Thread(target=self._keep, name="dfastllm-ledger-keeper", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def open(self, request_id: str, identity: Identity, model: str, adapter: str, prompt_tokens: int) -> Entry:
        """A new entry; does not wait. adapter: "" for none."""
        fixed = {
            "id": uuid.uuid4().hex,
            "request_id": _clean(request_id),
            "tenant_id": identity.tenant.id,
            "key_id": identity.key.id,
            "model": _clean(model),
            "adapter": _clean(adapter),
            "prompt_tokens": prompt_tokens,
            "started": time.time(),
            "writer": self._writer,
        }
        entry = Entry(self, fixed)
        with self._wake:
            self._open[entry.id] = entry
        return entry

    def health(self) -> LedgerHealth:
        """How it stands now."""
        with self._owing:
            size = self._journal.size if self._owed else 0
            return LedgerHealth(self._up, len(self._owed), size, self._commits, self._rows, self._failures)

    def close(self) -> None:
        """Write what is left, requests that still run as cancelled, and end the threads: at most some seconds. What a
        database that is down has not got stays in the journal, for the next start."""
        with self._wake:
            left = list(self._open.values())
        for entry in left:
            entry.close("cancelled")
        with self._wake:
            self._stopping = True
            self._wake.notify()
        writer, keeper = self._threads
        writer.join()
        self._stopped.set()
        self._mend.set()
        keeper.join()
        if self._owed:
            log.warning("the ledger: %d rows stay in %s for the next start", len(self._owed), self._journal.path)
        self._journal.close(keep=bool(self._owed))

    # On the event loops.

    async def _recorded(self, entry: Entry, tokens: int) -> None:
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        with self._wake:
            entry.tokens += tokens
            self._change(entry)
            self._waiting.append((loop, future))
        await future

    def _ended(self, entry: Entry) -> None:
        with self._wake:
            self._open.pop(entry.id, None)
            self._change(entry)

    def _change(self, entry: Entry) -> None:
        entry.version += 1
        self._changed[entry.id] = entry
        self._wake.notify()

    # On the writer's thread.

    def _write(self) -> None:
        while True:
            with self._wake:
                while not self._changed and not self._stopping:
                    self._wake.wait()
                rows = [entry.row() for entry in self._changed.values()]
                waiting, self._waiting = self._waiting, []
                self._changed.clear()
            if not rows:
                return
            self._record(rows)
            _release(waiting)

    def _record(self, rows: list[Row]) -> None:
        if self._up:
            try:
                self._commit(rows)
                return
            except Exception as error:
                self._fell(error)
        with self._owing:
            self._owed.update((str(row["id"]), row) for row in rows)
            self._up = False  # the other thread may have found nothing owed a moment ago
            self._note(rows)
        self._mend.set()

    def _commit(self, rows: list[Row]) -> None:
        with self._database.writing() as connection:
            connection.execute(self._upsert, rows)
        self._commits += 1
        self._rows += len(rows)

    def _fell(self, error: Exception) -> None:
        self._failures += 1
        known = error if isinstance(error, DFastLLMError) else None
        log.error(
            "the ledger goes to %s until the database answers: %s",
            self._journal.path,
            known or repr(error),
            exc_info=None if known else error,
        )

    def _note(self, rows: list[Row]) -> None:
        """Rows to the journal; where that fails, too, they stay in memory and are written with the next that works."""
        try:
            if self._journal_fails or self._journal.size > _COMPACT:
                self._journal.rewrite(self._owed.values())
            else:
                self._journal.append(rows)
        except DFastLLMError as error:
            self._failures += 1
            if not self._journal_fails:
                log.critical("%s Usage is in memory only, and lost if this process is killed.", error)
            self._journal_fails = True
        else:
            self._journal_fails = False

    # On the other thread.

    def _keep(self) -> None:
        wait, look = _RETRY[0], 0.0
        while True:
            stopped = self._stopped.is_set()
            paid = self._pay()
            if stopped:
                return
            if paid and time.monotonic() >= look:
                self._tidy()
                look = time.monotonic() + _KEEP
            if paid:
                wait = _RETRY[0]
                self._mend.wait(_KEEP)
                self._mend.clear()
            else:
                self._stopped.wait(wait)
                wait = min(wait * 2, _RETRY[1])

    def _pay(self) -> bool:
        """Write everything that is owed. Whether all of it is there."""
        while batch := self._oldest():
            try:
                self._commit(batch)
            except Exception as error:
                self._failures += 1
                log.warning("the ledger owes %d rows: %s", len(self._owed), error)
                return False
            with self._owing:
                for row in batch:
                    if self._owed[row["id"]]["version"] == row["version"]:
                        del self._owed[row["id"]]
        return True

    def _oldest(self) -> list[Row]:
        """Some of what is owed; where it is nothing, rows go to the database again."""
        with self._owing:
            batch = list(islice(self._owed.values(), _BATCH))
            if not batch and not self._up:
                self._up = True
                log.warning("the ledger's database has everything")
                try:
                    self._journal.rewrite(())
                except DFastLLMError as error:  # what stays in the file is written again at the next start: no harm
                    self._journal_fails = True
                    log.warning("%s", error)
        return batch

    def _tidy(self) -> None:
        """Requests whose server was killed no longer run; rows past their time go."""
        try:
            if self._journal.dead:
                with self._database.writing() as connection:
                    theirs = sa.and_(USAGE.c.writer.in_(self._journal.dead), USAGE.c.status == "running")
                    connection.execute(USAGE.update().where(theirs).values(status="lost"))
                self._journal.dead = []
            old = sa.select(USAGE.c.id).where(USAGE.c.started < time.time() - self._retention).limit(_BATCH)
            removed = _BATCH if self._retention else 0
            while removed == _BATCH:
                with self._database.writing() as connection:
                    removed = connection.execute(USAGE.delete().where(USAGE.c.id.in_(old))).rowcount
        except DFastLLMError as error:
            log.warning("the ledger is tidied later: %s", error)


def open_ledger(database: Database, settings: Settings) -> Ledger:
    """The ledger of a server with these settings. Its journal lies where `usage_journal` says; else beside the SQLite
    file, or, for another database, in a file of its own below ~/.local/state/dfastllm."""
    if settings.usage_journal is not None:
        journal = Path(settings.usage_journal)
    elif database.file is not None:
        journal = database.file.with_name(f"{database.file.name}-usage.journal")
    else:
        state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "dfastllm"
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        journal = state / f"usage-{_mark(database)[:8]}.journal"
    return Ledger(database, journal, settings.usage_retention_days)


def _mark(database: Database) -> str:
    """What a journal calls its database."""
    return hashlib.sha256(b"journal" + database.secret.encode()).hexdigest()[:16]


def _clean(name: str) -> str:
    """A text that every database takes."""
    return name.replace("\0", "").encode("utf-8", "replace").decode()[:_TEXT]


def _release(waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]]) -> None:
    """Let go on who waited for these rows."""
    for loop, futures in _by_loop(waiting).items():
        with suppress(RuntimeError):  # the loop was closed: nobody waits
            loop.call_soon_threadsafe(_resolve, futures)


def _by_loop(
    waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]],
) -> dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]]:
    loops: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for loop, future in waiting:
        loops.setdefault(loop, []).append(future)
    return loops


def _resolve(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)
