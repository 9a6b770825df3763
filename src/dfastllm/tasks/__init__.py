"""Verifiable tasks in chat form: a seeded generator, splits that share no template parameters, and graders.

`draw(split, seed, index)` is a pure function: the index-th sample of a stream, whatever was drawn before. Does not know
tokens or models.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from dfastllm.tasks import arithmetic, code, extract, instruct, prose, rewrite, tools
from dfastllm.tasks.graders import GRADERS, grade
from dfastllm.tasks.sample import SPLITS, Draft, Maker, Sample, Split, pick_split

__all__ = ["GRADERS", "SPLITS", "TASKS", "Draft", "Maker", "Sample", "Split", "draw", "grade", "pick_split"]

# task -> (maker, share of the mix)
TASKS: Mapping[str, tuple[Maker, float]] = {
    "arithmetic": (arithmetic.make, 0.20),
    "extract": (extract.make, 0.16),
    "tools": (tools.make, 0.18),
    "code": (code.make, 0.14),
    "rewrite": (rewrite.make, 0.16),
    "instruct": (instruct.make, 0.13),
    "prose": (prose.make, 0.03),
}
SYSTEM = ("You are a helpful assistant.", "Answer briefly.", "You are dfastllm, a small demo model.")
SYSTEM_SHARE = 0.08


def draw(
    split: Split, seed: int, index: int, task: str | None = None, mix: Mapping[str, float] | None = None
) -> Sample:
    """The index-th sample of this split's stream under this seed; `task` None: from the whole mix, in which `mix`
    multiplies the shares of the tasks it names."""
    rng = random.Random(f"{split}/{seed}/{index}/{task}")
    shares = [share * (mix or {}).get(name, 1.0) for name, (_, share) in TASKS.items()]
    name = task or rng.choices(list(TASKS), weights=shares)[0]
    maker = TASKS[name][0]
    while True:  # held-out shares are a few per cent: some 25 drafts for a test sample
        draft = maker(rng)
        if pick_split(name, draft.key) == split:
            break
    messages = [{"role": "user", "content": draft.prompt}, *draft.before]
    if rng.random() < SYSTEM_SHARE:
        messages.insert(0, {"role": "system", "content": rng.choice(SYSTEM)})
    return Sample(name, tuple(messages), draft.response, draft.expected, draft.grader, draft.key, draft.tools)
