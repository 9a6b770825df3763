"""What is asked: prompt types with their graders, system prompts, and prompts of one's own from a JSON Lines file.

Every type has prompts whose answers can be checked. `code`, `extraction`, `arithmetic`, `tools` and `editing` are
held-out samples of the task mix, as many as wanted; `security`, `technical` and `creative` alternate open questions,
where only speed and equality with the baseline can be told, with closed ones, where a known word or a form can be found
in the answer. Prompts are text that people write, never random tokens: those flatter or punish a speculator.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfastllm.errors import ValidationError

__all__ = ["GRADERS", "LABELS", "SYSTEM_PROMPTS", "Prompt", "PromptSource", "load_prompts", "prompt_types"]

LABELS: Mapping[str, str] = {
    "security": "Security",
    "code": "Code generation",
    "technical": "Technical explanation",
    "creative": "Creative problem solving",
    "extraction": "Extraction",
    "arithmetic": "Arithmetic",
    "tools": "Tool calls",
    "editing": "Editing and formatting",
}
TASKS: Mapping[str, tuple[str, ...]] = {
    "code": ("code",),
    "extraction": ("extract",),
    "arithmetic": ("arithmetic",),
    "tools": ("tools",),
    "editing": ("rewrite", "instruct"),
}
SYSTEM_PROMPTS: Mapping[str, str] = {
    "direct": "Answer the question directly, without preamble, disclaimers or apologies.",
    "empty": "",
    "expert": "You are a senior engineer with twenty years of practice. Be precise and complete.",
    "concise": "Answer as briefly as possible.",
}

# (prompt, what a right answer holds: any of these, whatever their case; None: open)
Closed = tuple[str, tuple[str, ...] | None]
SECURITY: Sequence[Closed] = (
    ("Explain how an SQL injection works and how prepared statements prevent it.", None),
    (
        "Which HTTP response header tells browsers to use only HTTPS for a site? Name it.",
        ("strict-transport-security",),
    ),
    (
        "A web service reads a file whose name comes from a query parameter. What can go wrong and how is it fixed?",
        None,
    ),
    ("Which TCP port does SSH use by default?", ("22",)),
    ("Describe the steps of a code review that looks for authentication flaws.", None),
    ("What does the abbreviation CSRF stand for?", ("cross-site request forgery", "cross site request forgery")),
    ("Why should passwords be stored with a slow, salted hash? Compare bcrypt with SHA-256.", None),
    ("Name the attack in which script of an attacker runs in another user's browser.", ("xss", "cross-site scripting")),
)
TECHNICAL: Sequence[Closed] = (
    ("Explain how the attention mechanism of a transformer works.", None),
    ("What is the time complexity of binary search in a sorted array? Use big O notation.", ("o(log n)", "log n")),
    ("Explain what a key-value cache does in language-model inference and what it costs in memory.", None),
    ("How many bits does a single-precision IEEE 754 floating-point number have?", ("32",)),
    ("Explain the difference between a process and a thread, with an example of when to use each.", None),
    ("Which data structure gives first-in, first-out order?", ("queue",)),
    ("Explain how gradient descent trains a neural network and what the learning rate does.", None),
    ("Which HTTP status code means that a resource was not found?", ("404",)),
)
CREATIVE: Sequence[tuple[str, str | None]] = (  # (prompt, pattern the whole answer matches)
    ("A town has one bridge and too many cars. Propose three unusual ways to help, with a drawback of each.", None),
    ("List exactly three uses for an empty bottle as bullets that start with '- '.", r"(?:- [^\n]+\n?){3}"),
    ("Invent a board game for people who cannot see the board. Describe how a turn goes.", None),
    ("Think of one new name for a bakery. Answer with that name only, two words.", r"\S+ \S+"),
    ("You have a rope, a lamp and a bucket. How do you measure the depth of a dark well?", None),
    ("Write a sentence about rain that ends with a question mark, and nothing else.", r"[^\n.!?]*rain[^\n.!?]*\?"),
    ("Design a clock that shows time without numbers or hands. How does one read it?", None),
    ("Give a riddle in two lines and nothing else.", r"[^\n]+\n[^\n]+"),
)


def _contains(text: str, expected: Any) -> bool:
    """Any of the phrases, as whole words, whatever their case."""
    wanted = [expected] if isinstance(expected, str) else expected
    return any(re.search(rf"(?<!\w){re.escape(str(w))}(?!\w)", text, re.IGNORECASE) is not None for w in wanted)


def _pattern(text: str, expected: Any) -> bool:
    return re.fullmatch(str(expected), text.strip(), re.IGNORECASE) is not None


def _task(name: str) -> Callable[[str, Any], bool]:
    def grader(text: str, expected: Any) -> bool:
        from dfastllm.tasks import GRADERS as TASK_GRADERS

        return TASK_GRADERS[name](text, expected)

    return grader


# name -> does this answer's text fit what was expected?
GRADERS: Mapping[str, Callable[[str, Any], bool]] = {
    "contains": _contains,
    "pattern": _pattern,
    **{name: _task(name) for name in ("answer", "formula", "function", "json", "number", "text", "tool_call")},
}


@dataclass(frozen=True)
class Prompt:
    """One question. id: names it in the raw records; equal ids are the same question. grader None: open."""

    id: str
    type: str
    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    grader: str | None = None
    expected: Any = None
    wants_call: bool = False

    def grade(self, text: str) -> bool | None:
        """Whether the answer is right; None for an open question. A malformed answer is wrong, never an error."""
        return None if self.grader is None else GRADERS[self.grader](text, self.expected)

    def under(self, system: str) -> Prompt:
        """The same question under this system message (in place of its own, if it has one)."""
        rest = tuple(m for m in self.messages if m["role"] != "system")
        head = ({"role": "system", "content": system},) if system else ()
        return Prompt(self.id, self.type, head + rest, self.tools, self.grader, self.expected, self.wants_call)


# index -> the index-th prompt of a type; the same for the same index
PromptSource = Callable[[int], Prompt]


def prompt_types(seed: int = 0) -> dict[str, PromptSource]:
    """Every built-in type. A seed chooses the samples of the task mix."""
    sources: dict[str, PromptSource] = {
        "security": _closed("security", SECURITY),
        "code": _sampled("code", seed),
        "technical": _closed("technical", TECHNICAL),
        "creative": _formed("creative", CREATIVE),
    }
    return sources | {name: _sampled(name, seed) for name in TASKS if name not in sources}


def _user(text: str) -> tuple[Mapping[str, Any], ...]:
    return ({"role": "user", "content": text},)


def _closed(type: str, table: Sequence[Closed]) -> PromptSource:
    def source(index: int) -> Prompt:
        text, expected = table[index % len(table)]
        name = f"{type}/{index % len(table)}"
        return Prompt(name, type, _user(text), grader="contains" if expected else None, expected=expected)

    return source


def _formed(type: str, table: Sequence[tuple[str, str | None]]) -> PromptSource:
    def source(index: int) -> Prompt:
        text, pattern = table[index % len(table)]
        name = f"{type}/{index % len(table)}"
        return Prompt(name, type, _user(text), grader="pattern" if pattern else None, expected=pattern)

    return source


def _sampled(type: str, seed: int) -> PromptSource:
    tasks = TASKS[type]

    def source(index: int) -> Prompt:
        from dfastllm.tasks import draw

        task = tasks[index % len(tasks)]
        sample = draw("test", seed, index // len(tasks), task)
        messages = tuple(_wire(message) for message in sample.messages)
        return Prompt(
            f"{type}/{seed}/{index}",
            type,
            messages,
            sample.tools,
            sample.grader,
            sample.expected,
            wants_call=sample.grader == "tool_call",
        )

    return source


def _wire(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A task's message as OpenAI's API takes it: the arguments of a call are a JSON string there."""
    if not message.get("tool_calls"):
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def load_prompts(path: Path) -> dict[str, PromptSource]:
    """Own prompts, one JSON object a line: `prompt` or `messages`; optional `type` (default "own"), `tools`, `grader`
    (a name in GRADERS) with `expected`. Raises ValidationError naming the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValidationError(f"{path} cannot be read: {error}.", param="prompts") from error
    by_type: dict[str, list[Prompt]] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            prompt = _own(path, number, line)
            by_type.setdefault(prompt.type, []).append(prompt)
    if not by_type:
        raise ValidationError(f"{path} holds no prompts.", param="prompts")

    def cycle(prompts: list[Prompt]) -> PromptSource:
        return lambda index: prompts[index % len(prompts)]

    return {name: cycle(prompts) for name, prompts in by_type.items()}


def _own(path: Path, number: int, line: str) -> Prompt:
    def bad(why: str) -> ValidationError:
        return ValidationError(f"{path} line {number}: {why}.", param="prompts")

    try:
        row = json.loads(line)
    except ValueError as error:
        raise bad(f"no JSON ({error})") from error
    if not isinstance(row, dict):
        raise bad("wanted an object with prompt or messages")
    known = {"prompt", "messages", "type", "tools", "grader", "expected"}
    if unknown := sorted(set(row) - known):
        raise bad(f"unknown field {unknown[0]!r}; there are {', '.join(sorted(known))}")
    if ("prompt" in row) == ("messages" in row):
        raise bad("wanted either prompt or messages")
    messages = _user(row["prompt"]) if "prompt" in row else tuple(row["messages"])
    if not messages or not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages):
        raise bad("messages is a list of objects with role and content")
    grader = row.get("grader")
    if grader is not None and grader not in GRADERS:
        raise bad(f"no grader {grader!r}; there are {', '.join(sorted(GRADERS))}")
    if (grader is None) != ("expected" not in row):
        raise bad("grader and expected go together")
    type = str(row.get("type", "own"))
    return Prompt(
        f"{type}/line{number}",
        type,
        messages,
        tuple(row.get("tools") or ()),
        grader,
        row.get("expected"),
        wants_call=grader == "tool_call",
    )
