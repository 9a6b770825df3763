"""The suite: find a server or start one, see what it can do, measure part after part, leave a result whatever happens.

Everything after the first answer is kept: a server that dies, a ctrl-C, a signal, a part that cannot be done end the
measuring with `partial` set and the reason said, and the figures so far in the file. Until the run is over the file
says that it is not, so one that is killed leaves no result that looks whole."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from dfastllm.bench.suite.client import Client
from dfastllm.bench.suite.configurations import Axes, Configuration, configurations, vet
from dfastllm.bench.suite.launch import launched, serve_command
from dfastllm.bench.suite.load import Driver, Point
from dfastllm.bench.suite.probe import DEFAULT_SERVERS, Fields, connect, probe, probe_all
from dfastllm.bench.suite.recommend import judge, recommend
from dfastllm.bench.suite.record import Recorder
from dfastllm.bench.suite.schema import (
    AccuracyVsParallelism,
    ConfigurationResult,
    Environment,
    ParallelismPoint,
    PromptTypeResult,
    Results,
    Run,
    ServerStatus,
    Skipped,
    SystemPromptResult,
    Target,
    save_results,
)
from dfastllm.bench.suite.sweep import Progress, ServerLost, Settings, Sweep, Trial
from dfastllm.bench.suite.watch import Watch
from dfastllm.bench.suite.workloads import LABELS, PromptSource
from dfastllm.errors import DFastLLMError

__all__ = ["PARTS", "Plan", "Suite", "accuracy_vs_parallelism"]

PARTS: Final = ("status", "sweep", "systems", "load")
DIFFUSION_BLOCK: Final = 32  # tokens; what dfastllm's server does without block_length


@dataclass(frozen=True)
class Plan:
    """What to do. url None: the first default server that runs, else a server of our own started with `serve`
    (arguments of `dfastllm serve`). sources: prompt type to questions. output: a second file for the results."""

    sources: Mapping[str, PromptSource]
    url: str | None = None
    model: str | None = None
    api_key: str | None = None
    timeout: float = 120.0
    parts: tuple[str, ...] = PARTS
    axes: Axes = field(default_factory=Axes)
    customs: tuple[Configuration, ...] = ()
    settings: Settings = field(default_factory=Settings)
    systems: Mapping[str, str] = field(default_factory=dict)
    points: tuple[Point, ...] = ()
    slo: Mapping[str, float] = field(default_factory=dict)
    serve: tuple[str, ...] = ()
    quick: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)
    output: Path | None = None


class Suite:
    """One run. `results` can be asked for at any time; `run` saves them after every part."""

    def __init__(self, plan: Plan, out: Path, progress: Progress = lambda *_: None) -> None:
        self.plan = plan
        self.out = out
        self.progress = progress
        self.started = time.time()
        self.watch = Watch()
        self.notes: list[str] = []
        self.skipped: list[Skipped] = []
        self.partial: str | None = None
        self.ended = "interrupted"
        self._task: asyncio.Task[Any] | None = None
        self.servers: list[ServerStatus] = []
        self.target: Target | None = None
        self.fields: Fields | None = None
        self.refused: list[tuple[Configuration, str]] = []
        self.measured: list[Configuration] = []
        self.sweep: Sweep | None = None
        self.systems: Sweep | None = None
        self.load: list[Driver] = []
        self._environment: Environment | None = None

    async def run(self) -> Results:
        """Measure. Raises DFastLLMError only where nothing could be measured at all."""
        self._task = asyncio.current_task()
        with contextlib.ExitStack() as stack:
            try:
                await self._run(stack)
            except ServerLost as lost:
                self.partial = str(lost)
            except asyncio.CancelledError:  # ctrl-C, or `end`: what is there is worth keeping
                self.partial = self.ended
            except Exception as error:  # ours or a fault: what is there is kept, and the error told
                self.partial = str(error) if isinstance(error, DFastLLMError) else f"{type(error).__name__}: {error}"
                self.save()
                raise
        return self.save()

    def end(self, reason: str) -> None:
        """End the run as a ctrl-C would, for another reason. On the event loop's thread."""
        self.ended = reason
        if self._task is not None:
            self._task.cancel()

    async def _run(self, stack: contextlib.ExitStack) -> None:
        plan = self.plan
        url = await self._find(stack)
        self._environment = await asyncio.to_thread(_environment, url)
        if set(plan.parts) == {"status"} or url is None:
            return
        status = next(s for s in self.servers if s.url == url)
        ours = plan.url is None and status.name == OURS
        client, target = await connect(status, self._asked(status, ours), api_key=plan.api_key, timeout=plan.timeout)
        self.target = target.model_copy(update={"started_here": ours})
        record = stack.enter_context(Recorder(self.out / "requests.jsonl"))
        async with contextlib.aclosing(client):
            self.fields = Fields(client)
            await self._choose()
            self.save(unfinished=True)  # what is killed from here on leaves no earlier run's result as its own
            for part, work in (("sweep", self._sweep), ("systems", self._systems), ("load", self._load)):
                if part not in plan.parts:
                    self.skipped.append(Skipped(part=part, reason="not asked for"))
                    continue
                await work(client, record)
                self.save(unfinished=True)

    def _asked(self, status: ServerStatus, ours: bool) -> str | None:
        """The model to ask for. A server that was started with a directory or a file serves it under a shorter name,
        the only one that it lists."""
        name = self.plan.model
        started = ours and name is not None and name not in status.models and name in self.plan.serve
        return status.models[0] if started and status.models else name

    async def _find(self, stack: contextlib.ExitStack) -> str | None:
        """The root URL of the server to measure; None when only the status was wanted and there is none."""
        plan = self.plan
        self.progress("status", 0, 1, "looking for servers")
        urls: Mapping[str, str] = {"given": plan.url} if plan.url is not None else DEFAULT_SERVERS
        if plan.url is None and plan.model is not None and Path(plan.model).exists() and set(plan.parts) != {"status"}:
            urls = {}  # a checkpoint that lies here is served from here, whatever else is up
        self.servers = await probe_all(urls, plan.api_key)
        self.progress("status", 1, 1, "done")
        running = [status for status in self.servers if status.status == "running"]
        if running:
            return running[0].url
        if plan.url is not None and plan.model is not None and self.servers[0].status == "not_openai":
            return plan.url  # some list no models and answer all the same (transformers serve without a cache)
        if set(plan.parts) == {"status"}:
            return None
        if plan.url is not None:
            [status] = self.servers
            raise NoServer(
                f"{plan.url} cannot be measured: {status.message}",
                hint="Start the server there, or leave the URL out and one is started for you.",
            )
        self.progress("server", 0, 1, f"none is up: starting dfastllm serve {' '.join(plan.serve)}")
        # Started on this thread: whatever ends the run from here on ends the server, and with it the waiting.
        server = stack.enter_context(launched(serve_command(plan.serve), self.out / "server.log"))
        url = (await asyncio.to_thread(server.wait)).url
        self.servers.append(await probe(OURS, url, plan.api_key))
        self.progress("server", 1, 1, "ready")
        return url

    async def _choose(self) -> None:
        """Which configurations there are to measure."""
        assert self.fields is not None
        assert self.target is not None
        plan = self.plan
        wanted = configurations(self.target.kind, plan.axes, plan.settings.max_tokens, plan.customs)
        if not {"sweep"} & set(plan.parts):
            wanted = [c for c in wanted if c.baseline or c in plan.customs]
        self.progress("configurations", 0, 1, f"asking which of {len(wanted)} the server does")
        self.measured, self.refused, notes = await vet(wanted, self.fields)
        self.notes += notes
        self.target = self.target.model_copy(update={"fields": dict(self.fields.found)})
        self.progress("configurations", 1, 1, f"{len(self.measured)} measured, {len(self.refused)} refused")

    def _trial(self, configuration: Configuration, name: str | None = None, system: str | None = None) -> Trial:
        block = configuration.options.get("block_length")
        if block is None and self.target is not None and self.target.kind == "diffusion":
            block = DIFFUSION_BLOCK if (self.target.software or "").startswith("dfastllm") else None
        return Trial(name or configuration.name, configuration.options, system, block)

    async def _sweep(self, client: Client, record: Recorder) -> None:
        plan = self.plan
        self.sweep = Sweep(
            client,
            [self._trial(configuration) for configuration in self.measured],
            plan.sources,
            plan.settings,
            record=record,
            progress=self._saving_progress(),
            watch=self.watch,
            warm_prompts=self.target is None or self.target.kind != "diffusion",  # which shares no prompts' K,V
        )
        await self.sweep.run()

    async def _systems(self, client: Client, record: Recorder) -> None:
        """The baseline and the best configuration under each system prompt."""
        plan = self.plan
        trials = [
            self._trial(configuration, f"{configuration.name} | {name}", text)
            for name, text in plan.systems.items()
            for configuration in self._finalists()
        ]
        self.systems = Sweep(
            client,
            trials,
            plan.sources,
            plan.settings,
            part="systems",
            record=record,
            progress=self._saving_progress(),
            watch=self.watch,
        )
        await self.systems.run()

    async def _load(self, client: Client, record: Recorder) -> None:
        plan = self.plan
        if not plan.points:
            self.skipped.append(Skipped(part="load", reason="no load points were asked for"))
        for configuration in self._finalists():
            driver = Driver(
                client,
                self._trial(configuration),
                plan.sources,
                plan.settings,
                slo=plan.slo,
                record=record,
                progress=self.progress,
                watch=self.watch,
            )
            self.load.append(driver)
            await driver.run(plan.points)
            if driver.lost is not None:
                raise ServerLost(driver.lost)

    def _finalists(self) -> list[Configuration]:
        """The baseline, and what is advised: the parts after the sweep measure both."""
        base = self.measured[0]
        advice = [r.configuration for r in self.results().recommendations if r.kind == "configuration"]
        return [base, *(c for c in self.measured if c is not base and c.name in advice)]

    def _saving_progress(self) -> Progress:
        """Progress that also saves now and then: a run that is killed leaves a partial result."""
        last = time.monotonic()

        def report(part: str, done: int, total: int, text: str) -> None:
            nonlocal last
            if time.monotonic() - last > 30:
                self.save(unfinished=True)
                last = time.monotonic()
            self.progress(part, done, total, text)

        return report

    # results

    def save(self, *, unfinished: bool = False) -> Results:
        made = self.results(unfinished=unfinished)
        save_results(made, self.out / "test_results.json")
        if self.plan.output is not None:
            save_results(made, self.plan.output)
        return made

    def results(self, *, unfinished: bool = False) -> Results:
        """What is known by now."""
        plan = self.plan
        partial = self.partial or ("the run is not over" if unfinished else None)
        host = self.target.url if self.target is not None else None
        made = Results(
            started=_utc(self.started),
            finished=_utc(time.time()),
            seconds=time.time() - self.started,
            partial=partial is not None,
            partial_reason=partial,
            environment=self._environment or _environment(host),
            run=Run(
                parts=plan.parts,
                prompt_types=tuple(plan.sources),
                requests=plan.settings.requests,
                rounds=plan.settings.rounds,
                concurrency=plan.settings.concurrency,
                max_tokens=plan.settings.max_tokens,
                temperature=plan.settings.temperature,
                seed=plan.settings.seed,
                quick=plan.quick,
                arguments=dict(plan.arguments),
            ),
            servers=tuple(self.servers),
            target=self.target,
            configurations=tuple(self._configurations()),
            system_prompts=tuple(self._system_prompts()),
            load=tuple(point for driver in self.load for point in driver.results),
            client=self.watch.result(),
            skipped=tuple(self.skipped),
            notes=tuple(self.notes),
        )
        made = made.model_copy(
            update={
                "prompt_types": tuple(self._prompt_types(made)),
                "accuracy_vs_parallelism": accuracy_vs_parallelism(made.configurations),
            }
        )
        return made.model_copy(update={"recommendations": recommend(made)}) if made.configurations else made

    def _configurations(self) -> Iterable[ConfigurationResult]:
        for configuration in self.measured:
            yield self._configuration(configuration)
        for configuration, why in self.refused:
            yield _outline(configuration, "refused", why)

    def _configuration(self, configuration: Configuration) -> ConfigurationResult:
        sweep = self.sweep
        trial = self._trial(configuration)
        total = sweep.figures(trial) if sweep is not None else None
        if sweep is None or total is None:
            return _outline(configuration, "skipped", self.partial or "the sweep did not measure it")
        if not total.speed.requests:
            kinds = ", ".join(f"{kind} {n}" for kind, n in total.speed.error_kinds.items())
            return _outline(configuration, "failed", f"every request failed: {kinds}")
        types = {name: made for name in self.plan.sources if (made := sweep.figures(trial, name)) is not None}
        outline = _outline(configuration, "measured", None)
        return outline.model_copy(update={"figures": total, "rounds": sweep.rounds(trial), "prompt_types": types})

    def _prompt_types(self, made: Results) -> Iterable[PromptTypeResult]:
        settings = self.plan.settings
        for name, source in self.plan.sources.items():
            asked = {p.id: p for p in (source(i) for i in range(settings.requests * settings.rounds))}
            judged = [j for j in judge(made, name) if j.gain.verdict == "faster" and j.why_not is None]
            best = max(judged, key=lambda j: j.gain.low, default=None)
            yield PromptTypeResult(
                name=name,
                label=LABELS.get(name, name),
                prompts=len(asked),
                gradable=sum(prompt.grader is not None for prompt in asked.values()),
                best_configuration=best.configuration.name if best is not None else None,
                gain=best.gain if best is not None else None,
            )

    def _system_prompts(self) -> Iterable[SystemPromptResult]:
        if self.systems is None:
            return
        for trial in self.systems.trials:
            made = self.systems.figures(trial)
            configuration, _, name = trial.name.partition(" | ")
            if made is not None:
                yield SystemPromptResult(name=name, text=trial.system or "", configuration=configuration, figures=made)


