"""What a result advises: the best configuration, where it helps most, what to expect; or that nothing can be said, or
that acceleration loses here.

A configuration is advised only when all of this holds: its speedup over the baseline has the verdict "faster"; no more
of its requests failed than of the baseline's; and its answers are as right: not fewer exact matches than the baseline,
or, where nothing is graded, every answer equal to the baseline's; and, where it speculates, its drafts saved forward
passes. Of those the one with the highest lower end of the
interval is the best, so that luck does not win."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from dfastllm.bench.suite.cells import accuracy, figure, percent, times
from dfastllm.bench.suite.schema import (
    Comparison,
    ConfigurationResult,
    Figures,
    Latency,
    LoadPoint,
    Recommendation,
    Results,
    SystemPromptResult,
)

__all__ = ["Judged", "disqualified", "judge", "recommend"]

SLOW = 10.0  # tok/s: about as fast as people read; below it they wait
ENOUGH = 0.9  # of the highest throughput: past this point load only adds waiting
Part = TypeVar("Part", LoadPoint, SystemPromptResult)
MORE = "Measure on an idle machine, or more: --rounds, --requests."


@dataclass(frozen=True, slots=True)
class Judged:
    """A configuration beside the baseline. why_not: None when its answers are as good as the baseline's."""

    configuration: ConfigurationResult
    figures: Figures
    gain: Comparison
    why_not: str | None


def disqualified(figures: Figures, base: Figures) -> str | None:
    """Why its speed does not count: fewer right answers, more failures, or answers nobody checked; None if it does."""
    ours, theirs = figures.accuracy, base.accuracy
    if figures.speed.errors > base.speed.errors:
        return f"{figures.speed.errors} requests failed, {base.speed.errors} of the baseline's"
    if ours is not None and theirs is not None:
        return f"accuracy fell from {accuracy(theirs)} to {accuracy(ours)}" if ours.value < theirs.value else None
    equality = figures.equality
    if equality is None or not equality.compared:
        return "nothing says whether its answers are still right"
    if equality.equal < equality.compared:
        return f"{equality.compared - equality.equal} of {equality.compared} answers differ and none could be graded"
    return None


def _idle(figures: Figures, base: Figures) -> str | None:
    """Speculation whose drafts saved no forward pass did the baseline's work: whatever the clock says is chance."""
    drafts, ours, theirs = figures.speculation, figures.forwards, base.forwards
    if ours is None or theirs is None or ours.nfe < theirs.nfe or (drafts is not None and drafts.num_accepted_tokens):
        return None
    return f"it made as many forward passes as the baseline ({figure(ours.nfe)} an answer): nothing was accelerated"


def judge(results: Results, prompt_type: str | None = None) -> list[Judged]:
    """All configurations that have a speedup, in the order measured; over one prompt type or all."""

    def of(config: ConfigurationResult) -> Figures | None:
        return config.figures if prompt_type is None else config.prompt_types.get(prompt_type)

    base = results.baseline
    base_figures = of(base) if base is not None else None
    if base is None or base_figures is None:
        return []
    out = []
    for config in results.configurations:
        figures = of(config)
        if config is not base and figures is not None and figures.versus_baseline is not None:
            why_not = disqualified(figures, base_figures)
            if config.axis == "speculation" and why_not is None:
                why_not = _idle(figures, base_figures)
            out.append(Judged(config, figures, figures.versus_baseline, why_not))
    return out


def recommend(results: Results) -> tuple[Recommendation, ...]:
    """Best configuration first, then use cases, system prompt, load, warnings. Never empty: a result that says nothing
    says that."""
    judged = judge(results)
    best = _best(judged)
    out = [_configuration(results, judged, best), *_rejected(judged, best)]
    if best is not None:
        out += _use_cases(results, best.configuration)
    advised = [j.name for j in (best.configuration if best else None, results.baseline) if j is not None]
    out += _system_prompt(_of(advised, results.system_prompts))
    out += _load(_of(advised, results.load))
    out += _warnings(results)
    return tuple(out)


