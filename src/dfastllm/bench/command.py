"""`dfastllm bench`: the benchmark suite against any OpenAI-compatible server."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from dfastllm.errors import ValidationError

if TYPE_CHECKING:
    from dfastllm.bench.suite.run import Plan
    from dfastllm.bench.suite.schema import Results
    from dfastllm.bench.suite.workloads import PromptSource

__all__ = ["bench"]

COMPLETE, FAILED, PARTIAL, INTERRUPTED = 0, 1, 3, 130
SIGNALS = {"SIGHUP": 1, "SIGTERM": 15}
# what a run of under a minute does on the demo models
QUICK = {"requests": 1, "rounds": 6, "load": "1,4", "rate": "4", "load_requests": 8, "load_seconds": 2.0}
FULL = {"requests": 5, "rounds": 6, "load": "1,2,4,8,16", "rate": "2,8", "load_requests": 32, "load_seconds": 10.0}
QUICK_AXES = {"method": "ngram,suffix", "k": "3,5", "cache": "none,dual", "threshold": "0.9"}
QUICK_TYPES = "code,extraction,arithmetic,tools"
# drafters of the demo models, for a server that is started here
DEMO = "demo-ar"
DEMO_DRAFTERS = [
    {"method": "ngram", "num_speculative_tokens": 5},
    {"method": "suffix", "num_speculative_tokens": 5},
    {"method": "draft_model", "model": "demo-draft", "num_speculative_tokens": 5},
    {"method": "diffusion", "model": "demo-diffusion", "num_speculative_tokens": 5},
]

T = TypeVar("T")


def bench(
    url: Annotated[
        str | None, typer.Argument(help="The server's root. Default: the first that runs on a usual port, else ours.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Model to ask for. Default: the first the server lists; ours: demo-ar.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory of the results.")] = Path("bench-results"),
    output: Annotated[
        Path | None, typer.Option(help="A file that gets test_results.json too.", show_default=False)
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer of all: under a minute on a demo model.")] = False,
    parts: Annotated[str, typer.Option(help="Of status, sweep, systems, load.")] = "status,sweep,systems,load",
    types: Annotated[str, typer.Option(help="Prompt types; all: every one. \\[default: all; --quick: four]")] = "",
    prompts: Annotated[Path | None, typer.Option(help="JSON Lines of own prompts, in place of the built-in.")] = None,
    system: Annotated[str, typer.Option(help="System prompts to compare.")] = "direct,empty,expert,concise",
    requests: Annotated[int | None, typer.Option(help="Prompts of each type in a round.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Interleaved rounds; verdicts need 6.")] = None,
    concurrency: Annotated[int, typer.Option(help="Requests in flight in sweep and systems.")] = 1,
    max_tokens: Annotated[int, typer.Option(help="New tokens at most; a diffusion model's canvas.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 compares answers token for token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of questions, arrivals and draws.")] = 0,
    margin: Annotated[float, typer.Option(help="Speed differences within it are the same.")] = 0.05,
    k: Annotated[str, typer.Option("--k", help="Draft tokens to try. \\[default: 3,5,7]")] = "",
    method: Annotated[str, typer.Option(help="Speculation methods. \\[default: all the server does]")] = "",
    adaptive: Annotated[
        bool | None, typer.Option(help="dfastllm: let draft lengths follow acceptance, or hold them at k.")
    ] = None,
    cache: Annotated[str, typer.Option(help="Diffusion caches. \\[default: none,prefix,dual]")] = "",
    threshold: Annotated[str, typer.Option(help="Diffusion thresholds. \\[default: 0.7,0.8,0.9,0.95]")] = "",
    factor: Annotated[str, typer.Option(help="Diffusion factors.")] = "",
    steps: Annotated[str, typer.Option(help="Diffusion steps.")] = "",
    rule: Annotated[str, typer.Option(help="Diffusion unmasking rules. \\[default: free_dave]")] = "",
    config: Annotated[list[str] | None, typer.Option(help="NAME=JSON of request fields; repeatable.")] = None,
    load: Annotated[str | None, typer.Option(help="Requests in flight to try. \\[default: 1,2,4,8,16]")] = None,
    rate: Annotated[str | None, typer.Option(help="Requests per second to try. \\[default: 2,8]")] = None,
    arrivals: Annotated[str, typer.Option(help="poisson or fixed.")] = "poisson",
    ramp: Annotated[list[str] | None, typer.Option(help="FROM:TO:STEPS in flight, or with /s per second.")] = None,
    load_requests: Annotated[int | None, typer.Option(help="Requests of a load point, at least.")] = None,
    load_seconds: Annotated[float | None, typer.Option(help="Seconds of arrivals, and of a ramp's step.")] = None,
    slo: Annotated[list[str] | None, typer.Option(help="ttft=MS, tpot=MS or e2el=MS, for goodput; repeatable.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds a request may take.")] = 120.0,
    api_key: Annotated[str | None, typer.Option(help="\\[default: $OPENAI_API_KEY]", show_default=False)] = None,
    serve: Annotated[str, typer.Option(help="Arguments of `dfastllm serve` where a server is started here.")] = "",
    history: Annotated[Path | None, typer.Option(help="Directory of earlier results. \\[default: OUT/history]")] = None,
) -> None:
    """Measure a server: configurations, prompt types, system prompts, load; accuracy beside every speed.

    Writes test_results.json, requests.jsonl (once it asks) and report.html to OUT. The last line on stdout is JSON.
    Exit code: 0 done; 1 nothing was measured; 2 wrong arguments; 3 partial results were kept; 130 interrupted, 143
    ended by SIGTERM (129: SIGHUP), partial results kept.
    """
    given = dict(locals())
    given.pop("api_key")  # never written to a file
    preset = QUICK if quick else FULL

    def or_preset(name: str) -> Any:
        return given[name] if given[name] is not None else preset[name]

    counts = {name: _at_least(or_preset(name), 1, name) for name in ("requests", "rounds", "load_requests")}
    for name, value in (("concurrency", concurrency), ("max_tokens", max_tokens)):
        _at_least(value, 1, name)
    for name, number in (("timeout", timeout), ("margin", margin)):
        if not 0 < number < float("inf"):
            raise ValidationError(f"{name} must be a number above 0, got {number:g}.", param=name)
    if output is not None and output.is_dir():
        raise ValidationError(
            f"output must be a file, got the directory {output}.", param="output", hint="--out names a directory."
        )
    if not 0 <= temperature <= 2:
        raise ValidationError(f"temperature must be in [0, 2], got {temperature:g}.", param="temperature")

    from dfastllm.bench.suite.load import parse_ramp, parse_slo, points
    from dfastllm.bench.suite.probe import normalise
    from dfastllm.bench.suite.run import PARTS, Plan
    from dfastllm.bench.suite.sweep import Settings
    from dfastllm.bench.suite.workloads import SYSTEM_PROMPTS

    seconds = float(or_preset("load_seconds"))
    plan = Plan(
        sources=_sources(types, prompts, seed, quick),
        url=normalise(url) if url is not None else None,
        model=model,
        api_key=api_key or os.environ.get("OPENAI_API_KEY"),
        timeout=timeout,
        parts=_chosen(parts, PARTS, "parts"),
        axes=_axes(given, quick),
        customs=_customs(config),
        settings=Settings(counts["requests"], counts["rounds"], concurrency, max_tokens, temperature, seed, margin),
        systems={name: SYSTEM_PROMPTS[name] for name in _chosen(system, SYSTEM_PROMPTS, "system")},
        points=tuple(
            points(
                _numbers(or_preset("load"), int, "load"),
                _numbers(or_preset("rate"), float, "rate"),
                arrivals,
                [parse_ramp(text, seconds) for text in ramp or ()],
                counts["load_requests"],
                seconds,
            )
        ),
        slo=parse_slo(slo or ()),
        serve=_serve_arguments(serve, model),
        quick=quick,
        output=output,
        arguments={name: str(v) if isinstance(v, Path) else v for name, v in given.items() if v not in (None, "")},
    )
    results = _measure(plan, out)
    _report(results, out, history or out / "history", output)


def _measure(plan: Plan, out: Path) -> Results:
    """The run, which a signal that would end this process ends in good order."""
    import asyncio
    import contextlib
    import signal

    from dfastllm.bench.suite.bars import Bars
    from dfastllm.bench.suite.run import Suite

    async def measure(suite: Suite) -> Results:
        for name in SIGNALS:
            with contextlib.suppress(ValueError, NotImplementedError, RuntimeError):  # not on the main thread
                asyncio.get_running_loop().add_signal_handler(signal.Signals[name], suite.end, f"ended by {name}")
        return await suite.run()

    with Bars() as bars:
        return asyncio.run(measure(Suite(plan, out, bars)))


def _report(results: Results, out: Path, history: Path, output: Path | None) -> None:
    """Tables, the page, the history, the last line, the exit code."""
    from dfastllm.bench.suite.history import comparison_table, earlier, entries, remember
    from dfastllm.bench.suite.html import write_html
    from dfastllm.bench.suite.tables import tables
    from dfastllm.bench.suite.terminal import print_tables

    extra = []
    if results.configurations:
        kept, complaints = entries(history)
        before = earlier(results, kept)
        extra = [comparison_table(results, before.results)] if before is not None else []
        for complaint in complaints:
            typer.echo(f"warning: {complaint}", err=True)
        if not results.partial:
            remember(results, history)
    print_tables([*tables(results), *extra])
    write_html(results, out / "report.html", extra=extra)
    if results.partial:
        typer.echo(f"partial results: {results.partial_reason}", err=True)
    asked = [out / "requests.jsonl"] if results.target is not None else []  # a look at servers alone asks nothing
    written = [out / "test_results.json", *asked, out / "report.html", *([output] if output is not None else [])]
    typer.echo(", ".join(map(str, written)), err=True)
    typer.echo(json.dumps(_last_line(results, out), ensure_ascii=False))
    if results.partial:
        raise typer.Exit(_code(results.partial_reason or ""))
    failed = [c for c in results.configurations if c.status == "measured"] == [] and "sweep" in results.run.parts
    raise typer.Exit(FAILED if failed else COMPLETE)


def _code(reason: str) -> int:
    """The exit code of a partial run: a signal's as shells tell it, 128 and its number."""
    codes = {"interrupted": INTERRUPTED, **{f"ended by {name}": 128 + number for name, number in SIGNALS.items()}}
    return codes.get(reason, PARTIAL)


