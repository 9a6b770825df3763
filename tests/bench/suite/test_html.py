"""The page: whole without a network, the same facts as the terminal, nothing of a server's words as markup."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dfastllm.bench.suite import html, plots
from dfastllm.bench.suite.about import environment
from dfastllm.bench.suite.html import render_html, write_html
from dfastllm.bench.suite.recommend import recommend
from dfastllm.bench.suite.schema import Results
from dfastllm.bench.suite.tables import tables
from tests.kit.suite_example import configuration, load_point, results


def only(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Draw these plots alone."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(plots, "DRAWINGS", {name: plots.DRAWINGS[name] for name in names})


CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
VOID = {"meta", "br", "img", "link", "hr", "input"}


class Page(HTMLParser):
    """Elements with their attributes, the text of cells and lines; fails on elements that are not closed in turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
            self.text.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.text[self.open[-1]][-1] += data

    def attributes(self, name: str) -> list[str]:
        return [value for _, found in self.elements if (value := found.get(name)) is not None]


@pytest.fixture(scope="module")
def found() -> Results:
    made = results()
    return made.model_copy(update={"recommendations": recommend(made)})


@pytest.fixture(scope="module")
def text(found: Results) -> str:
    pytest.importorskip("matplotlib")
    return render_html(found)


def test_every_fact_of_the_tables_is_on_the_page(found: Results, text: str) -> None:
    page = Page(text)
    said = set(page.text["td"]) | set(page.text["th"]) | set(page.text["p"]) | set(page.text["li"])
    said |= set(page.text["button"]) | set(page.text["h2"])
    for table in tables(found):
        assert table.title in said
        for column in table.columns:
            assert column.name in said
        for cell in (cell for row in table.rows for cell in row):
            assert cell.text in said, cell
        for line in table.lines:
            assert line.strip() in said, line


def test_nothing_is_loaded_from_anywhere(text: str) -> None:
    page = Page(text)
    for name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
        assert all(value.startswith("#") for value in page.attributes(name)), name
    assert not [tag for tag, _ in page.elements if tag in ("link", "iframe", "object", "img", "base")]
    style = " ".join(page.text["style"])
    assert "@import" not in style
    assert "url(" not in style
    assert "fetch(" not in " ".join(page.text["script"])


def test_ids_are_unique_and_what_refers_to_them_finds_them(text: str) -> None:
    page = Page(text)
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    used = [value[1:] for value in page.attributes("xlink:href")]
    used += re.findall(r"url\(#([^)]+)\)", text)
    assert used
    assert set(used) <= set(ids)


def test_all_plots_are_there_in_the_colours_of_the_page(text: str, found: Results) -> None:
    drawn = {p.name: p for p in plots.plots(found)}
    assert set(drawn) == {"speed-accuracy", "speedup-types", "latency-cdf", "throughput", "acceptance", "parallelism"}
    for plot in drawn.values():
        assert plot.title in text
        assert not re.findall(r"#0101[0-9a-f]{2}", plot.svg), "a placeholder is left"
        assert "var(--ink)" in plot.svg
        assert "#000000" not in plot.svg, "black is unreadable on a dark page"
        assert "<text" in plot.svg, "text stays text"
        assert " width=" not in plot.svg[: plot.svg.index(">")]
    defined = set(re.findall(r"(--[a-z0-9-]+):", text))
    assert set(re.findall(r"var\((--[a-z0-9-]+)\)", text)) <= defined


def test_rate_and_ramp_plots_come_with_their_load(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "rates", "ramp")
    ramp = load_point(4, 200).model_copy(
        update={"kind": "ramp", "name": "ramp", "timeline": tuple((float(s), s, 10.0 * s, 0) for s in range(5))}
    )
    load = (load_point(1, 100, rate=2.0), load_point(2, 160, rate=4.0), ramp)
    assert {"rates", "ramp"} <= {p.name for p in plots.plots(results(load=load))}


