"""The losses of distillation written again from their definitions: float64 numpy, one row after the other, no gradient
by hand, nothing shared with `dfastllm.distill.losses`. And lengths by writing out every answer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Row = NDArray[np.float64]


def softmax(row: Sequence[float] | Row, temperature: float = 1.0) -> Row:
    scaled = np.asarray(row, dtype=np.float64) / temperature
    powers = np.exp(scaled - scaled.max())
    return powers / powers.sum()


def kl(p: Row, q: Row) -> float:
    """KL(p || q) in nats."""
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def divergence(p: Row, q: Row, kind: str, beta: float = 0.5) -> float:
    """p the teacher's distribution, q the student's."""
    if kind == "forward":
        return kl(p, q)
    if kind == "reverse":
        return kl(q, p)
    mixed = beta * p + (1 - beta) * q
    return beta * kl(p, mixed) + (1 - beta) * kl(q, mixed)


def dense(student: Row, teacher: Row, kind: str, temperature: float, beta: float = 0.5) -> float:
    """Logits of one row -> the divergence times the square of the temperature."""
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    return temperature**2 * divergence(p, q, kind, beta)


def sparse(
    student: Row, ids: Sequence[int], logprobs: Sequence[float], kind: str, temperature: float, beta: float = 0.5
) -> float:
    """The same over buckets: the listed ids, and all others together; each tempered by its power 1 / T."""
    q = softmax(student)
    listed = [(id, math.exp(value)) for id, value in zip(ids, logprobs, strict=True) if value > -math.inf]
    theirs = [mass for _, mass in listed]
    ours = [q[id] for id, _ in listed]
    if len(listed) < len(q):
        theirs.append(max(1 - sum(theirs), 1e-7))
        ours.append(sum(mass for id, mass in enumerate(q) if id not in dict(listed)))
    p, q = np.array(theirs) ** (1 / temperature), np.array(ours) ** (1 / temperature)
    return temperature**2 * divergence(p / p.sum(), q / q.sum(), kind, beta)


def cross_entropy(logits: NDArray[np.float64], targets: Sequence[int], weights: Sequence[float]) -> float:
    """The weighted sum over rows of -log softmax(logits)[target]."""
    return sum(
        -weight * math.log(softmax(row)[target])
        for row, target, weight in zip(logits, targets, weights, strict=True)
        if weight > 0
    )


def expected_length(ending: Callable[[tuple[int, ...]], Row], most: int) -> float:
    """E[min(length, most)] of the answers of a model, the ending token counted, by writing out every one of them.

    ending  the tokens before -> the distribution of the next token, the ending token last.
    """
    total = 0.0
    first = ending(())
    for tokens in itertools.product(range(len(first) - 1), repeat=most - 1):
        probability = 1.0
        for at in range(most):
            step = ending(tokens[:at])
            # Answers that share this beginning are counted by the one whose further tokens are all 0.
            if not any(tokens[at:]):
                total += probability * step[-1] * (at + 1)
            if at < most - 1:
                probability *= step[tokens[at]]
        total += probability * (1 - ending(tokens)[-1]) * most
    return total
