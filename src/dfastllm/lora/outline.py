"""What an adapter's directory says of itself, by its config and the header of its weights: no model, no tensor read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from dfastllm.errors import AdapterError, CheckpointError
from dfastllm.lora.config import read_config
from dfastllm.lora.keys import parse_key
from dfastllm.lora.read import weights_of
from dfastllm.quant.header import BYTES, read_header

__all__ = ["outline"]


def outline(directory: Path) -> dict[str, Any]:
    """base, rank, alpha, kind (what it is beside plain LoRA), layers (last words of their names), tensors, bytes
    (of the tensors, which is what it takes in memory). Raises AdapterError."""
    config = read_config(directory)
    file = weights_of(directory)
    try:
        header = read_header(file)
    except CheckpointError as error:
        raise AdapterError(error.message, hint="The file is damaged or incomplete.") from error
    kinds = {
        "DoRA": config.magnitudes,
        "rank-stabilised": config.rank_stabilised,
        "ranks by layer": bool(config.rank_pattern.values),
        f"biases ({config.bias})": config.bias != "none",
        f"whole {', '.join(config.saved)}": bool(config.saved),
    }
    return {
        "base": config.base,
        "rank": config.rank,
        "alpha": config.alpha,
        "kind": [name for name, has in kinds.items() if has],
        "layers": sorted({parse_key(name, str(file)).module.rpartition(".")[2] for name in header}),
        "tensors": len(header),
        "bytes": sum(math.prod(entry.shape) * BYTES.get(entry.dtype, 0) for entry in header.values()),
    }
