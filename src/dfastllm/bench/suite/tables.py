"""What a result says, as tables of text: the terminal and the HTML page show these and nothing else, so that they agree.

No column is empty in every row, and no text that came from a server keeps its control characters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

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

__all__ = [
    "Cell",
    "Column",
    "Table",
    "accuracy",
    "advice",
    "best_configuration",
    "figure",
    "printable",
    "tables",
    "times",
]

NONE = "–"
BEST = "★"
Tone = Literal["", "good", "bad", "dim"]
TONES: dict[str, Tone] = {"faster": "good", "slower": "bad"}


@dataclass(frozen=True, slots=True)
class Cell:
    """key: what the cell sorts by; None for nothing to sort. tone: a hint for colour, never the only carrier."""

    text: str
    key: float | str | None = None
    tone: Tone = ""


@dataclass(frozen=True, slots=True)
class Column:
    name: str
    right: bool = True


@dataclass(frozen=True, slots=True)
class Table:
    """lines: sentences that belong under the table. Without rows it is only its lines."""

    name: str
    title: str
    columns: tuple[Column, ...] = ()
    rows: tuple[tuple[Cell, ...], ...] = ()
    lines: tuple[str, ...] = ()


def printable(text: str) -> str:
    """One line without control characters: what a server says may not steer the terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def figure(value: float | None, unit: str = "") -> str:
    """Three significant digits or all before the point, thousands separated: 0.0213, 1.23, 45.6, 789, 12,345. A whole
    number stays one."""
    if value is None:
        return NONE
    size = abs(value)
    digits = 0 if size >= 100 or isinstance(value, int) else 1 if size >= 10 else 2 if size >= 1 else 3
    text = f"{value:,.{digits}f}" if size >= 0.1 or value == 0 else f"{value:.3g}"
    return f"{text} {unit}" if unit else text


def share(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.1f} %".replace(".0 %", " %")


def accuracy(found: Accuracy | None) -> str:
    return NONE if found is None else f"{share(found.value)} ({found.correct}/{found.n})"


def times(gain: Comparison | None) -> str:
    """The ratio with its interval."""
    return NONE if gain is None else f"{gain.ratio:.2f}× ({gain.low:.2f}–{gain.high:.2f})"


def best_configuration(results: Results) -> str | None:
    """The configuration the recommendations name as the best, if they do."""
    found = (r.configuration for r in results.recommendations if r.kind == "configuration")
    return next((name for name in found if name is not None), None)


def tables(results: Results) -> tuple[Table, ...]:
    """Every table of the report, in reading order."""
    parts = (
        _servers(results),
        _configurations(results),
        _drafts(results),
        _latencies(results),
        _prompt_types(results),
        _types_by_configuration(results),
        _system_prompts(results),
        _load(results),
        _parallelism(results),
        _environment(results),
        advice(results.recommendations),
    )
    return tuple(_without_idle_columns(part) for part in parts if part.rows or part.lines)


def advice(recommendations: Sequence[Recommendation]) -> Table:
    lines = []
    for item in recommendations:
        lines.append(("Warning: " if item.kind == "warning" else "") + printable(item.text))
        if item.kind == "configuration" and item.configuration is not None and item.options:
            lines.append(f"    request fields: {printable(str(item.options))}")
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


def _columns(left: str, right: str) -> tuple[Column, ...]:
    """Names separated by "|": those set flush left, then the figures."""
    names = [Column(n, right=False) for n in left.split("|")]
    return (*names, *(Column(n) for n in right.split("|") if n))


def _text(text: str, tone: Tone = "") -> Cell:
    clean = printable(text)
    return Cell(clean, clean.lower(), tone)


def _number(value: float | None, unit: str = "", tone: Tone = "") -> Cell:
    return Cell(figure(value, unit), value, tone)


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
    return Cell(NONE) if gain is None else _text(gain.verdict, TONES.get(gain.verdict, "dim"))


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


