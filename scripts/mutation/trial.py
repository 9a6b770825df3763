"""One mutant at a time: put it into a copy of the tree, run the tests that reach it, and take it out again."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.mutation.mutant import PACKAGE, Mutant
from scripts.mutation.reach import Reach
from scripts.mutation.tree import ROOT, Tree

__all__ = ["Outcome", "Trial", "choose"]

FIRST = 40.0  # seconds of tests, by their times on the unchanged source, that reach the line
SECOND = 3.0  # seconds of the room's other tests, for what the record of lines cannot know (fixtures, caches, imports)
FOLDERS = {
    "": "house/",
    "assemble": "test_assemble.py",
    "errors": "core/test_errors.py",
    "llm": "test_llm.py",
    "options": "test_options.py",
    "settings": "house/test_settings.py",
}


@dataclass
class Outcome:
    """What came of a mutant.

    noticed: some test failed, or hung, or the package could not be imported or compiled
    test, error: the first that noticed, and how
    hung: it noticed by a time-out
    reached: how many tests reach the line
    ran: how many tests ran
    """

    noticed: bool
    test: str = ""
    error: str = ""
    hung: bool = False
    reached: int = 0
    ran: int = 0


def choose(reach: Reach, mutant: Mutant, source: str) -> tuple[list[str], list[str], int]:
    """The tests to try on `mutant`, in two goes, and how many reach its lines at all. What an import runs (a constant,
    a table, a signature) counts as reached by every test that reaches its file: which test imports a module first says
    nothing."""
    lines = reach.lines.get(mutant.file, {})
    touching = {test for line in mutant.lines(source) for test in lines.get(line, ())}
    if not mutant.native and not all(line in in_functions(source) for line in mutant.lines(source)):
        touching = {test for tests in lines.values() for test in tests}
    if mutant.native:
        touching = {test for test in reach.seconds if test.startswith(("tests/kernels/", "tests/engine/runners/"))}
        touching |= {test for test in reach.seconds if test.startswith("tests/recorded/")}
    touching &= reach.seconds.keys()  # less what was left out
    first = within(touching, reach.seconds, mutant.room, FIRST)
    folder = "tests/" + FOLDERS.get(mutant.room, f"{mutant.room}/")
    rest = (test for test in reach.seconds if test.startswith(folder) and test not in first)
    return first, within(rest, reach.seconds, mutant.room, SECOND), len(touching)


def in_functions(source: str) -> set[int]:
    """Lines that run when a function is called, not when the module is imported."""
    found: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.update(range(node.body[0].lineno, (node.end_lineno or 0) + 1))
    return found


def within(tests: Iterable[str], seconds: dict[str, float], room: str, budget: float) -> list[str]:
    """Those that fit into `budget`, the room's own before others and quick ones before slow ones, file by file."""
    folder = "tests/" + FOLDERS.get(room, f"{room}/")
    chosen: dict[str, list[str]] = defaultdict(list)
    spent = 0.0
    for test in sorted(tests, key=lambda test: (not test.startswith(folder), seconds[test], test)):
        if spent + seconds[test] <= budget or not chosen:
            spent += seconds[test]
            chosen[test.split("::")[0]].append(test)
    ordered = sorted(
        chosen.items(), key=lambda item: (not item[0].startswith(folder), sum(seconds[test] for test in item[1]))
    )
    return [test for _, own in ordered for test in own]


@dataclass
class Trial:
    """Tries mutants in one copy of the tree. Close it: it holds a process.

    tree: the copy
    reach: what the suite reaches on the unchanged source
    """

    tree: Tree
    reach: Reach
    # Times of the files that are written: never used twice, by an earlier count either (see `write`).
    _moment: int = field(default_factory=lambda: 2_000_000_000 + 4 * (int(time.time()) - 1_790_000_000), repr=False)

    def __post_init__(self) -> None:
        command = [str(self.tree.python), "-m", "scripts.mutation.forks"]
        self.forks = subprocess.Popen(
            [*command, str(self.tree.root), str(self.tree.root.parent / "tests.log")],
            cwd=ROOT, env=self.tree.environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def close(self) -> None:
        assert self.forks.stdin is not None
        self.forks.stdin.close()
        self.forks.wait()

    def __enter__(self) -> Trial:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def tests(self, tests: list[str], *, limited: bool = False) -> dict[str, Any]:
        """Run `tests` on the copy as it is. limited: in bounded memory, since a fault in Python may ask for any."""
        assert self.forks.stdin is not None
        assert self.forks.stdout is not None
        seconds = {test: self.reach.seconds.get(test, 0.0) for test in tests}
        asked = {"tests": tests, "seconds": seconds, "limited": limited}
        self.forks.stdin.write(json.dumps(asked) + "\n")
        self.forks.stdin.flush()
        answer: dict[str, Any] = json.loads(self.forks.stdout.readline())
        if not answer["began"]:
            raise RuntimeError(f"no test could be started; see {self.tree.root.parent / 'tests.log'}")
        return answer

    def try_one(self, mutant: Mutant) -> Outcome:
        """What the tests say of `mutant`. Raises ValueError when its place is not in the tree."""
        path = self.tree.root / mutant.file
        source = path.read_text(encoding="utf-8")
        changed = mutant.changed(source)
        if changed is None:
            raise ValueError(f"the text that a mutant of {mutant.file} replaces must stand there once:\n{mutant.old}")
        first, second, reached = choose(self.reach, mutant, source)
        self.write(path, changed)
        try:
            if mutant.native and not self.tree.compile():
                return Outcome(True, "", "does not compile")
            ran = 0
            for tests in (first, second):
                if tests:
                    said = self.tests(tests, limited=not mutant.native)
                    ran += said["ran"]
                    if said["noticed"]:
                        return Outcome(True, said["test"], said["error"], said["hung"], reached, ran)
            return Outcome(False, reached=reached, ran=ran)
        finally:
            self.write(path, source)
            if mutant.native:
                self.tree.compile()

    def write(self, path: Path, text: str) -> None:
        """Write `text` with a time of its own: bytecode of another text of the same second and size must not be taken
        for it. (cmake goes by the time too, and by the order of times.)"""
        path.write_text(text, encoding="utf-8")
        if path.relative_to(self.tree.root).as_posix().startswith(PACKAGE) and path.suffix == ".py":
            self._moment += 1
            os.utime(path, (self._moment, self._moment))
