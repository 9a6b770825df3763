"""The decoder over packed weights: what serves on a CPU, quantised or not.

The same wiring as `decoder`, without modules or gradients: weights are panels (kernels.packed), q, k, v and gate, up
are fused, the residual stream is float32, and K,V are written and read by the kernels themselves. `forward` is one
native call; without the native kernels, the same operations one by one through their torch twins.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dfastllm.core import ModelInfo
from dfastllm.errors import CheckpointError, UnsupportedError, ValidationError
from dfastllm.kernels import attention, linear
from dfastllm.kernels.activations import Acts, act_kind
from dfastllm.kernels.extension import native
from dfastllm.kernels.kv import KV_TYPES, KvCache
from dfastllm.kernels.packed import PANEL, Packed, QTensor
from dfastllm.kernels.step import Step
from dfastllm.models.config import DecoderConfig
from dfastllm.models.decoder import Decoder
from dfastllm.models.parts import inverse_frequencies
from dfastllm.models.program import RopeTable

__all__ = ["PackedDecoder", "Weights", "pack_decoder"]

HALF = PANEL // 2  # a panel of gate_up holds so many channels of each


@dataclass(frozen=True, eq=False)
class Weights:
    """A linear layer: packed matrix and float32 bias (gate_up: in panel order, padded to whole panels)."""

    packed: Packed
    bias: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + (0 if self.bias is None else self.bias.nbytes)


@dataclass(frozen=True, eq=False)
class PackedLayer:
    """qkv: one matrix, or q, k and v when their formats differ; norms float32."""

    attn_norm: Tensor
    mlp_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    qkv: tuple[Weights, ...]
    o: Weights
    gate_up: Weights
    down: Weights

    @property
    def linears(self) -> tuple[Weights, ...]:
        return (*self.qkv, self.o, self.gate_up, self.down)


@dataclass(eq=False)
class PackedDecoder:
    """A model ready to serve on the CPU. Made by `pack_decoder`.

    head is None when it is tied to the embedding: `embed` is then used for both. dtype: what the floating-point weights
    were stored in, and so the default of the K,V pages. notes: what was converted at load, for people.
    """

    config: DecoderConfig
    info: ModelInfo
    dtype: torch.dtype
    embed: Packed
    norm: Tensor
    layers: tuple[PackedLayer, ...]
    head: Packed | None = None
    notes: list[str] = field(default_factory=list)
    _native: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        table = RopeTable(self.config.rope_theta, self.config.rotary_dim, self.config.rope_scaling)
        self._frequencies, self._rope_factor = inverse_frequencies(table)

    @property
    def head_weights(self) -> Packed:
        return self.head or self.embed

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        norms = [t for la in self.layers for t in (la.attn_norm, la.mlp_norm, la.q_norm, la.k_norm) if t is not None]
        matrices = sum(w.nbytes for la in self.layers for w in la.linears)
        head = self.head.nbytes if self.head else 0
        return self.embed.nbytes + head + matrices + sum(t.nbytes for t in norms) + self.norm.nbytes

    @property
    def formats(self) -> dict[str, int]:
        """Format -> how many matrices are held in it."""
        matrices = [self.embed, *([self.head] if self.head else [])]
        matrices += [w.packed for la in self.layers for w in la.linears]
        return {f: sum(m.format == f for m in matrices) for f in sorted({m.format for m in matrices})}

    def forward(self, step: Step, cache: KvCache, own: KvCache) -> Tensor:
        """Hidden float32 [wanted, hidden] after the final norm. Writes the K,V of `step.slot` into `cache` (all layers)
        and those of `step.own_slot` into `own` (one layer, used by each in turn)."""
        if native() is not None:
            return self._run_native(step, cache, own)
        return self._run_plain(step, cache, own)

    def _run_plain(self, step: Step, cache: KvCache, own: KvCache) -> Tensor:
        config = self.config
        x = linear.weight_rows(self.embed, torch.from_numpy(step.ids).long())
        angles = torch.from_numpy(step.positions).float()[:, None] * self._frequencies
        cos, sin = angles.cos() * self._rope_factor, angles.sin() * self._rope_factor
        want = torch.from_numpy(step.want).long()
        for i, layer in enumerate(self.layers):
            qkv = torch.cat([linear.linear(self._in(x, w, layer.attn_norm), w.packed, w.bias) for w in layer.qkv], 1)
            kv = cache.layer(i), own.layer(0)
            attention.rope_store(
                qkv, cos, sin, step, *kv,
                heads=config.heads, q_norm=layer.q_norm, k_norm=layer.k_norm, eps=config.norm_eps,
            )  # fmt: skip
            mixed = attention.attention(qkv, step, *kv, heads=config.heads)
            if layer is self.layers[-1]:  # what follows is only looked at in the wanted rows
                x, mixed = x[want], mixed[want]
            linear.linear(self._in(mixed, layer.o), layer.o.packed, layer.o.bias, accumulate=x)
            width, kind = layer.down.packed.k, act_kind(layer.down.packed.format)
            up = layer.gate_up
            h = linear.linear_swiglu(self._in(x, up, layer.mlp_norm), up.packed, up.bias, kind=kind, width=width)
            linear.linear(h, layer.down.packed, layer.down.bias, accumulate=x)
        return linear.prepare(x, "f32", norm=self.norm, eps=config.norm_eps).dequantise()

    def _in(self, x: Tensor, weights: Weights, norm: Tensor | None = None) -> Acts:
        return linear.prepare(x, act_kind(weights.packed.format), norm=norm, eps=self.config.norm_eps)

    def _run_native(self, step: Step, cache: KvCache, own: KvCache) -> Tensor:
        if cache.type not in self._native:
            self._native[cache.type] = self._compile(cache)
        out = torch.empty(len(step.want), self.config.hidden_size)

        try:
            self._native[cache.type].run(step.native(), cache.native(), own.native(), out.numpy())
        except ValueError as error:
            raise ValidationError(str(error), param="step") from error
        return out

    def _compile(self, cache: KvCache) -> Any:
        config = self.config
        return native().Forward(
            hidden=config.hidden_size,
            heads=config.heads,
            kv_heads=config.kv_heads,
            dim=config.head_dim,
            rotary=config.rotary_dim,
            eps=config.norm_eps,
            rope_factor=self._rope_factor,
            frequencies=self._frequencies.data_ptr(),
            kv_type=list(KV_TYPES).index(cache.type),
            embed=linear.describe(self.embed),
            norm=self.norm.data_ptr(),
            layers=[
                (
                    layer.attn_norm.data_ptr(),
                    layer.mlp_norm.data_ptr(),
                    0 if layer.q_norm is None else layer.q_norm.data_ptr(),
                    0 if layer.k_norm is None else layer.k_norm.data_ptr(),
                    [linear.describe(w.packed, w.bias) for w in layer.qkv],
                    *(linear.describe(w.packed, w.bias) for w in (layer.o, layer.gate_up, layer.down)),
                )
                for layer in self.layers
            ],
        )


Value = QTensor | Tensor
Quantise = Callable[[str, Value], Value]  # own name of a parameter, as stored -> as it shall be kept


def pack_decoder(
    config: DecoderConfig,
    info: ModelInfo,
    parts: Iterable[tuple[str, Value]],
    dtype: torch.dtype,
    *,
    tied: bool | None = None,
    notes: list[str] | None = None,
) -> PackedDecoder:
    """Build from a stream of (parameter name as in `Decoder`, matrix or vector); each layer is packed as soon as it is
    complete, so that no more than about one layer is held in both forms. Floating-point matrices become float32 or
    bfloat16 panels.

    Raises UnsupportedError for a mixture of experts, CheckpointError for a missing, surplus or mis-shaped parameter or
    one that is not finite.
    """
    if config.moe is not None:
        raise UnsupportedError(f"{info.name} is a mixture of experts, which has no packed form yet.", param="model")
    wanted = _shapes(config, info)
    waiting: dict[int | None, dict[str, Value]] = {}
    count = {place: sum(_place(n) == place for n in wanted) for place in {_place(n) for n in wanted}}
    layers: dict[int, PackedLayer] = {}
    seen: set[str] = set()
    for name, value in parts:
        if name not in wanted or name in seen:
            raise CheckpointError(f"unexpected parameter {name}.")
        if tuple(value.shape) != wanted[name]:
            raise CheckpointError(f"{name} has shape {list(value.shape)}, wanted {list(wanted[name])}.")
        seen.add(name)
        place = _place(name)
        group = waiting.setdefault(place, {})
        group[name.removeprefix(f"layers.{place}.")] = _finite(name, value)
        if place is not None and len(group) == count[place]:
            layers[place] = _layer(config, group)
            del waiting[place], group
    missing = sorted(wanted.keys() - seen)
    if missing:
        raise CheckpointError(f"missing parameter(s) {', '.join(missing[:8])}{' ...' if len(missing) > 8 else ''}.")
    outer = waiting[None]
    return PackedDecoder(
        config=config,
        info=info,
        dtype=dtype,
        embed=_pack(outer["embed.weight"]),
        norm=_vector(outer["norm.weight"]),
        layers=tuple(layers[i] for i in range(config.layers)),
        head=None if config.tied else _pack(outer["lm_head.weight"]),
        notes=notes or [],
    )


def _shapes(config: DecoderConfig, info: ModelInfo) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in Decoder(config, info).named_parameters()}


def _place(name: str) -> int | None:
    """The layer a parameter belongs to, None: none."""
    found = re.match(r"layers\.(\d+)\.", name)
    return int(found[1]) if found else None


def _finite(name: str, value: Value) -> Value:
    floats = [value] if isinstance(value, Tensor) else [value.scales, value.mins]
    if isinstance(value, QTensor) and value.scales is None:
        floats = [value.codes]
    if not all(bool(torch.isfinite(t).all()) for t in floats if t is not None):
        raise CheckpointError(
            f"{name} holds values that are not finite (NaN or infinity).", hint="The file is damaged."
        )
    return value


def _layer(config: DecoderConfig, parts: dict[str, Value]) -> PackedLayer:
    def norm(name: str) -> Tensor | None:
        return _vector(parts[name]) if name in parts else None

    def bias(*names: str) -> list[Tensor | None]:
        return [_vector(parts[n]) if n in parts else None for n in names]

    names = ["attn.q_proj", "attn.k_proj", "attn.v_proj"]
    matrices = [_matrix(parts[f"{n}.weight"]) for n in names]
    biases = bias(*(f"{n}.bias" for n in names))
    gate, up = (_matrix(parts[f"mlp.{n}_proj.weight"]) for n in ("gate", "up"))
    attn_norm, mlp_norm = norm("attn_norm.weight"), norm("mlp_norm.weight")
    assert attn_norm is not None
    assert mlp_norm is not None
    return PackedLayer(
        attn_norm=attn_norm,
        mlp_norm=mlp_norm,
        q_norm=norm("attn.q_norm.weight"),
        k_norm=norm("attn.k_norm.weight"),
        qkv=_side_by_side(matrices, biases),
        o=Weights(_pack(parts["attn.o_proj.weight"]), *bias("attn.o_proj.bias")),
        gate_up=_interleaved(gate, up, bias("mlp.gate_proj.bias", "mlp.up_proj.bias")),
        down=Weights(_pack(parts["mlp.down_proj.weight"]), *bias("mlp.down_proj.bias")),
    )


def _side_by_side(matrices: list[QTensor], biases: Sequence[Tensor | None]) -> tuple[Weights, ...]:
    if len({_kind(m) for m in matrices}) > 1:
        return tuple(Weights(linear.pack(m), b) for m, b in zip(matrices, biases, strict=True))
    whole = None
    if any(b is not None for b in biases):
        whole = torch.cat([torch.zeros(m.shape[0]) if b is None else b for m, b in zip(matrices, biases, strict=True)])
    return (Weights(linear.pack(QTensor.stack(matrices)), whole),)


def _interleaved(gate: QTensor, up: QTensor, biases: Sequence[Tensor | None]) -> Weights:
    """Panels of 32 gate channels and the same 32 of up; channels beyond the last are zero weights."""
    if _kind(gate) != _kind(up):  # files mix formats by layer, hardly ever inside one MLP
        gate, up = (QTensor("f32", m.dequantise()) for m in (gate, up))
    n = gate.shape[0]
    panels = -(-n // HALF)
    both = QTensor.stack([gate.padded(panels * HALF), up.padded(panels * HALF)])
    order = torch.arange(2 * panels * HALF).view(2, panels, HALF).transpose(0, 1).reshape(-1)
    packed = linear.pack(both.rows(order))
    bias = None
    if any(b is not None for b in biases):
        full = torch.zeros(2, panels * HALF)
        for row, b in zip(full, biases, strict=True):
            if b is not None:
                row[:n] = b
        bias = full.view(-1)[order].contiguous()
    return Weights(packed, bias)


def _kind(matrix: QTensor) -> tuple[str, bool]:
    return matrix.format, matrix.mins is not None


def _vector(value: Value) -> Tensor:
    tensor = value if isinstance(value, Tensor) else value.dequantise()
    return tensor.float().contiguous()


def _matrix(value: Value) -> QTensor:
    if isinstance(value, QTensor):
        return value
    return QTensor("bf16", value) if value.dtype == torch.bfloat16 else QTensor("f32", value.float())


def _pack(value: Value) -> Packed:
    return linear.pack(_matrix(value))
