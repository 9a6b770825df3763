"""`dfastllm gate`: is it slower than before. Four commands: record and check (absolute times of one machine), compare
(two sides in turns), counters (exact numbers).

Exit codes of all four: 0 passed or skipped, 1 failed, 2 wrong usage or unusable files, 3 no verdict.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dfastllm.settings import Settings

if TYPE_CHECKING:
    from rich.console import Console

    from dfastllm.bench.compare import Compared
    from dfastllm.bench.counters import Change, Counters

__all__ = ["app"]

COUNTERS = Path("benchmarks/gates/counters.json")
EXIT = {"pass": 0, "skipped": 0, "fail": 1, "no verdict": 3}
Json = Annotated[bool, typer.Option("--json", help="The last line on stdout is the result as one JSON object.")]

app = typer.Typer(
    name="gate",
    no_args_is_help=True,
    help="Speed gates. Exit codes: 0 pass or skipped, 1 fail, 2 usage, 3 no verdict. See docs/gates.md.",
)


def console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def _end(verdict: str, as_json: bool, **found: Any) -> None:
    """The verdict in words or as the last line, and the exit code."""
    if as_json:
        from dfastllm.metrics.gates import strict_json

        typer.echo(json.dumps(strict_json({"verdict": verdict, "exit_code": EXIT[verdict], **found}), allow_nan=False))
    raise typer.Exit(EXIT[verdict])


def _number(value: Any) -> str:
    return "–" if value is None else f"{value:,.4g}"


@app.command()
def record(
    out: Annotated[Path, typer.Option(help="File to write.")],
    model: Annotated[str, typer.Option(help="A shipped model's name, a directory or a GGUF file.")] = "demo-ar",
    requests: Annotated[int, typer.Option(min=1, help="Measured requests; every other one should call a tool.")] = 40,
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens of each.")] = 64,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: all cores.")] = None,
    seed: Annotated[int, typer.Option(help="Of the workload.")] = 0,
    as_json: Json = False,
) -> None:
    """Measure a model on this machine and keep the speed as a report: a baseline, or what `check` holds against one."""
    settings = Settings.load({"threads": threads})
    with console(stderr=True).status("loading"):
        from dfastllm.kernels.extension import set_threads
        from dfastllm.llm import LLM, model_options
        from dfastllm.metrics.gates import save_report
        from dfastllm.metrics.model_speed import speed_report

        set_threads(settings.threads)
        llm = LLM(model, **model_options(settings))
    with llm, console(stderr=True).status(f"measuring {requests} requests"):
        report = speed_report(llm, requests, max_tokens=max_tokens, seed=seed)
    save_report(report, out)
    screen = console(stderr=as_json)
    _show_metrics(report.speed_metrics)
    screen.print(f"{report.n} requests on {report.hardware_profile_key}: {out}", markup=False)
    _end("pass", as_json, report=str(out), hardware_profile_key=report.hardware_profile_key, n=report.n)


def _show_metrics(metrics: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table("", "p05", "p50", "p90", "p95")
    for name, label in (
        ("ttft_ms", "TTFT, ms"),
        ("tps", "TPS"),
        ("ttfa_tokens", "TTFA, tokens"),
        ("ttfa_excess_tokens", "TTFA excess"),
        ("ttfa_ms", "TTFA, ms"),
    ):
        values = metrics.get(name) or {}
        table.add_row(label, *(_number(values.get(p)) if p in values else "" for p in ("p05", "p50", "p90", "p95")))
    console(stderr=True).print(table)


@app.command()
def check(
    current: Annotated[Path, typer.Argument(help="A report of `gate record`, or test_results.json of `bench`.")],
    baseline: Annotated[
        Path | None, typer.Option(help="The same of before; without it, or without that file, all gates are skipped.")
    ] = None,
    threshold: Annotated[float, typer.Option(help="Allowed regression; 0.05 is 5 %.")] = 0.05,
    ttfa_limit: Annotated[
        float, typer.Option(help="Most tokens (p95) up to the first complete tool call that the call did not need.")
    ] = 25.0,
    configuration: Annotated[
        str | None, typer.Option(help="Of a test_results.json; default: its baseline configuration.")
    ] = None,
    same_hardware: Annotated[
        bool, typer.Option("--same-hardware", help="A baseline of another machine is an error, not a reason to skip.")
    ] = False,
    other_model: Annotated[
        bool, typer.Option("--other-model", help="The two are of different models, such as a student and its baseline.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Hold a measurement against a baseline of the same hardware: TTFT, TPS, TTFA."""
    from dfastllm.bench.reports import load_current
    from dfastllm.metrics.gates import check as hold
    from dfastllm.metrics.gates import same_machine

    now = load_current(current, configuration)
    recorded = baseline is not None and baseline.exists()
    before = load_current(baseline, configuration) if baseline is not None and recorded else None
    if same_hardware and before is not None:
        same_machine(now, before)
    found = hold(now, before, regression_threshold=threshold, ttfa_limit=ttfa_limit, other_model=other_model)
    verdict = "skipped" if found["skipped"] else "pass" if found["gates_passed"] else "fail"
    if baseline is not None and not recorded:
        console().print(f"there is no {baseline}: record it with dfastllm gate record --out", markup=False)
    _show_gates(found, verdict, threshold)
    _end(verdict, as_json, **found)


