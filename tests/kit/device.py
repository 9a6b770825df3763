"""Models on a device for tests: on a card where there is one, else on the CPU, by the twins or, where Triton is
installed, by the kernels under its interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dfastllm.engine.runners.triton import TritonRunner
from dfastllm.kernels.triton.ops import TWINS, Ops, ops_for, triton_problem
from dfastllm.models import Decoder, DeviceDecoder, device_decoder

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NO_TRITON = triton_problem(DEVICE)
# Triton's interpreter takes about a second for a step of a small model: what runs there must be little.
KINDS = ["twins", pytest.param("kernels", marks=pytest.mark.skipif(NO_TRITON is not None, reason=str(NO_TRITON)))]


def ops_of(kind: str) -> Ops:
    """twins or kernels."""
    return ops_for(DEVICE, twins=frozenset(TWINS) if kind == "twins" else None)


def placed(model: Decoder, quantization: str | None = None, **more: Any) -> DeviceDecoder:
    """As `assemble.place`, without triton too."""
    from dfastllm import assemble

    if NO_TRITON is None:
        return assemble.place(model, quantization, device=DEVICE, **more)
    assert quantization is None
    parts = ((name, parameter.detach()) for name, parameter in model.named_parameters())
    return device_decoder(model.config, model.info, parts, model.dtype, DEVICE, **more)


def runner_of(
    model: Decoder,
    kind: str,
    slots: int,
    quantization: str | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    **more: Any,
) -> TritonRunner:
    """A runner of the model with small buckets."""
    limits = {"max_rows": 128, "max_spans": 32, **more}
    return TritonRunner(placed(model, quantization), slots, dtype, 16, ops=ops_of(kind), **limits)
