"""The soak: references on a quiet server, a warm-up, the time itself, a drain, and the verdict."""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.soak.attacks import ATTACKS
from tests.soak.clients import Clients, Found, alone
from tests.soak.deck import deck
from tests.soak.server import Held, SoakedServer, soaked_server

__all__ = ["Plan", "Result", "soak"]

DRAIN = 60.0  # s until nothing runs any more
HEALTH = 0.2  # s that /health may take


@dataclass(frozen=True)
class Plan:
    """seconds of traffic after `warm` seconds of the same. questions: in the deck. bomb: bytes of a hostile body.
    growth: MB that the server may grow after the warm-up. strict: whether the slowest /health counts, not the 99th of a
    hundred, and not the median of a machine that does other work besides."""

    seconds: float
    warm: float
    questions: int
    clients: int = 12
    bomb: int = 8 << 20
    seed: int = 1
    threads: int = 2
    growth: float = 48.0
    strict: bool = True


@dataclass
class Result:
    """What a soak found. attacks: how many of each; at_fault: what the server did not do about one."""

    found: Found
    attacks: Counter[str]
    at_fault: list[str]
    health: list[float]
    unanswered: int  # probes without a 200
    slow: list[str]  # of the probes beyond HEALTH: how long, and what the attackers were doing
    before: Held
    after: Held
    preemptions: float
    seconds: float
    plan: Plan
    log_bytes: int = 0

    @property
    def health_bound(self) -> float:
        """The figure that is held against HEALTH: the slowest answer, or the median."""
        ordered = sorted(self.health) or [float("inf")]
        return ordered[-1] if self.plan.strict else ordered[len(ordered) // 2]

    def faults(self) -> list[str]:
        """Why it is not good, in sentences; none where it is."""
        grown = self.after.rss - self.before.rss
        checks = (
            (bool(self.found.differ), f"{len(self.found.differ)} answers differ"),
            (bool(self.found.lost), f"{len(self.found.lost)} answers lost"),
            (bool(self.found.failed), f"{len(self.found.failed)} requests failed"),
            (bool(self.at_fault), f"{len(self.at_fault)} attacks not met"),
            (self.found.compared == 0, "no answer was compared"),
            (self.health_bound > HEALTH, f"/health took {self.health_bound * 1000:.0f} ms"),
            (self.unanswered > 0, f"/health was not answered {self.unanswered} times"),
            (self.after.busy != 0, f"gauges stand at {self.after.busy:g}"),
            (self.after.connections > 1, f"{self.after.connections:g} connections are left"),
            (grown > self.plan.growth, f"memory grew by {grown:.0f} MB"),
            (self.after.files > self.before.files + 2, f"{self.after.files - self.before.files} files are left open"),
            (self.after.threads > self.before.threads + 2, f"{self.after.threads - self.before.threads} threads more"),
        )
        return [text for wrong, text in checks if wrong]


def soak(plan: Plan, say: Callable[[str], None] = lambda _: None) -> Result:
    """Run it. say: is told what it does now. Raises GenerationError when the server does not start or dies."""
    with TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        with soaked_server(plan.threads, log) as server:
            try:
                result = asyncio.run(_soak(plan, server, say))
            except Exception as error:
                error.add_note(f"the server's log ends with:\n{log.read_text(errors='replace')[-3000:]}")
                raise
        result.log_bytes = log.stat().st_size
        return result


async def _soak(plan: Plan, server: SoakedServer, say: Callable[[str], None]) -> Result:
    rng = random.Random(plan.seed)
    questions = deck(plan.seed, plan.questions)
    say(f"references: {len(questions)} requests, each alone")
    references = [await alone(server.address, question) for question in questions]
    say(f"warm-up: {plan.warm:g} s")
    clients = Clients(server.address, questions, references, rng)
    await _traffic(plan, server, clients, plan.warm, rng, {})
    before = await _drained(server)
    warm, preempted = clients.found, server.count("num_preemptions_total")
    clients.found = Found()
    say(f"soak: {plan.seconds:g} s")
    began = time.monotonic()
    doing: dict[str, str] = {}
    async with _probed(server, doing) as (health, slow, unanswered):
        attacks, at_fault = await _traffic(plan, server, clients, plan.seconds, rng, doing)
    seconds = time.monotonic() - began
    after = await _drained(server)
    for name in ("differ", "lost", "failed"):  # of the warm-up too
        getattr(clients.found, name).extend(getattr(warm, name))
    return Result(
        found=clients.found,
        attacks=attacks,
        at_fault=at_fault,
        health=health,
        unanswered=unanswered[0],
        slow=slow,
        before=before,
        after=after,
        preemptions=server.count("num_preemptions_total") - preempted,
        seconds=seconds,
        plan=plan,
    )


async def _traffic(
    plan: Plan,
    server: SoakedServer,
    clients: Clients,
    seconds: float,
    rng: random.Random,
    doing: dict[str, str],
) -> tuple[Counter[str], list[str]]:
    """Clients and attackers for so long, then the answers that they still wait for. doing: what each attacker does now,
    kept by them."""
    done: Counter[str] = Counter()
    at_fault: list[str] = []

    async def attacker(name: str) -> None:
        attack, pause = ATTACKS[name]
        while not clients.over:
            try:
                wrong = await attack(server.address, rng, plan.bomb, partial(doing.__setitem__, name))
            except (TimeoutError, ConnectionError) as error:
                wrong = f"{error!r}"
            finally:
                doing.pop(name, None)
            done[name] += 1
            if wrong is not None:
                at_fault.append(f"{name}: {wrong}")
            await asyncio.sleep(pause)

    clients.over = False
    async with asyncio.TaskGroup() as tasks:
        for number in range(plan.clients):
            tasks.create_task(clients.run(f"soak-{number}"))
        for name in ATTACKS:
            tasks.create_task(attacker(name))
        await asyncio.sleep(seconds)
        clients.over = True
    return done, at_fault


async def _drained(server: SoakedServer) -> Held:
    """What the server holds once nothing runs and nobody is connected, or after DRAIN."""
    until = time.monotonic() + DRAIN
    while True:
        held = server.held()
        if (held.busy == 0 and held.connections <= 1) or time.monotonic() > until:
            return held
        await asyncio.sleep(0.25)


@contextlib.asynccontextmanager
async def _probed(
    server: SoakedServer, doing: Mapping[str, str]
) -> AsyncIterator[tuple[list[float], list[str], list[int]]]:
    """Seconds of each /health while the block runs, the slow ones in words, and how many did not answer 200 (one
    number)."""
    health: list[float] = []
    slow: list[str] = []
    unanswered = [0]
    words = ("-m", "tests.soak.probe", server.address[0], str(server.address[1]))
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(sys.executable, *words, stdin=pipe, stdout=pipe)
    assert process.stdout is not None
    output = process.stdout

    async def read() -> None:
        async for line in output:
            seconds, status = line.split()
            health.append(float(seconds))
            if health[-1] > HEALTH:
                slow.append(f"{health[-1] * 1000:.0f} ms beside {', '.join(doing.values()) or 'traffic alone'}")
            unanswered[0] += status != b"200"

    reading = asyncio.create_task(read())
    try:
        yield health, slow, unanswered
    finally:
        assert process.stdin is not None
        process.stdin.close()
        await process.wait()
        await reading