def _show_gates(found: dict[str, Any], verdict: str, threshold: float) -> None:
    from rich.table import Table

    screen = console()
    if found["skipped"]:
        screen.print(f"skipped: {found['reason']}")
        return
    table = Table("gate", "baseline", "current", "change", "limit", "")
    for gate, label in (("ttft_regression", "TTFT {}, ms"), ("tps_regression", "TPS {}")):
        for percentile, one in found[gate].items():
            change = one.get("regression")
            shown = "–" if change is None else f"{abs(change):.1%} {'slower' if change > 0 else 'faster'}"
            word = one.get("reason") or ("pass" if one["passed"] else "FAIL")
            values = (_number(one["baseline"]), _number(one["current"]))
            table.add_row(label.format(percentile), *values, shown, f"{threshold:.1%} slower", word)
    ttfa = found["ttfa_gate"]
    word = ttfa.get("reason") or ("pass" if ttfa["passed"] else "FAIL")
    label = "TTFA p95" if ttfa.get("counted") == "ttfa_tokens" else "TTFA excess p95"
    table.add_row(label, "", _number(ttfa.get("p95")), "", f"{ttfa['threshold']:g} tokens", word)
    screen.print(table)
    for error in found["errors"]:
        screen.print(error, markup=False)
    screen.print(verdict)


