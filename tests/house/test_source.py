"""Habits that a reader would otherwise have to check: exports, forbidden calls and names, the drawn error tree."""

from __future__ import annotations

import ast
import importlib
import inspect
import re

import pytest

import dfastllm.errors as errors
from tests.kit.source import ROOT, Module, modules, shipped_files, text_of

# file -> reason. An entry that is no longer needed fails the test.
ALLOWED_CALLS: dict[str, str] = {}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal"}
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "compile",
    "torch.load",
    "torch.save",
    "os.system",
    "yaml.load",
    "numpy.load",
    "np.load",
}
# Written in two halves, so that this file does not hold them.
FORBIDDEN_TEXT = {
    "a path of somebody's machine": re.compile(r"(?<![\w.])/(?:wo" r"rk|ro" r"ot|ho" r"me/\w+|Us" r"ers/\w+)/"),
    "a package registry's host": re.compile(
        r"pypi\.o" r"rg|pythonhos" r"ted\.org|download\.pyt" r"orch\.org|registry\.np" r"mjs|deb\.deb" r"ian\.org"
    ),
}
LICENSED = {"LICENSE"}


def exports(module: Module) -> list[str] | None:
    for node in module.tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if any(isinstance(t, ast.Name) and t.id == "__all__" for t in targets):
            return list(ast.literal_eval(node.value))  # type: ignore[union-attr]
    return None


def export_order(name: str) -> tuple[int, list[str | int]]:
    """ruff's (isort's) order: CONSTANTS, Classes, the rest; digits by value."""
    kind = 0 if name.isupper() and len(name) > 1 else 1 if name[:1].isupper() else 2
    return kind, [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def defined(module: Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


@pytest.mark.parametrize("module", modules(), ids=lambda m: m.relative)
def test_module(module: Module) -> None:
    """A docstring, and an `__all__` that is there, sorted, and names what exists."""
    assert ast.get_docstring(module.tree), f"{module.relative} has no opening docstring"
    listed = exports(module)
    if module.path.name == "__main__.py":
        return
    assert listed is not None, f"{module.relative} has no __all__"
    assert listed == sorted(listed, key=export_order), f"{module.relative}: __all__ is not sorted"
    assert len(listed) == len(set(listed)), f"{module.relative}: __all__ names something twice"
    lazy = any(isinstance(node, ast.FunctionDef) and node.name == "__getattr__" for node in module.tree.body)
    missing = [] if lazy else sorted(set(listed) - defined(module))
    assert missing == [], f"{module.relative}: __all__ names what is not there"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # legacy warns on import, as it should
def test_exports_are_there() -> None:
    """Every name in an `__all__` can be had, those loaded on first use too."""
    missing = []
    for module in modules():
        if module.path.name == "__main__.py":
            continue
        loaded = importlib.import_module(module.name)
        missing += [f"{module.name}.{name}" for name in exports(module) or [] if not hasattr(loaded, name)]
    assert missing == []


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else "?"


def dangers(tree: ast.Module) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            found += [f"import {name}" for name in names & FORBIDDEN_MODULES]
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            found += [name] if name in FORBIDDEN_CALLS else []
            found += [keyword.arg for keyword in node.keywords if keyword.arg == "trust_remote_code"]
            shell = [k for k in node.keywords if k.arg == "shell" and getattr(k.value, "value", None) is not False]
            found += ["shell=True"] if shell else []
    return found


def test_nothing_runs_code_from_data() -> None:
    found = {m.relative: dangers(m.tree) for m in modules()}
    found = {path: names for path, names in found.items() if names}
    assert {path: names for path, names in found.items() if path not in ALLOWED_CALLS} == {}
    assert set(ALLOWED_CALLS) <= set(found), "an entry of ALLOWED_CALLS is no longer needed"


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "eval('1')",
        "f(trust_remote_code=True)",
        "import subprocess\nsubprocess.run('ls', shell=True)",
    ],
)
def test_the_danger_check_sees(code: str) -> None:
    assert len(dangers(ast.parse(code))) == 1


def test_no_foreign_names_in_files() -> None:
    found = []
    for path in shipped_files():
        text = text_of(path)
        if text is None or path.name in LICENSED:
            continue
        for what, pattern in FORBIDDEN_TEXT.items():
            found += [f"{path.relative_to(ROOT)}: {what}: {m.group()}" for m in pattern.finditer(text)]
    assert found == []


def test_no_stray_weights() -> None:
    """Weights travel as safetensors only."""
    suffixes = {".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt", ".npz", ".npy"}
    assert [str(p.relative_to(ROOT)) for p in shipped_files() if p.suffix in suffixes] == []


def drawn_tree() -> dict[str, tuple[str | None, int | None]]:
    """name -> (parent, HTTP status) as drawn in the docstring of dfastllm.errors."""
    drawn: dict[str, tuple[str | None, int | None]] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^([ │├└─]*)(\w+)(?:\s+(\d{3}))?", line)
        if match and match.group(2) in dir(errors):
            depth = len(match.group(1)) // 4
            path = [*path[: depth - 1], match.group(2)]
            status = int(match.group(3)) if match.group(3) else None
            drawn[match.group(2)] = (path[-2] if len(path) > 1 else None, status)
    return drawn


def test_error_tree_is_drawn() -> None:
    classes = {
        name: cls
        for name, cls in inspect.getmembers(errors, inspect.isclass)
        if issubclass(cls, errors.DFastLLMError) and cls.__module__ == errors.__name__
    }
    drawn = drawn_tree()
    assert set(drawn) == set(classes) == set(errors.__all__)
    for name, cls in classes.items():
        parent, status = drawn[name]
        assert parent == (cls.__bases__[0].__name__ if name != "DFastLLMError" else None), name
        assert status in (None, cls.status), name
        assert cls.code, name
    codes = [cls.code for cls in classes.values()]
    assert len(set(codes)) == len(codes), "two errors share a code"
