"""Linear layers and embeddings that train on the numbers they will be served with.

Off, a module computes what the plain one does, to the bit. On, its forward pass is the serving operation itself: the
weight is rounded by the function that the export uses, the inputs by `kernels.prepare`, and `kernels.linear` multiplies
the codes (the torch twins on another device, or without the native kernels). Its backward pass is straight-through
(Bengio et al. 2013, arXiv 1308.3432): rounding counts as the identity, so that

    gradient of the inputs  = gradient of y times the rounded weight
    gradient of the weight  = gradient of y, transposed, times the rounded inputs

- A weight that is clipped (further than half a step from its code, at an end of the range) gets only a gradient that
  leads it back: one that leads further out changes nothing but the next scale.
- Inputs are never clipped: their scales come from their largest magnitude.
- Scales follow from the weights at every step and get no gradient of their own.
- A weight that is not finite has no codes: its layer computes in float then, and NaN shows where it would without this.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_post_hook

from dfastllm.errors import CheckpointError
from dfastllm.kernels import linear as kernels
from dfastllm.kernels import linear_plain as plain
from dfastllm.kernels.activations import Acts, act_kind
from dfastllm.kernels.extension import native
from dfastllm.kernels.packed import GROUP, Packed, QTensor
from dfastllm.models.parts import Projection
from dfastllm.quant.formats import Format, quantise

__all__ = ["QatEmbedding", "QatHead", "QatLinear", "Rounded", "Rounding", "Switch"]


@dataclass(eq=False)
class Switch:
    """Whether the modules that share it round."""

    on: bool = False


@dataclass(frozen=True, eq=False)
class Rounded:
    """A weight as it is served. natural: codes and scales, as files hold them. read: what the products read, panels
    where the native kernels run, else `natural` itself."""

    natural: QTensor
    read: Packed | QTensor

    @staticmethod
    def of(natural: QTensor) -> Rounded:
        panels = native() is not None and natural.codes.device.type == "cpu"
        return Rounded(natural, kernels.pack(natural) if panels else natural)

    def prepare(self, x: Tensor) -> Acts:
        """x float32 [rows, k] contiguous, rounded as this format wants its inputs."""
        kind = act_kind(self.natural.format)
        return kernels.prepare(x, kind) if x.device.type == "cpu" else plain.prepare(x, kind)

    def product(self, x: Acts, bias: Tensor | None) -> Tensor:
        """float32 [rows, n]"""
        if x.data.device.type == "cpu":
            return kernels.linear(x, self.read, bias)
        return plain.linear(x, self.natural, bias)

    def allowed(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """gradient float32 [n, k] of the weight, without what would lead clipped weights further out."""
        natural = self.natural
        assert natural.scales is not None  # of a quantised form
        n, k = natural.shape
        size = GROUP.get(natural.format, k)
        step = natural.scales.float().abs().view(n, -1, 1)  # negative where the low end holds a positive extreme
        beyond = (weight.detach().float() - natural.dequantise()).view(n, -1, size)
        clipped = (beyond.abs() > step * (0.5 + 2**-9)) & (step > 0)  # a group of zeros has no step, and no range
        outward = clipped & (beyond * gradient.view(n, -1, size) < 0)  # the update is against the gradient
        return gradient.masked_fill(outward.view(n, k), 0.0)


@functools.cache
def _optimizer_steps() -> list[int]:
    """How many steps the optimizers of this process have made since this was first called: one number. torch counts the
    changes of a tensor (`_version`), but not those of its fused optimizers."""
    count = [0]

    def step(*_: object) -> None:
        count[0] += 1

    register_optimizer_step_post_hook(step)
    return count


class Rounding:
    """How one parameter is rounded. The result is kept until the parameter changes: by an operation in place (not one
    on `.data`, which nobody counts), or by any optimizer's step."""

    def __init__(self, format: Format, *, search: bool, name: str) -> None:
        self.format, self.search, self.name = format, search, name
        self._of: tuple[Tensor, tuple[int, ...]] | None = None
        self._made: Rounded | None = None
        _optimizer_steps()  # count from now on

    def quantise(self, weight: Tensor) -> QTensor:
        """Any rows [n, k] of the parameter, on its device: the codes of a row follow from that row alone. Raises
        CheckpointError for NaN and infinity."""
        return quantise(weight, self.format, search=self.search, name=self.name, device=weight.device)

    def of(self, weight: Tensor) -> Rounded | None:
        """None: the weight is not finite."""
        if weight.is_inference():  # has no count of its changes
            self.forget()
            return self._round(weight)
        state = (weight.data_ptr(), weight._version, *_optimizer_steps())
        if self._of is None or self._of[0] is not weight or self._of[1] != state:
            self._of, self._made = (weight, state), self._round(weight)
        return self._made

    def _round(self, weight: Tensor) -> Rounded | None:
        try:
            return Rounded.of(self.quantise(weight))
        except CheckpointError:  # only NaN and infinity are refused by that name
            return None

    def forget(self) -> None:
        self._of = self._made = None


