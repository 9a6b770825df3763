"""Kernels that work on rows by themselves: add and norm, activation times up, how inputs are quantised, and head norms
with rotation and the write of K and V. The twins are those of plain.py; int8 codes of the same floats are the same.

A row is one program's, in one order of its sums, so its bits depend on nothing else.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from dfastllm.kernels.activations import Acts
from dfastllm.kernels.linear_plain import LEAST_AMAX
from dfastllm.kernels.triton.kv import KvSide
from dfastllm.kernels.triton.laid import Laid
from dfastllm.kernels.triton.tiles import MAGIC, narrowed
from dfastllm.kernels.triton.weight import MOST_FP8

__all__ = ["KINDS", "add_norm", "empty", "gate", "prepare", "rope_write"]

ACTIVATIONS = ("", "silu", "gelu_tanh")
CHUNK = 1024  # columns of a program where a row need not be seen whole
KINDS = {"f32": 0, "bf16": 1, "f16": 1, "fp8": 2, "row8": 3, "group8": 4}
DTYPES = {
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "fp8": torch.float8_e4m3fn,
    "row8": torch.int8,
    "group8": torch.int8,
}
WHOLE = ("fp8", "row8")  # one scale a row
WIDEST = 8192  # columns that a program holds in its registers, if it can go through them twice


def prepare(x: Tensor, kind: str, *, block: int = 1) -> Acts:
    """See the twin."""
    rows, k = x.shape
    acts = empty(kind, rows, k, x.device)
    _launch(acts, block, x, x, None, 0.0, 1.0, None, 0.0)
    return acts


def add_norm(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    eps: float,
    *,
    factor: float = 1.0,
    kind: str,
    post: tuple[Tensor, float] | None = None,
) -> Acts:
    """See the twin. post: weight float32 [k] and eps of a norm of y before it is added."""
    acts = empty(kind, len(x), x.shape[1], x.device)
    after = (None, 0.0) if post is None else post
    _launch(acts, 1, x, y, weight, eps, factor, *after, add=y is not None)
    return acts


def gate(y: Tensor, activation: str, kind: str, *, block: int = 1) -> Acts:
    """See the twin."""
    acts = empty(kind, len(y), y.shape[1] // 2, y.device)
    _launch(acts, block, y, y, None, 0.0, 1.0, None, 0.0, activation=activation)
    return acts


def empty(kind: str, rows: int, k: int, device: torch.device) -> Acts:
    """Rows of a kind, uninitialised."""
    codes = kind in ("row8", "group8")
    stride = -(-k // 32) * 32 if codes else k
    data = torch.empty(rows, stride, dtype=DTYPES[kind], device=device)
    if kind == "group8":
        by_group = torch.empty(rows, stride // 32, device=device)
        return Acts(kind, rows, k, data, by_group, torch.empty(rows, stride // 16, dtype=torch.int32, device=device))
    scales = torch.empty(rows, device=device) if kind in WHOLE else None
    return Acts(kind, rows, k, data, scales, torch.empty(rows, dtype=torch.int32, device=device) if codes else None)


def _launch(
    acts: Acts,
    block: int,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    eps: float,
    factor: float,
    post: Tensor | None,
    post_eps: float,
    *,
    add: bool = False,
    activation: str = "",
) -> None:
    rows, k, stride = acts.rows, acts.k, acts.data.shape[1]
    if not rows:
        return
    whole = acts.kind in WHOLE or weight is not None or post is not None
    width = triton.next_power_of_2(max(stride, 32)) if whole else max(CHUNK, block)
    some, turn = acts.data, float(np.float32(1.0) / np.sqrt(np.float32(block)))
    how = {"KIND": KINDS[acts.kind], "GATE": ACTIVATIONS.index(activation), "TURNS": block.bit_length() - 1}
    if width > WIDEST and weight is None and y is x:
        _long[(rows,)](
            x, some, acts.scales, some if acts.sums is None else acts.sums, x.stride(0), k, stride, turn,
            float(LEAST_AMAX), B=max(2 * CHUNK, block), **how, num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
        return
    _rows[(rows, 1 if whole else triton.cdiv(stride, width))](
        x, x if y is None else y, x if weight is None else weight, x if post is None else post, some,
        some if acts.scales is None else acts.scales, some if acts.sums is None else acts.sums,
        x.stride(0), (x if y is None else y).stride(0), k, stride, 1.0 / k, eps, post_eps, factor, turn,
        float(LEAST_AMAX),
        B=width, **how, ADD=add, NORM=weight is not None, POST=post is not None,
        num_warps=4 if width <= 4096 else 8 if width <= 8192 else 16, enable_fp_fusion=False,
    )  # fmt: skip


MOST = tl.constexpr(MOST_FP8)


@triton.jit
def _butterflies(v, B: tl.constexpr, APART: tl.constexpr):
    a, b = tl.split(tl.permute(tl.reshape(v, [B // (2 * APART), 2, APART]), 0, 2, 1))
    return tl.reshape(tl.permute(tl.join(a + b, a - b), 0, 2, 1), [B])


@triton.jit
def _turned(v, B: tl.constexpr, TURNS: tl.constexpr):
    """Butterflies (a, b) -> (a + b, a - b) of partners 1, 2, 4 ... apart."""
    for i in tl.static_range(TURNS):
        v = _butterflies(v, B, 1 << i)
    return v


@triton.jit
def _worst(v, axis: tl.constexpr):
    """max |v|, infinite where something is not finite."""
    size = tl.abs(v)
    return tl.max(tl.where(size < float("inf"), size, float("inf")), axis)


@triton.jit
def _codes(v, worst, inverse, least):
    """int8, 0 where the worst is too small or not finite."""
    fits = (worst < float("inf")) & (worst >= least)
    rounded = (v * tl.where(fits, inverse, 0.0) + MAGIC) - MAGIC
    return tl.where(fits, rounded, 0.0).to(tl.int8)


@triton.jit
def _value(x, k, i, GATE: tl.constexpr):
    """Columns i of a row, or activation(first k) * the k behind them."""
    v = tl.load(x + i, mask=i < k, other=0.0).to(tl.float32)
    if GATE > 0:
        up = tl.load(x + k + i, mask=i < k, other=0.0).to(tl.float32)
        inner = v
        if GATE == 2:
            inner = 1.59576912 * (v + 0.044715 * v * v * v)
        v = tl.math.div_rn(v, 1.0 + tl.exp(-inner)) * up
    return v


@triton.jit
def _scale(worst, least, to, KIND: tl.constexpr):
    """What the codes of a row are multiples of, stored; NaN where something is not finite."""
    if KIND == 2:
        scale = tl.where(worst == 0.0, 1.0, tl.math.div_rn(worst, MOST))
    else:
        scale = tl.where(worst >= least, tl.math.div_rn(worst, 127.0), 0.0)
    tl.store(to, tl.where(worst < float("inf"), scale, float("nan")))
    return scale


@triton.jit
def _coded(v, worst, scale, least, KIND: tl.constexpr):
    """Codes of a row: float32 for float8, int8."""
    if KIND == 2:
        code = tl.math.div_rn(v, scale)
        code = tl.where(code > MOST, MOST, tl.where(code < -MOST, -MOST, code))
    else:
        code = _codes(v, worst, tl.math.div_rn(127.0, worst), least)
    return code


@triton.jit
def _long(
    x, out, scales, sums, x_stride, k, stride, turn, least,
    B: tl.constexpr, KIND: tl.constexpr, GATE: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    """A row of one scale that is too long for registers: once for the scale, and again for the codes."""
    row = tl.program_id(0).to(tl.int64)
    most = tl.zeros([B], tl.float32)
    for at in range(0, stride, B):
        v = _value(x + row * x_stride, k, at + tl.arange(0, B), GATE)
        if TURNS > 0:
            v = _turned(v, B, TURNS) * turn
        size = tl.abs(v)
        most = tl.maximum(most, tl.where(size < float("inf"), size, float("inf")))
    worst = tl.max(most, 0)
    scale = _scale(worst, least, scales + row, KIND)
    total = tl.zeros([B], tl.int32)
    for at in range(0, stride, B):
        i = at + tl.arange(0, B)
        v = _value(x + row * x_stride, k, i, GATE)
        if TURNS > 0:
            v = _turned(v, B, TURNS) * turn
        code = _coded(v, worst, scale, least, KIND)
        tl.store(out + row * stride + i, narrowed(code, out.dtype.element_ty), mask=i < stride)
        if KIND == 3:
            total += code.to(tl.int32)
    if KIND == 3:
        tl.store(sums + row, tl.sum(total, 0))


@triton.jit
def _rows(
    x, y, weight, post, out, scales, sums, x_stride, y_stride, k, stride, inverse_k, eps, post_eps, factor, turn,
    least, B: tl.constexpr, KIND: tl.constexpr, ADD: tl.constexpr, NORM: tl.constexpr, POST: tl.constexpr,
    GATE: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    """B columns of a row: v = x (+ factor y, stored), or activation(first half) * second half; then norm or turns; then
    as KIND, see KINDS."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = chunk * B + tl.arange(0, B)
    inside = i < k
    v = _value(x + row * x_stride, k, i, GATE)
    if ADD:
        more = tl.load(y + row * y_stride + i, mask=inside, other=0.0).to(tl.float32)
        if POST:
            root = tl.math.div_rn(1.0, tl.sqrt_rn(tl.sum(more * more, 0) * inverse_k + post_eps))
            more = more * root * tl.load(post + i, mask=inside, other=0.0)
        v += factor * more
        tl.store(x + row * x_stride + i, v, mask=inside)
    if NORM:
        root = tl.math.div_rn(1.0, tl.sqrt_rn(tl.sum(v * v, 0) * inverse_k + eps))
        v = v * root * tl.load(weight + i, mask=inside, other=0.0)
    if TURNS > 0:
        v = _turned(v, B, TURNS) * turn
    to = out + row * stride + i
    if KIND <= 1:
        tl.store(to, narrowed(v, out.dtype.element_ty), mask=inside)
    elif KIND <= 3:
        worst = _worst(v, 0)
        size = _scale(worst, least, scales + row, KIND)
        code = _coded(v, worst, size, least, KIND)
        tl.store(to, narrowed(code, out.dtype.element_ty), mask=i < stride)
        if KIND == 3:
            tl.store(sums + row, tl.sum(code.to(tl.int32), 0))
    else:
        groups = tl.reshape(v, [B // 32, 32])
        worst = _worst(groups, 1)
        bits = tl.math.div_rn(worst, 127.0).to(tl.int32, bitcast=True)
        scale = ((bits + 0x1FFFFF) & -0x200000).to(tl.float32, bitcast=True)  # two bits of its fraction, upwards
        code = _codes(groups, worst[:, None], tl.math.div_rn(1.0, scale)[:, None], least)
        g = chunk * (B // 32) + tl.arange(0, B // 32)
        scale = tl.where(worst < float("inf"), tl.where(worst >= least, scale, 0.0), float("nan"))
        tl.store(scales + row * (stride // 32) + g, scale, mask=g < stride // 32)
        tl.store(to, tl.reshape(code, [B]), mask=i < stride)
        halves = chunk * (B // 16) + tl.arange(0, B // 16)
        both = tl.sum(tl.reshape(code.to(tl.int32), [B // 16, 16]), 1)
        tl.store(sums + row * (stride // 16) + halves, both, mask=halves < stride // 16)


def rope_write(
    qkv: Tensor,
    laid: Laid,
    cos: Tensor | None,
    sin: Tensor | None,
    kv: KvSide,
    *,
    heads: int,
    kv_heads: int,
    dim: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """See the twin."""
    rows = len(qkv)
    if not rows:
        return
    half = 0 if cos is None else cos.shape[1]
    rest = dim - 2 * half
    whole = q_norm is not None and len(q_norm) > dim, k_norm is not None and len(k_norm) > dim
    most = triton.next_power_of_2(heads)
    at_once = most if any(whole) else min(most, 8)
    blocks = triton.cdiv(heads, at_once), triton.cdiv(kv_heads, at_once)
    scales = (qkv, qkv) if kv.k_scales is None or kv.v_scales is None else (kv.k_scales, kv.v_scales)
    _rope_write[(rows, blocks[0] + 2 * blocks[1])](
        qkv, qkv if cos is None else cos, qkv if sin is None else sin, laid.slot, kv.k, kv.v, *scales,
        qkv if q_norm is None else q_norm, qkv if k_norm is None else k_norm, qkv.stride(0), eps, float(LEAST_AMAX),
        HEADS=heads, KV_HEADS=kv_heads, D=dim, HALF=half, HALFP=triton.next_power_of_2(max(half, 1)),
        REST=rest, RESTP=triton.next_power_of_2(max(rest, 1)), HB=at_once, Q_BLOCKS=blocks[0], K_BLOCKS=blocks[1],
        Q_NORM=0 if q_norm is None else 1 + whole[0], K_NORM=0 if k_norm is None else 1 + whole[1],
        FORM=("float", "int8", "fp8").index(
            "int8" if kv.k_scales is not None else "fp8" if kv.k.dtype == torch.float8_e4m3fn else "float"
        ),
        num_warps=1 if at_once * dim <= 256 else 4, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def _store_part(to, v, inside, inverse, fits, FORM: tl.constexpr):
    """v [heads, dims] of K or V as FORM has it."""
    if FORM == 1:
        code = (tl.where(tl.abs(v) < float("inf"), v, 0.0) * inverse[:, None] + MAGIC) - MAGIC
        tl.store(to, tl.where(fits[:, None], code, 0.0).to(tl.int8), mask=inside)
    elif FORM == 2:
        held = tl.where(v > MOST, MOST, tl.where(v < -MOST, -MOST, v))
        tl.store(to, narrowed(held, to.dtype.scalar.element_ty), mask=inside)
    else:
        tl.store(to, narrowed(v, to.dtype.scalar.element_ty), mask=inside)


@triton.jit
def _store_row(
    into, scales, slot, head, there, a, b, rest, least, KV_HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    HALFP: tl.constexpr, REST: tl.constexpr, RESTP: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """K or V of some heads of a row, in three parts: the halves of each pair, and dims that do not rotate."""
    j, r = tl.arange(0, HALFP), tl.arange(0, RESTP)
    worst = tl.maximum(tl.maximum(_worst(a, 1), _worst(b, 1)), _worst(rest, 1))
    fits = (worst < float("inf")) & (worst >= least)
    inverse = tl.where(fits, tl.math.div_rn(127.0, worst), 0.0)
    at = (slot.to(tl.int64) * KV_HEADS + head) * D
    if HALF > 0:
        pair = there[:, None] & (j < HALF)[None, :]
        _store_part(into + at[:, None] + j[None, :], a, pair, inverse, fits, FORM)
        _store_part(into + at[:, None] + HALF + j[None, :], b, pair, inverse, fits, FORM)
    if REST > 0:
        left = there[:, None] & (r < REST)[None, :]
        _store_part(into + at[:, None] + 2 * HALF + r[None, :], rest, left, inverse, fits, FORM)
    if FORM == 1:
        scale = tl.where(worst < float("inf"), tl.math.div_rn(worst, 127.0), float("nan"))
        tl.store(scales + slot.to(tl.int64) * KV_HEADS + head, scale, mask=there)


@triton.jit
def _normed(
    a, b, rest, norm, head, eps, COUNT: tl.constexpr, WHOLE: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    HALFP: tl.constexpr, REST: tl.constexpr, RESTP: tl.constexpr,
):  # fmt: skip
    """RMSNorm of each head, or (WHOLE) of all COUNT heads at once."""
    j, r = tl.arange(0, HALFP), tl.arange(0, RESTP)
    square = tl.sum(a * a, 1) + tl.sum(b * b, 1) + tl.sum(rest * rest, 1)
    weights = norm + tl.zeros_like(head)
    if WHOLE:
        square = tl.zeros_like(square) + tl.sum(square, 0) / COUNT
        weights = norm + tl.where(head < COUNT, head, 0) * D
    root = tl.math.div_rn(1.0, tl.sqrt_rn(square / D + eps))[:, None]
    pair, left = (j < HALF)[None, :], (r < REST)[None, :]
    a = a * root * tl.load(weights[:, None] + j[None, :], mask=pair, other=0.0)
    b = b * root * tl.load(weights[:, None] + HALF + j[None, :], mask=pair, other=0.0)
    rest = rest * root * tl.load(weights[:, None] + 2 * HALF + r[None, :], mask=left, other=0.0)
    return a, b, rest


@triton.jit
def _rope_write(
    qkv, cos, sin, slots, k, v, k_scales, v_scales, q_norm, k_norm, x_stride, eps, least,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, HALFP: tl.constexpr,
    REST: tl.constexpr, RESTP: tl.constexpr, HB: tl.constexpr, Q_BLOCKS: tl.constexpr, K_BLOCKS: tl.constexpr,
    Q_NORM: tl.constexpr, K_NORM: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """HB heads of q, k or v of a row."""
    row, block = tl.program_id(0), tl.program_id(1)
    is_q, is_v = block < Q_BLOCKS, block >= Q_BLOCKS + K_BLOCKS
    first = tl.where(is_q, 0, tl.where(is_v, HEADS + KV_HEADS, HEADS))
    head = (block - tl.where(is_q, 0, tl.where(is_v, Q_BLOCKS + K_BLOCKS, Q_BLOCKS))) * HB + tl.arange(0, HB)
    there = head < tl.where(is_q, HEADS, KV_HEADS)
    j, r = tl.arange(0, HALFP), tl.arange(0, RESTP)
    pair, left = there[:, None] & (j < HALF)[None, :], there[:, None] & (r < REST)[None, :]
    base = qkv + row.to(tl.int64) * x_stride + ((first + head) * D)[:, None]
    a = tl.load(base + j[None, :], mask=pair, other=0.0).to(tl.float32)
    b = tl.load(base + HALF + j[None, :], mask=pair, other=0.0).to(tl.float32)
    rest = tl.load(base + 2 * HALF + r[None, :], mask=left, other=0.0).to(tl.float32)
    slot = tl.load(slots + row)
    if is_v:
        if slot >= 0:
            _store_row(v, v_scales, slot, head, there, a, b, rest, least, KV_HEADS, D, HALF, HALFP, REST, RESTP, FORM)
    else:
        if Q_NORM > 0:
            if is_q:
                a, b, rest = _normed(
                    a, b, rest, q_norm, head, eps, HEADS, Q_NORM == 2, D, HALF, HALFP, REST, RESTP
                )  # fmt: skip
        if K_NORM > 0:
            if block >= Q_BLOCKS:
                a, b, rest = _normed(
                    a, b, rest, k_norm, head, eps, KV_HEADS, K_NORM == 2, D, HALF, HALFP, REST, RESTP
                )  # fmt: skip
        if HALF > 0:
            c = tl.load(cos + row * HALF + j, mask=j < HALF, other=0.0)[None, :]
            s = tl.load(sin + row * HALF + j, mask=j < HALF, other=0.0)[None, :]
            a, b = a * c - b * s, b * c + a * s
        held_a, held_b = narrowed(a, qkv.dtype.element_ty), narrowed(b, qkv.dtype.element_ty)
        held_rest = narrowed(rest, qkv.dtype.element_ty)
        tl.store(base + j[None, :], held_a, mask=pair)
        tl.store(base + HALF + j[None, :], held_b, mask=pair)
        tl.store(base + 2 * HALF + r[None, :], held_rest, mask=left)
        if (block >= Q_BLOCKS) & (slot >= 0):
            _store_row(
                k, k_scales, slot, head, there, held_a.to(tl.float32), held_b.to(tl.float32), held_rest.to(tl.float32),
                least, KV_HEADS, D, HALF, HALFP, REST, RESTP, FORM,
            )  # fmt: skip
