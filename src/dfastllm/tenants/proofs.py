"""Who proved a key lately, so that argon2 runs seldom, off the event loop, and never many at a time.

A key that was proved is remembered as a keyed digest of its text, under a random key of this process. For `REMEMBERED`
seconds its tenant and state are taken from memory; then they are read again, so a key that is disabled or an allow-list
that shrinks counts within that time. The proof itself holds as long as the stored hash is the same one.

While the database does not answer, what was known of a key goes on for `STALE` seconds; a key that is not known gets
503.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from dfastllm.errors import AuthenticationError, DatabaseError, RateLimitError
from dfastllm.tenants.identity import Identity
from dfastllm.tenants.keys import proves, split

__all__ = ["REMEMBERED", "STALE", "Found", "Proofs"]

REMEMBERED = 5.0  # seconds
STALE = 900.0  # seconds without a database in which a known key goes on
_MOST = 8192  # keys in memory
_THREADS = 2  # that prove: 19 MiB and a core for some tens of milliseconds each
_WAITING = 64  # texts that wait for one; more are told to come back
_UNKNOWN = "The API key is not known."

log = logging.getLogger("dfastllm.tenants")


@dataclass(frozen=True)
class Found:
    """What the database says of a key: whose it is, and the hash of its secret."""

    identity: Identity
    hash: str


@dataclass(frozen=True)
class _Proved:
    """found: None for a text that is no key. read: when the database said so; until: when it is asked again."""

    found: Found | None
    read: float
    until: float


class Proofs:
    """find: the key of an id, from the database; raises DatabaseError. clock: seconds that never go back; wall: seconds
    since 1970."""

    def __init__(
        self,
        find: Callable[[str], Found | None],
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._find = find
        self._clock = clock
        self._wall = wall
        self._pepper = secrets.token_bytes(32)
        self._known: OrderedDict[bytes, _Proved] = OrderedDict()
        self._running: dict[bytes, Future[Identity]] = {}
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(_THREADS, "dfastllm-keys")
        self._answers = True  # whether the database did when it was last asked

    async def identify(self, text: str) -> Identity:
        """See `Store.identify`."""
        digest = self._digest(text)
        known = self._remembered(digest)
        if known is not None and known.until > self._clock():
            return self._usable(known)
        if known is not None and not self._answers and known.read + STALE > self._clock():
            self._start(digest, text)  # asks the database again, while this request goes on
            return self._usable(known)
        return await asyncio.shield(asyncio.wrap_future(self._start(digest, text)))

    def authenticate(self, text: str) -> Identity:
        """See `Store.authenticate`."""
        digest = self._digest(text)
        known = self._remembered(digest)
        if known is not None and known.until > self._clock():
            return self._usable(known)
        return self._look(digest, text)

    def forget(self) -> None:
        """Ask the database again about every key: something was changed."""
        with self._lock:
            for digest, known in self._known.items():
                self._known[digest] = _Proved(known.found, known.read, until=0.0)

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(cancel_futures=True)

    def _digest(self, text: str) -> bytes:
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), key=self._pepper, digest_size=32).digest()

    def _remembered(self, digest: bytes) -> _Proved | None:
        with self._lock:
            known = self._known.get(digest)
            if known is not None:
                self._known.move_to_end(digest)
            return known

    def _start(self, digest: bytes, text: str) -> Future[Identity]:
        """The look-up of this text that runs, or a new one."""
        with self._lock:
            running = self._running.get(digest)
            if running is not None:
                return running
            if len(self._running) >= _WAITING:
                raise RateLimitError("Too many new API keys are being checked.", retry_after=1.0)
            started = self._running[digest] = self._threads.submit(self._look, digest, text)
        started.add_done_callback(lambda _: self._ended(digest))
        return started

    def _ended(self, digest: bytes) -> None:
        with self._lock:
            self._running.pop(digest, None)

    def _look(self, digest: bytes, text: str) -> Identity:
        parts, known = split(text), self._remembered(digest)
        found: Found | None = None
        began = self._clock()
        if parts is not None:
            try:
                found = self._find(parts[0])
            except DatabaseError:
                self._notice(False)
                if known is not None and known.read + STALE > self._clock():
                    return self._usable(known)
                raise
            self._notice(True)
            before = None if known is None or known.found is None else known.found.hash
            now = None if found is None else found.hash
            if (now is None or now != before) and not proves(parts[1], now):
                found = None
        kept = _Proved(found, began, began + REMEMBERED)
        with self._lock:
            self._known[digest] = kept
            self._known.move_to_end(digest)
            while len(self._known) > _MOST:
                self._known.popitem(last=False)
        return self._usable(kept)

    def _notice(self, answers: bool) -> None:
        if answers != self._answers:
            word = "answers again" if answers else f"does not answer: keys that are known go on for {STALE:.0f} s"
            log.warning("the database of tenants %s", word)
        self._answers = answers

    def _usable(self, known: _Proved) -> Identity:
        """Raises AuthenticationError; why a key is refused is said only to who proved it."""
        if known.found is None:
            raise AuthenticationError(_UNKNOWN, hint="Send it as 'Authorization: Bearer dfk_...'.")
        identity = known.found.identity
        if identity.tenant.disabled:
            raise AuthenticationError(f"The tenant {identity.tenant.name!r} is disabled.")
        if identity.key.disabled:
            raise AuthenticationError(f"The API key {identity.key.id} is disabled.")
        if identity.key.expires is not None and identity.key.expires <= self._wall():
            raise AuthenticationError(f"The API key {identity.key.id} has expired.")
        return identity
