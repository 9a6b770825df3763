"""Independent plain forwards, written from the published descriptions over dictionaries of raw tensors: no code of the
package, float64, one sequence, loops instead of batched tricks. Slow and obvious on purpose.

Rotary positions are complex multiplications here, attention a loop over heads and rows, routing a loop over rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Weights = dict[str, Tensor]
Sees = Callable[[int, int], bool]  # (row, key) -> may attend


def full(row: int, key: int) -> bool:
    return True


def causal(row: int, key: int) -> bool:
    return key <= row


def block_causal(block: int) -> Sees:
    return lambda row, key: key // block <= row // block


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def linear(x: Tensor, w: Weights, name: str) -> Tensor:
    out = x @ w[f"{name}.weight"].T
    return out + w[f"{name}.bias"] if f"{name}.bias" in w else out


def swiglu(x: Tensor, w: Weights, gate: str, up: str, down: str) -> Tensor:
    g = linear(x, w, gate)
    return linear(g / (1 + torch.exp(-g)) * linear(x, w, up), w, down)


def turn(x: Tensor, theta: float, rotating: int) -> Tensor:
    """x [rows, dim] at positions 0, 1, ...: pair (i, i + rotating/2) is one complex number, multiplied by
    exp(1j * position * theta ** (-2 i / rotating))."""
    half = rotating // 2
    pairs = torch.complex(x[:, :half], x[:, half:rotating])
    for position in range(len(x)):
        for i in range(half):
            angle = position * theta ** (-2 * i / rotating)
            pairs[position, i] *= complex(math.cos(angle), math.sin(angle))
    return torch.cat([pairs.real, pairs.imag, x[:, rotating:]], dim=1)


def attention(q: Tensor, k: Tensor, v: Tensor, sees: Sees) -> Tensor:
    """q [rows, heads, dim], k, v [rows, kv_heads, dim], already rotated -> [rows, heads * dim]."""
    rows, heads, dim = q.shape
    out = torch.zeros_like(q)
    for head in range(heads):
        shared = head // (heads // k.shape[1])
        for row in range(rows):
            keys = [key for key in range(rows) if sees(row, key)]
            scores = torch.stack([q[row, head] @ k[key, shared] for key in keys]) / math.sqrt(dim)
            weights = torch.exp(scores - scores.max())
            weights = weights / weights.sum()
            out[row, head] = sum(weight * v[key, shared] for weight, key in zip(weights, keys, strict=True))
    return out.reshape(rows, heads * dim)


def heads_of(
    x: Tensor,
    heads: int,
    dim: int,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    theta: float | None = None,
    rotating: int = 0,
) -> Tensor:
    """[rows, heads * dim] -> [rows, heads, dim], each head normed and rotated where asked for."""
    parts = []
    for head in range(heads):
        part = x[:, head * dim : (head + 1) * dim]
        if norm is not None:
            part = rms(part, norm, eps)
        parts.append(part if theta is None else turn(part, theta, rotating or dim))
    return torch.stack(parts, dim=1)


def llada(w: Weights, c: dict, ids: list[int]) -> Tensor:
    """LLaDA-8B: OLMo's names, full attention. Returns logits [rows, vocab]."""
    dim = c["d_model"] // c["n_heads"]
    eps, theta = c["rms_norm_eps"], c["rope_theta"]
    x = w["model.transformer.wte.weight"][ids]
    for i in range(c["n_layers"]):
        block = f"model.transformer.blocks.{i}"
        h = rms(x, w[f"{block}.attn_norm.weight"], eps)
        q = heads_of(linear(h, w, f"{block}.q_proj"), c["n_heads"], dim, theta=theta)
        k = heads_of(linear(h, w, f"{block}.k_proj"), c["n_kv_heads"], dim, theta=theta)
        v = heads_of(linear(h, w, f"{block}.v_proj"), c["n_kv_heads"], dim)
        x = x + linear(attention(q, k, v, full), w, f"{block}.attn_out")
        h = rms(x, w[f"{block}.ff_norm.weight"], eps)
        x = x + swiglu(h, w, f"{block}.ff_proj", f"{block}.up_proj", f"{block}.ff_out")
    x = rms(x, w["model.transformer.ln_f.weight"], eps)
    head = "model.transformer.wte" if c["weight_tying"] else "model.transformer.ff_out"
    return linear(x, w, head)


def qwen(w: Weights, c: dict, ids: list[int], sees: Sees, mlp: Callable | None = None) -> Tensor:
    """The body that Dream and Fast-dLLM v2 (Qwen2.5: biases on q, k, v) and SDAR and LLaDA-MoE (norm on every head of
    q and k) share. `mlp(w, layer, h)` replaces the dense MLP."""
    dim = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    eps, theta = c["rms_norm_eps"], c["rope_theta"]
    x = w["model.embed_tokens.weight"][ids]
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        att = f"{layer}.self_attn"
        h = rms(x, w[f"{layer}.input_layernorm.weight"], eps)
        qn, kn = w.get(f"{att}.q_norm.weight"), w.get(f"{att}.k_norm.weight")
        q = heads_of(linear(h, w, f"{att}.q_proj"), c["num_attention_heads"], dim, norm=qn, eps=eps, theta=theta)
        k = heads_of(linear(h, w, f"{att}.k_proj"), c["num_key_value_heads"], dim, norm=kn, eps=eps, theta=theta)
        v = heads_of(linear(h, w, f"{att}.v_proj"), c["num_key_value_heads"], dim)
        x = x + linear(attention(q, k, v, sees), w, f"{att}.o_proj")
        h = rms(x, w[f"{layer}.post_attention_layernorm.weight"], eps)
        names = [f"{layer}.mlp.{part}_proj" for part in ("gate", "up", "down")]
        x = x + (swiglu(h, w, *names) if mlp is None or f"{names[0]}.weight" in w else mlp(w, i, h))
    x = rms(x, w["model.norm.weight"], eps)
    return linear(x, w, "model.embed_tokens" if c.get("tie_word_embeddings") else "lm_head")


