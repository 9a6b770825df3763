"""The LoRA adapters of one engine: what a name stands for, which objects are in memory, and who still runs on them.

An adapter object never changes. A request is admitted on the object that its name stands for at that moment and holds
it, by a `Lease`, until it ends, whatever is loaded, reloaded, unloaded or evicted meanwhile. What is in memory has a
number in the runner's table, which the rows of its requests carry; the engine's thread gives the runner a new table
between two steps, and a number goes to another object only when nobody holds the one it had.

Files are read on the threads of those who ask for them, never on the engine's: `load` reads a directory for the first
time, and `lease` reads an adapter again that was evicted, whose content must then be what it was. At most `most`
adapters of `memory` bytes together are kept; the least recently used one that nobody holds gives way.

What an adapter does to a row is the runner's business; what a directory holds is that of `dfastllm.lora`.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dfastllm.errors import AdapterError, AdapterNotFoundError, AdaptersBusyError, ValidationError
from dfastllm.lora import Adapter

__all__ = ["Adapters", "Lease", "Named", "Read"]

Read = Callable[[Path], Adapter]
NAME = 256  # characters; it goes into logs, addresses and labels of metrics as it is


@dataclass(frozen=True, slots=True)
class Named:
    """What a name stands for.

    path     the directory that it was read from.
    hash     of its content. size: bytes in memory. rank: the largest of its matrices.
    created  seconds since the epoch: when it was loaded.
    """

    name: str
    path: Path
    hash: bytes
    size: int
    rank: int
    created: int


@dataclass(slots=True, eq=False)
class _Place:
    """An adapter in memory. number: in the runner's table. held: leases of it."""

    number: int
    adapter: Adapter
    held: int = 0


class Lease:
    """A request's hold on the adapter that it was admitted with.

    name     the name that it asked for.
    number   the adapter's number in the runner's table.
    release  ends the hold; harmless when it has ended. A lease that nobody refers to any more ends by itself.
    """

    def __init__(self, name: str, adapter: Adapter, number: int, dropped: deque[int]) -> None:
        self.name = name
        self.adapter = adapter
        self.number = number
        self.release = weakref.finalize(self, dropped.append, number)
        self.release.atexit = False

    @property
    def hash(self) -> bytes:
        return self.adapter.hash


