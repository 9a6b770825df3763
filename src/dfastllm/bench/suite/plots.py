"""The plots of the HTML report, as SVG to be set into a page.

Colours are drawn as placeholders and come out as CSS variables, so one drawing serves a light and a dark page; text
stays text. Every figure of a plot is in a table of the report too. matplotlib is wanted only here."""

from __future__ import annotations

import importlib.util
import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from dfastllm.bench.suite.schema import ConfigurationResult, Figures, LoadPoint, Results, Speculation
from dfastllm.bench.suite.tables import best_configuration

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Plot", "plots"]

SERIES = 6
MOST_LINES = 6  # in one plot; more cannot be told apart
COLOURS = {"ink": "#010101", "muted": "#010102", "grid": "#010103", "good": "#010104", "bad": "#010105"} | {
    f"series-{i}": f"#0101{16 + i:02x}" for i in range(SERIES)
}
MARKERS = "osD^vP"
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)), (0, (8, 3)), (0, (2, 2)))
WIDTH, HEIGHT = 5.0, 3.3  # inches; a phone shows it at about its own size


@dataclass(frozen=True, slots=True)
class Plot:
    """svg: an <svg> element with a viewBox and no size of its own. caption: what to see in it."""

    name: str
    title: str
    caption: str
    svg: str


def plots(results: Results) -> tuple[Plot, ...]:
    """Those that have something to show; none without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return ()
    import matplotlib

    out = []
    with matplotlib.rc_context(cast(Any, _style())):
        for name, (title, caption, draw) in DRAWINGS.items():
            drawn = draw(results)
            if drawn is not None:
                out.append(Plot(name, title, caption, _svg(drawn, name, title)))
    return tuple(out)


def _style() -> dict[str, Any]:
    ink, muted, grid = COLOURS["ink"], COLOURS["muted"], COLOURS["grid"]
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "dfastllm",
        "font.size": 8.5,
        "font.family": "sans-serif",
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.edgecolor": muted,
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": grid,
        "grid.linewidth": 0.7,
        "xtick.color": muted,
        "ytick.color": muted,
        "xtick.labelcolor": ink,
        "ytick.labelcolor": ink,
        "figure.facecolor": "none",
        "legend.frameon": False,
        "lines.linewidth": 1.6,
        "lines.markersize": 5.5,
    }


def _svg(drawn: Figure, name: str, title: str) -> str:
    """The drawing with CSS variables for colours, ids of its own, and its title for those who cannot see it."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    drawn.savefig(buffer, format="svg", metadata=nothing, transparent=True, bbox_inches="tight", pad_inches=0.05)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="|url\()#', rf"\1#{name}-", text)
    for variable, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{variable})")
    return text.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)


def _figure(height: float = HEIGHT, rows: int = 1) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = drawn.subplots(rows, 1, squeeze=False)[:, 0]
    return drawn, list(axes)


def _legend(axes: Axes, columns: int = 2) -> None:
    """Below the plot, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=2.6)


def _look(i: int) -> dict[str, Any]:
    return {"color": COLOURS[f"series-{i % SERIES}"], "marker": MARKERS[i % SERIES]}


def _line(i: int) -> dict[str, Any]:
    return {"color": COLOURS[f"series-{i % SERIES}"], "linestyle": DASHES[i % SERIES]}


def _measured(results: Results) -> list[tuple[ConfigurationResult, Figures]]:
    return [(c, c.figures) for c in results.configurations if c.figures is not None]


def _shown(results: Results) -> list[tuple[ConfigurationResult, Figures]]:
    """All measured, or the baseline, the best and those with the highest speedup, in the order measured."""
    found = _measured(results)
    best, base = best_configuration(results), results.baseline

    def rank(pair: tuple[ConfigurationResult, Figures]) -> tuple[bool, bool, float]:
        gain = pair[1].versus_baseline
        return pair[0] is base, pair[0].name == best, gain.ratio if gain else 0.0

    kept = {c.name for c, _ in sorted(found, key=rank, reverse=True)[:MOST_LINES]}
    return [pair for pair in found if pair[0].name in kept]


def _numbers(results: Results) -> dict[str, int]:
    """A number for each configuration, the same in every plot; those of `_shown` come first and share no colour."""
    first = [c.name for c, _ in _shown(results)]
    rest = [c.name for c in results.configurations if c.name not in first]
    others = [p.configuration for p in results.load if p.configuration not in (*first, *rest)]
    return {name: i for i, name in enumerate(dict.fromkeys([*first, *rest, *others]))}


def _speed_accuracy(results: Results) -> Figure | None:
    points = [
        (c, f.speed.output_throughput, f.accuracy)
        for c, f in _measured(results)
        if f.accuracy is not None and f.speed.output_throughput is not None
    ]
    if not points:
        return None
    drawn, (axes,) = _figure(HEIGHT + 0.17 * len(points) / 2)
    numbers = _numbers(results)
    for config, speed, accuracy in points:
        i = numbers[config.name]
        bar = [[100 * (accuracy.value - accuracy.low)], [100 * (accuracy.high - accuracy.value)]]
        look = _look(i) | {"capsize": 2, "elinewidth": 0.8}
        # A second round of the colours is drawn hollow.
        hollow: dict[str, Any] = {"markerfacecolor": "none"} if i >= SERIES else {}
        axes.errorbar([speed], [100 * accuracy.value], yerr=bar, label=config.label, linestyle="", **look, **hollow)
    axes.set_xlabel("output tokens per second")
    axes.set_ylabel("exact match, %")
    axes.set_ylim(min(axes.get_ylim()[0], 90), max(axes.get_ylim()[1], 102))
    axes.margins(x=0.1)
    _legend(axes)
    return drawn


def _latency_cdf(results: Results) -> Figure | None:
    lines = [(c, f.speed.cdf) for c, f in _shown(results) if f.speed.cdf]
    metrics = [m for m in ("ttft", "e2el") if any(m in cdf for _, cdf in lines)]
    numbers = _numbers(results)
    if not metrics:
        return None
    drawn, panels = _figure(1.9 * len(metrics) + 0.7, len(metrics))
    names = {"ttft": "time to first token, ms", "e2el": "end to end, ms"}
    for axes, metric in zip(panels, metrics, strict=True):
        for config, cdf in lines:
            values = cdf.get(metric, ())
            if values:
                shares = [100 * k / (len(values) - 1) for k in range(len(values))]
                axes.plot(values, shares, label=config.label, **_line(numbers[config.name]))
        axes.set_xlabel(names[metric])
        axes.set_ylabel("% of requests")
        axes.set_ylim(0, 101)
        _log_where_wide(axes, [v for _, cdf in lines for v in cdf.get(metric, ())])
    _legend(panels[0])
    return drawn


def _log_where_wide(axes: Axes, values: Sequence[float]) -> None:
    """One slow request would press all others against the axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    positive = [v for v in values if v > 0]
    if positive and max(positive) > 20 * min(positive):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())


