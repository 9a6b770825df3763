"""Speed gates: is a measurement slower than a baseline of the same hardware, and does a tool call come early enough.

When a call comes early enough. The published rule is 25 tokens at the 95th percentile, counted to the end of the call.
That unit mixes two things: what the model says before it acts, which training can change, and how long the call is
(the tool's name, the user's own words, the tokenizer), which it cannot: a model whose answer is nothing but a call of
30 tokens would fail, against itself too. So where a measurement knows the calls it counts the excess (`timelines`): the
tokens up to the end of the call less those of the same call alone, written as short as its form allows. Where it does
not, the call's own length counts as 0 and the gate is the published one. The limit is 25 in both. Requests that should
not call have no such figure and are left out; calls that never came have an infinite one, which percentiles leave out,
so the share of requests whose call came is held against the baseline's as well.

`evaluate_speed_gates` is the rule on plain numbers. `SpeedReport` is what is kept of a measurement, the same form for a
report and a baseline; `check` compares two of them. Absolute times of one machine only: where the noise is larger than
the margin, compare in pairs (`compare`); where a number must not change at all, count (`counters`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from pydantic import ValidationError as SchemaError

from dfastllm.errors import ValidationError
from dfastllm.metrics.hardware import fingerprints, hardware, hardware_profile_key

__all__ = [
    "SCHEMA_VERSION",
    "TTFA_LIMIT",
    "SpeedReport",
    "check",
    "evaluate_speed_gates",
    "load_report",
    "make_report",
    "read_json",
    "same_machine",
    "save_report",
    "strict_json",
]

SCHEMA_VERSION: Literal[1] = 1
TTFA_LIMIT = 25.0  # tokens beyond what the call needs, p95
TOLERANCE = 1e-9  # exactly the threshold passes, whatever the last bit of the division says
TTFT = ("p50", "p95")
TPS = ("p50", "p95", "p05")  # p05, the slow tail, where the baseline has it
SAME = ("workload", "threads")  # fingerprints without which two speeds say nothing about each other


class SpeedReport(BaseModel):
    """What is kept of a measurement. speed_metrics: see `timelines.aggregate`. n: requests measured. Infinite
    values are written as "Infinity"."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    schema_version: Literal[1] = SCHEMA_VERSION
    speed_metrics: dict[str, Any]
    hardware: dict[str, Any]
    hardware_profile_key: str
    fingerprints: dict[str, Any]
    n: int


def make_report(speed_metrics: Mapping[str, Any], **more: Any) -> SpeedReport:
    """A report of this machine. more: fingerprints, such as model and workload. Raises ValidationError when nothing was
    measured."""
    n = int(speed_metrics.get("n", 0))
    if n < 1:
        raise ValidationError("the speed metrics hold no request: nothing was measured.", param="speed_metrics")
    found = hardware()
    return SpeedReport(
        speed_metrics=dict(speed_metrics),
        hardware=found,
        hardware_profile_key=hardware_profile_key(found),
        fingerprints=fingerprints(**more),
        n=n,
    )


