"""A trained model as a quantised checkpoint: the Hugging Face directory that `dfastllm quantize` would write of it.

Codes and scales are given; everything else keeps the dtype it was trained in.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from dfastllm.errors import ModelLoadError
from dfastllm.kernels.packed import QTensor
from dfastllm.models.checkpoint import config_json
from dfastllm.models.decoder import Decoder
from dfastllm.models.family import find_family
from dfastllm.options import generation_config
from dfastllm.quant.checkpoint import QuantConfig, tensors_of
from dfastllm.quant.partial import place
from dfastllm.quant.stream import Planned, SafetensorsWriter

__all__ = ["write_quantised"]


def write_quantised(
    model: Decoder,
    weights: Mapping[str, QTensor],
    config: QuantConfig,
    out: Path,
    files: Iterable[str | Path] = (),
    *,
    shard_bytes: int = 5 * 10**9,
) -> Path:
    """Write `model` with these matrices (own names) in place of its own; returns `out`, whose earlier weights are
    replaced. files: copied beside them (a tokenizer's). config.json comes last: without it a half-written directory is
    no model. Raises ModelLoadError for a file that is not there, StorageError where something cannot be written."""
    copied = {Path(file).name: Path(file) for file in files}
    missing = [str(file) for file in copied.values() if not file.is_file()]
    if missing:
        raise ModelLoadError(f"{', '.join(missing)}: no such file to copy beside the weights.", param="files")
    published = find_family(model.info.family).names.published
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors |= tensors_of(published(name), weights[name]) if name in weights else {published(name): parameter}
    plan = {name: Planned(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with SafetensorsWriter(out, plan, shard_bytes=shard_bytes) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    for name, file in copied.items():
        place(out / name, file.read_bytes())
    if model.info.defaults:
        place(out / "generation_config.json", _json(generation_config(model.info.defaults)))
    place(out / "config.json", _json({**config_json(model), "quantization_config": config.to_json()}))
    return out


def _json(value: Mapping[str, object]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
