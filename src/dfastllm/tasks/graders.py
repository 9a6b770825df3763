"""Graders: did an answer do what was asked? Each takes the answer's text and the sample's `expected`; a malformed
answer is wrong, never an error. Those called `..._within` also take an answer that says more than was asked, as chat
models do: "Sure. Answer: 7", or words before a call."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from dfastllm.tasks.answers import formula, number
from dfastllm.tasks.evaluator import Refused, run_function
from dfastllm.tasks.sample import Sample

__all__ = ["CALL_GRADERS", "GRADERS", "grade"]

CALL_GRADERS = ("tool_call", "tool_call_within")  # of samples whose right answer is a call


def answer(text: str, expected: Any) -> bool:
    """The number after the last `Answer:`; the steps before it are not graded."""
    found = re.findall(r"Answer:\s*(-?\d+)\s*$", text.strip())
    return bool(found) and bool(found[-1] == expected)


def text(text: str, expected: Any) -> bool:
    return bool(text.strip() == expected)


def _same(a: Any, b: Any) -> bool:
    """JSON equality: 1 and true differ, 1 and 1.0 do not; key order does not matter."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


def equal_json(text: str, expected: Any) -> bool:
    try:
        return _same(json.loads(text), expected)
    except (ValueError, RecursionError):
        return False


def tool_call(text: str, expected: Mapping[str, Any]) -> bool:
    """Exactly one call, with this name and these arguments, and nothing beside it."""
    match = re.fullmatch(r"<tool_call>(.*)</tool_call>", text.strip(), re.DOTALL)
    return match is not None and equal_json(match[1], expected)


def function(text: str, expected: Mapping[str, Any]) -> bool:
    """The function has the name asked for and returns what the reference returns on every test input."""
    for inputs in expected["inputs"]:
        want = run_function(expected["source"], expected["name"], inputs)
        try:
            got = run_function(text, expected["name"], inputs)
        except Refused:
            return False
        if type(got) is not type(want) or got != want:
            return False
    return True


def tool_call_within(text: str, expected: Mapping[str, Any]) -> bool:
    """Exactly one call, with this name and these arguments, whatever is said beside it."""
    calls = re.findall(r"<tool_call>(.*?)</tool_call>", text, re.DOTALL)
    return len(calls) == text.count("<tool_call>") == 1 and equal_json(calls[0], expected)


def _within(grader: Callable[[str, Any], bool]) -> Callable[[str, Any], bool]:
    """This grader of what follows the last `Answer:`, or of the whole where there is none."""
    return lambda text, expected: grader(text.rpartition("Answer:")[2].strip(), expected)


GRADERS: Mapping[str, Callable[[str, Any], bool]] = {
    "answer": answer,
    "formula": formula,
    "function": function,
    "function_within": _within(function),
    "json": equal_json,
    "json_within": _within(equal_json),
    "number": number,
    "text": text,
    "text_within": _within(text),
    "tool_call": tool_call,
    "tool_call_within": tool_call_within,
}


def grade(sample: Sample, text: str) -> bool:
    """Whether `text` answers the sample. Raises ValueError for a sample without a grader (open prose)."""
    if sample.grader is None:
        raise ValueError(f"a {sample.task} sample has no grader: its answers are open.")
    return GRADERS[sample.grader](text, sample.expected)