def _servers(results: Results) -> Table:
    rows = []
    for server in results.servers:
        tone: Tone = "good" if server.status == "running" else "bad"
        state = server.status.replace("_", " ")
        cells = (
            _text(server.name),
            _text(server.url),
            _text(state.upper() if server.status == "running" else state, tone),
            _text(", ".join(server.models) or NONE),
            _text(server.software or NONE),
            _number(server.latency_ms, "ms"),
        )
        rows.append(cells)
    lines = tuple(
        f"{printable(s.name)}: {printable(s.message)}" for s in results.servers if s.status != "running" and s.message
    )
    return Table(
        "servers", "Server status", _columns("Server|URL|Status|Models|Software", "Latency"), tuple(rows), lines
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
            _text(config.label),
            _number(speed.output_throughput),
            _number(speed.duration, "s"),
            _gain(figures.versus_baseline, config is base),
            _accuracy(figures.accuracy, base_accuracy),
            _verdict(figures.versus_baseline),
            _equal(figures.equality),
            _errors(figures),
            Cell(BEST if config.name == best else "", float(config.name == best), "good"),
        )
        rows.append(cells)
    columns = _columns("Configuration", "Tok/s|Time|Speedup|Accuracy|Verdict|Equals baseline|Errors|Best")
    lines = [
        f"{printable(c.label)}: {c.status}{': ' + printable(c.message) if c.message else ''}"
        for c in results.configurations
        if c.figures is None
    ]
    lines += _about_tokens([f for _, f in _measured(results)])
    return Table("configurations", "Performance by configuration", columns, tuple(rows), tuple(lines))


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
            _text(config.label),
            _text(", ".join(f"{k} {v}" for k, v in sorted(figures.exactness.items())) or NONE),
            _number(spec.num_drafts if spec else None),
            Cell(f"{spec.num_accepted_tokens:,}/{spec.num_draft_tokens:,}", spec.num_accepted_tokens)
            if spec
            else Cell(NONE),
            _share(spec.acceptance_rate if spec else None),
            _number(spec.acceptance_length if spec else None),
            Cell(_per_position(spec) if spec else NONE),
            _number(work.nfe if work else None),
            _number(work.tokens_per_forward if work else None),
        )
        rows.append(cells)
    columns = _columns(
        "Configuration|Exactness (answers)",
        "Drafts|Tokens accepted|Acceptance|Tokens per verify|% accepted by position|Forwards per answer|Tokens per forward",
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
        (_text(config.label), *(_percentiles(of(figures)) for _, of in LATENCIES), _number(figures.speed.user_tps))
        for config, figures in _measured(results)
    ]
    columns = _columns("Configuration", "|".join([*(name for name, _ in LATENCIES), "Reader's tok/s"]))
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
    for kind in results.prompt_types:
        base = results.baseline.prompt_types.get(kind.name) if results.baseline else None
        config = _shown_for(kind, results)
        other = config.prompt_types.get(kind.name) if config else None
        gain = other.versus_baseline if other else None
        cells = (
            _text(kind.label),
            _text(config.label if config else NONE),
            _number(base.speed.output_throughput if base else None),
            _number(other.speed.output_throughput if other else None),
            _gain(gain),
            _accuracy(other.accuracy if other else None, base.accuracy if base else None),
            _accuracy(base.accuracy if base else None),
            _verdict(gain),
            _number(kind.prompts),
        )
        rows.append(cells)
    columns = _columns(
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
        cells = [_text(kind.label)]
        for config in others:
            figures = config.prompt_types.get(kind.name)
            gain = figures.versus_baseline if figures else None
            if figures is None or gain is None:
                cells.append(Cell(NONE))
                continue
            right = f", {share(figures.accuracy.value)}" if figures.accuracy else ""
            cells.append(Cell(f"{gain.ratio:.2f}×{right}", gain.ratio, TONES.get(gain.verdict, "")))
        rows.append(tuple(cells))
    columns = (Column("Prompt type", right=False), *(Column(printable(c.label)) for c in others))
    return Table("types_by_configuration", "Speedup and accuracy by prompt type", columns, tuple(rows))


def _system_prompts(results: Results) -> Table:
    labels = {c.name: c.label for c in results.configurations}
    rows = []
    for prompt in results.system_prompts:
        figures = prompt.figures
        cells = (
            _text(prompt.name),
            _text(prompt.text or "(none)"),
            _text(labels.get(prompt.configuration, prompt.configuration)),
            _number(figures.speed.output_throughput),
            _number(figures.speed.e2el.p50 if figures.speed.e2el else None, "ms"),
            _accuracy(figures.accuracy),
            _number(figures.output.mean_tokens),
            _share(figures.output.repetition),
            _number(figures.output.empty),
            _errors(figures),
        )
        rows.append(cells)
    columns = _columns(
        "System prompt|Text|Configuration", "Tok/s|E2E p50|Accuracy|Tokens per answer|Repetition|Empty|Errors"
    )
    return Table("system_prompts", "Performance by system prompt", columns, tuple(rows))


def _load(results: Results) -> Table:
    labels = {c.name: c.label for c in results.configurations}
    rows = []
    for point in results.load:
        speed = point.figures.speed
        cells = (
            _text(point.name),
            _text(labels.get(point.configuration, point.configuration)),
            _number(point.concurrency),
            _number(point.request_rate),
            _number(point.achieved_rate),
            _number(point.max_in_flight),
            _number(speed.output_throughput),
            _number(speed.request_goodput),
            _percentiles(speed.ttft),
            _percentiles(speed.tpot),
            _percentiles(speed.e2el),
            _accuracy(point.figures.accuracy),
            _errors(point.figures),
        )
        rows.append(cells)
    columns = _columns(
        "Load|Configuration",
        "In flight|Requests/s asked|Requests/s done|Most in flight|Tok/s|Goodput, requests/s|TTFT|TPOT|E2E|Accuracy|Errors",
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
            _text(labels.get(p.configuration, p.configuration)),
            _number(p.tokens_per_forward),
            _share(p.accuracy),
            _number(p.n),
        )
        for p in found.points
    )
    line = f"Area under the curve: {figure(found.area)}"
    line += f"; mean accuracy over it: {share(found.mean_accuracy)}." if found.mean_accuracy is not None else "."
    columns = _columns("Configuration", "Tokens per forward|Accuracy|Answers graded")
    return Table("parallelism", "Accuracy against parallelism", columns, rows, (line,))


