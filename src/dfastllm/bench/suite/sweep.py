"""Configurations against each other: interleaved rounds, the same questions, ratios per round.

In a round every prompt type is asked under every configuration, one right after the other, and the next round starts
with another configuration: what slows the machine for a while slows all of them. Before a type's turn its questions are
asked once for a single token, so that a server which keeps prompts' K,V keeps them for every configuration alike.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from dfastllm.bench.suite.client import Answer, Call, Client
from dfastllm.bench.suite.counting import Counters, TokenCounter
from dfastllm.bench.suite.figures import Measured, figures
from dfastllm.bench.suite.probe import probe
from dfastllm.bench.suite.record import Recorder
from dfastllm.bench.suite.schema import Comparison, Figures, Round, Speculation
from dfastllm.bench.suite.watch import Watch
from dfastllm.bench.suite.workloads import Prompt, PromptSource
from dfastllm.metrics.stats import paired_ratio, sign_interval

__all__ = ["Progress", "ServerLost", "Settings", "Sweep", "Trial", "ask_all", "compare"]

Progress = Callable[[str, int, int, str], None]  # part, done, of so many, what now
GONE = {"connect", "disconnected", "timeout"}
LEAST_ROUNDS = 6  # for a verdict: with fewer, all on one side is too often luck


class ServerLost(Exception):
    """The server stopped answering; what was measured before stands."""


@dataclass(frozen=True)
class Trial:
    """One way to ask: a configuration's fields, and a system message (None: the question's own)."""

    name: str
    options: Mapping[str, object] = field(default_factory=dict)
    system: str | None = None
    block: int | None = None


@dataclass(frozen=True)
class Settings:
    """requests: of each type in a round, `concurrency` at a time. margin: see schema.Comparison."""

    requests: int = 8
    rounds: int = 6
    concurrency: int = 1
    max_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0
    margin: float = 0.05

    def call(self, prompt: Prompt, options: Mapping[str, object], index: int) -> Call:
        """The index seeds a sampled request, so that every configuration draws the same."""
        seed = None if self.temperature == 0 else self.seed + index
        return Call(prompt.messages, prompt.tools, self.max_tokens, self.temperature, seed, options)


async def ask_all(client: Client, calls: Sequence[Call], concurrency: int) -> tuple[list[Answer], float]:
    """The answers in order, at most `concurrency` at a time, and the seconds it took."""
    answers: list[Answer | None] = [None] * len(calls)
    waiting = iter(range(len(calls)))

    async def worker() -> None:
        for index in waiting:
            answers[index] = await client.ask(calls[index])

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(calls))):
            group.create_task(worker())
    return [answer for answer in answers if answer is not None], time.perf_counter() - began


async def require_alive(client: Client, answers: Sequence[Answer]) -> None:
    """Raises ServerLost when all of these failed for want of a server and it does not answer a plain question."""
    if not answers or any(answer.error not in GONE for answer in answers):
        return
    status = await probe("", client.base)
    if status.status != "running":
        raise ServerLost(f"{client.base} stopped answering: {status.message} (last: {answers[-1].message})")


@dataclass
class Turn:
    """A trial's requests of one type in one round."""

    measured: list[Measured]
    seconds: float
    counters: Speculation | None

    @property
    def throughput(self) -> float | None:
        """Tokens per second; None when a request failed or tokens are unknown: such a turn is compared with nothing."""
        if not all(m.answer.ok and m.answer.completion_tokens is not None for m in self.measured):
            return None
        return sum(m.answer.completion_tokens or 0 for m in self.measured) / self.seconds


