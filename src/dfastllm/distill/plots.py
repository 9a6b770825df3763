"""Pictures of a run, made from the files in its directory: log.jsonl and, where it is there, comparison.json.

`python -m dfastllm.distill.plots RUN`

- training.png: the loss and its parts, the validation loss, the learning rate; where quantisation was switched on.
- validation.png: accuracy, tokens of an answer, tokens until a tool call, time to the first token, as validations
  measured them.
- comparison.png: the student against the model it began as: shares of right answers and calls, tokens, forwards.

A picture that nothing was logged for is not made. Needs matplotlib (extra `train`).
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfastllm.errors import DataError, UnsupportedError
from dfastllm.train.log import FILE, read_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["comparison_figure", "plot_run", "training_figure", "validation_figure"]

Lines = Sequence[Mapping[str, Any]]
Series = tuple[list[int], list[float]]
COMPARISON = "comparison.json"
SWITCHES = {"qat.on": "QAT on", "qat.off": "QAT off", "qat.failed": "QAT failed", "went_back": "went back"}
PANELS: Sequence[tuple[str, str, Mapping[str, str]]] = (
    (
        "Accuracy on held-out samples",
        "share",
        {
            "task.exact_match": "right answers",
            "task.tool_name_accuracy": "right tool",
            "task.argument_exact_match": "right arguments",
            "task.false_call_rate": "false calls",
        },
    ),
    (
        "Length of an answer",
        "tokens, median",
        {"task.median_tokens": "student", "task.teacher_median_tokens": "teacher"},
    ),
    (
        "Until the tool call is complete",
        "tokens, median",
        {"task.ttfa_tokens": "TTFA", "task.ttfa_excess_tokens": "of those, excess"},
    ),
    ("Time to first token", "ms", {"speed.ttft_ms.p50": "p50", "speed.ttft_ms.p95": "p95"}),
)


def plot_run(home: Path, out: Path | None = None) -> list[Path]:
    """The pictures of the run in `home`, written to `out` (None: `home`); their paths. Raises DataError for a directory
    without a readable log, UnsupportedError without matplotlib."""
    lines = read_log(home / FILE)
    if not lines:
        raise DataError(f"{home} holds no {FILE} with a line in it.", param="home", hint="Name a run's directory.")
    out = home if out is None else out
    out.mkdir(parents=True, exist_ok=True)
    comparison = home / COMPARISON
    figures = {
        "training.png": training_figure(lines),
        "validation.png": validation_figure(lines),
        "comparison.png": comparison_figure(_read(comparison)) if comparison.is_file() else None,
    }
    made = []
    for name, figure in figures.items():
        if figure is not None:
            figure.savefig(out / name, dpi=120)
            made.append(out / name)
    return made


def training_figure(lines: Lines) -> Figure:
    """Loss and its parts on a logarithmic axis, and below it the learning rate, by optimizer step."""
    figure, (upper, lower) = _figure(2, 1, (9.0, 7.0), heights=(3, 1))
    parts = sorted({name for line in lines for name in line if name.startswith("loss.")})
    _draw(upper, lines, {"loss": "loss, weighted sum"}, width=2.0)
    _draw(upper, lines, {name: name.removeprefix("loss.") for name in parts})
    validation = {"validation_loss": "validation loss", "validation_ce": "validation, cross entropy"}
    _draw(upper, lines, validation, marker="o", style="--")
    _finish(upper, "Losses", "nats per token, each term times its weight", legend=False)
    if any(value > 0 for value in _series(lines, "loss")[1]):
        upper.set_yscale("log", nonpositive="mask")  # a term that was 0 leaves a gap
    rates = [{**line, "lr": line["lr"] * line.get("lr_factor", 1.0)} for line in lines if "lr" in line]
    _draw(lower, rates, {"lr": "learning rate"})
    _finish(lower, "", "rate / its peak", legend=False)
    lower.set_ylim(bottom=0)
    lower.set_xlabel("optimizer step")
    upper.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    for axes in (upper, lower):
        _switches(axes, lines)
    return figure


def validation_figure(lines: Lines) -> Figure | None:
    """What validations measured, by optimizer step; None where none did."""
    logged = {name for line in lines for name in line}
    panels = [(title, unit, names) for title, unit, names in PANELS if logged & names.keys()]
    if not panels:
        return None
    rows = math.ceil(len(panels) / 2)
    figure, axes = _figure(rows, min(2, len(panels)), (10.0, 3.6 * rows))
    for (title, unit, names), one in zip(panels, axes, strict=False):
        _draw(one, lines, names, marker="o")
        _finish(one, title, unit)
        one.set_xlabel("optimizer step")
        one.margins(y=0.1)
        one.set_ylim(bottom=0)
        _switches(one, lines)
    for one in axes[len(panels) :]:
        one.set_visible(False)
    return figure


def comparison_figure(results: Mapping[str, Any]) -> Figure | None:
    """Bars of the student beside its baseline, from the record of `compare.Comparison`. None for a record that has no
    such summaries."""
    results = results.get("results", results)
    try:
        before, after = (results[side]["summary"] for side in ("baseline", "student"))
    except (KeyError, TypeError):
        return None
    shares = {
        "exact_match": "right\nanswers",
        "tool_name_accuracy": "right\ntool",
        "argument_exact_match": "right\narguments",
        "json_validity": "valid\nJSON",
        "completeness": "required\nfields",
        "false_call_rate": "false\ncalls",
    }
    counts = {
        "median_tokens": "tokens of\nan answer",
        "ttfa_tokens": "tokens until\nthe call",
        "forwards": "forwards of\nan answer",
    }
    figure, (left, right) = _figure(1, 2, (11.0, 4.2), widths=(2, 1))
    _bars(left, before, after, shares, 100.0)
    _finish(left, _equality(results), "share of samples, %")
    _bars(right, before, after, counts, 1.0)
    _finish(right, "Length and cost", "median (forwards: mean)", legend=False)
    return figure


def _equality(results: Mapping[str, Any]) -> str:
    found = results.get("equality")
    if not isinstance(found, Mapping):
        return "Accuracy"
    word = "equal" if found.get("equal") else "not shown to be equal"
    return (
        f"Accuracy {word}: {100 * found['difference']:+.2f} points, at least {100 * found['lower']:+.2f},"
        f" {found['n']} pairs"
    )


def _bars(
    axes: Axes, before: Mapping[str, Any], after: Mapping[str, Any], names: Mapping[str, str], scale: float
) -> None:
    """A pair of bars for each name that either side has, each with its value."""
    shown = [name for name in names if before.get(name) is not None or after.get(name) is not None]
    for offset, label, side in ((-0.2, "baseline", before), (0.2, "student", after)):
        heights = [scale * (side.get(name) or 0.0) for name in shown]
        bars = axes.bar([i + offset for i in range(len(shown))], heights, 0.38, label=label)
        axes.bar_label(bars, [f"{height:.3g}" for height in heights], fontsize=8, padding=1)
    axes.set_xticks(range(len(shown)), [names[name] for name in shown], fontsize=9)
    axes.margins(y=0.15)


def _figure(
    rows: int,
    columns: int,
    size: tuple[float, float],
    *,
    heights: Sequence[float] | None = None,
    widths: Sequence[float] | None = None,
) -> tuple[Figure, list[Axes]]:
    """A figure that needs no screen, and its axes in reading order. Raises UnsupportedError."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError(
            "pictures need matplotlib, which is not installed.",
            hint="./run setup train in a clone, or pip install 'dfastllm[train]'.",
        ) from error
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False, height_ratios=heights, width_ratios=widths)
    return figure, list(grid.flat)


