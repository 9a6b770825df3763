"""Float weights [n, k] to quantised ones: the formats a user can name, and the rounding. The kernels' table of natural
forms (`dfastllm.kernels.packed`) says what codes, scales and minima mean; how a scale is chosen is `scales`' business.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dfastllm.errors import CheckpointError, UnsupportedError, ValidationError
from dfastllm.kernels.packed import FORMS, QTensor
from dfastllm.quant.scales import Grid, encode, fit
from dfastllm.quant.stepped import STEPPED, fit_stepped

__all__ = [
    "EIGHT_BITS",
    "FORMATS",
    "Format",
    "assemble",
    "find_format",
    "quantise",
    "require_divisible",
    "require_finite",
    "require_format",
]

CHUNK = 1 << 17  # weights searched at once: temporaries stay in the cache
DEVICE_CHUNK = 1 << 24  # on other devices, which want much work at a time


@dataclass(frozen=True, slots=True)
class Format:
    """name: on the command line. kind: the natural form in kernels.packed, where `grid`'s codes are stored plus `zero`.
    group: inputs that share a scale; 0: one scale per output channel. head: the format of the embedding and the head,
    which decide every token, beside layers of this one; None: this one. turned: of a model in another basis
    (`models.basis`), whose turned matrices are rounded."""

    name: str
    kind: str
    grid: Grid
    zero: int
    summary: str
    head: str | None = None
    turned: bool = False

    @property
    def group(self) -> int:
        return FORMS[self.kind].group

    @property
    def stepped(self) -> int:
        """Inputs that share a step of their channel's scale; 0: there are no steps."""
        return FORMS[self.kind].stepped

    @property
    def code_bits(self) -> int:
        return FORMS[self.kind].bits

    @property
    def code_dtype(self) -> torch.dtype:
        return FORMS[self.kind].codes

    def nbytes(self, n: int, k: int) -> int:
        """Bytes of an [n, k] matrix in a file."""
        scales = n * 4 if not self.group else n * (k // self.group) * 2 * (2 if self.grid.minimum else 1)
        steps = n * (k // self.stepped) if self.stepped else 0
        return n * k * self.code_bits // 8 + scales + steps


# Spans around the range's end: wider than it clips the extreme, which pays where one weight stands out.
_FOUR = (-6.6, -7.0, -7.3, -7.6, -7.9, -8.2, -8.5, -8.8, -9.2, -9.8, -10.5, 6.6, 7.0, 7.4)
_SIX = (-30.5, -31.5, -32.0, -32.5, -33.5, -35.0, 31.0)
_EIGHT = (127.0, 128.0, 130.0, 134.0, 140.0)
_RANGE = (13.5, 14.2, 14.7, 15.0, 15.4, 16.0, 17.0, 18.5)

EIGHT_BITS = "8bit"  # what stands for w8r, or for w8g where a model cannot be turned (`models.basis.format_for`)
FORMATS = {
    f.name: f
    for f in (
        Format("w8", "w8", Grid(-127, 127, half=False, tries=_EIGHT), 0, "8 bits, a float32 scale per channel"),
        Format(
            "w8r", "w8", Grid(-127, 127, half=False, tries=_EIGHT), 0, "w8 of the model in another basis", turned=True
        ),
        Format("w8g", "w8g", Grid(-127, 127, tries=_EIGHT), 0, "8 bits, a float16 scale per 32 inputs"),
        Format("w8gr", "w8g", Grid(-127, 127, tries=_EIGHT), 0, "w8g of the model in another basis", turned=True),
        Format("w6", "w6g", Grid(-32, 31, tries=_SIX), 32, "6 bits, a float16 scale per 16 inputs", "w8g"),
        Format(
            "w4m", "w4g", Grid(0, 15, minimum=True, tries=_RANGE), 0, "4 bits, scale and minimum per 32 inputs", "w8g"
        ),
        Format("w4", "w4g", Grid(-8, 7, tries=_FOUR), 8, "4 bits, a float16 scale per 32 inputs", "w8g"),
        Format("w4r", "w4s", STEPPED, 0, "4 bits, whole steps of a channel's scale, in another basis", "w8r", True),
    )
}


def find_format(name: str, param: str = "format") -> Format:
    """By name. Raises ValidationError listing the formats there are."""
    require_format(name, FORMATS, param)
    return FORMATS[name]


def require_format(name: str, known: Iterable[str], param: str = "format") -> None:
    """Raises ValidationError listing the names that are known."""
    if name not in known:
        raise ValidationError(f"{param} must be {', '.join(known)}, got {name!r}.", param=param)


def require_divisible(format: Format, k: int, name: str) -> None:
    """Raise UnsupportedError unless groups of this format divide k inputs (of activations too: 32)."""
    if (format.group or format.stepped) and k % 32:
        raise UnsupportedError(
            f"{name} has {k} inputs, which groups of 32 do not divide: {format.name} cannot hold it.",
            param="format",
            hint=f"Use {'w8r' if format.turned else 'w8'}, which has one scale per output channel.",
        )


def require_finite(weight: Tensor, name: str) -> None:
    """Raise CheckpointError naming the tensor for NaN, infinity, or a shape that is not [n, k]."""
    if weight.ndim != 2:
        raise CheckpointError(f"{name} has shape {list(weight.shape)}; only matrices [n, k] are quantised.")
    nans = infinities = 0
    rows = max(1, CHUNK // max(weight.shape[1], 1))
    for at in range(0, len(weight), rows):
        part = weight[at : at + rows]
        if not bool(part.isfinite().all()):
            nans += int(part.isnan().sum())
            infinities += int(part.isinf().sum())
    if nans or infinities:
        kinds = [f"{count} {what}" for count, what in ((nans, "NaN"), (infinities, "infinite")) if count]
        raise CheckpointError(
            f"{name} holds {' and '.join(kinds)} of {weight.numel()} weights; nothing was written.",
            hint="The checkpoint is damaged or its training diverged; load another copy.",
        )


def quantise(
    weight: Tensor,
    format: Format | str,
    *,
    importance: Tensor | None = None,
    search: bool = True,
    name: str = "weight",
    device: torch.device | str = "cpu",
) -> QTensor:
    """weight [n, k] of any float dtype -> QTensor on `device`, where it is computed. A row's codes and scales follow
    from that row alone.

    importance [k]: mean square of each input over calibration data; None: all alike. search False: plain rounding to
    nearest. Raises CheckpointError (NaN, infinity) and UnsupportedError (k not a multiple of 32 in a group format,
    weights beyond what a scale reaches), each naming the tensor.
    """
    format = find_format(format) if isinstance(format, str) else format
    weight = weight.detach().to(device)
    require_finite(weight, name)
    n, k = weight.shape
    require_divisible(format, k, name)
    grid = format.grid if search else replace(format.grid, tries=())
    h = None if importance is None else prepared_importance(importance, k, name).to(weight.device)
    size = format.group or k
    rows = max(1, (CHUNK if weight.device.type == "cpu" else DEVICE_CHUNK) // max(k, 1))
    if format.stepped:
        return _stepped(weight, format, h, search, rows)
    codes = torch.empty(n, k, dtype=format.code_dtype, device=weight.device)
    steps = torch.empty(n, k // size if k else 0, device=weight.device)
    mins = torch.empty_like(steps) if grid.minimum else None
    for at in range(0, n, rows):
        groups = weight[at : at + rows].float().contiguous().view(-1, size)
        weights = None if h is None else h.view(1, -1, size).expand(len(groups) * size // k, -1, -1).reshape(-1, size)
        step, minimum = fit(groups, weights, grid, name)
        found = encode(groups, step[:, None], None if minimum is None else minimum[:, None], grid)
        codes[at : at + rows] = found.add_(format.zero).view(-1, k)
        steps[at : at + rows] = step.view(-1, k // size)
        if mins is not None and minimum is not None:
            mins[at : at + rows] = minimum.view(-1, k // size)
    return assemble(format, codes, steps, mins)


def _stepped(weight: Tensor, format: Format, h: Tensor | None, search: bool, rows: int) -> QTensor:
    """`quantise` for whole-numbered steps; so many rows at once."""
    n, k = weight.shape
    parts = [fit_stepped(weight[at : at + rows].float().contiguous(), h, search) for at in range(0, n, rows)]
    codes = torch.cat([part.codes.view(-1, k).to(format.code_dtype) for part in parts])
    return QTensor(
        format.kind, codes, torch.cat([part.scale for part in parts]), steps=torch.cat([part.sides for part in parts])
    )


def assemble(format: Format, codes: Tensor, steps: Tensor, mins: Tensor | None) -> QTensor:
    """codes [n, k] as stored (with the format's zero), steps and mins [n, groups] float32 -> QTensor."""
    if format.kind == "w8":
        return QTensor(format.kind, codes, steps.view(-1))
    return QTensor(format.kind, codes, steps.half(), None if mins is None else mins.half())


def prepared_importance(importance: Tensor, k: int, name: str) -> Tensor:
    """Mean 1, and a floor: an input that calibration never used still counts a little. Raises ValidationError."""
    h = importance.detach().to("cpu", torch.float32).reshape(-1)
    if len(h) != k or not bool(h.isfinite().all()) or bool((h < 0).any()):
        raise ValidationError(
            f"{name}: importance must be {k} finite numbers of at least 0, got {len(h)} "
            f"from {h.min().item() if len(h) else 'none'} to {h.max().item() if len(h) else 'none'}.",
            param="importance",
        )
    mean = h.mean()
    return torch.ones(k) if mean == 0 else h / mean + 1e-3
