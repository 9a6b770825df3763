"""The report in a terminal: the same facts with and without rich, at every width, in every encoding."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dfastllm.bench.suite.cells import Cell, Column, Table, figure, printable
from dfastllm.bench.suite.recommend import recommend
from dfastllm.bench.suite.schema import ConfigurationResult, Results, save_results
from dfastllm.bench.suite.tables import tables
from dfastllm.bench.suite.terminal import fold, print_report, print_tables
from tests.kit.suite_example import configuration, figures, load_point, results

RULES = "|╭╮╰╯─│├┤┼┬┴"


@pytest.fixture
def found() -> Results:
    made = results()
    return made.model_copy(update={"recommendations": recommend(made)})


def drawn(found: Results, *, rich: bool, width: int = 120, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding=encoding)
    print_tables(tables(found), file=out, width=width, rich=rich)
    out.flush()
    return raw.getvalue().decode(encoding)


def words(text: str) -> list[str]:
    """What is said, without the rules that are drawn around it."""
    lines = [line for line in text.splitlines() if not re.fullmatch(r"[-+]+", line)]
    return "".join(" " if c in RULES else c for c in "\n".join(lines)).split()


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_rich_and_plain_say_the_same(found: Results, width: int) -> None:
    with_rich, without = drawn(found, rich=True, width=width), drawn(found, rich=False, width=width)
    assert "╭" in with_rich
    assert "╭" not in without
    # Wrapped headers come in another order: the multiset is compared.
    assert sorted(words(with_rich)) == sorted(words(without))


@pytest.mark.parametrize("rich", [True, False])
@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_line_is_wider_than_the_terminal(found: Results, rich: bool, width: int) -> None:
    assert max(map(len, drawn(found, rich=rich, width=width).splitlines())) <= width


@pytest.mark.parametrize("rich", [True, False])
def test_every_figure_is_shown_at_80_columns(found: Results, rich: bool) -> None:
    text = drawn(found, rich=rich, width=80)
    for table in tables(found):
        for row in table.rows:
            for cell in row:
                assert cell.text in text, (table.name, cell)


def test_figures_of_the_file_are_the_ones_shown(found: Results) -> None:
    text = drawn(found, rich=False)
    for expected in ("162", "1.62× (+62 %, 1.57–1.67)", "93.3 % (28/30)", "60/60 tokens", "5.56 / 8.33 / 9.44 / 11.1"):
        assert expected in text
    assert "suffix, 5 tokens: refused: no suffix tree" in text
    assert "★" in next(line for line in text.splitlines() if line.startswith("n-gram, 5 tokens") and "162" in line)
    assert "4 requests/s, Poisson: partial: the server went away" in text


def test_folded_parts_keep_the_first_column_and_lose_nothing() -> None:
    rows = (tuple(Cell(f"row{r}cell{c}") for c in range(9)) for r in range(3))
    table = Table("t", "Title", tuple(Column(f"column{c}") for c in range(9)), tuple(rows), ("a line",))
    parts = fold(table, 50)
    assert len(parts) > 2
    assert all(part.columns[0].name == "column0" for part in parts)
    assert [c.name for part in parts for c in part.columns[1:]] == [f"column{c}" for c in range(1, 9)]
    assert [part.lines for part in parts] == [()] * (len(parts) - 1) + [("a line",)]
    assert [part.title for part in parts] == ["Title"] + ["Title (continued)"] * (len(parts) - 1)
    assert fold(table, 500) == [table]


def test_a_cell_wider_than_the_terminal_is_wrapped_not_cut() -> None:
    text = " ".join(f"word{i}" for i in range(40))
    table = Table("t", "T", (Column("name", right=False), Column("text", right=False)), ((Cell("a"), Cell(text)),))
    for rich in (True, False):
        out = io.StringIO()
        print_tables([table], file=out, width=60, rich=rich)
        assert max(map(len, out.getvalue().splitlines())) <= 60
        assert [w for w in words(out.getvalue()) if w.startswith("word")] == text.split()


@pytest.mark.parametrize("rich", [True, False])
def test_ascii_only_terminals_get_words_for_signs(found: Results, rich: bool) -> None:
    text = drawn(found, rich=rich, encoding="ascii")
    assert "1.62x (+62 %, 1.57-1.67)" in text
    assert "?" not in text


def test_what_a_server_says_does_not_steer_the_terminal(found: Results) -> None:
    evil = "\x1b[31mred\x1b[0m\x07\nnext [bold]markup[/bold]"
    base = configuration("baseline", f"{evil}")
    for rich in (True, False):
        text = drawn(results(base, servers=()), rich=rich)
        assert "\x1b" not in text
        assert "\x07" not in text
        assert "[bold]markup[/bold]" in text, "rich markup in a server's words is text"


def test_printable_keeps_words_and_drops_controls() -> None:
    assert printable("a\tb\r\n c\x00d — ü") == "a b c d — ü"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.02131, "0.0213"),
        (0.5, "0.500"),
        (1.234, "1.23"),
        (45.64, "45.6"),
        (789.4, "789"),
        (12345.6, "12,346"),
        (0.0, "0.000"),
        (7, "7"),
        (None, "–"),
        (-12.34, "-12.3"),
    ],
)
def test_figures_have_three_digits(value: float | None, text: str) -> None:
    assert figure(value) == text


def test_columns_that_say_nothing_are_left_out() -> None:
    plain = results(configuration("baseline", "None", correct=None), system_prompts=(), load=())
    config = next(t for t in tables(plain) if t.name == "configurations")
    assert "Accuracy" not in [c.name for c in config.columns]
    assert "Errors" not in [c.name for c in config.columns]
    assert "No request failed." in config.lines
    assert {"load", "system_prompts"}.isdisjoint(t.name for t in tables(plain))


def test_configurations_refused_for_the_same_reason_share_a_line() -> None:
    def refused(name: str, why: str) -> ConfigurationResult:
        return ConfigurationResult(name=name, label=name, axis="speculation", status="refused", message=why)

    made = results(configuration("baseline", "B"), refused("x", "no"), refused("y", "never"), refused("z", "no"))
    lines = next(t for t in tables(made) if t.name == "configurations").lines
    assert {"x; z: refused: no", "y: refused: never"} <= set(lines)


def test_errors_are_shown_with_their_kind() -> None:
    base = configuration("baseline", "None")
    broken = base.model_copy(update={"figures": figures(90, errors=3)})
    text = drawn(results(broken), rich=False)
    assert "3 (timeout 3)" in text


def test_where_tokens_come_from_is_said_unless_it_is_usage() -> None:
    base = configuration("baseline", "None")
    assert base.figures is not None
    speed = base.figures.speed.model_copy(update={"tokens_source": "estimate"})
    guessed = base.model_copy(update={"figures": base.figures.model_copy(update={"speed": speed})})
    assert "characters / 4" in drawn(results(guessed), rich=False)
    assert "characters / 4" not in drawn(results(), rich=False)


def test_one_configuration_for_all_points_is_said_once() -> None:
    points = (load_point(1, 100), load_point(2, 150))
    load = next(t for t in tables(results(load=points)) if t.name == "load")
    assert "Configuration" not in [c.name for c in load.columns]
    assert load.lines[0] == "Configuration: No speculation."
    mixed = (points[0], points[1].model_copy(update={"configuration": "ngram-k5"}))
    load = next(t for t in tables(results(load=mixed)) if t.name == "load")
    assert "Configuration" in [c.name for c in load.columns]


BLOCKED = """
import importlib.abc, sys
class NoRich(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "rich":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NoRich())
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "rich" else real(name, package)
from pathlib import Path
from dfastllm.bench.suite.schema import load_results
from dfastllm.bench.suite.terminal import print_report
print_report(load_results(Path(sys.argv[1])))
assert "rich" not in sys.modules
assert "torch" not in sys.modules
"""


def test_without_rich_installed_the_whole_report_comes(found: Results, tmp_path: Path) -> None:
    path = tmp_path / "test_results.json"
    save_results(found, path)
    environment = {"PATH": "", "COLUMNS": "100", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, str(path)], capture_output=True, encoding="utf-8", env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == drawn(found, rich=False, width=100)


def test_no_colour_codes_in_a_pipe(found: Results, capsys: pytest.CaptureFixture[str]) -> None:
    print_report(found, width=100)
    text = capsys.readouterr().out
    assert "Performance by configuration" in text
    assert "\x1b" not in text
