"""A server's ledger killed again and again, `python -m tests.tenants.killed URL JOURNAL MODE ...`: JSON of what was
delivered, recorded and generated of each request.

Each MODE is a process of its own that says what it generates before it asks the ledger, and what it delivers after;
SIGKILL comes at any moment. "up"; "down", where the database never answers the process that is killed; "flapping",
where commits fail, half of them after they were done.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa

from dfastllm.errors import DatabaseError
from dfastllm.tenants import ANYONE
from dfastllm.tenants.database import Database
from dfastllm.tenants.ledger import Ledger
from dfastllm.tenants.tables import USAGE

REQUESTS = 6  # at once


class Unsure(Database):
    """A database whose commits fail with probability `fails`, half of those after the commit."""

    fails = 0.0

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        bad, late = random.random() < self.fails, random.random() < 0.5
        if bad and not late:
            raise DatabaseError("It does not answer.")
        with super().writing() as connection:
            yield connection
        if bad:
            raise DatabaseError("The connection was lost.")


def serve(url: str, journal: Path, mode: str, pipe: int, name: str) -> None:
    """The process that is killed."""
    database = Unsure(url)
    ledger = Ledger(database, journal)
    database.fails = {"up": 0.0, "down": 1.0, "flapping": 0.5}[mode]

    async def one(number: int) -> None:
        for turn in range(1_000_000):
            request = f"{name}-{number}-{turn}"
            entry = ledger.open(request, ANYONE, "m", "", 3)
            for total in range(2, 2 * random.randint(2, 9), 2):
                os.write(pipe, f"g {request} {total}\n".encode())
                await entry.add(2)
                os.write(pipe, f"d {request} {total}\n".encode())
            entry.close("ok")

    async def all_of_them() -> None:
        await asyncio.gather(*map(one, range(REQUESTS)))

    asyncio.run(all_of_them())


def killed(url: str, journal: Path, mode: str, name: str) -> tuple[dict[str, int], dict[str, int]]:
    """(delivered, generated) of a process that was killed after some moments."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            random.seed(name)
            serve(url, journal, mode, writer, name)
        finally:
            os._exit(1)
    os.close(writer)
    said, wanted = bytearray(), random.randint(10, 200)
    with open(reader, "rb", buffering=0) as pipe:
        while said.count(b"\n") < wanted:
            said += pipe.read(4096)
        time.sleep(random.random() * 0.01)
        os.kill(child, signal.SIGKILL)
        said += pipe.read()
    os.waitpid(child, 0)
    counts: dict[str, dict[str, int]] = {"g": {}, "d": {}}
    for line in said.decode().splitlines():
        kind, request, total = line.split(" ")
        counts[kind][request] = int(total)
    return counts["d"], counts["g"]


def paid(url: str, journal: Path) -> Database:
    """The database once the next server has paid what the killed one owed."""
    database = Database(url)
    ledger = Ledger(database, journal)
    end = time.monotonic() + 20
    while not ledger.health().up and time.monotonic() < end:
        time.sleep(0.01)
    ledger.close()
    return database


def main() -> None:
    url, journal, modes = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    random.seed(0)
    Database(url, create=True).close()
    delivered: dict[str, int] = {}
    generated: dict[str, int] = {}
    for number, mode in enumerate(modes):
        sent, made = killed(url, journal, mode, f"r{number}")
        delivered |= sent
        generated |= made
    for _ in range(2):  # the second start finds nothing more
        database = paid(url, journal)
        with database.reading() as connection:
            rows = connection.execute(sa.select(USAGE)).all()
        database.close()
    recorded = [(row.request_id, row.completion_tokens, row.prompt_tokens, row.status) for row in rows]
    print(json.dumps({"delivered": delivered, "generated": generated, "recorded": recorded}))


if __name__ == "__main__":
    main()
