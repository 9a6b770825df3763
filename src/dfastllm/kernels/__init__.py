"""The table op -> implementation, with the reason each was chosen. Native kernels register here; today every op runs
its plain torch twin. Knows tensors only: no models, no engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dfastllm.kernels.attention import span_attention

__all__ = ["OpChoice", "span_attention", "table"]


@dataclass(frozen=True, slots=True)
class OpChoice:
    """One row of `dfastllm doctor`: which implementation an op uses on this machine, and why."""

    op: str
    implementation: str
    reason: str


def table() -> list[OpChoice]:
    """Every dispatched op, in order of name."""
    import torch

    backend = "oneDNN/MKL" if torch.backends.mkl.is_available() else "torch native"  # type: ignore[no-untyped-call]
    why = "no native kernel is built into this version"
    return [
        OpChoice("linear", f"torch.nn.functional.linear ({backend})", why),
        OpChoice("rms_norm", "torch eager, float32 accumulation", why),
        OpChoice("rope", "torch eager, float32 tables", why),
        OpChoice("span_attention", "torch scaled_dot_product_attention per span", why),
    ]


def __getattr__(name: str) -> object:
    if name == "span_attention":
        from dfastllm.kernels.attention import span_attention

        return span_attention
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