class _Product(torch.autograd.Function):
    """y = rounded inputs times rounded weight, plus bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rounded: Rounded) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            acts = rounded.prepare(x.detach().reshape(-1, x.shape[-1]).float().contiguous())
            y = rounded.product(acts, None if bias is None else bias.detach().float().contiguous())
        ctx.save_for_backward(weight)
        ctx.acts, ctx.rounded, ctx.shape, ctx.dtype = acts, rounded, x.shape, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y.view(*x.shape[:-1], y.shape[1]).to(weight.dtype)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (weight,) = ctx.saved_tensors
        of_x = of_weight = of_bias = None
        with torch.autocast(gradient.device.type, enabled=False):
            flat = gradient.reshape(-1, gradient.shape[-1]).float()
            if ctx.needs_input_grad[0]:
                of_x = (flat @ ctx.rounded.natural.dequantise()).view(ctx.shape).to(ctx.dtype)
            if ctx.needs_input_grad[1]:
                of_weight = ctx.rounded.allowed(weight, flat.T @ ctx.acts.dequantise()).to(weight.dtype)
            if ctx.needs_input_grad[2]:
                of_bias = flat.sum(0).to(ctx.bias_dtype)
        return of_x, of_weight, of_bias, None


class _ShownAs(torch.autograd.Function):
    """Forward, other numbers; backward, the identity."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, shown: Tensor) -> Tensor:
        return shown.to(value.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, rounding: Rounding, factor: float) -> Tensor:
    """factor: what the engine multiplies the inputs by before it rounds them, and the caller the outputs by (a model's
    logits_factor)."""
    rounded = rounding.of(weight)
    if rounded is None:
        return F.linear(x, weight, bias)
    if factor == 1:
        return _Product.apply(x, weight, bias, rounded)  # type: ignore[no-untyped-call, no-any-return]
    return _Product.apply(x * factor, weight, bias, rounded) / factor  # type: ignore[no-untyped-call, no-any-return]


class QatLinear(Projection):
    """A linear layer [n, k] in place of `linear`, with its very parameters. Rounds where `switch` is on."""

    def __init__(self, linear: nn.Linear, rounding: Rounding, switch: Switch, *, factor: float = 1.0) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.rounding, self.switch, self.factor = rounding, switch, factor

    def forward(self, x: Tensor) -> Tensor:
        """x [..., k] -> [..., n]"""
        if not self.switch.on:
            return super().forward(x)
        return _product(x, self.weight, self.bias, self.rounding, self.factor)


class QatEmbedding(nn.Embedding):
    """An embedding in place of `embed`, with its very parameter. On, its rows are those of the rounded matrix.

    whole: the matrix is rounded as a whole anyway, being the head's too; else only the rows that are looked up are.
    """

    def __init__(self, embed: nn.Embedding, rounding: Rounding, switch: Switch, *, whole: bool) -> None:
        super().__init__(embed.num_embeddings, embed.embedding_dim, _weight=embed.weight.detach())
        self.weight = embed.weight
        self.rounding, self.switch, self.whole = rounding, switch, whole

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] int64 -> [..., k]"""
        rows = super().forward(ids)
        if not self.switch.on:
            return rows
        flat = ids.reshape(-1)
        if self.whole:
            rounded = self.rounding.of(self.weight)
            found = None if rounded is None else rounded.natural.rows(flat).dequantise()
        else:
            used, place = torch.unique(flat, return_inverse=True)
            weight = self.weight.detach()[used]
            finite = bool(weight.isfinite().all())
            found = self.rounding.quantise(weight).dequantise()[place] if finite and len(used) else None
        if found is None:
            return rows
        return _ShownAs.apply(rows, found.view(rows.shape))  # type: ignore[no-untyped-call, no-any-return]


class QatHead(nn.Module):
    """The head of a model that ties it to its embedding. Holds no parameter of its own."""

    def __init__(self, embed: QatEmbedding, *, factor: float = 1.0) -> None:
        super().__init__()
        self._embed = (embed,)  # in a tuple: not a child, whose parameter would get a second name
        self.switch, self.factor = embed.switch, factor

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden] -> [..., vocabulary]"""
        embed = self._embed[0]
        if not self.switch.on:
            return F.linear(x, embed.weight)
        return _product(x, embed.weight, None, embed.rounding, self.factor)
