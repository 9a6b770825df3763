"""Verifiable tasks in chat form: a seeded generator, splits that share no template parameters, and graders.

`draw(split, seed, index)` is a pure function: the index-th sample of a stream, whatever was drawn before. The tasks of
the default mix have answers of some 15 tokens; those outside of it (`LONG`), which a mix must name, of 48 and more.
Does not know tokens or models.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from dfastllm.errors import ValidationError
from dfastllm.tasks import (
    arithmetic,
    code,
    edit,
    extract,
    instruct,
    ledger,
    listing,
    program,
    prose,
    record,
    rewrite,
    table,
    tools,
)
from dfastllm.tasks.graders import CALL_GRADERS, GRADERS, grade
from dfastllm.tasks.sample import SPLITS, Draft, Maker, Sample, Split, pick_split

__all__ = [
    "CALL_GRADERS",
    "GRADERS",
    "LONG",
    "MIXED",
    "SPLITS",
    "TASKS",
    "Draft",
    "Maker",
    "Sample",
    "Split",
    "draw",
    "grade",
    "pick_split",
    "shares",
]

# task -> (maker, share of the default mix; 0: only where a mix names it)
TASKS: Mapping[str, tuple[Maker, float]] = {
    "arithmetic": (arithmetic.make, 0.20),
    "extract": (extract.make, 0.16),
    "tools": (tools.make, 0.18),
    "code": (code.make, 0.14),
    "rewrite": (rewrite.make, 0.16),
    "instruct": (instruct.make, 0.13),
    "prose": (prose.make, 0.03),
    "listing": (listing.make, 0.0),
    "edit": (edit.make, 0.0),
    "table": (table.make, 0.0),
    "record": (record.make, 0.0),
    "ledger": (ledger.make, 0.0),
    "program": (program.make, 0.0),
}
MIXED = tuple(name for name, (_, share) in TASKS.items() if share)  # the tasks of the default mix
LONG = tuple(name for name in TASKS if name not in MIXED)  # answers of 48 tokens and more
SYSTEM = ("You are a helpful assistant.", "Answer briefly.", "You are dfastllm, a small demo model.")
SYSTEM_SHARE = 0.08


def shares(mix: Mapping[str, float] | None = None) -> dict[str, float]:
    """The weight of each task under this mix, which are relative to each other.

    mix: for a task of the default mix, the factor on its share; for one outside of it, its share itself, beside the
    default mix's 1.0 in all. Raises ValidationError for a task that there is not, a negative number, or nothing left.
    """
    given = mix or {}
    if unknown := sorted(given.keys() - TASKS.keys()):
        raise ValidationError(f"mix names no task {unknown[0]!r}; there are {', '.join(TASKS)}.", param="mix")
    if wrong := [name for name, number in given.items() if not 0 <= number < float("inf")]:
        raise ValidationError(f"mix: {wrong[0]} must be at least 0 and finite, got {given[wrong[0]]!r}.", param="mix")
    found = {
        name: share * given.get(name, 1.0) if share else float(given.get(name, 0.0))
        for name, (_, share) in TASKS.items()
    }
    if not sum(found.values()):
        raise ValidationError("mix leaves no task: every share is 0.", param="mix", hint="Give one above 0.")
    return found


def draw(
    split: Split, seed: int, index: int, task: str | None = None, mix: Mapping[str, float] | None = None
) -> Sample:
    """The index-th sample of this split's stream under this seed; `task` None: from the whole mix, as `shares` weighs
    it under `mix`, and raises what that raises."""
    rng = random.Random(f"{split}/{seed}/{index}/{task}")
    name = task or rng.choices(list(TASKS), weights=list(shares(mix).values()))[0]
    maker = TASKS[name][0]
    while True:  # held-out shares are a few per cent: some 25 drafts for a test sample
        draft = maker(rng)
        if pick_split(name, draft.key) == split:
            break
    messages = [{"role": "user", "content": draft.prompt}, *draft.before]
    if rng.random() < SYSTEM_SHARE:
        messages.insert(0, {"role": "system", "content": rng.choice(SYSTEM)})
    return Sample(name, tuple(messages), draft.response, draft.expected, draft.grader, draft.key, draft.tools)