def _best(judged: Sequence[Judged]) -> Judged | None:
    fit = [j for j in judged if j.gain.verdict == "faster" and j.why_not is None]
    return max(fit, key=lambda j: (j.gain.low, j.gain.ratio), default=None)


def _said(j: Judged) -> str:
    return f"{j.configuration.label} {times(j.gain)}"


def _configuration(results: Results, judged: Sequence[Judged], best: Judged | None) -> Recommendation:
    if best is not None:
        speed, base = best.figures.speed, results.baseline
        rate = f", {figure(speed.output_throughput)} tok/s" if speed.output_throughput is not None else ""
        right = ""
        if best.figures.accuracy is not None and base is not None and base.figures is not None:
            right = f"; accuracy {accuracy(best.figures.accuracy)}, baseline {accuracy(base.figures.accuracy)}"
        elif best.figures.equality is not None:
            right = f"; all {best.figures.equality.compared} answers equal the baseline's"
        gained = f"{percent(best.gain.low).removesuffix(' %')} to {percent(best.gain.high)}"
        return Recommendation(
            kind="configuration",
            text=f"Best configuration: {best.configuration.label}{rate}. Expected gain: {times(best.gain)} over the "
            f"baseline, {gained}{right}.",
            configuration=best.configuration.name,
            options=best.configuration.options,
            gain=best.gain,
        )
    return Recommendation(kind="configuration", text=_nothing(results, judged))


def _nothing(results: Results, judged: Sequence[Judged]) -> str:
    """Why no configuration is advised."""
    if results.baseline is None:
        return "No verdict: there is no measured baseline to compare with."
    if not judged:
        refused = [c for c in results.configurations if c.status == "refused"]
        if refused:
            return f"No verdict: the server refused every configuration but the baseline ({refused[0].message})."
        return "No verdict: no configuration was compared with the baseline."
    slower = [j for j in judged if j.gain.verdict == "slower"]
    drafted = all(j.configuration.axis == "speculation" for j in judged)
    what, off = ("Speculation", "Switch it off") if drafted else ("Every other configuration", "Keep the baseline")
    best = max(judged, key=lambda j: j.gain.ratio)
    if len(slower) == len(judged):
        return f"{what} loses here: at best {_said(best)}. {off}."
    if any(j.gain.verdict == "faster" for j in judged):
        return "No configuration is advised: those that look faster are out, see below. Keep the baseline."
    if any(j.gain.verdict == "no verdict" for j in judged):
        return f"No verdict: the noise is wider than the difference; at best {_said(best)}. {MORE}"
    return f"{what} gains nothing here: at best {_said(best)}. {off}."


def _rejected(judged: Sequence[Judged], best: Judged | None) -> Iterator[Recommendation]:
    """Fast but wrong, and, beside a winner, those that lose."""
    for j in judged:
        if j.gain.verdict == "faster" and j.why_not is not None:
            yield Recommendation(
                kind="warning",
                text=f"{j.configuration.label} is faster, {times(j.gain)}, and out: {j.why_not}.",
                configuration=j.configuration.name,
                gain=j.gain,
            )
        elif j.gain.verdict == "slower" and best is not None:
            yield Recommendation(
                kind="warning",
                text=f"{j.configuration.label} is slower than the baseline: {times(j.gain)}.",
                configuration=j.configuration.name,
                gain=j.gain,
            )


def _use_cases(results: Results, config: ConfigurationResult) -> Iterator[Recommendation]:
    """Where the advised configuration helps most, and the types for which it is the wrong one."""
    found: list[tuple[str, str, Judged]] = []
    for kind in results.prompt_types:
        for j in judge(results, kind.name):
            if j.configuration.name == config.name:
                found.append((kind.name, kind.label, j))
    fit = [f for f in found if f[2].gain.verdict == "faster" and f[2].why_not is None]
    if fit:
        name, label, j = max(fit, key=lambda f: f[2].gain.low)
        text = f"Best use case: {label}: {times(j.gain)} with {config.label}."
        yield Recommendation(
            kind="use_case", text=text, configuration=config.name, prompt_type=name, options=config.options, gain=j.gain
        )
    elif found:
        yield Recommendation(kind="use_case", text="Best use case: no verdict; no prompt type alone shows the gain.")
    for name, label, j in found:
        why = "is slower" if j.gain.verdict == "slower" else j.why_not
        if why is not None:
            yield Recommendation(
                kind="warning",
                text=f"{label} under {config.label}: {why} ({times(j.gain)}). Leave it off for such prompts.",
                configuration=config.name,
                prompt_type=name,
                gain=j.gain,
            )


