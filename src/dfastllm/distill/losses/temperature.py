"""The temperature of the divergence, row by row, by how sure the teacher is.

One temperature for all rows smooths too little where the teacher is sure, so that a student sees one token and nothing
of the others, and too much where it is not (Luong et al. 2026, arXiv 2605.20357). Here it falls in a straight line from
`sure`, where the teacher's entropy is 0, to `unsure`, from `ceiling` nats on.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dfastllm.distill.losses.divergence import Teacher, as_teacher
from dfastllm.distill.losses.fused import CHUNK, check_positive

__all__ = ["entropy_temperature", "teacher_entropy"]


@torch.no_grad()
def teacher_entropy(teacher: Tensor | Teacher, chunk: int | None = None) -> Tensor:
    """The entropy of the teacher's next token at temperature 1, in nats, float32 [...]; of a sparse teacher that of its
    buckets, its tail being one of them. A row of which nothing is known has entropy 0.

    teacher  logits [..., V], `Dense` or `Sparse`; chunk: rows at a time, None: about 2 million logits.
    """
    known = as_teacher(teacher)
    whole = teacher if isinstance(teacher, Tensor) else getattr(known, "logits", getattr(known, "logprobs", None))
    assert whole is not None
    step = max(1, CHUNK // whole.shape[-1]) if chunk is None else chunk
    count = math.prod(known.lead)
    out = torch.zeros(count, device=whole.device)
    for at in range(0, count, step):
        rows = torch.arange(at, min(at + step, count), device=whole.device)
        out[rows] = known.entropy(rows, torch.float32)
    return out.view(known.lead)


def entropy_temperature(
    teacher: Tensor | Teacher,
    *,
    sure: float = 3.0,
    unsure: float = 1.0,
    ceiling: float = 3.0,
    chunk: int | None = None,
) -> Tensor:
    """A temperature for every row [...], for `combined_kd_loss` and `token_divergence`:
    sure + (unsure - sure) * min(1, entropy / ceiling).

    teacher, chunk  see `teacher_entropy`.
    sure            the temperature where the teacher has no doubt, above 0.
    unsure          the temperature where its entropy is at least `ceiling`, above 0; it may be above `sure`.
    ceiling         nats, above 0.

    Raises ValidationError for a number out of range.
    """
    check_positive("sure", sure)
    check_positive("unsure", unsure)
    check_positive("ceiling", ceiling)
    return sure + (unsure - sure) * (teacher_entropy(teacher, chunk) / ceiling).clamp(max=1)
