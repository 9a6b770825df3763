"""The hand-made mutants: faults of the kind that people make, kept beside the drawn ones in handmade.toml."""

from __future__ import annotations

import tomllib
from pathlib import Path

from scripts.mutation.mutant import PACKAGE, Mutant

__all__ = ["handmade"]


def handmade() -> list[Mutant]:
    """All of them, in the order of the file."""
    table = tomllib.loads(Path(__file__).with_name("handmade.toml").read_text(encoding="utf-8"))
    return [Mutant(PACKAGE + row["file"], row["old"], row["new"], why=row["why"]) for row in table["fault"]]
