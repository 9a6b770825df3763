"""scripts/mutants: draw, record what tests reach, try every mutant, write the record. See its usage there."""

from __future__ import annotations

import argparse
import json
import os
import queue
import random
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

from scripts.mutation.handmade import handmade
from scripts.mutation.mutant import Mutant
from scripts.mutation.reach import Reach
from scripts.mutation.record import Case, Record
from scripts.mutation.tree import ROOT, Tree, prepare
from scripts.mutation.trial import Outcome, Trial

__all__ = ["main"]

LIBRARY = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["dependency-groups"]["mutants"]


def say(*words: object) -> None:
    print(time.strftime("%H:%M:%S"), *words, flush=True)


def drawn(tree: Tree, commit: str, folder: Path, seed: int, count: int) -> list[Mutant]:
    """About `count` mutants of the library, drawn from the tree. The library lives in an environment of its own."""
    kept = folder / f"drawn-{commit}-{seed}-{count}.json"
    python = folder / "library/bin/python"
    if not python.exists():
        say("installing", *LIBRARY)
        subprocess.run([sys.executable, "-m", "venv", str(folder / "library")], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *LIBRARY], check=True)
    if not kept.exists():
        command = [str(python), "-m", "scripts.mutation.places", str(tree.root), str(seed), str(count)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        kept.write_text(done.stdout, encoding="utf-8")
    return [Mutant(**one) for one in json.loads(kept.read_text(encoding="utf-8"))]


def reached(tree: Tree, folder: Path, tests: Sequence[str] = ()) -> Reach:
    """What the suite, or these files of it, reaches on the unchanged tree; recorded once for a folder."""
    whole = folder / "whole"
    if not whole.exists():
        say("recording which test reaches which line")
        folder.mkdir(parents=True, exist_ok=True)
        environment = {**tree.environment(), "MUTATION_REACH": str(folder), "PYTHONPATH": str(ROOT)}
        command = [str(tree.python), "-m", "pytest", "-p", "scripts.mutation.reach", "-p", "no:cacheprovider"]
        with open(folder / "log", "w", encoding="utf-8") as log:
            subprocess.run([*command, "-n", "auto", *tests], cwd=tree.root, env=environment, stdout=log, stderr=log)
        whole.touch()
    script = (
        "import json, sys; from pathlib import Path; from scripts.mutation.reach import read\n"
        "found = read(Path(sys.argv[1]), Path(sys.argv[2]))\n"
        "json.dump([found.lines, found.seconds], sys.stdout)"
    )
    command = [str(tree.python), "-c", script, str(folder), str(tree.root)]
    raw = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines, seconds = json.loads(raw)
    return Reach({name: {int(line): tests for line, tests in of.items()} for name, of in lines.items()}, seconds)


def changed_tests(tree: Tree, since: str) -> list[str]:
    """The files of tests that are new or other than in the commit `since`."""
    command = ["git", "-C", str(tree.root), "diff", "--name-only", "--diff-filter=d", since, "HEAD", "--", "tests"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return [name for name in listed if Path(name).name.startswith("test_")]


class Counting:
    """Tries mutants in several copies at once; what is found goes to a journal, so that a count can be gone on with."""

    def __init__(self, trees: Sequence[Tree], reach: Reach, commit: str, journal: Path) -> None:
        self.trees, self.reach, self.commit, self.journal = trees, reach, commit, journal
        self.lock = threading.Lock()
        self.done: dict[tuple[str, str, str], Case] = {}
        if journal.exists():
            for line in journal.read_text(encoding="utf-8").splitlines():
                raw = json.loads(line)
                case = Case(Mutant(**raw["mutant"]), Outcome(**raw["outcome"]), raw["line"], raw["commit"])
                self.done[case.key] = case

    def all(self, mutants: Iterable[Mutant]) -> list[Case]:
        """The cases of `mutants`. C++ ones go last, in the copy that has a build."""
        wanted = list(mutants)
        mixed = random.Random(0).sample(wanted, len(wanted))  # a count that is broken off has seen every room
        python: queue.SimpleQueue[Mutant] = queue.SimpleQueue()
        native: queue.SimpleQueue[Mutant] = queue.SimpleQueue()
        for mutant in mixed:
            if (mutant.file, mutant.old, mutant.new) not in self.done:
                (native if mutant.native else python).put(mutant)
        say(python.qsize() + native.qsize(), "of", len(wanted), "to try")
        with ThreadPoolExecutor(len(self.trees)) as pool:
            queues = [[python, native], *[[python]] * (len(self.trees) - 1)]
            for future in [pool.submit(self._work, *each) for each in zip(self.trees, queues, strict=True)]:
                future.result()
        return [self.done[one.file, one.old, one.new] for one in wanted]

    def _work(self, tree: Tree, queues: Sequence[queue.SimpleQueue[Mutant]]) -> None:
        with Trial(tree, self.reach) as trial:
            while waiting := [one for one in queues if not one.empty()]:
                try:
                    mutant = waiting[0].get_nowait()
                except queue.Empty:
                    continue  # another was quicker
                began = time.monotonic()
                source = (tree.root / mutant.file).read_text(encoding="utf-8")
                outcome = trial.try_one(mutant)
                case = Case(mutant, outcome, mutant.lines(source)[0], self.commit)
                with self.lock:
                    self.done[case.key] = case
                    with open(self.journal, "a", encoding="utf-8") as file:
                        file.write(json.dumps(asdict(case)) + "\n")
                word = "noticed " if outcome.noticed else "SURVIVES"
                say(
                    f"{word} {time.monotonic() - began:5.1f}s {mutant.file}:{case.line} {mutant.kind} "
                    f"[{outcome.ran} of {outcome.reached}] {outcome.test} {outcome.error}"
                )

    def unsound(self, cases: Sequence[Case]) -> set[str]:
        """Tests that noticed a mutant and fail on the unchanged tree as well: what they say does not count."""
        tests = sorted({case.outcome.test for case in cases if case.outcome.noticed and "::" in case.outcome.test})
        bad: set[str] = set()
        with Trial(self.trees[0], self.reach) as trial:
            while True:
                said = trial.tests([test for test in tests if test not in bad])
                if not said["noticed"]:
                    return bad
                bad.add(said["test"])
                say("fails on the unchanged tree:", said["test"], said["error"])


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/mutants", description=__doc__)
    parser.add_argument("--record", type=Path, default=Path("benchmarks/mutants.json"), help="where the record is")
    parser.add_argument("--commit", default="HEAD", help="the tree to count")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=220, help="about how many to draw")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="copies of the tree to work in")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "build/mutants", help="where copies and journals are kept"
    )
    parser.add_argument("--survivors", action="store_true", help="try those again that survived in the record")
    parser.add_argument("--only", default="", help="only mutants of files whose name holds this")
    parser.add_argument("--tests", nargs="*", default=(), help="with --survivors: only these files of tests")
    parser.add_argument("--page", action="store_true", help="try nothing: write the page anew, with today's reasons")
    asked = parser.parse_args()
    if asked.page:
        Record.load(asked.record).save(asked.record)
        return
    commit = subprocess.run(
        ["git", "rev-parse", "--short=7", asked.commit], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    say("copies of", commit)
    trees = [prepare(commit, asked.folder / "copy-0")]
    trees += [prepare(commit, asked.folder / f"copy-{i}", trees[0]) for i in range(1, asked.jobs)]
    old = Record.load(asked.record) if asked.survivors else None
    if old is None:
        library = drawn(trees[0], commit, asked.folder, asked.seed, asked.count)
        mutants = [*library, *handmade()]
        about = {
            "record": str(asked.record), "commit": commit, "seed": asked.seed, "library": ", ".join(LIBRARY),
            "drawn": len(library), "handmade": len(mutants) - len(library),
        }  # fmt: skip
    else:
        about = dict(old.about)
        mutants = [case.mutant for case in old.cases if not case.outcome.noticed]
    mutants = [one for one in mutants if asked.only in one.file]
    absent = [one for one in mutants if not one.present(trees[0].root)]
    for mutant in absent:
        say("its place is not in this tree any more:", mutant.file, repr(mutant.old[:80]))
    if old is None:
        reach = reached(trees[0], asked.folder / f"reach-{commit}")
    else:  # tests that are as they were let it live once
        new = asked.tests or changed_tests(trees[0], str(old.about["commit"]))
        reach = reached(trees[0], asked.folder / f"reach-{commit}-since-{old.about['commit']}", new)
    say(len(reach.seconds), "tests,", round(sum(reach.seconds.values())), "s")
    kind = "" if old is None else "-survivors"
    counting = Counting(trees, reach, commit, asked.folder / f"journal-{commit}{kind}.jsonl")
    cases = counting.all(one for one in mutants if one not in absent)
    bad = counting.unsound(cases)
    if bad:
        again = [case.mutant for case in cases if case.outcome.test in bad]
        counting.reach = replace(reach, seconds={t: s for t, s in reach.seconds.items() if t not in bad})
        counting.journal = asked.folder / f"journal-{commit}{kind}-again.jsonl"
        for mutant in again:
            del counting.done[mutant.file, mutant.old, mutant.new]
        cases = [case for case in cases if case.mutant not in again] + counting.all(again)
    if old is not None:
        tried = {case.key: case for case in cases}
        cases = [tried.get(case.key, case) for case in old.cases]
    Record(about, cases).save(asked.record)
    noticed = sum(case.outcome.noticed for case in cases)
    say(f"{noticed} of {len(cases)} noticed; see {asked.record.with_suffix('.md')}")


if __name__ == "__main__":
    main()
