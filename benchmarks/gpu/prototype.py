"""A prototype and a ruler for the triton runner: one packed forward in bfloat16 under one CUDA graph, with
few kernels of its own. No part of the product: it shows what the design reaches when nothing but the forward is there.

Every key lies in a page of the pool, so what a row sees is one number, `limit`, over its span's block table.

usage: python benchmarks/gpu/prototype.py check                        the kernels against plain torch (on a CPU with
                                                                       TRITON_INTERPRET=1)
       python benchmarks/gpu/prototype.py SHAPE SEQUENCES ROWS CONTEXT one forward: ms and GB/s
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from ceilings import graph_of, median_ms
from shapes import SHAPES
from torch import Tensor

__all__ = ["Forward", "prototype_forward"]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAGE = 16
FEW = 16  # query rows of a tile, all heads of a group counted
MANY = 64


@triton.jit
def _attention(
    q, kc, vc, o, tile_row, tile_rows, tile_span, table, limit, scale, q_stride, blocks_per_span,
    HQ: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """One program: up to BM / G rows of one span (G query heads share a K,V head) against all the keys they see.
    kc, vc [slots, KV, D]; table [spans, blocks]: page of each block; limit [rows]: keys the row sees."""
    t, h = tl.program_id(0), tl.program_id(1)
    n = tl.load(tile_rows + t)
    if n > 0:
        G: tl.constexpr = HQ // KV
        row0, span = tl.load(tile_row + t), tl.load(tile_span + t)
        m = tl.arange(0, BM)
        r, g = m // G, m % G
        live = r < n
        d = tl.arange(0, D)
        rows = row0 + r
        qv = tl.load(
            q + rows[:, None] * q_stride + (h * G + g)[:, None] * D + d[None, :], mask=live[:, None], other=0.0
        )
        lim = tl.load(limit + rows, mask=live, other=0)
        last = tl.max(lim)
        top = tl.full([BM], -1e30, tl.float32)
        den = tl.zeros([BM], tl.float32)
        acc = tl.zeros([BM, D], tl.float32)
        for at in range(0, last, BN):
            key = at + tl.arange(0, BN)
            page = tl.load(table + span * blocks_per_span + key // PAGE, mask=key < last, other=0)
            slot = page * PAGE + key % PAGE
            k = tl.load(kc + (slot * KV + h)[None, :] * D + d[:, None], mask=(key < last)[None, :], other=0.0)
            s = tl.dot(qv, k) * scale
            s = tl.where(key[None, :] < lim[:, None], s, -1e30)
            new = tl.maximum(top, tl.max(s, 1))
            p = tl.exp(s - new[:, None])
            keep = tl.exp(top - new)
            den = den * keep + tl.sum(p, 1)
            v = tl.load(vc + (slot * KV + h)[:, None] * D + d[None, :], mask=(key < last)[:, None], other=0.0)
            acc = acc * keep[:, None] + tl.dot(p.to(v.dtype), v)
            top = new
        out = acc / den[:, None]
        to = o + rows[:, None] * (HQ * D) + (h * G + g)[:, None] * D + d[None, :]
        tl.store(to, out.to(o.dtype.element_ty), mask=live[:, None])


@triton.jit
def _rope_write(qkv, cos, sin, slot, kc, vc, HQ: tl.constexpr, KV: tl.constexpr, D: tl.constexpr):
    """Rotates q and k in place and writes k, v of rows with slot >= 0. One program: one row, one head of q, k or v."""
    row, head = tl.program_id(0), tl.program_id(1)
    half: tl.constexpr = D // 2
    i = tl.arange(0, half)
    base = qkv + row * (HQ + 2 * KV) * D + head * D
    a = tl.load(base + i).to(tl.float32)
    b = tl.load(base + half + i).to(tl.float32)
    s = tl.load(slot + row)
    if head < HQ + KV:
        c, sn = tl.load(cos + row * half + i), tl.load(sin + row * half + i)
        a, b = a * c - b * sn, b * c + a * sn
        if head < HQ:
            tl.store(base + i, a.to(qkv.dtype.element_ty))
            tl.store(base + half + i, b.to(qkv.dtype.element_ty))
        elif s >= 0:
            to = kc + (s * KV + head - HQ) * D
            tl.store(to + i, a.to(kc.dtype.element_ty))
            tl.store(to + half + i, b.to(kc.dtype.element_ty))
    elif s >= 0:
        to = vc + (s * KV + head - HQ - KV) * D
        tl.store(to + i, a.to(vc.dtype.element_ty))
        tl.store(to + half + i, b.to(vc.dtype.element_ty))


@triton.jit
def _add_norm(x, y, w, o, H, eps, B: tl.constexpr, ADD: tl.constexpr):
    """x += y (if ADD); o = rmsnorm(x) * w. One program a row."""
    row = tl.program_id(0)
    i = tl.arange(0, B)
    m = i < H
    v = tl.load(x + row * H + i, mask=m, other=0.0).to(tl.float32)
    if ADD:
        v += tl.load(y + row * H + i, mask=m, other=0.0).to(tl.float32)
        tl.store(x + row * H + i, v.to(x.dtype.element_ty), mask=m)
    v = v * tl.rsqrt(tl.sum(v * v) / H + eps) * tl.load(w + i, mask=m, other=0.0).to(tl.float32)
    tl.store(o + row * H + i, v.to(o.dtype.element_ty), mask=m)


@triton.jit
def _silu_mul(gu, o, width, B: tl.constexpr):
    row, j = tl.program_id(0), tl.program_id(1)
    i = j * B + tl.arange(0, B)
    m = i < width
    g = tl.load(gu + row * 2 * width + i, mask=m, other=0.0).to(tl.float32)
    u = tl.load(gu + row * 2 * width + width + i, mask=m, other=0.0).to(tl.float32)
    tl.store(o + row * width + i, (g / (1 + tl.exp(-g)) * u).to(o.dtype.element_ty), mask=m)


@triton.jit
def _head_stats(logits, tok, best, norm, ent, V, B: tl.constexpr):
    """argmax, log-sum-exp and entropy of a row of logits, in one pass over it. One program a row."""
    row = tl.program_id(0)
    top = -1e30
    den = 0.0
    first = 0.0  # sum of exp(l - top) * l
    at_best = 0
    for at in range(0, V, B):
        i = at + tl.arange(0, B)
        x = tl.load(logits + row * V + i, mask=i < V, other=-1e30).to(tl.float32)
        m = tl.max(x)
        j = tl.min(tl.where(x == m, i, V))
        new = tl.maximum(top, m)
        keep = tl.exp(top - new)
        e = tl.where(i < V, tl.exp(x - new), 0.0)
        den = den * keep + tl.sum(e)
        first = first * keep + tl.sum(tl.where(i < V, e * x, 0.0))
        at_best = tl.where(m > top, j, at_best)
        top = new
    tl.store(tok + row, at_best)
    tl.store(best + row, top)
    tl.store(norm + row, top + tl.log(den))
    tl.store(ent + row, top + tl.log(den) - first / den)


def tiles(counts: Sequence[int], group: int, height: int) -> list[Tensor]:
    """First row, rows and span of every tile: at most height // group rows of one span each."""
    per, out, row = max(1, height // group), [], 0
    for span, n in enumerate(counts):
        out += [(row + i, min(per, n - i), span) for i in range(0, n, per)]
        row += n
    return [torch.tensor(column, dtype=torch.int32, device=DEVICE) for column in zip(*out, strict=True)]


class Forward:
    """A forward of so many rows of each sequence, over random weights and pages anywhere."""

    def __init__(self, name: str, sequences: int, rows: int, context: int, dtype: torch.dtype = torch.bfloat16) -> None:
        shape = SHAPES[name]
        self.shape, self.rows = shape, sequences * rows
        h, heads, kv, dim = shape.hidden, shape.heads, shape.kv_heads, shape.dim

        def weight(*size: int) -> Tensor:
            return torch.randn(*size, device=DEVICE, dtype=dtype) * 0.02

        def empty(*size: int) -> Tensor:
            return torch.empty(*size, device=DEVICE, dtype=dtype)

        self.layers = [
            (
                weight((heads + 2 * kv) * dim, h),
                weight(h, heads * dim),
                weight(2 * shape.inner, h),
                weight(h, shape.inner),
                torch.ones(h, device=DEVICE, dtype=dtype),
            )
            for _ in range(shape.layers)
        ]
        self.embed, self.head = weight(shape.vocab, h), weight(shape.vocab, h)
        blocks = -(-context // PAGE)
        self.keys = [weight(sequences * blocks * PAGE, kv, dim) for _ in range(shape.layers)]
        self.values = [weight(sequences * blocks * PAGE, kv, dim) for _ in range(shape.layers)]
        order = torch.randperm(sequences * blocks, device=DEVICE).to(torch.int32)
        self.table = order.view(sequences, blocks).contiguous()
        position = torch.arange(context - rows, context, device=DEVICE).repeat(sequences)
        span = torch.arange(sequences, device=DEVICE).repeat_interleave(rows)
        self.slot = (self.table[span, position // PAGE] * PAGE + position % PAGE).to(torch.int32)
        self.limit = torch.full((self.rows,), context, dtype=torch.int32, device=DEVICE)
        self.height = FEW if rows * (heads // kv) <= FEW else MANY
        self.tiles = tiles([rows] * sequences, heads // kv, self.height)
        angle = position[:, None].float() * 1e4 ** (-torch.arange(dim // 2, device=DEVICE).float() / (dim // 2))
        self.cos, self.sin = angle.cos().contiguous(), angle.sin().contiguous()
        self.ids = torch.randint(0, shape.vocab, (self.rows,), device=DEVICE)
        self.normed, self.mixed = empty(self.rows, h), empty(self.rows, heads * dim)
        self.product = empty(self.rows, shape.inner)
        self.token = torch.empty(self.rows, dtype=torch.int32, device=DEVICE)
        self.stats = torch.empty(3, self.rows, device=DEVICE)
        self.bytes = dtype.itemsize * (shape.layer_weights + shape.head_weights)

    def run(self) -> Tensor:
        """Logits [rows, vocabulary]."""
        shape, rows = self.shape, self.rows
        h, heads, kv, dim = shape.hidden, shape.heads, shape.kv_heads, shape.dim
        width = triton.next_power_of_2(h)
        x, y = F.embedding(self.ids, self.embed), None
        for (qkv_w, out_w, up_w, down_w, norm), k, v in zip(self.layers, self.keys, self.values, strict=True):
            _add_norm[(rows,)](x, x if y is None else y, norm, self.normed, h, 1e-6, B=width, ADD=y is not None)
            qkv = F.linear(self.normed, qkv_w)
            _rope_write[(rows, heads + 2 * kv)](qkv, self.cos, self.sin, self.slot, k, v, HQ=heads, KV=kv, D=dim)
            _attention[(len(self.tiles[0]), kv)](
                qkv, k, v, self.mixed, *self.tiles, self.table, self.limit, dim**-0.5, qkv.stride(0),
                self.table.shape[1], HQ=heads, KV=kv, D=dim, BM=max(self.height, heads // kv), BN=64, PAGE=PAGE,
            )  # fmt: skip
            y = F.linear(self.mixed, out_w)
            _add_norm[(rows,)](x, y, norm, self.normed, h, 1e-6, B=width, ADD=True)
            both = F.linear(self.normed, up_w)
            _silu_mul[(rows, triton.cdiv(shape.inner, 1024))](both, self.product, shape.inner, B=1024)
            y = F.linear(self.product, down_w)
        _add_norm[(rows,)](x, y, self.layers[0][4], self.normed, h, 1e-6, B=width, ADD=True)
        logits = F.linear(self.normed, self.head)
        _head_stats[(rows,)](logits, self.token, *self.stats, shape.vocab, B=4096)
        return logits


def prototype_forward(name: str, sequences: int, rows: int, context: int) -> tuple[float, int]:
    """Milliseconds of a forward under a graph, and the bytes of its weights."""
    with torch.inference_mode():
        forward = Forward(name, sequences, rows, context)
        return median_ms(graph_of(forward.run)), forward.bytes


def plain(f: Forward, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """The same logits in plain torch, 4 rows of each sequence."""
    shape = f.shape
    h, heads, kv, dim = shape.hidden, shape.heads, shape.kv_heads, shape.dim
    half = dim // 2
    cos, sin = f.cos[:, None], f.sin[:, None]

    def rotated(t: Tensor) -> Tensor:
        a, b = t[..., :half], t[..., half:]
        return torch.cat((a * cos - b * sin, a * sin + b * cos), -1).to(t.dtype)

    x = F.embedding(f.ids, f.embed)
    for (qkv_w, out_w, up_w, down_w, norm), k, v in zip(f.layers, keys, values, strict=True):
        qkv = F.linear(F.rms_norm(x, (h,), norm, 1e-6), qkv_w).view(-1, heads + 2 * kv, dim)
        q, new_k, new_v = qkv.split((heads, kv, kv), 1)
        k[f.slot.long()], v[f.slot.long()] = rotated(new_k), new_v
        q, out = rotated(q), []
        for s, table in enumerate(f.table):
            slots = (table.long()[:, None] * PAGE + torch.arange(PAGE, device=DEVICE)).flatten()[: int(f.limit[0])]
            mine = (t.transpose(0, 1) for t in (q[4 * s : 4 * s + 4], k[slots], v[slots]))
            out.append(F.scaled_dot_product_attention(*mine, enable_gqa=True).transpose(0, 1))
        x = x + F.linear(torch.cat(out).reshape(f.rows, -1), out_w)
        gate, up = F.linear(F.rms_norm(x, (h,), norm, 1e-6), up_w).chunk(2, -1)
        x = x + F.linear(F.silu(gate) * up, down_w)
    return F.linear(F.rms_norm(x, (h,), f.layers[0][4], 1e-6), f.head).float()


def check() -> bool:
    """Whether the kernels give the logits and statistics of plain torch; prints by how much they differ."""
    torch.manual_seed(0)
    tight = DEVICE == "cpu"
    f = Forward("tiny", 3, 4, 40, torch.float32 if tight else torch.bfloat16)
    with torch.inference_mode():
        keys, values = ([t.clone() for t in side] for side in (f.keys, f.values))
        logits = f.run().float()
        wanted = plain(f, keys, values)
    apart = float((logits - wanted).norm() / wanted.norm())
    norm = float((f.stats[1] - torch.logsumexp(logits, -1)).abs().max())
    entropy = float((f.stats[2] - torch.distributions.Categorical(logits=logits).entropy()).abs().max())
    same = bool((f.token.long() == logits.argmax(-1)).all())
    print(json.dumps({"logits": apart, "norm": norm, "entropy": entropy, "argmax_equal": same}))
    return same and apart < (1e-4 if tight else 2e-2) and max(norm, entropy) < 1e-3


def main() -> int:
    if sys.argv[1:] == ["check"]:
        return 0 if check() else 1
    name, *sizes = sys.argv[1:]
    ms, size = prototype_forward(name, *map(int, sizes))
    print(json.dumps({"shape": name, "sizes": sizes, "graph_ms": round(ms, 3), "GBps": round(size / ms / 1e6)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
