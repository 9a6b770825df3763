"""A published quantised matrix as the packed format that holds it, or as floats. Works on rows in chunks, so that no
more floats exist at a time than a chunk has, unless floats are what is asked for.

A matrix is one of two things. `Codes`: whole numbers with a scale for each group of inputs, and a zero or an offset;
most of these are kept as they are. `Values`: anything that only its own rule turns into numbers (a table of sixteen
floats, eight-bit floats); it is rounded to w8g, with a note.

| codes | zero | becomes | exact |
|---|---|---|---|
| 2 to 4 bits, groups of 32 x | in the middle, everywhere | w4g | where the scales are float16 numbers |
| 2 to 4 bits, groups of 32 x | of each group | w4g with minima | where scale times zero is one too |
| 2 to 6 bits, other groups of 16 x | any | w6g | likewise |
| 7, 8 bits, one scale a row | in the middle | w8 | always |
| 7, 8 bits, groups of 32 x | in the middle | w8g | where the scales are float16 numbers |
| all others | | w8g, rounded again | no |

A float16 has 11 bits of significand, so bfloat16 scales fit unless they are below 2^-17, float16 scales always, float32
scales seldom; a scale of 11 bits times a zero of 4 has up to 15 bits and is rounded, which moves a weight by at most
2^-11 of zero * scale. Notes say by how much it is for a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dfastllm.errors import CheckpointError
from dfastllm.kernels.packed import FORMS, MOST_INPUTS, QTensor

__all__ = ["Codes", "Matrix", "Opened", "Values", "opened", "to_float", "to_packed"]

CHUNK = 1 << 20  # weights converted at a time
HALF = 2.0**-11  # of a float16: what rounding to it moves a number by, relative to the number

Rows = Callable[[int, int], Tensor]
Opened = Callable[[bool], tuple[QTensor | Tensor, str | None]]  # see `Stored.opened`


@dataclass(frozen=True, slots=True)
class Codes:
    """value = (code - zero) * scale + offset.

    where    the file and tensor, for messages.
    shape    [n, k].
    bits     of a code: codes are 0 to 2^bits - 1.
    rows     (start, stop) -> codes [stop - start, k], any whole-number dtype.
    scales   float32 [n, groups].
    group    inputs that share a scale; k: one scale a row.
    zeros    int32 [n, groups], or one number for all.
    offsets  float32 [n, groups]; None: none.
    index    int64 [k], the group of each input; None: input i is of group i // group.
    """

    where: str
    shape: tuple[int, int]
    bits: int
    rows: Rows
    scales: Tensor
    group: int
    zeros: Tensor | int = 0
    offsets: Tensor | None = None
    index: Tensor | None = None

    def values(self, start: int, stop: int) -> Tensor:
        """float32 [rows, k]. The product is rounded once where the scale has more than 16 bits, else exact."""
        codes, k = self.rows(start, stop).to(torch.int16), self.shape[1]
        spread: Callable[[Tensor], Tensor]
        if self.index is not None:
            index = self.index
            spread = lambda side: side[start:stop].index_select(1, index)  # noqa: E731
        else:
            codes = codes.view(stop - start, -1, self.group)
            spread = lambda side: side[start:stop, :, None]  # noqa: E731
        codes = codes - (spread(self.zeros).to(torch.int16) if isinstance(self.zeros, Tensor) else self.zeros)
        value = codes.float().mul_(spread(self.scales))
        if self.offsets is not None:
            value += spread(self.offsets)
        return value.view(stop - start, k)


@dataclass(frozen=True, slots=True)
class Values:
    """where, shape: as of `Codes`. floats: (start, stop) -> float32 [stop - start, k]. said: what they are stored as,
    for notes."""

    where: str
    shape: tuple[int, int]
    floats: Rows
    said: str

    def values(self, start: int, stop: int) -> Tensor:
        """float32 [rows, k]."""
        return self.floats(start, stop)


Matrix = Codes | Values


def opened(make: Callable[[], Matrix]) -> Opened:
    """What opens a weight that `make` reads: as exact floats, or packed with a note."""
    return lambda exact: (to_float(make()), None) if exact else to_packed(make())


def to_float(matrix: Matrix) -> Tensor:
    """float32 [n, k], as the method's own dequantisation in float32. Raises CheckpointError for values that are not
    finite."""
    out = torch.empty(matrix.shape)
    for start, stop in _chunks(matrix.shape):
        values = matrix.values(start, stop)
        _require_numbers(matrix, values, start)
        out[start:stop] = values
    return out


def to_packed(matrix: Matrix) -> tuple[QTensor | Tensor, str | None]:
    """The matrix as QTensor, or as float32 where groups of 32 do not divide its inputs or float16 cannot say its
    scales; and a note where that is not exactly what was stored. Raises CheckpointError for values that are not
    finite."""
    k = matrix.shape[1]
    if isinstance(matrix, Values):
        if k % FORMS["w8g"].group:
            return to_float(matrix), f"{matrix.said} held as float32: groups of 32 do not divide {k} inputs"
        return _rounded(matrix, matrix.said)
    _require_finite(matrix)
    form = _form_of(matrix)
    if form == "w8":
        shift = _middle(matrix)
        return QTensor("w8", _codes(matrix, form, -shift), matrix.scales[:, 0].contiguous()), None
    if form is not None:
        found = _regrouped(matrix, form)
        if found is not None:
            return found
        return to_float(matrix), f"{matrix.bits}-bit codes held as float32: float16 is too coarse for their scales"
    if k % FORMS["w8g"].group:
        return to_float(matrix), f"{matrix.bits}-bit codes held as float32: groups of 32 do not divide {k} inputs"
    ordered = "groups of inputs that are not neighbours" if matrix.index is not None else "groups with zero points"
    return _rounded(matrix, f"{matrix.bits}-bit codes in {ordered}")


def _form_of(matrix: Codes) -> str | None:
    """The packed format that holds these codes, None: none does."""
    k = matrix.shape[1]
    if matrix.index is not None:
        return None
    narrow = [name for name in ("w4g", "w6g") if matrix.bits <= FORMS[name].bits]
    for name in narrow:
        if matrix.group % FORMS[name].group == 0:
            return name
    top, constant = 2**matrix.bits - 1, matrix.offsets is None and isinstance(matrix.zeros, int)
    middle = constant and _middle(matrix) <= 128 and top - _middle(matrix) <= 127  # the codes less it are int8
    if middle and matrix.group == k and k <= MOST_INPUTS:
        return "w8"
    return "w8g" if middle and matrix.group % FORMS["w8g"].group == 0 else None


def _middle(matrix: Codes) -> int:
    assert isinstance(matrix.zeros, int)
    return matrix.zeros


def _regrouped(matrix: Codes, form: str) -> tuple[QTensor, str | None] | None:
    """The codes as they are under float16 scales. None where float16 is too coarse: scales far below its range."""
    group = FORMS[form].group
    zero = FORMS[form].zero
    repeat = matrix.group // group
    halves = matrix.scales.half()
    moved = (halves.float() - matrix.scales).abs()
    largest = matrix.scales.abs().amax()
    if bool((moved > HALF * largest).any()) or bool(halves.isinf().any()):
        return None
    mins, shift = None, 0
    constant = isinstance(matrix.zeros, int) and matrix.offsets is None
    top = 2**matrix.bits - 1
    if zero is None:
        shift = -_middle(matrix)
    elif constant and zero >= _middle(matrix) and top + zero - _middle(matrix) < 2 ** FORMS[form].bits:
        shift = zero - _middle(matrix)
    else:
        exact = matrix.zeros * matrix.scales
        if matrix.offsets is not None:
            exact = exact - matrix.offsets
        mins = exact.half()
        moved = top * moved + (mins.float() - exact).abs()
        if bool(mins.isinf().any()):
            return None
        mins = mins.repeat_interleave(repeat, dim=1)
    if mins is None:
        moved = moved * top
    codes = _codes(matrix, form, shift)
    packed = QTensor(form, codes, halves.repeat_interleave(repeat, dim=1), mins)
    most = float(moved.amax() / largest) if bool(moved.any()) else 0.0
    said = f"scales and minima rounded to float16: a weight moves by at most {most:.1g} of the largest step"
    return packed, said if most else None


def _codes(matrix: Codes, form: str, shift: int) -> Tensor:
    """All codes, shifted, in the dtype of the form."""
    out = torch.empty(matrix.shape, dtype=FORMS[form].codes)
    for start, stop in _chunks(matrix.shape):
        codes = matrix.rows(start, stop)
        out[start:stop] = codes.to(torch.int16).add_(shift) if shift else codes
    return out


def _rounded(matrix: Matrix, said: str) -> tuple[QTensor, str]:
    """To w8g: one float16 scale for 32 inputs, amax / 127, so that a weight moves by at most amax / 250."""
    (n, k), group = matrix.shape, FORMS["w8g"].group
    codes, scales = torch.empty(n, k, dtype=torch.int8), torch.empty(n, k // group, dtype=torch.float16)
    for start, stop in _chunks(matrix.shape):
        values = matrix.values(start, stop).view(stop - start, -1, group)
        largest = values.abs().amax(dim=-1)
        if not bool(largest.isfinite().all()):
            _require_numbers(matrix, values.view(stop - start, -1), start)
        scale = (largest / 127).half()
        if bool(scale.isinf().any()):
            raise CheckpointError(
                f"{matrix.where} has weights up to {float(values.abs().amax()):.3g}, beyond what float16 scales reach.",
                hint="No trained model has such weights; the file is damaged.",
            )
        wide = scale.float()[..., None]
        values /= wide.masked_fill_(wide == 0, math.inf)  # what float16 has no scale for is zero
        codes[start:stop] = values.round_().clamp_(-127, 127).to(torch.int8).view(stop - start, k)
        scales[start:stop] = scale
    return QTensor("w8g", codes, scales), f"{said} rounded to w8g (8-bit codes, groups of 32)"


def _require_numbers(matrix: Matrix, values: Tensor, start: int) -> None:
    """Raise CheckpointError for values that are not finite, naming the first row."""
    bad = (~values.isfinite()).any(dim=1)
    if bool(bad.any()):
        raise CheckpointError(
            f"{matrix.where} holds weights that are NaN or infinite, first in row {start + int(bad.int().argmax())}.",
            hint="The file is damaged, or was made from damaged weights.",
        )


def _require_finite(matrix: Codes) -> None:
    for what, side in (("scales", matrix.scales), ("offsets", matrix.offsets)):
        if side is not None and not bool(side.isfinite().all()):
            row = int((~side.isfinite()).any(dim=1).int().argmax())
            raise CheckpointError(
                f"{matrix.where} has {what} that are NaN or infinite, first in row {row}.",
                hint="The file is damaged, or was made from damaged weights.",
            )


def _chunks(shape: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """In multiples of 8 rows, as some layouts pack eight rows together."""
    step = max(8, CHUNK // max(shape[1], 1) // 8 * 8)
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])
