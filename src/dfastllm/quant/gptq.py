"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): weights rounded one input at a time, each rounding's error spread over
the inputs not yet rounded so that the layer's output on calibration data changes least.

Minimised: |(W - Q) X|^2 for inputs X, of which only the gram matrix X X^T is needed. Knows one matrix at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dfastllm.errors import ValidationError
from dfastllm.kernels.packed import QTensor
from dfastllm.quant.formats import (
    Format,
    assemble,
    find_format,
    prepared_importance,
    quantise,
    require_divisible,
    require_finite,
)
from dfastllm.quant.scales import decode, encode, fit

__all__ = ["gptq"]

BLOCK = 128  # inputs whose updates are applied to the rest at once: a multiple of every group
DAMPING = 0.01  # share of the mean diagonal added to it


def gptq(
    weight: Tensor,
    format: Format | str,
    gram: Tensor,
    *,
    damping: float = DAMPING,
    act_order: bool = False,
    name: str = "weight",
) -> QTensor:
    """weight [n, k], gram [k, k] = sum of x x^T over calibration rows -> QTensor.

    act_order: inputs with the largest squares are rounded first (their errors have the most inputs left to be spread
    over); scales are then fitted to the weights as they were, else to the weights as updated when a group's turn comes.
    Raises as `quantise` does, and ValidationError for a gram matrix of another size or with NaN or infinity.
    """
    format = find_format(format) if isinstance(format, str) else format
    require_finite(weight, name)
    work = weight.detach().to("cpu", torch.float32, copy=True)
    n, k = work.shape
    require_divisible(format, k, name)
    if tuple(gram.shape) != (k, k) or not bool(gram.isfinite().all()):
        raise ValidationError(f"{name}: gram must be finite [{k}, {k}], got {list(gram.shape)}.", param="gram")
    importance = prepared_importance(gram.diagonal().float(), k, name)
    fixed = quantise(work, format, importance=importance, name=name) if act_order or not format.group else None
    order = gram.diagonal().argsort(descending=True) if act_order else torch.arange(k)
    inverse = _inverse_factor(gram[order][:, order], damping)
    size = format.group or k
    steps = torch.empty(n, k // size)
    mins = torch.empty_like(steps) if format.grid.minimum else None
    if fixed is not None and fixed.scales is not None:
        steps = fixed.scales.float().view(n, -1)
        mins = None if fixed.mins is None else fixed.mins.float()
    codes = torch.empty(n, k, dtype=format.code_dtype)
    work = work[:, order]
    for start in range(0, k, BLOCK):
        stop = min(start + BLOCK, k)
        errors = torch.zeros(n, stop - start)
        for i in range(start, stop):
            column = int(order[i])
            group = column // size
            if fixed is None and column % size == 0:
                span = slice(column, column + size)
                h = importance[span].expand(n, -1)
                steps[:, group], minimum = fit(work[:, span].contiguous(), h, format.grid, name)
                if mins is not None and minimum is not None:
                    mins[:, group] = minimum
            minimum = None if mins is None else mins[:, group]
            code = encode(work[:, i], steps[:, group], minimum, format.grid)
            codes[:, column] = code + format.zero
            error = (work[:, i] - decode(code, steps[:, group], minimum)) / inverse[i, i]
            work[:, i + 1 : stop] -= error[:, None] * inverse[i, i + 1 : stop]
            errors[:, i - start] = error
        work[:, stop:] -= errors @ inverse[start:stop, stop:]
    return assemble(format, codes, steps, mins)


def _inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor [k, k] float32 of the inverse of the damped gram matrix; row i holds how the error of input
    i is spread over the inputs after it. More damping until it can be factored."""
    wide = gram.double()
    diagonal = wide.diagonal()
    mean = float(diagonal.mean()) or 1.0
    diagonal[diagonal == 0] = mean  # an input that is always zero: any rounding will do
    for attempt in range(8):
        damped = wide + torch.eye(len(wide), dtype=torch.float64) * mean * damping * 10**attempt
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            continue
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            factor: Tensor = upper.float()
            return factor
    raise ValidationError("gram is no sum of outer products: it cannot be factored, however damped.", param="gram")
