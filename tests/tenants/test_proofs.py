"""What is remembered of a key, and for how long: a given clock, and a database that can be down."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from dfastllm.errors import AuthenticationError, DatabaseError, RateLimitError
from dfastllm.tenants import Identity, Key, Tenant, keys, proofs
from dfastllm.tenants.keys import hashed, new_key, split
from dfastllm.tenants.proofs import Found, Proofs


class World:
    """A database of keys, a clock, and how often each was asked. down: the database does not answer."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.kept: dict[str, Found] = {}
        self.asked = 0
        self.down = False
        self.slow = 0.0
        self.proofs = Proofs(self.find, clock=lambda: self.now, wall=lambda: 1e9 + self.now)

    def find(self, key_id: str) -> Found | None:
        self.asked += 1
        time.sleep(self.slow)
        if self.down:
            raise DatabaseError("It does not answer.")
        return self.kept.get(key_id)

    def key(self, **fields: float) -> str:
        key_id, text = new_key()
        parts = split(text)
        assert parts is not None
        key = replace(Key(key_id, "t", frozenset({"generate"})), **fields)  # type: ignore[arg-type]
        self.kept[key_id] = Found(Identity(Tenant("t", "name"), key), hashed(parts[1]))
        return text

    def change(self, text: str, **fields: object) -> None:
        found = self.kept[text.split("_")[1]]
        identity = replace(found.identity, key=replace(found.identity.key, **fields))  # type: ignore[arg-type]
        self.kept[text.split("_")[1]] = replace(found, identity=identity)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    made = World()
    yield made
    made.proofs.close()


