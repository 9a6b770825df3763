"""Teaching a draft model its target's distributions on the target's own answers (DistillSpec, Zhou et al. 2023, arXiv
2310.08461): what is accepted of a draft follows from how near the two are where the target really goes.

The divergence is taken at the temperature at which the target is asked. Of the target either the whole distribution is
known, from a forward of its weights beside the draft's, or its likeliest tokens, as the answers' file has them; where
nothing is known of a token (the end of such an answer), the draft learns the token itself.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dfastllm.distill.losses.divergence import Dense, Divergence, Sparse, Teacher
from dfastllm.distill.losses.fused import CHUNK, Hidden, RowTerms, check_divergence, row_terms
from dfastllm.distill.students.answers import Answer
from dfastllm.errors import ContextLengthError, DataError
from dfastllm.models import Decoder
from dfastllm.train.data import Example, buckets
from dfastllm.train.objectives import Causal, Rows, short_attention
from dfastllm.train.work import Losses, Value, Work

__all__ = ["Alignment"]

HEAD_CHUNK = 1 << 24  # logits at a time: each time costs a pass over the head's gradient, so fewer than by default
MOST_LOST = 0.98  # of a target's probability that may lie on tokens that are not listed
WINDOW = 1024  # answers sorted together by length, so that a batch has little padding
Batch = tuple[int, ...]  # numbers of the answers in it


class Alignment(Work):
    """A draft that learns from a target's answers.

    draft        trained; float32.
    target       gives whole distributions, without gradient; None: the answers' `top` do.
    answers      learned from; those longer than `longest` tokens are left out (`left_out` counts them).
    held         measured at every validation.
    temperature  of both distributions; answers that were made greedily have none, so 1 is taken then.
    kind         which divergence.
    tokens       of a batch, padding included.
    longest      None: the draft's context.
    bf16         matrix products in bfloat16 (autocast).
    shortlist    the only tokens that the draft will say (`models.shortlist`), int64 [n] ascending: the head is computed
                 for these alone, and what the target says beside them is left out of its distributions. None: all.
    frozen       the embedding, and a head that is tied to it, stay as they are.

    Raises DataError where no answer is left or the answers lack what the target would tell, ContextLengthError where
    the draft's context is shorter than `longest`.
    """

    def __init__(
        self,
        draft: Decoder,
        target: Decoder | None,
        answers: Sequence[Answer],
        held: Sequence[Answer],
        *,
        temperature: float = 1.0,
        kind: Divergence = "forward",
        tokens: int = 2048,
        longest: int | None = None,
        seed: int = 0,
        bf16: bool = False,
        shortlist: Tensor | None = None,
        frozen: bool = False,
    ) -> None:
        check_divergence(kind, 0.5)
        longest = draft.config.max_len if longest is None else longest
        if longest > draft.config.max_len:
            raise ContextLengthError(
                f"answers of up to {longest} tokens; the draft's context is {draft.config.max_len}.",
                param="longest",
                hint="Lower longest.",
            )
        self.model, self.target = draft, target
        self.answers = [a for a in answers if len(a.prompt) + len(a.ids) <= longest]
        self.held = [a for a in held if len(a.prompt) + len(a.ids) <= longest]
        self.left_out = len(answers) + len(held) - len(self.answers) - len(self.held)
        if not self.answers or not self.held:
            raise DataError(
                f"{len(self.answers)} answers to learn from and {len(self.held)} to measure on have at most {longest} "
                f"tokens with their prompts; both are needed.",
                param="answers",
            )
        if target is None and any(a.top is None for a in (*self.answers, *self.held)):
            raise DataError(
                "an answer without the target's likeliest tokens, and no target to ask.",
                param="answers",
                hint="Give the target, or collect answers with its likeliest tokens.",
            )
        self.temperature = temperature or 1.0
        self.kind, self.tokens, self.seed, self.bf16 = kind, tokens, seed, bf16
        self.start = [0, 0]  # epoch, batch in it
        pad = draft.info.eos_ids[0] if draft.info.pad_id is None else draft.info.pad_id
        self.objective = Causal(pad)
        self.vocabulary = draft.config.vocab_size  # padding beyond the other's is cut off
        if target is not None:
            self.vocabulary = min(self.vocabulary, target.config.vocab_size)
        self.shortlist = None if shortlist is None else shortlist[shortlist < self.vocabulary].to(draft.device)
        self.columns = torch.arange(draft.config.vocab_size, device=draft.device)  # token -> column of the head, or -1
        if self.shortlist is not None:
            self.vocabulary = len(self.shortlist)
            self.columns = torch.full_like(self.columns, -1)
            self.columns[self.shortlist] = torch.arange(self.vocabulary, device=draft.device)
        if frozen:
            draft.embed.weight.requires_grad_(False)

    def batches(self, position: Any) -> Iterator[tuple[Batch, list[int]]]:
        """Every epoch has each answer once, in an order of its own."""
        epoch, start = position
        while True:
            cut = self._epoch(epoch)
            for i in range(start, len(cut)):
                yield cut[i], [epoch, i + 1] if i + 1 < len(cut) else [epoch + 1, 0]
            epoch, start = epoch + 1, 0

    def _epoch(self, epoch: int) -> list[Batch]:
        rng = random.Random(f"align/{self.seed}/{epoch}")
        order = list(range(len(self.answers)))
        rng.shuffle(order)
        found: list[Batch] = []
        for at in range(0, len(order), WINDOW):
            window = sorted(order[at : at + WINDOW], key=lambda i: (self._cost(i), i))
            found += buckets(window, self._cost, self.tokens)
        rng.shuffle(found)
        return found

    def _cost(self, number: int) -> int:
        answer = self.answers[number]
        return len(answer.prompt) + len(answer.ids)

    @property
    def steps_of_epoch(self) -> int:
        """Batches of the first epoch."""
        return len(self._epoch(0))

    def losses(self, batch: Batch, step: int) -> Losses:
        """Mean divergence in nats (times the square of the temperature) and, of tokens of which no distribution is
        known, their cross entropy."""
        some = [self.answers[i] for i in batch]
        rows = self._rows(some)
        with self._autocast():
            hidden, teacher, _ = self._forward(rows, some)
            found = self._terms(self._student(hidden), rows, teacher)
        known = teacher.present(hidden.shape[:1])
        count = len(known)
        terms = {"divergence": found.divergence.sum() / count}
        alone = ~known & (self.columns[rows.targets] >= 0)
        if bool(alone.any()):
            terms["token"] = ((found.logsumexp - found.picked[:, 0]) * alone).sum() / count
        return Losses(terms, tokens=rows.batch * rows.length, samples=rows.batch)

    def counts(self, batch: Batch) -> Mapping[str, float]:
        tokens = float(sum(len(self.answers[i].ids) for i in batch))
        return {"divergence": tokens, "token": tokens}

    @torch.no_grad()
    def validate(self, step: int) -> Mapping[str, Value]:
        """On the held-out answers, means over their tokens.

        validation_loss  the divergence, as it is trained on.
        cross_entropy    nats of the answers' own tokens, of those that are listed; its exponential is the perplexity.
        agreement        how often the likeliest token is the same: what a greedy draft's token is accepted by. One that
                         is not listed is never the draft's.
        overlap          sum over the vocabulary of the lesser probability: what a drawn one is accepted by (Leviathan
                         et al. 2023); only where whole distributions are known, and every token is listed.
        """
        sums = {"validation_loss": 0.0, "agreement": 0.0, "overlap": 0.0}
        entropy, count, tokens = 0.0, 0, 0
        chunk = max(1, CHUNK // self.vocabulary)
        order = sorted(self.held, key=lambda a: len(a.prompt) + len(a.ids))
        for some in buckets(order, lambda a: len(a.prompt) + len(a.ids), self.tokens):
            rows = self._rows(some)
            with self._autocast():
                hidden, teacher, best = self._forward(rows, some)
                student = self._student(hidden)
                found = self._terms(student, rows, teacher)
                known = teacher.present(hidden.shape[:1])
                sums["validation_loss"] += found.divergence.sum().item()
                listed = self.columns[rows.targets] >= 0
                entropy += (found.logsumexp - found.picked[:, 0])[listed].sum().item()
                for at in range(0, len(known), chunk):
                    part = slice(at, at + chunk)
                    logits = student.head(student.rows[part]).float()
                    sums["agreement"] += (logits.argmax(-1) == best[part])[known[part]].sum().item()
                    if isinstance(teacher, Dense):
                        ours, theirs = (
                            (x / self.temperature).softmax(-1) for x in (logits, teacher.logits[part].float())
                        )
                        sums["overlap"] += torch.minimum(ours, theirs).sum().item()
                count, tokens = count + int(known.sum()), tokens + int(listed.sum())
        means: dict[str, Value] = {name: total / max(count, 1) for name, total in sums.items()}
        means["cross_entropy"] = entropy / tokens
        if self.target is None or self.shortlist is not None:
            del means["overlap"]
        return means

    def _rows(self, some: Sequence[Answer]) -> Rows:
        examples = [Example(a.prompt, a.ids, 0) for a in some]
        return self.objective.rows(examples, torch.Generator()).to(str(self.model.device))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bf16)

    def _forward(self, rows: Rows, some: Sequence[Answer]) -> tuple[Tensor, Teacher, Tensor]:
        """The draft's hidden rows that predict the answers' tokens [n, hidden], what is known of the target's, and the
        column of the target's best token [n], -1 where it is not listed."""
        attend = short_attention(rows)
        if self.target is None:
            told = _listed(some, rows.ids.device)
            best = told.ids.gather(1, told.logprobs.argmax(-1, keepdim=True))[:, 0]
            teacher: Teacher = told if self.shortlist is None else self._within(told)
        else:
            with torch.no_grad():
                logits = self.target.head(self.target(rows.ids, rows.positions, attend)[rows.wanted])
                logits = logits[:, : len(self.columns)]
                best = logits.argmax(-1)
                teacher = Dense(logits[:, : self.vocabulary] if self.shortlist is None else logits[:, self.shortlist])
        hidden: Tensor = self.model(rows.ids, rows.positions, attend)[rows.wanted]
        return hidden, teacher, self.columns[best]

    def _within(self, told: Sparse) -> Sparse:
        """The target's distributions given that its token is listed, by columns of the head. Where nearly all that it
        told is not listed nothing is known."""
        columns = self.columns[told.ids]
        listed = columns >= 0
        lost = told.logprobs.masked_fill(listed, -torch.inf).exp().sum(-1, keepdim=True)
        inside = told.logprobs.masked_fill(~listed, -torch.inf) - torch.log1p(-lost.clamp(max=MOST_LOST))
        return Sparse(columns.clamp(min=0), inside.masked_fill(lost > MOST_LOST, -torch.inf))

    def _terms(self, student: Hidden, rows: Rows, teacher: Teacher) -> RowTerms:
        picks = self.columns[rows.targets].clamp(min=0)[:, None]
        chunk = max(1, HEAD_CHUNK // self.vocabulary)
        return row_terms(
            student, picks=picks, teacher=teacher, temperature=self.temperature, kind=self.kind, chunk=chunk
        )

    def _student(self, hidden: Tensor) -> Hidden:
        own = Hidden.of(self.model, hidden)
        if self.shortlist is not None:
            weight = self.model.embed.weight if self.model.lm_head is None else self.model.lm_head.weight
            program = self.model.program
            return Hidden.linear(hidden * program.logits_factor, weight[self.shortlist], softcap=program.logits_softcap)
        if own.vocabulary == self.vocabulary:
            return own
        return Hidden(hidden, lambda x: own.head(x)[:, : self.vocabulary], own.parameters, self.vocabulary)


def _listed(some: Sequence[Answer], device: torch.device) -> Sparse:
    """The likeliest tokens of all rows, in one width."""
    tops = [a.top for a in some if a.top is not None]
    width = max(ids.shape[1] for ids, _ in tops)
    ids = torch.cat([F.pad(ids, (0, width - ids.shape[1])) for ids, _ in tops])
    logprobs = torch.cat([F.pad(v, (0, width - v.shape[1]), value=-torch.inf) for _, v in tops])
    return Sparse(ids.long().to(device), logprobs.to(device))
