"""The ledger behind a real server: killed under load, and with a database that goes away while requests run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from dfastllm.errors import DatabaseError
from dfastllm.server.listening import listen
from dfastllm.tenants.database import Database
from dfastllm.tenants.ledger import Ledger
from dfastllm.tenants.store import Store
from dfastllm.tenants.tables import USAGE, sa
from tests.kit.cheap_keys import cheap_keys
from tests.kit.live import Live, serving
from tests.kit.served import random_engine, slow

# A server of its own process, which writes down what its engine generates before anybody is told.
KILLED = """
import os, sys
from dfastllm.engine import Worker
from dfastllm.server.run import Server
from dfastllm.server.app import create_app
from dfastllm.server.listening import listen
from dfastllm.settings import Settings
from tests.kit.served import random_engine, slow
deliver = Worker._deliver
out = os.open(sys.argv[3], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def told(self, events):
    for event in events:
        if event.token_ids:
            os.write(out, f"{event.request_id} {len(event.token_ids)}\\n".encode())
    deliver(self, events)
Worker._deliver = told
settings = Settings(tenants_db=sys.argv[1], port=int(sys.argv[2]))
engines = {"m": slow(random_engine("llama"), 0.002)}
with Worker(engines) as worker, listen("127.0.0.1", settings.port) as listener:
    Server(create_app(worker, engines, settings), settings).run(sockets=[listener])
"""


@pytest.fixture(autouse=True)
def _cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    cheap_keys(monkeypatch)


@pytest.fixture
def tenants(tmp_path: Path) -> tuple[str, str]:
    """The database and a key."""
    file = str(tmp_path / "tenants.db")
    store = Store(file, create=True)
    store.create_tenant("acme", actor="cli:me")
    _, key = store.create_key("acme", actor="cli:me")
    store.close()
    return file, key


class Reader(threading.Thread):
    """A client that asks again and again until its server dies. got: tokens that came, by response id; ids of whole
    answers only when they came."""

    def __init__(self, url: str, key: str, *, stream: bool) -> None:
        super().__init__()
        self.url = url
        self.headers = {"Authorization": f"Bearer {key}"}
        self.stream = stream
        self.got: Counter[str] = Counter()

    def run(self) -> None:
        try:
            with httpx.Client(timeout=30, headers=self.headers) as http:
                while True:
                    self._ask(http)
        except httpx.HTTPError:
            return

    def _ask(self, http: httpx.Client) -> None:
        body = {"prompt": "abc", "max_tokens": 40, "ignore_eos": True, "return_token_ids": True, "stream": self.stream}
        if not self.stream:
            answer = http.post(f"{self.url}/v1/completions", json=body).raise_for_status().json()
            self.got[answer["id"]] += len(answer["choices"][0]["token_ids"])
            return
        with http.stream("POST", f"{self.url}/v1/completions", json=body) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    chunk = json.loads(line[6:])
                    self.got[chunk["id"]] += sum(len(choice.get("token_ids") or ()) for choice in chunk["choices"])


@contextmanager
def running(database: str, generated: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    with listen("127.0.0.1", 0) as probe:
        port = probe.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, database, str(port), str(generated)]
    process = subprocess.Popen(command, env=environment)
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + 60
    try:
        while True:
            try:
                httpx.get(f"{url}/health/ready").raise_for_status()
                break
            except httpx.HTTPError:
                assert process.poll() is None
                assert time.monotonic() < end
                time.sleep(0.05)
        yield url, process
    finally:
        process.kill()
        process.wait()


def recorded(database: str, journal: Path) -> dict[str, tuple[int, int, str]]:
    """(prompt, completion, status) by response id, once the next server has paid what the killed one owed."""
    opened = Database(database)
    ledger = Ledger(opened, journal)
    end = time.monotonic() + 20
    while not ledger.health().up and time.monotonic() < end:
        time.sleep(0.01)
    ledger.close()
    with opened.reading() as connection:
        rows = connection.execute(sa.select(USAGE)).all()
    opened.close()
    assert len({row.request_id for row in rows}) == len(rows), "a request was written twice"
    return {row.request_id: (row.prompt_tokens, row.completion_tokens, row.status) for row in rows}


def test_a_server_killed_under_load_has_recorded_what_it_delivered(tenants: tuple[str, str], tmp_path: Path) -> None:
    """SIGKILL, with six clients reading: for every request delivered <= recorded <= generated, and no row twice."""
    database, key = tenants
    log = tmp_path / "generated"
    with running(database, log) as (url, process):
        readers = [Reader(url, key, stream=number % 3 != 0) for number in range(6)]
        for reader in readers:
            reader.start()
        end = time.monotonic() + 30
        while sum(len(reader.got) for reader in readers) < 15 and time.monotonic() < end:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        for reader in readers:
            reader.join()
    generated: Counter[str] = Counter()
    for line in log.read_text().splitlines():
        name, count = line.split()
        generated[name.rpartition("-")[0]] += int(count)
    rows = recorded(database, Path(f"{database}-usage.journal"))
    delivered = sum((reader.got for reader in readers), Counter())
    assert sum(delivered.values()) > 200
    for name in generated:
        prompt, completion, _ = rows.get(name, (0, 0, ""))
        assert delivered[name] <= completion <= generated[name], name
        assert not delivered[name] or prompt == 3
    assert set(delivered) <= set(generated)
    assert sum(status == "ok" for _, _, status in rows.values()) >= 10
    assert any(0 < rows[name][1] < 40 for name in rows), "no stream was cut in its middle"


def test_a_database_that_is_down_stops_no_request(
    tenants: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests of known keys go on, whole and streamed; metric and log say so; afterwards the sums are exact."""
    database, key = tenants
    down, writing = threading.Event(), Database.writing

    @contextmanager
    def failing(self: Database) -> Iterator[Any]:
        if down.is_set():
            raise DatabaseError("It does not answer.")
        with writing(self) as connection:
            yield connection

    monkeypatch.setattr(Database, "writing", failing)
    headers = {"Authorization": f"Bearer {key}"}

    def ask(live: Live, **body: Any) -> httpx.Response:
        asked = {"prompt": "abc", "max_tokens": 5, "ignore_eos": True, **body}
        answer = live.post("/v1/completions", asked, headers=headers)
        assert answer.status_code == 200, answer.text
        return answer

    with serving({"m": slow(random_engine("llama"), 0.001)}, tenants_db=database) as live:
        ask(live)
        down.set()
        for n in range(4):
            ask(live, stream=bool(n % 2))
        assert live.metric("ledger_up") == 0
        assert live.metric("ledger_owed_rows") >= 4
        assert live.metric("ledger_write_failures") >= 1
        down.clear()
        end = time.monotonic() + 20
        while live.metric("ledger_up") == 0 and time.monotonic() < end:
            time.sleep(0.02)
        assert live.metric("ledger_owed_rows") == 0
        ask(live, n=2)
    rows = recorded(database, tmp_path / "another.journal")
    assert sorted(rows.values()) == [(3, 5, "ok")] * 5 + [(3, 10, "ok")]


def test_a_server_says_how_many_tenants_it_has_and_refuses_what_is_no_database(
    tenants: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from dfastllm.errors import ValidationError
    from dfastllm.server.app import create_app
    from dfastllm.settings import Settings

    store = Store(tenants[0])
    store.create_tenant("gone", actor="cli:me", disabled=True)
    store.close()
    with caplog.at_level("INFO", "dfastllm.server"):
        app = create_app(settings=Settings(tenants_db=tenants[0]))
    app.state.serving.close()
    assert "2 tenants, 1 of them disabled" in caplog.text
    for bad in (tmp_path / "nowhere.db", "mysql://x/y"):
        with pytest.raises(ValidationError) as refused:
            create_app(settings=Settings(tenants_db=str(bad)))
        assert refused.value.param == "tenants_db"
