"""Statistics of the inputs of linear layers, recorded by forward hooks while somebody runs the model.

Does not know models, data or formats: it sees `nn.Linear` modules and the rows that pass through them. Two layers that
read the very same tensor (q, k, v; gate, up) share one statistic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

__all__ = ["InputStatistics", "recording"]


@dataclass(eq=False)
class InputStatistics:
    """rows: seen so far. square [k] float64: sum of squares of each input. gram [k, k] float32: sum of outer products,
    None where it was not asked for."""

    rows: int
    square: Tensor
    gram: Tensor | None = None

    @staticmethod
    def empty(k: int, *, gram: bool) -> InputStatistics:
        return InputStatistics(0, torch.zeros(k, dtype=torch.float64), torch.zeros(k, k) if gram else None)

    def add(self, x: Tensor) -> None:
        """x [..., k] of any float dtype."""
        flat = x.detach().reshape(-1, x.shape[-1]).to("cpu", torch.float32)
        self.rows += len(flat)
        self.square += flat.square().sum(0, dtype=torch.float64)
        if self.gram is not None:
            self.gram.addmm_(flat.T, flat)

    @property
    def importance(self) -> Tensor | None:
        """Mean square of each input [k] float32; None when no row was seen (an expert that calibration never chose)."""
        return (self.square / self.rows).float() if self.rows else None


@dataclass(eq=False)
class _Last:
    """The tensor that the last hook saw and where it was counted: held, so that its identity cannot be reused."""

    x: Tensor | None = None
    statistics: InputStatistics | None = None
    owners: dict[str, InputStatistics] = field(default_factory=dict)


@contextmanager
def recording(modules: Mapping[str, nn.Linear], *, gram: bool = False) -> Iterator[dict[str, InputStatistics]]:
    """Record the inputs of these modules while the block runs. The dictionary has an entry per name once its module
    ran; `gram` also collects what GPTQ needs, k * k floats for each distinct input."""
    last = _Last()

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def seen(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            known = last.owners.get(name)
            if last.x is x and last.statistics is not None and (known is None or known is last.statistics):
                last.owners[name] = last.statistics  # the same rows as the module before: counted already
                return
            if known is None:
                known = last.owners[name] = InputStatistics.empty(x.shape[-1], gram=gram)
            known.add(x)
            last.x, last.statistics = x, known

        return seen

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        yield last.owners
    finally:
        for handle in handles:
            handle.remove()