OURS = "dfastllm, started here"


class NoServer(DFastLLMError):
    """Nothing answers where a server was said to be."""

    status = 503
    code = "no_server"


def _outline(configuration: Configuration, status: str, message: str | None) -> ConfigurationResult:
    return ConfigurationResult(
        name=configuration.name,
        label=configuration.label,
        axis=configuration.axis,
        baseline=configuration.baseline,
        method=configuration.method,
        num_speculative_tokens=configuration.num_speculative_tokens,
        options=configuration.options,
        status=status,  # type: ignore[arg-type]
        message=message,
    )


def accuracy_vs_parallelism(found: Sequence[ConfigurationResult]) -> AccuracyVsParallelism | None:
    """See schema.AccuracyVsParallelism; None where no configuration tells both."""
    known = [
        ParallelismPoint(
            configuration=c.name,
            tokens_per_forward=c.figures.forwards.tokens_per_forward,
            accuracy=c.figures.accuracy.value,
            n=c.figures.accuracy.n,
        )
        for c in found
        if c.figures is not None and c.figures.forwards is not None and c.figures.accuracy is not None
    ]
    if not known:
        return None
    known.sort(key=lambda point: point.tokens_per_forward)
    # From the right: the best accuracy that this many tokens per forward, or more, still reach.
    edge: list[tuple[float, float]] = []
    best = 0.0
    for point in reversed(known):
        best = max(best, point.accuracy)
        edge.append((point.tokens_per_forward, best))
    edge = [(max(1.0, x), y) for x, y in reversed(edge)]
    edge.insert(0, (1.0, edge[0][1]))
    area = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(edge))
    width = edge[-1][0] - 1.0
    return AccuracyVsParallelism(points=tuple(known), area=area, mean_accuracy=area / width if width > 0 else None)


def _utc(at: float) -> str:
    return datetime.datetime.fromtimestamp(at, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _environment(url: str | None) -> Environment:
    from dfastllm.metrics.hardware import hardware, hardware_profile_key
    from dfastllm.metrics.records import machine

    about, profile = machine(), hardware()
    host = urlsplit(url).hostname if url is not None else None
    local = None if host is None else host in ("localhost", "::1") or host.startswith("127.")
    versions = {name: str(about[name]) for name in ("dfastllm", "python", "torch", "os") if about.get(name)}
    return Environment(
        hardware={**profile, "load_1min": about["load_1min"]},
        profile_key=hardware_profile_key(profile),
        server_is_local=local,
        versions=versions,
        commit=about["commit"],
    )
