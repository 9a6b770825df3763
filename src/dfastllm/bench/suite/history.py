"""Earlier results: kept, listed, compared.

Two results are compared only when they come from the same hardware profile and asked the same of the same model. They
were not measured in turns, so their ratio carries what the machine did in between; the interval resamples the rounds of
each side on its own, and a change within the margin is no change."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dfastllm.bench.suite.cells import NONE, TONES, Cell, Table, accuracy, named, number, text, times
from dfastllm.bench.suite.schema import Comparison, ConfigurationResult, Results, Verdict, load_results, save_results
from dfastllm.bench.suite.tables import best_configuration
from dfastllm.errors import ValidationError

__all__ = [
    "MARGIN",
    "Change",
    "Entry",
    "compare",
    "comparison_table",
    "earlier",
    "entries",
    "list_table",
    "remember",
    "trend_table",
    "why_not_comparable",
]

MARGIN = 0.1  # of a ratio between two runs at different times
FEWEST_ROUNDS = 3  # for an interval
BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True)
class Entry:
    path: Path
    results: Results


@dataclass(frozen=True, slots=True)
class Change:
    """One configuration, before and now. ratio: of output throughput, above 1 is faster now; None when a side has none
    or too few rounds for an interval."""

    before: ConfigurationResult
    now: ConfigurationResult
    ratio: Comparison | None

    @property
    def verdict(self) -> Verdict:
        return self.ratio.verdict if self.ratio is not None else "no verdict"


def remember(results: Results, directory: Path) -> Path:
    """Keep a copy under a name that sorts by time; the same result twice is one file."""
    stamp = re.sub(r"[^0-9TZ]", "", results.started)
    model = results.target.model if results.target is not None else "none"
    name = re.sub(r"[^A-Za-z0-9.]+", "-", model).strip("-.")[-40:]
    path = directory / f"{stamp}-{name or 'model'}.json"
    save_results(results, path)
    return path


def entries(directory: Path) -> tuple[list[Entry], list[str]]:
    """What is kept, oldest first, and a sentence for each file that cannot be read: one bad file hides no other."""
    found, complaints = [], []
    for path in sorted(directory.glob("*.json")):
        try:
            found.append(Entry(path, load_results(path)))
        except ValidationError as error:
            complaints.append(str(error))
    return sorted(found, key=lambda e: e.results.started), complaints


def why_not_comparable(now: Results, before: Results) -> str | None:
    """The first difference that makes a comparison meaningless; None when there is none."""
    ours, theirs = now.environment.profile_key, before.environment.profile_key
    if ours.startswith("unknown-") or theirs.startswith("unknown-"):
        return "the hardware of one of them is not known"
    if ours != theirs:
        return f"they come from different hardware: {ours} and {theirs}"
    if now.target is None or before.target is None:
        return "one of them measured no server"
    if now.target.model != before.target.model:
        return f"they measured different models: {now.target.model!r} and {before.target.model!r}"
    if (now.target.software or "").split()[:1] != (before.target.software or "").split()[:1]:
        return f"they measured different servers: {now.target.software} and {before.target.software}"
    for name in ("requests", "concurrency", "max_tokens", "temperature", "seed", "prompt_types", "quick"):
        a, b = getattr(now.run, name), getattr(before.run, name)
        if a != b:
            return f"they were run with different {name}: {a} and {b}"
    return None


def earlier(now: Results, kept: Sequence[Entry]) -> Entry | None:
    """The latest comparable result from before this one."""
    fit = [e for e in kept if e.results.started < now.started and why_not_comparable(now, e.results) is None]
    return fit[-1] if fit else None


def compare(now: Results, before: Results, *, margin: float = MARGIN) -> list[Change]:
    """The configurations both measured. Raises ValidationError for results that cannot be compared."""
    why = why_not_comparable(now, before)
    if why is not None:
        raise ValidationError(
            f"these results cannot be compared: {why}.",
            param="history",
            hint="Measure again with the same arguments on the same machine.",
        )
    old = {c.name: c for c in before.configurations if c.figures is not None}
    pairs = [(old[c.name], c) for c in now.configurations if c.figures is not None and c.name in old]
    return [Change(then, new, _ratio(new, then, margin)) for then, new in pairs]


def _ratio(now: ConfigurationResult, before: ConfigurationResult, margin: float) -> Comparison | None:
    new, old = (np.array([r.output_throughput for r in c.rounds if r.output_throughput]) for c in (now, before))
    if min(len(new), len(old)) < FEWEST_ROUNDS:
        return None
    random = np.random.default_rng(0)
    draws = 4000
    medians = [np.median(side[random.integers(0, len(side), (draws, len(side)))], axis=1) for side in (new, old)]
    low, high = (float(v) for v in np.quantile(medians[0] / medians[1], (0.025, 0.975)))
    ratio = float(np.median(new) / np.median(old))
    verdict: Verdict = "no verdict"
    if low > 1 + margin:
        verdict = "faster"
    elif high < 1 / (1 + margin):
        verdict = "slower"
    elif low >= 1 / (1 + margin) and high <= 1 + margin:
        verdict = "same"
    return Comparison(ratio=ratio, low=low, high=high, rounds=(), margin=margin, verdict=verdict)


def comparison_table(now: Results, before: Results, *, margin: float = MARGIN) -> Table:
    """Before and now, a row per configuration."""
    rows = []
    for change in compare(now, before, margin=margin):
        old, new = change.before.figures, change.now.figures
        assert old is not None
        assert new is not None
        rows.append(
            (
                text(change.now.label),
                number(old.speed.output_throughput),
                number(new.speed.output_throughput),
                Cell(times(change.ratio), change.ratio.ratio if change.ratio else None, TONES.get(change.verdict, "")),
                text(change.verdict, TONES.get(change.verdict, "dim")),
                text(f"{times(old.versus_baseline)} → {times(new.versus_baseline)}" if old.versus_baseline else NONE),
                text(f"{accuracy(old.accuracy)} → {accuracy(new.accuracy)}" if old.accuracy or new.accuracy else NONE),
            )
        )
    columns = named("Configuration", "Tok/s before|Tok/s now|Now / before|Verdict|Speedup over baseline|Accuracy")
    about = (
        f"Before: {before.started}, commit {before.environment.commit or 'unknown'}; now: {now.started}, commit "
        f"{now.environment.commit or 'unknown'}. Not measured in turns: less than {100 * margin:.0f} % counts as none."
    )
    return Table("history", "Against the last comparable result", columns, tuple(rows), (about,))


def list_table(kept: Sequence[Entry], complaints: Sequence[str] = ()) -> Table:
    """One row per kept result."""
    rows = []
    for entry in kept:
        found = entry.results
        base = found.baseline
        best = next((c for c in found.configurations if c.name == best_configuration(found)), None)
        gain = best.figures.versus_baseline if best is not None and best.figures is not None else None
        rows.append(
            (
                text(found.started),
                text(found.target.model if found.target else NONE),
                text(found.environment.commit or NONE),
                text(found.environment.profile_key),
                number(base.figures.speed.output_throughput if base is not None and base.figures else None),
                text(best.label if best else NONE),
                Cell(times(gain), gain.ratio if gain else None),
                text("partial" if found.partial else "", "bad"),
                text(entry.path.name),
            )
        )
    columns = named("When|Model|Commit|Hardware profile", "Baseline tok/s|Best configuration|Speedup|State|File")
    lines = tuple(complaints) if rows or complaints else ("Nothing is kept yet.",)
    return Table("history_list", "Kept results", columns if rows else (), tuple(rows), lines)


def trend_table(kept: Sequence[Entry], now: Results) -> Table:
    """Output throughput of every configuration of `now` over the comparable results, oldest first."""
    line = [e.results for e in kept if why_not_comparable(now, e.results) is None and e.results.started <= now.started]
    if not line or line[-1].started != now.started:
        line.append(now)
    rows = []
    for config in now.configurations:
        series = [
            c.figures.speed.output_throughput
            for found in line
            for c in found.configurations
            if c.name == config.name and c.figures is not None and c.figures.speed.output_throughput
        ]
        if series:
            cells = (*(number(v) for v in (series[0], min(series), max(series), series[-1])),)
            change = Cell(f"{100 * (series[-1] / series[0] - 1):+.1f} %", series[-1] / series[0])
            rows.append((text(config.label), number(len(series)), *cells, change, Cell(_bars(series))))
    columns = named("Configuration", "Runs|First|Lowest|Highest|Latest|Latest to first|Course")
    about = f"Output tokens per second of {len(line)} comparable results, since {line[0].started}."
    return Table("trend", "Trend", columns, tuple(rows), (about,))


def _bars(series: Sequence[float]) -> str:
    """Bars from the lowest to the highest value; all the same when the range is below 1 %."""
    low, high = min(series), max(series)
    if high < 1.01 * low:
        return BARS[3] * len(series)
    return "".join(BARS[round((v - low) / (high - low) * (len(BARS) - 1))] for v in series)
