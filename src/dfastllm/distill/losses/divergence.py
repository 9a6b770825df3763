"""How far a student's distribution of the next token is from its teacher's: forward KL, reverse KL, Jensen-Shannon.

Written for a chunk of rows, with the gradient by hand, so that `fused` can go through any number of rows in the memory
of one chunk. The teacher is dense (all its logits) or sparse (its best tokens, as an API returns them; what they leave
is one more bucket). Keeps no state and knows no batch.

With P the teacher's and Q the student's distribution of a row, both at temperature T:

- forward  KL(P||Q), which covers all that the teacher might say (Hinton et al. 2015, arXiv 1503.02531).
- reverse  KL(Q||P), which keeps to what the teacher is likely to say (MiniLLM, Gu et al. 2023, arXiv 2306.08543).
- jsd      beta KL(P||M) + (1 - beta) KL(Q||M) with M = beta P + (1 - beta) Q (GKD, Agarwal et al. 2023, arXiv
           2306.13649). Bounded; like forward for a beta near 0 and like reverse for one near 1.

All are in nats and multiplied by T squared, which keeps the size of gradients when T changes (Hinton et al. 2015).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dfastllm.errors import ValidationError

__all__ = ["DIVERGENCES", "Dense", "Divergence", "Sparse", "Teacher", "as_teacher", "between", "take_rows"]

Divergence = Literal["forward", "reverse", "jsd"]
DIVERGENCES: tuple[Divergence, ...] = ("forward", "reverse", "jsd")

# What counts as the logarithm of a probability of zero. Its exponential is zero in float32 and float64, and it is
# finite, so that an id which one side can never say costs much and not infinitely much.
_NEVER = -1e4
# The least mass of what a sparse teacher did not list: float32 log-probabilities cannot tell less from nothing.
_LEAST_TAIL = 1e-7
_SLACK = 1e-3  # by how much listed probabilities may sum to more than 1, as rounded ones do


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x [..., size], rows [n] int64 flat indices into its leading dims -> a copy of these rows [n, size]. Needs no
    contiguous x."""
    if x.dim() == 2:
        return x[rows]
    return x[torch.unravel_index(rows, x.shape[:-1])]


@dataclass(frozen=True)
class Dense:
    """A teacher of which every logit is known.

    logits  [..., V] of any float dtype; -inf for an id that it can never say.
    """

    logits: Tensor

    @property
    def lead(self) -> torch.Size:
        """The shape of its rows, [...]."""
        return self.logits.shape[:-1]

    def check(self, lead: torch.Size, vocabulary: int) -> None:
        """Raises ValidationError for other rows than `lead` or another vocabulary than the student's."""
        _check_lead(self.lead, lead)
        if self.logits.shape[-1] != vocabulary:
            raise ValidationError(
                f"The teacher's logits have a vocabulary of {self.logits.shape[-1]}, the student's of {vocabulary}.",
                param="teacher_logits",
                hint="Dense distillation needs one vocabulary; cut padding off, or give the teacher's top ids.",
            )

    def present(self, lead: torch.Size) -> Tensor:
        """[rows] bool, flat: the rows of which a distribution is known, here all. Raises ValidationError for other rows
        than `lead`."""
        _check_lead(self.lead, lead)
        return torch.ones(math.prod(self.lead), dtype=torch.bool, device=self.logits.device)

    def entropy(self, rows: Tensor, wide: torch.dtype) -> Tensor:
        """[n] nats, at temperature 1."""
        log_p = take_rows(self.logits, rows).to(wide).log_softmax(-1).clamp_(min=_NEVER)
        return -(log_p.exp() * log_p).sum(-1)

    def divergence(
        self, z: Tensor, rows: Tensor, temperature: Tensor, kind: Divergence, beta: float, slope: bool
    ) -> tuple[Tensor, Tensor | None]:
        """z [n, V] the student's logits of these rows [n], temperature [n, 1] -> the divergences [n] and, where
        `slope`, their derivatives by z [n, V]."""
        log_q = (z / temperature).log_softmax(-1)
        log_p = take_rows(self.logits, rows).to(z.dtype).div_(temperature).log_softmax(-1)
        value, by_logits = between(log_p, log_q, kind, beta, slope)
        # The derivative by z is that by z / T, divided by T.
        return value * temperature[:, 0].square(), None if by_logits is None else by_logits.mul_(temperature)


