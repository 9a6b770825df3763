"""Blocks of quantised GGML types -> codes, scales and minima of the packed formats. Numpy, vectorised over blocks.

One function per type: blocks uint8 [m, bytes] -> codes [m, elements], scales [m, groups], minima [m, groups] or None,
scales and minima as float32 products. Which format (w4g, w6g, w8g) they are for is in `DECODERS`. Layouts are those of
ggml-common.h.

Codes are exact. Scales that are one small float in the block (Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, IQ4_NL, TQ1_0, TQ2_0, Q1_0,
Q2_0, NVFP4) stay exact, those of MXFP4 (powers of two) from 2^-24 up. In super-block types (Q2_K to Q6_K, IQ4_XS) a
scale is a float16 times an integer of 4 to 8 bits; the packed formats hold that product in float16, which moves it by
at most 2^-11 of itself (2^-25 where it is below 2^-14), so a weight code * scale - min by at most
2^-11 * (|code * scale| + |min|).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

__all__ = ["DECODERS", "Decoder", "Parts"]

Array = np.ndarray
Parts = tuple[Array, Array, Array | None]
SUPER = 256  # elements of a super-block
NON_LINEAR = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)  # IQ4
E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)  # four-bit floats, doubled


@dataclass(frozen=True, slots=True)
class Decoder:
    """format: of the QTensor the parts are for. exact: scales are not rounded. span: elements that share one of the
    returned scales; a group of the format may be smaller, then scales repeat."""

    format: str
    span: int
    exact: bool
    decode: Callable[[Array], Parts]


def _half(blocks: Array, at: int) -> Array:
    """float32 [m, 1] from the float16 at this byte of each block."""
    halves: Array = blocks[:, at : at + 2].copy().view("<f2")
    return halves.astype(np.float32)


def _nibbles(data: Array) -> Array:
    """[m, 16 g] -> [m, 32 g]: of each 16 bytes first all low nibbles, then all high ones."""
    halves = data.reshape(len(data), -1, 1, 16) >> np.array([[0], [4]], np.uint8)
    return (halves & 15).reshape(len(data), -1)


def _fields(data: Array, width: int, run: int) -> Array:
    """Bit fields of `width` bits: [m, run * j] -> [m, j, 8 / width, run], lowest field first."""
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    fields: Array = data.reshape(len(data), -1, 1, run) >> shifts
    fields &= np.uint8((1 << width) - 1)
    return fields


def _q8_0(b: Array) -> Parts:
    return b[:, 2:].view(np.int8), _half(b, 0), None


def _q4_0(b: Array) -> Parts:
    return _nibbles(b[:, 2:]), _half(b, 0), None


def _q4_1(b: Array) -> Parts:
    return _nibbles(b[:, 4:]), _half(b, 0), -_half(b, 2)


def _fifth(b: Array, at: int) -> Array:
    """Codes of the five-bit types: nibbles after four bytes of fifth bits."""
    high: Array = np.unpackbits(b[:, at : at + 4], axis=-1, bitorder="little")
    codes: Array = _nibbles(b[:, at + 4 :]) | high << 4
    return codes


def _q5_0(b: Array) -> Parts:
    return _fifth(b, 2) + np.uint8(16), _half(b, 0), None  # (q - 16) d is (code - 32) d


def _q5_1(b: Array) -> Parts:
    return _fifth(b, 4), _half(b, 0), -_half(b, 2)


def _q2_k(b: Array) -> Parts:
    scales, codes = b[:, :16], _fields(b[:, 16:80], 2, 32).reshape(-1, SUPER)
    return codes, _half(b, 80) * (scales & 15), _half(b, 82) * (scales >> 4)


def _q3_k(b: Array) -> Parts:
    low = _fields(b[:, 32:96], 2, 32).reshape(-1, SUPER)
    high = _fields(b[:, :32], 1, 32).reshape(-1, SUPER)  # 1: nothing to subtract, 0: minus 4
    packed = b[:, 96:108]
    six = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1)
    six |= _fields(packed[:, 8:], 2, 4).reshape(-1, 16) << 4
    scales = _half(b, 108) * (six.astype(np.float32) - 32)
    return low + (high << 2) + np.uint8(28), scales, None  # (low + 4 high - 4) is (code - 32)


def _six_bit(packed: Array) -> tuple[Array, Array]:
    """Scales and minima [m, 8] of Q4_K and Q5_K from their 12 bytes."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, third & 15 | (first >> 2) & 48], axis=1)
    minima = np.concatenate([second & 63, third >> 4 | (second >> 2) & 48], axis=1)
    return scales, minima


def _q4_k(b: Array) -> Parts:
    scales, minima = _six_bit(b[:, 4:16])
    return _fields(b[:, 16:], 4, 32).reshape(-1, SUPER), _half(b, 0) * scales, _half(b, 2) * minima


def _q5_k(b: Array) -> Parts:
    scales, minima = _six_bit(b[:, 4:16])
    codes = _fields(b[:, 48:], 4, 32).reshape(-1, SUPER) | _fields(b[:, 16:48], 1, 32).reshape(-1, SUPER) << 4
    return codes, _half(b, 0) * scales, _half(b, 2) * minima


