"""A bigram head for a masked draft model (see `models.bigram`), learned on the target's own answers.

The draft model stays as it is. At every position of every answer it drafts once, in the engine that serves, and what it
says of its candidates is kept; the head then learns, by cross entropy among the candidates, the token that the target
said there, after the one that it said before. A row counts as much as the draft is likely to be right up to it: beyond
a wrong token nothing can be accepted.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfastllm.core import ModelInfo, Request, SamplingParams, SequenceState
from dfastllm.distill.students.answers import Answer
from dfastllm.engine import EngineConfig
from dfastllm.engine.runners import Runnable
from dfastllm.engine.speculate import DraftCanvas
from dfastllm.engine.speculate.bigram import Candidates, Wanted, best_chain, likeliest
from dfastllm.errors import DataError
from dfastllm.models import DeviceDecoder, PackedDecoder
from dfastllm.models.bigram import Bigram
from dfastllm.train.work import Losses, Value, Work

__all__ = ["BigramHead", "Chains", "Pairs", "record"]

TOGETHER = 16  # answers drafted for at once
SURE = 0.995  # a candidate this likely has nothing to learn
UNREACHED = 0.02  # a row that drafts reach this seldom counts for nothing
SPREAD = 0.1  # of the numbers the first tokens begin with; the second ones begin as zeros, so that no term is at first


class BigramHead(nn.Module):
    """`before` and `after` float32 [vocabulary, rank], trained."""

    def __init__(self, vocabulary: int, rank: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.before = nn.Parameter(SPREAD * torch.randn(vocabulary, rank, generator=generator))
        self.after = nn.Parameter(torch.zeros(vocabulary, rank))

    def forward(self, previous: Tensor, ids: Tensor) -> Tensor:
        """The terms float32 [rows, n] of candidates ids int64 [rows, n] after previous int64 [rows]."""
        return torch.einsum("rnk,rk->rn", F.embedding(ids, self.after), F.embedding(previous, self.before))

    def head(self) -> Bigram:
        return Bigram(self.before.detach().clone(), self.after.detach().clone())


@dataclass(frozen=True)
class Chains:
    """What a masked model drafted along answers: `length` rows for each draft, one after the other.

    ids       int32 [rows, n], candidates, likeliest first.
    logits    float32 [rows, n].
    previous  int64 [rows]: the answer's token before the row's.
    said      int64 [rows]: the answer's token; -1 after its end.
    length    rows of a draft.
    """

    ids: Tensor
    logits: Tensor
    previous: Tensor
    said: Tensor
    length: int

    @property
    def place(self) -> Tensor:
        """int64 [rows]: which candidate the answer's token is; -1: none of them."""
        found = (self.ids == self.said[:, None]).int()
        return torch.where(found.any(-1), found.argmax(-1), -1)

    def weights(self) -> Tensor:
        """float32 [rows]: how likely the draft is right up to the row, by the model alone; 0 where nothing can be
        learned."""
        place = self.place
        chance = self.logits.softmax(-1).gather(1, place.clamp(min=0)[:, None])[:, 0] * (place >= 0)
        reached = chance.view(-1, self.length).cumprod(1).roll(1, 1)
        reached[:, 0] = 1.0
        weights = reached.reshape(-1) * (place >= 0)
        return weights * (weights >= UNREACHED) * (chance < SURE)

    def accepted(self, head: Bigram) -> Tensor:
        """int64 [drafts]: how many tokens of each draft a greedy target that says the answers accepts."""
        rows = Candidates(self.ids.long().numpy(), self.logits.numpy(), head.after.numpy()[self.ids.numpy()])
        firsts = self.previous.view(-1, self.length)[:, 0].numpy()
        drafted = best_chain(head, rows, firsts, np.full(len(firsts), self.length))
        right = (torch.from_numpy(drafted) == self.said).view(-1, self.length)
        return right.cumprod(1).sum(1)


def record(
    model: Runnable | PackedDecoder | DeviceDecoder, target: ModelInfo, answers: Sequence[Answer], length: int
) -> Chains:
    """Drafts of `length` tokens at every position of the answers, as the engine makes them. Raises DataError where the
    draft model's context leaves no draft."""
    rows = TOGETHER * (max(len(a.prompt) + len(a.ids) for a in answers) + 2 * length + 64)
    drafter = DraftCanvas(model, EngineConfig(kv_tokens=rows, prefix_caching=False))
    parts: list[tuple[Tensor, Tensor]] = []
    tokens: list[tuple[int, int]] = []  # before a row, and of it
    pending = iter(answers)
    while some := list(islice(pending, TOGETHER)):
        for at in range(max(len(a.ids) for a in some)):
            going = [(a, _state(a, at, target)) for a in some if at < len(a.ids)]
            wanted: list[Wanted] = [(state, length) for _, state in going]
            for numbers, given, out in drafter.rows(wanted):
                if any(most < length for _, most in given):
                    continue  # the context ends there
                ids, logits = likeliest(out, (drafter.mask,))
                parts.append((torch.from_numpy(ids).int(), torch.from_numpy(logits)))
                for answer in (going[n][0] for n in numbers):
                    line = (*(answer.prompt[-1], *answer.ids)[at : at + length + 1], *[-1] * length)
                    tokens += pairwise(line[: length + 1])
        for answer in some:
            drafter.release(_state(answer, 0, target))
    if not parts:
        raise DataError(f"no answer leaves {model.info.name} room for a draft of {length} tokens.", param="answers")
    previous, said = torch.tensor(tokens).T
    every = [torch.cat(column) for column in zip(*parts, strict=True)]
    return Chains(every[0], every[1], previous.clamp(min=0), said, length)


