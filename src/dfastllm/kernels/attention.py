"""Attention of one span's rows over its keys: the plain torch form."""

from __future__ import annotations

import torch
import torch.nn.functional as F

__all__ = ["span_attention"]


def span_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """softmax(q k^T / sqrt(dim)) v with grouped-query heads.

    q [rows, heads, dim]; k, v [keys, kv_heads, dim]; mask bool [rows, keys] (True: visible) or None. -> [rows, heads,
    dim]. The query heads that share a K,V head are folded into the rows, so K and V are never expanded.
    """
    rows, heads, dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    # [kv_heads, group * rows, dim]: row g * rows + r is query head h * group + g at row r
    folded = q.view(rows, kv_heads, group, dim).permute(1, 2, 0, 3).reshape(1, kv_heads, group * rows, dim)
    if mask is not None and group > 1:
        mask = mask.repeat(group, 1)
    out = F.scaled_dot_product_attention(
        folded, k.transpose(0, 1).unsqueeze(0), v.transpose(0, 1).unsqueeze(0), attn_mask=mask
    )
    return out.view(kv_heads, group, rows, dim).permute(2, 0, 1, 3).reshape(rows, heads, dim)
