"""The count of faults that the suite notices (scripts/mutants): its draw, its hand-made list, and what a mutant is."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from scripts.mutation.draw import LEAST, Place, draw
from scripts.mutation.handmade import handmade
from scripts.mutation.mutant import Mutant, room_of
from scripts.mutation.reach import Reach
from scripts.mutation.record import Case, Record, reasons
from scripts.mutation.trial import Outcome, choose

from tests.kit.source import ROOT, modules

OPERATORS = ("ReplaceComparisonOperator_Lt_LtE", "AddNot", "NumberReplacer", "ZeroIterationForLoop", "RemoveDecorator")
SIZES = {"src/dfastllm/core/a.py": 40, "src/dfastllm/engine/b.py": 900, "src/dfastllm/errors.py": 6}
PLACES = [
    Place(file, line, 4, OPERATORS[line % len(OPERATORS)], line) for file, size in SIZES.items() for line in range(size)
]


def test_rooms_are_those_of_the_package() -> None:
    assert {room_of(f"src/dfastllm/{module.relative.removeprefix('src/dfastllm/')}") for module in modules()} == {
        module.room for module in modules()
    }


def test_a_draw_is_the_seeds_and_gives_every_room_its_share() -> None:
    drawn = draw(PLACES, 7, 100)
    assert drawn == draw(reversed(PLACES), 7, 100)
    assert drawn != draw(PLACES, 8, 100)
    counts = Counter(room_of(place.file) for place in drawn)
    assert counts["errors"] == 6  # all there are
    assert counts["core"] >= LEAST
    assert counts["engine"] > 2 * counts["core"]
    assert abs(sum(counts.values()) - 100) <= 6
    assert len({place.kind for place in drawn}) == 5
    small = draw([place for place in PLACES if place.file != "src/dfastllm/engine/b.py"], 7, 10)
    assert Counter(room_of(place.file) for place in small) == {"core": LEAST, "errors": 6}


def test_one_fault_on_a_line_and_none_that_changes_nothing() -> None:
    twice = [Place("src/dfastllm/core/a.py", line, column, "AddNot", line) for line in range(12) for column in (1, 9)]
    drawn = draw(twice, 1, 100)
    assert len(drawn) == 12
    assert all(place.line % 2 for place in draw(twice, 1, 100, lambda place: place.line % 2 == 1))


@pytest.mark.parametrize("mutant", handmade(), ids=lambda one: f"{Path(one.file).name}-{one.why[:40]}")
def test_a_hand_made_fault_fits_the_source(mutant: Mutant) -> None:
    """Its text stands once in the present tree, and what it becomes is still a module."""
    assert mutant.present(ROOT), f"{mutant.file} does not hold once: {mutant.old}"
    changed = mutant.changed((ROOT / mutant.file).read_text(encoding="utf-8"))
    assert changed is not None
    assert mutant.new != mutant.old
    if not mutant.native:
        compiled = __import__("ast").parse(changed)
        assert compiled.body


def test_the_lines_of_a_fault_are_those_that_change() -> None:
    source = "a = 1\nb = 2\nc = 3\nb = 2\nd = 4\n"
    mutant = Mutant("src/dfastllm/x.py", "c = 3\nb = 2\nd = 4", "c = 3\nb = 5\nd = 4")
    assert mutant.lines(source) == range(4, 5)
    assert mutant.changed(source) == "a = 1\nb = 2\nc = 3\nb = 5\nd = 4\n"
    assert Mutant("src/dfastllm/x.py", "b = 2", "b = 3").changed(source) is None  # twice
    assert Mutant("src/dfastllm/x.py", "c = 3\n", "").lines(source) == range(3, 4)


def test_the_tests_that_reach_a_line_come_first() -> None:
    source = "TABLE = 1\ndef f():\n    return 2\ndef g():\n    return 3\n"
    seconds = {
        "tests/core/test_a.py::slow": 3.0,
        "tests/core/test_a.py::quick": 0.1,
        "tests/engine/test_b.py::far": 0.01,
    }
    reach = Reach(
        {"src/dfastllm/core/a.py": {1: [], 3: list(seconds), 5: ["tests/engine/test_b.py::far"]}},
        {**seconds, "tests/core/test_c.py::other": 0.2, "tests/core/test_c.py::endless": 999.0},
    )

    def chosen(old: str) -> tuple[list[str], list[str], int]:
        return choose(reach, Mutant("src/dfastllm/core/a.py", old, "changed"), source)

    first, second, count = chosen("return 2")
    assert first == ["tests/core/test_a.py::quick", "tests/core/test_a.py::slow", "tests/engine/test_b.py::far"]
    assert second == ["tests/core/test_c.py::other"]  # of the same room; one would take longer than all may
    assert count == 3
    assert chosen("return 3")[0] == ["tests/engine/test_b.py::far"]
    assert set(chosen("TABLE = 1")[0]) == set(seconds)  # imports reach it: everything that reaches the file


def test_a_record_says_what_is_below_the_aim(tmp_path: Path) -> None:
    mutants = [Mutant("src/dfastllm/core/a.py", f"x = {i}", "x = 0", "AddNot") for i in range(10)]
    cases = [Case(one, Outcome(i > 2, "t"), i, "abc") for i, one in enumerate(mutants)]
    about = {"record": "r", "drawn": 10, "library": "lib", "seed": 1, "commit": "abc", "handmade": 0}
    path = tmp_path / "r.json"
    Record(about, cases).save(path)
    page = path.with_suffix(".md").read_text(encoding="utf-8")
    assert "| core | 10 | 7 | 0 | 3 | 0 | 70% (below) |" in page
    assert page.count("**no test yet**") == 3
    again = Record.load(path)
    assert [case.key for case in again.cases] == [case.key for case in cases]
    assert [case.outcome.noticed for case in again.cases] == [i > 2 for i in range(10)]


def test_the_committed_record_is_that_of_todays_reasons() -> None:
    """A reason whose fault is noticed, or is not in the record, says nothing; every room has its share of faults."""
    record = Record.load(ROOT / "benchmarks/mutants.json")
    survivors = {case.key for case in record.cases if not case.outcome.noticed}
    assert set(reasons()) <= survivors
    tried = Counter(case.mutant.room for case in record.cases if case.mutant.kind != "hand")
    assert {room for room, count in tried.items() if count < LEAST} <= {""}
