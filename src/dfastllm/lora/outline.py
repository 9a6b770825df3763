"""What an adapter's directory says of itself, by its config and the header of its weights: no model, no tensor read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dfastllm.errors import AdapterError
from dfastllm.lora.config import CONFIG_FILE, read_config
from dfastllm.lora.read import WEIGHTS_FILE

__all__ = ["outline"]


def outline(directory: Path) -> dict[str, Any]:
    """base, rank, alpha, kind (what it is beside plain LoRA), layers (last words of their names), tensors, bytes.
    Raises AdapterError."""
    config = read_config(directory)
    raw = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    file = directory / WEIGHTS_FILE
    names: set[str] = set()
    count = 0
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (it is no dict)
                count += 1
                words = [
                    word for word in name.split(".") if not word.startswith(("lora_", "weight", "bias", "default"))
                ]
                names.add(words[-1])
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{file} cannot be read: {error}.") from error
    kinds = {
        "DoRA": config.magnitudes,
        "rank-stabilised": config.rank_stabilised,
        "ranks by layer": bool(config.rank_pattern),
        f"biases ({config.bias})": config.bias != "none",
        f"whole {', '.join(config.saved)}": bool(config.saved),
    }
    return {
        "base": str(raw.get("base_model_name_or_path") or ""),
        "rank": config.rank,
        "alpha": config.alpha,
        "kind": [name for name, has in kinds.items() if has],
        "layers": sorted(names),
        "tensors": count,
        "bytes": file.stat().st_size,
    }
