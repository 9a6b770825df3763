"""What a mutant is: a text of a file replaced by another. Drawn and hand-made ones have the same form."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Mutant", "room_of"]

PACKAGE = "src/dfastllm/"


@dataclass(frozen=True)
class Mutant:
    """One fault.

    file: from the root of the tree
    old: what stands there now: exactly once in the file
    new: what the fault makes of it
    kind: the operator of the library, or "hand"
    why: of a hand-made one: what a user would see
    native: a fault in C++, for which the kernels are compiled again
    """

    file: str
    old: str
    new: str
    kind: str = "hand"
    why: str = ""

    @property
    def room(self) -> str:
        return room_of(self.file)

    @property
    def native(self) -> bool:
        return not self.file.endswith(".py")

    def changed(self, source: str) -> str | None:
        """`source` with the fault in it; None when its place is not there (any more), or there twice."""
        return source.replace(self.old, self.new) if source.count(self.old) == 1 else None

    def lines(self, source: str) -> range:
        """The lines of `source`, from 1, that the fault changes (at least one)."""
        first = source[: source.index(self.old)].count("\n") + 1
        old, new = self.old.splitlines(), self.new.splitlines()
        head = 0
        while head < min(len(old), len(new)) - 1 and old[head] == new[head]:
            head += 1
        tail = 0
        while tail < min(len(old), len(new)) - 1 - head and old[-1 - tail] == new[-1 - tail]:
            tail += 1
        return range(first + head, first + len(old) - tail)

    def present(self, root: Path) -> bool:
        """Whether the fault can be put into the tree at `root`."""
        path = root / self.file
        return path.is_file() and self.changed(path.read_text(encoding="utf-8")) is not None


def room_of(file: str) -> str:
    """The room of a file of the package: its folder or its module directly under the package; "" for the package's own
    opening."""
    first = file.removeprefix(PACKAGE).split("/", 1)[0]
    return first.removesuffix(".py").removeprefix("__init__")