class Sweep:
    """Runs the rounds and keeps what came of them, so that an end at any time leaves figures."""

    def __init__(
        self,
        client: Client,
        trials: Sequence[Trial],
        sources: Mapping[str, PromptSource],
        settings: Settings,
        *,
        part: str = "sweep",
        record: Recorder | None = None,
        progress: Progress = lambda *_: None,
        warm_prompts: bool = True,
        watch: Watch | None = None,
    ) -> None:
        self.client = client
        self.trials = list(trials)
        self.sources = dict(sources)
        self.settings = settings
        self.part = part
        self.record = record
        self.progress = progress
        self.warm_prompts = warm_prompts
        self.watch = Watch() if watch is None else watch
        self.turns: dict[tuple[str, str], dict[int, Turn]] = {(t.name, s): {} for t in trials for s in sources}
        self.counter = TokenCounter(client)
        self.counters = Counters(client)

    @property
    def baseline(self) -> str:
        return self.trials[0].name

    async def run(self) -> None:
        """All rounds. Raises ServerLost."""
        total, done = self.settings.rounds * len(self.trials) * len(self.sources), 0
        self.progress(self.part, 0, total, "warm-up")
        await self._warm_up()
        for number in range(self.settings.rounds):
            start = number % len(self.trials)
            order = self.trials[start:] + self.trials[:start]
            for type, source in self.sources.items():
                first = number * self.settings.requests
                prompts = [source(first + i) for i in range(self.settings.requests)]
                await self._share(prompts)
                for trial in order:
                    self.progress(self.part, done, total, f"round {number + 1}, {type}, {trial.name}")
                    await self._turn(trial, type, number, prompts)
                    done += 1
        self.progress(self.part, total, total, "done")

    async def _warm_up(self) -> None:
        """Two requests of every trial that count for nothing."""
        source = next(iter(self.sources.values()))
        for trial in self.trials:
            calls = [self.settings.call(_ask(source(i), trial), trial.options, i) for i in range(2)]
            answers, _ = await ask_all(self.client, calls, 1)
            await require_alive(self.client, answers)

    async def _share(self, prompts: Sequence[Prompt]) -> None:
        if self.warm_prompts:
            # one token under the baseline: its fields are those that every model takes
            options = self.trials[0].options
            systems = dict.fromkeys(trial.system for trial in self.trials)
            asked = [p if system is None else p.under(system) for system in systems for p in prompts]
            calls = [Call(p.messages, p.tools, 1, options=options) for p in asked]
            await ask_all(self.client, calls, self.settings.concurrency)

    async def _turn(self, trial: Trial, type: str, number: int, prompts: Sequence[Prompt]) -> None:
        asked = [_ask(prompt, trial) for prompt in prompts]
        first = number * self.settings.requests
        calls = [self.settings.call(prompt, trial.options, first + i) for i, prompt in enumerate(asked)]
        await self.counters.mark()
        async with self.watch.on(self.client):
            answers, seconds = await ask_all(self.client, calls, self.settings.concurrency)
        counters = await self.counters.since()
        await self.counter.fill(answers)
        measured = [Measured(prompt, answer, number) for prompt, answer in zip(asked, answers, strict=True)]
        self.turns[trial.name, type][number] = Turn(measured, seconds, counters)
        if self.record is not None:
            self.record.write(self.part, trial.name, measured)
        await require_alive(self.client, answers)

    # figures, at any time

    def figures(self, trial: Trial, type: str | None = None) -> Figures | None:
        """Of a trial over all its types or one of them; None when it had no turn."""
        types = [type] if type is not None else list(self.sources)
        turns = [(name, number, turn) for name in types for number, turn in self.turns[trial.name, name].items()]
        if not turns:
            return None
        measured = [m for name, number, turn in turns for m in self._paired(trial, name, number, turn)]
        made = figures(
            measured,
            sum(turn.seconds for _, _, turn in turns),
            block=trial.block,
            counters=_sum([turn.counters for _, _, turn in turns]),
        )
        if trial.name == self.baseline:
            return made
        return made.model_copy(update={"versus_baseline": self.comparison(trial, types)})

    def _paired(self, trial: Trial, type: str, number: int, turn: Turn) -> list[Measured]:
        """With the baseline's answers to the same questions beside them, where answers are comparable: the same system
        message."""
        base = self.turns[self.baseline, type].get(number)
        if trial.name == self.baseline or base is None or trial.system != self.trials[0].system:
            return turn.measured
        pairs = zip(turn.measured, base.measured, strict=True)
        return [Measured(m.prompt, m.answer, m.round, b.answer) for m, b in pairs]

    def comparison(self, trial: Trial, types: Sequence[str]) -> Comparison | None:
        """Rounds in which both answered everything; None without any."""
        over, under = [], []
        for number in range(self.settings.rounds):
            ours, theirs = (self._throughput(name, types, number) for name in (trial.name, self.baseline))
            if ours and theirs:
                over.append(ours)
                under.append(theirs)
        return compare(over, under, self.settings.margin) if over else None

    def _throughput(self, trial: str, types: Sequence[str], number: int) -> float | None:
        """Tokens per second of a trial in a round, over these types; None unless all of them are complete."""
        turns = [self.turns[trial, type].get(number) for type in types]
        if not turns or any(turn is None or turn.throughput is None for turn in turns):
            return None
        tokens = sum(m.answer.completion_tokens or 0 for turn in turns if turn for m in turn.measured)
        return tokens / sum(turn.seconds for turn in turns if turn)

    def rounds(self, trial: Trial) -> tuple[Round, ...]:
        """What each round gave, complete or not."""
        found = []
        for number in range(self.settings.rounds):
            turns = [turn for type in self.sources if (turn := self.turns[trial.name, type].get(number))]
            if turns:
                errors = sum(not m.answer.ok for turn in turns for m in turn.measured)
                throughput = self._throughput(trial.name, list(self.sources), number)
                found.append(Round(output_throughput=throughput, duration=sum(t.seconds for t in turns), errors=errors))
        return tuple(found)


def _ask(prompt: Prompt, trial: Trial) -> Prompt:
    return prompt if trial.system is None else prompt.under(trial.system)


def compare(over: Sequence[float], under: Sequence[float], margin: float) -> Comparison:
    """Paired throughputs as a ratio with its interval and a verdict, see schema.Comparison."""
    ratio = paired_ratio(over, under)
    rounds = tuple(a / b for a, b in zip(over, under, strict=True))
    low, high, verdict = ratio.low, ratio.high, "no verdict"
    if len(rounds) >= LEAST_ROUNDS:
        # Of few pairs a bootstrap promises more than it holds; the interval of the sign test does not.
        sure = sign_interval(rounds)
        low, high = min(low, sure[0]), max(high, sure[1])
        if 1 - margin <= low and high <= 1 + margin:
            verdict = "same"
        elif low > 1:
            verdict = "faster"
        elif high < 1:
            verdict = "slower"
    return Comparison(
        ratio=ratio.median,
        low=low,
        high=high,
        rounds=rounds,
        margin=margin,
        verdict=verdict,  # type: ignore[arg-type]
    )


def _sum(parts: Sequence[Speculation | None]) -> Speculation | None:
    from dfastllm.bench.suite.figures import spec_counts

    told = [part for part in parts if part is not None]
    if not told:
        return None
    width = max(len(part.accepted_per_position) for part in told)
    places = [sum((*p.accepted_per_position, *[0] * width)[i] for p in told) for i in range(width)]
    return spec_counts(
        sum(p.num_drafts for p in told),
        sum(p.num_draft_tokens for p in told),
        sum(p.num_accepted_tokens for p in told),
        places,
        "metrics",
    )