def _q6_k(b: Array) -> Parts:
    low = _fields(b[:, :128], 4, 64).reshape(-1, SUPER)
    codes = low | _fields(b[:, 128:192], 2, 32).reshape(-1, SUPER) << 4
    return codes, _half(b, 208) * b[:, 192:208].view(np.int8), None


def _tq1_0(b: Array) -> Parts:
    """Five ternary digits a byte (four in the last four bytes), each byte a fraction of 256 in base 3."""
    powers = np.array([1, 3, 9, 27, 81], np.uint8)[:, None]
    parts = [
        (b[:, :32].reshape(-1, 1, 32) * powers).reshape(len(b), -1),
        (b[:, 32:48].reshape(-1, 1, 16) * powers).reshape(len(b), -1),
        (b[:, 48:52].reshape(-1, 1, 4) * powers[:4]).reshape(len(b), -1),
    ]
    digits = (np.concatenate(parts, axis=1).astype(np.uint16) * 3 >> 8).astype(np.uint8)
    return digits + np.uint8(7), _half(b, 52), None  # (digit - 1) d is (code - 8) d


def _tq2_0(b: Array) -> Parts:
    return _fields(b[:, :64], 2, 32).reshape(-1, SUPER) + np.uint8(7), _half(b, 64), None


def _q1_0(b: Array) -> Parts:
    bits = np.unpackbits(b[:, 2:], axis=-1, bitorder="little")
    return (bits << 1) + np.uint8(7), _half(b, 0), None  # bit 1: d, bit 0: -d


def _q2_0(b: Array) -> Parts:
    """Four elements a byte, lowest first: -1, 0, 1 or 2."""
    fields = (b[:, 2:, None] >> np.array([0, 2, 4, 6], np.uint8)) & 3
    return fields.reshape(len(b), -1) + np.uint8(7), _half(b, 0), None


def _iq4_nl(b: Array) -> Parts:
    return NON_LINEAR[_nibbles(b[:, 2:])], _half(b, 0), None


def _iq4_xs(b: Array) -> Parts:
    high = b[:, 2:4].copy().view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16)
    low = np.stack([b[:, 4:8] & 15, b[:, 4:8] >> 4], axis=-1).reshape(-1, 8)
    scales = (low | (high & 3).astype(np.uint8) << 4).astype(np.float32) - 32
    return NON_LINEAR[_nibbles(b[:, 8:])], _half(b, 0) * scales, None


def _mxfp4(b: Array) -> Parts:
    """One E8M0 exponent a block; halved because the codes are doubled. Exponent 255 is NaN."""
    exponent = b[:, :1].astype(np.int32)
    scales = np.where(exponent == 255, np.float32(np.nan), np.ldexp(np.float32(1), exponent - 128))
    return E2M1[_nibbles(b[:, 1:])], scales.astype(np.float32), None


def _nvfp4(b: Array) -> Parts:
    """Four unsigned E4M3 scales, then 8 bytes for each 16 elements. 0x7F, its NaN, counts as zero, as in ggml."""
    bits = b[:, :4].astype(np.int32)
    exponent, mantissa = (bits >> 3) & 15, (bits & 7).astype(np.float32)
    value = np.where(exponent == 0, np.ldexp(mantissa, -9), np.ldexp(1 + mantissa / 8, exponent - 7))
    scales = np.where(bits == 127, 0, value * 0.5).astype(np.float32)
    halves = b[:, 4:].reshape(len(b), 4, 1, 8) >> np.array([[0], [4]], np.uint8)
    codes = E2M1[(halves & 15).reshape(len(b), -1)]
    return (codes + np.int8(32)).view(np.uint8), scales, None


DECODERS = {
    "Q8_0": Decoder("w8g", 32, True, _q8_0),
    "Q4_0": Decoder("w4g", 32, True, _q4_0),
    "Q4_1": Decoder("w4g", 32, True, _q4_1),
    "Q5_0": Decoder("w6g", 32, True, _q5_0),
    "Q5_1": Decoder("w6g", 32, True, _q5_1),
    "Q1_0": Decoder("w4g", 128, True, _q1_0),
    "Q2_0": Decoder("w4g", 64, True, _q2_0),
    "Q2_K": Decoder("w6g", 16, False, _q2_k),
    "Q3_K": Decoder("w6g", 16, False, _q3_k),
    "Q4_K": Decoder("w4g", 32, False, _q4_k),
    "Q5_K": Decoder("w6g", 32, False, _q5_k),
    "Q6_K": Decoder("w6g", 16, False, _q6_k),
    "TQ1_0": Decoder("w4g", 256, True, _tq1_0),
    "TQ2_0": Decoder("w4g", 256, True, _tq2_0),
    "IQ4_NL": Decoder("w8g", 32, True, _iq4_nl),
    "IQ4_XS": Decoder("w8g", 32, False, _iq4_xs),
    "MXFP4": Decoder("w8g", 32, False, _mxfp4),
    "NVFP4": Decoder("w6g", 16, True, _nvfp4),
}