def _last_line(results: Results, out: Path) -> dict[str, Any]:
    advice = next((r for r in results.recommendations if r.kind == "configuration"), None)
    base = results.baseline
    best = next((c for c in results.configurations if advice is not None and c.name == advice.configuration), base)
    figures = best.figures if best is not None else None
    measured = [c.figures for c in results.configurations if c.figures is not None]
    return {
        "status": "partial" if results.partial else "complete",
        "reason": results.partial_reason,
        "results": str(out / "test_results.json"),
        "url": results.target.url if results.target else None,
        "model": results.target.model if results.target else None,
        "best_configuration": best.name if best is not None else None,
        "speedup": figures.versus_baseline.ratio if figures and figures.versus_baseline else None,
        "verdict": figures.versus_baseline.verdict if figures and figures.versus_baseline else None,
        "output_throughput": figures.speed.output_throughput if figures else None,
        "accuracy": figures.accuracy.value if figures and figures.accuracy else None,
        "errors": sum(f.speed.errors for f in measured) + sum(p.figures.speed.errors for p in results.load),
        "servers_running": [s.url for s in results.servers if s.status == "running"],
    }


def _at_least(value: Any, least: int, name: str) -> int:
    if value < least:
        raise ValidationError(f"{name} must be at least {least}, got {value}.", param=name)
    return int(value)