def _by_configuration(points: Sequence[LoadPoint], results: Results) -> Iterator[tuple[int, str, list[LoadPoint]]]:
    labels = {c.name: c.label for c in results.configurations}
    numbers = _numbers(results)
    for name in dict.fromkeys(p.configuration for p in points):
        yield numbers[name], labels.get(name, name), [p for p in points if p.configuration == name]


def _throughput(results: Results) -> Figure | None:
    points = [p for p in results.load if p.kind == "closed" and p.concurrency and p.figures.speed.output_throughput]
    if not points:
        return None
    drawn, (top, bottom) = _figure(4.2, 2)
    for i, label, mine in _by_configuration(points, results):
        mine = sorted(mine, key=lambda p: p.concurrency or 0)
        at = [p.concurrency or 0 for p in mine]
        top.plot(at, [p.figures.speed.output_throughput or 0.0 for p in mine], label=label, **_look(i))
        late = [(p.concurrency or 0, p.figures.speed.e2el.p95) for p in mine if p.figures.speed.e2el]
        bottom.plot([c for c, _ in late], [v for _, v in late], **_look(i))
    top.set_ylabel("output tok/s")
    bottom.set_ylabel("E2E p95, ms")
    bottom.set_xlabel("requests in flight")
    for axes in (top, bottom):
        axes.set_ylim(bottom=0)
        axes.set_xticks(sorted({p.concurrency for p in points if p.concurrency}))
    _legend(top)
    return drawn


def _rates(results: Results) -> Figure | None:
    points = [p for p in results.load if p.kind in ("fixed", "poisson") and p.request_rate]
    if len(points) < 2:
        return None
    drawn, (axes,) = _figure()
    most = max(p.request_rate or 0.0 for p in points)
    axes.plot([0, most], [0, most], color=COLOURS["muted"], linewidth=0.8, linestyle=":", label="as asked")
    for i, label, mine in _by_configuration(points, results):
        mine = sorted(mine, key=lambda p: p.request_rate or 0.0)
        at = [p.request_rate or 0.0 for p in mine]
        axes.plot(at, [p.achieved_rate for p in mine], label=f"{label}: done", **_look(i))
        good = [(p.request_rate or 0.0, g) for p in mine if (g := p.figures.speed.request_goodput) is not None]
        if good:
            dashed = _look(i) | {"linestyle": "--", "markerfacecolor": "none"}
            axes.plot([r for r, _ in good], [g for _, g in good], label=f"{label}: within SLOs", **dashed)
    axes.set_xlabel("requests per second asked")
    axes.set_ylabel("requests per second")
    axes.set_ylim(bottom=0)
    _legend(axes)
    return drawn


def _ramp(results: Results) -> Figure | None:
    ramps = [p for p in results.load if len(p.timeline) > 1]
    if not ramps:
        return None
    drawn, (top, bottom) = _figure(4.0, 2)
    for i, point in enumerate(ramps[:MOST_LINES]):
        at = [row[0] for row in point.timeline]
        top.plot(at, [row[2] for row in point.timeline], label=point.name, **_line(i))
        bottom.plot(at, [row[1] for row in point.timeline], drawstyle="steps-post", **_line(i))
    top.set_ylabel("output tok/s")
    bottom.set_ylabel("in flight")
    bottom.set_xlabel("seconds")
    for axes in (top, bottom):
        axes.set_ylim(bottom=0)
    _legend(top)
    return drawn


