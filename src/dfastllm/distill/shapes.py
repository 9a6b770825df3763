"""Enumerated shapes: training on the lengths that are met in production, in the shares in which they are met.

A run draws one length for each step and brings the step's batch to it. Keeps no state: what is drawn follows from the
seed and the step alone, so a resumed run goes on as the uninterrupted one would, and all ranks draw the same.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dfastllm.distill.data.collate import OWN_AXIS, TOKEN_ALIGNED
from dfastllm.errors import ValidationError

__all__ = [
    "DEFAULT_MIXES",
    "GOLDEN",
    "RARE_EVERY",
    "SEQUENCE_FILL",
    "fit_batch_to_shape",
    "sample_enumerated_shape",
    "shape_probabilities",
    "truncate_batch_to_shape",
]

GOLDEN = 0.618034  # the golden ratio's fraction: the additive sequence of the least discrepancy
RARE_EVERY = 100  # steps between two at which the rarest shape counts twice
DEFAULT_MIXES: Mapping[int, tuple[float, ...]] = {
    2: (0.7, 0.3),
    3: (0.6, 0.3, 0.1),
    4: (0.5, 0.3, 0.15, 0.05),
}
# The keys of a batch that have one entry a token, [B, T] or [B, T, ...], and what stands where there is no token.
SEQUENCE_FILL: Mapping[str, float] = {
    "input_ids": 0,  # replaced by the padding id
    "attention_mask": 0,
    "loss_mask": 0,
    "position_ids": 0,
    **TOKEN_ALIGNED,
    "teacher_logits": 0.0,
    "student_logits": 0.0,
    "logits": 0.0,
}
_SUM_TOLERANCE = 1e-6

Batch = Mapping[str, Any]


def sample_enumerated_shape(
    seq_lengths: Sequence[int],
    shape_probs: Sequence[float] | None = None,
    step: int | None = None,
    periodic_upweight_rare: bool = True,
    *,
    seed: int = 0,
) -> int:
    """The length that this step trains on: one of `seq_lengths`.

    seq_lengths             lengths in tokens, each once.
    shape_probs             the share of each; None: `DEFAULT_MIXES` for two to four lengths, equal shares otherwise.
    step                    of the optimizer, from 0. None: drawn by torch's own generator, and no length is raised.
    periodic_upweight_rare  at every `RARE_EVERY`th step, 0 included, the least likely length counts twice.
    seed                    of the run; 0 begins at 0.

    The draw is u = frac(offset(seed) + step · 0.618034), a low-discrepancy sequence (Niederreiter, Random Number
    Generation and Quasi-Monte Carlo Methods, 1992, section 3.1): over N steps the share of each length is off by some
    log(N) / N, where independent draws would be off by 1 / sqrt(N). Raises ValidationError as `shape_probabilities`,
    and for a step below 0.
    """
    if step is not None and (isinstance(step, bool) or not isinstance(step, int) or step < 0):
        raise ValidationError(f"step must be a whole number from 0 on, got {step!r}.", param="step")
    raised = periodic_upweight_rare and step is not None and step % RARE_EVERY == 0
    probabilities = shape_probabilities(seq_lengths, shape_probs, raise_rarest=raised)
    if step is None:
        u = float(torch.rand((), dtype=torch.float64))
    else:
        u = (_offset(seed) + step * GOLDEN) % 1.0
    at = bisect.bisect_right(list(itertools.accumulate(probabilities)), u)
    drawable = [i for i, p in enumerate(probabilities) if p > 0]
    return seq_lengths[min(at, drawable[-1])]  # the sum of the shares may fall short of 1 by a rounding


def shape_probabilities(
    seq_lengths: Sequence[int], shape_probs: Sequence[float] | None = None, *, raise_rarest: bool = False
) -> list[float]:
    """The share of each length, checked, summing to 1. raise_rarest: the least likely of those above 0 counts twice.

    Raises ValidationError for lengths that are none, repeat or are not above 0, and for shares that are not as many,
    negative, no numbers, or do not sum to 1.
    """
    if not seq_lengths:
        raise ValidationError("seq_lengths is empty: there is no shape to draw.", param="seq_lengths")
    for length in seq_lengths:
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise ValidationError(f"seq_lengths must be whole numbers above 0, got {length!r}.", param="seq_lengths")
    if len(set(seq_lengths)) != len(seq_lengths):
        raise ValidationError(
            f"seq_lengths names a length twice: {list(seq_lengths)}.",
            param="seq_lengths",
            hint="Name it once, with the sum of its shares.",
        )
    count = len(seq_lengths)
    given = DEFAULT_MIXES.get(count, (1 / count,) * count) if shape_probs is None else tuple(shape_probs)
    if len(given) != count:
        raise ValidationError(
            f"shape_probs has {len(given)} shares for {count} lengths.",
            param="shape_probs",
            hint="Give one share for each length, or leave shape_probs out.",
        )
    for share in given:
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < math.inf:
            raise ValidationError(f"shape_probs must be numbers from 0 on, got {share!r}.", param="shape_probs")
    total = math.fsum(given)
    if abs(total - 1) > _SUM_TOLERANCE:
        raise ValidationError(
            f"shape_probs must sum to 1, got {total:g} from {list(given)}.",
            param="shape_probs",
            hint=f"Divide each by {total:g}." if total else "Give one of them more than 0.",
        )
    if raise_rarest:
        rarest = min((share for share in given if share > 0), default=0.0)
        at = given.index(rarest)
        given = (*given[:at], 2 * rarest, *given[at + 1 :])
        total = math.fsum(given)
    return [share / total for share in given]


def _offset(seed: int) -> float:
    """Where the sequence of this seed begins, in [0, 1): 0 for seed 0, else 53 bits of a hash."""
    if not seed:
        return 0.0
    digest = hashlib.sha256(f"shapes/{seed}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def truncate_batch_to_shape(batch: Batch, length: int) -> dict[str, Any]:
    """The batch with every sequence cut to its first `length` tokens, along dim 1 ([B, T] and [B, T, V] alike).

    What is no sequence is kept as it is: metadata, flags, the teacher's prefix and mask, which have an axis of their
    own. `response_start` never points beyond the end. A batch that is no longer is returned unchanged: nothing is
    lengthened. A cut response has lost its end; `fit_batch_to_shape` never cuts one. Raises ValidationError for a
    length below 1, and for a batch without sequences or with sequences of unequal length.
    """
    _check_length(length)
    names, width = _sequences(batch)
    cut = dict(batch)
    if width <= length:
        return cut
    for name in names:
        cut[name] = batch[name][:, :length]
    if "response_start" in batch:
        cut["response_start"] = batch["response_start"].clamp(max=length)
    return cut


def fit_batch_to_shape(batch: Batch, length: int, *, pad_id: int = 0) -> tuple[dict[str, Any], int]:
    """The batch with rows of exactly `length` tokens, and how many of its rows were dropped.

    A row that is too long loses the beginning of its prompt; one whose response does not fit beside at least one token
    of prompt is dropped whole, so that no response is trained on without its end. A row that is shorter is padded at
    its end (`pad_id`, labels -100, masks 0). A batch of which no row fits is returned with none: its tensors are
    [0, length], and there is nothing to train on. Needs attention_mask (1 on each row's first tokens) and
    response_start. Raises ValidationError as `truncate_batch_to_shape`, and where those two are missing.
    """
    _check_length(length)
    names, _ = _sequences(batch)
    for needed in ("attention_mask", "response_start"):
        if needed not in batch:
            raise ValidationError(
                f"the batch has no {needed}, so it cannot be told what of a row is its prompt.",
                param=needed,
                hint="Make the batch with collate_kd_batch, or use truncate_batch_to_shape.",
            )
    sizes = batch["attention_mask"].sum(1).long()
    starts = batch["response_start"].long()
    kept = torch.nonzero(sizes - starts + 1 <= length).flatten().tolist()
    stops = sizes[kept].tolist()
    parts = [(row, max(0, stop - length), stop) for row, stop in zip(kept, stops, strict=True)]
    fitted = {name: _selected(value, kept, len(sizes)) for name, value in batch.items() if name not in names}
    for name in names:
        fill = pad_id if name == "input_ids" else SEQUENCE_FILL.get(name, 0)
        fitted[name] = _fitted(batch[name], parts, length, fill)
    cuts = torch.tensor([cut for _, cut, _ in parts], dtype=torch.long, device=starts.device)
    fitted["response_start"] = fitted["response_start"] - cuts
    return {name: fitted[name] for name in batch}, len(sizes) - len(kept)


def _fitted(value: torch.Tensor, parts: list[tuple[int, int, int]], length: int, fill: float) -> torch.Tensor:
    """The tokens (row, start, stop) of a sequence [B, T, ...], a row each, as [len(parts), length, ...]."""
    out = value.new_full((len(parts), length, *value.shape[2:]), fill)
    for place, (row, start, stop) in enumerate(parts):
        out[place, : stop - start] = value[row, start:stop]
    return out


def _selected(value: Any, kept: list[int], rows: int) -> Any:
    """The rows `kept` of what has an entry a row; anything else as it is."""
    if isinstance(value, torch.Tensor) and value.ndim and len(value) == rows:
        return value[kept]
    if isinstance(value, list) and len(value) == rows:
        return [value[row] for row in kept]
    return value


def _check_length(length: int) -> None:
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ValidationError(f"a shape's length must be a whole number above 0, got {length!r}.", param="length")


def _sequences(batch: Batch) -> tuple[list[str], int]:
    """The names of a batch's sequences and how many tokens they have. A tensor of at least two dimensions that has the
    batch's rows and tokens is one under any name, but for the two that have an axis of their own."""
    tensors = {
        name: value
        for name, value in batch.items()
        if isinstance(value, torch.Tensor) and value.ndim >= 2 and name not in OWN_AXIS
    }
    known = [name for name in SEQUENCE_FILL if name in tensors]
    if not known:
        raise ValidationError(
            f"the batch has no sequence: its keys are {', '.join(map(str, batch)) or 'none'}.",
            param="batch",
            hint=f"A sequence is one of {', '.join(SEQUENCE_FILL)}, a tensor [rows, tokens] or [rows, tokens, ...].",
        )
    shape = tuple(tensors[known[0]].shape[:2])
    for name in known:
        if tuple(tensors[name].shape[:2]) != shape:
            raise ValidationError(
                f"{name} is {list(tensors[name].shape[:2])} rows by tokens, but {known[0]} is {list(shape)}.",
                param=name,
                hint="All sequences of a batch have the same rows and tokens.",
            )
    return [name for name, value in tensors.items() if tuple(value.shape[:2]) == shape], shape[1]
