"""The search for two-level scales: each group of 32 weights has a whole-numbered step of 1 to 16 times its channel's
scale and a zero among its 16 codes (the natural form w4s of `dfastllm.kernels.packed`).

A weight is (code - zero) * step * scale, and (code - zero) * step fits a signed byte. Minimised is the squared error of
a whole channel, weighted by `importance`: for some guesses of the scale every group takes the best of the steps and
zeros around what its range asks for; the whole numbers found give the best scale in closed form, and around that the
groups choose once more. Plain rounding, which clips nothing, always takes part.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dfastllm.quant.scales import Grid

__all__ = ["STEPPED", "STEPS", "Stepped", "fit_stepped"]

GROUP = 32
CODES = 15  # the highest
STEPPED = Grid(0, CODES, half=False)  # what `fit_stepped` rounds to, short of its zeros
STEPS = 16  # the widest step
_TINY = 2.0**-126  # smallest normal float32: a channel below it is zero
_WIDEST = (16.0, 14.4, 13.0)  # guesses: steps of the widest group of a channel
_NEARLY = 1e-4  # a range of 5.00001 steps takes 5
_SHRUNK = 0.97  # a range is guessed to span a little less than it does: clipping its ends pays


@dataclass(frozen=True, slots=True)
class Stepped:
    """codes float32 [m, groups, 32] of whole numbers 0 to 15, steps (1 to 16) and zeros (0 to 15) float32 [m, groups],
    scale float32 [m]."""

    codes: Tensor
    steps: Tensor
    zeros: Tensor
    scale: Tensor

    @property
    def sides(self) -> Tensor:
        """uint8 [m, groups]: step - 1 in the low four bits, zero in the high ones."""
        return (self.steps - 1 + 16 * self.zeros).to(torch.uint8)


def fit_stepped(rows: Tensor, importance: Tensor | None, search: bool) -> Stepped:
    """rows float32 [m, k] finite, k a multiple of 32; importance [k] (> 0) or None: all alike. search False: plain
    rounding. A row follows from itself alone."""
    m, k = rows.shape
    largest = rows.abs().amax(-1)
    empty = largest < _TINY
    unit = torch.where(empty, torch.ones_like(largest), largest)  # squares of extreme weights would leave float32
    x = torch.where(empty[:, None], torch.zeros_like(rows), rows / unit[:, None]).view(m, k // GROUP, GROUP)
    h = torch.ones(1, k // GROUP, GROUP) if importance is None else importance.view(1, -1, GROUP)
    found = _Search(x, h.to(x.device)).best(search)
    most = torch.finfo(torch.float32).max / 128
    scale = torch.where(empty, torch.zeros_like(unit), (found.scale * unit).clamp(max=most))
    return Stepped(found.codes, found.steps, found.zeros, scale)


class _Search:
    """x [m, groups, 32] within [-1, 1]; h: weights of the squared error, the shape of a row."""

    def __init__(self, x: Tensor, h: Tensor) -> None:
        self.x, self.h, self.hx = x, h, h * x
        self.low, self.high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
        self.span = (self.high - self.low) / CODES  # the step that clips nothing, [m, groups]

    def best(self, search: bool) -> Stepped:
        # A group of weights that are all far above zero needs more of the signed byte than 15 steps.
        widest, far = self.span.amax(-1), torch.maximum(self.high, -self.low).amax(-1) / 127
        best = self._plain(torch.maximum(widest / STEPS, far))
        if not search:
            return best
        gain = self._gain(best)
        for guess in _WIDEST:
            found = self._fitted(self._around(_SHRUNK * torch.maximum(widest / guess, far)))
            best, gain = self._better(best, gain, found)
        for _ in range(2):
            best, gain = self._better(best, gain, self._fitted(self._around(best.scale)))
        return best

    def _plain(self, scale: Tensor) -> Stepped:
        """Each group the least step that reaches over its range."""
        safe = _positive(scale)[:, None]
        steps = (self.span / safe - _NEARLY).ceil().clamp(1, STEPS)
        zeros = (-self.low / (steps * safe)).round().clamp(0, CODES)
        return Stepped(self._codes(scale, steps, zeros), steps, zeros, scale)

    def _codes(self, scale: Tensor, steps: Tensor, zeros: Tensor) -> Tensor:
        """The nearest codes whose distance from zero, in steps, is a signed byte."""
        least = (zeros - torch.floor(128 / steps)).clamp(min=0)[..., None]
        most = (zeros + torch.floor(127 / steps)).clamp(max=CODES)[..., None]
        wide = _positive(scale)[:, None] * steps
        return torch.minimum(torch.maximum((self.x / wide[..., None]).round_() + zeros[..., None], least), most)

    def _around(self, scale: Tensor) -> Stepped:
        """For every group the best of three steps and two zeros."""
        safe = _positive(scale)[:, None]
        asked = (self.span * _SHRUNK / safe).round()
        best, error = self._plain(scale), torch.full_like(self.span, torch.inf)
        for more in (-1, 0, 1):
            steps = (asked + more).clamp(1, STEPS)
            middle = CODES / 2 - (self.low + self.high) / 2 / (steps * safe)
            for zeros in (middle.floor().clamp(0, CODES), (middle.floor() + 1).clamp(0, CODES)):
                codes = self._codes(scale, steps, zeros)
                wide = (steps * safe)[..., None]
                lost = (self.h * ((codes - zeros[..., None]) * wide - self.x).square_()).sum(-1)
                better = lost < error
                error = torch.where(better, lost, error)
                best = Stepped(
                    torch.where(better[..., None], codes, best.codes),
                    torch.where(better, steps, best.steps),
                    torch.where(better, zeros, best.zeros),
                    scale,
                )
        return best

    def _fitted(self, found: Stepped) -> Stepped:
        """With the best scale for its whole numbers."""
        cross, square = self._sums(found)
        return Stepped(found.codes, found.steps, found.zeros, cross / _positive(square))

    def _sums(self, found: Stepped) -> tuple[Tensor, Tensor]:
        """Of products of the whole numbers with the weights, and of their squares, [m]."""
        whole = (found.codes - found.zeros[..., None]) * found.steps[..., None]
        return (self.hx * whole).sum((-2, -1)), (self.h * whole.square()).sum((-2, -1))

    def _gain(self, found: Stepped) -> Tensor:
        """How much of the weighted square the rounding explains, [m]."""
        cross, square = self._sums(found)
        return found.scale * (2 * cross - found.scale * square)

    def _better(self, best: Stepped, gain: Tensor, found: Stepped) -> tuple[Stepped, Tensor]:
        new = self._gain(found)
        takes = new > gain
        group, each = takes[:, None], takes[:, None, None]
        kept = Stepped(
            torch.where(each, found.codes, best.codes),
            torch.where(group, found.steps, best.steps),
            torch.where(group, found.zeros, best.zeros),
            torch.where(takes, found.scale, best.scale),
        )
        return kept, torch.where(takes, new, gain)


def _positive(value: Tensor) -> Tensor:
    """To divide by: 1 where nothing is there."""
    return torch.where(value > 0, value, torch.ones_like(value))
