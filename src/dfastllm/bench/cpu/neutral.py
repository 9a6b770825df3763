"""Diffusion against autoregression on this CPU: shipped models of one size, the same held-out samples, the same engine.

Accuracy is measured once over many samples (answers are greedy and do not depend on neighbours or load); speed in turns
over fewer: one request at a time, and all in flight. Tokens are committed ones, end tokens and padding not counted. A
setting is as accurate as autoregression where a paired test shows it to lose less than a point (`distill.paired`)."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfastllm.bench.cpu.load import Foreign
from dfastllm.bench.workload import run
from dfastllm.core import DecodeParams, SamplingParams
from dfastllm.distill.paired import lower_bound
from dfastllm.engine import EngineConfig
from dfastllm.llm import LLM, load_engine
from dfastllm.metrics.stats import Summary, paired_ratio, summarise
from dfastllm.metrics.workload import gradable
from dfastllm.tasks import Sample, grade

__all__ = [
    "AR",
    "DRAFTED",
    "Accuracy",
    "Contender",
    "Pass",
    "contenders",
    "measure_accuracy",
    "measure_speed",
    "open_models",
    "plot",
    "winners",
]

AR = "autoregression"
DRAFTED = "autoregression with a draft"
MODELS = {AR: "demo-ar", DRAFTED: "demo-ar", "masked diffusion": "demo-diffusion", "block diffusion": "demo-block"}
DRAFT = "demo-draft"
MARGIN = 0.01  # of accuracy: a loss below it counts as none
FLIGHTS = ("one at a time", "in flight")


@dataclass(frozen=True)
class Contender:
    """A family's model with one decoder setting."""

    family: str
    setting: str
    decode: DecodeParams | None

    @property
    def name(self) -> str:
        return f"{self.family}, {self.setting}"