def test_more_configurations_than_colours_are_all_in_the_scatter_and_never_share_a_colour_in_lines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    only(monkeypatch, "speed-accuracy", "latency-cdf")
    many = [configuration("baseline", "Base")] + [
        configuration(f"c{i}", f"Config {i}", 1 + i / 20, num_speculative_tokens=i) for i in range(1, 10)
    ]
    drawn = {p.name: p.svg for p in plots.plots(results(*many))}
    assert all(f"Config {i}" in drawn["speed-accuracy"] for i in range(1, 10))
    lines = set(re.findall(r"var\(--series-\d\)", drawn["latency-cdf"]))
    assert len(lines) == plots.MOST_LINES
    assert "Base" in drawn["latency-cdf"]
    assert "Config 9" in drawn["latency-cdf"]
    assert "Config 1<" not in drawn["latency-cdf"]


def test_words_of_a_server_are_text(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "speed-accuracy")
    evil = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"
    base, other = configuration("baseline", evil), configuration("a", "A" + evil, 1.5)
    made = results(base, other, notes=(evil,))
    assert made.target is not None
    made = made.model_copy(update={"target": made.target.model_copy(update={"model": evil})})
    made = made.model_copy(update={"recommendations": recommend(made)})
    page = Page(render_html(made))
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert not [tag for tag, _ in page.elements if tag == "img"]
    assert page.text["h1"] == [evil]


def test_without_matplotlib_the_page_says_what_is_missing(
    found: Results, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    bare = render_html(found)
    assert "dfastllm[plots]" in bare
    assert "dfastllm[plots]" not in text
    assert "<svg" not in bare
    assert "1.62× (+62 %, 1.57–1.67)" in bare


def test_a_result_with_nothing_measured_still_makes_a_page() -> None:
    empty = results(target=None, load=(), system_prompts=(), prompt_types=(), accuracy_vs_parallelism=None)
    empty = empty.model_copy(update={"configurations": (), "partial": True, "partial_reason": "connection refused"})
    page = Page(render_html(empty))
    assert page.text["h1"] == ["no server"]
    assert "PARTIAL: connection refused" in page.text["p"]


def test_the_page_is_written_whole_or_not_at_all(
    found: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deep" / "report.html"
    monkeypatch.setattr(html, "render_html", lambda results, extra=(): "first")
    write_html(found, path)

    def fails(results: Results, extra: object = ()) -> str:
        raise RuntimeError

    monkeypatch.setattr(html, "render_html", fails)
    with pytest.raises(RuntimeError):
        write_html(found, path)
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]


def test_cells_carry_the_number_they_sort_by(text: str) -> None:
    assert '<td class="right" data-key="130.0">130</td>' in text
    assert 'data-key="1.62"' in text


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_click_sorts_numbers_as_numbers_and_back(text: str, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    click = """
    const heads = [...document.querySelectorAll("#configurations thead th")];
    const speed = heads.find((h) => h.textContent.trim() === "Tok/s");
    const order = () => [...document.querySelectorAll("#configurations tbody tr")].map((r) => r.cells[1].textContent);
    const log = [];
    for (let i = 0; i < 2; i++) { speed.querySelector("button").click(); log.push(order().join(" ")); }
    document.body.textContent = log.join(" then ") + ", " + speed.getAttribute("aria-sort");
    """
    path = tmp_path / "page.html"
    path.write_text(text.replace("</body>", f"<script>{click}</script></body>"), encoding="utf-8")
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", path.as_uri()],
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert "100 130 148 162 then 162 148 130 100, descending" in done.stdout


@pytest.mark.parametrize("local", [True, False, None])
def test_whose_machine_it_was_is_said_where_it_may_be_another(local: bool | None) -> None:
    made = results()
    table = environment(
        made.model_copy(update={"environment": made.environment.model_copy(update={"server_is_local": local})})
    )
    said = [line for line in table.lines if "The machine is the client's" in line]
    assert len(said) == (0 if local else 1)
