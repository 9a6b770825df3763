"""Speed reports of what `dfastllm gate record` and `dfastllm bench` wrote, in the form that the gates take."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dfastllm.bench.suite.schema import SCHEMA as SUITE
from dfastllm.bench.suite.schema import ConfigurationResult, Results, Speed, load_results
from dfastllm.errors import ValidationError
from dfastllm.metrics.gates import SpeedReport, load_report, read_json
from dfastllm.metrics.speed import Arrival
from dfastllm.metrics.timelines import ToolTimeline, aggregate
from dfastllm.metrics.tool_schemas import CallFinder

__all__ = ["load_current", "suite_report"]


def load_current(path: Path, configuration: str | None = None) -> SpeedReport:
    """A report of `dfastllm gate record`, or one made from the suite's test_results.json. Raises ValidationError for
    anything else, and for a configuration named of a file that has none."""
    if read_json(path).get("schema") == SUITE:
        return suite_report(path, configuration)
    if configuration is not None:
        raise ValidationError(f"{path} holds one measurement, no configurations.", param="configuration")
    return load_report(path)


def suite_report(path: Path, configuration: str | None = None) -> SpeedReport:
    """A configuration (default: the baseline) of test_results.json as a speed report.

    Percentiles are those of the single requests where requests.jsonl lies beside it. Without it they are the file's
    own: TPS then comes from the opposite percentiles of TPOT, and the index of a tool call's token is not known. A
    server on another machine has hardware that nobody knows: its key is that of its address."""
    results = load_results(path)
    chosen = _configuration(results, path, configuration)
    assert chosen.figures is not None  # `_configuration` sees to it
    raw = path.with_name("requests.jsonl")
    metrics = _of_requests(raw, chosen.name) if raw.exists() else _of_figures(chosen.figures.speed)
    if metrics["n"] < 1:
        raise ValidationError(f"{path}: no request of {chosen.name!r} ended well.", param="current")
    environment, target = results.environment, results.target
    key = environment.profile_key
    if environment.server_is_local is False:
        key = f"unknown-server-{target.url if target else ''}"
    run = results.run
    workload = {
        "suite": 1,
        "model": target.model if target else None,
        "configuration": chosen.name,
        "options": chosen.options,
        "prompt_types": list(run.prompt_types),
        "requests": run.requests,
        "concurrency": run.concurrency,
        "max_tokens": run.max_tokens,
        "temperature": run.temperature,
        "seed": run.seed,
    }
    prints = {**environment.versions, "commit": environment.commit, "workload": workload}
    return SpeedReport(
        speed_metrics=metrics,
        hardware=environment.hardware,
        hardware_profile_key=key,
        fingerprints=prints,
        n=metrics["n"],
    )


def _configuration(results: Results, path: Path, name: str | None) -> ConfigurationResult:
    measured = [c for c in results.configurations if c.figures is not None]
    if name is None:
        chosen = results.baseline or next(iter(measured), None)
    else:
        chosen = next((c for c in measured if c.name == name), None)
    if chosen is None:
        known = ", ".join(c.name for c in measured) or "none"
        wanted = "no configuration was measured" if name is None else f"no measured configuration {name!r}"
        raise ValidationError(f"{path}: {wanted}; there are: {known}.", param="configuration")
    return chosen


def _of_requests(path: Path, name: str) -> dict[str, Any]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValidationError(
                f"{path}, line {number}, is no JSON: the file was cut short.", param="current"
            ) from error
        try:
            if row["part"] == "sweep" and row["name"] == name and row["error"] is None:
                rows.append(_of_request(row))
        except (KeyError, TypeError) as error:
            raise ValidationError(
                f"{path}, line {number}: {error} is missing; another version of the suite wrote it.",
                param="current",
                hint="Run the suite again, or move the file away to use the percentiles of test_results.json.",
            ) from error
    return aggregate(rows)


def _of_request(row: Mapping[str, Any]) -> dict[str, float | None]:
    bare = not any(characters for _, characters, _ in row["chunks"])  # nothing but calls: chunks stand for characters
    arrivals = [Arrival(at, tokens, "x" * (bare or characters)) for at, characters, tokens in row["chunks"]]
    timeline = ToolTimeline(arrivals, row["e2el"], tokens=row["output_tokens"])
    found = timeline.metrics()
    if row["wants_call"]:
        at = row["ttfa"]
        found |= {"ttfa_tokens": math.inf, "ttfa_excess_tokens": math.inf, "ttfa_ms": math.inf}
        if at is not None:
            tokens = timeline.tokens_by(round(at, 6))  # as the chunks' times are kept
            excess = tokens * _unneeded(row["text"])
            found |= {"ttfa_tokens": tokens, "ttfa_excess_tokens": excess, "ttfa_ms": 1e3 * at}
    return found


def _unneeded(text: str) -> float:
    """Of the characters up to the end of the first call, the share that the call alone does not need: what stands for
    the tokens, whose texts a client is not told. 1 for a text without a call."""
    finder = CallFinder()
    for read, character in enumerate(text, start=1):
        if finder.push(character) is not None:
            return 1 - min(map(len, finder.writings())) / read
    return 1.0


def _of_figures(speed: Speed) -> dict[str, Any]:
    """The tails turn round: the slowest 5 % of TPOT are the lowest 5 % of TPS."""
    metrics: dict[str, Any] = {"n": speed.requests, "ttfa_hit_rate": None}
    if speed.ttft is not None:
        metrics["ttft_ms"] = {"p50": speed.ttft.p50, "p90": speed.ttft.p90, "p95": speed.ttft.p95}
    quantiles = speed.cdf.get("tpot")
    if quantiles:  # at 0, 5, ..., 100 %
        picked = {"p50": 10, "p90": 2, "p95": 1, "p05": 19}
        metrics["tps"] = {name: 1e3 / quantiles[i] if quantiles[i] > 0 else math.inf for name, i in picked.items()}
    if speed.ttfa is not None:
        metrics |= {"ttfa_ms": {"p50": speed.ttfa.p50, "p95": speed.ttfa.p95}}
        del metrics["ttfa_hit_rate"]
    return metrics