def _environment(results: Results) -> Table:
    env, run, target = results.environment, results.run, results.target
    lines = []
    if target is not None:
        kind = f", {target.kind}" if target.kind else ""
        software = f", {printable(target.software)}" if target.software else ""
        lines.append(f"Measured: {printable(target.model)}{kind} at {printable(target.url)}{software}.")
        lines += [f"The server {printable(text)}." for text in _fields(target.fields)]
        lines += [f"Fallback: {printable(text)}" for text in target.fallbacks]
    hardware = ", ".join(f"{k} {_flat(v)}" for k, v in env.hardware.items() if v not in (None, "", [], {}))
    lines.append(printable(f"Machine: {hardware} (profile {env.profile_key})."))
    if env.server_is_local is not True:
        lines.append("The machine is the client's; the server's may be another.")
    versions = ", ".join(f"{k} {v}" for k, v in env.versions.items())
    lines.append(printable(f"Versions: {versions}; commit {env.commit or 'unknown'}."))
    lines.append(
        f"Run: {results.started}, {figure(results.seconds)} s; {run.requests} prompts a type, {run.rounds} rounds, "
        f"{run.concurrency} in flight, max_tokens {run.max_tokens}, temperature {run.temperature:g}, seed {run.seed}"
        f"{', quick' if run.quick else ''}."
    )
    if results.client is not None:
        cost = results.client
        per_chunk = f"{figure(cost.cpu_us_per_chunk)} µs of CPU a chunk, " if cost.cpu_us_per_chunk is not None else ""
        lines.append(
            f"Client: {per_chunk}{share(cost.cpu_share)} of a core; event loop late by {figure(cost.loop_lag_p50_ms)} ms "
            f"(median), {figure(cost.loop_lag_p99_ms)} ms (p99)"
            f"{'' if cost.bounded else ': over its limits, so the figures may be the client’s own'}."
        )
    lines += [f"Skipped {printable(s.part)}: {printable(s.reason)}" for s in results.skipped]
    lines += [f"Note: {printable(note)}" for note in results.notes]
    if results.partial:
        lines.append(f"PARTIAL: {printable(results.partial_reason or 'the run ended early')}")
    return Table("environment", "What was measured, and where", lines=tuple(lines))


def _fields(fields: dict[str, str]) -> list[str]:
    """What the server makes of request fields beyond OpenAI's."""
    verbs = {"yes": "honours", "no": "refuses", "ignored": "takes and ignores"}
    by_answer = {answer: [name for name, a in sorted(fields.items()) if a == answer] for answer in verbs}
    return [f"{verbs[answer]} {', '.join(names)}" for answer, names in by_answer.items() if names]


def _flat(value: object) -> str:
    if isinstance(value, dict):
        return " ".join(f"{k} {_flat(v)}" for k, v in value.items())
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
