"""The scale search: which step (and minimum) a group of weights gets. Knows groups of numbers, no tensors of a model.

Minimised is the squared error weighted by `importance` (mean square of each input, or nothing), over a grid of first
guesses of the step. Every guess gives integer codes, the codes give the best step by least squares in closed form, and
the best of all is refined the same way. The plain guess (largest magnitude at the end of the range, no clipping) always
takes part, so the search is never worse than rounding to nearest. Steps and minima are float32 numbers that the stored
type (float16 or float32) holds exactly: the error counts what rounding them costs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dfastllm.errors import UnsupportedError

__all__ = ["Grid", "decode", "encode", "fit"]

HALF_MAX = 65504.0
HALF_TINY = 2.0**-25  # half of the smallest float16 step: a group below it rounds to zeros with any float16 step
FLOAT_TINY = 2.0**-126  # smallest normal float32
REFINEMENTS = 2


@dataclass(frozen=True, slots=True)
class Grid:
    """Integers low..high times a step; with `minimum`, codes 0..high times a step less a minimum.

    half: steps and minima are stored as float16. tries: numbers of steps that the largest magnitude (the range of the
    group where there is a minimum) is guessed to span; negative: the largest magnitude goes to the low end. The search
    with none of them is plain rounding to nearest.
    """

    low: int
    high: int
    minimum: bool = False
    half: bool = True
    tries: tuple[float, ...] = ()


def fit(groups: Tensor, importance: Tensor | None, grid: Grid, name: str = "weight") -> tuple[Tensor, Tensor | None]:
    """groups [m, size] float32 finite, importance the same shape (> 0) or None -> step [m] and minimum [m] (or None).

    Both are float32. A group of zeros has step 0. Raises UnsupportedError naming the tensor when a step or a minimum is
    beyond float16.
    """
    largest = groups.abs().amax(-1)
    reach = HALF_MAX * (1 if grid.minimum else grid.high)
    if grid.half and bool((largest > reach).any()):
        raise UnsupportedError(
            f"{name} holds {largest.max().item():.4g}, beyond {reach:.4g}, the most that float16 scales reach here.",
            param="format",
            hint="Use w8 (float32 scales) or keep this model in bfloat16.",
        )
    # In units of the largest magnitude: squares of extreme weights would leave float32.
    empty = largest < (HALF_TINY if grid.half else FLOAT_TINY)
    unit = torch.where(empty, torch.ones_like(largest), largest)
    scaled = torch.where(empty[:, None], torch.zeros_like(groups), groups / unit[:, None])
    search = _Search(scaled, unit, importance, grid)
    step, minimum = search.affine() if grid.minimum else (search.symmetric(), None)
    step = torch.where(empty, torch.zeros_like(step), step)
    return step, None if minimum is None else torch.where(empty, torch.zeros_like(step), minimum)


def encode(values: Tensor, step: Tensor, minimum: Tensor | None, grid: Grid) -> Tensor:
    """Nearest codes, float32 integers in low..high, of values with a broadcastable step; 0 where the step is 0."""
    shifted = values if minimum is None else values + minimum
    codes = torch.where(step == 0, torch.zeros_like(shifted), shifted / step)
    return codes.round().clamp(0 if grid.minimum else grid.low, grid.high)


def decode(codes: Tensor, step: Tensor, minimum: Tensor | None) -> Tensor:
    """The numbers that codes stand for."""
    return codes * step if minimum is None else codes * step - minimum


def _to_half(value: Tensor) -> Tensor:
    return value.clamp(-HALF_MAX, HALF_MAX).half().float()


def _up_to_half(value: Tensor) -> Tensor:
    """The smallest float16 not below value >= 0."""
    rounded = value.clamp(max=HALF_MAX).half()
    bits = rounded.view(torch.int16)
    above = torch.where((rounded.float() < value) & (bits < 0x7BFF), bits + 1, bits)
    return above.view(torch.float16).float()


class _Search:
    """One call of `fit`. x [m, size]: groups in units of `unit` [m]; steps are kept in absolute numbers."""

    def __init__(self, x: Tensor, unit: Tensor, importance: Tensor | None, grid: Grid) -> None:
        self.x, self.unit, self.grid = x, unit, grid
        self.h = torch.ones_like(x) if importance is None else importance
        self.hx = self.h * x
        # A hair below: the largest code times a float32 step must not round to infinity.
        self._most = torch.finfo(torch.float32).max / grid.high * (1 - 2.0**-22)

    def _stored(self, step: Tensor) -> Tensor:
        """A step in units of the group -> absolute, as it will be stored."""
        absolute = step * self.unit
        return _to_half(absolute) if self.grid.half else absolute.clamp(-self._most, self._most)

    def _error(self, step: Tensor, minimum: Tensor | None) -> Tensor:
        """Weighted squared error [m] in units of the group, of stored (absolute) step and minimum."""
        step = (step / self.unit)[:, None]
        minimum = None if minimum is None else (minimum / self.unit)[:, None]
        found = decode(encode(self.x, step, minimum, self.grid), step, minimum)
        return (self.h * (found - self.x).square()).sum(-1)

    def _plain(self) -> Tensor:
        """Largest magnitude at the end of the range, nothing clipped."""
        step = self.unit / self.grid.high
        if self.grid.half:
            return _up_to_half(step)
        return step.clamp(min=FLOAT_TINY, max=self._most)

    def _least_squares(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Best step [m] for these codes, and how much of the weighted square it explains [m]."""
        cross, square = (self.hx * codes).sum(-1), (self.h * codes.square()).sum(-1)
        square = torch.where(square > 0, square, torch.ones_like(square))
        return cross / square, cross.square() / square

    def symmetric(self) -> Tensor:
        plain = self._plain()
        if not self.grid.tries:
            return plain
        grid, x = self.grid, self.x
        extreme = x.gather(-1, x.abs().argmax(-1, keepdim=True)).squeeze(-1)  # [m], +-1, 0 in an empty group
        best = torch.zeros_like(plain)
        gain = torch.full_like(plain, -1.0)
        for span in grid.tries:
            codes = (x * (extreme * span)[:, None]).round().clamp(grid.low, grid.high)
            step, explained = self._least_squares(codes)
            better = explained > gain
            best, gain = torch.where(better, step, best), torch.where(better, explained, gain)
        best = self._stored(best)
        error = self._error(best, None)
        for _ in range(REFINEMENTS):
            codes = encode(x, (best / self.unit)[:, None], None, grid)
            best, error = self._keep(self._stored(self._least_squares(codes)[0]), None, best, None, error)[::2]
        return self._keep(plain, None, best, None, error)[0]

    def affine(self) -> tuple[Tensor, Tensor]:
        grid, x = self.grid, self.x
        low, high = x.amin(-1), x.amax(-1)
        width = high - low
        plain_min = _to_half(-low * self.unit)
        # Rounding the minimum moves the range: the step must still reach the top.
        plain = _up_to_half(((high * self.unit + plain_min) / grid.high).clamp(min=0))
        best, best_min, error = plain, plain_min, self._error(plain, plain_min)
        if not grid.tries:
            return best, best_min
        # The same with zero inside the range: exact for a group of equal weights, and zero stays zero.
        wide_min = _to_half(-low.clamp(max=0) * self.unit)
        wide = _up_to_half(((high.clamp(min=0) * self.unit + wide_min) / grid.high).clamp(min=0))
        best, best_min, error = self._keep(wide, wide_min, best, best_min, error)
        safe = torch.where(width > 0, width, torch.ones_like(width))
        for span in grid.tries:
            for shift in (0.0, 0.4):
                codes = ((x - low[:, None]) * (span / safe)[:, None] - shift).round().clamp(0, grid.high)
                best, best_min, error = self._keep(*self._two_parameters(codes), best, best_min, error)
        for _ in range(REFINEMENTS):
            codes = encode(x, (best / self.unit)[:, None], (best_min / self.unit)[:, None], grid)
            best, best_min, error = self._keep(*self._two_parameters(codes), best, best_min, error)
        return best, best_min

    def _two_parameters(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Best stored step and minimum [m] for these codes: weighted linear regression of x on the codes."""
        hc = self.h * codes
        n, c, cc = self.h.sum(-1), hc.sum(-1), (hc * codes).sum(-1)
        w, wc = self.hx.sum(-1), (self.hx * codes).sum(-1)
        spread = n * cc - c * c
        flat = spread <= 1e-6 * n * cc
        step = torch.where(flat, torch.zeros_like(w), (n * wc - c * w) / torch.where(flat, torch.ones_like(w), spread))
        return self._stored(step), _to_half((step * c - w) / n * self.unit)

    def _keep(
        self, step: Tensor, minimum: Tensor | None, best: Tensor, best_min: Tensor | None, error: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The better of the two in every group. Without minima the middle one means nothing."""
        new = self._error(step, minimum)
        better = new < error
        kept = best if minimum is None or best_min is None else torch.where(better, minimum, best_min)
        return torch.where(better, step, best), kept, torch.where(better, new, error)
