"""Where a server listens, and how it takes connections in: a TCP port or a Unix socket, as many as there is room for.

asyncio's own servers know no bound, and log every accept that fails for want of a file (thousands a second). Here the
number of connections has a limit under that of open files; a connection beyond it takes the place of an idle one or is
told 503 at once; and accepting rests after an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dfastllm.errors import TooManyConnectionsError, ValidationError
from dfastllm.server.connections import Connection, refusal
from dfastllm.server.cuts import Tally

__all__ = ["Acceptor", "address_of", "connections_allowed", "listen", "listen_unix", "raise_file_limit"]

BACKLOG = 1024  # connections that wait in the kernel
AT_ONCE = 64  # accepted in one turn of the event loop
REST = 0.5  # s without accepting after an error
LEAVING = 64  # refused connections that may still read their answer
LEAVE = 1.0  # s they have for it
RESERVE = 128  # files that are not connections: the models', logs, the event loop's


def raise_file_limit(connections: int) -> None:
    """Let this process open as many files as so many connections need, where the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + RESERVE
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):  # not allowed: connections_allowed says what remains
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def connections_allowed(wanted: int) -> int:
    """The limit of connections: `wanted`, or what the limit of open files leaves where that is less."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return wanted if soft == resource.RLIM_INFINITY else max(1, min(wanted, soft - RESERVE))


def listen(host: str, port: int) -> socket.socket:
    """A bound TCP socket. host: a name or an address, an IPv6 one also in brackets. Raises ValidationError naming port
    or host."""
    name = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        family, _, _, _, address = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError) as error:
        raise ValidationError(f"There is no address {host!r}: {error}.", param="host") from error
    # With its protocol named: asyncio lets small writes leave at once (TCP_NODELAY) only where it reads TCP there.
    # Without, a client that delays its acknowledgements sees a stream's first tokens 40 ms late.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise _refused(host, port, error) from error
    return listener


def _refused(host: str, port: int, error: OSError) -> ValidationError:
    if error.errno == errno.EADDRINUSE:
        return ValidationError(
            f"Port {port} on {host} is in use.",
            param="port",
            hint="Stop what listens there, or take another with --port (0: any free one).",
        )
    if error.errno == errno.EACCES:
        return ValidationError(f"Port {port} may not be opened by this user.", param="port", hint="Use one above 1023.")
    return ValidationError(f"{host} port {port} cannot be listened on: {error.strerror}.", param="host")


@contextlib.contextmanager
def listen_unix(path: str, mode: int) -> Iterator[socket.socket]:
    """A bound Unix socket for the time of the block; its file has the permissions `mode` from the first moment, and is
    gone afterwards. The file of a server that was killed is replaced. Raises ValidationError naming uds."""
    place = Path(path)
    _clear(place)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o777)  # nobody may connect until the mode is set
    try:
        listener.bind(path)
        os.chmod(path, mode)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        what = error.strerror or str(error)  # a path that is too long has no errno
        raise ValidationError(f"The socket {path} cannot be made: {what}.", param="uds") from error
    finally:
        os.umask(before)
    made = os.stat(path)
    try:
        yield listener
    finally:
        listener.close()
        with contextlib.suppress(OSError):  # removed by another
            now = os.stat(path)
            if (now.st_dev, now.st_ino) == (made.st_dev, made.st_ino):  # not the one of a server that came after us
                place.unlink()


def _clear(place: Path) -> None:
    """Remove the file of a socket that nobody listens on any more. Raises ValidationError for any other file."""
    try:
        kind = place.lstat().st_mode
    except OSError:
        return  # nothing there, or binding says why not
    if not stat.S_ISSOCK(kind):
        raise ValidationError(
            f"{place} is a file of another kind, no socket.", param="uds", hint="Name a path that is free."
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(place))
        except ConnectionRefusedError:
            place.unlink(missing_ok=True)
        except OSError as error:
            raise ValidationError(f"The socket {place} is there, and cannot be tried: {error}.", param="uds") from error
        else:
            raise ValidationError(
                f"The socket {place} is in use.", param="uds", hint="Stop what listens there, or take another path."
            )


def address_of(listener: socket.socket) -> str:
    """Where a socket listens, as a URL; a Unix socket as unix:PATH."""
    name = listener.getsockname()
    if listener.family == socket.AF_UNIX:
        return f"unix:{name}"
    host, port = name[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Acceptor:
    """Takes the connections of one listening socket, `limit` at most at a time. Has the face of an asyncio server, for
    uvicorn: `close` and `wait_closed`. Runs on the event loop's thread alone.

    make         the protocol of a new connection.
    connections  those that are open, kept by the protocols.
    """

    def __init__(
        self,
        listener: socket.socket,
        make: Callable[[], Connection],
        connections: set[Any],
        limit: int,
        tally: Tally,
    ) -> None:
        self.listener = listener
        self.make = make
        self.connections = connections
        self.limit = limit
        self.tally = tally
        self.loop = asyncio.get_running_loop()
        self._opening: set[asyncio.Task[Any]] = set()
        self._leaving: dict[socket.socket, asyncio.TimerHandle] = {}
        self._resting: asyncio.TimerHandle | None = None
        self._full = refusal(
            TooManyConnectionsError(
                f"This server has {limit} connections, its most, and none of them is idle.", hint="Try again soon."
            )
        )
        listener.setblocking(False)
        self._start()

    def close(self) -> None:
        """Accept no more. The socket stays its owner's to close."""
        self.loop.remove_reader(self.listener)
        if self._resting is not None:
            self._resting.cancel()
        for refused in list(self._leaving):
            self._leave(refused)

    async def wait_closed(self) -> None:
        """For uvicorn: there is nothing to wait for."""

    def _start(self) -> None:
        self._resting = None
        self.loop.add_reader(self.listener, self._accept)

    def _accept(self) -> None:
        for _ in range(AT_ONCE):
            try:
                client, _ = self.listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                self._rest(error)
                return
            client.setblocking(False)
            if len(self.connections) + len(self._opening) < self.limit or self._make_room():
                self._open(client)
            else:
                self._turn_away(client)

    def _rest(self, error: OSError) -> None:
        """No files or no memory are left: those who wait stay in the kernel's queue while it lasts."""
        self.tally.note("files", f"accepting rests for {REST:g} s: {error.strerror}")
        self.loop.remove_reader(self.listener)
        self._resting = self.loop.call_later(REST, self._start)

    def _open(self, client: socket.socket) -> None:
        task = self.loop.create_task(self.loop.connect_accepted_socket(self.make, client))
        self._opening.add(task)

        def opened(done: asyncio.Task[Any]) -> None:
            self._opening.discard(done)
            if done.cancelled() or done.exception() is not None:
                client.close()

        task.add_done_callback(opened)

    def _make_room(self) -> bool:
        """End the connection that has waited longest for its client, if there is one that may go."""
        now = self.loop.time()
        spare = [connection for connection in self.connections if connection.expendable(now)]
        if not spare:
            return False
        min(spare, key=lambda connection: connection.waiting_since).drop("capacity", "an idle one made room")
        return True

    def _turn_away(self, client: socket.socket) -> None:
        self.tally.note("capacity", f"all {self.limit} connections are busy")
        with contextlib.suppress(OSError):  # gone already
            client.send(self._full)
            client.shutdown(socket.SHUT_WR)
        if len(self._leaving) >= LEAVING:
            client.close()
            return
        self._leaving[client] = self.loop.call_later(LEAVE, self._leave, client)
        self.loop.add_reader(client, self._hear_out, client)

    def _hear_out(self, client: socket.socket) -> None:
        """Throw away what a refused client sends: closing on unread bytes would take its answer from it."""
        try:
            more = client.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            more = b""
        if not more:
            self._leave(client)

    def _leave(self, client: socket.socket) -> None:
        self._leaving.pop(client).cancel()
        self.loop.remove_reader(client)
        client.close()
