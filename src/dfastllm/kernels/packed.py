"""Weights of a linear layer in the two forms that kernels know: natural (QTensor, what files hold) and panels (Packed,
what the kernels read). The twins here are plain torch; `pack_panels` is the layout's definition.

| format | codes (natural) | scales | value |
|---|---|---|---|
| f32, bf16 | the float tensor [n, k] | none | itself |
| w8 | int8 [n, k] | float32 [n] | code * scale |
| w8g | int8 [n, k] | float16 [n, k / 32] | code * scale |
| w4g | uint8 [n, k], 0 to 15 | float16 [n, k / 32] | code * scale - min, or (code - 8) * scale without mins |
| w6g | uint8 [n, k], 0 to 63 | float16 [n, k / 16] | code * scale - min, or (code - 32) * scale without mins |
| w4s | uint8 [n, k], 0 to 15 | float32 [n] | (code - zero) * step * scale |

w4s has two levels: `steps` uint8 [n, k / 32] holds step - 1 (of 1 to 16) in the low four bits and zero (0 to 15) in the
high ones, and (code - zero) * step is a signed byte, so that its products are those of w8.

Panels hold 64 output channels, channels beyond n as zero weights. One vector register of a kernel holds 4 consecutive
inputs (2 in bf16, 1 in f32) of neighbouring channels, so a dot product needs no horizontal sum:

| format | data of one panel |
|---|---|
| w8, w8g | uint8 code + 128: [k4 / 4][64][4] (k4: k rounded up to 4; the rest is 128) |
| w4s | [k / 32]: 1024 bytes of w4g, then a byte of `steps` for each channel |
| w4g | [k / 8][64][4]: low nibble channel's input 8 i + j, high nibble input 8 i + 4 + j |
| w6g | [k / 16]: 512 bytes of low nibbles (w4g), then 256 bytes [64][4]: high bits of inputs 16 i + j, + 4, + 8, + 12 |
| bf16 | [k2 / 2][64][2] |
| f32 | [k][64] |

Scales and minima: [panels][groups][64], float16 (w8, w4s: float32, one group).
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from dfastllm.errors import ValidationError

__all__ = ["FORMATS", "FORMS", "GROUP", "PANEL", "Form", "Packed", "QTensor", "pack_panels", "unpack_panels"]

PANEL = 64  # output channels of a panel
MOST_INPUTS = 2**17  # 128 * 127 times this fits into 32 bits (sums on the way there wrap, and come back)


@dataclass(frozen=True, slots=True)
class Form:
    """One row of the tables above: what everything that differs by form is made of.

    codes    dtype of natural codes. bits: of a weight in a panel.
    step     inputs that lie together in a panel: k is rounded up to it.
    group    inputs that share a scale, 0: one scale a channel, or none.
    stepped  inputs that share a step of the channel's scale, 0: there are none.
    zero     the code of weight zero in a form that may have minima, None: it has none.
    inputs   how it wants its input rows: f32, bf16, row8 (int8, one scale a row) or group8 (one per 32 inputs).
    """

    codes: torch.dtype
    bits: int
    step: int
    inputs: str
    group: int = 0
    zero: int | None = None
    stepped: int = 0

    @property
    def together(self) -> int:
        """What the number of inputs must be a multiple of."""
        return self.group or self.stepped or 1

    @property
    def panel_bits(self) -> Fraction:
        """Bits of a weight in a panel, what stands beside codes there included."""
        return Fraction(self.bits) + (Fraction(8, self.stepped) if self.stepped else 0)

    @property
    def quantised(self) -> bool:
        return not self.codes.is_floating_point


FORMS = {  # in the order of the native kernels' Format
    "f32": Form(torch.float32, 32, 1, "f32"),
    "bf16": Form(torch.bfloat16, 16, 2, "bf16"),
    "w8": Form(torch.int8, 8, 4, "row8"),
    "w8g": Form(torch.int8, 8, 4, "group8", group=32),
    "w4g": Form(torch.uint8, 4, 8, "group8", group=32, zero=8),
    "w6g": Form(torch.uint8, 6, 16, "group8", group=16, zero=32),
    "w4s": Form(torch.uint8, 4, 32, "row8", stepped=32),
}
FORMATS = tuple(FORMS)
GROUP = {name: form.group for name, form in FORMS.items() if form.group}  # inputs that share a scale
_ZERO = {name: form.zero for name, form in FORMS.items() if form.zero is not None}


@dataclass(frozen=True, eq=False)
class QTensor:
    """A weight matrix [n, k] in natural order; see the table above. Raises ValidationError when the parts do not fit.

    It checks shapes and dtypes, not values: `dequantise` of NaN scales is NaN.
    """

    format: str
    codes: Tensor
    scales: Tensor | None = None
    mins: Tensor | None = None
    steps: Tensor | None = None

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValidationError(f"format must be one of {', '.join(FORMATS)}, got {self.format!r}.", param="format")
        if self.codes.ndim != 2:
            raise ValidationError(f"a weight must have two dims [n, k], got {list(self.codes.shape)}.", param="codes")
        wanted = FORMS[self.format].codes
        if self.codes.dtype != wanted:
            raise ValidationError(f"codes of {self.format} must be {wanted}, got {self.codes.dtype}.", param="codes")
        n, k = self.codes.shape
        group = GROUP.get(self.format)
        stepped, together = FORMS[self.format].stepped, FORMS[self.format].together
        if FORMS[self.format].inputs == "row8" and k > MOST_INPUTS:
            raise ValidationError(
                f"{self.format} sums at most {MOST_INPUTS} inputs in 32 bits, got {k}.", param="format", hint="Use w8g."
            )
        if k % together:
            raise ValidationError(
                f"{self.format} has groups of {together} inputs, which do not divide {k}.",
                param="format",
                hint="Use w8 (one scale per channel) or bf16 for this layer.",
            )
        self._check("scales", self.scales, n, k, group)
        if self.mins is not None and self.format not in _ZERO:
            raise ValidationError(f"{self.format} has no minima.", param="mins")
        if self.mins is not None:
            self._check("mins", self.mins, n, k, group)
        shape = [n, k // stepped] if stepped else None
        got = None if self.steps is None else list(self.steps.shape)
        if got != shape or (self.steps is not None and self.steps.dtype != torch.uint8):
            kind = None if self.steps is None else self.steps.dtype
            wanted_steps = "there are none" if shape is None else f"they must be {shape} {torch.uint8}"
            raise ValidationError(f"steps of {self.format}: {wanted_steps}, got {got} {kind}.", param="steps")

    def _check(self, name: str, value: Tensor | None, n: int, k: int, group: int | None) -> None:
        shape, dtype = ((n, k // group), torch.float16) if group else ((n,), torch.float32)
        if self.format in ("f32", "bf16"):
            if value is not None:
                raise ValidationError(f"{self.format} has no {name}.", param=name)
        elif value is None or tuple(value.shape) != shape or value.dtype != dtype:
            got = None if value is None else (list(value.shape), value.dtype)
            raise ValidationError(f"{name} of {self.format} must be {list(shape)} {dtype}, got {got}.", param=name)

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dequantise(self) -> Tensor:
        """float32 [n, k]."""
        wide = self.codes.float()
        if self.scales is None:
            return wide
        if self.format == "w8":
            return wide * self.scales[:, None]
        if self.steps is not None:
            return self.whole_codes().float() * self.scales[:, None]
        n, k = self.shape
        grouped = wide.view(n, -1, GROUP[self.format])
        if self.mins is not None:
            return (grouped * self.scales.float()[..., None] - self.mins.float()[..., None]).reshape(n, k)
        return ((grouped - _ZERO.get(self.format, 0)) * self.scales.float()[..., None]).reshape(n, k)

    @property
    def steps_fit(self) -> bool:
        """Whether all whole codes are signed bytes, as the kernels trust."""
        assert self.steps is not None
        step, zero = ((self.steps & 15) + 1).short()[..., None], (self.steps >> 4).short()[..., None]
        whole = (self.codes.view(len(self.codes), -1, FORMS[self.format].stepped) - zero) * step
        return bool(((whole >= -128) & (whole <= 127)).all())

    def whole_codes(self) -> Tensor:
        """int8 [n, k] of w4s: the codes of w8 that stand for the same weights."""
        assert self.steps is not None
        n, k = self.shape
        step, zero = ((self.steps & 15) + 1)[..., None], (self.steps >> 4)[..., None]  # bytes that wrap around
        return ((self.codes.view(n, -1, FORMS[self.format].stepped) - zero) * step).view(torch.int8).reshape(n, k)

    def rows(self, index: Tensor | slice) -> QTensor:
        """These output channels only, in this order (a permutation, a slice)."""
        scales = None if self.scales is None else self.scales[index]
        mins = None if self.mins is None else self.mins[index]
        return QTensor(self.format, self.codes[index], scales, mins, None if self.steps is None else self.steps[index])

    def padded(self, n: int) -> QTensor:
        """With zero weights below up to n output channels."""
        more = n - self.shape[0]

        def pad(value: Tensor | None, fill: int = 0) -> Tensor | None:
            return None if value is None else torch.cat([value, value.new_full((more, *value.shape[1:]), fill)])

        codes = pad(self.codes, 0 if self.mins is not None else _ZERO.get(self.format, 0))
        assert codes is not None
        return QTensor(self.format, codes, pad(self.scales), pad(self.mins), pad(self.steps))

    @staticmethod
    def stack(parts: list[QTensor]) -> QTensor:
        """Matrices of one format (and all with minima or all without) below one another."""
        first = parts[0]

        def cat(values: list[Tensor | None]) -> Tensor | None:
            return None if values[0] is None else torch.cat([v for v in values if v is not None])

        codes = torch.cat([p.codes for p in parts])
        sides = (cat([getattr(p, side) for p in parts]) for side in ("scales", "mins", "steps"))
        return QTensor(first.format, codes, *sides)


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight matrix in panels. data: 1-d, 64-byte aligned storage; uint8, or bfloat16 / float32 for those formats.
    scales, mins: 1-d as in the table of this file."""

    format: str
    n: int
    k: int
    data: Tensor
    scales: Tensor | None = None
    mins: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.data, self.scales, self.mins) if t is not None)

    @property
    def panels(self) -> int:
        return -(-self.n // PANEL)


def aligned(size: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised 1-d tensor on a 64-byte boundary (torch's own CPU allocator gives 64; this does not rely on it)."""
    raw = torch.empty(size * dtype.itemsize + 64, dtype=torch.uint8)
    skip = -raw.data_ptr() % 64
    return raw[skip : skip + size * dtype.itemsize].view(dtype)


def pack_panels(tensor: QTensor) -> Packed:
    """Natural to panels, in plain torch."""
    n, k = tensor.shape
    panels = -(-n // PANEL)
    pad = panels * PANEL - n

    def side(value: Tensor | None) -> Tensor | None:
        """[n, groups] -> [panels][groups][64], padded with zeros."""
        if value is None:
            return None
        value = value.view(n, -1)
        full = torch.cat([value, value.new_zeros(pad, value.shape[1])]) if pad else value
        return _settle(full.view(panels, PANEL, -1).transpose(1, 2))

    codes, step = tensor.codes, 1
    if tensor.format in ("w8", "w8g"):
        codes, step = (codes.to(torch.int16) + 128).to(torch.uint8), 4
    elif tensor.format == "bf16":
        step = 2
    fill = 128 if tensor.format in ("w8", "w8g") else (0 if tensor.mins is not None else _ZERO.get(tensor.format, 0))
    if pad:
        codes = torch.cat([codes, codes.new_full((pad, k), fill)])
    if k % step:
        codes = torch.cat([codes, codes.new_full((codes.shape[0], -k % step), fill)], dim=1)
    by_panel = codes.view(panels, PANEL, -1)
    if tensor.format == "w4g":
        data = _nibbles(by_panel)
    elif tensor.steps is not None:
        steps = side(tensor.steps)
        assert steps is not None
        nibbles = _nibbles(by_panel).reshape(panels, k // 32, 1024)
        data = torch.cat([nibbles, steps.view(panels, k // 32, PANEL)], dim=-1)
    elif tensor.format == "w6g":
        low = _nibbles(by_panel & 15).reshape(panels, k // 16, 512)
        bits = (by_panel >> 4).view(panels, PANEL, k // 16, 4, 4)  # [.., input / 4, input % 4]
        high = bits[..., 0, :] | bits[..., 1, :] << 2 | bits[..., 2, :] << 4 | bits[..., 3, :] << 6
        data = torch.cat([low, high.transpose(1, 2).reshape(panels, k // 16, 256)], dim=-1)
    else:
        data = by_panel.view(panels, PANEL, -1, step).transpose(1, 2)
    return Packed(tensor.format, n, k, _settle(data), side(tensor.scales), side(tensor.mins))


def unpack_panels(packed: Packed) -> QTensor:
    """Panels to natural, in plain torch: the inverse of `pack_panels`."""
    n, k, panels = packed.n, packed.k, packed.panels

    def side(value: Tensor | None) -> Tensor | None:
        if value is None:
            return None
        natural = value.view(panels, -1, PANEL).transpose(1, 2).reshape(panels * PANEL, -1)[:n]
        return natural.reshape(n) if FORMS[packed.format].inputs == "row8" else natural.contiguous()

    def natural(by_panel: Tensor) -> Tensor:  # [panels, 64, k or more]
        return by_panel.reshape(panels * PANEL, -1)[:n, :k].contiguous()

    data, steps = packed.data, None
    if packed.format in ("w8", "w8g"):
        codes = natural(data.view(panels, -1, PANEL, 4).transpose(1, 2))
        codes = (codes.to(torch.int16) - 128).to(torch.int8)
    elif packed.format == "w4g":
        codes = natural(_from_nibbles(data.view(panels, -1, PANEL, 4)))
    elif packed.format == "w4s":
        groups = data.view(panels, k // 32, 1024 + PANEL)
        codes = natural(_from_nibbles(groups[..., :1024].reshape(panels, k // 8, PANEL, 4)))
        steps = groups[..., 1024:].transpose(1, 2).reshape(panels * PANEL, -1)[:n].contiguous()
    elif packed.format == "w6g":
        both = data.view(panels, k // 16, 768)
        low = _from_nibbles(both[..., :512].reshape(panels, k // 8, PANEL, 4)).view(panels, PANEL, k // 16, 4, 4)
        high = both[..., 512:].reshape(panels, k // 16, PANEL, 1, 4).transpose(1, 2)
        shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8).view(4, 1)
        codes = natural(low | ((high >> shifts) & 3) << 4)
    else:
        codes = natural(data.view(panels, -1, PANEL, 2 if packed.format == "bf16" else 1).transpose(1, 2))
    return QTensor(packed.format, codes, side(packed.scales), side(packed.mins), steps)


def _nibbles(codes: Tensor) -> Tensor:
    """uint8 [panels, 64, k] below 16 -> [panels][k / 8][64][4] with two inputs a byte."""
    panels, _, k = codes.shape
    parts = codes.view(panels, PANEL, k // 8, 2, 4)
    return (parts[..., 0, :] | parts[..., 1, :] << 4).transpose(1, 2)


def _from_nibbles(data: Tensor) -> Tensor:
    """[panels, k / 8, 64, 4] -> uint8 [panels, 64, k]."""
    both = torch.stack([data & 15, data >> 4], dim=-2)  # [panels, k / 8, 64, 2, 4]
    return both.transpose(1, 2).reshape(data.shape[0], PANEL, -1)


def _settle(value: Tensor) -> Tensor:
    out = aligned(value.numel(), value.dtype)
    out.view(value.shape).copy_(value)
    return out