class Adapters:
    """The adapters of one engine. Thread-safe.

    read    the adapter in a directory. Raises AdapterError.
    most    adapters in memory, at most; memory: their bytes together, at most.
    loads, evictions  counted since the start: directories read, and objects given up for others.
    """

    def __init__(self, read: Read, most: int, memory: int) -> None:
        self.read = read
        self.most = most
        self.memory = memory
        self.loads = 0
        self.evictions = 0
        self._names: dict[str, Named] = {}
        self._places: dict[bytes, _Place] = {}  # by the adapter's hash, least recently used first
        self._dropped: deque[int] = deque()  # numbers of leases that ended; appended to on any thread, without a lock
        self._changed = False  # the runner's table is not that of `_places`
        self._lock = threading.Lock()
        self._reading = threading.Lock()  # one directory at a time, so that no more than one is beyond the budget

    def load(self, name: str, path: Path, *, replace: bool = False) -> Named:
        """Read the adapter in a directory and let the name stand for it. replace: also where the name stands for one
        already; requests that run go on with the one they have. Raises ValidationError for a name that cannot be or is
        taken, AdapterError for a directory that cannot be used."""
        if not name or name != name.strip() or ":" in name or not name.isprintable() or len(name) > NAME:
            raise ValidationError(
                f"an adapter's name must be at most {NAME} printable characters without ':' and outer spaces, "
                f"got {name!r:.80}.",
                param="lora_name",
            )
        with self._reading:
            if not replace and name in self._names:
                raise ValidationError(
                    f"the adapter {name!r} is loaded already, from {self._names[name].path}.",
                    param="lora_name",
                    hint="Unload it first, or ask to replace it.",
                )
            adapter = self.read(path)
            if adapter.bytes > self.memory:
                raise AdapterError(
                    f"the adapter {name!r} takes {adapter.bytes:,} bytes; {self.memory:,} are allowed for all.",
                    param="lora_memory",
                    hint="Allow more by --lora-memory.",
                )
            named = Named(name, path, adapter.hash, adapter.bytes, adapter.rank, int(time.time()))
            with self._lock:
                self.loads += 1
                old = self._names.get(name)
                self._names[name] = named
                if old is not None and old.hash != named.hash:
                    self._forget(old.hash)
                with contextlib.suppress(AdaptersBusyError):  # then it is read again when a request wants it
                    self._place(adapter)
        return named

    def unload(self, name: str) -> Named:
        """The name stands for nothing any more; requests that run on its adapter end as they would have. Raises
        AdapterNotFoundError."""
        with self._lock:
            named = self._find(name)
            del self._names[name]
            self._forget(named.hash)
        return named

    def find(self, name: str) -> Named:
        """What the name stands for. Raises AdapterNotFoundError naming what there is."""
        with self._lock:
            return self._find(name)

    def named(self) -> list[Named]:
        """Everything that has a name, by name."""
        with self._lock:
            return sorted(self._names.values(), key=lambda named: named.name)

    def in_memory(self, name: str) -> bool:
        """Whether `lease` would read nothing. Raises AdapterNotFoundError."""
        with self._lock:
            return self._find(name).hash in self._places

    def lease(self, name: str) -> Lease:
        """Hold what the name stands for now, read again where it was evicted. Raises AdapterNotFoundError,
        AdaptersBusyError where requests hold all that may be in memory, AdapterError where its directory is not what it
        was."""
        with self._lock:
            if (place := self._places.get(self._find(name).hash)) is not None:
                return self._hold(name, place)
        with self._reading:
            while True:
                with self._lock:
                    named = self._find(name)
                    if (place := self._places.get(named.hash)) is not None:
                        return self._hold(name, place)
                    self._make_room(named.size)
                adapter = self._read_again(named)
                with self._lock:
                    self.loads += 1
                    if self._names.get(name) == named:
                        return self._hold(name, self._place(adapter))

    def table(self) -> Sequence[Adapter | None] | None:
        """The adapters by number, 0 being none; None where nothing has changed since it was asked last. What is in it
        and what a lease holds are the same objects."""
        if not self._changed and not self._dropped:
            return None
        with self._lock:
            self._settle()
            if not self._changed:
                return None
            self._changed = False
            table: list[Adapter | None] = [None] * (1 + max((p.number for p in self._places.values()), default=0))
            for place in self._places.values():
                table[place.number] = place.adapter
            return table

    @property
    def used(self) -> int:
        """Bytes of those in memory."""
        with self._lock:
            return self._used()

    def held(self) -> dict[bytes, int]:
        """The leases of each adapter in memory that has any, by its hash."""
        with self._lock:
            self._settle()
            return {hash: place.held for hash, place in self._places.items() if place.held}

    def _used(self) -> int:
        return sum(place.adapter.bytes for place in self._places.values())

    def _find(self, name: str) -> Named:
        if name not in self._names:
            known = ", ".join(sorted(self._names)) or "none"
            raise AdapterNotFoundError(f"no adapter {name[:200]!r} is loaded; there are: {known:.500}.", param="lora")
        return self._names[name]

    def _hold(self, name: str, place: _Place) -> Lease:
        self._places[place.adapter.hash] = self._places.pop(place.adapter.hash)  # now the most recently used
        place.held += 1
        return Lease(name, place.adapter, place.number, self._dropped)

    def _settle(self) -> None:
        """Count the leases that have ended; what nobody holds and no name stands for is given up."""
        if not self._dropped:
            return
        numbers = {place.number: place for place in self._places.values()}
        while self._dropped:
            place = numbers[self._dropped.popleft()]
            place.held -= 1
            if not place.held and not self._is_named(place.adapter.hash):
                self._drop(place.adapter.hash)

    def _place(self, adapter: Adapter) -> _Place:
        """Its place in memory, a new one where it has none. Raises AdaptersBusyError."""
        place = self._places.get(adapter.hash)
        if place is None:
            self._make_room(adapter.bytes)
            taken = {each.number for each in self._places.values()}
            number = next(n for n in range(1, len(taken) + 2) if n not in taken)
            place = self._places[adapter.hash] = _Place(number, adapter)
            self._changed = True
        return place

    def _make_room(self, size: int) -> None:
        """Evict until one of so many bytes fits. Raises AdaptersBusyError."""
        self._settle()
        while len(self._places) >= self.most or self._used() + size > self.memory:
            idle = next((hash for hash, place in self._places.items() if not place.held), None)
            if idle is None:
                raise AdaptersBusyError(
                    f"requests run on {len(self._places)} adapters of {self._used():,} bytes, and {self.most} of "
                    f"{self.memory:,} are allowed.",
                    param="lora",
                    hint="Try again later, or allow more by --max-loras and --lora-memory.",
                )
            self._drop(idle)
            self.evictions += 1

    def _drop(self, hash: bytes) -> None:
        del self._places[hash]
        self._changed = True

    def _forget(self, hash: bytes) -> None:
        """A name stands no more for this adapter: give it up at once if nobody holds it and no other name stands for
        it; else `_settle` does."""
        self._settle()
        if hash in self._places and not self._places[hash].held and not self._is_named(hash):
            self._drop(hash)

    def _is_named(self, hash: bytes) -> bool:
        return any(named.hash == hash for named in self._names.values())

    def _read_again(self, named: Named) -> Adapter:
        try:
            adapter = self.read(named.path)
        except AdapterError as error:
            raise AdapterError(
                f"the adapter {named.name!r} was evicted and cannot be read again: {error}", param="lora"
            ) from error
        if adapter.hash != named.hash:
            raise AdapterError(
                f"the adapter {named.name!r} was evicted, and {named.path} is not what it was when it was loaded.",
                param="lora",
                hint="Load it again to serve what is there now.",
            )
        return adapter
