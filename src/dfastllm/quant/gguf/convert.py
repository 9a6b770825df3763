"""Tensors of a GGUF file -> QTensor or float tensor, in row chunks, so that nothing is held twice.

A quantised matrix is never expanded to float: its codes and scales move into the packed format that holds them (see
`blocks`). Types without such a format (the IQ types below four bits) are decoded by the `gguf` package and quantised
again to w8g, with a note. Scales that are not finite, and weights that are not, are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from gguf import GGMLQuantizationType, quants
from torch import Tensor

from dfastllm.errors import CheckpointError
from dfastllm.kernels.packed import GROUP, QTensor
from dfastllm.quant.gguf.blocks import DECODERS
from dfastllm.quant.gguf.reader import GgufFile, GgufTensor
from dfastllm.quant.gguf.types import FLOATS

__all__ = ["to_float", "to_qtensor"]

CHUNK = 1 << 22  # elements converted at a time
LARGEST_HALF = 65504.0


def to_qtensor(file: GgufFile, tensor: GgufTensor) -> tuple[QTensor, str | None]:
    """A matrix as QTensor and, where its values changed or its memory grew, a note that says so.

    F32 -> f32, BF16 -> bf16, F16 -> f32 (exact). Raises CheckpointError for a tensor that is no matrix, for scales or
    weights that are NaN, infinite or, as float16, out of range.
    """
    if len(tensor.shape) != 2:
        raise CheckpointError(f"{_where(file, tensor)} has shape {list(tensor.shape)}, wanted a matrix [n, k].")
    if tensor.type.name in FLOATS:
        values, note = _floats(file, tensor)
        return QTensor("bf16" if values.dtype == torch.bfloat16 else "f32", values), note
    if tensor.type.name in DECODERS:
        return _regroup(file, tensor)
    return _requantise(file, tensor)


def to_float(file: GgufFile, tensor: GgufTensor) -> Tensor:
    """Any tensor as float32 in its own shape (norms, biases, and matrices where float is wanted). Raises
    CheckpointError for values that are not finite."""
    if tensor.type.name in FLOATS:
        return _floats(file, tensor)[0].float()
    if tensor.type.name in DECODERS:
        matrix = replace(tensor, shape=(tensor.rows, tensor.shape[-1]))
        return _regroup(file, matrix)[0].dequantise().view(tensor.shape)
    out = torch.empty(tensor.rows, tensor.shape[-1])
    for start, stop in _chunks(tensor):
        out[start:stop] = torch.from_numpy(_decoded(file, tensor, start, stop))
    file.release(tensor)
    return out.view(tensor.shape)


def _where(file: GgufFile, tensor: GgufTensor) -> str:
    return f"{file.path}: tensor {tensor.name!r} ({tensor.type.name}, at byte {tensor.offset})"


def _chunks(tensor: GgufTensor) -> Iterator[tuple[int, int]]:
    step = max(1, CHUNK // tensor.shape[-1])
    for start in range(0, tensor.rows, step):
        yield start, min(start + step, tensor.rows)


def _require_finite(file: GgufFile, tensor: GgufTensor, values: np.ndarray, start: int, what: str) -> None:
    """values [rows, anything]: name the first row that has a NaN or an infinity."""
    bad = ~np.isfinite(values).all(axis=-1)
    if bad.any():
        row = start + int(bad.argmax())
        raise CheckpointError(
            f"{_where(file, tensor)} has {what} that are NaN or infinite, first in row {row}.",
            hint="The file is damaged, or was made from damaged weights.",
        )


def _floats(file: GgufFile, tensor: GgufTensor) -> tuple[Tensor, str | None]:
    kind, k = tensor.type.name, tensor.shape[-1]
    out = torch.empty(tensor.rows, k, dtype=torch.bfloat16 if kind == "BF16" else torch.float32)
    for start, stop in _chunks(tensor):
        raw = file.raw(tensor, start, stop)
        if kind == "BF16":
            chunk = torch.from_numpy(raw.view("<i2")).view(torch.bfloat16)
        else:
            chunk = torch.from_numpy(raw.view("<f4" if kind == "F32" else "<f2"))
        if not torch.isfinite(chunk).all():
            _require_finite(file, tensor, chunk.float().numpy(), start, "weights")
        out[start:stop] = chunk
    file.release(tensor)
    return out.view(tensor.shape), "float16 held as float32 (exact)" if kind == "F16" else None


def _regroup(file: GgufFile, tensor: GgufTensor) -> tuple[QTensor, str | None]:
    decoder, (n, k) = DECODERS[tensor.type.name], tensor.shape
    group = GROUP[decoder.format]
    codes = torch.empty(n, k, dtype=torch.int8 if decoder.format == "w8g" else torch.uint8)
    scales = torch.empty(n, k // group, dtype=torch.float16)
    mins: Tensor | None = None
    for start, stop in _chunks(tensor):
        blocks = file.raw(tensor, start, stop).reshape(-1, tensor.type.size)
        with np.errstate(over="ignore", invalid="ignore"):  # infinities and NaN are found below, with their row
            found, scale, least = decoder.decode(blocks)
        codes[start:stop] = torch.from_numpy(found.reshape(stop - start, k))
        repeat, rows = decoder.span // group, stop - start
        scales[start:stop] = _as_half(file, tensor, scale.reshape(rows, -1), start, "scales", repeat)
        if least is not None:
            mins = torch.empty_like(scales) if mins is None else mins
            mins[start:stop] = _as_half(file, tensor, least.reshape(rows, -1), start, "minima", repeat)
    file.release(tensor)
    return QTensor(decoder.format, codes, scales, mins), None


def _as_half(file: GgufFile, tensor: GgufTensor, rows: np.ndarray, start: int, what: str, repeat: int) -> Tensor:
    _require_finite(file, tensor, rows, start, what)
    if np.abs(rows).max(initial=0) > LARGEST_HALF:
        raise CheckpointError(
            f"{_where(file, tensor)} has {what} up to {np.abs(rows).max():g}, beyond float16 ({LARGEST_HALF:g}).",
            hint="No trained model has such weights; the file is damaged.",
        )
    return torch.from_numpy(np.repeat(rows, repeat, axis=-1)).half()


def _decoded(file: GgufFile, tensor: GgufTensor, start: int, stop: int) -> np.ndarray:
    """Rows as float32 [rows, k], by the `gguf` package."""
    raw = file.raw(tensor, start, stop)
    with np.errstate(over="ignore", invalid="ignore"):
        values: np.ndarray = quants.dequantize(raw, GGMLQuantizationType(tensor.type.number))
    _require_finite(file, tensor, values, start, "weights")
    return values


def _requantise(file: GgufFile, tensor: GgufTensor) -> tuple[QTensor, str | None]:
    """To w8g: one float16 scale for 32 inputs, amax / 127, so that a weight moves by at most amax / 250."""
    n, k = tensor.shape
    codes, scales = torch.empty(n, k, dtype=torch.int8), torch.empty(n, k // GROUP["w8g"], dtype=torch.float16)
    for start, stop in _chunks(tensor):
        values = torch.from_numpy(_decoded(file, tensor, start, stop)).view(stop - start, -1, GROUP["w8g"])
        amax = values.abs().amax(dim=-1)
        scale = (amax / 127).half()
        if not torch.isfinite(scale).all():
            _as_half(file, tensor, (amax / 127).numpy(), start, "scales", 1)
        wide = scale.float()[..., None]
        divided = torch.where(wide > 0, values / wide, 0.0)
        codes[start:stop] = divided.round().clamp(-127, 127).to(torch.int8).view(stop - start, k)
        scales[start:stop] = scale
    file.release(tensor)
    return QTensor("w8g", codes, scales), f"{tensor.type.name} quantised again to w8g (8-bit codes, groups of 32)"
