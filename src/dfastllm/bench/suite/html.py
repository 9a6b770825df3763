"""The report as one HTML page that needs nothing else: styles, script and plots are inside, no address is loaded.

It shows the tables of `tables` and the plots of `plots`; its colours follow the reader's light or dark setting, a
button changes them, and a click on a column's head sorts. All text is escaped."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from dfastllm.bench.suite.cells import Table, figure, printable, times
from dfastllm.bench.suite.plots import plots
from dfastllm.bench.suite.schema import Results
from dfastllm.bench.suite.tables import best_configuration, tables

__all__ = ["render_html", "write_html"]

FILES = ("report.html.j2", "report.css", "report.js")
NO_PLOTS = (
    "The plots are missing: matplotlib is not installed. `pip install 'dfastllm[plots]'` and write the page again."
)


def write_html(results: Results, path: Path, *, extra: Iterable[Table] = ()) -> None:
    """Write the page whole or not at all. extra: further tables, such as the history's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(render_html(results, extra=extra), encoding="utf-8")
    part.replace(path)


def render_html(results: Results, *, extra: Iterable[Table] = ()) -> str:
    folder = resources.files("dfastllm.bench.suite") / "templates"
    files = {name: (folder / name).read_text(encoding="utf-8") for name in FILES}
    environment = Environment(
        loader=DictLoader(files), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    found = tables(results)
    by_name = {table.name: table for table in found}
    drawn = plots(results)
    return environment.get_template("report.html.j2").render(
        title=_title(results),
        when=results.started,
        partial=results.partial,
        cards=_cards(results),
        advice=by_name.get("recommendations"),
        tables=[t for t in (*found, *extra) if t.name not in ("recommendations", "environment")],
        environment=by_name["environment"],
        plots=[(plot, Markup(plot.svg)) for plot in drawn],
        no_plots=NO_PLOTS if importlib.util.find_spec("matplotlib") is None else None,
        css=Markup(files["report.css"]),
        script=Markup(files["report.js"]),
    )


def _title(results: Results) -> str:
    return printable(results.target.model) if results.target is not None else "no server"


def _cards(results: Results) -> list[tuple[str, str, str]]:
    """The few figures to read first: name, value, what it belongs to."""
    base, best = results.baseline, best_configuration(results)
    cards = []
    if base is not None and base.figures is not None:
        speed = base.figures.speed
        if speed.output_throughput is not None:
            cards.append(("Baseline", f"{figure(speed.output_throughput)} tok/s", base.label))
        if speed.ttft is not None:
            cards.append(("First token", f"{figure(speed.ttft.p50)} ms", f"p95 {figure(speed.ttft.p95)} ms, baseline"))
        if base.figures.accuracy is not None:
            found = base.figures.accuracy
            cards.append(("Exact match", f"{100 * found.value:.0f} %", f"{found.correct} of {found.n}, baseline"))
    chosen = next((c for c in results.configurations if c.name == best), None)
    if chosen is not None and chosen.figures is not None and chosen.figures.versus_baseline is not None:
        gain = chosen.figures.versus_baseline
        cards.append(("Best speedup", f"{gain.ratio:.2f}×", f"{times(gain).split(' ', 1)[1]} {chosen.label}"))
    else:
        cards.append(("Best speedup", "none", "no configuration beats the baseline"))
    return cards
