"""After the last step: the student as directories that are served, its accuracy and speed against what it began as,
pictures, and a summary that is read at a glance.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dfastllm import models
from dfastllm.convert.source import files_for_other_weights
from dfastllm.distill.compare import Comparison, compare_students
from dfastllm.distill.evaluate import evaluate_student, read_samples
from dfastllm.distill.plots import plot_run
from dfastllm.distill.prepare import Say, test_file
from dfastllm.distill.probe import end_gates
from dfastllm.distill.qat.run import QatRun
from dfastllm.distill.sections import Config
from dfastllm.errors import UnsupportedError
from dfastllm.llm import LLM
from dfastllm.metrics.evaluation import Evaluation
from dfastllm.metrics.gates import SpeedReport, strict_json
from dfastllm.metrics.model_speed import speed_reports
from dfastllm.models.checkpoint import fill, named_dtype, skeleton
from dfastllm.models.decoder import Decoder
from dfastllm.train.log import FILE, read_log

__all__ = ["Report", "finish", "save_student", "show"]

WIDTH = 80
SPEED_TIMES = 5  # requests of the last measurement, as a multiple of a validation's
ROUNDS = 5  # how often each of them is sent


@dataclass
class Report:
    """What a run came to.

    student     directory of the trained student, in float.
    quantised   directory of it as it was trained to be rounded; None without quantisation-aware training, or where that
                was given up.
    served      the one of the two that was measured.
    steps       optimizer steps.
    qat         off, or the status of the recovery.
    comparison  accuracy and lengths against the student before training; None: not measured.
    gates       verdict of the speed gates; None: not measured.
    losses      first and last lines' losses of the log.
    plots       pictures.
    """

    home: Path
    student: Path
    quantised: Path | None
    steps: int
    qat: str
    comparison: Comparison | None = None
    gates: Mapping[str, Any] | None = None
    losses: Mapping[str, float] = field(default_factory=dict)
    plots: list[Path] = field(default_factory=list)

    @property
    def served(self) -> Path:
        return self.student if self.quantised is None else self.quantised

    def record(self) -> dict[str, Any]:
        """All but the rows of the comparison, as JSON."""
        found = {
            "student": str(self.student),
            "quantised": None if self.quantised is None else str(self.quantised),
            "steps": self.steps,
            "qat": self.qat,
            "losses": dict(self.losses),
            "gates": self.gates,
            "plots": [str(path) for path in self.plots],
        }
        if self.comparison is not None:
            kept = self.comparison.record()
            found["comparison"] = {name: kept[name] for name in ("equality", "ratios", "drift_by_shape")}
        return strict_json(found)  # type: ignore[no-any-return]


def save_student(model: Decoder, start: Path, out: Path, dtype: str) -> Path:
    """The trained weights as a Hugging Face directory with the tokenizer files of `start`."""
    weights = ((name, parameter.detach()) for name, parameter in model.named_parameters())
    copy = fill(skeleton(model.config, model.info, named_dtype(dtype)), weights)
    models.save(copy, out, files=files_for_other_weights(start))
    return out


def finish(config: Config, home: Path, student: Decoder, start: Path, qat: QatRun, steps: int, say: Say) -> Report:
    """Export, measure, draw. `start`: the student before training, which it is held against."""
    out = home / (config.model.name or "student")
    saved = save_student(student, start, out, config.model.dtype)
    quantised = None
    if qat.qat is not None and qat.status == "active":
        quantised = qat.qat.export(home / f"{out.name}-{config.quant.format}", files_for_other_weights(start))
    report = Report(home, saved, quantised, steps, qat.status, losses=_losses(home))
    _measure(config, report, start, say)
    try:
        report.plots = plot_run(home)
    except UnsupportedError as error:  # without matplotlib
        say(f"no pictures: {error}")
    (home / "report.json").write_text(json.dumps(report.record(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return report


def _losses(home: Path) -> dict[str, float]:
    lines = [line for line in read_log(home / FILE) if "loss" in line]
    validated = [line["validation_loss"] for line in lines if "validation_loss" in line]
    found = {"first": lines[0]["loss"], "last": lines[-1]["loss"]} if lines else {}
    return found | ({"validation": validated[-1]} if validated else {})


def _measure(config: Config, report: Report, start: Path, say: Say) -> None:
    """Accuracy and speed of the student and of what it began as, through the engine; the speed in turns, and of both in
    the format that the student is served in: the gates hold what training changed, and what a format costs is a
    question of its own (`dfastllm bench`)."""
    samples = test_file(config, report.home) if config.eval.samples else None
    asked = None if samples is None else read_samples(samples, config.eval.samples)
    requests = config.speed.measure * SPEED_TIMES
    most = config.eval.max_tokens
    evaluations: list[Evaluation] = []
    speeds: tuple[SpeedReport, SpeedReport] | None = None
    if asked is None and not requests:
        return
    say(f"measuring {start} and {report.served}")
    with LLM(report.served) as served:
        if asked is not None:
            with LLM(start) as before:
                evaluations = [
                    evaluate_student(llm, asked.samples, max_tokens=most, ids=asked.ids) for llm in (before, served)
                ]
        if requests:
            with LLM(start, quantization=None if report.quantised is None else config.quant.format) as before:
                speeds = speed_reports(before, served, requests, max_tokens=most, rounds=ROUNDS)
    if asked is not None:
        section = config.eval
        report.comparison = compare_students(
            *evaluations, margin=section.margin, alpha=section.alpha, shapes=config.train.seq_lengths
        )
        kept = json.dumps(strict_json(report.comparison.record()), allow_nan=False)
        (report.home / "comparison.json").write_text(kept + "\n", encoding="utf-8")
    if speeds is not None:
        given = config.speed.baseline
        baseline: SpeedReport | Path = speeds[0] if given is None else Path(given)
        report.gates = end_gates(
            report.home,
            speeds[1],
            baseline,
            regression_threshold=config.speed.regression_threshold,
            ttfa_limit=config.speed.ttfa_limit,
        )


def show(report: Report, console: Console | None = None) -> None:
    """The report as a table of at most 80 columns."""
    console = console or Console(width=WIDTH, highlight=False)
    table = Table("", "before", "after", width=min(WIDTH, console.width))
    losses = report.losses
    if losses:
        table.add_row("training loss", f"{losses['first']:.4f}", f"{losses['last']:.4f}")
    if report.comparison is not None:
        for name, before, after in _accuracy_rows(report.comparison):
            table.add_row(name, before, after)
    console.print(table)
    if report.comparison is not None:
        equality = report.comparison.equality
        word = "equal accuracy" if equality.equal else f"equal accuracy is not shown: {equality.reason}"
        console.print(f"{word} (difference {100 * equality.difference:+.2f} points, bound {100 * equality.lower:+.2f})")
    if report.gates is not None:
        gates = report.gates
        word = f"skipped, {gates['reason']}" if gates["skipped"] else "passed" if gates["gates_passed"] else "FAILED"
        console.print(f"speed gates: {word}")
        for error in gates["errors"]:
            console.print(f"  {error}", markup=False)
    if report.qat != "off":
        console.print(f"quantisation-aware training: {report.qat}")
    for path in (report.student, report.quantised, *report.plots):
        if path is not None:
            console.print(str(path), markup=False, soft_wrap=True)


def _accuracy_rows(comparison: Comparison) -> list[tuple[str, str, str]]:
    before, after = comparison.baseline.summary(), comparison.student.summary()
    percent = {
        "exact_match": "right answers",
        "tool_name_accuracy": "right tool",
        "argument_exact_match": "right arguments",
        "json_validity": "valid calls",
        "false_call_rate": "false calls",
        "completeness": "complete calls",
    }
    rows = [
        (label, f"{before[name]:.1%}", f"{after[name]:.1%}")
        for name, label in percent.items()
        if before.get(name) is not None and after.get(name) is not None
    ]
    counts = {"median_tokens": "tokens of an answer, median", "ttfa_tokens": "tokens until the call, median"}
    rows += [
        (label, f"{before[name]:g}", f"{after[name]:g}")
        for name, label in counts.items()
        if before.get(name) is not None and after.get(name) is not None
    ]
    return rows