def _chosen(text: str, known: Iterable[str], name: str) -> tuple[str, ...]:
    """A comma list of known words, each once."""
    words = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    names = list(known)
    if bad := [word for word in words if word not in names]:
        raise ValidationError(f"{name}: there is no {bad[0]!r}; there are {', '.join(names)}.", param=name)
    if not words:
        raise ValidationError(f"{name}: name at least one of {', '.join(names)}.", param=name)
    return tuple(words)


def _numbers(text: str, kind: Callable[[str], T], name: str) -> list[T]:
    try:
        return [kind(word) for word in text.split(",") if word.strip()]
    except ValueError:
        raise ValidationError(f"{name} is a list of numbers with commas between, got {text!r}.", param=name) from None


def _sources(types: str, prompts: Path | None, seed: int, quick: bool) -> dict[str, PromptSource]:
    from dfastllm.bench.suite.workloads import load_prompts, prompt_types

    built = load_prompts(prompts) if prompts is not None else prompt_types(seed)
    wanted = types or ("all" if prompts is not None or not quick else QUICK_TYPES)
    return dict(built) if wanted == "all" else {name: built[name] for name in _chosen(wanted, built, "types")}


def _axes(given: dict[str, Any], quick: bool) -> Any:
    from dfastllm.bench.suite.configurations import Axes

    def text(name: str) -> str:
        return given[name] or (QUICK_AXES.get(name, "") if quick else "")

    lists: dict[str, Any] = {
        "ks": _numbers(text("k"), int, "k"),
        "methods": [word.strip() for word in text("method").split(",") if word.strip()],
        "caches": [word.strip() for word in text("cache").split(",") if word.strip()],
        "thresholds": _numbers(text("threshold"), float, "threshold"),
        "factors": _numbers(text("factor"), float, "factor"),
        "steps": _numbers(text("steps"), int, "steps"),
        "rules": [word.strip() for word in text("rule").split(",") if word.strip()],
    }
    return Axes(**{name: tuple(values) for name, values in lists.items() if values}, adaptive=given["adaptive"])


def _customs(texts: list[str] | None) -> tuple[Any, ...]:
    from dfastllm.bench.suite.configurations import parse_custom

    return tuple(parse_custom(text) for text in texts or ())


def _serve_arguments(text: str, model: str | None) -> tuple[str, ...]:
    """Of the server that is started: what --serve says; the drafters of demo-ar where nothing else is said."""
    import shlex

    arguments = shlex.split(text)
    if not any(word == "--model" or word.startswith("--model=") for word in arguments):
        arguments = ["--model", model or DEMO, *arguments]
    if not text and (model or DEMO) == DEMO:
        arguments += ["--speculative-config", json.dumps(DEMO_DRAFTERS)]
    return tuple(arguments)
