"""A wiring as a program: frozen data that the torch module, the packed twin and the native forward walk.

Two registers: the stream x, which the layers add to, and the branch h. A branch begins as the stream, at the start of a
layer and after every Add; each op changes it, Add adds it to the stream. So a pre-norm is a Norm first in its branch, a
post-norm one last before Add, and a model without pre-norms starts its branches with Linear.

    Norm, Linear (q, k, v), HeadNorm, Rope, Attend, Linear (o), Add      attention of Qwen 3
    Norm, Linear (gate, up), Gate, Linear (down), Add                    its MLP

An op holds everything that its arithmetic needs but weights, whose names (within a layer) it gives. `standard` writes
the programs of the families that differ in details; a family may as well write its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dfastllm.models.config import DecoderConfig, MoEConfig, RopeScaling

__all__ = [
    "Activation",
    "Add",
    "Attend",
    "Experts",
    "Gate",
    "HeadNorm",
    "Linear",
    "Matrix",
    "Norm",
    "Op",
    "Program",
    "Rope",
    "RopeTable",
    "offsets",
    "standard",
]

Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True, slots=True)
class Norm:
    """h <- h / sqrt(mean(h^2) + eps) * (offset + weight), over `size` dims."""

    name: str
    size: int
    eps: float
    offset: float = 0.0  # 1: the stored weights are distances from 1 (Gemma)


@dataclass(frozen=True, slots=True)
class Matrix:
    """A stored weight [sum(outputs), inputs]. outputs: several where parts lie in one matrix, as a fused q, k, v."""

    name: str
    inputs: int
    outputs: tuple[int, ...]
    bias: bool = False


@dataclass(frozen=True, slots=True)
class Linear:
    """h <- h W^T + bias, the parts of all matrices side by side."""

    matrices: tuple[Matrix, ...]


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """q and k, the first two parts of h, are normed over every `size` dims: of a head, or the whole projection."""

    q: Norm
    k: Norm


@dataclass(frozen=True, slots=True)
class Rope:
    """q and k, in heads of `dim`, are rotated by a table of the program. Without this op a layer knows no positions."""

    table: int
    dim: int


@dataclass(frozen=True, slots=True)
class Attend:
    """h = (q, k, v) <- softmax(scores) v over the keys that a row sees; query head i reads K,V head
    i * kv_heads // heads.

    scale, softcap: a score is s = scale * q k, or softcap * tanh(s / softcap) where softcap > 0.
    window: a row at position p sees only keys at positions above p - window; 0: no window.
    """

    heads: int
    kv_heads: int
    dim: int
    scale: float
    window: int = 0
    softcap: float = 0.0


@dataclass(frozen=True, slots=True)
class Gate:
    """h = (gate, up) <- activation(gate) * up. gelu_tanh: the approximation by tanh."""

    activation: Activation = "silu"


@dataclass(frozen=True, slots=True)
class Experts:
    """h <- the sum of the chosen experts' outputs times their weights, plus the shared expert's."""

    name: str
    hidden: int
    config: MoEConfig


@dataclass(frozen=True, slots=True)
class Add:
    """x <- x + factor * h, and the next branch begins."""

    factor: float = 1.0


Op = Norm | Linear | HeadNorm | Rope | Attend | Gate | Experts | Add


@dataclass(frozen=True, slots=True)
class RopeTable:
    """Rotary frequencies: the first `dim` dims of a head rotate, in pairs (i, i + dim / 2). max_len: of the
    context that the model is loaded for."""

    theta: float
    dim: int
    scaling: RopeScaling | None = None
    max_len: int = 0


@dataclass(frozen=True, slots=True)
class Program:
    """x begins as embed_factor times the embedding's rows; logits are those of norm(x), times logits_factor, then
    softcap * tanh(logits / softcap) where logits_softcap > 0."""

    layers: tuple[tuple[Op, ...], ...]
    norm: Norm
    ropes: tuple[RopeTable, ...]
    embed_factor: float = 1.0
    logits_factor: float = 1.0
    logits_softcap: float = 0.0


def standard(
    config: DecoderConfig,
    *,
    activation: Activation = "silu",
    pre_norms: bool = True,
    post_norms: bool = False,
    norm_offset: float = 0.0,
    whole_qk_norm: bool = False,
    fused_qkv: bool = False,
    fused_gate_up: bool = False,
) -> Program:
    """Attention, then a gated MLP or a mixture, each around the stream; every field of the config has its place.

    whole_qk_norm: q and k norms go over the whole projection (OLMo 2) instead of each head. fused_qkv, fused_gate_up:
    these lie in one matrix.
    """
    ropes = [RopeTable(config.rope_theta, config.rotary_dim, config.rope_scaling, config.max_len)]
    if config.local_theta:
        ropes.append(RopeTable(config.local_theta, config.rotary_dim))
    scale = config.attention_scale or config.head_dim**-0.5
    hidden, dim = config.hidden_size, config.head_dim
    q, kv = config.heads * dim, config.kv_heads * dim

    def norm(name: str, size: int = hidden) -> Norm:
        return Norm(name, size, config.norm_eps, norm_offset)

    def parts(inside: str, fused: str | None, sizes: dict[str, int], bias: bool) -> Linear:
        if fused:
            return Linear((Matrix(f"{inside}.{fused}_proj", hidden, tuple(sizes.values()), bias),))
        return Linear(tuple(Matrix(f"{inside}.{name}_proj", hidden, (size,), bias) for name, size in sizes.items()))

    def layer(i: int) -> tuple[Op, ...]:
        windowed = config.is_windowed(i)
        before = [norm("attn_norm")], [norm("mlp_norm")]
        after = [norm("attn_post_norm")], [norm("mlp_post_norm")]
        ops: list[Op] = [*(before[0] if pre_norms else [])]
        ops.append(parts("attn", "qkv" if fused_qkv else None, {"q": q, "k": kv, "v": kv}, config.qkv_bias))
        if config.qk_norm:
            sizes = (q, kv) if whole_qk_norm else (dim, dim)
            ops.append(HeadNorm(norm("attn.q_norm", sizes[0]), norm("attn.k_norm", sizes[1])))
        if config.rotates(i):
            ops.append(Rope(1 if windowed and config.local_theta else 0, dim))
        window = config.window if windowed else 0
        ops.append(Attend(config.heads, config.kv_heads, dim, scale, window, config.attention_softcap))
        ops.append(Linear((Matrix("attn.o_proj", q, (hidden,), config.out_bias),)))
        ops += [*(after[0] if post_norms else []), Add(config.residual_factor), *(before[1] if pre_norms else [])]
        if config.moe is not None and config.is_mixture(i):
            ops.append(Experts("mlp", hidden, config.moe))
        else:
            inner = config.intermediate_size
            fused = "gate_up" if fused_gate_up else None
            ops.append(parts("mlp", fused, {"gate": inner, "up": inner}, config.mlp_bias))
            ops += [Gate(activation), Linear((Matrix("mlp.down_proj", inner, (hidden,), config.mlp_bias),))]
        ops += [*(after[1] if post_norms else []), Add(config.residual_factor)]
        return tuple(ops)

    return Program(
        tuple(layer(i) for i in range(config.layers)),
        norm("norm"),
        tuple(ropes),
        config.embed_factor,
        config.logits_factor,
        config.logits_softcap,
    )


def offsets(program: Program) -> dict[str, float]:
    """Own parameter name -> what its op adds to it, of the norms whose stored weights are distances from a constant."""
    found: dict[str, float] = {}
    for i, layer in enumerate(program.layers):
        for op in layer:
            norms = (op,) if isinstance(op, Norm) else (op.q, op.k) if isinstance(op, HeadNorm) else ()
            found |= {f"layers.{i}.{norm.name}.weight": norm.offset for norm in norms}
    found[f"{program.norm.name}.weight"] = program.norm.offset
    return {name: offset for name, offset in found.items() if offset}