@pytest.fixture
def hashes(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """What argon2 was asked to compare with."""
    compared: list[str | None] = []

    def proves(secret: str, kept: str | None) -> bool:
        compared.append(kept)
        return keys.proves(secret, kept)

    monkeypatch.setattr(proofs, "proves", proves)
    return compared


def identify(world: World, text: str) -> Identity:
    return asyncio.run(world.proofs.identify(text))


@pytest.mark.parametrize("ask", [identify, lambda world, text: world.proofs.authenticate(text)])
def test_argon2_runs_once_and_the_database_is_asked_every_five_seconds(
    world: World, hashes: list[str | None], ask: Callable[[World, str], Identity]
) -> None:
    text = world.key()
    for step in range(20):
        assert ask(world, text).tenant.name == "name"
        world.now += 1.0
        assert world.asked == 1 + step // 5
    assert len(hashes) == 1


def test_a_disabled_key_stops_within_the_bound(world: World) -> None:
    text = world.key()
    identify(world, text)
    world.change(text, disabled=True)
    world.now += proofs.REMEMBERED - 0.01
    identify(world, text)
    world.now += 0.01
    with pytest.raises(AuthenticationError, match="is disabled"):
        identify(world, text)
    world.change(text, disabled=False)
    world.now += proofs.REMEMBERED
    identify(world, text)


def test_what_this_process_changed_counts_at_once(world: World, hashes: list[str | None]) -> None:
    text = world.key()
    identify(world, text)
    world.change(text, disabled=True)
    world.proofs.forget()
    with pytest.raises(AuthenticationError, match="is disabled"):
        identify(world, text)
    assert len(hashes) == 1, "the proof still holds: the hash is the same"


def test_a_key_expires_to_the_second_though_it_is_remembered(world: World) -> None:
    text = world.key(expires=1e9 + 1001)
    identify(world, text)
    world.now = 1001.0
    with pytest.raises(AuthenticationError, match="has expired"):
        identify(world, text)
    assert world.asked == 1


def test_another_hash_is_another_proof(world: World) -> None:
    text = world.key()
    identify(world, text)
    found = world.kept[text.split("_")[1]]
    world.kept[text.split("_")[1]] = replace(found, hash=hashed("x" * 52))
    world.now += proofs.REMEMBERED
    with pytest.raises(AuthenticationError, match="not known"):
        identify(world, text)


def test_an_unknown_id_costs_a_proof_as_a_wrong_secret_does(world: World, hashes: list[str | None]) -> None:
    text = world.key()
    wrong = text[:-1] + ("a" if text[-1] != "a" else "b")
    for unknown in (wrong, new_key()[1]):
        for _ in range(3):  # remembered, too
            with pytest.raises(AuthenticationError, match="not known"):
                identify(world, unknown)
    assert hashes == [world.kept[text.split("_")[1]].hash, None]
    assert world.asked == 2


def test_while_the_database_is_down(world: World) -> None:
    text, other = world.key(), world.key()
    identify(world, text)
    world.down = True
    for _ in range(10):
        world.now += proofs.REMEMBERED
        identify(world, text)
    with pytest.raises(DatabaseError):
        identify(world, other)
    world.now = 1000.0 + proofs.STALE
    with pytest.raises(DatabaseError):
        identify(world, text)
    world.down = False
    identify(world, text)
    identify(world, other)


def test_a_database_that_hangs_holds_up_a_known_key_once(world: World) -> None:
    async def asks() -> None:
        text = world.key()
        await world.proofs.identify(text)
        world.down, world.slow = True, 0.3
        world.now += proofs.REMEMBERED
        await world.proofs.identify(text)  # finds out
        world.now += proofs.REMEMBERED
        began = time.perf_counter()
        for _ in range(50):
            await world.proofs.identify(text)
        assert time.perf_counter() - began < 5, "each waiting for it would take 15 seconds"
        await asyncio.sleep(0.35)
        assert world.asked == 3, "one try, in the background"
        world.down, world.slow = False, 0.0
        await world.proofs.identify(text)
        await asyncio.sleep(0.05)
        asked = world.asked
        await world.proofs.identify(text)
        assert world.asked == asked, "it answers again"

    asyncio.run(asks())


def test_the_event_loop_goes_on_while_keys_are_proved(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred requests with one new key prove it once; the loop is never held."""
    proved: list[str] = []

    def slowly(secret: str, kept: str | None) -> bool:
        proved.append(secret)
        time.sleep(0.2)
        return True

    monkeypatch.setattr(proofs, "proves", slowly)

    async def ticks(gaps: list[float]) -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(0.005)
            gaps.append(time.perf_counter() - before)

    async def asks() -> list[float]:
        gaps: list[float] = []
        ticking = asyncio.create_task(ticks(gaps))
        others = [asyncio.create_task(world.proofs.identify(other)) for other in (world.key(), world.key())]
        await asyncio.sleep(0.01)  # both threads have work
        first, *rest = [asyncio.create_task(world.proofs.identify(text)) for _ in range(100)]
        await asyncio.sleep(0.01)
        first.cancel()  # whose client went away: the others still get their answer
        found = await asyncio.gather(*rest)
        assert {identity.tenant.name for identity in found} == {"name"}
        await asyncio.gather(*others)
        ticking.cancel()
        return gaps

    text = world.key()
    gaps = asyncio.run(asks())
    assert len(proved) == 3
    assert sorted(gaps)[len(gaps) // 2] < 0.1


def test_a_flood_of_unknown_keys_is_told_to_come_back(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proofs, "proves", lambda secret, kept: time.sleep(0.02) or False)

    async def asks() -> list[object]:
        texts = [new_key()[1] for _ in range(proofs._WAITING + 20)]
        return await asyncio.gather(*(world.proofs.identify(text) for text in texts), return_exceptions=True)

    refused = asyncio.run(asks())
    assert [type(error) for error in refused].count(RateLimitError) == 20
    assert [type(error) for error in refused].count(AuthenticationError) == proofs._WAITING


def test_memory_is_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proofs, "_MOST", 10)
    monkeypatch.setattr(proofs, "proves", lambda secret, kept: False)
    for _ in range(50):
        with pytest.raises(AuthenticationError):
            world.proofs.authenticate(new_key()[1])
    assert len(world.proofs._known) == 10
