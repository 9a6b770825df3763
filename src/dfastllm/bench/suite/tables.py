"""What a result says, as tables of text. The terminal and the HTML page show these and nothing else: they agree.

No column is empty in every row, and no text that came from a server keeps its control characters."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence

from dfastllm.bench.suite.about import environment, server_status
from dfastllm.bench.suite.cells import (
    BEST,
    NONE,
    TONES,
    Cell,
    Column,
    Table,
    accuracy,
    figure,
    named,
    number,
    percent,
    printable,
    share,
    text,
    times,
)
from dfastllm.bench.suite.schema import (
    Accuracy,
    Comparison,
    ConfigurationResult,
    Equality,
    Figures,
    Latency,
    PromptTypeResult,
    Recommendation,
    Results,
    Speculation,
)

__all__ = ["advice", "best_configuration", "tables"]


def best_configuration(results: Results) -> str | None:
    """The configuration the recommendations name as the best, if they do."""
    found = (r.configuration for r in results.recommendations if r.kind == "configuration")
    return next((name for name in found if name is not None), None)


def tables(results: Results) -> tuple[Table, ...]:
    """Every table of the report, in reading order."""
    parts = (
        server_status(results),
        _configurations(results),
        _drafts(results),
        _latencies(results),
        _prompt_types(results),
        _types_by_configuration(results),
        _system_prompts(results),
        _load(results),
        _parallelism(results),
        environment(results),
        advice(results.recommendations),
    )
    return tuple(_without_idle_columns(part) for part in parts if part.rows or part.lines)


def advice(recommendations: Sequence[Recommendation]) -> Table:
    lines = []
    for item in recommendations:
        lines.append(("Warning: " if item.kind == "warning" else "") + printable(item.text))
        if item.kind == "configuration" and item.configuration is not None and item.options:
            lines.append(f"    request fields: {printable(json.dumps(item.options))}")
    return Table("recommendations", "Recommendations", lines=tuple(lines))


def _without_idle_columns(table: Table) -> Table:
    """Without the columns that say nothing in any row, without one configuration repeated in every row (a line says
    which it was), and without errors where there were none (a line says so)."""
    kept, lines = [], list(table.lines)
    for i, column in enumerate(table.columns):
        texts = {row[i].text for row in table.rows}
        if i and texts <= {"", NONE}:
            continue
        if i and column.name == "Configuration" and len(texts) == 1:
            lines.insert(0, f"Configuration: {texts.pop()}.")
        elif column.name == "Errors" and texts == {"0"}:
            lines.append("No request failed.")
        else:
            kept.append(i)
    rows = tuple(tuple(row[i] for i in kept) for row in table.rows)
    return Table(table.name, table.title, tuple(table.columns[i] for i in kept), rows, tuple(lines))


def _share(value: float | None) -> Cell:
    return Cell(share(value), value)


def _accuracy(found: Accuracy | None, base: Accuracy | None = None) -> Cell:
    fell = found is not None and base is not None and found.value < base.value
    return Cell(accuracy(found), None if found is None else found.value, "bad" if fell else "")


def _gain(gain: Comparison | None, baseline: bool = False) -> Cell:
    if baseline:
        return Cell("baseline", 1.0, "dim")
    return Cell(times(gain), None if gain is None else gain.ratio, TONES.get(gain.verdict, "") if gain else "")


def _verdict(gain: Comparison | None) -> Cell:
    return Cell(NONE) if gain is None else text(gain.verdict, TONES.get(gain.verdict, "dim"))


def _percentiles(latency: Latency | None) -> Cell:
    if latency is None:
        return Cell(NONE)
    values = (latency.p50, latency.p90, latency.p95, latency.p99)
    return Cell(" / ".join(figure(v) for v in values), latency.p50)


def _equal(found: Equality | None) -> Cell:
    if found is None or not found.compared:
        return Cell(NONE)
    return Cell(f"{found.equal}/{found.compared} {found.by}", found.equal / found.compared)


def _errors(figures: Figures) -> Cell:
    speed = figures.speed
    kinds = ", ".join(f"{printable(k)} {n}" for k, n in sorted(speed.error_kinds.items()))
    return Cell(
        f"{speed.errors} ({kinds})" if kinds else str(speed.errors), speed.errors, "bad" if speed.errors else ""
    )


def _measured(results: Results) -> list[tuple[ConfigurationResult, Figures]]:
    return [(c, c.figures) for c in results.configurations if c.figures is not None]


def _configurations(results: Results) -> Table:
    best, base = best_configuration(results), results.baseline
    base_accuracy = base.figures.accuracy if base is not None and base.figures is not None else None
    rows = []
    for config, figures in _measured(results):
        speed = figures.speed
        cells = (
            text(config.label),
            number(speed.output_throughput),
            number(speed.duration, "s"),
            _gain(figures.versus_baseline, config is base),
            Cell(BEST if config.name == best else "", float(config.name == best), "good"),
            _accuracy(figures.accuracy, base_accuracy),
            _verdict(figures.versus_baseline),
            _equal(figures.equality),
            _errors(figures),
        )
        rows.append(cells)
    columns = named("Configuration", "Tok/s|Time|Speedup|Best|Accuracy|Verdict|Equals baseline|Errors")
    lines = _unmeasured([c for c in results.configurations if c.figures is None])
    lines += _about_tokens([f for _, f in _measured(results)])
    return Table("configurations", "Performance by configuration", columns, tuple(rows), tuple(lines))


def _unmeasured(configurations: Iterable[ConfigurationResult]) -> list[str]:
    """A sentence for each reason, with all it holds for."""
    reasons: dict[str, list[str]] = {}
    for c in configurations:
        reason = c.status + (f": {printable(c.message)}" if c.message else "")
        reasons.setdefault(reason, []).append(printable(c.label))
    return [f"{'; '.join(labels)}: {reason}" for reason, labels in reasons.items()]


def _about_tokens(figures: Iterable[Figures]) -> list[str]:
    sources = {f.speed.tokens_source for f in figures} - {"usage"}
    meaning = {
        "tokenize": "Tokens were counted by the server's tokenize endpoint: its streams carry no usage.",
        "estimate": "Tokens are estimated as characters / 4: nothing counts them. Compare with no other server.",
        "mixed": "Not all answers had their tokens counted in the same way.",
        "none": "Nothing counts tokens here, so there are no token rates.",
    }
    return [meaning[source] for source in sorted(sources)]


def _per_position(spec: Speculation) -> str:
    if not spec.accepted_per_position or not spec.num_drafts:
        return NONE
    return " ".join(f"{100 * n / spec.num_drafts:.0f}" for n in spec.accepted_per_position)


def _drafts(results: Results) -> Table:
    rows = []
    for config, figures in _measured(results):
        spec, work = figures.speculation, figures.forwards
        if spec is None and work is None and not figures.exactness:
            continue
        cells = (
            text(config.label),
            text(", ".join(f"{k} {v}" for k, v in sorted(figures.exactness.items())) or NONE),
            number(spec.num_drafts if spec else None),
            Cell(f"{spec.num_accepted_tokens:,}/{spec.num_draft_tokens:,}", spec.num_accepted_tokens)
            if spec
            else Cell(NONE),
            _share(spec.acceptance_rate if spec else None),
            number(spec.acceptance_length if spec else None),
            Cell(_per_position(spec) if spec else NONE),
            number(work.nfe if work else None),
            number(work.tokens_per_forward if work else None),
        )
        rows.append(cells)
    columns = named(
        "Configuration|Exactness (answers)",
        "Drafts|Tokens accepted|Acceptance|Tokens per verify|% accepted by position|Forwards per answer|"
        "Tokens per forward",
    )
    from_metrics = any(f.speculation and f.speculation.source == "metrics" for _, f in _measured(results))
    lines = (
        ("Drafts were read from /metrics, which counts everything the server did meanwhile.",) if from_metrics else ()
    )
    return Table("work", "Drafts and forward passes", columns, tuple(rows), lines)


LATENCIES: tuple[tuple[str, Callable[[Figures], Latency | None]], ...] = (
    ("TTFT", lambda f: f.speed.ttft),
    ("TPOT", lambda f: f.speed.tpot),
    ("ITL", lambda f: f.speed.itl),
    ("Between chunks", lambda f: f.speed.icl),
    ("E2E", lambda f: f.speed.e2el),
    ("Per block", lambda f: f.speed.block),
    ("First tool call", lambda f: f.speed.ttfa),
)


def _latencies(results: Results) -> Table:
    rows = [
        (text(config.label), *(_percentiles(of(figures)) for _, of in LATENCIES), number(figures.speed.user_tps))
        for config, figures in _measured(results)
    ]
    columns = named("Configuration", "|".join([*(name for name, _ in LATENCIES), "Reader's tok/s"]))
    lines = ("Milliseconds: p50 / p90 / p95 / p99.",) if rows else ()
    return Table("latency", "Latency by configuration", columns, tuple(rows), lines)


def _shown_for(kind: PromptTypeResult, results: Results) -> ConfigurationResult | None:
    """The configuration a type is shown with: its own best, else the best of all, else the one with the highest ratio,
    whatever its verdict."""
    by_name = {c.name: c for c in results.configurations}
    for name in (kind.best_configuration, best_configuration(results)):
        if name is not None and name in by_name and kind.name in by_name[name].prompt_types:
            return by_name[name]
    rated = [
        (gain.ratio, c)
        for c in results.configurations
        if kind.name in c.prompt_types and (gain := c.prompt_types[kind.name].versus_baseline) is not None
    ]
    return max(rated, key=lambda pair: pair[0])[1] if rated else None


def _prompt_types(results: Results) -> Table:
    rows = []
    for kind in results.prompt_types if _measured(results) else ():  # of a look at servers alone there are no figures
        base = results.baseline.prompt_types.get(kind.name) if results.baseline else None
        config = _shown_for(kind, results)
        other = config.prompt_types.get(kind.name) if config else None
        gain = other.versus_baseline if other else None
        cells = (
            text(kind.label),
            text(config.label if config else NONE),
            number(base.speed.output_throughput if base else None),
            number(other.speed.output_throughput if other else None),
            _gain(gain),
            _accuracy(other.accuracy if other else None, base.accuracy if base else None),
            _accuracy(base.accuracy if base else None),
            _verdict(gain),
            number(kind.prompts),
        )
        rows.append(cells)
    columns = named(
        "Prompt type|Accelerated by", "Baseline tok/s|Tok/s|Speedup|Accuracy|Baseline accuracy|Verdict|Prompts"
    )
    return Table("prompt_types", "Performance by prompt type", columns, tuple(rows))


def _types_by_configuration(results: Results) -> Table:
    """Speedup and accuracy of every type under every configuration but the baseline."""
    others = [c for c in results.configurations if c.figures is not None and c is not results.baseline]
    if len(others) < 2:
        return Table("types_by_configuration", "")
    rows = []
    for kind in results.prompt_types:
        cells = [text(kind.label)]
        for config in others:
            figures = config.prompt_types.get(kind.name)
            gain = figures.versus_baseline if figures else None
            if figures is None or gain is None:
                cells.append(Cell(NONE))
                continue
            right = f", {share(figures.accuracy.value)}" if figures.accuracy else ""
            cells.append(
                Cell(f"{gain.ratio:.2f}× ({percent(gain.ratio)}){right}", gain.ratio, TONES.get(gain.verdict, ""))
            )
        rows.append(tuple(cells))
    columns = (Column("Prompt type", right=False), *(Column(printable(c.label)) for c in others))
    return Table("types_by_configuration", "Speedup and accuracy by prompt type", columns, tuple(rows))


def _system_prompts(results: Results) -> Table:
    labels = {c.name: c.label for c in results.configurations}
    rows = []
    for prompt in results.system_prompts:
        figures = prompt.figures
        cells = (
            text(prompt.name),
            text(prompt.text or "(none)"),
            text(labels.get(prompt.configuration, prompt.configuration)),
            number(figures.speed.output_throughput),
            number(figures.speed.e2el.p50 if figures.speed.e2el else None, "ms"),
            _accuracy(figures.accuracy),
            number(figures.output.mean_tokens),
            _share(figures.output.repetition),
            number(figures.output.empty),
            _errors(figures),
        )
        rows.append(cells)
    columns = named(
        "System prompt|Text|Configuration", "Tok/s|E2E p50|Accuracy|Tokens per answer|Repetition|Empty|Errors"
    )
    return Table("system_prompts", "Performance by system prompt", columns, tuple(rows))


def _load(results: Results) -> Table:
    labels = {c.name: c.label for c in results.configurations}
    rows = []
    for point in results.load:
        speed = point.figures.speed
        cells = (
            text(point.name),
            text(labels.get(point.configuration, point.configuration)),
            number(point.concurrency),
            number(point.request_rate),
            number(point.achieved_rate),
            number(point.max_in_flight),
            number(speed.output_throughput),
            number(speed.request_goodput),
            _percentiles(speed.ttft),
            _percentiles(speed.tpot),
            _percentiles(speed.e2el),
            _accuracy(point.figures.accuracy),
            _errors(point.figures),
        )
        rows.append(cells)
    columns = named(
        "Load|Configuration",
        "In flight|Requests/s asked|Requests/s done|Most in flight|Tok/s|Goodput, requests/s|TTFT|TPOT|E2E|Accuracy|"
        "Errors",
    )
    slos = {tuple(sorted(p.slo.items())) for p in results.load if p.slo}
    lines = ["Milliseconds: p50 / p90 / p95 / p99."] if rows else []
    lines += ["Goodput: " + ", ".join(f"{k} at most {figure(v, 'ms')}" for k, v in slo) + "." for slo in sorted(slos)]
    lines += [
        f"{printable(p.name)}: {'partial' if p.partial else 'timeouts: ' + str(p.timeouts)}"
        + (f": {printable(p.partial_reason)}" if p.partial_reason else "")
        for p in results.load
        if p.partial or p.timeouts
    ]
    return Table("load", "Load", columns, tuple(rows), tuple(lines))


def _parallelism(results: Results) -> Table:
    found = results.accuracy_vs_parallelism
    if found is None or not found.points:
        return Table("parallelism", "")
    labels = {c.name: c.label for c in results.configurations}
    rows = tuple(
        (
            text(labels.get(p.configuration, p.configuration)),
            number(p.tokens_per_forward),
            _share(p.accuracy),
            number(p.n),
        )
        for p in found.points
    )
    line = f"Area under the curve: {figure(found.area)}"
    line += f"; mean accuracy over it: {share(found.mean_accuracy)}." if found.mean_accuracy is not None else "."
    columns = named("Configuration", "Tokens per forward|Accuracy|Answers graded")
    return Table("parallelism", "Accuracy against parallelism", columns, rows, (line,))