def save_report(report: SpeedReport, path: Path) -> None:
    """Whole or not at all: what is killed while it writes leaves the file of before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def load_report(path: Path) -> SpeedReport:
    """A report or baseline. Raises ValidationError for a file that is missing, cut short, of another version,
    incomplete or without requests."""
    data = read_json(path)
    version = data.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ValidationError(
            f"{path} has schema version {version!r}; this dfastllm reads {SCHEMA_VERSION}.",
            param="baseline",
            hint="Record it anew: dfastllm gate record.",
        )
    try:
        report = SpeedReport.model_validate({**data, "speed_metrics": _numbers(data.get("speed_metrics"))})
    except SchemaError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValidationError(f"{path} is no speed report: {first['msg']} at {where}.", param="baseline") from error
    if report.n < 1:
        raise ValidationError(f"{path} holds no measured request (n = {report.n}).", param="baseline")
    return report


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ValidationError for a file that is missing, cut short or holds something else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValidationError(f"{path} cannot be read: {error}.", param="baseline") from error
    except ValueError as error:
        raise ValidationError(
            f"{path} is no complete JSON ({error}): it was cut short or is another kind of file.", param="baseline"
        ) from error
    if not isinstance(data, dict):
        raise ValidationError(f"{path} holds a {type(data).__name__}, wanted a JSON object.", param="baseline")
    return data


def _numbers(value: Any) -> Any:
    """The infinities of a file as numbers again."""
    if isinstance(value, dict):
        return {name: _numbers(inner) for name, inner in value.items()}
    return float(value) if value in ("Infinity", "-Infinity", "NaN") else value


def strict_json(value: Any) -> Any:
    """A verdict as strict JSON takes it, which has no infinity: as in reports it is "Infinity"."""
    if isinstance(value, dict):
        return {name: strict_json(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [strict_json(inner) for inner in value]
    return ("Infinity" if value > 0 else "-Infinity") if isinstance(value, float) and math.isinf(value) else value


def same_machine(current: SpeedReport, baseline: SpeedReport) -> None:
    """Raises ValidationError when the two were measured on different hardware."""
    if current.hardware_profile_key != baseline.hardware_profile_key:
        raise ValidationError(
            f"the baseline was measured on {baseline.hardware_profile_key}, the current report on"
            f" {current.hardware_profile_key}.",
            param="baseline",
            hint="A speed is comparable on the same hardware only: record a baseline there.",
        )


def check(
    current: SpeedReport,
    baseline: SpeedReport | None,
    *,
    regression_threshold: float = 0.05,
    ttfa_limit: float = TTFA_LIMIT,
    other_model: bool = False,
) -> dict[str, Any]:
    """`evaluate_speed_gates` of two reports; another hardware profile skips the gates. other_model: the two may be of
    different models, as a student and what it replaces are. Raises ValidationError when they measured different things
    (fingerprints workload and threads, where both have them)."""
    if baseline is None:
        return evaluate_speed_gates(current.speed_metrics, None, True, regression_threshold, ttfa_limit)
    match = current.hardware_profile_key == baseline.hardware_profile_key
    for name in SAME if match else ():
        mine, theirs = (_asked(report.fingerprints.get(name), other_model) for report in (current, baseline))
        if mine is not None and theirs is not None and mine != theirs:
            raise ValidationError(
                f"current and baseline are not comparable: {name} is {mine!r}, in the baseline {theirs!r}.",
                param="baseline",
                hint="Record both with the same workload and threads; --other-model for a student and its baseline.",
            )
    before = baseline.speed_metrics
    return evaluate_speed_gates(current.speed_metrics, before, match, regression_threshold, ttfa_limit)


def _asked(fingerprint: Any, other_model: bool) -> Any:
    """A fingerprint, without the model that was asked where that may be another."""
    if other_model and isinstance(fingerprint, Mapping):
        return {name: value for name, value in fingerprint.items() if name != "model"}
    return fingerprint


def evaluate_speed_gates(
    current: Mapping[str, Any],
    baseline: Mapping[str, Any] | None = None,
    hardware_match: bool = True,
    regression_threshold: float = 0.05,
    ttfa_limit: float = TTFA_LIMIT,
) -> dict[str, Any]:
    """Compare the aggregates of two measurements (`timelines.aggregate`).

    TTFT p50 and p95 may grow by `regression_threshold` of the baseline's, TPS p50, p95 and p05 (where the baseline has
    it) may fall by it. The p95 of ttfa_excess_tokens, or of ttfa_tokens in a measurement without those, may be at most
    `ttfa_limit`, and ttfa_hit_rate may fall by the threshold, where both have it. A value that the current measurement
    lacks fails its gate. Without a baseline, or with one of other hardware, all gates are skipped and pass.

    Returns {gates_passed, skipped, reason, ttft_regression, tps_regression, ttfa_gate, errors}: a regression holds per
    percentile {passed, regression, current, baseline} or {passed, skipped, reason}; the TTFA gate {passed, counted (the
    metric), p95, ttfa_tokens_p95, threshold, hit_rate, hit_rate_baseline}; `errors` says in words what failed.
    Raises ValidationError for a threshold or limit that is negative or no number."""
    if not ttfa_limit >= 0:
        raise ValidationError(f"ttfa_limit must be a number >= 0, got {ttfa_limit}.", param="ttfa_limit")
    if not regression_threshold >= 0 or math.isinf(regression_threshold):
        raise ValidationError(
            f"regression_threshold must be a number >= 0, got {regression_threshold}.", param="regression_threshold"
        )
    reason = "hardware_mismatch" if not hardware_match else "no_baseline" if baseline is None else None
    if baseline is None or reason is not None:
        skipped = {"skipped": True, "reason": reason}
        gates = {name: dict(skipped) for name in ("ttft_regression", "tps_regression", "ttfa_gate")}
        return {"gates_passed": True, **skipped, **gates, "errors": []}
    errors: list[str] = []
    if current.get("n") == 0:
        errors.append("nothing was measured: n is 0")
    gates = {
        "ttft_regression": _regressions("ttft_ms", TTFT, current, baseline, regression_threshold, errors),
        "tps_regression": _regressions("tps", TPS, current, baseline, regression_threshold, errors),
        "ttfa_gate": _ttfa_gate(current, baseline, ttfa_limit, regression_threshold, errors),
    }
    return {"gates_passed": not errors, "skipped": False, "reason": None, **gates, "errors": errors}


def _value(metrics: Mapping[str, Any], name: str, percentile: str) -> float | None:
    """None for what is missing or no number."""
    group = metrics.get(name)
    return _number(group.get(percentile)) if isinstance(group, Mapping) else None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        return None
    return float(value)


def _regressions(
    name: str,
    wanted: tuple[str, ...],
    current: Mapping[str, Any],
    baseline: Mapping[str, Any],
    threshold: float,
    errors: list[str],
) -> dict[str, Any]:
    label, unit, sign = {"ttft_ms": ("TTFT", "ms", 1.0), "tps": ("TPS", "tok/s", -1.0)}[name]
    found: dict[str, Any] = {}
    for percentile in wanted:
        now, before = _value(current, name, percentile), _value(baseline, name, percentile)
        if percentile == "p05" and before is None:
            continue
        if now is None:
            found[percentile] = {"passed": False, "regression": None, "current": None, "baseline": before}
            errors.append(f"{label} {percentile} is missing from the current measurement")
        elif before is None or before <= 0 or math.isinf(before):
            # Nothing to hold it against: no value, or a speed of answers that came in one piece.
            reason = "no_baseline_value"
            found[percentile] = {"passed": True, "skipped": True, "reason": reason, "current": now, "baseline": before}
        else:
            # A speed that is infinite now and was not before was not measured: one-piece answers have none.
            change = math.inf if math.isinf(now) else sign * (now - before) / before
            passed = change <= threshold + TOLERANCE
            found[percentile] = {"passed": passed, "regression": change, "current": now, "baseline": before}
            if not passed:
                errors.append(
                    f"{label} {percentile} regression: {change:.1%} (current {now:.4g} {unit}, baseline {before:.4g}"
                    f" {unit}, at most {threshold:.1%})"
                )
    return found


def _ttfa_gate(
    current: Mapping[str, Any], baseline: Mapping[str, Any], limit: float, threshold: float, errors: list[str]
) -> dict[str, Any]:
    if "ttfa_hit_rate" in current and current["ttfa_hit_rate"] is None and current.get("n"):
        return {"passed": True, "skipped": True, "reason": "no_tool_requests", "threshold": limit}
    counted = "ttfa_excess_tokens" if "ttfa_excess_tokens" in current else "ttfa_tokens"
    tokens = _value(current, counted, "p95")
    passed = tokens is not None and tokens <= limit + TOLERANCE
    if not passed:
        what = "p95 tokens" if counted == "ttfa_tokens" else "p95 tokens beyond what the call needs"
        got = "is missing from the current measurement" if tokens is None else f"is {tokens:.4g}, at most {limit:g}"
        errors.append(f"TTFA gate failed: {what} {got}")
    came, before = _number(current.get("ttfa_hit_rate")), _number(baseline.get("ttfa_hit_rate"))
    if came is not None and before and (before - came) / before > threshold + TOLERANCE:
        passed = False
        errors.append(f"TTFA gate failed: the call came in {came:.1%} of the requests, in the baseline {before:.1%}")
    return {
        "passed": passed,
        "counted": counted,
        "p95": tokens,
        "ttfa_tokens_p95": _value(current, "ttfa_tokens", "p95"),
        "threshold": limit,
        "hit_rate": came,
        "hit_rate_baseline": before,
    }