@dataclass(frozen=True)
class Sparse:
    """A teacher of which the log-probabilities of some ids are known. The ids that it did not list are one bucket, on
    both sides, with the mass that the listed ones leave: taking the listed ones for all there is would teach a student
    to be too sure (Anshumann et al. 2025, arXiv 2503.16870).

    Above temperature 1 the buckets are tempered, on both sides alike, since nobody knows what the teacher's unlisted
    tokens would be at another temperature: a bucket's mass becomes its power 1/T, and all are normalised. So the
    divergence is 0 exactly where student and teacher agree on every bucket.

    ids       [..., K] integers; anything where the log-probability is -inf.
    logprobs  [..., K] at temperature 1, in nats; -inf where fewer than K are known. A row with none has no
              distribution: its divergence is 0.
    """

    ids: Tensor
    logprobs: Tensor

    @property
    def lead(self) -> torch.Size:
        """The shape of its rows, [...]."""
        return self.ids.shape[:-1]

    def check(self, lead: torch.Size, vocabulary: int) -> None:
        """Raises ValidationError for other rows than `lead`, ids outside the student's vocabulary or listed twice, and
        numbers that are no log-probabilities."""
        if self.ids.shape != self.logprobs.shape or not self.ids.shape[-1:].numel():
            raise ValidationError(
                f"A sparse teacher has ids and log-probabilities of one shape [..., K] with K at least 1, got "
                f"{tuple(self.ids.shape)} and {tuple(self.logprobs.shape)}.",
                param="teacher_logits",
            )
        _check_lead(self.lead, lead)
        known = self._known()
        if bool((known & ((self.ids < 0) | (self.ids >= vocabulary))).any()):
            raise ValidationError(
                f"The teacher lists ids outside the student's vocabulary of {vocabulary}.",
                param="teacher_logits",
                hint="Teacher and student need one tokenizer.",
            )
        masses = self.logprobs.double().exp().sum(-1)
        if bool(self.logprobs.isnan().any()) or bool((masses > 1 + _SLACK).any()):
            raise ValidationError(
                f"The teacher's listed probabilities sum to {masses.max().item():.4g} in one row, above 1.",
                param="teacher_logits",
                hint="They must be natural logarithms at temperature 1, not logits.",
            )
        away = (
            torch.arange(self.ids.shape[-1], device=self.ids.device) - self.ids.shape[-1]
        )  # unlike each other and ids
        listed = torch.where(known, self.ids, away).sort(-1).values
        if bool((listed[..., 1:] == listed[..., :-1]).any()):
            raise ValidationError("The teacher lists an id twice in one row.", param="teacher_logits")

    def _known(self) -> Tensor:
        return self.logprobs > -torch.inf

    def present(self, lead: torch.Size) -> Tensor:
        """[rows] bool, flat: the rows of which a distribution is known. Raises ValidationError for other rows than
        `lead`."""
        _check_lead(self.lead, lead)
        return self._known().any(-1).flatten()

    def _buckets(self, rows: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
        """ids [n, K] and the log-masses of their buckets and of the tail [n, K + 1]."""
        ids, logprobs = take_rows(self.ids, rows).long(), take_rows(self.logprobs, rows).to(wide)
        tail = (1 - logprobs.exp().sum(-1, keepdim=True)).clamp_(min=_LEAST_TAIL).log_()
        return ids, torch.cat((logprobs, tail), -1)

    def entropy(self, rows: Tensor, wide: torch.dtype) -> Tensor:
        """[n] nats of the buckets, at temperature 1: at most the teacher's own."""
        log_p = self._buckets(rows, wide)[1].log_softmax(-1).clamp_(min=_NEVER)
        return -(log_p.exp() * log_p).sum(-1)

    def divergence(
        self, z: Tensor, rows: Tensor, temperature: Tensor, kind: Divergence, beta: float, slope: bool
    ) -> tuple[Tensor, Tensor | None]:
        """As `Dense.divergence`, over the buckets."""
        ids, teacher = self._buckets(rows, z.dtype)
        known = teacher[:, :-1] > -torch.inf
        size = z.shape[1]
        listed = torch.zeros(len(z), size + 1, dtype=torch.bool, device=z.device)
        listed.scatter_(1, torch.where(known, ids, size), True)  # the last column takes what is not known
        rest = z.masked_fill(listed[:, :size], -torch.inf)
        tail = rest.logsumexp(-1, keepdim=True)
        ids = torch.where(known, ids, 0)
        masses = torch.cat((z.gather(1, ids).masked_fill(~known, -torch.inf), tail), -1)
        # Where every id of the vocabulary is listed there is no tail, on neither side.
        teacher[:, -1:].masked_fill_(tail == -torch.inf, -torch.inf)
        log_q, log_p = (masses / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
        value, by_masses = between(log_p, log_q, kind, beta, slope)
        value = value * temperature[:, 0].square()
        if by_masses is None:
            return value, None
        by_masses.mul_(temperature)
        by_logits = rest.sub_(tail.clamp(min=_NEVER)).exp_().mul_(by_masses[:, -1:])
        return value, by_logits.scatter_add_(1, ids, by_masses[:, :-1].masked_fill(~known, 0))


Teacher = Dense | Sparse


def as_teacher(given: Tensor | Teacher) -> Teacher:
    """A tensor [..., V] is a dense teacher's logits."""
    return Dense(given) if isinstance(given, Tensor) else given


def _check_lead(got: torch.Size, wanted: torch.Size) -> None:
    if got != wanted:
        raise ValidationError(
            f"The teacher's rows have the shape {tuple(got)}, the student's {tuple(wanted)}.",
            param="teacher_logits",
            hint="Row t of both must predict the same token.",
        )


def between(log_p: Tensor, log_q: Tensor, kind: Divergence, beta: float, slope: bool) -> tuple[Tensor, Tensor | None]:
    """The divergences [n] of rows of log-probabilities [n, size], P the teacher's and Q the student's, and where
    `slope` their derivatives by the logits of Q. Overwrites both."""
    log_p, log_q = log_p.clamp_(min=_NEVER), log_q.clamp_(min=_NEVER)
    if kind == "forward":
        p = log_p.exp()
        value = log_p.sub_(log_q).mul_(p).sum(-1)
        return value, log_q.exp_().sub_(p) if slope else None
    if kind == "reverse":
        excess = log_q - log_p
        q = log_q.exp_()
        value = own = (q * excess).sum(-1)
    else:
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        excess = (log_q - log_m).mul_(1 - beta)
        q = log_q.exp_()
        own = (q * excess).sum(-1)
        p = log_p.exp()
        value = own + beta * log_p.sub_(log_m).mul_(p).sum(-1)
    # The derivative of sum q f(q) by the logits is q (f - sum q f); what f's own dependence on q adds cancels.
    return value, q.mul_(excess.sub_(own[:, None])) if slope else None
