"""A real PostgreSQL server of the tests' own: in a directory of memory, on a Unix socket, as another user than root.

`python -m tests.kit.postgres` says which binaries the tests will use, or that there are none.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

PLACES = "/usr/lib/postgresql/*/bin"
# No test pulls the plug, so nothing is synced to the disk; a server that is killed keeps what it committed.
OPTIONS = ("fsync=off", "full_page_writes=off", "shared_buffers=8MB", "max_connections=40")


def binaries() -> Path | None:
    """The directory of initdb and pg_ctl: of the newest version installed, else on the path."""
    installed = sorted(Path("/").glob(PLACES[1:]), key=lambda place: float(place.parent.name))
    on_path = shutil.which("initdb")
    found = [place for place in installed if (place / "initdb").exists()]
    return found[-1] if found else Path(on_path).resolve().parent if on_path else None


def user() -> pwd.struct_passwd | None:
    """Whom the server runs as: None for this user. It refuses root."""
    if os.geteuid() != 0:
        return None
    names = [entry.pw_name for entry in pwd.getpwall()]
    return pwd.getpwnam("postgres" if "postgres" in names else "nobody")


class Postgres:
    """One server; stopped and started by tests that want it down."""

    def __init__(self, place: Path, directory: Path) -> None:
        self.place = place
        self.directory = directory
        self.data = directory / "data"

    def run(self, *command: str) -> None:
        who = user()
        options: dict[str, Any] = {} if who is None else {"user": who.pw_uid, "group": who.pw_gid, "extra_groups": []}
        environment = {"PATH": os.environ.get("PATH", ""), "LC_ALL": "C", "HOME": str(self.directory)}
        path = str(self.place / command[0])
        with (self.directory / "commands.log").open("w+") as log:  # a pipe would be held open by the server
            ran = subprocess.run(
                [path, *command[1:]], stdout=log, stderr=log, cwd=self.directory, env=environment, timeout=60, **options
            )
            log.seek(0)
            assert ran.returncode == 0, log.read()

    def make(self) -> None:
        who = user()
        if who is not None:
            os.chown(self.directory, who.pw_uid, who.pw_gid)
        self.run("initdb", "-D", str(self.data), "-U", "tests", "--auth=trust", "--no-sync", "-E", "UTF8")

    def start(self) -> None:
        settings = " ".join(f"-c {option}" for option in OPTIONS)
        sockets = f"-c listen_addresses='' -c unix_socket_directories={self.directory}"
        server_log = str(self.directory / "server.log")
        self.run("pg_ctl", "-D", str(self.data), "-w", "-l", server_log, "-o", f"{sockets} {settings}", "start")

    def stop(self) -> None:
        """As a crash does: nobody is told."""
        self.run("pg_ctl", "-D", str(self.data), "-w", "-m", "immediate", "stop")

    def database(self) -> str:
        """The URL of its one database, empty again: making another copies 300 files."""
        url = f"postgresql://tests@/postgres?host={self.directory}"
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("DROP SCHEMA public CASCADE")
            connection.execute("CREATE SCHEMA public")
        return url


@contextmanager
def postgres() -> Iterator[Postgres]:
    """A started server, gone afterwards. `binaries()` must not be None."""
    place = binaries()
    assert place is not None
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else "/tmp"  # short names: a socket's has 107 bytes at most
    directory = Path(tempfile.mkdtemp(prefix="dfastllm-pg-", dir=memory))
    server = Postgres(place, directory)
    try:
        server.make()
        server.start()
        yield server
    finally:
        try:
            if (server.data / "postmaster.pid").exists():
                server.stop()
        finally:
            shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    who = user()
    print(f"postgres: {binaries() or 'none: its tests are skipped'}, as {who.pw_name if who else 'this user'}")
