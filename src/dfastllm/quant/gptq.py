"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): weights rounded one input at a time, each rounding's error spread over
the inputs not yet rounded so that the layer's output on calibration data changes least.

Minimised: |(W - Q) X|^2 for inputs X, of which only the gram matrix X X^T is needed. Knows one matrix at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dfastllm.errors import UnsupportedError, ValidationError
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

ROWS = 2048  # output channels worked on at once
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
    Raises as `quantise` does, UnsupportedError for w4r, and ValidationError for a gram matrix of another size or with
    NaN or infinity.
    """
    format = find_format(format) if isinstance(format, str) else format
    if format.stepped:
        raise UnsupportedError(
            f"{name}: GPTQ does not round to {format.name}, whose steps share a scale of the channel.",
            param="format",
            hint="Take w4m or w4.",
        )
    require_finite(weight, name)
    n, k = weight.shape
    require_divisible(format, k, name)
    if tuple(gram.shape) != (k, k) or not bool(gram.isfinite().all()):
        raise ValidationError(f"{name}: gram must be finite [{k}, {k}], got {list(gram.shape)}.", param="gram")
    squares = gram.diagonal().float()
    prepared_importance(squares, k, name)
    order = squares.argsort(descending=True) if act_order else torch.arange(k)
    spread = _Spread(format, squares, order, _inverse_factor(gram[order][:, order], damping), name)
    codes = torch.empty(n, k, dtype=format.code_dtype)
    steps = torch.empty(n, k // (format.group or k))
    mins = torch.empty_like(steps) if format.grid.minimum else None
    for at in range(0, n, ROWS):
        part = weight[at : at + ROWS].detach().to("cpu", torch.float32)
        found, step, minimum = spread.fixed(part) if act_order or not format.group else spread.in_order(part)
        codes[at : at + ROWS] = found.T
        steps[at : at + ROWS] = step.T
        if mins is not None and minimum is not None:
            mins[at : at + ROWS] = minimum.T
    return assemble(format, codes, steps, mins)


@dataclass(frozen=True, eq=False)
class _Spread:
    """GPTQ on some rows of one matrix (rows do not depend on one another), transposed: an input's weights lie together.

    order [k]: inputs in the order they are rounded. inverse [k, k]: see `_inverse_factor`, in that order. Both methods:
    part [r, k] float32 -> codes as stored [k, r] (natural order), steps [groups, r], minima [groups, r] or None.
    """

    format: Format
    squares: Tensor
    order: Tensor
    inverse: Tensor
    name: str

    def fixed(self, part: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """With the scales that the weights have before anything is spread."""
        plain = quantise(part, self.format, importance=self.squares, name=self.name)
        assert plain.scales is not None  # every format of the table has them
        steps = plain.scales.float().view(len(part), -1).T.contiguous()
        mins = None if plain.mins is None else plain.mins.float().T.contiguous()
        return self._run(part, steps, mins, fitted=True), steps, mins

    def in_order(self, part: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """With the scales fitted to a group's weights when its turn comes."""
        steps = torch.empty(part.shape[1] // self.format.group, len(part))
        mins = torch.empty_like(steps) if self.format.grid.minimum else None
        return self._run(part, steps, mins, fitted=False), steps, mins

    def _run(self, part: Tensor, steps: Tensor, mins: Tensor | None, *, fitted: bool) -> Tensor:
        k, r = part.shape[1], part.shape[0]
        size = self.format.group or k
        importance = prepared_importance(self.squares, k, self.name)
        work = part.T[self.order].contiguous()  # [k, r]
        codes = torch.empty(k, r)
        columns, diagonal = self.order.tolist(), self.inverse.diagonal().tolist()
        for start in range(0, k, BLOCK):
            stop = min(start + BLOCK, k)
            errors = torch.empty(stop - start, r)
            for i in range(start, stop):
                group = columns[i] // size
                if not fitted and columns[i] % size == 0:
                    h = importance[i : i + size].expand(r, -1)
                    steps[group], minimum = fit(work[i : i + size].T.contiguous(), h, self.format.grid, self.name)
                    if mins is not None and minimum is not None:
                        mins[group] = minimum
                minimum = None if mins is None else mins[group]
                code = encode(work[i], steps[group], minimum, self.format.grid)
                codes[columns[i]] = code
                error = (work[i] - decode(code, steps[group], minimum)) / diagonal[i]
                work[i + 1 : stop].addr_(self.inverse[i, i + 1 : stop], error, alpha=-1)
                errors[i - start] = error
            work[stop:].addmm_(self.inverse[start:stop, stop:].T, errors, alpha=-1)
        return codes.add_(self.format.zero)


def _inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor [k, k] float32 of the inverse of the damped gram matrix; row i holds how the error of input
    i is spread over the inputs after it. More damping until it can be factored."""
    wide = gram.double()
    diagonal = wide.diagonal()
    mean = float(diagonal.mean()) or 1.0
    diagonal[diagonal == 0] = mean  # an input that is always zero: any rounding will do
    share = 0.0
    for attempt in range(8):
        diagonal += mean * (damping * 10**attempt - share)
        share = damping * 10**attempt
        found, failed = torch.linalg.cholesky_ex(wide)
        if failed:
            continue
        found = torch.cholesky_inverse(found)  # one name: each is as large as the gram matrix twice
        found, failed = torch.linalg.cholesky_ex(found, upper=True)
        if not failed:
            factor: Tensor = found.float()
            return factor
    raise ValidationError("gram is no sum of outer products: it cannot be factored, however damped.", param="gram")
