"""Small random checkpoints with a byte tokenizer that group formats fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from dfastllm.models import save, tiny, tiny_config
from tests.kit.cli_models import write_tokenizer

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 260, "max_len": 256}


def grouped(family: str) -> dict[str, Any]:
    """The sizes of `SIZES` for a family, and experts that groups of 32 divide."""
    moe = tiny_config(family).moe
    if moe is None:
        return SIZES
    return {**SIZES, "moe": replace(moe, intermediate_size=32, shared_size=32 if moe.shared_size else 0)}


def write_tiny(directory: Path, family: str = "llama", **overrides: Any) -> Path:
    ids = write_tokenizer(directory)
    return save(tiny(family, ids=ids, **{**SIZES, **overrides}), directory)