@app.command()
def compare(
    base: Annotated[str, typer.Argument(help='A command, a URL, "model:NAME?cache=dual", or git:REVISION.')],
    new: Annotated[str, typer.Argument(help="The other side; fails when it is slower than BASE by more than MARGIN.")],
    pairs: Annotated[int, typer.Option(min=1, help="Measurements of each side.")] = 15,
    margin: Annotated[float, typer.Option(help="Allowed slow-down; 0.05 is 5 %.")] = 0.05,
    warmups: Annotated[int, typer.Option(min=0, help="Unmeasured turns before.")] = 2,
    requests: Annotated[int, typer.Option(min=1, help="Requests of a measurement (not of commands).")] = 4,
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens of each request.")] = 64,
    model: Annotated[
        str | None, typer.Option(help="Model of commits, default demo-ar, and of servers, default their first.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure two sides in turns: the ratio of their times with its interval, and a verdict unless the noise wins."""
    from contextlib import ExitStack

    from rich.progress import Progress

    from dfastllm.bench.compare import compare as take
    from dfastllm.bench.sides import Asked, open_side

    asked = Asked(requests, max_tokens, model)
    with ExitStack() as stack:
        with console(stderr=True).status("opening both sides"):
            sides = [stack.enter_context(open_side(side, asked)) for side in (base, new)]
        bar = stack.enter_context(Progress(console=console(stderr=True), transient=True))
        task = bar.add_task("pairs", total=pairs)
        found = take(
            *sides, pairs=pairs, margin=margin, warmups=warmups, progress=lambda n: bar.update(task, completed=n)
        )
    _show_compared(base, new, found)
    _end(found.verdict, as_json, **{k: v for k, v in dataclasses.asdict(found).items() if k != "verdict"})


def _show_compared(base: str, new: str, found: Compared) -> None:
    from rich.table import Table

    screen = console()
    table = Table("side", "what", "median, ms", "quartiles")
    for side, what, times in (("base", base, found.base), ("new", new, found.new)):
        table.add_row(side, what, f"{1e3 * times.median:,.4g}", f"{1e3 * times.q1:,.4g} – {1e3 * times.q3:,.4g}")
    screen.print(table)
    ratio = found.ratio
    screen.print(
        f"new takes {ratio.median:.3f} times as long, 95 % interval {ratio.low:.3f} – {ratio.high:.3f} over {ratio.n}"
        f" pairs; limit {1 + found.margin:.3f}"
    )
    screen.print(f"{found.verdict}: {found.reason}" if found.reason else found.verdict)


@app.command()
def counters(
    baseline: Annotated[Path, typer.Option(help="The baseline file.")] = COUNTERS,
    case: Annotated[list[str] | None, typer.Option(help="Only cases that begin so; repeatable.")] = None,
    update: Annotated[
        bool,
        typer.Option("--update", help="Count with every kind of kernels this machine can run, and write the file."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Exact counters of the shipped models on fixed requests, against the baseline in git."""
    from rich.progress import track

    from dfastllm.bench import counters as exact
    from dfastllm.errors import ValidationError

    if update:
        if case:
            raise ValidationError("--update writes the whole file: leave --case out.", param="case")
        with console(stderr=True).status("counting with every kind of kernels, a process each"):
            kinds = dict(exact.count_everywhere())
        exact.save_counters(baseline, kinds)
        _show_counters(kinds[exact.counters_key()])
        console().print(f"wrote {baseline}: {', '.join(kinds)}", markup=False)
        _end("pass", as_json, kinds=list(kinds), baseline=str(baseline))
    key = exact.counters_key()
    before = exact.load_counters(baseline, key)
    cases = exact.cases_of(case)
    if before is None:
        console().print(f"skipped: {baseline} has no counters for kernels of kind {key}", markup=False)
        _end("skipped", as_json, key=key, reason="no_baseline")
    screen = console(stderr=True)
    found = {c.name: exact.count(c) for c in track(cases, "counting", console=screen, transient=True)}
    changes = exact.differences(found, before or {})
    _show_counters(found)
    _show_changes(changes)
    verdict = "fail" if changes else "pass"
    console().print(f"{verdict}: {len(changes)} of the counters of {len(found)} cases differ ({key})", markup=False)
    _end(verdict, as_json, key=key, counters=found, changes=[dataclasses.asdict(change) for change in changes])


def _show_counters(found: dict[str, Counters]) -> None:
    from dfastllm.bench.suite.cells import Table, named, number, text
    from dfastllm.bench.suite.terminal import print_tables

    rows = []
    for name, c in found.items():
        nfe, tokens, drafts, accepted = (
            int(c.get(k, 0)) for k in ("nfe", "completion_tokens", "drafts", "accepted_tokens")
        )
        drafted = (drafts, int(c["draft_tokens"]), accepted) if "drafts" in c else (None,) * 3
        cells = (
            *(number(value) for value in (nfe, int(c["steps"]), int(c["rows"]), tokens, tokens / nfe)),
            *(number(value) for value in (*drafted, 1 + accepted / drafts if drafts else None)),
        )
        rows.append((text(name), *cells))
    columns = named("case", "nfe|steps|rows|tokens|per nfe|drafts|drafted|accepted|length")
    print_tables([Table("counters", "Counters", columns, tuple(rows))])


def _show_changes(changes: list[Change]) -> None:
    from dfastllm.bench.suite.cells import Table, named, text
    from dfastllm.bench.suite.terminal import print_tables

    if not changes:
        return
    rows = tuple((text(c.case), text(c.counter), text(str(c.baseline)), text(str(c.current))) for c in changes)
    print_tables([Table("changes", "Changed", named("case|counter|baseline|now"), rows)])
