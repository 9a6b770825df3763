"""A pytest plugin that records which test reaches which line of the package, and how long each test takes.

`-p scripts.mutation.reach` with MUTATION_REACH naming a folder: each process writes what it saw there, the processes
that tests start too (under the name of the test that started them). `read` puts them together.

Lines that a fixture of a module or of the session reaches stand under the first test that asked for it; lines that an
import reaches stand under no test.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

__all__ = ["Reach", "read"]

SETTINGS = """[run]
data_file = {folder}/process
parallel = true
sigterm = true
source = {source}
context = ${{MUTATION_TEST}}
"""


class Recorder:
    """Switches the context of coverage to each test, sums up the time of its three phases, and notes failures."""

    def __init__(self, folder: Path, source: Path) -> None:
        import coverage  # in the environment of a copy, see `tree`

        self.folder = folder
        self.seconds: dict[str, float] = defaultdict(float)
        self.failed: set[str] = set()
        settings = folder / "coveragerc"
        settings.write_text(SETTINGS.format(folder=folder, source=source), encoding="utf-8")
        os.environ["COVERAGE_PROCESS_START"] = str(settings)
        os.environ["MUTATION_TEST"] = ""
        self.coverage = coverage.Coverage(
            data_file=str(folder / f"tests.{os.getpid()}"), source=[str(source)], config_file=False
        )
        self.coverage.start()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.coverage.switch_context(item.nodeid)
        os.environ["MUTATION_TEST"] = item.nodeid.replace("$", "")
        try:
            return (yield)
        finally:
            self.coverage.switch_context("")
            os.environ["MUTATION_TEST"] = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration
        if report.failed or report.skipped:
            self.failed.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        self.coverage.stop()
        self.coverage.save()
        seen = {"seconds": self.seconds, "failed": sorted(self.failed)}
        (self.folder / f"times.{os.getpid()}.json").write_text(json.dumps(seen), encoding="utf-8")


def pytest_configure(config: Any) -> None:
    """Record in the processes that run tests: the workers of xdist, or the one process."""
    folder = os.environ.get("MUTATION_REACH")
    if folder and (hasattr(config, "workerinput") or not config.getoption("numprocesses", None)):
        config.pluginmanager.register(Recorder(Path(folder), Path.cwd() / "src/dfastllm"))


@dataclass
class Reach:
    """What the whole suite did, on the unchanged source.

    lines: of each file (as in the tree) and line: the tests that reached it
    seconds: of each test that passed
    """

    lines: dict[str, dict[int, list[str]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def read(folder: Path, root: Path) -> Reach:
    """What the processes of a recorded run in `folder` saw of the tree at `root`. Tests that failed or were skipped
    notice nothing, so they are left out."""
    import coverage

    found = Reach()
    failed: set[str] = set()
    for path in sorted(folder.glob("times.*.json")):
        seen = json.loads(path.read_text(encoding="utf-8"))
        found.seconds |= seen["seconds"]
        failed |= set(seen["failed"])
    for test in failed:
        found.seconds.pop(test, None)
    known = {test.replace("$", ""): test for test in found.seconds}
    lines: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for path in [*folder.glob("tests.*"), *folder.glob("process.*")]:
        data = coverage.CoverageData(str(path))
        data.read()
        for file in data.measured_files():
            name = Path(file).relative_to(root).as_posix()
            for line, contexts in data.contexts_by_lineno(file).items():
                lines[name][line] |= {known[one.replace("$", "")] for one in contexts if one.replace("$", "") in known}
    found.lines = {name: {line: sorted(tests) for line, tests in seen.items()} for name, seen in lines.items()}
    return found
