"""What the house tests read: the source tree as syntax trees, and the files that git would ship."""

from __future__ import annotations

import ast
import functools
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SRC = ROOT / "src" / "dfastllm"


@dataclass(frozen=True)
class Module:
    path: Path
    name: str  # dotted, e.g. dfastllm.core.span
    tree: ast.Module

    @property
    def room(self) -> str:
        """First part below the package; "" for the package's own __init__."""
        parts = self.name.split(".")
        return parts[1] if len(parts) > 1 else ""

    @property
    def relative(self) -> str:
        return self.path.relative_to(SRC).as_posix()


@functools.cache
def modules() -> tuple[Module, ...]:
    found = []
    for path in sorted(SRC.rglob("*.py")):
        parts = ["dfastllm", *path.relative_to(SRC).with_suffix("").parts]
        if parts[-1] == "__init__":
            parts.pop()
        found.append(Module(path, ".".join(parts), ast.parse(path.read_text(encoding="utf-8"), str(path))))
    return tuple(found)


def imported(module: Module) -> list[tuple[str, int]]:
    """(dotted name, line) of every module that this one imports anywhere, also inside functions, under TYPE_CHECKING
    and by import_module("..."). `from a import b` counts as a.b, which may be a module or a name in a."""
    package = module.name if module.path.name == "__init__.py" else module.name.rpartition(".")[0]
    found: list[tuple[str, int]] = []
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            found += [(f"{base}.{alias.name}", node.lineno) for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                found.append((str(node.args[0].value), node.lineno))
    return found


@functools.cache
def shipped_files() -> tuple[Path, ...]:
    """Files that are in git or would be added; where there is no git, all but caches."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        paths = [ROOT / name for name in listed]
    except (OSError, subprocess.CalledProcessError):
        skipped = {".git", ".venv", ".ci-venv", "build", "dist", "runs", "__pycache__"}
        paths = [p for p in ROOT.rglob("*") if not skipped & set(p.relative_to(ROOT).parts)]
    return tuple(sorted(p for p in paths if p.is_file()))


def text_of(path: Path) -> str | None:
    """The text of a file, None for a binary one."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