def _system_prompt(prompts: Sequence[SystemPromptResult]) -> Iterator[Recommendation]:
    """Accuracy first: of the prompts of one configuration only the most accurate may win by time."""
    if len(prompts) < 2:
        return
    graded = [(p, p.figures.accuracy) for p in prompts if p.figures.accuracy is not None]
    top = max((found for _, found in graded), key=lambda found: found.value, default=None)
    for p, found in graded:
        if top is not None and found.high < top.low:
            text = f"System prompt {p.name!r} costs accuracy: {accuracy(found)}, the best has {accuracy(top)}."
            yield Recommendation(kind="warning", text=text)
    fit = [p for p in prompts if p.figures.accuracy is None or top is None or p.figures.accuracy.value >= top.value]
    timed = [(p, p.figures.speed.e2el) for p in fit if p.figures.speed.e2el is not None]
    if len(timed) > 1:
        yield _shortest(timed)
    elif len(fit) == 1 and top is not None:
        text = f"System prompt with the most right answers: {fit[0].name!r}, {accuracy(top)}."
        yield Recommendation(kind="system_prompt", text=text, configuration=fit[0].configuration)


def _shortest(timed: Sequence[tuple[SystemPromptResult, Latency]]) -> Recommendation:
    """The one whose answers end soonest, if the difference to every other of these is more than noise."""
    best, took = min(timed, key=lambda pair: pair[1].mean)
    others = [other for p, other in timed if p is not best]
    clear = all(_differs(took, other) for other in others)
    if not clear:
        text = "System prompts: no verdict; among the most accurate the time to answer differs by no more than noise."
        return Recommendation(kind="system_prompt", text=text)
    next_best = min(other.mean for other in others)
    text = (
        f"System prompt: {best.name!r} answers soonest, {figure(took.mean, 'ms')} on average (next: "
        f"{figure(next_best, 'ms')}), and none is more accurate."
    )
    return Recommendation(kind="system_prompt", text=text, configuration=best.configuration)


def _differs(a: Latency, b: Latency) -> bool:
    """The 95 % interval of the difference of the means (Welch, normal approximation) leaves out zero."""
    error = math.sqrt(a.std**2 / max(a.n - 1, 1) + b.std**2 / max(b.n - 1, 1))
    return abs(a.mean - b.mean) > 1.96 * error


def _of(names: Sequence[str], parts: Sequence[Part]) -> list[Part]:
    """Those of the first of these configurations that has any: the advised one, else the baseline."""
    found = ([part for part in parts if part.configuration == name] for name in names)
    return next((kept for kept in found if kept), [])


def _load(points: Sequence[LoadPoint]) -> Iterator[Recommendation]:
    """The least concurrency that gives most of the throughput, and the highest goodput; of one configuration."""
    closed = [p for p in points if p.kind == "closed" and not p.partial and p.figures.speed.errors == 0]
    rate: Callable[[LoadPoint], float] = lambda p: p.figures.speed.output_throughput or 0.0  # noqa: E731
    if len(closed) > 1 and any(rate(p) for p in closed):
        most = max(map(rate, closed))
        knee = min((p for p in closed if rate(p) >= ENOUGH * most), key=lambda p: p.concurrency or 0)
        late = knee.figures.speed.e2el
        wait = f", E2E p95 {figure(late.p95, 'ms')}" if late is not None else ""
        beyond = [p for p in closed if (p.concurrency or 0) > (knee.concurrency or 0)]
        more = f"more in flight gives at most {figure(max(map(rate, beyond)))}" if beyond else "more was not tried"
        yield Recommendation(
            kind="load",
            text=f"Load: {figure(rate(knee))} tok/s with {knee.concurrency} in flight{wait}; {more}.",
            configuration=knee.configuration,
        )
    good = [(p.figures.speed.request_goodput, p) for p in points if p.figures.speed.request_goodput is not None]
    if good:
        value, point = max(good, key=lambda pair: pair[0])
        slo = ", ".join(f"{k} ≤ {figure(v, 'ms')}" for k, v in sorted(point.slo.items()))
        text = f"Goodput: at most {figure(value)} requests/s within {slo}, at {point.name}."
        if not value:
            text = f"Goodput: no load met {slo}."
        yield Recommendation(kind="load", text=text, configuration=point.configuration)


