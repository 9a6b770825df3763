"""The record of a count: every mutant with what became of it (JSON), and a table by room (Markdown).

Why a survivor is let live stands in reasons.toml, by hand: `equivalent` where it changes nothing that anyone could see,
else what a test of it would cost. A record takes the reasons that fit its survivors.
"""

from __future__ import annotations

import json
import tomllib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scripts.mutation.mutant import Mutant
from scripts.mutation.trial import Outcome

__all__ = ["Case", "Record", "reasons"]

REASONS = Path(__file__).with_name("reasons.toml")
AIM = 0.9  # noticed of each room's, those aside that change nothing


@dataclass
class Case:
    """A mutant and what came of it.

    line: of the file, when it was tried
    commit: of the tree that it was tried on last
    reason, equivalent: of a survivor, from reasons.toml
    """

    mutant: Mutant
    outcome: Outcome
    line: int
    commit: str
    reason: str = ""
    equivalent: bool = False

    @property
    def key(self) -> tuple[str, str, str]:
        return self.mutant.file, self.mutant.old, self.mutant.new


@dataclass
class Record:
    """A count. about: seed, size, versions, the commit that the mutants were drawn from."""

    about: Mapping[str, Any]
    cases: list[Case]

    @classmethod
    def load(cls, path: Path) -> Record:
        raw = json.loads(path.read_text(encoding="utf-8"))
        cases = [
            Case(Mutant(**one.pop("mutant")), Outcome(**one.pop("outcome")), **{k: one[k] for k in ("line", "commit")})
            for one in raw["cases"]
        ]
        return cls(raw["about"], cases)

    def save(self, path: Path) -> None:
        """Write `path` and the table beside it, with the reasons of today."""
        known = reasons()
        for case in self.cases:
            case.reason, case.equivalent = ("", False) if case.outcome.noticed else known.get(case.key, ("", False))
        self.cases.sort(key=lambda case: (case.mutant.room, case.mutant.file, case.line, case.mutant.new))
        raw = {"about": dict(self.about), "cases": [asdict(case) for case in self.cases]}
        path.write_text(json.dumps(raw, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(self.page(), encoding="utf-8")

    def page(self) -> str:
        """The table by room, then the survivors."""
        rooms: dict[str, list[Case]] = defaultdict(list)
        for case in self.cases:
            rooms[case.mutant.room or "dfastllm"].append(case)
        about = self.about
        lines = [
            "# What the suite notices",
            "",
            f"Made by `scripts/mutants` from `{about['record']}`: {len(self.cases)} faults put into the source one at "
            f"a time, {about['drawn']} drawn by {about['library']} with seed {about['seed']} at commit "
            f"{about['commit']} and {about['handmade']} made by hand (`scripts/mutation/handmade.toml`). Noticed: a "
            "test fails, or hangs, or the package cannot be imported or compiled. The share leaves out survivors that "
            "change nothing anyone could see.",
            "",
            "| room | faults | noticed | of these by time-out | survive | change nothing | share noticed |",
            "|---|---|---|---|---|---|---|",
        ]
        for room, cases in [*sorted(rooms.items()), ("all", self.cases)]:
            lines.append(row(room, cases))
        lines += ["", "## Survivors", "", "| where | fault | why it may live |", "|---|---|---|"]
        for case in self.cases:
            if not case.outcome.noticed:
                change = f"{cell(changed(case.mutant)[0])} → {cell(changed(case.mutant)[1])}"
                why = ("changes nothing: " if case.equivalent else "") + (case.reason or "**no test yet**")
                where = case.mutant.file.removeprefix("src/dfastllm/")
                lines.append(f"| {where}:{case.line} | {change} | {why.replace('|', chr(92) + '|')} |")
        return "\n".join(lines) + "\n"


def row(room: str, cases: Sequence[Case]) -> str:
    noticed = sum(case.outcome.noticed for case in cases)
    equivalent = sum(case.equivalent for case in cases)
    hung = sum(case.outcome.hung for case in cases)
    share = noticed / max(1, len(cases) - equivalent)
    return (
        f"| {room} | {len(cases)} | {noticed} | {hung} | {len(cases) - noticed} | {equivalent} | "
        f"{share:.0%}{'' if share >= AIM else ' (below)'} |"
    )


def changed(mutant: Mutant) -> tuple[str, str]:
    """The first line that differs, before and after, without the indentation."""
    old, new = mutant.old.split("\n"), mutant.new.split("\n")
    pairs = [(a.strip(), b.strip()) for a, b in zip(old, new, strict=False) if a != b]
    return pairs[0] if pairs else (mutant.old.strip().split("\n")[-1].strip(), "")


def cell(code: str) -> str:
    """Code in a cell of a Markdown table."""
    return "`" + code.replace("|", "\\|").replace("`", "'") + "`" if code else "(gone)"


def reasons() -> dict[tuple[str, str, str], tuple[str, bool]]:
    """By file, old and new text: why a survivor is let live, and whether it changes nothing."""
    if not REASONS.is_file():
        return {}
    rows = tomllib.loads(REASONS.read_text(encoding="utf-8")).get("survivor", [])
    return {
        ("src/dfastllm/" + one["file"], one["old"], one["new"]): (one["why"], one.get("equivalent", False))
        for one in rows
    }
