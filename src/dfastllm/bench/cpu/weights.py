"""Random weights of a real shape in our packed formats."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from dfastllm.kernels.packed import QTensor
from dfastllm.models import Decoder, PackedDecoder, pack_decoder
from dfastllm.models.basis import basis_of
from dfastllm.models.checkpoint import quantisable
from dfastllm.quant import find_format, quantise

__all__ = ["EIGHT", "packed"]

EIGHT = "w8r"  # what "8bit" means for the shapes of the records


def packed(model: Decoder, quantization: str | None) -> PackedDecoder:
    """As `assemble.pack`, in a fraction of the time: random weights are rounded to nearest instead of searching each
    scale, which a kernel's speed does not depend on. None, and bf16 of a model in bfloat16: the model's own dtype.
    Raises ValidationError for an unknown format."""
    if quantization == "bf16" and model.dtype == torch.bfloat16:
        quantization = None
    matrices = {*quantisable(model), "lm_head.weight"}
    chosen = None if quantization is None else find_format(quantization, "quantization")
    given: Iterable[tuple[str, Tensor]] = ((name, parameter.detach()) for name, parameter in model.named_parameters())
    basis = None
    if chosen is not None and chosen.turned:
        basis = basis_of(model.program, model.info.name, tied=model.config.tied)
        given = basis.turned(given)

    def parts() -> Iterator[tuple[str, QTensor | Tensor]]:
        for name, value in given:
            if chosen is None or name not in matrices:
                yield name, value
                continue
            outer = name in ("embed.weight", "lm_head.weight")
            form = find_format(chosen.head) if outer and chosen.head else chosen
            yield name, quantise(value, form, search=False, name=name)

    kv = model.dtype if quantization is None else torch.bfloat16
    return pack_decoder(model.config, model.info, parts(), kv, basis=basis)
