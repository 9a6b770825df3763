"""Samples to token batches: a seeded endless stream whose position is one number, bucketed by length.

Does not know objectives: what is masked or shifted is theirs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from dfastllm.tasks import Sample, Split, draw
from dfastllm.text.tokenizer import Tokenizer

__all__ = ["Batch", "Example", "Stream", "buckets", "encode"]

Item = TypeVar("Item")

WINDOW = 1024  # samples sorted together: buckets are tight, and a batch stays a mix of the tasks
TURN_SHARE = 0.03  # samples that follow another exchange in one chat


@dataclass(frozen=True)
class Example:
    """prompt: rendered up to the assistant's turn. response: the answer and EOS; the part that is learned."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    index: int

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.response)


@dataclass(frozen=True)
class Batch:
    """Examples of similar length. number: position in the stream, from 0; with the seed it keys every random draw that
    an objective makes about this batch."""

    examples: tuple[Example, ...]
    number: int


def encode(tokenizer: Tokenizer, sample: Sample, index: int = 0, before: Sample | None = None) -> Example:
    """before: an earlier exchange in the same chat (its system message and tools are left out)."""
    messages = list(sample.messages)
    if before is not None:
        earlier = [m for m in before.messages if m["role"] == "user"]
        at = 1 if messages[0]["role"] == "system" else 0
        messages[at:at] = [*earlier, {"role": "assistant", "content": before.response}]
    prompt = tokenizer.encode(tokenizer.apply_chat_template(messages, sample.tools or None))
    assert tokenizer.eos_id is not None  # the demo tokenizer has one
    response = [*tokenizer.encode(sample.response), tokenizer.eos_id]
    return Example(tuple(prompt), tuple(response), index)


def buckets(items: Iterable[Item], cost: Callable[[Item], int], tokens: int) -> list[tuple[Item, ...]]:
    """Items, which come with ascending cost, in groups of at most `tokens` rows once all are as long as the last; an
    item that alone is longer is a group of its own."""
    found: list[tuple[Item, ...]] = []
    group: list[Item] = []
    for item in items:
        if group and (len(group) + 1) * cost(item) > tokens:
            found.append(tuple(group))
            group = []
        group.append(item)
    if group:
        found.append(tuple(group))
    return found


class Stream:
    """Batches of about `tokens` padded tokens, a pure function of (split, seed, position): a resumed run continues
    exactly.

    cost: rows an example will take in the forward pass (an objective adds its canvas); sorts and fills the buckets.
    mix: see `draw`. style: what becomes of each sample before it is learnt; of an earlier exchange too.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        split: Split,
        seed: int,
        tokens: int,
        cost: Callable[[Example], int] = lambda example: example.length,
        mix: Mapping[str, float] | None = None,
        style: Callable[[Sample], Sample] | None = None,
    ) -> None:
        self.style = style
        self.tokenizer, self.split, self.seed, self.tokens, self.cost = tokenizer, split, seed, tokens, cost
        self.mix = mix

    def _examples(self, window: int) -> list[Example]:
        found = []
        for index in range(window * WINDOW, (window + 1) * WINDOW):
            sample = draw(self.split, self.seed, index, mix=self.mix)
            rng = random.Random(f"turn/{self.seed}/{index}")
            earlier = draw(self.split, self.seed, rng.randrange(10**9)) if rng.random() < TURN_SHARE else None
            if earlier is not None and (earlier.tools or sample.tools):
                earlier = None
            if self.style is not None:
                sample, earlier = self.style(sample), None if earlier is None else self.style(earlier)
            found.append(encode(self.tokenizer, sample, index, earlier))
        return found

    def _cut(self, window: int) -> list[tuple[Example, ...]]:
        examples = sorted(self._examples(window), key=lambda e: (self.cost(e), e.index))
        batches = buckets(examples, self.cost, self.tokens)
        random.Random(f"order/{self.seed}/{window}").shuffle(batches)
        return batches

    def at(self, position: tuple[int, int]) -> Iterator[tuple[Batch, tuple[int, int]]]:
        """Batches from (window, number in it) on, each with the position after it."""
        window, start = position
        while True:
            cut = self._cut(window)
            for i in range(start, len(cut)):
                after = (window, i + 1) if i + 1 < len(cut) else (window + 1, 0)
                yield Batch(cut[i], window * WINDOW + i), after  # a window has at most WINDOW batches
            window, start = window + 1, 0