def _warnings(results: Results) -> Iterator[Recommendation]:
    """What makes the figures worth less than they look."""
    target = results.target
    ignored = [name for name, answer in sorted(target.fields.items()) if answer == "ignored"] if target else []
    asked = {name for c in results.configurations if c.figures is not None for name in c.options}
    for name in ignored:
        if name in asked:
            text = f"The server ignores {name!r}: configurations that differ only in it are the same."
            yield Recommendation(kind="warning", text=text)
    if results.client is not None and not results.client.bounded:
        yield Recommendation(
            kind="warning", text="The client was too busy: latencies may be its own, not the server's."
        )
    yield from _idle_drafting(results)
    yield from _slow(results)
    sources = {c.figures.speed.tokens_source for c in results.configurations if c.figures is not None}
    if "estimate" in sources:
        yield Recommendation(kind="warning", text="Tokens are estimates: compare ratios, not tok/s.")
    failed = sum(c.figures.speed.errors for c in results.configurations if c.figures is not None)
    if failed:
        yield Recommendation(kind="warning", text=f"{failed} requests failed; they count in no speed.")
    if results.partial:
        reason = results.partial_reason or "the run ended early"
        yield Recommendation(kind="warning", text=f"The result is partial: {reason}.")


def _idle_drafting(results: Results) -> Iterator[Recommendation]:
    """Configurations that were to speculate and made not one draft, where the server tells what its answers took."""
    idle = [
        c
        for c in results.configurations
        if c.figures is not None
        and c.method not in (None, "none")
        and (c.figures.forwards is not None if c.figures.speculation is None else not c.figures.speculation.num_drafts)
    ]
    if not idle:
        return
    labels = "; ".join(c.label for c in idle)
    asked = [c.options.get("speculative_config") for c in idle]
    follows = any(isinstance(spec, dict) and spec.get("adaptive") is not False for spec in asked)
    why = "the method found nothing to propose (ngram and suffix need text that repeats itself)"
    way = "try another --method, or prompts whose answers repeat what was said"
    if follows:
        why += ", or a draft length that follows acceptance found that drafts do not pay here"
        way = f"hold the drafts at k with --no-adaptive; {way}"
    text = f"Drafting drafted nothing: {labels}. These figures are of plain decoding: {why}. To see drafts {way}."
    yield Recommendation(kind="warning", text=text, configuration=idle[0].name)


def _slow(results: Results) -> Iterator[Recommendation]:
    """Even the fastest configuration is below SLOW: what to look at."""
    rates = [
        (c.figures.speed.output_throughput, c)
        for c in results.configurations
        if c.figures is not None and c.figures.speed.output_throughput is not None
    ]
    rate, best = max(rates, key=lambda pair: pair[0], default=(SLOW, None))
    if best is None or rate >= SLOW:
        return
    hints = ["look at the load of the CPU and the GPU", "close other programs"]
    if any(c.method not in (None, "none") for _, c in rates):
        hints += ["try a smaller draft model", "fewer draft tokens (--k)"]
    if results.target is not None and (results.target.software or "").startswith("dfastllm"):
        hints.append("serve with --quantization w8 or more --threads")
    text = f"Slow: {figure(rate)} tok/s at best ({best.label}), below {SLOW:g}. To do: {', '.join(hints)}."
    yield Recommendation(kind="warning", text=text, configuration=best.name)