def experts_of(w: Weights, mlp: str, row: Tensor, chosen: list[int], weights: list[float]) -> Tensor:
    out = torch.zeros_like(row)
    for expert, weight in zip(chosen, weights, strict=True):
        names = [f"{mlp}.experts.{expert}.{part}_proj" for part in ("gate", "up", "down")]
        out = out + weight * swiglu(row[None], w, *names)[0]
    return out


def softmax_mixture(c: dict) -> Callable[[Weights, int, Tensor], Tensor]:
    """LLaDA-MoE: probabilities over all experts, the best `num_experts_per_tok` as they are, not renormalised. SDAR-MoE
    (Qwen3-MoE) renormalises."""

    def mlp(w: Weights, layer: int, h: Tensor) -> Tensor:
        name = f"model.layers.{layer}.mlp"
        rows = []
        for row in h:
            scores = [float(s) for s in w[f"{name}.gate.weight"] @ row]
            total = sum(math.exp(s) for s in scores)
            probs = [math.exp(s) / total for s in scores]
            chosen = sorted(range(len(probs)), key=lambda e: -probs[e])[: c["num_experts_per_tok"]]
            weights = [probs[e] for e in chosen]
            if c["norm_topk_prob"]:
                weights = [weight / sum(weights) for weight in weights]
            rows.append(experts_of(w, name, row, chosen, weights))
        return torch.stack(rows)

    return mlp


def llada2_routing(scores: list[float], bias: list[float], c: dict) -> dict[int, float]:
    """expert -> weight of one row. Groups are ranked by the sum of their two best biased scores; the best experts of
    the best groups are taken by biased score; their weights are the unbiased scores, normalised, times the scale."""
    size = len(scores) // c["n_group"]
    biased = [s + b for s, b in zip(scores, bias, strict=True)]
    groups = [list(range(g * size, (g + 1) * size)) for g in range(c["n_group"])]
    ranked = sorted(groups, key=lambda g: -sum(sorted((biased[e] for e in g), reverse=True)[:2]))
    allowed = [expert for group in ranked[: c["topk_group"]] for expert in group]
    chosen = sorted(allowed, key=lambda e: -biased[e])[: c["num_experts_per_tok"]]
    total = sum(scores[e] for e in chosen)
    return {e: scores[e] / total * c["routed_scaling_factor"] for e in chosen}


def llada2(w: Weights, c: dict, ids: list[int], sees: Sees) -> Tensor:
    """LLaDA2.x: fused q,k,v, norms on heads, partial rotary, sigmoid routing, a shared expert, dense first layers."""
    heads, kv, dim = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    eps, theta = c["rms_norm_eps"], c["rope_theta"]
    rotating = int(dim * c["partial_rotary_factor"])
    x = w["model.word_embeddings.weight"][ids]
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        h = rms(x, w[f"{layer}.input_layernorm.weight"], eps)
        fused = linear(h, w, f"{layer}.attention.query_key_value")
        q, k, v = fused[:, : heads * dim], fused[:, heads * dim : (heads + kv) * dim], fused[:, (heads + kv) * dim :]
        qn, kn = w[f"{layer}.attention.query_layernorm.weight"], w[f"{layer}.attention.key_layernorm.weight"]
        q = heads_of(q, heads, dim, norm=qn, eps=eps, theta=theta, rotating=rotating)
        k = heads_of(k, kv, dim, norm=kn, eps=eps, theta=theta, rotating=rotating)
        x = x + linear(attention(q, k, heads_of(v, kv, dim), sees), w, f"{layer}.attention.dense")
        h = rms(x, w[f"{layer}.post_attention_layernorm.weight"], eps)
        mlp = f"{layer}.mlp"
        if i < c["first_k_dense_replace"]:
            x = x + swiglu(h, w, *[f"{mlp}.{part}_proj" for part in ("gate", "up", "down")])
            continue
        routed = []
        for row in h:
            scores = [1 / (1 + math.exp(-float(s))) for s in w[f"{mlp}.gate.weight"] @ row]
            weights = llada2_routing(scores, w[f"{mlp}.gate.expert_bias"].tolist(), c)
            routed.append(experts_of(w, mlp, row, list(weights), list(weights.values())))
        shared = swiglu(h, w, *[f"{mlp}.shared_experts.{part}_proj" for part in ("gate", "up", "down")])
        x = x + torch.stack(routed) + shared
    return linear(rms(x, w["model.norm.weight"], eps), w, "lm_head")
