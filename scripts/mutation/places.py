"""The mutants of the library cosmic-ray over the package: every place where one of its operators fits, less those that
change nothing that runs. Prints the drawn ones as JSON.

usage: python -m scripts.mutation.places ROOT SEED COUNT     (in an environment that has cosmic-ray)
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator
from scripts.mutation.draw import Place, draw
from scripts.mutation.mutant import PACKAGE, Mutant

__all__ = ["mutant", "places"]

Point = tuple[int, int]

BINARY = (
    "Add_Sub Sub_Add Mul_Div Mul_Add Div_Mul FloorDiv_Mul Mod_FloorDiv Pow_Mul BitAnd_BitOr BitOr_BitAnd "
    "LShift_RShift RShift_LShift"
)
COMPARED = "Lt_LtE LtE_Lt Gt_GtE GtE_Gt Lt_Gt Gt_Lt Eq_NotEq NotEq_Eq Is_IsNot IsNot_Is"
UNARY = "Delete_Not Delete_USub"
OPERATORS = (
    *(f"ReplaceBinaryOperator_{name}" for name in BINARY.split()),
    *(f"ReplaceComparisonOperator_{name}" for name in COMPARED.split()),
    *(f"ReplaceUnaryOperator_{name}" for name in UNARY.split()),
    *"AddNot ReplaceTrueWithFalse ReplaceFalseWithTrue ReplaceAndWithOr ReplaceOrWithAnd".split(),
    *"ReplaceBreakWithContinue ReplaceContinueWithBreak ZeroIterationForLoop".split(),
    *"NumberReplacer RemoveDecorator ExceptionReplacer".split(),
)
SEPARATOR = re.compile(r"[*/]\s*,")  # of keyword-only parameters: no product
# Taking these away changes no value: they say something to a reader or a type checker, or save time or memory.
MUTE_DECORATORS = {"overload", "override", "final", "cache", "lru_cache", "runtime_checkable", "abstractmethod"}
MUTE_KEYWORDS = {"help", "slots", "strict", "frozen", "kw_only", "indent", "ensure_ascii", "daemon"}


def places(root: Path) -> Iterator[Place]:
    """Every place of the package under `root` where one of OPERATORS fits, in files sorted by name."""
    for path in sorted((root / PACKAGE).rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        mute, lines = list(mute_regions(source)), source.split("\n")
        nodes = list(ast_nodes(get_ast(source)))
        name = path.relative_to(root).as_posix()
        for operator in OPERATORS:
            occurrence = -1
            for start, _ in positions(operator, nodes):
                occurrence += 1
                separator = SEPARATOR.match(lines[start[0] - 1], start[1])
                if separator is None and not any(first <= start < last for first, last in mute):
                    yield Place(name, *start, operator, occurrence)


def positions(operator: str, nodes: list[Any]) -> Iterator[tuple[Point, Point]]:
    """Where `operator` fits, in the order in which the library counts occurrences."""
    fits = get_operator(f"core/{operator}")().mutation_positions
    for node in nodes:
        yield from fits(node)


def mute_regions(source: str) -> Iterator[tuple[Point, Point]]:
    """Where a change changes nothing that runs, or only words for a person: annotations, `__all__`, `if TYPE_CHECKING`,
    the script's last line, decorators and keywords of the tables above, what is logged, and the words of an error."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        for muted in mute(node):
            if muted is not None:
                yield point(lines, muted.lineno, muted.col_offset), point(lines, muted.end_lineno, muted.end_col_offset)


def mute(node: ast.AST) -> Iterator[Any]:
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            yield node.returns
            yield from (one for one in node.decorator_list if words(one) & MUTE_DECORATORS)
        case ast.ClassDef():
            yield from (one for one in node.decorator_list if words(one) & MUTE_DECORATORS)
        case ast.arg() | ast.AnnAssign():
            yield node.annotation
        case ast.Assign(targets=[ast.Name(id="__all__")]):
            yield node
        case ast.If(test=ast.Name(id="TYPE_CHECKING")):
            yield node
        case ast.If(test=ast.Compare(left=ast.Name(id="__name__"))):
            yield node
        case ast.keyword(arg=str(name)) if name in MUTE_KEYWORDS:
            yield node
        case ast.Raise(exc=ast.Call() as call):
            yield from (*call.args, *call.keywords)
        case ast.Call(func=ast.Attribute(value=ast.Name(id="log" | "logger"))):
            yield node


def words(node: ast.AST) -> set[str]:
    return {one.id for one in ast.walk(node) if isinstance(one, ast.Name)} | {
        one.attr for one in ast.walk(node) if isinstance(one, ast.Attribute)
    }


def point(lines: list[str], line: int, column: int) -> Point:
    """ast counts bytes in a line, the library characters."""
    return line, len(lines[line - 1].encode()[:column].decode())


def mutant(root: Path, place: Place) -> Mutant | None:
    """The change that `place` stands for: the lines that differ, with as many around them as make them stand once in
    the file. None when the library changes nothing or the result is no Python."""
    source = (root / place.file).read_text(encoding="utf-8")
    changed = mutate_code(source, get_operator(f"core/{place.operator}")(), place.occurrence)
    if changed is None or changed == source:
        return None
    try:
        same = ast.dump(ast.parse(changed)) == ast.dump(ast.parse(source))
    except SyntaxError:
        return None
    if same:
        return None
    old, new = source.split("\n"), changed.split("\n")
    head = next(at for at in range(len(old)) if at >= len(new) or old[at] != new[at])
    tail = next(at for at in range(len(old) - head + 1) if at == len(old) - head or old[-1 - at] != new[-1 - at])
    tail = min(tail, len(new) - head)
    while True:
        text = "\n".join(old[head : len(old) - tail])
        if text and source.count(text) == 1:
            return Mutant(place.file, text, "\n".join(new[head : len(new) - tail]), place.operator)
        head, tail = max(0, head - 1), max(0, tail - 1)


def main(root: Path, seed: int, count: int) -> None:
    made: dict[Place, Mutant | None] = {}

    def fits(place: Place) -> bool:
        made[place] = mutant(root, place)
        return made[place] is not None

    drawn = [made[place] for place in draw(places(root), seed, count, fits)]
    json.dump([asdict(one) for one in drawn if one is not None], sys.stdout, indent=1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