def _state(answer: Answer, at: int, target: ModelInfo) -> SequenceState:
    request = Request(answer.key, answer.prompt, SamplingParams(temperature=0.0, max_tokens=len(answer.ids)))
    return SequenceState(request, target, [*answer.prompt, *answer.ids[:at]], seed=0)


class Pairs(Work):
    """A bigram head that learns from drafts along a target's answers.

    model    a masked draft model as the engine runs it; not trained.
    target   whose answers they are.
    answers  learned from; those that are longer than `longest` tokens with their prompts are left out (`left_out`).
    held     measured on at every validation.
    rank     of the head.
    length   tokens of a draft.
    rows     of a batch.

    Raises DataError where no answer is left, or none has anything to learn.
    """

    def __init__(
        self,
        model: Runnable | PackedDecoder | DeviceDecoder,
        target: ModelInfo,
        answers: Sequence[Answer],
        held: Sequence[Answer],
        *,
        rank: int,
        length: int,
        rows: int,
        longest: int,
        seed: int = 0,
    ) -> None:
        room = min(longest, model.info.max_len - length)
        self.answers = [a for a in answers if len(a.prompt) + len(a.ids) <= room]
        self.held = [a for a in held if len(a.prompt) + len(a.ids) <= room]
        self.left_out = len(answers) + len(held) - len(self.answers) - len(self.held)
        if not self.answers or not self.held:
            raise DataError(
                f"{len(self.answers)} answers to learn from and {len(self.held)} to measure on have at most {room} "
                f"tokens with their prompts; both are needed.",
                param="answers",
            )
        self.model = BigramHead(model.info.vocab_size, rank, seed)
        self.rows, self.seed, self.start = rows, seed, [0, 0]
        chains = record(model, target, self.answers, length)
        weights = chains.weights()
        kept = weights.nonzero()[:, 0]
        if not len(kept):
            raise DataError(
                f"{model.info.name} is sure of every token of {len(self.answers)} answers: nothing is left to learn.",
                param="answers",
            )
        self.ids, self.logits = chains.ids[kept].long(), chains.logits[kept]
        self.previous, self.place, self.weights = chains.previous[kept], chains.place[kept], weights[kept]
        self.measured = record(model, target, self.held, length)

    @property
    def steps_of_epoch(self) -> int:
        return -(-len(self.ids) // self.rows)

    def batches(self, position: Any) -> Iterator[tuple[list[int], list[int]]]:
        """Every epoch has each row once, in an order of its own."""
        epoch, start = position
        while True:
            order = list(range(len(self.ids)))
            random.Random(f"pairs/{self.seed}/{epoch}").shuffle(order)
            for at in range(start * self.rows, len(order), self.rows):
                done = at // self.rows + 1
                yield order[at : at + self.rows], [epoch, done] if done < self.steps_of_epoch else [epoch + 1, 0]
            epoch, start = epoch + 1, 0

    def losses(self, batch: list[int], step: int) -> Losses:
        """Mean cross entropy among the candidates, weighted, in nats."""
        at = torch.tensor(batch)
        logits = self.logits[at] + self.model(self.previous[at], self.ids[at])
        found = F.cross_entropy(logits, self.place[at], reduction="none") * self.weights[at]
        return Losses({"token": found.sum() / self.weights[at].sum()}, tokens=len(batch), samples=len(batch))

    def counts(self, batch: list[int]) -> Mapping[str, float]:
        return {"token": float(self.weights[torch.tensor(batch)].sum())}

    @torch.no_grad()
    def validate(self, step: int) -> Mapping[str, Value]:
        """On drafts at every position of the held-out answers.

        validation_loss  nats, of rows and with weights as they are trained on.
        accepted         draft tokens that stand, the mean of all drafts.
        agreement        share of drafts whose first token stands.
        """
        chains = self.measured
        weights, place = chains.weights(), chains.place
        logits = chains.logits + self.model(chains.previous, chains.ids.long())
        nll = F.cross_entropy(logits, place.clamp(min=0), reduction="none") * weights
        accepted = chains.accepted(self.model.head()).float()
        return {
            "validation_loss": (nll.sum() / weights.sum().clamp(min=1e-9)).item(),
            "accepted": accepted.mean().item(),
            "agreement": (accepted > 0).float().mean().item(),
        }