def _series(lines: Lines, name: str) -> Series:
    """Steps and finite values of one figure."""
    found: Series = ([], [])
    for line in lines:
        value = line.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            found[0].append(int(line["step"]))
            found[1].append(float(value))
    return found


def _draw(
    axes: Axes, lines: Lines, names: Mapping[str, str], *, width: float = 1.3, marker: str = "", style: str = "-"
) -> None:
    for name, label in names.items():
        steps, values = _series(lines, name)
        if steps:
            only = "o" if len(steps) == 1 else marker  # one point makes no line
            whole = not marker  # a marker on the edge is drawn whole
            axes.plot(steps, values, style, linewidth=width, marker=only, markersize=4, label=label, clip_on=whole)


def _finish(axes: Axes, title: str, unit: str, *, legend: bool = True) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_ylabel(unit)
    axes.grid(alpha=0.3)
    if legend and axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8)


def _switches(axes: Axes, lines: Lines) -> None:
    """The whole run on the axis of steps, and a line where the log says that something was switched."""
    axes.set_xlim(0, 1.02 * max(int(line.get("step", 0)) for line in lines))
    for line in lines:
        word = SWITCHES.get(str(line.get("event")))
        if word is not None:
            axes.axvline(line["step"], color="0.4", linestyle=":", linewidth=1.2)
            how: dict[str, Any] = {"fontsize": 8, "color": "0.3", "rotation": 90, "ha": "right", "va": "bottom"}
            axes.text(line["step"], 0.03, word, transform=axes.get_xaxis_transform(), **how)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}.", param="home") from error
    return found if isinstance(found, Mapping) else {}


def main(arguments: Iterable[str] | None = None) -> int:
    """The command: RUN, a run's directory. Returns its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if len(words) != 1:
        print("usage: python -m dfastllm.distill.plots RUN", file=sys.stderr)
        return 2
    try:
        made = plot_run(Path(words[0]))
    except (DataError, UnsupportedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in made:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
