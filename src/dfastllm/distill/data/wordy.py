"""Answers as a chat model gives them: words before the answer, which the answer does not need.

A teacher that answers so is right as often as one that does not, so a student that leaves the words out, and calls its
tool at once, can be measured against it at equal accuracy. The graders that a wordy sample gets take both forms.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace

from dfastllm.errors import ValidationError
from dfastllm.tasks import Sample

__all__ = ["WITHIN", "wordy"]

# grader -> the one that finds the same answer among other words. `answer` looks at the last line alone as it is,
# formula and number at the final answer.
WITHIN: Mapping[str, str] = {
    "answer": "answer",
    "formula": "formula",
    "function": "function_within",
    "json": "json_within",
    "number": "number",
    "text": "text_within",
    "tool_call": "tool_call_within",
}
OPENINGS = (
    "Sure, I can help you with that.",
    "Of course!",
    "Thank you for the question.",
    "Let me look at this for you.",
    "All right, let me see what is asked here.",
    "Good question, let me think about it.",
)
BEFORE_CALLS = (
    "Let me look that up.",
    "I have a tool for this, so I will use it now.",
    "I will call {tool} with what you told me.",
    "One moment, I am going to ask {tool} for you.",
)
BEFORE_ANSWERS = (
    "I have read what you wrote, and here is what I found.",
    "I will go through it and then give you the answer.",
    "Here is the result that you asked for.",
    "This is not hard, and I am glad to do it.",
)
LONGEST_QUESTION = 60  # characters; longer ones are not said again


def wordy(sample: Sample, rng: random.Random, *, brief: float = 0.0) -> Sample:
    """The sample with a wordy response and a grader that takes wordy answers and brief ones. brief: the share of
    samples that stay as they are, as no teacher is always wordy. Raises ValidationError for a grader that has no such
    form."""
    if sample.grader is not None and sample.grader not in WITHIN:
        raise ValidationError(
            f"grader {sample.grader!r} of task {sample.task} has no form for wordy answers.",
            param="style",
            hint=f"Such graders are {', '.join(WITHIN)}.",
        )
    grader = None if sample.grader is None else WITHIN[sample.grader]
    words = _words(sample, rng)
    short = rng.random() < brief
    return replace(sample, response=sample.response if short else _joined(words, sample), grader=grader)


def _words(sample: Sample, rng: random.Random) -> str:
    called = sample.expected["name"] if sample.grader == "tool_call" else ""
    second = rng.choice(BEFORE_CALLS if called else BEFORE_ANSWERS).format(tool=called)
    asked = next(m["content"] for m in reversed(sample.messages) if m["role"] == "user")
    if len(asked) <= LONGEST_QUESTION and "\n" not in asked and rng.random() < 0.3:
        second = f'You asked: "{asked}" {second}'
    return f"{rng.choice(OPENINGS)} {second}"


def _joined(words: str, sample: Sample) -> str:
    """Where a grader looks for an answer among other words, the answer is marked, as `tasks.graders` reads it."""
    response = sample.response
    if sample.grader == "tool_call":
        return f"{words} {response}"
    if sample.grader in ("answer", None):
        return f"{words}\n{response}"
    gap = "\n" if "\n" in response else " "
    return f"{words}\nAnswer:{gap}{response}"