def _acceptance(results: Results) -> Figure | None:
    found: list[tuple[ConfigurationResult, Speculation]] = [
        (c, f.speculation)
        for c, f in _shown(results)
        if f.speculation is not None and f.speculation.accepted_per_position and f.speculation.num_drafts
    ]
    if not found:
        return None
    drawn, (axes,) = _figure()
    width = 0.8 / len(found)
    numbers = _numbers(results)
    for i, (config, spec) in enumerate(found):
        shares = [100 * n / spec.num_drafts for n in spec.accepted_per_position]
        at = [k + 1 + (i - (len(found) - 1) / 2) * width for k in range(len(shares))]
        axes.bar(at, shares, width * 0.92, label=config.label, color=_line(numbers[config.name])["color"])
    longest = max(len(spec.accepted_per_position) for _, spec in found)
    axes.set_xticks(range(1, longest + 1))
    axes.grid(axis="x", visible=False)
    axes.set_xlabel("position in the draft")
    axes.set_ylabel("% of drafts accepted here")
    axes.set_ylim(0, 100)
    _legend(axes)
    return drawn


def _speedups(results: Results) -> Figure | None:
    shown = [c for c, f in _shown(results) if f.versus_baseline is not None]
    kinds = [k for k in results.prompt_types if any(k.name in c.prompt_types for c in shown)]
    if not shown or not kinds:
        return None
    drawn, (axes,) = _figure(0.9 + len(kinds) * (0.24 + 0.13 * len(shown)) + 0.1 * len(shown))
    axes.axvline(1.0, color=COLOURS["ink"], linewidth=0.9)
    numbers = _numbers(results)
    for i, config in enumerate(shown):
        rows = []
        for k, kind in enumerate(kinds):
            figures = config.prompt_types.get(kind.name)
            if figures is not None and figures.versus_baseline is not None:
                rows.append((k + (i - (len(shown) - 1) / 2) * 0.7 / len(shown), figures.versus_baseline))
        bars = [[g.ratio - g.low for _, g in rows], [g.high - g.ratio for _, g in rows]]
        look = _look(numbers[config.name]) | {"markersize": 4.5, "elinewidth": 1.1, "linestyle": ""}
        axes.errorbar([g.ratio for _, g in rows], [y for y, _ in rows], xerr=bars, label=config.label, **look)
    axes.set_yticks(range(len(kinds)), [kind.label for kind in kinds])
    axes.set_ylim(len(kinds) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("times the baseline's tok/s")
    _legend(axes)
    return drawn


def _parallelism(results: Results) -> Figure | None:
    found = results.accuracy_vs_parallelism
    if found is None or not found.points:
        return None
    reached = [p.tokens_per_forward for p in found.points]
    if max(reached) < 1.05 * min(reached):  # one parallelism is a point, not a line
        return None
    drawn, (axes,) = _figure()
    points = sorted(found.points, key=lambda p: p.tokens_per_forward)
    at = [p.tokens_per_forward for p in points]
    best = [100 * max(q.accuracy for q in points[i:]) for i in range(len(points))]
    axes.fill_between(at, best, color=COLOURS["series-0"], alpha=0.18, linewidth=0)
    axes.plot(at, best, color=COLOURS["series-0"], linewidth=1.0, label="best at this parallelism or a higher one")
    axes.plot(
        at, [100 * p.accuracy for p in points], linestyle="", marker="o", color=COLOURS["series-1"], label="measured"
    )
    axes.set_xlabel("tokens per forward")
    axes.set_ylabel("exact match, %")
    axes.set_ylim(0, 102)
    _legend(axes)
    return drawn


Drawing = tuple[str, str, Callable[[Results], "Figure | None"]]
DRAWINGS: dict[str, Drawing] = {
    "speed-accuracy": (
        "Speed against accuracy",
        "Up and to the right is better. Bars: 95 % intervals of the accuracy.",
        _speed_accuracy,
    ),
    "speedup-types": (
        "Speedup by prompt type",
        "Left of the line is slower than the baseline. Bars: 95 % intervals.",
        _speedups,
    ),
    "latency-cdf": ("Latency", "The share of requests that took at most so long.", _latency_cdf),
    "throughput": (
        "Throughput against concurrency",
        "Where the upper line stops rising, more load only adds waiting.",
        _throughput,
    ),
    "rates": ("Requests done against requests asked", "Below the dotted line the server falls behind.", _rates),
    "ramp": ("Under a rising load", "Each second of the ramp.", _ramp),
    "acceptance": (
        "Draft tokens accepted by position",
        "Drafts longer than the bars reach are work for nothing.",
        _acceptance,
    ),
    "parallelism": (
        "Accuracy against parallelism",
        "The area under the line is the figure to compare between models and decoders.",
        _parallelism,
    ),
}
