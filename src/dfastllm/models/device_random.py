"""Random weights made on the device: real shapes in seconds, for measuring speed and memory. Their texts mean
nothing."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dfastllm.core import ModelInfo
from dfastllm.kernels.packed import FORMS, QTensor
from dfastllm.models.checkpoint import quantisable, skeleton
from dfastllm.models.config import DecoderConfig
from dfastllm.models.device import DeviceDecoder, device_decoder
from dfastllm.quant.formats import FORMATS, find_format

__all__ = ["random_decoder"]

DEVIATION = 0.02
SPREAD = {"w8": 73.0, "w8g": 73.0, "w6g": 18.5, "w4g": 4.6}  # deviation of codes that are equally likely
CODES = {"w8": (-127, 128), "w8g": (-127, 128), "w6g": (0, 64), "w4g": (0, 16)}


def random_decoder(
    config: DecoderConfig,
    info: ModelInfo,
    device: torch.device,
    dtype: torch.dtype,
    *,
    quantization: str | None = None,
    seed: int = 0,
    invariant: bool = False,
) -> DeviceDecoder:
    """A model with random weights of a format (None: floats of `dtype`; fp8), the same for the same seed on the same
    kind of device: deviation 0.02, norms 1, biases 0. Raises ValidationError for a format that there is not."""
    fp8 = quantization == "fp8"
    chosen = None if fp8 or quantization is None else find_format(quantization, "quantization")
    model = skeleton(config, info, dtype)
    matrices, draw = set(quantisable(model)), torch.Generator(device).manual_seed(seed)

    def parts() -> Iterator[tuple[str, QTensor | Tensor]]:
        for name, parameter in model.named_parameters():
            shape = tuple(parameter.shape)
            if len(shape) == 1:
                module = model.get_submodule(name.rpartition(".")[0])
                value = 0.0 if name.endswith("bias") else 1.0 - getattr(module, "offset", 0.0)
                yield name, torch.full(shape, value)
            elif chosen is None or name not in matrices:
                values = torch.randn(shape, generator=draw, device=device, dtype=dtype)
                yield name, values.mul_(DEVIATION)
            else:
                outer = name in ("embed.weight", "lm_head.weight")
                form = FORMATS[chosen.head] if outer and chosen.head else chosen
                yield name, _codes(form.kind, shape, draw, mins=form.grid.minimum)

    made = device_decoder(config, info, parts(), dtype, device, fp8=fp8, invariant=invariant)
    made.seed = seed
    return made


def _codes(kind: str, shape: tuple[int, ...], draw: torch.Generator, *, mins: bool) -> QTensor:
    """A matrix of equally likely codes; w4s, which a device holds as w8, is that."""
    kind = kind if kind in CODES else "w8"
    n, k = shape
    form, device = FORMS[kind], draw.device
    low, high = CODES[kind]
    codes = torch.randint(low, high, (n, k), generator=draw, device=device, dtype=form.codes)
    scale = DEVIATION / SPREAD[kind]
    if not form.group:
        return QTensor(kind, codes, torch.full((n,), scale, device=device))
    scales = torch.full((n, k // form.group), scale, dtype=torch.float16, device=device)
    middle = (low + high - 1) / 2
    return QTensor(kind, codes, scales, scales * middle if mins else None)
