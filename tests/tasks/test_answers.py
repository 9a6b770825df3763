"""Final answers: found where texts put them, equal by value."""

from __future__ import annotations

import pytest

from dfastllm.tasks.answers import boxed, final, formula, number, value_of


@pytest.mark.parametrize(
    ("text", "expected", "right"),
    [
        ("so \\boxed{1,234}.", "1234", True),
        ("First \\boxed{3}, then \\boxed{4}", "4", True),
        ("The answer is $18.", "18", True),
        ("6 * 7 = 42\n#### 42", "42", True),
        ("Then 5 and 7", "7", True),
        ("Then 5 and 7", "5", False),
        ("Answer: 3/4", "0.75", True),
        ("**Answer:** 42", "42", True),
        ("The final answer is: 10 dollars", "10", True),
        ("answer is -0.5", "-1/2", True),
        ("It costs 1234.50", "1,234.5", True),
        ("Answer: 12.", "12", True),
        ("Answer: 12 of 30", "30", True),  # the last number behind the mark, as GSM8K's own reading
        ("", "0", False),
        ("no number", "0", False),
        ("Answer: 1/0", "1", False),
        ("9" * 5000, "9", False),
    ],
)
def test_numbers(text: str, expected: str, right: bool) -> None:
    assert number(text, expected) == right


@pytest.mark.parametrize(
    ("text", "expected", "right"),
    [
        ("\\boxed{\\frac{1}{2}}", "\\dfrac12", True),
        ("\\boxed{0.5}", "\\frac12", True),
        ("\\boxed{x=5}", "5", True),
        ("\\boxed{\\text{(C)}}", "(C)", True),
        ("\\boxed{\\left( 3, \\pi \\right)}", "(3,\\pi)", True),
        ("\\boxed{90^\\circ}", "90", True),
        ("\\boxed{2\\sqrt2}", "2\\sqrt{2}", True),
        ("\\boxed{10\\%}", "10", True),
        ("\\boxed{\\frac{-1}{3}}", "-\\frac{1}{3}", True),
        ("\\boxed{x+1}", "1+x", False),  # no algebra
        ("Answer: x^2 + 1.", "x^2+1", True),
        ("one line\nx^2", "x^2", True),
        ("\\boxed{open", "open", False),
        ("", "1", False),
    ],
)
def test_formulas(text: str, expected: str, right: bool) -> None:
    assert formula(text, expected) == right


def test_boxes() -> None:
    assert boxed("a \\boxed{\\frac{1}{2}} b \\boxed{ {3} ") == "\\frac{1}{2}"  # the last is not closed
    assert boxed("none") is None
    assert final("nothing marked") is None
    assert value_of("x") is None
