"""Final answers of mathematical questions, as the public sets GSM8K and MATH have them: found in a text, and compared.

A final answer is what stands in the last \\boxed{...}, else behind the last "####" or "Answer:" or "answer is", else (a
number is wanted) the last number of the text. Numbers are equal by value: 1,234.50, $1234.5 and 2469/2 are one. Other
answers are equal as text once spaces, dollar signs, units of degree and percent, \\left, \\right, \\text and the
spellings of a fraction are the same; no algebra is done.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

__all__ = ["boxed", "final", "formula", "number", "value_of"]

_MARKS = re.compile(r"####|(?:final )?answer(?: is)?\s*:|answer is", re.IGNORECASE)
_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:\s*/\s*\d+)?|-?\.\d+")
LONGEST = 400  # characters of a number, or of an answer that is compared as one
# Spellings that mean the same, in the order in which they are replaced.
_SAME = (
    (re.compile(r"\\(?:left|right|displaystyle|,|!|;|:|quad|qquad|mathrm|mathbf|textbf|boldsymbol)(?![a-zA-Z])"), ""),
    (re.compile(r"\\[dt]frac"), r"\\frac"),
    (re.compile(r"\\text\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\frac(\d)(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac(\d)\{"), r"\\frac{\1}{"),
    (re.compile(r"(?<![\w}])(-?\d+)/(\d+)(?![\w{])"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac\{-"), r"-\\frac{"),
    (re.compile(r"\\sqrt(\w)"), r"\\sqrt{\1}"),
    (re.compile(r"\^\{?\\circ\}?|\\degree|\\%|%|\\\$|\$|\s|~"), ""),
    (re.compile(r"^[a-zA-Z]=(?=.)"), ""),  # x=5 asks for x
    (re.compile(r"(?<!\d)\.(?=\d)"), "0."),
)


def boxed(text: str) -> str | None:
    """What stands in the last \\boxed{...} (or \\fbox) whose braces are balanced, None: there is none."""
    for start in reversed([found.end() for found in re.finditer(r"\\(?:boxed|fbox)\s*\{", text)]):
        depth = 1
        for at in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            if depth == 0:
                return text[start:at]
    return None


def final(text: str) -> str | None:
    """The marked final answer of a text: boxed, or the rest of the line behind the last mark. None: nothing is
    marked."""
    inside = boxed(text)
    if inside is not None:
        return inside
    marks = list(_MARKS.finditer(text))
    if not marks:
        return None
    rest = text[marks[-1].end() :].strip().splitlines()
    return rest[0].strip().rstrip(".") if rest else None


def value_of(text: str) -> Fraction | None:
    """A number's value, None for what is no number: digits with thousands marked, a point, a quotient, a sign."""
    plain = _cleaned(text).replace(",", "").removeprefix("+")
    fraction = re.fullmatch(r"(-?)\\frac\{(\d+)\}\{(\d+)\}", plain)
    if fraction is not None:
        plain = f"{fraction[1]}{fraction[2]}/{fraction[3]}"
    if len(plain) > LONGEST or not re.fullmatch(r"-?\d*\.?\d+(?:/\d+)?|-?\d+\.", plain):
        return None
    try:
        return Fraction(plain.rstrip("."))
    except (ValueError, ZeroDivisionError):
        return None


def number(text: str, expected: Any) -> bool:
    """Grader: the final answer, or else the last number of the text, has the expected value."""
    wanted = value_of(str(expected))
    marked = final(text)
    if marked is not None and (whole := value_of(marked)) is not None:
        return whole == wanted
    found = _NUMBER.findall(text if marked is None else marked)
    if not found and marked is not None:
        found = _NUMBER.findall(text)
    return bool(found) and wanted is not None and value_of(found[-1]) == wanted


def formula(text: str, expected: Any) -> bool:
    """Grader: the final answer is the expected one, as a number or as a formula."""
    given = final(text)
    if given is None:
        given = text.strip().splitlines()[-1] if text.strip() else ""
    wanted, own = value_of(str(expected)), value_of(given)
    if wanted is not None and own is not None:
        return wanted == own
    return _cleaned(given) == _cleaned(str(expected))


def _cleaned(text: str) -> str:
    text = text.strip().rstrip(".")
    for pattern, replacement in _SAME:
        text = pattern.sub(replacement, text)
    return text