def contenders(canvas: int) -> list[Contender]:
    """Autoregression once, diffusion from careful (a token a step) to bold."""
    out = [Contender(AR, "greedy", None), Contender(DRAFTED, "greedy", None)]

    def diffusion(setting: str, **params: Any) -> None:
        out.append(Contender("masked diffusion", setting, DecodeParams(block_length=32, **params)))

    diffusion("schedule, 1 a step, no cache", rule="schedule", steps=canvas, cache="none")
    diffusion("schedule, 1 a step, dual", rule="schedule", steps=canvas, cache="dual")
    diffusion("schedule, 2 a step, dual", rule="schedule", steps=canvas // 2, cache="dual")
    for threshold in (0.99, 0.9, 0.7):
        diffusion(f"threshold {threshold}, dual", rule="threshold", threshold=threshold, cache="dual")
    for factor in (0.1, 0.25, 0.5, 1.0):
        diffusion(f"factor {factor}, dual", rule="factor", factor=factor, cache="dual")
    diffusion("threshold 0.9, no cache", rule="threshold", threshold=0.9, cache="none")
    out.append(Contender("block diffusion", "schedule, 1 a step", DecodeParams(rule="schedule", steps=canvas)))
    for threshold in (0.99, 0.9, 0.7):
        decode = DecodeParams(rule="threshold", threshold=threshold)
        out.append(Contender("block diffusion", f"threshold {threshold}", decode))
    return out


@dataclass(frozen=True, slots=True)
class Accuracy:
    """error: the standard error of the share of right answers. tokens and forwards: per answer."""

    name: str
    accuracy: float
    error: float
    samples: int
    tokens: float
    forwards: float
    marks: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Pass:
    """One speed measurement. tokens_per_s: committed tokens of all its requests over its wall time."""

    turn: int
    name: str
    flight: str
    tokens_per_s: float
    foreign: float | None


def open_models(
    families: Collection[str], in_flight: int, quantization: str | None = None, diffusion: str | None = None
) -> dict[str, LLM]:
    """A facade per family; the caller closes them. diffusion: a directory in place of the masked diffusion model."""
    config = EngineConfig(max_sequences=in_flight, kv_tokens=in_flight * 512)
    named = MODELS if diffusion is None else {**MODELS, "masked diffusion": diffusion}
    opened = {}
    for family in families:
        draft = json.dumps({"model": DRAFT}) if family == DRAFTED else None
        engine = load_engine(named[family], config=config, quantization=quantization, speculative=draft)
        opened[family] = LLM(engine=engine)
    return opened


def measure_accuracy(
    models: Mapping[str, LLM], field: Sequence[Contender], samples: int, canvas: int
) -> Iterator[Accuracy]:
    work = gradable(samples)
    for one in field:
        outcome, answers = run(models[one.family], work, _sampling(canvas), one.decode)
        marks = tuple(grade(sample, answer.text) for sample, answer in zip(work, answers, strict=True))
        share = outcome.accuracy
        error = math.sqrt(share * (1 - share) / len(work))
        per = len(work)
        yield Accuracy(one.name, share, error, per, outcome.tokens / per, outcome.forwards / per, marks)


def _sampling(canvas: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=canvas)


def measure_speed(
    models: Mapping[str, LLM], field: Sequence[Contender], alone: int, together: int, canvas: int, rounds: int
) -> Iterator[Pass]:
    """In each turn every contender answers `alone` samples one by one and `together` samples all in flight; the order
    is reversed every other turn."""
    one_by_one, batch = gradable(alone), gradable(together)
    for turn in range(rounds):
        for one in field if turn % 2 == 0 else list(field)[::-1]:
            for flight, work in zip(FLIGHTS, (one_by_one, batch), strict=True):
                yield _pass(models[one.family], one, flight, work, canvas, turn)


def _pass(llm: LLM, one: Contender, flight: str, work: Sequence[Sample], canvas: int, turn: int) -> Pass:
    with Foreign([os.getpid()]) as others:
        outcome, _ = run(llm, work, _sampling(canvas), one.decode, together=flight == FLIGHTS[1])
    return Pass(turn, one.name, flight, outcome.tokens_per_second, others.share)


def speeds(passes: Sequence[Pass]) -> dict[tuple[str, str], list[float]]:
    """tok/s per (contender, flight), by turn."""
    out: dict[tuple[str, str], list[float]] = {}
    for one in sorted(passes, key=lambda p: p.turn):
        out.setdefault((one.name, one.flight), []).append(one.tokens_per_s)
    return out


def _as_accurate(one: Accuracy, reference: Accuracy) -> bool:
    """Whether this run shows, with a confidence of 95 %, that `one` loses less than MARGIN of accuracy on samples like
    those that both answered."""
    lost = sum(r and not o for o, r in zip(one.marks, reference.marks, strict=True))
    won = sum(o and not r for o, r in zip(one.marks, reference.marks, strict=True))
    return one.name == reference.name or lower_bound(lost, won, len(one.marks)) > -MARGIN


def winners(field: Sequence[Contender], accuracy: Sequence[Accuracy], passes: Sequence[Pass]) -> list[dict[str, Any]]:
    """Per flight and family: its fastest setting among those as accurate as autoregression, and how many times faster
    that is (turn by turn); "none" where no setting is shown to be as accurate."""
    found, rate = {a.name: a for a in accuracy}, speeds(passes)
    reference = next(one for one in field if one.family == AR)
    rows: list[dict[str, Any]] = []
    for flight in FLIGHTS:
        base = rate[reference.name, flight]
        for family in dict.fromkeys(one.family for one in field):
            able = [
                one for one in field if one.family == family and _as_accurate(found[one.name], found[reference.name])
            ]
            if not able:
                rows.append({"flight": flight, "family": family, "setting": "none is as accurate"})
                continue
            best = max(able, key=lambda one: summarise(rate[one.name, flight]).median)
            mine = rate[best.name, flight]
            rows.append(
                {
                    "flight": flight,
                    "family": family,
                    "setting": best.setting,
                    "accuracy": found[best.name].accuracy,
                    "tokens_per_forward": found[best.name].tokens / found[best.name].forwards,
                    "tokens_per_s": summarise(mine),
                    "times_autoregression": paired_ratio(mine, base),
                }
            )
    return rows


def plot(
    field: Sequence[Contender], accuracy: Sequence[Accuracy], passes: Sequence[Pass], path: Path, title: str
) -> None:
    """Accuracy against tok/s, one panel per flight, one colour per family. Needs matplotlib (extra `plots`)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found, rate = {a.name: a for a in accuracy}, speeds(passes)
    markers = "osD^vPXphd"
    figure, panels = plt.subplots(1, 2, figsize=(13.5, 5.6), sharey=True)
    for panel, flight in zip(panels, FLIGHTS, strict=True):
        for colour, family in enumerate(dict.fromkeys(one.family for one in field)):
            for marker, one in zip(markers, (o for o in field if o.family == family), strict=False):
                speed: Summary = summarise(rate[one.name, flight])
                is_reference = family == AR
                if is_reference:  # what the others are compared with: right of and above the lines is better
                    panel.axvline(speed.median, color="black", linewidth=0.6, linestyle=":")
                    panel.axhline(100 * found[one.name].accuracy, color="black", linewidth=0.6, linestyle=":")
                panel.errorbar(
                    speed.median,
                    100 * found[one.name].accuracy,
                    xerr=[[speed.median - speed.q1], [speed.q3 - speed.median]],
                    yerr=100 * found[one.name].error,
                    marker="*" if is_reference else marker,
                    color="black" if is_reference else f"C{colour}",
                    markersize=13 if is_reference else 8,
                    zorder=3 if is_reference else 2,
                    linewidth=0.8,
                    linestyle="",
                    label=one.name,
                )
        panel.set_xscale("log", subs=[2, 5])
        panel.xaxis.set_major_formatter("{x:,.0f}")
        panel.xaxis.set_minor_formatter("{x:,.0f}")
        panel.set_xlabel("committed tokens per second (end tokens not counted), log scale")
        panel.set_title(flight)
        panel.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("exact match on held-out tasks, %")
    panels[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(title)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
